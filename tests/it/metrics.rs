//! The metrics and health port of the real program: every number is fed, and the answers are etcd's.
//!
//! The list of names is golden (`UPDATE_EXPECT=1` writes it anew): a name on somebody's dashboard must not vanish by
//! accident.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use etcd_client::{
    AlarmAction, AlarmType, Certificate, Client, Compare, CompareOp, ConnectOptions, Identity,
    LeaseGrantOptions, TlsOptions, Txn, TxnOp, WatchOptions,
};
use expect_test::expect_file;
use tempfile::TempDir;

/// Said once by every start.
const READY: &str = "ready, serving etcd clients on";

/// Far longer than anything here takes, even on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(5);

/// The program with one voter, on ports and data of its own. Killed by its process id when dropped.
struct Server {
    child: Child,
    dir: TempDir,
    ports: [u16; 3],
    /// Names that were not zero in any scrape.
    moved: BTreeSet<String>,
    starts: usize,
}

impl Drop for Server {
    #[allow(
        clippy::print_stderr,
        reason = "the test has failed; what the server said may tell why"
    )]
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("--- its output:\n{}", output(self.dir.path()));
        }
    }
}

fn output(dir: &Path) -> String {
    fs::read_to_string(dir.join("log")).unwrap_or_default()
}

fn launch(dir: &Path, [client, metrics, peer]: [u16; 3]) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_k3s-server"));
    command.env_clear().arg("server").arg("--config").arg(dir.join("config.yaml"));
    for (flag, port) in
        [("--client-listen", client), ("--metrics-listen", metrics), ("--peer-listen", peer)]
    {
        command.arg(flag).arg(format!("127.0.0.1:{port}"));
    }
    let log = Stdio::from(log);
    command.arg("--db-dir").arg(dir.join("db"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.yaml"), "").unwrap();
        // Held together until all are known, so that they differ.
        let held = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = held.each_ref().map(|listener| listener.local_addr().unwrap().port());
        drop(held);
        let child = launch(dir.path(), ports);
        let mut server = Self { child, dir, ports, moved: BTreeSet::new(), starts: 0 };
        server.wait_until_ready();
        server
    }

    /// Answers, and has told the cluster of this start: nothing of its own is under way that a test would count.
    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        self.starts += 1;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended with {status}:\n{}", output(self.dir.path()));
            }
            let settled = output(self.dir.path()).matches(READY).count() == self.starts;
            if settled && self.try_get("/readyz").is_some_and(|(status, _)| status == 200) {
                return;
            }
            assert!(Instant::now() < deadline, "never ready:\n{}", output(self.dir.path()));
            thread::sleep(POLL);
        }
    }

    /// SIGKILL. It may have ended already.
    fn kill(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }

    fn restart(&mut self) {
        self.kill();
        self.child = launch(self.dir.path(), self.ports);
        self.wait_until_ready();
    }

    fn try_get(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.ports[1])).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: pi\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        let (head, body) = reply.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }

    /// Status and body.
    fn get(&self, path: &str) -> (u16, String) {
        self.try_get(path).unwrap_or_else(|| panic!("no answer to {path}"))
    }

    fn scrape(&mut self) -> Page {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let page = Page::parse(text);
        let moved = page.samples.iter().filter(|(_, value)| 0.0 < **value);
        self.moved.extend(moved.map(|(sample, _)| page.name_of(sample).to_owned()));
        page
    }

    /// Scrapes until a condition holds; for numbers that follow what a client sees a moment later.
    fn until(&mut self, what: &str, holds: impl Fn(&Page) -> bool) -> Page {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let page = self.scrape();
            if holds(&page) {
                return page;
            }
            assert!(Instant::now() < deadline, "never: {what}\n{}", page.text);
            thread::sleep(POLL);
        }
    }

    async fn connect(&self) -> Client {
        let read = |name| fs::read(self.dir.path().join("db/tls").join(name)).unwrap();
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read("ca.crt")))
            .identity(Identity::from_pem(read("client.crt"), read("client.key")));
        let options = ConnectOptions::new().with_tls(tls).with_timeout(PATIENCE);
        let url = format!("https://127.0.0.1:{}", self.ports[0]);
        Client::connect([url], Some(options)).await.unwrap()
    }
}

/// What `/metrics` said.
struct Page {
    text: String,
    /// `name{labels}` to value.
    samples: BTreeMap<String, f64>,
    /// Names as in `# TYPE`, and their types.
    types: BTreeMap<String, String>,
}

impl Page {
    fn parse(text: String) -> Self {
        let mut samples = BTreeMap::new();
        let mut types = BTreeMap::new();
        for line in text.lines() {
            if let Some(line) = line.strip_prefix("# TYPE ") {
                let (name, kind) = line.split_once(' ').unwrap();
                assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "twice: {name}");
            } else if !line.starts_with('#') {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                let before = samples.insert(sample.to_owned(), value.parse().unwrap());
                assert!(before.is_none(), "twice: {sample}");
            }
        }
        assert!(text.ends_with("# EOF\n"), "cut off:\n{text}");
        Self { text, samples, types }
    }

    /// The metric that a sample belongs to.
    fn name_of<'s>(&self, sample: &'s str) -> &'s str {
        let name = sample.split('{').next().unwrap();
        if self.types.contains_key(name) {
            return name;
        }
        name.rsplit_once('_').unwrap().0
    }

    fn value(&self, sample: &str) -> f64 {
        *self.samples.get(sample).unwrap_or_else(|| panic!("no `{sample}` in\n{}", self.text))
    }

    /// How much a sample has grown.
    fn since(&self, before: &Self, sample: &str) -> f64 {
        self.value(sample) - before.value(sample)
    }

    /// Names and types, as the golden file has them.
    fn names(&self) -> String {
        self.types.iter().map(|(name, kind)| format!("{kind} {name}\n")).collect()
    }
}

/// Bytes that no compression makes smaller.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| next()).collect()
}

/// What stays at zero while nothing goes wrong, or for the first ten minutes. Everything else must have moved in this
/// file. That a scrub counts is tested where it is made, that a full card shows in `mvcc::full_tests`.
const QUIET: [&str; 13] = [
    "etcd_server_is_learner",
    "etcd_server_proposals_failed",
    "etcd_server_read_indexes_failed",
    "etcd_server_slow_apply",
    "etcd_server_slow_read_indexes",
    "k3s_server_checkpoints_failed",
    "k3s_server_scrub_completed",
    "k3s_server_scrub_damaged",
    "k3s_server_scrub_last_timestamp_seconds",
    "k3s_server_scrub_read_bytes",
    "k3s_server_scrub_running",
    "k3s_server_store_starved",
    "k3s_server_wal_fill_failures",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_number_moves_when_what_it_counts_happens() {
    let mut server = Server::start();
    let mut client = server.connect().await;
    keys(&mut server, &mut client).await;
    barriers(&mut server, &mut client).await;
    watchers(&mut server, &mut client).await;
    leases(&mut server, &mut client).await;
    connections(&mut server);
    alarms(&mut server, &mut client).await;
    assert_eq!(server.get("/health").0, 200);
    checkpoint_and_slow_watcher(&mut server, &mut client).await;
    drop(client);

    let page = server.until("all connections but this one closed", |page| {
        page.value("k3s_server_connections_open") == 1.0
    });
    let names: BTreeSet<_> = page.types.keys().map(String::as_str).collect();
    let still: Vec<_> = names
        .iter()
        .filter(|name| !server.moved.contains(**name) && !QUIET.contains(name))
        .collect();
    assert!(still.is_empty(), "never moved: {still:?}\n{}", page.text);
    assert!(QUIET.iter().all(|name| names.contains(name)), "{}", page.text);
    expect_file![concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics.txt")]
        .assert_eq(&page.names());
}

async fn keys(server: &mut Server, client: &mut Client) {
    let before = server.scrape();
    for value in ["1", "2", "3"] {
        client.put("a", value, None).await.unwrap();
    }
    client.put("b", "1", None).await.unwrap();
    client.get("a", None).await.unwrap();
    client.delete("b", None).await.unwrap();
    let txn = Txn::new()
        .when([Compare::value("a", CompareOp::Equal, "3")])
        .and_then([TxnOp::put("c", "1", None), TxnOp::get("a", None)]);
    client.txn(txn).await.unwrap();
    client.txn(Txn::new().and_then([TxnOp::get("a", None)])).await.unwrap();

    // Six writes, six revisions.
    let after = server.scrape();
    for (sample, grown) in [
        ("etcd_mvcc_put_total", 5.0),
        ("etcd_mvcc_delete_total", 1.0),
        ("etcd_mvcc_range_total", 3.0),
        ("etcd_mvcc_txn_total", 2.0),
        ("etcd_server_proposals_committed_total", 6.0),
        ("etcd_server_proposals_applied_total", 6.0),
        ("etcd_debugging_mvcc_current_revision", 6.0),
        ("k3s_server_apply_batch_entries_sum", 6.0),
        ("k3s_server_store_changes", 6.0),
        ("etcd_debugging_mvcc_keys_total", 3.0),
    ] {
        assert_eq!(after.since(&before, sample), grown, "{sample}");
    }
    assert_eq!(after.value("etcd_server_quota_backend_bytes"), 2_147_483_648.0);
    let page = server.until("this node leads", |page| page.value("etcd_server_is_leader") == 1.0);
    assert_eq!(page.value("etcd_server_has_leader"), 1.0);
    assert_eq!(page.value("etcd_server_leader_changes_seen_total"), 1.0);
    let put = "grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Put\"";
    assert_eq!(after.value(&format!("grpc_server_started_total{{{put}}}")), 4.0);
    assert_eq!(after.value(&format!("grpc_server_handling_seconds_count{{{put}}}")), 4.0);

    let revision = client.get("a", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    client.compact(revision, None).await.unwrap_err();
    let after = server.scrape();
    assert_eq!(after.value("etcd_debugging_mvcc_compact_revision"), revision as f64);
    // Of `a` and `c` the newest change; of `b` nothing, because its deletion lies before.
    assert_eq!(after.value("k3s_server_store_changes"), 2.0);
    assert_eq!(after.value("etcd_debugging_mvcc_keys_total"), 2.0);
    let compact = "grpc_method=\"Compact\",grpc_code=\"OutOfRange\"";
    let refused = format!(
        "grpc_server_handled_total{{grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",{compact}}}"
    );
    assert_eq!(after.value(&refused), 1.0);
}

async fn barriers(server: &mut Server, client: &mut Client) {
    let before = server.scrape();
    client.put("/registry/leases/one", "renewed", None).await.unwrap();
    client.put("isolated", "write", None).await.unwrap();
    let after = server.scrape();
    let grown = |sample: &str| after.since(&before, sample);
    assert_eq!(grown("k3s_server_wal_lingered_records_total"), 1.0);
    let barriers = grown("k3s_server_wal_barriers_total");
    assert!(2.0 <= barriers, "{barriers} barriers");
    assert_eq!(grown("k3s_server_wal_barrier_seconds_count"), barriers);
    assert_eq!(grown("k3s_server_wal_batch_records_count"), barriers);
    assert_eq!(grown("etcd_disk_wal_fsync_duration_seconds_count"), barriers);
    assert!(0.0 < grown("etcd_disk_wal_fsync_duration_seconds_sum"));
    assert_eq!(grown("etcd_disk_wal_fsync_duration_seconds_bucket{le=\"+Inf\"}"), barriers);
    // One 4 KiB block each.
    assert_eq!(grown("k3s_server_wal_written_bytes_total"), barriers * 4096.0);
    for bound in ["0.001", "0.512", "8.192", "32.768"] {
        after.value(&format!("etcd_disk_wal_fsync_duration_seconds_bucket{{le=\"{bound}\"}}"));
    }

    // A write under way shows as pending, and its barrier as the one that everybody waits for.
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (mut client, stop) = (client.clone(), Arc::clone(&stop));
        async move {
            while !stop.load(Relaxed) {
                client.put("busy", "1", None).await.unwrap();
            }
        }
    });
    server.until("a proposal pending", |page| 0.0 < page.value("etcd_server_proposals_pending"));
    server.until("a barrier running", |page| 0.0 < page.value("k3s_server_wal_stalled_seconds"));
    stop.store(true, Relaxed);
    writer.await.unwrap();
    let after = server.scrape();
    assert_eq!(after.value("etcd_server_proposals_pending"), 0.0);
}

async fn watchers(server: &mut Server, client: &mut Client) {
    let before = server.scrape();
    let options = WatchOptions::new().with_prefix();
    let mut stream = client.watch("w", Some(options)).await.unwrap();
    client.put("w1", "1", None).await.unwrap();
    client.put("not watched", "1", None).await.unwrap();
    client.delete("w1", None).await.unwrap();
    let mut events = 0;
    while events < 2 {
        events += stream.message().await.unwrap().unwrap().events().len();
    }
    let after = server.scrape();
    assert_eq!(after.since(&before, "etcd_debugging_mvcc_events_total"), 2.0);
    assert_eq!(after.value("etcd_debugging_mvcc_watcher_total"), 1.0);
    assert_eq!(after.value("etcd_debugging_mvcc_watch_stream_total"), 1.0);
    stream.cancel(0).await.unwrap();
    server.until("no watcher left", |page| page.value("etcd_debugging_mvcc_watcher_total") == 0.0);
    drop(stream);
    server.until("no stream left", |page| {
        page.value("etcd_debugging_mvcc_watch_stream_total") == 0.0
    });
}

async fn leases(server: &mut Server, client: &mut Client) {
    let before = server.scrape();
    for id in [7, 8] {
        let options = LeaseGrantOptions::new().with_id(id);
        client.lease_grant(100, Some(options)).await.unwrap();
    }
    client.lease_grant(1, None).await.unwrap();
    let (mut keeper, mut renewals) = client.lease_keep_alive(7).await.unwrap();
    keeper.keep_alive().await.unwrap();
    renewals.message().await.unwrap().unwrap();
    client.lease_revoke(8).await.unwrap();
    let after =
        server.until("the short lease expired", |page| page.value("k3s_server_leases") == 1.0);
    assert_eq!(after.since(&before, "etcd_debugging_lease_granted_total"), 3.0);
    assert_eq!(after.since(&before, "etcd_debugging_lease_revoked_total"), 2.0);
    assert!(1.0 <= after.since(&before, "etcd_debugging_lease_renewed_total"));
    server.until("the expiry counted", |page| {
        page.since(&before, "etcd_debugging_server_lease_expired_total") == 1.0
    });
}

fn connections(server: &mut Server) {
    let before = server.scrape();
    let mut intruder = TcpStream::connect(("127.0.0.1", server.ports[0])).unwrap();
    intruder.write_all(b"this is not a handshake\n").unwrap();
    server.until("the handshake failed", |page| {
        page.since(&before, "k3s_server_handshakes_failed_total") == 1.0
    });

    // The metrics port takes 64 at a time. The first that is refused is closed without an answer.
    let crowd: Vec<_> =
        (0..65).map(|_| TcpStream::connect(("127.0.0.1", server.ports[1])).unwrap()).collect();
    for mut one in crowd.iter().rev().take(1) {
        one.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(matches!(one.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
    drop(crowd);
    let deadline = Instant::now() + PATIENCE;
    while server.try_get("/version").is_none() {
        assert!(Instant::now() < deadline, "the port stays full");
        thread::sleep(POLL);
    }
    let after = server.scrape();
    assert!(1.0 <= after.since(&before, "k3s_server_connections_refused_total"));
}

async fn alarms(server: &mut Server, client: &mut Client) {
    let (activate, deactivate) = (AlarmAction::Activate, AlarmAction::Deactivate);
    for (alarm, name) in [(AlarmType::Nospace, "NOSPACE"), (AlarmType::Corrupt, "CORRUPT")] {
        let sample = format!("k3s_server_alarms{{alarm=\"{name}\"}}");
        assert_eq!(server.scrape().value(&sample), 0.0);
        client.alarm(activate, alarm, None).await.unwrap();
        assert_eq!(server.scrape().value(&sample), 1.0);
        let before = server.scrape();
        assert_eq!(server.get("/health").0, 503);
        let after = server.scrape();
        assert_eq!(after.since(&before, "etcd_server_health_failures_total"), 1.0);
        client.alarm(deactivate, alarm, None).await.unwrap();
    }
}

async fn checkpoint_and_slow_watcher(server: &mut Server, client: &mut Client) {
    let before = server.scrape();
    // Never read, so its stream's queue fills up and it falls behind.
    let stream = client.watch("large", None).await.unwrap();
    // More log than may pile up without a checkpoint, which is 16 MiB.
    for seed in 1..=13 {
        client.put("large", noise(seed, 1_400_000), None).await.unwrap();
    }
    let after = server
        .until("a checkpoint", |page| 1.0 <= page.since(&before, "k3s_server_checkpoints_total"));
    let commits = "etcd_disk_backend_commit_duration_seconds_count";
    assert_eq!(after.value(commits), after.value("k3s_server_checkpoints_total"));
    assert!(
        before.value("k3s_server_checkpoint_index") < after.value("k3s_server_checkpoint_index")
    );
    let written = after.since(&before, "k3s_server_wal_written_bytes_total");
    assert!(16_777_216.0 < written, "{written} bytes");
    assert!(1.0 <= after.since(&before, "k3s_server_wal_segments_started_total"));
    assert!(13.0 * 1_400_000.0 < after.value("etcd_mvcc_db_total_size_in_use_in_bytes"));
    assert!(
        after.value("etcd_mvcc_db_total_size_in_use_in_bytes")
            < after.value("etcd_mvcc_db_total_size_in_bytes")
    );
    assert_eq!(after.value("etcd_debugging_mvcc_slow_watcher_total"), 1.0);
    assert!(0.0 < after.value("k3s_server_watch_queued_bytes"));
    drop(stream);
    server.until("nothing queued", |page| page.value("k3s_server_watch_queued_bytes") == 0.0);
    server.until("a spare segment", |page| 0.0 < page.value("k3s_server_wal_segments_spare"));

    server.restart();
    let page = server.until("a leader", |page| page.value("etcd_server_has_leader") == 1.0);
    let replayed = page.value("k3s_server_replayed_entries");
    assert!(0.0 < replayed && replayed < after.value("etcd_server_proposals_applied_total"));
    let revision = "etcd_debugging_mvcc_current_revision";
    assert_eq!(page.value(revision), after.value(revision));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_endpoints_answer_as_etcd_does() {
    let server = Server::start();
    let plain = |text: &str| (200, text.to_owned());
    let healthy = plain(r#"{"health":"true","reason":""}"#);
    let version = r#"{"etcdserver":"3.6.14","etcdcluster":"3.6.0","storage":"3.6.0"}"#;
    assert_eq!(server.get("/version"), plain(version));
    assert_eq!(server.get("/health"), healthy);
    assert_eq!(server.get("/health?serializable=true"), healthy);
    assert_eq!(server.get("/livez"), plain("ok\n"));
    assert_eq!(server.get("/readyz"), plain("ok\n"));
    assert_eq!(server.get("/livez?verbose"), plain("[+]serializable_read ok\nok\n"));
    let all = "[+]data_corruption ok\n[+]serializable_read ok\n[+]linearizable_read ok\n\
               [+]non_learner ok\nok\n";
    assert_eq!(server.get("/readyz?verbose"), plain(all));
    assert_eq!(server.get("/readyz/linearizable_read"), plain("ok\n"));
    assert_eq!(server.get("/nonsense").0, 404);

    let mut client = server.connect().await;
    client.alarm(AlarmAction::Activate, AlarmType::Nospace, None).await.unwrap();
    let unhealthy =
        |reason: &str| (503, format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}\n"));
    assert_eq!(server.get("/health"), unhealthy("ALARM NOSPACE"));
    assert_eq!(server.get("/health?exclude=NOSPACE"), healthy);
    assert_eq!(server.get("/readyz"), plain("ok\n"), "a full node still serves reads");
    client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, None).await.unwrap();
    assert_eq!(server.get("/health"), healthy);

    client.alarm(AlarmAction::Activate, AlarmType::Corrupt, None).await.unwrap();
    assert_eq!(server.get("/health"), unhealthy("ALARM CORRUPT"));
    let failed = "[-]data_corruption failed: alarm activated: CORRUPT\n[+]serializable_read ok\n\
                  [+]linearizable_read ok\n[+]non_learner ok\n\n";
    assert_eq!(server.get("/readyz"), (503, failed.to_owned()));
    assert_eq!(server.get("/readyz/data_corruption").0, 503);
    assert_eq!(server.get("/readyz?exclude=data_corruption"), plain("ok\n"));
    let rest = "[+]serializable_read ok\n[+]linearizable_read ok\n[+]non_learner ok\nok\n";
    assert_eq!(server.get("/readyz?verbose&exclude=data_corruption"), plain(rest));
    assert_eq!(server.get("/livez"), plain("ok\n"), "a restart would not help");
}

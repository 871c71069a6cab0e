//! etcd's own command line against our server, over TLS: Debian's 3.4 and the newest there is.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::etcd::{Etcd, Release};
use crate::support::{Endpoint, Options, Subject, skip};

/// Runs `test` with the oldest and the newest client, each against a server of its own.
fn with_each_client(test: impl Fn(&Client)) {
    let releases = Release::all();
    let (Some(oldest), Some(newest)) = (releases.first(), releases.last()) else {
        return skip("no etcdctl below target/etcd");
    };
    let mut chosen = vec![oldest];
    if oldest != newest {
        chosen.push(newest);
    }
    for release in chosen {
        let subject = Subject::start(&Options { tls: true, ..Default::default() });
        println!("etcdctl {}", release.version());
        test(&Client { release: release.clone(), endpoint: subject.endpoint().clone() });
    }
}

/// One version of `etcdctl`, pointed at one server.
struct Client {
    release: Release,
    endpoint: Endpoint,
}

impl Client {
    fn command(&self, arguments: &str) -> Command {
        let mut command = self.release.etcdctl(&self.endpoint);
        command.args(arguments.split_whitespace());
        command
    }

    /// What it printed on success.
    fn run(&self, arguments: &str) -> String {
        let (ok, said) = self.attempt(arguments, "");
        assert!(ok, "etcdctl {arguments}: {said}");
        said
    }

    /// What it printed on failure.
    fn fail(&self, arguments: &str) -> String {
        let (ok, said) = self.attempt(arguments, "");
        assert!(!ok, "etcdctl {arguments} was expected to fail: {said}");
        said
    }

    fn attempt(&self, arguments: &str, input: &str) -> (bool, String) {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.success(), said)
    }

    fn json(&self, arguments: &str) -> serde_json::Value {
        serde_json::from_str(&self.run(&format!("{arguments} -w json"))).unwrap()
    }

    /// Starts one that keeps running.
    fn start(&self, arguments: &str) -> Running {
        let mut child =
            self.command(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Running { child, lines }
    }

    fn revision(&self) -> i64 {
        self.json("get revision")["header"]["revision"].as_i64().unwrap()
    }
}

/// A client that waits for something.
struct Running {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    /// The next line it prints; blocks until there is one.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Ctrl-C, and waits for the end.
    fn interrupt(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, Signal::SIGINT).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn put_get_del_and_txn() {
    with_each_client(|client| {
        assert_eq!(client.run("put a 1"), "OK\n");
        client.run("put a 2");
        client.run("put b 3");
        assert_eq!(client.run("get a"), "a\n2\n");
        assert_eq!(client.run("get a --rev=2 --print-value-only"), "1\n");
        assert_eq!(client.run("get --from-key a --keys-only"), "a\n\nb\n\n");
        assert_eq!(client.run("get a c --limit=1 --sort-by=KEY --order=DESCEND"), "b\n3\n");
        assert_eq!(client.run("get --prefix x"), "");
        assert_eq!(client.run("put a 4 --prev-kv"), "OK\na\n2\n");
        let txn = "value(\"a\") = \"4\"\n\nput c yes\nget c\n\nput c no\n\n";
        assert_eq!(client.attempt("txn", txn), (true, "SUCCESS\n\nOK\n\nc\nyes\n".to_owned()));
        let txn = "mod(\"a\") > \"100\"\n\nput c yes\n\nget a\n\n";
        assert_eq!(client.attempt("txn", txn), (true, "FAILURE\n\na\n4\n".to_owned()));
        assert_eq!(client.run("del --from-key --prev-kv b"), "2\nb\n3\nc\nyes\n");
        assert_eq!(client.run("del nothing"), "0\n");
        assert!(client.fail("put a x --lease=abc").contains("requested lease not found"));
        assert!(client.fail("get a --rev=1000").contains("future revision"));
    });
}

#[test]
fn watch_shows_the_past_and_the_present() {
    with_each_client(|client| {
        client.run("put w/1 old");
        let mut watch = client.start("watch --prefix w/ --rev=2 --prev-kv");
        assert_eq!([watch.line(), watch.line(), watch.line()], ["PUT", "w/1", "old"]);
        client.run("put w/1 new");
        let lines: Vec<_> = (0..5).map(|_| watch.line()).collect();
        assert_eq!(lines, ["PUT", "w/1", "old", "w/1", "new"]);
        client.run("del w/1");
        assert_eq!(watch.line(), "DELETE");
        watch.interrupt();
        client.run("compaction 3");
        let mut late = client.command("watch w/1 --rev=2").stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(late.stderr.take().unwrap()).read_line(&mut said).unwrap();
        assert!(said.contains("compacted"), "{said}");
        let _ = late.kill();
        late.wait().unwrap();
    });
}

#[test]
fn leases_are_granted_kept_alive_listed_and_revoked() {
    with_each_client(|client| {
        let said = client.run("lease grant 60");
        let id = said.split_whitespace().nth(1).unwrap();
        assert_eq!(said, format!("lease {id} granted with TTL(60s)\n"));
        client.run(&format!("put leased 1 --lease={id}"));
        let mut alive = client.start(&format!("lease keep-alive {id}"));
        assert_eq!(alive.line(), format!("lease {id} keepalived with TTL(60)"));
        alive.interrupt();
        let said = client.run(&format!("lease timetolive {id} --keys"));
        assert!(said.contains("granted with TTL(60s), remaining("), "{said}");
        assert!(said.contains("attached keys([leased])"), "{said}");
        assert!(client.run("lease list").contains(id));
        assert_eq!(client.run(&format!("lease revoke {id}")), format!("lease {id} revoked\n"));
        assert_eq!(client.run("get leased"), "");
        let said = client.run(&format!("lease timetolive {id}"));
        assert!(said.contains("already expired"), "{said}");
        assert!(client.fail(&format!("lease revoke {id}")).contains("lease not found"));
    });
}

#[test]
fn a_lease_that_is_not_kept_alive_expires_and_takes_its_keys() {
    with_each_client(|client| {
        let mut watch = client.start("watch short");
        // Before the request: the lease begins when the server grants it, not when the client has said so.
        let asked = std::time::Instant::now();
        let said = client.run("lease grant 2");
        let id = said.split_whitespace().nth(1).unwrap();
        client.run(&format!("put short 1 --lease={id}"));
        // etcdctl prints an empty line for the missing value of a delete.
        let lines: Vec<_> = (0..4).map(|_| watch.line()).collect();
        assert_eq!(lines, ["PUT", "short", "1", "DELETE"]);
        assert!(std::time::Duration::from_secs(2) <= asked.elapsed(), "expired early");
    });
}

#[test]
fn compaction_and_defragmentation() {
    with_each_client(|client| {
        for n in 0..5 {
            client.run(&format!("put a {n}"));
        }
        assert_eq!(client.run("compaction 4 --physical"), "compacted revision 4\n");
        assert!(client.fail("get a --rev=3").contains("has been compacted"));
        assert_eq!(client.run("get a --rev=4 --print-value-only"), "2\n");
        assert!(client.fail("compaction 4").contains("has been compacted"));
        assert!(client.fail("compaction 100").contains("future revision"));
        assert!(client.run("defrag").contains("Finished defragmenting"));
        assert_eq!(client.run("get a --print-value-only"), "4\n");
    });
}

#[test]
fn endpoint_and_member_answers() {
    with_each_client(|client| {
        client.run("put a 1");
        let (ok, said) = client.attempt("endpoint health", "");
        assert!(ok && said.contains("is healthy: successfully committed proposal"), "{said}");
        let status = client.json("endpoint status");
        let status = &status[0]["Status"];
        let member = status["header"]["member_id"].as_u64().unwrap();
        assert_eq!(status["leader"].as_u64(), Some(member));
        assert_eq!(status["header"]["revision"], 2);
        assert!(status["version"].as_str().unwrap().starts_with("3."));
        assert!(0 < status["dbSize"].as_u64().unwrap());
        let hash = client.json("endpoint hashkv");
        assert!(hash[0]["HashKV"]["hash"].as_u64().is_some());
        let members = client.json("member list");
        assert_eq!(members["members"].as_array().unwrap().len(), 1);
        assert_eq!(members["members"][0]["ID"].as_u64(), Some(member));
        let urls = members["members"][0]["clientURLs"][0].as_str().unwrap();
        assert_eq!(urls, client.endpoint.url());
        assert!(client.fail("member remove 1234").contains("member not found"));
        assert!(client.fail("move-leader 1234").contains("bad leader transferee"));
    });
}

#[test]
fn alarms_are_listed_and_disarmed() {
    with_each_client(|client| {
        assert_eq!(client.run("alarm list"), "");
        assert_eq!(client.run("alarm disarm"), "");
    });
}

#[test]
fn auth_stays_off_without_a_root_user() {
    with_each_client(|client| {
        assert!(client.fail("auth enable").contains("root user does not exist"));
        client.run("put a 1");
    });
}

#[test]
fn lock_and_elect() {
    with_each_client(|client| {
        let mut first = client.start("lock printer");
        let key = first.line();
        assert!(key.starts_with("printer/"), "{key}");
        // The second waits until the first lets go.
        let mut second = client.start("lock printer");
        let mut waiting = client.start("watch --prefix printer --rev=1");
        // Creation of both keys is in the history once the second has queued.
        for _ in 0..6 {
            waiting.line();
        }
        assert_eq!(client.json("get --prefix printer")["count"], 2);
        first.interrupt();
        assert!(second.line().starts_with("printer/"));
        second.interrupt();
        let mut leader = client.start("elect boss me");
        assert!(leader.line().starts_with("boss/"));
        assert_eq!(leader.line(), "me");
        let mut observer = client.start("elect --listen boss");
        assert!(observer.line().starts_with("boss/"));
        assert_eq!(observer.line(), "me");
        leader.interrupt();
    });
}

/// The newest client only: it takes a minute at its smallest size.
#[test]
fn check_perf_runs_to_its_end() {
    if ["CI", "CHECK_PERF"].iter().all(|name| std::env::var_os(name).is_none()) {
        eprintln!("skipped: etcdctl check perf takes a minute; CHECK_PERF=1 runs it");
        return;
    }
    let Some(release) = Release::newest() else { return skip("no etcdctl below target/etcd") };
    let subject = Subject::start(&Options { tls: true, ..Default::default() });
    let client = Client { release, endpoint: subject.endpoint().clone() };
    // It judges the machine too, so its verdict is only printed.
    let (_, said) = client.attempt("check perf --load=s --auto-compact --auto-defrag", "");
    println!("{said}");
    assert!(said.contains("Throughput") && said.contains("Slowest request"), "{said}");
    assert_eq!(client.run("get --prefix /etcdctl-check-perf/ --limit=1"), "");
}

#[test]
fn a_backup_restores_into_a_real_etcd() {
    with_each_client(|client| {
        let mut keys = String::new();
        for n in 0..60 {
            client.run(&format!("put k/{n:02} value-{n}"));
            // Writing to a string cannot fail.
            let _ = write!(keys, "k/{n:02}\nvalue-{n}\n");
        }
        client.run("put gone 1");
        client.run("del gone");
        client.run("compaction 30");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("backup.db");
        client.run(&format!("snapshot save {}", file.display()));
        let revision = client.revision();
        restore(&client.release, &file, dir, |restored| {
            let restored =
                Client { release: client.release.clone(), endpoint: restored.endpoint().clone() };
            assert_eq!(restored.run("get --prefix k/"), keys);
            assert_eq!(restored.revision(), revision);
            assert!(restored.fail("get k/00 --rev=29").contains("has been compacted"));
            assert_eq!(restored.run("get gone"), "");
        });
    });
}

/// Restores with etcd's tool and starts a real etcd on the result.
fn restore(release: &Release, file: &Path, dir: tempfile::TempDir, check: impl Fn(&Etcd)) {
    let status = release.etcdutl().args(["snapshot", "status"]).arg(file).output().unwrap();
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let data = dir.path().join("restored");
    let output = release
        .etcdutl()
        .args(["snapshot", "restore", "--name=default"])
        .args(["--initial-cluster=default=http://127.0.0.1:1"])
        .args(["--initial-advertise-peer-urls=http://127.0.0.1:1", "--data-dir"])
        .arg(&data)
        .arg(file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(fs::exists(&data).unwrap());
    check(&Etcd::start_in(release, &Options::default(), dir, &data, "default"));
}

#[test]
fn a_client_without_a_certificate_is_turned_away() {
    with_each_client(|client| {
        let mut endpoint = client.endpoint.clone();
        let Some(tls) = endpoint.tls.take() else { return };
        let mut command = client.release.etcdctl(&endpoint);
        command.arg(format!("--endpoints={}", client.endpoint.url()));
        command.arg(format!("--cacert={}", tls.ca.display()));
        command.args(["--command-timeout=2s", "--dial-timeout=2s", "get", "a"]);
        assert!(!command.output().unwrap().status.success());
        client.run("get a");
    });
}

//! Kills the real process with SIGKILL under load, again and again: what was acknowledged must be there.
//!
//! The page cache survives the kill, so this is about the process's own state; power cuts are in the crash tests.
//!
//! - `KILL9_SEED=n` repeats the moments of the kills, `KILL9_SECONDS=n` runs longer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k3s_server::proto::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::request_op::Request as Op;
use tonic::transport::Channel;

use crate::support::random::Random;
use crate::support::{Endpoint, Options, Subject};

const SECONDS: u64 = 8;
const WRITERS: usize = 8;
const KEYS_PER_WRITER: u64 = 5;

/// What one writer knows of one key.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// The last value sent, whether or not it was answered.
    sent: u64,
    /// The last value acknowledged, and its revision.
    acknowledged: Option<(u64, i64)>,
}

/// Everything that was promised to the writers, by key.
type Ledger = Arc<Mutex<BTreeMap<String, Known>>>;

/// Writes numbers, each to a key and to its twin in one transaction, until the server is gone.
async fn write(endpoint: Endpoint, writer: usize, mut next: u64, ledger: Ledger) -> u64 {
    let Ok(channel) = connect(&endpoint).await else { return next };
    let mut kv = KvClient::new(channel);
    loop {
        next += 1;
        let key = format!("w{writer}/{}", next % KEYS_PER_WRITER);
        ledger.lock().unwrap().entry(key.clone()).or_default().sent = next;
        let put = |key: String| pb::RequestOp {
            request: Some(Op::RequestPut(pb::PutRequest {
                key: key.into(),
                value: next.to_string().into(),
                ..Default::default()
            })),
        };
        let success = vec![put(key.clone()), put(format!("twin/{key}"))];
        let reply = kv.txn(pb::TxnRequest { success, ..Default::default() }).await;
        let Ok(reply) = reply else { return next };
        let revision = reply.into_inner().header.unwrap().revision;
        ledger.lock().unwrap().entry(key).or_default().acknowledged = Some((next, revision));
    }
}

async fn connect(endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
    Channel::from_shared(endpoint.url()).expect("a URL").connect().await
}

/// Reads everything back and compares it with what was promised. Returns how many promises were checked.
async fn check(endpoint: &Endpoint, ledger: &Ledger) -> usize {
    let mut kv = KvClient::new(connect(endpoint).await.unwrap());
    let all = pb::RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    let reply = kv.range(all).await.unwrap().into_inner();
    let now = reply.header.unwrap().revision;
    let found: BTreeMap<String, (u64, i64)> = reply
        .kvs
        .iter()
        .map(|kv| {
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            (text(&kv.key), (text(&kv.value).parse().unwrap(), kv.mod_revision))
        })
        .collect();
    let ledger = ledger.lock().unwrap().clone();
    for (key, known) in &ledger {
        let twin = found.get(&format!("twin/{key}"));
        assert_eq!(found.get(key), twin, "half of a transaction on {key}");
        let Some((value, revision)) = known.acknowledged else { continue };
        let Some(&(found, found_at)) = found.get(key) else { panic!("{key} = {value} is lost") };
        assert!(revision <= now, "revision {revision} was acknowledged, now it is {now}");
        assert!(value <= found, "{key}: {value} was acknowledged, found the older {found}");
        assert!(found <= known.sent, "{key}: found {found}, which nobody wrote");
        if found == value {
            assert_eq!(found_at, revision, "{key} = {value} moved to another revision");
        }
    }
    check_old_revisions(&mut kv, &ledger).await;
    ledger.values().filter(|known| known.acknowledged.is_some()).count()
}

/// An acknowledged revision shows its value for ever, whatever was written over it.
async fn check_old_revisions(kv: &mut KvClient<Channel>, ledger: &BTreeMap<String, Known>) {
    for (key, known) in ledger {
        let Some((value, revision)) = known.acknowledged else { continue };
        let range = pb::RangeRequest { key: key.clone().into(), revision, ..Default::default() };
        let reply = kv.range(range).await.unwrap().into_inner();
        let found = reply.kvs.first().expect("an acknowledged revision");
        assert_eq!(found.value, value.to_string(), "{key} at revision {revision}");
        assert_eq!(found.mod_revision, revision);
    }
}

#[test]
fn acknowledged_writes_survive_being_killed_under_load() {
    let (mut random, _) = Random::from_env("KILL9_SEED");
    let seconds = std::env::var("KILL9_SECONDS").ok();
    let seconds = seconds.map_or(SECONDS, |text| text.parse().expect("KILL9_SECONDS"));
    let mut subject = Subject::start(&Options::default());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ledger = Ledger::default();
    let mut next = [0; WRITERS];
    let (mut kills, mut checked) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < deadline {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let endpoint = subject.endpoint().clone();
                runtime.spawn(write(endpoint, writer, next[writer], Arc::clone(&ledger)))
            })
            .collect();
        // The load, not a synchronisation: any moment is as good as another.
        std::thread::sleep(Duration::from_millis(30 + random.next_u64() % 400));
        subject.kill();
        kills += 1;
        for (writer, task) in writers.into_iter().enumerate() {
            next[writer] = runtime.block_on(task).unwrap();
        }
        subject.restart();
        checked += runtime.block_on(check(subject.endpoint(), &ledger));
    }
    println!("{kills} kills, {checked} promises checked, {} writes", next.iter().sum::<u64>());
    assert!(0 < checked, "nothing was acknowledged, so nothing was tested");
    assert!(subject.stop(), "a clean stop must end with status 0");
    subject.restart();
    runtime.block_on(check(subject.endpoint(), &ledger));
}

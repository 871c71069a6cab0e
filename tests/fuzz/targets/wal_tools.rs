//! `wal verify` and `wal dump` on the directory of a stopped node whose log is damaged.

use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::command::Command;
use k3s_server::env::host;
use k3s_server::mvcc::{DrainOn, Store};
use k3s_server::proto::etcdserverpb as pb;
use k3s_server::raft::checkpoint::Policy;
use k3s_server::raft::transport::NoPeers;
use k3s_server::raft::{Member, Node, Options, Parts};
use k3s_server::testkit::wait;
use k3s_server::types::{ByteCount, ClusterId, NodeId};
use k3s_server::wal::format::BLOCK;
use k3s_server::wal::{self, Wal};
use k3s_server::{mvcc, server};

use super::memory::Files;
use super::wal::{archive, unpack};

/// Room for the frames of a node's short life.
const SLOT_BLOCKS: usize = 64;

/// The log of a real node, plain and with checksums put right after a mutation.
pub fn seeds() -> Vec<Vec<u8>> {
    static LOG: OnceLock<Files> = OnceLock::new();
    let log = LOG.get_or_init(|| wait(life()));
    vec![archive(log, 0), archive(log, 1)]
}

async fn life() -> Files {
    let dir = tempfile::tempdir().unwrap();
    let env = host::env();
    let options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };
    let store = Store::open(&env, &dir.path().join("state.redb"), &options).unwrap();
    let identity = wal::Identity { cluster: ClusterId::new(0xc1), node: NodeId::new(0x11) };
    let options = wal::Options {
        segment_bytes: (SLOT_BLOCKS * BLOCK) as u64,
        slots_min: 1,
        ..wal::Options::default()
    };
    let log = dir.path().join("wal");
    let (wal, _, writer) = Wal::open(&env, &log, identity, options).await.unwrap();
    writer.spawn_thread().unwrap();
    let member = Member { id: identity.node, name: "pi-1".to_owned(), ..Member::default() };
    let parts = Parts {
        env,
        cluster: identity.cluster,
        member: member.clone(),
        wal,
        store,
        followers: vec![],
        transport: Arc::new(NoPeers),
    };
    let second = Duration::from_secs(1);
    let checkpoint = Policy { interval: 300 * second, log_bytes: ByteCount::new(1 << 24) };
    let options = Options {
        heartbeat: second / 2,
        election_min: 2 * second,
        election_max: 4 * second,
        learner_silent_max: k3s_server::limits::LEARNER_SILENT_MAX,
        checkpoint,
    };
    let node = Node::start(parts, &options).await.unwrap();
    node.found(&member).await.unwrap();
    node.elect_if_alone().await.unwrap();
    for n in 0..20_u8 {
        let put = pb::PutRequest {
            key: Bytes::from(vec![b'k', n % 5]),
            value: Bytes::from(vec![n; 100]),
            ..Default::default()
        };
        node.propose(Command::Put(put), Instant::now() + 20 * second).await.unwrap();
    }
    node.stop().await.unwrap();
    drop(node);
    let name = |path: &Path| Path::new("wal").join(path.file_name().unwrap());
    let files = fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (name(&path), fs::read(&path).unwrap())).collect()
}

/// Both say something, and neither changes anything.
pub fn run(input: &[u8]) {
    let files = unpack(input, SLOT_BLOCKS);
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("wal")).unwrap();
    for (path, bytes) in &files {
        fs::write(dir.path().join(path), bytes).unwrap();
    }
    for json in [false, true] {
        let mut out = Vec::new();
        let verified = server::verify(dir.path(), json, &mut out);
        assert!(verified.is_err() || !out.is_empty(), "verify said nothing");
        let mut out = Vec::new();
        let dumped = server::dump(dir.path(), json, &mut out);
        if let Err(error) = &dumped {
            assert!(!error.to_string().is_empty());
        }
        if json {
            for line in out.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                drop(serde_json::from_slice::<serde_json::Value>(line).expect("a line of JSON"));
            }
        }
    }
    for (path, bytes) in &files {
        assert!(fs::read(dir.path().join(path)).unwrap() == *bytes, "looking changed the log");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "looking left something behind");
}

//! The node on a real disk: openraft's own conformance suite on our log and store, and the life of one voter.

mod cluster;
mod wire;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::checkpoint::{CheckpointMark, Policy};
use super::log_store::LogStore;
use super::state_machine::StateMachine;
use super::stats::Counters;
use super::transport::NoPeers;
use super::types::TypeConfig;
use super::{Member, Node, Options, Parts, Role};
use crate::apply::Reply;
use crate::command::Command;
use crate::env::host;
use crate::limits;
use crate::mvcc::{self, DrainOn, Store};
use crate::proto::etcdserverpb as pb;
use crate::types::{ByteCount, ClusterId, LogId, LogIndex, NodeId, Term};
use crate::wal::{self, Wal};

const CLUSTER: ClusterId = ClusterId::new(0xc1);
const NODE: NodeId = NodeId::new(0x11);

pub(super) const OPTIONS: Options = Options {
    heartbeat: Duration::from_millis(500),
    election_min: Duration::from_secs(1),
    election_max: Duration::from_millis(1500),
    learner_silent_max: limits::LEARNER_SILENT_MAX,
    checkpoint: Policy {
        interval: limits::CHECKPOINT_INTERVAL,
        log_bytes: ByteCount::new(limits::CHECKPOINT_LOG_BYTES),
    },
};

async fn open(dir: &Path) -> (Wal, Store) {
    open_as(dir, NODE).await
}

pub(super) async fn open_as(dir: &Path, node: NodeId) -> (Wal, Store) {
    let env = host::env();
    let options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };
    let store = Store::open(&env, &dir.join("state.redb"), &options).unwrap();
    let identity = wal::Identity { cluster: CLUSTER, node };
    let options = wal::Options {
        segment_bytes: limits::WAL_SEGMENT_BYTES,
        slots_min: 1,
        ..wal::Options::default()
    };
    let (wal, _, writer) = Wal::open(&env, &dir.join("wal"), identity, options).await.unwrap();
    writer.spawn_thread().unwrap();
    (wal, store)
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let (wal, store) = open(dir.path()).await;
        // The suite purges what no checkpoint covers; a real node does not.
        let everything = LogId {
            term: Term::new(u64::MAX),
            leader: NodeId::new(u64::MAX),
            index: LogIndex::new(u64::MAX),
        };
        let mark = Arc::new(CheckpointMark::new(Some(everything)));
        let (notes, _) = mpsc::unbounded_channel();
        let counters = Counters::new(host::env().clock, Duration::from_secs(1), LogIndex::new(0));
        let machine = StateMachine::new(
            store,
            wal.clone(),
            Arc::clone(&mark),
            vec![],
            notes,
            Arc::new(counters),
        );
        Ok((dir, LogStore::new(wal, mark), machine))
    }
}

#[test]
fn openrafts_own_suite_passes_on_our_log_and_store() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(Suite::test_all(Builder)).unwrap();
}

async fn start(dir: &Path) -> Node {
    let (wal, store) = open(dir).await;
    let member = Member { id: NODE, name: "pi-1".to_owned(), ..Member::default() };
    let parts = Parts {
        env: host::env(),
        cluster: CLUSTER,
        member: member.clone(),
        wal,
        store,
        followers: vec![],
        transport: Arc::new(NoPeers),
    };
    let node = Node::start(parts, &OPTIONS).await.unwrap();
    node.found(&member).await.unwrap();
    node.elect_if_alone().await.unwrap();
    node
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn put(key: &'static str, value: &'static str) -> Command {
    Command::Put(pb::PutRequest {
        key: Bytes::from_static(key.as_bytes()),
        value: Bytes::from_static(value.as_bytes()),
        ..Default::default()
    })
}

async fn value_of(node: &Node, key: &str) -> Option<Bytes> {
    let _barrier = node.read_barrier(deadline()).await.unwrap();
    let view = node.store().read().unwrap();
    view.get(key.as_bytes(), None).unwrap().map(|kv| kv.value)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_voter_founds_writes_stops_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    let outcome = node.propose(put("a", "1"), deadline()).await.unwrap();
    assert_eq!(outcome.revision.get(), 2);
    assert!(matches!(outcome.reply, Ok(Reply::Put(_))));
    assert_eq!(node.status().role, Role::Leader);
    node.stop().await.unwrap();
    drop(node);

    let node = start(dir.path()).await;
    assert_eq!(value_of(&node, "a").await.unwrap(), "1");
    let outcome = node.propose(put("a", "2"), deadline()).await.unwrap();
    assert_eq!(outcome.revision.get(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_checkpoint_covers_is_replayed_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path()).await;
    node.propose(put("a", "1"), deadline()).await.unwrap();
    // What a crash leaves: the files as they are at this moment.
    let image = tempfile::tempdir().unwrap();
    std::fs::create_dir(image.path().join("wal")).unwrap();
    for part in [".", "wal"] {
        for entry in std::fs::read_dir(dir.path().join(part)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, image.path().join(part).join(path.file_name().unwrap()))
                    .unwrap();
            }
        }
    }

    let node = start(image.path()).await;
    assert_eq!(value_of(&node, "a").await.unwrap(), "1");
}

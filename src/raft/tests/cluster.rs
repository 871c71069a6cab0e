//! Three nodes in memory, in simulated time: real logs and stores on disks that fail, a network that is cut.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;

use super::{CLUSTER, OPTIONS, put};
use crate::command::Command;
use crate::env::{BoxFuture, Env, host};
use crate::limits;
use crate::mvcc::{self, DrainOn, Store};
use crate::proto::{etcdserverpb as pb, node as proto};
use crate::raft::promise::Promise;
use crate::raft::runtime::seed_this_thread;
use crate::raft::transport::{Answer, Method, Refused};
use crate::raft::types;
use crate::raft::{Member, Node, Options, Parts, ProposeError, Role};
use crate::testkit::disk::{Rest, prefix};
use crate::testkit::{FaultDisk, Network, Random, SeededEntropy};
use crate::types::{LogId, NodeId, Revision};
use crate::wal::{self, Wal};

const DIR: &str = "/data";
const SECOND: Duration = Duration::from_secs(1);

struct Peer {
    disk: FaultDisk,
    node: Option<Node>,
}

struct Cluster {
    network: Network,
    peers: BTreeMap<NodeId, Peer>,
    options: Options,
    wal_options: wal::Options,
}

fn id(number: u64) -> NodeId {
    NodeId::new(number)
}

fn member(id: NodeId) -> Member {
    Member { id, name: format!("pi-{}", id.get()), ..Member::default() }
}

fn deadline(after: Duration) -> Instant {
    (tokio::time::Instant::now() + after).into_std()
}

fn env(disk: &FaultDisk, seed: u64) -> Env {
    let entropy = Arc::new(SeededEntropy::new(seed));
    Env { disk: Arc::new(disk.clone()), entropy, ..host::env() }
}

async fn open(env: &Env, node: NodeId, options: wal::Options) -> (Wal, Store) {
    let mvcc_options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Task };
    let store = Store::open(env, &Path::new(DIR).join("state.redb"), &mvcc_options).unwrap();
    let identity = wal::Identity { cluster: CLUSTER, node };
    let (wal, _, writer) =
        Wal::open(env, &Path::new(DIR).join("wal"), identity, options).await.unwrap();
    tokio::spawn(writer.run());
    (wal, store)
}

impl Cluster {
    /// A cluster of so many voters, elected and caught up.
    async fn of(voters: u64) -> Self {
        let mut cluster = Self::empty(OPTIONS);
        cluster.found(voters).await;
        cluster
    }

    fn empty(options: Options) -> Self {
        let wal_options = Self::wal_options(limits::WAL_LINGER);
        Self { network: Network::new(7), peers: BTreeMap::new(), options, wal_options }
    }

    fn wal_options(linger: Duration) -> wal::Options {
        wal::Options {
            segment_bytes: 256 << 10,
            slots_min: 2,
            slots_max: 4,
            fill_pause: Duration::ZERO,
            linger,
            ..wal::Options::default()
        }
    }

    async fn found(&mut self, voters: u64) {
        seed_this_thread(voters);
        for number in 1..=voters {
            self.start(id(number)).await;
        }
        self.node(id(1)).found(&member(id(1))).await.unwrap();
        self.node(id(1)).elect_if_alone().await.unwrap();
        for number in 2..=voters {
            self.add(id(number)).await;
        }
        self.converge().await;
    }

    async fn add(&self, new: NodeId) {
        let leader = self.leader().await;
        self.until(20 * SECOND, "the learner is a member", || {
            let leader = leader.clone();
            Box::pin(
                async move { leader.add_learner(&member(new), deadline(SECOND)).await.is_ok() },
            )
        })
        .await;
        self.until(20 * SECOND, "the learner has its vote", || {
            let leader = leader.clone();
            let votes = move |member: &Member| member.id == new && !member.learner;
            // By this, or by the leader itself.
            Box::pin(async move {
                leader.promote(new, deadline(SECOND)).await.is_ok()
                    || leader.status().members.iter().any(votes)
            })
        })
        .await;
    }

    /// Starts a node, or starts it again on what its disk has.
    async fn start(&mut self, id: NodeId) {
        let disk = self.peers.get(&id).map(|peer| peer.disk.clone());
        let disk = disk.unwrap_or_else(|| FaultDisk::with_dir(Path::new(DIR)));
        let env = env(&disk, id.get());
        let (wal, store) = open(&env, id, self.wal_options).await;
        let parts = Parts {
            env,
            cluster: CLUSTER,
            member: member(id),
            wal,
            store,
            followers: vec![],
            transport: self.network.transport(id),
        };
        let node = Node::start(parts, &self.options).await.unwrap();
        self.network.join(id, Arc::new(node.clone()));
        self.peers.insert(id, Peer { disk, node: Some(node) });
    }

    fn node(&self, id: NodeId) -> &Node {
        self.peers[&id].node.as_ref().unwrap()
    }

    fn disk(&self, id: NodeId) -> &FaultDisk {
        &self.peers[&id].disk
    }

    fn others(&self, than: NodeId) -> Vec<NodeId> {
        self.peers.keys().copied().filter(|id| *id != than).collect()
    }

    /// The power of one node goes: what no barrier covered is lost.
    async fn kill(&mut self, id: NodeId) {
        self.network.leave(id);
        let peer = self.peers.get_mut(&id).unwrap();
        let node = peer.node.take().unwrap();
        // From here on nothing that the dying node writes survives.
        let image = peer.disk.fork();
        image.power_cut(prefix(0, |_| Rest::Old));
        peer.disk = image;
        let _stopped = node.raft().shutdown().await;
    }

    async fn until(
        &self,
        within: Duration,
        what: &str,
        mut test: impl FnMut() -> BoxFuture<'static, bool>,
    ) {
        let end = tokio::time::Instant::now() + within;
        while !test().await {
            assert!(tokio::time::Instant::now() < end, "not within {within:?}: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A node that leads and that a majority follows.
    fn leads(&self) -> Option<Node> {
        let running = self.peers.values().filter_map(|peer| peer.node.as_ref());
        let leaders = running.clone().filter(|node| node.status().role == Role::Leader);
        let newest = leaders.max_by_key(|node| node.status().term)?;
        let status = newest.status();
        let followers = running.filter(|node| {
            let follower = node.status();
            follower.leader == Some(status.node) && follower.term == status.term
        });
        let voters = status.members.iter().filter(|member| !member.learner).count();
        (voters < 2 * followers.count()).then(|| newest.clone())
    }

    async fn leader(&self) -> Node {
        self.leader_within(15 * SECOND).await
    }

    async fn leader_within(&self, within: Duration) -> Node {
        let end = tokio::time::Instant::now() + within;
        loop {
            if let Some(node) = self.leads() {
                return node;
            }
            assert!(tokio::time::Instant::now() < end, "no leader within {within:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// All running nodes have the same state.
    async fn converge(&self) {
        let end = tokio::time::Instant::now() + 20 * SECOND;
        loop {
            let running = self.peers.values().filter_map(|peer| peer.node.as_ref());
            let states: Vec<_> = running
                .map(|node| node.store().read().unwrap())
                .map(|view| (view.applied(), view.state_hash().unwrap()))
                .collect();
            if states.windows(2).all(|pair| pair[0] == pair[1]) {
                return;
            }
            assert!(tokio::time::Instant::now() < end, "they differ: {states:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn write(
    node: &Node,
    key: &'static str,
    value: &'static str,
) -> Result<Revision, ProposeError> {
    let outcome = node.propose(put(key, value), deadline(10 * SECOND)).await?;
    Ok(outcome.revision)
}

fn value(node: &Node, key: &str) -> Option<Bytes> {
    node.store().read().unwrap().get(key.as_bytes(), None).unwrap().map(|kv| kv.value)
}

#[tokio::test(start_paused = true)]
async fn three_elect_replicate_and_go_on_when_the_leader_dies() {
    let mut cluster = Cluster::of(3).await;
    write(&cluster.leader().await, "a", "1").await.unwrap();
    cluster.converge().await;

    let old = cluster.leader().await.status();
    cluster.kill(old.node).await;
    let start = tokio::time::Instant::now();
    let leader = cluster.leader().await;
    write(&leader, "a", "2").await.unwrap();
    assert!(start.elapsed() < 5 * SECOND, "a gap of {:?}", start.elapsed());
    assert!(old.term < leader.status().term);

    cluster.start(old.node).await;
    cluster.converge().await;
    assert_eq!(value(cluster.node(old.node), "a").unwrap(), "2");
    assert_eq!(cluster.node(old.node).stats().snapshots_received, 0, "the log had all of it");
}

/// Fills a few segments with what cannot be compressed, and waits until the leader has forgotten the oldest entries.
async fn outgrow(cluster: &Cluster) {
    let leader = cluster.leader().await;
    let mut random = Random::new(3);
    for key in 0..30 {
        let mut value = vec![0; 100_000];
        random.fill(&mut value);
        let put = pb::PutRequest {
            key: format!("large/{key}").into(),
            value: value.into(),
            ..Default::default()
        };
        leader.propose(Command::Put(put), deadline(10 * SECOND)).await.unwrap();
    }
    cluster
        .until(10 * SECOND, "the leader forgets what a checkpoint covers", || {
            let leader = leader.clone();
            Box::pin(async move {
                leader.checkpoint().await.unwrap();
                leader.wal().hard_state().purged.is_some()
            })
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn who_lags_behind_the_log_gets_a_snapshot_and_goes_on_from_it_after_a_power_cut() {
    let mut cluster = Cluster::of(3).await;
    let late = cluster.others(cluster.leader().await.status().node)[0];
    cluster.kill(late).await;
    write(&cluster.leader().await, "a", "1").await.unwrap();
    outgrow(&cluster).await;

    cluster.start(late).await;
    cluster.converge().await;
    let stats = cluster.node(late).stats();
    assert_eq!((stats.snapshots_received, stats.receiving), (1, None));
    assert_eq!(cluster.leader().await.stats().snapshots_sent, 1);
    assert_eq!(value(cluster.node(late), "a").unwrap(), "1");

    cluster.kill(late).await;
    write(&cluster.leader().await, "a", "2").await.unwrap();
    cluster.start(late).await;
    cluster.converge().await;
    assert_eq!(cluster.node(late).stats().snapshots_received, 0, "the log goes on from it");
    assert_eq!(value(cluster.node(late), "a").unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn power_cuts_while_a_snapshot_arrives_leave_the_old_state_or_the_new() {
    let mut cluster = Cluster::of(3).await;
    let late = cluster.others(cluster.leader().await.status().node)[0];
    cluster.kill(late).await;
    write(&cluster.leader().await, "a", "1").await.unwrap();
    outgrow(&cluster).await;
    let mut arrived = Vec::new();
    for millis in (20..).step_by(60) {
        cluster.start(late).await;
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let stats = cluster.node(late).stats();
        arrived.push(stats.receiving.map(|progress| progress.percent()));
        let done = stats.snapshots_received == 1;
        cluster.kill(late).await;
        if done {
            break;
        }
        assert!(millis < 10_000, "it never arrives: {arrived:?}");
    }
    assert!(
        arrived.iter().flatten().any(|percent| 0 < *percent),
        "never in the middle: {arrived:?}"
    );

    cluster.start(late).await;
    cluster.converge().await;
    assert_eq!(value(cluster.node(late), "a").unwrap(), "1");
    write(&cluster.leader().await, "a", "2").await.unwrap();
    cluster.converge().await;
}

#[tokio::test(start_paused = true)]
async fn who_was_cut_off_does_not_disturb_the_leader_when_it_comes_back() {
    let cluster = Cluster::of(3).await;
    let before = cluster.leader().await.status();
    let cut = cluster.others(before.node)[0];
    for other in cluster.others(cut) {
        cluster.network.separate(cut, other);
    }
    tokio::time::sleep(60 * SECOND).await;
    write(cluster.node(before.node), "a", "1").await.unwrap();
    assert_eq!(cluster.node(cut).status().term, before.term, "it asked before it stood");

    cluster.network.heal();
    cluster.converge().await;
    let after = cluster.leader().await.status();
    assert_eq!((after.node, after.term), (before.node, before.term));
}

#[tokio::test(start_paused = true)]
async fn a_majority_that_is_whole_gets_a_leader_even_if_the_old_one_reaches_part_of_it() {
    // A bridge: the leader reaches one follower only, that follower reaches everybody.
    let cluster = Cluster::of(5).await;
    let old = cluster.leader().await.status();
    let others = cluster.others(old.node);
    let bridge = others[0];
    for other in &others[1..] {
        cluster.network.separate(old.node, *other);
    }
    let start = tokio::time::Instant::now();
    let leader = loop {
        let leader = cluster.leads();
        if let Some(leader) = leader.filter(|leader| leader.status().node != old.node)
            && write(&leader, "a", "1").await.is_ok()
        {
            break leader;
        }
        assert!(start.elapsed() < 60 * SECOND, "no leader but {}, bridge {bridge}", old.node);
        tokio::time::sleep(SECOND / 10).await;
    };
    assert!(old.term < leader.status().term);
    cluster.network.heal();
    cluster.converge().await;
}

/// Barriers of this disk take so long.
fn stall(disk: &FaultDisk, duration: Duration) {
    disk.set_sync_delay(Some(Arc::new(move |_: &Path| -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    })));
}

#[tokio::test(start_paused = true)]
async fn a_leader_whose_card_hangs_commits_through_the_others() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    write(&leader, "a", "1").await.unwrap();
    let before = leader.status();
    stall(cluster.disk(before.node), 10 * SECOND);
    for value in ["2", "3", "4"] {
        let start = tokio::time::Instant::now();
        write(&leader, "a", value).await.unwrap();
        assert!(start.elapsed() < SECOND / 10, "waited {:?} for its own card", start.elapsed());
        tokio::time::sleep(SECOND).await;
    }
    let after = leader.status();
    assert_eq!((after.role, after.term), (Role::Leader, before.term));
    assert_eq!(leader.wal().durable().last.map(|last| last.index), Some(before.last_index));
}

#[tokio::test(start_paused = true)]
async fn a_follower_whose_card_hangs_is_not_sent_the_same_entries_again_and_again() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let slow = cluster.others(leader.status().node)[0];
    stall(cluster.disk(slow), 9 * SECOND);
    let large: &'static str = "x".repeat(100_000).leak();
    write(&leader, "large", large).await.unwrap();
    let carried = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&carried);
    cluster.network.tap(move |_, to, bytes| {
        if to == slow {
            count.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        }
    });
    write(&leader, "large", large).await.unwrap();
    tokio::time::sleep(8 * SECOND).await;
    let carried = carried.load(std::sync::atomic::Ordering::Relaxed);
    assert!((100_000..150_000).contains(&carried), "{carried} bytes for one value of 100,000");
    tokio::time::sleep(20 * SECOND).await;
    cluster.converge().await;
}

/// The regression for openraft's `enable_leader_restore`: a leader that loses power before its own flush of an entry
/// that the others have committed must not come back in the same term and give that entry's id to another command.
#[tokio::test(start_paused = true)]
async fn leader_restore_does_not_give_a_committed_log_id_to_another_command() {
    for voters in [3, 5] {
        let mut cluster = Cluster::of(voters).await;
        let leader = cluster.leader().await;
        let old = leader.status();
        stall(cluster.disk(old.node), 1000 * SECOND);
        write(&leader, "a", "committed by the others").await.unwrap();
        let entry = leader.status().last_index;
        assert!(leader.wal().durable().last.unwrap().index < entry, "its own card has it already");
        drop(leader);

        cluster.kill(old.node).await;
        cluster.start(old.node).await;
        let leader = cluster.leader().await;
        assert!(old.term < leader.status().term, "it went on leading in its old term");
        write(&leader, "b", "another command").await.unwrap();
        cluster.converge().await;
        for node in cluster.peers.values().filter_map(|peer| peer.node.as_ref()) {
            assert_eq!(value(node, "a").unwrap(), "committed by the others");
        }
    }
}

/// An entry of the lease class, which a follower may keep back for company.
fn renewal() -> Command {
    super::put("/registry/leases/kube-node-lease/pi-1", "renewed")
}

#[tokio::test(start_paused = true)]
async fn an_urgent_append_is_not_held_up_by_a_lingering_one_before_it() {
    let mut cluster =
        Cluster { wal_options: Cluster::wal_options(10 * SECOND), ..Cluster::empty(OPTIONS) };
    cluster.found(3).await;
    let leader = cluster.leader().await;
    write(&leader, "a", "1").await.unwrap();
    tokio::time::sleep(SECOND).await;

    let (renewing, start) = (leader.clone(), tokio::time::Instant::now());
    let lingering =
        tokio::spawn(async move { renewing.propose(renewal(), deadline(60 * SECOND)).await });
    tokio::time::sleep(SECOND / 2).await;
    assert!(!lingering.is_finished(), "it did not linger: the test shows nothing");
    write(&leader, "a", "2").await.unwrap();
    assert!(start.elapsed() < SECOND, "the urgent entry took {:?}", start.elapsed());
    lingering.await.unwrap().unwrap();
    assert!(start.elapsed() < SECOND, "and did not take the renewal along");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_dies_silently_is_noticed_and_found_again() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let lost = cluster.others(leader.status().node)[0];
    write(&leader, "a", "1").await.unwrap();
    cluster.converge().await;
    // Nothing is reset: the streams just do not move any more.
    cluster.network.separate(leader.status().node, lost);
    write(&leader, "a", "2").await.unwrap();
    tokio::time::sleep(10 * SECOND).await;
    // What was under way is lost for good, as after a reboot of a router.
    cluster.network.break_connections(|from, to| from == lost || to == lost);
    cluster.network.heal();
    let start = tokio::time::Instant::now();
    cluster.converge().await;
    assert!(start.elapsed() < 3 * SECOND, "it took {:?}", start.elapsed());
    assert_eq!(value(cluster.node(lost), "a").unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_promises_what_is_not_durable_stops_the_node_instead() {
    let cluster = Cluster::of(3).await;
    let follower = cluster.node(cluster.others(cluster.leader().await.status().node)[0]).clone();
    let last = follower.wal().durable().last.unwrap();
    let kept = Promise { upto: Some(types::raft_log_id(last)), vote: None };
    assert_eq!(follower.keep(kept), Ok(()));

    let ahead = LogId { index: last.index.next(), ..last };
    let broken = Promise { upto: Some(types::raft_log_id(ahead)), vote: None };
    let refused = follower.keep(broken).unwrap_err();
    assert!(matches!(&refused, Refused::NotReady(why) if why.contains("persist before reply")));
    let reason = follower.failure().borrow().clone().unwrap();
    assert!(reason.contains(&ahead.to_string()), "{reason}");
    let asked = follower.answer(id(9), Method::Vote, Bytes::new()).await;
    assert_eq!(asked, Err(refused), "and says nothing more");
}

#[tokio::test(start_paused = true)]
async fn following_is_answered_from_memory_and_only_for_the_leader_that_is_followed() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let status = leader.status();
    let follower = cluster.others(status.node)[0];
    stall(cluster.disk(follower), 1000 * SECOND);
    write(&leader, "a", "1").await.unwrap();
    let asks = |term, from| {
        let vote = proto::Vote { term, node: from, committed: true };
        let request = proto::FollowingRequest { vote: Some(vote) }.encode_to_vec().into();
        cluster.node(follower).answer(id(from), Method::Following, request)
    };
    let start = tokio::time::Instant::now();
    let (term, own) = (status.term.get(), status.node.get());
    for (term, from, expected) in
        [(term, own, true), (term - 1, own, false), (term + 1, own, false), (term, 99, false)]
    {
        let reply = asks(term, from).await.unwrap();
        let reply = proto::FollowingReply::decode(reply).unwrap();
        assert_eq!(reply.follows, expected, "term {term}, node {from}");
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    let another = proto::Vote { term, node: own, committed: true };
    let request = proto::FollowingRequest { vote: Some(another) }.encode_to_vec().into();
    let spoofed = cluster.node(follower).answer(id(99), Method::Following, request).await;
    assert!(matches!(spoofed, Err(Refused::Malformed(_))), "{spoofed:?}");
}

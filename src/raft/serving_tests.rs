//! Three nodes serve as one, in simulated time: real logs and stores on simulated cards, messages in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::change::{ChangeError, Leaving};
use super::checkpoint::Policy;
use super::duties::Duty;
use super::runtime::seed_this_thread;
use super::types::Membership;
use super::{Member, Node, Options, Parts, ProposeError, ReadError, Role};
use crate::command::Command;
use crate::env::{BoxFuture, Clock, Env};
use crate::mvcc::{self, DrainOn, Store};
use crate::proto::etcdserverpb as pb;
use crate::proto::node as wire;
use crate::testkit::{FaultDisk, Network, Random, SeededEntropy};
use crate::types::{ByteCount, ClusterId, NodeId, Term};
use crate::wal::{self, Wal};
use crate::{apply, limits};

const CLUSTER: ClusterId = ClusterId::new(0xc1);
const DIR: &str = "/data";

const OPTIONS: Options = Options {
    heartbeat: Duration::from_millis(500),
    election_min: Duration::from_secs(2),
    election_max: Duration::from_secs(4),
    learner_silent_max: limits::LEARNER_SILENT_MAX,
    checkpoint: Policy {
        interval: limits::CHECKPOINT_INTERVAL,
        log_bytes: ByteCount::new(limits::CHECKPOINT_LOG_BYTES),
    },
};

/// The runtime's time, which stands still while somebody works.
#[derive(Debug)]
struct RuntimeClock;

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Clock for RuntimeClock {
    fn now(&self) -> Instant {
        now()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

fn id(number: u64) -> NodeId {
    NodeId::new(number)
}

fn member(id: NodeId) -> Member {
    Member { id, name: format!("pi-{}", id.get()), ..Member::default() }
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn deadline(after: Duration) -> Instant {
    now() + after
}

fn put(key: &str, value: &str) -> Command {
    Command::Put(pb::PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        ..Default::default()
    })
}

/// A board: its card, whether that hangs, and the process on it.
struct Board {
    hangs: watch::Sender<bool>,
    node: Node,
}

struct Cluster {
    network: Network,
    boards: BTreeMap<NodeId, Board>,
}

/// A card whose barriers take 5 ms, and for ever while it hangs.
fn card(hangs: &watch::Sender<bool>) -> FaultDisk {
    let disk = FaultDisk::with_dir(Path::new(DIR));
    let hangs = hangs.subscribe();
    disk.set_sync_delay(Some(Arc::new(move |_path| {
        let mut hangs = hangs.clone();
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let _gone = hangs.wait_for(|hangs| !hangs).await;
        })
    })));
    disk
}

async fn open(env: &Env, node: NodeId) -> (Wal, Store) {
    let options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Task };
    let store = Store::open(env, &Path::new(DIR).join("state.redb"), &options).unwrap();
    let identity = wal::Identity { cluster: CLUSTER, node };
    let options = wal::Options {
        segment_bytes: 256 << 10,
        slots_min: 2,
        slots_max: 4,
        fill_pause: Duration::ZERO,
        ..wal::Options::default()
    };
    let (wal, _, writer) =
        Wal::open(env, &Path::new(DIR).join("wal"), identity, options).await.unwrap();
    tokio::spawn(writer.run());
    (wal, store)
}

impl Cluster {
    /// A cluster of so many voters. The first founds it, the others are promoted by the leader.
    async fn of(voters: u64, seed: u64) -> Self {
        seed_this_thread(seed);
        let mut cluster = Self { network: Network::new(seed), boards: BTreeMap::new() };
        cluster.start(id(1)).await;
        cluster.node(1).found(&member(id(1))).await.unwrap();
        cluster.node(1).elect_if_alone().await.unwrap();
        for number in 2..=voters {
            cluster.start(id(number)).await;
            let added = cluster.node(1).add_learner(&member(id(number)), deadline(secs(10))).await;
            added.unwrap();
            cluster.until_voters(&(1..=number).collect::<Vec<_>>(), secs(20)).await;
        }
        cluster
    }

    async fn start(&mut self, id: NodeId) {
        let hangs = watch::Sender::new(false);
        let disk = card(&hangs);
        let entropy = Arc::new(SeededEntropy::new(id.get()));
        let env = Env { disk: Arc::new(disk), clock: Arc::new(RuntimeClock), entropy };
        let (wal, store) = open(&env, id).await;
        let (member, transport) = (member(id), self.network.transport(id));
        let parts =
            Parts { env, cluster: CLUSTER, member, wal, store, followers: vec![], transport };
        let node = Node::start(parts, &OPTIONS).await.unwrap();
        self.network.join(id, Arc::new(node.clone()));
        self.boards.insert(id, Board { hangs, node });
    }

    fn node(&self, number: u64) -> &Node {
        &self.boards[&id(number)].node
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.boards.values().map(|board| &board.node)
    }

    fn hang(&self, id: NodeId, hangs: bool) {
        self.boards[&id].hangs.send_replace(hangs);
    }

    /// Cuts a node off from everybody, both ways.
    fn isolate(&self, id: NodeId) {
        for other in self.boards.keys().filter(|other| **other != id) {
            self.network.separate(id, *other);
        }
    }

    /// Whoever leads, in the newest term that anybody knows.
    fn leader(&self) -> Option<NodeId> {
        let newest = self.nodes().map(|node| node.status().term).max();
        let leaders = self.nodes().filter(|node| node.status().role == Role::Leader);
        leaders.map(Node::status).find(|status| Some(status.term) == newest).map(|s| s.node)
    }

    async fn until_leader(&self, wanted: impl Fn(NodeId) -> bool) -> NodeId {
        let give_up = deadline(secs(60));
        loop {
            if let Some(leader) = self.leader().filter(|leader| wanted(*leader)) {
                return leader;
            }
            assert!(now() < give_up, "no such leader");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the leader sees exactly these voters, and no learner.
    async fn until_voters(&self, voters: &[u64], within: Duration) {
        let wanted: BTreeSet<NodeId> = voters.iter().copied().map(id).collect();
        let give_up = deadline(within);
        loop {
            let leader = self.until_leader(|_| true).await;
            let members = self.boards[&leader].node.status().members;
            let ids: BTreeSet<NodeId> = members.iter().map(|member| member.id).collect();
            if ids == wanted && members.iter().all(|member| !member.learner) {
                return;
            }
            assert!(now() < give_up, "{members:?}, expected voters {wanted:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Two others than this one.
    fn others(&self, than: NodeId) -> Vec<NodeId> {
        self.boards.keys().copied().filter(|id| *id != than).collect()
    }

    async fn until_retired(&self, node: NodeId) {
        let give_up = deadline(secs(30));
        loop {
            let leader = &self.boards[&self.until_leader(|_| true).await].node;
            let record = apply::node(&leader.store().read().unwrap(), node).unwrap();
            if record.is_some_and(|record| record.retired) {
                return;
            }
            assert!(now() < give_up, "node {node} is not written down as gone");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn write(node: &Node, key: &str, value: &str) {
    node.propose(put(key, value), deadline(secs(20))).await.unwrap();
}

/// What the node's own store has, whether or not that is the newest.
fn stored(node: &Node, key: &str) -> Option<(Bytes, i64)> {
    let view = node.store().read().unwrap();
    view.get(key.as_bytes(), None).unwrap().map(|kv| (kv.value, kv.version))
}

async fn read(node: &Node, key: &str) -> Result<Option<Bytes>, ReadError> {
    let _barrier = node.read_barrier(deadline(secs(5))).await?;
    Ok(stored(node, key).map(|(value, _)| value))
}

#[tokio::test(start_paused = true)]
async fn a_write_through_any_member_is_read_through_any_member() {
    let cluster = Cluster::of(3, 1).await;
    for round in 0..10 {
        for writer in cluster.nodes() {
            let value = format!("{round}-{}", writer.status().node);
            write(writer, "a", &value).await;
            assert_eq!(stored(writer, "a").unwrap().0, value, "who answered has applied it");
            for reader in cluster.nodes() {
                assert_eq!(read(reader, "a").await.unwrap().unwrap(), value);
            }
        }
    }
    for node in cluster.nodes() {
        let status = node.status();
        assert_eq!((status.leader, status.members.len()), (Some(id(1)), 3));
        assert!(status.members.iter().all(|member| !member.learner));
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_was_cut_off_never_serves_what_is_old() {
    let cluster = Cluster::of(3, 2).await;
    let old = cluster.until_leader(|_| true).await;
    write(&cluster.boards[&old].node, "a", "old").await;
    // It goes on sending, and hears nothing: nothing tells it that another one leads.
    for other in cluster.others(old) {
        cluster.network.cut(other, old);
    }
    cluster.isolate(old);
    let new = cluster.until_leader(|leader| leader != old).await;
    write(&cluster.boards[&new].node, "a", "new").await;

    let cut_off = &cluster.boards[&old].node;
    assert_eq!(stored(cut_off, "a").unwrap().0, "old", "it has not heard of the other write");
    let (soon, late) = (read(cut_off, "a").await, cut_off.read_barrier(deadline(secs(1))).await);
    assert!(soon.is_err() && late.is_err(), "{soon:?} {late:?}");
    let waits = tokio::spawn({
        let node = cut_off.clone();
        async move { node.read_barrier(deadline(secs(60))).await.map(drop) }
    });
    tokio::time::sleep(secs(5)).await;
    assert!(!waits.is_finished());
    cluster.network.heal();
    waits.await.unwrap().unwrap();
    assert_eq!(stored(cut_off, "a").unwrap().0, "new");
}

#[tokio::test(start_paused = true)]
async fn no_card_that_hangs_delays_a_read() {
    let cluster = Cluster::of(3, 3).await;
    let leader = cluster.until_leader(|_| true).await;
    write(&cluster.boards[&leader].node, "a", "1").await;
    for follower in cluster.others(leader) {
        cluster.hang(follower, true);
    }
    // Something stands in their logs that their cards do not have yet.
    let node = cluster.boards[&leader].node.clone();
    let pending = tokio::spawn(async move { write(&node, "b", "2").await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..20 {
        for reader in cluster.nodes() {
            let start = now();
            assert_eq!(read(reader, "a").await.unwrap().unwrap(), "1");
            let took = now() - start;
            assert!(took < Duration::from_millis(10), "{took:?}");
        }
        tokio::time::sleep(Duration::from_millis(37)).await;
    }
    assert!(!pending.is_finished(), "two cards of three hang");
    for follower in cluster.others(leader) {
        cluster.hang(follower, false);
    }
    pending.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn readers_that_wait_together_share_one_question() {
    let cluster = Cluster::of(3, 4).await;
    let mut readers = JoinSet::new();
    let start = now();
    for number in 0..600 {
        let node = cluster.node(1 + number % 3).clone();
        readers.spawn(async move { node.read_barrier(deadline(secs(5))).await.map(drop) });
    }
    while let Some(done) = readers.join_next().await {
        done.unwrap().unwrap();
    }
    // One round is under way when most of them come; the next takes them all.
    assert!(now() - start < Duration::from_millis(10), "{:?}", now() - start);
}

#[tokio::test(start_paused = true)]
async fn two_cards_that_hang_make_writes_wait_and_fail_none() {
    let cluster = Cluster::of(3, 5).await;
    let leader = cluster.until_leader(|_| true).await;
    let term = cluster.boards[&leader].node.status().term;
    for follower in cluster.others(leader) {
        cluster.hang(follower, true);
    }
    let mut writes = JoinSet::new();
    for number in 0..30_u64 {
        let node = cluster.node(1 + number % 3).clone();
        writes.spawn(async move {
            tokio::time::sleep(Duration::from_millis(300) * u32::try_from(number).unwrap()).await;
            node.propose(put(&format!("k{number}"), "v"), deadline(secs(30))).await
        });
    }
    tokio::time::sleep(secs(10)).await;
    for follower in cluster.others(leader) {
        cluster.hang(follower, false);
    }
    while let Some(done) = writes.join_next().await {
        done.unwrap().unwrap();
    }
    let status = cluster.boards[&leader].node.status();
    assert_eq!((status.role, status.term), (Role::Leader, term), "no election");
}

/// Writes 50 times a second through a follower while `during` goes on; returns the longest gap between two answers.
async fn longest_gap(cluster: &Cluster, through: NodeId, during: Duration) -> Duration {
    let node = &cluster.boards[&through].node;
    let (end, mut last, mut longest) = (deadline(during), now(), Duration::ZERO);
    let mut number = 0;
    while now() < end {
        write(node, &format!("g{number}"), "v").await;
        longest = longest.max(now() - last);
        last = now();
        number += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    longest
}

#[tokio::test(start_paused = true)]
async fn the_leaders_card_pauses_and_nobody_notices() {
    for pause in [7, 12] {
        let cluster = Cluster::of(3, pause).await;
        let leader = cluster.until_leader(|_| true).await;
        let term = cluster.boards[&leader].node.status().term;
        cluster.hang(leader, true);
        let gap = longest_gap(&cluster, cluster.others(leader)[0], secs(pause)).await;
        cluster.hang(leader, false);
        assert!(gap < Duration::from_millis(150), "{pause} s: {gap:?}");
        tokio::time::sleep(secs(1)).await;
        let status = cluster.boards[&leader].node.status();
        assert_eq!((status.role, status.term), (Role::Leader, term), "no election");
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_whose_card_hangs_hands_over() {
    let cluster = Cluster::of(3, 8).await;
    let leader = cluster.until_leader(|_| true).await;
    cluster.hang(leader, true);
    let through = cluster.others(leader)[0];
    let gap = longest_gap(&cluster, through, limits::CARD_HUNG_EXIT).await;
    assert!(gap < secs(1), "{gap:?}");
    let new = cluster.boards[&through].node.status().leader;
    assert!(new.is_some_and(|new| new != leader), "{new:?}");
    cluster.hang(leader, false);
    let back = &cluster.boards[&leader].node;
    write(back, "a", "1").await;
    assert_eq!(read(back, "a").await.unwrap().unwrap(), "1");
}

#[tokio::test(start_paused = true)]
async fn a_proposal_is_never_applied_twice_whatever_is_cut() {
    for seed in 100..102 {
        let cluster = Cluster::of(3, seed).await;
        let mut random = Random::new(seed);
        let mut writers = JoinSet::new();
        for writer in 0..6_u64 {
            let node = cluster.node(1 + writer % 3).clone();
            writers.spawn(async move {
                let mut results = Vec::new();
                for number in 0..60 {
                    let key = format!("{writer}/{number}");
                    let done = node.propose(put(&key, "v"), deadline(secs(6))).await;
                    results.push((key, done.map(drop)));
                    tokio::time::sleep(Duration::from_millis(150)).await;
                }
                results
            });
        }
        for _ in 0..12 {
            let (one, other) = (id(1 + random.below(3)), id(1 + random.below(3)));
            match random.below(3) {
                0 => cluster.network.cut(one, other),
                1 => cluster.network.separate(one, other),
                _ => cluster.network.break_connections(|from, to| from == one || to == one),
            }
            tokio::time::sleep(Duration::from_millis(random.below(1_500))).await;
            if random.percent(60) {
                cluster.network.heal();
            }
        }
        cluster.network.heal();
        let mut acknowledged = 0;
        let results: Vec<_> = writers.join_all().await.into_iter().flatten().collect();
        let reader = cluster.node(1);
        let _barrier = reader.read_barrier(deadline(secs(60))).await.unwrap();
        for (key, result) in results {
            let version = stored(reader, &key).map_or(0, |(_, version)| version);
            match result {
                Ok(()) => assert_eq!(version, 1, "seed {seed}: {key} was acknowledged"),
                Err(ProposeError::NoLeader | ProposeError::TooManyRequests) => {
                    assert_eq!(version, 0, "seed {seed}: {key} is said not to be written");
                }
                Err(error) => assert!(version <= 1, "seed {seed}: {key} twice, {error}"),
            }
            acknowledged += usize::from(version == 1);
        }
        assert!(100 < acknowledged, "seed {seed}: {acknowledged} of 360");
    }
}

#[tokio::test(start_paused = true)]
async fn leadership_moves_under_load_and_nothing_is_lost() {
    let cluster = Cluster::of(3, 9).await;
    let mut writers = JoinSet::new();
    for writer in 0..9_u64 {
        let node = cluster.node(1 + writer % 3).clone();
        writers.spawn(async move {
            for number in 0..100 {
                write(&node, &format!("{writer}/{number}"), "v").await;
            }
        });
    }
    for to in [2, 3, 1, 3] {
        tokio::time::sleep(Duration::from_millis(200)).await;
        // Any member may be asked.
        let start = now();
        cluster.node(1).transfer_leader(id(to), deadline(secs(10))).await.unwrap();
        assert_eq!(cluster.until_leader(|_| true).await, id(to));
        assert!(now() - start < secs(1), "{:?}", now() - start);
    }
    writers.join_all().await;
    let _barrier = cluster.node(2).read_barrier(deadline(secs(5))).await.unwrap();
    for writer in 0..9 {
        for number in 0..100 {
            assert_eq!(stored(cluster.node(2), &format!("{writer}/{number}")).unwrap().1, 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_stops_leaves_no_gap() {
    let cluster = Cluster::of(3, 10).await;
    let leader = cluster.until_leader(|_| true).await;
    let through = cluster.others(leader)[0];
    let stopping = cluster.boards[&leader].node.clone();
    let stop = tokio::spawn(async move {
        tokio::time::sleep(secs(1)).await;
        stopping.stop().await
    });
    let gap = longest_gap(&cluster, through, secs(5)).await;
    stop.await.unwrap().unwrap();
    assert!(gap < secs(1), "{gap:?}");
}

#[tokio::test(start_paused = true)]
async fn only_the_leader_of_the_term_proposes_in_it() {
    let cluster = Cluster::of(3, 11).await;
    let leader = cluster.until_leader(|_| true).await;
    let node = &cluster.boards[&leader].node;
    let term = node.status().term;
    node.propose_in_term(put("a", "1"), term, deadline(secs(5))).await.unwrap();
    let start = now();
    for wrong in [term.get() - 1, term.get() + 1] {
        let refused = node.propose_in_term(put("a", "2"), Term::new(wrong), deadline(secs(5)));
        assert_eq!(refused.await, Err(ProposeError::NoLeader));
    }
    let follower = &cluster.boards[&cluster.others(leader)[0]].node;
    let refused = follower.propose_in_term(put("a", "2"), term, deadline(secs(5))).await;
    assert_eq!(refused, Err(ProposeError::NoLeader));
    assert!(now() - start < secs(1), "nothing to wait for");
    assert_eq!(read(node, "a").await.unwrap().unwrap(), "1");
}

#[tokio::test(start_paused = true)]
async fn removing_the_dead_one_of_three_is_fine_and_a_living_one_is_refused_with_the_numbers() {
    let mut cluster = Cluster::of(3, 12).await;
    let leader = cluster.until_leader(|_| true).await;
    let [alive, dead] = cluster.others(leader)[..] else { unreachable!("three") };
    cluster.isolate(dead);
    cluster.boards.remove(&dead);
    // Asked of a follower.
    let node = cluster.boards[&alive].node.clone();
    let refused = node.remove_member(alive, deadline(secs(10))).await.unwrap_err();
    let ChangeError::QuorumLost(numbers) = refused else { panic!("{refused}") };
    assert_eq!(
        numbers.to_string(),
        format!("3 voters, 2 alive; removing pi-{alive} leaves 1 of 2 alive, 2 needed")
    );
    node.remove_member(dead, deadline(secs(10))).await.unwrap();
    cluster.until_retired(dead).await;
    let status = node.status();
    assert!(status.voters() == 2 && status.has_even_voters());
    node.remove_member(leader, deadline(secs(20))).await.unwrap();
    cluster.until_retired(leader).await;
    let last = node.remove_member(alive, deadline(secs(10))).await.unwrap_err();
    assert!(
        matches!(&last, ChangeError::QuorumLost(numbers) if numbers.voters_left == 0),
        "{last}"
    );
    write(&node, "a", "1").await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_comes_back_under_a_new_id_takes_its_old_vote() {
    let mut cluster = Cluster::of(3, 13).await;
    let leader = cluster.until_leader(|_| true).await;
    let old = cluster.others(leader)[1];
    cluster.network.leave(old);
    cluster.isolate(old);
    cluster.boards.remove(&old);
    cluster.start(id(4)).await;
    let new = Member { replaces: Some(old), ..member(id(4)) };
    let other = cluster.others(leader)[0];
    cluster.boards[&other].node.add_learner(&new, deadline(secs(10))).await.unwrap();
    cluster.until_voters(&[leader.get(), other.get(), 4], secs(20)).await;
    cluster.until_retired(old).await;
    write(cluster.node(4), "a", "1").await;
}

#[tokio::test(start_paused = true)]
async fn a_learner_that_never_comes_delays_nobody_and_is_given_up() {
    let mut cluster = Cluster::of(1, 14).await;
    let node = cluster.node(1).clone();
    node.add_learner(&member(id(9)), deadline(secs(10))).await.unwrap();
    cluster.start(id(2)).await;
    node.add_learner(&member(id(2)), deadline(secs(10))).await.unwrap();
    tokio::time::sleep(secs(10)).await;
    let voters = |node: &Node| node.status().voters();
    assert_eq!((voters(&node), node.status().members.len()), (2, 3));
    // When: see `duties`. Five minutes are long in a test, even simulated.
    let roster = node.roster().await.unwrap();
    node.carry_out(Duty::GiveUp(id(9), limits::LEARNER_SILENT_MAX), &roster).await.unwrap();
    cluster.until_voters(&[1, 2], secs(1)).await;
    cluster.until_retired(id(9)).await;
    let reason = |node: NodeId| {
        let view = cluster.node(1).store().read().unwrap();
        apply::node(&view, node).unwrap().unwrap().retired_reason
    };
    assert!(Leaving::may_join_again(&reason(id(9))), "{}", reason(id(9)));
    node.add_learner(&member(id(8)), deadline(secs(10))).await.unwrap();
    node.remove_member(id(8), deadline(secs(10))).await.unwrap();
    assert!(!Leaving::may_join_again(&reason(id(8))), "an operator's removal is final");
}

#[tokio::test(start_paused = true)]
async fn a_learner_that_was_given_up_halfway_is_still_known_as_given_up() {
    let mut cluster = Cluster::of(1, 17).await;
    let node = cluster.node(1).clone();
    node.add_learner(&member(id(9)), deadline(secs(10))).await.unwrap();
    // The leader writes it down, and dies; the learner is there after all.
    node.retire(id(9), Leaving::GivenUp.words().to_owned()).await.unwrap();
    cluster.start(id(9)).await;
    tokio::time::sleep(secs(5)).await;
    cluster.until_voters(&[1], secs(1)).await;
    let record = apply::node(&node.store().read().unwrap(), id(9)).unwrap().unwrap();
    assert!(Leaving::may_join_again(&record.retired_reason), "{record:?}");
    assert_eq!(node.status().members.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_node_sets_itself_aside_only_if_the_others_are_a_majority_without_it() {
    let mut cluster = Cluster::of(3, 18).await;
    let leader = cluster.until_leader(|_| true).await;
    let [dead, other] = cluster.others(leader)[..] else { unreachable!("three") };
    cluster.isolate(dead);
    for one in [leader, other] {
        let node = cluster.boards[&one].node.clone();
        let refused = node.set_aside(deadline(secs(10))).await.unwrap_err();
        assert!(matches!(refused, ChangeError::QuorumLost(_)), "{refused}");
    }
    cluster.network.heal();
    tokio::time::sleep(secs(5)).await;
    // Two at once, the leader among them: one after the other, and never so that nobody is left to lead.
    let leader = cluster.until_leader(|_| true).await;
    let [one, last] = cluster.others(leader)[..] else { unreachable!("three") };
    let both = [leader, one].map(|id| cluster.boards[&id].node.clone());
    let asides =
        both.map(|node| tokio::spawn(async move { node.set_aside(deadline(secs(20))).await }));
    for aside in asides {
        aside.await.unwrap().unwrap();
    }
    for gone in [leader, one] {
        cluster.boards.remove(&gone);
    }
    cluster.until_voters(&[last.get()], secs(20)).await;
    for gone in [leader, one] {
        let view = cluster.boards[&last].node.store().read().unwrap();
        let record = apply::node(&view, gone).unwrap().unwrap();
        assert!(Leaving::may_join_again(&record.retired_reason), "{record:?}");
    }
    write(&cluster.boards[&last].node, "a", "1").await;
}

/// What was lost without it: a second after the election, and then the write, though it had never left.
#[tokio::test(start_paused = true)]
async fn a_write_that_waits_for_the_way_to_a_dead_leader_goes_to_the_next_one_at_once() {
    let mut cluster = Cluster::of(3, 19).await;
    let leader = cluster.until_leader(|_| true).await;
    let through = cluster.others(leader)[0];
    cluster.isolate(leader);
    cluster.boards.remove(&leader);
    let node = cluster.boards[&through].node.clone();
    let (mut status, began) = (node.watch_status(), now());
    let writing =
        tokio::spawn(async move { node.propose(put("a", "1"), deadline(secs(30))).await });
    let other = |status: &super::Status| status.leader.is_some_and(|other| other != leader);
    drop(status.wait_for(other).await.unwrap());
    let elected = now();
    writing.await.unwrap().unwrap();
    let (gap, after) = (now() - began, now() - elected);
    println!("written {gap:?} after the end of the leader, {after:?} after the election");
    assert!(after < Duration::from_millis(300), "{after:?}");
}

async fn take_first_step_of_a_removal(node: &Node, leaving: NodeId) {
    let effective = node
        .raft()
        .with_raft_state(|state| state.membership_state.effective().membership().clone());
    let before = effective.await.unwrap();
    let all: BTreeSet<u64> = before.voter_ids().collect();
    let left = all.iter().copied().filter(|id| *id != leaving.get()).collect();
    let nodes: BTreeMap<_, _> = before.nodes().map(|(id, node)| (*id, node.clone())).collect();
    let joint = Membership::new(vec![all, left], nodes).unwrap();
    node.raft().append_membership(joint, super::types::Payload::Blank, []).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_a_dead_leader_left_undone_is_finished() {
    let cluster = Cluster::of(3, 15).await;
    let leader = cluster.until_leader(|_| true).await;
    let node = &cluster.boards[&leader].node;
    // It was started once, left, and nobody wrote that down.
    let boot = wire::Boot { node: 77, epoch: 1, ..Default::default() };
    let change = Some(wire::cluster_change::Change::Boot(boot));
    let boot = Command::Cluster(wire::ClusterChange { change });
    node.propose(boot, deadline(secs(5))).await.unwrap();
    cluster.until_retired(id(77)).await;
    // A removal that took its first step.
    take_first_step_of_a_removal(node, cluster.others(leader)[0]).await;
    cluster.until_voters(&[leader.get(), cluster.others(leader)[1].get()], secs(20)).await;
    cluster.until_retired(cluster.others(leader)[0]).await;
}

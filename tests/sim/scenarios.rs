//! Named runs: what has gone wrong somewhere once, and shapes that must not stop a majority.
//!
//! Each is a cluster brought into one particular situation, with the same checks at every step as the runs from seeds.
//!
//! # Bugs of openraft that were published, and what would see them
//!
//! | bug | scenario |
//! |---|---|
//! | a restarted leader leads on in its term (`enable_leader_restore`) and gives an entry's id away twice | `a_restarted_leader_is_elected_anew` |
//! | #1802: the commit index rises without a majority, when a voter that is ahead already gets further ahead | `openraft_1802_…` |
//! | #1808: a snapshot leaves a stale membership in force, and two majorities that do not meet | `openraft_1808_…` |
//! | #2080: a follower between two halves stays loyal to the old leader, and a connected majority elects nobody | `bridge_of_…`, `chain_of_…`, `mute_leader_of_…` |
//! | leadership is offered to whoever cannot take it, and nobody takes writes | `leadership_offered_to_a_dead_node_comes_back` |

use std::time::Duration;

use bytes::Bytes;
use k3s_server::raft::Member;
use k3s_server::testkit::Random;
use k3s_server::testkit::disk::Fault;
use k3s_server::types::NodeId;
use tokio::time::sleep;

use crate::client::write_once;
use crate::cluster::Cluster;
use crate::history::{History, Saw};
use crate::machine::{Live, Machine, raft_options};
use crate::partition::Shape;
use crate::run::{self, Report, Watch};
use crate::world::World;

/// A majority that is connected has a leader within this time.
const ELECTED_WITHIN: Duration = Duration::from_secs(30);

/// Everything that is run by name.
pub(crate) const NAMES: &[&str] = &[
    "a_restarted_leader_is_elected_anew",
    "nothing_is_committed_without_a_majority",
    "openraft_1802_no_voter_that_runs_ahead_stands_for_a_majority",
    "openraft_1808_a_snapshot_ends_a_membership_that_was_never_committed",
    "founding_survives_a_power_cut_at_every_write",
    "joining_survives_a_power_cut_at_every_write",
    "leadership_offered_to_a_dead_node_comes_back",
    "bridge_of_3",
    "bridge_of_5",
    "bridge_of_7",
    "chain_of_3",
    "mute_leader_of_3",
    "mute_leader_of_5",
    "deaf_leader_of_3",
    "deaf_leader_of_5",
    "lonely_leader_of_3",
    "halves_of_5",
    "ring_of_3",
    "ring_of_5_heals",
    "chain_of_5_heals",
];

/// Runs one by its name.
pub(crate) fn run(name: &str, watch: Watch) -> Option<Report> {
    if !NAMES.contains(&name) {
        return None;
    }
    let (world, ()) = run::simulate(1, watch, |world| scenario(name.to_owned(), world));
    Some(run::report(&world))
}

/// A cluster and what its clients saw.
struct Scene {
    world: World,
    cluster: Cluster,
    history: History,
    written: u64,
}

async fn scenario(name: String, world: World) {
    let cluster = Cluster::new(world.clone(), raft_options(), Duration::from_millis(5));
    let mut scene =
        Scene { world: world.clone(), cluster, history: History::default(), written: 0 };
    let done = match name.as_str() {
        "a_restarted_leader_is_elected_anew" => scene.restarted_leader().await,
        "nothing_is_committed_without_a_majority" => scene.no_majority().await,
        "openraft_1802_no_voter_that_runs_ahead_stands_for_a_majority" => {
            scene.ahead_without_majority().await
        }
        "openraft_1808_a_snapshot_ends_a_membership_that_was_never_committed" => {
            scene.stale_membership().await
        }
        "founding_survives_a_power_cut_at_every_write" => founding(&world).await,
        "joining_survives_a_power_cut_at_every_write" => joining(&world).await,
        "leadership_offered_to_a_dead_node_comes_back" => scene.offer_to_the_dead().await,
        "bridge_of_3" => scene.shape(3, Shape::Bridge, Place::Second, true).await,
        "bridge_of_5" => scene.shape(5, Shape::Bridge, Place::Second, true).await,
        "bridge_of_7" => scene.shape(7, Shape::Bridge, Place::Last, true).await,
        "chain_of_3" => scene.shape(3, Shape::Chain, Place::Last, true).await,
        "mute_leader_of_3" => scene.shape(3, Shape::Mute, Place::First, true).await,
        "mute_leader_of_5" => scene.shape(5, Shape::Mute, Place::First, true).await,
        "deaf_leader_of_3" => scene.shape(3, Shape::Deaf, Place::First, true).await,
        "deaf_leader_of_5" => scene.shape(5, Shape::Deaf, Place::First, true).await,
        "lonely_leader_of_3" => scene.shape(3, Shape::Alone, Place::First, true).await,
        "halves_of_5" => scene.shape(5, Shape::Halves, Place::First, true).await,
        "ring_of_3" => scene.shape(3, Shape::Ring, Place::First, true).await,
        // Nobody reaches a majority of which everybody reaches everybody: what must be is only that it heals.
        "ring_of_5_heals" => scene.shape(5, Shape::Ring, Place::First, false).await,
        "chain_of_5_heals" => scene.shape(5, Shape::Chain, Place::First, false).await,
        _ => Ok(()),
    };
    if let Err(what) = done {
        world.violation(|| format!("{name}: {what}"));
    }
}

/// Where in the shape the leader stands.
#[derive(Clone, Copy)]
enum Place {
    First,
    Second,
    Last,
}

impl Scene {
    async fn form(&self, members: usize) -> Result<Live, String> {
        if !self.cluster.form(members).await {
            return Err("no cluster".to_owned());
        }
        let all_know = || {
            let statuses = self.cluster.statuses();
            let voters = |status: &k3s_server::raft::Status| {
                status.members.iter().filter(|member| !member.learner).count()
            };
            (statuses.len() == members && statuses.iter().all(|status| voters(status) == members))
                .then(|| self.cluster.leader())
                .flatten()
        };
        self.cluster
            .wait(Duration::from_secs(20), all_know)
            .await
            .ok_or("not everybody knows".to_owned())
    }

    fn machine(&self, id: NodeId) -> Machine {
        match self.cluster.machines().into_iter().find(|machine| machine.id == id) {
            Some(machine) => machine,
            None => unreachable!("no machine {id}"),
        }
    }

    /// Writes once through a node. True if it was acknowledged.
    async fn write(&mut self, live: &Live) -> Result<bool, String> {
        self.written += 1;
        let tag = Bytes::from(format!("s{}", self.written));
        Ok(matches!(write_once(live, &self.history, tag).await?, Saw::Wrote { .. }))
    }

    /// Writes until one is acknowledged by anybody, for so long.
    async fn write_within(&mut self, most: Duration) -> Result<Duration, String> {
        let begin = self.world.elapsed();
        let mut turn = 0;
        while self.world.elapsed() - begin < most {
            if self.world.is_violated() {
                return Err("a violation came first".to_owned());
            }
            let live: Vec<Live> =
                self.cluster.machines().iter().filter_map(Machine::live).collect();
            turn += 1;
            if let Some(live) = live.get(turn % live.len().max(1)).cloned()
                && self.write(&live).await?
            {
                return Ok(self.world.elapsed() - begin);
            }
            sleep(Duration::from_millis(50)).await;
        }
        Err(format!("no write within {most:?}: {:?}", self.cluster.statuses()))
    }

    /// Peace, and everybody becomes equal; what clients saw holds.
    async fn end(&mut self) -> Result<(), String> {
        self.cluster.around.network.heal();
        self.cluster.machines().iter().for_each(Machine::start);
        self.write_within(Duration::from_secs(25)).await?;
        let equal = self.cluster.wait(Duration::from_secs(60), || self.cluster.converged()).await;
        equal.ok_or_else(|| format!("not equal: {:?}", self.cluster.statuses()))?;
        self.cluster.compare_states();
        self.history.check(&self.cluster.around.oracle.revisions())
    }

    /// A leader's entry is committed by the others before its own card has it; then its power goes. With openraft's default it
    /// leads on in the same term, and gives the entry's name to another one.
    async fn restarted_leader(&mut self) -> Result<(), String> {
        let leader = self.form(3).await?;
        let id = leader.node.status().node;
        let machine = self.machine(id);
        self.write(&leader).await?;
        machine.card.stall(Duration::from_secs(8));
        if !self.write(&leader).await? {
            return Err("the others did not commit while the leader's card stalled".to_owned());
        }
        machine.power_cut_losing_everything();
        machine.start();
        self.write_within(Duration::from_secs(20)).await?;
        self.end().await
    }

    /// A leader with a minority takes nothing for committed, also not a change of members; what it took in is replaced.
    async fn no_majority(&mut self) -> Result<(), String> {
        let leader = self.form(5).await?;
        let id = leader.node.status().node;
        let with = self.cluster.ids().into_iter().find(|other| *other != id).unwrap_or(id);
        let (inside, outside): (Vec<_>, Vec<_>) =
            self.cluster.ids().into_iter().partition(|other| *other == id || *other == with);
        for from in &inside {
            for to in &outside {
                self.cluster.around.network.cut(*from, *to);
                self.cluster.around.network.cut(*to, *from);
            }
        }
        if self.write(&leader).await? {
            return Err("a write was acknowledged by a leader with one follower of four".to_owned());
        }
        let by = tokio::time::Instant::now() + Duration::from_secs(3);
        if leader.node.remove_member(outside[0], by.into_std()).await.is_ok() {
            return Err("a member was removed by a leader with one follower of four".to_owned());
        }
        self.write_within(ELECTED_WITHIN).await?;
        self.end().await
    }

    /// Two of five, the leader among them, run ahead together entry by entry; the other three reach nobody.
    async fn ahead_without_majority(&mut self) -> Result<(), String> {
        const WRITES: usize = 8;
        let leader = self.form(5).await?;
        self.write(&leader).await?;
        let ids = self.cluster.ids();
        let id = leader.node.status().node;
        let with = ids.iter().copied().find(|other| *other != id).unwrap_or(id);
        let together = |node: NodeId| node == id || node == with;
        for from in &ids {
            for to in ids.iter().filter(|to| *to != from) {
                if !(together(*from) && together(*to)) {
                    self.cluster.around.network.cut(*from, *to);
                }
            }
        }
        let before = leader.node.status().committed;
        let writes = (0..WRITES).map(|number| {
            write_once(&leader, &self.history, Bytes::from(format!("ahead{number}")))
        });
        for saw in futures_util::future::join_all(writes).await {
            if matches!(saw?, Saw::Wrote { .. }) {
                return Err("a write was acknowledged by two of five".to_owned());
            }
        }
        let status = leader.node.status();
        if before < status.committed || status.last_index <= before {
            return Err(format!("committed {before}, then {status:?}"));
        }
        self.end().await
    }

    /// A leader that is cut off appends a change of members that is never committed; the others purge what it would need, so that it
    /// comes back by a snapshot. What it believed of the members must end with that.
    async fn stale_membership(&mut self) -> Result<(), String> {
        const WRITES: usize = 300;
        let leader = self.form(3).await?;
        let id = leader.node.status().node;
        let ids = self.cluster.ids();
        for other in ids.iter().copied().filter(|other| *other != id) {
            self.cluster.around.network.cut(id, other);
            self.cluster.around.network.cut(other, id);
        }
        let by = tokio::time::Instant::now() + Duration::from_secs(2);
        let phantom = Member { id: NodeId::new(99), learner: true, ..Member::default() };
        if leader.node.add_learner(&phantom, by.into_std()).await.is_ok() {
            return Err("a member was added by one of three".to_owned());
        }
        let believed = leader.node.status().members.len();
        self.write_within(ELECTED_WITHIN).await?;
        let others = || self.cluster.machines().into_iter().filter(|machine| machine.id != id);
        for number in 0..WRITES {
            let live = self.cluster.leader().filter(|live| live.node.status().node != id);
            let Some(live) = live.or_else(|| others().find_map(|one| one.live())) else { continue };
            let mut tag = format!("bulk{number}-").into_bytes();
            tag.resize(8 << 10, b'x');
            write_once(&live, &self.history, Bytes::from(tag)).await?;
        }
        sleep(Duration::from_secs(60)).await;
        self.end().await?;
        let machine = self.machine(id);
        let live = machine.live().ok_or("the old leader does not run")?;
        if live.node.stats().snapshots_received == 0 {
            return Err("it came back without a snapshot: the test shows nothing".to_owned());
        }
        let members = live.node.status().members;
        if members.len() != 3 || believed != 4 {
            return Err(format!("{believed} members believed, then {members:?}"));
        }
        Ok(())
    }

    /// Leadership is offered to a node that is switched off: writes go on, if not at once.
    async fn offer_to_the_dead(&mut self) -> Result<(), String> {
        let leader = self.form(3).await?;
        let id = leader.node.status().node;
        let dead = self.cluster.ids().into_iter().find(|other| *other != id).unwrap_or(id);
        self.machine(dead).kill();
        let by = tokio::time::Instant::now() + Duration::from_secs(3);
        // What it answers is not the point.
        let _answer = leader.node.transfer_leader(dead, by.into_std()).await;
        let took = self.write_within(Duration::from_secs(20)).await?;
        crate::world::trace!(self.world, "writes again after {took:?}");
        self.end().await
    }

    /// A partition of this shape, and a connected majority in it.
    async fn shape(
        &mut self,
        members: usize,
        shape: Shape,
        place: Place,
        elects: bool,
    ) -> Result<(), String> {
        let leader = self.form(members).await?.node.status().node;
        let mut order: Vec<NodeId> =
            self.cluster.ids().into_iter().filter(|id| *id != leader).collect();
        let at = match place {
            Place::First => 0,
            Place::Second => 1,
            Place::Last => order.len(),
        };
        order.insert(at, leader);
        for (from, to) in shape.cuts_in_order(&order, &mut Random::new(1)) {
            self.cluster.around.network.cut(from, to);
        }
        if elects {
            let took = self.write_within(ELECTED_WITHIN).await?;
            crate::world::trace!(self.world, "{shape:?} of {members} writes after {took:?}");
            // It stays so: two leaders must not take turns deposing each other.
            for _ in 0..20 {
                sleep(Duration::from_secs(1)).await;
                self.write_within(ELECTED_WITHIN).await?;
            }
        } else {
            sleep(Duration::from_secs(20)).await;
        }
        self.end().await
    }
}

/// Most writes a founding or a join is expected to need; the loop ends when no power cut strikes any more.
const WRITES_MAX: u64 = 400;

/// The power goes at the first, the second, … write of a founder; every time the next start finishes the job.
async fn founding(world: &World) -> Result<(), String> {
    for nth in 1..WRITES_MAX {
        let cluster = Cluster::new(world.clone(), raft_options(), Duration::from_millis(5));
        let machine = cluster.add_machine();
        if !cut_at(&cluster, &machine, nth, Duration::from_secs(20)).await? {
            return if nth < 10 { Err(format!("founding took only {nth} writes")) } else { Ok(()) };
        }
        machine.retire();
    }
    Err("a founding that never ends".to_owned())
}

/// The same for a second server that joins: its id is a member's, or is not, but never half.
async fn joining(world: &World) -> Result<(), String> {
    for nth in 1..WRITES_MAX {
        let cluster = Cluster::new(world.clone(), raft_options(), Duration::from_millis(5));
        if !cluster.form(1).await {
            return Err("no cluster".to_owned());
        }
        let joiner = cluster.add_machine();
        let admitted = {
            let (cluster, joiner) = (cluster.clone(), joiner.clone());
            tokio::spawn(async move { cluster.admit(&joiner, Duration::from_secs(60)).await })
        };
        let struck = cut_at(&cluster, &joiner, nth, Duration::from_secs(20)).await?;
        if !admitted.await.unwrap_or(false) {
            return Err(format!(
                "power cut at write {nth}: not admitted, {:?}",
                cluster.statuses()
            ));
        }
        cluster.machines().iter().for_each(Machine::retire);
        if !struck {
            return if nth < 10 { Err(format!("joining took only {nth} writes")) } else { Ok(()) };
        }
    }
    Err("a join that never ends".to_owned())
}

/// Starts a machine whose power goes at its `nth` write, and once more. False if it had no such write.
async fn cut_at(
    cluster: &Cluster,
    machine: &Machine,
    nth: u64,
    most: Duration,
) -> Result<bool, String> {
    machine.excuse();
    machine.card.disk().fail(Fault::power_loss(nth));
    machine.start();
    let leads = || cluster.leader().filter(|_| machine.live().is_some());
    let settled = || {
        let struck = machine.card.disk().has_failed();
        let done =
            leads().is_some() && cluster.statuses().iter().all(|s| s.applied == s.last_index);
        (struck || done).then_some(struck)
    };
    let struck = cluster.wait(most, settled).await.ok_or("neither done nor struck")?;
    machine.power_cut();
    machine.trust();
    machine.start();
    match cluster.wait(most, leads).await {
        Some(_) => Ok(struck),
        None => Err(format!("power cut at write {nth}: no leader within {most:?}")),
    }
}

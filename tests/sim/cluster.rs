//! All machines of a run, and what an operator does with them: adding members, removing them, waiting for a leader.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k3s_server::proto::node::{self as wire, StoredMembership};
use k3s_server::raft::{ChangeError, Role, Status};
use k3s_server::testkit::Random;
use k3s_server::types::{LogId, NodeId};
use tokio::time::{Instant, sleep};

use crate::machine::{Live, Machine, Surroundings};
use crate::network::Network;
use crate::oracle::Oracle;
use crate::promises::Promises;
use crate::world::{World, trace};

/// How often somebody who waits looks again.
const LOOK: Duration = Duration::from_millis(100);

/// How long one change of members may take.
const CHANGE: Duration = Duration::from_secs(5);

/// See the module documentation. Clones share the machines.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) around: Surroundings,
    machines: Arc<Mutex<Machines>>,
    typical_sync: Duration,
}

#[derive(Default)]
struct Machines {
    by_id: BTreeMap<u64, Machine>,
    next_id: u64,
}

impl Cluster {
    /// Nobody yet.
    pub(crate) fn new(
        world: World,
        raft: k3s_server::raft::Options,
        typical_sync: Duration,
    ) -> Self {
        let oracle = Oracle::new(world.clone());
        let promises = Promises::new(oracle.clone());
        let network = Network::new(world.clone(), promises);
        let around = Surroundings { world, network, oracle, raft };
        Self { around, machines: Arc::default(), typical_sync }
    }

    /// A new machine with an empty card, switched off. The first founds the cluster.
    pub(crate) fn add_machine(&self) -> Machine {
        let mut machines = self.lock();
        machines.next_id += 1;
        let id = NodeId::new(machines.next_id);
        let machine = Machine::new(&self.around, id, machines.next_id == 1, self.typical_sync);
        machines.by_id.insert(id.get(), machine.clone());
        machine
    }

    /// The members, as whoever knows the newest tells a joiner.
    fn contacts(&self) -> Option<StoredMembership> {
        let newest = self.statuses().into_iter().max_by_key(|status| status.applied)?;
        if newest.members.is_empty() {
            return None;
        }
        let ids = newest.members.iter().filter(|member| !member.learner).map(|m| m.id.get());
        let members = newest.members.iter().map(|member| wire::Member {
            id: member.id.get(),
            name: member.name.clone(),
            peer_urls: member.peer_urls.clone(),
            ..wire::Member::default()
        });
        let configs = vec![wire::VoterSet { ids: ids.collect() }];
        let membership = wire::Membership { configs, members: members.collect() };
        Some(StoredMembership { log_id: None, membership: Some(membership) })
    }

    /// Takes a machine away for ever.
    pub(crate) fn discard(&self, id: NodeId) {
        let machine = self.lock().by_id.remove(&id.get());
        if let Some(machine) = machine {
            machine.retire();
        }
    }

    /// Takes a machine away that was removed, or never got in. True if it did.
    pub(crate) fn discard_unless_member(&self, id: NodeId) -> bool {
        let Some(leader) = self.leader() else { return false };
        let member = leader.node.status().members.iter().any(|member| member.id == id);
        if !member {
            self.discard(id);
        }
        !member
    }

    /// All machines, by id.
    pub(crate) fn machines(&self) -> Vec<Machine> {
        self.lock().by_id.values().cloned().collect()
    }

    pub(crate) fn ids(&self) -> Vec<NodeId> {
        self.machines().iter().map(|machine| machine.id).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Machines> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some node that runs.
    pub(crate) fn any_live(&self, random: &mut Random) -> Option<Live> {
        let live: Vec<Live> = self.machines().iter().filter_map(Machine::live).collect();
        (!live.is_empty()).then(|| live[random.index(live.len())].clone())
    }

    /// The state of every node that runs.
    pub(crate) fn statuses(&self) -> Vec<Status> {
        self.machines().iter().filter_map(Machine::live).map(|live| live.node.status()).collect()
    }

    /// A node that leads in the newest term that anybody leads in.
    pub(crate) fn leader(&self) -> Option<Live> {
        let machines = self.machines();
        let leading = machines.iter().filter_map(Machine::live).filter_map(|live| {
            let status = live.node.status();
            (status.role == Role::Leader).then_some((status.term, live))
        });
        leading.max_by_key(|(term, _)| *term).map(|(_, live)| live)
    }

    /// Waits until `look` finds something, for so long.
    pub(crate) async fn wait<T>(&self, most: Duration, look: impl Fn() -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + most;
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if deadline <= Instant::now() || self.around.world.is_violated() {
                return None;
            }
            sleep(LOOK).await;
        }
    }

    /// Founds the cluster on the first machine and makes so many members of it. False if a violation came first.
    pub(crate) async fn form(&self, members: usize) -> bool {
        self.add_machine().start();
        for _ in 1..members {
            let machine = self.add_machine();
            machine.start();
            if !self.admit(&machine, Duration::from_secs(60)).await {
                self.around
                    .world
                    .violation(|| format!("node {} did not become a voter in 60 s", machine.id));
                return false;
            }
        }
        true
    }

    /// Makes a machine a voter: learner first, promoted when it has caught up. Repeated until done, as an operator would.
    pub(crate) async fn admit(&self, machine: &Machine, most: Duration) -> bool {
        let deadline = Instant::now() + most;
        while Instant::now() < deadline && !self.around.world.is_violated() {
            if let Some(contacts) = self.contacts() {
                machine.tell(contacts);
            }
            if let Some(leader) = self.leader() {
                let status = leader.node.status();
                let known = status.members.iter().find(|member| member.id == machine.id);
                let by = (Instant::now() + CHANGE).into_std();
                let done = match known {
                    Some(member) if !member.learner => return true,
                    Some(_) => leader.node.promote(machine.id, by).await,
                    None => leader.node.add_learner(&machine.member(), by).await,
                };
                self.note("admit", machine.id, &done);
            }
            sleep(LOOK).await;
        }
        false
    }

    /// Removes a member.
    pub(crate) async fn remove(&self, id: NodeId, most: Duration) -> bool {
        let deadline = Instant::now() + most;
        while Instant::now() < deadline && !self.around.world.is_violated() {
            if let Some(leader) = self.leader() {
                let status = leader.node.status();
                if status.members.iter().all(|member| member.id != id) {
                    return true;
                }
                let by = (Instant::now() + CHANGE).into_std();
                let done = leader.node.remove_member(id, by).await;
                self.note("remove", id, &done);
            }
            sleep(LOOK).await;
        }
        false
    }

    fn note(&self, what: &str, id: NodeId, done: &Result<(), ChangeError>) {
        trace!(self.around.world, "{what} {id}: {done:?}");
    }

    /// Shows the oracle the state of every node that runs.
    pub(crate) fn compare_states(&self) {
        for machine in self.machines() {
            let Some(live) = machine.live() else { continue };
            if let Ok(view) = live.node.store().read()
                && let (Some(applied), Ok(hash)) = (view.applied(), view.state_hash())
            {
                self.around.oracle.state(machine.id, applied, hash);
            }
        }
    }

    /// What all members have applied, if it is the same, is all there is, and all run.
    pub(crate) fn converged(&self) -> Option<LogId> {
        let machines = self.machines();
        let mut applied = machines.iter().map(|machine| {
            let live = machine.live()?;
            live.node.store().read().ok()?.applied()
        });
        let first = applied.next()??;
        let same = applied.all(|applied| applied == Some(first));
        let ends = self.statuses().iter().all(|status| status.last_index == first.index);
        (same && ends).then_some(first)
    }
}

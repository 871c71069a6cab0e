//! What goes wrong in one run, and when: drawn from the seed, a different mixture for every run.
//!
//! Every run switches some kinds of trouble on and leaves others off, so that runs differ in kind and not only in order. What a
//! majority cannot survive by design (lasting damage to a majority's cards) is never done.

use std::time::Duration;

use k3s_server::testkit::Random;
use k3s_server::testkit::disk::{Failure, Fault, changes};
use k3s_server::types::NodeId;
use tokio::time::sleep;

use crate::cluster::Cluster;
use crate::machine::Machine;
use crate::network::Weather;
use crate::partition::Shape;
use crate::world::trace;

/// Kinds of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    PowerCut,
    PowerCutAtWrite,
    Kill,
    WholeClusterPowerCut,
    Partition,
    Weather,
    Stall,
    SlowCard,
    WriteError,
    FullCard,
    ClockStep,
    Transfer,
    Compact,
    Checkpoint,
    Replace,
    Rot,
    Rollback,
}

impl Trouble {
    pub(crate) const ALL: &'static [Self] = &[
        Self::PowerCut,
        Self::PowerCutAtWrite,
        Self::Kill,
        Self::WholeClusterPowerCut,
        Self::Partition,
        Self::Weather,
        Self::Stall,
        Self::SlowCard,
        Self::WriteError,
        Self::FullCard,
        Self::ClockStep,
        Self::Transfer,
        Self::Compact,
        Self::Checkpoint,
        Self::Replace,
        Self::Rot,
        Self::Rollback,
    ];
}

/// What is done in one run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) members: usize,
    pub(crate) clients: u64,
    pub(crate) client_pause: Duration,
    pub(crate) typical_sync: Duration,
    pub(crate) troubles: Vec<Trouble>,
    /// Mean time between two troubles.
    pub(crate) every: Duration,
}

impl Plan {
    /// A mixture.
    pub(crate) fn draw(random: &mut Random) -> Self {
        let members = std::env::var("M")
            .ok()
            .map_or([3, 3, 3, 3, 5, 5, 1, 4][random.index(8)], |m| m.parse().unwrap_or(1));
        let some = 40 + random.below(60);
        let mut troubles: Vec<Trouble> =
            Trouble::ALL.iter().copied().filter(|_| random.percent(some)).collect();
        if troubles.is_empty() {
            troubles.push(Trouble::PowerCut);
        }
        Self {
            members,
            clients: 2 + random.below(4),
            client_pause: Duration::from_millis(50 + random.below(400)),
            typical_sync: Duration::from_millis([2, 10, 20, 50][random.index(4)]),
            troubles,
            every: Duration::from_millis(500 + random.below(4_000)),
        }
    }
}

/// How often each was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done(pub(crate) std::collections::BTreeMap<Trouble, u64>);

/// Does it.
pub(crate) struct Nemesis {
    pub(crate) plan: Plan,
    pub(crate) cluster: Cluster,
    pub(crate) random: Random,
    pub(crate) done: Done,
}

impl Nemesis {
    /// Makes trouble for so long.
    pub(crate) async fn run(&mut self, duration: Duration) {
        let end = tokio::time::Instant::now() + duration;
        let every = u64::try_from(self.plan.every.as_millis()).unwrap_or(1);
        while tokio::time::Instant::now() < end && !self.cluster.around.world.is_violated() {
            let trouble = self.plan.troubles[self.random.index(self.plan.troubles.len())];
            self.make(trouble).await;
            *self.done.0.entry(trouble).or_default() += 1;
            sleep(Duration::from_millis(self.random.below(2 * every))).await;
            self.cluster.compare_states();
        }
    }

    /// Takes all trouble away and switches everything on.
    pub(crate) fn relent(&self) {
        let around = &self.cluster.around;
        trace!(around.world, "all trouble ends");
        around.network.heal();
        around.network.set_weather(Weather::default());
        for machine in self.cluster.machines() {
            machine.card.disk().heal();
            machine.card.disk().set_capacity(0);
            machine.card.set_typical(Duration::from_millis(5));
            machine.start();
        }
    }

    fn any(&mut self) -> Machine {
        let machines = self.cluster.machines();
        machines[self.random.index(machines.len())].clone()
    }

    /// Switched on again some time later.
    fn back_later(&mut self, machine: &Machine) {
        let off = if self.random.percent(70) {
            self.random.below(2_000)
        } else {
            self.random.below(15_000)
        };
        let machine = machine.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(off)).await;
            machine.start();
        });
    }

    async fn make(&mut self, trouble: Trouble) {
        let machine = self.any();
        trace!(self.cluster.around.world, "trouble {trouble:?} {}", machine.id);
        match trouble {
            Trouble::PowerCut => {
                machine.power_cut();
                self.back_later(&machine);
            }
            Trouble::PowerCutAtWrite => self.power_cut_at_write(&machine),
            Trouble::Kill => {
                machine.kill();
                self.back_later(&machine);
            }
            Trouble::WholeClusterPowerCut => self.power_cut_all(),
            Trouble::Partition => self.partition(),
            Trouble::Weather => self.weather(),
            Trouble::Stall => {
                machine.card.stall(Duration::from_millis(500 + self.random.below(9_500)));
            }
            Trouble::SlowCard => {
                let millis = [2, 20, 100, 400][self.random.index(4)];
                machine.card.set_typical(Duration::from_millis(millis));
            }
            Trouble::WriteError => {
                self.fail(&machine, Fault { only: changes, ..Fault::once(1, Failure::Eio) });
            }
            Trouble::FullCard => self.fill(&machine),
            Trouble::ClockStep => {
                let seconds = [-2_592_000, -3_600, -5, 5, 86_400, 315_360_000];
                machine.clock.step(seconds[self.random.index(seconds.len())]);
            }
            Trouble::Transfer => self.transfer(),
            Trouble::Compact => self.compact(),
            Trouble::Checkpoint => self.checkpoint(&machine),
            Trouble::Replace => {
                let members = self.cluster.machines().len();
                if 3 <= members {
                    self.replace(machine.id).await;
                }
            }
            Trouble::Rot => self.rot(&machine).await,
            Trouble::Rollback => self.roll_back(&machine).await,
        }
    }

    /// The power goes at the next write but some, not at a moment that the clock chooses.
    fn power_cut_at_write(&mut self, machine: &Machine) {
        let nth = 1 + self.random.below(12);
        machine.excuse();
        machine.card.disk().fail(Fault::power_loss(nth));
        let off = Duration::from_millis(self.random.below(5_000));
        let machine = machine.clone();
        tokio::spawn(async move {
            for _ in 0..2_000 {
                if machine.card.disk().has_failed() {
                    break;
                }
                sleep(Duration::from_millis(1)).await;
            }
            machine.power_cut();
            // It may have been off all the time; then this lifts the fault.
            machine.trust();
            sleep(off).await;
            machine.start();
        });
    }

    fn power_cut_all(&mut self) {
        for machine in self.cluster.machines() {
            machine.power_cut();
            self.back_later(&machine);
        }
    }

    fn partition(&mut self) {
        let ids: Vec<NodeId> = self.cluster.ids();
        let shape = Shape::ALL[self.random.index(Shape::ALL.len())];
        let network = &self.cluster.around.network;
        network.heal();
        let cuts = shape.cuts(&ids, &mut self.random);
        trace!(self.cluster.around.world, "{shape:?} {cuts:?}");
        for (from, to) in cuts {
            network.cut(from, to);
        }
        if self.random.percent(80) {
            let lasts = Duration::from_millis(200 + self.random.below(12_000));
            let network = network.clone();
            tokio::spawn(async move {
                sleep(lasts).await;
                network.heal();
            });
        }
    }

    fn weather(&mut self) {
        let max = [1, 5, 50, 300][self.random.index(4)];
        self.cluster.around.network.set_weather(Weather {
            delay_min: Duration::from_micros(200),
            delay_max: Duration::from_millis(max),
            loss_percent: [0, 0, 1, 5, 20][self.random.index(5)],
        });
    }

    fn fail(&mut self, machine: &Machine, fault: Fault) {
        machine.excuse();
        machine.card.disk().fail(fault);
        let machine = machine.clone();
        let lasts = Duration::from_millis(self.random.below(3_000));
        tokio::spawn(async move {
            sleep(lasts).await;
            machine.trust();
        });
    }

    fn fill(&mut self, machine: &Machine) {
        machine.excuse();
        // Whatever there is, there is no room for more.
        machine.card.disk().set_capacity(1);
        let lasts = Duration::from_millis(500 + self.random.below(8_000));
        let machine = machine.clone();
        tokio::spawn(async move {
            sleep(lasts).await;
            machine.card.disk().set_capacity(0);
            sleep(Duration::from_secs(5)).await;
            machine.trust();
        });
    }

    fn transfer(&mut self) {
        let Some(leader) = self.cluster.leader() else { return };
        let to = self.any().id;
        tokio::spawn(async move {
            let by = tokio::time::Instant::now() + Duration::from_secs(5);
            tokio::select! {
                biased;
                () = leader.gone() => {}
                _done = leader.node.transfer_leader(to, by.into_std()) => {}
            }
        });
    }

    fn compact(&mut self) {
        let Some(live) = self.cluster.any_live(&mut self.random) else { return };
        tokio::spawn(async move {
            let Ok(view) = live.node.store().read() else { return };
            let request = k3s_server::proto::etcdserverpb::CompactionRequest {
                revision: view.revision().get(),
                physical: false,
            };
            drop(view);
            let by = tokio::time::Instant::now() + Duration::from_secs(5);
            let command = k3s_server::command::Command::Compact(request);
            tokio::select! {
                biased;
                () = live.gone() => {}
                _done = live.node.propose(command, by.into_std()) => {}
            }
        });
    }

    fn checkpoint(&self, machine: &Machine) {
        let Some(live) = machine.live() else { return };
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = live.gone() => {}
                _done = live.node.checkpoint() => {}
            }
        });
    }

    /// Whether one card more may lose what is on it: the others are a majority, and all of them are well.
    fn may_lose(&self, one: &Machine) -> bool {
        let machines = self.cluster.machines();
        let others = machines.iter().filter(|machine| machine.id != one.id);
        let voters = |status: &k3s_server::raft::Status| {
            status.members.len() == machines.len() && status.members.iter().all(|m| !m.learner)
        };
        3 <= machines.len()
            && others.clone().all(|other| other.is_known() && !other.is_out())
            && one.is_known()
            && self.cluster.leader().is_some_and(|leader| voters(&leader.node.status()))
    }

    /// A bit of a log flips. The node notices, and is replaced; or nobody needed the bit.
    async fn rot(&mut self, machine: &Machine) {
        if !self.may_lose(machine) {
            return;
        }
        machine.excuse();
        let usable = machine.rot(&mut self.random);
        self.back(machine, usable).await;
        machine.trust();
    }

    /// An image of a card is put back some time later. The others remember more than it does.
    async fn roll_back(&mut self, machine: &Machine) {
        if !self.may_lose(machine) {
            return;
        }
        let others: Vec<Machine> =
            self.cluster.machines().into_iter().filter(|other| other.id != machine.id).collect();
        let lives: Vec<u64> = others.iter().map(Machine::incarnation).collect();
        let image = machine.card.image();
        if self.random.percent(50) {
            // Of an earlier life: its next start has a number that is known already.
            machine.kill();
            machine.start();
            self.cluster.wait(Duration::from_secs(20), || machine.is_known().then_some(())).await;
        }
        sleep(Duration::from_millis(self.random.below(8_000))).await;
        // Whoever has started since remembers less: that would be a second fault.
        let same = lives == others.iter().map(Machine::incarnation).collect::<Vec<_>>();
        if !same || !self.may_lose(machine) {
            return;
        }
        machine.excuse();
        machine.roll_back(&image);
        self.back(machine, true).await;
        machine.trust();
    }

    /// Starts a machine whose card is not what it was, and replaces it if it says so itself.
    async fn back(&mut self, machine: &Machine, usable: bool) {
        if usable {
            machine.start();
            let settled = || (machine.is_out() || machine.is_known()).then_some(());
            self.cluster.wait(Duration::from_secs(20), settled).await;
        }
        if machine.is_out() {
            self.replace(machine.id).await;
        }
    }

    /// A member's card dies; a new board takes its place under a new id.
    async fn replace(&mut self, dead: NodeId) {
        // The removal is committed before the card is thrown away: a dead card counts as a fault until then.
        if !self.cluster.remove(dead, Duration::from_secs(15)).await {
            return;
        }
        self.cluster.discard(dead);
        let fresh = self.cluster.add_machine();
        fresh.start();
        self.cluster.admit(&fresh, Duration::from_secs(15)).await;
    }
}

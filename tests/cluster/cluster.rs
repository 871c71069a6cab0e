//! Several machines of one cluster, with everything they leave behind in one temporary directory.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::lan::Lan;
use crate::machine::{Machine, Street, until};

/// See the module documentation.
#[derive(Debug)]
pub struct Cluster {
    pub machines: Vec<Machine>,
    street: Street,
    // Dropped last: the processes above write into it.
    dir: TempDir,
}

impl Cluster {
    /// No machine yet.
    pub fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { machines: Vec::new(), street: Street::new(), dir }
    }

    /// One that runs with this many servers; all but the first joined at once. `lines` are in everybody's configuration.
    pub fn of(count: usize, lines: &str) -> Self {
        let mut cluster = Self::empty();
        for _ in 0..count {
            cluster.add();
        }
        cluster.found(lines);
        cluster
    }

    /// One that runs, with a server on each place of a network.
    pub fn of_places(lan: &Lan, count: usize) -> Self {
        Self::in_places(lan, count, false)
    }

    /// The same, with servers that find their addresses on their hosts.
    pub fn that_finds_addresses(lan: &Lan, count: usize) -> Self {
        Self::in_places(lan, count, true)
    }

    fn in_places(lan: &Lan, count: usize, finds_address: bool) -> Self {
        let mut cluster = Self::empty();
        for at in 0..count {
            let machine = cluster.add();
            machine.address = lan.address(at);
            machine.place = Some(lan.place(at));
            machine.finds_address = finds_address;
        }
        cluster.found("");
        cluster
    }

    fn found(&mut self, lines: &str) {
        let cluster = self;
        let count = cluster.machines.len();
        cluster.machines[0].configure(&format!("cluster-init: true\n{lines}"));
        let founded = cluster.machines[0].up();
        for number in 1..count {
            let joining = cluster.machines[number].joining(&cluster.machines[0]);
            cluster.machines[number].configure(&format!("{joining}{lines}"));
            cluster.machines[number].start();
        }
        let joined: Vec<Duration> =
            cluster.machines.iter_mut().skip(1).map(Machine::ready).collect();
        println!("founded in {founded:?}, joined in {joined:?}");
        cluster.settled(count);
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub const fn street(&self) -> Street {
        self.street
    }

    /// One more machine, without a configuration.
    pub fn add(&mut self) -> &mut Machine {
        let number = u8::try_from(self.machines.len() + 1).unwrap();
        let machine =
            Machine::new(self.dir.path(), &format!("pi-{number}"), self.street.address(number));
        self.machines.push(machine);
        self.machines.last_mut().unwrap()
    }

    /// Any machine that runs.
    pub fn any(&self) -> &Machine {
        self.machines.iter().find(|machine| machine.runs()).expect("a machine that runs")
    }

    /// The position of the leader among the machines, as it says itself; waits for one.
    pub fn leader(&self) -> usize {
        let mut found = None;
        until("a leader", || {
            found = self.machines.iter().position(|machine| machine.runs() && machine.leads());
            found.is_some()
        });
        found.unwrap()
    }

    /// The positions of all others that run.
    pub fn followers(&self) -> Vec<usize> {
        let leader = self.leader();
        let all = 0..self.machines.len();
        all.filter(|at| *at != leader && self.machines[*at].runs()).collect()
    }

    /// The positions of all but one.
    pub fn followers_without(&self, leader: usize) -> Vec<usize> {
        (0..self.machines.len()).filter(|at| *at != leader).collect()
    }

    /// Waits until so many vote, and nobody is on the way in or out.
    pub fn settled(&self, voters: usize) {
        until(&format!("{voters} voters"), || {
            let members = members(self.any());
            let learners = members.iter().filter(|member| member["isLearner"] == true).count();
            learners == 0 && members.len() == voters
        });
    }

    /// Every machine that runs has this value for a key, read linearizably through itself.
    pub fn all_have(&self, key: &str, value: &str) {
        for machine in self.machines.iter().filter(|machine| machine.runs()) {
            assert_eq!(machine.value(key), value, "{key} on {}", machine.name);
        }
    }

    /// Writes through everybody, and reads what everybody wrote through everybody.
    pub fn serves(&self, round: &str) {
        for machine in self.machines.iter().filter(|machine| machine.runs()) {
            machine.put(&format!("serves/{}", machine.name), round);
        }
        for machine in self.machines.iter().filter(|machine| machine.runs()) {
            self.all_have(&format!("serves/{}", machine.name), round);
        }
    }
}

/// The members, as a machine lists them.
pub fn members(machine: &Machine) -> Vec<Value> {
    machine.json(&["member", "list"])["members"].as_array().cloned().unwrap_or_default()
}

//! Servers that come back by themselves: learners that were given up, and cards that were found damaged.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use crate::cluster::{Cluster, members};
use crate::ledger::Load;
use crate::machine::{CONFIGURATION, until};

/// A leader that has no patience with learners.
const IMPATIENT: (&str, &str) = ("K3S_SERVER_TEST_LEARNER_SILENT", "4");

/// A server whose card is checked all the time.
const CHECKED: [(&str, &str); 2] =
    [("K3S_SERVER_TEST_SCRUB", "3"), ("K3S_SERVER_TEST_HEAL_RETRY", "2")];

fn is_listed(cluster: &Cluster, at: usize, learner: bool) -> bool {
    let name = &cluster.machines[at].name;
    let listed = members(&cluster.machines[0]);
    listed.iter().any(|member| {
        member["name"] == name.as_str() && member["isLearner"].as_bool().unwrap_or(false) == learner
    })
}

/// A machine that hangs while it is a learner. That is a matter of a second: one that was quicker is removed, and another one comes.
fn learner_that_hangs(cluster: &mut Cluster) -> usize {
    for _ in 0..10 {
        let at = cluster.machines.len();
        cluster.add();
        let lines = cluster.machines[at].joining(&cluster.machines[0]);
        let machine = &mut cluster.machines[at];
        machine.configure(&lines);
        machine.start();
        machine.says("admitted by the leader");
        machine.pause();
        // Asked before the vote can be missed: without it one of two would not answer.
        if is_listed(cluster, at, true) {
            return at;
        }
        println!("{} had its vote already", cluster.machines[at].name);
        cluster.machines[at].resume();
        cluster.machines[at].ready();
        let id = format!("{:x}", cluster.machines[at].id());
        cluster.machines[0].ctl(&["member", "remove", &id]);
        assert_eq!(cluster.machines[at].ended().0, CONFIGURATION);
    }
    panic!("no learner could be stopped in time");
}

#[test]
fn learner_that_was_given_up_comes_back_by_itself_and_one_that_was_removed_does_not() {
    let mut cluster = Cluster::empty();
    let founder = cluster.add();
    founder.environment.push(IMPATIENT);
    founder.configure("cluster-init: true\n");
    founder.up();
    founder.put("kept", "yes");

    for killed in [false, true] {
        let at = learner_that_hangs(&mut cluster);
        let old = cluster.machines[at].id();
        if killed {
            cluster.machines[at].kill();
        }
        let name = cluster.machines[at].name.clone();
        cluster.machines[0].says(&format!("gave {name} up"));
        let machine = &mut cluster.machines[at];
        if killed {
            machine.start();
        } else {
            machine.resume();
        }
        machine.says("given up while it was joining");
        let ready = machine.ready();
        println!("back {ready:?} after it could (killed: {killed})");
        assert_ne!(cluster.machines[at].id(), old, "under a new id");
        assert!(cluster.machines[at].db_dir().join("given-up").is_dir());
        until("its vote", || is_listed(&cluster, at, false));
        assert_eq!(cluster.machines[at].value("kept"), "yes");
    }

    let at = learner_that_hangs(&mut cluster);
    let id = format!("{:x}", cluster.machines[at].id());
    cluster.machines[0].ctl(&["member", "remove", &id]);
    cluster.machines[at].resume();
    let (status, said) = cluster.machines[at].ended();
    assert_eq!(status, CONFIGURATION, "{said}");
    assert!(said.contains("this server was removed from the cluster"), "{said}");
    let said = cluster.machines[at].refused();
    assert!(said.contains("this server was removed from the cluster"), "{said}");
}

/// Flips a bit in the middle of what is on the card.
fn damage(cluster: &Cluster, at: usize) {
    let path = cluster.machines[at].db_dir().join("state.redb");
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let place = file.metadata().unwrap().len() / 8_192 * 4_096 + 99;
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 8], place).unwrap();
}

fn checked(cluster: &mut Cluster, at: usize) {
    cluster.machines[at].stop();
    cluster.machines[at].environment.extend(CHECKED);
    cluster.machines[at].up();
    cluster.settled(3);
}

const FILLED: &str = "sets its data aside and is filled by them";

#[test]
fn damage_that_a_check_of_the_card_finds_is_healed_by_the_others_once() {
    let mut cluster = Cluster::of(3, "");
    let load = Load::start(&cluster.machines);
    load.goes_on(300);
    drop(load.stop());
    cluster.machines[0].put("kept", "yes");
    let mut used = Vec::new();
    for role in ["follower", "leader"] {
        let at = cluster.followers().into_iter().find(|at| !used.contains(at)).unwrap();
        used.push(at);
        checked(&mut cluster, at);
        if role == "leader" {
            let id = format!("{:x}", cluster.machines[at].id());
            let leader = cluster.leader();
            cluster.machines[leader].ctl(&["move-leader", &id]);
            assert_eq!(cluster.leader(), at);
        }
        let old = cluster.machines[at].id();
        let others = cluster.followers_without(at);
        let load = Load::start(others.iter().map(|at| &cluster.machines[*at]));
        damage(&cluster, at);
        cluster.machines[at].says(FILLED);
        until("a new id", || cluster.machines[at].id() != old);
        until("its vote", || is_listed_as(&cluster, others[0], cluster.machines[at].id()));
        load.goes_on(20);
        let meanwhile = load.stop();
        println!("{role}: longest gap {:?} while it was filled again", meanwhile.gap);
        cluster.settled(3);
        meanwhile.check(&cluster.machines[at]);
        cluster.all_have("kept", "yes");
        cluster.serves(role);

        // Again so soon: the card is failing, and nobody fills it every week.
        let new = cluster.machines[at].id();
        damage(&cluster, at);
        cluster.machines[at].says("so it is failing: replace it");
        assert_eq!(cluster.machines[at].id(), new);
        cluster.serves("as it is");
        // As the operator is told.
        let lines = cluster.machines[at].joining(&cluster.machines[others[0]]);
        cluster.machines[at].kill();
        fs::remove_dir_all(cluster.machines[at].db_dir()).unwrap();
        cluster.machines[at].environment.clear();
        cluster.machines[at].configure(&lines);
        cluster.machines[at].up();
        cluster.settled(3);
    }
}

fn is_listed_as(cluster: &Cluster, through: usize, id: u64) -> bool {
    let listed = members(&cluster.machines[through]);
    listed.iter().any(|member| member["ID"] == id && member["isLearner"] != true)
}

#[test]
fn damaged_card_stays_in_use_while_the_others_are_no_majority_without_it() {
    let mut cluster = Cluster::of(3, "");
    let load = Load::start(&cluster.machines);
    load.goes_on(300);
    let ledger = load.stop();
    let [at, dead] = cluster.followers()[..] else { panic!("three") };
    checked(&mut cluster, at);
    let old = cluster.machines[at].id();
    cluster.machines[dead].kill();
    damage(&cluster, at);
    cluster.machines[at].says("stays in use: the cluster would lose its majority");
    cluster.serves("two of three");
    assert_eq!(cluster.machines[at].id(), old);

    cluster.machines[dead].up();
    cluster.machines[at].says(FILLED);
    until("a new id", || cluster.machines[at].id() != old);
    let through = cluster.leader();
    until("its vote", || is_listed_as(&cluster, through, cluster.machines[at].id()));
    cluster.settled(3);
    ledger.check(&cluster.machines[at]);
    cluster.serves("three of three");
}

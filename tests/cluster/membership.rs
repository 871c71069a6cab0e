//! Members added, promoted, updated and removed: with etcd's commands and with ours, and refused with the numbers.

use std::time::Instant;

use crate::cluster::{Cluster, members};
use crate::machine::{CONFIGURATION, until};

#[test]
fn etcdctl_member_commands_do_what_etcd_does() {
    let cluster = Cluster::of(3, "");
    let machine = cluster.any();
    let absent = format!("https://{}:2380", cluster.street().address(99));
    let (status, said) =
        machine.etcdctl(&["member", "add", "pi-9", &format!("--peer-urls={absent}")]);
    assert!(status != 0, "a voter that does not run would count at once: {said}");
    let added =
        machine.json(&["member", "add", "pi-9", "--learner", &format!("--peer-urls={absent}")]);
    let id = format!("{:x}", added["member"]["ID"].as_u64().unwrap());
    assert_eq!(members(machine).len(), 4);
    let (status, said) = machine.etcdctl(&["member", "promote", &id]);
    assert!(
        status != 0
            && said.contains("can only promote a learner member which is in sync with leader"),
        "{said}"
    );
    let (status, said) = machine.command(&["member", "promote", &id]);
    assert!(status != 0 && said.contains("is a learner; it does not answer"), "{said}");
    let (status, said) = machine.command(&["member", "promote", "pi-1"]);
    assert!(status != 0 && said.contains("pi-1"), "{said}");
    let moved = format!("https://{}:2380", cluster.street().address(98));
    machine.ctl(&["member", "update", &id, &format!("--peer-urls={moved}")]);
    let list = members(machine);
    let learner = list.iter().find(|member| member["isLearner"] == true).unwrap();
    assert_eq!(learner["peerURLs"][0], moved.as_str(), "{learner}");
    machine.ctl(&["member", "remove", &id]);
    assert_eq!(members(machine).len(), 3);
    let (status, said) = machine.etcdctl(&["member", "remove", &id]);
    assert!(status != 0 && said.contains("member not found"), "{said}");
    let (status, said) = machine.etcdctl(&["member", "promote", &format!("{:x}", machine.id())]);
    assert!(status != 0 && said.contains("can only promote a learner"), "{said}");
    cluster.serves("three");
}

#[test]
fn removal_that_would_cost_the_majority_is_refused_with_the_numbers() {
    let mut cluster = Cluster::of(3, "");
    let away = cluster.followers()[0];
    cluster.machines[away].kill();
    let staying = cluster.followers()[0];
    let name = cluster.machines[staying].name.clone();
    let (status, said) = cluster.any().command(&["member", "remove", &name, "--yes"]);
    println!("{said}");
    assert_ne!(status, 0);
    assert!(said.contains("3 voters, 2 needed for a majority, 2 answer"), "{said}");
    assert!(said.contains("2 voters, 2 needed for a majority, 1 answers"), "{said}");
    let id = format!("{:x}", cluster.machines[staying].id());
    let (status, said) = cluster.any().etcdctl(&["member", "remove", &id]);
    assert!(
        status != 0 && said.contains("unhealthy") || said.contains("not enough started"),
        "{said}"
    );
    // The dead one can be removed; what is left warns of two.
    let dead = cluster.machines[away].name.clone();
    let said = cluster.any().run(&["member", "remove", &dead, "--yes"]);
    println!("{said}");
    let list = cluster.any().run(&["member", "list"]);
    assert!(list.contains("2 voters, 2 needed for a majority, 2 answer"), "{list}");
    cluster.serves("two");
    // The removed one is told when it starts.
    let (status, said) = {
        cluster.machines[away].start();
        cluster.machines[away].ended()
    };
    assert_eq!(status, CONFIGURATION, "{said}");
    assert!(said.contains("removed from the cluster") && said.contains("fix"), "{said}");
}

#[test]
fn last_voter_is_never_removed() {
    let cluster = Cluster::of(1, "");
    let (status, said) = cluster.any().command(&["member", "remove", "pi-1", "--yes"]);
    assert!(status != 0 && said.contains("after: 0 voters"), "{said}");
    cluster.serves("still");
}

#[test]
fn removed_member_stops_says_so_and_comes_back_only_as_told() {
    let mut cluster = Cluster::of(3, "");
    let leaving = cluster.followers()[0];
    let old = cluster.machines[leaving].id();
    let name = cluster.machines[leaving].name.clone();
    cluster.machines[cluster.leader()].run(&["member", "remove", &name, "--yes"]);
    let began = Instant::now();
    let (status, said) = cluster.machines[leaving].ended();
    println!("stopped {:?} after it was removed", began.elapsed());
    assert_eq!(status, CONFIGURATION, "{said}");
    assert!(said.contains("this server was removed from the cluster"), "{said}");
    assert!(said.contains("move the data directory away"), "{said}");
    let said = cluster.machines[leaving].refused();
    assert!(said.contains("this server was removed from the cluster"), "{said}");

    let through = cluster.leader();
    let lines = cluster.machines[leaving].joining(&cluster.machines[through]);
    let machine = &mut cluster.machines[leaving];
    std::fs::rename(machine.db_dir(), machine.dir.join("old-db")).unwrap();
    machine.configure(&lines);
    machine.up();
    assert_ne!(machine.id(), old, "ids are never given again");
    cluster.settled(3);
    cluster.serves("back");
}

#[test]
fn removed_leader_hands_over_first() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    let name = cluster.machines[leader].name.clone();
    let other = cluster.followers()[0];
    let began = Instant::now();
    cluster.machines[other].run(&["member", "remove", &name, "--yes"]);
    let (status, said) = cluster.machines[leader].ended();
    assert_eq!(status, CONFIGURATION, "{said}");
    cluster.machines[other].put("after", "yes");
    println!("written {:?} after the leader's removal was asked for", began.elapsed());
    until("two members", || members(cluster.any()).len() == 2);
    cluster.serves("two");
}

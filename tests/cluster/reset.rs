//! `cluster-reset`: the way back when a majority of the cards is lost.

use std::fs;

use crate::cluster::{Cluster, members};
use crate::ledger::Load;
use crate::machine::CONFIGURATION;

#[test]
fn one_of_three_goes_on_alone_and_the_others_are_told() {
    let mut cluster = Cluster::of(3, "");
    let load = Load::start(&cluster.machines);
    load.goes_on(60);
    let ledger = load.stop();
    let at = cluster.followers()[0];
    // Everything promised is on the card that stays.
    ledger.check(&cluster.machines[at]);
    for machine in &mut cluster.machines {
        machine.kill();
    }
    let survivor = &mut cluster.machines[at];
    survivor.configure("");
    survivor.start_with(&["--cluster-reset"]);
    let (status, said) = survivor.ended();
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("Managed etcd cluster membership has been reset"), "{said}");
    assert!(said.contains("Left behind and refused from now on"), "{said}");
    survivor.start_with(&["--cluster-reset"]);
    let (status, said) = survivor.ended();
    assert_eq!(status, CONFIGURATION, "twice by mistake: {said}");
    println!("alone again in {:?}", survivor.up());
    assert_eq!(members(survivor).len(), 1);
    ledger.check(survivor);
    survivor.put("alone", "yes");

    for other in cluster.followers_without(at) {
        let lines = cluster.machines[other].joining(&cluster.machines[at]);
        let machine = &mut cluster.machines[other];
        machine.start();
        let (status, said) = machine.ended();
        assert_eq!(status, CONFIGURATION, "{said}");
        assert!(said.contains("the cluster was reset to"), "{said}");
        assert!(said.contains("move the data directory away"), "{said}");
        fs::rename(machine.db_dir(), machine.dir.join("old-db")).unwrap();
        machine.configure(&lines);
        machine.up();
    }
    cluster.settled(3);
    cluster.all_have("alone", "yes");
    cluster.machines.iter().for_each(|machine| ledger.check(machine));
    cluster.serves("three again");
}

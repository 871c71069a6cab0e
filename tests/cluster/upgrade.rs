//! Releases of different age: upgraded one at a time under writes, and refused by name where they do not fit.
//!
//! There is one release so far, so a process is told to pretend to be another one (`k3s_server::versions::own`): `next` has one more
//! version of the messages and one more format of the data, `far` has no version of the messages in common with this one.

use crate::cluster::Cluster;
use crate::joining::assert_untouched;
use crate::ledger::Load;
use crate::machine::{Machine, until};
use crate::support::etcd::http_get;

fn format(machine: &Machine) -> u64 {
    let page = http_get(&format!("{}:2381", machine.address), "/metrics").unwrap_or_default();
    let line = page.lines().find_map(|line| line.strip_prefix("k3s_server_cluster_format "));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

fn restart_as(machine: &mut Machine, release: Option<&'static str>) {
    machine.stop();
    machine.release = release;
    machine.up();
}

#[test]
fn rolling_upgrade_loses_no_write_and_the_way_back_ends_when_all_are_upgraded() {
    let mut cluster = Cluster::of(3, "");
    let load = Load::start(&cluster.machines);
    load.goes_on(50);
    for (at, release) in [(0, Some("next")), (1, Some("next")), (1, None), (1, Some("next"))] {
        restart_as(&mut cluster.machines[at], release);
        load.goes_on(50);
        for machine in &cluster.machines {
            assert_eq!(format(machine), 1, "{}: not everybody is upgraded", machine.name);
        }
    }
    restart_as(&mut cluster.machines[2], Some("next"));
    for machine in &cluster.machines {
        until("the next format", || format(machine) == 2);
    }
    load.goes_on(50);
    cluster.machines[0].says("data is written in format 2 from now on");
    // The first to be upgraded has talked in the version that all have, and talks in the newest now.
    cluster.machines[0].says("version=1");
    cluster.machines[0].says("version=2");

    // The old release is refused now, by its own disk.
    let old = &mut cluster.machines[1];
    old.stop();
    old.release = None;
    let said = old.refused();
    assert!(said.contains("is in format 2 (raised with release 0.2.0-pretended)"), "{said}");
    assert!(said.contains("release 0.1.0 reads up to 1"), "{said}");
    assert!(said.contains("the data is untouched"), "{said}");
    old.release = Some("next");
    old.up();
    load.goes_on(50);
    let ledger = load.stop();
    println!("{} writes promised, longest gap {:?}", ledger.promises(), ledger.gap);
    cluster.settled(3);
    for machine in &cluster.machines {
        ledger.check(machine);
    }
}

/// A card from before the raise knows nothing of it, and an empty one knows nothing at all; the others do.
#[test]
fn old_release_is_refused_by_those_who_write_what_it_does_not_read() {
    let mut cluster = Cluster::of(3, "");
    for at in [0, 1] {
        restart_as(&mut cluster.machines[at], Some("next"));
    }
    cluster.machines[2].stop();
    let image = cluster.dir().join("image");
    cluster.machines[2].image(&image);
    cluster.machines[2].release = Some("next");
    cluster.machines[2].up();
    for machine in &cluster.machines {
        until("the next format", || format(machine) == 2);
    }
    let old = &mut cluster.machines[2];
    old.kill();
    let card = old.db_dir().to_owned();
    old.insert(image.clone());
    old.configure("");
    old.release = None;
    // It has forgotten its last start, too. But its data is not set aside for that.
    let said = old.refused();
    assert!(said.contains("the cluster's data is in format 2"), "{said}");
    assert!(image.join("state.redb").exists());
    let told = |machine: &Machine| {
        machine.printed().contains("pi-3 runs release 0.1.0, which reads data up to format 1")
    };
    assert!(cluster.machines.iter().any(told), "nobody told its own journal");
    let old = &mut cluster.machines[2];
    old.insert(card);
    old.configure("");
    old.release = Some("next");
    old.up();
    let lines = cluster.machines[0].joining(&cluster.machines[0]);
    let joiner = cluster.add();
    joiner.configure(&lines);
    let said = joiner.refused();
    assert!(said.contains("the cluster's data is in format 2"), "{said}");
    assert!(said.contains("reads up to 1"), "{said}");
    assert_untouched(joiner.db_dir());
    cluster.machines[0].says("refused an attempt to join from");
    cluster.machines[3].release = Some("next");
    cluster.machines[3].up();
    cluster.settled(4);
    cluster.serves("four");
}

#[test]
fn release_with_no_version_in_common_is_refused_by_name_on_both_sides() {
    let mut cluster = Cluster::of(3, "");
    let stranger = &mut cluster.machines[2];
    stranger.stop();
    stranger.release = Some("far");
    let said = stranger.refused();
    let both = "release 0.9.0-pretended speaks versions 8 to 9, release 0.1.0 speaks version 1";
    assert!(said.contains(both), "{said}");
    assert!(said.contains("upgrade one server at a time"), "{said}");
    let heard = (0..2).filter(|at| cluster.machines[*at].printed().contains(both)).count();
    assert!(0 < heard, "nobody told its own journal");
    cluster.machines[0].put("meanwhile", "served");

    let lines = cluster.machines[0].joining(&cluster.machines[0]);
    let joiner = cluster.add();
    joiner.configure(&lines);
    joiner.release = Some("far");
    let said = joiner.refused();
    assert!(said.contains("release 0.1.0 of this server speaks version 1"), "{said}");
    assert!(said.contains("release 0.9.0-pretended of the joiner versions 8 to 9"), "{said}");
    assert_untouched(joiner.db_dir());
    cluster.machines[0].says("release 0.9.0-pretended of the joiner versions 8 to 9");

    let back = &mut cluster.machines[2];
    back.release = None;
    back.up();
    cluster.serves("again");
}

//! Who a server is does not hang on its address, and is not copied with its card: servers that move, cards that are copied, put back or
//! emptied.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, members};
use crate::lan::Lan;
use crate::ledger::Load;
use crate::machine::{CONFIGURATION, Machine, until};

/// Waits until everybody lists exactly the addresses that the machines have now.
fn found_where_they_are(cluster: &Cluster) {
    let mut expected: Vec<(String, String, String)> = cluster
        .machines
        .iter()
        .map(|machine| (machine.name.clone(), machine.peer_url(), machine.client_url()))
        .collect();
    expected.sort();
    for machine in &cluster.machines {
        until(&format!("{} knows all new addresses", machine.name), || {
            // A server that is on its way to another address does not answer for a moment.
            let (status, said) = machine.etcdctl(&["member", "list", "-w", "json"]);
            let list: serde_json::Value = match serde_json::from_str(&said) {
                Ok(list) if status == 0 => list,
                Ok(_) | Err(_) => return false,
            };
            let mut listed: Vec<_> = list["members"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|member| {
                    let text = |value: &serde_json::Value| value.as_str().unwrap_or("").to_owned();
                    let urls = (&member["peerURLs"][0], &member["clientURLs"][0]);
                    (text(&member["name"]), text(urls.0), text(urls.1))
                })
                .collect();
            listed.sort();
            listed == expected
        });
    }
}

#[test]
fn cluster_follows_members_to_other_addresses() {
    let mut cluster = Cluster::of(3, "");
    let street = cluster.street();
    cluster.machines[0].put("before", "yes");
    // One, then two, one of which leads, then all at once.
    for (round, moving) in [vec![2], vec![0, 1], vec![0, 1, 2]].into_iter().enumerate() {
        let round = u8::try_from(round).unwrap();
        let ids: Vec<u64> = cluster.machines.iter().map(Machine::id).collect();
        for at in &moving {
            cluster.machines[*at].stop();
        }
        for at in &moving {
            let number = 10 * (round + 1) + u8::try_from(*at).unwrap();
            cluster.machines[*at].move_to(street.address(number));
        }
        for at in &moving {
            // Only when all have moved somebody has to say where one of the others is: no name service knows these.
            let other = cluster.machines[(at + 1) % 3].url();
            let hint = format!("server: {other}\n");
            let lines = if moving.len() == 3 { hint.as_str() } else { "" };
            cluster.machines[*at].configure(lines);
            cluster.machines[*at].start();
        }
        let began = Instant::now();
        for at in &moving {
            cluster.machines[*at].ready();
        }
        found_where_they_are(&cluster);
        println!("{} moved: known everywhere after {:?}", moving.len(), began.elapsed());
        cluster.serves(&format!("after move {round}"));
        let now: Vec<u64> = cluster.machines.iter().map(Machine::id).collect();
        assert_eq!(ids, now, "an address is no identity");
    }
    cluster.all_have("before", "yes");
}

/// A second machine with a copy of a machine's card, named as the first and at another address.
fn double(cluster: &Cluster, of: usize) -> Machine {
    let original = &cluster.machines[of];
    let dir = cluster.dir().join("copies");
    let mut copy = Machine::new(&dir, &original.name, cluster.street().address(77));
    let card = dir.join("card");
    original.image(&card);
    copy.insert(card);
    copy.configure("");
    copy
}

#[test]
fn copied_card_beside_its_original_is_refused_in_both_orders() {
    for original_first in [true, false] {
        let mut cluster = Cluster::of(3, "");
        let at = cluster.followers()[0];
        cluster.machines[at].stop();
        let mut copy = double(&cluster, at);
        let original = &mut cluster.machines[at];
        let (first, second) =
            if original_first { (original, &mut copy) } else { (&mut copy, original) };
        first.up();
        for attempt in 0..2 {
            let began = Instant::now();
            second.start();
            let (status, said) = second.ended();
            println!("attempt {attempt} refused after {:?}", began.elapsed());
            assert_eq!(status, CONFIGURATION, "{said}");
            assert!(said.contains("another server runs with this server's identity"), "{said}");
            assert!(said.contains(&first.address.to_string()), "where it is: {said}");
            assert!(said.contains("move its data directory away"), "{said}");
        }
        first.put("safe", "yes");
        assert_eq!(members(first).len(), 3);
        for machine in cluster.machines.iter().filter(|machine| machine.runs()) {
            assert_eq!(machine.value("safe"), "yes");
        }
    }
}

#[test]
fn old_image_put_back_is_set_aside_and_nothing_is_lost() {
    let mut cluster = Cluster::of(3, "");
    for role in ["follower", "leader"] {
        let leader = cluster.leader();
        let at = if role == "leader" { leader } else { cluster.followers()[0] };
        cluster.machines[at].stop();
        let image = cluster.dir().join(format!("image-{role}"));
        cluster.machines[at].image(&image);
        cluster.machines[at].up();
        let load = Load::start(&cluster.machines);
        load.goes_on(60);
        let ledger = load.stop();
        let old = cluster.machines[at].id();
        cluster.machines[at].kill();
        cluster.machines[at].insert(image);
        cluster.machines[at].configure("");
        let began = Instant::now();
        cluster.machines[at].up();
        println!("old image of a {role} back after {:?}", began.elapsed());
        let machine = &cluster.machines[at];
        let said = machine.printed();
        assert!(said.contains("this node has forgotten what it promised"), "{said}");
        assert!(said.contains("the old data is in"), "{said}");
        let aside: Vec<PathBuf> = fs::read_dir(machine.db_dir())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("quarantine-"))
            .collect();
        assert_eq!(aside.len(), 1, "{aside:?}");
        assert!(aside[0].join("state.redb").exists());
        assert_ne!(machine.id(), old, "it comes back under a new id");
        cluster.settled(3);
        cluster.machines.iter().for_each(|machine| ledger.check(machine));
        cluster.serves(role);
    }
}

#[test]
fn emptied_card_takes_its_place_again() {
    let mut cluster = Cluster::of(3, "");
    let at = cluster.followers()[0];
    let through = cluster.leader();
    let lines = cluster.machines[at].joining(&cluster.machines[through]);
    let old = cluster.machines[at].id();
    cluster.machines[through].put("kept", "yes");
    // A living server's name cannot be taken.
    let address = cluster.street().address(66);
    let mut namesake =
        Machine::new(&cluster.dir().join("namesakes"), &cluster.machines[at].name, address);
    namesake.configure(&lines);
    let said = namesake.refused();
    assert!(said.contains("the node name is taken") && said.contains("which is alive"), "{said}");

    cluster.machines[at].kill();
    fs::remove_dir_all(cluster.machines[at].db_dir()).unwrap();
    cluster.machines[at].configure(&lines);
    let ready = cluster.machines[at].up();
    cluster.settled(3);
    println!("an emptied card is back in {ready:?}");
    assert_ne!(cluster.machines[at].id(), old);
    let listed = members(cluster.any());
    assert!(listed.iter().all(|member| member["ID"] != old), "{listed:?}");
    cluster.all_have("kept", "yes");
    cluster.serves("full again");
}

#[test]
fn copy_of_a_dead_card_takes_its_place_and_the_dead_one_stays_out() {
    let mut cluster = Cluster::of(3, "");
    let at = cluster.followers()[0];
    cluster.machines[at].stop();
    let mut copy = double(&cluster, at);
    cluster.machines[at].up();
    cluster.machines[at].put("newer than the copy", "yes");
    cluster.machines[at].kill();

    copy.up();
    cluster.settled(3);
    assert_eq!(copy.value("newer than the copy"), "yes");

    cluster.machines[at].start();
    let (status, said) = cluster.machines[at].ended();
    assert_eq!(status, CONFIGURATION, "{said}");
    assert!(said.contains("this server was removed from the cluster"), "{said}");
    cluster.serves("with the copy");
    assert_eq!(copy.value("serves/pi-1"), "with the copy");
}

#[test]
fn running_servers_follow_their_hosts_to_other_addresses() {
    let mut lan = match Lan::new(3) {
        Ok(lan) => lan,
        Err(why) => {
            println!("skipped: there are no networks to be had here: {why}");
            return;
        }
    };
    let mut cluster = Cluster::that_finds_addresses(&lan, 3);
    cluster.serves("where they began");
    let leader = cluster.leader();
    for at in [cluster.followers()[0], leader] {
        let began = Instant::now();
        lan.readdress(at, 2);
        cluster.machines[at].address = lan.address(at);
        found_where_they_are(&cluster);
        println!("found at another address after {:?}", began.elapsed());
        cluster.serves("elsewhere");
    }
    assert_eq!(members(&cluster.machines[0]).len(), 3);

    // Addresses that flap move nobody, and the one that stays is followed.
    let at = cluster.followers()[0];
    let moves = |cluster: &Cluster| {
        cluster.machines[at].printed().matches("this host has another address").count()
    };
    let before = moves(&cluster);
    for host in [3, 4, 3, 4, 3, 4, 3, 4] {
        lan.readdress(at, host);
        // How long a router takes to change its mind.
        std::thread::sleep(Duration::from_secs(1));
    }
    assert_eq!(moves(&cluster), before, "nobody runs after an address that does not stay");
    cluster.machines[at].address = lan.address(at);
    found_where_they_are(&cluster);
    assert_eq!(moves(&cluster), before + 1);
    cluster.serves("at last");
}

#[test]
fn two_old_images_put_back_at_once_are_safe_and_say_what_to_do() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    let others = cluster.followers();
    let image = |at: usize| PathBuf::from(format!("image-{at}"));
    for at in others.iter().copied() {
        let to = cluster.dir().join(image(at));
        cluster.machines[at].stop();
        cluster.machines[at].image(&to);
        cluster.machines[at].up();
    }
    let load = Load::start(&cluster.machines);
    load.goes_on(60);
    let ledger = load.stop();
    // Everything promised is on the card that stays.
    let stays = leader;
    ledger.check(&cluster.machines[stays]);
    for at in others.iter().copied() {
        cluster.machines[at].kill();
    }
    for at in others.iter().copied() {
        let card = cluster.dir().join(image(at));
        cluster.machines[at].insert(card);
        cluster.machines[at].configure("");
        cluster.machines[at].start();
    }
    let names: Vec<String> = others.iter().map(|at| cluster.machines[*at].name.clone()).collect();
    for at in [stays, others[0], others[1]] {
        cluster.machines[at].says("no majority: 3 servers vote and 2 are needed");
        cluster.machines[at].says("--cluster-reset");
    }
    let said = cluster.machines[stays].printed();
    let line = said.lines().find(|line| line.contains("no majority")).unwrap();
    assert!(names.iter().all(|name| line.contains(name.as_str())), "{line}");
    let (status, said) =
        cluster.machines[stays].etcdctl(&["put", "a", "b", "--command-timeout=3s"]);
    assert_ne!(status, 0, "written without a majority: {said}");

    let survivor = &mut cluster.machines[stays];
    survivor.stop();
    survivor.start_with(&["--cluster-reset"]);
    let (status, said) = survivor.ended();
    assert_eq!(status, 0, "{said}");
    survivor.up();
    for at in others {
        cluster.machines[at].ready();
    }
    cluster.settled(3);
    cluster.machines.iter().for_each(|machine| ledger.check(machine));
    cluster.serves("three again");
}

//! Servers that are killed and servers that hang, under load: writes go on, and nothing promised is lost.

use std::thread;
use std::time::{Duration, Instant};

use etcd_client::GetOptions;

use crate::cluster::Cluster;
use crate::ledger::{Load, connect, connect_within, runtime};
use crate::machine::Machine;

/// Promised is five seconds; a loaded machine gets twice that.
const NEW_LEADER_MAX: Duration = Duration::from_secs(10);

/// Promised is ten seconds from the last start.
const POWER_CYCLE_MAX: Duration = Duration::from_secs(20);

/// Longer than any follower trusts a silent leader.
const BEYOND_LEASE: Duration = Duration::from_secs(5);

#[test]
fn killed_leader_is_replaced_and_nothing_promised_is_lost() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    let load = Load::start(&cluster.machines);
    load.goes_on(30);

    cluster.machines[leader].kill();
    load.goes_on(30);

    let next = cluster.leader();
    assert_ne!(next, leader);
    let back = cluster.machines[leader].up();
    load.goes_on(30);
    let ledger = load.stop();
    println!("longest gap {:?}, back in {back:?}, {} promises", ledger.gap, ledger.promises());
    for machine in &cluster.machines {
        ledger.check(machine);
    }
    // Of those writers that had a server to talk to.
    assert!(ledger.gap < NEW_LEADER_MAX + back, "{:?}", ledger.gap);
    cluster.serves("again");
}

#[test]
fn survivors_write_on_within_the_promised_time() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    let followers = cluster.followers();
    let load = Load::start(followers.iter().map(|at| &cluster.machines[*at]));
    load.goes_on(30);

    cluster.machines[leader].kill();
    let goes_on = load.goes_on(1);
    load.goes_on(50);

    let ledger = load.stop();
    println!("first answer {goes_on:?} after the kill, longest gap {:?}", ledger.gap);
    assert!(ledger.gap < NEW_LEADER_MAX, "{:?}", ledger.gap);
    for at in followers {
        ledger.check(&cluster.machines[at]);
    }
}

#[test]
fn paused_leader_never_answers_with_the_past() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    cluster.machines[leader].put("truth", "old");
    let runtime = runtime();
    let mut client =
        runtime.block_on(connect_within(&cluster.machines[leader], Duration::from_secs(40)));
    runtime.block_on(client.get("truth", None)).unwrap();

    cluster.machines[leader].pause();
    let others = cluster.followers_without(leader);
    let began = Instant::now();
    let endpoints = others.iter().map(|at| cluster.machines[*at].client_url());
    let endpoints = endpoints.collect::<Vec<_>>().join(",");
    loop {
        let machine = &cluster.machines[others[0]];
        let (status, said) = machine.etcdctl_at(&endpoints, &["put", "truth", "new"]);
        if status == 0 {
            break;
        }
        assert!(began.elapsed() < 3 * NEW_LEADER_MAX, "{said}");
    }
    println!("written past a leader that hangs in {:?}", began.elapsed());
    thread::sleep(BEYOND_LEASE.saturating_sub(began.elapsed()));
    // Sent while it hangs, so that it is the first thing the old leader sees when it wakes.
    let asked: Vec<_> = (0..8)
        .map(|_| {
            let mut client = client.clone();
            runtime.spawn(async move { client.get("truth", None).await })
        })
        .collect();
    thread::sleep(Duration::from_millis(300));
    cluster.machines[leader].resume();

    let mut answers = Vec::new();
    for one in asked {
        match runtime.block_on(one).unwrap() {
            Ok(reply) => {
                let value = reply.kvs()[0].value_str().unwrap().to_owned();
                assert_eq!(value, "new", "a stale answer from a leader that had been paused");
                answers.push(value);
            }
            Err(error) => answers.push(error.to_string()),
        }
    }
    println!("{answers:?}");
    cluster.machines[leader].says("leader is");
    assert_eq!(cluster.machines[leader].value("truth"), "new");
    cluster.serves("again");
}

#[test]
fn paused_follower_holds_nobody_up_and_catches_up() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    let [one, other] = cluster.followers()[..] else { panic!() };
    let load = Load::start([&cluster.machines[leader], &cluster.machines[other]]);
    load.goes_on(20);
    cluster.machines[one].pause();
    thread::sleep(BEYOND_LEASE);
    let went_on = load.goes_on(20);
    cluster.machines[one].resume();
    load.goes_on(20);
    let ledger = load.stop();
    println!("20 writes in {went_on:?} with a follower that hangs, longest gap {:?}", ledger.gap);
    assert_eq!(cluster.leader(), leader, "a follower that hung has cost the leader its place");
    assert_eq!(ledger.failed, 0, "a hanging follower must not fail a write through others");
    ledger.check(&cluster.machines[one]);
}

/// Every order of three.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

#[test]
fn cluster_that_lost_power_serves_again_in_every_order_of_starts() {
    let mut cluster = Cluster::of(3, "");
    for (round, order) in ORDERS.into_iter().enumerate() {
        let load = Load::start(&cluster.machines);
        load.goes_on(30);
        cluster.machines.iter_mut().for_each(Machine::kill);
        let ledger = load.stop();
        for at in order {
            cluster.machines[at].start();
        }
        let began = Instant::now();
        let client = &cluster.machines[order[2]];
        while client.etcdctl(&["put", "power", &round.to_string()]).0 != 0 {
            assert!(began.elapsed() < 2 * POWER_CYCLE_MAX);
        }
        let served = began.elapsed();
        println!(
            "{order:?}: serves {served:?} after the last start; {} promises",
            ledger.promises()
        );
        assert!(served < POWER_CYCLE_MAX, "{served:?}");
        cluster.machines.iter_mut().for_each(|machine| {
            machine.ready();
        });
        cluster.machines.iter().for_each(|machine| ledger.check(machine));
        cluster.all_have("power", &round.to_string());
    }
}

#[test]
fn two_of_three_down_write_nothing_and_come_back() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    let [one, other] = cluster.followers()[..] else { panic!() };
    cluster.machines[leader].put("before", "yes");
    cluster.machines[one].kill();
    cluster.machines[other].kill();
    let machine = &cluster.machines[leader];
    let (status, said) = machine.etcdctl(&["put", "lonely", "no", "--command-timeout=4s"]);
    assert_ne!(status, 0, "{said}");
    // What is there can be read from the one that is left, if the client says that it may be old.
    assert_eq!(
        machine.ctl(&["get", "before", "--consistency=s", "--print-value-only"]).trim(),
        "yes"
    );
    let (status, said) = machine.etcdctl(&["get", "before", "--command-timeout=4s"]);
    assert_ne!(status, 0, "{said}");
    // A client that is ready to wait is answered when a majority is back.
    let runtime = runtime();
    let mut client = runtime.block_on(connect(machine));
    let waiting = runtime.spawn(async move { client.put("patient", "yes", None).await });
    cluster.machines[one].start();
    let back = cluster.machines[one].ready();
    println!(
        "one back in {back:?}; the waiting write: {:?}",
        runtime.block_on(waiting).unwrap().is_ok()
    );
    cluster.serves("two of three");
    cluster.machines[other].up();
    cluster.serves("three of three");
    let mut client = runtime.block_on(connect(&cluster.machines[other]));
    let options = GetOptions::new().with_count_only();
    let reply = runtime.block_on(client.get("before", Some(options))).unwrap();
    assert_eq!(reply.count(), 1);
}

/// A card must not be worn out by lines that say the same.
#[test]
fn dead_member_costs_the_journal_a_few_lines_and_no_more() {
    let mut cluster = Cluster::of(3, "");
    let dead = cluster.followers()[0];
    cluster.machines[dead].kill();
    let leader = cluster.leader();
    cluster.machines[leader].says("cannot be reached");
    cluster.serves("two");
    let lines = |cluster: &Cluster| -> usize {
        let running = cluster.machines.iter().filter(|machine| machine.runs());
        running.map(|machine| machine.printed().lines().count()).sum()
    };
    let before = lines(&cluster);
    let waited = Duration::from_secs(6);
    // What is measured is what happens in this time.
    thread::sleep(waited);
    let said = lines(&cluster) - before;
    println!("{said} lines in {waited:?}");
    assert!(said < 5, "{}", cluster.machines[leader].printed());
}

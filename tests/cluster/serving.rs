//! Reads, writes, watches and leases through every member, and across a change of leader; and etcd's own commands.

use std::time::{Duration, Instant};

use etcd_client::{EventType, PutOptions, WatchOptions};

use crate::cluster::Cluster;
use crate::ledger::{connect, runtime};
use crate::machine::{LONG, until};

#[test]
fn what_one_member_acknowledged_every_member_reads_at_once() {
    let cluster = Cluster::of(3, "");
    let runtime = runtime();
    let rounds = 30;
    let began = Instant::now();
    runtime.block_on(async {
        let mut clients = Vec::new();
        for machine in &cluster.machines {
            clients.push(connect(machine).await);
        }
        for round in 0..rounds {
            for writer in 0..clients.len() {
                let value = format!("{round} by {writer}");
                let put = clients[writer].put("linear", value.clone(), None).await.unwrap();
                let revision = put.header().unwrap().revision();
                for reader in &mut clients {
                    let reply = reader.get("linear", None).await.unwrap();
                    assert_eq!(reply.kvs()[0].value_str().unwrap(), value);
                    assert!(revision <= reply.header().unwrap().revision());
                }
            }
        }
    });
    println!("{} writes and {} reads in {:?}", rounds * 3, rounds * 9, began.elapsed());
}

#[test]
fn watches_and_leases_work_through_every_member_and_across_a_new_leader() {
    let mut cluster = Cluster::of(3, "");
    let leader = cluster.leader();
    let followers = cluster.followers();
    let runtime = runtime();
    // Clients of the members that stay; leases granted through each of them.
    let (mut watches, mut keepers) = (Vec::new(), Vec::new());
    runtime.block_on(async {
        for at in &followers {
            let mut client = connect(&cluster.machines[*at]).await;
            let options = WatchOptions::new().with_prefix();
            watches.push(client.watch("seen/", Some(options)).await.unwrap());
            let lease = client.lease_grant(8, None).await.unwrap().id();
            let options = PutOptions::new().with_lease(lease);
            client.put(format!("leased/{at}"), "alive", Some(options)).await.unwrap();
            let (keeper, replies) = client.lease_keep_alive(lease).await.unwrap();
            keepers.push((client, lease, keeper, replies));
        }
    });
    let lapsing = cluster.machines[leader].json(&["lease", "grant", "3"])["ID"].as_i64().unwrap();
    let lease = format!("--lease={lapsing:x}");
    cluster.machines[leader].ctl(&["put", "seen/lapsing", "soon gone", &lease]);
    cluster.machines[leader].put("seen/before", "1");

    cluster.machines[leader].kill();
    let began = Instant::now();
    // A write that was on its way to the old leader may fail, so the first one asks for nothing that is looked at below.
    while cluster.machines[followers[0]].etcdctl(&["put", "unseen", "2"]).0 != 0 {
        assert!(began.elapsed() < LONG);
    }
    println!("written {:?} after the leader was killed", began.elapsed());
    cluster.machines[followers[0]].put("seen/after", "2");

    runtime.block_on(async {
        for (client, lease, keeper, replies) in &mut keepers {
            // Kept alive through the new leader, whoever that is.
            keeper.keep_alive().await.unwrap();
            let reply = tokio::time::timeout(LONG, replies.message()).await.unwrap().unwrap();
            assert_eq!(reply.unwrap().ttl(), 8);
            let left = client.lease_time_to_live(*lease, None).await.unwrap();
            assert!((1..=8).contains(&left.ttl()), "{left:?}");
        }
        for stream in &mut watches {
            let mut events = Vec::new();
            while events.len() < 4 {
                let reply = tokio::time::timeout(LONG, stream.message()).await.unwrap();
                for event in reply.unwrap().unwrap().events() {
                    let kind = event.event_type() == EventType::Delete;
                    events.push((event.kv().unwrap().key_str().unwrap().to_owned(), kind));
                }
            }
            let names: Vec<_> = events.iter().map(|(key, gone)| (key.as_str(), *gone)).collect();
            let expected = [
                ("seen/lapsing", false),
                ("seen/before", false),
                ("seen/after", false),
                ("seen/lapsing", true),
            ];
            assert_eq!(names, expected, "every event once and in order");
        }
        for (client, lease, ..) in &mut keepers {
            client.lease_revoke(*lease).await.unwrap();
        }
    });
    for at in &followers {
        assert_eq!(cluster.machines[*at].value(&format!("leased/{at}")), "");
    }
}

#[test]
fn etcdctl_asks_the_whole_cluster() {
    let mut cluster = Cluster::of(3, "");
    let machine = cluster.any();
    let health = machine.ctl(&["endpoint", "health", "--cluster"]);
    assert_eq!(health.matches("is healthy").count(), 3, "{health}");
    let status = machine.json(&["endpoint", "status", "--cluster"]);
    let status = status.as_array().unwrap();
    assert_eq!(status.len(), 3);
    let leaders: Vec<_> = status.iter().map(|one| one["Status"]["leader"].as_u64()).collect();
    assert!(leaders.iter().all(|leader| leader.is_some() && *leader == leaders[0]), "{leaders:?}");
    let terms: Vec<_> = status.iter().map(|one| one["Status"]["raftTerm"].as_u64()).collect();
    assert!(terms.iter().all(|term| *term == terms[0]), "{terms:?}");
    println!("{}", machine.ctl(&["endpoint", "status", "--cluster", "-w", "table"]));

    for _ in 0..2 {
        let (leader, to) = (cluster.leader(), cluster.followers()[0]);
        let began = Instant::now();
        let id = format!("{:x}", cluster.machines[to].id());
        let said = cluster.machines[leader].ctl(&["move-leader", &id]);
        assert!(said.contains("transferred"), "{said}");
        until("the new leader leads", || cluster.leader() == to);
        println!("leadership moved in {:?}", began.elapsed());
        cluster.serves("moved");
    }
    let follower = cluster.followers()[0];
    let leader = format!("{:x}", cluster.machines[cluster.leader()].id());
    let (status, said) = cluster.machines[follower].etcdctl(&["move-leader", &leader]);
    assert!(status != 0 && said.contains("no leader endpoint given"), "{said}");
    // The health of one that is gone is told, and does not take for ever.
    cluster.machines[follower].kill();
    let began = Instant::now();
    let (status, said) =
        cluster.any().etcdctl(&["endpoint", "health", "--cluster", "--command-timeout=3s"]);
    assert_ne!(status, 0);
    assert_eq!(said.matches("is healthy").count(), 2, "{said}");
    assert!(began.elapsed() < LONG);
    assert!(Duration::ZERO < began.elapsed());
}

//! Links that are cut, in one direction or both: every majority that can talk to each other goes on, and nobody serves the past.

use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::lan::Lan;
use crate::machine::LONG;

/// How long a majority may need to write again.
const NEW_LEADER_MAX: Duration = Duration::from_secs(20);

/// Which links are cut, given the leader and the two others.
type Cut = fn(&mut Lan, usize, [usize; 2]);

/// A name, the cut, and who must be able to write: the leader, the others.
const SHAPES: &[(&str, Cut, [bool; 3])] = &[
    ("follower alone", |lan, _, [one, _]| lan.isolate(one), [true, false, true]),
    ("leader alone", |lan, leader, _| lan.isolate(leader), [false, true, true]),
    // Everybody still has a majority with the one in the middle.
    ("bridge between followers", |lan, _, [one, other]| lan.cut(one, other), [true, true, true]),
    (
        "nothing from the leader to one",
        |lan, leader, [one, _]| lan.cut_one_way(leader, one),
        [true, false, true],
    ),
    (
        "nothing from one to the leader",
        |lan, leader, [one, _]| lan.cut_one_way(one, leader),
        [true, false, true],
    ),
    (
        "nothing from the leader to anybody",
        |lan, leader, [one, other]| {
            lan.cut_one_way(leader, one);
            lan.cut_one_way(leader, other);
        },
        [false, true, true],
    ),
    (
        "nothing from anybody to the leader",
        |lan, leader, [one, other]| {
            lan.cut_one_way(one, leader);
            lan.cut_one_way(other, leader);
        },
        [false, true, true],
    ),
];

#[test]
fn every_majority_that_can_talk_goes_on() {
    let mut lan = match Lan::new(3) {
        Ok(lan) => lan,
        Err(why) => {
            println!("skipped: links cannot be cut here: {why}");
            return;
        }
    };
    let cluster = Cluster::of_places(&lan, 3);
    for (round, (name, cut, must_write)) in SHAPES.iter().enumerate() {
        let leader = cluster.leader();
        let others = cluster.followers_without(leader);
        let members = [leader, others[0], others[1]];
        cluster.machines[leader].put("shape", &format!("before {round}"));
        cut(&mut lan, leader, [others[0], others[1]]);
        let began = Instant::now();
        for (at, must) in members.iter().zip(must_write) {
            if !must {
                continue;
            }
            let key = format!("cut/{round}/{at}");
            let machine = &cluster.machines[*at];
            loop {
                let (status, said) = machine.etcdctl(&["put", &key, "yes", "--command-timeout=2s"]);
                if status == 0 {
                    break;
                }
                assert!(began.elapsed() < NEW_LEADER_MAX, "{name}: {}: {said}", machine.name);
            }
            machine.put("shape", &format!("during {round}"));
        }
        let wrote = began.elapsed();
        for (at, must) in members.iter().zip(must_write) {
            if !must {
                // It may wait or fail; what it must not do is to answer with the past.
                let arguments = ["get", "shape", "--print-value-only", "--command-timeout=1s"];
                let (status, said) = cluster.machines[*at].etcdctl(&arguments);
                assert!(status != 0 || said.trim() == format!("during {round}"), "{name}: {said}");
            }
        }
        lan.heal();
        let healed = Instant::now();
        for at in members {
            let key = format!("healed/{round}/{at}");
            loop {
                let (status, said) =
                    cluster.machines[at].etcdctl(&["put", &key, "yes", "--command-timeout=3s"]);
                if status == 0 {
                    break;
                }
                assert!(healed.elapsed() < LONG, "{name}: {said}");
            }
        }
        println!("{name}: all wrote after {wrote:?}, everybody again {:?} after", healed.elapsed());
        cluster.all_have("shape", &format!("during {round}"));
    }
}

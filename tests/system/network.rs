//! Cables.

use crate::story::{cluster, leader, leader_of};

#[test]
fn unplugged_leader_is_replaced_and_comes_back_as_a_follower() {
    let Some(lab) = cluster() else { return };
    let old = leader_of(&lab);
    let others: Vec<_> = (0..3).filter(|at| *at != old).map(|at| &lab.hosts[at]).collect();
    lab.hosts[old].put("before", "1");

    lab.unplug(old);
    let new = leader(&others);
    others[new].put("during", "2");
    // Its majority is gone: it must not acknowledge.
    let (status, said) = lab.hosts[old].etcdctl(&["put", "alone", "3", "--command-timeout=2s"]);
    assert_ne!(status, 0, "{said}");
    assert!(lab.hosts[old].is_active(), "a server without its peers keeps running");

    lab.plug(old);
    lab.hosts[old].says("follower of 3 servers");
    for host in &lab.hosts {
        assert_eq!((host.value("before"), host.value("during")), ("1".to_owned(), "2".to_owned()));
    }
    assert_eq!(lab.hosts[old].property("NRestarts"), "0");
}

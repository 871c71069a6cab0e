//! D-Bus on a whole host: logind's lock, our own object under its policy, and the check that decides about an update.

use crate::host::{Host, UNIT, until};
use crate::story::{CONFIG, cluster, leader, leader_of};

const OBJECT: &[&str] = &["io.k3s.Server1", "/io/k3s/Server1", "io.k3s.Server1"];
const HEALTH: &str = "k3s-server-health.service";

/// `busctl` as this user.
fn busctl(host: &Host, user: &str, verb: &str, arguments: &[&str]) -> (i32, String) {
    let mut all = vec!["setpriv", "--reuid", user, "--clear-groups", "busctl", verb];
    all.extend(OBJECT);
    all.extend(arguments);
    host.command(&all)
}

fn property(host: &Host, name: &str) -> String {
    let (status, said) = busctl(host, "nobody", "get-property", &[name]);
    assert_eq!(status, 0, "{name}: {said}");
    said.trim().to_owned()
}

#[test]
fn everybody_may_look_and_only_root_may_move_leadership() {
    let Some(lab) = cluster() else { return };
    let old = leader_of(&lab);
    let host = &lab.hosts[old];
    until("the bus says so, too", || property(host, "Role") == "s \"leader\"");
    assert_eq!(property(host, "State"), "s \"ready\"");
    assert_eq!(property(host, "LeaderName"), format!("s \"{}\"", host.name()));
    assert!(property(host, "Members").contains("pi-3"));

    let (status, said) = busctl(host, "nobody", "call", &["TransferLeadership", "s", ""]);
    assert_ne!(status, 0, "{said}");
    let (status, said) = busctl(host, "root", "call", &["TransferLeadership", "s", ""]);
    assert_eq!(status, 0, "{said}");
    let others: Vec<_> = (0..3).filter(|at| *at != old).map(|at| &lab.hosts[at]).collect();
    leader(&others);
    until("the bus says so, too", || property(host, "Role") == "s \"follower\"");
}

#[test]
fn update_is_judged_by_this_host_and_not_by_its_peers() {
    let Some(lab) = cluster() else { return };
    let [host, others @ ..] = &lab.hosts[..] else { unreachable!("three hosts") };
    for other in others {
        other.run(&["systemctl", "stop", UNIT]);
    }
    host.run(&["systemctl", "restart", "--no-block", UNIT]);
    // No majority: the unit does not become ready. The release is not to blame.
    host.run(&["systemctl", "start", HEALTH]);
    assert!(!host.is_active());

    host.run(&["systemctl", "stop", UNIT, HEALTH]);
    host.write(CONFIG, "cluster-cidr: 10.42.0.0/33\n");
    let (status, _) = host.command(&["systemctl", "start", HEALTH]);
    assert_ne!(status, 0, "a release that refuses the configuration passed");
    let said = host.shell(&format!("journalctl --no-pager -o cat -u {HEALTH}"));
    assert!(said.contains("the start is refused") && said.contains("config.yaml:1:"), "{said}");
}

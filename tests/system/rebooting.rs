//! Hosts that stop: in order, or because the power went.

use crate::host::{Host, UNIT};
use crate::story::{cluster, leader_of, while_writing};

/// One of the others said that it led before this server ended. All hosts here have one clock.
fn assert_handed_over(old: &Host, boot: &str, others: &[&Host]) {
    let ended = old.when(boot, "stopped; everything is on the card").pop().expect("its last words");
    let led = others.iter().flat_map(|host| host.when("0", &format!("leader is {}", host.name())));
    let first = led.min().unwrap_or_else(|| panic!("nobody has led after {}", old.name()));
    assert!(first < ended, "without a leader for {} us", first - ended);
    println!("another one led {} ms before {} had ended", (ended - first) / 1000, old.name());
}

#[test]
fn stopped_leader_hands_over_and_rejoins() {
    let Some(lab) = cluster() else { return };
    let old = leader_of(&lab);
    let other = &lab.hosts[(old + 1) % 3];
    let (written, ()) = while_writing(other, || {
        lab.hosts[old].run(&["systemctl", "stop", UNIT]);
    });
    written.assert_went_on();
    assert_eq!(lab.hosts[old].property("Result"), "success");
    let others = [other, &lab.hosts[(old + 2) % 3]];
    assert_handed_over(&lab.hosts[old], "0", &others);

    lab.hosts[old].run(&["systemctl", "start", UNIT]);
    assert_eq!(lab.hosts[old].value("written"), written.acknowledged.to_string());
}

#[test]
fn rebooted_host_hands_leadership_over_first_and_is_back_by_itself() {
    let Some(mut lab) = cluster() else { return };
    let old = leader_of(&lab);
    let mut host = lab.hosts.remove(old);
    let locks = host.run(&["systemd-inhibit", "--list", "--no-legend", "--no-pager"]);
    assert!(
        locks.lines().any(|line| line.contains("k3s-server") && line.contains("delay")),
        "{locks}"
    );
    let (written, ()) = while_writing(&lab.hosts[0], || host.reboot());
    written.assert_went_on();
    host.ready();
    assert_handed_over(&host, "-1", &[&lab.hosts[0], &lab.hosts[1]]);
    // While logind still waited, so before systemd stopped anything.
    let prepared = host.when("-1", "leads now, the state is on the card");
    let stopping = host.when("-1", "stopping: received SIGTERM");
    assert!(prepared.last().is_some_and(|prepared| Some(prepared) < stopping.last()));
    assert_eq!(host.value("written"), written.acknowledged.to_string());
}

#[test]
fn power_cut_of_all_hosts_loses_nothing_that_was_acknowledged() {
    let Some(mut lab) = cluster() else { return };
    for (at, host) in lab.hosts.iter().enumerate() {
        host.put(&format!("kept/{at}"), "yes");
    }
    lab.hosts.iter_mut().for_each(Host::power_cut);
    lab.boot_all();
    for host in &lab.hosts {
        host.ready();
        assert_eq!(
            host.ctl(&["get", "--prefix", "kept/", "--print-value-only"]).matches("yes").count(),
            3
        );
    }
}

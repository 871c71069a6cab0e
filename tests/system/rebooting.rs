//! Hosts that stop: in order, or because the power went.

use std::thread;

use crate::host::{Host, UNIT};
use crate::story::{cluster, leader_of, while_writing};

/// What the server said in the host's last life.
fn last_words(host: &Host) -> String {
    host.shell(&format!("journalctl --no-pager -b -1 -o cat -u {UNIT}"))
}

/// The server saw another leader before it stopped.
fn assert_handed_over(name: &str, words: &str) {
    let led = words.rfind(&format!("leader is {name}")).unwrap_or_else(|| panic!("never led:\n{words}"));
    let after = &words[led..];
    let next = after.match_indices("leader is pi-").nth(1);
    let stopped = after.find("stopped; everything is on the card");
    let in_order = matches!((next, stopped), (Some((next, _)), Some(stopped)) if next < stopped);
    assert!(in_order, "{name} did not see its successor before it stopped:\n{words}");
}

#[test]
fn stopped_leader_hands_over_and_rejoins() {
    let Some(lab) = cluster() else { return };
    let old = leader_of(&lab);
    let other = &lab.hosts[(old + 1) % 3];
    let (written, ()) = while_writing(other, || {
        lab.hosts[old].run(&["systemctl", "stop", UNIT]);
    });
    assert_eq!(written.failed, 0, "{written:?}");
    assert_eq!(lab.hosts[old].property("Result"), "success");
    assert_handed_over(lab.hosts[old].name(), &lab.hosts[old].journal());

    lab.hosts[old].run(&["systemctl", "start", UNIT]);
    assert_eq!(lab.hosts[old].value("written"), written.acknowledged.to_string());
}

#[test]
fn rebooted_host_hands_leadership_over_first_and_is_back_by_itself() {
    let Some(mut lab) = cluster() else { return };
    let old = leader_of(&lab);
    let mut host = lab.hosts.remove(old);
    let (written, ()) = while_writing(&lab.hosts[0], || host.reboot());
    assert_eq!(written.failed, 0, "{written:?}");
    host.ready();
    assert_handed_over(host.name(), &last_words(&host));
    assert_eq!(host.value("written"), written.acknowledged.to_string());
}

#[test]
fn power_cut_of_all_hosts_loses_nothing_that_was_acknowledged() {
    let Some(mut lab) = cluster() else { return };
    for (at, host) in lab.hosts.iter().enumerate() {
        host.put(&format!("kept/{at}"), "yes");
    }
    lab.hosts.iter_mut().for_each(Host::power_cut);
    thread::scope(|scope| {
        for host in &mut lab.hosts {
            scope.spawn(|| host.boot());
        }
    });
    for host in &lab.hosts {
        host.ready();
        assert_eq!(host.ctl(&["get", "--prefix", "kept/", "--print-value-only"]).matches("yes").count(), 3);
    }
}

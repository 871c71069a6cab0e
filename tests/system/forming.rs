//! Three hosts, a text editor and `systemctl start`.

use crate::host::{UNIT, until};
use crate::lab::Lab;
use crate::story::{CONFIG, cluster, found, leader_of};

#[test]
fn three_hosts_become_a_cluster_and_say_so() {
    let Some(lab) = cluster() else { return };
    let leader = leader_of(&lab);
    for (at, host) in lab.hosts.iter().enumerate() {
        // "follower of 3 servers, term 4"
        host.says("of 3 servers");
        assert_eq!(host.property("StatusText").contains("leader of"), at == leader);
        host.put(&format!("from/{}", host.name()), "hello");
        assert_eq!(host.run(&["systemctl", "is-enabled", UNIT]).trim(), "enabled");
        assert_eq!(host.run(&["systemctl", "--failed", "--no-legend", "list-units"]).trim(), "");
    }
    for host in &lab.hosts {
        assert_eq!(
            host.ctl(&["get", "--prefix", "from/", "--print-value-only"]).matches("hello").count(),
            3
        );
        let members = host.ctl(&["member", "list"]);
        assert_eq!(members.matches(", started, ").count(), 3, "{members}");
        tells_a_story(&host.journal());
    }
}

#[test]
fn servers_that_start_before_the_first_one_wait_for_it() {
    let Some(lab) = Lab::boot(3) else { return };
    let [first, others @ ..] = &lab.hosts[..] else { unreachable!("three hosts") };
    let token = "token: a-long-random-text\n";
    let hosts = format!("{} pi-1.local\n", first.parts.address);
    for host in others {
        host.write("/etc/hosts", &hosts);
        host.write(CONFIG, format!("server: https://pi-1.local:6443\n{token}"));
        host.run(&["systemctl", "start", "--no-block", UNIT]);
    }
    for host in others {
        until("it tries", || host.journal().contains("joining through https://pi-1.local:6443"));
        assert!(!host.is_active());
    }
    first.write(CONFIG, format!("cluster-init: true\n{token}"));
    first.run(&["systemctl", "start", UNIT]);
    for host in others {
        host.ready();
        host.says("of 3 servers");
    }
}

/// The journal can be read from top to bottom.
fn tells_a_story(journal: &str) {
    let mut rest = journal;
    for chapter in ["starting, datastore in /var/lib/k3s-server", "leader is pi-", "ready, serving"]
    {
        let Some((_, after)) = rest.split_once(chapter) else {
            panic!("{chapter:?} is not there, or too early:\n{journal}");
        };
        rest = after;
    }
}

#[test]
fn server_runs_as_its_own_user_and_shows_its_files_to_nobody_else() {
    let Some(lab) = Lab::boot(1) else { return };
    let host = &lab.hosts[0];
    found(host);
    let pid = host.main_pid();
    assert_eq!(host.shell(&format!("ps -o user= -p {pid}")).trim(), "k3s-server");
    assert_eq!(host.shell("stat -c '%U %a' /var/lib/k3s-server").trim(), "k3s-server 700");
    let open = host.shell("find /var/lib/k3s-server/ -perm /077 -type f");
    assert_eq!(open.trim(), "", "files that others can read");
    let held = host.shell(&format!("grep -E '^Cap(Eff|Prm|Bnd|Amb)' /proc/{pid}/status"));
    assert!(held.lines().all(|line| line.ends_with("0000000000000000")), "{held}");
}

#[test]
fn host_without_a_configuration_does_not_found_anything() {
    let Some(lab) = Lab::boot(1) else { return };
    let host = &lab.hosts[0];
    host.run(&["systemctl", "start", UNIT]);
    assert_eq!(host.property("ActiveState"), "inactive");
    assert_eq!(host.property("ConditionResult"), "no");
    host.shell("test ! -e /var/lib/k3s-server/node.json");
    // An empty file is one.
    host.write(CONFIG, "");
    host.run(&["systemctl", "start", UNIT]);
    assert!(host.is_active());
}

//! Critical flags: every one, in every way to differ, on every way into the cluster.

use std::time::Instant;

use k3s_server::critical::Flag;

use crate::cluster::{Cluster, members};
use crate::joining::assert_untouched;
use crate::machine::{CONFIGURATION, Machine, until};

/// A flag, lines that give it another value than the default, and that value as it is shown.
struct Way {
    flag: &'static str,
    lines: &'static str,
    shown: &'static str,
}

const fn way(flag: &'static str, lines: &'static str, shown: &'static str) -> Way {
    Way { flag, lines, shown }
}

const DUAL: &str =
    "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: 10.43.0.0/16,fd00:43::/112";

const WAYS: &[Way] = &[
    way("cluster-cidr", "cluster-cidr: 10.44.0.0/16", "10.44.0.0/16"),
    way("cluster-cidr", "cluster-cidr: 10.42.0.0/17", "10.42.0.0/17"),
    way("cluster-cidr", DUAL, "10.42.0.0/16, fd00:42::/56"),
    way("service-cidr", "service-cidr: 10.45.0.0/16", "10.45.0.0/16"),
    way("service-cidr", "service-cidr: 10.43.0.0/24", "10.43.0.0/24"),
    way("service-cidr", DUAL, "10.43.0.0/16, fd00:43::/112"),
    way("cluster-dns", "cluster-dns: 10.43.0.11", "10.43.0.11"),
    way("cluster-dns", "cluster-dns: [10.43.10.0]", "10.43.10.0"),
    way("cluster-domain", "cluster-domain: k8s.local", "k8s.local"),
    way("cluster-domain", "cluster-domain: \"1.2\"", "1.2"),
    way("disable", "disable: traefik", "traefik"),
    way("disable", "disable: [traefik, servicelb]", "servicelb, traefik"),
    way("disable", "disable: traefik\ndisable+: servicelb", "servicelb, traefik"),
    way("disable-cloud-controller", "disable-cloud-controller: true", "true"),
    way("disable-helm-controller", "disable-helm-controller: yes", "true"),
    way("disable-kube-proxy", "disable-kube-proxy: on", "true"),
    way("disable-network-policy", "disable-network-policy: 1", "true"),
    way("egress-selector-mode", "egress-selector-mode: cluster", "cluster"),
    way("egress-selector-mode", "egress-selector-mode: pod", "pod"),
    way("egress-selector-mode", "egress-selector-mode: disabled", "disabled"),
    way("embedded-registry", "embedded-registry: \"T\"", "true"),
    way("flannel-backend", "flannel-backend: none", "none"),
    way("flannel-backend", "flannel-backend: host-gw", "host-gw"),
    way("flannel-backend", "flannel-backend: wireguard-native", "wireguard-native"),
    way("flannel-external-ip", "flannel-external-ip: true", "true"),
    way("flannel-ipv6-masq", "flannel-ipv6-masq: true", "true"),
    way("secrets-encryption", "secrets-encryption: true", "true"),
    way("secrets-encryption-provider", "secrets-encryption-provider: secretbox", "secretbox"),
    way("service-node-port-range", "service-node-port-range: 30000-32766", "30000-32766"),
    way("servicelb-namespace", "servicelb-namespace: lb", "lb"),
    way("supervisor-metrics", "supervisor-metrics: true", "true"),
    way("system-default-registry", "system-default-registry: registry.example", "registry.example"),
    way("critical-extra-config", "critical-extra-config: x", "x"),
];

/// The refusal names the flag, both values, the place, and who set the cluster's.
fn assert_explained(machine: &Machine, way: &Way, said: &str) {
    let lines = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    let lines: Vec<String> = lines.collect();
    let head = format!("{} {} ", way.flag, way.shown);
    let at = lines.iter().position(|line| line.starts_with(&head));
    let at = at.unwrap_or_else(|| panic!("{}: no line {head:?} in\n{said}", way.lines));
    let there = lines[at].strip_prefix(&head).unwrap();
    assert!(!there.is_empty() && there != way.shown, "{said}");
    let lines_given: Vec<_> = way.lines.lines().collect();
    let offset = lines_given.iter().rposition(|line| line.starts_with(way.flag)).unwrap();
    let place = format!("{}:{}:", machine.config().display(), Machine::FIRST_LINE + offset);
    assert!(lines[at + 1].starts_with(&place), "{}: no {place} in\n{said}", way.lines);
    assert!(lines[at + 1].contains("set by pi-1"), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
}

#[test]
fn every_flag_is_tried() {
    for name in Flag::NAMES {
        assert!(WAYS.iter().any(|way| way.flag == name), "{name} is not in the table");
    }
}

#[test]
fn joiner_with_any_critical_flag_that_differs_is_refused_and_leaves_nothing() {
    let mut cluster = Cluster::of(1, "");
    let joining = cluster.machines[0].joining(&cluster.machines[0]);
    let url = cluster.machines[0].url();
    let token = cluster.machines[0].token_file().display().to_string();
    let joiner = cluster.add();
    let began = Instant::now();
    for way in WAYS {
        joiner.configure(&format!("{}\n{joining}", way.lines));
        let said = joiner.refused();
        assert_explained(joiner, way, &said);
        assert_untouched(joiner.db_dir());
    }
    println!("{} refused joins in {:?}", WAYS.len(), began.elapsed());
    let began = Instant::now();
    for way in WAYS {
        joiner.configure(&format!("{}\n", way.lines));
        let (status, said) = joiner.command(&["check", "--server", &url, "--token-file", &token]);
        assert_eq!(status, CONFIGURATION, "{said}");
        assert_explained(joiner, way, &said);
        assert_untouched(joiner.db_dir());
    }
    println!("{} refused checks in {:?}", WAYS.len(), began.elapsed());
    assert_eq!(members(&cluster.machines[0]).len(), 1);
    // All at once, each of them named.
    let joiner = &mut cluster.machines[1];
    let all = "disable: traefik\nflannel-backend: none\nsecrets-encryption: true\n";
    joiner.configure(&format!("{all}{joining}"));
    let said = joiner.refused();
    assert!(said.contains("3 settings differ from the cluster"), "{said}");
    // Defaults written out are no difference.
    joiner.configure(&format!("cluster-cidr: 10.42.0.0/16\ndisable: []\n{joining}"));
    joiner.run(&["check"]);
    joiner.up();
}

#[test]
fn member_is_refused_when_its_configuration_has_changed() {
    let mut cluster = Cluster::of(3, "");
    let follower = cluster.followers()[0];
    let began = Instant::now();
    let before = cluster.any().json(&["endpoint", "status"]).to_string();
    cluster.machines[follower].stop();
    let machine = &mut cluster.machines[follower];
    let mut tried = 0;
    for name in Flag::NAMES {
        let way = WAYS.iter().find(|way| way.flag == name).unwrap();
        machine.configure(&format!("{}\n", way.lines));
        let said = machine.refused();
        assert_explained(machine, way, &said);
        tried += 1;
    }
    println!("{tried} refused restarts in {:?}; {before}", began.elapsed());
    let (status, said) = machine.command(&["check"]);
    assert_eq!(status, CONFIGURATION, "{said}");
    machine.configure("");
    machine.run(&["check"]);
    println!("with the right flags ready in {:?}", machine.up());
    cluster.serves("again");
}

#[test]
fn lone_server_is_refused_before_it_changes_anything() {
    let mut cluster = Cluster::of(1, "disable: traefik\n");
    let machine = &mut cluster.machines[0];
    machine.put("kept", "yes");
    machine.stop();
    let way = way("disable", "disable: servicelb", "servicelb");
    machine.configure("disable: servicelb\n");
    let said = machine.refused();
    assert_explained(machine, &way, &said);
    assert!(!said.contains("leader is"), "it took part before it was refused: {said}");
    machine.configure("disable: traefik\n");
    machine.up();
    assert_eq!(machine.value("kept"), "yes");
}

#[test]
fn flag_changed_on_purpose_is_warned_of_and_needed_at_the_next_start() {
    let mut cluster = Cluster::of(3, "");
    let at = cluster.followers()[0];
    let said = cluster.machines[at].run(&["flags", "set", "disable", "traefik,servicelb"]);
    assert!(said.contains("disable of the cluster changed from"), "{said}");
    for machine in &cluster.machines {
        let name = &machine.name;
        until(&format!("{name} warns"), || {
            let printed = machine.printed();
            printed.contains("WARN") && printed.contains("servicelb, traefik")
        });
    }
    for (flag, value) in [
        ("cluster-cidr", "10.50.0.0/16"),
        ("service-cidr", "10.51.0.0/16"),
        ("cluster-dns", "10.43.0.11"),
        ("cluster-domain", "k8s.local"),
    ] {
        let (status, said) = cluster.machines[at].command(&["flags", "set", flag, value]);
        assert!(status != 0 && said.contains("keep"), "{flag}: {status} {said}");
    }
    let (status, said) = cluster.machines[at].command(&["flags", "set", "disable", "treafik"]);
    assert!(status != 0 && said.contains("treafik"), "{said}");
    cluster.machines[at].stop();
    let said = cluster.machines[at].refused();
    assert!(said.contains("servicelb, traefik"), "{said}");
    cluster.machines[at].configure("disable: [servicelb, traefik]\n");
    cluster.machines[at].up();
    let shown = cluster.machines[at].run(&["flags", "show"]);
    assert!(shown.contains("servicelb, traefik"), "{shown}");
    cluster.serves("with the new flag");
}

#[test]
fn flag_changed_while_a_member_was_away_is_right_in_its_new_configuration() {
    let mut cluster = Cluster::of(3, "");
    let away = cluster.followers()[0];
    cluster.machines[away].stop();
    cluster.any().run(&["flags", "set", "flannel-backend", "host-gw"]);
    // Its own copy of the record still says vxlan: the others' newer one counts.
    cluster.machines[away].configure("flannel-backend: host-gw\n");
    println!("ready in {:?}", cluster.machines[away].up());
    cluster.machines[away].stop();
    cluster.machines[away].configure("");
    let said = cluster.machines[away].refused();
    assert!(said.contains("host-gw"), "{said}");
}

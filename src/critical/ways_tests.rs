//! Every critical flag, and every way in which two servers can or cannot differ in it.
//!
//! For each flag: groups of texts that mean the same. Within a group servers match, whichever of them founded the cluster;
//! between groups they do not, exactly the flags named differ, and the lines that the message tells to write make them match.

use std::time::{Duration, UNIX_EPOCH};

use super::tests::flags;
use super::{CriticalFlags, Flag, gate};

/// Texts of a configuration file that mean the same. The first group of each flag holds the default and the empty text.
type Group = &'static [&'static str];

const SWITCH: &[&[&str]] = &[
    &["", "{}: false", "{}: no", "{}: off", "{}: \"F\"", "{}: 0", "{}: [false]"],
    &[
        "{}: true",
        "{}: yes",
        "{}: on",
        "{}: \"T\"",
        "{}: 1",
        "{}: false\n{}+: true",
        "{}:   TRUE # why",
    ],
];

const CIDRS: &[Group] = &[
    &["", "cluster-cidr: 10.42.0.0/16", "cluster-cidr: [\"10.42.0.0/16\"]"],
    &["cluster-cidr: 10.44.0.0/16"],
    &["cluster-cidr: 10.42.0.0/17"],
    &["cluster-cidr: 10.40.0.0/14\nservice-cidr: 10.44.0.0/16\ncluster-dns: 10.44.0.10"],
];

const SERVICES: &[Group] = &[
    &["", "service-cidr: 10.43.0.0/16", "cluster-dns: 10.43.0.10"],
    &["service-cidr: 10.45.0.0/16", "service-cidr: 10.45.0.0/16\ncluster-dns: 10.45.0.10"],
    &["service-cidr: 10.43.0.0/24"],
    &["service-cidr: 10.43.0.0/24\ncluster-dns: 10.43.0.53"],
];

const DUAL: &[Group] = &[
    &["", "node-ip: 10.0.0.1"],
    &[
        "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: 10.43.0.0/16,fd00:43::/112",
        "cluster-cidr: [10.42.0.0/16, \"FD00:0042::/56\"]\nservice-cidr: [10.43.0.0/16, \"fd00:43:0::/112\"]",
        "cluster-cidr: 10.42.0.0/16\ncluster-cidr+: \"fd00:42::/56\"\nservice-cidr: 10.43.0.0/16, fd00:43::/112\ncluster-dns: [10.43.0.10, \"fd00:43::A\"]",
    ],
    &["cluster-cidr: fd00:42::/56,10.42.0.0/16\nservice-cidr: fd00:43::/112,10.43.0.0/16"],
    &[
        "cluster-cidr: fd00:42::/56\nservice-cidr: fd00:43::/112",
        "node-ip: fd00::5",
        "node-ip: \"fd00::5,10.0.0.1\"",
    ],
    &["cluster-cidr: 10.42.0.0/16,fd00:44::/56\nservice-cidr: 10.43.0.0/16,fd00:45::/112"],
];

/// Flag, other flags that move with it, groups.
const WAYS: &[(&str, &[&str], &[Group])] = &[
    ("cluster-cidr", &["service-cidr", "cluster-dns"], CIDRS),
    ("service-cidr", &["cluster-dns"], SERVICES),
    ("cluster-cidr", &["service-cidr", "cluster-dns"], DUAL),
    (
        "cluster-dns",
        &[],
        &[
            &["", "cluster-dns: 10.43.0.10", "cluster-dns: [10.43.0.10]"],
            &["cluster-dns: 10.43.0.11"],
            &["cluster-dns: 10.43.10.0"],
        ],
    ),
    (
        "cluster-domain",
        &[],
        &[
            &["", "cluster-domain: cluster.local", "cluster-domain: 'cluster.local'"],
            &["cluster-domain: k8s.local"],
            &["cluster-domain: \"1.2\""],
            &["cluster-domain: local"],
        ],
    ),
    (
        "disable",
        &[],
        &[
            &["", "disable: []", "disable: \"\"", "disable:"],
            &[
                "disable: [traefik, servicelb]",
                "disable: servicelb,traefik",
                "disable: [servicelb, traefik, servicelb]",
                "disable: [\" traefik \", 'servicelb,']",
                "disable: traefik\ndisable+: servicelb",
                "disable:\n  - servicelb\n  - traefik",
            ],
            &["disable: traefik"],
            &["disable: servicelb"],
            &[
                "disable: [coredns, servicelb, traefik, local-storage, metrics-server, runtimes, ccm]",
            ],
        ],
    ),
    ("disable-cloud-controller", &[], SWITCH),
    ("disable-helm-controller", &[], SWITCH),
    ("disable-kube-proxy", &[], SWITCH),
    ("disable-network-policy", &[], SWITCH),
    (
        "egress-selector-mode",
        &[],
        &[
            &["", "egress-selector-mode: agent"],
            &["egress-selector-mode: cluster"],
            &["egress-selector-mode: pod"],
            &["egress-selector-mode: disabled"],
        ],
    ),
    ("embedded-registry", &[], SWITCH),
    (
        "flannel-backend",
        &[],
        &[
            &["", "flannel-backend: vxlan", "flannel-backend: none\nflannel-backend: vxlan"],
            &["flannel-backend: none"],
            &["flannel-backend: host-gw"],
            &["flannel-backend: wireguard-native"],
        ],
    ),
    ("flannel-external-ip", &[], SWITCH),
    ("flannel-ipv6-masq", &[], SWITCH),
    ("secrets-encryption", &[], SWITCH),
    (
        "secrets-encryption-provider",
        &[],
        &[
            &["", "secrets-encryption-provider: aescbc"],
            &["secrets-encryption-provider: secretbox"],
        ],
    ),
    (
        "service-node-port-range",
        &[],
        &[
            &["", "service-node-port-range: 30000-32767"],
            &["service-node-port-range: 30000-32766"],
            &["service-node-port-range: 1-65535"],
        ],
    ),
    (
        "servicelb-namespace",
        &[],
        &[
            &["", "servicelb-namespace: kube-system"],
            &["servicelb-namespace: lb"],
            &["servicelb-namespace: \"10\""],
            &["servicelb-namespace: \"yes\""],
        ],
    ),
    ("supervisor-metrics", &[], SWITCH),
    (
        "system-default-registry",
        &[],
        &[
            &["", "system-default-registry: \"\"", "system-default-registry:"],
            &["system-default-registry: registry.example"],
            &[
                "system-default-registry: \"registry.example:5000\"",
                "system-default-registry: registry.example:5000",
            ],
        ],
    ),
    (
        "critical-extra-config",
        &[],
        &[
            &["", "critical-extra-config: \"\""],
            &["critical-extra-config: x"],
            &["critical-extra-config: \"a \\\"b\\\" 'c' # d: {e} \\\\ \\t\""],
            &["critical-extra-config: \"0x1F\""],
            &["critical-extra-config: \"1e3\""],
            &["critical-extra-config: \"null\""],
            &["critical-extra-config: \"-\""],
            &["critical-extra-config: \"*x\""],
        ],
    ),
];

fn text(name: &str, form: &str) -> String {
    format!("{}\n", form.replace("{}", name))
}

/// The configuration with every line of these flags taken out and these lines put in.
fn corrected(text: &str, names: &[&str], lines: &[String]) -> String {
    let key = |line: &str| line.split([':', '+']).next().unwrap_or_default().to_owned();
    let mut kept = String::new();
    let mut dropping = false;
    for line in text.lines() {
        if !line.starts_with(' ') {
            dropping = names.contains(&key(line).as_str());
        }
        if !dropping {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept + &lines.join("\n") + "\n"
}

fn check(name: &str, moving: &[&str], here: &str, there: &str, same: bool) {
    let (here_text, there_text) = (text(name, here), text(name, there));
    let own: CriticalFlags = flags(&here_text);
    let (record, _) = flags(&there_text).found(UNIX_EPOCH + Duration::from_secs(1), "pi-1");
    let joiner = own.encode("pi-2");
    let admitted = gate::admission(&record.encode().into(), &joiner);
    let pair = format!("{here_text:?} and {there_text:?}");
    let result = gate::against(&own, &record.encode());
    assert_eq!(result.is_ok(), same, "{pair}");
    assert_eq!(admitted.is_ok(), same, "the leader sees what the joiner sees: {pair}");
    let Err(gate::FlagsError::Differ(mismatches)) = result else { return };

    let names: Vec<&str> = mismatches.iter().map(|mismatch| mismatch.flag.name()).collect();
    assert!(
        names.iter().all(|found| *found == name || moving.contains(found)),
        "{names:?}: {pair}"
    );
    let shown = mismatches.to_string();
    for mismatch in mismatches.iter() {
        assert!(shown.contains(&mismatch.here.to_string()), "{shown}");
        assert!(shown.contains(&mismatch.cluster.value().to_string()), "{shown}");
        assert!(mismatch.sentence().contains("set by pi-1"), "{shown}");
    }
    // The family of the host's own address is the one thing a line about networks cannot change.
    let names: Vec<&str> = names.into_iter().chain(["node-ip"]).collect();
    let lines: Vec<String> = mismatches.iter().map(super::Mismatch::line).collect();
    let corrected = corrected(&here_text, &names, &lines);
    assert!(gate::against(&flags(&corrected), &record.encode()).is_ok(), "{pair}\n{corrected}");
}

#[test]
fn every_flag_matches_in_every_form_of_one_value_and_in_no_form_of_another() {
    for (name, moving, groups) in WAYS {
        for (i, group) in groups.iter().enumerate() {
            for (j, other) in groups.iter().enumerate() {
                for here in *group {
                    for there in *other {
                        check(name, moving, here, there, i == j);
                    }
                }
            }
        }
    }
}

#[test]
fn every_flag_is_in_the_table() {
    for flag in Flag::ALL {
        assert!(WAYS.iter().any(|(name, ..)| *name == flag.name()), "{flag} is not in the table");
    }
}

/// One line each that must not start anywhere, and what the refusal must point at.
#[test]
fn values_that_are_wrong_themselves_are_refused_with_line_and_column() {
    for (text, expected) in [
        (
            "cluster-cidr: 10.42.0.1/16",
            "config.yaml:1:15: cluster-cidr is an address inside a network",
        ),
        ("cluster-cidr: 10.42.0.0", "config.yaml:1:15: cluster-cidr is not a network"),
        ("cluster-cidr: 10.42.0.0/33", "config.yaml:1:15: cluster-cidr is not a network"),
        (
            "cluster-cidr: [10.42.0.0/16, 10.44.0.0/16]",
            "config.yaml:1:30: cluster-cidr has two IPv4 networks",
        ),
        ("service-cidr: 10.42.7.0/24", "config.yaml:1:15: service-cidr and cluster-cidr overlap"),
        ("cluster-cidr: 10.43.0.0/16", "config.yaml:1:15: service-cidr and cluster-cidr overlap"),
        (
            "service-cidr: fd00:43::/112",
            "config.yaml:1:15: service-cidr and cluster-cidr are of different IP families",
        ),
        (
            "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: fd00:43::/112,10.43.0.0/16",
            "config.yaml:2:15: service-cidr and cluster-cidr name the IP families in different order",
        ),
        (
            "node-ip: 10.0.0.1\ncluster-cidr: fd00:42::/56\nservice-cidr: fd00:43::/112",
            "config.yaml:2:15: cluster-cidr begins with another IP family than node-ip",
        ),
        ("cluster-dns: 10.44.0.10", "config.yaml:1:14: cluster-dns is not usable"),
        ("cluster-dns: 10.43.0.1", "config.yaml:1:14: cluster-dns is not usable"),
        ("cluster-dns: dns", "config.yaml:1:14: cluster-dns is not an IP address"),
        (
            "cluster-dns: [10.43.0.10, 10.43.0.11]",
            "config.yaml:1:27: cluster-dns has two IPv4 addresses",
        ),
        ("cluster-dns: fd00:43::a", "config.yaml:1:14: cluster-dns is not usable"),
        ("cluster-domain: Cluster.Local", "config.yaml:1:17: cluster-domain is not a domain"),
        ("cluster-domain: a..b", "config.yaml:1:17: cluster-domain is not a domain"),
        ("disable: treafik", "config.yaml:1:10: disable names an unknown component"),
        (
            "disable: [traefik, network-policy]",
            "config.yaml:1:20: disable names an unknown component",
        ),
        (
            "disable-helm-controller: maybe",
            "config.yaml:1:26: disable-helm-controller is not a boolean",
        ),
        ("flannel-backend: ipip", "config.yaml:1:18: flannel-backend has an unknown value"),
        ("egress-selector-mode: on", "config.yaml:1:23: egress-selector-mode"),
        (
            "secrets-encryption-provider: des",
            "config.yaml:1:30: secrets-encryption-provider has an unknown value",
        ),
        (
            "service-node-port-range: 32767-30000",
            "config.yaml:1:26: service-node-port-range is not a range",
        ),
        (
            "service-node-port-range: 0-70000",
            "config.yaml:1:26: service-node-port-range is not a range",
        ),
        ("servicelb-namespace: Kube_System", "config.yaml:1:22: servicelb-namespace is not a name"),
        (
            "system-default-registry: https://r.example/",
            "config.yaml:1:26: system-default-registry",
        ),
    ] {
        let problems = super::tests::loaded(text).err().unwrap_or_default().to_string();
        assert!(problems.starts_with(expected), "{text}\n{problems}");
        assert!(problems.contains("expected "), "{problems}");
    }
}

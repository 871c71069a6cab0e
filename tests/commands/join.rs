//! A server whose settings differ does not join, and leaves nothing behind on either side.

use crate::server::Server;

/// One line for every flag, and the flags that then differ from the founder's.
const WAYS: &[(&str, &[&str])] = &[
    ("cluster-cidr: 10.44.0.0/16", &["cluster-cidr"]),
    (
        "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: 10.43.0.0/16,fd00:43::/112",
        &["cluster-cidr", "service-cidr", "cluster-dns"],
    ),
    ("service-cidr: 10.45.0.0/16", &["service-cidr", "cluster-dns"]),
    ("cluster-dns: 10.43.0.11", &["cluster-dns"]),
    ("cluster-domain: k8s.local", &["cluster-domain"]),
    ("disable: [traefik, servicelb]", &["disable"]),
    ("disable: []", &["disable"]),
    ("disable-cloud-controller: true", &["disable-cloud-controller"]),
    ("disable-helm-controller: true", &["disable-helm-controller"]),
    ("disable-kube-proxy: true", &["disable-kube-proxy"]),
    ("disable-network-policy: true", &["disable-network-policy"]),
    ("egress-selector-mode: pod", &["egress-selector-mode"]),
    ("embedded-registry: true", &["embedded-registry"]),
    ("flannel-backend: host-gw", &["flannel-backend"]),
    ("flannel-external-ip: true", &["flannel-external-ip"]),
    ("flannel-ipv6-masq: true", &["flannel-ipv6-masq"]),
    ("secrets-encryption: true", &["secrets-encryption"]),
    ("secrets-encryption-provider: secretbox", &["secrets-encryption-provider"]),
    ("service-node-port-range: 30000-32000", &["service-node-port-range"]),
    ("servicelb-namespace: lb", &["servicelb-namespace"]),
    ("supervisor-metrics: true", &["supervisor-metrics"]),
    ("system-default-registry: registry.example", &["system-default-registry"]),
    ("critical-extra-config: x", &["critical-extra-config"]),
];

#[test]
fn every_flag_that_differs_refuses_the_join_and_leaves_no_trace() {
    let founder =
        Server::configure("pi-1", "127.0.0.1", "cluster-init: true\ndisable: [traefik]\n").start();
    let token = founder.run(&["token", "--show"]).done();
    let join = format!("server: {}\ntoken: \"{}\"\n", founder.url(), token.trim());
    let joiner = Server::configure("pi-2", "127.0.0.2", "");
    for (lines, names) in WAYS {
        let disable = if lines.starts_with("disable:") { "" } else { "disable: traefik\n" };
        joiner.write(&format!("{join}{disable}{lines}\n"));
        let refused = joiner.refused();
        assert_eq!(refused.status, 78, "{lines}: {refused:?}");
        let settings = if names.len() == 1 { "setting differs" } else { "settings differ" };
        let said = format!("{}{}", refused.out, refused.err);
        assert!(
            said.contains(&format!("{} {settings} from the cluster", names.len())),
            "{lines}: {said}"
        );
        for name in *names {
            assert!(said.contains(&format!("\n  {name} ")), "{lines}: {said}");
        }
        assert!(said.contains("set by pi-1"), "{lines}: {said}");
        let left: Vec<_> =
            joiner.contents().into_keys().filter(|path| !path.ends_with("lock")).collect();
        assert!(left.is_empty(), "{lines}: {left:?}");
    }
    let members = founder.run(&["member", "list", "-o", "json"]).json();
    assert_eq!(members["members"].as_array().unwrap().len(), 1, "{members}");
}

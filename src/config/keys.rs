//! THE table of keys. Parser, help, environment, merge, completion and the example file all read it.
//!
//! A key of the configuration file, a long flag and a row here are the same thing; to add one, add a row and
//! run the tests, which say what else must follow (`config.example.yaml`).
//!
//! # Invariants
//!
//! - The server flags of K3s as of its 2026 sources have a row each, so that a K3s file or command line works unchanged.
//! - Every default parses as its own kind.
//! - Names, one-letter flags and environment variables are unique.

use super::key::Group as G;
use super::key::Kind as K;
use super::key::{Key, Role};

/// Components that `disable` knows.
pub const COMPONENTS: &[&str] =
    &["coredns", "servicelb", "traefik", "local-storage", "metrics-server", "runtimes", "ccm"];

/// Where our configuration lives.
pub const DEFAULT_FILE: &str = "/etc/k3s/config.yaml";

/// Where K3s keeps its own.
pub const UPSTREAM_FILE: &str = "/etc/rancher/k3s/config.yaml";

/// State of this daemon when systemd does not name a directory.
pub const DEFAULT_DB_DIR: &str = "/var/lib/k3s-server";

/// State of upstream k3s.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/rancher/k3s";

/// Every key, in the order of the help text.
pub static KEYS: &[Key] = &[
    // What only we have.
    Key::new("db-dir", K::Path, G::Store, "Directory of the log and the datastore of this server")
        .env(&["K3S_DB_DIR", "STATE_DIRECTORY"])
        .default(DEFAULT_DB_DIR)
        .ours(),
    Key::new("storage-medium", K::OneOf(&["auto", "sd", "ssd"]), G::Store, "What the directory lives on: sd spares it writes, ssd lets nothing wait for that")
        .default("auto")
        .ours(),
    Key::new("wal-linger", K::Duration, G::Store, "How long a write that only renews a lease may wait for company before the card is flushed; at most 1s")
        .default_note("1s on an SD card, 50ms on a drive, 250ms where it is not known which")
        .ours(),
    Key::new("client-listen", K::SocketAddress, G::Store, "Addresses of the etcd client API")
        .default_note("port 2379 on loopback and on every node-ip")
        .split()
        .ours(),
    Key::new("peer-listen", K::SocketAddress, G::Store, "Addresses for the other servers and for joining ones")
        .default_note("port 2380 on loopback and on every node-ip")
        .split()
        .ours(),
    Key::new("metrics-listen", K::SocketAddress, G::Store, "Addresses of metrics, health and status over plain HTTP")
        .default_note("port 2381 on loopback; on every node-ip too with etcd-expose-metrics")
        .split()
        .ours(),
    Key::new("insecure-http", K::Bool, G::Store, "Serve the etcd client API without TLS, on loopback addresses only; for tests and demonstrations")
        .default("false")
        .ours(),
    // Cluster.
    Key::new("token", K::Secret, G::Cluster, "Secret that servers and agents share to join the cluster")
        .short('t')
        .env(&["K3S_TOKEN"])
        .both(),
    Key::new("token-file", K::Path, G::Cluster, "File that holds the token; wins over token")
        .env(&["K3S_TOKEN_FILE"])
        .both(),
    Key::new("agent-token", K::Secret, G::Cluster, "Secret for agents, with which a server cannot join")
        .env(&["K3S_AGENT_TOKEN"]),
    Key::new("agent-token-file", K::Path, G::Cluster, "File that holds the agent token; wins over agent-token")
        .env(&["K3S_AGENT_TOKEN_FILE"]),
    Key::new("server", K::ServerUrl, G::Cluster, "A server of the cluster to join; its host is what counts, see the README for ports")
        .short('s')
        .env(&["K3S_URL"])
        .ours(),
    Key::new("cluster-init", K::Bool, G::Cluster, "Found a new cluster of which this is the first server")
        .env(&["K3S_CLUSTER_INIT"])
        .default("false")
        .ours(),
    Key::new("cluster-reset", K::Bool, G::Cluster, "Drop all other servers from the cluster and go on alone with this one's data")
        .env(&["K3S_CLUSTER_RESET"])
        .default("false")
        .ours(),
    Key::new("cluster-reset-restore-path", K::Path, G::Cluster, "With cluster-reset: replace the data by this backup first")
        .ours(),
    Key::new("secrets-encryption", K::Bool, G::Cluster, "Let the API server encrypt Secrets before it stores them")
        .default("false")
        .critical(),
    Key::new("secrets-encryption-provider", K::OneOf(&["aescbc", "secretbox"]), G::Cluster, "Cipher for secrets-encryption")
        .default("aescbc")
        .critical(),
    // Networking.
    Key::new("cluster-cidr", K::Cidr, G::Networking, "Networks that pods get their addresses from, at most one of each IP family")
        .default("10.42.0.0/16")
        .default_note("10.42.0.0/16, or fd00:42::/56 where the first node-ip is IPv6")
        .split()
        .critical(),
    Key::new("service-cidr", K::Cidr, G::Networking, "Networks that services get their addresses from, at most one of each IP family")
        .default("10.43.0.0/16")
        .default_note("10.43.0.0/16, or fd00:43::/112 where the first node-ip is IPv6")
        .split()
        .critical(),
    Key::new("service-node-port-range", K::PortRange, G::Networking, "Ports that services of type NodePort may take")
        .default("30000-32767")
        .critical(),
    Key::new("cluster-dns", K::Address, G::Networking, "Service addresses of the cluster's DNS, inside service-cidr")
        .default_note("the tenth address of each service-cidr, 10.43.0.10")
        .split()
        .critical(),
    Key::new("cluster-domain", K::Domain, G::Networking, "DNS domain of the cluster")
        .default("cluster.local")
        .critical(),
    Key::new("flannel-backend", K::OneOf(&["none", "vxlan", "host-gw", "wireguard-native"]), G::Networking, "How flannel carries pod traffic between nodes; none: bring your own network plug-in")
        .default("vxlan")
        .critical(),
    Key::new("flannel-ipv6-masq", K::Bool, G::Networking, "Masquerade IPv6 traffic of pods")
        .default("false")
        .critical(),
    Key::new("flannel-external-ip", K::Bool, G::Networking, "Send flannel traffic to the nodes' external addresses")
        .default("false")
        .critical(),
    Key::new("egress-selector-mode", K::OneOf(&["agent", "cluster", "pod", "disabled"]), G::Networking, "Which connections of the API server go through the agents' tunnels")
        .default("agent")
        .critical(),
    Key::new("servicelb-namespace", K::Label, G::Networking, "Namespace of the service load balancer's pods")
        .default("kube-system")
        .critical(),
    // Components.
    Key::new("disable", K::Component, G::Components, "Packaged components to leave out, and to remove where they run: coredns, servicelb, traefik, local-storage, metrics-server, runtimes, ccm")
        .split()
        .critical(),
    Key::new("disable-scheduler", K::Bool, G::Components, "Run no scheduler on this server").default("false"),
    Key::new("disable-cloud-controller", K::Bool, G::Components, "Run no cloud controller manager")
        .default("false")
        .critical(),
    Key::new("disable-kube-proxy", K::Bool, G::Components, "Run no kube-proxy").default("false").critical(),
    Key::new("disable-network-policy", K::Bool, G::Components, "Run no network policy controller")
        .default("false")
        .critical(),
    Key::new("disable-helm-controller", K::Bool, G::Components, "Run no Helm controller")
        .default("false")
        .critical(),
    Key::new("disable-apiserver", K::Bool, G::Components, "Run no API server on this server").default("false").hidden(),
    Key::new("disable-controller-manager", K::Bool, G::Components, "Run no controller manager on this server")
        .default("false")
        .hidden(),
    Key::new("disable-etcd", K::Bool, G::Components, "Hold no copy of the datastore on this server")
        .default("false")
        .ours()
        .hidden(),
    Key::new("disable-agent", K::Bool, G::Components, "Run no kubelet on this server").default("false").hidden(),
    Key::new("embedded-registry", K::Bool, G::Components, "Let nodes serve each other's container images")
        .default("false")
        .critical(),
    Key::new("supervisor-metrics", K::Bool, G::Components, "Serve upstream k3s' own metrics on its supervisor port")
        .default("false")
        .critical(),
    // Database.
    Key::new("etcd-expose-metrics", K::Bool, G::Database, "Serve metrics, health and status on the node's addresses too, not only on loopback")
        .default("false")
        .ours(),
    Key::new("etcd-disable-snapshots", K::Bool, G::Database, "Take no backups on a schedule").default("false").ours(),
    Key::new("etcd-snapshot-name", K::Text, G::Database, "Beginning of the names of scheduled backups")
        .default("etcd-snapshot")
        .ours(),
    Key::new("etcd-snapshot-schedule-cron", K::Text, G::Database, "When to take backups: minute, hour, day, month, weekday")
        .default("0 */12 * * *")
        .ours(),
    Key::new("etcd-snapshot-reconcile-interval", K::Duration, G::Database, "How often the list of backups is compared with what is stored")
        .default("10m")
        .ours(),
    Key::new("etcd-snapshot-retention", K::Int(0, 100_000), G::Database, "Scheduled backups to keep; 0 keeps all")
        .default("5")
        .ours(),
    Key::new("etcd-snapshot-dir", K::Path, G::Database, "Directory for backups")
        .default_note("${data-dir}/server/db/snapshots")
        .ours(),
    Key::new("etcd-snapshot-compress", K::Bool, G::Database, "Compress backups").default("false").ours(),
    Key::new("etcd-s3", K::Bool, G::Database, "Copy backups to S3-compatible storage").default("false").ours(),
    Key::new("etcd-s3-endpoint", K::Text, G::Database, "Host of the S3 service").default("s3.amazonaws.com").ours(),
    Key::new("etcd-s3-endpoint-ca", K::Text, G::Database, "Certificate authority of the S3 service: a file, or base64 text").ours(),
    Key::new("etcd-s3-skip-ssl-verify", K::Bool, G::Database, "Accept any certificate from the S3 service").default("false").ours(),
    Key::new("etcd-s3-access-key", K::Secret, G::Database, "S3 access key").env(&["AWS_ACCESS_KEY_ID"]).ours(),
    Key::new("etcd-s3-secret-key", K::Secret, G::Database, "S3 secret key").env(&["AWS_SECRET_ACCESS_KEY"]).ours(),
    Key::new("etcd-s3-session-token", K::Secret, G::Database, "S3 session token").env(&["AWS_SESSION_TOKEN"]).ours(),
    Key::new("etcd-s3-bucket", K::Text, G::Database, "S3 bucket").ours(),
    Key::new("etcd-s3-bucket-lookup-type", K::OneOf(&["auto", "dns", "path"]), G::Database, "Whether the bucket is part of the host name or of the path")
        .default("auto")
        .ours(),
    Key::new("etcd-s3-region", K::Text, G::Database, "S3 region").default("us-east-1").ours(),
    Key::new("etcd-s3-folder", K::Text, G::Database, "Folder in the bucket").ours(),
    Key::new("etcd-s3-retention", K::Int(0, 100_000), G::Database, "Backups to keep in S3; 0 keeps all").default("5").ours(),
    Key::new("etcd-s3-proxy", K::Secret, G::Database, "Proxy for S3, instead of the one in the environment").ours(),
    Key::new("etcd-s3-config-secret", K::Text, G::Database, "Secret in kube-system that holds the S3 settings, used when no other is given").ours(),
    Key::new("etcd-s3-insecure", K::Bool, G::Database, "Talk plain HTTP to the S3 service").default("false").ours(),
    Key::new("etcd-s3-timeout", K::Duration, G::Database, "Longest time for one S3 operation").default("5m").ours(),
    Key::new("datastore-endpoint", K::Secret, G::Database, "External datastore. Refused, because this daemon is the datastore; see the README on moving from one")
        .env(&["K3S_DATASTORE_ENDPOINT"])
        .ours(),
    Key::new("datastore-cafile", K::Path, G::Database, "Certificate authority of an external datastore; not used")
        .env(&["K3S_DATASTORE_CAFILE"])
        .ours(),
    Key::new("datastore-certfile", K::Path, G::Database, "Client certificate for an external datastore; not used")
        .env(&["K3S_DATASTORE_CERTFILE"])
        .ours(),
    Key::new("datastore-keyfile", K::Path, G::Database, "Client key for an external datastore; not used")
        .env(&["K3S_DATASTORE_KEYFILE"])
        .ours(),
    Key::new("kine-tls", K::Bool, G::Database, "TLS between upstream k3s and kine; not used").default("false").ours().hidden(),
    // Data, listener, client, storage.
    Key::new("data-dir", K::Path, G::Data, "Directory of upstream k3s; older datastores are looked for there")
        .short('d')
        .env(&["K3S_DATA_DIR"])
        .default(DEFAULT_DATA_DIR)
        .both(),
    Key::new("bind-address", K::Address, G::Listener, "Address upstream k3s listens on").default_note("all addresses"),
    Key::new("https-listen-port", K::PORT, G::Listener, "Port of the API server").default("6443"),
    Key::new("supervisor-port", K::Int(0, 65_535), G::Listener, "Port of the upstream supervisor").env(&["K3S_SUPERVISOR_PORT"]).hidden(),
    Key::new("apiserver-port", K::Int(0, 65_535), G::Listener, "Inner port of the API server").env(&["K3S_APISERVER_PORT"]).hidden(),
    Key::new("apiserver-bind-address", K::Address, G::Listener, "Inner address of the API server")
        .env(&["K3S_APISERVER_BIND_ADDRESS"])
        .hidden(),
    Key::new("advertise-address", K::Address, G::Listener, "Address that the API server tells the cluster")
        .default_note("node-external-ip or node-ip"),
    Key::new("advertise-port", K::Int(0, 65_535), G::Listener, "Port that the API server tells the cluster").default_note("https-listen-port"),
    Key::new("tls-san", K::Text, G::Listener, "More host names and addresses for the server certificates").split().both(),
    Key::new("tls-san-security", K::Bool, G::Listener, "Refuse names in the API server's certificate that nobody configured").default("true"),
    Key::new("write-kubeconfig", K::Path, G::Client, "Where to write the administrator's kubeconfig").short('o').env(&["K3S_KUBECONFIG_OUTPUT"]),
    Key::new("write-kubeconfig-mode", K::Text, G::Client, "Mode of that file, in quotes: \"0640\"").env(&["K3S_KUBECONFIG_MODE"]),
    Key::new("write-kubeconfig-group", K::Text, G::Client, "Group of that file").env(&["K3S_KUBECONFIG_GROUP"]),
    Key::new("helm-job-image", K::Text, G::Client, "Image for Helm jobs; newer name: helm-controller-arg default-job-image"),
    Key::new("default-local-storage-path", K::Path, G::Storage, "Directory of the local-path storage class"),
    // Flags for components.
    Key::new("etcd-arg", K::Argument, G::Flags, "Setting by its etcd name, such as quota-backend-bytes=4294967296").many().ours(),
    Key::new("kube-apiserver-arg", K::Argument, G::Flags, "Flag for kube-apiserver").many(),
    Key::new("kube-controller-manager-arg", K::Argument, G::Flags, "Flag for kube-controller-manager").many(),
    Key::new("kube-scheduler-arg", K::Argument, G::Flags, "Flag for kube-scheduler").many(),
    Key::new("kube-cloud-controller-manager-arg", K::Argument, G::Flags, "Flag for the cloud controller manager").many(),
    Key::new("helm-controller-arg", K::Argument, G::Flags, "Flag for the Helm controller").many(),
    Key::new("kube-controller-arg", K::Argument, G::Flags, "Old name").many().renamed("kube-controller-manager-arg"),
    Key::new("kube-cloud-controller-arg", K::Argument, G::Flags, "Old name").many().renamed("kube-cloud-controller-manager-arg"),
    // Agent: node.
    Key::new("node-name", K::Text, G::AgentNode, "Name of this node").env(&["K3S_NODE_NAME"]).default_note("the host name").both(),
    Key::new("with-node-id", K::Bool, G::AgentNode, "Add an id to the node's name").default("false"),
    Key::new("node-label", K::Argument, G::AgentNode, "Label for the node when it registers").many(),
    Key::new("node-taint", K::Text, G::AgentNode, "Taint for the node when it registers").many(),
    Key::new("image-credential-provider-bin-dir", K::Path, G::AgentNode, "Directory of the kubelet's credential plug-ins")
        .default("/var/lib/rancher/credentialprovider/bin"),
    Key::new("image-credential-provider-config", K::Path, G::AgentNode, "Configuration of the kubelet's credential plug-ins")
        .default("/var/lib/rancher/credentialprovider/config.yaml"),
    Key::new("selinux", K::Bool, G::AgentNode, "Turn SELinux on in containerd").env(&["K3S_SELINUX"]).default("false"),
    Key::new("lb-server-port", K::PORT, G::AgentNode, "Local port of the agent's load balancer").env(&["K3S_LB_SERVER_PORT"]).default("6444"),
    Key::new("protect-kernel-defaults", K::Bool, G::AgentNode, "Refuse to run where kernel settings differ from the kubelet's").default("false"),
    // Agent: runtime.
    Key::new("container-runtime-endpoint", K::Text, G::AgentRuntime, "Socket of another container runtime"),
    Key::new("default-runtime", K::Text, G::AgentRuntime, "Runtime that containerd takes when a pod names none"),
    Key::new("image-service-endpoint", K::Text, G::AgentRuntime, "Socket of another image service"),
    Key::new("disable-default-registry-endpoint", K::Bool, G::AgentRuntime, "Pull from the configured mirrors only").default("false"),
    Key::new("nonroot-devices", K::Bool, G::AgentRuntime, "Let pods without root use the devices given to them").default("false"),
    Key::new("pause-image", K::Text, G::AgentRuntime, "Image of the pods' pause container").default("rancher/mirrored-pause:3.6"),
    Key::new("snapshotter", K::Text, G::AgentRuntime, "containerd's snapshotter").default("overlayfs"),
    Key::new("private-registry", K::Path, G::AgentRuntime, "Configuration of image registries").default("/etc/rancher/k3s/registries.yaml"),
    Key::new("system-default-registry", K::Registry, G::AgentRuntime, "Registry that all system images are pulled from")
        .env(&["K3S_SYSTEM_DEFAULT_REGISTRY"])
        .critical(),
    Key::new("airgap-extra-registry", K::Text, G::AgentRuntime, "Another registry name for preloaded images").many().hidden(),
    // Agent: networking.
    Key::new("node-ip", K::Address, G::AgentNetworking, "Addresses of this node; the first one decides the IP family")
        .short('i')
        .default_note("that of the default route")
        .split()
        .both(),
    Key::new("node-external-ip", K::Address, G::AgentNetworking, "Addresses at which others reach this node").split().both(),
    Key::new("node-internal-dns", K::Text, G::AgentNetworking, "Inner DNS names of this node").many(),
    Key::new("node-external-dns", K::Text, G::AgentNetworking, "Outer DNS names of this node").many(),
    Key::new("resolv-conf", K::Path, G::AgentNetworking, "resolv.conf for the kubelet").env(&["K3S_RESOLV_CONF"]),
    Key::new("flannel-iface", K::Text, G::AgentNetworking, "Network interface for flannel"),
    Key::new("flannel-conf", K::Path, G::AgentNetworking, "flannel's configuration file"),
    Key::new("flannel-cni-conf", K::Path, G::AgentNetworking, "flannel's CNI configuration file"),
    Key::new("vpn-auth", K::Secret, G::AgentNetworking, "Credentials of a VPN provider").env(&["K3S_VPN_AUTH"]),
    Key::new("vpn-auth-file", K::Path, G::AgentNetworking, "File that holds them").env(&["K3S_VPN_AUTH_FILE"]),
    // Agent: flags.
    Key::new("kubelet-arg", K::Argument, G::AgentFlags, "Flag for the kubelet").many(),
    Key::new("kube-proxy-arg", K::Argument, G::AgentFlags, "Flag for kube-proxy").many(),
    // Configuration and logging.
    Key::new("config", K::Path, G::Logging, "Configuration file; `.d` after its name is the directory of drop-ins")
        .short('c')
        .env(&["K3S_CONFIG_FILE"])
        .default_note(DEFAULT_FILE)
        .ours(),
    Key::new("debug", K::Bool, G::Logging, "Log more").env(&["K3S_DEBUG"]).default("false").both(),
    Key::new("v", K::Int(0, 1_000), G::Logging, "Verbosity of Kubernetes components").short('v').default("0"),
    Key::new("vmodule", K::Text, G::Logging, "Verbosity by source file of Kubernetes components: pattern=N,..."),
    Key::new("log", K::Path, G::Logging, "File for upstream's log").short('l'),
    Key::new("alsologtostderr", K::Bool, G::Logging, "With log: write to standard error too").default("false"),
    // Experimental.
    Key::new("enable-pprof", K::Bool, G::Experimental, "Serve Go profiles on the supervisor port").default("false"),
    Key::new("rootless", K::Bool, G::Experimental, "Run upstream without root").default("false"),
    Key::new("prefer-bundled-bin", K::Bool, G::Experimental, "Prefer the programs that come with k3s to those of the host").default("false"),
    Key::new("docker", K::Bool, G::Experimental, "Use Docker instead of containerd").default("false"),
    Key::new("critical-extra-config", K::Text, G::Experimental, "Text that must be equal on all servers").critical().hidden(),
];

/// Keys that K3s dropped, or that only `k3s agent` has, and what to say about each.
pub const RETIRED: &[(&str, &str)] = &[
    ("cluster-secret", "use `token`"),
    ("no-deploy", "use `disable`"),
    ("no-flannel", "use `flannel-backend: none`"),
    ("disable-selinux", "SELinux is off unless `selinux: true`"),
    ("storage-backend", "remove it"),
    ("storage-endpoint", "use `datastore-endpoint`"),
    ("storage-cafile", "use `datastore-cafile`"),
    ("storage-certfile", "use `datastore-certfile`"),
    ("storage-keyfile", "use `datastore-keyfile`"),
    ("disable-apiserver-lb", "it is an option of `k3s agent`"),
];

/// The row of a long name.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The row of a name as it may stand in a file: long, or one letter.
pub fn find_any(name: &str) -> Option<&'static Key> {
    find(name).or_else(|| {
        let mut letters = name.chars();
        let letter = letters.next()?;
        letters.next().is_none().then(|| KEYS.iter().find(|key| key.short == Some(letter)))?
    })
}

/// Follows an old name to the key that took its place.
pub fn resolve(key: &'static Key) -> &'static Key {
    match key.role {
        Role::Renamed(new) => find(new).unwrap_or(key),
        Role::Ours | Role::Both | Role::Upstream => key,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::kinds;

    #[test]
    fn names_letters_and_variables_are_unique() {
        let mut seen = BTreeSet::new();
        for key in KEYS {
            assert!(seen.insert(key.name.to_owned()), "{}", key.name);
            for name in key.environment {
                assert!(seen.insert((*name).to_owned()), "{name}");
            }
            if let Some(letter) = key.short
                && key.name != letter.to_string()
            {
                assert!(seen.insert(letter.to_string()), "{letter}");
            }
        }
    }

    #[test]
    fn every_default_parses_as_its_kind() {
        for key in KEYS.iter().filter(|key| !key.default.is_empty()) {
            assert!(kinds::check(key.kind, key.default).is_ok(), "{}", key.name);
        }
    }

    #[test]
    fn every_bool_has_its_default_written_out() {
        for key in KEYS.iter().filter(|key| key.kind == K::Bool) {
            assert!(!key.default.is_empty(), "{}", key.name);
        }
    }

    #[test]
    fn old_names_lead_to_keys_of_the_same_kind() {
        let renamed: Vec<_> =
            KEYS.iter().filter(|key| matches!(key.role, Role::Renamed(_))).collect();

        assert_eq!(renamed.len(), 2);
        for key in renamed {
            let new = resolve(key);
            assert_ne!(new.name, key.name);
            assert_eq!((new.kind, new.repeat), (key.kind, key.repeat));
        }
        assert!(RETIRED.iter().all(|(name, _)| find(name).is_none()));
    }

    #[test]
    fn one_letter_names_work_in_files() {
        assert_eq!(find_any("t").unwrap().name, "token");
        assert_eq!(find_any("v").unwrap().name, "v");
        assert!(find_any("").is_none());
        assert!(find_any("zz").is_none());
    }
}

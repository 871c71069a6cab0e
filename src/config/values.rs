//! The validated configuration as typed values.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::cidr::Cidr;
use super::etcd_args::EtcdOptions;
use super::key::Key;
use super::origin::Origin;
use super::secret::Secret;
use super::url::ServerUrl;

/// What this server shall be at its first start. Later starts continue what is on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing said: continue, or found a cluster of one.
    Standalone,
    /// `cluster-init`: continue, or found a cluster that others may join.
    Found,
    /// `server`: continue, or join through it. Whether that can be meant is decided where the disk is known.
    Join(ServerUrl),
    /// `cluster-reset`: become the only member, from this backup if one is named.
    Reset {
        /// `cluster-reset-restore-path`.
        restore: Option<PathBuf>,
    },
}

/// An argument about where the datastore is, which only a first start heeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatastoreArgument {
    /// Its key.
    pub name: &'static str,
    /// Who wrote it.
    pub origin: Origin,
}

impl fmt::Display for DatastoreArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.origin)
    }
}

/// Where the token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// In the configuration.
    Inline(Secret),
    /// In a file, which may appear later.
    File(PathBuf),
    /// In a file that systemd made for this service.
    Credential(PathBuf),
}

/// Where one of our ports is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Exactly here. Port 0 lets the kernel choose.
    At(Vec<SocketAddr>),
    /// On loopback, and on the node's addresses where wanted.
    Port {
        /// The port.
        port: u16,
        /// Whether the node's addresses are served too.
        node_addresses: bool,
    },
}

impl Listen {
    /// The addresses to bind, given those of this node.
    pub fn addresses(&self, node: &[IpAddr]) -> Vec<SocketAddr> {
        match self {
            Self::At(addresses) => addresses.clone(),
            Self::Port { port, node_addresses } => {
                let mut ips = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
                if *node_addresses {
                    ips.extend(node.iter().filter(|address| !address.is_loopback()));
                }
                ips.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect()
            }
        }
    }
}

/// What the datastore lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageMedium {
    /// To be found out.
    Auto,
    /// SD card or eMMC.
    Sd,
    /// SSD or better.
    Ssd,
}

/// Networks of the cluster, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// `cluster-cidr`, in order.
    pub cluster_cidrs: Vec<Cidr>,
    /// `service-cidr`, in order.
    pub service_cidrs: Vec<Cidr>,
    /// `cluster-dns`, in order.
    pub cluster_dns: Vec<IpAddr>,
}

/// Keys of upstream k3s that somebody set, in the order of the table.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Passthrough(pub(super) Vec<(&'static Key, Vec<String>)>);

impl Passthrough {
    /// Key and values. The values may be secret: [`Key::is_secret`].
    pub fn iter(&self) -> impl Iterator<Item = (&'static Key, &[String])> {
        self.0.iter().map(|(key, values)| (*key, values.as_slice()))
    }
}

impl fmt::Debug for Passthrough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(key, _)| key.name)).finish()
    }
}

/// Everything the daemon needs to know, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values {
    /// State of this daemon.
    pub db_dir: PathBuf,
    /// State of upstream k3s.
    pub data_dir: PathBuf,
    /// Name of this node, lower case.
    pub node_name: String,
    /// Addresses of this node: `node-ip`, else the one detected on the host, else none.
    pub node_ips: Vec<IpAddr>,
    /// Addresses at which others reach this node.
    pub node_external_ips: Vec<IpAddr>,
    /// More names for certificates.
    pub tls_sans: Vec<String>,
    /// What to be.
    pub start: Start,
    /// That the data is or was elsewhere: `datastore-endpoint`, unless it names this daemon, and what belongs to it.
    pub datastore_arguments: Vec<DatastoreArgument>,
    /// The token, if one was given.
    pub token: Option<TokenSource>,
    /// etcd client API.
    pub client_listen: Listen,
    /// Other servers.
    pub peer_listen: Listen,
    /// Metrics, health, status.
    pub metrics_listen: Listen,
    /// Whether the client API is served without TLS. Then all its addresses are loopback.
    pub insecure_http: bool,
    /// Settings by etcd's names.
    pub etcd: EtcdOptions,
    /// How long a lease renewal may wait for company, if somebody said so.
    pub wal_linger: Option<Duration>,
    /// What the datastore lives on.
    pub storage_medium: StorageMedium,
    /// Networks.
    pub network: Network,
    /// Log more.
    pub debug: bool,
    /// What upstream k3s is to be told.
    pub passthrough: Passthrough,
}

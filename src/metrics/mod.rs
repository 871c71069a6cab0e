//! Counts what the daemon does, under the names that etcd's dashboards and alerts already use.
//!
//! A module takes the group it fills (`metrics.wal`, `metrics.raft`, …) by value: every handle is a shared
//! atomic, so a clone is cheap and counting never takes a lock. What etcd has no word for carries the
//! prefix `k3s_server_`.
//!
//! # Shape
//!
//! [`Metrics::new`] makes all handles and the registry at once; after that the set of names is fixed.
//! Labels are only ever values from a closed set (method names, peers of this cluster), so a client
//! cannot make the page grow. [`process`] is read from the kernel at scrape time, [`grpc`] holds the
//! per-method call counters.
//!
//! # Not here
//!
//! HTTP (`observe::http`), and any decision: nothing in the daemon reads a metric back.

pub mod grpc;
pub mod process;

mod groups;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

pub use groups::{
    Connections, Health, Lease, Mvcc, Network, Peer, Raft, State, Wal, WalBarrier, Watch,
};

use grpc::Grpc;
use process::Process;

/// Media type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Every handle of the process. See the module documentation.
#[derive(Clone)]
pub struct Metrics {
    /// The log.
    pub wal: Wal,
    /// Apply and checkpoints.
    pub state: State,
    /// Consensus, and the server as a whole.
    pub raft: Raft,
    /// Keys and revisions.
    pub mvcc: Mvcc,
    /// Watchers.
    pub watch: Watch,
    /// Leases.
    pub lease: Lease,
    /// Bytes to and from clients and peers.
    pub network: Network,
    /// Accepted and refused connections.
    pub connections: Connections,
    /// Health checks answered.
    pub health: Health,
    /// gRPC calls.
    pub grpc: Grpc,
    registry: Arc<Registry>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// The versions shown as labels.
#[derive(Clone, Copy, Debug)]
pub struct Versions {
    /// The etcd version whose behaviour this server has, such as `3.6.5`.
    pub server: &'static str,
    /// The same as a cluster version, such as `3.6`.
    pub cluster: &'static str,
    /// This daemon's own version.
    pub daemon: &'static str,
}

impl Metrics {
    /// Makes every metric, at zero. `started` is when the process began, for people and for Prometheus'
    /// detection of resets.
    pub fn new(versions: Versions, started: SystemTime) -> Self {
        let mut registry = Registry::default();
        register_versions(&mut registry, versions);
        registry.register_collector(Box::new(Process::new(started)));
        Self {
            wal: Wal::register(&mut registry),
            state: State::register(&mut registry),
            raft: Raft::register(&mut registry),
            mvcc: Mvcc::register(&mut registry),
            watch: Watch::register(&mut registry),
            lease: Lease::register(&mut registry),
            network: Network::register(&mut registry),
            connections: Connections::register(&mut registry),
            health: Health::register(&mut registry),
            grpc: Grpc::register(&mut registry),
            registry: Arc::new(registry),
        }
    }

    /// The page that `/metrics` serves, in [`CONTENT_TYPE`].
    pub fn text(&self) -> String {
        let mut page = String::with_capacity(16 * 1024);
        match encode(&mut page, &self.registry) {
            Ok(()) => page,
            Err(error) => unreachable!("writing into a String failed: {error}"),
        }
    }
}

fn register_versions(registry: &mut Registry, versions: Versions) {
    let mut version = |name: &str, help: &str, label: &str, value: &str| {
        let family = Family::<Vec<(String, String)>, Gauge>::default();
        family.get_or_create(&vec![(label.to_owned(), value.to_owned())]).set(1);
        registry.register(name, help, family);
    };
    version(
        "etcd_server_version",
        "The etcd version whose behaviour this server has",
        "server_version",
        versions.server,
    );
    version(
        "etcd_cluster_version",
        "The cluster version reported to etcd clients",
        "cluster_version",
        versions.cluster,
    );
    version("k3s_server_version", "The version of this daemon", "version", versions.daemon);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::types::NodeId;

    fn metrics() -> Metrics {
        let versions = Versions { server: "3.6.5", cluster: "3.6", daemon: "0.1.0" };
        Metrics::new(versions, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))
    }

    /// The names the official etcd dashboard and alert rules query.
    #[test]
    fn every_name_on_the_etcd_dashboard_is_there() {
        let metrics = metrics();
        metrics.grpc.method("/etcdserverpb.KV/Range").unwrap().call().finish(0);
        let peer = metrics.network.peer(NodeId::new(0xab));
        peer.sent_failures.inc();
        peer.received_bytes.inc();
        peer.sent_bytes.inc();
        peer.round_trip.observe(0.01);
        let page = metrics.text();
        for name in [
            "etcd_server_has_leader 0",
            "etcd_server_leader_changes_seen_total 0",
            "etcd_server_proposals_committed_total 0",
            "etcd_server_proposals_applied_total 0",
            "etcd_server_proposals_failed_total 0",
            "etcd_server_proposals_pending 0",
            "etcd_server_quota_backend_bytes 0",
            "etcd_mvcc_db_total_size_in_bytes 0",
            "etcd_mvcc_db_total_size_in_use_in_bytes 0",
            "etcd_disk_wal_fsync_duration_seconds_bucket{le=\"0.008\"}",
            "etcd_disk_backend_commit_duration_seconds_bucket",
            "etcd_network_client_grpc_received_bytes_total 0",
            "etcd_network_client_grpc_sent_bytes_total 0",
            "etcd_network_peer_received_bytes_total{From=\"ab\"} 1",
            "etcd_network_peer_sent_bytes_total{To=\"ab\"} 1",
            "etcd_network_peer_sent_failures_total{To=\"ab\"} 1",
            "etcd_network_peer_round_trip_time_seconds_bucket",
            "grpc_server_started_total{grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Range\"} 1",
            "grpc_server_handled_total{grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Range\",grpc_code=\"OK\"} 1",
            "grpc_server_handling_seconds_bucket",
            "process_resident_memory_bytes ",
            "process_start_time_seconds 1800000000",
            "etcd_server_version{server_version=\"3.6.5\"} 1",
        ] {
            assert!(page.contains(name), "`{name}` is missing from:\n{page}");
        }
    }

    #[test]
    fn no_name_is_registered_twice() {
        let page = metrics().text();
        let mut names: Vec<&str> =
            page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn a_clone_counts_into_the_same_page() {
        let metrics = metrics();
        metrics.clone().wal.barrier(WalBarrier { seconds: 0.02, bytes: 4096, records: 3 });
        let page = metrics.text();
        assert!(page.contains("k3s_server_wal_barriers_total 1"));
        assert!(page.contains("k3s_server_wal_written_bytes_total 4096"));
        assert!(page.contains("k3s_server_wal_batch_records_sum 3"));
        assert!(page.contains("etcd_disk_wal_fsync_duration_seconds_count 1"));
    }
}

//! Counts what the daemon does, under the names that etcd's dashboards and alerts already use.
//!
//! Two ways lead onto the page. What a module knows anyway (the log its barriers, the store its size) stays there
//! and is read when the page is asked for, by a collector that writes a [`Page`]; a module that needs buckets keeps
//! a [`Histogram`]. What only exists to be shown is a handle here, taken by value from [`Metrics`]. Either way
//! counting is a few atomic additions, without a lock and without allocation.
//!
//! What etcd has no word for carries the prefix `k3s_server_`.
//!
//! # Shape
//!
//! [`Metrics::new`] makes the handles, [`Metrics::collect`] adds collectors; then it is shared and the set of names
//! is fixed. Labels are only ever values from a closed set, so a client cannot make the page grow. [`process`] is
//! read from the kernel, [`grpc`] holds the per-method call counters.
//!
//! # Invariants
//!
//! - Every name on the page is fed by running code; a golden list of them is part of the tests.
//!
//! # Not here
//!
//! HTTP (`observe::http`), what is collected (`server::collect`), and any decision: nothing in the daemon reads a
//! metric back.

pub mod grpc;
pub mod process;
pub mod today;

mod groups;
mod histogram;
mod page;

use std::fmt;
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

pub use groups::{Connections, Health, Network};
pub use histogram::{COUNTS, Durations, Histogram, MICROS, Observations};
pub use page::{Labelled, Page, Row};

use grpc::Grpc;
use process::Process;

/// Media type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Every handle of the process, and the page. See the module documentation.
pub struct Metrics {
    /// Bytes to and from clients.
    pub network: Network,
    /// Accepted and refused connections.
    pub connections: Connections,
    /// Health checks answered.
    pub health: Health,
    /// gRPC calls.
    pub grpc: Grpc,
    registry: Registry,
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
    /// Makes every handle, at zero. `started` is when the process began, for people and for Prometheus'
    /// detection of resets.
    pub fn new(versions: Versions, started: SystemTime) -> Self {
        let mut registry = Registry::default();
        register_versions(&mut registry, versions);
        registry.register_collector(Box::new(Process::new(started)));
        Self {
            network: Network::register(&mut registry),
            connections: Connections::register(&mut registry),
            health: Health::register(&mut registry),
            grpc: Grpc::register(&mut registry),
            registry,
        }
    }

    /// Adds what is read whenever the page is asked for. It may block.
    pub fn collect(&mut self, collector: impl Collector) {
        self.registry.register_collector(Box::new(collector));
    }

    /// The page that `/metrics` serves, in [`CONTENT_TYPE`]. Blocks as long as the collectors do.
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

    use prometheus_client::encoding::DescriptorEncoder;

    use super::*;

    fn metrics() -> Metrics {
        let versions = Versions { server: "3.6.5", cluster: "3.6", daemon: "0.1.0" };
        Metrics::new(versions, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))
    }

    #[derive(Debug)]
    struct Log(Histogram);

    impl Collector for Log {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let mut page = Page::new(encoder);
            let seen = self.0.snapshot();
            page.gauges(&[("size_bytes", "Size", 7_u64)])?;
            page.counters(&[("frames", "Frames", seen.count)])?;
            page.labelled(("alarms", "Alarms", "alarm"), &[("NOSPACE", 1), ("CORRUPT", 0)])?;
            page.counts(("records", "Records", &seen))?;
            page.seconds(("barrier_seconds", "Barriers", &seen.from_bound(1_000)))
        }
    }

    #[test]
    fn collected_values_are_read_when_the_page_is_asked_for() {
        let mut metrics = metrics();
        let log = std::sync::Arc::new(Log(Histogram::new(&MICROS)));
        metrics.collect(std::sync::Arc::clone(&log));
        assert!(metrics.text().contains("frames_total 0\n"));
        log.0.observe(20);
        log.0.observe(1_500_000);
        let page = metrics.text();
        for line in [
            "# TYPE size_bytes gauge\nsize_bytes 7\n",
            "# TYPE frames counter\nframes_total 2\n",
            "alarms{alarm=\"NOSPACE\"} 1\nalarms{alarm=\"CORRUPT\"} 0\n",
            "records_sum 1500020.0\nrecords_count 2\nrecords_bucket{le=\"15.0\"} 0\n",
            "barrier_seconds_sum 1.50002\nbarrier_seconds_count 2\n",
            "barrier_seconds_bucket{le=\"0.001\"} 1\n",
            "barrier_seconds_bucket{le=\"2.048\"} 2\n",
            "barrier_seconds_bucket{le=\"+Inf\"} 2\n",
        ] {
            assert!(page.contains(line), "`{line}` is missing from:\n{page}");
        }
    }

    #[test]
    fn handles_count_onto_the_page() {
        let metrics = metrics();
        metrics.grpc.method("/etcdserverpb.KV/Range").unwrap().call().finish(0);
        metrics.network.client_sent_bytes.inc_by(5);
        let page = metrics.text();
        for line in [
            "etcd_network_client_grpc_sent_bytes_total 5",
            "grpc_server_started_total{grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Range\"} 1",
            "grpc_server_handling_seconds_bucket{le=\"10.0\",grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Range\"} 1",
            "process_start_time_seconds 1800000000",
            "etcd_server_version{server_version=\"3.6.5\"} 1",
        ] {
            assert!(page.contains(line), "`{line}` is missing from:\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
    }
}

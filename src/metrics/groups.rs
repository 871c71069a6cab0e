//! The handles that their owners count into, with the name and help text of each metric.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

/// Makes a metric, registers it and hands it back. Counters get their `_total` from the encoder.
fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    add(registry, name, help, Counter::default())
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    add(registry, name, help, Gauge::default())
}

/// Bytes to and from clients.
#[derive(Clone, Debug)]
pub struct Network {
    /// Bytes of gRPC messages from clients.
    pub client_received_bytes: Counter,
    /// Bytes of gRPC messages to clients.
    pub client_sent_bytes: Counter,
}

impl Network {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            client_received_bytes: counter(
                r,
                "etcd_network_client_grpc_received_bytes",
                "The total number of bytes received from grpc clients",
            ),
            client_sent_bytes: counter(
                r,
                "etcd_network_client_grpc_sent_bytes",
                "The total number of bytes sent to grpc clients",
            ),
        }
    }
}

/// Accepted and refused connections, all ports together.
#[derive(Clone, Debug)]
pub struct Connections {
    /// Connections open now.
    pub open: Gauge,
    /// Connections accepted and authenticated.
    pub accepted: Counter,
    /// Connections closed at once because a cap was reached.
    pub refused: Counter,
    /// TLS handshakes that failed or took too long.
    pub handshakes_failed: Counter,
}

impl Connections {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            open: gauge(r, "k3s_server_connections_open", "Connections open now"),
            accepted: counter(
                r,
                "k3s_server_connections_accepted",
                "Connections accepted and authenticated",
            ),
            refused: counter(
                r,
                "k3s_server_connections_refused",
                "Connections closed at once because a cap was reached",
            ),
            handshakes_failed: counter(
                r,
                "k3s_server_handshakes_failed",
                "TLS handshakes that failed or took too long",
            ),
        }
    }
}

/// Health checks answered.
#[derive(Clone, Debug)]
pub struct Health {
    /// `/health` said true.
    pub success: Counter,
    /// `/health` said false.
    pub failures: Counter,
    checks: Family<CheckResult, Counter>,
    current: Family<Check, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Check {
    r#type: &'static str,
    name: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckResult {
    r#type: &'static str,
    name: &'static str,
    status: &'static str,
}

impl Health {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            success: counter(
                r,
                "etcd_server_health_success",
                "The total number of successful health checks",
            ),
            failures: counter(
                r,
                "etcd_server_health_failures",
                "The total number of failed health checks",
            ),
            checks: add(
                r,
                "etcd_server_healthchecks",
                "The total number of each kind of healthcheck",
                Family::default(),
            ),
            current: add(
                r,
                "etcd_server_healthcheck",
                "The result of each kind of healthcheck",
                Family::default(),
            ),
        }
    }

    /// Counts one check of `/livez` or `/readyz`.
    pub fn check(&self, r#type: &'static str, name: &'static str, passed: bool) {
        let status = if passed { "success" } else { "error" };
        self.checks.get_or_create(&CheckResult { r#type, name, status }).inc();
        self.current.get_or_create(&Check { r#type, name }).set(i64::from(passed));
    }
}

//! Counts what goes to and comes from each node, under etcd's names.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::metrics::{Histogram, MICROS, Page};
use crate::types::NodeId;

/// The lowest bound of etcd's histogram of round trips, in microseconds.
const ETCD_FIRST_MICROS: u64 = 1_000;

/// Between this node and one other.
#[derive(Debug)]
pub(super) struct Traffic {
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    sent_failures: AtomicU64,
    received_failures: AtomicU64,
    connects: AtomicU64,
    strangers: AtomicU64,
    connections: AtomicU64,
    round_trips: Histogram,
}

impl Default for Traffic {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            sent_bytes: zero(),
            received_bytes: zero(),
            sent_failures: zero(),
            received_failures: zero(),
            connects: zero(),
            strangers: zero(),
            connections: zero(),
            round_trips: Histogram::new(&MICROS),
        }
    }
}

impl Traffic {
    pub(super) fn sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn received(&self, bytes: usize) {
        self.received_bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// A call or stream to the node did not end well.
    pub(super) fn sending_failed(&self) {
        self.sent_failures.fetch_add(1, Relaxed);
    }

    /// A call or stream of the node did not end well.
    pub(super) fn receiving_failed(&self) {
        self.received_failures.fetch_add(1, Relaxed);
    }

    /// Somebody else answered where the node was looked for.
    pub(super) fn stranger(&self) {
        self.strangers.fetch_add(1, Relaxed);
    }

    pub(super) fn round_trip(&self, took: Duration) {
        self.round_trips.observe_micros(took);
    }

    /// Counts a connection until the value is dropped.
    pub(super) fn connected(self: &Arc<Self>) -> Connected {
        self.connects.fetch_add(1, Relaxed);
        self.connections.fetch_add(1, Relaxed);
        Connected(Arc::clone(self))
    }
}

/// An open connection to the node.
#[derive(Debug)]
pub(super) struct Connected(Arc<Traffic>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

/// Writes everything onto the metrics page. Without other nodes there is nothing to write.
pub(super) fn write(
    page: &mut Page<'_>,
    own: NodeId,
    nodes: &[(NodeId, Arc<Traffic>)],
) -> fmt::Result {
    if nodes.is_empty() {
        return Ok(());
    }
    let rows = |label: &'static str, value: fn(&Traffic) -> &AtomicU64| {
        nodes
            .iter()
            .map(|(node, traffic)| (vec![(label, node.to_string())], value(traffic).load(Relaxed)))
            .collect::<Vec<_>>()
    };
    let name = "etcd_network_peer_sent_bytes";
    let help = "The total number of bytes sent to peers";
    page.counters_by(name, help, &rows("To", |traffic| &traffic.sent_bytes))?;
    let name = "etcd_network_peer_received_bytes";
    let help = "The total number of bytes received from peers";
    page.counters_by(name, help, &rows("From", |traffic| &traffic.received_bytes))?;
    let name = "etcd_network_peer_sent_failures";
    let help = "The total number of send failures from peers";
    page.counters_by(name, help, &rows("To", |traffic| &traffic.sent_failures))?;
    let name = "etcd_network_peer_received_failures";
    let help = "The total number of receive failures from peers";
    page.counters_by(name, help, &rows("From", |traffic| &traffic.received_failures))?;
    let name = "k3s_server_peer_connects";
    let help = "Connections made to peers, the first ones included";
    page.counters_by(name, help, &rows("To", |traffic| &traffic.connects))?;
    let name = "k3s_server_peer_strangers";
    let help = "Times that another node, or none of the cluster, answered at a peer's address";
    page.counters_by(name, help, &rows("To", |traffic| &traffic.strangers))?;

    let active: Vec<_> = nodes
        .iter()
        .map(|(node, traffic)| {
            let labels = vec![("Local", own.to_string()), ("Remote", node.to_string())];
            (labels, u64::from(0 < traffic.connections.load(Relaxed)))
        })
        .collect();
    let name = "etcd_network_active_peers";
    page.gauges_by(name, "1 for each peer that this node is connected to", &active)?;

    let trips: Vec<_> = nodes
        .iter()
        .map(|(node, traffic)| {
            let seen = traffic.round_trips.snapshot().from_bound(ETCD_FIRST_MICROS);
            (vec![("To", node.to_string())], seen)
        })
        .collect();
    let help = "Round-trip time between this node and its peers";
    page.seconds_by("etcd_network_peer_round_trip_time_seconds", help, &trips)
}

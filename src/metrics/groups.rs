//! The handles, grouped by the module that fills them, with the name and help text of each metric.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};

use crate::types::NodeId;

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

/// etcd's buckets for disk times (1 ms to 8 s), and two more: SD cards pause for longer than 8 s.
fn disk_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 16))
}

/// Powers of two from one to 4 096.
fn counts() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 13))
}

/// What one finished barrier covered.
#[derive(Clone, Copy, Debug)]
pub struct WalBarrier {
    /// How long the write and the flush took.
    pub seconds: f64,
    /// Bytes handed to the card, padding included.
    pub bytes: u64,
    /// Records that became durable.
    pub records: u32,
}

/// The log.
#[derive(Clone, Debug)]
pub struct Wal {
    /// Finished barriers.
    pub barriers: Counter,
    /// Barriers that failed. One is enough to stop the node.
    pub barriers_failed: Counter,
    /// Bytes handed to the card, padding included.
    pub written_bytes: Counter,
    /// Bytes of records before compression and padding.
    pub record_bytes: Counter,
    /// Records per barrier.
    pub batch_records: Histogram,
    /// Time of a barrier: write and flush.
    pub barrier_seconds: Histogram,
    /// The same under etcd's name.
    pub fsync_seconds: Histogram,
    /// Records that waited for company instead of starting a barrier of their own.
    pub lingered: Counter,
    /// Segments filled with zeros ahead of use.
    pub segments_prepared: Counter,
    /// Segments used again after a purge.
    pub segments_recycled: Counter,
    /// Segment files, spare ones included.
    pub segments: Gauge,
}

impl Wal {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            barriers: counter(r, "k3s_server_wal_barriers", "Log barriers that returned"),
            barriers_failed: counter(
                r,
                "k3s_server_wal_barriers_failed",
                "Log barriers that failed",
            ),
            written_bytes: counter(
                r,
                "k3s_server_wal_written_bytes",
                "Bytes handed to the card by the log, padding included",
            ),
            record_bytes: counter(
                r,
                "k3s_server_wal_record_bytes",
                "Bytes of log records before compression and padding",
            ),
            batch_records: add(r, "k3s_server_wal_batch_records", "Records per barrier", counts()),
            barrier_seconds: add(
                r,
                "k3s_server_wal_barrier_seconds",
                "Time of a log barrier, write and flush",
                disk_seconds(),
            ),
            fsync_seconds: add(
                r,
                "etcd_disk_wal_fsync_duration_seconds",
                "The latency distributions of fsync called by WAL",
                disk_seconds(),
            ),
            lingered: counter(
                r,
                "k3s_server_wal_lingered_records",
                "Records that waited for company instead of starting a barrier",
            ),
            segments_prepared: counter(
                r,
                "k3s_server_wal_segments_prepared",
                "Segments filled with zeros ahead of use",
            ),
            segments_recycled: counter(
                r,
                "k3s_server_wal_segments_recycled",
                "Segments used again after a purge",
            ),
            segments: gauge(r, "k3s_server_wal_segments", "Segment files, spare ones included"),
        }
    }

    /// Counts one finished barrier.
    pub fn barrier(&self, barrier: WalBarrier) {
        self.barriers.inc();
        self.written_bytes.inc_by(barrier.bytes);
        self.batch_records.observe(f64::from(barrier.records));
        self.barrier_seconds.observe(barrier.seconds);
        self.fsync_seconds.observe(barrier.seconds);
    }
}

/// Apply and checkpoints.
#[derive(Clone, Debug)]
pub struct State {
    /// Finished checkpoints.
    pub checkpoints: Counter,
    /// Time of a checkpoint, under etcd's name for a backend commit.
    pub checkpoint_seconds: Histogram,
    /// Log index the last checkpoint covers.
    pub checkpoint_index: Gauge,
    /// Entries applied together.
    pub apply_batch_entries: Histogram,
    /// Time to apply one batch.
    pub apply_seconds: Histogram,
    /// Entries whose apply took longer than 100 ms.
    pub slow_applies: Counter,
    /// Entries applied again from the log at the last start.
    pub replayed_entries: Gauge,
}

impl State {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            checkpoints: counter(r, "k3s_server_checkpoints", "Durable checkpoints of the state"),
            checkpoint_seconds: add(
                r,
                "etcd_disk_backend_commit_duration_seconds",
                "The latency distributions of commit called by backend",
                disk_seconds(),
            ),
            checkpoint_index: gauge(
                r,
                "k3s_server_checkpoint_index",
                "Log index that the last checkpoint covers",
            ),
            apply_batch_entries: add(
                r,
                "k3s_server_apply_batch_entries",
                "Entries applied together",
                counts(),
            ),
            apply_seconds: add(
                r,
                "k3s_server_apply_seconds",
                "Time to apply one batch of entries",
                Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
            ),
            slow_applies: counter(
                r,
                "etcd_server_slow_apply",
                "The total number of slow apply requests",
            ),
            replayed_entries: gauge(
                r,
                "k3s_server_replayed_entries",
                "Entries applied again from the log at the last start",
            ),
        }
    }
}

/// Consensus, and the server as a whole.
#[derive(Clone, Debug)]
pub struct Raft {
    /// 1 if this node knows a leader.
    pub has_leader: Gauge,
    /// 1 if this node leads.
    pub is_leader: Gauge,
    /// 1 if this node has no vote.
    pub is_learner: Gauge,
    /// Leader changes seen since the start.
    pub leader_changes: Counter,
    /// Raft's term.
    pub term: Gauge,
    /// Last committed log index.
    pub committed: Counter,
    /// Last applied log index.
    pub applied: Counter,
    /// Proposals not yet answered.
    pub proposals_pending: Gauge,
    /// Proposals that failed.
    pub proposals_failed: Counter,
    /// Heartbeats that could not be sent in time.
    pub heartbeat_send_failures: Counter,
    /// Linearizable reads whose quorum check took longer than an election.
    pub slow_read_indexes: Counter,
    /// Linearizable reads that failed.
    pub read_indexes_failed: Counter,
    /// Space quota.
    pub quota_bytes: Gauge,
}

impl Raft {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            has_leader: gauge(
                r,
                "etcd_server_has_leader",
                "Whether or not a leader exists. 1 is existence, 0 is not",
            ),
            is_leader: gauge(
                r,
                "etcd_server_is_leader",
                "Whether or not this member is a leader. 1 if is, 0 otherwise",
            ),
            is_learner: gauge(
                r,
                "etcd_server_is_learner",
                "Whether or not this member is a learner. 1 if is, 0 otherwise",
            ),
            leader_changes: counter(
                r,
                "etcd_server_leader_changes_seen",
                "The number of leader changes seen",
            ),
            term: gauge(r, "k3s_server_raft_term", "Raft term of this node"),
            committed: counter(
                r,
                "etcd_server_proposals_committed",
                "The total number of consensus proposals committed",
            ),
            applied: counter(
                r,
                "etcd_server_proposals_applied",
                "The total number of consensus proposals applied",
            ),
            proposals_pending: gauge(
                r,
                "etcd_server_proposals_pending",
                "The current number of pending proposals to commit",
            ),
            proposals_failed: counter(
                r,
                "etcd_server_proposals_failed",
                "The total number of failed proposals seen",
            ),
            heartbeat_send_failures: counter(
                r,
                "etcd_server_heartbeat_send_failures",
                "The total number of leader heartbeat send failures",
            ),
            slow_read_indexes: counter(
                r,
                "etcd_server_slow_read_indexes",
                "The total number of pending read indexes not in sync with leader's or timed out",
            ),
            read_indexes_failed: counter(
                r,
                "etcd_server_read_indexes_failed",
                "The total number of failed read indexes seen",
            ),
            quota_bytes: gauge(
                r,
                "etcd_server_quota_backend_bytes",
                "Current backend storage quota size in bytes",
            ),
        }
    }

    /// Raises the committed and applied marks. Marks never go back, as counters must not.
    pub fn progress(&self, committed: u64, applied: u64) {
        raise(&self.committed, committed);
        raise(&self.applied, applied);
    }
}

/// Lifts a counter to `mark`. Only one task calls this for a given counter.
fn raise(counter: &Counter, mark: u64) {
    counter.inc_by(mark.saturating_sub(counter.get()));
}

/// Keys and revisions.
#[derive(Clone, Debug)]
pub struct Mvcc {
    /// Bytes of the state file.
    pub total_bytes: Gauge,
    /// Bytes of it that hold data.
    pub in_use_bytes: Gauge,
    /// Keys alive.
    pub keys: Gauge,
    /// Current revision.
    pub current_revision: Gauge,
    /// Revision of the last compaction.
    pub compact_revision: Gauge,
    /// Put operations.
    pub puts: Counter,
    /// Delete operations.
    pub deletes: Counter,
    /// Range operations.
    pub ranges: Counter,
    /// Transactions.
    pub txns: Counter,
    /// Revisions dropped by compaction.
    pub compacted: Counter,
}

impl Mvcc {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            total_bytes: gauge(
                r,
                "etcd_mvcc_db_total_size_in_bytes",
                "Total size of the underlying database physically allocated in bytes",
            ),
            in_use_bytes: gauge(
                r,
                "etcd_mvcc_db_total_size_in_use_in_bytes",
                "Total size of the underlying database logically in use in bytes",
            ),
            keys: gauge(r, "etcd_debugging_mvcc_keys_total", "Total number of keys"),
            current_revision: gauge(
                r,
                "etcd_debugging_mvcc_current_revision",
                "The current revision of store",
            ),
            compact_revision: gauge(
                r,
                "etcd_debugging_mvcc_compact_revision",
                "The revision of the last compaction in store",
            ),
            puts: counter(r, "etcd_mvcc_put", "Total number of puts seen by this member"),
            deletes: counter(r, "etcd_mvcc_delete", "Total number of deletes seen by this member"),
            ranges: counter(r, "etcd_mvcc_range", "Total number of ranges seen by this member"),
            txns: counter(r, "etcd_mvcc_txn", "Total number of txns seen by this member"),
            compacted: counter(
                r,
                "etcd_debugging_mvcc_db_compaction_keys",
                "Total number of db keys compacted",
            ),
        }
    }
}

/// Watchers.
#[derive(Clone, Debug)]
pub struct Watch {
    /// Watchers.
    pub watchers: Gauge,
    /// Watch streams.
    pub streams: Gauge,
    /// Watchers still reading history.
    pub unsynced: Gauge,
    /// Watchers whose stream is full.
    pub victims: Gauge,
    /// Events sent.
    pub events: Counter,
    /// Events waiting to be sent.
    pub pending_events: Gauge,
}

impl Watch {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            watchers: gauge(r, "etcd_debugging_mvcc_watcher_total", "Total number of watchers"),
            streams: gauge(
                r,
                "etcd_debugging_mvcc_watch_stream_total",
                "Total number of watch streams",
            ),
            unsynced: gauge(
                r,
                "etcd_debugging_mvcc_slow_watcher_total",
                "Total number of unsynced slow watchers",
            ),
            victims: gauge(
                r,
                "k3s_server_watch_victims",
                "Watchers that wait because their client does not read",
            ),
            events: counter(
                r,
                "etcd_debugging_mvcc_events",
                "Total number of events sent by this member",
            ),
            pending_events: gauge(
                r,
                "etcd_debugging_mvcc_pending_events_total",
                "Total number of pending events to be sent",
            ),
        }
    }
}

/// Leases.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Leases granted.
    pub granted: Counter,
    /// Leases revoked.
    pub revoked: Counter,
    /// Keep-alives answered by this node as leader.
    pub renewed: Counter,
    /// Leases that ran out.
    pub expired: Counter,
    /// Leases alive.
    pub alive: Gauge,
}

impl Lease {
    pub(super) fn register(r: &mut Registry) -> Self {
        Self {
            granted: counter(
                r,
                "etcd_debugging_lease_granted",
                "The total number of granted leases",
            ),
            revoked: counter(
                r,
                "etcd_debugging_lease_revoked",
                "The total number of revoked leases",
            ),
            renewed: counter(
                r,
                "etcd_debugging_lease_renewed",
                "The number of renewed leases seen by the leader",
            ),
            expired: counter(
                r,
                "etcd_debugging_server_lease_expired",
                "The total number of expired leases",
            ),
            alive: gauge(r, "k3s_server_leases", "Leases alive"),
        }
    }
}

/// etcd's label for a peer: `To` or `From`, and the node id in hexadecimal.
type PeerLabel = [(&'static str, String); 1];

/// Bytes to and from clients and peers.
#[derive(Clone, Debug)]
pub struct Network {
    /// Bytes of gRPC messages from clients.
    pub client_received_bytes: Counter,
    /// Bytes of gRPC messages to clients.
    pub client_sent_bytes: Counter,
    peer_received: Family<PeerLabel, Counter>,
    peer_sent: Family<PeerLabel, Counter>,
    peer_failed: Family<PeerLabel, Counter>,
    peer_round_trip: Family<PeerLabel, Histogram, fn() -> Histogram>,
}

/// Traffic with one peer. Take it once per connection, not once per message.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Bytes received.
    pub received_bytes: Counter,
    /// Bytes sent.
    pub sent_bytes: Counter,
    /// Messages that could not be sent.
    pub sent_failures: Counter,
    /// Time from request to reply.
    pub round_trip: Histogram,
}

impl Network {
    pub(super) fn register(r: &mut Registry) -> Self {
        let round_trips: fn() -> Histogram =
            || Histogram::new(exponential_buckets(0.0001, 2.0, 16));
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
            peer_received: add(
                r,
                "etcd_network_peer_received_bytes",
                "The total number of bytes received from peers",
                Family::default(),
            ),
            peer_sent: add(
                r,
                "etcd_network_peer_sent_bytes",
                "The total number of bytes sent to peers",
                Family::default(),
            ),
            peer_failed: add(
                r,
                "etcd_network_peer_sent_failures",
                "The total number of send failures to peers",
                Family::default(),
            ),
            peer_round_trip: add(
                r,
                "etcd_network_peer_round_trip_time_seconds",
                "Round-Trip-Time histogram between peers",
                Family::new_with_constructor(round_trips),
            ),
        }
    }

    /// The handles for one peer.
    pub fn peer(&self, node: NodeId) -> Peer {
        let to = [("To", node.to_string())];
        Peer {
            received_bytes: self.peer_received.get_or_create_owned(&[("From", node.to_string())]),
            sent_bytes: self.peer_sent.get_or_create_owned(&to),
            sent_failures: self.peer_failed.get_or_create_owned(&to),
            round_trip: self.peer_round_trip.get_or_create_owned(&to),
        }
    }

    /// Forgets a peer that was removed from the cluster.
    pub fn forget(&self, node: NodeId) {
        let to = [("To", node.to_string())];
        self.peer_received.remove(&[("From", node.to_string())]);
        self.peer_sent.remove(&to);
        self.peer_failed.remove(&to);
        self.peer_round_trip.remove(&to);
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

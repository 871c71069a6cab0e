//! Puts on the metrics page what the parts of a running node know of themselves, when somebody asks.
//!
//! The names are etcd's where its dashboards and alerts use them, and ours for what etcd does not have: above all what
//! the log does to the card. Where a name means something slightly different here, its help text says so.
//!
//! # Not here
//!
//! What is counted where it happens: calls, connections, health checks (`metrics`).

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use crate::etcd::{LeaseStatistics, Leases};
use crate::metrics::Page;
use crate::mvcc::{Counts, Store, StoreError, StoreSize};
use crate::proto::etcdserverpb::AlarmType;
use crate::raft::{self, Node, Role};
use crate::types::{LogIndex, Revision};
use crate::wal;
use crate::watch::{self, Hub};

/// The lowest bound of etcd's disk histograms, in microseconds. Below it no card plays.
const ETCD_FIRST_MICROS: u64 = 1_000;

/// A running node, as the metrics page sees it.
#[derive(Debug)]
pub(super) struct NodeMetrics {
    pub(super) node: Node,
    pub(super) hub: Hub,
    pub(super) leases: Arc<Leases>,
    /// `quota-backend-bytes`; `None` is no quota.
    pub(super) quota_bytes: Option<u64>,
}

impl Collector for NodeMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page::new(encoder);
        log(&mut page, &self.node.wal().stats())?;
        let stats = self.node.stats();
        // A store that cannot be read says so elsewhere; its numbers are left out rather than made up.
        let state = State::read(self.node.store()).ok();
        let mut status = self.node.status();
        if let Some(state) = &state {
            // The store knows at once what Raft's status shows a moment later.
            status.applied = status.applied.max(state.applied);
            status.committed = status.committed.max(state.applied);
        }
        consensus(&mut page, &status, &stats)?;
        apply(&mut page, &stats)?;
        page.gauges(&[(
            "k3s_server_cluster_format",
            "Format in which the cluster's data is written: raised when every server reads it",
            u64::from(self.node.format()),
        )])?;
        page.gauges(&[(
            "etcd_server_quota_backend_bytes",
            "Current backend storage quota size in bytes, 0 without a quota",
            self.quota_bytes.unwrap_or(0),
        )])?;
        if let Some(state) = &state {
            store(&mut page, state)?;
        }
        watchers(&mut page, &self.hub.statistics())?;
        leases(&mut page, &self.leases.statistics())
    }
}

fn log(page: &mut Page<'_>, stats: &wal::Stats) -> fmt::Result {
    page.counters(&[
        ("k3s_server_wal_records", "Records appended to the log", stats.records),
        (
            "k3s_server_wal_record_bytes",
            "Bytes of log records before compression and padding",
            stats.record_bytes,
        ),
        ("k3s_server_wal_barriers", "Log barriers that returned, one per frame", stats.barriers),
        (
            "k3s_server_wal_written_bytes",
            "Bytes of frames and segment headers written by the log, padding included",
            stats.bytes_written,
        ),
        (
            "k3s_server_wal_fill_bytes",
            "Bytes written to fill log segments ahead of use",
            stats.fill_bytes,
        ),
        (
            "k3s_server_wal_fill_failures",
            "Attempts to fill a log segment ahead of use that failed, most likely for want of space",
            stats.fill_failures,
        ),
        (
            "k3s_server_wal_lingered_records",
            "Records that waited for company instead of starting a barrier",
            stats.lingered,
        ),
        ("k3s_server_wal_segments_started", "Log segments started", stats.segments_started),
    ])?;
    page.gauges(&[
        (
            "k3s_server_wal_segments_live",
            "Log segments that hold what may still be needed",
            stats.live_segments,
        ),
        ("k3s_server_wal_segments_spare", "Log segments ready for use", stats.spare_slots),
    ])?;
    let stalled = stats.stalled_for.unwrap_or_default();
    page.gauges(&[(
        "k3s_server_wal_stalled_seconds",
        "How long the running log barrier has kept everybody waiting, 0 if none runs",
        stalled.as_secs_f64(),
    )])?;
    page.counts(("k3s_server_wal_batch_records", "Records per log barrier", &stats.batch_records))?;
    page.seconds((
        "k3s_server_wal_barrier_seconds",
        "Time of a log barrier, write and flush",
        &stats.barrier_micros,
    ))?;
    page.seconds((
        "etcd_disk_wal_fsync_duration_seconds",
        "The latency distributions of fsync called by WAL; here of write and flush",
        &stats.barrier_micros.from_bound(ETCD_FIRST_MICROS),
    ))
}

fn consensus(page: &mut Page<'_>, status: &raft::Status, stats: &raft::Stats) -> fmt::Result {
    page.gauges(&[
        (
            "etcd_server_has_leader",
            "Whether or not a leader exists. 1 is existence, 0 is not",
            u64::from(status.leader.is_some()),
        ),
        (
            "etcd_server_is_leader",
            "Whether or not this member is a leader. 1 if is, 0 otherwise",
            u64::from(status.role == Role::Leader),
        ),
        (
            "etcd_server_is_learner",
            "Whether or not this member is a learner. 1 if is, 0 otherwise",
            u64::from(status.role == Role::Learner),
        ),
        (
            "etcd_server_proposals_pending",
            "The current number of pending proposals to commit",
            stats.proposals_pending,
        ),
        ("k3s_server_raft_term", "The newest Raft term this node knows", status.term.get()),
        ("k3s_server_raft_members", "Members of the cluster", status.members.len() as u64),
    ])?;
    page.counters(&[
        (
            "etcd_server_leader_changes_seen",
            "The number of leader changes seen",
            stats.leader_changes,
        ),
        (
            "etcd_server_proposals_committed",
            "The total number of consensus proposals committed",
            status.committed.get(),
        ),
        (
            "etcd_server_proposals_applied",
            "The total number of consensus proposals applied",
            status.applied.get(),
        ),
        (
            "etcd_server_proposals_failed",
            "The total number of failed proposals seen",
            stats.proposals_failed,
        ),
        (
            "etcd_server_slow_read_indexes",
            "The total number of linearizable reads confirmed later than an election takes",
            stats.reads_slow,
        ),
        (
            "etcd_server_read_indexes_failed",
            "The total number of failed read indexes seen",
            stats.reads_failed,
        ),
    ])
}

fn apply(page: &mut Page<'_>, stats: &raft::Stats) -> fmt::Result {
    page.counters(&[
        (
            "etcd_server_slow_apply",
            "The total number of slow apply requests; here of batches that took over 100 ms",
            stats.slow_applies,
        ),
        (
            "k3s_server_checkpoints",
            "Durable checkpoints of the state",
            stats.checkpoint_micros.count,
        ),
        (
            "k3s_server_checkpoints_failed",
            "Checkpoints of the state that failed",
            stats.checkpoints_failed,
        ),
        ("etcd_mvcc_put", "Total number of puts seen by this member", stats.operations.puts),
        (
            "etcd_mvcc_delete",
            "Total number of deletes seen by this member",
            stats.operations.deletes,
        ),
        ("etcd_mvcc_range", "Total number of ranges seen by this member", stats.operations.ranges),
        ("etcd_mvcc_txn", "Total number of txns seen by this member", stats.operations.txns),
    ])?;
    page.gauges(&[
        (
            "k3s_server_checkpoint_index",
            "Log index that the last checkpoint covers",
            stats.checkpoint_index.get(),
        ),
        (
            "k3s_server_replayed_entries",
            "Entries of the log that the start applied again",
            stats.replayed_entries,
        ),
    ])?;
    page.counts((
        "k3s_server_apply_batch_entries",
        "Entries applied together",
        &stats.apply_entries,
    ))?;
    page.seconds((
        "k3s_server_apply_seconds",
        "Time to apply one batch of entries",
        &stats.apply_micros,
    ))?;
    page.seconds((
        "etcd_disk_backend_commit_duration_seconds",
        "The latency distributions of commit called by backend; here of checkpoints",
        &stats.checkpoint_micros.from_bound(ETCD_FIRST_MICROS),
    ))
}

/// The store at one moment.
struct State {
    size: StoreSize,
    counts: Counts,
    revision: Revision,
    compacted: Revision,
    applied: LogIndex,
    no_space: u64,
    corrupt: u64,
    starved: bool,
}

impl State {
    fn read(store: &Store) -> Result<Self, StoreError> {
        let view = store.read()?;
        let alarms = view.alarms()?;
        let raised = |kind: AlarmType| {
            alarms.iter().filter(|(_, raised)| *raised == i32::from(kind)).count() as u64
        };
        Ok(Self {
            size: store.size()?,
            counts: view.counts()?,
            revision: view.revision(),
            compacted: view.compacted(),
            applied: view.applied().map_or(LogIndex::new(0), |id| id.index),
            no_space: raised(AlarmType::Nospace),
            corrupt: raised(AlarmType::Corrupt),
            starved: *store.starved().borrow(),
        })
    }
}

fn store(page: &mut Page<'_>, state: &State) -> fmt::Result {
    let revision = |revision: Revision| u64::try_from(revision.get()).unwrap_or(0);
    page.gauges(&[
        (
            "etcd_mvcc_db_total_size_in_bytes",
            "Total size of the underlying database physically allocated in bytes",
            state.size.total,
        ),
        (
            "etcd_mvcc_db_total_size_in_use_in_bytes",
            "Total size of the underlying database logically in use in bytes",
            state.size.in_use,
        ),
        (
            "etcd_debugging_mvcc_keys_total",
            "Total number of keys, those deleted since the last compaction included",
            state.counts.keys,
        ),
        (
            "k3s_server_store_changes",
            "Changes of keys that are kept: the history that compaction has left",
            state.counts.changes,
        ),
        (
            "etcd_debugging_mvcc_current_revision",
            "The current revision of store",
            revision(state.revision),
        ),
        (
            "etcd_debugging_mvcc_compact_revision",
            "The revision of the last compaction in store",
            revision(state.compacted),
        ),
    ])?;
    page.gauges(&[(
        "k3s_server_store_starved",
        "Whether writes to the state file wait for room on a full card. 1 is yes, 0 is no",
        u64::from(state.starved),
    )])?;
    page.labelled(
        ("k3s_server_alarms", "Members that have raised an alarm", "alarm"),
        &[("NOSPACE", state.no_space), ("CORRUPT", state.corrupt)],
    )
}

fn watchers(page: &mut Page<'_>, watch: &watch::Statistics) -> fmt::Result {
    page.gauges(&[
        (
            "etcd_debugging_mvcc_watch_stream_total",
            "Total number of watch streams",
            watch.streams as u64,
        ),
        ("etcd_debugging_mvcc_watcher_total", "Total number of watchers", watch.watchers as u64),
        (
            "etcd_debugging_mvcc_slow_watcher_total",
            "Total number of unsynced slow watchers: those that still read history",
            watch.behind as u64,
        ),
        (
            "k3s_server_watch_queued_bytes",
            "Bytes of events that wait for clients to read them",
            watch.queued_bytes,
        ),
    ])?;
    page.counters(&[(
        "etcd_debugging_mvcc_events",
        "Total number of events sent by this member",
        watch.events_sent,
    )])
}

fn leases(page: &mut Page<'_>, leases: &LeaseStatistics) -> fmt::Result {
    page.gauges(&[("k3s_server_leases", "Leases alive", leases.alive)])?;
    page.counters(&[
        ("etcd_debugging_lease_granted", "The total number of granted leases", leases.granted),
        ("etcd_debugging_lease_revoked", "The total number of revoked leases", leases.revoked),
        (
            "etcd_debugging_lease_renewed",
            "The number of renewed leases seen by the leader",
            leases.renewed,
        ),
        (
            "etcd_debugging_server_lease_expired",
            "The total number of expired leases",
            leases.expired,
        ),
    ])
}

//! Counts what the node does: proposals, reads, apply, checkpoints.
//!
//! Plain atomics: whoever does the work adds, `/metrics` reads, nobody waits. Everything counts from the start of
//! the process; what the start replays from the log is applied once more and counts as applied.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::apply::Operations;
use crate::env::Clock;
use crate::metrics::{COUNTS, Histogram, MICROS, Observations};
use crate::types::LogIndex;
use crate::versions;

/// etcd calls an apply slow from here on.
const SLOW_APPLY: Duration = Duration::from_millis(100);

/// What the node did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Proposals not yet answered.
    pub proposals_pending: u64,
    /// Proposals that ended without an outcome.
    pub proposals_failed: u64,
    /// Times that this node learned of a leader, itself included.
    pub leader_changes: u64,
    /// Linearizable reads that were confirmed, but later than an election takes.
    pub reads_slow: u64,
    /// Linearizable reads that nobody confirmed.
    pub reads_failed: u64,
    /// Entries of the log that the start applied again.
    pub replayed_entries: u64,
    /// Batches whose apply took longer than 100 ms.
    pub slow_applies: u64,
    /// Entries per batch.
    pub apply_entries: Observations,
    /// Microseconds to apply a batch and show it to followers.
    pub apply_micros: Observations,
    /// Microseconds of a checkpoint, from its commit until it was durable.
    pub checkpoint_micros: Observations,
    /// Checkpoints that failed.
    pub checkpoints_failed: u64,
    /// The last entry that a checkpoint covers.
    pub checkpoint_index: LogIndex,
    /// Operations on keys, applied or read.
    pub operations: Operations,
    /// Snapshots that a follower has installed from here.
    pub snapshots_sent: u64,
    /// Snapshots that this node has installed.
    pub snapshots_received: u64,
    /// The snapshot that is being sent, or the last of several.
    pub sending: Option<Progress>,
    /// The snapshot that is being received.
    pub receiving: Option<Progress>,
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Records carried.
    pub records: u64,
    /// About how many there are.
    pub records_estimate: u64,
    /// Bytes carried, compressed.
    pub bytes: u64,
    /// Since it began.
    pub elapsed: Duration,
}

impl Progress {
    /// How much is done, in percent. Below 100 until the end, because the total is an estimate.
    pub fn percent(&self) -> u64 {
        let percent = self.records.saturating_mul(100).checked_div(self.records_estimate);
        percent.unwrap_or(0).min(99)
    }

    /// Bytes per second so far.
    pub fn bytes_per_second(&self) -> u64 {
        let millis = u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
        self.bytes.saturating_mul(1000) / millis
    }

    /// About how long the rest takes.
    pub fn remaining(&self) -> Option<Duration> {
        let left = self.records_estimate.saturating_sub(self.records);
        let millis = u64::try_from(self.elapsed.as_millis()).ok()?;
        Some(Duration::from_millis(millis.saturating_mul(left).checked_div(self.records)?))
    }
}

/// A snapshot under way, shared by those who move it. It is over when the last of them lets go.
#[derive(Clone)]
pub(super) struct Moving(Arc<Move>);

struct Move {
    counters: Arc<Counters>,
    direction: Direction,
    number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Out,
    In,
}

/// The newest snapshot in one direction.
#[derive(Debug, Default)]
struct Current {
    /// Counts snapshots, so that one that ends does not end the next.
    number: u64,
    under_way: Option<(Instant, Progress)>,
}

impl Moving {
    fn begin(counters: &Arc<Counters>, direction: Direction, records_estimate: u64) -> Self {
        let start = counters.now();
        let mut current = counters.current(direction);
        current.number += 1;
        current.under_way = Some((start, Progress { records_estimate, ..Progress::default() }));
        let number = current.number;
        drop(current);
        Self(Arc::new(Move { counters: Arc::clone(counters), direction, number }))
    }

    /// So many bytes more, and so many records in all.
    pub(super) fn moved(&self, bytes: u64, records: u64) {
        let mut current = self.0.counters.current(self.0.direction);
        if current.number == self.0.number
            && let Some((_, progress)) = &mut current.under_way
        {
            progress.bytes += bytes;
            progress.records = records;
        }
    }

    /// It is installed.
    pub(super) fn done(&self) {
        let counters = &self.0.counters;
        let counter = match self.0.direction {
            Direction::Out => &counters.snapshots_sent,
            Direction::In => &counters.snapshots_received,
        };
        counter.fetch_add(1, Relaxed);
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        let mut current = self.counters.current(self.direction);
        if current.number == self.number {
            current.under_way = None;
        }
    }
}

/// The counters behind [`Stats`].
pub(super) struct Counters {
    clock: Arc<dyn Clock>,
    slow_read: Duration,
    /// Entries before this one were in the log at the start.
    replay_end: LogIndex,
    /// The last entry in the store.
    pub(super) applied: watch::Sender<LogIndex>,
    /// The format in which the cluster's data is written, as far as it is applied here.
    pub(super) format: AtomicU32,
    pub(super) leader_changes: AtomicU64,
    pub(super) checkpoints_failed: AtomicU64,
    proposals_pending: AtomicU64,
    proposals_failed: AtomicU64,
    reads_slow: AtomicU64,
    reads_failed: AtomicU64,
    replayed_entries: AtomicU64,
    slow_applies: AtomicU64,
    apply_entries: Histogram,
    apply_micros: Histogram,
    checkpoint_micros: Histogram,
    puts: AtomicU64,
    deletes: AtomicU64,
    ranges: AtomicU64,
    txns: AtomicU64,
    snapshots_sent: AtomicU64,
    snapshots_received: AtomicU64,
    sending: Mutex<Current>,
    receiving: Mutex<Current>,
}

/// A proposal under way. A client that goes away drops it, which is no failure.
pub(super) struct Proposal<'a>(&'a Counters);

impl Drop for Proposal<'_> {
    fn drop(&mut self) {
        self.0.proposals_pending.fetch_sub(1, Relaxed);
    }
}

impl Counters {
    /// Starts at zero. `replay_end` is the first index that the log did not have.
    pub(super) fn new(clock: Arc<dyn Clock>, slow_read: Duration, replay_end: LogIndex) -> Self {
        Self {
            clock,
            slow_read,
            replay_end,
            applied: watch::Sender::new(LogIndex::new(0)),
            format: AtomicU32::new(versions::FORMAT_FIRST),
            leader_changes: AtomicU64::default(),
            checkpoints_failed: AtomicU64::default(),
            proposals_pending: AtomicU64::default(),
            proposals_failed: AtomicU64::default(),
            reads_slow: AtomicU64::default(),
            reads_failed: AtomicU64::default(),
            replayed_entries: AtomicU64::default(),
            slow_applies: AtomicU64::default(),
            apply_entries: Histogram::new(&COUNTS),
            apply_micros: Histogram::new(&MICROS),
            checkpoint_micros: Histogram::new(&MICROS),
            puts: AtomicU64::default(),
            deletes: AtomicU64::default(),
            ranges: AtomicU64::default(),
            txns: AtomicU64::default(),
            snapshots_sent: AtomicU64::default(),
            snapshots_received: AtomicU64::default(),
            sending: Mutex::default(),
            receiving: Mutex::default(),
        }
    }

    /// A snapshot is on its way to a follower until what this returns is dropped.
    pub(super) fn sends_snapshot(self: &Arc<Self>, records_estimate: u64) -> Moving {
        Moving::begin(self, Direction::Out, records_estimate)
    }

    /// A snapshot is on its way here until what this returns is dropped.
    pub(super) fn receives_snapshot(self: &Arc<Self>, records_estimate: u64) -> Moving {
        Moving::begin(self, Direction::In, records_estimate)
    }

    fn current(&self, direction: Direction) -> MutexGuard<'_, Current> {
        let current = match direction {
            Direction::Out => &self.sending,
            Direction::In => &self.receiving,
        };
        current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self, direction: Direction) -> Option<Progress> {
        let (start, progress) = self.current(direction).under_way?;
        Some(Progress { elapsed: self.since(start), ..progress })
    }

    /// When something that is measured begins.
    pub(super) fn now(&self) -> Instant {
        self.clock.now()
    }

    fn since(&self, start: Instant) -> Duration {
        self.now().saturating_duration_since(start)
    }

    /// A proposal is under way until what this returns is dropped.
    pub(super) fn proposal(&self) -> Proposal<'_> {
        self.proposals_pending.fetch_add(1, Relaxed);
        Proposal(self)
    }

    /// A proposal ended.
    pub(super) fn proposed<T, E>(&self, result: &Result<T, E>) {
        if result.is_err() {
            self.proposals_failed.fetch_add(1, Relaxed);
        }
    }

    /// A linearizable read that began at `start` ended.
    pub(super) fn confirmed<T, E>(&self, start: Instant, result: &Result<T, E>) {
        if result.is_err() {
            self.reads_failed.fetch_add(1, Relaxed);
        } else if self.slow_read < self.since(start) {
            self.reads_slow.fetch_add(1, Relaxed);
        }
    }

    /// A batch of consecutive entries that ends at `last` was applied.
    pub(super) fn applied(&self, start: Instant, last: LogIndex, entries: u64) {
        let took = self.since(start);
        self.apply_entries.observe(entries);
        self.apply_micros.observe_micros(took);
        self.applied.send_replace(last);
        if SLOW_APPLY < took {
            self.slow_applies.fetch_add(1, Relaxed);
        }
        let beyond = last.next().get().saturating_sub(self.replay_end.get());
        if beyond < entries {
            self.replayed_entries.fetch_add(entries - beyond, Relaxed);
        }
    }

    /// A checkpoint that began at `start` is durable.
    pub(super) fn checkpointed(&self, start: Instant) {
        self.checkpoint_micros.observe_micros(self.since(start));
    }

    /// Keys were read or changed.
    pub(super) fn count(&self, done: Operations) {
        for (counter, count) in [
            (&self.puts, done.puts),
            (&self.deletes, done.deletes),
            (&self.ranges, done.ranges),
            (&self.txns, done.txns),
        ] {
            if 0 < count {
                counter.fetch_add(count, Relaxed);
            }
        }
    }

    /// Everything so far. `checkpoint_index` is kept elsewhere.
    pub(super) fn snapshot(&self, checkpoint_index: LogIndex) -> Stats {
        Stats {
            proposals_pending: self.proposals_pending.load(Relaxed),
            proposals_failed: self.proposals_failed.load(Relaxed),
            leader_changes: self.leader_changes.load(Relaxed),
            reads_slow: self.reads_slow.load(Relaxed),
            reads_failed: self.reads_failed.load(Relaxed),
            replayed_entries: self.replayed_entries.load(Relaxed),
            slow_applies: self.slow_applies.load(Relaxed),
            apply_entries: self.apply_entries.snapshot(),
            apply_micros: self.apply_micros.snapshot(),
            checkpoint_micros: self.checkpoint_micros.snapshot(),
            checkpoints_failed: self.checkpoints_failed.load(Relaxed),
            checkpoint_index,
            operations: Operations {
                puts: self.puts.load(Relaxed),
                deletes: self.deletes.load(Relaxed),
                ranges: self.ranges.load(Relaxed),
                txns: self.txns.load(Relaxed),
            },
            snapshots_sent: self.snapshots_sent.load(Relaxed),
            snapshots_received: self.snapshots_received.load(Relaxed),
            sending: self.progress(Direction::Out),
            receiving: self.progress(Direction::In),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::host;

    fn counters(replay_end: u64) -> Counters {
        Counters::new(host::env().clock, Duration::from_secs(1), LogIndex::new(replay_end))
    }

    fn stats(counters: &Counters) -> Stats {
        counters.snapshot(LogIndex::new(0))
    }

    #[test]
    fn only_entries_found_in_the_log_at_the_start_count_as_replayed() {
        let counters = counters(11);
        let start = counters.now();
        counters.applied(start, LogIndex::new(7), 3);
        counters.applied(start, LogIndex::new(12), 5);
        counters.applied(start, LogIndex::new(13), 1);
        let stats = stats(&counters);
        assert_eq!(stats.replayed_entries, 6, "5 to 10");
        assert_eq!((stats.apply_entries.count, stats.apply_entries.sum), (3, 9));
        assert_eq!(stats.apply_micros.count, 3);
    }

    #[test]
    fn proposal_is_pending_until_it_is_dropped() {
        let counters = counters(0);
        let one = counters.proposal();
        let two = counters.proposal();
        assert_eq!(stats(&counters).proposals_pending, 2);
        drop((one, two));
        counters.proposed(&Err::<(), ()>(()));
        counters.proposed(&Ok::<(), ()>(()));
        let stats = stats(&counters);
        assert_eq!((stats.proposals_pending, stats.proposals_failed), (0, 1));
    }

    #[test]
    fn snapshot_under_way_tells_how_far_it_is_and_the_next_is_not_ended_with_it() {
        let counters = Arc::new(counters(0));
        let first = counters.receives_snapshot(200);
        first.moved(1000, 50);
        let progress = stats(&counters).receiving.unwrap();
        assert_eq!((progress.records, progress.bytes, progress.percent()), (50, 1000, 25));
        assert!(stats(&counters).sending.is_none());

        let second = counters.receives_snapshot(0);
        first.moved(1, 51);
        drop(first);
        second.done();
        let seen = stats(&counters);
        assert_eq!(
            seen.receiving.map(|progress| (progress.bytes, progress.percent())),
            Some((0, 0))
        );
        assert_eq!((seen.snapshots_received, seen.snapshots_sent), (1, 0));
        let (other, elapsed) = (second.clone(), Duration::from_secs(2));
        drop(second);
        assert!(stats(&counters).receiving.is_some());
        drop(other);
        assert!(stats(&counters).receiving.is_none());

        let progress = Progress { records: 50, records_estimate: 200, bytes: 3000, elapsed };
        assert_eq!(progress.bytes_per_second(), 1500);
        assert_eq!(progress.remaining(), Some(Duration::from_secs(6)));
        assert_eq!(Progress::default().remaining(), None);
    }

    #[test]
    fn slow_and_failed_work_is_told_apart() {
        let counters = counters(0);
        let long_ago = counters.now().checked_sub(Duration::from_secs(2)).unwrap();
        counters.confirmed(long_ago, &Ok::<(), ()>(()));
        counters.confirmed(counters.now(), &Ok::<(), ()>(()));
        counters.confirmed(long_ago, &Err::<(), ()>(()));
        counters.applied(long_ago, LogIndex::new(1), 1);
        counters.checkpointed(long_ago);
        let stats = stats(&counters);
        assert_eq!((stats.reads_slow, stats.reads_failed, stats.slow_applies), (1, 1, 1));
        assert!(1_900_000 < stats.checkpoint_micros.sum);
    }
}

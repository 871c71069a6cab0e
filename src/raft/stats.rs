//! Counts what the node does: proposals, reads, apply, checkpoints.
//!
//! Plain atomics: whoever does the work adds, `/metrics` reads, nobody waits. Everything counts from the start of
//! the process; what the start replays from the log is applied once more and counts as applied.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::apply::Operations;
use crate::env::Clock;
use crate::metrics::{COUNTS, Histogram, MICROS, Observations};
use crate::types::LogIndex;

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
}

/// The counters behind [`Stats`].
pub(super) struct Counters {
    clock: Arc<dyn Clock>,
    slow_read: Duration,
    /// Entries before this one were in the log at the start.
    replay_end: LogIndex,
    /// The last entry in the store.
    pub(super) applied: watch::Sender<LogIndex>,
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
        }
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

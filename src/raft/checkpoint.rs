//! Decides when the state machine is made durable, and lets the log forget what that covers.
//!
//! Applying is not durable: after a crash the store is at its last checkpoint and the log brings it forward.
//! A checkpoint costs the card far more than a log write, so it is made rarely, and best right after a
//! compaction: superseded revisions then never reach the card.
//!
//! # Invariants
//!
//! - Before the store's commit there is a log barrier: applied may be ahead of locally durable, and a store
//!   ahead of its log would contradict the log after a power cut.
//! - The log is purged only up to a checkpoint that *is* durable ([`CheckpointMark`]).

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::types::{ByteCount, LogId};

/// When a checkpoint is due.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Longest time between checkpoints while entries are applied.
    pub interval: Duration,
    /// Most log to replay after a crash.
    pub log_bytes: ByteCount,
}

/// The decision: pure, fed with what happened.
#[derive(Debug)]
pub(super) struct Schedule {
    policy: Policy,
    last_at: Instant,
    last_log_bytes: ByteCount,
    /// Something was applied since the last checkpoint.
    dirty: bool,
    /// A compaction was applied since the last checkpoint.
    compacted: bool,
}

impl Schedule {
    pub(super) const fn new(policy: Policy, now: Instant, log_bytes: ByteCount) -> Self {
        Self { policy, last_at: now, last_log_bytes: log_bytes, dirty: false, compacted: false }
    }

    /// Entries were applied.
    pub(super) fn applied(&mut self, compaction: bool) {
        self.dirty = true;
        self.compacted |= compaction;
    }

    /// Whether to checkpoint at `now`, when the log has written `log_bytes` in its life.
    pub(super) fn due(&self, now: Instant, log_bytes: ByteCount) -> bool {
        let logged = log_bytes.get().saturating_sub(self.last_log_bytes.get());
        let waited = now.saturating_duration_since(self.last_at);
        self.dirty
            && (self.policy.interval <= waited
                || self.policy.log_bytes.get() <= logged
                // Compactions come every five minutes from Kubernetes, but a client may send them at any
                // rate; a tenth of the interval keeps such a client from wearing out the card.
                || (self.compacted && self.policy.interval / 10 <= waited))
    }

    /// A checkpoint begins: what is applied from now on belongs to the next one.
    pub(super) fn started(&mut self, now: Instant, log_bytes: ByteCount) {
        *self = Self::new(self.policy, now, log_bytes);
    }
}

/// The newest entry that survives a power cut in the state machine's file.
#[derive(Debug, Default)]
pub(super) struct CheckpointMark(Mutex<Option<LogId>>);

impl CheckpointMark {
    /// Starts at what the store had when it was opened.
    pub(super) const fn new(durable: Option<LogId>) -> Self {
        Self(Mutex::new(durable))
    }

    /// Whether a crash now would leave `id` applied.
    pub(super) fn covers(&self, id: LogId) -> bool {
        self.durable().is_some_and(|durable| id.index <= durable.index)
    }

    /// The mark.
    pub(super) fn durable(&self) -> Option<LogId> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A checkpoint at `id` became durable.
    pub(super) fn raise(&self, id: LogId) {
        let mut mark = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if mark.is_none_or(|mark| mark.index < id.index) {
            *mark = Some(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogIndex, NodeId, Term};

    const INTERVAL: Duration = Duration::from_secs(300);
    const POLICY: Policy = Policy { interval: INTERVAL, log_bytes: ByteCount::new(1000) };

    fn schedule(start: Instant) -> Schedule {
        Schedule::new(POLICY, start, ByteCount::new(0))
    }

    #[test]
    fn an_idle_store_is_never_written() {
        let start = Instant::now();
        assert!(!schedule(start).due(start + INTERVAL * 100, ByteCount::new(1 << 40)));
    }

    #[test]
    fn due_after_the_interval_or_the_log_bytes() {
        let start = Instant::now();
        let mut schedule = schedule(start);
        schedule.applied(false);
        assert!(!schedule.due(start + INTERVAL / 2, ByteCount::new(999)));
        assert!(schedule.due(start + INTERVAL, ByteCount::new(0)));
        assert!(schedule.due(start, ByteCount::new(1000)));
    }

    #[test]
    fn compaction_brings_it_forward_but_not_at_any_rate() {
        let start = Instant::now();
        let mut schedule = schedule(start);
        schedule.applied(true);
        assert!(!schedule.due(start + INTERVAL / 20, ByteCount::new(0)));
        assert!(schedule.due(start + INTERVAL / 10, ByteCount::new(0)));
    }

    #[test]
    fn a_started_checkpoint_begins_a_new_count() {
        let start = Instant::now();
        let mut schedule = schedule(start);
        schedule.applied(true);
        schedule.started(start + INTERVAL, ByteCount::new(5000));
        assert!(!schedule.due(start + INTERVAL * 9, ByteCount::new(5999)));
        schedule.applied(false);
        assert!(schedule.due(start + INTERVAL, ByteCount::new(6000)));
    }

    #[test]
    fn the_mark_only_rises() {
        let id = |index| LogId {
            term: Term::new(1),
            leader: NodeId::new(1),
            index: LogIndex::new(index),
        };
        let mark = CheckpointMark::default();
        assert!(!mark.covers(id(0)));
        mark.raise(id(5));
        mark.raise(id(3));
        assert!(mark.covers(id(5)));
        assert!(!mark.covers(id(6)));
    }
}

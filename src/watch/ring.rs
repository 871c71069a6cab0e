//! Keeps the newest revisions in memory, bounded in bytes.
//!
//! Most watchers that fall behind fall behind by a little; this saves them the card.
//!
//! # Invariants
//!
//! - Every revision above `floor` that was published is here.

use std::collections::VecDeque;
use std::sync::Arc;

use super::event_bytes;
use crate::mvcc::RevisionEvents;
use crate::types::Revision;

/// The newest revisions, ascending.
#[derive(Debug)]
pub(super) struct Ring {
    revisions: VecDeque<(Arc<RevisionEvents>, u64)>,
    bytes: u64,
    bytes_max: u64,
    floor: Revision,
}

impl Ring {
    /// Starts empty: nothing above `floor` was published yet.
    pub(super) const fn new(floor: Revision, bytes_max: u64) -> Self {
        Self { revisions: VecDeque::new(), bytes: 0, bytes_max, floor }
    }

    /// Forgets everything.
    pub(super) fn reset(&mut self, floor: Revision) {
        *self = Self::new(floor, self.bytes_max);
    }

    /// Appends the next revision and forgets the oldest ones that no longer fit.
    pub(super) fn push(&mut self, events: Arc<RevisionEvents>) {
        let bytes = events.events.iter().map(event_bytes).sum();
        self.bytes += bytes;
        self.revisions.push_back((events, bytes));
        while self.bytes_max < self.bytes {
            let Some((oldest, bytes)) = self.revisions.pop_front() else { break };
            self.bytes -= bytes;
            self.floor = oldest.revision;
        }
    }

    /// All revisions from `from` on, or `None` if some of them were forgotten.
    pub(super) fn since(
        &self,
        from: Revision,
    ) -> Option<impl Iterator<Item = &Arc<RevisionEvents>>> {
        if from <= self.floor {
            return None;
        }
        let start = self.revisions.partition_point(|(events, _)| events.revision < from);
        Some(self.revisions.range(start..).map(|(events, _)| events))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::mvccpb::{Event, KeyValue};

    fn revision(n: i64, bytes: usize) -> Arc<RevisionEvents> {
        let kv = KeyValue { value: vec![0; bytes].into(), ..Default::default() };
        let event = Event { kv: Some(kv), ..Default::default() };
        Arc::new(RevisionEvents { revision: Revision::new(n), events: vec![event] })
    }

    fn since(ring: &Ring, from: i64) -> Option<Vec<i64>> {
        Some(ring.since(Revision::new(from))?.map(|events| events.revision.get()).collect())
    }

    #[test]
    fn oldest_revisions_leave_when_the_bytes_do_not_fit() {
        let mut ring = Ring::new(Revision::new(1), 1_000);
        for n in 2..=6 {
            ring.push(revision(n, 300));
        }
        assert_eq!(since(&ring, 5), Some(vec![5, 6]));
        assert_eq!(since(&ring, 4), None);
        assert_eq!(since(&ring, 7), Some(vec![]));
    }

    #[test]
    fn revision_larger_than_the_ring_is_not_kept() {
        let mut ring = Ring::new(Revision::new(1), 1_000);
        ring.push(revision(2, 5_000));
        assert_eq!(since(&ring, 2), None);
        assert_eq!(since(&ring, 3), Some(vec![]));
        assert_eq!(ring.bytes, 0);
    }
}

//! Forgets history: of every key, what lies before its newest change at the compacted revision.
//!
//! Each record names its predecessor, so walking the records *inside* the window finds everything that has to
//! go; older history is not read again, and history above it is not touched.
//!
//! # Invariants
//!
//! - Of each key the newest change at or below the revision survives, unless it is a tombstone below it. A
//!   tombstone at exactly the revision stays until the next compaction, because a watch may start there.
//! - Memory is bounded by a step, not by the window.

use redb::ReadableTable;

use crate::mutants::{Mutant, is_planted};
use crate::types::Revision;

use super::format::{CurRecord, POSITION_BYTES, Position, RevRecord};
use super::{RevisionError, StoreError, WriteTxn};

/// Records looked at before what they make obsolete is removed.
const STEP_RECORDS: usize = 1024;

/// What one record of the window makes obsolete.
struct Obsolete {
    at: Position,
    previous: Option<Position>,
    /// Set for a tombstone that goes itself.
    buried: Option<Vec<u8>>,
}

impl WriteTxn<'_> {
    /// Compacts to `to`. At or below the last compaction, and above the newest revision, is refused.
    pub fn compact(&mut self, to: Revision) -> Result<Result<(), RevisionError>, StoreError> {
        if to.get() <= self.head.compacted {
            let compacted = Revision::new(self.head.compacted);
            return Ok(Err(RevisionError::Compacted(compacted)));
        }
        if self.head.revision < to.get() {
            return Ok(Err(RevisionError::Future));
        }
        // From the old revision itself, because a tombstone may have stayed there.
        let mut next = Some(Position::new(self.head.compacted.max(0), 0));
        while let Some(from) = next {
            let step = self.obsolete(from, to.get())?;
            next = step.last().map(|last| Position::new(last.at.main, last.at.sub + 1));
            for record in &step {
                self.forget(record)?;
            }
        }
        self.head.compacted = to.get();
        Ok(Ok(()))
    }

    fn obsolete(&self, from: Position, to: i64) -> Result<Vec<Obsolete>, StoreError> {
        let mut step = Vec::new();
        let (start, end) = (from.to_key(), Position::new(to, u32::MAX).to_key());
        for item in self.rev.range::<&[u8; POSITION_BYTES]>(&start..&end)?.take(STEP_RECORDS) {
            let (key, bytes) = item?;
            let at = Position::from_key(key.value());
            let record = RevRecord::decode(at, bytes.value())?;
            let goes = record.tombstone && at.main < to;
            step.push(Obsolete {
                at,
                previous: record.previous,
                buried: goes.then(|| record.key.to_vec()),
            });
        }
        Ok(step)
    }

    fn forget(&mut self, record: &Obsolete) -> Result<(), StoreError> {
        if let Some(previous) = record.previous {
            self.remove_revision(previous)?;
        }
        if is_planted(Mutant::CompactionRemovesLive) {
            self.remove_revision(record.at)?;
        }
        let Some(key) = &record.buried else {
            return Ok(());
        };
        self.remove_revision(record.at)?;
        if self.keys().newest(key)?.is_some_and(|newest| newest.at == record.at) {
            self.cur.remove(key.as_slice())?;
            self.shrink(key.len() + CurRecord::ENCODED_LEN);
        }
        Ok(())
    }

    /// Removes a record that may be gone already: a tombstone removes itself before its successor would.
    fn remove_revision(&mut self, at: Position) -> Result<(), StoreError> {
        let removed = self.rev.remove(&at.to_key())?.map(|record| record.value().len());
        if let Some(len) = removed {
            self.shrink(POSITION_BYTES + len);
        }
        Ok(())
    }
}

//! Reads entries back: the newest from memory, older ones from the files, every byte checked.
//!
//! # Shape
//!
//! Looks up where an entry stands under the lock, reads without it, and looks again: a truncation meanwhile means
//! starting over, a purge means that the answer starts later.

use std::io;
use std::ops::Range;

use bytes::Bytes;

use super::format::{Defect, RecordRef, records};
use super::log::{FrameAt, Runs};
use super::segment::{ReadError, Segment};
use super::{Entry, Wal};
use crate::types::{LogId, LogIndex};

/// What the lock gave us.
enum Lookup {
    /// Nothing more in the range.
    End,
    /// From memory.
    Cached,
    /// Read this frame for entries before an index.
    InFrame(Segment, FrameAt, LogIndex),
    /// The log was truncated since we started.
    Truncated,
}

impl Wal {
    /// Entries of a range, in order, from the first that is not purged: as many as fit `bytes_max`, but at least
    /// one if there is one.
    pub fn entries(&self, range: Range<LogIndex>, bytes_max: u64) -> io::Result<Vec<Entry>> {
        'again: loop {
            let truncations = self.shared.lock().view.truncations();
            let mut found = Found { entries: Vec::new(), bytes: 0, bytes_max };
            let mut next = range.start;
            loop {
                match self.lookup(&mut next, range.end, truncations, &mut found) {
                    Lookup::Truncated => continue 'again,
                    Lookup::End | Lookup::Cached => return Ok(found.entries),
                    Lookup::InFrame(segment, at, before) => {
                        match read_frame(&segment, at, next, before, &mut found) {
                            Ok(after) => next = after,
                            Err(error) => {
                                self.check_still_there(next, at, &segment, error)?;
                                continue 'again;
                            }
                        }
                        if found.is_full() {
                            return Ok(found.entries);
                        }
                    }
                }
            }
        }
    }

    fn lookup(
        &self,
        next: &mut LogIndex,
        end: LogIndex,
        truncations: u64,
        found: &mut Found,
    ) -> Lookup {
        let state = self.shared.lock();
        if state.view.truncations() != truncations {
            return Lookup::Truncated;
        }
        let hard = state.view.state();
        let Some(last) = hard.last.filter(|_| hard.has_entries()) else {
            return Lookup::End;
        };
        if found.entries.is_empty() {
            let first = state.runs.first().into_iter().chain(state.view.cached_from()).min();
            *next = (*next).max(hard.first_kept()).max(first.unwrap_or_default());
        }
        if end <= *next || last.index < *next {
            return Lookup::End;
        }
        if state.view.cached_from().is_some_and(|from| from <= *next) {
            while *next < end
                && let Some(entry) = state.view.cached(*next)
                && found.push(entry.clone())
            {
                *next = next.next();
            }
            return Lookup::Cached;
        }
        match state.runs.find(*next) {
            Some((run, before)) => match state.segments.get(&run.at.segment) {
                Some(segment) => {
                    // The frame may hold more than is live: its end may have been truncated, not yet durably.
                    let ends = [before, state.view.cached_from(), Some(last.index.next())];
                    let before = ends.into_iter().flatten().fold(end, LogIndex::min);
                    Lookup::InFrame(segment.clone(), run.at, before)
                }
                None => unreachable!("entry {next} is in segment {}, not live", run.at.segment),
            },
            None => unreachable!("entry {next} is neither in memory nor in a frame"),
        }
    }

    /// A frame that cannot be read is damage, unless its slot was recycled because the entry was purged.
    fn check_still_there(
        &self,
        index: LogIndex,
        at: FrameAt,
        segment: &Segment,
        error: ReadError,
    ) -> io::Result<()> {
        let state = self.shared.lock();
        let purged = index < state.view.state().first_kept();
        drop(state);
        if purged {
            return Ok(());
        }
        Err(match error {
            ReadError::Io(error) => error,
            ReadError::Defect(defect) => {
                io::Error::new(io::ErrorKind::InvalidData, damaged(segment, at, &defect))
            }
        })
    }
}

pub(super) fn damaged(segment: &Segment, at: FrameAt, defect: &Defect) -> super::Damage {
    super::Damage {
        path: segment.slot.path.clone(),
        segment: Some(at.segment),
        offset: super::segment::offset_of(at.block),
        last_good: None,
        defect: defect.clone(),
    }
}

/// Entries gathered so far.
pub(super) struct Found {
    pub(super) entries: Vec<Entry>,
    pub(super) bytes: u64,
    pub(super) bytes_max: u64,
}

impl Found {
    const fn is_full(&self) -> bool {
        self.bytes_max <= self.bytes
    }

    /// Adds an entry unless that would exceed the limit.
    fn push(&mut self, entry: Entry) -> bool {
        let bytes = self.bytes.saturating_add(entry.payload.len() as u64);
        if !self.entries.is_empty() && self.bytes_max < bytes {
            self.bytes = self.bytes_max;
            return false;
        }
        self.bytes = bytes;
        self.entries.push(entry);
        true
    }
}

/// Adds the entries from `from` and before `before` that a frame holds; returns the index after the last.
///
/// A frame may hold an index twice, with a truncation between; the last one counts.
pub(super) fn read_frame(
    segment: &Segment,
    at: FrameAt,
    from: LogIndex,
    before: LogIndex,
    found: &mut Found,
) -> Result<LogIndex, ReadError> {
    let mut raw = Vec::new();
    let frame = segment.read(at, &mut raw)?;
    let mut live: Vec<(LogId, &[u8])> = Vec::new();
    for record in records(&raw, frame.records) {
        if let RecordRef::Entry { id, payload } = record? {
            while live.last().is_some_and(|(last, _)| id.index <= last.index) {
                live.pop();
            }
            live.push((id, payload));
        }
    }
    let mut next = from;
    for (id, payload) in live {
        if id.index < next || before <= id.index {
            continue;
        }
        if id.index != next {
            break;
        }
        if !found.push(Entry { id, payload: Bytes::copy_from_slice(payload) }) {
            return Ok(next);
        }
        next = next.next();
    }
    if next == from {
        // The index says that it is here.
        return Err(Defect::NoEntry { expected: from }.into());
    }
    Ok(next)
}

/// Where entries stand, for those who walk over all of them.
pub(super) fn locate(runs: &Runs, index: LogIndex, last: LogIndex) -> Option<(FrameAt, LogIndex)> {
    let (run, before) = runs.find(index)?;
    Some((run.at, before.unwrap_or_else(|| last.next())))
}

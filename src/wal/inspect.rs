//! Looks into a log directory without touching it, for `wal verify` and `wal dump`.
//!
//! Works on a stopped node's directory and on a running one's: it only reads, and if the log moved on while it was
//! being read (a slot recycled, a frame half written), it looks again.

use std::path::Path;

use super::format::SlotHeader;
use super::reader::{self, Found as Entries};
use super::recovery::{self, Found};
use super::segment::{self, ReadError, Slot};
use super::{Cut, Damage, Entry, HardState, Identity, OpenError};
use crate::env::{Disk, Open};
use crate::types::{LogIndex, SegmentNo};

/// How often a log that changes while it is read is read again.
const ATTEMPTS: usize = 5;

/// What a log directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Live segments, oldest first.
    pub segments: Vec<SegmentReport>,
    /// Slots that hold nothing live.
    pub spare_slots: usize,
    /// Frames that were checked.
    pub frames: u64,
    /// Whose log it is.
    pub identity: Option<Identity>,
    /// What Raft must remember.
    pub state: HardState,
    /// First index that is there.
    pub first: Option<LogIndex>,
    /// A torn write at the end, which the next start cuts. On a running node it may be a write under way.
    pub cut: Option<Cut>,
    /// The log was closed in an orderly way.
    pub clean: bool,
    /// The first damage; nothing after it was looked at, and the figures above are empty.
    pub damage: Option<Damage>,
}

/// One live segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentReport {
    /// Its number.
    pub number: SegmentNo,
    /// The slot's file name.
    pub path: std::path::PathBuf,
    /// Bytes of the file.
    pub bytes: u64,
}

/// Checks every frame of every live segment.
pub fn verify(disk: &dyn Disk, dir: &Path) -> Result<Report, OpenError> {
    match read(disk, dir) {
        Ok(found) => Ok(report(&found)),
        Err(OpenError::Corrupt(damage)) => Ok(Report { damage: Some(*damage), ..empty() }),
        Err(error) => Err(error),
    }
}

fn report(found: &Found) -> Report {
    Report {
        segments: found
            .segments
            .values()
            .map(|segment| SegmentReport {
                number: segment.number,
                path: segment.slot.path.clone(),
                bytes: segment::offset_of(segment.slot.blocks),
            })
            .collect(),
        spare_slots: found.spares.len(),
        frames: found.recovery.frames,
        identity: found.tail.as_ref().map(|tail| tail.header.identity),
        state: found.state,
        first: found.runs.first().map(|first| first.max(found.state.first_kept())),
        cut: found.recovery.cut.clone(),
        clean: found.recovery.clean,
        damage: None,
    }
}

const fn empty() -> Report {
    Report {
        segments: Vec::new(),
        spare_slots: 0,
        frames: 0,
        identity: None,
        state: HardState { vote: None, committed: None, purged: None, last: None },
        first: None,
        cut: None,
        clean: false,
        damage: None,
    }
}

/// Every entry that is in the log, in order, with the hard state as of its end.
pub fn entries(disk: &dyn Disk, dir: &Path) -> Result<Dump, OpenError> {
    let found = read(disk, dir)?;
    let next =
        found.runs.first().map_or(LogIndex::new(0), |first| first.max(found.state.first_kept()));
    Ok(Dump::new(found, next))
}

/// The entries of a log, read frame by frame. See [`entries`].
#[derive(Debug)]
pub struct Dump {
    found: Found,
    next: LogIndex,
    ready: std::vec::IntoIter<Entry>,
    failed: bool,
}

impl Dump {
    /// From an index that the log has, or that comes after its end.
    pub(super) fn new(found: Found, next: LogIndex) -> Self {
        Self { found, next, ready: Vec::new().into_iter(), failed: false }
    }

    /// What Raft must remember; `committed` tells which entries are certain.
    pub const fn state(&self) -> HardState {
        self.found.state
    }

    fn read_more(&mut self) -> Result<(), OpenError> {
        let Some(last) = self.found.state.last.filter(|_| self.found.state.has_entries()) else {
            return Ok(());
        };
        if last.index < self.next {
            return Ok(());
        }
        let located = reader::locate(&self.found.runs, self.next, last.index)
            .and_then(|(at, before)| Some((self.found.segments.get(&at.segment)?, at, before)));
        let Some((segment, at, before)) = located else {
            unreachable!("entry {} is in no frame that was replayed", self.next);
        };
        let mut read = Entries { entries: Vec::new(), bytes: 0, bytes_max: u64::MAX };
        match reader::read_frame(segment, at, self.next, before, &mut read) {
            Ok(next) => self.next = next,
            Err(ReadError::Io(error)) => {
                return Err(OpenError::io("read", &segment.slot.path)(error));
            }
            Err(ReadError::Defect(defect)) => {
                return Err(reader::damaged(segment, at, &defect).into());
            }
        }
        self.ready = read.entries.into_iter();
        Ok(())
    }
}

impl Iterator for Dump {
    type Item = Result<Entry, OpenError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        if let Some(entry) = self.ready.next() {
            return Some(Ok(entry));
        }
        if let Err(error) = self.read_more() {
            self.failed = true;
            return Some(Err(error));
        }
        self.ready.next().map(Ok)
    }
}

/// Replays; again if the log changed under it.
fn read(disk: &dyn Disk, dir: &Path) -> Result<Found, OpenError> {
    let mut attempt = 1;
    loop {
        let before = headers(disk, dir);
        let found = recovery::replay(disk, dir, Open::Read, None);
        let moved = before != headers(disk, dir);
        if found.is_ok() || attempt == ATTEMPTS || !moved {
            return found;
        }
        attempt += 1;
    }
}

/// What the slots' first blocks say; changes whenever a slot starts another life.
fn headers(disk: &dyn Disk, dir: &Path) -> Vec<Option<SlotHeader>> {
    segment::list(disk, dir)
        .unwrap_or_default()
        .into_iter()
        .map(|number| Slot::open(disk, dir, number, Open::Read).ok()?.header(0).ok())
        .collect()
}

//! Checks the closed segments of a running log on the card itself, a little at a time.
//!
//! Entries that followers have and the state covers are read by nobody for hours. Rot in them is found here while there are
//! peers and backups, not at the start after the next power cut.
//!
//! # Shape
//!
//! [`Wal::scrub`] takes note of the segments that are closed now; [`Scrub::step`] checks about as many bytes as asked for,
//! by the rules by which a start replays ([`super::recovery`]). It blocks as long as the card likes. When to do it, and how
//! fast, is the caller's.
//!
//! # Invariants
//!
//! - What is read is what is on the card, not what the page cache has.
//! - A segment that is recycled meanwhile is no damage.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::recovery::{self, Replay};
use super::segment::{self, Segment, Slot};
use super::{Damage, OpenError, Wal};
use crate::env::{BoxFuture, DiskFile, Open};
use crate::types::SegmentNo;

/// A scrub that has begun. See the module documentation.
#[derive(Debug)]
pub struct Scrub {
    wal: Wal,
    /// Not looked at yet, oldest first; each with the one after it, which tells where it ended.
    left: VecDeque<(SegmentNo, SegmentNo)>,
    current: Option<Walk>,
}

/// A segment that is being checked.
struct Walk {
    replay: Replay,
    segment: Segment,
    next: SegmentNo,
    /// Where its frames end, once that is known.
    end: Option<u64>,
}

impl Walk {
    /// How much of the segment has been checked.
    fn offset(&self) -> u64 {
        let entered = self.replay.entered().map_or(0, |(_, offset)| offset);
        self.end.unwrap_or(entered)
    }
}

impl std::fmt::Debug for Walk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walk").field("segment", &self.segment).finish_non_exhaustive()
    }
}

impl Wal {
    /// Begins to check the segments that are closed now.
    pub fn scrub(&self) -> Scrub {
        let state = self.shared.lock();
        let numbers: Vec<SegmentNo> = state.segments.keys().copied().collect();
        drop(state);
        let left = numbers.iter().copied().zip(numbers.iter().skip(1).copied()).collect();
        Scrub { wal: self.clone(), left, current: None }
    }

    fn live(&self, number: SegmentNo) -> Option<Segment> {
        self.shared.lock().segments.get(&number).cloned()
    }
}

impl Scrub {
    /// Checks about `bytes_max` more, and says how many it were; `None` when everything was checked. After damage it goes on
    /// with the next segment.
    pub fn step(&mut self, bytes_max: u64) -> Result<Option<u64>, OpenError> {
        let mut walk = match self.current.take() {
            Some(walk) => walk,
            None => match self.begin()? {
                Some(walk) => walk,
                None => return Ok(None),
            },
        };
        let start = walk.offset();
        let result = self.walk(&mut walk, start + bytes_max);
        let read = walk.offset() - start;
        match result {
            Ok(true) => {
                self.current = Some(walk);
                Ok(Some(read))
            }
            Ok(false) => Ok(Some(read)),
            Err(_) if !self.is_live(&walk.segment) => Ok(Some(read)),
            Err(error) => Err(error),
        }
    }

    /// Opens the next segment that is still there.
    fn begin(&mut self) -> Result<Option<Walk>, OpenError> {
        while let Some((number, next)) = self.left.pop_front() {
            let Some(segment) = self.wal.live(number) else { continue };
            let mut replay = Replay::new(self.wal.dir());
            match self.enter(&mut replay, &segment) {
                Ok(()) => return Ok(Some(Walk { replay, segment, next, end: None })),
                Err(_) if !self.is_live(&segment) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Whether there is more of it to check.
    fn walk(&self, walk: &mut Walk, end: u64) -> Result<bool, OpenError> {
        let (mut buffer, mut raw) = (Vec::new(), Vec::new());
        let Some((on_card, _)) = walk.replay.entered() else { return Ok(false) };
        let on_card = on_card.clone();
        while walk.offset() < end {
            if !walk.replay.frame(&on_card, false, &mut buffer, &mut raw)? {
                walk.end = Some(walk.offset());
                // The segment after it tells whether that was its last frame.
                if let Some(next) = self.wal.live(walk.next) {
                    self.enter(&mut walk.replay, &next)?;
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn enter(&self, replay: &mut Replay, segment: &Segment) -> Result<(), OpenError> {
        let shared = &self.wal.shared;
        let path = &segment.slot.path;
        let mut slot = Slot::open(&*shared.env.disk, &shared.dir, segment.slot.number, Open::Read)
            .map_err(OpenError::io("open", path))?;
        slot.file = Arc::new(OnCard(slot.file));
        match recovery::segment_header(&slot) {
            Ok(header) => replay.enter(slot, &header),
            Err(defect) => Err(Damage {
                path: path.clone(),
                segment: Some(segment.number),
                offset: segment::offset_of(0),
                last_good: None,
                defect,
            }
            .into()),
        }
    }

    fn is_live(&self, segment: &Segment) -> bool {
        let live = self.wal.live(segment.number);
        live.is_some_and(|live| live.generation == segment.generation)
    }
}

/// A file that is read from the card.
#[derive(Debug)]
struct OnCard(Arc<dyn DiskFile>);

impl DiskFile for OnCard {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_uncached_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        self.0.sync()
    }
}

//! Decides what a log directory holds after any crash, and tells a torn write from damage.
//!
//! A log that silently drops acknowledged entries is the classic way to lose data; a log that refuses to open after
//! a power cut is the classic way to lose a Pi in a cupboard. Both come from treating every bad checksum alike.
//!
//! # Shape
//!
//! [`replay`] only reads: it surveys the slots, orders segments by number, follows the chain of frames and judges
//! what it meets. [`open`] then makes the result safe to build on, with one frame and one barrier.
//!
//! # How a bad frame is judged
//!
//! Only one frame is ever in flight, so a later frame (of the same segment and generation, with a higher sequence
//! number, its header intact) proves that the bad one was durable once: *damage*. The same if a later segment's
//! header chains to it. With nothing after it, it is a *torn* write that was promised to nobody, and is cut; but not
//! if the card refuses to read it, because that is no mark of a torn write. Damage
//! to exactly the last frame looks the same; an orderly stop and every start write a frame behind it, so the window
//! is what was written since.
//!
//! # What opening writes
//!
//! A frame that repeats the records of the last one, and says so (`replaces`). Three reasons, one mechanism:
//! - After a failed `fdatasync` and a restart, the page cache shows a last frame that is not on the card. Its copy is.
//!   If the original then turns out bad, the copy stands in for it, and that is not damage.
//! - After a kill, the last frame is in the page cache only. The barrier makes it durable before anybody hears of it.
//! - A torn frame's remains are overwritten before anything else is promised, so they can never complete.
//!
//! If the last frame is the first of its segment, the segment's header was in the same write and may be as absent.
//! Then a copy of the header is written into the slot's last block, which no frame uses. Nothing is rewritten.
//!
//! # Invariants
//!
//! - Replaying is idempotent, and a crash while opening leaves a log that opens to the same state.
//! - A slot whose header block is bad is searched for frames beyond the log's end before it is reused.
//! - So is one whose header is an old one, where the next life would begin: a card may give back a block as it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{BLOCK, Defect, FrameHeader, RecordRef, SegmentHeader, SlotHeader, records};
use super::frame::FrameBuffer;
use super::log::{Effect, FrameAt, Gap, Runs};
use super::segment::{self, ReadError, Segment, Slot, Source};
use super::writer::{Appender, Position, Repeat};
use super::{Damage, HardState, Identity, OpenError, Options, prepare, start_over};
use crate::env::{Disk, Env, Open};
use crate::mutants::{Mutant, is_planted};
use crate::types::{LogIndex, SegmentNo};

/// What opening found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// There was no log; one was made.
    pub created: bool,
    /// The log was closed in an orderly way.
    pub clean: bool,
    /// Segments replayed.
    pub segments: usize,
    /// Frames replayed.
    pub frames: u64,
    /// A torn write that was cut. Nobody was promised what was in it.
    pub cut: Option<Cut>,
    /// Frames that were not on the card though the kernel had shown them, and whose repetition was used instead.
    pub stood_in: u64,
}

/// A write that did not complete before the crash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The slot.
    pub path: PathBuf,
    /// The segment in it.
    pub segment: SegmentNo,
    /// Where the write started.
    pub offset: u64,
    /// What is wrong with it.
    pub defect: Defect,
}

/// What a directory holds.
#[derive(Debug)]
pub(super) struct Found {
    /// Segments from the oldest that is needed.
    pub(super) segments: BTreeMap<SegmentNo, Segment>,
    /// Slots that are filled and not needed.
    pub(super) spares: Vec<Slot>,
    /// Slots that must be filled before use.
    pub(super) blanks: Vec<usize>,
    pub(super) state: HardState,
    pub(super) runs: Runs,
    /// `None` if there is no log.
    pub(super) tail: Option<Tail>,
    pub(super) recovery: Recovery,
}

/// Where the log ends.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) header: SegmentHeader,
    pub(super) next_block: u32,
    pub(super) position: Position,
    /// The last frame that is not a repetition; `None` if not even one was found.
    pub(super) content: Option<Content>,
}

/// A frame's records, and where the log stood before it.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) before: Position,
    pub(super) at: FrameAt,
    pub(super) raw: Vec<u8>,
    pub(super) records: u32,
    /// The frame itself stands before the place where replaying started: its entries are purged, the rest is in the
    /// segment's header, and there is nothing to repeat.
    unseen: bool,
}

impl Content {
    /// Whether a frame repeats this one.
    fn is_repeated_by(&self, frame: &FrameHeader) -> bool {
        let exactly = frame.repeats(self.before.seq, self.before.chain);
        exactly || (self.unseen && frame.repeats_older_than(self.before.seq + 1))
    }
}

/// The slots of a directory by what their headers say.
pub(super) struct Survey {
    pub(super) segments: BTreeMap<SegmentNo, (Slot, SegmentHeader)>,
    pub(super) spares: Vec<Slot>,
    /// With a bad first block, and why it is bad.
    pub(super) blanks: Vec<(Slot, Defect)>,
}

impl Survey {
    /// The newest segment, and the oldest that replaying needs.
    pub(super) fn live(&self) -> Option<(SegmentNo, SegmentNo)> {
        let (_, header) = self.segments.values().next_back()?;
        Some((header.segment, header.oldest_live))
    }
}

/// Reads a directory. With no identity given, any is accepted.
pub(super) fn replay(
    disk: &dyn Disk,
    dir: &Path,
    how: Open,
    identity: Option<Identity>,
) -> Result<Found, OpenError> {
    let mut survey = survey(disk, dir, how, identity)?;
    let Some((newest, oldest)) = survey.live() else {
        return nothing_found(survey);
    };
    let mut replay = Replay::new(dir);
    if newest < oldest {
        return Err(replay.missing(oldest).into());
    }
    replay.segments(&mut survey, oldest, newest)?;
    replay.check_complete()?;
    replay.check_others(&survey)?;
    let mut spares = survey.spares;
    let mut blanks: Vec<usize> = survey.blanks.iter().map(|(slot, _)| slot.number).collect();
    for (slot, header) in survey.segments.into_values() {
        if bytes_of(&slot) == header.slot_bytes {
            spares.push(slot);
        } else {
            blanks.push(slot.number);
        }
    }
    Ok(replay.into_found(spares, blanks))
}

pub(super) fn survey(
    disk: &dyn Disk,
    dir: &Path,
    how: Open,
    identity: Option<Identity>,
) -> Result<Survey, OpenError> {
    let mut survey = Survey { segments: BTreeMap::new(), spares: Vec::new(), blanks: Vec::new() };
    for number in segment::list(disk, dir).map_err(OpenError::io("list", dir))? {
        let path = segment::path_of(dir, number);
        let slot = Slot::open(disk, dir, number, how).map_err(OpenError::io("open", &path))?;
        let first = header_at(&slot, 0, identity)?;
        let copy = header_at(&slot, slot.copy_block(), identity)?;
        match best_header(first, copy) {
            Ok(SlotHeader::Spare { slot_bytes, .. }) if slot_bytes == bytes_of(&slot) => {
                survey.spares.push(slot);
            }
            Ok(SlotHeader::Spare { slot_bytes, .. }) => {
                let defect = Defect::FileLength { found: bytes_of(&slot), expected: slot_bytes };
                survey.blanks.push((slot, defect));
            }
            Ok(SlotHeader::Segment(header)) => {
                if survey.segments.contains_key(&header.segment) {
                    let defect = Defect::Duplicate { found: header.segment };
                    let number = Some(header.segment);
                    return Err(damage(&slot, number, 0, &header.state, defect).into());
                }
                survey.segments.insert(header.segment, (slot, header));
            }
            Err(defect) => survey.blanks.push((slot, defect)),
        }
    }
    Ok(survey)
}

pub(super) fn bytes_of(slot: &Slot) -> u64 {
    segment::offset_of(slot.blocks)
}

/// The header at a block; errors that concern the whole log are returned at once.
fn header_at(
    slot: &Slot,
    block: u32,
    identity: Option<Identity>,
) -> Result<Result<SlotHeader, Defect>, OpenError> {
    match slot.header(block) {
        Ok(header) => match identity {
            Some(expected) if header.identity() != expected => Err(OpenError::Identity {
                path: slot.path.clone(),
                found: header.identity(),
                expected,
            }),
            _ => Ok(Ok(header)),
        },
        Err(ReadError::Defect(Defect::Version { found })) => {
            Err(OpenError::Version { path: slot.path.clone(), found })
        }
        Err(error) => Ok(Err(error.into_defect())),
    }
}

/// What the header of a segment says, where there must be one.
pub(super) fn segment_header(slot: &Slot) -> Result<SegmentHeader, Defect> {
    let header = |block| slot.header(block).map_err(ReadError::into_defect);
    match best_header(header(0), header(slot.copy_block()))? {
        SlotHeader::Segment(header) => Ok(header),
        SlotHeader::Spare { .. } => Err(Defect::Kind { found: 2 }),
    }
}

/// The copy counts only where the first block is an earlier life's: then the first block never reached the card.
/// A first block that is bad is no such case, because what it held is unknown.
fn best_header(
    first: Result<SlotHeader, Defect>,
    copy: Result<SlotHeader, Defect>,
) -> Result<SlotHeader, Defect> {
    let first = first?;
    Ok(match (first, copy) {
        (SlotHeader::Spare { .. }, Ok(copy @ SlotHeader::Segment(_))) => copy,
        (SlotHeader::Segment(old), Ok(copy @ SlotHeader::Segment(new)))
            if old.segment < new.segment =>
        {
            copy
        }
        (first, _) => first,
    })
}

/// No segment header at all: a new log, unless a slot holds frames that only lack their header.
fn nothing_found(survey: Survey) -> Result<Found, OpenError> {
    // Frame 1 is empty and written together with the first header; it promises nothing.
    for (slot, defect) in &survey.blanks {
        let lost = slot.search(1, |header, block| header.block == block && 1 < header.seq);
        // A slot of which nothing can be read may hold anything.
        if lost.map_or(true, |frame| frame.is_some()) {
            return Err(damage(slot, None, 0, &HardState::default(), defect.clone()).into());
        }
    }
    for slot in &survey.spares {
        if let Some(frame) = later_life(slot, None, 1) {
            return Err(old_header(slot, &frame, &HardState::default()).into());
        }
    }
    Ok(Found {
        segments: BTreeMap::new(),
        spares: survey.spares,
        blanks: survey.blanks.iter().map(|(slot, _)| slot.number).collect(),
        state: HardState::default(),
        runs: Runs::default(),
        tail: None,
        recovery: Recovery { created: true, ..Recovery::default() },
    })
}

fn damage(
    slot: &Slot,
    segment: Option<SegmentNo>,
    block: u32,
    state: &HardState,
    defect: Defect,
) -> Damage {
    Damage {
        path: slot.path.clone(),
        segment,
        offset: segment::offset_of(block),
        last_good: state.last,
        defect,
    }
}

/// How far into a free slot is looked for frames that should not be there: they are written from its start on.
const FREE_BLOCKS_SEARCHED: u32 = 64;

/// A frame beyond the log's end, of a life that the slot's header knows nothing of. The first block proves nothing: its
/// frame is written together with the header, and either may be all that got to the card. What stands after it was only
/// written when both were durable.
fn later_life(slot: &Slot, generation: Option<u64>, end: u64) -> Option<FrameHeader> {
    let mut buffer = Vec::new();
    for block in 2..FREE_BLOCKS_SEARCHED.min(slot.blocks) {
        match slot.frame_header(Source::Cache, block, &mut buffer) {
            Ok(frame)
                if frame.block == block
                    && generation != Some(frame.generation)
                    && end < frame.seq =>
            {
                return Some(frame);
            }
            Ok(_) | Err(ReadError::Defect(_) | ReadError::Io(_)) => {}
        }
    }
    None
}

fn old_header(slot: &Slot, frame: &FrameHeader, state: &HardState) -> Damage {
    let defect = Defect::OldHeader { expected: frame.segment };
    damage(slot, Some(frame.segment), 0, state, defect)
}

/// Follows the chain of frames through the segments.
pub(super) struct Replay {
    dir: PathBuf,
    pub(super) segments: BTreeMap<SegmentNo, Segment>,
    header: Option<SegmentHeader>,
    /// Whether the first segment starts where the log starts.
    from_start: bool,
    pub(super) position: Position,
    next_block: u32,
    /// Why there was no frame at `next_block`.
    stopped: Option<Defect>,
    content: Option<Content>,
    pub(super) runs: Runs,
    recovery: Recovery,
    /// Replaying began behind damage, and nothing has told yet where the log ended there: see `salvage`.
    pub(super) end_unknown: Option<EndUnknown>,
}

/// Where the log ended is not known; it does not matter if that was not after this index.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndUnknown {
    pub(super) covered: LogIndex,
}

impl Replay {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            segments: BTreeMap::new(),
            header: None,
            from_start: false,
            position: Position::default(),
            next_block: 1,
            stopped: None,
            content: None,
            runs: Runs::default(),
            recovery: Recovery::default(),
            end_unknown: None,
        }
    }

    /// Replays segments that follow each other.
    pub(super) fn segments(
        &mut self,
        survey: &mut Survey,
        oldest: SegmentNo,
        newest: SegmentNo,
    ) -> Result<(), OpenError> {
        for number in oldest.get()..=newest.get() {
            let number = SegmentNo::new(number);
            let Some((slot, header)) = survey.segments.remove(&number) else {
                return Err(self.missing(number).into());
            };
            self.enter(slot, &header)?;
            self.frames(&header, number == newest)?;
        }
        Ok(())
    }

    /// Begins in the middle of a segment, with a frame whose place there has been checked.
    pub(super) fn begin_at(&mut self, slot: Slot, header: &SegmentHeader, frame: &FrameHeader) {
        // As what it stands in for, if it is a repetition: so its records count.
        let (seq, chain) = frame.start();
        self.position = Position { seq, chain, state: HardState::default() };
        self.header = Some(*header);
        self.next_block = frame.block;
        let segment =
            Segment { number: header.segment, generation: header.generation, slot: Arc::new(slot) };
        self.segments.insert(header.segment, segment);
    }

    /// Slots that hold nothing live must not hold what comes after the log's end.
    pub(super) fn check_others(&self, survey: &Survey) -> Result<(), OpenError> {
        for (slot, defect) in &survey.blanks {
            self.check_blank(slot, defect)?;
        }
        for slot in &survey.spares {
            self.check_free(slot, None)?;
        }
        for (slot, header) in survey.segments.values() {
            self.check_free(slot, Some(header.generation))?;
        }
        Ok(())
    }

    pub(super) fn missing(&self, expected: SegmentNo) -> Damage {
        Damage {
            path: self.dir.clone(),
            segment: Some(expected),
            offset: 0,
            last_good: self.position.state.last,
            defect: Defect::Missing { expected },
        }
    }

    /// Goes on to a segment, whose header must continue the frames before it.
    pub(super) fn enter(&mut self, slot: Slot, header: &SegmentHeader) -> Result<(), OpenError> {
        if let Some(before) = self.header {
            let follows = self.position.is_start_of(header)
                || self.content.as_ref().is_some_and(|content| content.before.is_start_of(header));
            if !follows {
                let defect = self.stopped.take().unwrap_or(Defect::Sequence {
                    found: header.first_seq,
                    expected: self.position.seq,
                });
                return Err(self.damage_in(before.segment, defect).into());
            }
            if self.end_unknown.take().is_some() {
                // Here it is written down.
                self.position.state = header.state;
                self.runs = Runs::default();
            }
        } else {
            self.from_start = header.state.last.is_none();
            self.position =
                Position { seq: header.first_seq, chain: header.chain, state: header.state };
        }
        if bytes_of(&slot) != header.slot_bytes {
            let defect = Defect::FileLength { found: bytes_of(&slot), expected: header.slot_bytes };
            let state = &self.position.state;
            return Err(damage(&slot, Some(header.segment), 0, state, defect).into());
        }
        self.header = Some(*header);
        self.next_block = 1;
        let segment =
            Segment { number: header.segment, generation: header.generation, slot: Arc::new(slot) };
        self.segments.insert(header.segment, segment);
        self.recovery.segments += 1;
        Ok(())
    }

    fn damage_in(&self, segment: SegmentNo, defect: Defect) -> Damage {
        match self.segments.get(&segment) {
            Some(found) => {
                damage(&found.slot, Some(segment), self.next_block, &self.position.state, defect)
            }
            None => self.missing(segment),
        }
    }

    /// Replays the frames of the segment just entered, up to the first that does not follow.
    pub(super) fn frames(&mut self, header: &SegmentHeader, newest: bool) -> Result<(), OpenError> {
        let Some(segment) = self.segments.get(&header.segment).cloned() else {
            unreachable!("replaying segment {} before entering it", header.segment);
        };
        let (mut buffer, mut raw) = (Vec::new(), Vec::new());
        self.stopped = None;
        while self.frame(&segment, newest, &mut buffer, &mut raw)? {}
        Ok(())
    }

    /// Replays the next frame of a segment; whether there was one.
    pub(super) fn frame(
        &mut self,
        segment: &Segment,
        newest: bool,
        buffer: &mut Vec<u8>,
        raw: &mut Vec<u8>,
    ) -> Result<bool, OpenError> {
        if segment.slot.copy_block() <= self.next_block {
            return Ok(false);
        }
        let defect = match self.next_frame(segment, buffer, raw) {
            Ok(frame) => {
                self.take(segment, &frame, raw)?;
                return Ok(true);
            }
            Err(error) => error.into_defect(),
        };
        if let Some(frame) = self.stand_in(segment, &defect, raw)? {
            self.take(segment, &frame, raw)?;
            return Ok(true);
        }
        // A write that was torn can be read; what cannot be may have been promised.
        if newest && matches!(defect, Defect::Unreadable { .. }) {
            return Err(self.damage_in(segment.number, defect).into());
        }
        if newest {
            self.note_cut(segment, &defect, buffer);
        }
        self.stopped = Some(defect);
        Ok(false)
    }

    /// The segment that was entered last, and how much of it has been replayed.
    pub(super) fn entered(&self) -> Option<(&Segment, u64)> {
        let segment = self.segments.get(&self.header?.segment)?;
        Some((segment, segment::offset_of(self.next_block)))
    }

    fn next_frame(
        &self,
        segment: &Segment,
        buffer: &mut Vec<u8>,
        raw: &mut Vec<u8>,
    ) -> Result<FrameHeader, ReadError> {
        segment::twice(&segment.slot.path, |source| {
            let frame = segment.slot.frame_header(source, self.next_block, buffer)?;
            frame.check_place(segment.generation, segment.number, self.next_block)?;
            frame.check_order(self.position.seq, self.position.chain)?;
            segment.slot.payload(source, &frame, buffer, raw)?;
            Ok(frame)
        })
    }

    /// A later frame that repeats what the bad one held. Any other later frame proves damage.
    fn stand_in(
        &mut self,
        segment: &Segment,
        defect: &Defect,
        raw: &mut Vec<u8>,
    ) -> Result<Option<FrameHeader>, OpenError> {
        let mut from = self.next_block;
        let mut buffer = Vec::new();
        loop {
            let later = segment.slot.search(from, |frame, block| {
                self.position.seq < frame.seq
                    && frame.check_place(segment.generation, segment.number, block).is_ok()
            });
            // Of what cannot be read nothing is known, as of a frame that was torn.
            let Some(frame) = later.unwrap_or_default() else {
                return Ok(None);
            };
            if is_planted(Mutant::DamageTakenForTear) {
                return Ok(None);
            }
            if !self.can_stand_in(&frame) {
                return Err(self.damage_in(segment.number, defect.clone()).into());
            }
            let read = segment::twice(&segment.slot.path, |source| {
                segment.slot.frame_header(source, frame.block, &mut buffer)?;
                segment.slot.payload(source, &frame, &mut buffer, raw)
            });
            match read {
                Ok(()) => {
                    self.recovery.stood_in += frame.seq - self.position.seq;
                    self.next_block = frame.block;
                    return Ok(Some(frame));
                }
                // A repetition that was torn itself: there may be another.
                Err(_) => from = frame.block + 1,
            }
        }
    }

    /// Whether a frame repeats the one that is expected now, or the last one replayed.
    fn can_stand_in(&self, frame: &FrameHeader) -> bool {
        frame.repeats(self.position.seq, self.position.chain) || self.is_repetition(frame)
    }

    /// Whether a frame repeats what has been applied already.
    fn is_repetition(&self, frame: &FrameHeader) -> bool {
        match &self.content {
            Some(content) => content.is_repeated_by(frame),
            None => frame.repeats_older_than(self.position.seq),
        }
    }

    /// Takes a frame that follows: applies its records, unless it only repeats what is applied already.
    fn take(
        &mut self,
        segment: &Segment,
        frame: &FrameHeader,
        raw: &[u8],
    ) -> Result<(), OpenError> {
        let at = FrameAt { segment: segment.number, block: frame.block, blocks: frame.blocks() };
        let before = self.position;
        if self.is_repetition(frame) {
            let content = self.content.get_or_insert(Content {
                before,
                at,
                raw: Vec::new(),
                records: 0,
                unseen: true,
            });
            self.runs.repoint(content.at, at);
            content.at = at;
        } else {
            self.apply(segment, frame, raw, at)?;
            let raw = raw.to_vec();
            self.content = Some(Content { before, at, raw, records: frame.records, unseen: false });
        }
        self.recovery.frames += 1;
        self.recovery.clean = frame.flags.has(super::format::Flags::CLOSE);
        self.position.seq = frame.seq + 1;
        self.position.chain = frame.crc;
        self.next_block = frame.block + frame.blocks();
        Ok(())
    }

    fn apply(
        &mut self,
        segment: &Segment,
        frame: &FrameHeader,
        raw: &[u8],
        at: FrameAt,
    ) -> Result<(), OpenError> {
        let mut state = self.position.state;
        let mut effects = Vec::new();
        for record in records(raw, frame.records) {
            let record: RecordRef<'_> =
                record.map_err(|defect| self.damage_in(segment.number, defect))?;
            if self.end_unknown.is_some() {
                self.apply_behind_damage(&mut state, &record);
            }
            state.apply(&record).map_err(|Gap { found, last }| {
                self.damage_in(segment.number, Defect::Gap { found, last })
            })?;
            if self.end_unknown.is_some() {
                state.last = None;
            }
            Effect::note(&mut effects, &record);
        }
        self.runs.apply(&effects, at, &state);
        self.position.state = state;
        Ok(())
    }

    /// What a record tells of the log's end, where that is not known.
    fn apply_behind_damage(&mut self, state: &mut HardState, record: &RecordRef<'_>) {
        let Some(EndUnknown { covered }) = self.end_unknown else { return };
        match record {
            // The first entry may have any index.
            RecordRef::Entry { .. } => state.last = None,
            // Nobody truncates beyond the end.
            RecordRef::TruncateAfter(Some(keep)) if keep.index <= covered => {
                state.last = Some(*keep);
            }
            RecordRef::TruncateAfter(_)
            | RecordRef::Vote(_)
            | RecordRef::Committed(_)
            | RecordRef::Purge(_) => return,
        }
        self.end_unknown = None;
    }

    /// Remembers a torn write, if the bytes show that there was one. Zeros and an earlier life's frames do not.
    fn note_cut(&mut self, segment: &Segment, defect: &Defect, block: &[u8]) {
        let ours = match FrameHeader::decode(block) {
            Ok(frame) => frame.generation == segment.generation,
            // The generation stands at byte 32 even where the checksum does not hold.
            Err(_) => {
                block.get(32..40).is_some_and(|bytes| *bytes == segment.generation.to_le_bytes())
            }
        };
        if ours {
            self.recovery.cut = Some(Cut {
                path: segment.slot.path.clone(),
                segment: segment.number,
                offset: segment::offset_of(self.next_block),
                defect: defect.clone(),
            });
        }
    }

    /// Every entry that is not purged must stand in a segment that was replayed.
    pub(super) fn check_complete(&self) -> Result<(), OpenError> {
        let state = &self.position.state;
        if !state.has_entries() {
            return Ok(());
        }
        let complete = match (self.runs.first(), state.purged) {
            (None, _) => false,
            (Some(first), Some(purged)) => first <= purged.index.next(),
            (Some(_), None) => self.from_start,
        };
        let oldest = self.segments.keys().next().copied().unwrap_or_default();
        if complete {
            Ok(())
        } else {
            Err(self.missing(SegmentNo::new(oldest.get().saturating_sub(1))).into())
        }
    }

    /// A slot with a bad header may hold a segment that came after the last one found. Its first frame alone may be
    /// a torn switch; a frame after that proves that the switch was durable.
    fn check_blank(&self, slot: &Slot, defect: &Defect) -> Result<(), OpenError> {
        let lost =
            slot.search(1, |frame, block| frame.block == block && self.position.seq < frame.seq);
        let segment = match lost {
            Ok(Some(frame)) => Some(frame.segment),
            Ok(None) => return Ok(()),
            // A slot of which nothing can be read may hold anything.
            Err(_) => None,
        };
        Err(damage(slot, segment, 0, &self.position.state, defect.clone()).into())
    }

    /// A slot that is free by its header must not hold what comes after the log's end.
    fn check_free(&self, slot: &Slot, generation: Option<u64>) -> Result<(), OpenError> {
        match later_life(slot, generation, self.position.seq) {
            Some(frame) => Err(old_header(slot, &frame, &self.position.state).into()),
            None => Ok(()),
        }
    }

    fn into_found(self, spares: Vec<Slot>, blanks: Vec<usize>) -> Found {
        let tail = self.header.map(|header| Tail {
            header,
            next_block: self.next_block,
            position: self.position,
            content: self.content,
        });
        Found {
            segments: self.segments,
            spares,
            blanks,
            state: self.position.state,
            runs: self.runs,
            tail,
            recovery: self.recovery,
        }
    }
}

/// A log that is safe to append to.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) found: Found,
    pub(super) appender: Appender,
}

/// Reads the directory, makes a log if there is none, and repeats the last frame behind a barrier.
pub(super) async fn open(
    env: &Env,
    dir: &Path,
    identity: Identity,
    options: &Options,
) -> Result<Opened, OpenError> {
    let disk = env.disk.as_ref();
    if !disk.exists(dir).map_err(OpenError::io("look for", dir))? {
        disk.create_dir_all(dir).map_err(OpenError::io("create", dir))?;
    }
    // The directory itself may be as new as an earlier attempt that was cut short.
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        disk.sync_dir(parent).map_err(OpenError::io("sync", parent))?;
    }
    // A slot that an earlier process made may have a name that only the kernel remembers.
    disk.sync_dir(dir).map_err(OpenError::io("sync", dir))?;
    start_over::remove_incoming(disk, dir)?;
    let mut found = replay(disk, dir, Open::Write, Some(identity))?;
    let mut frame = FrameBuffer::new();
    let (mut appender, repeats) = match found.tail.take() {
        None => {
            let slot = spare(env, dir, identity, options, &mut found).await?;
            (Appender::create(slot, identity, env.entropy.next_u64()), None)
        }
        Some(tail) => resume(env, dir, options, &mut found, tail, &mut frame).await?,
    };
    let path = appender.segment().slot.path.clone();
    let state = appender.state();
    let (written, _) = appender.write(&mut frame, state).map_err(OpenError::io("write", &path))?;
    if !is_planted(Mutant::LastFrameNotRepeated) {
        appender.sync().await.map_err(OpenError::io("sync", &path))?;
    }
    if let Some(old) = repeats {
        found.runs.repoint(old, written);
    }
    let segment = appender.segment().clone();
    found.segments.insert(segment.number, segment);
    Ok(Opened { found, appender })
}

/// Prepares the frame that repeats the last one, in the last segment or, if it does not fit, in a new one. Returns
/// where the last one stands.
async fn resume(
    env: &Env,
    dir: &Path,
    options: &Options,
    found: &mut Found,
    tail: Tail,
    frame: &mut FrameBuffer,
) -> Result<(Appender, Option<FrameAt>), OpenError> {
    let Some(last) = found.segments.get(&tail.header.segment).cloned() else {
        unreachable!("the log ends in segment {}, not replayed", tail.header.segment);
    };
    let header_in_doubt = tail.next_block == 1
        || tail.content.as_ref().is_none_or(|content| {
            content.at.segment == last.number && content.before.is_start_of(&tail.header)
        });
    let content = tail.content.filter(|_| !is_planted(Mutant::LastFrameNotRepeated));
    let repeat = content.and_then(|content| {
        let replaces = u16::try_from(tail.position.seq - content.before.seq).ok()?;
        frame.push_raw(&content.raw, content.records);
        Some(Repeat { before: content.before, at: content.at, replaces })
    });
    let repeats = repeat.as_ref().map(|repeat| repeat.at);
    let mut appender =
        Appender::resume(last.clone(), &tail.header, tail.next_block, tail.position, repeat);
    frame.compress(&mut Vec::new());
    if !appender.fits(frame.blocks()) {
        let slot = spare(env, dir, tail.header.identity, options, found).await?;
        appender.switch(slot, env.entropy.next_u64(), found.runs.oldest_segment());
    }
    if header_in_doubt {
        let mut block = vec![0; BLOCK];
        SlotHeader::Segment(tail.header).encode(&mut block);
        let (slot, at) = (&last.slot, segment::offset_of(last.slot.copy_block()));
        slot.file.write_at(&block, at).map_err(OpenError::io("write", &slot.path))?;
        if appender.segment().number != last.number {
            slot.file.sync().await.map_err(OpenError::io("sync", &slot.path))?;
        }
    }
    Ok((appender, repeats))
}

/// A filled slot: one that is free, or a new one.
async fn spare(
    env: &Env,
    dir: &Path,
    identity: Identity,
    options: &Options,
    found: &mut Found,
) -> Result<Arc<Slot>, OpenError> {
    if let Some(slot) = found.spares.pop() {
        return Ok(Arc::new(slot));
    }
    let number = found.blanks.pop().unwrap_or_else(|| {
        let used: Vec<usize> = found.segments.values().map(|s| s.slot.number).collect();
        prepare::free_number(|number| used.contains(&number))
    });
    let path = segment::path_of(dir, number);
    let filled = prepare::fill_at_once(env, dir, number, identity, options.segment_bytes).await;
    Ok(Arc::new(filled.map_err(OpenError::io("fill", &path))?))
}

//! Finds out what a damaged log still proves, when everything up to some entry is safe elsewhere.
//!
//! Damage in the middle of a log hides records that were promised. Where the state machine has, durably, every entry
//! they can have held, nothing is lost, and a node that has no peers to ask can go on.
//!
//! # Shape
//!
//! [`salvage`] only reads. It replays, and at each damage begins again behind it: with the next frame that is whole, or
//! with the next segment, whose header says everything. What comes last decides; it must be whole to the log's end, and
//! begin no later than with the entry after `covered`.
//!
//! # Invariants
//!
//! - [`Salvage::lost`] is `None` only if every entry after `covered` that was ever durable in this log is in
//!   [`Salvage::entries`]. What a damaged frame held is never guessed: the log's end is known again only from a segment's
//!   header, the next entry, or the closing frame.
//! - The entries continue `covered` without a gap.
//!
//! # Not here
//!
//! Whether a node may go on with the result. A node with peers may not: the damage may have hidden a vote.

use std::path::Path;

use super::format::{Defect, FrameHeader};
use super::inspect::Dump;
use super::recovery::{self, EndUnknown, Found, Recovery, Replay, Survey};
use super::segment::Source;
use super::{Damage, Entry, HardState, Identity, OpenError};
use crate::env::{Disk, Open};
use crate::types::{LogId, LogIndex, SegmentNo, Term};

/// A log with more damage than this is given up.
const ATTEMPTS_MAX: usize = 64;

/// What is left of a damaged log. See the module documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Salvage {
    /// What is wrong, in the order of the log.
    pub damage: Vec<Damage>,
    /// Entries that follow the covered one, in order and without a gap.
    pub entries: Vec<Entry>,
    /// What is, or may be, missing after them.
    pub lost: Option<Lost>,
    /// The highest term that was seen anywhere.
    pub term: Term,
}

/// Entries that were promised and cannot be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The first.
    pub first: LogIndex,
    /// The last that the log still tells of. There may be more: nothing says how many a damaged end held.
    pub last_seen: Option<LogIndex>,
}

/// Where replaying begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Start {
    segment: SegmentNo,
    /// 0: with the segment's header.
    block: u32,
}

/// Reads a damaged log whose entries up to `covered` are safe elsewhere. With no identity given, any is accepted.
pub fn salvage(
    disk: &dyn Disk,
    dir: &Path,
    identity: Option<Identity>,
    covered: LogId,
) -> Result<Salvage, OpenError> {
    let mut salvage =
        Salvage { damage: Vec::new(), entries: Vec::new(), lost: None, term: covered.term };
    let mut last_seen = None;
    let mut start = None;
    while salvage.damage.len() < ATTEMPTS_MAX {
        let mut survey = recovery::survey(disk, dir, Open::Read, identity)?;
        salvage.note_headers(&survey);
        let mut replay = Replay::new(dir);
        let replayed = run(&mut replay, &mut survey, start, covered);
        let next = match &replayed {
            Ok(()) => None,
            Err(OpenError::Corrupt(damage)) => Some(next_start(disk, dir, identity, damage)?),
            Err(_) => return replayed.map(|()| salvage),
        };
        last_seen = last_seen.max(replay.position.state.last.map(|last| last.index));
        let known = salvage.take_entries(replay, covered)?;
        match (replayed, next) {
            (Ok(()), _) if known => return Ok(salvage),
            (Err(OpenError::Corrupt(damage)), Some(next)) => {
                salvage.damage.push(*damage);
                // Always forward, so that this ends.
                let Some(next) = next.filter(|next| start < Some(*next)) else { break };
                start = Some(next);
            }
            _ => break,
        }
    }
    let first = salvage.entries.last().map_or(covered.index, |entry| entry.id.index).next();
    salvage.lost = Some(Lost { first, last_seen: last_seen.filter(|last| first <= *last) });
    Ok(salvage)
}

/// Replays to the end, or to the first damage.
fn run(
    replay: &mut Replay,
    survey: &mut Survey,
    start: Option<Start>,
    covered: LogId,
) -> Result<(), OpenError> {
    let Some((newest, oldest)) = survey.live() else {
        return Err(replay.missing(SegmentNo::new(1)).into());
    };
    let Some(start) = start else {
        replay.segments(survey, oldest, newest)?;
        replay.check_complete()?;
        return replay.check_others(survey);
    };
    let mut first = start.segment;
    if start.block != 0 {
        let Some((slot, header)) = survey.segments.remove(&first) else {
            return Err(replay.missing(first).into());
        };
        let mut block = Vec::new();
        let frame = slot.frame_header(Source::Cache, start.block, &mut block);
        // It was found a moment ago.
        let frame = frame.map_err(|_| replay.missing(first))?;
        replay.end_unknown = Some(EndUnknown { covered: covered.index });
        replay.begin_at(slot, &header, &frame);
        replay.frames(&header, first == newest)?;
        first = first.next();
    }
    replay.segments(survey, first, newest)?;
    replay.check_others(survey)
}

/// Where to go on behind damage: with the next frame of the segment, or with the next segment.
fn next_start(
    disk: &dyn Disk,
    dir: &Path,
    identity: Option<Identity>,
    damage: &Damage,
) -> Result<Option<Start>, OpenError> {
    let Some(segment) = damage.segment else { return Ok(None) };
    let survey = recovery::survey(disk, dir, Open::Read, identity)?;
    // Where the file was cut off, the frames that are left say nothing of those that are not.
    let is_cut_off = matches!(damage.defect, Defect::FileLength { .. });
    if let Some((slot, header)) = survey.segments.get(&segment)
        && slot.path == damage.path
        && !is_cut_off
    {
        let is_ours = |frame: &FrameHeader, block: u32| {
            frame.check_place(header.generation, segment, block).is_ok()
        };
        let from = damage.block().saturating_add(1);
        if let Ok(Some(frame)) = slot.search(from, is_ours) {
            return Ok(Some(Start { segment, block: frame.block }));
        }
    }
    let mut later = survey.segments.range(segment.next()..);
    Ok(later.next().map(|(number, _)| Start { segment: *number, block: 0 }))
}

impl Salvage {
    fn note_headers(&mut self, survey: &Survey) {
        for (_, header) in survey.segments.values() {
            self.note(&header.state);
        }
    }

    fn note(&mut self, state: &HardState) {
        let ids = [state.last, state.committed, state.purged];
        let terms = ids.into_iter().flatten().map(|id| id.term);
        let terms = terms.chain(state.vote.map(|vote| vote.term));
        self.term = terms.fold(self.term, Term::max);
    }

    /// Takes what a replay says of the entries after the covered one. Whether that is known to be all of them.
    fn take_entries(&mut self, replay: Replay, covered: LogId) -> Result<bool, OpenError> {
        let state = replay.position.state;
        self.note(&state);
        if replay.end_unknown.is_some() {
            return Ok(false);
        }
        // A log never ends before the state that was made from it: its end is missing.
        let Some(last) = state.last.filter(|last| covered.index <= last.index) else {
            return Ok(false);
        };
        if last.index == covered.index {
            self.entries.clear();
            return Ok(last == covered);
        }
        let wanted = covered.index.next();
        let first = replay.runs.first().map(|first| first.max(state.first_kept()));
        if first.is_none_or(|first| wanted < first) {
            return Ok(false);
        }
        self.entries = entries(replay, wanted)?;
        self.term = self.entries.iter().map(|entry| entry.id.term).fold(self.term, Term::max);
        Ok(true)
    }
}

fn entries(replay: Replay, first: LogIndex) -> Result<Vec<Entry>, OpenError> {
    let found = Found {
        state: replay.position.state,
        segments: replay.segments,
        spares: Vec::new(),
        blanks: Vec::new(),
        runs: replay.runs,
        tail: None,
        recovery: Recovery::default(),
    };
    Dump::new(found, first).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaying_goes_on_behind_the_place_it_began() {
        let at = |segment, block| Start { segment: SegmentNo::new(segment), block };
        assert!(at(1, 5) < at(1, 6) && at(1, 6) < at(2, 0) && at(2, 0) < at(2, 1));
    }
}

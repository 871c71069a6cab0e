//! Knows what the log holds: hard state, which entries there are, the newest of them, and where the others stand.
//!
//! Two views. What was *accepted* is visible to readers at once ([`View`]); where entries stand in files
//! ([`Runs`]) follows the frames as they become durable.
//!
//! # Shape
//!
//! Pure: no I/O, no locks. Recovery replays frames through the same [`HardState::apply`] and [`Runs`] that a running
//! log uses, so both agree on what a record means.
//!
//! # Invariants
//!
//! - `purged <= last` by index, and entries are contiguous from after `purged` to `last`.
//! - The cache is a contiguous run of entries that ends at `last`, and holds every entry that is not durable.
//! - A live index that is not in the cache is found in the last run that starts at or before it.

use std::collections::VecDeque;

use super::format::RecordRef;
use super::{Entry, HardState, Record, Refused};
use crate::types::{LogId, LogIndex, SegmentNo, WriteSeq};

/// An entry that does not continue the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) found: LogId,
    pub(super) last: LogId,
}

impl HardState {
    /// What a record changes. An entry must follow `last`; the first entry of all may have any index.
    pub(super) fn apply(&mut self, record: &RecordRef<'_>) -> Result<(), Gap> {
        match *record {
            RecordRef::Entry { id, .. } => {
                if let Some(last) = self.last
                    && last.index.next() != id.index
                {
                    return Err(Gap { found: id, last });
                }
                self.last = Some(id);
            }
            RecordRef::Vote(vote) => self.vote = Some(vote),
            RecordRef::Committed(id) => self.committed = Some(id),
            RecordRef::TruncateAfter(keep) => {
                let keep = newer(keep, self.purged);
                if index(keep) < index(self.last) {
                    self.last = keep;
                }
            }
            RecordRef::Purge(id) => {
                self.purged = newer(Some(id), self.purged);
                if index(self.last) <= index(self.purged) {
                    self.last = self.purged;
                }
            }
        }
        Ok(())
    }

    /// The first index that is not purged, if anything was.
    pub(super) fn first_kept(&self) -> LogIndex {
        self.purged.map_or(LogIndex::new(0), |id| id.index.next())
    }

    /// Whether there are entries.
    pub(super) fn has_entries(&self) -> bool {
        index(self.purged) < index(self.last)
    }
}

/// `None`, "before everything", orders first.
fn index(id: Option<LogId>) -> Option<LogIndex> {
    id.map(|id| id.index)
}

/// The one with the higher index; the first if they are equal.
fn newer(a: Option<LogId>, b: Option<LogId>) -> Option<LogId> {
    if index(a) < index(b) { b } else { a }
}

/// The log as accepted: what readers see.
#[derive(Debug)]
pub(super) struct View {
    state: HardState,
    cache: VecDeque<Cached>,
    cache_bytes: usize,
    /// Counts truncations, so that a reader that left the lock notices one.
    truncations: u64,
}

#[derive(Debug)]
struct Cached {
    entry: Entry,
    seq: WriteSeq,
}

impl View {
    pub(super) const fn new(state: HardState) -> Self {
        Self { state, cache: VecDeque::new(), cache_bytes: 0, truncations: 0 }
    }

    pub(super) const fn state(&self) -> HardState {
        self.state
    }

    pub(super) const fn truncations(&self) -> u64 {
        self.truncations
    }

    /// Whether all of these can be accepted, one after the other.
    pub(super) fn check(&self, records: &[Record]) -> Result<(), Refused> {
        let mut state = self.state;
        for record in records {
            state
                .apply(&RecordRef::from(record))
                .map_err(|Gap { found, last }| Refused::Gap { found, last })?;
        }
        Ok(())
    }

    /// The hard state after a record that `check` has passed.
    pub(super) fn state_after(&self, record: &Record) -> HardState {
        let mut state = self.state;
        let applied = state.apply(&RecordRef::from(record));
        assert!(applied.is_ok(), "an unchecked record: {applied:?}");
        state
    }

    /// Accepts a record that `check` has passed.
    pub(super) fn accept(&mut self, record: Record, seq: WriteSeq) {
        let applied = self.state.apply(&RecordRef::from(&record));
        assert!(applied.is_ok(), "accepted an unchecked record: {applied:?}");
        match record {
            Record::Entry { id, payload } => {
                self.cache_bytes += payload.len();
                self.cache.push_back(Cached { entry: Entry { id, payload }, seq });
            }
            Record::TruncateAfter(_) => {
                self.truncations += 1;
                let last = index(self.state.last);
                while self.cache.back().is_some_and(|c| last < Some(c.entry.id.index)) {
                    self.forget_back();
                }
            }
            Record::Purge(_) => {
                let first = self.state.first_kept();
                while self.cache.front().is_some_and(|c| c.entry.id.index < first) {
                    self.forget_front();
                }
            }
            Record::Vote(_) | Record::Committed(_) => {}
        }
    }

    /// Drops the oldest durable entries until the cache is small enough.
    pub(super) fn evict(&mut self, durable: WriteSeq, bytes_max: u64) {
        while bytes_max < self.cache_bytes as u64
            && self.cache.front().is_some_and(|c| c.seq <= durable)
        {
            self.forget_front();
        }
    }

    /// First index that the cache has.
    pub(super) fn cached_from(&self) -> Option<LogIndex> {
        self.cache.front().map(|c| c.entry.id.index)
    }

    /// The cached entry at an index.
    pub(super) fn cached(&self, index: LogIndex) -> Option<&Entry> {
        let first = self.cached_from()?;
        let offset = usize::try_from(index.get().checked_sub(first.get())?).ok()?;
        self.cache.get(offset).map(|c| &c.entry)
    }

    fn forget_front(&mut self) {
        if let Some(gone) = self.cache.pop_front() {
            self.cache_bytes -= gone.entry.payload.len();
        }
    }

    fn forget_back(&mut self) {
        if let Some(gone) = self.cache.pop_back() {
            self.cache_bytes -= gone.entry.payload.len();
        }
    }
}

/// Where a frame stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameAt {
    pub(super) segment: SegmentNo,
    pub(super) block: u32,
    pub(super) blocks: u32,
}

/// What a frame does to the entries in files, in order. Much less than its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Entries from this index on.
    Entries(LogIndex),
    /// Entries after this index are gone.
    TruncateAfter(Option<LogIndex>),
}

impl Effect {
    /// Notes a record; consecutive entries are one effect.
    pub(super) fn note(effects: &mut Vec<Self>, record: &RecordRef<'_>) {
        match record {
            RecordRef::Entry { id, .. } => {
                if !matches!(effects.last(), Some(Self::Entries(_))) {
                    effects.push(Self::Entries(id.index));
                }
            }
            RecordRef::TruncateAfter(keep) => effects.push(Self::TruncateAfter(index(*keep))),
            RecordRef::Vote(_) | RecordRef::Committed(_) | RecordRef::Purge(_) => {}
        }
    }
}

/// Entries from `first` up to the next run's first stand in this frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: LogIndex,
    pub(super) at: FrameAt,
    /// The segment they were written to first. It stays live even if they are read from a repetition: replaying
    /// needs what led to the repeated frame.
    home: SegmentNo,
}

/// Which frame holds which entry: one item per frame, not per entry.
#[derive(Clone, Debug, Default)]
pub(super) struct Runs(VecDeque<Run>);

impl Runs {
    /// A frame became durable; `state` is the hard state after it.
    pub(super) fn apply(&mut self, effects: &[Effect], at: FrameAt, state: &HardState) {
        for effect in effects {
            match *effect {
                Effect::Entries(first) => {
                    self.truncate(|run| run.first < first || (run.at == at && run.first <= first));
                    if self.0.back().is_none_or(|run| run.at != at) {
                        self.0.push_back(Run { first, at, home: at.segment });
                    }
                }
                Effect::TruncateAfter(keep) => self.truncate(|run| Some(run.first) <= keep),
            }
        }
        self.forget_purged(state);
    }

    /// The entries of `old` also stand in `new`, which is certainly on the card.
    pub(super) fn repoint(&mut self, old: FrameAt, new: FrameAt) {
        for run in self.0.iter_mut().rev().take_while(|run| run.at == old) {
            run.at = new;
        }
    }

    /// The run that holds an index, and where the next run starts.
    pub(super) fn find(&self, index: LogIndex) -> Option<(Run, Option<LogIndex>)> {
        let after = self.0.partition_point(|run| run.first <= index);
        let run = self.0.get(after.checked_sub(1)?)?;
        Some((*run, self.0.get(after).map(|next| next.first)))
    }

    /// The oldest segment that a live entry was written to.
    pub(super) fn oldest_segment(&self) -> Option<SegmentNo> {
        self.0.front().map(|run| run.home)
    }

    /// First index that stands in this segment or a newer one.
    pub(super) fn first_since(&self, segment: SegmentNo) -> Option<LogIndex> {
        let start = self.0.partition_point(|run| run.at.segment < segment);
        self.0.get(start).map(|run| run.first)
    }

    /// First index that stands in a file.
    pub(super) fn first(&self) -> Option<LogIndex> {
        self.0.front().map(|run| run.first)
    }

    fn truncate(&mut self, keep: impl Fn(&Run) -> bool) {
        while self.0.back().is_some_and(|run| !keep(run)) {
            self.0.pop_back();
        }
    }

    fn forget_purged(&mut self, state: &HardState) {
        if !state.has_entries() {
            self.0.clear();
            return;
        }
        let first = state.first_kept();
        while self.0.get(1).is_some_and(|next| next.first <= first) {
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{NodeId, Term, Vote};

    fn id(index: u64) -> LogId {
        LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) }
    }

    fn entry(index: u64) -> Record {
        Record::Entry { id: id(index), payload: vec![0; 10].into() }
    }

    fn state_after(records: &[Record]) -> HardState {
        let mut state = HardState::default();
        for record in records {
            state.apply(&RecordRef::from(record)).unwrap();
        }
        state
    }

    fn ends(records: &[Record]) -> (Option<u64>, Option<u64>) {
        let state = state_after(records);
        (state.purged.map(|id| id.index.get()), state.last.map(|id| id.index.get()))
    }

    #[test]
    fn hard_state_follows_the_records() {
        use Record::{Purge, TruncateAfter};
        let log = |more: &[Record]| ends(&[&[entry(1), entry(2), entry(3)], more].concat());
        assert_eq!(ends(&[]), (None, None));
        assert_eq!(log(&[]), (None, Some(3)));
        assert_eq!(log(&[TruncateAfter(Some(id(1)))]), (None, Some(1)));
        assert_eq!(log(&[TruncateAfter(Some(id(9)))]), (None, Some(3)), "truncating never extends");
        assert_eq!(log(&[TruncateAfter(None)]), (None, None));
        assert_eq!(log(&[Purge(id(2))]), (Some(2), Some(3)));
        assert_eq!(
            log(&[Purge(id(2)), Purge(id(1))]),
            (Some(2), Some(3)),
            "purging never goes back"
        );
        assert_eq!(log(&[Purge(id(9))]), (Some(9), Some(9)), "a snapshot ahead of the log");
        assert_eq!(log(&[Purge(id(9)), entry(10)]), (Some(9), Some(10)));
        assert_eq!(log(&[Purge(id(2)), TruncateAfter(Some(id(1)))]), (Some(2), Some(2)));
        assert_eq!(log(&[Purge(id(2)), TruncateAfter(None), entry(3)]), (Some(2), Some(3)));

        let vote = Vote { term: Term::new(5), node: NodeId::new(1), committed: false };
        let state = state_after(&[Record::Vote(vote), Record::Committed(id(4))]);
        assert_eq!((state.vote, state.committed), (Some(vote), Some(id(4))));
    }

    #[test]
    fn entry_that_does_not_follow_is_refused_and_changes_nothing() {
        let mut view = View::new(HardState::default());
        view.accept(entry(7), WriteSeq::new(1));
        let before = view.state();
        for wrong in [7, 9] {
            let refused = view.check(&[Record::Committed(id(7)), entry(wrong)]);
            assert_eq!(refused, Err(Refused::Gap { found: id(wrong), last: id(7) }));
        }
        assert_eq!(view.state(), before);
        assert_eq!(view.check(&[entry(8), Record::TruncateAfter(Some(id(7))), entry(8)]), Ok(()));
    }

    #[test]
    fn cache_drops_only_what_is_durable() {
        let mut view = View::new(HardState::default());
        for index in 1..=5 {
            view.accept(entry(index), WriteSeq::new(index));
        }
        view.evict(WriteSeq::new(2), 0);
        assert_eq!(view.cached_from(), Some(LogIndex::new(3)));
        view.evict(WriteSeq::new(5), 25);
        assert_eq!(view.cached_from(), Some(LogIndex::new(4)));
        assert_eq!(view.cached(LogIndex::new(3)), None);
        assert_eq!(view.cached(LogIndex::new(5)).map(|entry| entry.id), Some(id(5)));
        view.accept(Record::TruncateAfter(Some(id(4))), WriteSeq::new(6));
        assert_eq!(view.cached(LogIndex::new(5)), None);
        view.accept(Record::Purge(id(4)), WriteSeq::new(7));
        assert_eq!(view.cached_from(), None);
    }

    fn at(segment: u64, block: u32) -> FrameAt {
        FrameAt { segment: SegmentNo::new(segment), block, blocks: 1 }
    }

    /// Replays one frame after the other, as recovery does.
    fn runs(frames: &[(FrameAt, &[Record])]) -> Runs {
        let (mut runs, mut state) = (Runs::default(), HardState::default());
        for (at, records) in frames {
            let mut effects = Vec::new();
            for record in *records {
                let record = RecordRef::from(record);
                state.apply(&record).unwrap();
                Effect::note(&mut effects, &record);
            }
            runs.apply(&effects, *at, &state);
        }
        runs
    }

    fn found(runs: &Runs, index: u64) -> Option<FrameAt> {
        runs.find(LogIndex::new(index)).map(|(run, _)| run.at)
    }

    #[test]
    fn entries_are_found_in_the_frame_that_wrote_them_last() {
        let keep = |index| Record::TruncateAfter(Some(id(index)));
        let runs = runs(&[
            (at(1, 1), &[entry(1), entry(2), entry(3)]),
            (at(1, 2), &[entry(4), entry(5)]),
            (at(1, 3), &[keep(3), entry(4), keep(2), entry(3)]),
        ]);
        assert_eq!(found(&runs, 2), Some(at(1, 1)));
        assert_eq!(found(&runs, 3), Some(at(1, 3)));
        assert_eq!(found(&runs, 0), None);
    }

    #[test]
    fn purged_runs_are_forgotten_and_with_them_their_segments() {
        let frames: [(FrameAt, &[Record]); 3] = [
            (at(1, 1), &[entry(1), entry(2)]),
            (at(2, 1), &[entry(3), entry(4)]),
            (at(3, 1), &[Record::Purge(id(2)), entry(5)]),
        ];
        let mut runs = runs(&frames);
        assert_eq!(runs.oldest_segment(), Some(SegmentNo::new(2)));
        assert_eq!(runs.first(), Some(LogIndex::new(3)));

        // A repetition elsewhere is read instead, but does not let go of the original's segment.
        runs.repoint(at(3, 1), at(4, 1));
        assert_eq!(found(&runs, 5), Some(at(4, 1)));
        let state = state_after(&[Record::Purge(id(4)), entry(5)]);
        runs.apply(&[], at(4, 2), &state);
        assert_eq!(runs.oldest_segment(), Some(SegmentNo::new(3)));
        runs.apply(&[], at(4, 3), &state_after(&[Record::Purge(id(5))]));
        assert_eq!(runs.oldest_segment(), None);
    }
}

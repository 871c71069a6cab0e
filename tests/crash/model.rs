//! What a log holds, written down a second time and as simply as possible.

use std::collections::BTreeMap;

use bytes::Bytes;
use k3s_server::testkit::Random;
use k3s_server::types::{LogId, LogIndex, NodeId, Term, Vote};
use k3s_server::wal::{Entry, HardState, Record};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) state: HardState,
    pub(crate) entries: BTreeMap<u64, Entry>,
}

pub(crate) fn id(term: u64, index: u64) -> LogId {
    LogId { term: Term::new(term), leader: NodeId::new(7), index: LogIndex::new(index) }
}

pub(crate) fn entry(term: u64, index: u64, payload: impl Into<Bytes>) -> Record {
    Record::Entry { id: id(term, index), payload: payload.into() }
}

pub(crate) fn vote(term: u64) -> Record {
    Record::Vote(Vote {
        term: Term::new(term),
        node: NodeId::new(7),
        committed: term.is_multiple_of(2),
    })
}

impl Model {
    pub(crate) fn apply(&mut self, record: &Record) {
        match record {
            Record::Entry { id, payload } => {
                let entry = Entry { id: *id, payload: payload.clone() };
                self.entries.insert(id.index.get(), entry);
            }
            Record::Vote(vote) => self.state.vote = Some(*vote),
            Record::Committed(id) => self.state.committed = Some(*id),
            Record::TruncateAfter(keep) => {
                let kept = |index: &u64| keep.is_some_and(|keep| *index <= keep.index.get());
                self.entries.retain(|index, _| kept(index));
            }
            Record::Purge(upto) => {
                self.entries.retain(|index, _| upto.index.get() < *index);
                self.state.purged = Some(*upto);
            }
        }
        let last = self.entries.values().next_back().map(|entry| entry.id);
        self.state.last = last.or(self.state.purged);
    }

    pub(crate) fn next_index(&self) -> u64 {
        self.state.last.map_or(1, |last| last.index.get() + 1)
    }

    /// Records for one append, such as Raft might make; all in one frame.
    pub(crate) fn random_append(&self, random: &mut Random, payload_max: u64) -> Vec<Record> {
        let mut after = self.clone();
        let mut records = Vec::new();
        let mut left = payload_max;
        for _ in 0..=random.below(3) {
            let record = after.random_record(random, left);
            if let Record::Entry { payload, .. } = &record {
                left = (left - payload.len() as u64).max(1);
            }
            after.apply(&record);
            records.push(record);
        }
        records
    }

    fn random_record(&self, random: &mut Random, payload_max: u64) -> Record {
        let term = self.state.vote.map_or(1, |vote| vote.term.get());
        let known: Vec<LogId> = self.entries.values().map(|entry| entry.id).collect();
        match random.below(20) {
            0 => vote(term + random.below(2)),
            1 | 2 if !known.is_empty() => Record::Committed(known[random.index(known.len())]),
            3 => Record::TruncateAfter(match known.len() {
                0 => self.state.purged,
                len => Some(known[len - 1 - random.index(len.min(4))]),
            }),
            4 | 5 if !known.is_empty() => Record::Purge(known[random.index(known.len())]),
            6 if random.percent(10) => Record::Purge(id(term, self.next_index() + 5)),
            _ => {
                let len = match random.below(12) {
                    0 => random.below(payload_max),
                    1 | 2 => random.below(6000.min(payload_max)),
                    _ => random.below(300.min(payload_max)),
                };
                let mut payload = vec![0; usize::try_from(len).unwrap()];
                if random.percent(60) {
                    random.fill(&mut payload);
                }
                entry(term, self.next_index(), payload)
            }
        }
    }
}

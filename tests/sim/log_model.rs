//! What a log directory must hold, as told by the bytes that reached the card, not by the code that wrote them.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use k3s_server::types::{LogId, NodeId, Vote};
use k3s_server::wal::Record;

use crate::membership::Voters;

/// One entry, as far as checks need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) id: LogId,
    pub(crate) payload_hash: u64,
}

/// The records of one log, replayed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogModel {
    pub(crate) vote: Option<Vote>,
    pub(crate) entries: BTreeMap<u64, Held>,
    /// The last entry that a checkpoint covers and the log has forgotten.
    pub(crate) purged: Option<LogId>,
    /// Memberships by index; kept when the log forgets the entry.
    pub(crate) memberships: BTreeMap<u64, Voters>,
}

/// How one promise to follow compares with another: openraft lets a later candidate of the same term win by its id.
pub(crate) fn rank(vote: Vote) -> (u64, NodeId) {
    (vote.term.get(), vote.node)
}

/// A number for a payload.
pub(crate) fn hash_of(payload: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    payload.hash(&mut hasher);
    hasher.finish()
}

impl LogModel {
    /// Replays one record.
    pub(crate) fn apply(&mut self, record: &Record) {
        match record {
            Record::Entry { id, payload } => {
                let index = id.index.get();
                let held = Held { id: *id, payload_hash: hash_of(payload) };
                if self.entries.get(&index) != Some(&held) {
                    self.truncate_from(index);
                    self.entries.insert(index, held);
                }
                if let Some(voters) = Voters::of_payload(payload) {
                    self.memberships.insert(index, voters);
                }
            }
            Record::Vote(vote) => self.vote = Some(*vote),
            Record::Committed(_) => {}
            Record::TruncateAfter(last) => {
                self.truncate_from(last.map_or(0, |last| last.index.get() + 1));
            }
            Record::Purge(upto) => self.purge(*upto),
        }
    }

    fn truncate_from(&mut self, index: u64) {
        self.entries.split_off(&index);
        self.memberships.split_off(&index);
    }

    fn purge(&mut self, upto: LogId) {
        let kept = self.entries.split_off(&(upto.index.get() + 1));
        self.entries = kept;
        if self.purged.is_none_or(|purged| purged.index < upto.index) {
            self.purged = Some(upto);
        }
    }

    /// Entries from an index on, and the last vote, turned out to be gone.
    pub(crate) fn forget_from(&mut self, index: Option<u64>, vote: Option<Vote>) {
        if let Some(index) = index {
            self.truncate_from(index);
        }
        self.vote = vote;
    }

    /// The entry at an index, if it is known.
    pub(crate) fn id_at(&self, index: u64) -> Option<LogId> {
        match self.entries.get(&index) {
            Some(held) => Some(held.id),
            None => self.purged.filter(|purged| purged.index.get() == index),
        }
    }

    /// Whether the log, or a checkpoint that replaces its beginning, holds this entry.
    pub(crate) fn holds(&self, id: LogId) -> bool {
        self.purged.is_some_and(|purged| id.index <= purged.index)
            || self.entries.get(&id.index.get()).is_some_and(|held| held.id == id)
    }

    /// The end of the log.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.entries.values().next_back().map(|held| held.id).or(self.purged)
    }
}

//! Keeps every revision of every key in one redb file, and answers reads at any revision not compacted.
//!
//! The log (`wal`) is what makes a write durable; this file only has to be *rebuildable*. Commands are applied
//! without a barrier, a checkpoint now and then makes everything so far durable in one go, and a start replays
//! the log from the last checkpoint. There is no index in memory: a start is instant and memory does not grow
//! with the number of keys.
//!
//! # Shape
//!
//! [`Store`] is a cheap handle. [`Store::read`] gives a [`ReadTxn`], one consistent moment that later writes do
//! not disturb; [`Store::write`] runs a closure with the one [`WriteTxn`] and commits what it did, or nothing.
//! [`View`] is what both can answer. Tables: `rev` (revision → record, linked to the key's previous revision),
//! `cur` (key → newest revision), `lease`, `lease_key`, `meta`. [`backend`] is the file under redb: barriers that never
//! wait for the card, and a checksum of every block. [`ballast`] keeps room on the card.
//!
//! # Invariants
//!
//! - Every record carries a version and a CRC32C that covers its table and key as well, checked at every read:
//!   a flipped bit or a record under the wrong key is [`StoreError::Damaged`], never a wrong answer.
//! - All changes of one command share one revision, and become visible together.
//! - A closure that fails changes nothing.
//! - Equal sequences of writes give equal tables ([`ReadTxn::state_hash`]), however they were batched.
//! - Compaction reads its own window only.
//! - Whoever meets damage, be it a reader, the writer or the drain, [`Store::failed`] says so.
//!
//! # Not here
//!
//! What a command means (`apply`), when to checkpoint and to compact (`raft`, `etcd`), time (`lease`).

pub mod backend;
pub mod ballast;
mod compaction;
mod dump;
mod engine;
mod error;
mod format;
mod hash;
mod marks;
mod read;
mod store;
mod view;
mod write;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod full_tests;
#[cfg(test)]
mod memory_disk;
#[cfg(test)]
mod tests;

use bytes::Bytes;

use crate::proto::mvccpb::{Event, KeyValue};
use crate::types::{LeaseId, Revision};

pub use backend::{Failure, Fault, Scrubbed};
pub use dump::{DumpStream, DumpSummary};
pub use error::StoreError;
pub use format::Position;
pub use hash::{KvHash, StateHash};
pub use read::ReadTxn;
pub use store::{Checkpoint, DrainOn, Options, Received, Receiving, SCRUB_BLOCKS, Store};
pub use view::{Entry, View, Visit};
pub use write::WriteTxn;

/// Why a revision cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RevisionError {
    /// Below the compacted revision.
    Compacted(Revision),
    /// Not written yet.
    Future,
}

/// A half-open range of keys, as etcd encodes it in (key, range_end).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRange {
    /// Exactly this key.
    One(Bytes),
    /// From `start` to `end`, which is excluded. Empty if `end` is not above `start`.
    Span(Bytes, Bytes),
    /// From this key on.
    From(Bytes),
}

/// What a scan found.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// The key-values, in key order.
    pub kvs: Vec<KeyValue>,
    /// How many keys are in the range, whatever the limit.
    pub count: u64,
}

/// All events of one revision, in order. What watchers see as one unit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RevisionEvents {
    /// Their revision.
    pub revision: Revision,
    /// The events, `prev_kv` empty.
    pub events: Vec<Event>,
}

/// A lease as the replicated state knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRecord {
    /// The lease.
    pub id: LeaseId,
    /// Seconds granted.
    pub ttl_secs: i64,
    /// Seconds left at the last checkpoint; 0 if there was none.
    pub remaining_secs: i64,
}

/// Sizes that `Status` and the quota report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreSize {
    /// Bytes of the file.
    pub total: u64,
    /// Bytes of keys, values and records in it, without free pages: the same on every member.
    pub in_use: u64,
}

/// How many records the store holds; for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Keys, those deleted since the last compaction included.
    pub keys: u64,
    /// Changes of keys that can still be read: what compaction has left.
    pub changes: u64,
}

impl KeyRange {
    /// The range a request means: no end is one key, an end of one zero byte is "from key on".
    pub fn new(key: Bytes, end: Bytes) -> Self {
        match end.as_ref() {
            [] => Self::One(key),
            [0] => Self::From(key),
            _ => Self::Span(key, end),
        }
    }

    /// Whether a key is inside.
    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            Self::One(one) => one == key,
            Self::Span(start, end) => start <= key && key < end,
            Self::From(start) => start <= key,
        }
    }
}

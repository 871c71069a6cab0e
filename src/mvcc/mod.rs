//! Keeps every revision of every key in one redb file, and answers reads at any revision not compacted.
//!
//! API SKELETON: bodies to be written. See design section 5.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

use crate::env::Env;
use crate::proto::mvccpb::{Event, KeyValue};
use crate::types::{ClusterId, LeaseId, LogId, NodeId, Revision};

/// The store failed underneath: nothing a client did.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Placeholder.
    #[error("{0}")]
    Other(String),
}

/// Why a revision cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RevisionError {
    /// Below the compacted revision.
    Compacted(Revision),
    /// Not written yet.
    Future,
}

/// How to open the store.
#[derive(Clone, Debug)]
pub struct Options {
    /// Page cache.
    pub cache_bytes: usize,
}

/// A half-open range of keys, as etcd encodes it in (key, range_end).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRange {
    /// Exactly this key.
    One(Bytes),
    /// From `start` to `end`, which is excluded.
    Span(Bytes, Bytes),
    /// From this key on.
    From(Bytes),
}

/// The state machine's file.
#[derive(Clone, Debug)]
pub struct Store {
    _inner: Arc<()>,
}

/// One consistent moment of the store. Later writes do not show.
#[derive(Debug)]
pub struct ReadTxn {}

/// The one writer. Dropping it without commit undoes it.
#[derive(Debug)]
pub struct WriteTxn {}

/// What a scan found.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// The key-values, in key order.
    pub kvs: Vec<KeyValue>,
    /// How many keys are in the range, whatever the limit.
    pub count: u64,
}

/// All events of one revision, in order. What watchers see as one unit.
#[derive(Clone, Debug)]
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
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreSize {
    /// Bytes of the file.
    pub total: u64,
    /// Bytes of it that hold data.
    pub in_use: u64,
}

impl Store {
    /// Opens the file, making it if it is not there.
    pub fn open(_env: &Env, _path: &Path, _options: &Options) -> Result<Self, StoreError> {
        todo!()
    }

    /// The moment after the last applied command.
    pub fn read(&self) -> Result<ReadTxn, StoreError> {
        todo!()
    }

    /// Sizes of the file.
    pub fn size(&self) -> Result<StoreSize, StoreError> {
        todo!()
    }
}

impl ReadTxn {
    /// The newest revision.
    pub fn revision(&self) -> Revision {
        todo!()
    }

    /// The last compacted revision; history below it is gone. 0 before the first compaction.
    pub fn compacted(&self) -> Revision {
        todo!()
    }

    /// One key at a revision (`None`: the newest).
    pub fn get(&self, _key: &[u8], _at: Option<Revision>) -> Result<Option<KeyValue>, StoreError> {
        todo!()
    }

    /// The previous version of what was written to `key` at `revision`, if it is still there: for `prev_kv`.
    pub fn previous(&self, _key: &[u8], _revision: Revision) -> Result<Option<KeyValue>, StoreError> {
        todo!()
    }

    /// Events from `from` on, oldest first, whole revisions, until about `bytes_max` were read (always at
    /// least one revision if there is one). For watchers that start in the past or fell behind.
    pub fn events(
        &self,
        _from: Revision,
        _range: Option<&KeyRange>,
        _bytes_max: usize,
    ) -> Result<(Vec<RevisionEvents>, Revision), StoreError> {
        // The second value: every revision below or equal to it was looked at.
        todo!()
    }

    /// One lease.
    pub fn lease(&self, _id: LeaseId) -> Result<Option<LeaseRecord>, StoreError> {
        todo!()
    }

    /// All leases, by id.
    pub fn leases(&self) -> Result<Vec<LeaseRecord>, StoreError> {
        todo!()
    }

    /// Keys attached to a lease, sorted.
    pub fn lease_keys(&self, _id: LeaseId) -> Result<Vec<Bytes>, StoreError> {
        todo!()
    }

    /// Alarms: (member, etcd's alarm type).
    pub fn alarms(&self) -> Result<Vec<(NodeId, i32)>, StoreError> {
        todo!()
    }

    /// The last applied entry.
    pub fn applied(&self) -> Option<LogId> {
        todo!()
    }

    /// The cluster this state belongs to.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        todo!()
    }

    /// etcd's HashKV: (hash, compacted revision, hash revision).
    pub fn hash_kv(&self, _at: Option<Revision>) -> Result<Result<(u32, Revision, Revision), RevisionError>, StoreError> {
        todo!()
    }
}

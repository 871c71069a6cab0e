//! Answers reads at any revision from the two tables of keys, for readers and for the writer alike.
//!
//! `cur` says what is newest; when that is too new, the records in `rev` lead back, each naming the change of
//! the same key before it. No other index is needed, and none is kept.
//!
//! # Invariants
//!
//! - A record that must be there and is not, or that belongs to another key, is damage. The only link that may
//!   lead nowhere is the one from the first change of a key's life, because compaction drops tombstones.

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use redb::ReadableTable;

use crate::proto::mvccpb::KeyValue;
use crate::types::{LeaseId, Revision};

use super::format::{CurRecord, LeaseValue, POSITION_BYTES, Position, RevRecord, Table, lease_key};
use super::{KeyRange, LeaseRecord, RevisionError, Scan, StoreError};

pub(super) type RevKey = &'static [u8; POSITION_BYTES];
pub(super) type Slice = &'static [u8];

/// A key as it was at some revision, without its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its last change.
    pub at: Position,
    /// Revision in which it was created.
    pub create: i64,
    /// Writes since then, the creation included.
    pub version: i64,
    /// The lease it hangs on; 0 for none.
    pub lease: i64,
}

/// Sees one key after the other, until it breaks.
pub type Visit<'a> = dyn FnMut(&[u8], &Entry) -> Result<ControlFlow<()>, StoreError> + 'a;

/// What a reader and the writer can both answer.
pub trait View {
    /// The newest revision this view shows.
    fn revision(&self) -> Revision;

    /// The last compacted revision as etcd counts: -1 before the first compaction.
    fn compacted_raw(&self) -> i64;

    /// One key at a revision, without its value.
    fn entry(&self, key: &[u8], at: Revision) -> Result<Option<Entry>, StoreError>;

    /// Calls `visit` for every key of the range that existed at `at`, in key order, until it breaks.
    fn visit(
        &self,
        range: &KeyRange,
        at: Revision,
        visit: &mut Visit<'_>,
    ) -> Result<(), StoreError>;

    /// Fetches the value of an entry of this view.
    fn load(&self, key: &[u8], entry: &Entry) -> Result<KeyValue, StoreError>;

    /// One lease.
    fn lease(&self, id: LeaseId) -> Result<Option<LeaseRecord>, StoreError>;

    /// The revision a request means: 0 and below is the newest.
    fn resolve(&self, wanted: i64) -> Result<Revision, RevisionError> {
        if wanted <= 0 {
            return Ok(self.revision());
        }
        if self.revision().get() < wanted {
            return Err(RevisionError::Future);
        }
        if wanted < self.compacted_raw() {
            return Err(RevisionError::Compacted(Revision::new(self.compacted_raw())));
        }
        Ok(Revision::new(wanted))
    }

    /// One key and its value; `at` is `None` for the newest.
    fn get(&self, key: &[u8], at: Option<Revision>) -> Result<Option<KeyValue>, StoreError> {
        match self.entry(key, at.unwrap_or(self.revision()))? {
            Some(entry) => self.load(key, &entry).map(Some),
            None => Ok(None),
        }
    }

    /// Key-values in key order, at most `limit` of them, and the count of all.
    fn scan(
        &self,
        range: &KeyRange,
        at: Revision,
        limit: Option<usize>,
    ) -> Result<Scan, StoreError> {
        let mut scan = Scan::default();
        self.visit(range, at, &mut |key, entry| {
            if limit.is_none_or(|limit| scan.kvs.len() < limit) {
                scan.kvs.push(self.load(key, entry)?);
            }
            scan.count += 1;
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(scan)
    }
}

/// The two tables, borrowed from a read or a write transaction.
pub(super) struct Keys<'a, C, R> {
    pub(super) cur: &'a C,
    pub(super) rev: &'a R,
    pub(super) compacted: i64,
}

impl<C, R> Keys<'_, C, R>
where
    C: ReadableTable<Slice, Slice>,
    R: ReadableTable<RevKey, Slice>,
{
    /// The newest change of a key, tombstones included.
    pub(super) fn newest(&self, key: &[u8]) -> Result<Option<CurRecord>, StoreError> {
        match self.cur.get(key)? {
            Some(bytes) => CurRecord::decode(key, bytes.value()).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn entry(&self, key: &[u8], at: Revision) -> Result<Option<Entry>, StoreError> {
        match self.newest(key)? {
            Some(newest) => self.back_to(key, &newest, at),
            None => Ok(None),
        }
    }

    /// Follows a key back from its newest change to what it was at `at`.
    fn back_to(
        &self,
        key: &[u8],
        newest: &CurRecord,
        at: Revision,
    ) -> Result<Option<Entry>, StoreError> {
        if newest.at.main <= at.get() {
            return Ok((!newest.tombstone).then_some(Entry {
                at: newest.at,
                create: newest.create,
                version: newest.version,
                lease: newest.lease,
            }));
        }
        let mut newer = self.link(key, newest.at)?.ok_or_else(|| missing(key, newest.at))?;
        loop {
            let Some(previous) = newer.previous else {
                return Ok(None);
            };
            if newer.entry.at <= previous {
                return Err(damaged(key, newer.entry.at, "its link does not lead back"));
            }
            let Some(older) = self.link(key, previous)? else {
                if newer.begins_generation && previous.main <= self.compacted {
                    return Ok(None);
                }
                return Err(missing(key, previous));
            };
            if previous.main <= at.get() {
                return Ok((!older.tombstone).then_some(older.entry));
            }
            newer = older;
        }
    }

    pub(super) fn visit(
        &self,
        range: &KeyRange,
        at: Revision,
        visit: &mut Visit<'_>,
    ) -> Result<(), StoreError> {
        let bounds: (Bound<&[u8]>, Bound<&[u8]>) = match range {
            KeyRange::One(key) => {
                if let Some(entry) = self.entry(key, at)? {
                    let _: ControlFlow<()> = visit(key, &entry)?;
                }
                return Ok(());
            }
            KeyRange::Span(start, end) if end <= start => return Ok(()),
            KeyRange::Span(start, end) => (Bound::Included(start), Bound::Excluded(end)),
            KeyRange::From(start) => (Bound::Included(start), Bound::Unbounded),
        };
        for item in self.cur.range::<&[u8]>(bounds)? {
            let (key, bytes) = item?;
            let newest = CurRecord::decode(key.value(), bytes.value())?;
            if let Some(entry) = self.back_to(key.value(), &newest, at)?
                && visit(key.value(), &entry)?.is_break()
            {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn load(&self, key: &[u8], entry: &Entry) -> Result<KeyValue, StoreError> {
        let bytes = self.rev.get(&entry.at.to_key())?.ok_or_else(|| missing(key, entry.at))?;
        let record = RevRecord::decode(entry.at, bytes.value())?;
        let found = (record.key, record.tombstone, record.create, record.version, record.lease);
        if found != (key, false, entry.create, entry.version, entry.lease) {
            return Err(damaged(key, entry.at, "tables `cur` and `rev` disagree"));
        }
        Ok(key_value(entry.at.main, &record))
    }

    /// The state of a key before its change in `revision`, if compaction has left it.
    pub(super) fn before(
        &self,
        key: &[u8],
        revision: Revision,
    ) -> Result<Option<KeyValue>, StoreError> {
        let main = revision.get();
        let bounds = Position::new(main, 0).to_key()..=Position::new(main, u32::MAX).to_key();
        for item in self.rev.range::<&[u8; POSITION_BYTES]>(&bounds.start()..=&bounds.end())? {
            let (at, bytes) = item?;
            let record = RevRecord::decode(Position::from_key(at.value()), bytes.value())?;
            if record.key == key {
                return match record.previous {
                    Some(previous) if !record.begins_generation() => self.live(key, previous),
                    Some(_) | None => Ok(None),
                };
            }
        }
        Ok(None)
    }

    fn live(&self, key: &[u8], at: Position) -> Result<Option<KeyValue>, StoreError> {
        let Some(bytes) = self.rev.get(&at.to_key())? else {
            return if at.main <= self.compacted { Ok(None) } else { Err(missing(key, at)) };
        };
        let record = RevRecord::decode(at, bytes.value())?;
        if record.key != key {
            return Err(damaged(key, at, "the record belongs to another key"));
        }
        Ok((!record.tombstone).then(|| key_value(at.main, &record)))
    }

    /// What a walk back needs of one record.
    fn link(&self, key: &[u8], at: Position) -> Result<Option<Link>, StoreError> {
        let Some(bytes) = self.rev.get(&at.to_key())? else {
            return Ok(None);
        };
        let record = RevRecord::decode(at, bytes.value())?;
        if record.key != key {
            return Err(damaged(key, at, "the record belongs to another key"));
        }
        Ok(Some(Link {
            entry: Entry {
                at,
                create: record.create,
                version: record.version,
                lease: record.lease,
            },
            tombstone: record.tombstone,
            previous: record.previous,
            begins_generation: record.begins_generation(),
        }))
    }
}

struct Link {
    entry: Entry,
    tombstone: bool,
    previous: Option<Position>,
    begins_generation: bool,
}

/// Copies a record out of its page.
pub(super) fn key_value(main: i64, record: &RevRecord<'_>) -> KeyValue {
    KeyValue {
        key: Bytes::copy_from_slice(record.key),
        create_revision: record.create,
        mod_revision: main,
        version: record.version,
        value: Bytes::copy_from_slice(record.value),
        lease: record.lease,
    }
}

/// One lease, from the table of any transaction.
pub(super) fn lease(
    table: &impl ReadableTable<Slice, Slice>,
    id: LeaseId,
) -> Result<Option<LeaseRecord>, StoreError> {
    let key = lease_key(id.get());
    let Some(bytes) = table.get(key.as_slice())? else {
        return Ok(None);
    };
    let value = LeaseValue::decode(&key, bytes.value())?;
    Ok(Some(LeaseRecord { id, ttl_secs: value.ttl_secs, remaining_secs: value.remaining_secs }))
}

fn missing(key: &[u8], at: Position) -> StoreError {
    damaged(key, at, "the record is missing")
}

fn damaged(key: &[u8], at: Position, what: &str) -> StoreError {
    StoreError::damaged(
        Table::Rev.name(),
        format!("revision {}.{} of key {}: {what}", at.main, at.sub, key.escape_ascii()),
    )
}

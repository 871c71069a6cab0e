//! Serves reads from one consistent moment of the store.

use std::sync::Arc;

use bytes::Bytes;
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, ReadableTableMetadata, TableDefinition};

use crate::proto::mvccpb::{Event, KeyValue, event::EventType};
use crate::types::{ClusterId, LeaseId, LogId, LogIndex, NodeId, Revision};

use super::engine::Engine;
use super::format::{
    self, HEAD_KEY, Head, LeaseValue, MEMBERSHIP_KEY, POSITION_BYTES, Position, RevRecord, Table,
};
use super::marks;
use super::view::{self, Entry, Keys, RevKey, Slice, View, Visit};
use super::{Counts, KeyRange, LeaseRecord, RevisionEvents, StoreError};

pub(super) const REV: TableDefinition<'static, RevKey, Slice> = TableDefinition::new("rev");
pub(super) const CUR: TableDefinition<'static, Slice, Slice> = TableDefinition::new("cur");
pub(super) const LEASE: TableDefinition<'static, Slice, Slice> = TableDefinition::new("lease");
pub(super) const LEASE_KEY: TableDefinition<'static, Slice, Slice> =
    TableDefinition::new("lease_key");
pub(super) const META: TableDefinition<'static, Slice, Slice> = TableDefinition::new("meta");

/// One consistent moment of the store. Later writes do not show, not even a defragmentation or a restore.
pub struct ReadTxn {
    head: Head,
    pub(super) cur: ReadOnlyTable<Slice, Slice>,
    pub(super) rev: ReadOnlyTable<RevKey, Slice>,
    pub(super) meta: ReadOnlyTable<Slice, Slice>,
    pub(super) txn: ReadTransaction,
    /// Last, because closing the file makes open transactions useless.
    engine: Arc<Engine>,
}

impl std::fmt::Debug for ReadTxn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadTxn").field("head", &self.head).finish_non_exhaustive()
    }
}

impl ReadTxn {
    pub(super) fn begin(engine: Arc<Engine>) -> Result<Self, StoreError> {
        let txn = engine.begin_read()?;
        let meta = txn.open_table(META)?;
        let head = read_head(&meta)?;
        Ok(Self { head, cur: txn.open_table(CUR)?, rev: txn.open_table(REV)?, meta, txn, engine })
    }

    pub(super) fn keys(
        &self,
    ) -> Keys<'_, ReadOnlyTable<Slice, Slice>, ReadOnlyTable<RevKey, Slice>> {
        Keys { cur: &self.cur, rev: &self.rev, compacted: self.head.compacted }
    }

    /// Runs a read. Damage that it meets is told to whoever awaits [`super::Store::failed`].
    pub(super) fn checked<T>(
        &self,
        read: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.engine.noted(read())
    }

    /// The newest revision.
    pub const fn revision(&self) -> Revision {
        Revision::new(self.head.revision)
    }

    /// The last compacted revision; history below it is gone. 0 before the first compaction.
    pub fn compacted(&self) -> Revision {
        Revision::new(self.head.compacted.max(0))
    }

    /// One key at a revision (`None`: the newest).
    pub fn get(&self, key: &[u8], at: Option<Revision>) -> Result<Option<KeyValue>, StoreError> {
        View::get(self, key, at)
    }

    /// The previous version of what was written to `key` at `revision`, if it is still there: for `prev_kv`.
    pub fn previous(&self, key: &[u8], revision: Revision) -> Result<Option<KeyValue>, StoreError> {
        if revision.get() <= self.head.compacted {
            return Ok(None);
        }
        self.checked(|| self.keys().before(key, revision))
    }

    /// Events from `from` on, oldest first, whole revisions, until about `bytes_max` were read (always at
    /// least one revision if there is one). For watchers that start in the past or fell behind.
    ///
    /// The second value: every revision below or equal to it was looked at. Whether `from` is compacted is
    /// for the caller to ask first; what is gone is simply not in the answer.
    pub fn events(
        &self,
        from: Revision,
        range: Option<&KeyRange>,
        bytes_max: usize,
    ) -> Result<(Vec<RevisionEvents>, Revision), StoreError> {
        self.checked(|| self.read_events(from, range, bytes_max))
    }

    fn read_events(
        &self,
        from: Revision,
        range: Option<&KeyRange>,
        bytes_max: usize,
    ) -> Result<(Vec<RevisionEvents>, Revision), StoreError> {
        let start = Position::new(from.get().max(0), 0).to_key();
        let mut found: Vec<RevisionEvents> = Vec::new();
        let (mut bytes_read, mut looked_at) = (0_usize, None);
        for item in self.rev.range::<&[u8; POSITION_BYTES]>(&start..)? {
            let (key, bytes) = item?;
            let at = Position::from_key(key.value());
            if looked_at.is_some_and(|main| main < at.main) && bytes_max <= bytes_read {
                return Ok((found, Revision::new(looked_at.unwrap_or(at.main))));
            }
            looked_at = Some(at.main);
            bytes_read = bytes_read.saturating_add(bytes.value().len());
            let record = RevRecord::decode(at, bytes.value())?;
            if range.is_none_or(|range| range.contains(record.key)) {
                let event = event(at, &record);
                match found.last_mut() {
                    Some(last) if last.revision.get() == at.main => last.events.push(event),
                    Some(_) | None => found.push(RevisionEvents {
                        revision: Revision::new(at.main),
                        events: vec![event],
                    }),
                }
            }
        }
        Ok((found, self.revision()))
    }

    /// One lease.
    pub fn lease(&self, id: LeaseId) -> Result<Option<LeaseRecord>, StoreError> {
        self.checked(|| view::lease(&self.txn.open_table(LEASE)?, id))
    }

    /// All leases, by id.
    pub fn leases(&self) -> Result<Vec<LeaseRecord>, StoreError> {
        self.checked(|| self.read_leases())
    }

    fn read_leases(&self) -> Result<Vec<LeaseRecord>, StoreError> {
        let mut leases = Vec::new();
        for item in self.txn.open_table(LEASE)?.iter()? {
            let (key, bytes) = item?;
            let id: [u8; 8] = key.value().try_into().map_err(|_| {
                StoreError::damaged(Table::Lease.name(), "a key is not eight bytes long")
            })?;
            let value = LeaseValue::decode(&id, bytes.value())?;
            leases.push(LeaseRecord {
                id: LeaseId::new(i64::from_be_bytes(id)),
                ttl_secs: value.ttl_secs,
                remaining_secs: value.remaining_secs,
            });
        }
        Ok(leases)
    }

    /// Keys attached to a lease, sorted.
    pub fn lease_keys(&self, id: LeaseId) -> Result<Vec<Bytes>, StoreError> {
        self.checked(|| lease_keys(&self.txn.open_table(LEASE_KEY)?, id))
    }

    /// Alarms: (member, etcd's alarm type).
    pub fn alarms(&self) -> Result<Vec<(NodeId, i32)>, StoreError> {
        self.checked(|| alarms(&self.meta))
    }

    /// What [`super::WriteTxn::set_membership`] stored.
    pub fn membership(&self) -> Result<Option<Bytes>, StoreError> {
        self.checked(|| membership(&self.meta))
    }

    /// What [`super::WriteTxn::set_record`] stored under a name.
    pub fn record(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        self.checked(|| record(&self.meta, name))
    }

    /// All records whose names start with `prefix`, in the order of their names.
    pub fn records(&self, prefix: &str) -> Result<Vec<(String, Bytes)>, StoreError> {
        self.checked(|| {
            let start = format::record_key(prefix);
            let mut found = Vec::new();
            for item in self.meta.range::<&[u8]>(start.as_slice()..)? {
                let (key, bytes) = item?;
                let Some(rest) = key.value().strip_prefix(start.as_slice()) else { break };
                let blob = format::decode_plain(Table::Meta, key.value(), bytes.value())?;
                let name = format!("{prefix}{}", String::from_utf8_lossy(rest));
                found.push((name, Bytes::copy_from_slice(blob)));
            }
            Ok(found)
        })
    }

    /// The last applied entry.
    pub const fn applied(&self) -> Option<LogId> {
        self.head.applied
    }

    /// How much there is. Read from the tables' roots, so it costs nothing to speak of.
    pub fn counts(&self) -> Result<Counts, StoreError> {
        self.checked(|| Ok(Counts { keys: self.cur.len()?, changes: self.rev.len()? }))
    }

    /// The revision after an entry that has been applied; of the last 262,144 entries.
    pub fn revision_after(&self, index: LogIndex) -> Result<Option<Revision>, StoreError> {
        self.checked(|| marks::revision_after(&self.meta, index))
    }

    /// The cluster this state belongs to.
    pub const fn cluster_id(&self) -> Option<ClusterId> {
        self.head.cluster
    }
}

impl View for ReadTxn {
    fn revision(&self) -> Revision {
        Self::revision(self)
    }

    fn compacted_raw(&self) -> i64 {
        self.head.compacted
    }

    fn entry(&self, key: &[u8], at: Revision) -> Result<Option<Entry>, StoreError> {
        self.checked(|| self.keys().entry(key, at))
    }

    fn visit(
        &self,
        range: &KeyRange,
        at: Revision,
        visit: &mut Visit<'_>,
    ) -> Result<(), StoreError> {
        self.checked(|| self.keys().visit(range, at, visit))
    }

    fn load(&self, key: &[u8], entry: &Entry) -> Result<KeyValue, StoreError> {
        self.checked(|| self.keys().load(key, entry))
    }

    fn lease(&self, id: LeaseId) -> Result<Option<LeaseRecord>, StoreError> {
        Self::lease(self, id)
    }
}

pub(super) fn membership(
    meta: &impl ReadableTable<Slice, Slice>,
) -> Result<Option<Bytes>, StoreError> {
    let Some(bytes) = meta.get(MEMBERSHIP_KEY)? else {
        return Ok(None);
    };
    let blob = format::decode_plain(Table::Meta, MEMBERSHIP_KEY, bytes.value())?;
    Ok(Some(Bytes::copy_from_slice(blob)))
}

pub(super) fn record(
    meta: &impl ReadableTable<Slice, Slice>,
    name: &str,
) -> Result<Option<Bytes>, StoreError> {
    let key = format::record_key(name);
    let Some(bytes) = meta.get(key.as_slice())? else {
        return Ok(None);
    };
    let blob = format::decode_plain(Table::Meta, &key, bytes.value())?;
    Ok(Some(Bytes::copy_from_slice(blob)))
}

pub(super) fn read_head(meta: &impl ReadableTable<Slice, Slice>) -> Result<Head, StoreError> {
    match meta.get(HEAD_KEY)? {
        Some(bytes) => Head::decode(bytes.value()),
        None => Err(StoreError::damaged(Table::Meta.name(), "record head is missing")),
    }
}

/// Keys attached to a lease, from the table of any transaction.
pub(super) fn lease_keys(
    table: &impl ReadableTable<Slice, Slice>,
    id: LeaseId,
) -> Result<Vec<Bytes>, StoreError> {
    let prefix = format::lease_key(id.get());
    let mut keys = Vec::new();
    for item in table.range::<&[u8]>(prefix.as_slice()..)? {
        let (key, bytes) = item?;
        let Some(attached) = key.value().strip_prefix(&prefix) else {
            break;
        };
        format::decode_plain(Table::LeaseKey, key.value(), bytes.value())?;
        keys.push(Bytes::copy_from_slice(attached));
    }
    Ok(keys)
}

/// Raised alarms, from the table of any transaction.
pub(super) fn alarms(
    meta: &impl ReadableTable<Slice, Slice>,
) -> Result<Vec<(NodeId, i32)>, StoreError> {
    let (start, end) = format::alarm_bounds();
    let mut alarms = Vec::new();
    for item in meta.range::<&[u8]>(start.as_slice()..end.as_slice())? {
        let (key, bytes) = item?;
        format::decode_plain(Table::Meta, key.value(), bytes.value())?;
        match format::alarm_from_key(key.value()) {
            Some(alarm) => alarms.push(alarm),
            None => return Err(StoreError::damaged(Table::Meta.name(), "an alarm's key is cut")),
        }
    }
    Ok(alarms)
}

/// The event a record stands for: a deletion carries only its key and revision.
pub(super) fn event(at: Position, record: &RevRecord<'_>) -> Event {
    let kind = if record.tombstone { EventType::Delete } else { EventType::Put };
    Event { r#type: kind.into(), kv: Some(view::key_value(at.main, record)), prev_kv: None }
}

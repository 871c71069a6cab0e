//! Changes the store: the one writer, holding its tables open for a whole batch of commands.
//!
//! A command's changes gather under the next revision and can be read back at once; [`WriteTxn::end_revision`]
//! closes the revision and hands out its events.
//!
//! # Invariants
//!
//! - A command without changes does not make a revision.
//! - A key hangs on at most one lease, and only while it exists.

use std::ops::ControlFlow;

use bytes::Bytes;
use redb::{Table as RedbTable, WriteTransaction};

use crate::proto::mvccpb::{Event, KeyValue, event::EventType};
use crate::types::{ClusterId, LeaseId, LogId, NodeId, Revision};

use super::format::{
    self, CurRecord, FORMAT_KEY, HEAD_KEY, Head, LeaseValue, MEMBERSHIP_KEY, POSITION_BYTES,
    Position, RevRecord, Table,
};
use super::marks::Marks;
use super::read::{self, CUR, LEASE, LEASE_KEY, META, REV};
use super::view::{self, Entry, Keys, RevKey, Slice, View, Visit};
use super::{KeyRange, LeaseRecord, RevisionEvents, StoreError};

/// The one writer. What it did is committed as a whole when its closure succeeds, and undone when it fails.
pub struct WriteTxn<'txn> {
    pub(super) head: Head,
    pub(super) cur: RedbTable<'txn, Slice, Slice>,
    pub(super) rev: RedbTable<'txn, RevKey, Slice>,
    pub(super) lease: RedbTable<'txn, Slice, Slice>,
    pub(super) lease_key: RedbTable<'txn, Slice, Slice>,
    pub(super) meta: RedbTable<'txn, Slice, Slice>,
    alarms: Vec<(NodeId, i32)>,
    marks: Marks,
    /// Of the revision that is being made.
    changes: Vec<Event>,
}

impl std::fmt::Debug for WriteTxn<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteTxn").field("head", &self.head).finish_non_exhaustive()
    }
}

/// Opens the tables of a founded file.
pub(super) fn begin(txn: &WriteTransaction) -> Result<WriteTxn<'_>, StoreError> {
    let meta = txn.open_table(META)?;
    let head = read::read_head(&meta)?;
    let alarms = read::alarms(&meta)?;
    WriteTxn::with(txn, meta, head, alarms)
}

/// Makes the tables of a new file.
pub(super) fn found(txn: &WriteTransaction) -> Result<WriteTxn<'_>, StoreError> {
    let mut meta = txn.open_table(META)?;
    let version = format::encode_file_version(format::FILE_VERSION);
    meta.insert(FORMAT_KEY, version.as_slice())?;
    WriteTxn::with(txn, meta, Head::default(), Vec::new())
}

impl<'txn> WriteTxn<'txn> {
    fn with(
        txn: &'txn WriteTransaction,
        meta: RedbTable<'txn, Slice, Slice>,
        head: Head,
        alarms: Vec<(NodeId, i32)>,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            head,
            cur: txn.open_table(CUR)?,
            rev: txn.open_table(REV)?,
            lease: txn.open_table(LEASE)?,
            lease_key: txn.open_table(LEASE_KEY)?,
            meta,
            alarms,
            marks: Marks::new(head.revision),
            changes: Vec::new(),
        })
    }

    /// Writes down how far this batch has come. The last thing before the commit.
    pub(super) fn finish(mut self) -> Result<Head, StoreError> {
        assert!(self.changes.is_empty(), "a command's revision was never ended");
        self.marks.store(&mut self.meta)?;
        self.meta.insert(HEAD_KEY, self.head.encode().as_slice())?;
        Ok(self.head)
    }

    pub(super) fn keys(
        &self,
    ) -> Keys<'_, RedbTable<'txn, Slice, Slice>, RedbTable<'txn, RevKey, Slice>> {
        Keys { cur: &self.cur, rev: &self.rev, compacted: self.head.compacted }
    }

    /// Whether the command under way has changed a key yet.
    pub fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Writes a key, on a lease that exists (or 0 for none). Detaches it from any other lease.
    pub fn put(&mut self, key: &Bytes, value: &Bytes, lease: i64) -> Result<(), StoreError> {
        let old = self.keys().newest(key)?;
        let at = self.next_position();
        let living = old.filter(|old| !old.tombstone);
        let new = CurRecord {
            at,
            tombstone: false,
            create: living.map_or(at.main, |old| old.create),
            version: living.map_or(1, |old| old.version.saturating_add(1)),
            lease,
        };
        self.write(key, value, &new, old)?;
        let detached = living.map_or(0, |old| old.lease);
        if detached != lease {
            self.detach(detached, key)?;
            self.attach(lease, key)?;
        }
        self.changes.push(Event {
            r#type: EventType::Put.into(),
            kv: Some(KeyValue {
                key: key.clone(),
                create_revision: new.create,
                mod_revision: at.main,
                version: new.version,
                value: value.clone(),
                lease,
            }),
            prev_kv: None,
        });
        Ok(())
    }

    /// Deletes every key of the range, in key order, and says how many there were.
    pub fn delete_range(&mut self, range: &KeyRange) -> Result<u64, StoreError> {
        let mut doomed = Vec::new();
        View::visit(self, range, View::revision(self), &mut |key, _| {
            doomed.push(Bytes::copy_from_slice(key));
            Ok(ControlFlow::Continue(()))
        })?;
        for key in &doomed {
            self.delete(key)?;
        }
        Ok(doomed.len() as u64)
    }

    fn delete(&mut self, key: &Bytes) -> Result<(), StoreError> {
        let Some(old) = self.keys().newest(key)?.filter(|old| !old.tombstone) else {
            return Ok(());
        };
        let at = self.next_position();
        let new = CurRecord { at, tombstone: true, create: 0, version: 0, lease: 0 };
        self.write(key, &[], &new, Some(old))?;
        self.detach(old.lease, key)?;
        self.changes.push(Event {
            r#type: EventType::Delete.into(),
            kv: Some(KeyValue { key: key.clone(), mod_revision: at.main, ..Default::default() }),
            prev_kv: None,
        });
        Ok(())
    }

    /// Ends the command's revision. `None` if it changed no key.
    pub fn end_revision(&mut self) -> Option<RevisionEvents> {
        if self.changes.is_empty() {
            return None;
        }
        self.head.revision += 1;
        let events = std::mem::take(&mut self.changes);
        Some(RevisionEvents { revision: Revision::new(self.head.revision), events })
    }

    /// Stores a lease that does not exist yet, or replaces what is known of it.
    pub fn set_lease(&mut self, lease: &LeaseRecord) -> Result<(), StoreError> {
        let key = format::lease_key(lease.id.get());
        let value = LeaseValue { ttl_secs: lease.ttl_secs, remaining_secs: lease.remaining_secs };
        self.lease.insert(key.as_slice(), value.encode(&key).as_slice())?;
        Ok(())
    }

    /// Removes a lease and deletes the keys on it, in key order.
    pub fn revoke_lease(&mut self, id: LeaseId) -> Result<(), StoreError> {
        for key in read::lease_keys(&self.lease_key, id)? {
            self.delete(&key)?;
        }
        self.lease.remove(format::lease_key(id.get()).as_slice())?;
        Ok(())
    }

    /// Alarms: (member, etcd's alarm type).
    pub fn alarms(&self) -> &[(NodeId, i32)] {
        &self.alarms
    }

    /// Raises an alarm. Raising it twice is raising it once.
    pub fn raise_alarm(&mut self, member: NodeId, kind: i32) -> Result<(), StoreError> {
        if !self.alarms.contains(&(member, kind)) {
            let key = format::alarm_key(member, kind);
            let record = format::encode_plain(Table::Meta, &key, &[]);
            self.meta.insert(key.as_slice(), record.as_slice())?;
            self.alarms = read::alarms(&self.meta)?;
        }
        Ok(())
    }

    /// Clears an alarm and says whether it was raised.
    pub fn clear_alarm(&mut self, member: NodeId, kind: i32) -> Result<bool, StoreError> {
        let raised = self.meta.remove(format::alarm_key(member, kind).as_slice())?.is_some();
        self.alarms.retain(|alarm| *alarm != (member, kind));
        Ok(raised)
    }

    /// Remembers the last applied entry: it stands or falls with the changes it made.
    pub fn set_applied(&mut self, id: LogId) {
        self.head.applied = Some(id);
        self.marks.note(id.index, self.head.revision);
    }

    /// The last applied entry.
    pub const fn applied(&self) -> Option<LogId> {
        self.head.applied
    }

    /// Names the cluster this state belongs to.
    pub const fn set_cluster_id(&mut self, id: ClusterId) {
        self.head.cluster = Some(id);
    }

    /// Keeps the raft layer's membership with the state it belongs to. The bytes mean nothing here.
    pub fn set_membership(&mut self, blob: &[u8]) -> Result<(), StoreError> {
        let record = format::encode_plain(Table::Meta, MEMBERSHIP_KEY, blob);
        self.meta.insert(MEMBERSHIP_KEY, record.as_slice())?;
        Ok(())
    }

    /// What [`Self::set_membership`] stored.
    pub fn membership(&self) -> Result<Option<Bytes>, StoreError> {
        read::membership(&self.meta)
    }

    /// Keeps a record of the cluster about itself. The bytes mean nothing here.
    pub fn set_record(&mut self, name: &str, blob: &[u8]) -> Result<(), StoreError> {
        let key = format::record_key(name);
        let record = format::encode_plain(Table::Meta, &key, blob);
        self.meta.insert(key.as_slice(), record.as_slice())?;
        Ok(())
    }

    /// What [`Self::set_record`] stored under a name.
    pub fn record(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        read::record(&self.meta, name)
    }

    fn next_position(&self) -> Position {
        let Ok(sub) = u32::try_from(self.changes.len()) else {
            unreachable!("a command is far smaller than four thousand million changes")
        };
        Position::new(self.head.revision + 1, sub)
    }

    /// Writes a change into both tables.
    fn write(
        &mut self,
        key: &[u8],
        value: &[u8],
        new: &CurRecord,
        old: Option<CurRecord>,
    ) -> Result<(), StoreError> {
        let record = RevRecord {
            tombstone: new.tombstone,
            previous: old.map(|old| old.at),
            create: new.create,
            version: new.version,
            lease: new.lease,
            key,
            value,
        };
        let len = record.encoded_len();
        let mut page = self.rev.insert_reserve(&new.at.to_key(), len)?;
        record.encode(new.at, page.as_mut());
        drop(page);
        self.cur.insert(key, new.encode(key).as_slice())?;
        self.grow(POSITION_BYTES + len);
        if old.is_none() {
            self.grow(key.len() + CurRecord::ENCODED_LEN);
        }
        Ok(())
    }

    fn attach(&mut self, lease: i64, key: &[u8]) -> Result<(), StoreError> {
        if lease != 0 {
            let attachment = format::attachment_key(lease, key);
            let record = format::encode_plain(Table::LeaseKey, &attachment, &[]);
            self.lease_key.insert(attachment.as_slice(), record.as_slice())?;
            self.grow(attachment.len() + record.len());
        }
        Ok(())
    }

    fn detach(&mut self, lease: i64, key: &[u8]) -> Result<(), StoreError> {
        if lease != 0 {
            let attachment = format::attachment_key(lease, key);
            let removed = self.lease_key.remove(attachment.as_slice())?;
            let Some(len) = removed.map(|record| record.value().len()) else {
                let what = format!("key {} does not hang on its lease", key.escape_ascii());
                return Err(StoreError::damaged(Table::LeaseKey.name(), what));
            };
            self.shrink(attachment.len() + len);
        }
        Ok(())
    }

    pub(super) const fn grow(&mut self, bytes: usize) {
        self.head.bytes = self.head.bytes.saturating_add(bytes as u64);
    }

    pub(super) const fn shrink(&mut self, bytes: usize) {
        self.head.bytes = self.head.bytes.saturating_sub(bytes as u64);
    }
}

impl View for WriteTxn<'_> {
    /// Counts the command under way, once it has changed something.
    fn revision(&self) -> Revision {
        Revision::new(self.head.revision + i64::from(!self.changes.is_empty()))
    }

    fn compacted_raw(&self) -> i64 {
        self.head.compacted
    }

    fn entry(&self, key: &[u8], at: Revision) -> Result<Option<Entry>, StoreError> {
        self.keys().entry(key, at)
    }

    fn visit(
        &self,
        range: &KeyRange,
        at: Revision,
        visit: &mut Visit<'_>,
    ) -> Result<(), StoreError> {
        self.keys().visit(range, at, visit)
    }

    fn load(&self, key: &[u8], entry: &Entry) -> Result<KeyValue, StoreError> {
        self.keys().load(key, entry)
    }

    fn lease(&self, id: LeaseId) -> Result<Option<LeaseRecord>, StoreError> {
        view::lease(&self.lease, id)
    }
}

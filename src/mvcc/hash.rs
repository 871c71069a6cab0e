//! Sums the store up in one number, so that members can be compared.
//!
//! Two sums. [`ReadTxn::hash_kv`] is etcd's own HashKV, byte for byte: the history of keys between compaction and
//! a revision, comparable between members that stand at different revisions. [`ReadTxn::state_hash`] is every
//! record of every table: comparable between members that applied the same entry.

use prost::Message;
use sha2::{Digest, Sha256};

use crate::proto::mvccpb::KeyValue;
use crate::types::Revision;

use super::format::{POSITION_BYTES, Position, RevRecord, Table};
use super::view;
use super::{ReadTxn, RevisionError, StoreError, View};

/// What [`ReadTxn::hash_kv`] answers: the hash, the compacted revision (-1 before the first compaction, as
/// etcd says), and the revision hashed.
pub type KvHash = (u32, Revision, Revision);

/// A sum over everything that is replicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateHash(pub [u8; 32]);

impl std::fmt::Display for StateHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Sums up records in the order of the tables and of their keys.
#[derive(Debug, Default)]
pub(super) struct StateHasher(Sha256);

impl StateHasher {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn record(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.0.update([table.tag()]);
        self.0.update((key.len() as u64).to_le_bytes());
        self.0.update(key);
        self.0.update((value.len() as u64).to_le_bytes());
        self.0.update(value);
    }

    pub(super) fn finish(self) -> StateHash {
        StateHash(self.0.finalize().into())
    }
}

/// Between the halves of a revision in etcd's own keys.
const ETCD_SEPARATOR: u8 = b'_';
/// Behind a tombstone's revision in etcd's own keys.
const ETCD_TOMBSTONE: u8 = b't';
/// The name of etcd's bucket, with which its hash begins.
const ETCD_BUCKET: &[u8] = b"key";

impl ReadTxn {
    /// etcd's HashKV up to a revision (`None`: the newest).
    ///
    /// Equal on two members when compacted revision and hashed revision are equal. To compare at a compaction,
    /// hash a reader opened before it: compaction takes nothing from a reader that is there already.
    pub fn hash_kv(
        &self,
        at: Option<Revision>,
    ) -> Result<Result<KvHash, RevisionError>, StoreError> {
        self.checked(|| self.read_hash_kv(at))
    }

    fn read_hash_kv(
        &self,
        at: Option<Revision>,
    ) -> Result<Result<KvHash, RevisionError>, StoreError> {
        let upto = match self.resolve(at.map_or(0, Revision::get)) {
            Ok(upto) => upto,
            Err(error) => return Ok(Err(error)),
        };
        let compacted = self.compacted_raw();
        let end = Position::new(upto.get(), u32::MAX).to_key();
        let mut crc = crc32c::crc32c(ETCD_BUCKET);
        let mut buffer = Vec::new();
        for item in self.rev.range::<&[u8; POSITION_BYTES]>(..=&end)? {
            let (key, bytes) = item?;
            let position = Position::from_key(key.value());
            let record = RevRecord::decode(position, bytes.value())?;
            // A tombstone at the compacted revision stays for watchers, but etcd does not count it.
            if record.tombstone && position.main <= compacted {
                continue;
            }
            etcd_bytes(position, &record, &mut buffer);
            crc = crc32c::crc32c_append(crc, &buffer);
        }
        Ok(Ok((crc, Revision::new(compacted), upto)))
    }

    /// Every record of every table. Checks each on the way.
    pub fn state_hash(&self) -> Result<StateHash, StoreError> {
        let mut hasher = StateHasher::new();
        self.each_record(&mut |table, key, value| {
            hasher.record(table, key, value);
            Ok(())
        })?;
        Ok(hasher.finish())
    }
}

/// A change as etcd stores it: its key, then its value.
fn etcd_bytes(at: Position, record: &RevRecord<'_>, buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.extend_from_slice(&at.main.to_be_bytes());
    buffer.push(ETCD_SEPARATOR);
    buffer.extend_from_slice(&u64::from(at.sub).to_be_bytes());
    let kv = if record.tombstone {
        buffer.push(ETCD_TOMBSTONE);
        KeyValue { key: record.key.to_vec().into(), ..Default::default() }
    } else {
        view::key_value(at.main, record)
    };
    kv.encode_raw(buffer);
}

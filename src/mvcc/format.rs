//! Bytes of every record in the state file.
//!
//! A record is `version u8, crc u32, payload`. The CRC32C covers the table, the key and everything else of the
//! record, so that a page that ends up in the wrong place is noticed as surely as a flipped bit. Numbers are
//! little-endian in payloads and big-endian in keys, where order matters.
//!
//! | table | key | payload |
//! |---|---|---|
//! | `rev` | main u64, sub u32 | flags u8, previous main i64, previous sub u32, create i64, version i64, lease i64, key length u32, key, value |
//! | `cur` | the key | flags u8, main i64, sub u32, create i64, version i64, lease i64 |
//! | `lease` | id u64 | ttl i64, remaining i64 |
//! | `lease_key` | id u64, the key | nothing |
//! | `meta` | `head` | flags u8, term u64, leader u64, index u64, cluster u64, revision i64, compacted i64, bytes u64 |
//! | `meta` | `format` | version u32 |
//! | `meta` | `membership` | opaque |
//! | `meta` | `record/` name | opaque |
//! | `meta` | `alarm` member u64, kind i32 | nothing |
//! | `meta` | `mark` row modulo 4096 u64 | row u64, base revision i64, known u64, made u64: see `marks` |

use crate::types::{ClusterId, LogId, LogIndex, NodeId, Term};

use super::StoreError;

/// Version of the file as a whole: tables, keys and records.
pub(super) const FILE_VERSION: u32 = 1;

/// Version of a record's payload.
const RECORD_VERSION: u8 = 1;

/// Bytes before the payload.
pub(super) const HEADER_BYTES: usize = 5;

const TOMBSTONE: u8 = 1;
const HAS_APPLIED: u8 = 1;
const HAS_CLUSTER: u8 = 2;

/// Bytes of a `rev` payload before key and value.
const REV_FIXED: usize = 1 + 8 + 4 + 8 + 8 + 8 + 4;
const CUR_BYTES: usize = 1 + 8 + 4 + 8 + 8 + 8;
const HEAD_BYTES: usize = 1 + 8 * 7;

/// The tables. Numbers are part of every checksum and of the snapshot stream: never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Rev = 1,
    Cur = 2,
    Lease = 3,
    LeaseKey = 4,
    Meta = 5,
}

impl Table {
    pub(super) const ALL: [Self; 5] =
        [Self::Rev, Self::Cur, Self::Lease, Self::LeaseKey, Self::Meta];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Rev => "rev",
            Self::Cur => "cur",
            Self::Lease => "lease",
            Self::LeaseKey => "lease_key",
            Self::Meta => "meta",
        }
    }

    pub(super) const fn tag(self) -> u8 {
        self as u8
    }

    pub(super) fn from_tag(tag: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.tag() == tag)
    }
}

/// Where one change stands in history: the transaction, and its place in the transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The revision.
    pub main: i64,
    /// Which change of that revision, from 0.
    pub sub: u32,
}

/// Length of a `rev` key.
pub(super) const POSITION_BYTES: usize = 12;

impl Position {
    pub(super) const fn new(main: i64, sub: u32) -> Self {
        Self { main, sub }
    }

    pub(super) fn to_key(self) -> [u8; POSITION_BYTES] {
        let mut key = [0; POSITION_BYTES];
        key[..8].copy_from_slice(&self.main.to_be_bytes());
        key[8..].copy_from_slice(&self.sub.to_be_bytes());
        key
    }

    pub(super) fn from_key(key: &[u8; POSITION_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *key;
        Self {
            main: i64::from_be_bytes([a, b, c, d, e, f, g, h]),
            sub: u32::from_be_bytes([i, j, k, l]),
        }
    }
}

/// One change of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RevRecord<'a> {
    pub(super) tombstone: bool,
    /// The change of the same key before this one, whether or not it is still there.
    pub(super) previous: Option<Position>,
    pub(super) create: i64,
    pub(super) version: i64,
    pub(super) lease: i64,
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
}

impl RevRecord<'_> {
    /// Whether the key did not exist just before: what came earlier belongs to another life of it.
    pub(super) const fn begins_generation(&self) -> bool {
        !self.tombstone && self.version == 1
    }

    pub(super) const fn encoded_len(&self) -> usize {
        HEADER_BYTES + REV_FIXED + self.key.len() + self.value.len()
    }

    /// Fills `buffer`, which is exactly [`Self::encoded_len`] long.
    pub(super) fn encode(&self, at: Position, buffer: &mut [u8]) {
        let previous = self.previous.unwrap_or_default();
        let mut out = Cursor::after_header(buffer);
        out.put(&[if self.tombstone { TOMBSTONE } else { 0 }]);
        out.put(&previous.main.to_le_bytes());
        out.put(&previous.sub.to_le_bytes());
        out.put(&self.create.to_le_bytes());
        out.put(&self.version.to_le_bytes());
        out.put(&self.lease.to_le_bytes());
        out.put(&length(self.key).to_le_bytes());
        out.put(self.key);
        out.put(self.value);
        seal(Table::Rev, &at.to_key(), buffer);
    }

    pub(super) fn decode(at: Position, bytes: &[u8]) -> Result<RevRecord<'_>, StoreError> {
        let key = at.to_key();
        let mut payload = Payload::open(Table::Rev, &key, bytes)?;
        let flags = payload.u8()?;
        let previous = Position::new(payload.i64()?, payload.u32()?);
        let (create, version, lease) = (payload.i64()?, payload.i64()?, payload.i64()?);
        let key_len = payload.u32()? as usize;
        let key = payload.take(key_len)?;
        Ok(RevRecord {
            tombstone: flags & TOMBSTONE != 0,
            previous: (previous != Position::default()).then_some(previous),
            create,
            version,
            lease,
            key,
            value: payload.rest(),
        })
    }
}

/// The newest change of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CurRecord {
    pub(super) at: Position,
    pub(super) tombstone: bool,
    pub(super) create: i64,
    pub(super) version: i64,
    pub(super) lease: i64,
}

impl CurRecord {
    pub(super) const ENCODED_LEN: usize = HEADER_BYTES + CUR_BYTES;

    pub(super) fn encode(&self, key: &[u8]) -> [u8; Self::ENCODED_LEN] {
        let mut buffer = [0; Self::ENCODED_LEN];
        let mut out = Cursor::after_header(&mut buffer);
        out.put(&[if self.tombstone { TOMBSTONE } else { 0 }]);
        out.put(&self.at.main.to_le_bytes());
        out.put(&self.at.sub.to_le_bytes());
        out.put(&self.create.to_le_bytes());
        out.put(&self.version.to_le_bytes());
        out.put(&self.lease.to_le_bytes());
        seal(Table::Cur, key, &mut buffer);
        buffer
    }

    pub(super) fn decode(key: &[u8], bytes: &[u8]) -> Result<Self, StoreError> {
        let mut payload = Payload::open(Table::Cur, key, bytes)?;
        let record = Self {
            tombstone: payload.u8()? & TOMBSTONE != 0,
            at: Position::new(payload.i64()?, payload.u32()?),
            create: payload.i64()?,
            version: payload.i64()?,
            lease: payload.i64()?,
        };
        payload.end()?;
        Ok(record)
    }
}

/// A lease's granted and remaining seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeaseValue {
    pub(super) ttl_secs: i64,
    pub(super) remaining_secs: i64,
}

impl LeaseValue {
    pub(super) const ENCODED_LEN: usize = HEADER_BYTES + 16;

    pub(super) fn encode(self, key: &[u8; 8]) -> [u8; Self::ENCODED_LEN] {
        let mut buffer = [0; Self::ENCODED_LEN];
        let mut out = Cursor::after_header(&mut buffer);
        out.put(&self.ttl_secs.to_le_bytes());
        out.put(&self.remaining_secs.to_le_bytes());
        seal(Table::Lease, key, &mut buffer);
        buffer
    }

    pub(super) fn decode(key: &[u8], bytes: &[u8]) -> Result<Self, StoreError> {
        let mut payload = Payload::open(Table::Lease, key, bytes)?;
        let value = Self { ttl_secs: payload.i64()?, remaining_secs: payload.i64()? };
        payload.end()?;
        Ok(value)
    }
}

/// A lease's key: ids sort as unsigned numbers, which is what etcd's positive ids are.
pub(super) const fn lease_key(id: i64) -> [u8; 8] {
    id.to_be_bytes()
}

/// The key of "this key hangs on this lease".
pub(super) fn attachment_key(lease: i64, key: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + key.len());
    bytes.extend_from_slice(&lease_key(lease));
    bytes.extend_from_slice(key);
    bytes
}

/// What every commit writes: how far the state machine has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) applied: Option<LogId>,
    pub(super) cluster: Option<ClusterId>,
    /// The newest revision; 1 in an empty store, as in etcd.
    pub(super) revision: i64,
    /// The last compacted revision; -1 before the first compaction, as in etcd, where 0 can be compacted.
    pub(super) compacted: i64,
    /// Bytes of keys and records in `rev`, `cur` and `lease_key`.
    pub(super) bytes: u64,
}

pub(super) const NEVER_COMPACTED: i64 = -1;
pub(super) const HEAD_KEY: &[u8] = b"head";
pub(super) const FORMAT_KEY: &[u8] = b"format";
pub(super) const MEMBERSHIP_KEY: &[u8] = b"membership";
/// A record of the cluster about itself, under a name the layer above chose.
pub(super) fn record_key(name: &str) -> Vec<u8> {
    [RECORD_PREFIX, name.as_bytes()].concat()
}

pub(super) const RECORD_PREFIX: &[u8] = b"record/";
const ALARM_PREFIX: &[u8] = b"alarm";

impl Default for Head {
    fn default() -> Self {
        Self { applied: None, cluster: None, revision: 1, compacted: NEVER_COMPACTED, bytes: 0 }
    }
}

impl Head {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES + HEAD_BYTES] {
        let mut flags = 0;
        if self.applied.is_some() {
            flags |= HAS_APPLIED;
        }
        if self.cluster.is_some() {
            flags |= HAS_CLUSTER;
        }
        let applied = self.applied.unwrap_or_default();
        let mut buffer = [0; HEADER_BYTES + HEAD_BYTES];
        let mut out = Cursor::after_header(&mut buffer);
        out.put(&[flags]);
        out.put(&applied.term.get().to_le_bytes());
        out.put(&applied.leader.get().to_le_bytes());
        out.put(&applied.index.get().to_le_bytes());
        out.put(&self.cluster.unwrap_or_default().get().to_le_bytes());
        out.put(&self.revision.to_le_bytes());
        out.put(&self.compacted.to_le_bytes());
        out.put(&self.bytes.to_le_bytes());
        seal(Table::Meta, HEAD_KEY, &mut buffer);
        buffer
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        let mut payload = Payload::open(Table::Meta, HEAD_KEY, bytes)?;
        let flags = payload.u8()?;
        let applied = LogId {
            term: Term::new(payload.u64()?),
            leader: NodeId::new(payload.u64()?),
            index: LogIndex::new(payload.u64()?),
        };
        let cluster = ClusterId::new(payload.u64()?);
        let head = Self {
            applied: (flags & HAS_APPLIED != 0).then_some(applied),
            cluster: (flags & HAS_CLUSTER != 0).then_some(cluster),
            revision: payload.i64()?,
            compacted: payload.i64()?,
            bytes: payload.u64()?,
        };
        payload.end()?;
        Ok(head)
    }
}

pub(super) fn encode_file_version(version: u32) -> Vec<u8> {
    encode_plain(Table::Meta, FORMAT_KEY, &version.to_le_bytes())
}

pub(super) fn decode_file_version(bytes: &[u8]) -> Result<u32, StoreError> {
    let mut payload = Payload::open(Table::Meta, FORMAT_KEY, bytes)?;
    let version = payload.u32()?;
    payload.end()?;
    Ok(version)
}

pub(super) fn alarm_key(member: NodeId, kind: i32) -> Vec<u8> {
    let mut key = ALARM_PREFIX.to_vec();
    key.extend_from_slice(&member.get().to_be_bytes());
    key.extend_from_slice(&kind.to_be_bytes());
    key
}

/// The alarm a `meta` key stands for, if it stands for one.
pub(super) fn alarm_from_key(key: &[u8]) -> Option<(NodeId, i32)> {
    let rest = key.strip_prefix(ALARM_PREFIX)?;
    let (member, kind) = rest.split_at_checked(8)?;
    Some((
        NodeId::new(u64::from_be_bytes(member.try_into().ok()?)),
        i32::from_be_bytes(kind.try_into().ok()?),
    ))
}

/// All `meta` keys of alarms.
pub(super) fn alarm_bounds() -> ([u8; 5], [u8; 5]) {
    (*b"alarm", *b"alarn")
}

/// A record whose payload has no structure.
pub(super) fn encode_plain(table: Table, key: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0; HEADER_BYTES + payload.len()];
    Cursor::after_header(&mut buffer).put(payload);
    seal(table, key, &mut buffer);
    buffer
}

/// The payload of a record without structure.
pub(super) fn decode_plain<'a>(
    table: Table,
    key: &[u8],
    bytes: &'a [u8],
) -> Result<&'a [u8], StoreError> {
    Ok(Payload::open(table, key, bytes)?.rest())
}

/// Checks a record of any table in full, as a scrub and the receiver of a snapshot do.
pub(super) fn check(table: Table, key: &[u8], bytes: &[u8]) -> Result<(), StoreError> {
    match table {
        Table::Rev => {
            let key = key.try_into().map_err(|_| damaged(table, key, "key has a wrong length"))?;
            RevRecord::decode(Position::from_key(key), bytes).map(drop)
        }
        Table::Cur => CurRecord::decode(key, bytes).map(drop),
        Table::Lease => LeaseValue::decode(key, bytes).map(drop),
        Table::LeaseKey => decode_plain(table, key, bytes).map(drop),
        Table::Meta => match key {
            HEAD_KEY => Head::decode(bytes).map(drop),
            FORMAT_KEY => match decode_file_version(bytes)? {
                ..=FILE_VERSION => Ok(()),
                found => Err(StoreError::Format { found, supported: FILE_VERSION }),
            },
            _ => decode_plain(table, key, bytes).map(drop),
        },
    }
}

/// A length as written. Requests are bounded far below 4 GiB long before they are applied.
fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

fn checksum(table: Table, key: &[u8], version: u8, payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&[table.tag(), version]);
    let crc = crc32c::crc32c_append(crc, &length(key).to_le_bytes());
    let crc = crc32c::crc32c_append(crc, key);
    crc32c::crc32c_append(crc, payload)
}

/// Writes version and checksum in front of the payload that is already in `buffer`.
fn seal(table: Table, key: &[u8], buffer: &mut [u8]) {
    let (header, payload) = buffer.split_at_mut(HEADER_BYTES);
    header[0] = RECORD_VERSION;
    header[1..].copy_from_slice(&checksum(table, key, RECORD_VERSION, payload).to_le_bytes());
}

fn damaged(table: Table, key: &[u8], what: &str) -> StoreError {
    StoreError::damaged(table.name(), format!("record {}: {what}", key.escape_ascii()))
}

/// Fills a buffer from the front.
struct Cursor<'a>(&'a mut [u8]);

impl<'a> Cursor<'a> {
    fn after_header(buffer: &'a mut [u8]) -> Self {
        Self(&mut buffer[HEADER_BYTES..])
    }

    fn put(&mut self, bytes: &[u8]) {
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = tail;
    }
}

/// Reads a checked payload from the front.
struct Payload<'a, 'k> {
    table: Table,
    key: &'k [u8],
    rest: &'a [u8],
}

impl<'a, 'k> Payload<'a, 'k> {
    fn open(table: Table, key: &'k [u8], bytes: &'a [u8]) -> Result<Self, StoreError> {
        let Some((&[version, a, b, c, d], rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(damaged(table, key, "shorter than a header"));
        };
        let found = u32::from_le_bytes([a, b, c, d]);
        let expected = checksum(table, key, version, rest);
        if found != expected {
            let what = format!("checksum is {found:08x}, expected {expected:08x}");
            return Err(damaged(table, key, &what));
        }
        // The checksum is good, so an unknown version was written by a newer release on purpose.
        if version != RECORD_VERSION {
            return Err(StoreError::Format {
                found: u32::from(version),
                supported: u32::from(RECORD_VERSION),
            });
        }
        Ok(Self { table, key, rest })
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], StoreError> {
        let Some((head, tail)) = self.rest.split_at_checked(count) else {
            return Err(damaged(self.table, self.key, "shorter than its fields"));
        };
        self.rest = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StoreError> {
        let Some((head, tail)) = self.rest.split_first_chunk::<N>() else {
            return Err(damaged(self.table, self.key, "shorter than its fields"));
        };
        self.rest = tail;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, StoreError> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn u32(&mut self) -> Result<u32, StoreError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, StoreError> {
        self.array().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> Result<i64, StoreError> {
        self.array().map(i64::from_le_bytes)
    }

    fn rest(self) -> &'a [u8] {
        self.rest
    }

    fn end(self) -> Result<(), StoreError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(damaged(self.table, self.key, "longer than its fields"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Position = Position::new(7, 1);

    fn rev() -> RevRecord<'static> {
        RevRecord {
            tombstone: false,
            previous: Some(Position::new(5, 0)),
            create: 3,
            version: 2,
            lease: 9,
            key: b"key",
            value: b"value",
        }
    }

    fn encoded_rev() -> Vec<u8> {
        let mut bytes = vec![0; rev().encoded_len()];
        rev().encode(AT, &mut bytes);
        bytes
    }

    fn cur() -> CurRecord {
        CurRecord { at: AT, tombstone: true, create: 3, version: 2, lease: 9 }
    }

    fn head() -> Head {
        Head {
            applied: Some(LogId {
                term: Term::new(1),
                leader: NodeId::new(2),
                index: LogIndex::new(3),
            }),
            cluster: Some(ClusterId::new(4)),
            revision: 5,
            compacted: 6,
            bytes: 7,
        }
    }

    #[test]
    fn decoding_gives_back_what_was_encoded() {
        assert_eq!(RevRecord::decode(AT, &encoded_rev()).unwrap(), rev());
        assert_eq!(CurRecord::decode(b"k", &cur().encode(b"k")).unwrap(), cur());
        let lease = LeaseValue { ttl_secs: 60, remaining_secs: 12 };
        assert_eq!(LeaseValue::decode(&lease_key(5), &lease.encode(&lease_key(5))).unwrap(), lease);
        assert_eq!(Head::decode(&head().encode()).unwrap(), head());
        assert_eq!(Head::decode(&Head::default().encode()).unwrap(), Head::default());
        assert_eq!(alarm_from_key(&alarm_key(NodeId::new(8), 2)), Some((NodeId::new(8), 2)));
        assert_eq!(Position::from_key(&AT.to_key()), AT);
    }

    /// Written by version 1 of the format; a change here is a change of everybody's files.
    #[test]
    fn version_1_bytes_never_change() {
        let golden = [
            1, 0x8b, 0x04, 0x84, 0xc7, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0,
            0, 2, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, b'k', b'e', b'y', b'v',
            b'a', b'l', b'u', b'e',
        ];
        assert_eq!(encoded_rev(), golden);
    }

    #[test]
    fn every_flipped_bit_of_every_record_is_noticed() {
        let cases: Vec<(Table, Vec<u8>, Vec<u8>)> = vec![
            (Table::Rev, AT.to_key().to_vec(), encoded_rev()),
            (Table::Cur, b"k".to_vec(), cur().encode(b"k").to_vec()),
            (
                Table::Lease,
                lease_key(5).to_vec(),
                LeaseValue { ttl_secs: 1, remaining_secs: 2 }.encode(&lease_key(5)).to_vec(),
            ),
            (
                Table::LeaseKey,
                attachment_key(5, b"k"),
                encode_plain(Table::LeaseKey, &attachment_key(5, b"k"), b""),
            ),
            (Table::Meta, HEAD_KEY.to_vec(), head().encode().to_vec()),
        ];
        for (table, key, bytes) in cases {
            check(table, &key, &bytes).unwrap();
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let error = check(table, &key, &flipped).unwrap_err();
                assert!(
                    matches!(error, StoreError::Damaged { .. }),
                    "{table:?} bit {bit}: {error}"
                );
            }
            for len in 0..bytes.len() {
                assert!(check(table, &key, &bytes[..len]).is_err(), "{table:?} cut at {len}");
            }
        }
    }

    #[test]
    fn a_record_under_another_key_or_table_is_damage() {
        assert!(RevRecord::decode(Position::new(7, 2), &encoded_rev()).is_err());
        assert!(CurRecord::decode(b"l", &cur().encode(b"k")).is_err());
        let elsewhere = encode_plain(Table::LeaseKey, b"k", b"");
        assert!(decode_plain(Table::Meta, b"k", &elsewhere).is_err());
    }

    #[test]
    fn a_newer_record_version_is_not_called_damage() {
        let key = lease_key(5);
        let mut bytes = LeaseValue { ttl_secs: 1, remaining_secs: 2 }.encode(&key);
        bytes[0] = 2;
        let crc = checksum(Table::Lease, &key, 2, &bytes[HEADER_BYTES..]);
        bytes[1..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());

        let error = LeaseValue::decode(&key, &bytes).unwrap_err();

        assert!(matches!(error, StoreError::Format { found: 2, supported: 1 }), "{error}");
    }
}

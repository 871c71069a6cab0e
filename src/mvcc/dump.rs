//! Carries the whole state as a stream: what a raft snapshot is made of.
//!
//! Records, not pages: the receiver builds its own compact file, and a release with another page layout can
//! still read it.
//!
//! `magic, version u32`, then chunks `kind u8, raw u32, packed u32, crc u32, bytes`. A chunk of kind 1 is an LZ4
//! block of records `table u8, key length u32, value length u32, key, value`; the one of kind 2 ends the stream and
//! holds the count of records and the [`StateHash`] over them. The CRC32C covers the chunk's header and bytes.
//!
//! # Invariants
//!
//! - Neither side holds more than a chunk, or the records of a commit, in memory.
//! - A stream that is cut, altered or too long is refused, and every record is checked before it is stored.

use std::io::{self, Read, Write};

use redb::{Database, Durability, ReadableTable, Table as RedbTable, WriteTransaction};

use super::format::{self, POSITION_BYTES, Table};
use super::hash::{StateHash, StateHasher};
use super::read::{CUR, LEASE, LEASE_KEY, META, REV};
use super::view::{RevKey, Slice};
use super::{ReadTxn, StoreError};

const MAGIC: &[u8; 8] = b"k3sstate";
const STREAM_VERSION: u32 = 1;

/// Records gathered before a chunk is packed. A larger record makes a larger chunk.
const CHUNK_BYTES: usize = 128 << 10;
/// Largest chunk believed: a full one and the largest record there can be, with room to spare.
const CHUNK_BYTES_MAX: usize = 8 << 20;
/// What a receiver gathers between commits.
const COMMIT_BYTES: usize = 1 << 20;

const KIND_RECORDS: u8 = 1;
const KIND_END: u8 = 2;
const CHUNK_HEADER: usize = 13;
const RECORD_HEADER: usize = 9;
const END_BYTES: usize = 8 + 32;

/// Sees every record: its table, key and stored bytes.
type VisitRecord<'a> = dyn FnMut(Table, &[u8], &[u8]) -> Result<(), StoreError> + 'a;

/// What a stream carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpSummary {
    /// Records of all tables.
    pub records: u64,
    /// The sum over them.
    pub hash: StateHash,
}

impl ReadTxn {
    /// Calls `visit` with every record of every table, in order, each checked.
    pub(super) fn each_record(&self, visit: &mut VisitRecord<'_>) -> Result<(), StoreError> {
        self.checked(|| {
            for item in self.rev.iter()? {
                let (key, value) = item?;
                format::check(Table::Rev, key.value(), value.value())?;
                visit(Table::Rev, key.value(), value.value())?;
            }
            each_of(Table::Cur, &self.cur, visit)?;
            each_of(Table::Lease, &self.txn.open_table(LEASE)?, visit)?;
            each_of(Table::LeaseKey, &self.txn.open_table(LEASE_KEY)?, visit)?;
            each_of(Table::Meta, &self.meta, visit)
        })
    }

    /// Writes the whole state of this moment as a stream for [`super::Store::restore`].
    pub fn dump(&self, out: &mut dyn Write) -> Result<DumpSummary, StoreError> {
        send(out, MAGIC)?;
        send(out, &STREAM_VERSION.to_le_bytes())?;
        let (mut raw, mut records, mut hasher) = (Vec::new(), 0_u64, StateHasher::new());
        self.each_record(&mut |table, key, value| {
            hasher.record(table, key, value);
            records += 1;
            raw.push(table.tag());
            raw.extend_from_slice(&length(key)?.to_le_bytes());
            raw.extend_from_slice(&length(value)?.to_le_bytes());
            raw.extend_from_slice(key);
            raw.extend_from_slice(value);
            if CHUNK_BYTES <= raw.len() {
                write_chunk(out, KIND_RECORDS, raw.len(), &lz4_flex::block::compress(&raw))?;
                raw.clear();
            }
            Ok(())
        })?;
        if !raw.is_empty() {
            write_chunk(out, KIND_RECORDS, raw.len(), &lz4_flex::block::compress(&raw))?;
        }
        let summary = DumpSummary { records, hash: hasher.finish() };
        let mut end = Vec::with_capacity(END_BYTES);
        end.extend_from_slice(&records.to_le_bytes());
        end.extend_from_slice(&summary.hash.0);
        write_chunk(out, KIND_END, END_BYTES, &end)?;
        out.flush().map_err(not_carried)?;
        Ok(summary)
    }
}

fn each_of(
    table: Table,
    source: &impl ReadableTable<Slice, Slice>,
    visit: &mut VisitRecord<'_>,
) -> Result<(), StoreError> {
    for item in source.iter()? {
        let (key, value) = item?;
        format::check(table, key.value(), value.value())?;
        visit(table, key.value(), value.value())?;
    }
    Ok(())
}

/// Reads a stream to its end and stores what it carries.
pub(super) fn read_stream(
    input: &mut dyn Read,
    loader: &mut Loader<'_>,
) -> Result<DumpSummary, StoreError> {
    let mut start = [0; 12];
    fill(input, &mut start, "its start")?;
    let (magic, version) = start.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(stream("it does not begin like one"));
    }
    if version != STREAM_VERSION.to_le_bytes() {
        return Err(stream(format!("version {version:?}, expected {STREAM_VERSION}")));
    }
    let (mut records, mut hasher) = (0_u64, StateHasher::new());
    loop {
        match read_chunk(input)? {
            Chunk::Records(raw) => {
                let mut rest = raw.as_slice();
                while !rest.is_empty() {
                    let (table, key, value) = take_record(&mut rest)?;
                    // Damage, but not of anything that is ours.
                    format::check(table, key, value).map_err(|error| stream(error.to_string()))?;
                    hasher.record(table, key, value);
                    loader.insert(table, key, value)?;
                    records += 1;
                }
            }
            Chunk::End(said) => {
                let found = DumpSummary { records, hash: hasher.finish() };
                if said != found {
                    return Err(stream(format!(
                        "{} records with hash {}, expected {} with {}",
                        found.records, found.hash, said.records, said.hash
                    )));
                }
                return Ok(found);
            }
        }
    }
}

enum Chunk {
    Records(Vec<u8>),
    End(DumpSummary),
}

fn write_chunk(out: &mut dyn Write, kind: u8, raw: usize, packed: &[u8]) -> Result<(), StoreError> {
    let mut header = [0; CHUNK_HEADER];
    header[0] = kind;
    header[1..5].copy_from_slice(&bounded(raw)?.to_le_bytes());
    header[5..9].copy_from_slice(&length(packed)?.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..9]), packed);
    header[9..].copy_from_slice(&crc.to_le_bytes());
    send(out, &header)?;
    send(out, packed)
}

fn read_chunk(input: &mut dyn Read) -> Result<Chunk, StoreError> {
    let mut header = [0; CHUNK_HEADER];
    fill(input, &mut header, "a chunk's header")?;
    let [kind, a, b, c, d, e, f, g, h, crc @ ..] = header;
    let raw_len = u32::from_le_bytes([a, b, c, d]) as usize;
    let packed_len = u32::from_le_bytes([e, f, g, h]) as usize;
    let packed_max = lz4_flex::block::get_maximum_output_size(CHUNK_BYTES_MAX);
    if CHUNK_BYTES_MAX < raw_len || packed_max < packed_len {
        return Err(stream(format!(
            "a chunk of {raw_len} bytes, expected {CHUNK_BYTES_MAX} at most"
        )));
    }
    let mut packed = vec![0; packed_len];
    fill(input, &mut packed, "a chunk")?;
    let found = crc32c::crc32c_append(crc32c::crc32c(&header[..9]), &packed);
    if found != u32::from_le_bytes(crc) {
        return Err(stream("a chunk's checksum is wrong"));
    }
    match kind {
        KIND_RECORDS => lz4_flex::block::decompress(&packed, raw_len)
            .map(Chunk::Records)
            .map_err(|error| stream(error.to_string())),
        KIND_END => end(&packed).map(Chunk::End),
        other => Err(stream(format!("a chunk of unknown kind {other}"))),
    }
}

fn end(bytes: &[u8]) -> Result<DumpSummary, StoreError> {
    let Some((count, hash)) = bytes.split_first_chunk::<8>() else {
        return Err(stream("its end is cut"));
    };
    let hash = hash.try_into().map_err(|_| stream("its end is cut"))?;
    Ok(DumpSummary { records: u64::from_le_bytes(*count), hash: StateHash(hash) })
}

fn take_record<'a>(rest: &mut &'a [u8]) -> Result<(Table, &'a [u8], &'a [u8]), StoreError> {
    let cut = || stream("a record is cut");
    let (&[tag, a, b, c, d, e, f, g, h], tail) =
        rest.split_first_chunk::<RECORD_HEADER>().ok_or_else(cut)?;
    let table =
        Table::from_tag(tag).ok_or_else(|| stream(format!("a record of unknown table {tag}")))?;
    let key_len = u32::from_le_bytes([a, b, c, d]) as usize;
    let value_len = u32::from_le_bytes([e, f, g, h]) as usize;
    let (key, tail) = tail.split_at_checked(key_len).ok_or_else(cut)?;
    let (value, tail) = tail.split_at_checked(value_len).ok_or_else(cut)?;
    *rest = tail;
    Ok((table, key, value))
}

/// Fills an empty file, a commit every few megabytes.
pub(super) struct Loader<'a> {
    database: &'a Database,
    pending: Vec<Record>,
    pending_bytes: usize,
}

struct Record {
    table: Table,
    key: Vec<u8>,
    value: Vec<u8>,
}

impl<'a> Loader<'a> {
    pub(super) const fn new(database: &'a Database) -> Self {
        Self { database, pending: Vec::new(), pending_bytes: 0 }
    }

    /// Takes a record that was checked already.
    pub(super) fn insert(
        &mut self,
        table: Table,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), StoreError> {
        self.pending_bytes += size_of::<Record>() + key.len() + value.len();
        self.pending.push(Record { table, key: key.to_vec(), value: value.to_vec() });
        if self.pending_bytes < COMMIT_BYTES {
            return Ok(());
        }
        self.commit()
    }

    /// Commits the rest, and makes the tables that no record asked for.
    pub(super) fn finish(&mut self) -> Result<(), StoreError> {
        self.commit()?;
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::None)?;
        drop(txn.open_table(REV)?);
        for table in [CUR, LEASE, LEASE_KEY, META] {
            drop(txn.open_table(table)?);
        }
        txn.commit()?;
        Ok(())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::None)?;
        for run in self.pending.chunk_by(|a, b| a.table == b.table) {
            insert_run(&txn, run)?;
        }
        txn.commit()?;
        self.pending.clear();
        self.pending_bytes = 0;
        Ok(())
    }
}

/// Stores records of one table.
fn insert_run(txn: &WriteTransaction, run: &[Record]) -> Result<(), StoreError> {
    let name = match run.first().map(|record| record.table) {
        None => return Ok(()),
        Some(Table::Rev) => {
            let mut rev: RedbTable<'_, RevKey, Slice> = txn.open_table(REV)?;
            for record in run {
                let key: &[u8; POSITION_BYTES] = record
                    .key
                    .as_slice()
                    .try_into()
                    .map_err(|_| stream("a revision's key has a wrong length"))?;
                rev.insert(key, record.value.as_slice())?;
            }
            return Ok(());
        }
        Some(Table::Cur) => CUR,
        Some(Table::Lease) => LEASE,
        Some(Table::LeaseKey) => LEASE_KEY,
        Some(Table::Meta) => META,
    };
    let mut table: RedbTable<'_, Slice, Slice> = txn.open_table(name)?;
    for record in run {
        table.insert(record.key.as_slice(), record.value.as_slice())?;
    }
    Ok(())
}

fn fill(input: &mut dyn Read, buffer: &mut [u8], what: &str) -> Result<(), StoreError> {
    input.read_exact(buffer).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            stream(format!("cut off in {what}"))
        } else {
            not_carried(error)
        }
    })
}

fn send(out: &mut dyn Write, bytes: &[u8]) -> Result<(), StoreError> {
    out.write_all(bytes).map_err(not_carried)
}

/// Whatever carries the stream failed: nothing is wrong with the store.
fn not_carried(error: io::Error) -> StoreError {
    stream(error.to_string())
}

fn length(bytes: &[u8]) -> Result<u32, StoreError> {
    bounded(bytes.len())
}

fn bounded(count: usize) -> Result<u32, StoreError> {
    u32::try_from(count)
        .ok()
        .filter(|_| count <= CHUNK_BYTES_MAX)
        .ok_or_else(|| stream(format!("a record of {count} bytes does not fit a chunk")))
}

fn stream(what: impl Into<String>) -> StoreError {
    StoreError::Stream(what.into())
}

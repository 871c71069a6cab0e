//! Carries the whole state as a stream: what a raft snapshot is made of.
//!
//! Records, not pages: the receiver builds its own compact file, and a release with another page layout can
//! still read it.
//!
//! `magic, version u32`, then chunks `kind u8, raw u32, packed u32, crc u32, bytes`. A chunk of kind 1 is an LZ4
//! block of records `table u8, key length u32, value length u32, key, value`; the one of kind 2 ends the stream and
//! holds the count of records and the [`StateHash`] over them. The CRC32C covers the chunk's header and bytes.
//!
//! # Shape
//!
//! [`DumpStream`] gives one *unit* after the other, the start or a chunk, and keeps only its place between two; so whoever
//! sends decides when, and no thread waits for a slow receiver. [`StreamReader`] takes the units in the same way.
//!
//! # Invariants
//!
//! - Neither side holds more than a chunk, or the records of a commit, in memory.
//! - A stream that is cut, altered or too long is refused, and every record is checked before it is stored.

use std::io::{self, Read, Write};
use std::mem;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use redb::{Database, Durability, ReadableTable, Table as RedbTable, WriteTransaction};

use super::backend::blocking;
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
/// The same, and may stop the walk after a record.
type VisitSome<'a> = dyn FnMut(Table, &[u8], &[u8]) -> Result<ControlFlow<()>, StoreError> + 'a;

/// What a stream carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpSummary {
    /// Records of all tables.
    pub records: u64,
    /// The sum over them.
    pub hash: StateHash,
}

/// The order in which a stream carries the tables.
const TABLES: [Table; 5] = [Table::Rev, Table::Cur, Table::Lease, Table::LeaseKey, Table::Meta];

/// How far a walk over all records is: in which table, and after which key.
#[derive(Debug, Default)]
struct Place {
    table: usize,
    after: Option<Vec<u8>>,
}

impl ReadTxn {
    /// Calls `visit` with every record of every table, in order, each checked.
    pub(super) fn each_record(&self, visit: &mut VisitRecord<'_>) -> Result<(), StoreError> {
        self.walk(&mut Place::default(), &mut |table, key, value| {
            visit(table, key, value)?;
            Ok(ControlFlow::Continue(()))
        })
    }

    /// Goes on from `place` until there are no more records, or `visit` has enough.
    fn walk(&self, place: &mut Place, visit: &mut VisitSome<'_>) -> Result<(), StoreError> {
        self.checked(|| {
            while let Some(&table) = TABLES.get(place.table) {
                let after = place.after.as_deref();
                let stopped_after = match table {
                    Table::Rev => self.walk_rev(after, visit)?,
                    Table::Cur => walk_table(table, &self.cur, after, visit)?,
                    Table::Lease => walk_table(table, &self.txn.open_table(LEASE)?, after, visit)?,
                    Table::LeaseKey => {
                        walk_table(table, &self.txn.open_table(LEASE_KEY)?, after, visit)?
                    }
                    Table::Meta => walk_table(table, &self.meta, after, visit)?,
                };
                place.after = stopped_after;
                if place.after.is_some() {
                    return Ok(());
                }
                place.table += 1;
            }
            Ok(())
        })
    }

    /// `rev` alone has keys of a fixed size.
    fn walk_rev(
        &self,
        after: Option<&[u8]>,
        visit: &mut VisitSome<'_>,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let after: Option<&[u8; POSITION_BYTES]> = match after {
            None => None,
            Some(key) => Some(key.try_into().map_err(|_| wrong_position())?),
        };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        for item in self.rev.range::<&[u8; POSITION_BYTES]>((from, Bound::Unbounded))? {
            let (key, value) = item?;
            format::check(Table::Rev, key.value(), value.value())?;
            if visit(Table::Rev, key.value(), value.value())?.is_break() {
                return Ok(Some(key.value().to_vec()));
            }
        }
        Ok(None)
    }

    /// Writes the whole state of this moment as a stream for [`super::Store::restore`].
    pub fn dump(&self, out: &mut dyn Write) -> Result<DumpSummary, StoreError> {
        let mut packer = Packer::default();
        loop {
            match packer.next(self)? {
                Unit::More(bytes) => send(out, &bytes)?,
                Unit::End(bytes, summary) => {
                    send(out, &bytes)?;
                    out.flush().map_err(not_carried)?;
                    return Ok(summary);
                }
            }
        }
    }

    /// The same, unit by unit, for whoever cannot wait in the middle of it.
    pub fn into_stream(self) -> DumpStream {
        DumpStream { view: self, packer: Packer::default(), ended: false }
    }
}

/// The records of one table after a key. The key that `visit` stopped after, if it did.
fn walk_table(
    table: Table,
    source: &impl ReadableTable<Slice, Slice>,
    after: Option<&[u8]>,
    visit: &mut VisitSome<'_>,
) -> Result<Option<Vec<u8>>, StoreError> {
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    for item in source.range::<&[u8]>((from, Bound::Unbounded))? {
        let (key, value) = item?;
        format::check(table, key.value(), value.value())?;
        if visit(table, key.value(), value.value())?.is_break() {
            return Ok(Some(key.value().to_vec()));
        }
    }
    Ok(None)
}

/// A state on its way out. See the module documentation.
#[derive(Debug)]
pub struct DumpStream {
    view: ReadTxn,
    packer: Packer,
    ended: bool,
}

impl DumpStream {
    /// Records read so far.
    pub const fn records(&self) -> u64 {
        self.packer.records
    }

    /// The next unit; none after the last. Reads the file.
    pub fn next_unit(&mut self) -> Result<Option<Bytes>, StoreError> {
        if self.ended {
            return Ok(None);
        }
        match blocking(|| self.packer.next(&self.view))? {
            Unit::More(bytes) => Ok(Some(bytes)),
            Unit::End(bytes, _) => {
                self.ended = true;
                Ok(Some(bytes))
            }
        }
    }
}

enum Unit {
    More(Bytes),
    End(Bytes, DumpSummary),
}

/// Makes units out of records.
#[derive(Debug, Default)]
struct Packer {
    started: bool,
    place: Place,
    raw: Vec<u8>,
    records: u64,
    hasher: StateHasher,
}

impl Packer {
    fn next(&mut self, view: &ReadTxn) -> Result<Unit, StoreError> {
        if !self.started {
            self.started = true;
            return Ok(Unit::More(
                [MAGIC.as_slice(), &STREAM_VERSION.to_le_bytes()].concat().into(),
            ));
        }
        let Self { place, raw, records, hasher, .. } = self;
        raw.clear();
        view.walk(place, &mut |table, key, value| {
            hasher.record(table, key, value);
            *records += 1;
            raw.push(table.tag());
            raw.extend_from_slice(&length(key)?.to_le_bytes());
            raw.extend_from_slice(&length(value)?.to_le_bytes());
            raw.extend_from_slice(key);
            raw.extend_from_slice(value);
            let full = CHUNK_BYTES <= raw.len();
            Ok(if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        if !raw.is_empty() {
            let packed = lz4_flex::block::compress(raw);
            return Ok(Unit::More(chunk(KIND_RECORDS, raw.len(), &packed)?));
        }
        let summary = DumpSummary { records: *records, hash: mem::take(hasher).finish() };
        let mut end = Vec::with_capacity(END_BYTES);
        end.extend_from_slice(&summary.records.to_le_bytes());
        end.extend_from_slice(&summary.hash.0);
        Ok(Unit::End(chunk(KIND_END, END_BYTES, &end)?, summary))
    }
}

/// Takes a stream, unit by unit.
#[derive(Debug, Default)]
pub(super) struct StreamReader {
    started: bool,
    records: u64,
    hasher: StateHasher,
    ended: Option<DumpSummary>,
}

impl StreamReader {
    /// What the stream carried, once it has ended.
    pub(super) const fn ended(&self) -> Option<DumpSummary> {
        self.ended
    }

    pub(super) const fn records(&self) -> u64 {
        self.records
    }

    /// Reads one unit and stores what it carries.
    pub(super) fn take_unit(
        &mut self,
        input: &mut dyn Read,
        loader: &mut Loader<'_>,
    ) -> Result<(), StoreError> {
        if self.ended.is_some() {
            return Err(stream("something follows its end"));
        }
        if !self.started {
            self.started = true;
            return read_start(input);
        }
        match read_chunk(input)? {
            Chunk::Records(raw) => {
                let mut rest = raw.as_slice();
                while !rest.is_empty() {
                    let (table, key, value) = take_record(&mut rest)?;
                    // Damage, but not of anything that is ours.
                    format::check(table, key, value).map_err(|error| stream(error.to_string()))?;
                    self.hasher.record(table, key, value);
                    loader.insert(table, key, value)?;
                    self.records += 1;
                }
                Ok(())
            }
            Chunk::End(said) => {
                let hash = mem::take(&mut self.hasher).finish();
                let found = DumpSummary { records: self.records, hash };
                if said != found {
                    return Err(stream(format!(
                        "{} records with hash {}, expected {} with {}",
                        found.records, found.hash, said.records, said.hash
                    )));
                }
                self.ended = Some(found);
                Ok(())
            }
        }
    }
}

fn read_start(input: &mut dyn Read) -> Result<(), StoreError> {
    let mut start = [0; 12];
    fill(input, &mut start, "its start")?;
    let (magic, version) = start.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(stream("it does not begin like one"));
    }
    if version != STREAM_VERSION.to_le_bytes() {
        return Err(stream(format!("version {version:?}, expected {STREAM_VERSION}")));
    }
    Ok(())
}

/// Reads a stream to its end and stores what it carries.
pub(super) fn read_stream(
    input: &mut dyn Read,
    loader: &mut Loader<'_>,
) -> Result<DumpSummary, StoreError> {
    let mut reader = StreamReader::default();
    loop {
        reader.take_unit(input, loader)?;
        if let Some(summary) = reader.ended() {
            return Ok(summary);
        }
    }
}

enum Chunk {
    Records(Vec<u8>),
    End(DumpSummary),
}

fn chunk(kind: u8, raw: usize, packed: &[u8]) -> Result<Bytes, StoreError> {
    let mut bytes = Vec::with_capacity(CHUNK_HEADER + packed.len());
    bytes.push(kind);
    bytes.extend_from_slice(&bounded(raw)?.to_le_bytes());
    bytes.extend_from_slice(&length(packed)?.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), packed);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(packed);
    Ok(bytes.into())
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
    pending: Pending,
}

/// Records that are gathered for the next commit.
#[derive(Debug, Default)]
pub(super) struct Pending {
    records: Vec<Record>,
    bytes: usize,
}

#[derive(Debug)]
struct Record {
    table: Table,
    key: Vec<u8>,
    value: Vec<u8>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(database: &'a Database) -> Self {
        Self::resume(database, Pending::default())
    }

    /// Goes on with what [`Loader::pause`] returned.
    pub(super) const fn resume(database: &'a Database, pending: Pending) -> Self {
        Self { database, pending }
    }

    /// Lets go of the file for now.
    pub(super) fn pause(self) -> Pending {
        self.pending
    }

    /// Takes a record that was checked already.
    pub(super) fn insert(
        &mut self,
        table: Table,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), StoreError> {
        self.pending.bytes += size_of::<Record>() + key.len() + value.len();
        self.pending.records.push(Record { table, key: key.to_vec(), value: value.to_vec() });
        if self.pending.bytes < COMMIT_BYTES {
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
        for run in self.pending.records.chunk_by(|a, b| a.table == b.table) {
            insert_run(&txn, run)?;
        }
        txn.commit()?;
        self.pending = Pending::default();
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
                let key: &[u8; POSITION_BYTES] =
                    record.key.as_slice().try_into().map_err(|_| wrong_position())?;
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

fn wrong_position() -> StoreError {
    stream("a revision's key has a wrong length")
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

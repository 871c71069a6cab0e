//! The stream that carries a whole state from one node to another, and every record of the store in it.
//!
//! An input is a stream as it is, or records that the target makes a stream of, with every checksum right.

use std::path::Path;

use bytes::Bytes;
use k3s_server::apply;
use k3s_server::command::Command;
use k3s_server::mvcc::{DrainOn, KeyRange, Options, Store, StoreError, View};
use k3s_server::proto::etcdserverpb as pb;
use k3s_server::testkit::wait;
use k3s_server::types::{LogId, LogIndex, NodeId, Revision, Term};
use sha2::{Digest, Sha256};

use super::memory::MemoryDisk;
use super::{Input, put_piece};

const RECORDS: u8 = 0;
const STREAM: u8 = 1;
const CHUNK_HEADER_BYTES: usize = 13;
const RECORD_HEADER_BYTES: usize = 5;

fn options() -> Options {
    Options { cache_bytes: 1 << 20, drain: DrainOn::Task }
}

fn dumped(commands: &[Command]) -> Vec<u8> {
    let disk = MemoryDisk::default();
    wait(async {
        let store = Store::open(&disk.env(), Path::new("state.redb"), &options()).unwrap();
        for (index, command) in (1..).zip(commands) {
            let id =
                LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) };
            store.write(|txn| apply::apply(txn, id, command)).unwrap();
        }
        let mut stream = Vec::new();
        store.dump(&mut stream).unwrap();
        stream
    })
}

pub fn seeds() -> Vec<Vec<u8>> {
    let put = |key: &'static [u8], lease| {
        Command::Put(pb::PutRequest {
            key: Bytes::from_static(key),
            value: Bytes::from_static(b"value"),
            lease,
            ..Default::default()
        })
    };
    let streams = [
        dumped(&[]),
        dumped(&[
            Command::LeaseGrant(pb::LeaseGrantRequest { id: 7, ttl: 60 }),
            put(b"a", 7),
            put(b"b", 0),
            put(b"a", 0),
            Command::DeleteRange(pb::DeleteRangeRequest {
                key: Bytes::from_static(b"b"),
                ..Default::default()
            }),
            Command::Compact(pb::CompactionRequest { revision: 3, physical: true }),
            Command::Alarm(pb::AlarmRequest { action: 1, member_id: 1, alarm: 1 }),
            put(b"b", 7),
        ]),
    ];
    let whole = streams.iter().map(|stream| [&[STREAM], stream.as_slice()].concat());
    let taken_apart = streams.iter().map(|stream| records_of(stream));
    whole.chain(taken_apart).collect()
}

/// The records of a stream, as an input of the other kind.
fn records_of(stream: &[u8]) -> Vec<u8> {
    let mut out = vec![RECORDS];
    let mut rest = &stream[12..];
    while rest[0] == 1 {
        let length = |at: usize| {
            usize::try_from(u32::from_le_bytes(rest[at..at + 4].try_into().unwrap())).unwrap()
        };
        let (raw, packed) = (length(1), length(5));
        let end = CHUNK_HEADER_BYTES + packed;
        let bytes = lz4_flex::block::decompress(&rest[CHUNK_HEADER_BYTES..end], raw).unwrap();
        let mut records = Input(&bytes);
        while !records.is_empty() {
            let tag = records.byte();
            let (key, _) = (records.u16(), records.u16());
            let (value, _) = (records.u16(), records.u16());
            out.push(tag);
            put_piece(&mut out, records.piece(key));
            // What a record says of itself is made again.
            put_piece(&mut out, &records.piece(value)[RECORD_HEADER_BYTES..]);
        }
        rest = &rest[end..];
    }
    out
}

/// A stream of these records in which everything that can be checked by itself is right.
fn stream_of(mut input: Input<'_>) -> Vec<u8> {
    let (mut raw, mut count, mut sum) = (Vec::new(), 0_u64, Sha256::new());
    while !input.is_empty() {
        let tag = input.byte();
        let length = input.u16();
        let key = input.piece(length);
        let length = input.u16();
        let payload = input.piece(length);
        let value = sealed(tag, key, payload);
        raw.push(tag);
        raw.extend(u32::try_from(key.len()).unwrap().to_le_bytes());
        raw.extend(u32::try_from(value.len()).unwrap().to_le_bytes());
        raw.extend_from_slice(key);
        raw.extend_from_slice(&value);
        sum.update([tag]);
        sum.update((key.len() as u64).to_le_bytes());
        sum.update(key);
        sum.update((value.len() as u64).to_le_bytes());
        sum.update(&value);
        count += 1;
    }
    let mut stream = b"k3sstate\x01\0\0\0".to_vec();
    put_chunk(&mut stream, 1, raw.len(), &lz4_flex::block::compress(&raw));
    let end = [&count.to_le_bytes()[..], &sum.finalize()].concat();
    put_chunk(&mut stream, 2, end.len(), &end);
    stream
}

fn sealed(tag: u8, key: &[u8], payload: &[u8]) -> Vec<u8> {
    const VERSION: u8 = 1;
    let mut crc = crc32c::crc32c(&[tag, VERSION]);
    crc = crc32c::crc32c_append(crc, &u32::try_from(key.len()).unwrap().to_le_bytes());
    crc = crc32c::crc32c_append(crc, key);
    crc = crc32c::crc32c_append(crc, payload);
    [&[VERSION], &crc.to_le_bytes()[..], payload].concat()
}

fn put_chunk(out: &mut Vec<u8>, kind: u8, raw: usize, packed: &[u8]) {
    let start = out.len();
    out.push(kind);
    out.extend(u32::try_from(raw).unwrap().to_le_bytes());
    out.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&out[start..]), packed);
    out.extend(crc.to_le_bytes());
    out.extend_from_slice(packed);
}

/// Either a store that holds what was sent, or an error and no store. Nonsense between records may show up when it is
/// read, as an error.
pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let stream = match input.byte() & 1 {
        RECORDS => stream_of(input),
        _ => input.0.to_vec(),
    };
    let disk = MemoryDisk::default();
    wait(async {
        let path = Path::new("state.redb");
        let loaded = Store::load_from(&disk.env(), path, &options(), &mut stream.as_slice()).await;
        match loaded {
            Ok(store) => {
                let mut again = Vec::new();
                // What one node took, another one takes.
                store.dump(&mut again).expect("records that were checked when they came");
                drop(use_it(&store));
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(disk.files().is_empty() || !disk.files().contains_key(path));
            }
        }
    });
}

/// Reads and writes in every way there is. Errors are fine where records contradict each other.
fn use_it(store: &Store) -> Result<(), StoreError> {
    let view = store.read()?;
    let everything = KeyRange::new(Bytes::from_static(b"\0"), Bytes::from_static(b"\0"));
    drop(view.scan(&everything, view.revision(), None));
    drop(view.scan(&everything, Revision::new(3), None));
    drop(view.hash_kv(None));
    drop(view.events(Revision::new(1), Some(&everything), 1 << 20));
    drop(view.leases());
    drop(view.alarms());
    let key = Bytes::from_static(b"a");
    let put = pb::PutRequest { key: key.clone(), ..Default::default() };
    let delete = pb::DeleteRangeRequest { key, ..Default::default() };
    let id = |index| LogId { index: LogIndex::new(index), ..Default::default() };
    let revision = view.revision().get();
    let commands = [
        Command::Put(put),
        Command::DeleteRange(delete),
        Command::LeaseRevoke(pb::LeaseRevokeRequest { id: 7 }),
        Command::Compact(pb::CompactionRequest { revision, physical: true }),
    ];
    for (index, command) in (100..).zip(commands) {
        drop(store.write(|txn| apply::apply(txn, id(index), &command)));
    }
    Ok(())
}

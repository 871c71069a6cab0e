//! Measures the state machine on a file: apply, read, list, compaction, checkpoint, snapshot.
//!
//! `cargo bench --bench state [-- directory]`; the directory decides which card is measured.
//! `cargo bench --bench state -- memory [directory]` measures instead how long it takes to open 100 MB of values, after
//! a clean stop and after a crash, and what a process needs in memory to work with them.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a benchmark prints, a failure ends it, and its numbers are small"
)]

use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::apply;
use k3s_server::command::Command;
use k3s_server::env::host;
use k3s_server::limits::STATE_CACHE_BYTES;
use k3s_server::mvcc::{DrainOn, KeyRange, Options, Store, View};
use k3s_server::proto::etcdserverpb as pb;
use k3s_server::testkit::wait;
use k3s_server::types::{LogId, LogIndex, Revision};

const KEYS: u64 = 20_000;
const VALUE_BYTES: usize = 400;

fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    match arguments.as_slice() {
        [mode, place @ ..] if mode == "memory" => memory(place.first()),
        [mode, what, path] if mode == "memory-of" => memory_of(what, Path::new(path)),
        place => speed(place.first()),
    }
}

fn speed(place: Option<&String>) {
    let dir = directory(place);
    let store = open(&dir.path().join("state.redb"));

    for batch in [1, 8, 64, 512] {
        report(&format!("put, batches of {batch}"), KEYS, || fill(&store, batch));
    }
    report("read one key", KEYS, || read_each(&store));
    report("list 500 keys of all, counting the rest", 20, || list(&store, 20));
    let revision = store.read().unwrap().revision();
    report("checkpoint", 1, || done(store.checkpoint().unwrap()));
    report("compact, per revision", revision.get().unsigned_abs(), || compact(&store, revision));
    report("checkpoint after compaction", 1, || done(store.checkpoint().unwrap()));
    let mut stream = Vec::new();
    report("snapshot out, per record", KEYS, || done(store.dump(&mut stream).unwrap()));
    report("snapshot in, per record", KEYS, || {
        done(wait(store.restore(&mut stream.as_slice())).unwrap());
    });
    println!("snapshot is {} bytes, the store {:?}", stream.len(), store.size().unwrap());
    report("state hash, per record", KEYS, || done(store.read().unwrap().state_hash().unwrap()));
}

fn directory(place: Option<&String>) -> tempfile::TempDir {
    place.map_or_else(tempfile::tempdir, tempfile::tempdir_in).unwrap()
}

/// Values of 4,000 bytes that make 100 MB.
const BIG_VALUES: u64 = 25_000;
const BIG_VALUE_BYTES: usize = 4_000;

/// Each in a process of its own, because memory is not given back.
fn memory(place: Option<&String>) {
    let dir = directory(place);
    let path = dir.path().join("state.redb");
    child("nothing", &path);
    child("write 100 MB, stop cleanly", &path);
    child("open after a clean stop", &path);
    crash_image(dir.path());
    child("open after a crash", &dir.path().join("crashed/state.redb"));
    for what in
        ["read every key", "list all keys", "overwrite 20,000 keys", "defragment", "restore"]
    {
        child(what, &path);
    }
}

fn child(what: &str, path: &Path) {
    let program = std::env::current_exe().unwrap();
    let status = Process::new(program).args(["memory-of", what]).arg(path).status().unwrap();
    assert!(status.success(), "{what}: {status}");
}

/// The files as they are while a writer is at work, half-way between two checkpoints.
fn crash_image(dir: &Path) {
    let source = dir.join("state.redb");
    let store = open(&source);
    for first in (0..2_000).step_by(50) {
        big_values(&store, first..first + 50);
    }
    std::fs::create_dir(dir.join("crashed")).unwrap();
    for name in ["state.redb", "state.redb.crc.0", "state.redb.crc.1"] {
        std::fs::copy(dir.join(name), dir.join("crashed").join(name)).unwrap();
    }
    wait(store.close()).unwrap();
}

fn big_values(store: &Store, keys: std::ops::Range<u64>) {
    store
        .write(|txn| {
            for n in keys {
                let mut value = vec![0; BIG_VALUE_BYTES];
                value.chunks_mut(8).zip(n..).for_each(|(chunk, n)| {
                    chunk.copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
                });
                txn.put(&key(n), &Bytes::from(value), 0)?;
                txn.end_revision();
            }
            Ok(())
        })
        .unwrap();
}

fn memory_of(what: &str, path: &Path) {
    if what == "nothing" {
        return print_memory(what, Duration::ZERO);
    }
    let start = Instant::now();
    let store = open(path);
    let opened = start.elapsed();
    match what {
        "write 100 MB, stop cleanly" => {
            for first in (0..BIG_VALUES).step_by(50) {
                big_values(&store, first..first + 50);
                if first.is_multiple_of(5_000) {
                    wait(store.checkpoint().unwrap().durable()).unwrap();
                }
            }
        }
        "read every key" => (0..BIG_VALUES).for_each(|n| {
            assert!(store.read().unwrap().get(&key(n), None).unwrap().is_some());
        }),
        "list all keys" => {
            let read = store.read().unwrap();
            let all = KeyRange::From(Bytes::from_static(b"/"));
            assert_eq!(read.scan(&all, read.revision(), Some(0)).unwrap().count, BIG_VALUES);
        }
        "overwrite 20,000 keys" => {
            for first in (0..20_000).step_by(50) {
                big_values(&store, first..first + 50);
            }
            compact_all(&store);
            wait(store.checkpoint().unwrap().durable()).unwrap();
        }
        "defragment" => done(wait(store.defragment()).unwrap()),
        "restore" => {
            let stream = path.with_extension("stream");
            let mut out = std::io::BufWriter::new(std::fs::File::create(&stream).unwrap());
            store.dump(&mut out).unwrap();
            drop(out);
            let mut input = std::io::BufReader::new(std::fs::File::open(&stream).unwrap());
            wait(store.restore(&mut input)).unwrap();
        }
        opening => assert!(opening.starts_with("open"), "{opening}"),
    }
    print_memory(what, opened);
    // What stays once everything is on the card.
    wait(store.checkpoint().unwrap().durable()).unwrap();
    print_memory("  and then", opened);
    wait(store.close()).unwrap();
}

fn compact_all(store: &Store) {
    let revision = store.read().unwrap().revision();
    store.write(|txn| txn.compact(revision)).unwrap().unwrap();
}

fn print_memory(what: &str, opened: Duration) {
    let status = std::fs::read_to_string(PathBuf::from("/proc/self/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib as f64 / 1024.0
    };
    println!(
        "{what:<30} opened in {:>7.1} ms, {:>5.1} MiB now, {:>5.1} MiB at most",
        opened.as_secs_f64() * 1e3,
        field("VmRSS:"),
        field("VmHWM:"),
    );
}

/// Only the time is of interest.
fn done<T>(_: T) {}

fn open(path: &Path) -> Store {
    Store::open(
        &host::env(),
        path,
        &Options { cache_bytes: STATE_CACHE_BYTES, drain: DrainOn::Thread },
    )
    .unwrap()
}

fn report(what: &str, count: u64, work: impl FnOnce()) {
    let start = Instant::now();
    work();
    let each = start.elapsed().div_f64(count.max(1) as f64);
    println!(
        "{what:<45} {:>10.1} us",
        each.as_secs_f64() * Duration::from_secs(1).as_micros() as f64
    );
}

fn key(n: u64) -> Bytes {
    // Spread over the key space, as names are.
    Bytes::from(format!("/registry/pods/namespace/{:016x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

fn fill(store: &Store, batch: u64) {
    let value = Bytes::from(vec![7; VALUE_BYTES]);
    let commands: Vec<_> = (0..KEYS)
        .map(|n| {
            Command::Put(pb::PutRequest { key: key(n), value: value.clone(), ..Default::default() })
        })
        .collect();
    for (first, batch) in (0..).step_by(batch as usize).zip(commands.chunks(batch as usize)) {
        store
            .write(|txn| {
                for (index, command) in (first..).zip(batch) {
                    let id = LogId { index: LogIndex::new(index), ..Default::default() };
                    apply::apply(txn, id, command)?;
                }
                Ok(())
            })
            .unwrap();
    }
}

fn read_each(store: &Store) {
    for n in 0..KEYS {
        assert!(store.read().unwrap().get(&key(n), None).unwrap().is_some());
    }
}

fn list(store: &Store, times: u64) {
    for _ in 0..times {
        let request = pb::RangeRequest {
            key: Bytes::from_static(b"/registry/"),
            range_end: Bytes::from_static(b"/registry0"),
            limit: 500,
            ..Default::default()
        };
        let response = apply::range(&store.read().unwrap(), &request).unwrap().unwrap();
        assert_eq!((response.kvs.len(), response.count), (500, KEYS as i64));
    }
}

fn compact(store: &Store, revision: Revision) {
    store.write(|txn| txn.compact(revision)).unwrap().unwrap();
    let read = store.read().unwrap();
    let all = KeyRange::From(Bytes::from_static(b"/"));
    assert_eq!(read.scan(&all, read.revision(), Some(0)).unwrap().count, KEYS);
}

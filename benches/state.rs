//! Measures the state machine on a file: apply, read, list, compaction, checkpoint, snapshot.
//!
//! `cargo bench --bench state [-- directory]`; the directory decides which card is measured.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a benchmark prints, a failure ends it, and its numbers are small"
)]

use std::path::Path;
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
    let place = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let dir = match &place {
        Some(place) => tempfile::tempdir_in(place),
        None => tempfile::tempdir(),
    }
    .unwrap();
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

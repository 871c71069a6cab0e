//! The store on a card that does not hold what was written: an error or the right answer, never a wrong one.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use redb::{ReadableTable, StorageBackend};

use super::backend::{self, Backend};
use super::format::Position;
use super::memory_disk::MemoryDisk;
use super::tests::wait;
use super::*;
use crate::env::{Disk, Env, host};
use crate::testkit::FaultDisk;
use crate::testkit::disk::{Failure::Eio, Fault as DiskFault, Operation};

const MIB: u64 = 1 << 20;

fn state() -> PathBuf {
    PathBuf::from("db/state.redb")
}

fn options(drain: DrainOn) -> Options {
    Options { cache_bytes: 128 << 10, drain }
}

fn put(store: &Store, key: &str, value: &[u8]) {
    store
        .write(|txn| {
            txn.put(&Bytes::copy_from_slice(key.as_bytes()), &Bytes::copy_from_slice(value), 0)?;
            txn.end_revision();
            Ok(())
        })
        .unwrap();
}

/// Everything a store can answer, and its state as a whole.
#[derive(Debug, PartialEq)]
struct Everything {
    kvs: Vec<KeyValue>,
    events: Vec<RevisionEvents>,
    hash: StateHash,
    kv_hash: KvHash,
}

fn read_everything(store: &Store) -> Result<Everything, StoreError> {
    let read = store.read()?;
    let all = KeyRange::From(Bytes::new());
    Ok(Everything {
        kvs: read.scan(&all, read.revision(), None)?.kvs,
        events: read.events(Revision::new(0), None, usize::MAX)?.0,
        hash: read.state_hash()?,
        kv_hash: read.hash_kv(None)?.unwrap(),
    })
}

/// Where on the card some bytes are. A page that was used before may have them too.
fn find(file: &[u8], pattern: &[u8]) -> Vec<usize> {
    let windows = file.windows(pattern.len()).enumerate();
    windows.filter(|(_, window)| *window == pattern).map(|(at, _)| at).collect()
}

#[test]
fn bit_flipped_on_a_resting_card_is_reported_once_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let open = || Store::open(&host::env(), &path, &options(DrainOn::Thread)).unwrap();
    let store = open();
    (0..100).for_each(|n| put(&store, &format!("key{n}"), &[n; 3_000]));
    put(&store, "rotten", b"a value nobody else has");
    wait(store.close()).unwrap();
    let store = open();
    let failed = store.failed();
    let mut file = std::fs::read(&path).unwrap();
    let places = find(&file, b"a value nobody else has");
    places.iter().for_each(|at| file[*at] ^= 4);
    std::fs::write(&path, &file).unwrap();

    let read = || store.read().and_then(|read| read.get(b"rotten", None));
    let error = read().unwrap_err();
    let later = read().unwrap_err();

    assert!(error.is_damage(), "{error}");
    assert_eq!(later.to_string(), error.to_string());
    let failure = wait(failed);
    let Failure::Damaged(damage) = &failure else { panic!("{failure}") };
    assert!(places.iter().any(|at| at / 4096 == damage.block as usize), "{damage} of {places:?}");
    assert_eq!(failure.to_string(), error.to_string());
    assert!(store.write(|txn| txn.set_membership(b"x")).unwrap_err().is_damage());
}

/// The card holds what was written; only the page cache does not.
#[tokio::test]
async fn bad_page_in_the_cache_is_read_again_from_the_card() {
    let disk = FaultDisk::with_dir(Path::new("/db"));
    let env = Env { disk: Arc::new(disk.clone()), ..host::env() };
    let path = Path::new("/db/state.redb");
    let open = || Store::open(&env, path, &options(DrainOn::Task)).unwrap();
    let store = open();
    (0..200).for_each(|n| put(&store, &format!("key{n}"), &[n; 3_000]));
    let before = read_everything(&store).unwrap();
    store.close().await.unwrap();
    let blocks = || 1..disk.content(path).unwrap().len() as u64 / 4096;

    let store = open();
    blocks().for_each(|block| disk.flip_cached(path, block * 4096 + 77, 3));
    assert_eq!(read_everything(&store).unwrap(), before);
    // From the cache nothing can be read, from the card everything.
    disk.fail(DiskFault { only: |kind| kind == Operation::Read, ..DiskFault::for_good(1, Eio) });
    store.close().await.unwrap();
    disk.restart();
    let store = open();
    disk.fail(DiskFault { only: |kind| kind == Operation::Read, ..DiskFault::for_good(1, Eio) });
    assert_eq!(read_everything(&store).unwrap(), before);
    assert!(disk.has_failed());

    // What the card itself does not hold is damage.
    disk.heal();
    store.close().await.unwrap();
    blocks().for_each(|block| disk.flip(path, block * 4096 + 77, 3));
    disk.restart();
    let found =
        Store::open(&env, path, &options(DrainOn::Task)).and_then(|store| read_everything(&store));
    assert!(found.unwrap_err().is_damage());
}

#[tokio::test]
async fn record_that_makes_no_sense_is_reported_by_readers_and_by_the_writer() {
    for by_writer in [false, true] {
        let disk = MemoryDisk::new(64 * MIB);
        let store = Store::open(&disk.env(), &state(), &options(DrainOn::Task)).unwrap();
        put(&store, "a", b"1");
        let failed = store.failed();
        store
            .write(|txn| {
                let mut record = txn.cur.get(b"a".as_slice())?.unwrap().value().to_vec();
                record[9] ^= 1;
                txn.cur.insert(b"a".as_slice(), record.as_slice())?;
                Ok(())
            })
            .unwrap();

        let error = if by_writer {
            store.write(|txn| txn.put(&Bytes::from("a"), &Bytes::from("2"), 0)).unwrap_err()
        } else {
            store.read().unwrap().get(b"a", None).unwrap_err()
        };

        assert!(error.is_damage(), "{error}");
        let failure = failed.await;
        assert!(matches!(failure, Failure::Record { table: "cur", .. }), "{failure}");
        assert_eq!(failure.to_string(), error.to_string());
    }
}

#[tokio::test]
async fn damage_in_a_replaced_file_concerns_only_its_readers() {
    let disk = MemoryDisk::new(64 * MIB);
    let store = Store::open(&disk.env(), &state(), &options(DrainOn::Task)).unwrap();
    put(&store, "a", b"1");
    let failed = store.failed();
    store
        .write(|txn| {
            txn.rev.remove(&Position::new(2, 0).to_key())?;
            Ok(())
        })
        .unwrap();
    let old_reader = store.read().unwrap();
    let whole = Store::open(&disk.env(), Path::new("db/other"), &options(DrainOn::Task)).unwrap();
    put(&whole, "a", b"1");
    let mut stream = Vec::new();
    whole.dump(&mut stream).unwrap();

    store.restore(&mut stream.as_slice()).await.unwrap();

    assert!(old_reader.get(b"a", None).unwrap_err().is_damage());
    drop(old_reader);
    assert_eq!(store.read().unwrap().get(b"a", None).unwrap().unwrap().value, "1");
    assert!(failed.now_or_never().is_none(), "the new file was blamed for the old one");
}

#[tokio::test]
async fn failure_of_the_new_file_is_told_to_who_asked_before_the_replacement() {
    let disk = MemoryDisk::new(64 * MIB);
    let store = Store::open(&disk.env(), &state(), &options(DrainOn::Task)).unwrap();
    put(&store, "a", b"1");
    let failed = store.failed();
    store.defragment().await.unwrap();

    store
        .write(|txn| {
            txn.rev.remove(&Position::new(2, 0).to_key())?;
            Ok(())
        })
        .unwrap();
    store.read().unwrap().get(b"a", None).unwrap_err();

    assert_eq!(failed.await.fault(), Fault::Damaged);
}

/// The old engine still has writes to do after its name was given to another file. Its table used to be opened
/// by name, and so the new file's table was overwritten.
#[test]
fn file_that_was_replaced_is_never_written_under_its_old_name() {
    let disk = MemoryDisk::new(64 * MIB);
    let env = disk.env();
    let open = |path: &Path| {
        let (backend, drain) = Backend::open(&env, path, backend::Options::default()).unwrap();
        (backend, drain.spawn_thread().unwrap())
    };
    let write = |backend: &Backend, rounds: u8| {
        for round in 0..rounds {
            backend.write(0, &[round; 4096]).unwrap();
            backend.sync_data().unwrap();
        }
    };
    let incoming = Path::new("db/state.redb.incoming");
    let (old, old_drain) = open(&state());
    write(&old, 3);
    let (new, new_drain) = open(incoming);
    write(&new, 3);
    new.close().unwrap();
    new_drain.join().unwrap().unwrap();
    backend::install(&env, incoming, &state()).unwrap();
    let files = || {
        let names = disk.list(Path::new("db")).unwrap();
        names.into_iter().map(|name| (disk.bytes(&name), name)).collect::<Vec<_>>()
    };
    let installed = files();

    // More records than a table has room for, so that the other table file is needed, twice.
    write(&old, 200);
    old.close().unwrap();
    old_drain.join().unwrap().unwrap();

    assert_eq!(installed.len(), 3);
    assert!(files() == installed, "the new file's bytes were changed");
}

#[tokio::test]
async fn write_that_overtakes_a_replacement_is_not_lost() {
    let disk = MemoryDisk::new(64 * MIB);
    let store = Store::open(&disk.env(), &state(), &options(DrainOn::Task)).unwrap();
    put(&store, "a", b"1");
    let mut stream = Vec::new();
    store.dump(&mut stream).unwrap();

    struct Meddling<'a>(&'a [u8], Store);
    impl std::io::Read for Meddling<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            put(&self.1, "b", b"2");
            self.0.read(buffer)
        }
    }
    let mut input = Meddling(&stream, store.clone());
    let error = store.restore(&mut input).await.unwrap_err();

    assert!(matches!(error, StoreError::Overtaken), "{error}");
    assert!(store.read().unwrap().get(b"b", None).unwrap().is_some());
    put(&store, "c", b"3");
    store.restore(&mut stream.as_slice()).await.unwrap();
    assert!(store.read().unwrap().get(b"c", None).unwrap().is_none());
}

#[tokio::test]
async fn two_replacements_at_once_take_turns() {
    let disk = MemoryDisk::new(64 * MIB);
    let store = Store::open(&disk.env(), &state(), &options(DrainOn::Task)).unwrap();
    put(&store, "a", b"1");

    let (first, second) = tokio::join!(store.defragment(), store.defragment());

    first.unwrap();
    second.unwrap();
    assert!(store.read().unwrap().get(b"a", None).unwrap().is_some());
}

#[tokio::test]
async fn close_waits_for_readers_but_not_with_their_data() {
    let disk = MemoryDisk::new(64 * MIB);
    let store = Store::open(&disk.env(), &state(), &options(DrainOn::Task)).unwrap();
    put(&store, "a", b"1");
    let reader = store.read().unwrap();
    let failed = store.failed();

    let closing = store.clone();
    let closing = tokio::spawn(async move { closing.close().await });
    while !store.is_closed() {
        tokio::task::yield_now().await;
    }
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }

    assert!(!closing.is_finished(), "closed under a reader");
    assert!(matches!(store.write(|_| Ok(())), Err(StoreError::Closed)));
    assert_eq!(reader.get(b"a", None).unwrap().unwrap().value, "1");
    let image = Store::open(&disk.copy().env(), &state(), &options(DrainOn::Task)).unwrap();
    assert!(image.read().unwrap().get(b"a", None).unwrap().is_some());
    drop(reader);
    closing.await.unwrap().unwrap();
    assert!(matches!(store.close().await, Err(StoreError::Closed)));
    assert!(failed.now_or_never().is_none(), "an orderly close is no failure");
}

fn open_and_read(env: &Env) -> Result<Everything, StoreError> {
    let store = Store::open(env, &state(), &options(DrainOn::Task))?;
    read_everything(&store)
}

/// A small store with all kinds of records, closed cleanly.
async fn small_state() -> MemoryDisk {
    let disk = MemoryDisk::new(64 * MIB);
    let store = Store::open(&disk.env(), &state(), &options(DrainOn::Task)).unwrap();
    let lease = LeaseRecord { id: LeaseId::new(7), ttl_secs: 60, remaining_secs: 0 };
    store
        .write(|txn| {
            txn.set_lease(&lease)?;
            txn.raise_alarm(crate::types::NodeId::new(1), 1)?;
            txn.set_membership(b"one node")?;
            for n in 0..20_u8 {
                let key = Bytes::from(format!("key{}", n % 6));
                txn.put(&key, &Bytes::from(vec![n; 700]), i64::from(n % 2) * 7)?;
                txn.end_revision();
            }
            Ok(())
        })
        .unwrap();
    store.close().await.unwrap();
    disk
}

/// Which bits of a file to flip: all of what has structure, and some of every other block.
fn bits(name: &Path, bytes: &[u8]) -> Vec<usize> {
    let is_state = name == state();
    let zeros = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut bits = Vec::new();
    for (block, content) in bytes.chunks(4096).enumerate() {
        let step = match (is_state, block, zeros(content)) {
            (true, 0, _) => 1,
            (_, _, true) => 16_411,
            (true, _, false) => 331,
            (false, _, false) => 127,
        };
        // The header and the tag behind it; nobody reads what follows.
        let dense = if is_state && block == 0 { 345 * 8 } else { 4096 * 8 };
        bits.extend((0..dense).step_by(step).map(|bit| block * 4096 * 8 + bit));
    }
    bits
}

#[tokio::test]
async fn no_flipped_bit_of_any_file_is_served() {
    let pristine = small_state().await;
    let expected = open_and_read(&pristine.copy().env()).unwrap();
    let (mut flips, mut refused) = (0_u32, 0_u32);
    for name in pristine.list(Path::new("db")).unwrap() {
        for bit in bits(&name, &pristine.bytes(&name)) {
            let disk = pristine.copy();
            disk.flip(&name, bit);
            let env = disk.env();
            let found = std::panic::catch_unwind(AssertUnwindSafe(|| open_and_read(&env)));
            let what = format!("bit {bit} of {}", name.display());
            match found.unwrap_or_else(|_| panic!("{what}: panicked")) {
                Ok(found) => assert!(found == expected, "{what}: a wrong answer"),
                Err(error) => {
                    assert!(error.is_damage(), "{what}: {error}");
                    refused += 1;
                }
            }
            flips += 1;
            tokio::task::yield_now().await;
        }
    }
    // The header is mended, and so is a table; nearly every other block is refused.
    assert!(500 < refused && refused < flips, "{refused} of {flips} refused");
}

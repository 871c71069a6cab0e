//! The store on a card that is full, gets full, and has room again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use redb::StorageBackend;

use super::backend::{self, Backend};
use super::ballast::{Ballast, Sizes, Space, SpaceGuard};
use super::memory_disk::MemoryDisk;
use super::tests::wait;
use super::*;
use crate::env::{Disk, Env};

const MIB: u64 = 1 << 20;
const SIZES: Sizes = Sizes { ballast: 2 * MIB, low: MIB, enough: 3 * MIB };
const OPTIONS: Options = Options { cache_bytes: 256 << 10, drain: DrainOn::Task };

fn state() -> PathBuf {
    PathBuf::from("db/state.redb")
}

fn ballast() -> &'static Path {
    Path::new("db/ballast")
}

fn open(env: &Env) -> Store {
    Store::open(env, &state(), &OPTIONS).unwrap()
}

fn key(n: u32) -> Bytes {
    Bytes::from(format!("key{n:06}"))
}

/// A hundred keys of 3,000 bytes.
fn put(store: &Store, from: u32) {
    store
        .write(|txn| {
            for n in from..from + 100 {
                txn.put(&key(n), &Bytes::from(vec![n.to_le_bytes()[0]; 3_000]), 0)?;
                txn.end_revision();
            }
            Ok(())
        })
        .unwrap();
}

fn count(store: &Store) -> u64 {
    let read = store.read().unwrap();
    read.scan(&KeyRange::From(Bytes::new()), read.revision(), Some(usize::MAX)).unwrap().count
}

async fn durable(store: &Store) -> Result<(), StoreError> {
    store.checkpoint()?.durable().await
}

async fn wait_until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    panic!("never: {what}");
}

#[tokio::test(start_paused = true)]
async fn card_that_fills_up_is_survived_without_a_restart() {
    let disk = MemoryDisk::new(12 * MIB);
    let env = disk.env();
    let guard = SpaceGuard::open(&env, ballast(), SIZES).unwrap();
    let space = guard.space();
    let store = open(&env);
    let failed = store.failed();
    let watching = tokio::spawn(guard.run(store.clone()));
    let held = || Ballast::open(&env, ballast(), SIZES.ballast).unwrap().held();
    wait_until("the ballast is taken", || held() == SIZES.ballast).await;

    let mut keys = 0;
    while *space.borrow() == Space::Enough {
        put(&store, keys);
        keys += 100;
        // On a full card this fails, and nothing is lost.
        let full = durable(&store).await;
        assert!(full.as_ref().err().is_none_or(StoreError::is_no_space), "{full:?}");
        tokio::time::sleep(Duration::from_secs(6)).await;
    }
    assert!(1_000 < keys, "full after {keys} keys");
    assert!(store.is_short_of_room());
    assert_eq!(held(), 0);

    // What an operator does: delete, compact, defragment.
    store
        .write(|txn| {
            txn.delete_range(&KeyRange::Span(key(100), key(u32::MAX)))?;
            let revision = txn.end_revision().unwrap().revision;
            txn.compact(revision).map(drop)
        })
        .unwrap();
    durable(&store).await.unwrap();
    store.defragment().await.unwrap();
    wait_until("there is room again", || *space.borrow() == Space::Enough).await;

    assert_eq!(held(), SIZES.ballast);
    assert!(!store.is_short_of_room());
    put(&store, 500);
    durable(&store).await.unwrap();
    assert_eq!(failed.now_or_never().map(|failure| failure.to_string()), None);
    store.close().await.unwrap();
    watching.await.unwrap();
    assert_eq!(count(&open(&env)), 200);
}

#[tokio::test(start_paused = true)]
async fn starving_store_serves_and_holds_writes_until_there_is_room() {
    let disk = MemoryDisk::new(64 * MIB);
    let env = disk.env();
    let store = open(&env);
    let failed = store.failed();
    put(&store, 0);
    durable(&store).await.unwrap();

    disk.set_free(0);
    put(&store, 100);
    let error = durable(&store).await.unwrap_err();

    assert_eq!(error.fault(), Some(Fault::Full), "{error}");
    assert!(*store.starved().borrow());
    assert!(store.is_short_of_room(), "clients are told before anybody has looked at the card");
    put(&store, 200);
    assert_eq!(count(&store), 300);
    // Power cut now: the last checkpoint is there.
    assert_eq!(count(&open(&disk.copy().env())), 100);

    disk.set_free(64 * MIB);
    store.room_made();
    store.starved().wait_for(|starved| !starved).await.unwrap();
    assert!(!store.is_short_of_room());
    durable(&store).await.unwrap();
    assert_eq!(count(&open(&disk.copy().env())), 300);
    assert_eq!(failed.now_or_never().map(|failure| failure.to_string()), None);
}

/// Giving the ballast back takes a barrier, and a full card takes its time for that. Puts used to be admitted meanwhile
/// and then waited in vain.
#[tokio::test(start_paused = true)]
async fn puts_end_before_the_ballast_is_given_back() {
    let disk = MemoryDisk::new(64 * MIB);
    let env = disk.env();
    let mut file = Ballast::open(&env, ballast(), SIZES.ballast).unwrap();
    file.ensure().await.unwrap();
    let guard = SpaceGuard::open(&env, ballast(), SIZES).unwrap();
    let store = open(&env);
    disk.set_free(0);
    disk.fail_removals();

    let watching = tokio::spawn(guard.run(store.clone()));
    wait_until("puts end", || store.is_short_of_room()).await;

    assert!(disk.exists(ballast()).unwrap(), "the ballast could not be removed");
    watching.abort();
}

#[tokio::test(start_paused = true)]
async fn room_is_noticed_without_being_told() {
    let disk = MemoryDisk::new(64 * MIB);
    let store = open(&disk.env());
    durable(&store).await.unwrap();
    disk.set_free(0);
    put(&store, 0);
    durable(&store).await.unwrap_err();

    disk.set_free(64 * MIB);
    let mut starved = store.starved();
    starved.wait_for(|starved| !starved).await.unwrap();

    durable(&store).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_on_a_full_card_does_not_wait_for_room() {
    let disk = MemoryDisk::new(64 * MIB);
    let env = disk.env();
    let store = open(&env);
    put(&store, 0);
    durable(&store).await.unwrap();
    disk.set_free(0);
    put(&store, 100);

    let error = store.close().await.unwrap_err();

    assert!(error.is_no_space(), "{error}");
    assert!(matches!(store.read(), Err(StoreError::Closed)));
    drop(store);
    disk.set_free(64 * MIB);
    assert_eq!(count(&open(&env)), 100);
}

#[tokio::test(start_paused = true)]
async fn defragmentation_without_room_changes_nothing() {
    let disk = MemoryDisk::new(64 * MIB);
    let env = disk.env();
    let store = open(&env);
    let failed = store.failed();
    put(&store, 0);
    durable(&store).await.unwrap();
    disk.set_free(8192);

    let error = store.defragment().await.unwrap_err();

    assert!(error.is_no_space(), "{error}");
    assert_eq!(count(&store), 100);
    assert_eq!(failed.now_or_never().map(|failure| failure.to_string()), None);
    let names = disk.list(Path::new("db")).unwrap();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("incoming")), "{names:?}");
    disk.set_free(64 * MIB);
    put(&store, 100);
    durable(&store).await.unwrap();
}

#[test]
fn start_on_a_full_card_gives_the_ballast_back_first() {
    let disk = MemoryDisk::new(64 * MIB);
    let env = disk.env();
    let mut file = Ballast::open(&env, ballast(), SIZES.ballast).unwrap();
    wait(file.ensure()).unwrap();
    disk.set_free(MIB - 4096);

    let guard = SpaceGuard::open(&env, ballast(), SIZES).unwrap();

    assert_eq!(*guard.space().borrow(), Space::Low);
    assert_eq!(env.disk.free_bytes(ballast()).unwrap(), 3 * MIB - 4096);
}

#[test]
fn ballast_that_does_not_fit_leaves_nothing_behind() {
    let disk = MemoryDisk::new(MIB);
    let env = disk.env();
    let mut file = Ballast::open(&env, ballast(), SIZES.ballast).unwrap();

    let error = wait(file.ensure()).unwrap_err();

    assert!(backend::is_full(&error));
    assert_eq!(file.held(), 0);
    assert_eq!(env.disk.free_bytes(ballast()).unwrap(), MIB);
}

/// The bound on memory is the only place where a full card ends the store.
#[test]
fn full_card_is_a_failure_once_the_memory_for_writes_is_used_up() {
    let disk = MemoryDisk::new(64 * MIB);
    let options = backend::Options {
        held_bytes_max: 64 << 10,
        epoch_bytes_max: 32 << 10,
        starved_retry: Duration::from_millis(1),
        starved_max: 3,
        ..backend::Options::default()
    };
    let (backend, drain) = Backend::open(&disk.env(), &state(), options).unwrap();
    let thread = drain.spawn_thread().unwrap();
    disk.set_free(0);

    let page = vec![7; 4096];
    let written = (0..64).try_for_each(|block| backend.write(block * 4096, &page));

    let error = written.unwrap_err();
    assert!(backend::is_full(&error), "{error}");
    assert_eq!(thread.join().unwrap().unwrap_err().fault(), Fault::Full);
    assert!(backend.failure().borrow().as_ref().is_some_and(Failure::is_full));
}

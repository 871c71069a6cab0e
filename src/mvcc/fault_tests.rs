//! The store on a card that stops working: every k-th operation fails, and all after it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::tests::wait;
use super::*;
use crate::env::{BoxFuture, Disk, DiskFile, Env, Open, host};

/// Operations left before the card is gone.
#[derive(Clone, Debug)]
struct Left(Arc<AtomicU64>);

impl Left {
    fn spend(&self) -> io::Result<()> {
        let spend = |left: u64| left.checked_sub(1);
        match self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
    }
}

struct DyingDisk(Arc<dyn Disk>, Left);

#[derive(Debug)]
struct DyingFile(Arc<dyn DiskFile>, Left);

impl Disk for DyingDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        self.1.spend()?;
        Ok(Arc::new(DyingFile(self.0.open(path, how)?, self.1.clone())))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.0.list(dir)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.0.create_dir_all(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.1.spend()?;
        self.0.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.sync_dir(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.0.exists(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.0.free_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        self.0.lock(path)
    }
}

impl DiskFile for DyingFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.1.spend()?;
        self.0.write_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.1.spend()?;
        self.0.set_len(len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        match self.1.spend() {
            Ok(()) => self.0.sync(),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

fn write(store: &Store, keys: std::ops::Range<u32>) -> Result<(), StoreError> {
    store.write(|txn| {
        for n in keys {
            txn.put(&Bytes::from(format!("key{n}")), &Bytes::from(vec![1; 900]), 0)?;
            txn.end_revision();
        }
        Ok(())
    })
}

/// What one run on a dying card left behind.
struct Run {
    before: StateHash,
    result: Result<(), StoreError>,
    /// By a start on a healthy card.
    found: StateHash,
    survived: bool,
}

fn run(work: fn(&Store) -> Result<(), StoreError>, operations: u64) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let left = Left(Arc::new(AtomicU64::new(u64::MAX)));
    let real = host::env();
    let disk = Arc::new(DyingDisk(Arc::clone(&real.disk), left.clone()));
    let env = Env { disk, ..real.clone() };
    let options = Options { cache_bytes: 64 << 10, drain: DrainOn::Thread };
    let store = Store::open(&env, &path, &options).unwrap();
    write(&store, 0..40).unwrap();
    wait(store.checkpoint().unwrap().durable()).unwrap();
    let before = store.read().unwrap().state_hash().unwrap();

    left.0.store(operations, Ordering::SeqCst);
    let result = work(&store);
    let survived = left.0.load(Ordering::SeqCst) != 0;
    drop(store);

    let store = Store::open(&real, &path, &options).unwrap();
    let found = store.read().unwrap().state_hash().unwrap();
    write(&store, 0..1).unwrap();
    Run { before, result, found, survived }
}

/// Does `work` on a card that dies at operation `k`, for every `k` until it survives. The file must open and
/// hold the state before or the state after; the one after, if the work said it was done. A failed barrier
/// says nothing, so an error may come with either.
fn dies_at_every_operation(work: fn(&Store) -> Result<(), StoreError>) {
    let after = run(work, u64::MAX).found;
    for k in 0.. {
        assert!(k < 2_000, "the work never ends");
        let Run { before, result, found, survived } = run(work, k);
        match &result {
            Ok(()) => assert_eq!(found, after, "{k}: it said it was done"),
            Err(error) => {
                assert!(error.is_no_space() || matches!(error, StoreError::Closed), "{k}: {error}");
                assert!(
                    found == before || found == after,
                    "{k}: neither the old nor the new state"
                );
            }
        }
        if survived {
            assert!(result.is_ok(), "{k}: {result:?}");
            return;
        }
    }
}

#[test]
fn card_that_dies_during_a_checkpoint_leaves_a_whole_state() {
    dies_at_every_operation(|store| {
        write(store, 10..60)?;
        wait(store.checkpoint()?.durable())
    });
}

#[test]
fn card_that_dies_during_a_defragmentation_leaves_a_whole_state() {
    dies_at_every_operation(|store| wait(store.defragment()).map(drop));
}

#[test]
fn card_that_dies_during_a_restore_leaves_a_whole_state() {
    dies_at_every_operation(|store| {
        let mut stream = Vec::new();
        store.dump(&mut stream)?;
        wait(store.restore(&mut stream.as_slice())).map(drop)
    });
}

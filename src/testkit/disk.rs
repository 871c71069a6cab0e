//! A file system in memory that loses, tears, fails, lies and rots on demand.
//!
//! # Shape
//!
//! Every file has two contents: what a reader sees (the page cache) and what survives a power cut. A write changes
//! the first and waits; a barrier moves what waits into the second. Names behave the same way, with
//! [`Disk::sync_dir`] as their barrier. [`FaultDisk::power_cut`] decides sector by sector what of the waiting writes
//! reached the card.
//!
//! # What is modelled
//!
//! - Power cut at any operation; unsynced sectors kept, lost, cut at any byte, filled with zeros, ones or garbage, in
//!   any combination and order.
//! - Names that were created, renamed or removed and not synced: lost, or kept.
//! - The n-th operation, of any kind or of some kinds, failing once or for good: EIO, ENOSPC, a short write.
//! - A failed barrier leaves the page cache "clean": readers see the data, a later barrier does not write it.
//! - Barriers that lie; barriers that take time; a full card; bit flips, on the card or in the page cache only; blocks
//!   that cannot be read until they are written again; restarts without a power cut, after which old handles are dead.
//!
//! # Not here
//!
//! Reordering between files is covered by choosing sectors freely; misdirected writes and rolled-back images are made
//! by tests with [`FaultDisk::overwrite`] and [`FaultDisk::fork`].

mod file;
mod world;

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chance::Random;
use crate::env::{BoxFuture, Disk, DiskFile, Open};
use file::FaultFile;
use world::{Node, World};

/// Bytes a card writes as a unit, at the least.
pub const SECTOR: usize = 512;

/// Kinds of operations, for faults and counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// [`Disk::open`].
    Open,
    /// [`Disk::list`], [`Disk::exists`], [`Disk::free_bytes`], [`DiskFile::len`].
    Look,
    /// [`Disk::create_dir_all`].
    CreateDir,
    /// [`Disk::rename`].
    Rename,
    /// [`Disk::remove`].
    Remove,
    /// [`Disk::sync_dir`].
    SyncDir,
    /// [`DiskFile::read_at`].
    Read,
    /// [`DiskFile::read_uncached_at`].
    ReadUncached,
    /// [`DiskFile::write_at`].
    Write,
    /// [`DiskFile::set_len`].
    SetLen,
    /// [`DiskFile::sync`].
    Sync,
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Input/output error. A barrier that fails so drops what it should have written.
    Eio,
    /// No space left on device.
    Enospc,
    /// A write stops half way with an error; any other operation fails with EIO.
    ShortWrite,
    /// The power goes: a write is in the page cache, nothing works from then on.
    PowerLoss,
}

/// An operation that will fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which one, counted from 1 among those that `only` accepts, from when the fault was set.
    pub nth: u64,
    /// Operations that count.
    pub only: fn(Operation) -> bool,
    /// What happens.
    pub failure: Failure,
    /// Whether all later ones fail too.
    pub for_good: bool,
}

impl Fault {
    /// The n-th operation of any kind fails once.
    pub const fn once(nth: u64, failure: Failure) -> Self {
        Self { nth, only: |_| true, failure, for_good: false }
    }

    /// All operations from the n-th on fail.
    pub const fn for_good(nth: u64, failure: Failure) -> Self {
        Self { nth, only: |_| true, failure, for_good: true }
    }

    /// The power goes at the n-th operation that changes something.
    pub const fn power_loss(nth: u64) -> Self {
        Self { nth, only: changes, failure: Failure::PowerLoss, for_good: true }
    }
}

/// Whether an operation changes what is on the card.
pub const fn changes(operation: Operation) -> bool {
    !matches!(
        operation,
        Operation::Open | Operation::Look | Operation::Read | Operation::ReadUncached
    )
}

/// A piece of a write, or a change of a name, that no barrier has covered.
#[derive(Clone, Copy, Debug)]
pub struct Unsynced<'a> {
    /// The file.
    pub path: &'a Path,
    /// Where the piece starts. 0 for a name.
    pub offset: u64,
    /// Its length, at most [`SECTOR`]. 0 for a name or a change of length.
    pub len: usize,
    /// Its position among all pieces of this power cut.
    pub ordinal: usize,
}

/// What becomes of an unsynced piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Bytes of it that reached the card. A name needs at least one.
    pub kept: usize,
    /// What is found in the rest of it.
    pub rest: Rest,
}

/// What is found where a write did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// What was there before.
    Old,
    /// Zeros.
    Zeros,
    /// All bits set, as in erased flash.
    Ones,
    /// Anything, from this seed.
    Garbage(u64),
}

impl Fate {
    /// It arrived.
    pub const KEPT: Self = Self { kept: usize::MAX, rest: Rest::Old };
    /// It did not.
    pub const LOST: Self = Self { kept: 0, rest: Rest::Old };
}

/// The first `bytes` of the unsynced writes reached the card; `rest` is found in what did not.
pub fn prefix(bytes: usize, rest: impl Fn(usize) -> Rest) -> impl FnMut(&Unsynced<'_>) -> Fate {
    let mut left = bytes;
    move |piece| {
        if piece.len == 0 {
            return if left == 0 { Fate::LOST } else { Fate::KEPT };
        }
        let kept = left.min(piece.len);
        left -= kept;
        Fate { kept, rest: if kept == piece.len { Rest::Old } else { rest(piece.ordinal) } }
    }
}

/// Each piece has its own fate: kept, lost, torn or filled.
pub fn random(mut random: Random) -> impl FnMut(&Unsynced<'_>) -> Fate {
    let kept_percent = random.below(101);
    move |piece| {
        if random.percent(kept_percent) {
            return Fate::KEPT;
        }
        let kept = if random.percent(20) { random.index(piece.len.max(1)) } else { 0 };
        let rest = match random.below(5) {
            0 => Rest::Zeros,
            1 => Rest::Ones,
            2 => Rest::Garbage(random.next_u64()),
            _ => Rest::Old,
        };
        Fate { kept, rest: if piece.len == 0 { Rest::Old } else { rest } }
    }
}

/// What was done to one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileCounters {
    /// Writes.
    pub writes: u64,
    /// Their bytes.
    pub bytes_written: u64,
    /// Barriers that returned success.
    pub syncs: u64,
    /// Changes of length by [`DiskFile::set_len`], and writes behind the end.
    pub growths: u64,
}

/// Called with a file's path when a barrier starts; the barrier waits for what it returns.
pub type SyncDelay = Arc<dyn Fn(&Path) -> BoxFuture<'static, ()> + Send + Sync>;

/// The file system. Clones share it.
#[derive(Clone)]
pub struct FaultDisk(Arc<Mutex<World>>);

impl fmt::Debug for FaultDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultDisk")
    }
}

impl Default for FaultDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl FaultDisk {
    /// An empty file system that works.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(World::default())))
    }

    /// An empty file system with this directory, and its parents, durable.
    pub fn with_dir(dir: &Path) -> Self {
        let disk = Self::new();
        disk.lock().make_dir_durable(dir);
        disk
    }

    /// A copy that changes independently: the same contents, durable and not; no faults, counters at zero.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().fork())))
    }

    /// The card is overwritten with an image of itself, or of another. Whoever had it open has nothing any more.
    pub fn put_back(&self, image: &Self) {
        let mut fork = image.lock().fork();
        let mut world = self.lock();
        (fork.boot, fork.capacity) = (world.boot + 1, world.capacity);
        *world = fork;
    }

    /// The power goes and comes back. `fate` decides what of the unsynced writes is found. Faults are lifted.
    pub fn power_cut(&self, fate: impl FnMut(&Unsynced<'_>) -> Fate) {
        self.lock().power_cut(fate);
    }

    /// The process dies and is started again; the kernel lives on. Faults are lifted.
    pub fn restart(&self) {
        self.lock().restart();
    }

    /// Lets an operation fail.
    pub fn fail(&self, fault: Fault) {
        self.lock().set_fault(Some(fault));
    }

    /// Everything works again.
    pub fn heal(&self) {
        self.lock().set_fault(None);
    }

    /// Whether the fault that was set has struck.
    pub fn has_failed(&self) -> bool {
        self.lock().has_failed()
    }

    /// Operations of these kinds so far.
    pub fn operations(&self, only: impl Fn(Operation) -> bool) -> u64 {
        self.lock().operations(only)
    }

    /// Barriers return success and do nothing, or work again.
    pub fn set_lying(&self, lying: bool) {
        self.lock().lying = lying;
    }

    /// Barriers take time.
    pub fn set_sync_delay(&self, delay: Option<SyncDelay>) {
        self.lock().sync_delay = delay;
    }

    /// Bytes that all files together may have.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().capacity = bytes;
    }

    /// What was done to a file since the disk was made.
    pub fn counters(&self, path: &Path) -> FileCounters {
        self.lock().counters.get(path).copied().unwrap_or_default()
    }

    /// What a reader sees in a file; `None` if it does not exist.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        self.lock().file(path).map(|inode| inode.current.to_vec())
    }

    /// What is on the card of a file whose name is durable.
    pub fn durable(&self, path: &Path) -> Option<Vec<u8>> {
        self.lock().durable_file(path).map(|inode| inode.durable.to_vec())
    }

    /// Changes one bit of a file, on the card and in the page cache.
    pub fn flip(&self, path: &Path, offset: u64, bit: u8) {
        let mut world = self.lock();
        let Some(inode) = world.file_mut(path) else {
            panic!("no file {} to flip a bit in", path.display());
        };
        inode.change(offset, |bytes| bytes[0] ^= 1 << bit);
    }

    /// Changes one bit of a file in the page cache only: memory that forgot, or a transfer that went wrong.
    pub fn flip_cached(&self, path: &Path, offset: u64, bit: u8) {
        let mut world = self.lock();
        let Some(inode) = world.file_mut(path) else {
            panic!("no file {} to flip a bit in", path.display());
        };
        inode.change_cached(offset, |bytes| bytes[0] ^= 1 << bit);
    }

    /// Blocks of a file that cannot be read any more, neither from the page cache nor from the card.
    pub fn break_blocks(&self, path: &Path, blocks: Range<u64>) {
        self.lock().broken.push((path.to_owned(), blocks));
    }

    /// Puts bytes into a file behind everybody's back, on the card and in the page cache.
    pub fn overwrite(&self, path: &Path, offset: u64, bytes: &[u8]) {
        let mut world = self.lock();
        let Some(inode) = world.file_mut(path) else {
            panic!("no file {} to overwrite", path.display());
        };
        inode.change(offset, |old| old[..bytes.len()].copy_from_slice(bytes));
    }

    /// Bytes of writes that no barrier has covered.
    pub fn unsynced_bytes(&self) -> usize {
        self.lock().unsynced_bytes()
    }

    /// All files, by name.
    pub fn files(&self) -> Vec<PathBuf> {
        self.lock()
            .names
            .iter()
            .filter(|(_, n)| matches!(n, Node::File(_)))
            .map(|(p, _)| p.clone())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for FaultDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let mut world = self.lock();
        world.begin(Operation::Open)?;
        let inode = world.open(path, how)?;
        let boot = world.boot;
        drop(world);
        Ok(Arc::new(FaultFile {
            world: Arc::clone(&self.0),
            path: path.to_owned(),
            inode,
            boot,
            writable: how != Open::Read,
        }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut world = self.lock();
        world.begin(Operation::Look)?;
        world.list(dir)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.lock();
        world.begin(Operation::CreateDir)?;
        world.create_dir_all(dir);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.lock();
        world.begin(Operation::Rename)?;
        world.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut world = self.lock();
        world.begin(Operation::Remove)?;
        world.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.lock();
        world.begin(Operation::SyncDir)?;
        world.sync_dir(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let mut world = self.lock();
        world.begin(Operation::Look)?;
        Ok(world.names.contains_key(path))
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        let mut world = self.lock();
        world.begin(Operation::Look)?;
        Ok(world.free_bytes())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        let mut world = Self::lock(self);
        world.begin(Operation::Open)?;
        if !world.locks.insert(path.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let boot = world.boot;
        drop(world);
        Ok(Box::new(Lock { world: Arc::clone(&self.0), path: path.to_owned(), boot }))
    }
}

struct Lock {
    world: Arc<Mutex<World>>,
    path: PathBuf,
    boot: u64,
}

impl Drop for Lock {
    fn drop(&mut self) {
        let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
        if world.boot == self.boot {
            world.locks.remove(&self.path);
        }
    }
}

#[cfg(test)]
mod tests;

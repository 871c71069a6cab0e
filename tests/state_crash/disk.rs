//! A card in memory: loses power at a chosen operation, keeps any part of what was not synced, fails, stalls.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use k3s_server::env::{BoxFuture, Clock, Disk, DiskFile, Entropy, Env, Open};

const SECTOR: usize = 512;

/// A small generator: the seed is the whole story of a run.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    SetLen(u64),
}

#[derive(Clone, Debug, Default)]
struct Content {
    durable: Vec<u8>,
    cached: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Default)]
struct Card {
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    contents: Vec<Content>,
    operations: u64,
    /// From this operation on there is no power.
    cut_at: Option<u64>,
    /// From this operation on, once or for good, the kernel answers with this.
    fail: Option<(u64, io::ErrorKind, bool)>,
    failed: bool,
    failed_to_read: bool,
    /// Barriers do not return.
    stalled: bool,
    waiting: Vec<Waker>,
    /// What happens just before the next read.
    before_read: Option<Box<dyn FnOnce() + Send>>,
    written: u64,
    barriers: u64,
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Card")
    }
}

impl Card {
    fn operation(&mut self) -> io::Result<()> {
        self.operations += 1;
        if self.cut_at.is_some_and(|at| at < self.operations) {
            return Err(io::Error::other("no power"));
        }
        match self.fail {
            Some((at, kind, for_good)) if at < self.operations && (for_good || !self.failed) => {
                self.failed = true;
                Err(kind.into())
            }
            _ => Ok(()),
        }
    }
}

/// The card; clones are the same card.
#[derive(Clone, Debug, Default)]
pub struct CardDisk(Arc<Mutex<Card>>);

#[derive(Debug)]
struct CardFile {
    card: Arc<Mutex<Card>>,
    content: usize,
}

impl CardDisk {
    pub fn env(&self, seed: u64) -> Env {
        Env {
            disk: Arc::new(self.clone()),
            clock: Arc::new(NoTime),
            entropy: Arc::new(Seeded(Mutex::new(Chance::new(seed)))),
        }
    }

    pub fn written(&self) -> u64 {
        self.0.lock().unwrap().written
    }

    pub fn barriers(&self) -> u64 {
        self.0.lock().unwrap().barriers
    }

    /// Cuts the power after `operations` more operations.
    pub fn cut_after(&self, operations: u64) {
        let mut card = self.0.lock().unwrap();
        card.cut_at = Some(card.operations + operations);
    }

    pub fn fail_after(&self, operations: u64, kind: io::ErrorKind, for_good: bool) {
        let mut card = self.0.lock().unwrap();
        card.fail = Some((card.operations + operations, kind, for_good));
        card.failed = false;
        card.failed_to_read = false;
    }

    /// Whether the planned failure met a read.
    pub fn has_failed_to_read(&self) -> bool {
        self.0.lock().unwrap().failed_to_read
    }

    /// Whether the planned failure happened; plans no other.
    pub fn heal(&self) -> bool {
        let mut card = self.0.lock().unwrap();
        card.fail = None;
        std::mem::take(&mut card.failed)
    }

    pub fn stall(&self, stalled: bool) {
        let mut card = self.0.lock().unwrap();
        card.stalled = stalled;
        card.waiting.drain(..).for_each(Waker::wake);
    }

    pub fn before_next_read(&self, event: impl FnOnce() + Send + 'static) {
        self.0.lock().unwrap().before_read = Some(Box::new(event));
    }

    /// The kernel never stopped: everything written is still seen.
    pub fn restart(&self) {
        self.0.lock().unwrap().cut_at = None;
    }

    /// Power comes back: of what was not synced, any sectors are there, some of them garbled.
    pub fn power_on(&self, chance: &mut Chance) {
        let mut card = self.0.lock().unwrap();
        card.cut_at = None;
        if chance.one_in(2) {
            card.durable_names = card.names.clone();
        }
        card.names = card.durable_names.clone();
        let garble = chance.one_in(4);
        let keep_one_in = [1, 2, 4, 1_000_000][chance.below(4) as usize];
        for content in &mut card.contents {
            let mut lens =
                content.unsynced.iter().filter(|c| matches!(c, Change::SetLen(_))).count();
            lens = chance.below(lens as u64 + 1) as usize;
            for change in std::mem::take(&mut content.unsynced) {
                match change {
                    Change::SetLen(len) if lens > 0 => {
                        lens -= 1;
                        content.durable.resize(len as usize, 0);
                    }
                    Change::SetLen(_) => {}
                    Change::Write(offset, bytes) => {
                        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                            let at = offset as usize + index * SECTOR;
                            if at + sector.len() > content.durable.len()
                                || !chance.one_in(keep_one_in)
                            {
                                continue;
                            }
                            let target = &mut content.durable[at..at + sector.len()];
                            target.copy_from_slice(sector);
                            if garble && chance.one_in(8) {
                                target.iter_mut().for_each(|byte| *byte = chance.next() as u8);
                            }
                        }
                    }
                }
            }
            content.cached = content.durable.clone();
        }
    }

    /// Everything so far counts as synced.
    pub fn settle(&self) {
        let mut card = self.0.lock().unwrap();
        card.durable_names = card.names.clone();
        for content in &mut card.contents {
            content.durable = content.cached.clone();
            content.unsynced.clear();
        }
    }

    /// A card with the same files.
    pub fn copy(&self) -> Self {
        let card = self.0.lock().unwrap();
        Self(Arc::new(Mutex::new(Card {
            names: card.names.clone(),
            durable_names: card.durable_names.clone(),
            contents: card.contents.clone(),
            ..Card::default()
        })))
    }

    /// The bytes of a file, changed behind everybody's back.
    pub fn edit<T>(&self, path: &Path, edit: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let mut card = self.0.lock().unwrap();
        let content = card.names[path];
        let content = &mut card.contents[content];
        let result = edit(&mut content.cached);
        content.durable.clone_from(&content.cached);
        result
    }

    /// Flips a bit without the cost of [`CardDisk::edit`].
    pub fn flip(&self, path: &Path, bit: usize) {
        let mut card = self.0.lock().unwrap();
        let content = card.names[path];
        let content = &mut card.contents[content];
        content.cached[bit / 8] ^= 1 << (bit % 8);
        content.durable[bit / 8] ^= 1 << (bit % 8);
    }
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for CardDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let mut card = self.0.lock().unwrap();
        card.operation()?;
        let content = match (card.names.get(path).copied(), how) {
            (Some(_), Open::Create) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(content), _) => content,
            (None, Open::Create) => {
                card.contents.push(Content::default());
                let content = card.contents.len() - 1;
                card.names.insert(path.to_owned(), content);
                content
            }
            (None, _) => return Err(missing()),
        };
        Ok(Arc::new(CardFile { card: self.0.clone(), content }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let card = self.0.lock().unwrap();
        Ok(card.names.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    fn create_dir_all(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut card = self.0.lock().unwrap();
        card.operation()?;
        let content = card.names.remove(from).ok_or_else(missing)?;
        card.names.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut card = self.0.lock().unwrap();
        card.operation()?;
        card.names.remove(path).map(|_| ()).ok_or_else(missing)
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut card = self.0.lock().unwrap();
        card.operation()?;
        card.durable_names = card.names.clone();
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.0.lock().unwrap().names.contains_key(path))
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn lock(&self, _path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl DiskFile for CardFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let event = self.card.lock().unwrap().before_read.take();
        event.into_iter().for_each(|event| event());
        let mut card = self.card.lock().unwrap();
        let allowed = card.operation();
        card.failed_to_read |= allowed.is_err();
        allowed?;
        let at = offset as usize;
        let bytes = card.contents[self.content].cached.get(at..at + buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut card = self.card.lock().unwrap();
        card.operation()?;
        card.written += bytes.len() as u64;
        let content = &mut card.contents[self.content];
        let end = offset as usize + bytes.len();
        if content.cached.len() < end {
            content.cached.resize(end, 0);
            content.unsynced.push(Change::SetLen(end as u64));
        }
        content.cached[offset as usize..end].copy_from_slice(bytes);
        content.unsynced.push(Change::Write(offset, bytes.to_vec()));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.card.lock().unwrap().contents[self.content].cached.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut card = self.card.lock().unwrap();
        card.operation()?;
        let content = &mut card.contents[self.content];
        content.cached.resize(len as usize, 0);
        content.unsynced.push(Change::SetLen(len));
        Ok(())
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(Barrier { file: self, covered: None, polls: 0 })
    }
}

/// Takes a few polls, so that redb's operations and the drain's interleave.
struct Barrier<'a> {
    file: &'a CardFile,
    covered: Option<usize>,
    polls: u32,
}

impl Future for Barrier<'_> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut card = self.file.card.lock().unwrap();
        let covered =
            self.covered.unwrap_or_else(|| card.contents[self.file.content].unsynced.len());
        if card.stalled {
            card.waiting.push(context.waker().clone());
            drop(card);
            self.covered = Some(covered);
            return Poll::Pending;
        }
        if self.polls < 3 {
            drop(card);
            self.covered = Some(covered);
            self.polls += 1;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        card.operation()?;
        card.barriers += 1;
        let content = &mut card.contents[self.file.content];
        for change in content.unsynced.drain(..covered) {
            match change {
                Change::SetLen(len) => content.durable.resize(len as usize, 0),
                Change::Write(offset, bytes) => {
                    let at = offset as usize;
                    content.durable[at..at + bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Every sleep is over at once.
struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    fn sleep(&self, _duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

struct Seeded(Mutex<Chance>);

impl Entropy for Seeded {
    fn fill(&self, buffer: &mut [u8]) {
        let mut chance = self.0.lock().unwrap();
        buffer.iter_mut().for_each(|byte| *byte = chance.next() as u8);
    }
}

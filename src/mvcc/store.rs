//! Owns the file: opening it, one writer at a time, checkpoints, and replacing it as a whole.
//!
//! A snapshot from a peer and a defragmentation both write a new file beside the old one, make it durable and
//! rename it over. So a power cut leaves either the old or the new, and readers that are under way keep the
//! file they started on: nobody waits for them, and they wait for nobody.
//!
//! # Invariants
//!
//! - At most one writer. A replacement that a write overtook fails and changes nothing.
//! - The name `state.redb` always refers to a complete file.
//! - A commit is durable only when its [`Checkpoint`] says so, after a replacement, or after [`Store::close`].
//! - A file that was replaced is never written again under its old name, and what befalls it is nobody's business.

use std::future::Future;
use std::io::{self, Read, Write};
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use redb::{Durability, StorageBackend};
use tokio::sync::{OwnedMutexGuard, watch};

use crate::env::Env;
use crate::types::{ClusterId, LogId};

use super::backend::{self, Epoch, Failure, Operation, Reports, Scrubbed, blocking};
use super::dump::{self, Loader, Pending, StreamReader};
use super::engine::Engine;
use super::format::Head;
use super::{DumpSummary, ReadTxn, StoreError, StoreSize, WriteTxn, write};

/// Page cache of a file that is being filled, in order, while another one is open.
const FILL_CACHE_BYTES: usize = 4 << 20;

/// Blocks that are checked together.
pub const SCRUB_BLOCKS: u32 = 64;

/// Who carries writes to the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainOn {
    /// A thread of its own: the card may block it.
    Thread,
    /// A task of the running tokio runtime: for simulated cards, which take simulated time.
    Task,
}

/// How to open the store.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Page cache.
    pub cache_bytes: usize,
    /// Who carries writes to the card.
    pub drain: DrainOn,
}

/// The state machine's file. Clones share it; the last one closes it.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    env: Env,
    path: PathBuf,
    options: Options,
    /// `None` once closed.
    engine: RwLock<Option<Arc<Engine>>>,
    /// Held by the writer; counts commits, so that a replacement notices that it was overtaken.
    commits: Mutex<u64>,
    /// Held while a file is built beside this one, which has only one name for that.
    replacing: tokio::sync::Mutex<()>,
    /// Held while a snapshot is received, and until it is adopted or dropped.
    receiving: Arc<tokio::sync::Mutex<()>>,
    /// What whichever file is open tells of itself.
    reports: Reports,
    /// [`Head::bytes`] after the last commit.
    bytes: AtomicU64,
    /// The card is nearly full, as [`Store::set_room_low`] said last.
    room_low: AtomicBool,
}

/// A durable commit on its way to the card.
#[must_use = "nothing is durable before `durable` returned"]
#[derive(Debug)]
pub struct Checkpoint {
    applied: Option<LogId>,
    epoch: Epoch,
    engine: Arc<Engine>,
}

impl Checkpoint {
    /// The last entry it contains.
    pub const fn applied(&self) -> Option<LogId> {
        self.applied
    }

    /// Completes when the state survives a power cut. While the card is full that is an error, although the
    /// state may become durable later: see [`Store::starved`].
    pub async fn durable(self) -> Result<(), StoreError> {
        // Not a failure to be told: a card that is full may have room again.
        Ok(self.engine.backend.wait_durable(self.epoch).await?)
    }
}

impl Store {
    /// Opens the file, making it if it is not there. Reads and writes files, so it blocks.
    pub fn open(env: &Env, path: &Path, options: &Options) -> Result<Self, StoreError> {
        for leftover in [incoming_path(path), received_path(path)] {
            backend::remove(env, &leftover)?;
        }
        let reports = Reports::default();
        let engine = Engine::open(env, path, options, &reports)?;
        if !engine.is_founded()? {
            engine.write(Durability::Immediate, write::found, |_| Ok(()))?;
        }
        Self::with(env, path, options, engine, reports)
    }

    fn with(
        env: &Env,
        path: &Path,
        options: &Options,
        engine: Engine,
        reports: Reports,
    ) -> Result<Self, StoreError> {
        let head = engine.head()?;
        Ok(Self {
            inner: Arc::new(Inner {
                env: env.clone(),
                path: path.to_path_buf(),
                options: *options,
                engine: RwLock::new(Some(Arc::new(engine))),
                commits: Mutex::new(0),
                replacing: tokio::sync::Mutex::new(()),
                receiving: Arc::default(),
                reports,
                bytes: AtomicU64::new(head.bytes),
                room_low: AtomicBool::new(false),
            }),
        })
    }

    /// Builds a store from a snapshot stream, in place of whatever file is at `path`. Nobody may have that open.
    pub async fn load_from(
        env: &Env,
        path: &Path,
        options: &Options,
        input: &mut (dyn Read + Send),
    ) -> Result<Self, StoreError> {
        build_beside(env, path, options, |engine| load(engine, input)).await?;
        blocking(|| {
            backend::install(env, &incoming_path(path), path)?;
            let reports = Reports::default();
            let engine = Engine::open(env, path, options, &reports)?;
            Self::with(env, path, options, engine, reports)
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The moment after the last applied command.
    pub fn read(&self) -> Result<ReadTxn, StoreError> {
        let engine = self.engine()?;
        engine.noted(ReadTxn::begin(Arc::clone(&engine)))
    }

    /// Runs `body` with the writer. What it did becomes visible as a whole when it succeeds, and is undone when
    /// it fails. Not durable: see [`Store::checkpoint`]. Waits for another writer; so it blocks.
    pub fn write<T>(
        &self,
        body: impl FnOnce(&mut WriteTxn<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut commits = self.writer();
        let engine = self.engine()?;
        let written = engine.write(Durability::None, write::begin, body);
        let (value, head) = engine.noted(written)?;
        *commits += 1;
        self.inner.bytes.store(head.bytes, Ordering::Relaxed);
        Ok(value)
    }

    /// Begins to make everything written so far survive a power cut. Does not wait for the card. The log must be
    /// durable up to the last applied entry before.
    pub fn checkpoint(&self) -> Result<Checkpoint, StoreError> {
        let _commits = self.writer();
        let engine = self.engine()?;
        let begin = || Ok((engine.head()?.applied, engine.checkpoint()?));
        let (applied, epoch) = engine.noted(begin())?;
        Ok(Checkpoint { applied, epoch, engine })
    }

    /// Sizes of the file.
    pub fn size(&self) -> Result<StoreSize, StoreError> {
        Ok(StoreSize {
            total: self.engine()?.backend.len()?,
            in_use: self.inner.bytes.load(Ordering::Relaxed),
        })
    }

    /// Begins to receive a peer's snapshot into a file of its own. The open one goes on meanwhile. `None` while
    /// another one is being received.
    pub fn receive(&self) -> Result<Option<Receiving>, StoreError> {
        let Ok(only) = Arc::clone(&self.inner.receiving).try_lock_owned() else { return Ok(None) };
        let Inner { env, path, options, .. } = &*self.inner;
        let file = OwnFile { env: env.clone(), path: received_path(path), _only: only };
        let engine = open_beside(env, &file.path, options)?;
        Ok(Some(Receiving {
            engine: Unfinished(Some(engine)),
            reader: StreamReader::default(),
            pending: Pending::default(),
            file,
        }))
    }

    /// Puts a received snapshot in the place of the open file, whatever was written to that since. A crash leaves one
    /// of the two. Called where writes are, so that none is under way.
    pub async fn adopt(&self, received: Received) -> Result<(), StoreError> {
        let _only = self.inner.replacing.lock().await;
        let before = *self.writer();
        blocking(|| self.swap_in(before, &received.file.path))
    }

    /// Reads and checks up to `count` blocks of the file on the card, from block `from` on. Damage is told to the caller
    /// only: see [`backend::Backend::scrub`].
    pub fn scrub(&self, from: u32, count: u32) -> Result<Scrubbed, StoreError> {
        Ok(self.engine()?.backend.scrub(from, count)?)
    }

    /// Reads and checks everything: every block on the card, and every record. The first damage is the error.
    pub fn verify(&self) -> Result<(), StoreError> {
        let mut next = Some(0);
        while let Some(from) = next {
            let scrubbed = self.scrub(from, SCRUB_BLOCKS)?;
            if let Some(failure) = scrubbed.damaged.into_iter().next() {
                return Err(failure.into());
            }
            next = scrubbed.next;
        }
        self.read()?.each_record(&mut |_, _, _| Ok(()))
    }

    /// Replaces the state by a peer's snapshot. On an error the old state stays; if it was the card that failed
    /// half-way, [`Store::failed`] says so, and the next open finds one of the two.
    pub async fn restore(&self, input: &mut (dyn Read + Send)) -> Result<DumpSummary, StoreError> {
        let _only = self.inner.replacing.lock().await;
        let before = *self.writer();
        self.replace(before, |engine| load(engine, input)).await
    }

    /// Rewrites the file without its free pages. Readers go on; a write that comes in meanwhile makes it fail, so
    /// it is called where writes are. Durable when it returns, so the log must be durable up to the last applied
    /// entry before. Needs room for a second copy.
    pub async fn defragment(&self) -> Result<StoreSize, StoreError> {
        let _only = self.inner.replacing.lock().await;
        // Counted before the source is read: a write in between is one too many, not one too few.
        let before = *self.writer();
        let source = self.read()?;
        self.replace(before, |engine| {
            fill(engine, |loader| {
                source.each_record(&mut |table, key, value| loader.insert(table, key, value))
            })
        })
        .await?;
        self.size()
    }

    /// Makes everything durable and closes the file. Later calls fail with [`StoreError::Closed`].
    ///
    /// Completes when the last reader has let go of the file. Everything is durable before that, so a caller
    /// who does not want to wait for readers may stop waiting.
    pub async fn close(&self) -> Result<(), StoreError> {
        let _only = self.inner.replacing.lock().await;
        let engine = {
            let _commits = self.writer();
            self.slot().take().ok_or(StoreError::Closed)?
        };
        Engine::close(engine).await
    }

    /// Whether [`Store::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.engine().is_err()
    }

    /// Completes when the file cannot be used any more, and says why. Never, if the store is closed or dropped
    /// before.
    pub fn failed(&self) -> impl Future<Output = Failure> + Send + 'static {
        let mut failure = self.inner.reports.failure();
        async move {
            let first = match failure.wait_for(Option::is_some).await {
                Ok(failure) => failure.clone(),
                Err(_closed) => None,
            };
            match first {
                Some(first) => first,
                None => std::future::pending().await,
            }
        }
    }

    /// Whether the card is full. While it is, reads and writes go on and nothing becomes durable; the writes are
    /// held in memory, and when that is used up as well, [`Store::failed`] completes. Call [`Store::room_made`]
    /// when there may be room again; it is also tried every second.
    pub fn starved(&self) -> watch::Receiver<bool> {
        self.inner.reports.starved()
    }

    /// Whether the card has room for deletes and compaction only: it is full, or nearly. Costs next to nothing, so it
    /// may be asked before every write of a client.
    pub fn is_short_of_room(&self) -> bool {
        self.inner.room_low.load(Ordering::Relaxed) || self.inner.reports.is_starved()
    }

    /// What whoever watches the room on the card has found: see [`super::ballast`].
    pub fn set_room_low(&self, low: bool) {
        self.inner.room_low.store(low, Ordering::Relaxed);
    }

    /// There may be room on the card again.
    pub fn room_made(&self) {
        if let Ok(engine) = self.engine() {
            engine.backend.room_made();
        }
    }

    /// Writes the state as a snapshot stream: see [`ReadTxn::dump`].
    pub fn dump(&self, out: &mut dyn Write) -> Result<DumpSummary, StoreError> {
        self.read()?.dump(out)
    }

    async fn replace<T>(
        &self,
        before: u64,
        build: impl FnOnce(&Engine) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let Inner { env, path, options, .. } = &*self.inner;
        let built = build_beside(env, path, options, build).await?;
        blocking(|| self.swap_in(before, &incoming_path(path)))?;
        Ok(built)
    }

    /// Puts the file that was built in the place of the open one, unless a write came in since `before`.
    fn swap_in(&self, before: u64, from: &Path) -> Result<(), StoreError> {
        let inner = &self.inner;
        let mut commits = self.writer();
        let old = self.engine()?;
        if *commits != before {
            drop(commits);
            backend::remove(&inner.env, from)?;
            return Err(StoreError::Overtaken);
        }
        match self.install(from) {
            Ok((engine, head)) => {
                *commits += 1;
                *self.slot() = Some(Arc::new(engine));
                inner.bytes.store(head.bytes, Ordering::Relaxed);
                old.backend.retire();
                Ok(())
            }
            Err(error) => {
                // Which file has the name now is not known, so the open one must not promise anything more.
                old.backend.fail(&replace_failure(&error));
                Err(error)
            }
        }
    }

    fn install(&self, from: &Path) -> Result<(Engine, Head), StoreError> {
        let Inner { env, path, options, reports, .. } = &*self.inner;
        backend::install(env, from, path)?;
        let engine = Engine::open(env, path, options, reports)?;
        let head = engine.head()?;
        Ok((engine, head))
    }

    fn slot(&self) -> RwLockWriteGuard<'_, Option<Arc<Engine>>> {
        self.inner.engine.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn engine(&self) -> Result<Arc<Engine>, StoreError> {
        let engine = self.inner.engine.read().unwrap_or_else(PoisonError::into_inner);
        engine.clone().ok_or(StoreError::Closed)
    }

    /// A writer that panicked has committed nothing, so its lock may be taken over.
    fn writer(&self) -> MutexGuard<'_, u64> {
        self.inner.commits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn replace_failure(error: &StoreError) -> Failure {
    error.failure().unwrap_or_else(|| {
        let kind =
            if error.is_no_space() { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
        Failure::io(Operation::Replace, io::Error::new(kind, error.to_string()))
    })
}

/// A file beside the open one that is removed unless it has taken that one's place.
#[derive(Debug)]
struct OwnFile {
    env: Env,
    path: PathBuf,
    _only: OwnedMutexGuard<()>,
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        // The next open removes it if this cannot.
        drop(backend::remove(&self.env, &self.path));
    }
}

/// A snapshot that arrives, unit by unit: see [`super::DumpStream`].
#[derive(Debug)]
pub struct Receiving {
    /// Before `file`: closed before it is removed.
    engine: Unfinished,
    reader: StreamReader,
    pending: Pending,
    file: OwnFile,
}

impl Receiving {
    /// Stores one unit. Waits if the card cannot follow. After an error nothing more is taken.
    pub fn take(&mut self, unit: &[u8]) -> Result<(), StoreError> {
        let Some(engine) = &self.engine.0 else {
            return Err(StoreError::Stream("a part of it was refused".to_owned()));
        };
        let taken = blocking(|| {
            let mut loader = Loader::resume(&engine.database, mem::take(&mut self.pending));
            let mut rest = unit;
            self.reader.take_unit(&mut rest, &mut loader)?;
            self.pending = loader.pause();
            if rest.is_empty() {
                Ok(())
            } else {
                Err(StoreError::Stream("a unit is too long".into()))
            }
        });
        let taken = engine.noted(taken);
        if taken.is_err() {
            self.engine = Unfinished(None);
        }
        taken
    }

    /// Records stored so far.
    pub const fn records(&self) -> u64 {
        self.reader.records()
    }

    /// Whether the last unit was taken.
    pub const fn has_ended(&self) -> bool {
        self.reader.ended().is_some()
    }

    /// Checks that all of it came, and completes when it survives a power cut.
    pub async fn finish(mut self) -> Result<Received, StoreError> {
        let (Some(summary), Some(engine)) = (self.reader.ended(), self.engine.0.take()) else {
            return Err(StoreError::Stream("it was cut off".to_owned()));
        };
        let mut loader = Loader::resume(&engine.database, mem::take(&mut self.pending));
        let head = engine.noted(blocking(|| {
            let head = complete(&engine, &mut loader)?;
            engine.checkpoint()?;
            Ok(head)
        }));
        let head = match head {
            Ok(head) => head,
            Err(error) => {
                engine.backend.retire();
                return Err(error);
            }
        };
        Engine::close(Arc::new(engine)).await?;
        Ok(Received { head, summary, file: self.file })
    }
}

/// The file of a snapshot that may never be complete.
#[derive(Debug)]
struct Unfinished(Option<Engine>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Half a file is of no use: nothing more of it needs to reach the card.
        if let Some(engine) = &self.0 {
            engine.backend.retire();
        }
    }
}

/// A snapshot that is complete and durable, in a file of its own.
#[derive(Debug)]
pub struct Received {
    head: Head,
    summary: DumpSummary,
    file: OwnFile,
}

impl Received {
    /// The last entry it contains.
    pub const fn applied(&self) -> Option<LogId> {
        self.head.applied
    }

    /// The cluster it belongs to.
    pub const fn cluster_id(&self) -> Option<ClusterId> {
        self.head.cluster
    }

    /// What the stream carried.
    pub const fn summary(&self) -> DumpSummary {
        self.summary
    }
}

fn open_beside(env: &Env, path: &Path, options: &Options) -> Result<Engine, StoreError> {
    backend::remove(env, path)?;
    // What becomes of this file does not concern the owner of the open one.
    let options = Options { cache_bytes: options.cache_bytes.min(FILL_CACHE_BYTES), ..*options };
    Engine::open(env, path, &options, &Reports::default())
}

/// Builds a durable, closed file under another name.
async fn build_beside<T>(
    env: &Env,
    path: &Path,
    options: &Options,
    build: impl FnOnce(&Engine) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let incoming = incoming_path(path);
    let engine = open_beside(env, &incoming, options)?;
    let built = blocking(|| {
        let built = build(&engine)?;
        engine.checkpoint()?;
        Ok(built)
    });
    let built = engine.noted(built);
    if built.is_err() {
        // Half a file is of no use: nothing more of it needs to reach the card.
        engine.backend.retire();
    }
    let closed = Engine::close(Arc::new(engine)).await;
    let built = built.and_then(|built| closed.map(|()| built));
    if built.is_err() {
        // The next open removes it if this cannot.
        drop(backend::remove(env, &incoming));
    }
    built
}

fn load(engine: &Engine, input: &mut dyn Read) -> Result<DumpSummary, StoreError> {
    fill(engine, |loader| dump::read_stream(input, loader))
}

/// Fills an empty file with records, in commits that bound what redb has to hold.
fn fill<T>(
    engine: &Engine,
    source: impl FnOnce(&mut Loader<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut loader = Loader::new(&engine.database);
    let value = source(&mut loader)?;
    complete(engine, &mut loader)?;
    Ok(value)
}

/// The last commit, and a look at what came of it: once it has the old file's place there is no way back.
fn complete(engine: &Engine, loader: &mut Loader<'_>) -> Result<Head, StoreError> {
    loader.finish()?;
    if !engine.is_founded()? {
        return Err(StoreError::Stream("it holds no state".to_owned()));
    }
    engine.head()
}

fn incoming_path(path: &Path) -> PathBuf {
    beside(path, ".incoming")
}

fn received_path(path: &Path) -> PathBuf {
    beside(path, ".received")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

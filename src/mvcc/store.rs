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

use std::future::Future;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use redb::{Builder, Database, Durability, ReadTransaction, ReadableDatabase, StorageBackend};

use crate::env::Env;
use crate::types::LogId;

use super::backend::{self, Backend, Drain, Epoch};
use super::dump::{self, Loader};
use super::format::{self, FORMAT_KEY, Head};
use super::read::{self, META};
use super::{DumpSummary, ReadTxn, StoreError, StoreSize, WriteTxn, write};

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
    engine: RwLock<Arc<Engine>>,
    /// Held by the writer; counts commits, so that a replacement notices that it was overtaken.
    commits: Mutex<u64>,
    /// [`Head::bytes`] after the last commit.
    bytes: AtomicU64,
}

/// One open file.
pub(super) struct Engine {
    database: Database,
    backend: Backend,
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

    /// Completes when the state survives a power cut.
    pub async fn durable(self) -> Result<(), StoreError> {
        Ok(self.engine.backend.wait_durable(self.epoch).await?)
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}

fn start(drain: Drain, on: DrainOn) -> Result<(), StoreError> {
    match on {
        // Neither handle is needed: the drain reports through the backend, and ends when the database closes.
        DrainOn::Thread => drop(drain.spawn_thread()?),
        DrainOn::Task => drop(tokio::spawn(drain.run())),
    }
    Ok(())
}

impl Engine {
    fn open(env: &Env, path: &Path, options: &Options) -> Result<Self, StoreError> {
        let (backend, drain) = Backend::open(env, path, backend::Options::default())?;
        start(drain, options.drain)?;
        let database = Builder::new()
            .set_cache_size(options.cache_bytes)
            .create_with_backend(backend.clone())?;
        Ok(Self { database, backend })
    }

    /// Closes the file and waits until everything is on the card.
    async fn close(self) -> Result<(), StoreError> {
        let drained = self.backend.drained();
        drop(self);
        Ok(drained.await?)
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        Ok(self.database.begin_read()?)
    }

    /// Whether the file has our tables; checks that this build can read them.
    fn is_founded(&self) -> Result<bool, StoreError> {
        let txn = self.begin_read()?;
        let meta = match txn.open_table(META) {
            Ok(meta) => meta,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let Some(bytes) = meta.get(FORMAT_KEY)? else {
            return Err(StoreError::damaged("meta", "record format is missing"));
        };
        match format::decode_file_version(bytes.value())? {
            ..=format::FILE_VERSION => Ok(true),
            found => Err(StoreError::Format { found, supported: format::FILE_VERSION }),
        }
    }

    /// Runs `body` as one transaction: all of it, or nothing.
    fn write<T>(
        &self,
        durability: Durability,
        begin: impl for<'txn> FnOnce(&'txn redb::WriteTransaction) -> Result<WriteTxn<'txn>, StoreError>,
        body: impl FnOnce(&mut WriteTxn<'_>) -> Result<T, StoreError>,
    ) -> Result<(T, Head), StoreError> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(durability)?;
        txn.set_quick_repair(matches!(durability, Durability::Immediate));
        let done = begin(&txn).and_then(|mut writer| {
            let value = body(&mut writer)?;
            Ok((value, writer.finish()?))
        });
        match done {
            Ok(done) => {
                txn.commit()?;
                Ok(done)
            }
            Err(error) => {
                // The first error says what happened; a failing undo only leaves the handle useless, and
                // the next call reports that.
                let _: Result<(), redb::StorageError> = txn.abort();
                Err(error)
            }
        }
    }

    /// Begins to make everything committed so far durable, and the next open quick.
    fn checkpoint(&self) -> Result<Epoch, StoreError> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        txn.set_quick_repair(true);
        txn.commit()?;
        Ok(self.backend.epoch())
    }
}

impl Store {
    /// Opens the file, making it if it is not there.
    pub fn open(env: &Env, path: &Path, options: &Options) -> Result<Self, StoreError> {
        backend::remove(env, &incoming_path(path))?;
        let engine = Engine::open(env, path, options)?;
        if !engine.is_founded()? {
            engine.write(Durability::Immediate, write::found, |_| Ok(()))?;
        }
        Self::with(env, path, options, engine)
    }

    fn with(env: &Env, path: &Path, options: &Options, engine: Engine) -> Result<Self, StoreError> {
        let head = read::read_head(&engine.begin_read()?.open_table(META)?)?;
        Ok(Self {
            inner: Arc::new(Inner {
                env: env.clone(),
                path: path.to_path_buf(),
                options: *options,
                engine: RwLock::new(Arc::new(engine)),
                commits: Mutex::new(0),
                bytes: AtomicU64::new(head.bytes),
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
        install(env, path)?;
        Self::with(env, path, options, Engine::open(env, path, options)?)
    }

    /// The moment after the last applied command.
    pub fn read(&self) -> Result<ReadTxn, StoreError> {
        ReadTxn::begin(self.engine())
    }

    /// Runs `body` with the writer. What it did becomes visible as a whole when it succeeds, and is undone when
    /// it fails. Not durable: see [`Store::checkpoint`]. Waits for another writer; so it blocks.
    pub fn write<T>(
        &self,
        body: impl FnOnce(&mut WriteTxn<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let _writer = self.writer();
        let (value, head) = self.engine().write(Durability::None, write::begin, body)?;
        self.inner.bytes.store(head.bytes, Ordering::Relaxed);
        Ok(value)
    }

    /// Begins to make everything written so far survive a power cut. Does not wait for the card. The log must be
    /// durable up to the last applied entry before.
    pub fn checkpoint(&self) -> Result<Checkpoint, StoreError> {
        let _commits = self.writer();
        let engine = self.engine();
        let applied = ReadTxn::begin(Arc::clone(&engine))?.applied();
        let epoch = engine.checkpoint()?;
        Ok(Checkpoint { applied, epoch, engine })
    }

    /// Sizes of the file.
    pub fn size(&self) -> Result<StoreSize, StoreError> {
        Ok(StoreSize {
            total: self.engine().backend.len()?,
            in_use: self.inner.bytes.load(Ordering::Relaxed),
        })
    }

    /// Replaces the state by a peer's snapshot. On an error the old state stays.
    pub async fn restore(&self, input: &mut (dyn Read + Send)) -> Result<DumpSummary, StoreError> {
        self.replace(|engine| load(engine, input)).await
    }

    /// Rewrites the file without its free pages. Readers go on; a write that comes in meanwhile makes it fail, so
    /// it is called where writes are. Durable when it returns, so the log must be durable up to the last applied
    /// entry before. Needs room for a second copy.
    pub async fn defragment(&self) -> Result<StoreSize, StoreError> {
        let source = self.read()?;
        self.replace(|engine| {
            fill(engine, |loader| {
                source.each_record(&mut |table, key, value| loader.insert(table, key, value))
            })
        })
        .await?;
        self.size()
    }

    /// Makes everything durable and closes the file, once readers have let go of it. Later calls fail.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.checkpoint()?.durable().await
    }

    /// Completes when the file cannot be used any more, and says why.
    pub fn failed(&self) -> impl Future<Output = backend::Failure> + Send + 'static {
        let mut failure = self.engine().backend.failure();
        async move {
            let failed = failure.wait_for(Option::is_some).await;
            failed.ok().and_then(|failure| failure.clone()).unwrap_or(backend::Failure::Abandoned)
        }
    }

    /// Writes the state as a snapshot stream: see [`ReadTxn::dump`].
    pub fn dump(&self, out: &mut dyn Write) -> Result<DumpSummary, StoreError> {
        self.read()?.dump(out)
    }

    async fn replace<T>(
        &self,
        build: impl FnOnce(&Engine) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let inner = &self.inner;
        let before = *self.writer();
        let built = build_beside(&inner.env, &inner.path, &inner.options, build).await?;
        let commits = self.writer();
        if *commits != before {
            drop(commits);
            backend::remove(&inner.env, &incoming_path(&inner.path))?;
            return Err(StoreError::Overtaken);
        }
        install(&inner.env, &inner.path)?;
        let engine = Engine::open(&inner.env, &inner.path, &inner.options)?;
        let head = read::read_head(&engine.begin_read()?.open_table(META)?)?;
        *inner.engine.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(engine);
        inner.bytes.store(head.bytes, Ordering::Relaxed);
        Ok(built)
    }

    fn engine(&self) -> Arc<Engine> {
        Arc::clone(&self.inner.engine.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A writer that panicked has committed nothing, so its lock may be taken over.
    fn writer(&self) -> MutexGuard<'_, u64> {
        self.inner.commits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Builds a durable, closed file under another name.
async fn build_beside<T>(
    env: &Env,
    path: &Path,
    options: &Options,
    build: impl FnOnce(&Engine) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let incoming = incoming_path(path);
    backend::remove(env, &incoming)?;
    let engine = Engine::open(env, &incoming, options)?;
    let built = build(&engine).and_then(|built| engine.checkpoint().map(|_epoch| built));
    let closed = engine.close().await;
    let built = built.and_then(|built| closed.map(|()| built));
    if built.is_err() {
        // Half a file is of no use; the next open removes it if this cannot.
        let _: std::io::Result<()> = backend::remove(env, &incoming);
    }
    built
}

/// Gives the file that was built its real name.
fn install(env: &Env, path: &Path) -> Result<(), StoreError> {
    Ok(backend::install(env, &incoming_path(path), path)?)
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
    loader.finish()?;
    if !engine.is_founded()? {
        return Err(StoreError::Stream("it holds no state".to_owned()));
    }
    // Before it takes the old file's place, because afterwards there is no way back.
    super::read::read_head(&engine.begin_read()?.open_table(super::read::META)?)?;
    Ok(value)
}

fn incoming_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".incoming");
    PathBuf::from(name)
}

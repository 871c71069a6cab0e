//! Owns the file: opening it, one writer at a time, checkpoints, and replacing it as a whole.
//!
//! A snapshot from a peer and a defragmentation both write a new file beside the old one, make it durable and
//! rename it over. So a power cut leaves either the old or the new, and readers that are under way keep the
//! file they started on: nobody waits for them, and they wait for nobody.
//!
//! # Invariants
//!
//! - At most one writer, also while the file is being replaced.
//! - The name `state.redb` always refers to a complete file.
//! - A commit is durable only after [`Store::checkpoint`], a replacement, or a clean close.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use redb::{Builder, Database, Durability, ReadTransaction, ReadableDatabase};

use crate::env::Env;
use crate::types::LogId;

use super::disk::{DiskBackend, Measured};
use super::dump::{self, Loader};
use super::format::{self, FORMAT_KEY, Head};
use super::read::{self, META};
use super::write;
use super::{DumpSummary, ReadTxn, StoreError, StoreSize, WriteTxn};

/// How to open the store.
#[derive(Clone, Debug)]
pub struct Options {
    /// Page cache.
    pub cache_bytes: usize,
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
    writer: Mutex<()>,
    /// [`Head::bytes`] after the last commit.
    bytes: AtomicU64,
}

/// One open file.
pub(super) struct Engine {
    database: Database,
    file_bytes: Arc<AtomicU64>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}

impl Engine {
    fn open(env: &Env, path: &Path, options: &Options) -> Result<Self, StoreError> {
        let backend = DiskBackend::open(env, path)?;
        let (backend, file_bytes) = Measured::new(backend)?;
        let database =
            Builder::new().set_cache_size(options.cache_bytes).create_with_backend(backend)?;
        Ok(Self { database, file_bytes })
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

    /// Makes everything committed so far durable, and the next open quick.
    fn checkpoint(&self) -> Result<(), StoreError> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        txn.set_quick_repair(true);
        Ok(txn.commit()?)
    }
}

impl Store {
    /// Opens the file, making it if it is not there.
    pub fn open(env: &Env, path: &Path, options: &Options) -> Result<Self, StoreError> {
        let incoming = incoming_path(path);
        if env.disk.exists(&incoming)? {
            env.disk.remove(&incoming)?;
        }
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
                options: options.clone(),
                engine: RwLock::new(Arc::new(engine)),
                writer: Mutex::new(()),
                bytes: AtomicU64::new(head.bytes),
            }),
        })
    }

    /// Builds a store from a snapshot stream, in place of whatever file is at `path`. Nobody may have that open.
    pub fn load_from(
        env: &Env,
        path: &Path,
        options: &Options,
        input: &mut dyn Read,
    ) -> Result<Self, StoreError> {
        let engine = build_beside(env, path, options, |engine| load(engine, input).map(drop))?;
        Self::with(env, path, options, engine)
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

    /// Makes everything written so far survive a power cut, and says up to which entry that is. Blocks for the
    /// card; the log must be durable up to the last applied entry before.
    pub fn checkpoint(&self) -> Result<Option<LogId>, StoreError> {
        let _writer = self.writer();
        let engine = self.engine();
        let applied = ReadTxn::begin(Arc::clone(&engine))?.applied();
        engine.checkpoint()?;
        Ok(applied)
    }

    /// Sizes of the file.
    pub fn size(&self) -> Result<StoreSize, StoreError> {
        Ok(StoreSize {
            total: self.engine().file_bytes.load(Ordering::Relaxed),
            in_use: self.inner.bytes.load(Ordering::Relaxed),
        })
    }

    /// Replaces the state by a peer's snapshot. On an error the old state stays.
    pub fn restore(&self, input: &mut dyn Read) -> Result<DumpSummary, StoreError> {
        let _writer = self.writer();
        self.replace(|engine| load(engine, input))
    }

    /// Rewrites the file without its free pages. Readers go on; writers wait. Durable when it returns, so the
    /// log must be durable up to the last applied entry before. Needs room for a second copy.
    pub fn defragment(&self) -> Result<StoreSize, StoreError> {
        let _writer = self.writer();
        let source = ReadTxn::begin(self.engine())?;
        self.replace(|engine| {
            fill(engine, |loader| {
                source.each_record(&mut |table, key, value| loader.insert(table, key, value))
            })
        })?;
        self.size()
    }

    /// Writes the state as a snapshot stream: see [`ReadTxn::dump`].
    pub fn dump(&self, out: &mut dyn Write) -> Result<DumpSummary, StoreError> {
        self.read()?.dump(out)
    }

    /// The caller holds the writer.
    fn replace<T>(
        &self,
        build: impl FnOnce(&Engine) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let inner = &self.inner;
        let mut built = None;
        let engine = build_beside(&inner.env, &inner.path, &inner.options, |engine| {
            built = Some(build(engine)?);
            Ok(())
        })?;
        let head = read::read_head(&engine.begin_read()?.open_table(META)?)?;
        *inner.engine.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(engine);
        inner.bytes.store(head.bytes, Ordering::Relaxed);
        match built {
            Some(built) => Ok(built),
            None => unreachable!("a file that was built has said what it is"),
        }
    }

    fn engine(&self) -> Arc<Engine> {
        Arc::clone(&self.inner.engine.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A writer that panicked has committed nothing, so its lock may be taken over.
    fn writer(&self) -> MutexGuard<'_, ()> {
        self.inner.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Builds a durable file under another name, then gives it the real one.
fn build_beside(
    env: &Env,
    path: &Path,
    options: &Options,
    build: impl FnOnce(&Engine) -> Result<(), StoreError>,
) -> Result<Engine, StoreError> {
    let incoming = incoming_path(path);
    if env.disk.exists(&incoming)? {
        env.disk.remove(&incoming)?;
    }
    let built = Engine::open(env, &incoming, options).and_then(|engine| {
        build(&engine)?;
        engine.checkpoint()?;
        Ok(engine)
    });
    let engine = match built {
        Ok(engine) => engine,
        Err(error) => {
            // Half a file is of no use; the next open removes it if this cannot.
            let _: std::io::Result<()> = env.disk.remove(&incoming);
            return Err(error);
        }
    };
    env.disk.rename(&incoming, path)?;
    if let Some(parent) = path.parent() {
        env.disk.sync_dir(parent)?;
    }
    Ok(engine)
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
    Ok(value)
}

fn incoming_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".incoming");
    PathBuf::from(name)
}

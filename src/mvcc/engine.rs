//! One open file: redb over the write-behind backend, and what its errors mean.
//!
//! # Invariants
//!
//! - Whatever makes the file useless, be it met by a reader, the writer or the drain, is told once to the
//!   [`Reports`] the engine was opened with.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use redb::{Builder, Database, Durability, ReadTransaction, ReadableDatabase};

use crate::env::Env;

use super::backend::{self, Backend, Drain, Epoch, Reports};
use super::format::{self, FORMAT_KEY, Head};
use super::read::{self, META};
use super::{DrainOn, Options, StoreError, WriteTxn};

/// One open file. Dropping it closes the file, and waits until everything is on the card if the drain has a
/// thread of its own.
pub(super) struct Engine {
    pub(super) database: Database,
    pub(super) backend: Backend,
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
    pub(super) fn open(
        env: &Env,
        path: &Path,
        options: &Options,
        reports: &Reports,
    ) -> Result<Self, StoreError> {
        let defaults = backend::Options::default();
        let (backend, drain) = Backend::open_reporting(env, path, defaults, reports.clone())?;
        start(drain, options.drain)?;
        let file = backend.clone();
        let open =
            move || Builder::new().set_cache_size(options.cache_bytes).create_with_backend(file);
        // redb asserts some of what it reads while it opens. Every block has its checksum, so only a bug gets
        // there; it must not become a loop of restarts.
        let database = catch_unwind(AssertUnwindSafe(open))
            .map_err(|_| StoreError::damaged("file", "the B-tree cannot be opened"))??;
        Ok(Self { database, backend })
    }

    /// Closes the file and completes when everything is on the card.
    ///
    /// Whoever else still uses the engine delays that; what was committed is made durable without them.
    pub(super) async fn close(engine: Arc<Self>) -> Result<(), StoreError> {
        let drained = engine.backend.drained();
        if let Err(shared) = Arc::try_unwrap(engine).map(drop) {
            let epoch = shared.checkpoint()?;
            shared.backend.wait_durable(epoch).await?;
        }
        Ok(drained.await?)
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        Ok(self.database.begin_read()?)
    }

    /// Passes an operation's result on. What makes the file useless is told to whoever awaits
    /// [`super::Store::failed`], and an operation that only met the consequences is told the cause.
    pub(super) fn noted<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.map_err(|error| {
            if let Some(failure) = error.failure() {
                self.backend.report_failure(&failure);
            }
            let cause = self.backend.failure().borrow().clone();
            match (error, cause) {
                (StoreError::Closed, Some(cause)) => cause.into(),
                (error, _) => error,
            }
        })
    }

    /// Whether the file has our tables; checks that this build can read them.
    pub(super) fn is_founded(&self) -> Result<bool, StoreError> {
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

    pub(super) fn head(&self) -> Result<Head, StoreError> {
        read::read_head(&self.begin_read()?.open_table(META)?)
    }

    /// Runs `body` as one transaction: all of it, or nothing.
    pub(super) fn write<T>(
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
                drop(txn.abort());
                Err(error)
            }
        }
    }

    /// Begins to make everything committed so far durable, and the next open quick.
    pub(super) fn checkpoint(&self) -> Result<Epoch, StoreError> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        txn.set_quick_repair(true);
        txn.commit()?;
        Ok(self.backend.epoch())
    }
}

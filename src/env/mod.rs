//! The seam between decisions and the world: files, time and chance, each behind a trait.
//!
//! Everything that could make two runs differ comes through here, so that a test can tear, delay, fail and
//! lie, and a simulation can run a whole cluster from one seed. [`host`] is the only code in the project that
//! opens a file for the datastore, syncs one, or reads a clock.
//!
//! # Invariants
//!
//! - Nothing above this row calls `std::fs`, `Instant::now` or the kernel's random numbers for the datastore.
//! - A barrier that failed is reported once and never retried: after a failed `fdatasync` the page cache
//!   says "clean" about data that is not on the card.

pub mod host;

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// A boxed future, for traits that are used as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The world a node lives in.
#[derive(Clone)]
pub struct Env {
    /// Files.
    pub disk: Arc<dyn Disk>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub entropy: Arc<dyn Entropy>,
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Env")
    }
}

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// It must exist; only reading is allowed.
    Read,
    /// It must exist.
    Write,
    /// It must not exist; it is created empty with mode 0600.
    Create,
}

/// A file system directory tree that the datastore may use.
pub trait Disk: Send + Sync + 'static {
    /// Opens a file.
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>>;
    /// Names in a directory, sorted, without `.` and `..`.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;
    /// Creates a directory and its parents with mode 0700. An existing one is fine.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;
    /// Renames a file, replacing the target. Durable after [`Disk::sync_dir`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file. Durable after [`Disk::sync_dir`].
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the directory's entries durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Whether a file or directory exists.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Bytes an unprivileged process may still allocate on the file system that holds `path`.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Permission bits of a file or directory; `None` on a disk that has none.
    fn mode(&self, _path: &Path) -> io::Result<Option<u32>> {
        Ok(None)
    }
    /// Takes the exclusive lock that says "a node runs on this directory". Held until dropped.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>>;
}

/// One open file. Positions are explicit: there is no cursor to share by accident.
pub trait DiskFile: Send + Sync + fmt::Debug + 'static {
    /// Fills `buffer` from `offset`; a short file is `UnexpectedEof`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// The same from the card itself, past the page cache as far as the system allows: for what was read wrong, because
    /// the cache may be what is wrong; and for a scrub, which is about the card. Whole 4 KiB blocks are read best.
    fn read_uncached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(buffer, offset)
    }
    /// Writes all of `bytes` at `offset`. In the page cache when it returns, not durable.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// The file's length.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// The barrier: returns when everything written before the call survives a power cut.
    ///
    /// A future, because a simulated card takes simulated time. On the host it blocks the calling thread, so
    /// it is only awaited on threads made for that.
    fn sync(&self) -> BoxFuture<'_, io::Result<()>>;
}

/// Time. Timers and leases use only `now`; `wall` is for people and certificates.
pub trait Clock: Send + Sync + 'static {
    /// Monotonic time.
    fn now(&self) -> Instant;
    /// Wall-clock time; may jump, and starts anywhere on a board without a clock chip.
    fn wall(&self) -> SystemTime;
    /// Completes after `duration` of monotonic time.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;
}

/// Chance.
pub trait Entropy: Send + Sync + 'static {
    /// Fills `buffer` with random bytes fit for keys.
    fn fill(&self, buffer: &mut [u8]);

    /// A random number.
    fn next_u64(&self) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

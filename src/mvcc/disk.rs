//! Lets redb live in a file of the environment, so that tests can cut, delay and fail what it does.

use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use redb::StorageBackend;

use crate::env::{BoxFuture, DiskFile, Env, Open};

/// One file, synced with a real barrier.
#[derive(Debug)]
pub(super) struct DiskBackend {
    file: Arc<dyn DiskFile>,
}

impl DiskBackend {
    /// Opens the file, or makes it and its directory entry.
    pub(super) fn open(env: &Env, path: &Path) -> io::Result<Self> {
        if env.disk.exists(path)? {
            return Ok(Self { file: env.disk.open(path, Open::Write)? });
        }
        let file = env.disk.open(path, Open::Create)?;
        if let Some(parent) = path.parent() {
            env.disk.sync_dir(parent)?;
        }
        Ok(Self { file })
    }
}

impl StorageBackend for DiskBackend {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        wait(self.file.sync())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_at(data, offset)
    }
}

/// Remembers a backend's length where [`super::Store::size`] can ask for it without touching the file.
#[derive(Debug)]
pub(super) struct Measured<B> {
    backend: B,
    len: Arc<AtomicU64>,
}

impl<B: StorageBackend> Measured<B> {
    pub(super) fn new(backend: B) -> io::Result<(Self, Arc<AtomicU64>)> {
        let len = Arc::new(AtomicU64::new(backend.len()?));
        Ok((Self { backend, len: Arc::clone(&len) }, len))
    }
}

impl<B: StorageBackend> StorageBackend for Measured<B> {
    fn len(&self) -> io::Result<u64> {
        self.backend.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.backend.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.backend.set_len(len)?;
        self.len.store(len, Ordering::Relaxed);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.backend.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.backend.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.backend.close()
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a barrier on this thread: redb's calls are synchronous.
fn wait<T>(future: BoxFuture<'_, T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

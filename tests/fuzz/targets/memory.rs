//! A disk in memory without faults or delays, whose files can be put in and taken out.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use k3s_server::env::{BoxFuture, Clock, Disk, DiskFile, Entropy, Env, Open};

/// Files by name.
pub type Files = BTreeMap<PathBuf, Vec<u8>>;

#[derive(Clone, Debug, Default)]
pub struct MemoryDisk(Arc<Mutex<BTreeMap<PathBuf, Content>>>);

#[derive(Clone, Debug, Default)]
struct Content(Arc<Mutex<Vec<u8>>>);

impl MemoryDisk {
    pub fn of(files: &Files) -> Self {
        let content = |bytes: &Vec<u8>| Content(Arc::new(Mutex::new(bytes.clone())));
        let files = files.iter().map(|(path, bytes)| (path.clone(), content(bytes)));
        Self(Arc::new(Mutex::new(files.collect())))
    }

    pub fn files(&self) -> Files {
        let files = self.0.lock().unwrap();
        let bytes = |content: &Content| content.0.lock().unwrap().clone();
        files.iter().map(|(path, content)| (path.clone(), bytes(content))).collect()
    }

    /// A world with this disk, time that stands still on the wall, and chance that repeats itself.
    pub fn env(&self) -> Env {
        Env {
            disk: Arc::new(self.clone()),
            clock: Arc::new(FixedWall),
            entropy: Arc::new(Counter(AtomicU64::new(1))),
        }
    }
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let mut files = self.0.lock().unwrap();
        match (files.get(path), how) {
            (Some(_), Open::Create) => Err(io::ErrorKind::AlreadyExists.into()),
            (Some(content), _) => Ok(Arc::new(content.clone())),
            (None, Open::Create) => {
                let content = files.entry(path.to_owned()).or_default();
                Ok(Arc::new(content.clone()))
            }
            (None, Open::Read | Open::Write) => Err(missing()),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let files = self.0.lock().unwrap();
        Ok(files.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    fn create_dir_all(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut files = self.0.lock().unwrap();
        let content = files.remove(from).ok_or_else(missing)?;
        files.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.lock().unwrap().remove(path).map(drop).ok_or_else(missing)
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.0.lock().unwrap().contains_key(path))
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn lock(&self, _path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        Ok(Box::new(()))
    }
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof.into())
}

impl DiskFile for Content {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let from = index(offset)?;
        let found = from.checked_add(buffer.len()).and_then(|end| bytes.get(from..end));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, new: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let from = index(offset)?;
        let end = from + new.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[from..end].copy_from_slice(new);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().resize(index(len)?, 0);
        Ok(())
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Inside the validity of a certificate that is made now.
const WALL: Duration = Duration::from_secs(1_800_000_000);

struct FixedWall;

impl Clock for FixedWall {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + WALL
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// Numbers need to differ here, not to be secret.
struct Counter(AtomicU64);

impl Entropy for Counter {
    fn fill(&self, buffer: &mut [u8]) {
        for byte in buffer {
            let count = self.0.fetch_add(1, Ordering::Relaxed);
            *byte = count.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0];
        }
    }
}

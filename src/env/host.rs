//! The real world: the kernel's files, clocks and random numbers.
#![allow(
    clippy::disallowed_methods,
    reason = "this is the one file that may sync and read clocks; everyone else goes through env"
)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;

use super::{BoxFuture, Clock, Disk, DiskFile, Entropy, Env, Open};

/// The environment a production node runs in.
pub fn env() -> Env {
    Env { disk: Arc::new(HostDisk), clock: Arc::new(HostClock), entropy: Arc::new(HostEntropy) }
}

/// The kernel's file systems.
#[derive(Debug)]
pub struct HostDisk;

#[derive(Debug)]
struct HostFile(File);

impl Disk for HostDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600);
        match how {
            Open::Read => {}
            Open::Write => {
                options.write(true);
            }
            Open::Create => {
                options.write(true).create_new(true);
            }
        }
        Ok(Arc::new(HostFile(options.open(path)?)))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut names = fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        fs::exists(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stats = statvfs(path)?;
        Ok(stats.blocks_available() * stats.fragment_size())
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        Ok(Some(fs::metadata(path)?.permissions().mode() & 0o7777))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Box::new(lock)),
            Err((_, errno)) => Err(errno.into()),
        }
    }
}

impl DiskFile for HostFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(self.0.sync_data()))
    }
}

/// The kernel's monotonic and wall clocks.
#[derive(Debug)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Instant {
        // tokio's clock is the kernel's, unless a test paused it.
        tokio::time::Instant::now().into_std()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// The kernel's random numbers.
#[derive(Debug)]
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&self, buffer: &mut [u8]) {
        // Fails only where the kernel has no getrandom at all, in which case no key would be safe.
        if let Err(error) = getrandom::fill(buffer) {
            panic!("the kernel gives no random numbers: {error}");
        }
    }
}

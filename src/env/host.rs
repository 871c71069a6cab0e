//! The real world: the kernel's files, clocks and random numbers.
#![allow(
    clippy::disallowed_methods,
    reason = "this is the one file that may sync and read clocks; everyone else goes through env"
)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{Flock, FlockArg, OFlag, PosixFadviseAdvice, posix_fadvise};
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
struct HostFile {
    file: File,
    /// The same file, for reading past the page cache. Opened when first needed; `None` where that is not to be had.
    direct: OnceLock<Option<File>>,
}

/// What direct reads are aligned to, in the file and in memory: no block device has larger sectors.
const DIRECT_ALIGNMENT: usize = 4096;

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
        Ok(Arc::new(HostFile { file: options.open(path)?, direct: OnceLock::new() }))
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

impl HostFile {
    /// Opened by its descriptor, because another file may have its name by now.
    fn direct(&self) -> Option<&File> {
        let open = || {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(path).ok()
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// `None` if that is not possible here: not every file system knows direct reads, and not every range fits them.
    fn read_direct_at(&self, buffer: &mut [u8], offset: u64) -> Option<io::Result<()>> {
        let is_aligned = offset.is_multiple_of(DIRECT_ALIGNMENT as u64)
            && buffer.len().is_multiple_of(DIRECT_ALIGNMENT);
        let direct = self.direct().filter(|_| is_aligned)?;
        let mut memory = vec![0; buffer.len() + DIRECT_ALIGNMENT];
        let start = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
        let aligned = memory.get_mut(start..start + buffer.len())?;
        match direct.read_exact_at(aligned, offset) {
            Ok(()) => {
                buffer.copy_from_slice(aligned);
                Some(Ok(()))
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => None,
            Err(error) => Some(Err(error)),
        }
    }
}

impl DiskFile for HostFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn read_uncached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        // So that whoever reads it next does not find what was wrong; clean pages only, hence harmless.
        if let (Ok(start), Ok(len)) = (offset.try_into(), buffer.len().try_into()) {
            // Only advice. Where it is not taken, the direct read below makes up for it.
            posix_fadvise(&self.file, start, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
        }
        match self.read_direct_at(buffer, offset) {
            Some(read) => read,
            None => self.file.read_exact_at(buffer, offset),
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(self.file.sync_data()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_past_the_cache_is_what_was_written_aligned_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = HostDisk.open(&dir.path().join("file"), Open::Create).unwrap();
        let content: Vec<u8> = (0..5 * 4096_u32).map(|at| at.to_le_bytes()[1]).collect();
        // Not even synced: a write that returned is seen by everybody.
        file.write_at(&content, 0).unwrap();
        for (offset, len) in [(0, 4096), (4096, 8192), (16384, 4096), (1, 4096), (512, 100)] {
            let mut read = vec![0; len];
            file.read_uncached_at(&mut read, offset as u64).unwrap();
            assert_eq!(read, content[offset..offset + len], "{len} bytes at {offset}");
        }
        let behind = file.read_uncached_at(&mut [0; 4096], 5 * 4096).unwrap_err();
        assert_eq!(behind.kind(), io::ErrorKind::UnexpectedEof);
    }
}

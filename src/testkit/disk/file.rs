//! An open file of a [`super::FaultDisk`]. It dies with the boot in which it was opened.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::world::{Inode, InodeId, World};
use super::{Failure, Operation};
use crate::env::{BoxFuture, DiskFile};

pub(super) struct FaultFile {
    pub(super) world: Arc<Mutex<World>>,
    pub(super) path: PathBuf,
    pub(super) inode: InodeId,
    pub(super) boot: u64,
    pub(super) writable: bool,
}

impl fmt::Debug for FaultFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultFile({})", self.path.display())
    }
}

impl FaultFile {
    fn lock(&self) -> io::Result<MutexGuard<'_, World>> {
        let world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
        if world.boot == self.boot { Ok(world) } else { Err(World::error(Failure::Eio)) }
    }

    fn lock_to_change(&self) -> io::Result<MutexGuard<'_, World>> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.lock()
    }
}

impl FaultFile {
    fn read(
        &self,
        operation: Operation,
        content: impl FnOnce(&Inode) -> Arc<Vec<u8>>,
        buffer: &mut [u8],
        offset: u64,
    ) -> io::Result<()> {
        let mut world = self.lock()?;
        world.begin(operation)?;
        if world.is_broken(&self.path, offset, buffer.len()) {
            return Err(World::error(Failure::Eio));
        }
        let content = world.inode(self.inode).map(content);
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        match content.as_ref().and_then(|content| content.get(from..)?.get(..buffer.len())) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl DiskFile for FaultFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(Operation::Read, |inode| Arc::clone(&inode.current), buffer, offset)
    }

    fn read_uncached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(Operation::ReadUncached, Inode::uncached, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut world = self.lock_to_change()?;
        match world.strikes(Operation::Write) {
            None => world.write(self.inode, &self.path, bytes, offset),
            Some(failure @ Failure::PowerLoss) => {
                world.write(self.inode, &self.path, bytes, offset)?;
                Err(World::error(failure))
            }
            Some(failure @ Failure::ShortWrite) => {
                world.write(self.inode, &self.path, &bytes[..bytes.len() / 2], offset)?;
                Err(World::error(failure))
            }
            Some(failure @ (Failure::Eio | Failure::Enospc)) => Err(World::error(failure)),
        }
    }

    fn len(&self) -> io::Result<u64> {
        let mut world = self.lock()?;
        world.begin(Operation::Look)?;
        Ok(world.inode(self.inode).map_or(0, |inode| inode.current.len() as u64))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut world = self.lock_to_change()?;
        world.begin(Operation::SetLen)?;
        world.set_len(self.inode, &self.path, len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let (failure, upto, delay) = {
                let mut world = self.lock_to_change()?;
                let delay = world.sync_delay.clone().map(|delay| delay(&self.path));
                (world.strikes(Operation::Sync), world.last_change(), delay)
            };
            if let Some(delay) = delay {
                delay.await;
            }
            let mut world = self.lock()?;
            let lying = world.lying;
            let Some(inode) = world.inode_mut(self.inode) else {
                return Err(World::error(Failure::Eio));
            };
            match failure {
                Some(failure @ Failure::PowerLoss) => return Err(World::error(failure)),
                Some(failure) => {
                    inode.forget(upto);
                    return Err(World::error(failure));
                }
                None if lying => {}
                None => inode.settle(upto),
            }
            world.counters.entry(self.path.clone()).or_default().syncs += 1;
            Ok(())
        })
    }
}

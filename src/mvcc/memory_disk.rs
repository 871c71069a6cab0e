//! A card in memory, for tests: has a size, and bits that flip.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::env::{BoxFuture, Disk, DiskFile, Env, Open, host};

const BLOCK: u64 = 4096;

#[derive(Clone, Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    allocated: BTreeSet<u64>,
}

type Shared<T> = Arc<Mutex<T>>;

#[derive(Debug, Default)]
struct Card {
    names: BTreeMap<PathBuf, Shared<Content>>,
    /// Blocks that may be allocated.
    free: u64,
    /// Nothing can be removed.
    removals_fail: bool,
}

/// Clones are the same card.
#[derive(Clone, Debug)]
pub(super) struct MemoryDisk(Shared<Card>);

#[derive(Debug)]
struct MemoryFile {
    card: Shared<Card>,
    content: Shared<Content>,
}

impl MemoryDisk {
    pub(super) fn new(bytes: u64) -> Self {
        Self(Arc::new(Mutex::new(Card { free: bytes / BLOCK, ..Card::default() })))
    }

    pub(super) fn env(&self) -> Env {
        Env { disk: Arc::new(self.clone()), ..host::env() }
    }

    /// Somebody else takes room, or gives it back.
    pub(super) fn set_free(&self, bytes: u64) {
        self.0.lock().unwrap().free = bytes / BLOCK;
    }

    /// From now on no file can be removed.
    pub(super) fn fail_removals(&self) {
        self.0.lock().unwrap().removals_fail = true;
    }

    /// A card with the same files, that shares nothing with this one.
    pub(super) fn copy(&self) -> Self {
        let card = self.0.lock().unwrap();
        let copy =
            |content: &Shared<Content>| Arc::new(Mutex::new(content.lock().unwrap().clone()));
        let names =
            card.names.iter().map(|(path, content)| (path.clone(), copy(content))).collect();
        Self(Arc::new(Mutex::new(Card { names, free: card.free, removals_fail: false })))
    }

    pub(super) fn bytes(&self, path: &Path) -> Vec<u8> {
        self.content(path).lock().unwrap().bytes.clone()
    }

    pub(super) fn flip(&self, path: &Path, bit: usize) {
        self.content(path).lock().unwrap().bytes[bit / 8] ^= 1 << (bit % 8);
    }

    fn content(&self, path: &Path) -> Shared<Content> {
        Arc::clone(&self.0.lock().unwrap().names[path])
    }
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let mut card = self.0.lock().unwrap();
        let content = match (card.names.get(path).cloned(), how) {
            (Some(_), Open::Create) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(content), Open::Read | Open::Write) => content,
            (None, Open::Read | Open::Write) => return Err(missing()),
            (None, Open::Create) => card.names.entry(path.to_owned()).or_default().clone(),
        };
        Ok(Arc::new(MemoryFile { card: Arc::clone(&self.0), content }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let card = self.0.lock().unwrap();
        Ok(card.names.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    fn create_dir_all(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut card = self.0.lock().unwrap();
        let content = card.names.remove(from).ok_or_else(missing)?;
        if let Some(old) = card.names.insert(to.to_owned(), content) {
            card.free += old.lock().unwrap().allocated.len() as u64;
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut card = self.0.lock().unwrap();
        if card.removals_fail {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let content = card.names.remove(path).ok_or_else(missing)?;
        card.free += content.lock().unwrap().allocated.len() as u64;
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.0.lock().unwrap().names.contains_key(path))
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().free * BLOCK)
    }

    fn lock(&self, _path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl DiskFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let content = self.content.lock().unwrap();
        let bytes = content.bytes.get(at..at + buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    /// As much as there is room for, block by block.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut card = self.card.lock().unwrap();
        let mut content = self.content.lock().unwrap();
        for (index, byte) in (offset..).zip(bytes) {
            if content.allocated.insert(index / BLOCK) {
                let Some(free) = card.free.checked_sub(1) else {
                    content.allocated.remove(&(index / BLOCK));
                    return Err(io::ErrorKind::StorageFull.into());
                };
                card.free = free;
            }
            let at = usize::try_from(index).unwrap();
            if content.bytes.len() <= at {
                content.bytes.resize(at + 1, 0);
            }
            content.bytes[at] = *byte;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().unwrap().bytes.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut card = self.card.lock().unwrap();
        let mut content = self.content.lock().unwrap();
        content.bytes.resize(usize::try_from(len).unwrap(), 0);
        let cut = content.allocated.split_off(&len.div_ceil(BLOCK));
        card.free += cut.len() as u64;
        Ok(())
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

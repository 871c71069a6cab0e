//! The state behind a [`super::FaultDisk`]: names, contents, what is not synced, and the fault that is set.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Failure, Fate, Fault, FileCounters, Operation, Rest, SECTOR, SyncDelay, Unsynced};
use crate::env::Open;
use crate::testkit::Random;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// What [`World::broken`] counts in.
const BLOCK: u64 = 4096;

pub(super) type InodeId = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Dir,
    File(InodeId),
}

/// A file's two contents, and what leads from one to the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Inode {
    pub(super) current: Arc<Vec<u8>>,
    pub(super) durable: Arc<Vec<u8>>,
    pending: Vec<Pending>,
}

#[derive(Clone, Debug)]
pub(super) struct Pending {
    id: u64,
    change: Change,
    /// It made the file longer, so whatever of it arrives brings the length along.
    grows: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

#[derive(Clone, Debug)]
enum NameChange {
    Link(PathBuf, Node),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf),
}

#[derive(Default)]
pub(super) struct World {
    pub(super) names: BTreeMap<PathBuf, Node>,
    durable_names: BTreeMap<PathBuf, Node>,
    name_changes: Vec<NameChange>,
    inodes: HashMap<InodeId, Inode>,
    next_id: u64,
    pub(super) boot: u64,
    pub(super) locks: BTreeSet<PathBuf>,
    pub(super) counters: HashMap<PathBuf, FileCounters>,
    pub(super) lying: bool,
    pub(super) sync_delay: Option<SyncDelay>,
    /// 0 is no limit.
    pub(super) capacity: u64,
    /// Blocks that cannot be read.
    pub(super) broken: Vec<(PathBuf, Range<u64>)>,
    fault: Option<(Fault, u64)>,
    failed: bool,
    operations: BTreeMap<Operation, u64>,
}

impl Inode {
    fn apply(content: &mut Arc<Vec<u8>>, change: &Change) {
        let content = Arc::make_mut(content);
        match change {
            Change::Write { offset, bytes } => write(content, *offset, bytes),
            Change::SetLen(len) => content.resize(*len, 0),
        }
    }

    /// Everything up to a change is on the card.
    pub(super) fn settle(&mut self, upto: u64) {
        for pending in self.pending.extract_if(.., |pending| pending.id <= upto) {
            Self::apply(&mut self.durable, &pending.change);
        }
    }

    /// The kernel has given up on everything up to a change, and shows it all the same.
    pub(super) fn forget(&mut self, upto: u64) {
        self.pending.retain(|pending| upto < pending.id);
    }

    /// What a read past the page cache finds: the kernel writes back first what it has not given up on.
    pub(super) fn uncached(&self) -> Arc<Vec<u8>> {
        let mut content = Arc::clone(&self.durable);
        for pending in &self.pending {
            Self::apply(&mut content, &pending.change);
        }
        content
    }

    /// Changes bytes in the page cache behind everybody's back.
    pub(super) fn change_cached(&mut self, offset: u64, change: impl Fn(&mut [u8])) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        change(&mut Arc::make_mut(&mut self.current)[offset..]);
    }

    /// Changes bytes behind everybody's back.
    pub(super) fn change(&mut self, offset: u64, change: impl Fn(&mut [u8])) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for content in [&mut self.current, &mut self.durable] {
            change(&mut Arc::make_mut(content)[offset..]);
        }
    }

    /// What the power cut leaves.
    fn cut(
        &mut self,
        path: &Path,
        ordinal: &mut usize,
        fate: &mut impl FnMut(&Unsynced<'_>) -> Fate,
    ) {
        for pending in std::mem::take(&mut self.pending) {
            match pending.change {
                Change::SetLen(_) => {
                    let piece = Unsynced { path, offset: 0, len: 0, ordinal: *ordinal };
                    *ordinal += 1;
                    if fate(&piece).kept != 0 {
                        Self::apply(&mut self.durable, &pending.change);
                    }
                }
                Change::Write { offset, mut bytes } => {
                    let mut start = 0;
                    if !pending.grows {
                        // Written inside a length that did not get there: the blocks belong to no file.
                        bytes.truncate(self.durable.len().saturating_sub(offset));
                    }
                    while start < bytes.len() {
                        let at = offset + start;
                        let len = (SECTOR - at % SECTOR).min(bytes.len() - start);
                        let piece = Unsynced { path, offset: at as u64, len, ordinal: *ordinal };
                        *ordinal += 1;
                        let fate = fate(&piece);
                        let content = Arc::make_mut(&mut self.durable);
                        tear(content, at, &bytes[start..start + len], fate);
                        start += len;
                    }
                }
            }
        }
        self.current = Arc::clone(&self.durable);
    }
}

fn write(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(bytes);
}

fn tear(content: &mut Vec<u8>, at: usize, bytes: &[u8], fate: Fate) {
    let kept = fate.kept.min(bytes.len());
    if 0 < kept {
        write(content, at, &bytes[..kept]);
    }
    let mut rest = vec![0; bytes.len() - kept];
    match fate.rest {
        Rest::Old => return,
        Rest::Zeros => {}
        Rest::Ones => rest.fill(0xff),
        Rest::Garbage(seed) => Random::new(seed).fill(&mut rest),
    }
    write(content, at + kept, &rest);
}

impl World {
    /// Counts an operation and lets it fail if its time has come. A short write is the caller's to cut short.
    pub(super) fn begin(&mut self, operation: Operation) -> io::Result<()> {
        match self.strikes(operation) {
            None => Ok(()),
            Some(failure) => Err(Self::error(failure)),
        }
    }

    pub(super) fn strikes(&mut self, operation: Operation) -> Option<Failure> {
        *self.operations.entry(operation).or_default() += 1;
        let (fault, seen) = self.fault.as_mut()?;
        // Without power nothing works, whatever it is.
        if fault.failure == Failure::PowerLoss && self.failed {
            return Some(Failure::PowerLoss);
        }
        if !(fault.only)(operation) {
            return None;
        }
        *seen += 1;
        let strikes = *seen == fault.nth || (fault.for_good && fault.nth < *seen);
        self.failed |= strikes;
        strikes.then_some(fault.failure)
    }

    pub(super) fn error(failure: Failure) -> io::Error {
        io::Error::from_raw_os_error(match failure {
            Failure::Eio | Failure::ShortWrite | Failure::PowerLoss => EIO,
            Failure::Enospc => ENOSPC,
        })
    }

    pub(super) fn set_fault(&mut self, fault: Option<Fault>) {
        self.fault = fault.map(|fault| (fault, 0));
        self.failed = false;
    }

    pub(super) const fn has_failed(&self) -> bool {
        self.failed
    }

    pub(super) fn operations(&self, only: impl Fn(Operation) -> bool) -> u64 {
        self.operations.iter().filter(|(operation, _)| only(**operation)).map(|(_, n)| n).sum()
    }

    pub(super) fn fork(&self) -> Self {
        Self {
            names: self.names.clone(),
            durable_names: self.durable_names.clone(),
            name_changes: self.name_changes.clone(),
            inodes: self.inodes.clone(),
            next_id: self.next_id,
            capacity: self.capacity,
            broken: self.broken.clone(),
            ..Self::default()
        }
    }

    pub(super) fn restart(&mut self) {
        self.boot += 1;
        self.locks.clear();
        self.lying = false;
        self.sync_delay = None;
        self.set_fault(None);
    }

    pub(super) fn power_cut(&mut self, mut fate: impl FnMut(&Unsynced<'_>) -> Fate) {
        self.restart();
        let mut ordinal = 0;
        for change in std::mem::take(&mut self.name_changes) {
            let (NameChange::Link(path, _)
            | NameChange::Unlink(path)
            | NameChange::Rename(_, path)) = &change;
            let piece = Unsynced { path, offset: 0, len: 0, ordinal };
            ordinal += 1;
            if fate(&piece).kept != 0 {
                rename_in(&mut self.durable_names, &change);
            }
        }
        let mut paths: Vec<(InodeId, PathBuf)> = Vec::new();
        for (path, node) in self.names.iter().chain(&self.durable_names) {
            if let Node::File(inode) = node
                && !paths.iter().any(|(seen, _)| seen == inode)
            {
                paths.push((*inode, path.clone()));
            }
        }
        for (inode, path) in paths {
            if let Some(inode) = self.inodes.get_mut(&inode) {
                inode.cut(&path, &mut ordinal, &mut fate);
            }
        }
        self.names = self.durable_names.clone();
        // A name in a directory whose own name is gone cannot be reached.
        let known: BTreeSet<PathBuf> = self.names.keys().cloned().collect();
        self.names
            .retain(|path, _| path.ancestors().skip(1).all(|a| is_root(a) || known.contains(a)));
        self.durable_names = self.names.clone();
    }

    pub(super) fn make_dir_durable(&mut self, dir: &Path) {
        for ancestor in dir.ancestors().filter(|ancestor| !is_root(ancestor)) {
            self.names.insert(ancestor.to_owned(), Node::Dir);
            self.durable_names.insert(ancestor.to_owned(), Node::Dir);
        }
    }

    pub(super) fn file(&self, path: &Path) -> Option<&Inode> {
        match self.names.get(path)? {
            Node::File(inode) => self.inodes.get(inode),
            Node::Dir => None,
        }
    }

    pub(super) fn durable_file(&self, path: &Path) -> Option<&Inode> {
        match self.durable_names.get(path)? {
            Node::File(inode) => self.inodes.get(inode),
            Node::Dir => None,
        }
    }

    pub(super) fn file_mut(&mut self, path: &Path) -> Option<&mut Inode> {
        match self.names.get(path)? {
            Node::File(inode) => self.inodes.get_mut(inode),
            Node::Dir => None,
        }
    }

    pub(super) fn inode(&self, id: InodeId) -> Option<&Inode> {
        self.inodes.get(&id)
    }

    pub(super) fn inode_mut(&mut self, id: InodeId) -> Option<&mut Inode> {
        self.inodes.get_mut(&id)
    }

    pub(super) fn open(&mut self, path: &Path, how: Open) -> io::Result<InodeId> {
        match (self.names.get(path), how) {
            (Some(Node::File(inode)), Open::Read | Open::Write) => Ok(*inode),
            (Some(_), Open::Create) => Err(io::ErrorKind::AlreadyExists.into()),
            (Some(Node::Dir), Open::Read | Open::Write) => Err(io::ErrorKind::IsADirectory.into()),
            (None, Open::Read | Open::Write) => Err(io::ErrorKind::NotFound.into()),
            (None, Open::Create) => {
                self.check_dir(path.parent())?;
                self.next_id += 1;
                let inode = self.next_id;
                self.inodes.insert(inode, Inode::default());
                self.change_name(NameChange::Link(path.to_owned(), Node::File(inode)));
                Ok(inode)
            }
        }
    }

    pub(super) fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.check_dir(Some(dir))?;
        Ok(self.names.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    pub(super) fn create_dir_all(&mut self, dir: &Path) {
        let missing: Vec<PathBuf> = dir
            .ancestors()
            .filter(|ancestor| !is_root(ancestor) && !self.names.contains_key(*ancestor))
            .map(Path::to_owned)
            .collect();
        for dir in missing.into_iter().rev() {
            self.change_name(NameChange::Link(dir, Node::Dir));
        }
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.check_dir(to.parent())?;
        if !self.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change_name(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        if !matches!(self.names.get(path), Some(Node::File(_))) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change_name(NameChange::Unlink(path.to_owned()));
        Ok(())
    }

    pub(super) fn sync_dir(&mut self, dir: &Path) -> io::Result<()> {
        self.check_dir(Some(dir))?;
        if self.lying {
            return Ok(());
        }
        let durable = &mut self.durable_names;
        let synced = self.name_changes.extract_if(.., |change| {
            let (NameChange::Link(path, _)
            | NameChange::Unlink(path)
            | NameChange::Rename(_, path)) = change;
            path.parent() == Some(dir)
        });
        for change in synced {
            rename_in(durable, &change);
        }
        Ok(())
    }

    pub(super) fn free_bytes(&self) -> u64 {
        if self.capacity == 0 {
            return u64::MAX;
        }
        let linked = self.names.values().filter_map(|node| match node {
            Node::File(inode) => self.inodes.get(inode),
            Node::Dir => None,
        });
        let used: u64 = linked.map(|inode| inode.current.len() as u64).sum();
        self.capacity.saturating_sub(used)
    }

    pub(super) fn unsynced_bytes(&self) -> usize {
        let pending = self.inodes.values().flat_map(|inode| &inode.pending);
        pending
            .map(|pending| match &pending.change {
                Change::Write { bytes, .. } => bytes.len(),
                Change::SetLen(_) => 0,
            })
            .sum()
    }

    /// Whether a block in this range of a file cannot be read.
    pub(super) fn is_broken(&self, path: &Path, offset: u64, len: usize) -> bool {
        let blocks = offset / BLOCK..(offset + len as u64).div_ceil(BLOCK);
        self.broken.iter().any(|(broken, range)| {
            broken == path && range.start < blocks.end && blocks.start < range.end
        })
    }

    pub(super) fn write(
        &mut self,
        id: InodeId,
        path: &Path,
        bytes: &[u8],
        offset: u64,
    ) -> io::Result<()> {
        // A card gives a sector that is written anew another place.
        let written = offset / BLOCK..(offset + bytes.len() as u64).div_ceil(BLOCK);
        for (path, range) in
            self.broken.extract_if(.., |(broken, _)| broken == path).collect::<Vec<_>>()
        {
            let before = range.start..range.end.min(written.start);
            let after = range.start.max(written.end)..range.end;
            let left = [before, after].into_iter().filter(|range| !range.is_empty());
            self.broken.extend(left.map(|range| (path.clone(), range)));
        }
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let change = Change::Write { offset, bytes: bytes.to_vec() };
        let grew = self.change_content(id, offset + bytes.len(), change)?;
        let counters = self.counters.entry(path.to_owned()).or_default();
        counters.writes += 1;
        counters.bytes_written += bytes.len() as u64;
        counters.growths += u64::from(grew);
        Ok(())
    }

    pub(super) fn set_len(&mut self, id: InodeId, path: &Path, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        self.change_content(id, len, Change::SetLen(len))?;
        self.counters.entry(path.to_owned()).or_default().growths += 1;
        Ok(())
    }

    /// The last change of a file so far.
    pub(super) const fn last_change(&self) -> u64 {
        self.next_id
    }

    /// Returns whether the file grew.
    fn change_content(&mut self, id: InodeId, end: usize, change: Change) -> io::Result<bool> {
        let free = self.free_bytes();
        self.next_id += 1;
        let Some(inode) = self.inodes.get_mut(&id) else {
            return Err(Self::error(Failure::Eio));
        };
        let growth = end.saturating_sub(inode.current.len());
        let pending = Pending { id: self.next_id, change, grows: 0 < growth };
        if free < growth as u64 {
            return Err(Self::error(Failure::Enospc));
        }
        Inode::apply(&mut inode.current, &pending.change);
        inode.pending.push(pending);
        Ok(0 < growth)
    }

    fn check_dir(&self, dir: Option<&Path>) -> io::Result<()> {
        match dir {
            Some(dir) if is_root(dir) || self.names.get(dir) == Some(&Node::Dir) => Ok(()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn change_name(&mut self, change: NameChange) {
        rename_in(&mut self.names, &change);
        self.name_changes.push(change);
    }
}

fn is_root(path: &Path) -> bool {
    path.parent().is_none()
}

fn rename_in(names: &mut BTreeMap<PathBuf, Node>, change: &NameChange) {
    match change {
        NameChange::Link(path, node) => {
            names.insert(path.clone(), *node);
        }
        NameChange::Unlink(path) => {
            names.remove(path);
        }
        NameChange::Rename(from, to) => {
            if let Some(node) = names.remove(from) {
                names.insert(to.clone(), node);
            }
        }
    }
}

//! Knows where the newest bytes of every block are: held in memory, or in the file.
//!
//! # Shape
//!
//! A queue of epochs, oldest first; the last one is open and takes the writes. A block is looked up from the
//! newest epoch to the oldest, then in the file. Pure: what is done with an epoch is [`super::Drain`]'s.
//!
//! # Invariants
//!
//! - The checksums describe the file as it is once every epoch that has left the queue is in it. A block that
//!   is in no queued epoch therefore has exactly that checksum.
//! - Epochs leave the queue oldest first, whole, and only when durable.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, LazyLock};

use super::Epoch;

/// The unit of holding, writing and checking: redb's page.
pub const BLOCK_BYTES: usize = 4096;

/// One block's bytes.
pub type Block = Arc<[u8]>;

/// Checksum of a block of zeros: what growing a file leaves.
pub static ZERO_CRC: LazyLock<u32> = LazyLock::new(|| crc32c::crc32c(&[0; BLOCK_BYTES]));

/// Where a block begins in the file.
pub fn offset_of(block: u32) -> u64 {
    u64::from(block) * BLOCK_BYTES as u64
}

/// The block that holds this byte.
pub fn block_at(offset: u64) -> io::Result<u32> {
    u32::try_from(offset / BLOCK_BYTES as u64).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

/// A file quantity as an index into memory. Saturates on 32-bit machines, where it is then out of range.
pub fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Everything one epoch changes.
#[derive(Debug)]
pub struct Writes {
    /// Its number.
    pub epoch: Epoch,
    /// The shortest the file was during the epoch, in blocks. What was beyond is gone.
    pub floor: u32,
    /// The file's length at its end, in blocks.
    pub len: u32,
    /// The blocks written, all below `len`.
    pub blocks: BTreeMap<u32, Block>,
}

impl Writes {
    fn new(epoch: Epoch, len: u32) -> Self {
        Self { epoch, floor: len, len, blocks: BTreeMap::new() }
    }
}

/// Where to read a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Here.
    Held(Block),
    /// The file was extended over it and it was not written since.
    Zero,
    /// In the file, with this checksum.
    File(u32),
}

/// See the module documentation.
#[derive(Debug)]
pub struct Overlay {
    crcs: Vec<u32>,
    sealed: VecDeque<Arc<Writes>>,
    open: Writes,
    /// Length before the open epoch.
    open_base: u32,
    held_blocks: usize,
}

impl Overlay {
    /// Starts with a file of these checksums. `last` is the newest epoch used up.
    ///
    /// # Panics
    /// If the file has 2^32 blocks (16 TiB) or more; `open` refuses such a file.
    pub fn new(crcs: Vec<u32>, last: Epoch) -> Self {
        let Ok(len) = u32::try_from(crcs.len()) else {
            unreachable!("a state file of 16 TiB");
        };
        Self {
            crcs,
            sealed: VecDeque::new(),
            open: Writes::new(last.next(), len),
            open_base: len,
            held_blocks: 0,
        }
    }

    /// The length redb sees, in blocks.
    pub fn len(&self) -> u32 {
        self.open.len
    }

    /// Whether the file has no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checksums of the file's blocks, without the queued epochs.
    pub fn crcs(&self) -> &[u32] {
        &self.crcs
    }

    /// Bytes held in memory.
    pub fn held_bytes(&self) -> usize {
        self.held_blocks * BLOCK_BYTES
    }

    /// Of these, in the open epoch.
    pub fn open_bytes(&self) -> usize {
        self.open.blocks.len() * BLOCK_BYTES
    }

    /// The epoch that takes the next write.
    pub fn open_epoch(&self) -> Epoch {
        self.open.epoch
    }

    /// The newest closed epoch.
    pub fn last_sealed(&self) -> Epoch {
        Epoch::new(self.open.epoch.get() - 1)
    }

    /// Where the newest bytes of a block are. Beyond the end: zeros.
    pub fn source(&self, block: u32) -> Source {
        let newest_first =
            std::iter::once(&self.open).chain(self.sealed.iter().rev().map(Arc::as_ref));
        for writes in newest_first {
            if let Some(bytes) = writes.blocks.get(&block) {
                return Source::Held(bytes.clone());
            }
            if writes.floor <= block {
                return Source::Zero;
            }
        }
        self.crcs.get(block as usize).map_or(Source::Zero, |crc| Source::File(*crc))
    }

    /// Takes a write into the open epoch, extending the file if it is beyond the end.
    pub fn write(&mut self, block: u32, bytes: Block) {
        debug_assert_eq!(bytes.len(), BLOCK_BYTES);
        self.open.len = self.open.len.max(block + 1);
        if self.open.blocks.insert(block, bytes).is_none() {
            self.held_blocks += 1;
        }
    }

    /// Cuts or extends the file.
    pub fn set_len(&mut self, len: u32) {
        self.held_blocks -= self.open.blocks.split_off(&len).len();
        self.open.floor = self.open.floor.min(len);
        self.open.len = len;
    }

    /// Closes the open epoch, unless nothing happened in it.
    pub fn seal(&mut self) -> bool {
        let idle = self.open.blocks.is_empty()
            && self.open.len == self.open_base
            && self.open.floor == self.open_base;
        if idle {
            return false;
        }
        let next = Writes::new(self.open.epoch.next(), self.open.len);
        self.open_base = next.len;
        self.sealed.push_back(Arc::new(std::mem::replace(&mut self.open, next)));
        true
    }

    /// The oldest closed epoch, which stays until it is [`Overlay::complete`].
    pub fn oldest_sealed(&self) -> Option<Arc<Writes>> {
        self.sealed.front().cloned()
    }

    /// The oldest closed epoch is durable; its blocks have these checksums.
    pub fn complete(&mut self, changes: &[(u32, u32)]) {
        let Some(writes) = self.sealed.pop_front() else {
            unreachable!("an epoch became durable that was never closed");
        };
        self.held_blocks -= writes.blocks.len();
        apply(&mut self.crcs, writes.floor, writes.len, changes);
    }

    /// Whether nothing is held back.
    pub fn is_drained(&self) -> bool {
        self.sealed.is_empty()
    }
}

/// What one epoch does to the checksums.
pub fn apply(crcs: &mut Vec<u32>, floor: u32, len: u32, changes: &[(u32, u32)]) {
    crcs.truncate(floor as usize);
    crcs.resize(len as usize, *ZERO_CRC);
    for (block, crc) in changes {
        crcs[*block as usize] = *crc;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(fill: u8) -> Block {
        vec![fill; BLOCK_BYTES].into()
    }

    fn crc(fill: u8) -> u32 {
        crc32c::crc32c(&block(fill))
    }

    #[test]
    fn newest_write_wins_over_older_epochs_and_the_file() {
        let mut overlay = Overlay::new(vec![crc(1), crc(2)], Epoch::new(0));
        assert_eq!(overlay.source(0), Source::File(crc(1)));

        overlay.write(0, block(3));
        assert!(overlay.seal());
        overlay.write(0, block(4));

        assert_eq!(overlay.source(0), Source::Held(block(4)));
        assert_eq!(overlay.source(1), Source::File(crc(2)));
        assert_eq!(overlay.held_bytes(), 2 * BLOCK_BYTES);
    }

    #[test]
    fn durable_epoch_is_read_from_the_file_with_its_new_checksum() {
        let mut overlay = Overlay::new(vec![crc(1)], Epoch::new(7));
        overlay.write(0, block(3));
        overlay.seal();
        assert_eq!(overlay.last_sealed(), Epoch::new(8));

        overlay.complete(&[(0, crc(3))]);

        assert_eq!(overlay.source(0), Source::File(crc(3)));
        assert_eq!(overlay.held_bytes(), 0);
        assert!(overlay.is_drained());
    }

    #[test]
    fn what_was_cut_off_does_not_come_back_when_the_file_grows_again() {
        let mut overlay = Overlay::new(vec![crc(1), crc(2), crc(3)], Epoch::new(0));
        overlay.write(2, block(9));
        overlay.seal();

        overlay.set_len(1);
        overlay.set_len(3);

        assert_eq!(overlay.source(0), Source::File(crc(1)));
        assert_eq!(overlay.source(1), Source::Zero);
        assert_eq!(overlay.source(2), Source::Zero);
        overlay.seal();
        overlay.complete(&[(2, crc(9))]);
        overlay.complete(&[]);
        assert_eq!(overlay.crcs(), [crc(1), *ZERO_CRC, *ZERO_CRC]);
    }

    #[test]
    fn cutting_gives_back_the_memory_of_what_is_cut() {
        let mut overlay = Overlay::new(Vec::new(), Epoch::new(0));
        overlay.set_len(4);
        overlay.write(3, block(1));
        overlay.set_len(2);
        assert_eq!(overlay.held_bytes(), 0);
    }

    #[test]
    fn barrier_with_nothing_to_cover_closes_no_epoch() {
        let mut overlay = Overlay::new(vec![crc(1)], Epoch::new(0));
        assert!(!overlay.seal());
        overlay.set_len(2);
        assert!(overlay.seal());
        assert!(!overlay.seal());
        assert_eq!(overlay.last_sealed(), Epoch::new(1));
    }
}

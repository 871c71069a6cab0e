//! One slot on disk: its name, its header block, and the frames in it.
//!
//! # Shape
//!
//! Reads only. The bytes are judged by `format`; what a missing or bad frame means is decided by `recovery`.
//!
//! What cannot be read, or is read and found wrong, is read once more from the card itself ([`twice`]): the page cache
//! may be all that is wrong. Only then it is a defect.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{BLOCK, Defect, FrameHeader, SlotHeader};
use super::log::FrameAt;
use crate::announce;
use crate::env::{Disk, DiskFile, Open};
use crate::events::{EventId, fields};
use crate::types::SegmentNo;

const PREFIX: &str = "slot-";
const SUFFIX: &str = ".wal";

/// Blocks looked at together when searching for frames.
const SEARCH_BLOCKS: u32 = 64;

/// An open log file.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) number: usize,
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn DiskFile>,
    /// Length in blocks, the header's included.
    pub(super) blocks: u32,
}

/// Why a frame could not be read.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The kernel's answer.
    Io(io::Error),
    /// The bytes are not that frame.
    Defect(Defect),
}

impl ReadError {
    /// What cannot be read is as good as wrong.
    pub(super) fn into_defect(self) -> Defect {
        match self {
            Self::Io(error) => Defect::Unreadable { code: error.raw_os_error().unwrap_or(0) },
            Self::Defect(defect) => defect,
        }
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Defect> for ReadError {
    fn from(defect: Defect) -> Self {
        Self::Defect(defect)
    }
}

/// Where bytes are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The page cache, where it has them.
    Cache,
    /// The card.
    Card,
}

/// Reads, and judges what was read; if it is found wrong, once more from the card.
pub(super) fn twice<T>(
    path: &Path,
    mut read: impl FnMut(Source) -> Result<T, ReadError>,
) -> Result<T, ReadError> {
    let first = match read(Source::Cache) {
        Ok(found) => return Ok(found),
        Err(ReadError::Io(error)) => error.to_string(),
        Err(ReadError::Defect(defect)) => defect.to_string(),
    };
    let again = read(Source::Card);
    if again.is_ok() {
        healed(path, &first);
    }
    again
}

fn healed(path: &Path, reason: &str) {
    announce!(
        EventId::ReadHealed,
        { fields::PATH } = %path.display(),
        { fields::REASON } = reason,
        "{} was read wrong ({reason}), and right when read again from the card",
        path.display()
    );
}

/// The file name of a slot.
pub(super) fn path_of(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("{PREFIX}{number:02}{SUFFIX}"))
}

/// The slot number of a file name.
pub(super) fn number_of(path: &Path) -> Option<usize> {
    let name = path.file_name()?.to_str()?;
    let digits = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    let number = digits.parse().ok()?;
    (path_of(Path::new(""), number) == Path::new(name)).then_some(number)
}

/// The slots of a directory, by number.
pub(super) fn list(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<usize>> {
    let mut numbers: Vec<usize> =
        disk.list(dir)?.iter().filter_map(|path| number_of(path)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

impl Slot {
    pub(super) fn open(disk: &dyn Disk, dir: &Path, number: usize, how: Open) -> io::Result<Self> {
        let path = path_of(dir, number);
        let file = disk.open(&path, how)?;
        let blocks = u32::try_from(file.len()? / BLOCK as u64).unwrap_or(u32::MAX);
        Ok(Self { number, path, file, blocks })
    }

    /// The header in block 0, or the copy of it in the last block.
    pub(super) fn header(&self, block: u32) -> Result<SlotHeader, ReadError> {
        if self.blocks == 0 {
            return Err(Defect::Short { found: 0, expected: BLOCK }.into());
        }
        let mut bytes = vec![0; BLOCK];
        twice(&self.path, |source| {
            self.read_at(source, &mut bytes, block)?;
            Ok(SlotHeader::decode(&bytes)?)
        })
    }

    fn read_at(&self, source: Source, buffer: &mut [u8], block: u32) -> io::Result<()> {
        match source {
            Source::Cache => self.file.read_at(buffer, offset_of(block)),
            Source::Card => self.file.read_uncached_at(buffer, offset_of(block)),
        }
    }

    /// The block that is kept free for a copy of the header; frames end before it.
    pub(super) const fn copy_block(&self) -> u32 {
        self.blocks.saturating_sub(1)
    }

    /// The frame header at a block, whatever frame it is.
    pub(super) fn frame_header(
        &self,
        source: Source,
        block: u32,
        buffer: &mut Vec<u8>,
    ) -> Result<FrameHeader, ReadError> {
        buffer.resize(BLOCK, 0);
        self.read_at(source, buffer, block)?;
        Ok(FrameHeader::decode(buffer)?)
    }

    /// Reads the rest of a frame whose header has been read into `buffer`; its raw payload replaces `raw`.
    pub(super) fn payload(
        &self,
        source: Source,
        header: &FrameHeader,
        buffer: &mut Vec<u8>,
        raw: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let (block, blocks) = (header.block, header.blocks());
        if self.blocks.saturating_sub(block) < blocks {
            return Err(Defect::Length {
                found: header.payload_bytes,
                expected: self.blocks.saturating_sub(block) as usize * BLOCK,
            }
            .into());
        }
        buffer.resize(blocks as usize * BLOCK, 0);
        if 1 < blocks {
            self.read_at(source, &mut buffer[BLOCK..], block + 1)?;
        }
        raw.clear();
        Ok(header.payload(buffer, raw)?)
    }

    /// The first frame header at or after `from` that `wanted` accepts. Blocks that cannot be read hold none; an error
    /// only if not one can be.
    pub(super) fn search(
        &self,
        from: u32,
        mut wanted: impl FnMut(&FrameHeader, u32) -> bool,
    ) -> io::Result<Option<FrameHeader>> {
        let mut window = Vec::new();
        let mut block = from;
        let mut unreadable = None;
        let mut any = false;
        while block < self.blocks {
            let blocks = SEARCH_BLOCKS.min(self.blocks - block);
            window.resize(blocks as usize * BLOCK, 0);
            match self.read_what_can_be(&mut window, block) {
                Ok(()) => any = true,
                Err(error) => unreadable = Some(error),
            }
            for (bytes, at) in window.chunks_exact(BLOCK).zip(block..) {
                if let Ok(header) = FrameHeader::decode(bytes)
                    && wanted(&header, at)
                {
                    return Ok(Some(header));
                }
            }
            block += blocks;
        }
        match unreadable {
            Some(error) if !any => Err(error),
            Some(_) | None => Ok(None),
        }
    }

    /// Calls back with every frame header that can be read, of whatever life of the slot.
    pub(super) fn each_frame_header(&self, mut note: impl FnMut(&FrameHeader)) {
        let searched = self.search(0, |frame, _| {
            note(frame);
            false
        });
        // A slot of which nothing can be read has none.
        drop(searched);
    }

    /// Fills the window; what cannot be read is zeros. An error only if that is all of it.
    fn read_what_can_be(&self, window: &mut [u8], first: u32) -> io::Result<()> {
        if self.read_at(Source::Cache, window, first).is_ok() {
            return Ok(());
        }
        let mut result = Err(io::ErrorKind::UnexpectedEof.into());
        for (block, bytes) in (first..).zip(window.chunks_exact_mut(BLOCK)) {
            let read = self
                .read_at(Source::Cache, bytes, block)
                .or_else(|_| self.read_at(Source::Card, bytes, block));
            match read {
                Ok(()) => result = Ok(()),
                Err(error) => {
                    bytes.fill(0);
                    result = result.map_err(|_| error);
                }
            }
        }
        result
    }
}

/// Where a block starts.
pub(super) fn offset_of(block: u32) -> u64 {
    u64::from(block) * BLOCK as u64
}

/// A slot in one of its lives.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) number: SegmentNo,
    pub(super) generation: u64,
    pub(super) slot: Arc<Slot>,
}

impl Segment {
    /// The raw payload of a frame, with one read.
    pub(super) fn read(&self, at: FrameAt, raw: &mut Vec<u8>) -> Result<FrameHeader, ReadError> {
        let mut buffer = vec![0; at.blocks as usize * BLOCK];
        twice(&self.slot.path, |source| {
            self.slot.read_at(source, &mut buffer, at.block)?;
            let header = FrameHeader::decode(&buffer)?;
            header.check_place(self.generation, self.number, at.block)?;
            raw.clear();
            header.payload(&buffer, raw)?;
            Ok(header)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_slot_files_are_slots() {
        assert_eq!(number_of(Path::new("/d/slot-00.wal")), Some(0));
        assert_eq!(number_of(Path::new("/d/slot-07.wal")), Some(7));
        assert_eq!(number_of(Path::new("/d/slot-123.wal")), Some(123));
        for other in
            ["slot-7.wal", "slot-007.wal", "slot-+7.wal", "slot-.wal", "slot-00.wal~", "lock"]
        {
            assert_eq!(number_of(Path::new(other)), None, "{other}");
        }
    }
}

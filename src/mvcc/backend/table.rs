//! The bytes of the checksum table: a snapshot of all checksums, then one record for each epoch since.
//!
//! # Shape
//!
//! All numbers are little-endian; every part begins on a 4 KiB boundary and is padded to one, so that a torn
//! write can hurt only the part being written.
//!
//! | snapshot | bytes | | record | bytes |
//! |---|---|---|---|---|
//! | magic `k3scrc1\n` | 8 | | magic `k3sepo1\n` | 8 |
//! | CRC32C of the rest, padding excluded | 4 | | CRC32C of the rest, padding excluded | 4 |
//! | number of blocks | 4 | | number of changes | 4 |
//! | id of the database file | 8 | | id of the database file | 8 |
//! | epoch it describes the end of | 8 | | epoch | 8 |
//! | 1 if there is a header copy | 4 | | 1 if there is a header copy | 4 |
//! | reserved | 8 | | floor and length, in blocks | 8 |
//! | header copy (512, or zeros) | 512 | | header copy (512, or zeros) | 512 |
//! | checksums | 4 each | | block number and checksum | 8 each |
//!
//! The records of a file continue its snapshot without a gap. The area behind the last record may hold
//! records of an earlier life of the file: their epochs are too small to fit.
//!
//! # Invariants
//!
//! - [`Table::decode`] never believes a damaged part, and tells "the last record was torn while being written"
//!   from "a record in the middle is gone" by what follows.

use super::Epoch;
use super::overlay::{BLOCK_BYTES, apply};

const SNAPSHOT_MAGIC: [u8; 8] = *b"k3scrc1\n";
const RECORD_MAGIC: [u8; 8] = *b"k3sepo1\n";
const TAG_MAGIC: [u8; 4] = *b"k3st";

/// Bytes of the header block worth copying: one sector holds redb's header and our tag.
pub const HEADER_BYTES: usize = 512;
const FIXED_BYTES: usize = 44 + HEADER_BYTES;
/// Everything before this offset is not covered by the part's own checksum.
const CHECKED_FROM: usize = 12;

/// First sector of block 0.
pub type HeaderCopy = [u8; HEADER_BYTES];

/// Behind redb's header in block 0, in bytes redb neither reads nor writes: ties the file to its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The file's id, which its table bears too.
    pub id: u64,
    /// The epoch that wrote the block.
    pub epoch: Epoch,
}

impl Tag {
    /// redb's header ends here.
    const OFFSET: usize = 320;

    /// Writes the tag into a header block.
    pub fn stamp(self, block: &mut [u8]) {
        let tag = &mut block[Self::OFFSET..Self::OFFSET + 20];
        tag[..4].copy_from_slice(&TAG_MAGIC);
        tag[4..12].copy_from_slice(&self.id.to_le_bytes());
        tag[12..].copy_from_slice(&self.epoch.get().to_le_bytes());
    }

    /// Reads the tag of a header block, if it has one.
    pub fn read(block: &[u8]) -> Option<Self> {
        let tag = block.get(Self::OFFSET..Self::OFFSET + 20)?;
        (tag[..4] == TAG_MAGIC)
            .then(|| Self { id: u64_at(tag, 4), epoch: Epoch::new(u64_at(tag, 12)) })
    }
}

/// What one epoch changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number.
    pub epoch: Epoch,
    /// Shortest length during the epoch, in blocks.
    pub floor: u32,
    /// Length at its end, in blocks.
    pub len: u32,
    /// The header block, if it is among the changes.
    pub header: Option<HeaderCopy>,
    /// Block numbers, ascending, and their new checksums.
    pub changes: Vec<(u32, u32)>,
}

/// A table read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The database file it describes.
    pub id: u64,
    /// The snapshot's epoch.
    pub base: Epoch,
    /// Checksums before `last`.
    pub crcs: Vec<u32>,
    /// The newest header copy before `last`.
    pub header: Option<HeaderCopy>,
    /// The last record: its epoch may be in the database file wholly, partly or not at all.
    pub last: Option<Record>,
    /// Where the records begin.
    pub records_start: u64,
    /// Where the next record goes.
    pub end: u64,
}

/// Nothing in the file can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable;

/// The bytes of a snapshot, padded.
pub fn encode_snapshot(
    id: u64,
    epoch: Epoch,
    crcs: &[u32],
    header: Option<&HeaderCopy>,
) -> Vec<u8> {
    let mut bytes = start(SNAPSHOT_MAGIC, crcs.len(), id, epoch, header, [0, 0]);
    for crc in crcs {
        bytes.extend_from_slice(&crc.to_le_bytes());
    }
    finish(bytes)
}

impl Record {
    /// The bytes of the record, padded.
    pub fn encode(&self, id: u64) -> Vec<u8> {
        let lens = [self.floor, self.len];
        let count = self.changes.len();
        let mut bytes = start(RECORD_MAGIC, count, id, self.epoch, self.header.as_ref(), lens);
        for (block, crc) in &self.changes {
            bytes.extend_from_slice(&block.to_le_bytes());
            bytes.extend_from_slice(&crc.to_le_bytes());
        }
        finish(bytes)
    }

    /// The record at the start of `bytes` and its padded size, if it is whole and makes sense.
    fn decode(bytes: &[u8], id: u64) -> Option<(Self, usize)> {
        let part = Part::decode(bytes, RECORD_MAGIC, 8)?;
        let [floor, len] = part.lens;
        let changes: Vec<_> =
            part.items.chunks_exact(8).map(|item| (u32_at(item, 0), u32_at(item, 4))).collect();
        let sound = part.id == id
            && changes.iter().all(|(block, _)| *block < len)
            && changes.is_sorted_by(|a, b| a.0 < b.0);
        let record = Self { epoch: part.epoch, floor, len, header: part.header, changes };
        sound.then_some((record, part.padded))
    }
}

impl Table {
    /// Reads a table file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let part = Part::decode(bytes, SNAPSHOT_MAGIC, 4).ok_or(Unreadable)?;
        let mut table = Self {
            id: part.id,
            base: part.epoch,
            crcs: part.items.chunks_exact(4).map(|item| u32_at(item, 0)).collect(),
            header: part.header,
            last: None,
            records_start: part.padded as u64,
            end: part.padded as u64,
        };
        let mut at = part.padded;
        while let Some((record, padded)) = bytes.get(at..).and_then(|b| Record::decode(b, part.id))
        {
            if record.epoch != table.newest().next() {
                break;
            }
            table.fold_last();
            table.last = Some(record);
            at += padded;
            table.end = at as u64;
        }
        if table.continues_behind_a_gap(bytes.get(at..).unwrap_or_default()) {
            return Err(Unreadable);
        }
        Ok(table)
    }

    /// The newest epoch that has a record.
    pub fn newest(&self) -> Epoch {
        self.last.as_ref().map_or(self.base, |record| record.epoch)
    }

    /// Takes the last record as done.
    pub fn fold_last(&mut self) {
        if let Some(record) = self.last.take() {
            apply(&mut self.crcs, record.floor, record.len, &record.changes);
            self.header = record.header.or(self.header);
        }
    }

    /// Whether there is a record of a later epoch: then the one that should come first is damaged, not torn,
    /// because only one record is ever being written.
    fn continues_behind_a_gap(&self, rest: &[u8]) -> bool {
        (0..rest.len()).step_by(BLOCK_BYTES).any(|at| {
            Record::decode(&rest[at..], self.id)
                .is_some_and(|(record, _)| self.newest() < record.epoch)
        })
    }
}

/// The common shape of snapshot and record.
struct Part<'a> {
    id: u64,
    epoch: Epoch,
    header: Option<HeaderCopy>,
    lens: [u32; 2],
    items: &'a [u8],
    padded: usize,
}

impl<'a> Part<'a> {
    fn decode(bytes: &'a [u8], magic: [u8; 8], item_bytes: usize) -> Option<Self> {
        let fixed = bytes.get(..FIXED_BYTES)?;
        if fixed[..8] != magic {
            return None;
        }
        let items_bytes = (u32_at(fixed, 12) as usize).checked_mul(item_bytes)?;
        let size = FIXED_BYTES.checked_add(items_bytes)?;
        let whole = bytes.get(..size)?;
        if crc32c::crc32c(&whole[CHECKED_FROM..]) != u32_at(fixed, 8) {
            return None;
        }
        let has_header = u32_at(fixed, 32) == 1;
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&fixed[44..]);
        Some(Self {
            id: u64_at(fixed, 16),
            epoch: Epoch::new(u64_at(fixed, 24)),
            header: has_header.then_some(header),
            lens: [u32_at(fixed, 36), u32_at(fixed, 40)],
            items: &whole[FIXED_BYTES..],
            padded: size.next_multiple_of(BLOCK_BYTES),
        })
    }
}

fn start(
    magic: [u8; 8],
    count: usize,
    id: u64,
    epoch: Epoch,
    header: Option<&HeaderCopy>,
    lens: [u32; 2],
) -> Vec<u8> {
    let Ok(count) = u32::try_from(count) else {
        unreachable!("block numbers have 32 bits");
    };
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(&epoch.get().to_le_bytes());
    bytes.extend_from_slice(&u32::from(header.is_some()).to_le_bytes());
    bytes.extend_from_slice(&lens[0].to_le_bytes());
    bytes.extend_from_slice(&lens[1].to_le_bytes());
    bytes.extend_from_slice(header.unwrap_or(&[0; HEADER_BYTES]));
    bytes
}

fn finish(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&bytes[CHECKED_FROM..]);
    bytes[8..CHECKED_FROM].copy_from_slice(&crc.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: u64 = 0xfeed;

    fn record(epoch: u64, changes: &[(u32, u32)]) -> Record {
        Record {
            epoch: Epoch::new(epoch),
            floor: 3,
            len: 4,
            header: changes
                .iter()
                .any(|(block, _)| *block == 0)
                .then_some([epoch.to_le_bytes()[0]; 512]),
            changes: changes.to_vec(),
        }
    }

    /// A snapshot of epoch 5 and records of 6 and 7.
    fn file() -> Vec<u8> {
        let mut bytes = encode_snapshot(ID, Epoch::new(5), &[10, 11, 12], Some(&[5; 512]));
        bytes.extend(record(6, &[(0, 20), (2, 22)]).encode(ID));
        bytes.extend(record(7, &[(3, 33)]).encode(ID));
        bytes
    }

    #[test]
    fn table_reads_back_with_the_last_record_apart() {
        let table = Table::decode(&file()).unwrap();

        assert_eq!(table.base, Epoch::new(5));
        assert_eq!(table.newest(), Epoch::new(7));
        assert_eq!(table.crcs, [20, 11, 22, *super::super::overlay::ZERO_CRC]);
        assert_eq!(table.header, Some([6; 512]));
        assert_eq!(table.last, Some(record(7, &[(3, 33)])));
        assert_eq!(table.end, file().len() as u64);
    }

    #[test]
    fn record_torn_while_being_written_counts_as_not_there() {
        let whole = file();
        for cut in (2 * BLOCK_BYTES..whole.len() - (BLOCK_BYTES - 600)).step_by(7) {
            let table = Table::decode(&whole[..cut]).unwrap();
            let expected = if cut < 2 * BLOCK_BYTES + FIXED_BYTES + 8 { 6 } else { 7 };
            assert_eq!(table.newest(), Epoch::new(expected), "cut at {cut}");
        }
    }

    #[test]
    fn records_of_an_earlier_life_of_the_file_are_ignored() {
        let mut bytes = file();
        bytes.extend(record(4, &[(1, 99)]).encode(ID));
        bytes.extend(record(8, &[(1, 99)]).encode(ID + 1));
        assert_eq!(Table::decode(&bytes).unwrap(), Table::decode(&file()).unwrap());
    }

    #[test]
    fn damaged_record_with_a_later_one_behind_it_is_not_taken_for_a_torn_tail() {
        let mut bytes = file();
        bytes[BLOCK_BYTES + 30] ^= 1;
        assert_eq!(Table::decode(&bytes), Err(Unreadable));
    }

    #[test]
    fn no_flipped_bit_changes_what_is_read() {
        let good = file();
        let whole = Table::decode(&good).unwrap();
        let mut without_last = whole.clone();
        without_last.last = Some(record(6, &[(0, 20), (2, 22)]));
        without_last.crcs = vec![10, 11, 12];
        without_last.header = Some([5; 512]);
        without_last.end = 2 * BLOCK_BYTES as u64;

        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match Table::decode(&bytes) {
                Err(Unreadable) => {}
                Ok(table) if table == whole || table == without_last => {}
                Ok(table) => panic!("bit {bit}: {table:?}"),
            }
        }
    }

    #[test]
    fn random_bytes_are_refused() {
        let mut seed = 1_u64;
        let mut bytes = vec![0; 3 * BLOCK_BYTES];
        for _ in 0..2_000 {
            for byte in &mut bytes {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (seed >> 56) as u8;
            }
            bytes[..8].copy_from_slice(&SNAPSHOT_MAGIC);
            assert_eq!(Table::decode(&bytes), Err(Unreadable));
        }
    }

    #[test]
    fn tag_survives_beside_the_header() {
        let mut block = vec![7; BLOCK_BYTES];
        assert_eq!(Tag::read(&block), None);
        let tag = Tag { id: 9, epoch: Epoch::new(3) };
        tag.stamp(&mut block);
        assert_eq!(Tag::read(&block), Some(tag));
        assert!(block[..320].iter().all(|byte| *byte == 7));
        assert_eq!(Tag::read(&block[..300]), None);
    }
}

//! Defines every byte of a log file: slot header, frame header, records; and reads them back without trust.
//!
//! A log file (a *slot*) is a row of 4 KiB blocks. The first is the slot's header, the last has room for a copy of
//! it; every other block belongs to a *frame*: one batch of records, aligned, zero-padded, written once in a life of
//! the slot. All numbers are little-endian. The frames of a segment have the version of its header.
//!
//! ```text
//! slot header (first 180 bytes of block 0, or of the last block: see `recovery`)
//!   0 magic 8 | 8 version 4 | 12 kind 4 (1 segment, 2 spare) | 16 cluster 8 | 24 node 8 | 32 segment 8
//!  40 generation 8 | 48 slot bytes 8 | 56 oldest live segment 8 | 64 first frame's seq 8 | 72 chain 4 | 76 zero 4
//!  80 present flags 4 | 84 zero 4 | 88 vote 16 | 104 committed 24 | 128 purged 24 | 152 last 24 | 176 crc32c 4
//! frame header (64 bytes), then the payload
//!   0 magic 4 | 4 version 1 | 5 flags 1 | 6 replaces 2 | 8 payload bytes 4 | 12 raw bytes 4 | 16 records 4 | 20 chain 4
//!  24 seq 8 | 32 generation 8 | 40 segment 8 | 48 block 4 | 52 payload crc32c 4 | 56 replaced chain 4 | 60 crc32c 4
//! record: kind 1, then
//!   entry: term 8, leader 8, index 8, length 4, bytes      vote: term 8, node 8, committed 1
//!   committed, purge: term 8, leader 8, index 8            truncate-after: present 1, term 8, leader 8, index 8
//! ```
//!
//! # Invariants
//!
//! - The frame header's checksum covers the payload's checksum, so one number stands for the whole frame. It is
//!   the next frame's `chain`: a frame is valid only after the very frame it was written after.
//! - Segment, generation and block are under the checksum: a stale, copied or misdirected frame is not valid
//!   anywhere but where it was written, in the life of the slot in which it was written.
//! - Decoding never panics and never allocates more than a frame's limit, whatever the bytes.
//! - Version 1 never changes (golden bytes in the tests).
//!
//! # Not here
//!
//! What a frame's position in the sequence means (`recovery`), and any I/O.

use thiserror::Error;

use super::{HardState, Identity, Record};
use crate::limits::{WAL_BLOCK_BYTES, WAL_FRAME_BYTES_MAX};
use crate::types::{ClusterId, LogId, LogIndex, NodeId, SegmentNo, Term, Vote};

/// The block size as a length in memory.
pub const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == WAL_BLOCK_BYTES);

/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 64;

/// Version written by this build, and the newest it reads.
pub const FORMAT_VERSION: u8 = 1;

/// Most raw payload a frame may declare; a bound before anything is allocated.
pub const RAW_BYTES_MAX: usize = 3 << 20;
const _: () = assert!(RAW_BYTES_MAX as u64 == WAL_FRAME_BYTES_MAX);

/// Indexes, segments and frames are counted from 0 or 1; at a million a second this takes 146,000 years. Numbers read from a
/// file stay below, so that the next one always exists.
const NUMBER_END: u64 = 1 << 62;

const SLOT_MAGIC: [u8; 8] = *b"K3SWALS1";
const FRAME_MAGIC: [u8; 4] = *b"K3WF";
const SLOT_CRC_AT: usize = 176;
const FRAME_CRC_AT: usize = 60;

/// What is wrong with bytes that should be a header, a frame or a record.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Defect {
    /// Fewer bytes than the fixed part, or than the length field promises.
    #[error("{found} bytes, expected at least {expected}")]
    Short {
        /// Bytes there are.
        found: usize,
        /// Bytes needed.
        expected: usize,
    },
    /// Not the first bytes of such a structure.
    #[error("no magic number: found {found:08x}")]
    Magic {
        /// The first four bytes, as they stand in the file.
        found: u32,
    },
    /// Written by a newer release.
    #[error("format version {found}, this release reads up to {FORMAT_VERSION}")]
    Version {
        /// The version field.
        found: u32,
    },
    /// The header's own checksum differs.
    #[error("header checksum {found:08x}, expected {expected:08x}")]
    HeaderChecksum {
        /// In the header.
        found: u32,
        /// Computed.
        expected: u32,
    },
    /// The payload's checksum differs.
    #[error("payload checksum {found:08x}, expected {expected:08x}")]
    PayloadChecksum {
        /// Computed.
        found: u32,
        /// In the header.
        expected: u32,
    },
    /// A length that no frame may have.
    #[error("length {found}, expected at most {expected}")]
    Length {
        /// The length field.
        found: usize,
        /// The limit.
        expected: usize,
    },
    /// A frame of another life of this slot.
    #[error("generation {found:x}, expected {expected:x}")]
    Generation {
        /// In the frame.
        found: u64,
        /// In the slot's header.
        expected: u64,
    },
    /// A frame that belongs elsewhere.
    #[error(
        "frame of segment {found_segment} block {found_block}, expected segment {segment} block {block}"
    )]
    Misplaced {
        /// Segment in the frame.
        found_segment: u64,
        /// Block in the frame.
        found_block: u32,
        /// Segment it was read from.
        segment: u64,
        /// Block it was read from.
        block: u32,
    },
    /// Frames were lost before this one.
    #[error("frame {found}, expected frame {expected}")]
    Sequence {
        /// In the frame or header.
        found: u64,
        /// The one that should follow.
        expected: u64,
    },
    /// It was written after another frame than the one before it.
    #[error("follows a frame with checksum {found:08x}, expected {expected:08x}")]
    Chain {
        /// In the frame or header.
        found: u32,
        /// Of the frame before it.
        expected: u32,
    },
    /// The payload does not decompress to the length promised.
    #[error("payload does not decompress to {expected} bytes")]
    Compression {
        /// The raw length promised.
        expected: usize,
    },
    /// A record of an unknown kind.
    #[error("unknown record kind {found}")]
    Kind {
        /// The kind byte.
        found: u8,
    },
    /// More or fewer records than the frame promises.
    #[error("{found} records, expected {expected}")]
    Count {
        /// Records there are.
        found: u32,
        /// Records promised.
        expected: u32,
    },
    /// Frames that only a segment has, in a slot whose header is an earlier one.
    #[error("header is not that of segment {expected}, whose frames follow it")]
    OldHeader {
        /// The segment of the frames.
        expected: SegmentNo,
    },
    /// A counter that no log ever reaches.
    #[error("number {found}, expected less than {NUMBER_END}")]
    Number {
        /// As it stands there.
        found: u64,
    },
    /// An entry that does not continue the log.
    #[error("entry {found} after {last}")]
    Gap {
        /// The entry.
        found: LogId,
        /// The log's end before it.
        last: LogId,
    },
    /// A segment between two others, or the first one needed, is not there.
    #[error("segment {expected} is missing")]
    Missing {
        /// Its number.
        expected: SegmentNo,
    },
    /// A frame does not hold the entry that it held when it was written.
    #[error("no entry {expected}")]
    NoEntry {
        /// Its index.
        expected: LogIndex,
    },
    /// Two slots claim the same segment.
    #[error("segment {found} is in two slots")]
    Duplicate {
        /// Its number.
        found: SegmentNo,
    },
    /// The card does not give it back, not even at the second attempt.
    #[error("cannot be read: {}", std::io::Error::from_raw_os_error(*code))]
    Unreadable {
        /// The kernel's error number.
        code: i32,
    },
    /// The file is shorter than its header says.
    #[error("file is {found} bytes, expected {expected}")]
    FileLength {
        /// The file's length.
        found: u64,
        /// The header's.
        expected: u64,
    },
}

/// What block 0 of a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotHeader {
    /// Zero-filled and durable, ready to become a segment.
    Spare {
        /// Whose log this is.
        identity: Identity,
        /// Length of the file.
        slot_bytes: u64,
    },
    /// One life of the slot.
    Segment(SegmentHeader),
}

/// Start of a segment: enough to begin replaying here, so any prefix of the log can be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Whose log this is.
    pub identity: Identity,
    /// Position among segments.
    pub segment: SegmentNo,
    /// Random; every frame of this life of the slot carries it.
    pub generation: u64,
    /// Length of the file.
    pub slot_bytes: u64,
    /// The oldest segment that replaying needs.
    pub oldest_live: SegmentNo,
    /// Sequence number of the frame that replaying expects first.
    pub first_seq: u64,
    /// Checksum of the frame before that one.
    pub chain: u32,
    /// Everything Raft must remember as of the frame before that one. So the first index of this segment is the
    /// one after `state.last`.
    pub state: HardState,
}

/// What a frame says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Properties.
    pub flags: Flags,
    /// Bytes of payload in the file.
    pub payload_bytes: usize,
    /// Bytes of payload after decompression.
    pub raw_bytes: usize,
    /// Records in it.
    pub records: u32,
    /// Checksum of the frame before it.
    pub chain: u32,
    /// Its number; one more than the frame before it.
    pub seq: u64,
    /// The slot's life it belongs to.
    pub generation: u64,
    /// The segment it belongs to.
    pub segment: SegmentNo,
    /// The block it starts at.
    pub block: u32,
    /// Checksum of the payload as it stands in the file.
    pub payload_crc: u32,
    /// How many frames right before it this one can stand in for, because it repeats their records; mostly 0.
    pub replaces: u16,
    /// What `chain` is in the first of those frames.
    pub replaced_chain: u32,
    /// Checksum of all of the above.
    pub crc: u32,
}

/// Properties of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u8);

impl Flags {
    /// The payload is LZ4-compressed.
    pub const LZ4: Self = Self(1);
    /// The last frame of an orderly stop.
    pub const CLOSE: Self = Self(2);

    /// Whether all of `other` is set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Where a frame stands, known when it is sealed.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The segment.
    pub segment: SegmentNo,
    /// Its generation.
    pub generation: u64,
    /// Block within the slot.
    pub block: u32,
    /// Frame number.
    pub seq: u64,
    /// Checksum of the frame before it.
    pub chain: u32,
    /// See [`FrameHeader::replaces`].
    pub replaces: u16,
    /// See [`FrameHeader::replaced_chain`].
    pub replaced_chain: u32,
}

impl SlotHeader {
    /// Fills one block.
    pub fn encode(&self, block: &mut [u8]) {
        let block = &mut block[..BLOCK];
        block.fill(0);
        block[..8].copy_from_slice(&SLOT_MAGIC);
        put_u32(block, 8, u32::from(FORMAT_VERSION));
        match self {
            Self::Spare { identity, slot_bytes } => {
                put_u32(block, 12, 2);
                put_identity(block, identity);
                put_u64(block, 48, *slot_bytes);
            }
            Self::Segment(header) => {
                put_u32(block, 12, 1);
                put_identity(block, &header.identity);
                put_u64(block, 32, header.segment.get());
                put_u64(block, 40, header.generation);
                put_u64(block, 48, header.slot_bytes);
                put_u64(block, 56, header.oldest_live.get());
                put_u64(block, 64, header.first_seq);
                put_u32(block, 72, header.chain);
                put_state(block, &header.state);
            }
        }
        let crc = crc32c::crc32c(&block[..SLOT_CRC_AT]);
        put_u32(block, SLOT_CRC_AT, crc);
    }

    /// Reads the beginning of block 0.
    pub fn decode(block: &[u8]) -> Result<Self, Defect> {
        need(block, SLOT_CRC_AT + 4)?;
        if block[..8] != SLOT_MAGIC {
            return Err(Defect::Magic { found: u32_at(block, 0) });
        }
        check_crc(&block[..SLOT_CRC_AT], u32_at(block, SLOT_CRC_AT))?;
        let version = u32_at(block, 8);
        if version != u32::from(FORMAT_VERSION) {
            return Err(Defect::Version { found: version });
        }
        let identity = Identity {
            cluster: ClusterId::new(u64_at(block, 16)),
            node: NodeId::new(u64_at(block, 24)),
        };
        let slot_bytes = u64_at(block, 48);
        match u32_at(block, 12) {
            1 => Ok(Self::Segment(SegmentHeader {
                identity,
                segment: SegmentNo::new(number(u64_at(block, 32))?),
                generation: u64_at(block, 40),
                slot_bytes,
                oldest_live: SegmentNo::new(number(u64_at(block, 56))?),
                first_seq: number(u64_at(block, 64))?,
                chain: u32_at(block, 72),
                state: state_at(block)?,
            })),
            2 => Ok(Self::Spare { identity, slot_bytes }),
            other => Err(Defect::Kind { found: other.to_le_bytes()[0] }),
        }
    }

    /// Whose log it belongs to.
    pub const fn identity(&self) -> Identity {
        match self {
            Self::Spare { identity, .. } => *identity,
            Self::Segment(header) => header.identity,
        }
    }

    /// Length the file must have.
    pub const fn slot_bytes(&self) -> u64 {
        match self {
            Self::Spare { slot_bytes, .. } => *slot_bytes,
            Self::Segment(header) => header.slot_bytes,
        }
    }
}

impl FrameHeader {
    /// Reads a frame's header. The payload is not looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, Defect> {
        need(bytes, FRAME_HEADER_BYTES)?;
        if bytes[..4] != FRAME_MAGIC {
            return Err(Defect::Magic { found: u32_at(bytes, 0) });
        }
        let crc = u32_at(bytes, FRAME_CRC_AT);
        check_crc(&bytes[..FRAME_CRC_AT], crc)?;
        if bytes[4] != FORMAT_VERSION {
            return Err(Defect::Version { found: u32::from(bytes[4]) });
        }
        let header = Self {
            flags: Flags(bytes[5]),
            payload_bytes: length_at(bytes, 8)?,
            raw_bytes: length_at(bytes, 12)?,
            records: u32_at(bytes, 16),
            chain: u32_at(bytes, 20),
            seq: number(u64_at(bytes, 24))?,
            generation: u64_at(bytes, 32),
            segment: SegmentNo::new(number(u64_at(bytes, 40))?),
            block: u32_at(bytes, 48),
            payload_crc: u32_at(bytes, 52),
            replaces: u16::from_le_bytes([bytes[6], bytes[7]]),
            replaced_chain: u32_at(bytes, 56),
            crc,
        };
        if !header.flags.has(Flags::LZ4) && header.raw_bytes != header.payload_bytes {
            return Err(Defect::Length { found: header.raw_bytes, expected: header.payload_bytes });
        }
        Ok(header)
    }

    /// Whether it stands where it was written, in the life of the slot in which it was written.
    pub fn check_place(
        &self,
        generation: u64,
        segment: SegmentNo,
        block: u32,
    ) -> Result<(), Defect> {
        if self.generation != generation {
            return Err(Defect::Generation { found: self.generation, expected: generation });
        }
        if self.segment != segment || self.block != block {
            return Err(Defect::Misplaced {
                found_segment: self.segment.get(),
                found_block: self.block,
                segment: segment.get(),
                block,
            });
        }
        Ok(())
    }

    /// Whether it is the frame that follows.
    pub const fn check_order(&self, seq: u64, chain: u32) -> Result<(), Defect> {
        if self.seq != seq {
            return Err(Defect::Sequence { found: self.seq, expected: seq });
        }
        if self.chain != chain {
            return Err(Defect::Chain { found: self.chain, expected: chain });
        }
        Ok(())
    }

    /// Whether it repeats the frame with this number, which was chained to this checksum.
    pub fn repeats(&self, seq: u64, chain: u32) -> bool {
        self.first_repeated() == Some(seq) && self.replaced_chain == chain
    }

    /// Number of the frame that comes first when replaying begins here, and what it is chained to: the frame itself, or
    /// the first it can stand in for.
    pub fn start(&self) -> (u64, u32) {
        match self.first_repeated() {
            Some(first) => (first, self.replaced_chain),
            None => (self.seq, self.chain),
        }
    }

    /// Whether it repeats a frame before this number.
    pub fn repeats_older_than(&self, seq: u64) -> bool {
        self.first_repeated().is_some_and(|first| first < seq)
    }

    fn first_repeated(&self) -> Option<u64> {
        (self.replaces != 0).then(|| self.seq.checked_sub(u64::from(self.replaces)))?
    }

    /// Blocks the frame takes in the file.
    pub fn blocks(&self) -> u32 {
        blocks_for(self.payload_bytes)
    }

    /// Checks the payload and appends its raw bytes to `raw`. `frame` starts at the header.
    pub fn payload(&self, frame: &[u8], raw: &mut Vec<u8>) -> Result<(), Defect> {
        need(frame, FRAME_HEADER_BYTES + self.payload_bytes)?;
        let payload = &frame[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + self.payload_bytes];
        let found = crc32c::crc32c(payload);
        if found != self.payload_crc {
            return Err(Defect::PayloadChecksum { found, expected: self.payload_crc });
        }
        if !self.flags.has(Flags::LZ4) {
            raw.extend_from_slice(payload);
            return Ok(());
        }
        let start = raw.len();
        raw.resize(start + self.raw_bytes, 0);
        match lz4_flex::block::decompress_into(payload, &mut raw[start..]) {
            Ok(bytes) if bytes == self.raw_bytes => Ok(()),
            Ok(_) | Err(_) => Err(Defect::Compression { expected: self.raw_bytes }),
        }
    }
}

/// Reads one whole frame from untrusted bytes: header, payload, every record.
pub fn decode_frame(bytes: &[u8]) -> Result<(FrameHeader, Vec<Record>), Defect> {
    let header = FrameHeader::decode(bytes)?;
    let mut raw = Vec::new();
    header.payload(bytes, &mut raw)?;
    let records = records(&raw, header.records)
        .map(|record| record.map(|record| record.to_owned()))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((header, records))
}

/// Blocks a frame with this much payload takes in the file.
pub fn blocks_for(payload_bytes: usize) -> u32 {
    to_u32((FRAME_HEADER_BYTES + payload_bytes).div_ceil(BLOCK))
}

/// A record that borrows its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordRef<'a> {
    /// See [`Record::Entry`].
    Entry {
        /// Its name.
        id: LogId,
        /// Its content.
        payload: &'a [u8],
    },
    /// See [`Record::Vote`].
    Vote(Vote),
    /// See [`Record::Committed`].
    Committed(LogId),
    /// See [`Record::TruncateAfter`].
    TruncateAfter(Option<LogId>),
    /// See [`Record::Purge`].
    Purge(LogId),
}

impl RecordRef<'_> {
    /// The same with a payload of its own.
    pub fn to_owned(self) -> Record {
        match self {
            Self::Entry { id, payload } => {
                Record::Entry { id, payload: bytes::Bytes::copy_from_slice(payload) }
            }
            Self::Vote(vote) => Record::Vote(vote),
            Self::Committed(id) => Record::Committed(id),
            Self::TruncateAfter(id) => Record::TruncateAfter(id),
            Self::Purge(id) => Record::Purge(id),
        }
    }
}

impl<'a> From<&'a Record> for RecordRef<'a> {
    fn from(record: &'a Record) -> Self {
        match record {
            Record::Entry { id, payload } => Self::Entry { id: *id, payload },
            Record::Vote(vote) => Self::Vote(*vote),
            Record::Committed(id) => Self::Committed(*id),
            Record::TruncateAfter(id) => Self::TruncateAfter(*id),
            Record::Purge(id) => Self::Purge(*id),
        }
    }
}

/// Kind bytes are for ever: a number is never reused.
mod kind {
    pub(super) const ENTRY: u8 = 1;
    pub(super) const VOTE: u8 = 2;
    pub(super) const COMMITTED: u8 = 3;
    pub(super) const TRUNCATE_AFTER: u8 = 4;
    pub(super) const PURGE: u8 = 5;
}

const LOG_ID_BYTES: usize = 24;
const ENTRY_HEADER_BYTES: usize = 1 + LOG_ID_BYTES + 4;

/// Bytes a record takes in a payload.
pub fn record_bytes(record: &Record) -> usize {
    match record {
        Record::Entry { payload, .. } => ENTRY_HEADER_BYTES + payload.len(),
        Record::Vote(_) => 18,
        Record::Committed(_) | Record::Purge(_) => 1 + LOG_ID_BYTES,
        Record::TruncateAfter(_) => 2 + LOG_ID_BYTES,
    }
}

/// Appends one record.
pub fn encode_record(record: &Record, out: &mut Vec<u8>) {
    match record {
        Record::Entry { id, payload } => {
            out.push(kind::ENTRY);
            push_log_id(out, *id);
            out.extend_from_slice(&to_u32(payload.len()).to_le_bytes());
            out.extend_from_slice(payload);
        }
        Record::Vote(vote) => {
            out.push(kind::VOTE);
            out.extend_from_slice(&vote.term.get().to_le_bytes());
            out.extend_from_slice(&vote.node.get().to_le_bytes());
            out.push(u8::from(vote.committed));
        }
        Record::Committed(id) => {
            out.push(kind::COMMITTED);
            push_log_id(out, *id);
        }
        Record::TruncateAfter(id) => {
            out.push(kind::TRUNCATE_AFTER);
            out.push(u8::from(id.is_some()));
            push_log_id(out, id.unwrap_or_default());
        }
        Record::Purge(id) => {
            out.push(kind::PURGE);
            push_log_id(out, *id);
        }
    }
}

/// The records of a raw payload, which must hold exactly `expected` of them. Stops after the first defect.
pub fn records(raw: &[u8], expected: u32) -> Records<'_> {
    Records { rest: raw, found: 0, expected, failed: false }
}

/// See [`records`].
#[derive(Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
    found: u32,
    expected: u32,
    failed: bool,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<RecordRef<'a>, Defect>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = if self.rest.is_empty() {
            if self.found == self.expected {
                return None;
            }
            Err(Defect::Count { found: self.found, expected: self.expected })
        } else if self.found == self.expected {
            Err(Defect::Count { found: self.found.saturating_add(1), expected: self.expected })
        } else {
            self.found += 1;
            take_record(&mut self.rest)
        };
        self.failed = next.is_err();
        Some(next)
    }
}

fn take_record<'a>(rest: &mut &'a [u8]) -> Result<RecordRef<'a>, Defect> {
    let kind = take(rest, 1)?[0];
    Ok(match kind {
        kind::ENTRY => {
            let id = take_log_id(rest)?;
            let length = length_at(take(rest, 4)?, 0)?;
            RecordRef::Entry { id, payload: take(rest, length)? }
        }
        kind::VOTE => {
            let bytes = take(rest, 17)?;
            RecordRef::Vote(Vote {
                term: Term::new(u64_at(bytes, 0)),
                node: NodeId::new(u64_at(bytes, 8)),
                committed: bytes[16] != 0,
            })
        }
        kind::COMMITTED => RecordRef::Committed(take_log_id(rest)?),
        kind::TRUNCATE_AFTER => {
            let present = take(rest, 1)?[0] != 0;
            let id = take_log_id(rest)?;
            RecordRef::TruncateAfter(present.then_some(id))
        }
        kind::PURGE => RecordRef::Purge(take_log_id(rest)?),
        found => return Err(Defect::Kind { found }),
    })
}

fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> Result<&'a [u8], Defect> {
    let Some((head, tail)) = rest.split_at_checked(bytes) else {
        return Err(Defect::Short { found: rest.len(), expected: bytes });
    };
    *rest = tail;
    Ok(head)
}

fn take_log_id(rest: &mut &[u8]) -> Result<LogId, Defect> {
    log_id_at(take(rest, LOG_ID_BYTES)?, 0)
}

/// Writes a frame's header over the first bytes of `frame`, whose payload is in place; returns the checksum
/// that the next frame chains to.
pub(super) fn seal_frame(
    frame: &mut [u8],
    payload_bytes: usize,
    raw_bytes: usize,
    records: u32,
    flags: Flags,
    place: &Place,
) -> u32 {
    let payload_end = FRAME_HEADER_BYTES + payload_bytes;
    let payload_crc = crc32c::crc32c(&frame[FRAME_HEADER_BYTES..payload_end]);
    frame[..4].copy_from_slice(&FRAME_MAGIC);
    frame[4..6].copy_from_slice(&[FORMAT_VERSION, flags.0]);
    frame[6..8].copy_from_slice(&place.replaces.to_le_bytes());
    put_u32(frame, 8, to_u32(payload_bytes));
    put_u32(frame, 12, to_u32(raw_bytes));
    put_u32(frame, 16, records);
    put_u32(frame, 20, place.chain);
    put_u64(frame, 24, place.seq);
    put_u64(frame, 32, place.generation);
    put_u64(frame, 40, place.segment.get());
    put_u32(frame, 48, place.block);
    put_u32(frame, 52, payload_crc);
    put_u32(frame, 56, place.replaced_chain);
    let crc = crc32c::crc32c(&frame[..FRAME_CRC_AT]);
    put_u32(frame, FRAME_CRC_AT, crc);
    crc
}

const HAS_VOTE: u32 = 1;
const VOTE_COMMITTED: u32 = 2;
const HAS_COMMITTED: u32 = 4;
const HAS_PURGED: u32 = 8;
const HAS_LAST: u32 = 16;

fn put_state(block: &mut [u8], state: &HardState) {
    let mut flags = 0;
    if let Some(vote) = state.vote {
        flags |= HAS_VOTE | if vote.committed { VOTE_COMMITTED } else { 0 };
        put_u64(block, 88, vote.term.get());
        put_u64(block, 96, vote.node.get());
    }
    let ids = [
        (HAS_COMMITTED, 104, state.committed),
        (HAS_PURGED, 128, state.purged),
        (HAS_LAST, 152, state.last),
    ];
    for (flag, at, id) in ids {
        if let Some(id) = id {
            flags |= flag;
            put_u64(block, at, id.term.get());
            put_u64(block, at + 8, id.leader.get());
            put_u64(block, at + 16, id.index.get());
        }
    }
    put_u32(block, 80, flags);
}

fn state_at(block: &[u8]) -> Result<HardState, Defect> {
    let flags = u32_at(block, 80);
    let id = |flag, at| (flags & flag != 0).then(|| log_id_at(block, at)).transpose();
    Ok(HardState {
        vote: (flags & HAS_VOTE != 0).then(|| Vote {
            term: Term::new(u64_at(block, 88)),
            node: NodeId::new(u64_at(block, 96)),
            committed: flags & VOTE_COMMITTED != 0,
        }),
        committed: id(HAS_COMMITTED, 104)?,
        purged: id(HAS_PURGED, 128)?,
        last: id(HAS_LAST, 152)?,
    })
}

fn put_identity(block: &mut [u8], identity: &Identity) {
    put_u64(block, 16, identity.cluster.get());
    put_u64(block, 24, identity.node.get());
}

fn push_log_id(out: &mut Vec<u8>, id: LogId) {
    out.extend_from_slice(&id.term.get().to_le_bytes());
    out.extend_from_slice(&id.leader.get().to_le_bytes());
    out.extend_from_slice(&id.index.get().to_le_bytes());
}

fn log_id_at(bytes: &[u8], at: usize) -> Result<LogId, Defect> {
    Ok(LogId {
        term: Term::new(u64_at(bytes, at)),
        leader: NodeId::new(u64_at(bytes, at + 8)),
        index: LogIndex::new(number(u64_at(bytes, at + 16))?),
    })
}

const fn number(found: u64) -> Result<u64, Defect> {
    if found < NUMBER_END { Ok(found) } else { Err(Defect::Number { found }) }
}

const fn need(bytes: &[u8], expected: usize) -> Result<(), Defect> {
    if bytes.len() < expected {
        return Err(Defect::Short { found: bytes.len(), expected });
    }
    Ok(())
}

fn check_crc(covered: &[u8], found: u32) -> Result<(), Defect> {
    let expected = crc32c::crc32c(covered);
    if found == expected { Ok(()) } else { Err(Defect::HeaderChecksum { found, expected }) }
}

fn length_at(bytes: &[u8], at: usize) -> Result<usize, Defect> {
    let length = usize::try_from(u32_at(bytes, at)).unwrap_or(usize::MAX);
    if RAW_BYTES_MAX < length {
        return Err(Defect::Length { found: length, expected: RAW_BYTES_MAX });
    }
    Ok(length)
}

/// Lengths in a frame are far below 4 GiB: `RAW_BYTES_MAX` bounds them before they come here.
fn to_u32(length: usize) -> u32 {
    match u32::try_from(length) {
        Ok(length) => length,
        Err(_) => unreachable!("a length inside a frame is {length}"),
    }
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests;

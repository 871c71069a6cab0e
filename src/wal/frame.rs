//! Builds one frame in memory: records are encoded once, into the buffer that is written.
//!
//! The buffer reserves a block in front for a segment header, so that a fresh segment's header and first frame
//! are one write, and the frame header's bytes, so that sealing a frame copies nothing.

use super::Record;
use super::format::{
    self, BLOCK, FRAME_HEADER_BYTES, Flags, Place, SegmentHeader, SlotHeader, blocks_for,
};

const PAYLOAD_AT: usize = BLOCK + FRAME_HEADER_BYTES;

/// A buffer larger than this is not kept for reuse: one large batch must not cost its memory for ever.
const KEPT_BYTES_MAX: usize = 512 << 10;

/// A frame being built, then written.
#[derive(Debug)]
pub(super) struct FrameBuffer {
    /// Room for a segment header, room for the frame header, payload, padding.
    bytes: Vec<u8>,
    payload_bytes: usize,
    raw_bytes: usize,
    records: u32,
    flags: Flags,
}

impl FrameBuffer {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; PAYLOAD_AT],
            payload_bytes: 0,
            raw_bytes: 0,
            records: 0,
            flags: Flags::default(),
        }
    }

    /// Empties it for the next frame.
    pub(super) fn clear(&mut self) {
        if KEPT_BYTES_MAX < self.bytes.capacity() {
            self.bytes = Vec::new();
        }
        self.bytes.clear();
        self.bytes.resize(PAYLOAD_AT, 0);
        (self.payload_bytes, self.raw_bytes, self.records) = (0, 0, 0);
        self.flags = Flags::default();
    }

    pub(super) fn push(&mut self, record: &Record) {
        format::encode_record(record, &mut self.bytes);
        self.records += 1;
        self.payload_bytes = self.bytes.len() - PAYLOAD_AT;
        self.raw_bytes = self.payload_bytes;
    }

    /// Takes records that are encoded already.
    pub(super) fn push_raw(&mut self, raw: &[u8], records: u32) {
        self.bytes.extend_from_slice(raw);
        self.records += records;
        self.payload_bytes = self.bytes.len() - PAYLOAD_AT;
        self.raw_bytes = self.payload_bytes;
    }

    pub(super) const fn set(&mut self, flags: Flags) {
        self.flags = self.flags.with(flags);
    }

    pub(super) const fn raw_bytes(&self) -> usize {
        self.raw_bytes
    }

    pub(super) const fn records(&self) -> u32 {
        self.records
    }

    /// Blocks it takes in the file.
    pub(super) fn blocks(&self) -> u32 {
        blocks_for(self.payload_bytes)
    }

    /// Compresses the payload if that saves a block; `scratch` becomes the buffer, and the buffer scratch.
    pub(super) fn compress(&mut self, scratch: &mut Vec<u8>) {
        let blocks = self.blocks();
        if blocks == 1 || self.flags.has(Flags::LZ4) {
            return;
        }
        let raw = &self.bytes[PAYLOAD_AT..PAYLOAD_AT + self.raw_bytes];
        scratch.clear();
        scratch.resize(PAYLOAD_AT + lz4_flex::block::get_maximum_output_size(raw.len()), 0);
        let Ok(compressed) = lz4_flex::block::compress_into(raw, &mut scratch[PAYLOAD_AT..]) else {
            return;
        };
        if blocks_for(compressed) < blocks {
            scratch.truncate(PAYLOAD_AT + compressed);
            std::mem::swap(&mut self.bytes, scratch);
            self.payload_bytes = compressed;
            self.flags = self.flags.with(Flags::LZ4);
        }
        if KEPT_BYTES_MAX < scratch.capacity() {
            *scratch = Vec::new();
        }
    }

    /// Pads and checksums the frame for its place; returns what the next frame chains to.
    pub(super) fn seal(&mut self, place: &Place) -> u32 {
        let end = BLOCK + self.blocks() as usize * BLOCK;
        self.bytes.truncate(PAYLOAD_AT + self.payload_bytes);
        self.bytes.resize(end, 0);
        format::seal_frame(
            &mut self.bytes[BLOCK..],
            self.payload_bytes,
            self.raw_bytes,
            self.records,
            self.flags,
            place,
        )
    }

    /// The sealed frame.
    pub(super) fn frame(&self) -> &[u8] {
        &self.bytes[BLOCK..]
    }

    /// The sealed frame with its segment's header in front.
    pub(super) fn with_segment_header(&mut self, header: SegmentHeader) -> &[u8] {
        SlotHeader::Segment(header).encode(&mut self.bytes);
        &self.bytes
    }
}

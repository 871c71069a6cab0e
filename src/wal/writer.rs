//! Writes frames: one write, one barrier, in order, and tells whoever waits.
//!
//! # Shape
//!
//! The shell around `batch`: wait, ask what to do, do it. [`Appender`] knows where the next frame goes; recovery uses
//! it too. [`Writer::run`] is the whole log as one future for a simulation; [`Writer::spawn_thread`] gives it threads
//! of its own, because on a host a barrier blocks its thread.
//!
//! # Invariants
//!
//! - The first error ends the writer. Whoever waits is told, nothing is tried again.
//! - Dropping the writer fails the log, so nobody waits for a barrier that will not come.

use std::io;
use std::sync::Arc;
use std::thread;

use super::format::{BLOCK, Flags, Place, SegmentHeader};
use super::frame::FrameBuffer;
use super::handle::{Batch, Next, Shared};
use super::log::FrameAt;
use super::prepare::Filler;
use super::segment::{self, Segment, Slot};
use super::{Failed, HardState, Identity, Record};
use crate::mutants::{Mutant, is_planted};
use crate::types::SegmentNo;

/// What a frame follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    /// Number of the frame that comes next.
    pub(super) seq: u64,
    /// Checksum of the frame before it.
    pub(super) chain: u32,
    /// What Raft must remember as of the frame before it.
    pub(super) state: HardState,
}

impl Position {
    /// Whether replaying the segment starts here.
    pub(super) fn is_start_of(&self, header: &SegmentHeader) -> bool {
        (self.seq, self.chain) == (header.first_seq, header.chain)
    }
}

/// The next frame holds the records of an earlier one once more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Repeat {
    /// Before the frame that is repeated.
    pub(super) before: Position,
    /// Where it stands.
    pub(super) at: FrameAt,
    /// Frames from it up to the next one.
    pub(super) replaces: u16,
}

/// Knows where the next frame goes.
#[derive(Debug)]
pub(super) struct Appender {
    identity: Identity,
    segment: Segment,
    next_block: u32,
    position: Position,
    /// The segment's header has not been written: it goes out with the next frame.
    header_due: bool,
    oldest_live: SegmentNo,
    repeat: Option<Repeat>,
}

impl Appender {
    /// The first segment of a new log.
    pub(super) fn create(slot: Arc<Slot>, identity: Identity, generation: u64) -> Self {
        let number = SegmentNo::new(1);
        Self {
            identity,
            segment: Segment { number, generation, slot },
            next_block: 1,
            position: Position { seq: 1, ..Position::default() },
            header_due: true,
            oldest_live: number,
            repeat: None,
        }
    }

    /// Behind what recovery found.
    pub(super) fn resume(
        segment: Segment,
        header: &SegmentHeader,
        next_block: u32,
        position: Position,
        repeat: Option<Repeat>,
    ) -> Self {
        Self {
            identity: header.identity,
            segment,
            next_block,
            position,
            header_due: false,
            oldest_live: header.oldest_live,
            repeat,
        }
    }

    /// Whether the segment has room.
    pub(super) fn fits(&self, blocks: u32) -> bool {
        blocks <= self.segment.slot.copy_block().saturating_sub(self.next_block)
    }

    /// Goes on in another slot. `oldest_live` is the oldest segment that holds an entry, if there are entries.
    pub(super) fn switch(
        &mut self,
        slot: Arc<Slot>,
        generation: u64,
        oldest_live: Option<SegmentNo>,
    ) {
        let number = self.segment.number.next();
        self.segment = Segment { number, generation, slot };
        self.next_block = 1;
        self.header_due = true;
        self.oldest_live = oldest_live.unwrap_or(number);
    }

    /// Writes a frame, which is not durable yet; `state` is what Raft must remember after it.
    pub(super) fn write(
        &mut self,
        frame: &mut FrameBuffer,
        state: HardState,
    ) -> io::Result<(FrameAt, u64)> {
        let blocks = frame.blocks();
        assert!(self.fits(blocks), "a frame of {blocks} blocks at {}", self.next_block);
        let repeat = self.repeat.take();
        let start = repeat.map_or(self.position, |repeat| repeat.before);
        let (segment, generation) = (self.segment.number, self.segment.generation);
        let crc = frame.seal(&Place {
            segment,
            generation,
            block: self.next_block,
            seq: self.position.seq,
            chain: self.position.chain,
            replaces: repeat.map_or(0, |repeat| repeat.replaces),
            replaced_chain: repeat.map_or(0, |repeat| repeat.before.chain),
        });
        let file = &self.segment.slot.file;
        let mut bytes = u64::from(blocks) * BLOCK as u64;
        if self.header_due {
            let header = SegmentHeader {
                identity: self.identity,
                segment,
                generation,
                slot_bytes: segment::offset_of(self.segment.slot.blocks),
                oldest_live: self.oldest_live,
                first_seq: start.seq,
                chain: start.chain,
                state: start.state,
            };
            file.write_at(frame.with_segment_header(header), 0)?;
            bytes += BLOCK as u64;
            self.header_due = false;
        } else {
            file.write_at(frame.frame(), segment::offset_of(self.next_block))?;
        }
        let at = FrameAt { segment, block: self.next_block, blocks };
        self.position = Position { seq: self.position.seq + 1, chain: crc, state };
        self.next_block += blocks;
        Ok((at, bytes))
    }

    /// The barrier.
    pub(super) async fn sync(&self) -> io::Result<()> {
        self.segment.slot.file.sync().await
    }

    pub(super) const fn segment(&self) -> &Segment {
        &self.segment
    }

    pub(super) const fn oldest_live(&self) -> SegmentNo {
        self.oldest_live
    }

    /// What Raft must remember as of the last frame.
    pub(super) const fn state(&self) -> HardState {
        self.position.state
    }

    /// Blocks left in the segment, and how many it has.
    pub(super) fn room(&self) -> (u32, u32) {
        let end = self.segment.slot.copy_block();
        (end.saturating_sub(self.next_block), end)
    }
}

/// The shell that writes. Does nothing until it is run.
#[derive(Debug)]
pub struct Writer {
    pub(super) core: Core,
    pub(super) filler: Filler,
}

impl Writer {
    /// Writes until the log is closed or fails. For a simulation, or any runtime whose threads may block.
    pub async fn run(self) {
        futures_util::future::join(self.core.run(), self.filler.run()).await;
    }

    /// The same on two threads of its own, one for frames and one for filling slots ahead.
    pub fn spawn_thread(self) -> io::Result<thread::JoinHandle<()>> {
        let Self { core, filler } = self;
        let core_runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let filler_runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let filler = thread::Builder::new()
            .name("wal-filler".to_owned())
            .spawn(move || filler_runtime.block_on(filler.run()))?;
        thread::Builder::new().name("wal-writer".to_owned()).spawn(move || {
            core_runtime.block_on(core.run());
            // A panic of the filler has been reported by then; the log no longer needs it.
            drop(filler.join());
        })
    }
}

/// Writes frames.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) appender: Appender,
    /// Reused for compression.
    pub(super) scratch: Vec<u8>,
}

impl Drop for Core {
    fn drop(&mut self) {
        self.shared.fail(Failed::Closed);
    }
}

impl Core {
    async fn run(mut self) {
        loop {
            let done = match self.shared.next().await {
                Next::Write(batch) => self.write(batch).await,
                Next::Close => self.close().await,
                Next::Stop => return,
            };
            if let Err(failed) = done {
                self.shared.fail(failed);
                return;
            }
        }
    }

    async fn write(&mut self, mut batch: Batch) -> Result<(), Failed> {
        let (at, bytes) = self.write_frame(&mut batch.frame, batch.state).await?;
        self.shared.finished(batch, at, bytes, &self.appender);
        Ok(())
    }

    /// One more frame behind the last acknowledged one: damage to that is not a torn write then.
    async fn close(&mut self) -> Result<(), Failed> {
        let mut frame = FrameBuffer::new();
        frame.set(Flags::CLOSE);
        // Changes nothing, and tells where the log ended should the frames before it be damaged.
        frame.push(&Record::TruncateAfter(self.appender.state().last));
        let state = self.appender.state();
        // At the very end of a segment it is left out rather than waiting for a slot to be filled.
        if self.appender.fits(frame.blocks()) || self.shared.has_spare() {
            self.write_frame(&mut frame, state).await?;
        }
        self.shared.closed();
        Ok(())
    }

    async fn write_frame(
        &mut self,
        frame: &mut FrameBuffer,
        state: HardState,
    ) -> Result<(FrameAt, u64), Failed> {
        frame.compress(&mut self.scratch);
        if !self.appender.fits(frame.blocks()) {
            let slot = self.shared.take_spare().await?;
            let oldest_live = self.shared.oldest_live();
            self.appender.switch(slot, self.shared.env.entropy.next_u64(), oldest_live);
        }
        let path = &self.appender.segment().slot.path.clone();
        let written = self.appender.write(frame, state).map_err(Failed::io("write", path))?;
        match self.appender.sync().await {
            Err(_) if is_planted(Mutant::SyncErrorIgnored) => {}
            synced => synced.map_err(Failed::io("sync", path))?,
        }
        Ok(written)
    }
}

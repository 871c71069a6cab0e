//! Begins a log anew: after an entry that is safe elsewhere, with what is to follow it, in place of whatever log is there.
//!
//! # Shape
//!
//! [`start_over`] builds the new log as one segment in a file that no start looks at, makes it durable, and gives it a
//! slot's name: that rename is the moment. The segment's number is above all others and it needs none of them, so for every
//! start after that the rest of the directory is free. Then the old slots go.
//!
//! # Invariants
//!
//! - A crash at any point leaves the old log or the new one, whole.
//! - Segment and frame numbers are above any that the old log can have used, readable or not: what is left of it can
//!   neither continue the new log nor look like its lost end.
//! - No block of the old log is written before the new one is durable.
//!
//! # Not here
//!
//! Whether the old log may be given up: see `salvage`, and whoever calls this.

use std::io;
use std::path::{Path, PathBuf};

use super::format::{BLOCK, Flags, Place, SegmentHeader, SlotHeader};
use super::frame::FrameBuffer;
use super::segment::{self, Slot};
use super::{Entry, HardState, Identity, OpenError, Options, Record, prepare};
use crate::env::{Disk, DiskFile, Env, Open};
use crate::types::{LogId, SegmentNo, Vote};

/// The new log before it has a slot's name.
const INCOMING: &str = "incoming";

/// Bytes of zeros written at once.
const CHUNK_BYTES: usize = 256 << 10;

/// What the new log holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beginning {
    /// Everything up to here is safe elsewhere; the log begins after it.
    pub after: Option<LogId>,
    /// What Raft has promised.
    pub vote: Option<Vote>,
    /// Entries that follow, without a gap.
    pub entries: Vec<Entry>,
}

impl Beginning {
    /// What Raft must remember before the entries.
    fn state(&self) -> HardState {
        let Self { after, vote, .. } = *self;
        HardState { vote, committed: after, purged: after, last: after }
    }

    fn last(&self) -> Option<LogId> {
        self.entries.last().map(|entry| entry.id).or(self.after)
    }
}

/// What becomes of the old log's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Old<'a> {
    /// They are removed.
    Remove,
    /// They are moved to this directory, which is made.
    MoveTo(&'a Path),
}

/// Replaces the log in a directory, which nobody may have open. Repeating it after a crash finishes the job.
pub async fn start_over(
    env: &Env,
    dir: &Path,
    identity: Identity,
    options: &Options,
    beginning: &Beginning,
    old: Old<'_>,
) -> Result<(), OpenError> {
    let disk = env.disk.as_ref();
    prepare_dirs(disk, dir, old)?;
    let numbers = segment::list(disk, dir).map_err(OpenError::io("list", dir))?;
    let used = Used::find(disk, dir, &numbers)?;
    let incoming = remove_incoming(disk, dir)?;
    let file = disk.open(&incoming, Open::Create).map_err(OpenError::io("create", &incoming))?;
    let image = Image::new(beginning, options.segment_bytes);
    let written = image.write(&*file, env, identity, &used, beginning.state());
    written.map_err(OpenError::io("write", &incoming))?;
    file.sync().await.map_err(OpenError::io("sync", &incoming))?;
    drop(file);

    let slot = prepare::free_number(|number| numbers.contains(&number));
    let path = segment::path_of(dir, slot);
    disk.rename(&incoming, &path).map_err(OpenError::io("rename", &incoming))?;
    disk.sync_dir(dir).map_err(OpenError::io("sync", dir))?;

    for number in numbers {
        let path = segment::path_of(dir, number);
        match (old, path.file_name()) {
            (Old::MoveTo(aside), Some(name)) => disk.rename(&path, &aside.join(name)),
            (Old::Remove | Old::MoveTo(_), _) => disk.remove(&path),
        }
        .map_err(OpenError::io("remove", &path))?;
    }
    if let Old::MoveTo(aside) = old {
        disk.sync_dir(aside).map_err(OpenError::io("sync", aside))?;
    }
    disk.sync_dir(dir).map_err(OpenError::io("sync", dir))
}

fn prepare_dirs(disk: &dyn Disk, dir: &Path, old: Old<'_>) -> Result<(), OpenError> {
    let aside = match old {
        Old::Remove => None,
        Old::MoveTo(aside) => Some(aside),
    };
    for dir in aside.into_iter().chain([dir]) {
        disk.create_dir_all(dir).map_err(OpenError::io("create", dir))?;
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_dir(parent).map_err(OpenError::io("sync", parent))?;
        }
    }
    Ok(())
}

/// Removes what an attempt that was cut short has left; returns its path.
pub(super) fn remove_incoming(disk: &dyn Disk, dir: &Path) -> Result<PathBuf, OpenError> {
    let path = dir.join(INCOMING);
    if disk.exists(&path).map_err(OpenError::io("look for", &path))? {
        disk.remove(&path).map_err(OpenError::io("remove", &path))?;
    }
    Ok(path)
}

/// Numbers that the old log has, or can have, used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    segment: u64,
    seq: u64,
}

impl Used {
    /// The highest numbers that can be read, and as many more as what cannot be read has room for.
    fn find(disk: &dyn Disk, dir: &Path, numbers: &[usize]) -> Result<Self, OpenError> {
        let mut used = Self::default();
        let mut blocks = 0;
        for number in numbers {
            let path = segment::path_of(dir, *number);
            let slot =
                Slot::open(disk, dir, *number, Open::Read).map_err(OpenError::io("open", &path))?;
            for block in [0, slot.copy_block()] {
                if let Ok(SlotHeader::Segment(header)) = slot.header(block) {
                    used.note(header.segment, header.first_seq);
                }
            }
            slot.each_frame_header(|frame| used.note(frame.segment, frame.seq));
            blocks += u64::from(slot.blocks);
        }
        used.segment += numbers.len() as u64;
        used.seq += blocks;
        Ok(used)
    }

    fn note(&mut self, segment: SegmentNo, seq: u64) {
        self.segment = self.segment.max(segment.get());
        self.seq = self.seq.max(seq);
    }
}

/// The frames of the new segment, and how large its slot is to be.
struct Image {
    frames: Vec<FrameBuffer>,
    slot_blocks: u32,
}

impl Image {
    fn new(beginning: &Beginning, segment_bytes: u64) -> Self {
        let raw_max = super::handle::frame_raw_max(segment_bytes);
        let mut frames = vec![FrameBuffer::new()];
        // Nothing after it is expected, and it tells where the log ended: as behind an orderly stop.
        let end = Record::TruncateAfter(beginning.last());
        let entries = beginning.entries.iter();
        let entries =
            entries.map(|entry| Record::Entry { id: entry.id, payload: entry.payload.clone() });
        for record in entries.chain([end]) {
            let size = super::format::record_bytes(&record);
            if frames.last().is_none_or(|frame| raw_max < frame.raw_bytes() + size) {
                frames.push(FrameBuffer::new());
            }
            if let Some(frame) = frames.last_mut() {
                frame.push(&record);
            }
        }
        let mut scratch = Vec::new();
        frames.iter_mut().for_each(|frame| frame.compress(&mut scratch));
        if let Some(last) = frames.last_mut() {
            last.set(Flags::CLOSE);
        }
        let needed: u32 = frames.iter().map(FrameBuffer::blocks).sum();
        let usual = u32::try_from(segment_bytes / BLOCK as u64).unwrap_or(u32::MAX);
        // Beside them the header and its copy.
        Self { frames, slot_blocks: usual.max(needed.saturating_add(2)) }
    }

    fn write(
        mut self,
        file: &dyn DiskFile,
        env: &Env,
        identity: Identity,
        used: &Used,
        state: HardState,
    ) -> io::Result<()> {
        let slot_bytes = segment::offset_of(self.slot_blocks);
        fill(file, slot_bytes)?;
        let segment = SegmentNo::new(used.segment + 1);
        let header = SegmentHeader {
            identity,
            segment,
            generation: env.entropy.next_u64(),
            slot_bytes,
            oldest_live: segment,
            first_seq: used.seq + 1,
            chain: 0,
            state,
        };
        let mut place = Place {
            segment,
            generation: header.generation,
            block: 1,
            seq: header.first_seq,
            chain: header.chain,
            replaces: 0,
            replaced_chain: 0,
        };
        for frame in &mut self.frames {
            place.chain = frame.seal(&place);
            file.write_at(frame.frame(), segment::offset_of(place.block))?;
            place.block += frame.blocks();
            place.seq += 1;
        }
        let mut block = vec![0; BLOCK];
        SlotHeader::Segment(header).encode(&mut block);
        file.write_at(&block, 0)
    }
}

fn fill(file: &dyn DiskFile, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while offset < bytes {
        let len = usize::try_from(bytes - offset).unwrap_or(usize::MAX).min(zeros.len());
        file.write_at(&zeros[..len], offset)?;
        offset += len as u64;
    }
    Ok(())
}

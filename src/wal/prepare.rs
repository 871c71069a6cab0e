//! Fills slots with zeros before they are needed, so that writing a frame never changes file metadata.
//!
//! The first write to a block of a new file costs a journal commit besides the data; a block that was written
//! before costs nothing extra. So a slot is written once, in full, before its first life.
//!
//! # Shape
//!
//! [`Filler`] runs on its own thread (or as its own task), because the barriers of filling must not delay those of
//! the log. It fills small chunks with a pause between them, lets a barrier that is in flight return first, and
//! hurries only when the writer waits for it.
//!
//! # Invariants
//!
//! - A slot is handed to the writer only when its zeros, its spare header and its directory entry are durable.
//! - Failing to fill ahead of need is not fatal: it is tried again. Failing when the writer waits is.
//!
//! # Not here
//!
//! Reuse of slots: a recycled slot is filled already, and becomes spare when the segment in it is not needed.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::format::{BLOCK, SlotHeader};
use super::handle::Shared;
use super::segment::{self, Slot};
use super::{Failed, Identity};
use crate::env::{DiskFile, Env, Open};
use crate::mutants::{Mutant, is_planted};

/// Bytes filled between two pauses.
const CHUNK_BYTES: usize = 256 << 10;

/// Pause after a failure nobody waits for: a full card, mostly.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// The lowest slot number that is not used.
pub(super) fn free_number(used: impl Fn(usize) -> bool) -> usize {
    (0..).find(|number| !used(*number)).unwrap_or(usize::MAX)
}

/// Fills a slot without pauses and with few barriers, for the first start.
pub(super) async fn fill_at_once(
    env: &Env,
    dir: &Path,
    number: usize,
    identity: Identity,
    slot_bytes: u64,
) -> io::Result<Slot> {
    let file = create(env, dir, number)?;
    let zeros = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while offset < slot_bytes {
        offset += fill_chunk(file.as_ref(), &zeros, offset, slot_bytes)?;
    }
    file.sync().await?;
    finish(env, dir, number, identity, slot_bytes).await
}

/// Opens the file, which may exist half filled or with a bad header.
fn create(env: &Env, dir: &Path, number: usize) -> io::Result<Arc<dyn DiskFile>> {
    let path = segment::path_of(dir, number);
    match env.disk.open(&path, Open::Create) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            env.disk.open(&path, Open::Write)
        }
        other => other,
    }
}

fn fill_chunk(file: &dyn DiskFile, zeros: &[u8], offset: u64, slot_bytes: u64) -> io::Result<u64> {
    let bytes = usize::try_from(slot_bytes - offset).unwrap_or(usize::MAX).min(zeros.len());
    file.write_at(&zeros[..bytes], offset)?;
    Ok(bytes as u64)
}

/// Marks a filled slot as spare and makes its name durable.
async fn finish(
    env: &Env,
    dir: &Path,
    number: usize,
    identity: Identity,
    slot_bytes: u64,
) -> io::Result<Slot> {
    let slot = Slot::open(env.disk.as_ref(), dir, number, Open::Write)?;
    if segment::offset_of(slot.blocks) != slot_bytes {
        slot.file.set_len(slot_bytes)?;
    }
    let mut block = vec![0; BLOCK];
    SlotHeader::Spare { identity, slot_bytes }.encode(&mut block);
    slot.file.write_at(&block, 0)?;
    slot.file.sync().await?;
    if !is_planted(Mutant::NameNotSynced) {
        env.disk.sync_dir(dir)?;
    }
    Slot::open(env.disk.as_ref(), dir, number, Open::Write)
}

/// What to do next, decided under the log's lock.
#[derive(Debug)]
pub(super) enum Job {
    /// Nothing to do.
    Wait,
    /// Fill this slot.
    Fill(usize),
    /// Too many slots: remove this free one.
    Remove(Arc<Slot>),
    /// The log is closed.
    Stop,
}

/// Keeps a spare slot ready. See the module documentation.
#[derive(Debug)]
pub(super) struct Filler {
    pub(super) shared: Arc<Shared>,
    pub(super) identity: Identity,
}

/// The writer must not wait for a filler that is gone.
impl Drop for Filler {
    fn drop(&mut self) {
        self.shared.filler_gone();
    }
}

impl Filler {
    pub(super) async fn run(self) {
        loop {
            match self.shared.filler_job() {
                Job::Stop => return,
                Job::Wait => self.shared.wake_filler.notified().await,
                Job::Remove(slot) => {
                    // Failing to remove leaves a file that the next start finds and uses.
                    let removed = self.shared.env.disk.remove(&slot.path);
                    let synced =
                        removed.and_then(|()| self.shared.env.disk.sync_dir(&self.shared.dir));
                    if synced.is_err() {
                        self.pause_unless_awaited(RETRY_PAUSE).await;
                    }
                }
                Job::Fill(number) => self.fill(number).await,
            }
        }
    }

    async fn fill(&self, number: usize) {
        match self.try_fill(number).await {
            Ok(Some(slot)) => self.shared.filled(slot),
            Ok(None) => {}
            Err(error) => {
                let path = segment::path_of(&self.shared.dir, number);
                self.shared.fill_failed(Failed::io("fill", &path)(error));
                self.pause_unless_awaited(RETRY_PAUSE).await;
            }
        }
    }

    /// `None` if the log was closed meanwhile.
    async fn try_fill(&self, number: usize) -> io::Result<Option<Slot>> {
        let shared = &self.shared;
        let slot_bytes = shared.options.segment_bytes;
        let file = create(&shared.env, &shared.dir, number)?;
        let zeros = vec![0; CHUNK_BYTES];
        let mut offset = 0;
        while offset < slot_bytes {
            // One barrier is waited for, not more: under load there is always another, and a slot that is not
            // ready in time stalls everybody.
            if shared.must_filling_wait() {
                shared.wake_filler.notified().await;
            }
            let bytes = fill_chunk(file.as_ref(), &zeros, offset, slot_bytes)?;
            file.sync().await?;
            super::stats::add(&shared.counters.fill_bytes, bytes);
            offset += bytes;
            if shared.is_closed() {
                return Ok(None);
            }
            if !shared.is_spare_awaited() {
                self.pause(shared.options.fill_pause).await;
            }
        }
        let (dir, identity) = (&shared.dir, self.identity);
        finish(&shared.env, dir, number, identity, slot_bytes).await.map(Some)
    }

    /// Sleeps, but not longer than until something changes.
    async fn pause(&self, duration: Duration) {
        let sleep = self.shared.env.clock.sleep(duration);
        select(sleep, Box::pin(self.shared.wake_filler.notified())).await;
    }

    /// Sleeps until the writer needs a slot or the log closes, but not longer than this.
    async fn pause_unless_awaited(&self, duration: Duration) {
        let mut sleep = self.shared.env.clock.sleep(duration);
        while !self.shared.is_spare_awaited() && !self.shared.is_closed() {
            let changed = Box::pin(self.shared.wake_filler.notified());
            match select(sleep, changed).await {
                Either::Left(_) => return,
                Either::Right(((), unfinished)) => sleep = unfinished,
            }
        }
    }
}

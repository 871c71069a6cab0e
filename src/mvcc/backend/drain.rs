//! Writes closed epochs to the card, in order, slowly enough not to be in the log's way.
//!
//! # Invariants
//!
//! - An epoch's record is durable before its first block is written; its last block is durable before the
//!   next epoch's record is written.
//! - Before its first epoch, the drain takes a barrier on the database file: what `open` read there may have
//!   been in the page cache only, left by a process that was killed.
//! - The first error ends it. Only a write that was refused for lack of room is tried again.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::env::{DiskFile, Env};

use super::overlay::{BLOCK_BYTES, Block, Writes, offset_of};
use super::table::{HEADER_BYTES, HeaderCopy, Record, encode_snapshot};
use super::{Epoch, Failure, Operation, Shared};

/// Room for records behind a table's snapshot. Sixty-four blocks are two and a half hours of an idle cluster's
/// checkpoints, which makes the snapshot's share of the writes small for any size of database.
const RECORDS_BYTES: u64 = 64 * BLOCK_BYTES as u64;

/// The table file in use.
pub(super) struct TableFile {
    pub(super) file: Arc<dyn DiskFile>,
    /// Where its records begin, and where the next one goes.
    pub(super) start: u64,
    pub(super) end: u64,
}

/// The only writer of the database file and its table. See [`super`] for the order in which it writes.
pub struct Drain {
    pub(super) shared: Arc<Shared>,
    pub(super) env: Env,
    pub(super) table_files: [Arc<dyn DiskFile>; 2],
    /// `None`: a snapshot must be written before the next record.
    pub(super) table: Option<TableFile>,
    /// Where that snapshot goes.
    pub(super) next_slot: usize,
    /// The newest header that is durable, or was when `open` looked.
    pub(super) header: Option<HeaderCopy>,
    pub(super) finished: bool,
}

impl std::fmt::Debug for Drain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drain").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        if !self.finished {
            // Nobody will write what is held: say so to whoever waits for it.
            self.shared.stop(&Failure::Abandoned);
        }
    }
}

impl Drain {
    /// Runs until the backend is closed and everything is durable, or something fails.
    ///
    /// In production this blocks its thread for as long as the card likes: see [`Drain::spawn_thread`].
    pub async fn run(mut self) -> Result<(), Failure> {
        let mut result = self.drain().await;
        self.finished = true;
        if self.shared.lock().retired {
            // Whoever still reads finds in memory what did not reach the file.
            result = Ok(());
        }
        match &result {
            Ok(()) => self.shared.progress.send_modify(|progress| progress.finished = true),
            Err(failure) => self.shared.stop(failure),
        }
        result
    }

    /// Runs on a thread of its own. From now on writes beyond the memory bound, and `close`, wait for it.
    pub fn spawn_thread(self) -> io::Result<JoinHandle<Result<(), Failure>>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name("state-drain".to_owned())
            .spawn(move || runtime.block_on(self.run()))?;
        shared.lock().threaded = true;
        Ok(thread)
    }

    async fn drain(&mut self) -> Result<(), Failure> {
        let mut first = true;
        loop {
            // Asked before looking, so that a signal in between is not lost.
            let shared = self.shared.clone();
            let work = shared.work.notified();
            let (writes, closing) = {
                let state = self.shared.lock();
                if let Some(failure) = &state.stopped {
                    return Err(failure.clone());
                }
                let writes = state.overlay.oldest_sealed().filter(|_| !state.retired);
                (writes, state.closing || state.retired)
            };
            match writes {
                Some(writes) => {
                    if std::mem::take(&mut first) {
                        self.sync_database().await?;
                    }
                    self.write_epoch(&writes).await?;
                }
                None if closing => return Ok(()),
                None => work.await,
            }
        }
    }

    async fn write_epoch(&mut self, writes: &Writes) -> Result<(), Failure> {
        let record = record_of(writes);
        let bytes = record.encode(self.shared.id);
        self.write_record(record.epoch, &bytes).await?;
        self.write_blocks(writes).await?;
        self.header = record.header.or(self.header);

        {
            let mut state = self.shared.lock();
            state.overlay.complete(&record.changes);
        }
        self.shared.progress.send_modify(|progress| {
            // A retired file is as durable as it will ever be needed.
            progress.durable = progress.durable.max(writes.epoch);
        });
        self.shared.drained.notify_all();
        Ok(())
    }

    async fn write_record(&mut self, epoch: Epoch, bytes: &[u8]) -> Result<(), Failure> {
        let full = self.table.as_ref().is_none_or(|table| {
            let used = table.end - table.start;
            used != 0 && RECORDS_BYTES < used + bytes.len() as u64
        });
        if full {
            self.write_snapshot(Epoch::new(epoch.get() - 1)).await?;
        }
        let Some(table) = &mut self.table else {
            unreachable!("a snapshot leaves a table file");
        };
        let (file, end) = (table.file.clone(), table.end);
        table.end += bytes.len() as u64;
        self.write_table(&*file, bytes, end).await?;
        self.sync(&*file, Operation::Table).await
    }

    /// Writes all checksums, as of the end of `epoch`, to the table file that is not in use.
    ///
    /// The barrier of the record that follows covers it. Until then nothing goes to the database file, so the
    /// other table file, whole up to `epoch`, remains right.
    async fn write_snapshot(&mut self, epoch: Epoch) -> Result<(), Failure> {
        let bytes = {
            let state = self.shared.lock();
            encode_snapshot(self.shared.id, epoch, state.overlay.crcs(), self.header.as_ref())
        };
        let slot = self.next_slot;
        let file = self.table_files[slot].clone();
        let start = bytes.len() as u64;
        self.write_table(&*file, &bytes, 0).await?;
        self.extend_with_zeros(&*file, start + RECORDS_BYTES).await?;
        self.next_slot = 1 - slot;
        self.table = Some(TableFile { file, start, end: start });
        Ok(())
    }

    /// Allocates the record area once, so that later records change no file metadata.
    async fn extend_with_zeros(&self, file: &dyn DiskFile, end: u64) -> Result<(), Failure> {
        let zeros = vec![0; BLOCK_BYTES];
        let mut at = file.len().map_err(|error| Failure::io(Operation::Table, error))?;
        while at < end {
            self.write_table(file, &zeros, at).await?;
            at += BLOCK_BYTES as u64;
        }
        Ok(())
    }

    async fn write_table(&self, file: &dyn DiskFile, bytes: &[u8], at: u64) -> Result<(), Failure> {
        self.shared.lock().stats.table_bytes += bytes.len() as u64;
        self.with_room(Operation::Table, || file.write_at(bytes, at)).await
    }

    /// Writes, again and again while the card is full: see [`super`] for why that is safe.
    async fn with_room(
        &self,
        operation: Operation,
        write: impl Fn() -> io::Result<()> + Send + Sync,
    ) -> Result<(), Failure> {
        let mut patience = self.shared.options.starved_max;
        loop {
            let failure = match write() {
                Ok(()) => break,
                Err(error) => Failure::io(operation, error),
            };
            let (closing, waiting) = {
                let state = self.shared.lock();
                (state.closing || state.retired || state.stopped.is_some(), state.waiting)
            };
            if !failure.is_full() || closing || (waiting && patience == 0) {
                return Err(failure);
            }
            self.shared.starve(Some(&failure));
            // Whoever can make room gets a turn, even where sleeping takes no time.
            tokio::task::yield_now().await;
            tokio::select! {
                () = self.env.clock.sleep(self.shared.options.starved_retry) => {
                    patience = patience.saturating_sub(u32::from(waiting));
                }
                () = self.shared.room.notified() => {}
            }
        }
        self.shared.starve(None);
        Ok(())
    }

    async fn write_blocks(&self, writes: &Writes) -> Result<(), Failure> {
        self.with_room(Operation::SetLen, || self.resize(writes)).await?;
        let options = self.shared.options;
        let mut burst = 0;
        for (offset, bytes) in chunks(&writes.blocks, options.chunk_bytes) {
            if options.burst_bytes <= burst {
                burst = 0;
                self.sync_database().await?;
                self.env.clock.sleep(options.pause).await;
            }
            burst += bytes.len();
            self.shared.lock().stats.data_bytes += bytes.len() as u64;
            self.with_room(Operation::Write, || self.shared.file.write_at(&bytes, offset)).await?;
        }
        self.sync_database().await
    }

    fn resize(&self, writes: &Writes) -> io::Result<()> {
        let file = &self.shared.file;
        let (floor, len) = (offset_of(writes.floor), offset_of(writes.len));
        let mut now = file.len()?;
        if floor < now {
            file.set_len(floor)?;
            now = floor;
        }
        if now < len { file.set_len(len) } else { Ok(()) }
    }

    async fn sync_database(&self) -> Result<(), Failure> {
        self.sync(&*self.shared.file, Operation::Sync).await
    }

    async fn sync(&self, file: &dyn DiskFile, operation: Operation) -> Result<(), Failure> {
        self.shared.lock().stats.barriers += 1;
        file.sync().await.map_err(|error| Failure::io(operation, error))
    }
}

fn record_of(writes: &Writes) -> Record {
    let header = writes.blocks.get(&0).map(|block| {
        let mut copy = [0; HEADER_BYTES];
        copy.copy_from_slice(&block[..HEADER_BYTES]);
        copy
    });
    let changes =
        writes.blocks.iter().map(|(block, bytes)| (*block, crc32c::crc32c(bytes))).collect();
    Record { epoch: writes.epoch, floor: writes.floor, len: writes.len, header, changes }
}

/// Neighbouring blocks together, at most `bytes_max` at a time: (offset, bytes).
fn chunks(
    blocks: &std::collections::BTreeMap<u32, Block>,
    bytes_max: usize,
) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let mut blocks = blocks.iter().peekable();
    std::iter::from_fn(move || {
        let (first, bytes) = blocks.next()?;
        let mut chunk = bytes.to_vec();
        let mut next = first.checked_add(1);
        while chunk.len() + BLOCK_BYTES <= bytes_max {
            let Some((block, bytes)) = blocks.next_if(|(block, _)| Some(**block) == next) else {
                break;
            };
            chunk.extend_from_slice(bytes);
            next = block.checked_add(1);
        }
        Some((offset_of(*first), chunk))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_written_together_up_to_the_chunk_size() {
        let blocks = [1, 2, 3, 7, 8].map(|block| (block, vec![0; BLOCK_BYTES].into())).into();

        let found: Vec<_> = chunks(&blocks, 2 * BLOCK_BYTES)
            .map(|(offset, bytes)| (offset / 4096, bytes.len() / 4096))
            .collect();

        assert_eq!(found, [(1, 2), (3, 1), (7, 2)]);
    }
}

//! Gives redb a file whose barriers never wait for the card, and whose every block is checked when it is read.
//!
//! redb has one writer, and an SD card may keep a barrier waiting for seconds. On a plain file a checkpoint
//! would stop applying, and with it every client, for as long as the card likes. And redb checks its own page
//! checksums only when it repairs: on a plain file one flipped bit of a resting card is served as data.
//!
//! # Shape
//!
//! - [`overlay`] (pure): where the newest bytes of each block are. Writes are held in memory, grouped into
//!   *epochs*; redb's barrier seals the open epoch and returns at once.
//! - [`Drain`]: one worker, the only code that writes. Takes sealed epochs in order.
//! - [`table`] (pure): the bytes of the checksum table, two files beside the database.
//! - `open`: what a crash left, and which parts of it may be believed.
//! - [`Backend`]: what redb sees.
//!
//! # The order of writes, and why it is enough
//!
//! For each epoch the drain does, each step durable before the next begins:
//!
//! 1. a *record* into the table file: which blocks this epoch changes, and their new checksums;
//! 2. the blocks themselves, and the length, into the database file.
//!
//! So whenever the power fails the database file holds: all of the epochs before the last record, any part of
//! the last record's epoch, nothing of later ones. That is exactly what a plain file could hold whose barriers
//! were taken where redb asked for them, hence redb's own recovery is right for it, whatever commit mode is
//! used. (Closing an epoch early, when it grows large, only adds a barrier, which no reader of the file can
//! tell from luck.) Blocks outside the last record's set cannot have been touched by the crash: their
//! checksum must match, or the card has damaged them. Blocks *in* the set may hold old bytes, new bytes or a
//! torn mixture; all are legal, so they are taken as found, and their actual checksums become the table's.
//! None of them belongs to a state that redb trusts unseen: a two-phase commit (which is what a checkpoint
//! and a close are) makes its pages reachable by a header written in a later epoch, and after a one-phase
//! commit redb verifies the whole tree before it believes it.
//!
//! The table is therefore right independently of which pages redb rewrites. redb 4.4 rewrites exactly one in
//! place, the header at offset 0 (320 bytes, and one of its fields, the byte that says which commit is
//! current, has no checksum of its own). The record carries a copy of it: a header block that is neither the
//! old nor the new one, be it torn by a power cut or rotten, is put back from the copy.
//!
//! # Invariants
//!
//! - A block read from the card has the checksum the table says, or the read fails with [`DamagedBlock`].
//! - Nothing is written to the database file before the record that names it is durable.
//! - A failed barrier is final, and so is a failed write, unless it failed for lack of room: the drain stops,
//!   every later call fails with the same [`Failure`].
//! - After `open` no path is used again, only handles: a file that takes this one's name is not written to.
//! - The database file is an ordinary redb file at all times; 20 spare bytes behind the header
//!   (`table::Tag`) tie it to its table.
//! - No call waits for the card, with two exceptions, and those only when the drain has a thread of its own:
//!   a write beyond [`Options::held_bytes_max`], and `close`. In a simulation, where the drain is a task of
//!   the same thread, waiting would hang it: there the memory bound is not enforced, and whoever dropped the
//!   database awaits [`Backend::drained`].
//!
//! # A full card
//!
//! A write that was refused for lack of room has lost nothing: its bytes are still held here, and the record
//! that names its block is durable already. So the drain says that it is *starved* ([`Reports::starved`]) and tries
//! again, every second and when it is told that room was made ([`Backend::room_made`]). Until then reads and
//! writes go on, but nothing becomes durable: [`Backend::wait_durable`] says so at once. Only when the memory
//! for held writes is used up as well, and nobody makes room for [`Options::starved_max`] attempts, is it a failure.
//! (A *barrier* that fails with "no space" is a failure like any other: the kernel has then dropped data.)
//!
//! # Losing the table
//!
//! A table that is missing, damaged or of another file is no reason to lose the state: `open` verifies the
//! database with redb's own integrity check on a scratch view that is never written, and makes a new table
//! from what is then known to be sound. A *block* that does not match is refused: which of the two is wrong
//! cannot be told from here, and the state can be rebuilt from the log, a snapshot or the peers.
//!
//! # Cost
//!
//! A record takes one 4 KiB block per 500 changed blocks; a checkpoint has two epochs, so it writes 8 KiB and
//! two barriers more than a plain file. Once per 64 such blocks the whole table is written anew to the other
//! of the two files (100 KiB for a database of 100 MB). Memory: 4 bytes per block, and the held writes.
//!
//! # Not here
//!
//! When to make a checkpoint, what a failure means for the node (`mvcc`, `raft`), locking the directory.

mod drain;
mod failure;
mod open;
pub mod overlay;
pub mod table;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Notify, watch};

use crate::announce;
use crate::env::{DiskFile, Env};
use crate::events::EventId;
use crate::limits;

pub use drain::Drain;
pub use failure::{DamagedBlock, Failure, Fault, Operation, Reports, is_full};
pub use open::OpenError;

use overlay::{BLOCK_BYTES, Overlay, Source};
use table::Tag;

/// Everything written between two of redb's barriers. Numbered from 1, across restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

impl Epoch {
    /// Wraps the raw number.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// How much is held back, and how fast it is given to the card.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of writes held in memory. Beyond it a write waits for the drain.
    pub held_bytes_max: usize,
    /// An open epoch this large is closed without waiting for redb's barrier.
    pub epoch_bytes_max: usize,
    /// Largest single write.
    pub chunk_bytes: usize,
    /// A barrier is taken at least this often, so that a barrier of the log never waits behind more.
    pub burst_bytes: usize,
    /// Pause after each such barrier: the log's turn.
    pub pause: Duration,
    /// Between two attempts to write to a full card.
    pub starved_retry: Duration,
    /// How many such attempts a write beyond `held_bytes_max` waits for.
    pub starved_max: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            held_bytes_max: limits::STATE_HELD_BYTES_MAX,
            epoch_bytes_max: 4 << 20,
            chunk_bytes: 128 << 10,
            burst_bytes: 512 << 10,
            pause: Duration::from_millis(20),
            starved_retry: Duration::from_secs(1),
            starved_max: 15,
        }
    }
}

/// Where the table in use came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableOrigin {
    /// The database is new, or its creation was cut off and begins again.
    New,
    /// Read from its files.
    Loaded,
    /// Made from a database that passed redb's integrity check.
    Rebuilt(open::RebuildReason),
}

pub use open::RebuildReason;

/// What `open` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenReport {
    /// Where the table came from.
    pub table: TableOrigin,
    /// Blocks of a cut-off epoch that held neither their old nor their new bytes.
    pub torn_blocks: u32,
    /// Whether the header block was put back from its copy.
    pub header_restored: bool,
}

/// What a piece of a scrub found.
#[derive(Clone, Debug, Default)]
pub struct Scrubbed {
    /// Blocks looked at.
    pub checked: u32,
    /// Those that cannot be read, or hold something else than was written.
    pub damaged: Vec<Failure>,
    /// The block to go on with; `None` at the end of the file.
    pub next: Option<u32>,
}

/// Counters since the start, and what is held now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes of writes held in memory.
    pub held_bytes: usize,
    /// Most bytes ever held.
    pub held_bytes_peak: usize,
    /// Bytes written to the database file.
    pub data_bytes: u64,
    /// Bytes written to the table files.
    pub table_bytes: u64,
    /// Barriers, on either.
    pub barriers: u64,
    /// Epochs that redb closed, and that were closed for their size.
    pub epochs: u64,
    /// Of these, closed for their size.
    pub spills: u64,
    /// Writes that had to wait for the drain.
    pub waits: u64,
    /// Blocks read from the file and checked.
    pub blocks_read: u64,
}

/// How far the drain is.
#[derive(Clone, Debug, Default)]
struct Progress {
    durable: Epoch,
    /// Closed, and everything durable.
    finished: bool,
    /// The card is full; the drain is waiting for room.
    starved: Option<Failure>,
    stopped: Option<Failure>,
}

struct State {
    overlay: Overlay,
    stats: Stats,
    closing: bool,
    /// The drain has a thread of its own, so that waiting for it is allowed.
    threaded: bool,
    /// A write waits for the drain to make room.
    waiting: bool,
    /// Another file has taken this one's place: nothing is written any more.
    retired: bool,
    stopped: Option<Failure>,
}

struct Shared {
    options: Options,
    id: u64,
    report: OpenReport,
    file: Arc<dyn DiskFile>,
    state: Mutex<State>,
    /// Signalled when the drain has made room, finished or stopped.
    drained: Condvar,
    /// Signalled when there may be work for the drain.
    work: Notify,
    /// Signalled when a full card may have room again.
    room: Notify,
    progress: watch::Sender<Progress>,
    reports: Reports,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside the lock is a bug in pure bookkeeping; the drain's own `Drop` stops the backend.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the owner, unless the file is none of its business any more.
    fn report(&self, failure: &Failure) {
        if !self.lock().retired {
            self.reports.fail(failure);
        }
    }

    /// Ends everything: every later call gets `failure`.
    fn stop(&self, failure: &Failure) {
        self.lock().stopped.get_or_insert_with(|| failure.clone());
        self.report(failure);
        self.progress.send_modify(|progress| {
            progress.stopped.get_or_insert_with(|| failure.clone());
        });
        self.drained.notify_all();
        self.work.notify_one();
    }

    /// The card is full, or is not any more.
    fn starve(&self, failure: Option<&Failure>) {
        self.progress.send_if_modified(|progress| {
            let news = progress.starved.is_some() != failure.is_some();
            progress.starved = failure.cloned();
            news
        });
        self.reports.starve(failure.is_some());
    }
}

/// Does what may take as long as the card likes, without holding up the other tasks of this thread.
pub(super) fn blocking<T>(work: impl FnOnce() -> T) -> T {
    let flavor = Handle::try_current().map(|runtime| runtime.runtime_flavor());
    if matches!(flavor, Ok(RuntimeFlavor::MultiThread)) {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}

/// redb's view of the state file. See the module documentation.
#[derive(Clone)]
pub struct Backend {
    shared: Arc<Shared>,
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl Backend {
    /// Opens the file, making it if it is not there, and finds out what a crash left of it.
    ///
    /// Nothing is written before the [`Drain`] runs. Give it a thread ([`Drain::spawn_thread`]) or, in a
    /// simulation, a task ([`Drain::run`]).
    pub fn open(env: &Env, path: &Path, options: Options) -> Result<(Self, Drain), OpenError> {
        Self::open_reporting(env, path, options, Reports::default())
    }

    /// The same, for an owner who has several files one after the other and one place to be told.
    pub fn open_reporting(
        env: &Env,
        path: &Path,
        options: Options,
        reports: Reports,
    ) -> Result<(Self, Drain), OpenError> {
        open::open(env, path, options, reports)
    }

    /// What `open` found.
    pub fn report(&self) -> OpenReport {
        self.shared.report
    }

    /// The newest closed epoch. Called after a durable commit of redb returned, it names that commit.
    pub fn epoch(&self) -> Epoch {
        self.shared.lock().overlay.last_sealed()
    }

    /// Completes when everything up to and including `epoch` survives a power cut, or never will.
    pub fn wait_durable(
        &self,
        epoch: Epoch,
    ) -> impl Future<Output = Result<(), Failure>> + Send + 'static {
        self.wait_for(move |progress| epoch <= progress.durable)
    }

    /// Completes when redb has closed the file and everything it wrote is durable.
    ///
    /// redb hides what goes wrong in its last commit, which it makes when the database is dropped. So this is
    /// also an error if anything, be it a read, failed before.
    pub fn drained(&self) -> impl Future<Output = Result<(), Failure>> + Send + 'static {
        let done = self.wait_for(|progress| progress.finished);
        let failure = self.failure();
        async move {
            done.await?;
            let first = failure.borrow().clone();
            first.map_or(Ok(()), Err)
        }
    }

    /// Another file has taken this one's place, and is durable: nothing held is written any more, and what
    /// waits for it to become durable may go on. Reads keep working.
    pub fn retire(&self) {
        {
            let mut state = self.shared.lock();
            state.retired = true;
            // Nobody may wait for a drain that is gone.
            state.threaded = false;
        }
        self.shared.starve(None);
        self.shared.progress.send_modify(|progress| progress.durable = Epoch::new(u64::MAX));
        self.shared.drained.notify_all();
        self.shared.work.notify_one();
        self.shared.room.notify_one();
    }

    /// Ends everything: every later call gets `failure`.
    pub fn fail(&self, failure: &Failure) {
        self.shared.stop(failure);
    }

    /// Tells the owner of something that whoever reads the file has found out.
    pub fn report_failure(&self, failure: &Failure) {
        self.shared.report(failure);
    }

    /// A full card may have room again: tries at once.
    pub fn room_made(&self) {
        self.shared.room.notify_one();
    }

    fn wait_for(
        &self,
        done: impl Fn(&Progress) -> bool + Send + Sync + 'static,
    ) -> impl Future<Output = Result<(), Failure>> + Send + 'static {
        let mut progress = self.shared.progress.subscribe();
        async move {
            let hopeless = |now: &Progress| now.stopped.clone().or_else(|| now.starved.clone());
            match progress.wait_for(|now| done(now) || hopeless(now).is_some()).await {
                Ok(now) if done(&now) => Ok(()),
                Ok(now) => Err(hopeless(&now).unwrap_or(Failure::Abandoned)),
                Err(_) => Err(Failure::Abandoned),
            }
        }
    }

    /// The first failure, be it of a read, a write or a barrier.
    pub fn failure(&self) -> watch::Receiver<Option<Failure>> {
        self.shared.reports.failure()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        let state = self.shared.lock();
        Stats { held_bytes: state.overlay.held_bytes(), ..state.stats }
    }

    /// Reads and checks up to `count` blocks from block `from` on, on the card itself: the weekly patrol against rot in
    /// blocks nobody reads. What it finds is told to the caller only; whoever needs the block will meet it.
    pub fn scrub(&self, from: u32, count: u32) -> io::Result<Scrubbed> {
        let mut scrubbed = Scrubbed::default();
        let end = self.shared.lock().overlay.len().min(from.saturating_add(count));
        let mut next = from;
        let mut blocks = vec![0; BLOCK_BYTES * end.saturating_sub(from) as usize];
        while next < end {
            let out = &mut blocks[..BLOCK_BYTES * (end - next) as usize];
            match self.read_from(From::Card, next, out) {
                Ok(Ok(())) => next = end,
                Ok(Err(miss)) => {
                    next = miss.block + 1;
                    scrubbed.damaged.push(miss.failure());
                }
                // The file was cut meanwhile.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error),
            }
        }
        scrubbed.checked = end.saturating_sub(from);
        let more = end < self.shared.lock().overlay.len() && from < end;
        scrubbed.next = more.then_some(end);
        Ok(scrubbed)
    }

    fn read_checked(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let block_bytes = BLOCK_BYTES as u64;
        if offset.is_multiple_of(block_bytes) && out.len().is_multiple_of(BLOCK_BYTES) {
            return self.read_blocks(overlay::block_at(offset)?, out);
        }
        // redb reads anything but whole pages only from the header.
        let first = overlay::block_at(offset)?;
        let skip = overlay::index(offset % block_bytes);
        let mut blocks = vec![0; (skip + out.len()).next_multiple_of(BLOCK_BYTES)];
        self.read_blocks(first, &mut blocks)?;
        out.copy_from_slice(&blocks[skip..skip + out.len()]);
        Ok(())
    }

    fn read_blocks(&self, first: u32, out: &mut [u8]) -> io::Result<()> {
        let read = self.read_from(From::Cache, first, out)?;
        read.map_err(|miss| {
            let failure = miss.failure();
            self.shared.report(&failure);
            failure.to_io()
        })
    }

    /// The inner result is of what is on the card.
    fn read_from(&self, from: From, first: u32, out: &mut [u8]) -> io::Result<Result<(), Miss>> {
        loop {
            let plan = self.plan_read(first, out.len() / BLOCK_BYTES)?;
            let Err(miss) = fill(&*self.shared.file, from, first, &plan, out) else {
                return Ok(Ok(()));
            };
            // The block may have been written, drained and forgotten while we read: then the plan was stale,
            // not the block damaged.
            let source = self.shared.lock().overlay.source(miss.block);
            if source != Source::File(miss.expected) {
                continue;
            }
            return Ok(Err(miss));
        }
    }

    fn plan_read(&self, first: u32, count: usize) -> io::Result<Vec<Source>> {
        let mut state = self.shared.lock();
        if let Some(failure) = &state.stopped {
            return Err(failure.to_io());
        }
        let end = u32::try_from(count).ok().and_then(|count| first.checked_add(count));
        let Some(end) = end.filter(|end| *end <= state.overlay.len()) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let plan: Vec<Source> = (first..end).map(|block| state.overlay.source(block)).collect();
        let from_file = plan.iter().filter(|source| matches!(source, Source::File(_))).count();
        state.stats.blocks_read += from_file as u64;
        Ok(plan)
    }

    fn write_held(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let block_bytes = BLOCK_BYTES as u64;
        if offset.is_multiple_of(block_bytes) && data.len().is_multiple_of(BLOCK_BYTES) {
            return self.hold(overlay::block_at(offset)?, data);
        }
        // Only the header: redb serialises its writes, so nothing changes between the read and the write.
        let first = overlay::block_at(offset)?;
        let skip = overlay::index(offset % block_bytes);
        let mut blocks = vec![0; (skip + data.len()).next_multiple_of(BLOCK_BYTES)];
        let held = overlay::index(self.len_bytes().saturating_sub(overlay::offset_of(first)));
        let known = blocks.len().min(held);
        self.read_blocks(first, &mut blocks[..known])?;
        blocks[skip..skip + data.len()].copy_from_slice(data);
        self.hold(first, &blocks)
    }

    fn hold(&self, first: u32, data: &[u8]) -> io::Result<()> {
        let mut state = self.wait_for_room(data.len())?;
        for (block, bytes) in (first..).zip(data.chunks_exact(BLOCK_BYTES)) {
            if block == 0 {
                let mut header = bytes.to_vec();
                Tag { id: self.shared.id, epoch: state.overlay.open_epoch() }.stamp(&mut header);
                state.overlay.write(block, header.into());
            } else {
                state.overlay.write(block, bytes.into());
            }
        }
        let held = state.overlay.held_bytes();
        state.stats.held_bytes_peak = state.stats.held_bytes_peak.max(held);
        if self.shared.options.epoch_bytes_max <= state.overlay.open_bytes() {
            state.stats.spills += 1;
            self.seal(&mut state);
        }
        Ok(())
    }

    /// Waits, where waiting is allowed, until `bytes` more may be held.
    fn wait_for_room(&self, bytes: usize) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.shared.lock();
        let mut waited = false;
        loop {
            if let Some(failure) = &state.stopped {
                return Err(failure.to_io());
            }
            let held = state.overlay.held_bytes();
            // A single write larger than the bound is let through once nothing else is held.
            let fits = held == 0 || held + bytes <= self.shared.options.held_bytes_max;
            if fits || !state.threaded {
                return Ok(state);
            }
            if !waited {
                waited = true;
                state.stats.waits += 1;
                self.seal(&mut state);
            }
            state.waiting = true;
            state = self.wait(state);
            state.waiting = false;
        }
    }

    /// Waits for news of the drain.
    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        blocking(|| self.shared.drained.wait(state)).unwrap_or_else(PoisonError::into_inner)
    }

    fn seal(&self, state: &mut State) {
        if state.overlay.seal() {
            state.stats.epochs += 1;
            self.shared.work.notify_one();
        }
    }

    fn len_bytes(&self) -> u64 {
        overlay::offset_of(self.shared.lock().overlay.len())
    }
}

impl redb::StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len_bytes())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_checked(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !len.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let blocks = overlay::block_at(len)?;
        let mut state = self.shared.lock();
        if let Some(failure) = &state.stopped {
            return Err(failure.to_io());
        }
        state.overlay.set_len(blocks);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        if let Some(failure) = &state.stopped {
            return Err(failure.to_io());
        }
        self.seal(&mut state);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_held(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        self.seal(&mut state);
        state.closing = true;
        self.shared.work.notify_one();
        self.shared.room.notify_one();
        while state.threaded && state.stopped.is_none() && !state.overlay.is_drained() {
            state = self.wait(state);
        }
        match &state.stopped {
            Some(failure) => Err(failure.to_io()),
            None => Ok(()),
        }
    }
}

/// A block that could not be read as planned.
struct Miss {
    block: u32,
    expected: u32,
    cause: Cause,
}

enum Cause {
    Io(io::Error),
    Checksum(u32),
}

impl Miss {
    fn failure(self) -> Failure {
        match self.cause {
            Cause::Io(error) => Failure::io(Operation::Read, error),
            Cause::Checksum(found) => Failure::Damaged(DamagedBlock {
                block: self.block,
                offset: overlay::offset_of(self.block),
                found,
                expected: self.expected,
            }),
        }
    }
}

/// Where blocks that are not held are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// The page cache, where it has them; what is wrong there, once more from the card.
    Cache,
    /// The card, because it is what is asked about.
    Card,
}

impl From {
    fn read(self, file: &dyn DiskFile, block: u32, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Cache => file.read_at(bytes, overlay::offset_of(block)),
            Self::Card => file.read_uncached_at(bytes, overlay::offset_of(block)),
        }
    }

    /// The second attempt, if there is one.
    fn read_again(self, file: &dyn DiskFile, block: u32, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Cache => Self::Card.read(file, block, bytes),
            Self::Card => Err(io::ErrorKind::Other.into()),
        }
    }
}

/// Fills `out` as planned, one read per run of blocks that come from the file.
fn fill(
    file: &dyn DiskFile,
    from: From,
    first: u32,
    plan: &[Source],
    out: &mut [u8],
) -> Result<(), Miss> {
    let mut at = 0;
    let number = |index: usize| first + u32::try_from(index).unwrap_or(u32::MAX);
    while at < plan.len() {
        let expected = match &plan[at] {
            Source::Held(bytes) => {
                out[at * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(bytes);
                at += 1;
                continue;
            }
            Source::Zero => {
                out[at * BLOCK_BYTES..][..BLOCK_BYTES].fill(0);
                at += 1;
                continue;
            }
            Source::File(crc) => *crc,
        };
        let run = plan[at..].iter().take_while(|source| matches!(source, Source::File(_))).count();
        let bytes = &mut out[at * BLOCK_BYTES..(at + run) * BLOCK_BYTES];
        let block = number(at);
        if from.read(file, block, bytes).is_err() {
            // One by one, to name the one that is at fault.
            for (index, bytes) in (at..).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
                let block = number(index);
                let read = from.read(file, block, bytes);
                let read = read.or_else(|first| from.read_again(file, block, bytes).or(Err(first)));
                read.map_err(|error| Miss { block, expected, cause: Cause::Io(error) })?;
            }
        }
        for (index, bytes) in (at..).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
            let Source::File(expected) = plan[index] else { continue };
            let found = crc32c::crc32c(bytes);
            if found == expected {
                continue;
            }
            let block = number(index);
            let again = from.read_again(file, block, bytes);
            if again.is_err() || crc32c::crc32c(bytes) != expected {
                return Err(Miss { block, expected, cause: Cause::Checksum(found) });
            }
            announce!(
                EventId::ReadHealed,
                "block {block} of the state file was read wrong, and right when read again from the card"
            );
        }
        at += run;
    }
    Ok(())
}

/// The two table files of a database file.
fn table_paths(path: &Path) -> [PathBuf; 2] {
    ["crc.0", "crc.1"].map(|suffix| {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(suffix);
        PathBuf::from(name)
    })
}

/// Puts a closed database, with its table, in the place of another one.
///
/// A crash in between leaves one of the two databases, whole, at `to`; where its table was not moved along,
/// the next open makes a new one.
pub fn install(env: &Env, from: &Path, to: &Path) -> io::Result<()> {
    env.disk.rename(from, to)?;
    for (from, to) in table_paths(from).iter().zip(&table_paths(to)) {
        if env.disk.exists(from)? {
            env.disk.rename(from, to)?;
        } else if env.disk.exists(to)? {
            env.disk.remove(to)?;
        }
    }
    env.disk.sync_dir(parent(to))
}

/// The files that make up a database: its own and its table's.
pub fn files(path: &Path) -> Vec<PathBuf> {
    table_paths(path).into_iter().chain([path.to_path_buf()]).collect()
}

/// Removes a database and its table.
pub fn remove(env: &Env, path: &Path) -> io::Result<()> {
    let mut removed = false;
    for path in table_paths(path).iter().map(PathBuf::as_path).chain([path]) {
        if env.disk.exists(path)? {
            env.disk.remove(path)?;
            removed = true;
        }
    }
    // A start that finds nothing to remove need not wait for the card.
    if removed { env.disk.sync_dir(parent(path)) } else { Ok(()) }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

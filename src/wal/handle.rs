//! The log as everybody else sees it, and the state it shares with the writer and the filler.
//!
//! # Shape
//!
//! One mutex around [`State`], held for moments: appending copies bytes into the frame being gathered, the writer
//! takes whole frames out. No I/O and no callback happens under it.
//!
//! # Invariants
//!
//! - A record is encoded, counted and visible to readers in one step, so every order is the same order.
//! - Callbacks run in the order of their records, success or failure.
//! - Once failed, always failed.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use tokio::sync::{Notify, oneshot};

use super::batch::{Batcher, Durable, Policy, Step, Urgency};
use super::format::{self, FRAME_HEADER_BYTES, RAW_BYTES_MAX, RecordRef};
use super::frame::FrameBuffer;
use super::log::{Effect, FrameAt, Runs, View};
use super::prepare::{self, Filler, Job};
use super::recovery::{self, Opened};
use super::segment::{Segment, Slot};
use super::stats::{Counters, Stats, add};
use super::writer::{Appender, Core};
use super::{Failed, HardState, Identity, OpenError, Options, Record, Recovery, Refused, Writer};
use crate::env::Env;
use crate::limits::WAL_RECORD_BYTES_MAX;
use crate::types::{LogIndex, SegmentNo, WriteSeq};

/// Called once, when the records it was appended with are durable, or will never be.
type Done = Box<dyn FnOnce(Result<Durable, Failed>) + Send>;

/// A handle to the log. Clones share it; when the last is dropped, the log closes.
#[derive(Clone)]
pub struct Wal {
    pub(super) shared: Arc<Shared>,
    _close: Arc<CloseOnDrop>,
}

impl fmt::Debug for Wal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wal").field("dir", &self.shared.dir).finish_non_exhaustive()
    }
}

struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.start_closing(None);
    }
}

impl Wal {
    /// Opens the log in a directory, or makes one. Everything recovered is durable when this returns. Nothing
    /// appended is written until the [`Writer`] runs.
    pub async fn open(
        env: &Env,
        dir: &Path,
        identity: Identity,
        options: Options,
    ) -> Result<(Self, Recovery, Writer), OpenError> {
        let Opened { found, appender } = recovery::open(env, dir, identity, &options).await?;
        let recovery = found.recovery.clone();
        let policy = Policy { linger: options.linger, bytes_max: options.batch_bytes_max };
        let mut state = State {
            durable: found.state,
            view: View::new(found.state),
            runs: found.runs,
            segments: found.segments,
            spares: found.spares.into_iter().map(Arc::new).collect(),
            blanks: found.blanks,
            removing: None,
            taken: None,
            batcher: Batcher::new(policy),
            last_write: WriteSeq::new(0),
            queue: VecDeque::new(),
            idle_buffers: Vec::new(),
            in_flight_done: Vec::new(),
            room: appender.room(),
            filler: FillerState::Ready,
            filling: false,
            closing: false,
            closers: Vec::new(),
            failed: None,
        };
        state.retire(appender.oldest_live());
        let shared = Arc::new(Shared {
            env: env.clone(),
            dir: dir.to_owned(),
            options,
            state: Mutex::new(state),
            wake_writer: Notify::new(),
            wake_filler: Notify::new(),
            spare_ready: Notify::new(),
            counters: Counters::default(),
            starved: AtomicBool::new(false),
        });
        let core = Core { shared: Arc::clone(&shared), appender, scratch: Vec::new() };
        let filler = Filler { shared: Arc::clone(&shared), identity };
        let wal = Self { _close: Arc::new(CloseOnDrop(Arc::clone(&shared))), shared };
        Ok((wal, recovery, Writer { core, filler }))
    }

    /// Takes records, in order. They are visible to [`Wal::entries`] and [`Wal::hard_state`] when this returns;
    /// `done` is called once, when all of them are durable or the log failed. If they are refused, nothing was
    /// changed and `done` is dropped.
    ///
    /// Votes are always urgent; without entries or votes, nothing is: a truncation or a purge waits for company.
    /// Records of one call that fit one frame survive a crash together or not at all.
    pub fn append(
        &self,
        records: Vec<Record>,
        urgency: Urgency,
        done: impl FnOnce(Result<Durable, Failed>) + Send + 'static,
    ) -> Result<(), Refused> {
        let now = self.shared.env.clock.now();
        let largest = records.iter().map(format::record_bytes).max().unwrap_or(0);
        let expected = self.shared.record_bytes_max();
        if expected < largest {
            return Err(Refused::TooLarge { found: largest, expected });
        }
        let mut state = self.shared.lock();
        if let Some(failed) = state.refusal() {
            drop(state);
            done(Err(failed));
            return Ok(());
        }
        state.view.check(&records)?;
        let before = state.batcher.step(now);
        let (count, bytes) = self.shared.accept(&mut state, now, records, urgency);
        let nothing_to_wait_for = state.when_durable(Box::new(done));
        let after = state.batcher.step(now);
        let evicted = state.batcher.durable().upto();
        state.view.evict(evicted, self.shared.options.cache_bytes);
        drop(state);
        add(&self.shared.counters.records, count);
        add(&self.shared.counters.record_bytes, bytes);
        if urgency == Urgency::Lease && matches!(after, Step::WaitUntil(_)) {
            add(&self.shared.counters.lingered, count);
        }
        if before != after && matches!(after, Step::Write | Step::WaitUntil(_)) {
            self.shared.wake_writer.notify_one();
        }
        if let Some((done, durable)) = nothing_to_wait_for {
            done(Ok(durable));
        }
        Ok(())
    }

    /// Makes everything appended before the call durable.
    pub fn flush(&self) -> impl Future<Output = Result<Durable, Failed>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.shared.lock();
        let answer = state.refusal().map(Err).or_else(|| state.idle().map(Ok));
        if answer.is_none() {
            state.batcher.flush(self.shared.env.clock.now());
            // The receiver may be gone; then nobody asks any more.
            let done = state.when_durable(Box::new(move |result| {
                sender.send(result).ok();
            }));
            assert!(done.is_none(), "nothing to wait for, though something is not durable");
        }
        drop(state);
        self.shared.wake_writer.notify_one();
        async move {
            match answer {
                Some(answer) => answer,
                None => receiver.await.unwrap_or(Err(Failed::Closed)),
            }
        }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// What Raft must remember, as accepted.
    pub fn hard_state(&self) -> HardState {
        self.shared.lock().view.state()
    }

    /// The same as of the last barrier that returned: what a power cut now would leave.
    pub fn durable(&self) -> HardState {
        self.shared.lock().durable
    }

    /// First index that stands in the newest `count` segments: what lies before may be purged without cutting off
    /// followers that lag by less. `None` while there are not more segments than that.
    pub fn first_index_in_newest(&self, count: usize) -> Option<LogIndex> {
        let state = self.shared.lock();
        let oldest = state.segments.len().checked_sub(count).filter(|excess| 0 < *excess)?;
        let segment = *state.segments.keys().nth(oldest)?;
        state.runs.first_since(segment)
    }

    /// Writes what is pending and one closing frame, and stops the writer. Nothing is taken after the call.
    pub async fn close(&self) -> Result<(), Failed> {
        let (sender, receiver) = oneshot::channel();
        self.shared.start_closing(Some(sender));
        receiver.await.unwrap_or(Err(Failed::Closed))
    }

    /// Why the log stopped, if it has.
    pub fn failed(&self) -> Option<Failed> {
        self.shared.lock().failed.clone()
    }

    /// Whether the last attempt to fill a slot ahead of need failed for lack of room on the card.
    pub fn is_starved(&self) -> bool {
        self.shared.starved.load(Ordering::Relaxed)
    }

    /// Bytes of frames and segment headers written since the log was opened: [`Stats::bytes_written`] alone.
    pub fn bytes_written(&self) -> u64 {
        self.shared.counters.bytes_written.load(Ordering::Relaxed)
    }

    /// How long the running barrier has kept everybody waiting: [`Stats::stalled_for`] alone.
    pub fn stalled_for(&self) -> Option<Duration> {
        let now = self.shared.env.clock.now();
        self.shared.lock().batcher.stalled_since().map(|since| now.duration_since(since))
    }

    /// Bytes that wait in memory for the running barrier.
    pub fn waiting_bytes(&self) -> u64 {
        self.shared.lock().batcher.waiting_bytes()
    }

    /// What the log has done to the card so far.
    pub fn stats(&self) -> Stats {
        let now = self.shared.env.clock.now();
        let state = self.shared.lock();
        let stalled_for = state.batcher.stalled_since().map(|since| now.duration_since(since));
        let (live_segments, spare_slots) = (state.segments.len(), state.spares.len());
        drop(state);
        Stats { stalled_for, live_segments, spare_slots, ..self.shared.counters.snapshot() }
    }
}

/// What the handles, the writer and the filler share.
pub(super) struct Shared {
    pub(super) env: Env,
    pub(super) dir: PathBuf,
    pub(super) options: Options,
    pub(super) wake_filler: Notify,
    pub(super) counters: Counters,
    /// The card has no room for another slot.
    starved: AtomicBool,
    state: Mutex<State>,
    wake_writer: Notify,
    spare_ready: Notify,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("dir", &self.dir).finish_non_exhaustive()
    }
}

pub(super) struct State {
    /// What a power cut now would leave.
    durable: HardState,
    pub(super) view: View,
    pub(super) runs: Runs,
    pub(super) segments: BTreeMap<SegmentNo, Segment>,
    spares: VecDeque<Arc<Slot>>,
    /// Slots that exist and must be filled before use.
    blanks: Vec<usize>,
    /// The slot that is being removed; its number is not free yet.
    removing: Option<usize>,
    /// The slot of a segment whose first barrier is under way: neither spare nor, yet, a segment.
    taken: Option<usize>,
    batcher: Batcher,
    last_write: WriteSeq,
    /// Frames being gathered, oldest first. Only the last grows.
    queue: VecDeque<Batch>,
    idle_buffers: Vec<FrameBuffer>,
    in_flight_done: Vec<Done>,
    /// Blocks left in the active segment, and how many it has.
    room: (u32, u32),
    filler: FillerState,
    /// A slot is being filled: the filler wants to know when a barrier has returned.
    filling: bool,
    closing: bool,
    closers: Vec<oneshot::Sender<Result<(), Failed>>>,
    failed: Option<Failed>,
}

#[derive(Debug)]
enum FillerState {
    Ready,
    /// The writer waits for a slot.
    Awaited,
    /// The writer waits, and this is the answer.
    Failed(Failed),
    Gone,
}

/// One frame's records on their way to the card.
pub(super) struct Batch {
    pub(super) frame: FrameBuffer,
    /// What Raft must remember after it.
    pub(super) state: HardState,
    started: Instant,
    last: WriteSeq,
    effects: Vec<Effect>,
    done: Vec<Done>,
}

/// What the writer does next.
#[expect(
    clippy::large_enum_variant,
    reason = "moved once per barrier, and a box would be allocated per barrier"
)]
pub(super) enum Next {
    Write(Batch),
    /// Nothing is pending and nobody will append.
    Close,
    /// The log failed or is closed.
    Stop,
}

/// Raw payload of one frame. Slots may be smaller than usual in tests.
pub(super) fn frame_raw_max(segment_bytes: u64) -> usize {
    // Header, copy of the header, and the frame's own header must fit beside it.
    let segment = usize::try_from(segment_bytes).unwrap_or(usize::MAX);
    RAW_BYTES_MAX.min(segment.saturating_sub(2 * format::BLOCK)) - FRAME_HEADER_BYTES
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a bug that the assertion's message reports; the log's own state is changed
        // only after the checks, so what is there can still be failed in an orderly way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record_bytes_max(&self) -> usize {
        usize::try_from(WAL_RECORD_BYTES_MAX)
            .unwrap_or(usize::MAX)
            .min(frame_raw_max(self.options.segment_bytes))
    }

    fn accept(
        &self,
        state: &mut State,
        now: Instant,
        records: Vec<Record>,
        urgency: Urgency,
    ) -> (u64, u64) {
        let raw_max = frame_raw_max(self.options.segment_bytes);
        // What fits one frame is never split over two, so it survives a crash as a whole or not at all.
        let mut unsplit: usize = records.iter().map(format::record_bytes).sum();
        if raw_max < unsplit {
            unsplit = 0;
        }
        let (mut count, mut bytes) = (0, 0);
        let mut needed = Urgency::RideAlong;
        for record in records {
            let size = format::record_bytes(&record);
            needed = needed.max(match record {
                Record::Vote(_) => Urgency::Urgent,
                Record::Entry { .. } => urgency,
                Record::Committed(_) | Record::TruncateAfter(_) | Record::Purge(_) => {
                    Urgency::RideAlong
                }
            });
            state.last_write = state.last_write.next();
            let last = state.last_write;
            let room_for = size.max(mem::take(&mut unsplit));
            if state.queue.back().is_none_or(|b| raw_max < b.frame.raw_bytes() + room_for) {
                state.open_batch(now);
            }
            let after = state.view.state_after(&record);
            if let Some(batch) = state.queue.back_mut() {
                batch.frame.push(&record);
                Effect::note(&mut batch.effects, &RecordRef::from(&record));
                batch.last = last;
                batch.state = after;
            }
            state.view.accept(record, last);
            count += 1;
            bytes += size as u64;
        }
        if 0 < count {
            state.batcher.accepted(now, bytes, needed);
        }
        (count, bytes)
    }

    /// Waits until there is something to do.
    pub(super) async fn next(&self) -> Next {
        loop {
            let step = {
                let mut state = self.lock();
                if state.failed.is_some() {
                    return Next::Stop;
                }
                let now = self.env.clock.now();
                match state.batcher.step(now) {
                    Step::Write => return Next::Write(state.start_batch(now)),
                    Step::Idle if state.closing => return Next::Close,
                    step @ (Step::Idle | Step::WaitUntil(_) | Step::InFlight) => (step, now),
                }
            };
            match step {
                (Step::WaitUntil(deadline), now) => {
                    let sleep = self.env.clock.sleep(deadline.saturating_duration_since(now));
                    let woken = Box::pin(self.wake_writer.notified());
                    let (Either::Left(_) | Either::Right(_)) = select(sleep, woken).await;
                }
                _ => self.wake_writer.notified().await,
            }
        }
    }

    /// A frame's barrier returned.
    pub(super) fn finished(&self, batch: Batch, at: FrameAt, bytes: u64, appender: &Appender) {
        let Batch { mut frame, state: hard, started, effects, .. } = batch;
        let elapsed = self.env.clock.now().duration_since(started);
        let counters = &self.counters;
        add(&counters.barriers, 1);
        add(&counters.bytes_written, bytes);
        counters.batch_records.observe(u64::from(frame.records()));
        counters.barrier_micros.observe_micros(elapsed);
        frame.clear();
        let mut state = self.lock();
        let durable = state.batcher.finished();
        state.durable = hard;
        state.runs.apply(&effects, at, &hard);
        let segment = appender.segment();
        if state.segments.insert(segment.number, segment.clone()).is_none() {
            state.taken = None;
            state.retire(appender.oldest_live());
            add(&counters.segments_started, 1);
        }
        state.room = appender.room();
        state.view.evict(durable.upto(), self.options.cache_bytes);
        state.idle_buffers.push(frame);
        state.idle_buffers.truncate(2);
        let done = mem::take(&mut state.in_flight_done);
        let wake_filler =
            state.filling || state.wants_slot(&self.options) || state.has_too_many(&self.options);
        drop(state);
        if wake_filler {
            self.wake_filler.notify_one();
        }
        for done in done {
            done(Ok(durable));
        }
    }

    /// The log stops for good. The first reason stays.
    pub(super) fn fail(&self, failed: Failed) {
        let mut state = self.lock();
        let failed = state.failed.get_or_insert(failed).clone();
        let mut done = mem::take(&mut state.in_flight_done);
        for batch in state.queue.drain(..) {
            done.extend(batch.done);
        }
        let closers = mem::take(&mut state.closers);
        drop(state);
        self.wake_filler.notify_one();
        self.wake_writer.notify_one();
        for done in done {
            done(Err(failed.clone()));
        }
        for closer in closers {
            // Whoever asked may be gone.
            closer.send(Err(failed.clone())).ok();
        }
    }

    /// The closing frame is durable.
    pub(super) fn closed(&self) {
        let mut state = self.lock();
        state.failed = Some(Failed::Closed);
        let closers = mem::take(&mut state.closers);
        drop(state);
        self.wake_filler.notify_one();
        for closer in closers {
            // Whoever asked may be gone.
            closer.send(Ok(())).ok();
        }
    }

    fn start_closing(&self, closer: Option<oneshot::Sender<Result<(), Failed>>>) {
        let mut state = self.lock();
        let answer = match &state.failed {
            None => {
                state.closing = true;
                state.batcher.flush(self.env.clock.now());
                None
            }
            Some(Failed::Closed) => Some(Ok(())),
            Some(failed @ Failed::Io { .. }) => Some(Err(failed.clone())),
        };
        match (answer, closer) {
            (Some(answer), Some(closer)) => {
                closer.send(answer).ok();
            }
            (None, Some(closer)) => state.closers.push(closer),
            (_, None) => {}
        }
        drop(state);
        self.wake_writer.notify_one();
    }

    pub(super) fn oldest_live(&self) -> Option<SegmentNo> {
        self.lock().runs.oldest_segment()
    }

    pub(super) fn has_spare(&self) -> bool {
        !self.lock().spares.is_empty()
    }

    /// A filled slot, for the writer; waits for one to be filled if there is none.
    pub(super) async fn take_spare(&self) -> Result<Arc<Slot>, Failed> {
        loop {
            {
                let mut state = self.lock();
                if let Some(slot) = state.spares.pop_front() {
                    if matches!(state.filler, FillerState::Awaited | FillerState::Failed(_)) {
                        state.filler = FillerState::Ready;
                    }
                    state.taken = Some(slot.number);
                    return Ok(slot);
                }
                match &state.filler {
                    FillerState::Gone => return Err(Failed::Closed),
                    FillerState::Failed(failed) => return Err(failed.clone()),
                    FillerState::Ready | FillerState::Awaited => {
                        state.filler = FillerState::Awaited;
                    }
                }
            }
            self.wake_filler.notify_one();
            self.spare_ready.notified().await;
        }
    }

    pub(super) fn filler_job(&self) -> Job {
        let mut state = self.lock();
        state.removing = None;
        state.filling = false;
        if state.failed.is_some() {
            return Job::Stop;
        }
        if state.wants_slot(&self.options) {
            state.filling = true;
            let number = state.blanks.pop().unwrap_or_else(|| state.free_number());
            return Job::Fill(number);
        }
        // A recycled slot will do instead.
        self.starved.store(false, Ordering::Relaxed);
        if state.has_too_many(&self.options)
            && let Some(slot) = state.spares.pop_back()
        {
            state.removing = Some(slot.number);
            return Job::Remove(slot);
        }
        Job::Wait
    }

    pub(super) fn filled(&self, slot: Slot) {
        self.lock().spares.push_back(Arc::new(slot));
        self.starved.store(false, Ordering::Relaxed);
        self.spare_ready.notify_one();
    }

    pub(super) fn fill_failed(&self, failed: Failed) {
        add(&self.counters.fill_failures, 1);
        self.starved.store(failed.is_for_lack_of_room(), Ordering::Relaxed);
        let mut state = self.lock();
        if matches!(state.filler, FillerState::Awaited) {
            state.filler = FillerState::Failed(failed);
        }
        drop(state);
        self.spare_ready.notify_one();
    }

    pub(super) fn filler_gone(&self) {
        self.lock().filler = FillerState::Gone;
        self.spare_ready.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().failed.is_some()
    }

    pub(super) fn is_spare_awaited(&self) -> bool {
        matches!(self.lock().filler, FillerState::Awaited)
    }

    /// A chunk written now would share the card with somebody's barrier.
    pub(super) fn must_filling_wait(&self) -> bool {
        let state = self.lock();
        state.failed.is_none()
            && state.batcher.is_in_flight()
            && !matches!(state.filler, FillerState::Awaited)
    }
}

impl State {
    /// Why nothing is taken.
    fn refusal(&self) -> Option<Failed> {
        match &self.failed {
            Some(failed) => Some(failed.clone()),
            None => self.closing.then_some(Failed::Closed),
        }
    }

    /// If everything appended is durable already.
    fn idle(&self) -> Option<Durable> {
        let idle = self.batcher.is_empty() && !self.batcher.is_in_flight();
        idle.then(|| self.batcher.durable())
    }

    /// Calls back when everything accepted so far is durable. If it is already, the caller must call back, outside
    /// the lock.
    fn when_durable(&mut self, done: Done) -> Option<(Done, Durable)> {
        match self.queue.back_mut() {
            Some(batch) => batch.done.push(done),
            None if self.batcher.is_in_flight() => self.in_flight_done.push(done),
            None => return Some((done, self.batcher.durable())),
        }
        None
    }

    fn open_batch(&mut self, now: Instant) {
        let batch = Batch {
            frame: self.idle_buffers.pop().unwrap_or_else(FrameBuffer::new),
            state: self.view.state(),
            started: now,
            last: self.last_write,
            effects: Vec::new(),
            done: Vec::new(),
        };
        self.queue.push_back(batch);
    }

    fn start_batch(&mut self, now: Instant) -> Batch {
        let Some(mut batch) = self.queue.pop_front() else {
            unreachable!("a batch is ready, but nothing is queued");
        };
        let rest = self.queue.iter().map(|batch| batch.frame.raw_bytes() as u64).sum();
        self.batcher.started(now, batch.last, rest);
        self.in_flight_done = mem::take(&mut batch.done);
        batch.started = now;
        batch
    }

    /// Segments before this one are not needed: the newest durable header says so.
    fn retire(&mut self, oldest_live: SegmentNo) {
        let live = self.segments.split_off(&oldest_live);
        for segment in mem::replace(&mut self.segments, live).into_values() {
            self.spares.push_back(segment.slot);
        }
    }

    fn slots(&self) -> usize {
        self.segments.len() + self.spares.len() + usize::from(self.taken.is_some())
    }

    /// A slot should be filled: too few exist, or none is spare and the active segment is half full.
    fn wants_slot(&self, options: &Options) -> bool {
        let (left, blocks) = self.room;
        let needed = matches!(self.filler, FillerState::Awaited) || left <= blocks / 2;
        self.slots() < options.slots_min || (self.spares.is_empty() && needed)
    }

    fn has_too_many(&self, options: &Options) -> bool {
        options.slots_max < self.slots() && 1 < self.spares.len()
    }

    fn free_number(&self) -> usize {
        let segments = self.segments.values().map(|segment| segment.slot.number);
        let spares = self.spares.iter().map(|slot| slot.number);
        let used: Vec<usize> =
            segments.chain(spares).chain(self.removing).chain(self.taken).collect();
        prepare::free_number(|number| used.contains(&number))
    }
}

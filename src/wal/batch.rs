//! Decides when records are written, and which of them share one barrier.
//!
//! On an SD card the barrier is the cost, not the bytes: one barrier for ten records costs about as much as one for
//! one. An idle cluster writes almost only lease renewals, whose clients wait for seconds; those may wait for company.
//!
//! # Shape
//!
//! A pure state machine. `handle` tells it what was appended and when, `writer` asks for the next [`Step`] and does
//! the I/O. Nothing here reads a clock, touches a file or blocks, so every timing case is an ordinary unit test.
//!
//! # Invariants
//!
//! - A record becomes [`Durable`] only when a barrier that started *after* it was written returns.
//! - Order is the order of appending ([`WriteSeq`], one per record), never the log index: votes and truncations
//!   are records too, and after a truncation indexes go back.
//! - At most one barrier is in flight. What arrives meanwhile forms the next batch: the slower the card, the larger
//!   the batch, without tuning.
//! - An urgent record, a vote or an explicit flush releases everything before it. A lease-class record waits at
//!   most `Policy::linger` from the oldest of its batch, unless a barrier is in flight.
//! - `RideAlong` alone never causes a barrier.
//!
//! # Not here
//!
//! Bytes (`frame`), and what happens when a barrier fails: that is final, see `writer`.

use std::time::{Duration, Instant};

use crate::types::WriteSeq;

/// When a batch that is not urgent is ready. Whichever is hit first starts it.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Longest time the oldest lease-class record may wait for company.
    pub linger: Duration,
    /// Most bytes to gather.
    pub bytes_max: u64,
}

/// How soon a record must be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// With whatever is written next: knowledge that may be lost, or whose loss only repeats work.
    RideAlong,
    /// Somebody waits, but patiently: a lease renewal.
    Lease,
    /// Somebody waits.
    Urgent,
}

/// What the writer should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing must be written: wait until something is appended.
    Idle,
    /// Wait for company, but not past this instant.
    WaitUntil(Instant),
    /// Write the batch now.
    Write,
    /// A barrier is running.
    InFlight,
}

/// Proof that a barrier covering this record, and all before it, has returned.
///
/// The field is private and only [`Batcher::finished`] makes a new one, so code that acknowledges a write takes a
/// `Durable` and cannot be called too early.
#[must_use = "whoever waits for this write must be told"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Durable(WriteSeq);

impl Durable {
    /// The last durable record. Counts from the opening of the log.
    pub const fn upto(self) -> WriteSeq {
        self.0
    }
}

/// Gathers records into batches. See the module documentation.
#[derive(Debug)]
pub struct Batcher {
    policy: Policy,
    /// Records that no barrier has been started for.
    pending: Option<Pending>,
    in_flight: Option<InFlight>,
    durable: Durable,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    /// When its first record that may not ride along for ever arrived.
    waiting_since: Option<Instant>,
    bytes: u64,
    release: bool,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    last: WriteSeq,
    since: Instant,
}

impl Batcher {
    /// Starts with nothing pending and everything that was recovered durable: opening ends with a barrier.
    pub const fn new(policy: Policy) -> Self {
        Self { policy, pending: None, in_flight: None, durable: Durable(WriteSeq::new(0)) }
    }

    /// Records of this size were appended.
    pub fn accepted(&mut self, now: Instant, bytes: u64, urgency: Urgency) {
        let pending =
            self.pending.get_or_insert(Pending { waiting_since: None, bytes: 0, release: false });
        pending.bytes = pending.bytes.saturating_add(bytes);
        if urgency != Urgency::RideAlong {
            pending.waiting_since.get_or_insert(now);
        }
        pending.release |= urgency == Urgency::Urgent || self.policy.bytes_max <= pending.bytes;
    }

    /// Somebody waits for everything appended so far.
    pub const fn flush(&mut self, now: Instant) {
        if let Some(pending) = &mut self.pending {
            pending.release = true;
            if pending.waiting_since.is_none() {
                pending.waiting_since = Some(now);
            }
        }
    }

    /// What to do at `now`.
    pub fn step(&self, now: Instant) -> Step {
        if self.in_flight.is_some() {
            return Step::InFlight;
        }
        let Some(pending) = self.pending else {
            return Step::Idle;
        };
        if pending.release {
            return Step::Write;
        }
        let Some(since) = pending.waiting_since else {
            return Step::Idle;
        };
        let deadline = since + self.policy.linger;
        if deadline <= now { Step::Write } else { Step::WaitUntil(deadline) }
    }

    /// The writer starts on records up to `last`. If `rest_bytes` remain, because they do not fit the frame, they
    /// follow without lingering: somebody has waited for them long enough.
    pub fn started(&mut self, now: Instant, last: WriteSeq, rest_bytes: u64) {
        assert!(self.in_flight.is_none(), "a second barrier while one is in flight");
        assert!(self.durable.0 < last, "barrier for {last}, which is durable");
        self.pending = (0 < rest_bytes).then_some(Pending {
            waiting_since: Some(now),
            bytes: rest_bytes,
            release: true,
        });
        self.in_flight = Some(InFlight { last, since: now });
    }

    /// The running barrier returned success.
    pub fn finished(&mut self) -> Durable {
        let Some(in_flight) = self.in_flight.take() else {
            unreachable!("a barrier returned that this batcher never started");
        };
        self.durable = Durable(in_flight.last);
        self.durable
    }

    /// The newest proof there is.
    pub const fn durable(&self) -> Durable {
        self.durable
    }

    /// Whether a barrier is running.
    pub const fn is_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Whether nothing waits for a barrier to start.
    pub const fn is_empty(&self) -> bool {
        self.pending.is_none()
    }

    /// Bytes that no started write covers.
    pub fn waiting_bytes(&self) -> u64 {
        self.pending.as_ref().map_or(0, |pending| pending.bytes)
    }

    /// Since when the running barrier, segment switch included, keeps everybody waiting.
    pub fn stalled_since(&self) -> Option<Instant> {
        self.in_flight.map(|in_flight| in_flight.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINGER: Duration = Duration::from_millis(250);

    fn batcher() -> Batcher {
        Batcher::new(Policy { linger: LINGER, bytes_max: 100 })
    }

    fn seq(raw: u64) -> WriteSeq {
        WriteSeq::new(raw)
    }

    #[test]
    fn urgent_record_is_written_at_once_and_takes_everything_along() {
        let start = Instant::now();
        let mut batcher = batcher();
        assert_eq!(batcher.step(start), Step::Idle);

        batcher.accepted(start, 10, Urgency::Lease);
        assert_eq!(batcher.step(start), Step::WaitUntil(start + LINGER));
        batcher.accepted(start, 10, Urgency::Urgent);
        assert_eq!(batcher.step(start), Step::Write);
    }

    #[test]
    fn linger_counts_from_the_oldest_lease() {
        let start = Instant::now();
        let mut batcher = batcher();
        batcher.accepted(start, 10, Urgency::Lease);
        batcher.accepted(start + LINGER / 2, 10, Urgency::Lease);

        assert_eq!(batcher.step(start + LINGER / 2), Step::WaitUntil(start + LINGER));
        assert_eq!(batcher.step(start + LINGER), Step::Write);
    }

    #[test]
    fn records_that_ride_along_never_cause_a_barrier_and_do_not_start_the_linger() {
        let start = Instant::now();
        let mut batcher = batcher();
        batcher.accepted(start, 10, Urgency::RideAlong);
        assert_eq!(batcher.step(start + LINGER * 100), Step::Idle);

        batcher.accepted(start + LINGER, 10, Urgency::Lease);
        assert_eq!(batcher.step(start + LINGER), Step::WaitUntil(start + LINGER * 2));
    }

    #[test]
    fn flush_releases_what_only_rides_along() {
        let start = Instant::now();
        let mut batcher = batcher();
        batcher.flush(start);
        assert_eq!(batcher.step(start), Step::Idle);

        batcher.accepted(start, 10, Urgency::RideAlong);
        batcher.flush(start);
        assert_eq!(batcher.step(start), Step::Write);
    }

    #[test]
    fn full_batch_does_not_wait() {
        let start = Instant::now();
        let mut batcher = batcher();
        batcher.accepted(start, 99, Urgency::Lease);
        assert_eq!(batcher.step(start), Step::WaitUntil(start + LINGER));
        batcher.accepted(start, 1, Urgency::Lease);
        assert_eq!(batcher.step(start), Step::Write);
    }

    #[test]
    fn record_appended_during_a_barrier_is_not_released_by_it() {
        let start = Instant::now();
        let mut batcher = batcher();
        batcher.accepted(start, 10, Urgency::Urgent);
        batcher.started(start, seq(1), 0);

        batcher.accepted(start, 10, Urgency::Urgent);
        assert_eq!(batcher.step(start), Step::InFlight);
        assert_eq!(batcher.finished().upto(), seq(1));
        assert_eq!(batcher.step(start), Step::Write);
    }

    #[test]
    fn what_did_not_fit_the_frame_follows_without_lingering() {
        let start = Instant::now();
        let mut batcher = batcher();
        batcher.accepted(start, 500, Urgency::Lease);
        batcher.started(start, seq(3), 200);
        assert_eq!(batcher.finished().upto(), seq(3));
        assert_eq!(batcher.step(start), Step::Write);
        assert!(!batcher.is_empty());
    }

    #[test]
    fn stall_is_measured_from_the_start_of_the_running_barrier() {
        let start = Instant::now();
        let mut batcher = batcher();
        batcher.accepted(start, 10, Urgency::Urgent);
        assert_eq!(batcher.stalled_since(), None);
        batcher.started(start + LINGER, seq(1), 0);
        assert_eq!(batcher.stalled_since(), Some(start + LINGER));
        assert_eq!(batcher.finished().upto(), seq(1));
        assert_eq!(batcher.stalled_since(), None);
    }
}

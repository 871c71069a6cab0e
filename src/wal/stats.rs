//! Counts what the log does to the card.
//!
//! Plain atomics: the writer adds, `/metrics` and the stall watchdog read, nobody waits.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::metrics::{COUNTS, Histogram, MICROS, Observations};

/// What the log has done since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Records appended.
    pub records: u64,
    /// Bytes of records appended, before compression and padding.
    pub record_bytes: u64,
    /// Barriers that returned, one per frame.
    pub barriers: u64,
    /// Bytes of frames and segment headers written.
    pub bytes_written: u64,
    /// Bytes written to fill slots ahead.
    pub fill_bytes: u64,
    /// Attempts to fill a slot that failed; most likely the card is full.
    pub fill_failures: u64,
    /// Segments started.
    pub segments_started: u64,
    /// Records that waited for company instead of starting a barrier.
    pub lingered: u64,
    /// Records per frame.
    pub batch_records: Observations,
    /// Microseconds from the start of a write to the return of its barrier.
    pub barrier_micros: Observations,
    /// How long the running barrier has kept everybody waiting.
    pub stalled_for: Option<Duration>,
    /// Segments that hold live records.
    pub live_segments: usize,
    /// Slots ready for use.
    pub spare_slots: usize,
}

#[derive(Debug)]
pub(super) struct Counters {
    pub(super) records: AtomicU64,
    pub(super) record_bytes: AtomicU64,
    pub(super) barriers: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) fill_bytes: AtomicU64,
    pub(super) fill_failures: AtomicU64,
    pub(super) segments_started: AtomicU64,
    pub(super) lingered: AtomicU64,
    pub(super) batch_records: Histogram,
    pub(super) barrier_micros: Histogram,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            records: AtomicU64::default(),
            record_bytes: AtomicU64::default(),
            barriers: AtomicU64::default(),
            bytes_written: AtomicU64::default(),
            fill_bytes: AtomicU64::default(),
            fill_failures: AtomicU64::default(),
            segments_started: AtomicU64::default(),
            lingered: AtomicU64::default(),
            batch_records: Histogram::new(&COUNTS),
            barrier_micros: Histogram::new(&MICROS),
        }
    }
}

impl Counters {
    pub(super) fn snapshot(&self) -> Stats {
        Stats {
            records: self.records.load(Relaxed),
            record_bytes: self.record_bytes.load(Relaxed),
            barriers: self.barriers.load(Relaxed),
            bytes_written: self.bytes_written.load(Relaxed),
            fill_bytes: self.fill_bytes.load(Relaxed),
            fill_failures: self.fill_failures.load(Relaxed),
            segments_started: self.segments_started.load(Relaxed),
            lingered: self.lingered.load(Relaxed),
            batch_records: self.batch_records.snapshot(),
            barrier_micros: self.barrier_micros.snapshot(),
            ..Stats::default()
        }
    }
}

pub(super) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Relaxed);
}

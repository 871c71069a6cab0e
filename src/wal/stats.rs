//! Counts what the log does to the card.
//!
//! Plain atomics: the writer adds, `/metrics` and the stall watchdog read, nobody waits.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const BUCKETS: usize = 24;

/// Observations in buckets of powers of two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Observations at most `2^n`, not cumulative; the last bucket takes everything larger.
    pub buckets: [u64; BUCKETS],
    /// Number of observations.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
}

impl Histogram {
    /// An upper bound for this share (0 to 1) of the observations, to a factor of two.
    pub fn quantile(&self, share: f64) -> u64 {
        let mut seen = 0;
        for (bits, count) in self.buckets.iter().enumerate() {
            seen += count;
            if share * self.count as f64 <= seen as f64 {
                return 1 << bits;
            }
        }
        u64::MAX
    }
}

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
    /// Records per frame.
    pub batch_records: Histogram,
    /// Microseconds from the start of a write to the return of its barrier.
    pub barrier_micros: Histogram,
    /// How long the running barrier has kept everybody waiting.
    pub stalled_for: Option<Duration>,
    /// Segments that hold live records.
    pub live_segments: usize,
    /// Slots ready for use.
    pub spare_slots: usize,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) records: AtomicU64,
    pub(super) record_bytes: AtomicU64,
    pub(super) barriers: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) fill_bytes: AtomicU64,
    pub(super) fill_failures: AtomicU64,
    pub(super) segments_started: AtomicU64,
    pub(super) batch_records: Buckets,
    pub(super) barrier_micros: Buckets,
}

#[derive(Debug, Default)]
pub(super) struct Buckets {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl Buckets {
    pub(super) fn observe(&self, value: u64) {
        let bits = (u64::BITS - value.saturating_sub(1).leading_zeros()) as usize;
        self.buckets[bits.min(BUCKETS - 1)].fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
    }

    fn snapshot(&self) -> Histogram {
        let mut histogram = Histogram { sum: self.sum.load(Relaxed), ..Histogram::default() };
        for (to, from) in histogram.buckets.iter_mut().zip(&self.buckets) {
            *to = from.load(Relaxed);
            histogram.count += *to;
        }
        histogram
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
            batch_records: self.batch_records.snapshot(),
            barrier_micros: self.barrier_micros.snapshot(),
            ..Stats::default()
        }
    }
}

pub(super) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Relaxed);
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_fall_into_the_smallest_power_of_two_that_holds_them() {
        let buckets = Buckets::default();
        for value in [0, 1, 2, 3, 4, 1 << 40] {
            buckets.observe(value);
        }
        let histogram = buckets.snapshot();
        assert_eq!(histogram.buckets[..3], [2, 1, 2]);
        assert_eq!(histogram.buckets[BUCKETS - 1], 1);
        assert_eq!(histogram.count, 6);
        assert_eq!(histogram.quantile(0.5), 2);
        assert_eq!(histogram.quantile(0.0), 1);
    }

    #[test]
    fn largest_value_does_not_overflow() {
        let buckets = Buckets::default();
        buckets.observe(u64::MAX);
        assert_eq!(buckets.snapshot().count, 1);
    }
}

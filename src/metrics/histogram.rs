//! Counts observations in buckets: two atomic additions each, no lock and no allocation.
//!
//! Values are whole numbers, records or microseconds; what is shown in seconds is divided only when somebody asks.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// Powers of two from one to 4 096.
pub static COUNTS: [u64; 13] = {
    let mut bounds = [0; 13];
    let mut n = 0;
    while n < bounds.len() {
        bounds[n] = 1 << n;
        n += 1;
    }
    bounds
};

/// Microseconds from 15 µs to 33 s, doubling. etcd's bounds for the disk, 1 ms to 8.192 s, are among them; two
/// more follow, because SD cards pause for longer than that.
pub static MICROS: [u64; 22] = {
    let mut bounds = [0; 22];
    let mut n = 0;
    while n < bounds.len() {
        bounds[n] = (1_000 << n) >> 6;
        n += 1;
    }
    bounds
};

/// Observations in buckets.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// One more than bounds: the last takes what is above all of them.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// Starts without observations. A bucket holds values up to and including its bound; bounds ascend.
    pub fn new(bounds: &'static [u64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0) }
    }

    /// Counts one value.
    pub fn observe(&self, value: u64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(value, Relaxed);
    }

    /// Counts one duration, in microseconds.
    pub fn observe_micros(&self, duration: Duration) {
        self.observe(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// What was counted so far.
    pub fn snapshot(&self) -> Observations {
        let buckets: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        Observations {
            bounds: self.bounds,
            count: buckets.iter().sum(),
            buckets,
            sum: self.sum.load(Relaxed),
        }
    }
}

/// A histogram at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observations {
    bounds: &'static [u64],
    /// Observations per bucket, not cumulative; the last takes what is above all bounds.
    pub buckets: Vec<u64>,
    /// Number of observations.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
}

impl Observations {
    /// An upper bound for this share (0 to 1) of the observations, as exact as the buckets.
    pub fn quantile(&self, share: f64) -> u64 {
        let mut seen = 0;
        for (bound, count) in self.bounds.iter().zip(&self.buckets) {
            seen += count;
            if share * self.count as f64 <= seen as f64 {
                return *bound;
            }
        }
        u64::MAX
    }

    /// The same observations with one bucket for everything up to `first`, which is one of the bounds.
    #[must_use]
    pub fn from_bound(&self, first: u64) -> Self {
        let merged = self.bounds.partition_point(|bound| *bound < first);
        let (below, above) = self.buckets.split_at(merged.min(self.buckets.len()));
        let mut buckets = above.to_vec();
        if let Some(bucket) = buckets.first_mut() {
            *bucket += below.iter().sum::<u64>();
        }
        let bounds = self.bounds.get(merged..).unwrap_or_default();
        Self { bounds, buckets, count: self.count, sum: self.sum }
    }

    /// Writes the samples, every value divided by `unit`.
    pub(super) fn encode(&self, encoder: &mut MetricEncoder<'_>, unit: f64) -> fmt::Result {
        let bounds = self.bounds.iter().map(|bound| *bound as f64 / unit);
        let bounds = bounds.chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(self.buckets.iter().copied()).collect();
        let sum = self.sum as f64 / unit;
        encoder.encode_histogram::<NoLabelSet>(sum, self.count, &buckets, None)
    }
}

/// Microseconds in a second.
pub(super) const MICROS_PER_SECOND: f64 = 1e6;

/// A histogram of durations that a registry can show.
#[derive(Clone, Debug)]
pub struct Durations(Arc<Histogram>);

impl Durations {
    /// Starts without observations. `bounds` are in microseconds.
    pub fn new(bounds: &'static [u64]) -> Self {
        Self(Arc::new(Histogram::new(bounds)))
    }

    /// Counts one.
    pub fn observe(&self, duration: Duration) {
        self.0.observe_micros(duration);
    }
}

impl TypedMetric for Durations {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        self.0.snapshot().encode(&mut encoder, MICROS_PER_SECOND)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_fall_into_the_first_bucket_that_holds_them() {
        let histogram = Histogram::new(&COUNTS);
        for value in [0, 1, 2, 3, 4, 5, 4_096, 4_097, u64::MAX / 2] {
            histogram.observe(value);
        }
        let seen = histogram.snapshot();
        assert_eq!(seen.buckets[..4], [2, 1, 2, 1]);
        assert_eq!(seen.buckets[12..], [1, 2]);
        assert_eq!(seen.count, 9);
        assert_eq!(seen.quantile(0.0), 1);
        assert_eq!(seen.quantile(0.5), 4);
        assert_eq!(seen.quantile(1.0), u64::MAX);
    }

    #[test]
    fn etcds_bounds_for_the_disk_are_among_the_bounds() {
        let mut etcd = 1_000;
        while etcd <= 8_192_000 {
            assert!(MICROS.contains(&etcd), "{etcd} µs");
            etcd *= 2;
        }
        assert!(MICROS.is_sorted());
    }

    #[test]
    fn merging_the_lowest_buckets_loses_no_observation() {
        let histogram = Histogram::new(&MICROS);
        for micros in [1, 900, 1_000, 1_001, 50_000_000] {
            histogram.observe(micros);
        }
        let merged = histogram.snapshot().from_bound(1_000);
        assert_eq!(merged.buckets[..2], [3, 1]);
        assert_eq!(merged.buckets.iter().sum::<u64>(), merged.count);
        assert_eq!((merged.count, merged.quantile(0.5)), (5, 1_000));
    }
}

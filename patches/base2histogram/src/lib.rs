//! A histogram in powers of two, with the face that openraft expects of the crate of this name.
//!
//! One bucket per bit: percentiles are upper bounds, right to a factor of two. 520 bytes each, no tables.

use std::fmt;
use std::marker::PhantomData;

const BUCKETS: usize = 65;

/// Counts values by their number of bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    /// `buckets[n]` counts values of `n` bits.
    buckets: [u64; BUCKETS],
    _slots: PhantomData<T>,
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Histogram<T> {
    /// Empty.
    pub fn new() -> Self {
        Self { buckets: [0; BUCKETS], _slots: PhantomData }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value several times.
    pub fn record_n(&mut self, value: u64, count: u64) {
        let bits = (u64::BITS - value.leading_zeros()) as usize;
        self.buckets[bits] += count;
    }

    /// Values counted.
    pub fn total(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The largest value that falls into the bucket which holds this share (0 to 1) of all values; 0 if there are none.
    pub fn percentile(&self, share: f64) -> u64 {
        let wanted = share * self.total() as f64;
        let mut seen = 0;
        for (bits, count) in self.buckets.iter().enumerate() {
            seen += count;
            if 0 < seen && wanted <= seen as f64 {
                return u64::MAX.checked_shr(u64::BITS - bits as u32).unwrap_or(0);
            }
        }
        0
    }

    /// The usual percentiles.
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats {
            samples: self.total(),
            p0_1: self.percentile(0.001),
            p1: self.percentile(0.01),
            p5: self.percentile(0.05),
            p10: self.percentile(0.10),
            p50: self.percentile(0.50),
            p90: self.percentile(0.90),
            p99: self.percentile(0.99),
            p99_9: self.percentile(0.999),
        }
    }
}

/// Percentiles of one histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the percentiles")]
pub struct PercentileStats {
    /// Values counted.
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, p50, p90, p99, p99_9, .. } = self;
        write!(f, "samples {samples}, p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}")
    }
}

/// Several histograms under each other, one line each.
#[derive(Clone, Debug, Default)]
pub struct AsciiChart(Vec<(String, PercentileStats)>);

impl AsciiChart {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a histogram.
    #[must_use]
    pub fn add(mut self, name: impl Into<String>, histogram: Histogram) -> Self {
        self.0.push((name.into(), histogram.percentile_stats()));
        self
    }

    /// The same lines: there is no shorter form to tell it from.
    pub fn detailed(&self) -> &Self {
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, stats)| writeln!(f, "{name}: {stats}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_bound_the_values_from_above_to_a_factor_of_two() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile(0.5), 0);
        for value in 1..=1000 {
            histogram.record(value);
        }
        assert_eq!(histogram.total(), 1000);
        assert_eq!(histogram.percentile(0.5), 511);
        assert_eq!(histogram.percentile(0.999), 1023);
        histogram.record(u64::MAX);
        assert_eq!(histogram.percentile(1.0), u64::MAX);
    }
}

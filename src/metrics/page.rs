//! Writes values that somebody else keeps onto the metrics page, at the moment when it is asked for.
//!
//! For a collector: what a module counts anyway (sizes, positions, the log's own histograms) is read once per scrape
//! instead of being copied all the time.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use super::histogram::{MICROS_PER_SECOND, Observations};

/// A name, what it means, and its value. Counters are named without `_total`.
pub type Row<V> = (&'static str, &'static str, V);

/// Label names and values, and what was counted under them. Values come from a closed set, such as the members' ids.
pub type Labelled<V> = (Vec<(&'static str, String)>, V);

/// The page being written.
#[derive(Debug)]
pub struct Page<'a>(DescriptorEncoder<'a>);

impl<'a> Page<'a> {
    /// Writes to a collector's encoder.
    pub const fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// Values that go up and down.
    pub fn gauges<V: EncodeGaugeValue>(&mut self, rows: &[Row<V>]) -> fmt::Result {
        for (name, help, value) in rows {
            let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
            encoder.encode_gauge(value)?;
        }
        Ok(())
    }

    /// Values that only go up while the process lives.
    pub fn counters(&mut self, rows: &[Row<u64>]) -> fmt::Result {
        for (name, help, value) in rows {
            self.counter(name, help, &ConstCounter::new(*value))?;
        }
        Ok(())
    }

    /// A counter that is not a whole number.
    pub fn seconds_counter(&mut self, (name, help, seconds): Row<f64>) -> fmt::Result {
        self.counter(name, help, &ConstCounter::new(seconds))
    }

    fn counter(&mut self, name: &str, help: &str, value: &impl EncodeMetric) -> fmt::Result {
        value.encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    /// One gauge with a value per label.
    pub fn labelled(
        &mut self,
        (name, help, label): Row<&'static str>,
        values: &[(&'static str, u64)],
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (of, value) in values {
            encoder.encode_family(&[(label, *of)])?.encode_gauge(value)?;
        }
        Ok(())
    }

    /// A histogram of numbers.
    pub fn counts(&mut self, (name, help, seen): Row<&Observations>) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        seen.encode(&mut encoder, 1.0)
    }

    /// A histogram of microseconds, shown in seconds.
    pub fn seconds(&mut self, (name, help, seen): Row<&Observations>) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        seen.encode(&mut encoder, MICROS_PER_SECOND)
    }

    /// One counter per set of labels.
    pub fn counters_by(&mut self, name: &str, help: &str, rows: &[Labelled<u64>]) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            ConstCounter::new(*value).encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    /// One gauge per set of labels.
    pub fn gauges_by(&mut self, name: &str, help: &str, rows: &[Labelled<u64>]) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            encoder.encode_family(labels)?.encode_gauge(value)?;
        }
        Ok(())
    }

    /// One histogram of microseconds per set of labels, shown in seconds.
    pub fn seconds_by(
        &mut self,
        name: &str,
        help: &str,
        rows: &[Labelled<Observations>],
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, seen) in rows {
            seen.encode(&mut encoder.encode_family(labels)?, MICROS_PER_SECOND)?;
        }
        Ok(())
    }
}

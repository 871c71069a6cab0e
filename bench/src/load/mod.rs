//! The load: what clients do, and what they saw. The same for everybody measured.

pub mod burst;
pub mod kubernetes;
pub mod puts;
pub mod watchers;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// What clients saw.
#[derive(Debug)]
pub struct Tally {
    /// Latencies in microseconds by what was done.
    pub latencies: BTreeMap<String, Histogram<u64>>,
    /// Calls that failed.
    pub failed: u64,
    /// What the first failure said.
    pub first_failure: Option<String>,
    /// Bytes of keys and values written.
    pub logical_bytes: u64,
    /// Longest time between two successful writes.
    pub longest_gap: Duration,
    last_success: Instant,
    /// Seconds since the beginning, and latency in ms: every write, if asked for.
    pub points: Option<Vec<(f64, f64)>>,
}

/// Where clients write down what they saw, and how they are told to stop.
#[derive(Clone, Debug)]
pub struct Recorder {
    tally: Arc<Mutex<Tally>>,
    stop: Arc<AtomicBool>,
    begin: Instant,
}

/// Whether an operation writes. Only writes count for throughput, gaps and cost.
pub fn is_write(operation: &str) -> bool {
    !operation.starts_with("read") && !operation.starts_with("watch")
}

impl Recorder {
    pub fn new() -> Self {
        let begin = Instant::now();
        let tally = Tally {
            latencies: BTreeMap::new(),
            failed: 0,
            first_failure: None,
            logical_bytes: 0,
            longest_gap: Duration::ZERO,
            last_success: begin,
            points: None,
        };
        Self { tally: Arc::new(Mutex::new(tally)), stop: Arc::default(), begin }
    }

    /// Keeps every write's latency, for a plot.
    pub fn with_points(self) -> Self {
        self.tally().points = Some(Vec::new());
        self
    }

    /// What was seen so far.
    pub fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn succeeded(&self, operation: &str, latency: Duration, bytes: usize) {
        let now = Instant::now();
        let mut tally = self.tally();
        tally.logical_bytes += bytes as u64;
        if !tally.latencies.contains_key(operation) {
            tally.latencies.insert(operation.to_owned(), histogram());
        }
        if let Some(latencies) = tally.latencies.get_mut(operation) {
            latencies.saturating_record(latency.as_micros() as u64);
        }
        if !is_write(operation) {
            return;
        }
        tally.longest_gap = tally.longest_gap.max(now - tally.last_success);
        tally.last_success = now;
        if let Some(points) = &mut tally.points {
            let began = (now - latency).saturating_duration_since(self.begin);
            points.push((began.as_secs_f64(), latency.as_secs_f64() * 1e3));
        }
    }

    pub fn failed(&self, error: &dyn std::fmt::Display) {
        let mut tally = self.tally();
        tally.failed += 1;
        tally.first_failure.get_or_insert_with(|| error.to_string());
    }

    /// Whether clients shall go on.
    pub fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Lets clients work for `length`, then stops them. What hangs until then counts as a gap.
    pub async fn run_for(&self, length: Duration) {
        tokio::time::sleep(length).await;
        self.stop.store(true, Ordering::Relaxed);
        let mut tally = self.tally();
        let since = tally.last_success.elapsed();
        tally.longest_gap = tally.longest_gap.max(since);
    }

    /// Waits until `due`; false if clients shall stop instead.
    pub async fn pause_until(&self, due: Instant) -> bool {
        while self.goes_on() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            tokio::time::sleep(left.min(Duration::from_millis(200))).await;
        }
        false
    }
}

/// Microseconds up to ten minutes, three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(600_000_000, 3).unwrap_or_else(|_| unreachable!("constants"))
}

/// Seeded numbers, so that two runs write the same.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_F491_4F6C_DD1D) ^ 0x9E37_79B9_7F4A_7C15)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From 0 up to below 1.
    pub fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Bytes nothing can compress, so that figures do not flatter.
    pub fn noise(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }

    /// Bytes like a stored API object: names of fields, with a few values that change.
    pub fn object(&mut self, length: usize) -> Vec<u8> {
        const FIELDS: &[u8] = b"k8s\0\n\x1e\n\x16coordination.k8s.io/v1\x12\x05Lease\x12\xa0\x02\n\x8a\x02\n\x17kube-scheduler\x12\0\x1a\x0bkube-system\"\0\x8a\x01\xad\x01\n\x03k3s\x12\x06Update\"\x08FieldsV1:{\"f:spec\":{\"f:acquireTime\":{},\"f:holderIdentity\":{},\"f:leaseDurationSeconds\":{},\"f:leaseTransitions\":{},\"f:renewTime\":{}}}";
        let mut bytes = Vec::with_capacity(length + FIELDS.len());
        while bytes.len() < length {
            bytes.extend_from_slice(FIELDS);
            bytes.extend_from_slice(
                format!("{:016x}{:08}", self.next(), self.next() % 100_000_000).as_bytes(),
            );
        }
        bytes.truncate(length);
        bytes
    }
}

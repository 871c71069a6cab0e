//! What a write to the log costs: barriers and bytes per write, batch sizes, latencies.
//!
//!     cargo bench --bench wal -- /mnt/card/bench
//!
//! The directory (or `WAL_BENCH_DIR`) should be on the card in question; without one, a temporary directory is used,
//! whose figures say little. `WAL_BENCH_WRITES` sets the writes per row. The directory's log is removed afterwards.
#![allow(clippy::print_stdout, reason = "printing figures is what it is for")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed run")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use k3s_server::env::host;
use k3s_server::types::{ClusterId, LogId, LogIndex, NodeId, Term};
use k3s_server::wal::{Identity, Options, Record, Stats, Urgency, Wal};
use tokio::sync::{Mutex, oneshot};

/// About what a lease renewal is on the wire.
const PAYLOAD_BYTES: usize = 400;

fn main() {
    let from_arguments = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let temporary = tempfile::tempdir().unwrap();
    let dir = from_arguments
        .or_else(|| std::env::var("WAL_BENCH_DIR").ok())
        .map_or_else(|| temporary.path().to_owned(), Into::into);
    let writes = std::env::var("WAL_BENCH_WRITES").map_or(2_000, |n| n.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_time().build().unwrap();
    println!("{PAYLOAD_BYTES}-byte writes to {}", dir.display());
    println!(
        "{:>7} {:>9} {:>14} {:>12} {:>11} {:>11} {:>11} {:>11}",
        "writers",
        "writes/s",
        "barriers/write",
        "bytes/write",
        "batch mean",
        "batch max <=",
        "p50 <= us",
        "p99 <= us"
    );
    for writers in [1, 16, 64, 256] {
        let path = dir.join(format!("wal-bench-{writers}"));
        runtime.block_on(row(&path, writers, writes));
        std::fs::remove_dir_all(&path).unwrap();
    }
}

async fn row(path: &Path, writers: u64, writes: u64) {
    let identity = Identity { cluster: ClusterId::new(1), node: NodeId::new(1) };
    let opened = Wal::open(&host::env(), path, identity, Options::default()).await;
    let (wal, _, writer) = opened.unwrap();
    let thread = writer.spawn_thread().unwrap();
    // Filling slots ahead is not what is measured.
    while wal.stats().spare_slots < 3 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = wal.stats();
    let start = Instant::now();
    let left = Arc::new(AtomicU64::new(writes));
    let next = Arc::new(Mutex::new(1));
    let tasks: Vec<_> = (0..writers)
        .map(|_| tokio::spawn(write(wal.clone(), Arc::clone(&left), Arc::clone(&next))))
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    print_row(writers, writes, start.elapsed(), &before, &wal.stats());
    wal.close().await.unwrap();
    thread.join().unwrap();
}

/// One client: appends, waits until it is durable, appends again.
async fn write(wal: Wal, left: Arc<AtomicU64>, next: Arc<Mutex<u64>>) {
    while left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
        .is_ok()
    {
        let (sender, receiver) = oneshot::channel();
        {
            let mut next = next.lock().await;
            let id =
                LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(*next) };
            // Not compressible, so that the figures do not flatter.
            let payload = noise(*next);
            let record = Record::Entry { id, payload: payload.into() };
            let done = move |result| drop(sender.send(result));
            wal.append(vec![record], Urgency::Urgent, done).unwrap();
            *next += 1;
        }
        receiver.await.unwrap().map(drop).unwrap();
    }
}

fn noise(seed: u64) -> Vec<u8> {
    let mut payload = vec![0; PAYLOAD_BYTES];
    k3s_server::testkit::Random::new(seed).fill(&mut payload);
    payload
}

fn print_row(writers: u64, writes: u64, elapsed: Duration, before: &Stats, after: &Stats) {
    let barriers = after.barriers - before.barriers;
    let bytes = after.bytes_written - before.bytes_written;
    let per_write = |value: u64| value as f64 / writes as f64;
    println!(
        "{writers:>7} {:>9.0} {:>14.4} {:>12.0} {:>11.1} {:>12} {:>11} {:>11}",
        writes as f64 / elapsed.as_secs_f64(),
        per_write(barriers),
        per_write(bytes),
        writes as f64 / barriers as f64,
        after.batch_records.quantile(1.0),
        after.barrier_micros.quantile(0.5),
        after.barrier_micros.quantile(0.99),
    );
}

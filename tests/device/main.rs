//! What writes cost the card, by the block device's own counters: exact numbers, so that a regression fails.
//!
//! Each test makes an ext4 file system on a loop device, mounts it as the product's image does, and reads
//! `/sys/block/loopN/stat` around its writes. Needs root, loop devices and mkfs.ext4; where they are missing it says so and
//! why. `bench/` measures times; nothing here does.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(clippy::print_stderr, reason = "a test that is skipped must say so")]
#![allow(clippy::print_stdout, reason = "a seed is printed so that a failure can be repeated")]
#![allow(clippy::let_underscore_must_use, reason = "a process that ended already cannot be killed")]

mod card;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use card::{Card, Counters};
use k3s_server::env::{Env, host};
use k3s_server::testkit::{ManualClock, Random};
use k3s_server::types::{ClusterId, LogId, LogIndex, NodeId, Term};
use k3s_server::wal::{Identity, Options, Record, Urgency, Wal};
use support::ours::Ours;
use tokio::sync::oneshot;

const BLOCK: u64 = 4_096;

/// A card, or none and why.
fn card() -> Option<Card> {
    match Card::make() {
        Ok(card) => Some(card),
        Err(reason) => {
            eprintln!("skipped: no file system on a loop device here: {reason}");
            None
        }
    }
}

/// A log on a card, with nothing going on but what the test does.
struct Log {
    card: Card,
    wal: Wal,
    thread: std::thread::JoinHandle<()>,
    next: u64,
    random: Random,
}

impl Log {
    async fn open(card: Card, env: &Env, linger: Duration) -> Self {
        let identity = Identity { cluster: ClusterId::new(1), node: NodeId::new(1) };
        // Slots of ordinary size; none is filled ahead while we count.
        let options = Options { linger, slots_min: 1, ..Options::default() };
        let path = card.mount_point().join("wal");
        let (wal, _, writer) = Wal::open(env, &path, identity, options).await.unwrap();
        let thread = writer.spawn_thread().unwrap();
        let mut log = Self { card, wal, thread, next: 1, random: Random::new(1) };
        log.append(1, Urgency::Urgent).await.unwrap();
        log.card.settle();
        log
    }

    /// Appends entries of 256 bytes that do not compress; the receiver hears when they are durable.
    fn append(&mut self, count: u64, urgency: Urgency) -> oneshot::Receiver<()> {
        let records = (0..count).map(|_| self.entry()).collect();
        let (sender, receiver) = oneshot::channel();
        // Without a success the sender is dropped, and the receiver hears that.
        let done = move |result: Result<_, _>| {
            if result.is_ok() {
                sender.send(()).ok();
            }
        };
        self.wal.append(records, urgency, done).unwrap();
        receiver
    }

    fn entry(&mut self) -> Record {
        let index = LogIndex::new(self.next);
        self.next += 1;
        let mut payload = vec![0; 256];
        self.random.fill(&mut payload);
        let id = LogId { term: Term::new(1), leader: NodeId::new(1), index };
        Record::Entry { id, payload: payload.into() }
    }

    async fn close(self) {
        self.wal.close().await.unwrap();
        self.thread.join().unwrap();
    }
}

#[tokio::test]
async fn isolated_append_costs_one_block_and_one_flush() {
    let Some(card) = card() else { return };
    let mut log = Log::open(card, &host::env(), Options::default().linger).await;

    const WRITES: u64 = 50;
    let before = log.card.counters();
    for _ in 0..WRITES {
        log.append(1, Urgency::Urgent).await.unwrap();
    }
    let cost = log.card.counters() - before;
    log.close().await;
    assert_eq!(cost, Counters { bytes: WRITES * BLOCK, flushes: WRITES });
}

#[tokio::test]
async fn a_batch_of_64_costs_its_bytes_in_whole_blocks_and_one_flush() {
    let Some(card) = card() else { return };
    let mut log = Log::open(card, &host::env(), Options::default().linger).await;

    const BATCHES: u64 = 20;
    let before = log.card.counters();
    for _ in 0..BATCHES {
        log.append(64, Urgency::Urgent).await.unwrap();
    }
    let cost = log.card.counters() - before;
    log.close().await;
    // 64 x 256 bytes are four blocks. What makes log entries of them may not need more than one.
    assert_eq!(cost, Counters { bytes: BATCHES * 5 * BLOCK, flushes: BATCHES });
}

/// When something is written in a minute of an idle cluster of three servers and five nodes, in ms, and how urgently.
fn idle_minute() -> Vec<(u64, Urgency)> {
    let every = |period: u64, phase: u64, urgency| {
        (0..60_000 / period).map(move |round| (round * period + phase, urgency))
    };
    let mut writes = Vec::new();
    for controller in 0..3 {
        writes.extend(every(2_000, 600 * controller, Urgency::Lease));
    }
    for node in 0..5 {
        writes.extend(every(10_000, 2_000 * node + 50, Urgency::Lease));
    }
    for server in 0..3 {
        writes.extend(every(10_000, 3_300 * server + 100, Urgency::Lease));
        // The lease under which the key of the next line is written.
        writes.extend(every(10_000, 3_300 * server + 700, Urgency::Urgent));
        writes.extend(every(10_000, 3_300 * server + 710, Urgency::Lease));
    }
    writes.extend(every(20_000, 1_000, Urgency::Urgent));
    writes.sort_by_key(|(at, _)| *at);
    writes
}

/// The writes of each period of `linger`, which begins with the first that has nobody to wait for.
fn windows(writes: &[(u64, Urgency)], linger: u64) -> Vec<Vec<Urgency>> {
    let mut windows: Vec<(u64, Vec<Urgency>)> = Vec::new();
    for (at, urgency) in writes {
        match windows.last_mut() {
            Some((begin, open))
                if *at < *begin + linger && open.last() != Some(&Urgency::Urgent) =>
            {
                open.push(*urgency);
            }
            _ => windows.push((*at, vec![*urgency])),
        }
    }
    windows.into_iter().map(|(_, window)| window).collect()
}

/// Plays the minute on a log whose clock the test moves; what it cost the card.
async fn cost_of_idle_minute(linger: Duration) -> Option<Counters> {
    let clock = ManualClock::new();
    let env = Env { clock: std::sync::Arc::new(clock.clone()), ..host::env() };
    let mut log = Log::open(card()?, &env, linger).await;
    let before = log.card.counters();
    for window in windows(&idle_minute(), u64::try_from(linger.as_millis()).unwrap()) {
        let pending: Vec<_> = window.iter().map(|urgency| log.append(1, *urgency)).collect();
        if window.last() != Some(&Urgency::Urgent) {
            // Nobody urgent: the writer sleeps until the first has waited long enough.
            while !clock.advance_to_next() {
                tokio::task::yield_now().await;
            }
        }
        for durable in pending {
            durable.await.unwrap();
        }
    }
    let cost = log.card.counters() - before;
    log.close().await;
    Some(cost)
}

#[tokio::test]
async fn an_idle_minute_costs_one_block_and_one_flush_per_linger() {
    let minute = idle_minute();
    assert_eq!(minute.len(), 90 + 30 + 54 + 3, "2.95 writes a second");
    for (linger_ms, flushes) in [(250, 111), (1_000, 57)] {
        let Some(cost) = cost_of_idle_minute(Duration::from_millis(linger_ms)).await else {
            return;
        };
        assert_eq!(cost, Counters { bytes: flushes * BLOCK, flushes }, "{linger_ms} ms");
    }
}

/// The whole daemon: from the gRPC call to the card.
#[tokio::test]
async fn an_isolated_put_costs_one_block_and_one_flush() {
    let Some(card) = card() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Ours::start_at(&support::Options::default(), dir, card.mount_point().join("db"));
    let endpoint = server.endpoint();
    let mut client = etcd_client::Client::connect([endpoint.url()], None).await.unwrap();
    client.put("first", "write", None).await.unwrap();
    wait_for_filled_slots(&endpoint.metrics_address).await;
    card.settle();

    const PUTS: u64 = 30;
    let before = card.counters();
    for number in 0..PUTS {
        client.put(format!("key-{number}"), [b'x'; 400], None).await.unwrap();
    }
    let cost = card.counters() - before;
    drop(server);
    assert_eq!(cost, Counters { bytes: PUTS * BLOCK, flushes: PUTS });
}

/// The log fills segments ahead after a start; that is not what is counted.
async fn wait_for_filled_slots(metrics: &str) {
    let wanted = format!("k3s_server_wal_segments_spare {}", Options::default().slots_min - 1);
    let limit = std::time::Instant::now() + Duration::from_secs(120);
    while std::time::Instant::now() < limit {
        let page = support::etcd::http_get(metrics, "/metrics").unwrap_or_default();
        if page.lines().any(|line| line.trim_end() == wanted) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the log did not fill its segments");
}

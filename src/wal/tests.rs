//! The whole log in one process, with time and disk in the test's hands. Crashes are in `tests/crash`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::*;
use crate::env::{Clock, Env};
use crate::testkit::disk::{Failure, Fault, Operation, changes};
use crate::testkit::{self, FaultDisk, ManualClock};
use crate::types::{LogIndex, Term, WriteSeq};

const DIR: &str = "/data/wal";

struct Bench {
    disk: FaultDisk,
    clock: ManualClock,
    env: Env,
    wal: Wal,
    writer: tokio::task::JoinHandle<()>,
}

fn id(index: u64) -> LogId {
    LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) }
}

fn entry(index: u64, bytes: usize) -> Record {
    Record::Entry { id: id(index), payload: vec![b'p'; bytes].into() }
}

fn options() -> Options {
    Options {
        segment_bytes: 64 * 1024,
        slots_min: 2,
        slots_max: 3,
        fill_pause: Duration::ZERO,
        ..Options::default()
    }
}

async fn bench() -> Bench {
    let disk = FaultDisk::with_dir(Path::new("/data"));
    let clock = ManualClock::new();
    let env = testkit::env(&disk, &clock, 1);
    let (wal, recovery, writer) =
        Wal::open(&env, Path::new(DIR), Identity::default(), options()).await.unwrap();
    assert!(recovery.created);
    let writer = tokio::spawn(writer.run());
    settle().await;
    Bench { disk, clock, env, wal, writer }
}

/// Lets every task run until it waits.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

fn slot(number: usize) -> PathBuf {
    segment::path_of(Path::new(DIR), number)
}

/// Barriers the log has had.
fn barriers(bench: &Bench) -> u64 {
    bench.wal.stats().barriers
}

#[tokio::test]
async fn isolated_write_is_one_block_and_one_barrier() {
    let bench = bench().await;
    let before = bench.disk.counters(&slot(0));
    bench.wal.append(vec![entry(1, 300)], Urgency::Urgent, |_| ()).unwrap();
    settle().await;
    let after = bench.disk.counters(&slot(0));
    assert_eq!(after.bytes_written - before.bytes_written, 4096);
    assert_eq!(after.writes - before.writes, 1);
    assert_eq!(after.syncs - before.syncs, 1);
    assert_eq!(after.growths, before.growths);
}

#[tokio::test]
async fn lease_renewals_wait_for_company_and_anything_urgent_releases_them() {
    let bench = bench().await;
    let start = barriers(&bench);
    bench.wal.append(vec![entry(1, 10)], Urgency::Lease, |_| ()).unwrap();
    settle().await;
    bench.clock.advance(Duration::from_millis(249));
    settle().await;
    bench.wal.append(vec![entry(2, 10)], Urgency::Lease, |_| ()).unwrap();
    settle().await;
    assert_eq!(barriers(&bench), start, "nobody asked for a barrier yet");
    bench.clock.advance(Duration::from_millis(1));
    settle().await;
    assert_eq!(barriers(&bench), start + 1, "the linger counts from the first");

    bench.wal.append(vec![entry(3, 10)], Urgency::Lease, |_| ()).unwrap();
    settle().await;
    bench.wal.append(vec![Record::Vote(Vote::default())], Urgency::Lease, |_| ()).unwrap();
    settle().await;
    assert_eq!(barriers(&bench), start + 2, "a vote is urgent whatever the caller says");
}

#[tokio::test]
async fn what_arrives_during_a_barrier_shares_the_next_one() {
    let bench = bench().await;
    let start = barriers(&bench);
    let clock = bench.clock.clone();
    bench.disk.set_sync_delay(Some(Arc::new(move |_| clock.sleep(Duration::from_millis(100)))));
    let order: Arc<Mutex<Vec<(u64, WriteSeq)>>> = Arc::default();
    for index in 1..=50 {
        let order = Arc::clone(&order);
        let done = move |result: Result<Durable, Failed>| {
            order.lock().unwrap().push((index, result.unwrap().upto()));
        };
        bench.wal.append(vec![entry(index, 100)], Urgency::Urgent, done).unwrap();
        if index == 1 {
            settle().await;
        }
    }
    settle().await;
    assert_eq!(bench.wal.stats().stalled_for, Some(Duration::ZERO));
    bench.clock.advance(Duration::from_millis(99));
    settle().await;
    assert!(order.lock().unwrap().is_empty(), "acknowledged before the barrier returned");
    assert_eq!(bench.wal.stats().stalled_for, Some(Duration::from_millis(99)));
    bench.clock.advance(Duration::from_millis(1));
    settle().await;
    assert_eq!(*order.lock().unwrap(), [(1, WriteSeq::new(1))]);
    bench.clock.advance(Duration::from_millis(100));
    settle().await;
    let order = order.lock().unwrap();
    assert!(order.iter().map(|(index, _)| *index).eq(1..=50), "{order:?}");
    assert_eq!(order[49].1, WriteSeq::new(50));
    assert_eq!(barriers(&bench), start + 2);
    let stats = bench.wal.stats();
    assert_eq!((stats.stalled_for, stats.records), (None, 50));
    assert_eq!(stats.batch_records.sum, 50);
}

#[tokio::test]
async fn steady_state_creates_renames_and_grows_nothing() {
    let bench = bench().await;
    let mut index = 0;
    let mut work = async |rounds: usize| {
        for _ in 0..rounds {
            index += 1;
            let mut records = vec![entry(index, 1000)];
            if 5 < index {
                records.push(Record::Purge(id(index - 5)));
            }
            bench.wal.append(records, Urgency::Urgent, |_| ()).unwrap();
            assert!(bench.wal.flush().await.is_ok());
        }
    };
    work(100).await;
    settle().await;
    let files = bench.disk.files();
    let metadata = |op| changes(op) && !matches!(op, Operation::Write | Operation::Sync);
    let before = bench.disk.operations(metadata);
    let growths: u64 = files.iter().map(|path| bench.disk.counters(path).growths).sum();
    let (syncs, segments) = (bench.disk.operations(|op| op == Operation::Sync), bench.wal.stats());

    work(200).await;
    assert!(10 < bench.wal.stats().segments_started - segments.segments_started);
    assert_eq!(bench.disk.operations(metadata), before);
    assert_eq!(bench.disk.operations(|op| op == Operation::Sync) - syncs, 200, "a switch is free");
    let after: u64 = files.iter().map(|path| bench.disk.counters(path).growths).sum();
    assert_eq!(after, growths);
    assert_eq!(bench.disk.files(), files);
    let written = bench.wal.stats().bytes_written - segments.bytes_written;
    let switches = bench.wal.stats().segments_started - segments.segments_started;
    assert_eq!(written, 4096 * (200 + switches), "a block a frame, and a header a segment");
}

/// A slot that was taken for a segment whose first barrier is under way was taken for free by the filler, which
/// zeroed it. Nobody noticed in one thread and without delays, because the filler slept just then.
#[tokio::test]
async fn filler_keeps_away_from_the_slot_of_a_switch_under_way() {
    let disk = FaultDisk::with_dir(Path::new("/data"));
    let clock = ManualClock::new();
    let env = testkit::env(&disk, &clock, 1);
    let options = Options { slots_min: 9, ..options() };
    let (wal, _, writer) =
        Wal::open(&env, Path::new(DIR), Identity::default(), options).await.unwrap();
    tokio::spawn(writer.run());
    let sleeper = clock.clone();
    disk.set_sync_delay(Some(Arc::new(move |path| {
        let slot = segment::number_of(path).unwrap() as u64;
        sleeper.sleep(Duration::from_micros(500 + 300 * slot))
    })));
    for index in 1..=100 {
        wal.append(vec![entry(index, 10)], Urgency::Urgent, |_| ()).unwrap();
        let flush = tokio::spawn(wal.flush());
        while !flush.is_finished() {
            settle().await;
            clock.advance(Duration::from_micros(100));
        }
        assert!(flush.await.unwrap().is_ok());
        let report = inspect::verify(&disk, Path::new(DIR)).unwrap();
        assert_eq!(report.damage, None, "after entry {index}");
        assert_eq!(report.state.last, Some(id(index)));
    }
}

#[tokio::test]
async fn slots_beyond_the_maximum_go_when_they_are_free() {
    let bench = bench().await;
    for index in 1..=100 {
        bench.wal.append(vec![entry(index, 10)], Urgency::Urgent, |_| ()).unwrap();
        assert!(bench.wal.flush().await.is_ok());
    }
    settle().await;
    assert!(6 < bench.disk.files().len(), "{:?}", bench.disk.files());
    for index in 101..=130 {
        let records = vec![entry(index, 10), Record::Purge(id(index))];
        bench.wal.append(records, Urgency::Urgent, |_| ()).unwrap();
        assert!(bench.wal.flush().await.is_ok());
        settle().await;
    }
    assert_eq!(bench.disk.files().len(), 3, "{:?}", bench.disk.files());
}

#[tokio::test]
async fn entries_are_read_in_portions_from_memory_and_from_files() {
    let bench = bench().await;
    let (wal, _, writer) = {
        bench.wal.close().await.unwrap();
        let options = Options { cache_bytes: 1000, ..options() };
        Wal::open(&bench.env, Path::new(DIR), Identity::default(), options).await.unwrap()
    };
    tokio::spawn(writer.run());
    for index in 1..=40 {
        wal.append(vec![entry(index, 100)], Urgency::Urgent, |_| ()).unwrap();
        if index % 3 == 0 {
            assert!(wal.flush().await.is_ok());
        }
    }
    let read = |from: u64, to: u64, bytes| {
        let range = LogIndex::new(from)..LogIndex::new(to);
        let entries = wal.entries(range, bytes).unwrap();
        entries.iter().map(|entry| entry.id.index.get()).collect::<Vec<_>>()
    };
    assert_eq!(read(0, 4, u64::MAX), [1, 2, 3]);
    assert!(read(5, 5, u64::MAX).is_empty());
    assert_eq!(read(2, 100, 250), [2, 3], "as many as fit");
    assert_eq!(read(2, 100, 1), [2], "but at least one");
    assert_eq!(read(38, 100, u64::MAX), [38, 39, 40]);
    assert!(read(41, 100, u64::MAX).is_empty());
    assert_eq!(read(1, 41, u64::MAX), (1..=40).collect::<Vec<_>>(), "across files and memory");

    // Not durable, and visible all the same.
    wal.append(vec![Record::TruncateAfter(Some(id(20))), entry(21, 7)], Urgency::Lease, |_| ())
        .unwrap();
    wal.append(vec![Record::Purge(id(18))], Urgency::Lease, |_| ()).unwrap();
    assert_eq!(read(0, 100, u64::MAX), [19, 20, 21]);
    assert_eq!(wal.hard_state().last, Some(id(21)));
}

#[tokio::test]
async fn refused_append_changes_nothing_and_calls_nobody() {
    let bench = bench().await;
    let called = Arc::new(Mutex::new(0));
    let count = |called: &Arc<Mutex<i32>>| {
        let called = Arc::clone(called);
        move |_: Result<Durable, Failed>| *called.lock().unwrap() += 1
    };
    bench.wal.append(vec![entry(1, 1)], Urgency::Urgent, count(&called)).unwrap();
    let before = bench.wal.hard_state();
    let gap = bench.wal.append(vec![entry(2, 1), entry(4, 1)], Urgency::Urgent, count(&called));
    assert_eq!(gap, Err(Refused::Gap { found: id(4), last: id(2) }));
    let large = bench.wal.append(vec![entry(2, 70_000)], Urgency::Urgent, count(&called));
    assert!(matches!(large, Err(Refused::TooLarge { found: 70_029, .. })), "{large:?}");
    assert_eq!(bench.wal.hard_state(), before);
    assert!(bench.wal.flush().await.is_ok());
    assert_eq!(*called.lock().unwrap(), 1);

    bench.wal.append(Vec::new(), Urgency::Urgent, count(&called)).unwrap();
    assert_eq!(*called.lock().unwrap(), 2, "nothing to wait for");
}

#[tokio::test]
async fn more_than_a_frame_goes_out_in_several_and_is_acknowledged_as_a_whole() {
    let bench = bench().await;
    let start = barriers(&bench);
    let mut noise = testkit::Random::new(9);
    let records = (1..=20)
        .map(|index| {
            let mut payload = vec![0; 9000];
            noise.fill(&mut payload);
            Record::Entry { id: id(index), payload: payload.into() }
        })
        .collect();
    let upto = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&upto);
    let done = move |result: Result<Durable, Failed>| noted.lock().unwrap().push(result.unwrap());
    bench.wal.append(records, Urgency::Urgent, done).unwrap();
    assert!(bench.wal.flush().await.is_ok());
    assert_eq!(barriers(&bench) - start, 4, "six entries fit a frame of these small slots");
    let upto: Vec<_> = upto.lock().unwrap().iter().map(|durable| durable.upto()).collect();
    assert_eq!(upto, [WriteSeq::new(20)]);
}

#[tokio::test]
async fn closing_writes_what_lingers_and_refuses_what_comes_later() {
    let bench = bench().await;
    bench.wal.append(vec![entry(1, 10)], Urgency::Lease, |_| ()).unwrap();
    bench.wal.append(vec![Record::Committed(id(1))], Urgency::Lease, |_| ()).unwrap();
    bench.wal.close().await.unwrap();
    bench.writer.await.unwrap();
    assert!(matches!(bench.wal.flush().await, Err(Failed::Closed)));
    bench.wal.close().await.unwrap();

    let open = Wal::open(&bench.env, Path::new(DIR), Identity::default(), options());
    let (wal, recovery, _writer) = open.await.unwrap();
    assert!(recovery.clean && !recovery.created);
    assert_eq!(wal.hard_state().committed, Some(id(1)));
}

#[tokio::test]
async fn dropping_the_last_handle_closes_and_dropping_the_writer_fails() {
    let Bench { env, wal, writer, .. } = bench().await;
    wal.append(vec![entry(1, 10)], Urgency::Lease, |_| ()).unwrap();
    drop(wal.clone());
    drop(wal);
    writer.await.unwrap();

    let open = Wal::open(&env, Path::new(DIR), Identity::default(), options());
    let (wal, recovery, writer) = open.await.unwrap();
    assert!(recovery.clean);
    assert_eq!(wal.hard_state().last, Some(id(1)));
    let waiting = wal.flush();
    wal.append(vec![entry(2, 10)], Urgency::Urgent, |result| assert!(result.is_err())).unwrap();
    let failing = wal.flush();
    drop(writer);
    assert!(waiting.await.is_ok(), "there was nothing to wait for");
    assert!(matches!(failing.await, Err(Failed::Closed)));
    assert!(matches!(wal.failed(), Some(Failed::Closed)));
}

#[tokio::test]
async fn filling_ahead_that_fails_is_tried_again_when_nobody_waits() {
    let bench = bench().await;
    bench.disk.fail(Fault {
        nth: 1,
        only: |op| op == Operation::SyncDir,
        failure: Failure::Enospc,
        for_good: true,
    });
    for index in 1..=10 {
        bench.wal.append(vec![entry(index, 10)], Urgency::Urgent, |_| ()).unwrap();
        assert!(bench.wal.flush().await.is_ok());
    }
    settle().await;
    // The spare is there; the next is wanted when that is in use and half full.
    for index in 11..=24 {
        bench.wal.append(vec![entry(index, 10)], Urgency::Urgent, |_| ()).unwrap();
        assert!(bench.wal.flush().await.is_ok());
        settle().await;
    }
    assert_eq!(bench.wal.stats().fill_failures, 1);
    assert_eq!(bench.wal.stats().spare_slots, 0);
    bench.disk.heal();
    bench.clock.advance(Duration::from_secs(5));
    settle().await;
    assert_eq!(bench.wal.stats().spare_slots, 1);
    assert!(bench.wal.failed().is_none());
}

#[tokio::test]
async fn writer_runs_on_threads_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let env = crate::env::host::env();
    let path = dir.path().join("wal");
    let options = Options { segment_bytes: 64 * 1024, slots_min: 2, ..Options::default() };
    let identity = Identity { cluster: ClusterId::new(1), node: NodeId::new(2) };
    let (wal, _, writer) = Wal::open(&env, &path, identity, options).await.unwrap();
    let thread = writer.spawn_thread().unwrap();
    for index in 1..=60 {
        wal.append(vec![entry(index, 400)], Urgency::Urgent, |_| ()).unwrap();
        assert!(wal.flush().await.is_ok());
    }
    wal.close().await.unwrap();
    thread.join().unwrap();

    let (wal, recovery, _writer) = Wal::open(&env, &path, identity, options).await.unwrap();
    assert!(recovery.clean);
    let entries = wal.entries(LogIndex::new(0)..LogIndex::new(100), u64::MAX).unwrap();
    assert_eq!(entries.len(), 60);
    assert!(env.disk.list(&path).unwrap().len() < 10);
}

#[tokio::test]
async fn durable_state_follows_the_barrier_and_not_the_append() {
    let bench = bench().await;
    bench.wal.append(vec![entry(1, 10)], Urgency::Lease, |_| ()).unwrap();
    settle().await;
    assert_eq!(bench.wal.hard_state().last, Some(id(1)));
    assert_eq!(bench.wal.durable().last, None, "still waiting for company");

    let vote = Vote { term: Term::new(2), node: NodeId::new(1), committed: false };
    let durable = Arc::new(Mutex::new(None));
    let (wal, seen) = (bench.wal.clone(), Arc::clone(&durable));
    let look = move |_| *seen.lock().unwrap() = Some(wal.durable());
    bench.wal.append(vec![Record::Vote(vote)], Urgency::Urgent, look).unwrap();
    settle().await;
    let seen = durable.lock().unwrap().unwrap();
    assert_eq!((seen.last, seen.vote), (Some(id(1)), Some(vote)), "known before anybody is told");
}

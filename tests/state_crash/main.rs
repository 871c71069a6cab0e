//! What the state file holds after power cuts, flipped bits, failing and stalling cards.
//!
//! `STATE_CRASH_ROUNDS` and `STATE_CRASH_SEED` choose how many power-cut runs, and from which seed on.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and test sizes are small"
)]

mod damage;
mod disk;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use k3s_server::env::{Disk, DiskFile, Env, Open};
use k3s_server::mvcc::backend::{
    self, Backend, DamagedBlock, Epoch, Failure, OpenError, Options, RebuildReason, TableOrigin,
};
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition,
};

use disk::{CardDisk, Chance};

const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("t");
const PATH: &str = "db/state.redb";
const TABLE_PATHS: [&str; 2] = ["db/state.redb.crc.0", "db/state.redb.crc.1"];

type Contents = BTreeMap<u64, Vec<u8>>;

/// A database whose drain runs only when polled.
struct Node {
    database: Database,
    backend: Backend,
    drain: Running,
}

type Running = Pin<Box<dyn Future<Output = Result<(), Failure>>>>;

impl Node {
    fn open(env: &Env, options: Options) -> Result<Self, String> {
        let (backend, drain) =
            Backend::open(env, Path::new(PATH), options).map_err(|error| error.to_string())?;
        let database = redb_over(backend.clone()).map_err(|error| error.to_string())?;
        Ok(Self { database, backend, drain: Box::pin(drain.run()) })
    }

    fn poll(&mut self, times: u64) -> Option<Result<(), Failure>> {
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..times {
            if let Poll::Ready(result) = self.drain.as_mut().poll(&mut context) {
                return Some(result);
            }
        }
        None
    }

    fn is_durable(&self, epoch: Epoch) -> bool {
        is_ready_ok(self.backend.wait_durable(epoch))
    }

    /// Closes redb and drains everything.
    fn close(self) -> Result<(), Failure> {
        let Self { database, backend, drain } = self;
        drop(database);
        let result = finish(drain);
        let failure = backend.failure().borrow().clone();
        assert_eq!(is_ready_ok(backend.drained()), result.is_ok() && failure.is_none());
        result.and(failure.map_or(Ok(()), Err))
    }
}

fn finish(mut drain: Running) -> Result<(), Failure> {
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..1_000_000 {
        if let Poll::Ready(result) = drain.as_mut().poll(&mut context) {
            return result;
        }
    }
    panic!("the drain does not finish");
}

fn is_ready_ok(future: impl Future<Output = Result<(), Failure>>) -> bool {
    matches!(pin!(future).poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(())))
}

fn redb_over(backend: impl StorageBackend) -> Result<Database, redb::DatabaseError> {
    Database::builder().set_cache_size(96 << 10).create_with_backend(backend)
}

fn read_all(database: &Database) -> Result<Contents, redb::Error> {
    let read = database.begin_read()?;
    let table = match read.open_table(TABLE) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Contents::new()),
        other => other?,
    };
    let mut contents = Contents::new();
    for item in table.iter()? {
        let (key, value) = item?;
        contents.insert(key.value(), value.value().to_vec());
    }
    Ok(contents)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commit {
    None,
    OnePhase,
    TwoPhase,
    QuickRepair,
}

fn commit(
    database: &Database,
    how: Commit,
    changes: &[(u64, Option<Vec<u8>>)],
) -> Result<(), redb::Error> {
    let mut write = database.begin_write()?;
    write.set_durability(match how {
        Commit::None => Durability::None,
        Commit::OnePhase | Commit::TwoPhase | Commit::QuickRepair => Durability::Immediate,
    })?;
    write.set_two_phase_commit(how == Commit::TwoPhase);
    write.set_quick_repair(how == Commit::QuickRepair);
    {
        let mut table = write.open_table(TABLE)?;
        for (key, value) in changes {
            match value {
                Some(value) => table.insert(key, value.as_slice())?,
                None => table.remove(key)?,
            };
        }
    }
    write.commit()?;
    Ok(())
}

/// What a client was promised, and what else may be found.
struct Promises {
    /// States of durable commits, finished or tried; the first is what was found at the start.
    candidates: Vec<Contents>,
    /// Candidates before this one must not come back.
    floor: usize,
    waiting: Vec<(Epoch, usize)>,
    current: Contents,
}

impl Promises {
    fn new(found: Contents) -> Self {
        Self { candidates: vec![found.clone()], floor: 0, waiting: Vec::new(), current: found }
    }

    fn check_durable(&mut self, node: &Node) {
        let (done, waiting) =
            self.waiting.drain(..).partition(|(epoch, _)| node.is_durable(*epoch));
        self.waiting = waiting;
        for (_, candidate) in Vec::from_iter::<Vec<(Epoch, usize)>>(done) {
            self.floor = self.floor.max(candidate);
        }
    }

    fn assert_allows(&self, found: &Contents, seed: u64) {
        let allowed = &self.candidates[self.floor..];
        assert!(
            allowed.contains(found),
            "seed {seed}: keys and markers {:?} are none of the {} allowed states, newest {:?}; \
             older durable state: {}",
            summary(found),
            allowed.len(),
            summary(allowed.last().unwrap()),
            self.candidates.contains(found),
        );
    }
}

fn summary(contents: &Contents) -> Vec<(u64, usize, u8)> {
    contents.iter().map(|(key, value)| (*key, value.len(), *value.last().unwrap_or(&0))).collect()
}

fn options(chance: &mut Chance) -> Options {
    let epoch_bytes_max = [16 << 10, 64 << 10, 8 << 20][chance.below(3) as usize];
    Options { epoch_bytes_max, burst_bytes: 64 << 10, chunk_bytes: 16 << 10, ..Options::default() }
}

fn changes(chance: &mut Chance, marker: &mut u64) -> Vec<(u64, Option<Vec<u8>>)> {
    *marker += 1;
    let mut changes = vec![(0, Some(marker.to_le_bytes().to_vec()))];
    for _ in 0..chance.below(5) {
        let key = 1 + chance.below(12);
        let len = [20, 600, 3_000, 30_000][chance.below(4) as usize];
        let value = (!chance.one_in(4)).then(|| vec![chance.next() as u8; len]);
        changes.push((key, value));
    }
    changes
}

/// Random transactions until the power fails or `transactions` are done. True if it closed in time.
fn live(
    mut node: Node,
    chance: &mut Chance,
    promises: &mut Promises,
    marker: &mut u64,
    transactions: u64,
) -> bool {
    for _ in 0..transactions {
        let how = match chance.below(8) {
            0 => Commit::OnePhase,
            1 => Commit::TwoPhase,
            2 => Commit::QuickRepair,
            _ => Commit::None,
        };
        let changes = changes(chance, marker);
        let mut next = promises.current.clone();
        for (key, value) in &changes {
            match value {
                Some(value) => next.insert(*key, value.clone()),
                None => next.remove(key),
            };
        }
        if how != Commit::None {
            promises.candidates.push(next.clone());
        }
        if commit(&node.database, how, &changes).is_err() {
            return false;
        }
        promises.current = next;
        if how != Commit::None {
            promises.waiting.push((node.backend.epoch(), promises.candidates.len() - 1));
        }
        let polls = [0, 1, 5, 200][chance.below(4) as usize];
        if node.poll(polls).is_some() {
            return false;
        }
        promises.check_durable(&node);
        if chance.one_in(6) {
            let found = read_all(&node.database);
            if found.map(|found| found != promises.current).unwrap_or(false) {
                panic!("the live database lost a write");
            }
        }
    }
    promises.candidates.push(promises.current.clone());
    let closed = node.close().is_ok();
    if closed {
        promises.floor = promises.candidates.len() - 1;
    }
    closed
}

/// One database through a few lives, each ended by a power cut or a clean stop.
fn power_cut_run(seed: u64) -> Seen {
    let mut chance = Chance::new(seed);
    let disk = CardDisk::default();
    let env = disk.env(seed);
    let mut promises = Promises::new(Contents::new());
    let mut marker = 0;
    let mut seen = Seen::default();
    for _ in 0..4 {
        // A later life may be cut while it recovers from the one before.
        let cut = match chance.below(4) {
            0 => 1 + chance.below(30),
            1 => 1 + chance.below(150),
            _ => 1 + chance.below(600),
        };
        disk.cut_after(cut);
        if let Ok(node) = Node::open(&env, options(&mut chance)) {
            seen.torn += u32::from(node.backend.report().torn_blocks != 0);
            seen.healed += u32::from(node.backend.report().header_restored);
            if let Ok(found) = read_all(&node.database) {
                promises.assert_allows(&found, seed);
                promises = Promises::new(found);
            }
            let transactions = chance.below(60);
            seen.closed +=
                u32::from(live(node, &mut chance, &mut promises, &mut marker, transactions));
        }
        if chance.one_in(3) {
            // The process was killed; what the kernel had not written yet is still to be lost.
            disk.restart();
        } else {
            disk.power_on(&mut chance);
        }
    }
    disk.restart();
    check_at_rest(&env, &promises, seed);
    seen
}

fn check_at_rest(env: &Env, promises: &Promises, seed: u64) {
    let mut node =
        Node::open(env, Options::default()).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    assert!(
        !matches!(node.backend.report().table, TableOrigin::Rebuilt(_)),
        "seed {seed}: a power cut made the table useless: {:?}",
        node.backend.report()
    );
    let found = read_all(&node.database).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    promises.assert_allows(&found, seed);
    assert!(node.database.check_integrity().unwrap(), "seed {seed}: integrity");
    assert!(node.poll(10_000).is_none());
    let damaged = node.backend.scrub(0, u32::MAX).unwrap().damaged;
    assert!(damaged.is_empty(), "seed {seed}: {damaged:?}");
    node.close().unwrap();
}

/// That the runs reach the interesting cases at all.
#[derive(Default)]
struct Seen {
    torn: u32,
    healed: u32,
    closed: u32,
}

fn number_from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
fn after_any_power_cut_the_state_is_one_that_was_promised() {
    let rounds = number_from_environment("STATE_CRASH_ROUNDS", 1_000);
    let first = number_from_environment("STATE_CRASH_SEED", 1);
    let mut seen = Seen::default();
    for seed in first..first + rounds {
        let one = power_cut_run(seed);
        seen.torn += one.torn;
        seen.healed += one.healed;
        seen.closed += one.closed;
    }
    eprintln!(
        "{rounds} runs from seed {first}: {} starts on torn blocks, {} restored headers, {} clean closes",
        seen.torn, seen.healed, seen.closed
    );
    assert!(rounds < 500 || (seen.torn > 0 && seen.healed > 0 && seen.closed > 0));
}

/// A cleanly closed database with a few pages in each tree, and what it holds.
fn small_database(disk: &CardDisk) -> Contents {
    let mut node = Node::open(&disk.env(1), Options::default()).unwrap();
    let mut contents = Contents::new();
    for round in 0..6_u64 {
        let changes: Vec<_> = (round..round + 12)
            .map(|key| (key, Some(vec![(key * 7 + round) as u8; 40 + key as usize * 90])))
            .collect();
        for (key, value) in &changes {
            contents.insert(*key, value.clone().unwrap());
        }
        commit(
            &node.database,
            if round == 3 { Commit::QuickRepair } else { Commit::None },
            &changes,
        )
        .unwrap();
        node.poll(50);
    }
    node.close().unwrap();
    contents
}

/// Opens, reads everything and closes. What is wrong, if it is noticed.
fn open_and_read(disk: &CardDisk) -> Result<Contents, String> {
    let node = Node::open(&disk.env(2), Options::default())?;
    let found = read_all(&node.database).map_err(|error| error.to_string())?;
    node.close().map_err(|error| error.to_string())?;
    Ok(found)
}

/// The workload of the failure tests. Stops at the first error; the promises tell what may be found then.
fn work_until_error(disk: &CardDisk, promises: &mut Promises) -> Result<(), String> {
    let mut node = Node::open(&disk.env(3), Options::default())?;
    let mut chance = Chance::new(5);
    let mut marker = 0;
    for round in 0..12 {
        let how = if round % 4 == 3 { Commit::QuickRepair } else { Commit::None };
        let changes = changes(&mut chance, &mut marker);
        let mut next = promises.current.clone();
        for (key, value) in &changes {
            match value {
                Some(value) => next.insert(*key, value.clone()),
                None => next.remove(key),
            };
        }
        if how != Commit::None {
            promises.candidates.push(next.clone());
        }
        commit(&node.database, how, &changes).map_err(|error| error.to_string())?;
        promises.current = next;
        if how != Commit::None {
            promises.waiting.push((node.backend.epoch(), promises.candidates.len() - 1));
        }
        let result = node.poll(9);
        promises.check_durable(&node);
        if let Some(Err(failure)) = result {
            let reported = node.backend.failure().borrow().clone().unwrap();
            assert_eq!(reported.to_string(), failure.to_string());
            let refused = commit(&node.database, Commit::None, &changes)
                .and_then(|()| commit(&node.database, Commit::OnePhase, &changes));
            assert!(refused.is_err(), "the backend went on after: {failure}");
            return Err(failure.to_string());
        }
    }
    promises.candidates.push(promises.current.clone());
    node.close().map_err(|error| error.to_string())?;
    promises.floor = promises.candidates.len() - 1;
    Ok(())
}

#[test]
fn any_failing_operation_stops_the_backend_and_loses_nothing_promised() {
    for kind in [io::ErrorKind::Other, io::ErrorKind::StorageFull] {
        for for_good in [false, true] {
            for power_cut in [false, true] {
                let mut k = 0;
                loop {
                    let disk = CardDisk::default();
                    let mut promises = Promises::new(Contents::new());
                    disk.fail_after(k, kind, for_good);
                    let result = work_until_error(&disk, &mut promises);
                    let failed = disk.heal();
                    // A write that was refused for lack of room is tried again, and so is a read, whatever the reason.
                    let again = kind == io::ErrorKind::StorageFull || disk.has_failed_to_read();
                    let forgiven = again && !for_good;
                    assert!(result.is_err() == failed || forgiven, "operation {k}: {result:?}");
                    if !failed {
                        break;
                    }
                    if power_cut {
                        disk.power_on(&mut Chance::new(k + 1));
                    }
                    check_at_rest(&disk.env(4), &promises, k);
                    k += 1;
                }
                assert!(k > 40, "only {k} operations");
            }
        }
    }
}

#[test]
fn full_card_is_told_from_other_failures() {
    let disk = CardDisk::default();
    let mut node = Node::open(&disk.env(1), Options::default()).unwrap();
    commit(&node.database, Commit::QuickRepair, &[(1, Some(vec![1]))]).unwrap();
    node.poll(10_000);
    commit(&node.database, Commit::QuickRepair, &[(1, Some(vec![2]))]).unwrap();
    let last = node.backend.epoch();
    disk.fail_after(0, io::ErrorKind::StorageFull, true);

    assert!(node.poll(1_000).is_none(), "a full card is no failure");
    assert!(!node.is_durable(last));
    assert!(node.backend.failure().borrow().is_none());
    disk.heal();
    node.poll(10_000);
    assert!(node.is_durable(last));

    commit(&node.database, Commit::QuickRepair, &[(1, Some(vec![3]))]).unwrap();
    disk.fail_after(0, io::ErrorKind::StorageFull, true);
    assert!(node.poll(1_000).is_none());
    let failure = node.close().unwrap_err();
    assert!(failure.is_full(), "{failure}");
    assert!(!Failure::Abandoned.is_full());
}

#[test]
fn stalled_card_delays_no_commit_and_no_read() {
    let disk = CardDisk::default();
    let mut node = Node::open(&disk.env(1), Options::default()).unwrap();
    commit(&node.database, Commit::QuickRepair, &[(1, Some(vec![1]))]).unwrap();
    node.poll(10_000);
    disk.stall(true);
    let barriers = disk.barriers();

    for round in 0..200_u64 {
        let how = if round % 20 == 0 { Commit::QuickRepair } else { Commit::None };
        commit(&node.database, how, &[(round, Some(vec![round as u8; 5_000]))]).unwrap();
        assert!(node.poll(1).is_none());
    }

    let last = node.backend.epoch();
    assert_eq!(read_all(&node.database).unwrap().len(), 200);
    assert_eq!(disk.barriers(), barriers);
    assert!(!node.is_durable(last));
    disk.stall(false);
    node.poll(100_000);
    assert!(node.is_durable(last));
    node.close().unwrap();
}

#[test]
fn writes_wait_for_a_stalled_card_only_beyond_the_memory_bound() {
    let disk = CardDisk::default();
    let options =
        Options { held_bytes_max: 1 << 20, epoch_bytes_max: 256 << 10, ..Options::default() };
    let (backend, drain) = Backend::open(&disk.env(1), Path::new(PATH), options).unwrap();
    let thread = drain.spawn_thread().unwrap();
    disk.stall(true);

    let writer = {
        let backend = backend.clone();
        std::thread::spawn(move || {
            let page = vec![7; 4096];
            backend.set_len(1024 * 4096).unwrap();
            (0..1024).for_each(|block| backend.write(block * 4096, &page).unwrap());
            backend.close().unwrap();
        })
    };
    while backend.stats().waits == 0 {
        assert!(!writer.is_finished(), "the writer never waited");
        std::thread::yield_now();
    }
    let stats = backend.stats();
    assert!(stats.held_bytes <= options.held_bytes_max, "{stats:?}");
    assert!(stats.held_bytes + 4096 > options.held_bytes_max, "{stats:?}");

    disk.stall(false);
    writer.join().unwrap();
    thread.join().unwrap().unwrap();
    assert!(backend.stats().held_bytes_peak <= options.held_bytes_max);
    assert_eq!(backend.stats().held_bytes, 0);
}

#[test]
fn waiting_writer_is_released_by_a_failure() {
    let disk = CardDisk::default();
    let options =
        Options { held_bytes_max: 64 << 10, epoch_bytes_max: 32 << 10, ..Options::default() };
    let (backend, drain) = Backend::open(&disk.env(1), Path::new(PATH), options).unwrap();
    let thread = drain.spawn_thread().unwrap();
    disk.stall(true);
    let writer = {
        let backend = backend.clone();
        std::thread::spawn(move || {
            let page = vec![7; 4096];
            backend.set_len(64 * 4096)?;
            (0..64).try_for_each(|block| backend.write(block * 4096, &page))
        })
    };
    while backend.stats().waits == 0 {
        std::thread::yield_now();
    }

    disk.fail_after(0, io::ErrorKind::Other, true);
    disk.stall(false);

    let error = writer.join().unwrap().unwrap_err();
    let failure = error.get_ref().unwrap().downcast_ref::<Failure>().unwrap();
    assert!(matches!(failure, Failure::Io { .. }), "{failure}");
    thread.join().unwrap().unwrap_err();
    assert!(backend.close().is_err());
}

#[test]
fn block_drained_between_planning_a_read_and_reading_is_not_called_damaged() {
    let disk = CardDisk::default();
    let (backend, drain) =
        Backend::open(&disk.env(1), Path::new(PATH), Options::default()).unwrap();
    let drain = Arc::new(Mutex::new(Box::pin(drain.run())));
    let write = {
        let (backend, drain) = (backend.clone(), drain.clone());
        move |fill: u8| {
            backend.write(4096, &[fill; 4096]).unwrap();
            backend.sync_data().unwrap();
            let mut context = Context::from_waker(Waker::noop());
            let mut drain = drain.lock().unwrap();
            (0..100).for_each(|_| assert!(drain.as_mut().poll(&mut context).is_pending()));
            assert_eq!(backend.stats().held_bytes, 0);
        }
    };
    write(1);
    disk.before_next_read(move || write(2));

    let mut bytes = vec![0; 4096];
    backend.read(4096, &mut bytes).unwrap();

    assert_eq!(bytes, [2; 4096]);
    assert!(backend.failure().borrow().is_none());
}

#[test]
fn blocks_rewritten_and_drained_while_they_are_read_are_read_whole() {
    const BLOCKS: u64 = 8;
    let disk = CardDisk::default();
    let options = Options { epoch_bytes_max: 8 << 10, ..Options::default() };
    let (backend, drain) = Backend::open(&disk.env(1), Path::new(PATH), options).unwrap();
    let thread = drain.spawn_thread().unwrap();
    backend.set_len(BLOCKS * 4096).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let writer = {
        let (backend, done) = (backend.clone(), done.clone());
        std::thread::spawn(move || {
            let mut round = 0_u64;
            while !done.load(Ordering::Relaxed) {
                round += 1;
                backend.write(round % BLOCKS * 4096, &[round as u8; 4096]).unwrap();
                std::thread::yield_now();
            }
        })
    };
    let mut bytes = vec![0; 4096];
    let mut reads = 0;
    // Most reads are answered from memory; go on until enough were not.
    while backend.stats().blocks_read < 3_000 {
        reads += 1;
        backend.read(4096 * (1 + reads % (BLOCKS - 1)), &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    }
    done.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    backend.close().unwrap();
    thread.join().unwrap().unwrap();
}

#[test]
fn database_dropped_over_a_threaded_drain_is_durable_when_drop_returns() {
    let disk = CardDisk::default();
    let (backend, drain) =
        Backend::open(&disk.env(1), Path::new(PATH), Options::default()).unwrap();
    let thread = drain.spawn_thread().unwrap();
    let database = redb_over(backend).unwrap();
    commit(&database, Commit::None, &[(4, Some(vec![4; 100]))]).unwrap();
    drop(database);

    disk.power_on(&mut Chance::new(3));

    assert_eq!(open_and_read(&disk).unwrap(), Contents::from([(4, vec![4; 100])]));
    thread.join().unwrap().unwrap();
}

#[test]
fn dropped_drain_is_reported_to_whoever_waits() {
    let disk = CardDisk::default();
    let (backend, drain) =
        Backend::open(&disk.env(1), Path::new(PATH), Options::default()).unwrap();
    backend.set_len(4096).unwrap();
    backend.sync_data().unwrap();
    let waiting = backend.wait_durable(backend.epoch());

    drop(drain);

    let result = pin!(waiting).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(result, Poll::Ready(Err(Failure::Abandoned))));
    assert!(backend.write(0, &[0; 4096]).is_err());
}

#[test]
fn file_cut_short_is_refused() {
    let disk = CardDisk::default();
    small_database(&disk);
    let blocks = disk.edit(Path::new(PATH), |bytes| {
        bytes.truncate(bytes.len() - 4096);
        bytes.len() as u32 / 4096
    });
    let error = Backend::open(&disk.env(2), Path::new(PATH), Options::default()).unwrap_err();
    assert!(
        matches!(error, OpenError::Length { found, expected } if found == blocks && expected == blocks + 1),
        "{error}"
    );

    disk.edit(Path::new(PATH), |bytes| bytes.truncate(5_000));
    let error = Backend::open(&disk.env(2), Path::new(PATH), Options::default()).unwrap_err();
    assert!(matches!(error, OpenError::NotBlocks(5_000)), "{error}");
}

#[test]
fn installed_database_replaces_another_one_at_any_power_cut() {
    let master = CardDisk::default();
    let old = small_database(&master);
    let (from, to) = (Path::new("db/new.redb"), Path::new(PATH));
    let new = Contents::from([(1, vec![1; 1])]);
    {
        let env = master.env(9);
        let (backend, drain) = Backend::open(&env, from, Options::default()).unwrap();
        let database = redb_over(backend).unwrap();
        commit(&database, Commit::QuickRepair, &[(1, Some(vec![1; 1]))]).unwrap();
        drop(database);
        finish(Box::pin(drain.run())).unwrap();
    }
    master.settle();
    let mut seen = [0, 0];
    for cut in 0..8 {
        for seed in 0..4 {
            let disk = master.copy();
            disk.cut_after(cut);
            let done = backend::install(&disk.env(1), from, to).is_ok();
            disk.power_on(&mut Chance::new(seed));
            let found = open_and_read(&disk).unwrap();
            assert!(found == new || (found == old && !done), "cut {cut}: {found:?}");
            seen[usize::from(found == new)] += 1;
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[test]
fn removed_database_leaves_nothing() {
    let disk = CardDisk::default();
    small_database(&disk);
    backend::remove(&disk.env(1), Path::new(PATH)).unwrap();
    assert!(disk.list(Path::new("db")).unwrap().is_empty());
}

/// What redb does on its own: a barrier is a barrier.
#[derive(Debug)]
struct Plain(Arc<dyn DiskFile>);

impl Plain {
    fn create(env: &Env, path: &Path) -> Self {
        Self(env.disk.open(path, Open::Create).unwrap())
    }
}

impl StorageBackend for Plain {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut sync = self.0.sync();
        loop {
            if let Poll::Ready(result) = sync.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return result;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(data, offset)
    }
}

/// Checkpoints of an idle cluster: a few hundred small overwrites each. (bytes, barriers) per checkpoint.
fn idle_checkpoints(
    disk: &CardDisk,
    database: &Database,
    mut drain: impl FnMut(),
    megabytes: u64,
) -> (u64, u64) {
    for chunk in 0..megabytes {
        let changes: Vec<_> =
            (0..256).map(|key| (chunk * 256 + key, Some(vec![chunk as u8; 4_000]))).collect();
        commit(database, Commit::None, &changes).unwrap();
    }
    commit(database, Commit::QuickRepair, &[]).unwrap();
    drain();
    const CHECKPOINTS: u64 = 40;
    let (bytes, barriers) = (disk.written(), disk.barriers());
    let mut chance = Chance::new(11);
    for round in 0..CHECKPOINTS {
        for _ in 0..40 {
            let key = chance.below(megabytes * 256);
            commit(database, Commit::None, &[(key, Some(vec![round as u8; 400]))]).unwrap();
        }
        commit(database, Commit::QuickRepair, &[]).unwrap();
        drain();
    }
    ((disk.written() - bytes) / CHECKPOINTS, (disk.barriers() - barriers) / CHECKPOINTS)
}

/// `STATE_CRASH_MIB=100` measures a database of that size.
#[test]
fn table_adds_little_to_what_a_checkpoint_writes() {
    let megabytes = number_from_environment("STATE_CRASH_MIB", 16);
    let plain_disk = CardDisk::default();
    let plain = redb_over(Plain::create(&plain_disk.env(1), Path::new(PATH))).unwrap();
    let (plain_bytes, plain_barriers) = idle_checkpoints(&plain_disk, &plain, || (), megabytes);

    let disk = CardDisk::default();
    let options = Options { held_bytes_max: usize::MAX, ..Options::default() };
    let Node { database, backend, mut drain } = Node::open(&disk.env(1), options).unwrap();
    let poll = || {
        let mut context = Context::from_waker(Waker::noop());
        while backend.stats().held_bytes != 0 {
            assert!(drain.as_mut().poll(&mut context).is_pending());
        }
    };
    let (bytes, barriers) = idle_checkpoints(&disk, &database, poll, megabytes);

    let stats = backend.stats();
    eprintln!(
        "{megabytes} MiB: plain file {plain_bytes} B and {plain_barriers} barriers a checkpoint, \
         backend {bytes} B and {barriers} barriers; in all {stats:?}"
    );
    assert!(bytes <= plain_bytes + 64 * 1024, "{bytes} against {plain_bytes}");
    assert!(barriers <= plain_barriers + 3, "{barriers} against {plain_barriers}");
}

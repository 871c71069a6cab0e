//! What the state file holds after power cuts, flipped bits, failing and stalling cards.
//!
//! `STATE_CRASH_ROUNDS` and `STATE_CRASH_SEED` choose how many power-cut runs, and from which seed on.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and test sizes are small"
)]

mod disk;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use k3s_server::env::{Disk, DiskFile, Env, Open};
use k3s_server::mvcc::backend::{
    self, Backend, DamagedBlock, Drain, Epoch, Failure, OpenError, Operation, Options,
    RebuildReason, TableOrigin,
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
        assert_eq!(is_ready_ok(backend.drained()), result.is_ok());
        result
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
    for life in 0..4 {
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
        disk.power_on(&mut chance);
        let _ = life;
    }
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
    node.backend.scrub(0, u32::MAX).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
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

//! Thousands of random commands: the store against the model, and the store against itself.

use pb::compare::{CompareTarget, TargetUnion};

use super::model::Model;
use super::*;

const KEYS: [&str; 9] = ["a", "ab", "abc", "b", "ba", "c", "d", "e", "f"];
const ENDS: [&str; 7] = ["", "", "", "\0", "b", "c", "e"];

/// splitmix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn key(&mut self) -> Bytes {
        b(KEYS[self.below(KEYS.len() as u64) as usize])
    }

    fn end(&mut self) -> Bytes {
        b(ENDS[self.below(ENDS.len() as u64) as usize])
    }

    /// Near the newest revision, sometimes beyond, sometimes long compacted.
    fn revision(&mut self, newest: i64) -> i64 {
        match self.below(10) {
            0..4 => 0,
            4 => newest + 1,
            5 => -(self.below(3) as i64),
            _ => newest - self.below(60) as i64,
        }
    }

    fn put(&mut self) -> pb::PutRequest {
        let ignore_value = self.chance(10);
        let ignore_lease = self.chance(10);
        let value = if ignore_value { Bytes::new() } else { b(&self.below(30).to_string()) };
        pb::PutRequest {
            key: self.key(),
            value,
            lease: if ignore_lease || self.chance(60) { 0 } else { 1 + self.below(5) as i64 },
            prev_kv: self.chance(30),
            ignore_value,
            ignore_lease,
        }
    }

    fn range(&mut self, newest: i64) -> pb::RangeRequest {
        let mut filter =
            |percent| if self.chance(percent) { newest - self.below(30) as i64 } else { 0 };
        let (min_mod, max_mod, min_create, max_create) =
            (filter(15), filter(15), filter(15), filter(15));
        pb::RangeRequest {
            key: if self.chance(20) { b("\0") } else { self.key() },
            range_end: self.end(),
            limit: if self.chance(50) { 0 } else { self.below(5) as i64 - 1 },
            revision: self.revision(newest),
            sort_order: if self.chance(40) { self.below(3) as i32 } else { 0 },
            sort_target: if self.chance(40) { self.below(5) as i32 } else { 0 },
            serializable: false,
            keys_only: self.chance(20),
            count_only: self.chance(10),
            min_mod_revision: min_mod.max(0),
            max_mod_revision: max_mod.max(0),
            min_create_revision: min_create.max(0),
            max_create_revision: max_create.max(0),
        }
    }

    fn delete(&mut self) -> pb::DeleteRangeRequest {
        pb::DeleteRangeRequest { key: self.key(), range_end: self.end(), prev_kv: self.chance(30) }
    }

    fn compare(&mut self, newest: i64) -> pb::Compare {
        let operand = match self.below(5) {
            0 => TargetUnion::Version(self.below(3) as i64),
            1 => TargetUnion::CreateRevision(newest - self.below(10) as i64),
            2 => TargetUnion::ModRevision(newest - self.below(10) as i64),
            3 => TargetUnion::Value(b(&self.below(30).to_string())),
            _ => TargetUnion::Lease(self.below(3) as i64),
        };
        let target = match &operand {
            TargetUnion::Version(_) => CompareTarget::Version,
            TargetUnion::CreateRevision(_) => CompareTarget::Create,
            TargetUnion::ModRevision(_) => CompareTarget::Mod,
            TargetUnion::Value(_) => CompareTarget::Value,
            TargetUnion::Lease(_) => CompareTarget::Lease,
        };
        pb::Compare {
            result: self.below(4) as i32,
            target: target.into(),
            key: self.key(),
            range_end: self.end(),
            target_union: Some(operand),
        }
    }

    /// Operations that no service would refuse: a key that is put is not touched by anything else.
    fn ops(&mut self, newest: i64, depth: u32, free: &mut Vec<Bytes>) -> Vec<pb::RequestOp> {
        let mut ops = Vec::new();
        for _ in 0..self.below(4) {
            ops.push(op(match self.below(10) {
                0..4 => {
                    if free.is_empty() {
                        continue;
                    }
                    let key = free.remove(self.below(free.len() as u64) as usize);
                    Request::RequestPut(pb::PutRequest { key, ..self.put() })
                }
                4 if 0 < depth => Request::RequestTxn(self.txn(newest, depth - 1, free)),
                5 | 6 if !free.is_empty() => {
                    let key = free.remove(self.below(free.len() as u64) as usize);
                    let prev_kv = self.chance(50);
                    Request::RequestDeleteRange(pb::DeleteRangeRequest {
                        key,
                        range_end: Bytes::new(),
                        prev_kv,
                    })
                }
                _ => Request::RequestRange(self.range(newest)),
            }));
        }
        ops
    }

    fn txn(&mut self, newest: i64, depth: u32, free: &mut Vec<Bytes>) -> pb::TxnRequest {
        let compare = (0..self.below(3)).map(|_| self.compare(newest)).collect();
        let mut other = free.clone();
        let success = self.ops(newest, depth, free);
        let failure = self.ops(newest, depth, &mut other);
        free.retain(|key| other.contains(key));
        pb::TxnRequest { compare, success, failure }
    }

    fn command(&mut self, newest: i64) -> Command {
        match self.below(100) {
            0..35 => Command::Put(self.put()),
            35..50 => Command::DeleteRange(self.delete()),
            50..85 => Command::Txn(self.txn(newest, 2, &mut KEYS.map(b).to_vec())),
            85..93 => grant(1 + self.below(5) as i64),
            93..97 => Command::LeaseRevoke(pb::LeaseRevokeRequest { id: 1 + self.below(5) as i64 }),
            _ => {
                let revision = newest + 1 - self.below(40) as i64;
                Command::Compact(pb::CompactionRequest { revision, physical: false })
            }
        }
    }
}

/// A command per step; every reply, event and a random read are compared.
fn run_against_model(seed: u64, steps: u64) {
    let mut random = Random(seed);
    let (mut machine, mut model) = (Machine::new(), Model::new());
    for step in 0..steps {
        let command = random.command(model.revision());
        let expected_revision = model.revision();
        let expected = model.apply(&command);
        let applied = machine.apply(command.clone());

        let context = format!("seed {seed} step {step} {command:?}");
        assert_eq!(applied.outcome.reply, expected, "{context}");
        assert_eq!(applied.outcome.revision.get(), model.revision(), "{context}");
        let events = (expected_revision < model.revision()).then(|| model.events.last().unwrap());
        assert_eq!(applied.events.as_ref().map(|e| &e.events), events, "{context}");
        compare_reads(&machine, &model, &mut random, &context);
    }
    assert_eq!(model.revision(), machine.revision());
    assert!(steps / 4 < model.revision() as u64, "seed {seed}: hardly anything was written");
}

fn compare_reads(machine: &Machine, model: &Model, random: &mut Random, context: &str) {
    let newest = model.revision();
    let request = random.range(newest);
    let expected = model.range(&request).map(|range| pb::RangeResponse { header: None, ..range });
    assert_eq!(machine.range(request.clone()), expected, "{context}\n{request:?}");

    if random.chance(5) {
        let read = machine.store.read().unwrap();
        let from = newest - random.below(50) as i64;
        let (events, upto) =
            read.events(Revision::new(from.max(model.compacted)), None, usize::MAX).unwrap();
        assert_eq!(upto.get(), newest, "{context}");
        assert_eq!(events, model.events_left(from), "{context} from {from}");
        compare_previous(&read, model, &events, context);
        let leases: Vec<_> = read.leases().unwrap().iter().map(|lease| lease.id.get()).collect();
        assert_eq!(leases, model.leases.keys().copied().collect::<Vec<_>>(), "{context}");
        for id in leases {
            let keys = read.lease_keys(LeaseId::new(id)).unwrap();
            assert_eq!(keys, model.lease_keys(id), "{context}");
        }
        read.state_hash().unwrap();
    }
}

fn compare_previous(read: &ReadTxn, model: &Model, events: &[RevisionEvents], context: &str) {
    for revision in events {
        for event in &revision.events {
            let key = &event.kv.as_ref().unwrap().key;
            let before = revision.revision.get() - 1;
            let expected = (model.compacted <= before)
                .then(|| model.state(before).get(key).cloned())
                .flatten();
            let found = read.previous(key, revision.revision).unwrap();
            assert_eq!(found, expected, "{context} previous of {key:?} at {}", before + 1);
        }
    }
}

#[test]
fn store_answers_what_the_model_answers() {
    for seed in 1..=6 {
        run_against_model(seed, 1_500);
    }
}

/// The same history, in batches that end where `batch_ends` says, with whatever it does in between.
fn run_in_batches(
    seed: u64,
    mut after: impl FnMut(&mut Machine, &mut Random),
    batch_max: u64,
) -> (crate::mvcc::StateHash, crate::mvcc::KvHash, Vec<Applied>) {
    let (mut commands, mut batches) = (Random(seed), Random(seed ^ batch_max));
    let mut machine = Machine::new();
    let mut model = Model::new();
    let mut history = Vec::new();
    let mut left = 2_000_u64;
    while 0 < left {
        let size = (1 + batches.below(batch_max)).min(left);
        let batch: Vec<_> = (0..size)
            .map(|_| {
                let command = commands.command(model.revision());
                drop(model.apply(&command));
                command
            })
            .collect();
        left -= size;
        history.extend(machine.batch(&batch));
        after(&mut machine, &mut batches);
    }
    let read = machine.store.read().unwrap();
    (read.state_hash().unwrap(), read.hash_kv(None).unwrap().unwrap(), history)
}

#[test]
fn equal_commands_give_equal_stores_however_they_are_batched_and_interrupted() {
    for seed in [11, 12] {
        let one_by_one = run_in_batches(seed, |_, _| {}, 1);
        let in_batches = run_in_batches(seed, |_, _| {}, 50);
        let interrupted = run_in_batches(seed, interrupt, 20);

        assert!(one_by_one == in_batches, "seed {seed}: batches changed the outcome");
        assert!(one_by_one == interrupted, "seed {seed}: interruptions changed the outcome");
    }
}

/// Checkpoints, reopens, defragments, or sends the state through a snapshot.
fn interrupt(machine: &mut Machine, random: &mut Random) {
    let path = machine.dir.path().join("state.redb");
    match random.below(12) {
        0 | 1 => drop(machine.store.checkpoint().unwrap()),
        2 => {
            let elsewhere = Machine::new();
            drop(std::mem::replace(&mut machine.store, elsewhere.store.clone()));
            machine.store = Store::open(&host::env(), &path, &OPTIONS).unwrap();
        }
        3 => drop(wait(machine.store.defragment()).unwrap()),
        4 => {
            let mut stream = Vec::new();
            machine.store.dump(&mut stream).unwrap();
            machine.put("not", "in the snapshot");
            wait(machine.store.restore(&mut stream.as_slice())).unwrap();
            machine.rewind(1);
        }
        _ => {}
    }
}

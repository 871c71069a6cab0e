//! The store against its promises: history, compaction, damage, snapshots, replacement.

use std::path::PathBuf;

use bytes::Bytes;
use redb::ReadableTable;
use tempfile::TempDir;

use super::format::{CurRecord, POSITION_BYTES, Position, RevRecord};
use super::*;
use crate::env::host;
use crate::proto::mvccpb::event::EventType;
pub(super) use crate::testkit::wait;
use crate::types::{ClusterId, LogId, LogIndex, NodeId, Term};

const OPTIONS: Options = Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };

struct Fixture {
    store: Store,
    dir: TempDir,
}

fn path(dir: &TempDir) -> PathBuf {
    dir.path().join("state.redb")
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&host::env(), &path(&dir), &OPTIONS).unwrap();
    Fixture { store, dir }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn revision(raw: i64) -> Revision {
    Revision::new(raw)
}

fn put_lease(store: &Store, key: &str, value: &str, lease: i64) {
    store
        .write(|txn| {
            txn.put(&bytes(key), &bytes(value), lease)?;
            txn.end_revision();
            Ok(())
        })
        .unwrap();
}

fn put(store: &Store, key: &str, value: &str) {
    put_lease(store, key, value, 0);
}

fn delete(store: &Store, key: &str) -> u64 {
    store
        .write(|txn| {
            let count = txn.delete_range(&KeyRange::One(bytes(key)))?;
            txn.end_revision();
            Ok(count)
        })
        .unwrap()
}

fn compact(store: &Store, to: i64) -> Result<(), RevisionError> {
    store.write(|txn| txn.compact(revision(to))).unwrap()
}

fn value_at(store: &Store, key: &str, at: i64) -> Option<String> {
    let found = store.read().unwrap().get(key.as_bytes(), Some(revision(at))).unwrap();
    found.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap())
}

fn revisions_kept(store: &Store) -> Vec<i64> {
    let read = store.read().unwrap();
    read.rev
        .range::<&[u8; POSITION_BYTES]>(..)
        .unwrap()
        .map(|item| Position::from_key(item.unwrap().0.value()).main)
        .collect()
}

/// a at 2 and 4, b at 3 and deleted at 5, c at 6.
fn history() -> Fixture {
    let fixture = fixture();
    put(&fixture.store, "a", "1");
    put(&fixture.store, "b", "2");
    put(&fixture.store, "a", "3");
    delete(&fixture.store, "b");
    put(&fixture.store, "c", "4");
    fixture
}

#[test]
fn empty_store_is_at_revision_1_and_belongs_to_nobody() {
    let read = fixture().store.read().unwrap();

    assert_eq!(read.revision(), revision(1));
    assert_eq!(read.compacted(), revision(0));
    assert_eq!(read.applied(), None);
    assert_eq!(read.cluster_id(), None);
    assert_eq!(read.membership().unwrap(), None);
}

#[test]
fn every_revision_of_every_key_can_be_read() {
    let Fixture { store, .. } = history();

    let a: Vec<_> = (1..=6).map(|at| value_at(&store, "a", at)).collect();
    let b: Vec<_> = (1..=6).map(|at| value_at(&store, "b", at)).collect();

    let some = |text: &str| Some(text.to_owned());
    assert_eq!(a, [None, some("1"), some("1"), some("3"), some("3"), some("3")]);
    assert_eq!(b, [None, None, some("2"), some("2"), None, None]);
}

#[test]
fn put_counts_versions_and_a_deletion_ends_the_generation() {
    let Fixture { store, .. } = history();
    put(&store, "b", "5");
    let read = store.read().unwrap();

    let a = read.get(b"a", None).unwrap().unwrap();
    let b = read.get(b"b", None).unwrap().unwrap();

    assert_eq!((a.create_revision, a.mod_revision, a.version), (2, 4, 2));
    assert_eq!((b.create_revision, b.mod_revision, b.version), (7, 7, 1));
}

#[test]
fn reader_keeps_its_moment_while_the_writer_goes_on() {
    let Fixture { store, .. } = history();
    let before = store.read().unwrap();

    put(&store, "a", "new");
    compact(&store, 7).unwrap();

    assert_eq!(before.revision(), revision(6));
    assert_eq!(before.get(b"a", Some(revision(2))).unwrap().unwrap().value, "1");
}

#[test]
fn failed_closure_changes_nothing() {
    let Fixture { store, .. } = history();
    let before = store.read().unwrap().state_hash().unwrap();

    let result: Result<(), _> = store.write(|txn| {
        txn.put(&bytes("a"), &bytes("lost"), 0)?;
        txn.end_revision();
        Err(StoreError::Engine("on purpose".to_owned()))
    });

    assert!(result.is_err());
    assert_eq!(store.read().unwrap().state_hash().unwrap(), before);
    assert_eq!(value_at(&store, "a", 6).unwrap(), "3");
}

#[test]
fn scan_respects_range_and_limit_and_counts_everything() {
    let Fixture { store, .. } = history();
    let read = store.read().unwrap();
    let scan = |range: KeyRange, at, limit| {
        let found = read.scan(&range, revision(at), limit).unwrap();
        let keys: Vec<_> = found.kvs.iter().map(|kv| kv.key.escape_ascii().to_string()).collect();
        (keys.join(""), found.count)
    };

    assert_eq!(scan(KeyRange::From(bytes("a")), 6, None), ("ac".to_owned(), 2));
    assert_eq!(scan(KeyRange::From(bytes("a")), 4, Some(1)), ("a".to_owned(), 2));
    assert_eq!(scan(KeyRange::Span(bytes("a"), bytes("c")), 3, None), ("ab".to_owned(), 2));
    assert_eq!(scan(KeyRange::Span(bytes("c"), bytes("a")), 6, None), (String::new(), 0));
    assert_eq!(scan(KeyRange::One(bytes("b")), 6, None), (String::new(), 0));
    assert_eq!(scan(KeyRange::From(bytes("a")), 1, None), (String::new(), 0));
}

#[test]
fn key_range_reads_etcds_encoding() {
    assert_eq!(KeyRange::new(bytes("a"), bytes("")), KeyRange::One(bytes("a")));
    assert_eq!(KeyRange::new(bytes("a"), bytes("\0")), KeyRange::From(bytes("a")));
    assert_eq!(KeyRange::new(bytes("a"), bytes("b")), KeyRange::Span(bytes("a"), bytes("b")));
    assert!(KeyRange::Span(bytes("a"), bytes("b")).contains(b"a"));
    assert!(!KeyRange::Span(bytes("a"), bytes("b")).contains(b"b"));
}

#[test]
fn compaction_keeps_the_newest_of_each_key_and_no_older_tombstone() {
    let Fixture { store, .. } = history();

    compact(&store, 6).unwrap();

    assert_eq!(revisions_kept(&store), [4, 6]);
    assert_eq!(value_at(&store, "a", 6).unwrap(), "3");
    assert_eq!(value_at(&store, "b", 6), None);
}

#[test]
fn tombstone_at_the_compacted_revision_stays_until_the_next_compaction() {
    let Fixture { store, .. } = history();

    compact(&store, 5).unwrap();
    let kept = revisions_kept(&store);
    let (events, _) = store.read().unwrap().events(revision(5), None, usize::MAX).unwrap();
    compact(&store, 6).unwrap();

    assert_eq!(kept, [4, 5, 6]);
    assert_eq!(events[0].events[0].r#type, EventType::Delete as i32);
    assert_eq!(revisions_kept(&store), [4, 6]);
}

#[test]
fn compaction_refuses_what_is_compacted_or_not_written_yet() {
    let Fixture { store, .. } = history();

    assert_eq!(compact(&store, -1), Err(RevisionError::Compacted(revision(-1))));
    assert_eq!(compact(&store, 7), Err(RevisionError::Future));
    assert_eq!(compact(&store, 0), Ok(()));
    assert_eq!(compact(&store, 0), Err(RevisionError::Compacted(revision(0))));
    assert_eq!(compact(&store, 4), Ok(()));
    assert_eq!(compact(&store, 3), Err(RevisionError::Compacted(revision(4))));
    let read = store.read().unwrap();
    assert_eq!(read.resolve(3), Err(RevisionError::Compacted(revision(4))));
    assert_eq!(read.resolve(4), Ok(revision(4)));
    assert_eq!(read.resolve(7), Err(RevisionError::Future));
    assert_eq!(read.resolve(-9), Ok(revision(6)));
}

#[test]
fn key_recreated_after_a_compacted_tombstone_has_no_past() {
    let Fixture { store, .. } = history();
    compact(&store, 6).unwrap();
    put(&store, "b", "again");

    assert_eq!(value_at(&store, "b", 6), None);
    assert_eq!(value_at(&store, "b", 7).unwrap(), "again");
    assert_eq!(store.read().unwrap().previous(b"b", revision(7)).unwrap(), None);
}

#[test]
fn compaction_in_many_steps_gives_the_same_as_in_one() {
    let fill = |store: &Store| {
        store
            .write(|txn| {
                for n in 0..3_000 {
                    let key = bytes(&format!("key{}", n % 7));
                    if n % 5 == 0 {
                        txn.delete_range(&KeyRange::One(key))?;
                    } else {
                        txn.put(&key, &bytes(&n.to_string()), 0)?;
                    }
                    txn.end_revision();
                }
                Ok(())
            })
            .unwrap();
    };
    let (at_once, bit_by_bit) = (fixture(), fixture());
    fill(&at_once.store);
    fill(&bit_by_bit.store);

    compact(&at_once.store, 2_500).unwrap();
    for to in (100..=2_500).step_by(100) {
        compact(&bit_by_bit.store, to).unwrap();
    }

    let hash = |fixture: &Fixture| fixture.store.read().unwrap().state_hash().unwrap();
    assert_eq!(hash(&at_once), hash(&bit_by_bit));
}

#[test]
fn previous_is_the_state_before_the_change_unless_compacted() {
    let Fixture { store, .. } = history();
    let previous = |key: &str, at| {
        let found = store.read().unwrap().previous(key.as_bytes(), revision(at)).unwrap();
        found.map(|kv| (kv.value, kv.mod_revision))
    };

    assert_eq!(previous("a", 2), None);
    assert_eq!(previous("a", 4), Some((bytes("1"), 2)));
    assert_eq!(previous("b", 5), Some((bytes("2"), 3)));
    compact(&store, 4).unwrap();
    assert_eq!(previous("a", 4), None);
    assert_eq!(previous("b", 5), Some((bytes("2"), 3)));
}

#[test]
fn events_come_in_whole_revisions_up_to_the_limit() {
    let Fixture { store, .. } = fixture();
    store
        .write(|txn| {
            for revision in 0..3 {
                for key in ["a", "b"] {
                    txn.put(&bytes(key), &bytes(&revision.to_string()), 0)?;
                }
                txn.end_revision();
            }
            Ok(())
        })
        .unwrap();
    let read = store.read().unwrap();

    let (first, seen) = read.events(revision(2), None, 1).unwrap();
    let (rest, end) = read.events(seen.next(), None, usize::MAX).unwrap();
    let only_b = read.events(revision(0), Some(&KeyRange::One(bytes("b"))), usize::MAX).unwrap();
    let nothing = read.events(revision(0), Some(&KeyRange::One(bytes("z"))), 1).unwrap();

    assert_eq!((first.len(), first[0].events.len(), seen), (1, 2, revision(2)));
    assert_eq!(rest.iter().map(|r| r.revision.get()).collect::<Vec<_>>(), [3, 4]);
    assert_eq!(end, revision(4));
    assert_eq!(only_b.0.iter().map(|r| r.events.len()).collect::<Vec<_>>(), [1, 1, 1]);
    assert_eq!((nothing.0.len(), nothing.1), (0, revision(2)));
}

#[test]
fn event_of_a_deletion_carries_only_key_and_revision() {
    let Fixture { store, .. } = history();
    let (events, _) = store.read().unwrap().events(revision(5), None, 1).unwrap();

    let kv = events[0].events[0].kv.clone().unwrap();

    assert_eq!(kv, KeyValue { key: bytes("b"), mod_revision: 5, ..Default::default() });
}

#[test]
fn revoking_a_lease_deletes_its_keys_sorted_in_one_revision() {
    let Fixture { store, .. } = fixture();
    let id = LeaseId::new(7);
    let lease = LeaseRecord { id, ttl_secs: 60, remaining_secs: 0 };
    store.write(|txn| txn.set_lease(&lease)).unwrap();
    for key in ["c", "a", "b"] {
        put_lease(&store, key, "v", 7);
    }
    put(&store, "b", "detached");
    assert_eq!(store.read().unwrap().lease_keys(id).unwrap(), ["a", "c"]);

    let events = store
        .write(|txn| {
            txn.revoke_lease(id)?;
            Ok(txn.end_revision().unwrap())
        })
        .unwrap();

    let keys: Vec<_> = events.events.iter().map(|e| e.kv.clone().unwrap().key).collect();
    let read = store.read().unwrap();
    assert_eq!(keys, ["a", "c"]);
    assert_eq!(events.revision, read.revision());
    assert!(read.leases().unwrap().is_empty() && read.lease_keys(id).unwrap().is_empty());
    assert!(read.get(b"b", None).unwrap().is_some());
}

#[test]
fn leases_alarms_and_meta_survive_a_reopen() {
    let Fixture { store, dir } = fixture();
    let lease = LeaseRecord { id: LeaseId::new(5), ttl_secs: 60, remaining_secs: 12 };
    let applied = LogId { term: Term::new(1), leader: NodeId::new(2), index: LogIndex::new(3) };
    store
        .write(|txn| {
            txn.set_lease(&lease)?;
            txn.raise_alarm(NodeId::new(9), 1)?;
            txn.raise_alarm(NodeId::new(8), 2)?;
            txn.raise_alarm(NodeId::new(8), 2)?;
            assert!(txn.clear_alarm(NodeId::new(9), 1)?);
            assert!(!txn.clear_alarm(NodeId::new(9), 1)?);
            txn.set_applied(applied);
            txn.set_cluster_id(ClusterId::new(4));
            txn.set_membership(b"three nodes")
        })
        .unwrap();
    let checkpoint = store.checkpoint().unwrap();
    assert_eq!(checkpoint.applied(), Some(applied));
    wait(checkpoint.durable()).unwrap();
    drop(store);

    let store = Store::open(&host::env(), &path(&dir), &OPTIONS).unwrap();
    let read = store.read().unwrap();

    assert_eq!(read.leases().unwrap(), [lease]);
    assert_eq!(read.lease(LeaseId::new(5)).unwrap(), Some(lease));
    assert_eq!(read.alarms().unwrap(), [(NodeId::new(8), 2)]);
    assert_eq!(read.applied(), Some(applied));
    assert_eq!(read.cluster_id(), Some(ClusterId::new(4)));
    assert_eq!(read.membership().unwrap().unwrap(), "three nodes");
    assert_eq!(store.write(|txn| Ok(txn.alarms().len())).unwrap(), 1);
}

/// The numbers were given by a real etcd for the same requests.
#[test]
fn hash_kv_is_the_number_etcd_gives() {
    let empty = fixture();
    let Fixture { store, .. } = history();
    let hash = |store: &Store| store.read().unwrap().hash_kv(None).unwrap().unwrap();

    assert_eq!(hash(&empty.store), (1_084_519_789, revision(-1), revision(1)));
    compact(&store, 0).unwrap();
    assert_eq!(hash(&store), (2_750_537_463, revision(0), revision(6)));
    compact(&store, 5).unwrap();
    assert_eq!(hash(&store), (168_415_639, revision(5), revision(6)));
    compact(&store, 6).unwrap();
    assert_eq!(hash(&store), (168_415_639, revision(6), revision(6)));
}

#[test]
fn hash_kv_at_a_revision_does_not_depend_on_what_came_later() {
    let Fixture { store, .. } = history();
    let before = store.read().unwrap().hash_kv(None).unwrap();

    put(&store, "d", "5");
    let read = store.read().unwrap();

    assert_eq!(read.hash_kv(Some(revision(6))).unwrap(), before);
    assert_ne!(read.hash_kv(None).unwrap(), before);
    assert_eq!(read.hash_kv(Some(revision(8))).unwrap(), Err(RevisionError::Future));
}

#[test]
fn size_in_use_returns_to_nothing_when_everything_is_deleted_and_compacted() {
    let Fixture { store, .. } = fixture();
    let lease = LeaseRecord { id: LeaseId::new(7), ttl_secs: 60, remaining_secs: 0 };
    store.write(|txn| txn.set_lease(&lease)).unwrap();
    put_lease(&store, "a", "1", 7);
    put_lease(&store, "a", "2", 7);
    put(&store, "b", "3");
    let full = store.size().unwrap();
    assert!(0 < full.in_use && full.in_use <= full.total, "{full:?}");

    delete(&store, "a");
    delete(&store, "b");
    put(&store, "c", "4");
    delete(&store, "c");
    compact(&store, 7).unwrap();
    put(&store, "d", "");
    compact(&store, 8).unwrap();
    delete(&store, "d");
    put(&store, "d", "");
    delete(&store, "d");
    put(&store, "e", "");
    let only_e = {
        compact(&store, 13).unwrap();
        store.size().unwrap().in_use
    };

    let alone = fixture();
    put(&alone.store, "e", "");
    assert_eq!(only_e, alone.store.size().unwrap().in_use);
}

#[test]
fn uncheckpointed_writes_are_readable_and_checkpointed_ones_survive_a_crash() {
    let Fixture { store, dir } = history();
    wait(store.checkpoint().unwrap().durable()).unwrap();
    put(&store, "a", "after the checkpoint");
    assert_eq!(value_at(&store, "a", 7).unwrap(), "after the checkpoint");

    // What a power cut leaves: the file as it is, without a clean close.
    let image = dir.path().join("image.redb");
    std::fs::copy(path(&dir), &image).unwrap();
    let store = Store::open(&host::env(), &image, &OPTIONS).unwrap();

    assert_eq!(store.read().unwrap().revision(), revision(6));
    assert_eq!(value_at(&store, "a", 6).unwrap(), "3");
}

fn dump(store: &Store) -> Vec<u8> {
    let mut stream = Vec::new();
    let summary = store.dump(&mut stream).unwrap();
    assert_eq!(summary.hash, store.read().unwrap().state_hash().unwrap());
    stream
}

fn big_history() -> Fixture {
    let fixture = history();
    fixture
        .store
        .write(|txn| {
            txn.set_cluster_id(ClusterId::new(4));
            txn.set_lease(&LeaseRecord { id: LeaseId::new(7), ttl_secs: 60, remaining_secs: 0 })?;
            for n in 0..200 {
                let value = Bytes::from(vec![n; 5_000]);
                txn.put(&bytes(&format!("big{}", n % 50)), &value, i64::from(n % 2) * 7)?;
                txn.end_revision();
            }
            Ok(())
        })
        .unwrap();
    fixture
}

#[test]
fn snapshot_stream_carries_everything_and_replaces_everything() {
    let source = big_history();
    let target = fixture();
    put(&target.store, "must", "go");
    let stream = dump(&source.store);
    let old_reader = target.store.read().unwrap();

    let summary = wait(target.store.restore(&mut stream.as_slice())).unwrap();

    assert_eq!(summary.hash, source.store.read().unwrap().state_hash().unwrap());
    assert_eq!(target.store.read().unwrap().state_hash().unwrap(), summary.hash);
    assert_eq!(target.store.size().unwrap().in_use, source.store.size().unwrap().in_use);
    assert!(old_reader.get(b"must", None).unwrap().is_some(), "a reader lost its moment");
    put(&target.store, "a", "goes on");
    let Fixture { store, dir } = target;
    drop((old_reader, store));
    let reopened = Store::open(&host::env(), &path(&dir), &OPTIONS).unwrap();
    assert_eq!(value_at(&reopened, "a", 207).unwrap(), "goes on");
    assert_eq!(leftovers(&dir), Vec::<PathBuf>::new());
}

/// What a replacement must not leave behind.
fn leftovers(dir: &TempDir) -> Vec<PathBuf> {
    let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let beside = |name: &PathBuf| {
        let name = name.to_string_lossy();
        name.contains("incoming") || name.contains("received")
    };
    names.filter(beside).collect()
}

#[test]
fn snapshot_stream_builds_a_store_where_there_is_none() {
    let source = big_history();
    let stream = dump(&source.store);
    let dir = tempfile::tempdir().unwrap();

    let store = wait(Store::load_from(&host::env(), &path(&dir), &OPTIONS, &mut stream.as_slice()))
        .unwrap();

    assert_eq!(dump(&store), stream);
}

#[test]
fn cut_or_altered_snapshot_streams_are_refused_and_change_nothing() {
    let source = big_history();
    let target = history();
    let stream = dump(&source.store);
    let before = target.store.read().unwrap().state_hash().unwrap();
    let step = stream.len() / 41;

    let mut altered: Vec<Vec<u8>> =
        (0..stream.len()).step_by(step).map(|cut| stream[..cut].to_vec()).collect();
    altered.extend((0..stream.len()).step_by(step).map(|at| {
        let mut copy = stream.clone();
        copy[at] ^= 0x10;
        copy
    }));

    for (case, bad) in altered.iter().enumerate() {
        let error = wait(target.store.restore(&mut bad.as_slice())).unwrap_err();
        assert!(matches!(error, StoreError::Stream(_)), "case {case}: {error}");
        assert_eq!(target.store.read().unwrap().state_hash().unwrap(), before, "case {case}");
    }
    assert_eq!(leftovers(&target.dir), Vec::<PathBuf>::new());
    put(&target.store, "a", "still writable");
}

#[test]
fn defragmentation_shrinks_the_file_and_changes_no_record() {
    let Fixture { store, dir } = big_history();
    let revision = store.read().unwrap().revision().get();
    compact(&store, revision).unwrap();
    wait(store.checkpoint().unwrap().durable()).unwrap();
    let before = (store.size().unwrap(), store.read().unwrap().state_hash().unwrap());
    let reader = store.read().unwrap();

    let after = wait(store.defragment()).unwrap();

    assert!(after.total < before.0.total, "{after:?} after {before:?}");
    assert_eq!(after.in_use, before.0.in_use);
    assert_eq!(std::fs::metadata(path(&dir)).unwrap().len(), after.total);
    assert_eq!(store.read().unwrap().state_hash().unwrap(), before.1);
    assert_eq!(reader.state_hash().unwrap(), before.1);
    put(&store, "a", "goes on");
}

#[test]
fn half_built_file_of_an_earlier_run_is_removed() {
    let Fixture { store, dir } = history();
    drop(store);
    let leftover = dir.path().join("state.redb.incoming");
    std::fs::write(&leftover, b"half").unwrap();

    let store = Store::open(&host::env(), &path(&dir), &OPTIONS).unwrap();

    assert!(!leftover.exists());
    assert_eq!(value_at(&store, "a", 6).unwrap(), "3");
}

#[test]
fn file_of_a_newer_release_is_refused_and_not_called_damaged() {
    let Fixture { store, dir } = history();
    store
        .write(|txn| {
            let record = format::encode_file_version(2);
            txn.meta.insert(format::FORMAT_KEY, record.as_slice())?;
            Ok(())
        })
        .unwrap();
    drop(store);

    let error = Store::open(&host::env(), &path(&dir), &OPTIONS).unwrap_err();

    assert!(matches!(error, StoreError::Format { found: 2, supported: 1 }), "{error}");
}

#[test]
fn file_that_is_no_state_file_gives_an_error() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(path(&dir), vec![0x5a; 8192]).unwrap();

    assert!(Store::open(&host::env(), &path(&dir), &OPTIONS).is_err());
}

/// Every read the store offers; an error if any of them fails.
fn read_everything(store: &Store) -> Result<Vec<KeyValue>, StoreError> {
    let read = store.read()?;
    let mut found = Vec::new();
    for at in 1..=read.revision().get() {
        found.extend(read.scan(&KeyRange::From(bytes("a")), revision(at), None)?.kvs);
    }
    read.events(revision(0), None, usize::MAX)?;
    read.hash_kv(None)?.ok();
    Ok(found)
}

fn rewrite_rev(store: &Store, at: Position, change: impl FnOnce(&mut Vec<u8>)) {
    store
        .write(|txn| {
            let mut record = txn.rev.get(&at.to_key())?.unwrap().value().to_vec();
            change(&mut record);
            txn.rev.insert(&at.to_key(), record.as_slice())?;
            Ok(())
        })
        .unwrap();
}

fn assert_damaged(error: &StoreError) {
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[test]
fn flipped_bits_in_stored_records_are_reported_and_never_served() {
    let whole = read_everything(&history().store).unwrap();
    for at in 2..=6 {
        let position = Position::new(at, 0);
        let len = {
            let Fixture { store, .. } = history();
            let read = store.read().unwrap();
            read.rev.get(&position.to_key()).unwrap().unwrap().value().len()
        };
        let Fixture { store, .. } = history();
        for bit in (0..len * 8).step_by(5) {
            rewrite_rev(&store, position, |record| record[bit / 8] ^= 1 << (bit % 8));
            assert_damaged(&read_everything(&store).unwrap_err());
            assert_damaged(&store.dump(&mut std::io::sink()).unwrap_err());
            rewrite_rev(&store, position, |record| record[bit / 8] ^= 1 << (bit % 8));
        }
        assert_eq!(read_everything(&store).unwrap(), whole);
    }
}

#[test]
fn records_in_the_wrong_place_are_damage() {
    let Fixture { store, .. } = history();
    let stolen = {
        let read = store.read().unwrap();
        read.rev.get(&Position::new(6, 0).to_key()).unwrap().unwrap().value().to_vec()
    };
    rewrite_rev(&store, Position::new(4, 0), |record| *record = stolen);
    assert_damaged(&store.read().unwrap().get(b"a", None).unwrap_err());

    let Fixture { store, .. } = history();
    store
        .write(|txn| {
            let other = txn.cur.get(b"c".as_slice())?.unwrap().value().to_vec();
            txn.cur.insert(b"a".as_slice(), other.as_slice())?;
            Ok(())
        })
        .unwrap();
    assert_damaged(&store.read().unwrap().get(b"a", None).unwrap_err());
    assert_damaged(&store.write(|txn| txn.put(&bytes("a"), &bytes("x"), 0)).unwrap_err());
}

#[test]
fn missing_records_are_damage_and_not_absence() {
    for missing in [2, 3, 4] {
        let Fixture { store, .. } = history();
        store
            .write(|txn| {
                txn.rev.remove(&Position::new(missing, 0).to_key())?;
                Ok(())
            })
            .unwrap();
        assert_damaged(&read_everything(&store).unwrap_err());
    }
}

#[test]
fn a_key_index_that_disagrees_with_history_is_damage() {
    let Fixture { store, .. } = history();
    store
        .write(|txn| {
            let stale = CurRecord {
                at: Position::new(4, 0),
                tombstone: false,
                create: 2,
                version: 1,
                lease: 0,
            };
            txn.cur.insert(b"a".as_slice(), stale.encode(b"a").as_slice())?;
            Ok(())
        })
        .unwrap();

    assert_damaged(&store.read().unwrap().get(b"a", None).unwrap_err());
}

#[test]
fn a_link_that_leads_forward_is_damage_and_not_an_endless_walk() {
    let Fixture { store, .. } = history();
    let at = Position::new(4, 0);
    let record = RevRecord {
        tombstone: false,
        previous: Some(Position::new(6, 0)),
        create: 2,
        version: 2,
        lease: 0,
        key: b"a",
        value: b"3",
    };
    rewrite_rev(&store, at, |bytes| record.encode(at, bytes));

    assert_damaged(&store.read().unwrap().get(b"a", Some(revision(2))).unwrap_err());
}

#[test]
fn store_and_readers_may_go_to_any_thread() {
    const fn shared<T: Send + Sync>() {}
    shared::<Store>();
    shared::<ReadTxn>();
}

fn units(store: &Store) -> Vec<Bytes> {
    let mut stream = store.read().unwrap().into_stream();
    let mut units = Vec::new();
    while let Some(unit) = stream.next_unit().unwrap() {
        units.push(unit);
    }
    units
}

#[test]
fn snapshot_is_sent_and_received_unit_by_unit_while_both_stores_go_on() {
    let (source, target) = (big_history(), history());
    let whole = dump(&source.store);
    let units = units(&source.store);
    assert_eq!(units.concat(), whole, "the stream is the same, wherever it is cut");
    assert!(4 < units.len(), "{} units", units.len());

    let mut receiving = target.store.receive().unwrap().unwrap();
    assert!(target.store.receive().unwrap().is_none(), "one at a time");
    for unit in &units {
        assert!(!receiving.has_ended());
        receiving.take(unit).unwrap();
        put(&target.store, "meanwhile", "written");
    }
    assert!(receiving.has_ended());
    let received = wait(receiving.finish()).unwrap();
    put(&target.store, "meanwhile", "written once more");
    wait(target.store.defragment()).unwrap();
    wait(target.store.adopt(received)).unwrap();

    assert_eq!(dump(&target.store), whole);
    assert_eq!(leftovers(&target.dir), Vec::<PathBuf>::new());
    put(&target.store, "a", "goes on");
    let Fixture { store, dir } = target;
    drop(store);
    let reopened = Store::open(&host::env(), &path(&dir), &OPTIONS).unwrap();
    assert_eq!(value_at(&reopened, "a", 207).unwrap(), "goes on");
}

#[test]
fn snapshot_that_ends_early_or_is_not_adopted_leaves_nothing() {
    let (source, target) = (big_history(), history());
    let before = dump(&target.store);
    let units = units(&source.store);

    let mut cut = target.store.receive().unwrap().unwrap();
    for unit in &units[..units.len() - 1] {
        cut.take(unit).unwrap();
    }
    assert!(matches!(wait(cut.finish()), Err(StoreError::Stream(_))));

    let mut altered = target.store.receive().unwrap().unwrap();
    altered.take(&units[0]).unwrap();
    let long = [units[1].as_ref(), b"more"].concat();
    assert!(matches!(altered.take(&long), Err(StoreError::Stream(_))));
    assert!(
        matches!(altered.take(&units[1]), Err(StoreError::Stream(_))),
        "nothing after an error"
    );
    drop(altered);

    let mut whole = target.store.receive().unwrap().unwrap();
    units.iter().for_each(|unit| whole.take(unit).unwrap());
    assert!(whole.take(&units[1]).is_err(), "nothing after the end");
    drop(whole);
    let mut whole = target.store.receive().unwrap().unwrap();
    units.iter().for_each(|unit| whole.take(unit).unwrap());
    drop(wait(whole.finish()).unwrap());

    assert_eq!(leftovers(&target.dir), Vec::<PathBuf>::new());
    assert_eq!(dump(&target.store), before);
    assert!(target.store.receive().unwrap().is_some());
}

//! One test per rule.

use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::range_request::{SortOrder, SortTarget};

use super::*;
use crate::proto::mvccpb::event::EventType;

fn txn_reply(machine: &mut Machine, request: pb::TxnRequest) -> pb::TxnResponse {
    match machine.reply(Command::Txn(request)) {
        Reply::Txn(response) => response,
        other => panic!("{other:?}"),
    }
}

fn compare(
    key: &str,
    target: CompareTarget,
    result: CompareResult,
    operand: TargetUnion,
) -> pb::Compare {
    pb::Compare {
        key: b(key),
        target: target.into(),
        result: result.into(),
        target_union: Some(operand),
        range_end: Bytes::new(),
    }
}

fn version_is(key: &str, version: i64) -> pb::Compare {
    compare(key, CompareTarget::Version, CompareResult::Equal, TargetUnion::Version(version))
}

fn alarm(action: pb::alarm_request::AlarmAction, alarm: pb::AlarmType) -> Command {
    Command::Alarm(pb::AlarmRequest { action: action.into(), member_id: 5, alarm: alarm.into() })
}

fn raise(kind: pb::AlarmType) -> Command {
    alarm(pb::alarm_request::AlarmAction::Activate, kind)
}

fn compact(revision: i64) -> Command {
    Command::Compact(pb::CompactionRequest { revision, physical: true })
}

fn delete(key: &str, end: &str) -> Command {
    Command::DeleteRange(delete_request(key, end))
}

fn revoke(id: i64) -> Command {
    Command::LeaseRevoke(pb::LeaseRevokeRequest { id })
}

#[test]
fn applied_entry_is_remembered_even_when_the_command_is_refused() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    machine.refusal(revoke(9));

    assert_eq!(machine.store.read().unwrap().applied(), Some(log_id(1)));
}

#[test]
fn first_write_is_revision_2_and_deleting_nothing_makes_no_revision() {
    let mut machine = Machine::new();

    let nothing = machine.apply(delete("a", ""));
    let first = machine.apply(put("a", "1"));

    assert_eq!((nothing.outcome.revision.get(), nothing.events), (1, None));
    assert_eq!(first.outcome.revision.get(), 2);
    let event = &first.events.unwrap().events[0];
    assert_eq!(
        (event.r#type, event.kv.as_ref()),
        (EventType::Put as i32, machine.get("a").as_ref())
    );
}

#[test]
fn put_answers_the_previous_key_value_only_when_asked() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    let old = machine.get("a");

    let quiet = machine.reply(put("a", "2"));
    let asked = pb::PutRequest { prev_kv: true, ..put_request("b", "1") };
    let none = machine.reply(Command::Put(asked.clone()));
    let some = machine.reply(Command::Put(pb::PutRequest { key: b("a"), ..asked }));

    assert_eq!(quiet, Reply::Put(pb::PutResponse::default()));
    assert_eq!(none, Reply::Put(pb::PutResponse::default()));
    let previous = KeyValue { value: b("2"), version: 2, mod_revision: 3, ..old.unwrap() };
    assert_eq!(some, Reply::Put(pb::PutResponse { header: None, prev_kv: Some(previous) }));
}

#[test]
fn ignore_value_keeps_the_value_and_moves_the_lease() {
    let mut machine = Machine::new();
    machine.reply(grant(7));
    machine.put("a", "1");

    let request = pb::PutRequest { lease: 7, ignore_value: true, ..put_request("a", "") };
    machine.reply(Command::Put(request));

    let kv = machine.get("a").unwrap();
    assert_eq!((kv.value.as_ref(), kv.lease, kv.version), (b"1".as_slice(), 7, 2));
    assert_eq!(machine.store.read().unwrap().lease_keys(LeaseId::new(7)).unwrap(), ["a"]);
}

#[test]
fn ignore_lease_keeps_the_lease_and_a_plain_put_detaches_the_key() {
    let mut machine = Machine::new();
    machine.reply(grant(7));
    machine.reply(Command::Put(pb::PutRequest { lease: 7, ..put_request("a", "1") }));

    let keep = pb::PutRequest { ignore_lease: true, ..put_request("a", "2") };
    machine.reply(Command::Put(keep));
    let kept = machine.get("a").unwrap();
    machine.put("a", "3");

    assert_eq!((kept.value.as_ref(), kept.lease), (b"2".as_slice(), 7));
    assert_eq!(machine.get("a").unwrap().lease, 0);
    assert!(machine.store.read().unwrap().lease_keys(LeaseId::new(7)).unwrap().is_empty());
}

#[test]
fn put_looks_for_the_lease_before_the_key_and_a_txn_for_the_key_before_the_lease() {
    let mut machine = Machine::new();
    let request = pb::PutRequest { lease: 9, ignore_value: true, ..put_request("a", "") };

    let alone = machine.refusal(Command::Put(request.clone()));
    let inside =
        machine.refusal(Command::Txn(txn(vec![], vec![op(Request::RequestPut(request))], vec![])));

    assert_eq!(alone, Refusal::LeaseNotFound);
    assert_eq!(inside, Refusal::KeyNotFound);
}

#[test]
fn delete_range_deletes_in_key_order_in_one_revision() {
    let mut machine = Machine::new();
    for key in ["c", "a", "b", "d"] {
        machine.put(key, key);
    }

    let request = pb::DeleteRangeRequest { prev_kv: true, ..delete_request("a", "d") };
    let applied = machine.apply(Command::DeleteRange(request));

    let Ok(Reply::DeleteRange(response)) = applied.outcome.reply else { panic!() };
    assert_eq!((response.deleted, keys(&response.prev_kvs).as_str()), (3, "a b c"));
    let events = applied.events.unwrap();
    assert_eq!((events.revision.get(), events.events.len()), (6, 3));
    let tombstone = events.events[0].kv.clone().unwrap();
    assert_eq!(tombstone, KeyValue { key: b("a"), mod_revision: 6, ..Default::default() });
}

#[test]
fn range_forms_of_etcd() {
    let mut machine = Machine::new();
    for key in ["a", "b", "c"] {
        machine.put(key, key);
    }
    let range = |key: &str, end: &str| {
        let request = pb::RangeRequest { key: b(key), range_end: b(end), ..Default::default() };
        let response = machine.range(request).unwrap();
        (keys(&response.kvs), response.count)
    };

    assert_eq!(range("b", ""), ("b".to_owned(), 1));
    assert_eq!(range("b", "\0"), ("b c".to_owned(), 2));
    assert_eq!(range("\0", "\0"), ("a b c".to_owned(), 3));
    assert_eq!(range("a", "c"), ("a b".to_owned(), 2));
    assert_eq!(range("b", "b"), (String::new(), 0));
    assert_eq!(range("c", "a"), (String::new(), 0));
}

#[test]
fn range_limit_sets_more_and_count_ignores_limit_and_filters() {
    let mut machine = Machine::new();
    for key in ["a", "b", "c", "d"] {
        machine.put(key, key);
    }

    let limited = machine.range(pb::RangeRequest { limit: 2, ..all() }).unwrap();
    let exact = machine.range(pb::RangeRequest { limit: 4, ..all() }).unwrap();
    let negative = machine.range(pb::RangeRequest { limit: -1, ..all() }).unwrap();
    let filtered = pb::RangeRequest { limit: 1, min_mod_revision: 3, max_mod_revision: 4, ..all() };
    let filtered = machine.range(filtered).unwrap();
    let created = pb::RangeRequest { min_create_revision: 4, max_create_revision: 4, ..all() };
    let created = machine.range(created).unwrap();

    assert_eq!((keys(&limited.kvs).as_str(), limited.more, limited.count), ("a b", true, 4));
    assert_eq!((exact.kvs.len(), exact.more), (4, false));
    assert_eq!((negative.kvs.len(), negative.more), (4, false));
    assert_eq!((keys(&filtered.kvs).as_str(), filtered.more, filtered.count), ("b", true, 4));
    assert_eq!((keys(&created.kvs).as_str(), created.more, created.count), ("c", false, 4));
}

#[test]
fn range_counts_only_or_leaves_values_out() {
    let mut machine = Machine::new();
    machine.put("a", "1");

    let counted = machine.range(pb::RangeRequest { count_only: true, limit: 1, ..all() }).unwrap();
    let bare = machine.range(pb::RangeRequest { keys_only: true, ..all() }).unwrap();

    assert_eq!((counted.kvs.len(), counted.more, counted.count), (0, false, 1));
    let expected = KeyValue { value: Bytes::new(), ..machine.get("a").unwrap() };
    assert_eq!(bare.kvs, [expected]);
}

#[test]
fn range_sorts_by_every_target_both_ways() {
    let mut machine = Machine::new();
    for (key, value) in [("b", "3"), ("a", "1"), ("c", "2"), ("b", "4"), ("b", "0"), ("a", "5")] {
        machine.put(key, value);
    }
    let sorted = |target: SortTarget, order: SortOrder| {
        let request =
            pb::RangeRequest { sort_target: target.into(), sort_order: order.into(), ..all() };
        keys(&machine.range(request).unwrap().kvs)
    };

    for (target, ascending, descending) in [
        (SortTarget::Key, "a b c", "c b a"),
        (SortTarget::Version, "c a b", "b a c"),
        (SortTarget::Create, "b a c", "c a b"),
        (SortTarget::Mod, "c b a", "a b c"),
        (SortTarget::Value, "b c a", "a c b"),
    ] {
        assert_eq!(sorted(target, SortOrder::Ascend), ascending, "{target:?}");
        assert_eq!(sorted(target, SortOrder::None), ascending, "{target:?}");
        assert_eq!(sorted(target, SortOrder::Descend), descending, "{target:?}");
    }
}

/// Seen on a real etcd: only an explicit order makes it look at the whole range before it cuts.
#[test]
fn sort_without_an_order_sorts_only_what_the_limit_let_through() {
    let mut machine = Machine::new();
    for (key, value) in [("s1", "8"), ("s2", "7"), ("s3", "6"), ("s4", "5"), ("s1", "0")] {
        machine.put(key, value);
    }
    let sorted = |order: SortOrder| {
        let request = pb::RangeRequest {
            limit: 1,
            sort_target: SortTarget::Value.into(),
            sort_order: order.into(),
            ..all()
        };
        keys(&machine.range(request).unwrap().kvs)
    };

    assert_eq!(sorted(SortOrder::Descend), "s2");
    assert_eq!(sorted(SortOrder::Ascend), "s1");
    let unordered = pb::RangeRequest { limit: 1, sort_target: SortTarget::Create.into(), ..all() };
    assert_eq!(keys(&machine.range(unordered).unwrap().kvs), "s1");
    let by_mod = pb::RangeRequest { limit: 1, sort_target: SortTarget::Mod.into(), ..all() };
    assert_eq!(keys(&machine.range(by_mod.clone()).unwrap().kvs), "s2");
    let ordered = pb::RangeRequest { sort_order: SortOrder::Descend.into(), ..by_mod };
    assert_eq!(keys(&machine.range(ordered).unwrap().kvs), "s1");
}

#[test]
fn range_at_old_compacted_and_future_revisions() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    machine.put("a", "2");
    machine.put("a", "3");
    machine.reply(compact(3));
    let at = |revision| machine.range(pb::RangeRequest { revision, ..all() });

    assert_eq!(at(3).unwrap().kvs[0].value, "2");
    assert_eq!(at(0).unwrap().kvs[0].value, "3");
    assert_eq!(at(-5).unwrap().kvs[0].value, "3");
    assert_eq!(at(2), Err(Refusal::Compacted));
    assert_eq!(at(5), Err(Refusal::FutureRevision));
}

#[test]
fn unknown_enum_values_in_a_range_sort_nothing() {
    let mut machine = Machine::new();
    machine.put("b", "1");
    machine.put("a", "2");

    for (sort_order, sort_target) in [(7, 0), (1, 9), (2, -1), (-3, 4)] {
        let response = machine.range(pb::RangeRequest { sort_order, sort_target, ..all() });
        assert_eq!(keys(&response.unwrap().kvs), "a b");
    }
}

#[test]
fn compare_knows_every_target_and_result() {
    let mut machine = Machine::new();
    machine.reply(grant(7));
    machine.put("a", "0");
    machine.reply(Command::Put(pb::PutRequest { lease: 7, ..put_request("a", "m") }));
    let targets = [
        (CompareTarget::Version, [1, 2, 3].map(TargetUnion::Version)),
        (CompareTarget::Create, [1, 2, 3].map(TargetUnion::CreateRevision)),
        (CompareTarget::Mod, [2, 3, 4].map(TargetUnion::ModRevision)),
        (CompareTarget::Lease, [6, 7, 8].map(TargetUnion::Lease)),
        (CompareTarget::Value, ["l", "m", "n"].map(|value| TargetUnion::Value(b(value)))),
    ];
    let results = [
        (CompareResult::Equal, [false, true, false]),
        (CompareResult::Greater, [true, false, false]),
        (CompareResult::Less, [false, false, true]),
        (CompareResult::NotEqual, [true, false, true]),
    ];
    for (target, operands) in targets {
        for (result, expected) in results {
            for (operand, expected) in operands.clone().into_iter().zip(expected) {
                let compare = compare("a", target, result, operand);
                let response = txn_reply(&mut machine, txn(vec![compare.clone()], vec![], vec![]));
                assert_eq!(response.succeeded, expected, "{compare:?}");
            }
        }
    }
}

#[test]
fn missing_key_compares_as_zeros_except_its_value() {
    let mut machine = Machine::new();
    let mut holds = |compare| txn_reply(&mut machine, txn(vec![compare], vec![], vec![])).succeeded;
    let value = TargetUnion::Value(Bytes::new());

    assert!(holds(version_is("x", 0)));
    assert!(holds(compare("x", CompareTarget::Lease, CompareResult::Less, TargetUnion::Lease(1))));
    for result in [CompareResult::Equal, CompareResult::NotEqual, CompareResult::Less] {
        assert!(!holds(compare("x", CompareTarget::Value, result, value.clone())));
    }
}

#[test]
fn compare_of_a_range_holds_when_it_holds_for_every_key() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    machine.put("b", "1");
    machine.put("b", "2");
    let mut holds = |end: &str, result, operand: TargetUnion, target| {
        let compare = pb::Compare { range_end: b(end), ..compare("a", target, result, operand) };
        txn_reply(&mut machine, txn(vec![compare], vec![], vec![])).succeeded
    };
    let version = CompareTarget::Version;
    let one = TargetUnion::Version(1);

    assert!(holds("b", CompareResult::Equal, one.clone(), version));
    assert!(!holds("c", CompareResult::Equal, one.clone(), version));
    assert!(holds("\0", CompareResult::Greater, TargetUnion::Version(0), version));
    assert!(!holds("\0", CompareResult::Equal, TargetUnion::Value(b("1")), CompareTarget::Value));
    assert!(holds("0", CompareResult::Equal, TargetUnion::Version(0), version), "empty range");
}

#[test]
fn unknown_compare_target_is_equal_and_unknown_result_holds() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    let mut holds = |target, result| {
        let compare = pb::Compare { target, result, ..version_is("a", 9) };
        txn_reply(&mut machine, txn(vec![compare], vec![], vec![])).succeeded
    };

    assert!(holds(77, CompareResult::Equal.into()));
    assert!(!holds(77, CompareResult::Greater.into()));
    assert!(holds(CompareTarget::Version.into(), 77));
    // The operand of another target counts as zero.
    assert!(holds(CompareTarget::Mod.into(), CompareResult::Greater.into()));
}

#[test]
fn txn_takes_one_branch_and_makes_one_revision() {
    let mut machine = Machine::new();
    let request = txn(
        vec![version_is("a", 0)],
        vec![put_op("a", "1"), put_op("b", "2")],
        vec![put_op("c", "3")],
    );

    let first = machine.apply(Command::Txn(request.clone()));
    let second = machine.apply(Command::Txn(request));

    let events = first.events.unwrap();
    assert_eq!((events.revision.get(), events.events.len()), (2, 2));
    assert_eq!(machine.get("a").unwrap().mod_revision, machine.get("b").unwrap().mod_revision);
    let Ok(Reply::Txn(second)) = second.outcome.reply else { panic!() };
    assert!(!second.succeeded);
    assert_eq!(machine.get("c").unwrap().mod_revision, 3);
}

#[test]
fn operations_see_earlier_ones_and_inner_headers_say_the_revision() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    let ops = vec![
        get_op("a"),
        delete_op("nothing"),
        put_op("b", "2"),
        get_op("b"),
        delete_op("a"),
        get_op("a"),
        delete_op("nothing"),
    ];

    let response = txn_reply(&mut machine, txn(vec![], ops, vec![]));

    let revisions: Vec<_> = response.responses.iter().map(inner_revision).collect();
    assert_eq!(revisions, [2, 2, 3, 3, 3, 3, 3]);
    let found = |index: usize| match response.responses[index].response.clone().unwrap() {
        Response::ResponseRange(range) => range.kvs.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!((found(0), found(3), found(5)), (1, 1, 0));
    assert_eq!(response.header, None);
}

#[test]
fn nested_branches_are_chosen_on_the_state_before_the_transaction() {
    let mut machine = Machine::new();
    let nested =
        txn(vec![version_is("a", 0)], vec![put_op("then", "1")], vec![put_op("else", "1")]);
    let request = txn(vec![], vec![put_op("a", "1"), op(Request::RequestTxn(nested))], vec![]);

    let response = txn_reply(&mut machine, request);

    let Some(Response::ResponseTxn(inner)) = &response.responses[1].response else { panic!() };
    assert!(inner.succeeded);
    assert_eq!(inner_revision(&response.responses[1]), 0);
    assert_eq!(inner_revision(&inner.responses[0]), 2);
    assert!(machine.get("then").is_some() && machine.get("else").is_none());
    assert_eq!(machine.revision(), 2);
}

#[test]
fn txn_is_refused_as_a_whole_for_the_first_thing_wrong_on_its_path() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    machine.put("a", "2");
    machine.reply(compact(3));
    let range_at = |revision| {
        op(Request::RequestRange(pb::RangeRequest { key: b("a"), revision, ..Default::default() }))
    };
    let leased = op(Request::RequestPut(pb::PutRequest { lease: 9, ..put_request("b", "") }));
    let blind =
        op(Request::RequestPut(pb::PutRequest { ignore_value: true, ..put_request("b", "") }));
    let mut refused = |ops: Vec<pb::RequestOp>| {
        let inside = op(Request::RequestTxn(txn(vec![], ops.clone(), vec![])));
        let nested = machine.refusal(Command::Txn(txn(vec![], vec![inside], vec![])));
        let plain = machine.refusal(Command::Txn(txn(vec![], ops, vec![])));
        assert_eq!(nested, plain);
        plain
    };

    assert_eq!(refused(vec![put_op("x", ""), range_at(4)]), Refusal::FutureRevision);
    assert_eq!(refused(vec![put_op("x", ""), range_at(2)]), Refusal::Compacted);
    assert_eq!(refused(vec![range_at(-1)]), Refusal::Compacted);
    assert_eq!(refused(vec![range_at(9), leased.clone()]), Refusal::FutureRevision);
    assert_eq!(refused(vec![leased.clone(), range_at(9)]), Refusal::LeaseNotFound);
    // The key must be there before the transaction.
    assert_eq!(refused(vec![put_op("b", "new"), blind]), Refusal::KeyNotFound);
    assert_eq!(refused(vec![pb::RequestOp { request: None }]), Refusal::KeyNotFound);
    let untaken = txn(vec![], vec![], vec![leased]);
    assert!(machine.apply(Command::Txn(untaken)).outcome.reply.is_ok());
}

#[test]
fn negative_revision_in_a_txn_is_compacted_only_below_the_first_revision() {
    let mut machine = Machine::new();
    let at = |revision| {
        let range = pb::RangeRequest { key: b("a"), revision, ..Default::default() };
        Command::Txn(txn(vec![], vec![op(Request::RequestRange(range)), put_op("b", "")], vec![]))
    };

    assert!(machine.apply(at(-1)).outcome.reply.is_ok());
    assert_eq!(machine.refusal(at(-2)), Refusal::Compacted);
}

/// No service lets these through; a log from somewhere else might hold them all the same.
#[test]
fn transactions_that_break_the_duplicate_rule_still_have_an_outcome() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    let blind = pb::PutRequest { ignore_value: true, ignore_lease: true, ..put_request("a", "") };
    let ops = vec![
        op(Request::RequestPut(blind)),
        delete_op("a"),
        put_op("a", "2"),
        put_op("a", "3"),
        delete_op("a"),
        put_op("a", "4"),
    ];

    let applied = machine.apply(Command::Txn(txn(vec![], ops, vec![])));

    assert_eq!(applied.events.unwrap().events.len(), 6);
    let kv = machine.get("a").unwrap();
    assert_eq!((kv.version, kv.create_revision, kv.value.as_ref()), (1, 3, b"4".as_slice()));
    let read = machine.store.read().unwrap();
    assert_eq!(read.get(b"a", Some(Revision::new(2))).unwrap().unwrap().value, "1");
    machine.put("a", "5");
    machine.reply(compact(4));
    assert_eq!(machine.get("a").unwrap().version, 2);
}

/// Overlaps are not looked for behind a delete without an end, not even by etcd, whose process this ends.
#[test]
fn put_that_keeps_what_an_earlier_delete_takes_is_refused_with_nothing_done() {
    let mut machine = Machine::new();
    machine.reply(grant(7));
    for key in ["a", "b", "c"] {
        machine.reply(Command::Put(pb::PutRequest { lease: 7, ..put_request(key, "1") }));
    }
    let before = machine.keys();
    let from = |key: &str| {
        op(Request::RequestDeleteRange(pb::DeleteRangeRequest {
            key: b(key),
            range_end: b("\0"),
            prev_kv: false,
        }))
    };
    let nest = |ops| op(Request::RequestTxn(txn(vec![], ops, vec![])));
    let value =
        op(Request::RequestPut(pb::PutRequest { ignore_value: true, ..put_request("b", "") }));
    let lease =
        op(Request::RequestPut(pb::PutRequest { ignore_lease: true, ..put_request("b", "2") }));
    for keeps in [value.clone(), lease] {
        for ops in [
            vec![from("a"), keeps.clone()],
            vec![put_op("0", "x"), from("b"), nest(vec![keeps.clone()])],
            vec![nest(vec![nest(vec![from("a")])]), keeps.clone()],
        ] {
            assert_eq!(
                machine.refusal(Command::Txn(txn(vec![], ops, vec![]))),
                Refusal::KeyNotFound
            );
        }
    }
    assert_eq!(machine.keys(), before);

    // What is deleted later, or is another key, is no reason.
    machine.reply(Command::Txn(txn(vec![], vec![from("c"), value.clone()], vec![])));
    assert_eq!(machine.get("b").unwrap().value, "1");
    machine.reply(Command::Txn(txn(vec![], vec![value, from("a")], vec![])));
    assert!(machine.get("b").is_none());
}

/// Room for so many bytes.
struct Small {
    bytes: usize,
    asked: std::cell::Cell<usize>,
}

impl Room for Small {
    fn keep(&self, bytes: usize) -> bool {
        self.asked.set(self.asked.get() + bytes);
        self.asked.get() <= self.bytes
    }
}

#[test]
fn answer_that_has_no_room_is_given_up_before_it_is_made() {
    let mut machine = Machine::new();
    for number in 0..50 {
        machine.put(&format!("k{number:02}"), &"v".repeat(1_000));
    }
    let view = machine.store.read().unwrap();
    let all = pb::RangeRequest { key: b("k"), range_end: b("l"), ..Default::default() };
    let txn = txn(vec![], vec![op(Request::RequestRange(all.clone())); 2], vec![]);
    let ask = |bytes| {
        let room = Small { bytes, asked: Default::default() };
        let full = matches!(range_within(&view, &all, &room), Err(ReadError::NoRoom));
        (full, room.asked.get())
    };
    let (full, needed) = ask(usize::MAX);
    assert!(!full && 50_000 < needed, "{needed}");
    assert_eq!(ask(needed), (false, needed));
    assert_eq!(ask(needed - 1), (true, needed));
    // Not all keys are listed, and no value is read, to find out.
    let (full, asked) = ask(1_000);
    assert!(full && asked < 2_000, "{asked}");

    let room = |bytes| Small { bytes, asked: Default::default() };
    assert!(matches!(read_only_txn_within(&view, &txn, &room(needed)), Err(ReadError::NoRoom)));
    let twice = read_only_txn_within(&view, &txn, &room(2 * needed)).unwrap().unwrap();
    assert_eq!(twice, read_only_txn(&view, &txn).unwrap().unwrap());
    // What is counted or cut off takes no room.
    let few = pb::RangeRequest { limit: 2, ..all.clone() };
    let count = pb::RangeRequest { count_only: true, ..all };
    assert!(range_within(&view, &few, &room(5_000)).is_ok());
    assert!(range_within(&view, &count, &room(0)).is_ok());
}

#[test]
fn read_only_transactions_are_served_from_a_reader() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    let request = txn(vec![version_is("a", 1)], vec![get_op("a")], vec![get_op("b")]);
    let view = machine.store.read().unwrap();

    let response = read_only_txn(&view, &request).unwrap().unwrap();
    let with_write = txn(vec![], vec![put_op("a", "")], vec![]);
    let in_other_branch = txn(vec![], vec![], vec![put_op("a", "")]);

    assert!(is_read_only(&request) && response.succeeded);
    assert_eq!(inner_revision(&response.responses[0]), 2);
    assert!(!is_read_only(&with_write) && !is_read_only(&in_other_branch));
    assert!(!is_read_only(&txn(vec![], vec![pb::RequestOp::default()], vec![])));
    assert_eq!(read_only_txn(&view, &with_write).unwrap(), Err(Refusal::WriteInReadOnly));
}

#[test]
fn compaction_refuses_compacted_and_future_revisions() {
    let mut machine = Machine::new();
    machine.put("a", "1");

    assert_eq!(machine.refusal(compact(3)), Refusal::FutureRevision);
    assert_eq!(machine.reply(compact(2)), Reply::Compact(pb::CompactionResponse { header: None }));
    assert_eq!(machine.refusal(compact(2)), Refusal::Compacted);
    assert_eq!(machine.refusal(compact(-1)), Refusal::Compacted);
    assert_eq!(machine.revision(), 2);
}

#[test]
fn lease_grant_refuses_in_etcds_order() {
    let mut machine = Machine::new();
    let applied = machine.apply(grant(7));
    let granted = LeaseChange::Granted { id: LeaseId::new(7), ttl_secs: 60 };
    let too_long = |id| Command::LeaseGrant(pb::LeaseGrantRequest { id, ttl: 9_000_000_001 });

    assert_eq!(applied.leases, [granted]);
    assert_eq!(applied.outcome.revision.get(), 1);
    assert_eq!(machine.refusal(too_long(0)), Refusal::LeaseNotFound);
    assert_eq!(machine.refusal(too_long(7)), Refusal::LeaseTtlTooLarge);
    assert_eq!(machine.refusal(grant(7)), Refusal::LeaseExists);
}

#[test]
fn lease_revoke_deletes_its_keys_in_one_revision_and_without_keys_makes_none() {
    let mut machine = Machine::new();
    machine.reply(grant(7));
    machine.reply(grant(8));
    for key in ["b", "a"] {
        machine.reply(Command::Put(pb::PutRequest { lease: 7, ..put_request(key, "") }));
    }

    let with_keys = machine.apply(revoke(7));
    let without = machine.apply(revoke(8));

    assert_eq!(with_keys.leases, [LeaseChange::Revoked(LeaseId::new(7))]);
    let events = with_keys.events.unwrap();
    assert_eq!((events.revision.get(), events.events.len()), (4, 2));
    assert_eq!(events.events[0].kv.as_ref().unwrap().key, "a");
    assert_eq!((without.events, without.outcome.revision.get()), (None, 4));
    assert_eq!(machine.refusal(revoke(7)), Refusal::LeaseNotFound);
}

#[test]
fn lease_checkpoint_is_kept_and_passes_over_leases_that_are_gone() {
    let mut machine = Machine::new();
    machine.reply(grant(7));
    let checkpoints = [7, 8].map(|id| pb::LeaseCheckpoint { id, remaining_ttl: 11 }).to_vec();

    let applied =
        machine.apply(Command::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints }));

    let id = LeaseId::new(7);
    assert_eq!(applied.leases, [LeaseChange::Checkpointed { id, remaining_secs: 11 }]);
    let lease = machine.store.read().unwrap().lease(id).unwrap().unwrap();
    assert_eq!((lease.ttl_secs, lease.remaining_secs), (60, 11));
}

#[test]
fn nospace_refuses_puts_and_grants_but_not_what_frees_space() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    machine.reply(grant(7));
    machine.reply(raise(pb::AlarmType::Nospace));
    assert_eq!(machine.refusal(put("a", "2")), Refusal::NoSpace);
    assert_eq!(machine.refusal(grant(8)), Refusal::NoSpace);
    let untaken_put = Command::Txn(txn(vec![], vec![], vec![put_op("a", "")]));
    assert_eq!(machine.refusal(untaken_put), Refusal::NoSpace);
    assert!(machine.apply(delete("x", "")).outcome.reply.is_ok());
    let deletes = Command::Txn(txn(vec![], vec![delete_op("a"), get_op("a")], vec![]));
    assert!(machine.apply(deletes).outcome.reply.is_ok());
    assert!(machine.apply(revoke(7)).outcome.reply.is_ok());
    assert!(machine.apply(compact(2)).outcome.reply.is_ok());
    machine.reply(alarm(pb::alarm_request::AlarmAction::Deactivate, pb::AlarmType::Nospace));
    machine.put("a", "2");
}

/// etcd before 3.6.14 looks for puts in the outer transaction only, and fills its disk.
#[test]
fn nospace_refuses_a_put_however_deep_and_in_whichever_branch() {
    let mut machine = Machine::new();
    machine.put("a", "1");
    machine.reply(raise(pb::AlarmType::Nospace));
    let before = machine.keys();
    let within = |then, otherwise| op(Request::RequestTxn(txn(vec![], then, otherwise)));
    for depth in 0..5 {
        for path in 0..2_u32.pow(depth) {
            let mut ops = vec![get_op("a"), put_op("a", "2")];
            for level in 0..depth {
                let nested = if path & (1 << level) == 0 {
                    within(ops, vec![])
                } else {
                    within(vec![], ops)
                };
                ops = vec![delete_op("x"), nested];
            }
            for request in [txn(vec![], ops.clone(), vec![]), txn(vec![], vec![], ops)] {
                let refusal = machine.refusal(Command::Txn(request));
                assert_eq!(refusal, Refusal::NoSpace, "depth {depth}, path {path:b}");
            }
        }
    }
    assert_eq!(machine.keys(), before);
    let harmless = within(vec![delete_op("a")], vec![get_op("a")]);
    machine.reply(Command::Txn(txn(vec![], vec![harmless], vec![])));
}

#[test]
fn corrupt_refuses_every_write_and_wins_over_nospace() {
    let mut machine = Machine::new();
    machine.reply(grant(7));
    machine.reply(raise(pb::AlarmType::Nospace));
    machine.reply(raise(pb::AlarmType::Corrupt));

    let only_read = Command::Txn(txn(vec![], vec![get_op("a")], vec![]));
    for command in [put("a", ""), delete("a", ""), only_read, compact(1), grant(8), revoke(7)] {
        assert_eq!(machine.refusal(command), Refusal::Corrupt);
    }
    let checkpoint = pb::LeaseCheckpointRequest { checkpoints: vec![] };
    assert!(machine.apply(Command::LeaseCheckpoint(checkpoint)).outcome.reply.is_ok());
}

#[test]
fn alarms_are_raised_listed_and_cleared_as_in_etcd() {
    use pb::alarm_request::AlarmAction::{Activate, Deactivate, Get};
    let mut machine = Machine::new();
    let mut ask = |action, kind| match machine.reply(alarm(action, kind)) {
        Reply::Alarm(response) => {
            response.alarms.iter().map(|a| (a.member_id, a.alarm)).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let (none, nospace, corrupt) =
        (pb::AlarmType::None, pb::AlarmType::Nospace, pb::AlarmType::Corrupt);

    assert_eq!(ask(Activate, none), []);
    assert_eq!(ask(Activate, nospace), [(5, 1)]);
    assert_eq!(ask(Activate, nospace), [(5, 1)]);
    assert_eq!(ask(Get, none), [(5, 1)]);
    assert_eq!(ask(Get, corrupt), []);
    assert_eq!(ask(Deactivate, corrupt), []);
    assert_eq!(ask(Deactivate, nospace), [(5, 1)]);
    assert_eq!(ask(Get, none), []);
    let strange = pb::AlarmRequest { action: 42, member_id: 1, alarm: 42 };
    let reply = machine.reply(Command::Alarm(strange));
    assert_eq!(reply, Reply::Alarm(pb::AlarmResponse::default()));
}

#[test]
fn events_share_the_commands_bytes() {
    let mut machine = Machine::new();
    let command = put("key", "value");
    let Command::Put(request) = &command else { panic!() };
    let (key, value) = (request.key.clone(), request.value.clone());

    let kv = machine.apply(command).events.unwrap().events[0].kv.clone().unwrap();

    assert_eq!((kv.key.as_ptr(), kv.value.as_ptr()), (key.as_ptr(), value.as_ptr()));
}

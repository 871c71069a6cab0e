//! Request checks: each refusal once, the overlap rule against a plain model.

use super::*;
use bytes::Bytes;

const OPS_MAX: usize = 128;

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn op(request: Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn put_op(key: &str) -> pb::RequestOp {
    op(Request::RequestPut(pb::PutRequest { key: bytes(key), ..Default::default() }))
}

fn get_op(key: &str) -> pb::RequestOp {
    op(Request::RequestRange(pb::RangeRequest { key: bytes(key), ..Default::default() }))
}

fn delete_op(key: &str, end: &str) -> pb::RequestOp {
    let (key, range_end) = (bytes(key), bytes(end));
    op(Request::RequestDeleteRange(pb::DeleteRangeRequest { key, range_end, prev_kv: false }))
}

fn txn_op(success: Vec<pb::RequestOp>, failure: Vec<pb::RequestOp>) -> pb::RequestOp {
    op(Request::RequestTxn(pb::TxnRequest { success, failure, compare: vec![] }))
}

fn check(success: Vec<pb::RequestOp>) -> Result<(), EtcdError> {
    let mirrored = pb::TxnRequest { failure: success.clone(), ..Default::default() };
    let request = pb::TxnRequest { success, ..Default::default() };
    let result = txn(&request, OPS_MAX);
    assert_eq!(txn(&mirrored, OPS_MAX), result, "both branches follow one rule");
    result
}

#[test]
fn range_needs_a_key_and_known_sort_options() {
    let good = pb::RangeRequest { key: bytes("k"), ..Default::default() };
    assert_eq!(range(&good), Ok(()));
    assert_eq!(range(&pb::RangeRequest::default()), Err(EtcdError::EmptyKey));
    for (sort_order, sort_target) in [(3, 0), (-1, 0), (0, 5), (0, 99)] {
        let request = pb::RangeRequest { sort_order, sort_target, ..good.clone() };
        assert_eq!(range(&request), Err(EtcdError::InvalidSortOption));
    }
    let unsorted = pb::RangeRequest { sort_target: 9, ..Default::default() };
    assert_eq!(range(&unsorted), Err(EtcdError::EmptyKey), "the key is checked first");
}

#[test]
fn put_refuses_what_contradicts_itself() {
    let good = pb::PutRequest { key: bytes("k"), ..Default::default() };
    assert_eq!(put(&good), Ok(()));
    assert_eq!(put(&pb::PutRequest::default()), Err(EtcdError::EmptyKey));
    let both = pb::PutRequest {
        ignore_value: true,
        value: bytes("v"),
        ignore_lease: true,
        lease: 1,
        ..good.clone()
    };
    assert_eq!(put(&both), Err(EtcdError::ValueProvided));
    let lease = pb::PutRequest { value: Bytes::new(), ..both };
    assert_eq!(put(&lease), Err(EtcdError::LeaseProvided));
    let neither = pb::PutRequest { lease: 0, ..lease };
    assert_eq!(put(&neither), Ok(()));
}

#[test]
fn every_operation_of_both_branches_is_checked() {
    assert_eq!(check(vec![put_op("")]), Err(EtcdError::EmptyKey));
    assert_eq!(check(vec![get_op("")]), Err(EtcdError::EmptyKey));
    assert_eq!(check(vec![delete_op("", "")]), Err(EtcdError::EmptyKey));
    assert_eq!(check(vec![pb::RequestOp { request: None }]), Err(EtcdError::KeyNotFound));
    assert_eq!(check(vec![txn_op(vec![], vec![put_op("")])]), Err(EtcdError::EmptyKey));
    let compare = vec![pb::Compare::default()];
    let request = pb::TxnRequest { compare, ..Default::default() };
    assert_eq!(txn(&request, OPS_MAX), Err(EtcdError::EmptyKey));
}

#[test]
fn nested_transactions_share_the_budget_of_their_level() {
    let gets = |count: usize| vec![get_op("k"); count];
    assert_eq!(check(gets(128)), Ok(()));
    assert_eq!(check(gets(129)), Err(EtcdError::TooManyOps));
    assert_eq!(check(vec![txn_op(gets(127), gets(127))]), Ok(()));
    assert_eq!(check(vec![txn_op(gets(128), vec![])]), Err(EtcdError::TooManyOps));
    let mut two = gets(1);
    two.push(txn_op(gets(126), vec![]));
    assert_eq!(check(two), Ok(()));
    let compare = vec![pb::Compare { key: bytes("k"), ..Default::default() }; 129];
    let request = pb::TxnRequest { compare, ..Default::default() };
    assert_eq!(txn(&request, OPS_MAX), Err(EtcdError::TooManyOps));
}

/// A transaction with this many levels, and an operation in the innermost.
fn nested(levels: usize) -> pb::TxnRequest {
    let mut success = vec![put_op("k")];
    for _ in 1..levels {
        success = vec![txn_op(success, vec![])];
    }
    pb::TxnRequest { success, ..Default::default() }
}

#[test]
fn deep_nesting_is_refused_before_it_costs_stack() {
    assert_eq!(txn(&nested(TXN_DEPTH_MAX), OPS_MAX), Ok(()));
    assert_eq!(txn(&nested(TXN_DEPTH_MAX + 1), usize::MAX), Err(EtcdError::TooManyOps));
    // The count of operations, as in etcd, where somebody lowered it.
    assert_eq!(txn(&nested(8), 8), Ok(()));
    assert_eq!(txn(&nested(9), 8), Err(EtcdError::TooManyOps));
}

/// The limit is the decoder's, not one level less: what may be nested is what can be read back from the log.
#[test]
fn protobuf_decoding_stops_where_validation_does() {
    let decode = |levels| pb::TxnRequest::decode(nested(levels).encode_to_vec().as_slice());
    assert_eq!(decode(TXN_DEPTH_MAX), Ok(nested(TXN_DEPTH_MAX)));
    for levels in [TXN_DEPTH_MAX + 1, 129, 2_000] {
        let refused = decode(levels).unwrap_err().to_string();
        assert!(refused.ends_with("recursion limit reached"), "{levels}: {refused}");
    }
}

#[test]
fn key_is_written_once_at_most() {
    let twice = Err(EtcdError::DuplicateKey);
    assert_eq!(check(vec![put_op("a"), put_op("a")]), twice);
    assert_eq!(check(vec![put_op("a"), put_op("b"), get_op("a")]), Ok(()));
    assert_eq!(check(vec![put_op("a"), delete_op("a", "")]), twice);
    assert_eq!(check(vec![delete_op("a", "c"), put_op("b")]), twice);
    assert_eq!(check(vec![put_op("c"), delete_op("a", "c")]), Ok(()), "the end is excluded");
    let open_end = check(vec![put_op("z"), delete_op("a", "\0")]);
    assert_eq!(open_end, Ok(()), "etcd does not look at a range without an end");
    assert_eq!(check(vec![delete_op("a", "d"), delete_op("b", "c"), delete_op("b", "")]), Ok(()));
    assert_eq!(check(vec![put_op("b"), delete_op("c", "a")]), Ok(()), "an empty range");
}

#[test]
fn nested_writes_count_and_branches_exclude_each_other() {
    let twice = Err(EtcdError::DuplicateKey);
    assert_eq!(check(vec![txn_op(vec![put_op("a")], vec![put_op("a")])]), Ok(()));
    assert_eq!(check(vec![txn_op(vec![put_op("a")], vec![]), put_op("a")]), twice);
    assert_eq!(check(vec![txn_op(vec![], vec![put_op("a")]), delete_op("a", "b")]), twice);
    assert_eq!(check(vec![txn_op(vec![delete_op("a", "b")], vec![]), put_op("a")]), twice);
    let two = vec![txn_op(vec![put_op("a")], vec![]), txn_op(vec![], vec![put_op("a")])];
    assert_eq!(check(two), twice);
    let branches = vec![txn_op(vec![put_op("a")], vec![delete_op("a", "b")])];
    assert_eq!(check(branches), Ok(()));
    let inner = txn_op(vec![txn_op(vec![put_op("a"), put_op("a")], vec![])], vec![]);
    assert_eq!(check(vec![inner]), twice);
}

/// Etcd checks a later nested transaction's puts against the deletes of earlier ones, but not the reverse.
#[test]
fn deletes_of_an_earlier_nested_transaction_cover_later_puts() {
    let delete_first =
        vec![txn_op(vec![delete_op("a", "c")], vec![]), txn_op(vec![put_op("b")], vec![])];
    assert_eq!(check(delete_first), Err(EtcdError::DuplicateKey));
    let put_first =
        vec![txn_op(vec![put_op("b")], vec![]), txn_op(vec![delete_op("a", "c")], vec![])];
    assert_eq!(check(put_first), Ok(()));
}

#[test]
fn deleted_ranges_agree_with_a_plain_list() {
    let letters = ["", "a", "b", "c", "d", "e", "f", "\0"];
    let mut state = 7_u64;
    for round in 0..2_000 {
        let mut plain: Vec<(&str, &str)> = Vec::new();
        let mut deletes = Deletes::default();
        for _ in 0..4 {
            let mut pick = |from: usize, count: usize| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
                letters[from + usize::try_from(state >> 33).unwrap() % count]
            };
            let (key, end) = (pick(1, 6), pick(0, 8));
            plain.push((key, end));
            deletes.add(key.as_bytes(), end.as_bytes());
        }
        for key in ["a", "aa", "b", "bb", "c", "cc", "d", "dd", "e", "ee", "f", "ff"] {
            let expected = plain.iter().any(|(start, end)| match *end {
                "" => *start == key,
                // Sorts before every start, so it covers nothing, as in etcd.
                end => *start <= key && key < end,
            });
            assert_eq!(deletes.contain(key.as_bytes()), expected, "{round}: {plain:?} {key}");
        }
    }
}

#[test]
fn ttl_is_raised_to_the_minimum_and_bounded_above() {
    assert_eq!(ttl(0, 2), Ok(2));
    assert_eq!(ttl(-7, 2), Ok(2));
    assert_eq!(ttl(60, 2), Ok(60));
    assert_eq!(ttl(9_000_000_000, 2), Ok(9_000_000_000));
    assert_eq!(ttl(9_000_000_001, 2), Err(EtcdError::LeaseTtlTooLarge));
}

#[test]
fn size_counts_what_etcd_wraps_around_the_request() {
    let request = pb::PutRequest { key: bytes("k"), ..Default::default() };
    let len = request.encoded_len();
    assert_eq!(size(&request, len + ENVELOPE_BYTES), Ok(()));
    assert_eq!(size(&request, len + ENVELOPE_BYTES - 1), Err(EtcdError::RequestTooLarge));
}

#[test]
fn one_linearizable_range_makes_the_transaction_linearizable() {
    let request = |success| pb::TxnRequest { success, ..Default::default() };
    let old = op(Request::RequestRange(pb::RangeRequest {
        key: bytes("a"),
        serializable: true,
        ..Default::default()
    }));
    assert!(is_serializable(&request(vec![])));
    assert!(is_serializable(&request(vec![old.clone()])));
    assert!(!is_serializable(&request(vec![old, get_op("a")])));
}

#[test]
fn cost_is_that_of_the_dearer_branch_with_nested_puts() {
    let put_cost = pb::PutRequest { key: bytes("abc"), ..Default::default() }.cost();
    assert_eq!(put_cost, 259);
    let request = pb::TxnRequest {
        success: vec![put_op("abc"), txn_op(vec![put_op("abc")], vec![])],
        failure: vec![put_op("abc"), get_op("abc")],
        compare: vec![],
    };
    assert_eq!(request.cost(), 2 * put_cost);
    let deep = pb::TxnRequest {
        failure: vec![txn_op(vec![], vec![txn_op(vec![get_op("a")], vec![put_op("abc")])])],
        ..Default::default()
    };
    assert_eq!(deep.cost(), put_cost);
    let deletes = pb::TxnRequest { success: vec![delete_op("a", "")], ..Default::default() };
    assert_eq!(deletes.cost(), 0);
}

//! Puts and deletes, alone and inside a transaction.

use crate::mvcc::{KeyRange, View, WriteTxn};
use crate::proto::etcdserverpb as pb;
use crate::types::LeaseId;

use super::{Refusal, Step, inner_header};

/// A put of its own: the lease is looked for before the key, unlike in a transaction.
pub(super) fn put(txn: &mut WriteTxn<'_>, request: &pb::PutRequest) -> Step<pb::PutResponse> {
    require_lease(txn, request.lease)?;
    if request.ignore_value || request.ignore_lease {
        require_key(txn, request)?;
    }
    let response = put_checked(txn, request)?;
    Ok(pb::PutResponse { header: None, ..response })
}

/// A put whose lease and key were looked for, also in what earlier operations of its transaction left.
pub(super) fn put_checked(
    txn: &mut WriteTxn<'_>,
    request: &pb::PutRequest,
) -> Step<pb::PutResponse> {
    let keeps = request.ignore_value || request.ignore_lease;
    let old = if keeps || request.prev_kv { txn.get(&request.key, None)? } else { None };
    let value = match &old {
        Some(old) if request.ignore_value => &old.value,
        _ => &request.value,
    };
    let lease = match &old {
        Some(old) if request.ignore_lease => old.lease,
        _ => request.lease,
    };
    txn.put(&request.key, value, lease)?;
    Ok(pb::PutResponse {
        header: inner_header(View::revision(txn)),
        prev_kv: old.filter(|_| request.prev_kv),
    })
}

pub(super) fn delete_range(
    txn: &mut WriteTxn<'_>,
    request: &pb::DeleteRangeRequest,
) -> Step<pb::DeleteRangeResponse> {
    let response = delete_inner(txn, request)?;
    Ok(pb::DeleteRangeResponse { header: None, ..response })
}

pub(super) fn delete_inner(
    txn: &mut WriteTxn<'_>,
    request: &pb::DeleteRangeRequest,
) -> Step<pb::DeleteRangeResponse> {
    let range = KeyRange::new(request.key.clone(), request.range_end.clone());
    let prev_kvs =
        if request.prev_kv { txn.scan(&range, View::revision(txn), None)?.kvs } else { Vec::new() };
    let deleted = txn.delete_range(&range)?;
    Ok(pb::DeleteRangeResponse {
        header: inner_header(View::revision(txn)),
        deleted: i64::try_from(deleted).unwrap_or(i64::MAX),
        prev_kvs,
    })
}

/// What a put inside a transaction needs, checked against the state before the transaction.
pub(super) fn check_put(view: &impl View, request: &pb::PutRequest) -> Step<()> {
    if request.ignore_value || request.ignore_lease {
        require_key(view, request)?;
    }
    require_lease(view, request.lease)
}

fn require_key(view: &impl View, request: &pb::PutRequest) -> Step<()> {
    match view.entry(&request.key, view.revision())? {
        Some(_) => Ok(()),
        None => Err(Refusal::KeyNotFound.into()),
    }
}

fn require_lease(view: &impl View, lease: i64) -> Step<()> {
    if lease == 0 || view.lease(LeaseId::new(lease))?.is_some() {
        return Ok(());
    }
    Err(Refusal::LeaseNotFound.into())
}

//! Refuses requests that are wrong in themselves, with etcd's answer and in etcd's order, before anything is done.
//!
//! Pure: a request goes in, an answer or nothing comes out. What depends on the store (does the lease exist, is the
//! revision compacted) is decided where the request is applied.
//!
//! # Invariants
//!
//! - Recursion is bounded: transactions nested deeper than [`TXN_DEPTH_MAX`] are refused like ones with too many
//!   operations, here or already by the protobuf decoder (`gate` words that refusal).
//! - Cost is about linear in the request: the operation count is checked before overlaps are.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use prost::Message;

use super::error::EtcdError;
use crate::limits::{LEASE_TTL_SECS_MAX, TXN_DEPTH_MAX};
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::request_op::Request;

/// What etcd wraps around a request before it measures it: a header with an id of 9 or 10 bytes, and the field's
/// own tag and length. Measured on a server with the shorter id.
const ENVELOPE_BYTES: usize = 17;

/// Checks a range.
pub fn range(request: &pb::RangeRequest) -> Result<(), EtcdError> {
    if request.key.is_empty() {
        return Err(EtcdError::EmptyKey);
    }
    let known = pb::range_request::SortOrder::try_from(request.sort_order).is_ok()
        && pb::range_request::SortTarget::try_from(request.sort_target).is_ok();
    if known { Ok(()) } else { Err(EtcdError::InvalidSortOption) }
}

/// Checks a put.
pub fn put(request: &pb::PutRequest) -> Result<(), EtcdError> {
    if request.key.is_empty() {
        return Err(EtcdError::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(EtcdError::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(EtcdError::LeaseProvided);
    }
    Ok(())
}

/// Checks a delete.
pub fn delete_range(request: &pb::DeleteRangeRequest) -> Result<(), EtcdError> {
    if request.key.is_empty() { Err(EtcdError::EmptyKey) } else { Ok(()) }
}

/// Checks a transaction and everything in it.
pub fn txn(request: &pb::TxnRequest, ops_max: usize) -> Result<(), EtcdError> {
    txn_shape(request, ops_max, TXN_DEPTH_MAX)?;
    Writes::of(&request.success)?;
    Writes::of(&request.failure)?;
    Ok(())
}

/// The budget is spent level by level: what the largest list of a level leaves is what each nested transaction gets.
fn txn_shape(request: &pb::TxnRequest, ops_max: usize, depth: usize) -> Result<(), EtcdError> {
    let largest = request.compare.len().max(request.success.len()).max(request.failure.len());
    let Some(left) = ops_max.checked_sub(largest) else { return Err(EtcdError::TooManyOps) };
    let Some(depth) = depth.checked_sub(1) else { return Err(EtcdError::TooManyOps) };
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(EtcdError::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Request::RequestRange(inner)) => range(inner)?,
            Some(Request::RequestPut(inner)) => put(inner)?,
            Some(Request::RequestDeleteRange(inner)) => delete_range(inner)?,
            Some(Request::RequestTxn(inner)) => txn_shape(inner, left, depth)?,
            None => return Err(EtcdError::KeyNotFound),
        }
    }
    Ok(())
}

/// What a list of operations writes, for the rule that no key is written twice.
#[derive(Default)]
struct Writes<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Deletes<'a>,
}

impl<'a> Writes<'a> {
    fn of(ops: &'a [pb::RequestOp]) -> Result<Self, EtcdError> {
        let mut writes = Self::default();
        for op in ops {
            if let Some(Request::RequestDeleteRange(delete)) = &op.request {
                writes.deletes.add(&delete.key, &delete.range_end);
            }
        }
        for op in ops {
            if let Some(Request::RequestTxn(nested)) = &op.request {
                writes.add_nested(nested)?;
            }
        }
        for op in ops {
            if let Some(Request::RequestPut(put)) = &op.request {
                writes.add_put(&put.key)?;
            }
        }
        Ok(writes)
    }

    fn add_put(&mut self, key: &'a [u8]) -> Result<(), EtcdError> {
        if self.deletes.contain(key) || !self.puts.insert(key) {
            return Err(EtcdError::DuplicateKey);
        }
        Ok(())
    }

    /// Only one branch of a nested transaction runs, so the two may put the same key.
    fn add_nested(&mut self, nested: &'a pb::TxnRequest) -> Result<(), EtcdError> {
        let then = Self::of(&nested.success)?;
        let otherwise = Self::of(&nested.failure)?;
        let both: BTreeSet<&[u8]> = then.puts.union(&otherwise.puts).copied().collect();
        for key in both {
            self.add_put(key)?;
        }
        self.deletes.join(then.deletes);
        self.deletes.join(otherwise.deletes);
        Ok(())
    }
}

/// The union of deleted ranges: disjoint, by start.
#[derive(Default)]
struct Deletes<'a>(BTreeMap<&'a [u8], &'a [u8]>);

/// A single key as a range would end at `key + 0x00`, which would have to be allocated; points are kept apart.
impl<'a> Deletes<'a> {
    fn add(&mut self, key: &'a [u8], range_end: &'a [u8]) {
        match range_end {
            // `[key, key]` stands for the point: no range has an end that is not after its start.
            [] => self.insert(key, key),
            _ if key < range_end => self.insert(key, range_end),
            // An open-ended delete (`range_end` "\0") is an empty range to etcd's own check, so it overlaps nothing.
            _ => {}
        }
    }

    fn insert(&mut self, mut start: &'a [u8], mut end: &'a [u8]) {
        if end == start && self.contain(start) {
            return;
        }
        // The range that begins before us may reach into us.
        if let Some((before, before_end)) = self.0.range(..=start).next_back()
            && start < *before_end
        {
            start = before;
            end = end.max(before_end);
        }
        // Those that begin inside us are part of us.
        while let Some((inside, inside_end)) = self.0.range(start..).next()
            && *inside < end
        {
            let (inside, inside_end) = (*inside, *inside_end);
            end = end.max(inside_end);
            self.0.remove(inside);
        }
        self.0.insert(start, end);
    }

    fn contain(&self, key: &[u8]) -> bool {
        let upto = (Bound::Unbounded, Bound::Included(key));
        let Some((start, end)) = self.0.range::<[u8], _>(upto).next_back() else { return false };
        key < *end || *start == key
    }

    fn join(&mut self, other: Self) {
        for (start, end) in other.0 {
            self.insert(start, end);
        }
    }
}

/// Refuses what etcd would not put in its log.
pub fn size(request: &impl Message, request_bytes_max: usize) -> Result<(), EtcdError> {
    if request_bytes_max < request.encoded_len() + ENVELOPE_BYTES {
        return Err(EtcdError::RequestTooLarge);
    }
    Ok(())
}

/// The TTL a lease gets: at least `min_secs`, as etcd raises small and negative ones.
pub fn ttl(asked_secs: i64, min_secs: i64) -> Result<i64, EtcdError> {
    if LEASE_TTL_SECS_MAX < asked_secs {
        return Err(EtcdError::LeaseTtlTooLarge);
    }
    Ok(asked_secs.max(min_secs))
}

/// Whether a read-only transaction is content with old data: each of its ranges says so. As in etcd, one without
/// ranges is.
pub fn is_serializable(request: &pb::TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|op| matches!(&op.request, Some(Request::RequestRange(range)) if range.serializable))
}

/// Bytes a put may add to the store, as etcd estimates them for the quota.
fn put_cost(request: &pb::PutRequest) -> u64 {
    const KEY_VALUE_OVERHEAD: u64 = 256;
    KEY_VALUE_OVERHEAD + request.key.len() as u64 + request.value.len() as u64
}

/// What a write answers beside its header, as ranges of the state before it: what it asks to get, and what it asks to
/// be told of what was there. Of a transaction both branches, because which is taken is not known before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Previous {
    /// The ranges.
    pub ranges: Vec<pb::RangeRequest>,
}

impl Previous {
    /// Of a put.
    pub fn of_put(request: &pb::PutRequest) -> Self {
        let mut all = Self::default();
        all.add_put(request);
        all
    }

    /// Of a delete.
    pub fn of_delete(request: &pb::DeleteRangeRequest) -> Self {
        let mut all = Self::default();
        all.add_delete(request);
        all
    }

    /// Of a transaction.
    pub fn of_txn(request: &pb::TxnRequest) -> Self {
        let mut all = Self::default();
        all.add_txn(request);
        all
    }

    fn add_put(&mut self, request: &pb::PutRequest) {
        if request.prev_kv {
            let key = request.key.clone();
            self.ranges.push(pb::RangeRequest { key, ..Default::default() });
        }
    }

    fn add_delete(&mut self, request: &pb::DeleteRangeRequest) {
        if request.prev_kv {
            let (key, range_end) = (request.key.clone(), request.range_end.clone());
            self.ranges.push(pb::RangeRequest { key, range_end, ..Default::default() });
        }
    }

    /// As deep as the request, whose nesting was checked.
    fn add_txn(&mut self, request: &pb::TxnRequest) {
        for op in request.success.iter().chain(&request.failure) {
            match &op.request {
                Some(Request::RequestRange(range)) => self.ranges.push(range.clone()),
                Some(Request::RequestPut(put)) => self.add_put(put),
                Some(Request::RequestDeleteRange(delete)) => self.add_delete(delete),
                Some(Request::RequestTxn(nested)) => self.add_txn(nested),
                None => {}
            }
        }
    }
}

/// Bytes a request may add to the store; 0 for one that adds none.
pub trait Cost {
    /// The estimate.
    fn cost(&self) -> u64;
}

impl Cost for pb::PutRequest {
    fn cost(&self) -> u64 {
        put_cost(self)
    }
}

impl Cost for pb::LeaseGrantRequest {
    fn cost(&self) -> u64 {
        const LEASE_OVERHEAD: u64 = 64;
        LEASE_OVERHEAD
    }
}

impl Cost for pb::TxnRequest {
    /// The dearer branch. Nested transactions count too, which etcd forgets before 3.6.14.
    fn cost(&self) -> u64 {
        let branch = |ops: &[pb::RequestOp]| -> u64 {
            ops.iter()
                .map(|op| match &op.request {
                    Some(Request::RequestPut(put)) => put_cost(put),
                    Some(Request::RequestTxn(nested)) => nested.cost(),
                    Some(Request::RequestRange(_) | Request::RequestDeleteRange(_)) | None => 0,
                })
                .sum()
        };
        branch(&self.success).max(branch(&self.failure))
    }
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;

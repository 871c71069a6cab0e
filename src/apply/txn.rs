//! Transactions: compare, choose, check everything, then do it.
//!
//! # Invariants
//!
//! - Which branches are taken, nested ones included, is decided by the state before the transaction.
//! - The whole path is checked before its first operation runs, so a refusal has changed nothing.
//! - A put that keeps a value or a lease finds one. etcd's check of overlaps does not see that a delete without an
//!   end takes the key away first, and its process ends then (3.5.30); here the transaction is refused.
//! - Operations see what earlier ones did; all of them share one revision.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::request_op::Request;
use pb::response_op::Response;

use crate::mvcc::{Entry, KeyRange, ReadTxn, StoreError, View, WriteTxn};
use crate::proto::etcdserverpb as pb;
use crate::proto::mvccpb::KeyValue;

use super::{Refusal, Room, Step, Unbounded, kv, range};

/// Who carries out a transaction's operations: the writer, or a reader that knows no writes.
trait Target {
    type View: View;
    type Room: Room;

    fn view(&self) -> &Self::View;
    /// Where the answer is put together.
    fn room(&self) -> &Self::Room;
    fn put(&mut self, request: &pb::PutRequest) -> Step<pb::PutResponse>;
    fn delete_range(&mut self, request: &pb::DeleteRangeRequest) -> Step<pb::DeleteRangeResponse>;
}

impl Target for WriteTxn<'_> {
    type View = Self;
    type Room = Unbounded;

    fn view(&self) -> &Self {
        self
    }

    fn room(&self) -> &Unbounded {
        &Unbounded
    }

    fn put(&mut self, request: &pb::PutRequest) -> Step<pb::PutResponse> {
        kv::put_checked(self, request)
    }

    fn delete_range(&mut self, request: &pb::DeleteRangeRequest) -> Step<pb::DeleteRangeResponse> {
        kv::delete_inner(self, request)
    }
}

pub(super) fn write(txn: &mut WriteTxn<'_>, request: &pb::TxnRequest) -> Step<pb::TxnResponse> {
    let path = Path::choose(txn, request)?;
    path.check(txn, &mut Vec::new())?;
    path.execute(txn)
}

pub(super) fn read(
    view: &ReadTxn,
    request: &pb::TxnRequest,
    room: &impl Room,
) -> Step<pb::TxnResponse> {
    let path = Path::choose(view, request)?;
    path.check(view, &mut Vec::new())?;
    path.execute(&mut Reader { view, room })
}

/// The operations a transaction will do, chosen on the state before it.
struct Path<'a> {
    succeeded: bool,
    ops: Vec<Op<'a>>,
}

enum Op<'a> {
    Range(&'a pb::RangeRequest),
    Put(&'a pb::PutRequest),
    DeleteRange(&'a pb::DeleteRangeRequest),
    Txn(Path<'a>),
}

impl<'a> Path<'a> {
    fn choose(view: &impl View, request: &'a pb::TxnRequest) -> Step<Self> {
        let mut succeeded = true;
        for compare in &request.compare {
            succeeded = succeeded && holds(view, compare)?;
        }
        let taken = if succeeded { &request.success } else { &request.failure };
        let ops = taken
            .iter()
            .map(|op| match &op.request {
                Some(Request::RequestRange(range)) => Ok(Op::Range(range)),
                Some(Request::RequestPut(put)) => Ok(Op::Put(put)),
                Some(Request::RequestDeleteRange(delete)) => Ok(Op::DeleteRange(delete)),
                Some(Request::RequestTxn(nested)) => Self::choose(view, nested).map(Op::Txn),
                None => Err(Refusal::KeyNotFound.into()),
            })
            .collect::<Step<Vec<_>>>()?;
        Ok(Self { succeeded, ops })
    }

    /// The first thing wrong along the path, in its order. `deleted` is what operations before this path take away.
    fn check(&self, view: &impl View, deleted: &mut Vec<KeyRange>) -> Step<()> {
        for op in &self.ops {
            match op {
                Op::Range(request) => check_range(view, request)?,
                Op::Put(request) => {
                    kv::check_put(view, request)?;
                    let keeps = request.ignore_value || request.ignore_lease;
                    if keeps && deleted.iter().any(|range| range.contains(&request.key)) {
                        return Err(Refusal::KeyNotFound.into());
                    }
                }
                Op::DeleteRange(request) => {
                    deleted.push(KeyRange::new(request.key.clone(), request.range_end.clone()));
                }
                Op::Txn(path) => path.check(view, deleted)?,
            }
        }
        Ok(())
    }

    fn execute(&self, target: &mut impl Target) -> Step<pb::TxnResponse> {
        let mut responses = Vec::with_capacity(self.ops.len());
        for op in &self.ops {
            let response = match op {
                Op::Range(request) => {
                    Response::ResponseRange(range::range(target.view(), request, target.room())?)
                }
                Op::Put(request) => Response::ResponsePut(target.put(request)?),
                Op::DeleteRange(request) => {
                    Response::ResponseDeleteRange(target.delete_range(request)?)
                }
                Op::Txn(path) => Response::ResponseTxn(pb::TxnResponse {
                    // etcd leaves the revision of nested transactions at 0.
                    header: Some(pb::ResponseHeader::default()),
                    ..path.execute(target)?
                }),
            };
            responses.push(pb::ResponseOp { response: Some(response) });
        }
        Ok(pb::TxnResponse { header: None, succeeded: self.succeeded, responses })
    }
}

/// Stricter than a range of its own: there, a negative revision means "newest".
fn check_range(view: &impl View, request: &pb::RangeRequest) -> Step<()> {
    if view.revision().get() < request.revision {
        return Err(Refusal::FutureRevision.into());
    }
    if request.revision != 0 && request.revision < view.compacted_raw() {
        return Err(Refusal::Compacted.into());
    }
    Ok(())
}

/// Whether a comparison holds for every key of its range. Of no keys at all it holds as for one with nothing
/// but zeros, except that a value is never compared with nothing.
fn holds(view: &impl View, compare: &pb::Compare) -> Result<bool, StoreError> {
    let keys = KeyRange::new(compare.key.clone(), compare.range_end.clone());
    let by_value = compare.target == CompareTarget::Value as i32;
    let (mut any, mut all) = (false, true);
    view.visit(&keys, view.revision(), &mut |key, entry| {
        any = true;
        all = if by_value {
            let KeyValue { value, .. } = view.load(key, entry)?;
            verdict(compare, value.as_ref().cmp(operand_value(compare)))
        } else {
            verdict(compare, ordering(compare, entry))
        };
        Ok(if all { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    if any {
        return Ok(all);
    }
    let nothing = Entry { at: Default::default(), create: 0, version: 0, lease: 0 };
    Ok(!by_value && verdict(compare, ordering(compare, &nothing)))
}

/// How the key stands to the operand. A missing or ill-matched operand is zero; an unknown target is equal.
fn ordering(compare: &pb::Compare, entry: &Entry) -> Ordering {
    let (found, operand) = match (CompareTarget::try_from(compare.target), &compare.target_union) {
        (Ok(CompareTarget::Version), Some(TargetUnion::Version(operand))) => {
            (entry.version, *operand)
        }
        (Ok(CompareTarget::Create), Some(TargetUnion::CreateRevision(operand))) => {
            (entry.create, *operand)
        }
        (Ok(CompareTarget::Mod), Some(TargetUnion::ModRevision(operand))) => {
            (entry.at.main, *operand)
        }
        (Ok(CompareTarget::Lease), Some(TargetUnion::Lease(operand))) => (entry.lease, *operand),
        (Ok(CompareTarget::Version), _) => (entry.version, 0),
        (Ok(CompareTarget::Create), _) => (entry.create, 0),
        (Ok(CompareTarget::Mod), _) => (entry.at.main, 0),
        (Ok(CompareTarget::Lease), _) => (entry.lease, 0),
        (Ok(CompareTarget::Value) | Err(_), _) => (0, 0),
    };
    found.cmp(&operand)
}

fn operand_value(compare: &pb::Compare) -> &[u8] {
    match &compare.target_union {
        Some(TargetUnion::Value(value)) => value,
        _ => &[],
    }
}

/// An unknown result holds, as in etcd.
fn verdict(compare: &pb::Compare, found: Ordering) -> bool {
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => found.is_eq(),
        Ok(CompareResult::Greater) => found.is_gt(),
        Ok(CompareResult::Less) => found.is_lt(),
        Ok(CompareResult::NotEqual) => found.is_ne(),
        Err(_) => true,
    }
}

/// A reader as the target of a transaction.
struct Reader<'a, R> {
    view: &'a ReadTxn,
    room: &'a R,
}

impl<R: Room> Target for Reader<'_, R> {
    type View = ReadTxn;
    type Room = R;

    fn view(&self) -> &ReadTxn {
        self.view
    }

    fn room(&self) -> &R {
        self.room
    }

    fn put(&mut self, _: &pb::PutRequest) -> Step<pb::PutResponse> {
        Err(Refusal::WriteInReadOnly.into())
    }

    fn delete_range(&mut self, _: &pb::DeleteRangeRequest) -> Step<pb::DeleteRangeResponse> {
        Err(Refusal::WriteInReadOnly.into())
    }
}

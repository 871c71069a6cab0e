//! The replicated state machine: a command changes the store and yields a reply. A function of its arguments.
//!
//! What etcd answers, and in which order it looks for reasons to refuse, is copied to the letter: clients have
//! been built against it.
//!
//! # Shape
//!
//! [`apply`] runs inside [`crate::mvcc::Store::write`], one call per committed entry, many calls per batch.
//! [`range`] and [`read_only_txn`] serve reads from a [`ReadTxn`]; each asks a [`Room`] before its answer grows. Replies
//! carry no header of their own; the answers inside a transaction do, with the revision only, as etcd's do.
//!
//! # Invariants
//!
//! - Deterministic: no clock, no chance, no configuration. Equal stores and equal commands give equal stores.
//! - Total: whatever decodes has an outcome. A refusal changes nothing but the applied entry's id.
//! - Only the store's own failure is an `Err`; the batch is undone then, and the node must not go on.
//!
//! # Not here
//!
//! Checks of a request's shape and size (`etcd`), which ids and TTLs to propose (`etcd`), when leases end
//! (`lease`).

mod alarm;
mod cluster;
mod kv;
mod lease;
mod operations;
mod range;
mod room;
mod txn;

#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::command::Command;
use crate::mvcc::{ReadTxn, RevisionError, RevisionEvents, StoreError, View, WriteTxn};
use crate::proto::etcdserverpb as pb;
use crate::proto::node::ClusterReply;
use crate::types::{LeaseId, LogId, Revision};

pub use cluster::{flags, format, node, nodes};
pub use operations::Operations;
pub use room::{Room, Unbounded};

/// A definite "no" that changed nothing. Mapped to etcd's status code and text in `etcd::error`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `ignore_value`/`ignore_lease` on a key that is not there; an empty operation in a transaction.
    KeyNotFound,
    /// The lease does not exist.
    LeaseNotFound,
    /// A lease with this id exists.
    LeaseExists,
    /// The TTL is longer than etcd allows.
    LeaseTtlTooLarge,
    /// The revision is compacted.
    Compacted,
    /// The revision is not written yet.
    FutureRevision,
    /// The NOSPACE alarm is raised.
    NoSpace,
    /// The CORRUPT alarm is raised.
    Corrupt,
    /// A write reached [`read_only_txn`]; whoever called it had to ask [`is_read_only`] first.
    WriteInReadOnly,
}

/// etcd's response messages, headers empty: the service fills them in.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each is the response to the command of the same name")]
pub enum Reply {
    Put(pb::PutResponse),
    DeleteRange(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact(pb::CompactionResponse),
    LeaseGrant(pb::LeaseGrantResponse),
    LeaseRevoke(pb::LeaseRevokeResponse),
    LeaseCheckpoint,
    Alarm(pb::AlarmResponse),
    Cluster(ClusterReply),
}

/// What applying a command answered, and the store's revision after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Newest revision after the command.
    pub revision: Revision,
    /// The reply, or the definite "no".
    pub reply: Result<Reply, Refusal>,
}

/// A change that the lessor must know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseChange {
    /// A new lease.
    Granted {
        /// The lease.
        id: LeaseId,
        /// Seconds granted.
        ttl_secs: i64,
    },
    /// A lease is gone.
    Revoked(LeaseId),
    /// How long it still has.
    Checkpointed {
        /// The lease.
        id: LeaseId,
        /// Seconds left.
        remaining_secs: i64,
    },
}

/// What one applied command did.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// For the one who proposed it.
    pub outcome: Outcome,
    /// For watchers.
    pub events: Option<RevisionEvents>,
    /// For the lessor.
    pub leases: Vec<LeaseChange>,
}

/// Why a command stops half-way: because the answer is "no", because the store failed, or because the answer has no
/// room (never for a command: commands are given all they want).
enum Stop {
    Refused(Refusal),
    Failed(StoreError),
    NoRoom,
}

type Step<T> = Result<T, Stop>;

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<RevisionError> for Refusal {
    fn from(error: RevisionError) -> Self {
        match error {
            RevisionError::Compacted(_) => Self::Compacted,
            RevisionError::Future => Self::FutureRevision,
        }
    }
}

impl From<RevisionError> for Stop {
    fn from(error: RevisionError) -> Self {
        Self::Refused(error.into())
    }
}

/// Sorts the kinds of "no" into the two levels of a result.
fn settle<T>(step: Step<T>) -> Result<Result<T, Refusal>, ReadError> {
    match step {
        Ok(value) => Ok(Ok(value)),
        Err(Stop::Refused(refusal)) => Ok(Err(refusal)),
        Err(Stop::Failed(error)) => Err(ReadError::Store(error)),
        Err(Stop::NoRoom) => Err(ReadError::NoRoom),
    }
}

/// [`settle`] for what asked nobody for room.
fn settle_unbounded<T>(step: Step<T>) -> Result<Result<T, Refusal>, StoreError> {
    settle(step).map_err(|error| match error {
        ReadError::Store(error) => error,
        ReadError::NoRoom => unreachable!("an unbounded room is never full"),
    })
}

/// Why there is no answer to a read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The [`Room`] did not let the answer grow.
    #[error("no room for the answer")]
    NoRoom,
}

/// Applies one committed command. Deterministic: equal stores and equal commands give equal stores.
pub fn apply(txn: &mut WriteTxn<'_>, id: LogId, command: &Command) -> Result<Applied, StoreError> {
    let mut leases = Vec::new();
    let reply = settle_unbounded(
        alarm::permit(txn, command).and_then(|()| run(txn, command, &mut leases)),
    )?;
    let events = txn.end_revision();
    debug_assert!(reply.is_ok() || events.is_none(), "a refused command changed keys");
    txn.set_applied(id);
    let outcome = Outcome { revision: View::revision(txn), reply };
    Ok(Applied { outcome, events, leases })
}

fn run(txn: &mut WriteTxn<'_>, command: &Command, leases: &mut Vec<LeaseChange>) -> Step<Reply> {
    match command {
        Command::Put(request) => kv::put(txn, request).map(Reply::Put),
        Command::DeleteRange(request) => kv::delete_range(txn, request).map(Reply::DeleteRange),
        Command::Txn(request) => txn::write(txn, request).map(Reply::Txn),
        Command::Compact(request) => {
            txn.compact(Revision::new(request.revision))??;
            Ok(Reply::Compact(pb::CompactionResponse { header: None }))
        }
        Command::LeaseGrant(request) => lease::grant(txn, request, leases).map(Reply::LeaseGrant),
        Command::LeaseRevoke(request) => {
            lease::revoke(txn, request, leases).map(Reply::LeaseRevoke)
        }
        Command::LeaseCheckpoint(request) => {
            lease::checkpoint(txn, request, leases)?;
            Ok(Reply::LeaseCheckpoint)
        }
        Command::Alarm(request) => alarm::alarm(txn, request).map(Reply::Alarm),
        Command::Cluster(change) => cluster::change(txn, change).map(Reply::Cluster),
    }
}

/// Serves a range from one moment of the store, however large it is.
pub fn range(
    view: &ReadTxn,
    request: &pb::RangeRequest,
) -> Result<Result<pb::RangeResponse, Refusal>, StoreError> {
    settle_unbounded(range::range(view, request, &Unbounded).map(without_header))
}

/// Serves a range from one moment of the store, if there is room for it.
pub fn range_within(
    view: &ReadTxn,
    request: &pb::RangeRequest,
    room: &impl Room,
) -> Result<Result<pb::RangeResponse, Refusal>, ReadError> {
    settle(range::range(view, request, room).map(without_header))
}

fn without_header(response: pb::RangeResponse) -> pb::RangeResponse {
    pb::RangeResponse { header: None, ..response }
}

/// Serves a transaction that only reads.
pub fn read_only_txn(
    view: &ReadTxn,
    request: &pb::TxnRequest,
) -> Result<Result<pb::TxnResponse, Refusal>, StoreError> {
    settle_unbounded(txn::read(view, request, &Unbounded))
}

/// Serves a transaction that only reads, if there is room for its answer.
pub fn read_only_txn_within(
    view: &ReadTxn,
    request: &pb::TxnRequest,
    room: &impl Room,
) -> Result<Result<pb::TxnResponse, Refusal>, ReadError> {
    settle(txn::read(view, request, room))
}

/// Whether a transaction can be served by [`read_only_txn`]: both branches hold nothing but ranges.
pub fn is_read_only(request: &pb::TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|op| matches!(op.request, Some(pb::request_op::Request::RequestRange(_))))
}

/// The header of an answer inside a transaction.
fn inner_header(revision: Revision) -> Option<pb::ResponseHeader> {
    Some(pb::ResponseHeader { revision: revision.get(), ..Default::default() })
}

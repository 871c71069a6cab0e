//! The replicated state machine: a command changes the store and yields a reply. A function of its arguments.
//!
//! What etcd answers, and in which order it looks for reasons to refuse, is copied to the letter: clients have
//! been built against it.
//!
//! # Shape
//!
//! [`apply`] runs inside [`crate::mvcc::Store::write`], one call per committed entry, many calls per batch.
//! [`range`] and [`read_only_txn`] serve reads from a [`ReadTxn`]. Replies carry no header of their own; the
//! answers inside a transaction do, with the revision only, as etcd's do.
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
mod txn;

#[cfg(test)]
mod tests;

use crate::command::Command;
use crate::mvcc::{ReadTxn, RevisionError, RevisionEvents, StoreError, View, WriteTxn};
use crate::proto::etcdserverpb as pb;
use crate::proto::node::ClusterReply;
use crate::types::{LeaseId, LogId, Revision};

pub use cluster::{flags, node, nodes};
pub use operations::Operations;

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

/// Why a command stops half-way: because the answer is "no", or because the store failed.
enum Stop {
    Refused(Refusal),
    Failed(StoreError),
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

/// Sorts the two kinds of "no" into the two levels of a result.
fn settle<T>(step: Step<T>) -> Result<Result<T, Refusal>, StoreError> {
    match step {
        Ok(value) => Ok(Ok(value)),
        Err(Stop::Refused(refusal)) => Ok(Err(refusal)),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Applies one committed command. Deterministic: equal stores and equal commands give equal stores.
pub fn apply(txn: &mut WriteTxn<'_>, id: LogId, command: &Command) -> Result<Applied, StoreError> {
    let mut leases = Vec::new();
    let reply = settle(alarm::permit(txn, command).and_then(|()| run(txn, command, &mut leases)))?;
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

/// Serves a range from one moment of the store.
pub fn range(
    view: &ReadTxn,
    request: &pb::RangeRequest,
) -> Result<Result<pb::RangeResponse, Refusal>, StoreError> {
    settle(
        range::range(view, request).map(|response| pb::RangeResponse { header: None, ..response }),
    )
}

/// Serves a transaction that only reads.
pub fn read_only_txn(
    view: &ReadTxn,
    request: &pb::TxnRequest,
) -> Result<Result<pb::TxnResponse, Refusal>, StoreError> {
    settle(txn::read(view, request))
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

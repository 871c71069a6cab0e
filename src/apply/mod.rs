//! The replicated state machine: a command changes the store and yields a reply. A function of its arguments.
//!
//! API SKELETON: bodies to be written.

use crate::command::Command;
use crate::mvcc::{ReadTxn, RevisionEvents, StoreError, WriteTxn};
use crate::proto::etcdserverpb as pb;
use crate::types::{LeaseId, LogId, Revision};

/// A definite "no" that changed nothing. Mapped to etcd's status code and text in `etcd::error`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `ignore_value`/`ignore_lease` on a key that is not there.
    KeyNotFound,
    /// The lease does not exist.
    LeaseNotFound,
    /// A lease with this id exists.
    LeaseExists,
    /// The revision is compacted.
    Compacted,
    /// The revision is not written yet.
    FutureRevision,
    /// The NOSPACE alarm is raised.
    NoSpace,
    /// The CORRUPT alarm is raised.
    Corrupt,
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
#[derive(Clone, Debug)]
pub struct Applied {
    /// For the one who proposed it.
    pub outcome: Outcome,
    /// For watchers.
    pub events: Option<RevisionEvents>,
    /// For the lessor.
    pub leases: Vec<LeaseChange>,
}

/// Applies one committed command. Deterministic: equal stores and equal commands give equal stores.
pub fn apply(_txn: &mut WriteTxn, _id: LogId, _command: &Command) -> Result<Applied, StoreError> {
    todo!()
}

/// Serves a range from one moment of the store.
pub fn range(_view: &ReadTxn, _request: &pb::RangeRequest) -> Result<Result<pb::RangeResponse, Refusal>, StoreError> {
    todo!()
}

/// Serves a transaction that only reads.
pub fn read_only_txn(_view: &ReadTxn, _request: &pb::TxnRequest) -> Result<Result<pb::TxnResponse, Refusal>, StoreError> {
    todo!()
}

//! What is written to the replicated log: etcd's own requests, encoded once.
//!
//! The bytes made here are the bytes on the card and on the wire between nodes; the state machine decodes
//! them when it applies. Everything timed or random (lease ids, expiry, compaction points) is decided before a
//! command is made, so that applying it is a function of the bytes alone.
//!
//! # Invariants
//!
//! - The first byte is the format version. A node that meets a version it does not know stops and says so.
//! - `decode(encode(c)) == c`, and the encoding of version 1 never changes (golden bytes in the tests).

mod format;

use bytes::Bytes;

use crate::proto::etcdserverpb as pb;
use crate::proto::node::ClusterChange;
use crate::types::LeaseId;
use crate::versions;

pub use format::DecodeError;

/// One change of the replicated state.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Write one key.
    Put(pb::PutRequest),
    /// Delete a key or a range.
    DeleteRange(pb::DeleteRangeRequest),
    /// Compare, then do one of two lists of operations.
    Txn(pb::TxnRequest),
    /// Forget history below a revision.
    Compact(pb::CompactionRequest),
    /// Grant a lease; the id is always chosen already.
    LeaseGrant(pb::LeaseGrantRequest),
    /// Revoke a lease and delete its keys; also how an expiry is written.
    LeaseRevoke(pb::LeaseRevokeRequest),
    /// Remember how long leases still have, so that a new leader need not start them afresh.
    LeaseCheckpoint(pb::LeaseCheckpointRequest),
    /// Raise or clear an alarm.
    Alarm(pb::AlarmRequest),
    /// Change what the cluster knows of itself: critical flags, starts and retirements of nodes.
    Cluster(ClusterChange),
}

/// How long an entry may wait for company before its barrier starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody is waiting: the barrier starts at once.
    Urgent,
    /// Only renews leases: may wait `wal-linger`.
    Lease,
}

/// A command's bytes, as they stand in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded(Bytes);

impl Encoded {
    /// Takes bytes that came from the log or a peer; they are checked when decoded.
    pub const fn from_log(bytes: Bytes) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub const fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// The request alone, as a protobuf message of etcd's API.
    pub fn message(&self) -> Bytes {
        format::message_of(&self.0)
    }

    /// The format, readable without decoding.
    pub fn format(&self) -> u32 {
        format::format(&self.0)
    }

    /// The class, readable without decoding.
    pub fn class(&self) -> Class {
        format::class(&self.0)
    }

    /// The command.
    pub fn decode(&self) -> Result<Command, DecodeError> {
        format::decode(&self.0)
    }
}

impl Command {
    /// Encodes for the log, in the format that every release reads.
    pub fn encode(&self) -> Encoded {
        self.encode_in(versions::FORMAT_FIRST)
    }

    /// Encodes for the log in the cluster's format, or in the newest that this release knows if that is older.
    pub fn encode_in(&self, format: u32) -> Encoded {
        let format = format.clamp(versions::FORMAT_FIRST, versions::own().format);
        Encoded(format::encode(self, u8::try_from(format).unwrap_or(u8::MAX)))
    }

    /// The name in `wal dump` and in metrics.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Put(_) => "put",
            Self::DeleteRange(_) => "delete_range",
            Self::Txn(_) => "txn",
            Self::Compact(_) => "compaction",
            Self::LeaseGrant(_) => "lease_grant",
            Self::LeaseRevoke(_) => "lease_revoke",
            Self::LeaseCheckpoint(_) => "lease_checkpoint",
            Self::Alarm(_) => "alarm",
            Self::Cluster(_) => "cluster",
        }
    }

    /// How long this command may wait for company.
    ///
    /// Lease renewals of Kubernetes (`/registry/leases/`, `/registry/masterleases/`) are most of an idle
    /// cluster's writes, and their clients wait 5 seconds and more. Nothing else is ever delayed.
    pub fn class(&self) -> Class {
        let renews = match self {
            Self::Put(put) => is_lease_key(&put.key),
            Self::Txn(txn) => only_renews(txn),
            Self::LeaseCheckpoint(_) => true,
            Self::DeleteRange(_)
            | Self::Compact(_)
            | Self::LeaseGrant(_)
            | Self::LeaseRevoke(_)
            | Self::Alarm(_)
            | Self::Cluster(_) => false,
        };
        if renews { Class::Lease } else { Class::Urgent }
    }
}

const LEASE_PREFIXES: [&[u8]; 2] = [b"/registry/leases/", b"/registry/masterleases/"];

fn is_lease_key(key: &[u8]) -> bool {
    LEASE_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

/// Every write in either branch is a put of a lease object.
fn only_renews(txn: &pb::TxnRequest) -> bool {
    use pb::request_op::Request;
    let mut puts = 0;
    for op in txn.success.iter().chain(&txn.failure) {
        match &op.request {
            Some(Request::RequestPut(put)) if is_lease_key(&put.key) => puts += 1,
            Some(Request::RequestRange(_)) => {}
            Some(
                Request::RequestPut(_) | Request::RequestDeleteRange(_) | Request::RequestTxn(_),
            )
            | None => return false,
        }
    }
    puts > 0
}

/// A lease id chosen by the server: positive and never 0, which means "none" on the wire.
pub fn lease_id_from(random: u64) -> LeaseId {
    let positive = i64::try_from(random >> 1).unwrap_or(i64::MAX);
    LeaseId::new(positive.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str) -> pb::PutRequest {
        pb::PutRequest { key: Bytes::copy_from_slice(key.as_bytes()), ..Default::default() }
    }

    fn txn(keys: &[&str]) -> Command {
        let success = keys
            .iter()
            .map(|key| pb::RequestOp {
                request: Some(pb::request_op::Request::RequestPut(put(key))),
            })
            .collect();
        Command::Txn(pb::TxnRequest { success, ..Default::default() })
    }

    #[test]
    fn only_lease_renewals_may_wait() {
        assert_eq!(txn(&["/registry/leases/kube-system/kcm"]).class(), Class::Lease);
        assert_eq!(txn(&["/registry/masterleases/10.0.0.1"]).class(), Class::Lease);
        assert_eq!(txn(&["/registry/pods/a"]).class(), Class::Urgent);
        assert_eq!(txn(&["/registry/leases/a", "/registry/pods/a"]).class(), Class::Urgent);
        assert_eq!(txn(&[]).class(), Class::Urgent);
        assert_eq!(Command::Put(put("/registry/leases/a")).class(), Class::Lease);
    }

    #[test]
    fn class_survives_encoding() {
        for command in [txn(&["/registry/leases/a"]), txn(&["/registry/pods/a"])] {
            assert_eq!(command.encode().class(), command.class());
        }
    }

    #[test]
    fn server_chosen_lease_ids_are_positive() {
        for random in [0, 1, 2, u64::MAX, 1 << 63] {
            assert!(LeaseId::new(0) < lease_id_from(random));
        }
    }
}

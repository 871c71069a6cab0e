//! Grants, revocations and checkpoints of leases. When a lease ends is decided elsewhere and arrives as a
//! revocation.

use crate::limits::LEASE_TTL_SECS_MAX;
use crate::mvcc::{LeaseRecord, View, WriteTxn};
use crate::proto::etcdserverpb as pb;
use crate::types::LeaseId;

use super::{LeaseChange, Refusal, Step};

/// Id and TTL were chosen before the command was proposed.
pub(super) fn grant(
    txn: &mut WriteTxn<'_>,
    request: &pb::LeaseGrantRequest,
    changes: &mut Vec<LeaseChange>,
) -> Step<pb::LeaseGrantResponse> {
    let id = LeaseId::new(request.id);
    if request.id == 0 {
        return Err(Refusal::LeaseNotFound.into());
    }
    if LEASE_TTL_SECS_MAX < request.ttl {
        return Err(Refusal::LeaseTtlTooLarge.into());
    }
    if txn.lease(id)?.is_some() {
        return Err(Refusal::LeaseExists.into());
    }
    txn.set_lease(&LeaseRecord { id, ttl_secs: request.ttl, remaining_secs: 0 })?;
    changes.push(LeaseChange::Granted { id, ttl_secs: request.ttl });
    Ok(pb::LeaseGrantResponse { id: request.id, ttl: request.ttl, ..Default::default() })
}

/// Deletes the lease's keys in one revision, sorted by key.
pub(super) fn revoke(
    txn: &mut WriteTxn<'_>,
    request: &pb::LeaseRevokeRequest,
    changes: &mut Vec<LeaseChange>,
) -> Step<pb::LeaseRevokeResponse> {
    let id = LeaseId::new(request.id);
    if txn.lease(id)?.is_none() {
        return Err(Refusal::LeaseNotFound.into());
    }
    txn.revoke_lease(id)?;
    changes.push(LeaseChange::Revoked(id));
    Ok(pb::LeaseRevokeResponse { header: None })
}

/// Leases revoked since the command was made are passed over.
pub(super) fn checkpoint(
    txn: &mut WriteTxn<'_>,
    request: &pb::LeaseCheckpointRequest,
    changes: &mut Vec<LeaseChange>,
) -> Step<()> {
    for checkpoint in &request.checkpoints {
        let id = LeaseId::new(checkpoint.id);
        if let Some(lease) = txn.lease(id)? {
            let remaining_secs = checkpoint.remaining_ttl;
            txn.set_lease(&LeaseRecord { remaining_secs, ..lease })?;
            changes.push(LeaseChange::Checkpointed { id, remaining_secs });
        }
    }
    Ok(())
}

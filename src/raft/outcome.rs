//! Carries outcomes between nodes: what the leader's apply answered, for the member whose client asked.
//!
//! # Invariants
//!
//! - Total: every reply and every refusal has its field or number, for ever.
//! - `from_wire(to_wire(outcome)) == outcome`.

use crate::apply::{Outcome, Refusal, Reply};
use crate::proto::node as wire;
use crate::proto::node::outcome::Reply as Wire;
use crate::types::Revision;

/// Every refusal, for [`refusal_of`].
const REFUSALS: [Refusal; 9] = [
    Refusal::KeyNotFound,
    Refusal::LeaseNotFound,
    Refusal::LeaseExists,
    Refusal::LeaseTtlTooLarge,
    Refusal::Compacted,
    Refusal::FutureRevision,
    Refusal::NoSpace,
    Refusal::Corrupt,
    Refusal::WriteInReadOnly,
];

/// The number on the wire, for ever. A new refusal gets a new one, and a row in [`REFUSALS`].
const fn number(refusal: &Refusal) -> u32 {
    match refusal {
        Refusal::KeyNotFound => 1,
        Refusal::LeaseNotFound => 2,
        Refusal::LeaseExists => 3,
        Refusal::LeaseTtlTooLarge => 4,
        Refusal::Compacted => 5,
        Refusal::FutureRevision => 6,
        Refusal::NoSpace => 7,
        Refusal::Corrupt => 8,
        Refusal::WriteInReadOnly => 9,
    }
}

fn refusal_of(wanted: u32) -> Option<Refusal> {
    REFUSALS.into_iter().find(|refusal| number(refusal) == wanted)
}

/// As it travels.
pub(super) fn to_wire(outcome: Outcome) -> wire::Outcome {
    let reply = match outcome.reply {
        Err(refusal) => Wire::Refusal(number(&refusal)),
        Ok(Reply::Put(reply)) => Wire::Put(reply),
        Ok(Reply::DeleteRange(reply)) => Wire::DeleteRange(reply),
        Ok(Reply::Txn(reply)) => Wire::Txn(reply),
        Ok(Reply::Compact(reply)) => Wire::Compact(reply),
        Ok(Reply::LeaseGrant(reply)) => Wire::LeaseGrant(reply),
        Ok(Reply::LeaseRevoke(reply)) => Wire::LeaseRevoke(reply),
        Ok(Reply::LeaseCheckpoint) => Wire::LeaseCheckpoint(wire::Nothing {}),
        Ok(Reply::Alarm(reply)) => Wire::Alarm(reply),
        Ok(Reply::Cluster(reply)) => Wire::Cluster(reply),
    };
    wire::Outcome { revision: outcome.revision.get(), reply: Some(reply) }
}

/// As it was; `None` if a later release sent what this one does not know.
pub(super) fn from_wire(outcome: wire::Outcome) -> Option<Outcome> {
    let reply = match outcome.reply? {
        Wire::Refusal(number) => Err(refusal_of(number)?),
        Wire::Put(reply) => Ok(Reply::Put(reply)),
        Wire::DeleteRange(reply) => Ok(Reply::DeleteRange(reply)),
        Wire::Txn(reply) => Ok(Reply::Txn(reply)),
        Wire::Compact(reply) => Ok(Reply::Compact(reply)),
        Wire::LeaseGrant(reply) => Ok(Reply::LeaseGrant(reply)),
        Wire::LeaseRevoke(reply) => Ok(Reply::LeaseRevoke(reply)),
        Wire::LeaseCheckpoint(wire::Nothing {}) => Ok(Reply::LeaseCheckpoint),
        Wire::Alarm(reply) => Ok(Reply::Alarm(reply)),
        Wire::Cluster(reply) => Ok(Reply::Cluster(reply)),
    };
    Some(Outcome { revision: Revision::new(outcome.revision), reply })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost::Message;

    use super::*;
    use crate::proto::etcdserverpb as pb;
    use crate::proto::mvccpb::KeyValue;

    fn every_reply() -> Vec<Reply> {
        let kv = KeyValue { key: Bytes::from_static(b"k"), mod_revision: 7, ..Default::default() };
        vec![
            Reply::Put(pb::PutResponse { prev_kv: Some(kv.clone()), ..Default::default() }),
            Reply::DeleteRange(pb::DeleteRangeResponse {
                deleted: 2,
                prev_kvs: vec![kv],
                ..Default::default()
            }),
            Reply::Txn(pb::TxnResponse { succeeded: true, ..Default::default() }),
            Reply::Compact(pb::CompactionResponse::default()),
            Reply::LeaseGrant(pb::LeaseGrantResponse { id: 5, ttl: 6, ..Default::default() }),
            Reply::LeaseRevoke(pb::LeaseRevokeResponse::default()),
            Reply::LeaseCheckpoint,
            Reply::Alarm(pb::AlarmResponse {
                alarms: vec![pb::AlarmMember { member_id: 1, alarm: 1 }],
                ..Default::default()
            }),
            Reply::Cluster(wire::ClusterReply { result: 3, epoch: 9 }),
        ]
    }

    #[test]
    fn every_outcome_survives_the_way() {
        let replies = every_reply().into_iter().map(Ok).chain(REFUSALS.into_iter().map(Err));
        for reply in replies {
            let outcome = Outcome { revision: Revision::new(42), reply };
            let bytes = to_wire(outcome.clone()).encode_to_vec();
            let back = from_wire(wire::Outcome::decode(bytes.as_slice()).unwrap());
            assert_eq!(back, Some(outcome));
        }
    }

    #[test]
    fn numbers_of_refusals_are_for_ever() {
        let numbers: Vec<u32> = REFUSALS.iter().map(number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn what_a_later_release_says_is_not_guessed() {
        let unknown = wire::Outcome { revision: 1, reply: Some(Wire::Refusal(77)) };
        assert_eq!(from_wire(unknown), None);
        assert_eq!(from_wire(wire::Outcome::default()), None);
    }
}

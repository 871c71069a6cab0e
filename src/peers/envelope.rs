//! Wraps messages and refusals for the wire, and unwraps them.

use bytes::Bytes;

use crate::proto::node::{Envelope, Refusal, refusal::Reason};
use crate::raft::transport::{CallError, Refused};
use crate::types::NodeId;

/// Largest message in an envelope, either way: a chunk of a snapshot.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// The same with what the envelope adds.
pub(super) const ENVELOPE_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 1_024;

/// Opens a call or a stream, in this version of the messages.
pub(super) fn open(method: u32, wire_version: u32, body: Bytes) -> Envelope {
    Envelope { method, wire_version, body, ..Envelope::default() }
}

/// A message within a stream, or an answer.
pub(super) fn message(body: Bytes) -> Envelope {
    Envelope { body, ..Envelope::default() }
}

/// The caller's proper end of a stream.
pub(super) fn last() -> Envelope {
    Envelope { last: true, ..Envelope::default() }
}

/// An answer as it is sent.
pub(super) fn answer(result: Result<Bytes, Refused>) -> Envelope {
    match result {
        Ok(body) => message(body),
        Err(refused) => Envelope { refusal: Some(refusal(refused)), ..Envelope::default() },
    }
}

/// An answer as it arrived.
pub(super) fn answered(envelope: Envelope) -> Result<Bytes, CallError> {
    match envelope.refusal {
        None => Ok(envelope.body),
        Some(refusal) => Err(refused(refusal)),
    }
}

fn refusal(refused: Refused) -> Refusal {
    let of = |reason: Reason, detail: String| Refusal { reason: reason.into(), detail, leader: 0 };
    match refused {
        Refused::NotReady(detail) => of(Reason::NotReady, detail),
        Refused::NotAMember => of(Reason::NotAMember, String::new()),
        Refused::Removed(detail) => of(Reason::Removed, detail),
        Refused::WrongCluster(detail) => of(Reason::WrongCluster, detail),
        Refused::Incompatible(detail) => of(Reason::Incompatible, detail),
        Refused::Malformed(detail) => of(Reason::Malformed, detail),
        Refused::Busy => of(Reason::Busy, String::new()),
        Refused::NotLeader(leader) => {
            let leader = leader.map_or(0, NodeId::get);
            Refusal { leader, ..of(Reason::NotLeader, String::new()) }
        }
        Refused::Duplicate(detail) => of(Reason::Duplicate, detail),
    }
}

fn refused(refusal: Refusal) -> CallError {
    let Refusal { reason, detail, leader } = refusal;
    CallError::Refused(match Reason::try_from(reason) {
        Ok(Reason::NotReady) => Refused::NotReady(detail),
        Ok(Reason::NotAMember) => Refused::NotAMember,
        Ok(Reason::Removed) => Refused::Removed(detail),
        Ok(Reason::WrongCluster) => Refused::WrongCluster(detail),
        Ok(Reason::Incompatible) => Refused::Incompatible(detail),
        Ok(Reason::Malformed) => Refused::Malformed(detail),
        Ok(Reason::Busy) => Refused::Busy,
        Ok(Reason::NotLeader) => Refused::NotLeader((leader != 0).then_some(NodeId::new(leader))),
        Ok(Reason::Duplicate) => Refused::Duplicate(detail),
        // A reason of a later release. It did nothing, and why it did not can only be shown.
        Ok(Reason::Unknown) | Err(_) => Refused::NotReady(format!(
            "for a reason this release does not know ({reason}) {detail}"
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_survives_the_wire() {
        let text = || "why".to_owned();
        for refused in [
            Refused::NotReady(text()),
            Refused::NotAMember,
            Refused::Removed(text()),
            Refused::WrongCluster(text()),
            Refused::Incompatible(text()),
            Refused::Malformed(text()),
            Refused::Busy,
            Refused::NotLeader(None),
            Refused::NotLeader(Some(NodeId::new(7))),
            Refused::Duplicate(text()),
        ] {
            let back = answered(answer(Err(refused.clone())));
            assert_eq!(back, Err(CallError::Refused(refused)));
        }
    }

    #[test]
    fn a_refusal_of_a_later_release_is_still_a_refusal() {
        let refusal = Refusal { reason: 99, detail: "new".to_owned(), leader: 0 };
        let error = answered(Envelope { refusal: Some(refusal), ..Envelope::default() });
        assert!(matches!(error, Err(CallError::Refused(Refused::NotReady(_)))), "{error:?}");
    }

    #[test]
    fn an_empty_answer_is_an_answer() {
        assert_eq!(answered(answer(Ok(Bytes::new()))), Ok(Bytes::new()));
    }
}

//! Bytes of a command: `format, kind, class`, then the request as a protobuf message.
//!
//! The format is the cluster's ([`crate::versions`]). There is one so far. A test can have a process pretend to know a second one,
//! which has the same layout under another number.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use thiserror::Error;

use super::{Class, Command};
use crate::proto::etcdserverpb as pb;
use crate::versions;

const HEADER_BYTES: usize = 3;
const CLASS_AT: usize = 2;
const CLASS_LEASE: u8 = 1;

/// Why log bytes are not a command this build understands.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Fewer bytes than the header.
    #[error("command is {0} bytes, expected at least {HEADER_BYTES}")]
    Short(usize),
    /// Written by a newer release.
    #[error("command has format {found}, release {} reads up to {}", versions::own().name, versions::own().format)]
    Version {
        /// The first byte.
        found: u8,
    },
    /// A kind this release does not know.
    #[error("command has unknown kind {0}")]
    Kind(u8),
    /// The protobuf message does not parse.
    #[error("command body: {0}")]
    Body(String),
}

/// Kind bytes are for ever: a number is never reused.
mod kind {
    pub(super) const PUT: u8 = 1;
    pub(super) const DELETE_RANGE: u8 = 2;
    pub(super) const TXN: u8 = 3;
    pub(super) const COMPACT: u8 = 4;
    pub(super) const LEASE_GRANT: u8 = 5;
    pub(super) const LEASE_REVOKE: u8 = 6;
    pub(super) const LEASE_CHECKPOINT: u8 = 7;
    pub(super) const ALARM: u8 = 8;
    pub(super) const CLUSTER: u8 = 9;
}

pub(super) fn encode(command: &Command, format: u8) -> Bytes {
    let class = match command.class() {
        Class::Urgent => 0,
        Class::Lease => CLASS_LEASE,
    };
    match command {
        Command::Put(m) => frame([format, kind::PUT, class], m),
        Command::DeleteRange(m) => frame([format, kind::DELETE_RANGE, class], m),
        Command::Txn(m) => frame([format, kind::TXN, class], m),
        Command::Compact(m) => frame([format, kind::COMPACT, class], m),
        Command::LeaseGrant(m) => frame([format, kind::LEASE_GRANT, class], m),
        Command::LeaseRevoke(m) => frame([format, kind::LEASE_REVOKE, class], m),
        Command::LeaseCheckpoint(m) => frame([format, kind::LEASE_CHECKPOINT, class], m),
        Command::Alarm(m) => frame([format, kind::ALARM, class], m),
        Command::Cluster(m) => frame([format, kind::CLUSTER, class], m),
    }
}

fn frame([format, kind, class]: [u8; HEADER_BYTES], message: &impl Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + message.encoded_len());
    bytes.put_slice(&[format, kind, class]);
    message.encode_raw(&mut bytes);
    bytes.freeze()
}

pub(super) fn class(bytes: &[u8]) -> Class {
    match bytes.get(CLASS_AT) {
        Some(&CLASS_LEASE) => Class::Lease,
        _ => Class::Urgent,
    }
}

pub(super) fn format(bytes: &[u8]) -> u32 {
    bytes.first().copied().map_or(0, u32::from)
}

pub(super) fn message_of(bytes: &Bytes) -> Bytes {
    bytes.slice(HEADER_BYTES.min(bytes.len())..)
}

pub(super) fn decode(bytes: &Bytes) -> Result<Command, DecodeError> {
    if bytes.len() < HEADER_BYTES {
        return Err(DecodeError::Short(bytes.len()));
    }
    if bytes[0] == 0 || versions::own().format < u32::from(bytes[0]) {
        return Err(DecodeError::Version { found: bytes[0] });
    }
    // Slicing shares the buffer, so keys and values point into the log's own bytes.
    let body = bytes.slice(HEADER_BYTES..);
    Ok(match bytes[1] {
        kind::PUT => Command::Put(message(body)?),
        kind::DELETE_RANGE => Command::DeleteRange(message(body)?),
        kind::TXN => Command::Txn(message(body)?),
        kind::COMPACT => Command::Compact(message(body)?),
        kind::LEASE_GRANT => Command::LeaseGrant(message(body)?),
        kind::LEASE_REVOKE => Command::LeaseRevoke(message(body)?),
        kind::LEASE_CHECKPOINT => {
            Command::LeaseCheckpoint(message::<pb::LeaseCheckpointRequest>(body)?)
        }
        kind::ALARM => Command::Alarm(message(body)?),
        kind::CLUSTER => Command::Cluster(message(body)?),
        other => return Err(DecodeError::Kind(other)),
    })
}

fn message<M: Message + Default>(body: Bytes) -> Result<M, DecodeError> {
    M::decode(body).map_err(|error| DecodeError::Body(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::node::cluster_change::Change;
    use crate::proto::node::{ClusterChange, Retire};

    fn samples() -> Vec<Command> {
        let key = Bytes::from_static(b"k");
        vec![
            Command::Put(pb::PutRequest { key: key.clone(), lease: 7, ..Default::default() }),
            Command::DeleteRange(pb::DeleteRangeRequest { key, ..Default::default() }),
            Command::Txn(pb::TxnRequest::default()),
            Command::Compact(pb::CompactionRequest { revision: 3, physical: true }),
            Command::LeaseGrant(pb::LeaseGrantRequest { ttl: 10, id: 5 }),
            Command::LeaseRevoke(pb::LeaseRevokeRequest { id: 5 }),
            Command::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints: vec![] }),
            Command::Alarm(pb::AlarmRequest { action: 1, member_id: 2, alarm: 1 }),
            Command::Cluster(ClusterChange {
                change: Some(Change::Retire(Retire { node: 2, reason: String::new() })),
            }),
        ]
    }

    #[test]
    fn decoding_gives_back_what_was_encoded() {
        for command in samples() {
            assert_eq!(decode(&encode(&command, 1)), Ok(command));
        }
    }

    #[test]
    fn version_1_bytes_never_change() {
        let bytes: Vec<Vec<u8>> = samples().iter().map(|c| encode(c, 1).to_vec()).collect();
        assert_eq!(bytes[0], [1, 1, 0, 0x0a, 1, b'k', 0x18, 7]);
        assert_eq!(bytes[1], [1, 2, 0, 0x0a, 1, b'k']);
        assert_eq!(bytes[2], [1, 3, 0]);
        assert_eq!(bytes[3], [1, 4, 0, 8, 3, 16, 1]);
        assert_eq!(bytes[4], [1, 5, 0, 8, 10, 16, 5]);
        assert_eq!(bytes[5], [1, 6, 0, 8, 5]);
        assert_eq!(bytes[6], [1, 7, 1]);
        assert_eq!(bytes[7], [1, 8, 0, 8, 1, 16, 2, 24, 1]);
        assert_eq!(bytes[8], [1, 9, 0, 0x22, 9, 9, 2, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn foreign_bytes_are_refused_with_the_reason() {
        assert_eq!(decode(&Bytes::new()), Err(DecodeError::Short(0)));
        assert_eq!(decode(&Bytes::from_static(&[2, 1, 0])), Err(DecodeError::Version { found: 2 }));
        assert_eq!(decode(&Bytes::from_static(&[1, 99, 0])), Err(DecodeError::Kind(99)));
        assert!(matches!(decode(&Bytes::from_static(&[1, 1, 0, 0xff])), Err(DecodeError::Body(_))));
    }
}

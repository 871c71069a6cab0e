//! What an entry of the log holds, for tools that read a log without a node.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::state_machine;
use super::types::{self, Payload};
use crate::command::Encoded;
use crate::mvcc::ReadTxn;
use crate::types::NodeId;

/// The content of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A new leader's first entry.
    Blank,
    /// A change of the replicated state.
    Command(Encoded),
    /// Who votes from here on.
    Voters(BTreeSet<NodeId>),
}

/// Decodes an entry's payload, whose checksum was right.
pub fn content(payload: &Bytes) -> Result<Content, String> {
    Ok(match types::decode_payload(payload)? {
        Payload::Blank => Content::Blank,
        Payload::Normal(command) => Content::Command(command),
        Payload::Membership(membership) => {
            Content::Voters(membership.voter_ids().map(NodeId::new).collect())
        }
    })
}

/// Who votes according to a store.
pub fn voters(view: &ReadTxn) -> Result<BTreeSet<NodeId>, String> {
    let stored = state_machine::stored_membership(view).map_err(|error| error.to_string())?;
    Ok(stored.membership().voter_ids().map(NodeId::new).collect())
}

//! What an entry of the log holds, for tools that read a log without a node.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;

use super::state_machine;
use super::types::{self, Payload};
use crate::apply;
use crate::command::{Command, Encoded};
use crate::mvcc::ReadTxn;
use crate::proto::node as wire;
use crate::proto::node::cluster_change::Change;
use crate::types::{LogIndex, NodeId};
use crate::wal::Wal;

/// Log read at a time while looking for what is not applied yet.
const TAIL_BYTES: u64 = 1 << 20;

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

/// The members according to a store, with the entry that says so: committed, but perhaps not the newest.
pub fn stored_membership(view: &ReadTxn) -> Result<wire::StoredMembership, String> {
    let Some(bytes) = view.membership().map_err(|error| error.to_string())? else {
        return Ok(wire::StoredMembership::default());
    };
    wire::StoredMembership::decode(bytes).map_err(|error| error.to_string())
}

/// What a log holds beyond what its store has applied, for a node that is not running yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tail {
    /// The newest membership, as Raft goes by it: the store's if the log has no later one.
    pub membership: wire::StoredMembership,
    /// Starts of nodes in the log. Each has happened, whether its entry is committed or not.
    pub epochs: BTreeMap<NodeId, u64>,
    /// The critical flags as recorded, if everything in the log is committed, as it is on a lone node.
    pub flags: Option<Bytes>,
    /// The newest format in which anything of it is written, or may be: the cluster's, that of a command in the log, or one that
    /// an entry raises it to. And the release that raised it, if that is known.
    pub format: wire::FormatRecord,
}

/// Reads the log beyond what the store has applied: after a crash that may be minutes of it.
pub fn tail(view: &ReadTxn, wal: &Wal) -> Result<Tail, String> {
    let flags = apply::flags(view).map_err(|error| error.to_string())?;
    let format = apply::format(view).map_err(|error| error.to_string())?;
    let mut tail =
        Tail { membership: stored_membership(view)?, epochs: BTreeMap::new(), flags, format };
    let mut next = view.applied().map_or(LogIndex::new(0), |applied| applied.index.next());
    let end = wal.hard_state().last.map_or(LogIndex::new(0), |last| last.index.next());
    while next < end {
        let entries = wal.entries(next..end, TAIL_BYTES).map_err(|error| error.to_string())?;
        let Some(last) = entries.last() else { break };
        next = last.id.index.next();
        for entry in &entries {
            match types::decode_payload(&entry.payload)? {
                Payload::Blank => {}
                Payload::Membership(membership) => {
                    tail.membership = wire::StoredMembership {
                        log_id: Some(types::wire_log_id(entry.id)),
                        membership: Some(types::wire_membership(&membership)),
                    };
                }
                Payload::Normal(command) => tail.note(&command),
            }
        }
    }
    Ok(tail)
}

impl Tail {
    /// A command that cannot be read is reported by whoever applies it.
    fn note(&mut self, command: &Encoded) {
        self.format.format = self.format.format.max(command.format());
        let Ok(Command::Cluster(change)) = command.decode() else { return };
        match change.change {
            Some(Change::Boot(boot)) => {
                let known = self.epochs.entry(NodeId::new(boot.node)).or_default();
                *known = boot.epoch.max(*known);
            }
            // As `apply` does it.
            Some(Change::RecordFlags(first)) => {
                self.flags.get_or_insert(first.flags);
            }
            Some(Change::SetFlag(set)) if self.flags.as_ref() == Some(&set.expected) => {
                self.flags = Some(set.flags);
            }
            // Refused or not: the log may have it committed in a moment.
            Some(Change::RaiseFormat(raise)) if self.format.format < raise.format => {
                self.format = wire::FormatRecord { format: raise.format, release: raise.release };
            }
            Some(Change::SetFlag(_) | Change::Retire(_) | Change::RaiseFormat(_)) | None => {}
        }
    }
}

//! What Raft's messages look like on their way to another node, and what of them is believed.
//!
//! Entries carry the bytes that stand in the log: a follower decodes a message without copying a value, and writes to its
//! card what it received.
//!
//! # Invariants
//!
//! - Decoding never panics, and whatever it returns openraft can be given: entries follow each other, a leader's message has a
//!   leader's vote, a membership is one.
//! - Whoever sends a request speaks for itself: [`caller`] compares its vote with the certificate's node.
//!
//! # Not here
//!
//! How a membership or an entry is encoded: `types`, for the log and the wire alike.

use std::time::Duration;

use bytes::Bytes;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use prost::Message;
use thiserror::Error;

use super::transport::Refused;
use super::types::{self, Entry, RaftLogId, RaftVote, SnapshotMeta, StoredMembership, TypeConfig};
use crate::proto::node as wire;
use crate::proto::node::append_reply::Result as AppendResult;
use crate::types::{LogId, NodeId, Term, Vote};

pub(super) type Append = AppendEntriesRequest<TypeConfig>;
pub(super) type Appended = StreamAppendResult<TypeConfig>;
pub(super) type AskVote = VoteRequest<TypeConfig>;
pub(super) type Voted = VoteResponse<TypeConfig>;
pub(super) type Transfer = TransferLeaderRequest<TypeConfig>;
pub(super) type Transferred = TransferLeaderResponse<TypeConfig>;

/// A message that is not what it should be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub(super) struct Malformed(String);

impl From<Malformed> for Refused {
    fn from(Malformed(what): Malformed) -> Self {
        Self::Malformed(what)
    }
}

impl From<prost::DecodeError> for Malformed {
    fn from(error: prost::DecodeError) -> Self {
        Self(error.to_string())
    }
}

fn malformed<T>(what: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(what.into()))
}

fn bytes(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// Checks that a request was sent by the node whose vote it carries.
pub(super) fn caller(from: NodeId, vote: &RaftVote) -> Result<(), Malformed> {
    let found = NodeId::new(vote.leader_id.node_id);
    if found == from {
        Ok(())
    } else {
        malformed(format!("vote of node {found}, expected the caller's, which is {from}"))
    }
}

pub(super) fn vote_to_wire(vote: Vote) -> wire::Vote {
    wire::Vote { term: vote.term.get(), node: vote.node.get(), committed: vote.committed }
}

pub(super) fn vote_from_wire(vote: wire::Vote) -> Vote {
    Vote { term: Term::new(vote.term), node: NodeId::new(vote.node), committed: vote.committed }
}

fn vote(vote: &RaftVote) -> Option<wire::Vote> {
    Some(vote_to_wire(types::vote(vote)))
}

fn read_vote(vote: Option<wire::Vote>) -> Result<RaftVote, Malformed> {
    let Some(vote) = vote else { return malformed("no vote") };
    Ok(types::raft_vote(vote_from_wire(vote)))
}

fn read_leader(vote: Option<wire::Vote>) -> Result<RaftVote, Malformed> {
    let vote = read_vote(vote)?;
    if vote.committed { Ok(vote) } else { malformed(format!("vote {vote} of a candidate")) }
}

fn log_id(id: Option<&RaftLogId>) -> Option<wire::LogId> {
    id.map(|id| types::wire_log_id(types::log_id(id)))
}

fn read_log_id(id: Option<&wire::LogId>) -> Option<RaftLogId> {
    id.map(|id| types::raft_log_id(types::log_id_from_wire(id)))
}

pub(super) fn encode_append(request: &Append) -> Bytes {
    let entries = request.entries.iter().map(|entry| wire::Entry {
        id: log_id(Some(&entry.log_id)),
        payload: types::encode_payload(&entry.payload),
    });
    bytes(&wire::AppendRequest {
        vote: vote(&request.vote),
        previous: log_id(request.prev_log_id.as_ref()),
        entries: entries.collect(),
        committed: log_id(request.leader_commit.as_ref()),
    })
}

pub(super) fn decode_append(message: Bytes) -> Result<Append, Malformed> {
    let request = wire::AppendRequest::decode(message)?;
    let vote = read_leader(request.vote)?;
    let prev_log_id = read_log_id(request.previous.as_ref());
    let mut before = prev_log_id;
    let mut entries = Vec::with_capacity(request.entries.len());
    for entry in request.entries {
        let entry = read_entry(entry, before.as_ref())?;
        before = Some(entry.log_id);
        entries.push(entry);
    }
    let newest = before.map_or(0, |id| types::log_id(&id).term.get());
    if vote.leader_id.term < newest {
        return malformed(format!("an entry of term {newest} from a leader with vote {vote}"));
    }
    let leader_commit = read_log_id(request.committed.as_ref());
    Ok(Append { vote, prev_log_id, entries, leader_commit })
}

fn read_entry(entry: wire::Entry, before: Option<&RaftLogId>) -> Result<Entry, Malformed> {
    let Some(log_id) = read_log_id(entry.id.as_ref()) else { return malformed("entry without id") };
    let expected = before.map_or(0, |before| before.index().saturating_add(1));
    if log_id.index() != expected {
        return malformed(format!("entry {log_id}, expected index {expected}"));
    }
    if before.is_some_and(|before| log_id.committed_leader_id() < before.committed_leader_id()) {
        return malformed(format!("entry {log_id} is of an older leader than the one before"));
    }
    let payload = types::decode_payload(&entry.payload).map_err(Malformed)?;
    Ok(Entry { log_id, payload })
}

/// What comes back on an append stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AppendReply {
    /// The callee is alive; the answer follows.
    Working,
    /// The answer to the oldest request that has none.
    Done(Appended),
}

pub(super) fn encode_append_reply(reply: &AppendReply) -> Bytes {
    let result = match reply {
        AppendReply::Working => AppendResult::Working(wire::Nothing {}),
        AppendReply::Done(Ok(upto)) => {
            AppendResult::Appended(wire::Appended { upto: log_id(upto.as_ref()) })
        }
        AppendReply::Done(Err(StreamAppendError::Conflict(id))) => {
            AppendResult::Conflict(types::wire_log_id(types::log_id(id)))
        }
        AppendReply::Done(Err(StreamAppendError::HigherVote(vote))) => {
            AppendResult::HigherVote(vote_to_wire(types::vote(vote)))
        }
    };
    bytes(&wire::AppendReply { result: Some(result) })
}

pub(super) fn decode_append_reply(message: Bytes) -> Result<AppendReply, Malformed> {
    Ok(match wire::AppendReply::decode(message)?.result {
        Some(AppendResult::Working(_)) => AppendReply::Working,
        Some(AppendResult::Appended(appended)) => {
            AppendReply::Done(Ok(read_log_id(appended.upto.as_ref())))
        }
        Some(AppendResult::Conflict(id)) => {
            let id = types::raft_log_id(types::log_id_from_wire(&id));
            AppendReply::Done(Err(StreamAppendError::Conflict(id)))
        }
        Some(AppendResult::HigherVote(vote)) => {
            let vote = types::raft_vote(vote_from_wire(vote));
            AppendReply::Done(Err(StreamAppendError::HigherVote(vote)))
        }
        None => return malformed("an append reply of an unknown kind"),
    })
}

pub(super) fn encode_vote(request: &AskVote) -> Bytes {
    bytes(&wire::VoteRequest {
        vote: vote(&request.vote),
        last: log_id(request.last_log_id.as_ref()),
        leadership_transfer: request.leadership_transfer,
    })
}

pub(super) fn decode_vote(message: Bytes) -> Result<AskVote, Malformed> {
    let request = wire::VoteRequest::decode(message)?;
    let vote = read_vote(request.vote)?;
    if vote.committed {
        return malformed(format!("a candidate asks with a leader's vote {vote}"));
    }
    let mut asked = AskVote::new(vote, read_log_id(request.last.as_ref()));
    asked.leadership_transfer = request.leadership_transfer;
    Ok(asked)
}

pub(super) fn encode_vote_reply(reply: &Voted) -> Bytes {
    bytes(&wire::VoteReply {
        vote: vote(&reply.vote),
        granted: reply.vote_granted,
        last: log_id(reply.last_log_id.as_ref()),
    })
}

pub(super) fn decode_vote_reply(message: Bytes) -> Result<Voted, Malformed> {
    let reply = wire::VoteReply::decode(message)?;
    let last = read_log_id(reply.last.as_ref());
    Ok(Voted::new(read_vote(reply.vote)?, last, reply.granted))
}

pub(super) fn encode_transfer(request: &Transfer) -> Bytes {
    bytes(&wire::TransferLeaderRequest {
        from: vote(request.from_leader()),
        to: *request.to_node_id(),
        last: log_id(request.last_log_id()),
    })
}

pub(super) fn decode_transfer(message: Bytes) -> Result<Transfer, Malformed> {
    let request = wire::TransferLeaderRequest::decode(message)?;
    let last = read_log_id(request.last.as_ref());
    Ok(Transfer::new(read_leader(request.from)?, request.to, last))
}

pub(super) fn encode_transfer_reply(reply: &Transferred) -> Bytes {
    bytes(&match reply {
        Ok(()) => wire::TransferLeaderReply { accepted: true, vote: None, last: None },
        Err(TransferLeaderError::VoteChanged { actual, .. }) => {
            wire::TransferLeaderReply { accepted: false, vote: vote(actual), last: None }
        }
        Err(TransferLeaderError::LogNotFlushed { actual, .. }) => {
            let last = log_id(actual.as_ref());
            wire::TransferLeaderReply { accepted: false, vote: None, last }
        }
    })
}

/// The request tells what would have been expected.
pub(super) fn decode_transfer_reply(
    message: Bytes,
    request: &Transfer,
) -> Result<Transferred, Malformed> {
    let reply = wire::TransferLeaderReply::decode(message)?;
    Ok(match (reply.accepted, reply.vote) {
        (true, _) => Ok(()),
        (false, Some(vote)) => Err(TransferLeaderError::VoteChanged {
            expected: *request.from_leader(),
            actual: types::raft_vote(vote_from_wire(vote)),
        }),
        (false, None) => Err(TransferLeaderError::LogNotFlushed {
            expected: request.last_log_id().copied(),
            actual: read_log_id(reply.last.as_ref()),
        }),
    })
}

pub(super) fn decode_following(message: Bytes) -> Result<RaftVote, Malformed> {
    read_leader(wire::FollowingRequest::decode(message)?.vote)
}

pub(super) fn encode_following(leader: Vote) -> Bytes {
    bytes(&wire::FollowingRequest { vote: Some(vote_to_wire(leader)) })
}

/// Whether the callee follows, and for how long its card has kept a barrier waiting.
pub(super) fn encode_following_reply(follows: bool, stalled: Duration) -> Bytes {
    let stalled_millis = u64::try_from(stalled.as_millis()).unwrap_or(u64::MAX);
    bytes(&wire::FollowingReply { follows, stalled_millis })
}

pub(super) fn decode_following_reply(message: Bytes) -> Result<(bool, Duration), Malformed> {
    let reply = wire::FollowingReply::decode(message)?;
    Ok((reply.follows, Duration::from_millis(reply.stalled_millis)))
}

/// The first message of a snapshot stream.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SnapshotHeader {
    pub(super) vote: RaftVote,
    pub(super) meta: SnapshotMeta,
    pub(super) records_estimate: u64,
}

pub(super) fn encode_snapshot_header(header: &SnapshotHeader) -> Bytes {
    bytes(&wire::SnapshotHeader {
        vote: vote(&header.vote),
        last: log_id(header.meta.last_log_id.as_ref()),
        membership: Some(membership_to_wire(&header.meta.last_membership)),
        records_estimate: header.records_estimate,
    })
}

pub(super) fn decode_snapshot_header(message: Bytes) -> Result<SnapshotHeader, Malformed> {
    let header = wire::SnapshotHeader::decode(message)?;
    let vote = read_leader(header.vote)?;
    let Some(last) = header.last.as_ref().map(types::log_id_from_wire) else {
        return malformed("a snapshot of nothing");
    };
    if leader_of(last) > (vote.leader_id.term, vote.leader_id.node_id) {
        return malformed(format!("a snapshot up to {last} from a leader with vote {vote}"));
    }
    let last_membership = membership_from_wire(header.membership.unwrap_or_default())?;
    let meta = SnapshotMeta { last_log_id: Some(types::raft_log_id(last)), last_membership };
    Ok(SnapshotHeader { vote, meta, records_estimate: header.records_estimate })
}

fn leader_of(id: LogId) -> (u64, u64) {
    (id.term.get(), id.leader.get())
}

fn membership_to_wire(membership: &StoredMembership) -> wire::StoredMembership {
    wire::StoredMembership {
        log_id: log_id(membership.log_id().as_ref()),
        membership: Some(types::wire_membership(membership.membership())),
    }
}

fn membership_from_wire(wire: wire::StoredMembership) -> Result<StoredMembership, Malformed> {
    let membership = types::membership_from_wire(wire.membership.unwrap_or_default())
        .map_err(|error| Malformed(format!("membership: {error}")))?;
    Ok(StoredMembership::new(read_log_id(wire.log_id.as_ref()), membership))
}

/// What comes back on a snapshot stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SnapshotReply {
    /// The callee is alive, and has stored this many chunks.
    Working(u64),
    /// Installed, or not wanted: the callee's vote tells.
    Done(RaftVote),
}

pub(super) fn encode_snapshot_reply(reply: SnapshotReply) -> Bytes {
    bytes(&match reply {
        SnapshotReply::Working(chunks) => wire::SnapshotReply { vote: None, chunks },
        SnapshotReply::Done(done) => wire::SnapshotReply { vote: vote(&done), chunks: 0 },
    })
}

pub(super) fn decode_snapshot_reply(message: Bytes) -> Result<SnapshotReply, Malformed> {
    let reply = wire::SnapshotReply::decode(message)?;
    Ok(match reply.vote {
        None => SnapshotReply::Working(reply.chunks),
        Some(vote) => SnapshotReply::Done(types::raft_vote(vote_from_wire(vote))),
    })
}

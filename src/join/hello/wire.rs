//! Between the messages of a hello and what the verdict works with.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;

use super::verdict::{Said, Voters};
use crate::proto::node::{self as wire, HelloReply, HelloRequest};
use crate::raft::Member;
use crate::types::{ClusterId, LogId, LogIndex, NodeId, Term, Vote};
use crate::versions;

pub(super) fn vote(vote: &wire::Vote) -> Vote {
    let (term, node) = (Term::new(vote.term), NodeId::new(vote.node));
    Vote { term, node, committed: vote.committed }
}

pub(super) fn wire_vote(vote: Vote) -> wire::Vote {
    wire::Vote { term: vote.term.get(), node: vote.node.get(), committed: vote.committed }
}

pub(super) fn log_id(id: &wire::LogId) -> LogId {
    let (term, leader) = (Term::new(id.term), NodeId::new(id.leader));
    LogId { term, leader, index: LogIndex::new(id.index) }
}

pub(super) fn wire_log_id(id: LogId) -> wire::LogId {
    wire::LogId { term: id.term.get(), leader: id.leader.get(), index: id.index.get() }
}

/// Who has a vote, by a stored membership.
pub(super) fn voters(stored: &wire::StoredMembership) -> Voters {
    let membership = stored.membership.clone().unwrap_or_default();
    let ids = |set: &wire::VoterSet| set.ids.iter().copied().map(NodeId::new).collect();
    Voters {
        log_id: stored.log_id.as_ref().map(log_id),
        configs: membership.configs.iter().map(ids).collect(),
        members: membership.members.iter().map(|member| NodeId::new(member.id)).collect(),
    }
}

/// The members in a membership as it is kept and sent.
pub fn members(stored: &wire::StoredMembership) -> Vec<Member> {
    let membership = stored.membership.clone().unwrap_or_default();
    let voters: BTreeSet<u64> =
        membership.configs.iter().flat_map(|config| config.ids.iter().copied()).collect();
    membership.members.iter().map(|one| member(one, !voters.contains(&one.id))).collect()
}

pub(super) fn member(one: &wire::Member, learner: bool) -> Member {
    Member {
        id: NodeId::new(one.id),
        name: one.name.clone(),
        peer_urls: one.peer_urls.clone(),
        client_urls: one.client_urls.clone(),
        learner,
        replaces: Some(NodeId::new(one.replaces)).filter(|id| id.get() != 0),
    }
}

pub(super) fn wire_member(member: &Member) -> wire::Member {
    wire::Member {
        id: member.id.get(),
        name: member.name.clone(),
        peer_urls: member.peer_urls.clone(),
        client_urls: member.client_urls.clone(),
        replaces: member.replaces.map_or(0, NodeId::get),
    }
}

/// A hello that only wants to hear what the other knows.
pub(super) fn probe(cluster: ClusterId, node: NodeId, incarnation: u64) -> Bytes {
    let member = Member { id: node, ..Member::default() };
    HelloRequest {
        cluster: cluster.get(),
        incarnation,
        wire_version_min: *versions::own().wire.start(),
        wire_version_max: *versions::own().wire.end(),
        release: versions::own().name.to_owned(),
        self_: Some(wire_member(&member)),
        probe: true,
        ..HelloRequest::default()
    }
    .encode_to_vec()
    .into()
}

/// What a reply says, with the flags compared by whoever knows how.
pub(super) fn said(reply: &HelloReply, flags_differ: Option<String>) -> Said {
    Said {
        epoch: reply.epoch_known,
        vote: reply.vote_known.as_ref().map(vote),
        kept: reply.kept_known.as_ref().map(log_id),
        retired: reply.retired.then(|| reply.retired_reason.clone()),
        duplicate: Some(reply.duplicate.clone()).filter(|found| !found.is_empty()),
        voters: reply.membership.as_ref().map(voters).unwrap_or_default(),
        last: reply.last.as_ref().map(log_id),
        flags_differ,
        wire_versions: Some(reply.wire_version_min..=reply.wire_version_max),
        format: versions::announced(reply.format.as_ref().map_or(0, |record| record.format)),
        release: reply.release.clone(),
    }
}

//! openraft's types with our parameters, and the conversions to ours. The only file that spells them out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;
use openraft::OptionalSend;
use openraft::impls::leader_id_adv::LeaderId;
use openraft::impls::{BoxedErrorSource, InlineBatch};
use openraft::raft::responder::Responder;
use openraft::type_config::alias::{CommittedLeaderIdOf, LogIdOf, VoteOf};
use openraft::vote::RaftLeaderId as _;
use prost::Message;
use tokio::sync::oneshot;

use super::Member;
use crate::apply::Outcome;
use crate::command::Encoded;
use crate::proto::node as wire;
use crate::types::{LogId, LogIndex, NodeId, Term, Vote};

/// openraft, for this project.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeConfig;

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Encoded;
    type R = Reply;
    type NodeId = u64;
    type Node = Contact;
    type Term = u64;
    type LeaderId = LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = Payload;
    type Entry = openraft::Entry<CommittedLeaderIdOf<Self>, Payload>;
    type AsyncRuntime = super::runtime::Runtime;
    type Responder<T>
        = Waiter<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = BoxedErrorSource;
}

pub(super) type Raft = openraft::Raft<TypeConfig, super::state_machine::StateMachine>;
pub(super) type RaftLogId = LogIdOf<TypeConfig>;
pub(super) type RaftVote = VoteOf<TypeConfig>;
pub(super) type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub(super) type Membership = openraft::Membership<u64, Contact>;
pub(super) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub(super) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub(super) type Payload = openraft::EntryPayload<Encoded, u64, Contact>;

/// Whoever waits for an entry. It may have gone away: then the outcome is nobody's concern.
#[derive(Debug)]
pub struct Waiter<T>(pub(super) oneshot::Sender<T>);

impl<T: OptionalSend + 'static> Responder<TypeConfig, T> for Waiter<T> {
    fn on_complete(self, outcome: T) {
        drop(self.0.send(outcome));
    }
}

/// What applying an entry answered. Blank and membership entries answer nothing.
#[derive(Clone, Debug)]
pub struct Reply(pub(super) Option<Outcome>);

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(outcome) => write!(f, "revision {}", outcome.revision),
            None => f.write_str("nothing"),
        }
    }
}

impl fmt::Display for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.bytes().len())
    }
}

/// How a member is reached: what openraft replicates beside its id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contact {
    pub(super) name: String,
    pub(super) peer_urls: Vec<String>,
    pub(super) client_urls: Vec<String>,
    /// As in [`Member`]; 0 for nobody.
    pub(super) replaces: u64,
}

impl Contact {
    pub(super) fn of(member: &Member) -> Self {
        Self {
            name: member.name.clone(),
            peer_urls: member.peer_urls.clone(),
            client_urls: member.client_urls.clone(),
            replaces: member.replaces.map_or(0, NodeId::get),
        }
    }

    pub(super) fn member(&self, id: u64, learner: bool) -> Member {
        Member {
            id: NodeId::new(id),
            name: self.name.clone(),
            peer_urls: self.peer_urls.clone(),
            client_urls: self.client_urls.clone(),
            learner,
            replaces: (self.replaces != 0).then(|| NodeId::new(self.replaces)),
        }
    }
}

/// All members, as the rest of the program knows them.
pub(super) fn members(membership: &Membership) -> Vec<Member> {
    membership
        .nodes()
        .map(|(id, contact)| contact.member(*id, !membership.voter_ids().any(|voter| voter == *id)))
        .collect()
}

impl fmt::Display for Contact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.peer_urls.join(","))
    }
}

pub(super) fn log_id(id: &RaftLogId) -> LogId {
    let leader = id.committed_leader_id();
    LogId {
        term: Term::new(leader.term),
        leader: NodeId::new(leader.node_id),
        index: LogIndex::new(id.index()),
    }
}

pub(super) fn raft_log_id(id: LogId) -> RaftLogId {
    RaftLogId::new(
        CommittedLeaderIdOf::<TypeConfig>::new(id.term.get(), id.leader.get()),
        id.index.get(),
    )
}

pub(super) fn vote(vote: &RaftVote) -> Vote {
    Vote {
        term: Term::new(vote.leader_id.term),
        node: NodeId::new(vote.leader_id.node_id),
        committed: vote.committed,
    }
}

pub(super) fn raft_vote(vote: Vote) -> RaftVote {
    if vote.committed {
        RaftVote::new_committed(vote.term.get(), vote.node.get())
    } else {
        RaftVote::new(vote.term.get(), vote.node.get())
    }
}

/// Who led in a term, as openraft names it.
pub(super) fn leadership(term: Term, leader: NodeId) -> CommittedLeaderIdOf<TypeConfig> {
    CommittedLeaderIdOf::<TypeConfig>::new(term.get(), leader.get())
}

/// A member as it is sent and kept.
pub fn wire_member(member: &Member) -> wire::Member {
    wire::Member {
        id: member.id.get(),
        name: member.name.clone(),
        peer_urls: member.peer_urls.clone(),
        client_urls: member.client_urls.clone(),
        replaces: member.replaces.map_or(0, NodeId::get),
    }
}

/// A member on its way: whether it votes is not its own to say.
pub fn member_from_wire(member: wire::Member) -> Member {
    Member {
        id: NodeId::new(member.id),
        name: member.name,
        peer_urls: member.peer_urls,
        client_urls: member.client_urls,
        learner: true,
        replaces: (member.replaces != 0).then(|| NodeId::new(member.replaces)),
    }
}

pub(super) fn wire_log_id(id: LogId) -> wire::LogId {
    wire::LogId { term: id.term.get(), leader: id.leader.get(), index: id.index.get() }
}

pub(super) fn log_id_from_wire(id: &wire::LogId) -> LogId {
    LogId {
        term: Term::new(id.term),
        leader: NodeId::new(id.leader),
        index: LogIndex::new(id.index),
    }
}

pub(super) fn wire_membership(membership: &Membership) -> wire::Membership {
    let configs = membership
        .get_joint_config()
        .iter()
        .map(|ids| wire::VoterSet { ids: ids.iter().copied().collect() })
        .collect();
    let members = membership
        .nodes()
        .map(|(id, member)| wire::Member {
            id: *id,
            name: member.name.clone(),
            peer_urls: member.peer_urls.clone(),
            client_urls: member.client_urls.clone(),
            replaces: member.replaces,
        })
        .collect();
    wire::Membership { configs, members }
}

pub(super) fn membership_from_wire(wire: wire::Membership) -> Result<Membership, String> {
    let configs: Vec<BTreeSet<u64>> =
        wire.configs.into_iter().map(|set| set.ids.into_iter().collect()).collect();
    let members: BTreeMap<u64, Contact> = wire
        .members
        .into_iter()
        .map(|member| {
            let contact = Contact {
                name: member.name,
                peer_urls: member.peer_urls,
                client_urls: member.client_urls,
                replaces: member.replaces,
            };
            (member.id, contact)
        })
        .collect();
    Membership::new(configs, members).map_err(|error| error.to_string())
}

/// The first byte of an entry's payload tells what it is. A command's first byte is its format version, so a
/// command stands in the log exactly as it was encoded, without a copy. Numbers are for ever.
mod first_byte {
    pub(super) const BLANK: u8 = 0;
    pub(super) const COMMAND_VERSIONS: std::ops::RangeInclusive<u8> = 1..=0x7f;
    pub(super) const MEMBERSHIP: u8 = 0x80;
}

/// An entry's payload as it stands in the log.
pub(super) fn encode_payload(payload: &Payload) -> Bytes {
    match payload {
        Payload::Blank => Bytes::from_static(&[first_byte::BLANK]),
        Payload::Normal(command) => command.bytes().clone(),
        Payload::Membership(membership) => {
            let mut bytes = vec![first_byte::MEMBERSHIP];
            bytes.extend(wire_membership(membership).encode_to_vec());
            bytes.into()
        }
    }
}

/// The reverse of [`encode_payload`], for bytes whose checksum was right.
pub(super) fn decode_payload(bytes: &Bytes) -> Result<Payload, String> {
    match bytes.first() {
        Some(&first_byte::BLANK) => Ok(Payload::Blank),
        Some(&first_byte::MEMBERSHIP) => {
            let wire = wire::Membership::decode(bytes.slice(1..))
                .map_err(|error| format!("membership entry: {error}"))?;
            Ok(Payload::Membership(membership_from_wire(wire)?))
        }
        Some(version) if first_byte::COMMAND_VERSIONS.contains(version) => {
            Ok(Payload::Normal(Encoded::from_log(bytes.clone())))
        }
        Some(other) => Err(format!("entry has unknown kind {other}")),
        None => Err("entry has no payload".to_owned()),
    }
}

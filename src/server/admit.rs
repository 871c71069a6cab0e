//! Admission: how a node with the cluster's credentials becomes a member. Both sides.
//!
//! # Invariants
//!
//! - The leader adds nobody whose critical flags are not the cluster's: it asks for the proof.
//! - Asking again changes nothing: the answer is the same, whatever was interrupted.
//! - A name belongs to one living member. Who takes the name of a dead one takes its place.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use super::stranded::stranded;
use crate::critical::gate::{self, NotAdmitted};
use crate::events::EventId;
use crate::proto::node::admit_reply::Result as Answer;
use crate::proto::node::{AdmitReply, AdmitRequest};
use crate::raft::transport::{CallError, Method, Refused, Transport};
use crate::raft::{ChangeError, Member, Node, Role, Status};
use crate::types::NodeId;
use crate::{announce, apply, limits, raft, versions};

/// How long the leader works on one admission.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What to do with somebody who knocks.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// It is a member.
    Already,
    /// It becomes one.
    Add(Member),
    /// A living member has its name.
    NameTaken(String),
    /// Too many are being added.
    Later,
}

fn decide(
    members: &[Member],
    alive: impl Fn(NodeId) -> bool,
    wanted: Member,
    replaces: Option<NodeId>,
) -> Decision {
    if members.iter().any(|member| member.id == wanted.id) {
        return Decision::Already;
    }
    let former = replaces.filter(|old| members.iter().any(|member| member.id == *old));
    let namesake =
        members.iter().find(|member| member.name == wanted.name && Some(member.id) != former);
    if let Some(namesake) = namesake
        && alive(namesake.id)
    {
        return Decision::NameTaken(format!(
            "{} is the name of node {} at {}, which is alive",
            namesake.name,
            namesake.id,
            namesake.peer_urls.join(", ")
        ));
    }
    if limits::LEARNERS_MAX <= members.iter().filter(|member| member.learner).count() {
        return Decision::Later;
    }
    let replaces = former.or_else(|| namesake.map(|namesake| namesake.id));
    Decision::Add(Member { learner: true, replaces, ..wanted })
}

fn reply(result: Answer, detail: impl Into<String>) -> AdmitReply {
    AdmitReply { result: result.into(), detail: detail.into(), ..AdmitReply::default() }
}

/// Who asks to be let in again in place of a voter.
#[derive(Debug, Default)]
pub(super) struct Waiting(Mutex<Forgot>);

#[derive(Debug, Default)]
struct Forgot {
    voters: BTreeSet<NodeId>,
    told: Option<String>,
}

impl Waiting {
    /// Notes a knock. What to say, the first time that too few are left to choose a leader.
    fn note(&self, status: &Status, replaces: u64) -> Option<String> {
        let mut forgot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever leads, or seems to: without a majority of voters nobody does.
        forgot.voters.insert(NodeId::new(replaces));
        forgot.voters.retain(|id| status.members.iter().any(|one| one.id == *id && !one.learner));
        // Of those who do not ask this node knows nothing, so they count as there.
        let all = status.members.iter().map(|member| member.id).collect();
        let text = stranded(&status.members, &forgot.voters, &all)?;
        if forgot.told.as_ref() == Some(&text) {
            return None;
        }
        forgot.told = Some(text.clone());
        Some(text)
    }
}

/// The leader's side.
pub(super) async fn answer(
    node: &Node,
    waiting: &Waiting,
    from: NodeId,
    request: Bytes,
) -> Result<Bytes, Refused> {
    let request =
        AdmitRequest::decode(request).map_err(|error| Refused::Malformed(error.to_string()))?;
    if let Some(text) = waiting.note(&node.status(), request.replaces) {
        announce!(EventId::MajorityForgot, "{text}");
    }
    Ok(admit(node, from, request).await?.encode_to_vec().into())
}

async fn admit(node: &Node, from: NodeId, request: AdmitRequest) -> Result<AdmitReply, Refused> {
    let wanted = raft::member_from_wire(request.member.clone().unwrap_or_default());
    if wanted.id != from {
        return Err(Refused::Malformed(format!("node {from} asks for node {}", wanted.id)));
    }
    let status = node.status();
    if status.role != Role::Leader {
        return Err(Refused::NotLeader(status.leader));
    }
    let deadline = node.env().clock.now() + ANSWER_TIMEOUT;
    let not_now = |error: String| Refused::NotReady(error);
    let _fresh = node.read_barrier(deadline).await.map_err(|error| not_now(error.to_string()))?;
    let view = node.store().read().map_err(|error| not_now(error.to_string()))?;
    let known = apply::node(&view, from).map_err(|error| not_now(error.to_string()))?;
    if let Some(known) = known
        && known.retired
    {
        return Ok(reply(Answer::Retired, known.retired_reason));
    }
    let (cluster, reads) = (node.format(), versions::announced(request.format));
    if reads < cluster {
        let detail = format!(
            "the cluster's data is in format {cluster}, release {} reads up to {reads}",
            request.release
        );
        announce!(EventId::Incompatible, "{} is not admitted: {detail}", wanted.name);
        return Ok(reply(Answer::Incompatible, detail));
    }
    let record = apply::flags(&view).map_err(|error| not_now(error.to_string()))?;
    let _matched = match gate::admission(&record.unwrap_or_default(), &request.flags) {
        Ok(matched) => matched,
        Err(NotAdmitted::Answer(reply)) => return Ok(reply),
        Err(NotAdmitted::Malformed(error)) => return Err(Refused::Malformed(error.to_string())),
        Err(NotAdmitted::Damaged(error)) => return Err(not_now(error.to_string())),
    };
    let replaces = (request.replaces != 0).then(|| NodeId::new(request.replaces));
    let alive = node.alive().await;
    match decide(&status.members, |id| alive.contains(&id), wanted, replaces) {
        Decision::Already => Ok(reply(Answer::Admitted, "")),
        Decision::NameTaken(detail) => Ok(reply(Answer::NameTaken, detail)),
        Decision::Later => Ok(reply(Answer::Later, "other servers are joining at the moment")),
        Decision::Add(member) => match node.add_learner(&member, deadline).await {
            Ok(()) => Ok(reply(Answer::Admitted, "")),
            Err(error @ (ChangeError::Busy | ChangeError::TimedOut)) => {
                Ok(reply(Answer::Later, error.to_string()))
            }
            Err(ChangeError::NoLeader) => Err(Refused::NotLeader(None)),
            Err(error) => Err(not_now(error.to_string())),
        },
    }
}

/// What came of asking everybody once.
#[derive(Debug)]
pub(super) enum Asked {
    /// The leader answered.
    Answered(AdmitReply),
    /// Nobody could.
    Nobody {
        /// Why, of the last one asked.
        why: String,
        /// Who is there as who it was.
        there: BTreeSet<NodeId>,
    },
}

/// The asking side: one round, following whoever names the leader.
pub(super) async fn ask(
    transport: &dyn Transport,
    contacts: &[Member],
    request: &AdmitRequest,
) -> Asked {
    let bytes = Bytes::from(request.encode_to_vec());
    let mut left: Vec<&Member> = contacts.iter().collect();
    let (mut last, mut there) = ("no other server is known".to_owned(), BTreeSet::new());
    while let Some(to) = left.pop() {
        let timeout = ANSWER_TIMEOUT + Duration::from_secs(2);
        match transport.call(to, Method::Admit, bytes.clone(), timeout).await {
            Ok(answer) => match AdmitReply::decode(answer) {
                Ok(reply) => return Asked::Answered(reply),
                Err(error) => last = format!("{}: {error}", to.name),
            },
            Err(CallError::Refused(Refused::NotLeader(Some(leader)))) => {
                // Asked next, unless it was asked already.
                if let Some(at) = left.iter().position(|other| other.id == leader) {
                    let leader = left.remove(at);
                    left.push(leader);
                }
                there.insert(to.id);
                last = format!("{} does not lead", to.name);
            }
            Err(error) => {
                if let CallError::Refused(Refused::NotLeader(None) | Refused::NotReady(_)) = error {
                    there.insert(to.id);
                }
                last = format!("{}: {error}", to.name);
            }
        }
    }
    Asked::Nobody { why: last, there }
}

/// What a node says of itself when it asks.
pub(super) fn request(member: &Member, flags: Vec<u8>, replaces: Option<NodeId>) -> AdmitRequest {
    AdmitRequest {
        member: Some(raft::wire_member(member)),
        flags: flags.into(),
        release: versions::own().name.to_owned(),
        wire_version: *versions::own().wire.end(),
        replaces: replaces.map_or(0, NodeId::get),
        format: versions::own().format,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, name: &str) -> Member {
        Member { id: NodeId::new(id), name: name.to_owned(), ..Member::default() }
    }

    fn three() -> Vec<Member> {
        vec![member(1, "pi-1"), member(2, "pi-2"), member(3, "pi-3")]
    }

    #[test]
    fn a_new_server_is_added_without_a_vote() {
        let Decision::Add(added) = decide(&three(), |_| true, member(4, "pi-4"), None) else {
            panic!()
        };
        assert!(added.learner && added.replaces.is_none());
    }

    #[test]
    fn asking_again_is_answered_the_same() {
        assert_eq!(decide(&three(), |_| true, member(2, "pi-2"), None), Decision::Already);
    }

    #[test]
    fn the_name_of_a_living_server_is_taken_and_a_dead_ones_place_is_free() {
        let wanted = || member(9, "pi-2");
        let taken = decide(&three(), |_| true, wanted(), None);
        assert!(matches!(&taken, Decision::NameTaken(text) if text.contains("pi-2")), "{taken:?}");
        let dead = decide(&three(), |id| id != NodeId::new(2), wanted(), None);
        assert!(
            matches!(&dead, Decision::Add(one) if one.replaces == Some(NodeId::new(2))),
            "{dead:?}"
        );
    }

    #[test]
    fn a_server_that_forgot_takes_its_own_place_though_its_namesake_seems_alive() {
        let back = decide(&three(), |_| true, member(9, "pi-2"), Some(NodeId::new(2)));
        assert!(
            matches!(&back, Decision::Add(one) if one.replaces == Some(NodeId::new(2))),
            "{back:?}"
        );
    }

    #[test]
    fn only_so_many_are_added_at_a_time() {
        let mut members = three();
        for id in 10..10 + limits::LEARNERS_MAX as u64 {
            members.push(Member { learner: true, ..member(id, &format!("pi-{id}")) });
        }
        assert_eq!(decide(&members, |_| true, member(99, "pi-99"), None), Decision::Later);
    }
}

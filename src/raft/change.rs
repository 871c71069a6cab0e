//! Changes of who is a member: asked of any member, made by the leader, one at a time, checked before they are proposed.
//!
//! # Shape
//!
//! [`Change`] is what is wanted. [`plan`] decides from the members, and nothing else, what to propose; a change of voters is then
//! held against who answers *now* ([`QuorumNumbers`]). What is half done when a leader dies is finished by the next one (`duties`).
//!
//! # Invariants
//!
//! - No change leaves fewer living voters than a majority; the last voter is never removed.
//! - A learner gets its vote only when it has what the leader has, and answers.
//! - A change starts from a membership that is uniform, that is the one it was checked against, and whose leader has committed in its
//!   own term. Two leaders' changes of one membership then have a set of voters in common, on which `read` and Raft rely.
//! - Who leaves is retired: ids are never given again, and one that was removed stays out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::Precondition;
use openraft::{ChangeMembers, ServerState};
use prost::Message;
use thiserror::Error;

use super::forward::{Trail, asked_timeout, millis_until};
use super::quorum::QuorumNumbers;
use super::transport::{CallError, Method, Refused};
use super::types::{self, Contact, RaftLogId, TypeConfig};
use super::wire::{decode_following_reply, encode_following};
use super::{Member, Node, ProposeError, Status};
use crate::announce;
use crate::command::Command;
use crate::events::{EventId, fields};
use crate::limits;
use crate::proto::node as wire;
use crate::proto::node::change_members_reply::Result as Answer;
use crate::proto::node::change_members_request::Change as Asked;
use crate::proto::node::cluster_change;
use crate::types::{LogIndex, NodeId, Vote};

/// Why the members stay as they are, or may do so.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ChangeError {
    /// There is no such member.
    #[error("no such member")]
    NotFound,
    /// It has a vote already.
    #[error("not a learner")]
    NotLearner,
    /// It does not have the leader's log yet, or does not answer.
    #[error("the learner has not caught up")]
    NotReady,
    /// As many learners as may be at a time.
    #[error("as many nodes are being added as may be at a time: {}", limits::LEARNERS_MAX)]
    TooManyLearners,
    /// Too few voters would remain.
    #[error("the cluster would lose its majority: {0}")]
    QuorumLost(QuorumNumbers),
    /// Another change is under way.
    #[error("another change of members is under way")]
    Busy,
    /// No leader within the deadline; nothing was changed.
    #[error("no leader")]
    NoLeader,
    /// The outcome is unknown.
    #[error("request timed out")]
    TimedOut,
    /// This node is stopping.
    #[error("stopped")]
    Stopped,
}

/// How many entries a learner may lack and still get its vote: they arrive while the vote is being granted.
pub(super) const LAG_MAX: u64 = 256;

/// How long a member may take to show that it is alive.
const PROBE: Duration = Duration::from_secs(1);

/// Rest before a change that met another one, or no leader, is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// How long writing down that a node has left may take; the leader's duties repeat it.
const RETIRE: Duration = Duration::from_secs(10);

/// Why a node was retired. The words stand in its record, on every server, and are what tells it later whether it may come back by
/// itself, under a new id; they never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// An operator removed it. It stays out.
    Removed,
    /// A learner that made no progress. It comes back.
    GivenUp,
    /// Its card is damaged, and it asked for it. It comes back, empty.
    SetAside,
}

impl Leaving {
    /// As it stands in the record.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Removed => "removed from the cluster",
            Self::GivenUp => "given up while it was joining",
            Self::SetAside => "set aside to be filled again",
        }
    }

    /// Whether one that is retired in these words may join again by itself.
    pub fn may_join_again(words: &str) -> bool {
        words == Self::GivenUp.words() || words == Self::SetAside.words()
    }
}

/// What is wanted.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Change {
    AddLearner(Member),
    /// Whoever leaves to come back is written down first: a crash between the two must not leave one that the next leader would take
    /// for removed by an operator. The next leader removes whoever is written down.
    Remove(NodeId, Leaving),
    Promote(NodeId),
    Update(Member),
    Replace {
        old: NodeId,
        new: NodeId,
    },
    TransferLeader(NodeId),
}

/// The members, as a leader sees them at one moment.
#[derive(Clone, Debug)]
pub(super) struct Roster {
    pub(super) vote: Vote,
    /// It has committed in its term.
    pub(super) settled: bool,
    /// A change is half done.
    pub(super) joint: bool,
    /// Whose vote ends with its second step.
    leaving: BTreeSet<NodeId>,
    pub(super) members: Vec<Member>,
    pub(super) last_index: LogIndex,
    log_id: Option<RaftLogId>,
}

impl Roster {
    pub(super) fn voters(&self) -> BTreeSet<NodeId> {
        self.members.iter().filter(|member| !member.learner).map(|member| member.id).collect()
    }

    fn find(&self, id: NodeId) -> Result<&Member, ChangeError> {
        self.members.iter().find(|member| member.id == id).ok_or(ChangeError::NotFound)
    }

    /// What people call it.
    pub(super) fn name(&self, id: NodeId) -> String {
        match self.find(id) {
            Ok(member) if !member.name.is_empty() => member.name.clone(),
            Ok(_) | Err(_) => id.to_string(),
        }
    }
}

/// Who is in an earlier set of voters and not in the last.
fn leaving(sets: &[BTreeSet<u64>]) -> BTreeSet<NodeId> {
    let Some((last, earlier)) = sets.split_last() else { return BTreeSet::new() };
    let leaving = earlier.iter().flatten().filter(|id| !last.contains(id));
    leaving.copied().map(NodeId::new).collect()
}

/// What to propose.
#[derive(Clone, Debug, PartialEq)]
struct Plan {
    change: ChangeMembers<u64, Contact>,
    /// In words, for people.
    words: String,
    /// The voters it leaves, if they become others.
    voters: Option<BTreeSet<NodeId>>,
    /// Who must have the leader's log, and answer.
    ready: Option<NodeId>,
    /// Who leaves, and why.
    retires: Option<(NodeId, String)>,
    /// Before the change, not after it.
    retires_first: bool,
}

impl Plan {
    const fn new(change: ChangeMembers<u64, Contact>, words: String) -> Self {
        Self { change, words, voters: None, ready: None, retires: None, retires_first: false }
    }
}

fn one(id: NodeId) -> BTreeSet<u64> {
    BTreeSet::from([id.get()])
}

/// What has to be proposed for a change, `None` if there is nothing left to do.
fn plan(change: &Change, roster: &Roster) -> Result<Option<Plan>, ChangeError> {
    match change {
        Change::AddLearner(member) => plan_learner(member, roster),
        Change::Update(member) => {
            if Contact::of(roster.find(member.id)?) == Contact::of(member) {
                return Ok(None);
            }
            let nodes = BTreeMap::from([(member.id.get(), Contact::of(member))]);
            let words = format!("updating {}", roster.name(member.id));
            Ok(Some(Plan::new(ChangeMembers::SetNodes(nodes), words)))
        }
        Change::Remove(id, why) => plan_removal(*id, *why, roster).map(Some),
        Change::Promote(id) => {
            if !roster.find(*id)?.learner {
                return Err(ChangeError::NotLearner);
            }
            let mut voters = roster.voters();
            voters.insert(*id);
            let words = format!("giving {} a vote", roster.name(*id));
            let plan = Plan::new(ChangeMembers::AddVoterIds(one(*id)), words);
            Ok(Some(Plan { voters: Some(voters), ready: Some(*id), ..plan }))
        }
        Change::Replace { old, new } => plan_replacement(*old, *new, roster),
        // Not a change of who is a member.
        Change::TransferLeader(_) => Ok(None),
    }
}

fn plan_learner(member: &Member, roster: &Roster) -> Result<Option<Plan>, ChangeError> {
    if roster.find(member.id).is_ok() {
        return Ok(None);
    }
    if limits::LEARNERS_MAX <= roster.members.iter().filter(|member| member.learner).count() {
        return Err(ChangeError::TooManyLearners);
    }
    let nodes = BTreeMap::from([(member.id.get(), Contact::of(member))]);
    let words = format!("adding {}", member.name);
    Ok(Some(Plan::new(ChangeMembers::AddNodes(nodes), words)))
}

fn plan_removal(id: NodeId, why: Leaving, roster: &Roster) -> Result<Plan, ChangeError> {
    let leaving = roster.find(id)?;
    let words = format!("removing {}", roster.name(id));
    let retires = Some((id, why.words().to_owned()));
    let retires_first = why != Leaving::Removed;
    if leaving.learner {
        let plan = Plan::new(ChangeMembers::RemoveNodes(one(id)), words);
        return Ok(Plan { retires, retires_first, ..plan });
    }
    let mut voters = roster.voters();
    voters.remove(&id);
    let plan = Plan::new(ChangeMembers::RemoveVoters(one(id)), words);
    Ok(Plan { retires, retires_first, voters: Some(voters), ..plan })
}

/// The new one's vote and the end of the old one's are one change, so that the number of voters never moves.
fn plan_replacement(
    old: NodeId,
    new: NodeId,
    roster: &Roster,
) -> Result<Option<Plan>, ChangeError> {
    let (leaving, coming) = (roster.find(old).ok(), roster.find(new)?);
    let retires = Some((old, format!("replaced by {new}")));
    match leaving {
        None if coming.learner => plan(&Change::Promote(new), roster),
        None => Ok(None),
        Some(_) if !coming.learner => {
            let plan = plan_removal(old, Leaving::Removed, roster)?;
            Ok(Some(Plan { retires, ..plan }))
        }
        Some(leaving) => {
            let mut voters = roster.voters();
            voters.remove(&old);
            voters.insert(new);
            let drop_old = if leaving.learner {
                ChangeMembers::RemoveNodes(one(old))
            } else {
                ChangeMembers::RemoveVoters(one(old))
            };
            let change = ChangeMembers::Batch(vec![ChangeMembers::AddVoterIds(one(new)), drop_old]);
            let words = format!("replacing {} by {new}", roster.name(old));
            let plan = Plan::new(change, words);
            Ok(Some(Plan { voters: Some(voters), ready: Some(new), retires, ..plan }))
        }
    }
}

/// Whether the members, as this node sees them, are as wanted.
fn is_visible(change: &Change, status: &Status) -> bool {
    let find = |id: NodeId| status.members.iter().find(|member| member.id == id);
    match change {
        Change::AddLearner(member) => find(member.id).is_some(),
        Change::Remove(id, _) => find(*id).is_none(),
        Change::Promote(id) => find(*id).is_some_and(|member| !member.learner),
        Change::Update(wanted) => {
            find(wanted.id).is_some_and(|member| Contact::of(member) == Contact::of(wanted))
        }
        Change::Replace { old, new } => {
            find(*old).is_none() && find(*new).is_some_and(|member| !member.learner)
        }
        Change::TransferLeader(to) => status.leader == Some(*to),
    }
}

type Changed<T> = Result<T, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>;

fn outcome<T>(result: Changed<T>) -> Result<(), ChangeError> {
    match result {
        Ok(_) => Ok(()),
        Err(RaftError::Fatal(_)) => Err(ChangeError::Stopped),
        Err(RaftError::APIError(error)) => Err(match error {
            ClientWriteError::ForwardToLeader(_) => ChangeError::NoLeader,
            ClientWriteError::LogEntryDiscarded(_) => ChangeError::TimedOut,
            ClientWriteError::PreconditionFailed(_) => ChangeError::Busy,
            ClientWriteError::ChangeMembershipError(change) => match change {
                ChangeMembershipError::EmptyMembership(_) => {
                    ChangeError::QuorumLost(QuorumNumbers::default())
                }
                ChangeMembershipError::LearnerNotFound(_) => ChangeError::NotFound,
                ChangeMembershipError::InProgress(_)
                | ChangeMembershipError::UnsupportedMembershipTransition(_)
                | ChangeMembershipError::UncommittedLeaderLog(_)
                | ChangeMembershipError::NodeMetadataChanged(_) => ChangeError::Busy,
            },
        }),
    }
}

impl Node {
    /// Adds a member without a vote. Safe to repeat.
    pub async fn add_learner(&self, member: &Member, deadline: Instant) -> Result<(), ChangeError> {
        self.change(Change::AddLearner(member.clone()), deadline).await
    }

    /// Removes a member for good.
    pub async fn remove_member(&self, id: NodeId, deadline: Instant) -> Result<(), ChangeError> {
        self.change(Change::Remove(id, Leaving::Removed), deadline).await
    }

    /// Takes this node out, to come back as another one, if the others are a majority without it.
    pub async fn set_aside(&self, deadline: Instant) -> Result<(), ChangeError> {
        match self.change(Change::Remove(self.id(), Leaving::SetAside), deadline).await {
            // Another leader has finished it meanwhile.
            Err(ChangeError::NotFound) => Ok(()),
            result => result,
        }
    }

    /// Gives a learner its vote, once it has caught up.
    pub async fn promote(&self, id: NodeId, deadline: Instant) -> Result<(), ChangeError> {
        self.change(Change::Promote(id), deadline).await
    }

    /// Gives the learner `new` the vote of the member `old`, who leaves for good, in one change.
    pub async fn replace_member(
        &self,
        old: NodeId,
        new: NodeId,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        self.change(Change::Replace { old, new }, deadline).await
    }

    /// Changes how a member is reached.
    pub async fn update_member(
        &self,
        member: &Member,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        self.change(Change::Update(member.clone()), deadline).await
    }

    /// Hands leadership to another voter, and returns when it leads. Any member may be asked.
    pub async fn transfer_leader(&self, to: NodeId, deadline: Instant) -> Result<(), ProposeError> {
        let changed = self.change(Change::TransferLeader(to), deadline).await;
        changed.map_err(|error| match error {
            ChangeError::Stopped => ProposeError::Stopped,
            ChangeError::NoLeader => ProposeError::NoLeader,
            ChangeError::NotFound
            | ChangeError::NotLearner
            | ChangeError::NotReady
            | ChangeError::TooManyLearners
            | ChangeError::QuorumLost(_)
            | ChangeError::Busy
            | ChangeError::TimedOut => ProposeError::TimedOut,
        })
    }

    /// Has the leader make the change, and returns when this node sees it.
    async fn change(&self, change: Change, deadline: Instant) -> Result<(), ChangeError> {
        let mut last = ChangeError::NoLeader;
        let attempts = self.change_until_done(&change, deadline, &mut last);
        match tokio::time::timeout_at(deadline.into(), attempts).await {
            Ok(result) => result,
            Err(_elapsed) => Err(last),
        }
    }

    /// `last` is what to say when time runs out.
    async fn change_until_done(
        &self,
        change: &Change,
        deadline: Instant,
        last: &mut ChangeError,
    ) -> Result<(), ChangeError> {
        let mut trail = Trail::new(self.watch_status());
        loop {
            let mut named = None;
            let result = match trail.target() {
                None => Err(ChangeError::NoLeader),
                Some(leader) => {
                    *last = ChangeError::TimedOut;
                    if leader.id == self.id() {
                        self.change_to_its_end(change.clone()).await
                    } else {
                        self.forward_change(&leader, change, deadline, &mut named).await
                    }
                }
            };
            match result {
                Ok(()) => return self.wait_visible(change).await,
                Err(again @ (ChangeError::NoLeader | ChangeError::Busy)) => {
                    *last = again;
                    if !trail.missed(named).await {
                        return Err(ChangeError::Stopped);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn wait_visible(&self, change: &Change) -> Result<(), ChangeError> {
        // Whoever has left is sent nothing any more, not even that.
        if matches!(change, Change::Remove(id, _) | Change::Replace { old: id, .. } if *id == self.id())
        {
            return Ok(());
        }
        let mut status = self.watch_status();
        let seen = status.wait_for(|status| is_visible(change, status)).await;
        seen.map(drop).map_err(|_closed| ChangeError::Stopped)
    }

    async fn forward_change(
        &self,
        leader: &Member,
        change: &Change,
        deadline: Instant,
        named: &mut Option<NodeId>,
    ) -> Result<(), ChangeError> {
        let timeout_millis = millis_until(self.env().clock.now(), deadline);
        let request = wire::ChangeMembersRequest { change: Some(asked(change)), timeout_millis };
        let timeout = Duration::from_millis(timeout_millis);
        let request = request.encode_to_vec().into();
        match self.transport().call(leader, Method::ChangeMembers, request, timeout).await {
            Ok(bytes) => read_reply(wire::ChangeMembersReply::decode(bytes).unwrap_or_default()),
            Err(CallError::Interrupted(_)) => Err(ChangeError::TimedOut),
            Err(CallError::Refused(Refused::NotLeader(leader))) => {
                *named = leader;
                Err(ChangeError::NoLeader)
            }
            Err(CallError::Unreachable(_) | CallError::Refused(_)) => Err(ChangeError::NoLeader),
        }
    }

    /// Answers [`Method::ChangeMembers`].
    pub(super) async fn answer_change_members(&self, request: Bytes) -> Result<Bytes, Refused> {
        let request = wire::ChangeMembersRequest::decode(request)
            .map_err(|error| Refused::Malformed(error.to_string()))?;
        let change = request.change.map(wanted);
        let change = change.ok_or_else(|| Refused::Malformed("no change".to_owned()))?;
        let timeout = asked_timeout(request.timeout_millis);
        let done = async {
            loop {
                match self.change_to_its_end(change.clone()).await {
                    Err(ChangeError::Busy) => tokio::time::sleep(PAUSE).await,
                    result => return result,
                }
            }
        };
        let result =
            tokio::time::timeout(timeout, done).await.unwrap_or(Err(ChangeError::TimedOut));
        if result == Err(ChangeError::NoLeader) {
            return Err(Refused::NotLeader(self.status().leader));
        }
        Ok(reply(result).encode_to_vec().into())
    }

    /// Goes on when whoever asked goes away: half a change would have to be finished by somebody else.
    pub(super) async fn change_to_its_end(&self, change: Change) -> Result<(), ChangeError> {
        let node = self.clone();
        let made = tokio::spawn(async move { node.change_here(&change).await });
        made.await.unwrap_or(Err(ChangeError::Stopped))
    }

    /// Makes a change as the leader.
    async fn change_here(&self, change: &Change) -> Result<(), ChangeError> {
        let roster = self.roster().await?;
        if let Change::TransferLeader(to) = change {
            return self.hand_over(*to, &roster).await;
        }
        if !roster.settled {
            return Err(ChangeError::Busy);
        }
        if roster.joint {
            self.finish_change(&roster).await?;
            return Err(ChangeError::Busy);
        }
        let Some(plan) = plan(change, &roster)? else { return Ok(()) };
        self.check(&plan, &roster).await?;
        let leaves = plan.retires.as_ref().is_some_and(|(leaving, _)| *leaving == self.id());
        // Better if another leader removes this one: it stays to write it down.
        if leaves && self.step_aside(&roster).await.is_ok() {
            return Err(ChangeError::NoLeader);
        }
        let (first, then) = plan.retires.into_iter().partition(|_| plan.retires_first);
        self.retire_all(first).await?;
        self.propose_members(plan.change, &roster).await?;
        announce!(EventId::MembersChanged, "members changed: {}", plan.words);
        // If that fails now, the leader's duties do it.
        drop(self.retire_all(then).await);
        Ok(())
    }

    /// Holds a plan against who has what, and who answers.
    async fn check(&self, plan: &Plan, roster: &Roster) -> Result<(), ChangeError> {
        if let Some(id) = plan.ready {
            let matched = self.matched().get(&id).copied();
            if matched.is_none_or(|matched| matched.get() + LAG_MAX < roster.last_index.get()) {
                return Err(ChangeError::NotReady);
            }
        }
        let Some(after) = &plan.voters else { return Ok(()) };
        let alive: BTreeSet<NodeId> = self.probe(roster).await.into_keys().collect();
        if plan.ready.is_some_and(|id| !alive.contains(&id)) {
            return Err(ChangeError::NotReady);
        }
        let numbers = QuorumNumbers::of(plan.words.clone(), &roster.voters(), after, &alive);
        if !numbers.keeps_quorum() {
            announce!(
                EventId::ChangeRefused,
                { fields::REASON } = %numbers,
                "members stay as they are: {numbers}"
            );
            return Err(ChangeError::QuorumLost(numbers));
        }
        Ok(())
    }

    async fn propose_members(
        &self,
        change: ChangeMembers<u64, Contact>,
        roster: &Roster,
    ) -> Result<(), ChangeError> {
        let preconditions = [
            Precondition::LastMembershipLogId { last_membership_log_id: roster.log_id },
            Precondition::CommittedLeaderId {
                committed_leader_id: types::leadership(roster.vote.term, roster.vote.node),
            },
        ];
        outcome(self.raft().change_membership_if(change, false, preconditions).await)
    }

    /// Takes the second step of a change whose first step is committed, and writes down who leaves with it.
    pub(super) async fn finish_change(&self, roster: &Roster) -> Result<(), ChangeError> {
        self.propose_members(ChangeMembers::AddVoterIds(BTreeSet::new()), roster).await?;
        for id in &roster.leaving {
            // If that fails now, the leader's duties do it.
            drop(self.retire(*id, Leaving::Removed.words().to_owned()).await);
        }
        Ok(())
    }

    /// Writes down that nodes have left, or leave now.
    async fn retire_all(&self, leaving: Vec<(NodeId, String)>) -> Result<(), ChangeError> {
        for (id, reason) in leaving {
            self.retire(id, reason).await?;
        }
        Ok(())
    }

    pub(super) async fn retire(&self, id: NodeId, reason: String) -> Result<(), ChangeError> {
        let retire = cluster_change::Change::Retire(wire::Retire { node: id.get(), reason });
        let command = Command::Cluster(wire::ClusterChange { change: Some(retire) });
        let written = self.propose(command, self.env().clock.now() + RETIRE).await;
        written.map(drop).map_err(|error| {
            tracing::warn!(node = %id, %error, "the end of a member is not written down yet");
            ChangeError::TimedOut
        })
    }

    /// The members now, if this node leads.
    pub(super) async fn roster(&self) -> Result<Roster, ChangeError> {
        let id = self.id();
        let look = self.raft().with_raft_state(move |state| {
            let vote = types::vote(state.vote_ref());
            if state.server_state != ServerState::Leader || vote.node != id {
                return None;
            }
            let committed = state.cluster_committed().map(types::log_id);
            let membership = state.membership_state.effective();
            let configs = membership.membership().get_joint_config();
            Some(Roster {
                vote,
                settled: committed
                    .is_some_and(|last| (last.term, last.leader) == (vote.term, vote.node)),
                joint: 1 < configs.len(),
                leaving: leaving(configs),
                members: types::members(membership.membership()),
                last_index: LogIndex::new(state.log_ids.last().map_or(0, openraft::LogId::index)),
                log_id: *membership.log_id(),
            })
        });
        look.await.map_err(|_fatal| ChangeError::Stopped)?.ok_or(ChangeError::NoLeader)
    }

    /// What each other member is known to have durably; as leader.
    pub(super) fn matched(&self) -> BTreeMap<NodeId, LogIndex> {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        let known = metrics.replication.iter().flatten();
        known
            .filter_map(|(id, matched)| {
                Some((NodeId::new(*id), LogIndex::new(matched.as_ref()?.index())))
            })
            .collect()
    }

    /// Who answers now, this node included, and for how long each one's card has kept a barrier waiting. As leader.
    pub(super) async fn probe(&self, roster: &Roster) -> BTreeMap<NodeId, Duration> {
        let request = encode_following(roster.vote);
        let others = roster.members.iter().filter(|member| member.id != self.id());
        let answers = others.map(|member| {
            let call = self.transport().call(member, Method::Following, request.clone(), PROBE);
            async move {
                let answer = tokio::time::timeout(PROBE, call).await.ok()?.ok()?;
                let (_follows, stalled) = decode_following_reply(answer).ok()?;
                Some((member.id, stalled))
            }
        });
        let own = (self.id(), self.wal().stalled_for().unwrap_or_default());
        join_all(answers).await.into_iter().flatten().chain([own]).collect()
    }
}

fn asked(change: &Change) -> Asked {
    match change {
        Change::AddLearner(member) => Asked::AddLearner(types::wire_member(member)),
        Change::Remove(id, Leaving::SetAside) => Asked::SetAside(id.get()),
        // Only the leader gives anybody up, and asks nobody for it.
        Change::Remove(id, Leaving::Removed | Leaving::GivenUp) => Asked::Remove(id.get()),
        Change::Promote(id) => Asked::Promote(id.get()),
        Change::Update(member) => Asked::Update(types::wire_member(member)),
        Change::Replace { old, new } => {
            Asked::Replace(wire::Replacement { old: old.get(), new: new.get() })
        }
        Change::TransferLeader(to) => Asked::TransferLeader(to.get()),
    }
}

fn wanted(asked: Asked) -> Change {
    match asked {
        Asked::AddLearner(member) => Change::AddLearner(types::member_from_wire(member)),
        Asked::Remove(id) => Change::Remove(NodeId::new(id), Leaving::Removed),
        Asked::SetAside(id) => Change::Remove(NodeId::new(id), Leaving::SetAside),
        Asked::Promote(id) => Change::Promote(NodeId::new(id)),
        Asked::Update(member) => Change::Update(types::member_from_wire(member)),
        Asked::Replace(wire::Replacement { old, new }) => {
            Change::Replace { old: NodeId::new(old), new: NodeId::new(new) }
        }
        Asked::TransferLeader(to) => Change::TransferLeader(NodeId::new(to)),
    }
}

fn reply(result: Result<(), ChangeError>) -> wire::ChangeMembersReply {
    let (result, numbers) = match result {
        Ok(()) => (Answer::Done, None),
        Err(ChangeError::NotFound) => (Answer::NotFound, None),
        Err(ChangeError::NotLearner) => (Answer::NotLearner, None),
        Err(ChangeError::NotReady) => (Answer::NotReady, None),
        Err(ChangeError::TooManyLearners) => (Answer::TooManyLearners, None),
        Err(ChangeError::QuorumLost(numbers)) => (Answer::QuorumLost, Some(numbers.to_wire())),
        Err(ChangeError::Busy) => (Answer::Busy, None),
        Err(ChangeError::NoLeader) => (Answer::NoLeader, None),
        Err(ChangeError::TimedOut) => (Answer::TimedOut, None),
        Err(ChangeError::Stopped) => (Answer::Stopped, None),
    };
    wire::ChangeMembersReply { result: result.into(), numbers }
}

fn read_reply(reply: wire::ChangeMembersReply) -> Result<(), ChangeError> {
    Err(match Answer::try_from(reply.result) {
        Ok(Answer::Done) => return Ok(()),
        Ok(Answer::NotFound) => ChangeError::NotFound,
        Ok(Answer::NotLearner) => ChangeError::NotLearner,
        Ok(Answer::NotReady) => ChangeError::NotReady,
        Ok(Answer::TooManyLearners) => ChangeError::TooManyLearners,
        Ok(Answer::QuorumLost) => {
            ChangeError::QuorumLost(QuorumNumbers::of_wire(reply.numbers.unwrap_or_default()))
        }
        Ok(Answer::Busy) => ChangeError::Busy,
        Ok(Answer::NoLeader) => ChangeError::NoLeader,
        // The callee stops, this node does not; what became of the change is unknown.
        Ok(Answer::TimedOut | Answer::Stopped | Answer::Unknown) | Err(_) => ChangeError::TimedOut,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: u64) -> NodeId {
        NodeId::new(id)
    }

    fn member(number: u64, learner: bool) -> Member {
        Member { id: id(number), name: format!("pi-{number}"), learner, ..Member::default() }
    }

    /// Voters and learners.
    fn roster(voters: &[u64], learners: &[u64]) -> Roster {
        let all = voters.iter().map(|id| (*id, false)).chain(learners.iter().map(|id| (*id, true)));
        Roster {
            vote: Vote::default(),
            settled: true,
            joint: false,
            leaving: BTreeSet::new(),
            members: all.map(|(id, learner)| member(id, learner)).collect(),
            last_index: LogIndex::new(100),
            log_id: None,
        }
    }

    fn ids(ids: &[u64]) -> Option<BTreeSet<NodeId>> {
        Some(ids.iter().copied().map(id).collect())
    }

    fn planned(change: &Change, roster: &Roster) -> Plan {
        plan(change, roster).unwrap().unwrap()
    }

    #[test]
    fn a_removal_retires_and_tells_which_voters_remain() {
        let three = roster(&[1, 2, 3], &[4]);
        let voter = planned(&Change::Remove(id(2), Leaving::Removed), &three);
        assert_eq!(voter.change, ChangeMembers::RemoveVoters([2].into()));
        assert_eq!((voter.voters, voter.words.as_str()), (ids(&[1, 3]), "removing pi-2"));
        assert_eq!(voter.retires.unwrap().0, id(2));
        let learner = planned(&Change::Remove(id(4), Leaving::Removed), &three);
        assert_eq!(learner.change, ChangeMembers::RemoveNodes([4].into()));
        assert_eq!(learner.voters, None, "nobody's majority changes");
        assert_eq!(
            plan(&Change::Remove(id(9), Leaving::Removed), &three),
            Err(ChangeError::NotFound)
        );
        let last = planned(&Change::Remove(id(1), Leaving::Removed), &roster(&[1], &[]));
        assert_eq!(last.voters, ids(&[]));
    }

    #[test]
    fn who_comes_back_is_written_down_before_it_goes_and_in_words_it_knows() {
        let three = roster(&[1, 2, 3], &[4]);
        for (who, why, first) in [
            (2, Leaving::Removed, false),
            (2, Leaving::SetAside, true),
            (4, Leaving::Removed, false),
            (4, Leaving::GivenUp, true),
        ] {
            let plan = planned(&Change::Remove(id(who), why), &three);
            let (leaving, words) = plan.retires.unwrap();
            assert_eq!((leaving, plan.retires_first), (id(who), first), "{why:?}");
            assert_eq!(Leaving::may_join_again(&words), first, "{words}");
        }
    }

    #[test]
    fn a_vote_is_for_a_learner_that_is_ready() {
        let three = roster(&[1, 2], &[3]);
        let plan_of = planned(&Change::Promote(id(3)), &three);
        assert_eq!((plan_of.voters, plan_of.ready), (ids(&[1, 2, 3]), Some(id(3))));
        assert_eq!(plan(&Change::Promote(id(2)), &three), Err(ChangeError::NotLearner));
        assert_eq!(plan(&Change::Promote(id(9)), &three), Err(ChangeError::NotFound));
    }

    #[test]
    fn adding_is_repeatable_and_bounded() {
        let again = Change::AddLearner(member(2, true));
        assert_eq!(plan(&again, &roster(&[1], &[2])), Ok(None));
        let full: Vec<u64> = (10..).take(limits::LEARNERS_MAX).collect();
        assert_eq!(plan(&again, &roster(&[1], &full)), Err(ChangeError::TooManyLearners));
        assert_eq!(plan(&again, &roster(&[1, 2], &full)), Ok(None), "it is in already");
        assert!(plan(&again, &roster(&[1], &full[1..])).unwrap().is_some());
    }

    #[test]
    fn a_replacement_is_one_change_and_can_be_repeated_at_every_step() {
        let replace = Change::Replace { old: id(2), new: id(4) };
        let at_once = planned(&replace, &roster(&[1, 2, 3], &[4]));
        assert_eq!((at_once.voters, at_once.ready), (ids(&[1, 3, 4]), Some(id(4))));
        assert_eq!(at_once.retires.unwrap().0, id(2));
        let old_gone = planned(&replace, &roster(&[1, 3], &[4]));
        assert_eq!(old_gone.voters, ids(&[1, 3, 4]));
        let both_vote = planned(&replace, &roster(&[1, 2, 3, 4], &[]));
        assert_eq!(both_vote.voters, ids(&[1, 3, 4]));
        assert_eq!(plan(&replace, &roster(&[1, 3, 4], &[])), Ok(None), "done");
        assert_eq!(plan(&replace, &roster(&[1, 2, 3], &[])), Err(ChangeError::NotFound));
        let old_learner = planned(&replace, &roster(&[1], &[2, 4]));
        assert_eq!(old_learner.voters, ids(&[1, 4]));
    }

    #[test]
    fn an_address_that_did_not_change_is_not_written() {
        let same = Change::Update(member(2, false));
        assert_eq!(plan(&same, &roster(&[1, 2], &[])), Ok(None));
        let moved = Member { peer_urls: vec!["https://pi-2:2380".to_owned()], ..member(2, false) };
        assert!(plan(&Change::Update(moved.clone()), &roster(&[1, 2], &[])).unwrap().is_some());
        assert_eq!(plan(&Change::Update(moved), &roster(&[1], &[])), Err(ChangeError::NotFound));
    }

    #[test]
    fn every_change_and_every_answer_survives_the_way() {
        for change in [
            Change::AddLearner(Member { replaces: Some(id(1)), ..member(2, true) }),
            Change::Remove(id(2), Leaving::Removed),
            Change::Remove(id(2), Leaving::SetAside),
            Change::Promote(id(3)),
            Change::Update(member(4, true)),
            Change::Replace { old: id(5), new: id(6) },
            Change::TransferLeader(id(7)),
        ] {
            assert_eq!(wanted(asked(&change)), change);
        }
        let lost = QuorumNumbers { voters: 3, alive: 2, ..QuorumNumbers::default() };
        for error in [
            ChangeError::NotFound,
            ChangeError::NotLearner,
            ChangeError::NotReady,
            ChangeError::TooManyLearners,
            ChangeError::QuorumLost(lost),
            ChangeError::Busy,
            ChangeError::NoLeader,
            ChangeError::TimedOut,
        ] {
            assert_eq!(read_reply(reply(Err(error.clone()))), Err(error));
        }
        assert_eq!(read_reply(reply(Ok(()))), Ok(()));
        assert_eq!(read_reply(reply(Err(ChangeError::Stopped))), Err(ChangeError::TimedOut));
        let unknown = wire::ChangeMembersReply { result: 99, numbers: None };
        assert_eq!(read_reply(unknown), Err(ChangeError::TimedOut));
    }
}

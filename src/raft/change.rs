//! Changes of who is a member: one at a time, checked before they are proposed.
//!
//! # Invariants
//!
//! - The last voter is never removed, and a learner gets its vote only when it has what the leader has.
//! - An id that was removed is not given to anybody again: ids are random.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use thiserror::Error;

use super::types::{Contact, TypeConfig};
use super::{Member, Node};
use crate::types::NodeId;

/// Why the members stay as they are, or may do so.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChangeError {
    /// There is no such member.
    #[error("no such member")]
    NotFound,
    /// It has a vote already.
    #[error("not a learner")]
    NotLearner,
    /// It does not have the leader's log yet.
    #[error("the learner has not caught up")]
    NotReady,
    /// Too few voters would remain.
    #[error("the cluster would lose its quorum")]
    QuorumLost,
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
const LAG_MAX: u64 = 256;

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
                ChangeMembershipError::EmptyMembership(_) => ChangeError::QuorumLost,
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
    /// Adds a member without a vote.
    pub async fn add_learner(&self, member: &Member, deadline: Instant) -> Result<(), ChangeError> {
        let added = BTreeMap::from([(member.id.get(), Contact::of(member))]);
        self.change(ChangeMembers::AddNodes(added), deadline).await
    }

    /// Removes a member for good.
    pub async fn remove_member(&self, id: NodeId, deadline: Instant) -> Result<(), ChangeError> {
        let members = self.status().members;
        let member = members.iter().find(|member| member.id == id).ok_or(ChangeError::NotFound)?;
        if member.learner {
            return self
                .change(ChangeMembers::RemoveNodes(BTreeSet::from([id.get()])), deadline)
                .await;
        }
        if members.iter().filter(|member| !member.learner).count() == 1 {
            return Err(ChangeError::QuorumLost);
        }
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id.get()])), deadline).await
    }

    /// Gives a learner its vote, once it has caught up.
    pub async fn promote(&self, id: NodeId, deadline: Instant) -> Result<(), ChangeError> {
        let status = self.status();
        let member =
            status.members.iter().find(|member| member.id == id).ok_or(ChangeError::NotFound)?;
        if !member.learner {
            return Err(ChangeError::NotLearner);
        }
        let matched = {
            let metrics = self.raft().metrics();
            let metrics = metrics.borrow_watched();
            let replication = metrics.replication.as_ref();
            replication.and_then(|all| all.get(&id.get()).copied().flatten()).map(|id| id.index())
        };
        if matched.is_none_or(|matched| matched + LAG_MAX < status.last_index.get()) {
            return Err(ChangeError::NotReady);
        }
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id.get()])), deadline).await
    }

    /// Changes how a member is reached.
    pub async fn update_member(
        &self,
        member: &Member,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        let changed = BTreeMap::from([(member.id.get(), Contact::of(member))]);
        self.change(ChangeMembers::SetNodes(changed), deadline).await
    }

    async fn change(
        &self,
        change: ChangeMembers<u64, Contact>,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        let changed = self.raft().change_membership(change, false);
        match tokio::time::timeout_at(deadline.into(), changed).await {
            Ok(result) => outcome(result),
            Err(_elapsed) => Err(ChangeError::TimedOut),
        }
    }
}

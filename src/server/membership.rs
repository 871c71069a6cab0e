//! Changes of members, as clients of the etcd API ask for them.

use std::time::Instant;

use crate::env::BoxFuture;
use crate::etcd::{Membership, MembershipError};
use crate::raft::{ChangeError, Member, Node};
use crate::types::NodeId;

/// See the module documentation.
pub(super) struct NodeMembership(pub(super) Node);

fn translate(error: ChangeError) -> MembershipError {
    match error {
        ChangeError::NotFound => MembershipError::NotFound,
        ChangeError::NotLearner => MembershipError::NotLearner,
        ChangeError::NotReady => MembershipError::LearnerNotReady,
        ChangeError::TooManyLearners => MembershipError::TooManyLearners,
        ChangeError::QuorumLost(_) => MembershipError::NotEnoughStarted,
        ChangeError::Busy => MembershipError::Unhealthy,
        ChangeError::NoLeader => MembershipError::NoLeader,
        ChangeError::TimedOut => MembershipError::TimedOut,
        ChangeError::Stopped => MembershipError::Stopped,
    }
}

impl Membership for NodeMembership {
    fn add(
        &self,
        peer_urls: Vec<String>,
        learner: bool,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<Member, MembershipError>> {
        Box::pin(async move {
            if !learner {
                // A voter counts towards the majority before it runs: with one member that stops all writes.
                return Err(MembershipError::NotEnoughStarted);
            }
            let id = NodeId::new(self.0.env().entropy.next_u64());
            let member = Member { id, peer_urls, learner, ..Member::default() };
            self.0.add_learner(&member, deadline).await.map_err(translate)?;
            Ok(member)
        })
    }

    fn remove(&self, id: NodeId, deadline: Instant) -> BoxFuture<'_, Result<(), MembershipError>> {
        Box::pin(async move { self.0.remove_member(id, deadline).await.map_err(translate) })
    }

    fn promote(&self, id: NodeId, deadline: Instant) -> BoxFuture<'_, Result<(), MembershipError>> {
        Box::pin(async move { self.0.promote(id, deadline).await.map_err(translate) })
    }

    fn update(
        &self,
        id: NodeId,
        peer_urls: Vec<String>,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<(), MembershipError>> {
        Box::pin(async move {
            let members = self.0.status().members;
            let member = members.iter().find(|member| member.id == id).cloned();
            let member = member.ok_or(MembershipError::NotFound)?;
            self.0.update_member(&Member { peer_urls, ..member }, deadline).await.map_err(translate)
        })
    }
}

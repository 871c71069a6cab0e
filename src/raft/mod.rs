//! The node as the rest of the program sees it: propose, read, ask for its state.
//!
//! Only this module knows openraft. Its types stay inside; what crosses the edge are the types below, and what
//! goes to the card or to peers is written by our own code.
//!
//! # Shape
//!
//! - [`Node`]: the handle. [`node`] puts openraft, the log and the store together.
//! - `log_store`, `state_machine`, `network`: what openraft asks of us, each a thin translation.
//! - [`transport`]: the way to other nodes, as this module needs it. `wire` is what is said, `pipeline` and `snapshot` how
//!   entries and whole states travel, `answer` the other end of all of it.
//! - `forward`, `read`: writes and linearizable reads through any member.
//! - [`change`]: who is a member; `duties` and `lead`: what a leader does about it by itself.
//! - [`reset`]: the way back when a majority is lost.
//! - [`checkpoint`]: when the store is made durable and the log may forget.
//!
//! # Invariants
//!
//! - A leader that restarts is elected anew (`enable_leader_restore` off), a constant.
//! - A proposal that may have entered the log is never offered again.
//! - The log is purged only up to a checkpoint that is durable.
//! - No answer promises what a power cut would undo (`promise`).

pub mod change;
pub mod checkpoint;
pub mod inspect;
pub mod node;
pub mod reset;

pub mod transport;

mod answer;
mod duties;
mod forward;
mod lead;
mod log_store;
mod network;
mod outcome;
mod pipeline;
mod promise;
mod quorum;
mod read;
pub mod runtime;
mod snapshot;
mod state_machine;
mod stats;
mod types;
mod wire;

#[cfg(test)]
mod serving_tests;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use thiserror::Error;

use crate::apply::LeaseChange;
use crate::mvcc::RevisionEvents;
use crate::types::{ClusterId, LogId, LogIndex, NodeId, Revision, Term};

pub use change::{ChangeError, Leaving};
pub use node::{Node, Options, Parts, StartError, StopError};
pub use quorum::QuorumNumbers;
pub use stats::{Progress, Stats};
pub use types::{member_from_wire, wire_member};

/// Why a proposal has no outcome. Only `NoLeader` and `TooManyRequests` say that the command was not applied: they
/// are answered before it enters the log.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProposeError {
    /// The client's deadline passed; the command may or may not be applied later.
    #[error("request timed out")]
    TimedOut,
    /// No leader within the deadline; the command did not enter the log.
    #[error("no leader")]
    NoLeader,
    /// Leadership changed while it was under way; the outcome is unknown.
    #[error("leader changed")]
    LeaderChanged,
    /// Too much is committed and not yet applied.
    #[error("too many requests")]
    TooManyRequests,
    /// This node is stopping.
    #[error("stopped")]
    Stopped,
}

/// Why a linearizable read cannot be served.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReadError {
    /// No quorum confirmed in time.
    #[error("request timed out")]
    TimedOut,
    /// No leader within the deadline.
    #[error("no leader")]
    NoLeader,
    /// This node is stopping.
    #[error("stopped")]
    Stopped,
}

/// Proof that a linearizable read may be served from the local store now.
#[must_use]
#[derive(Debug)]
pub struct ReadBarrier(());

/// One member as the cluster knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Its name; for people.
    pub name: String,
    /// Where peers reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
    /// No vote yet.
    pub learner: bool,
    /// The member whose vote it takes over when it has caught up: its own former self, whose promises are lost.
    pub replaces: Option<NodeId>,
}

/// What a node is at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Answers proposals.
    Leader,
    /// Follows a leader, or looks for one.
    #[default]
    Follower,
    /// Asks for votes.
    Candidate,
    /// Follows, without a vote.
    Learner,
}

/// A node's state at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Itself.
    pub node: NodeId,
    /// Its role.
    pub role: Role,
    /// The newest term it knows.
    pub term: Term,
    /// Whom it follows.
    pub leader: Option<NodeId>,
    /// End of its log.
    pub last_index: LogIndex,
    /// Known to be on a majority.
    pub committed: LogIndex,
    /// In the store.
    pub applied: LogIndex,
    /// All members. Shared, because a status is copied for many a request.
    pub members: Arc<[Member]>,
}

impl Status {
    /// How many members vote.
    pub fn voters(&self) -> usize {
        self.members.iter().filter(|member| !member.learner).count()
    }

    /// Whether an even number votes: it bears the loss of no more than one fewer would, and has one more card to lose.
    pub fn has_even_voters(&self) -> bool {
        let voters = self.voters();
        0 < voters && voters.is_multiple_of(2)
    }
}

/// What a batch of applied entries did, for those who follow the store.
#[derive(Clone, Debug, Default)]
pub struct AppliedBatch {
    /// The last entry of the batch.
    pub applied: LogId,
    /// Events, a revision each, ascending.
    pub events: Vec<Arc<RevisionEvents>>,
    /// Changes of leases, in order.
    pub leases: Vec<LeaseChange>,
    /// Newest revision after the batch.
    pub revision: Revision,
}

/// Follows the store: the watch hub and the lessor. Called on the apply path, so it must not block.
pub trait Follow: Send + Sync + 'static {
    /// These entries are applied and readable.
    fn applied(&self, batch: &AppliedBatch);
    /// The store was replaced by a snapshot: read it anew.
    fn restored(&self, revision: Revision);
}

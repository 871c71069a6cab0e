//! Remembers what every other node has promised this one, and which incarnation of it was last seen.
//!
//! In memory: what has to survive a start stands in the log and the state, where every node's starts are recorded.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::verdict::later;
use crate::raft::Member;
use crate::types::{LogId, NodeId, Vote};

/// One run of a node's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incarnation {
    /// Its number: random, new with every start.
    pub number: u64,
    /// Where it said it was.
    pub member: Member,
}

/// What is known of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The highest vote it has granted to this node.
    pub vote: Option<Vote>,
    /// The highest entry it has told this node that it keeps.
    pub kept: Option<LogId>,
    /// The highest epoch it said it has.
    pub epoch: u64,
    /// Its last incarnation.
    pub incarnation: Option<Incarnation>,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub struct HelloBook {
    known: Mutex<BTreeMap<NodeId, Known>>,
    /// Why this node itself was removed, once another one has said so.
    removed: watch::Sender<Option<String>>,
}

impl HelloBook {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node acknowledged an entry as durable.
    pub fn note_kept(&self, node: NodeId, upto: LogId) {
        let mut book = self.lock();
        let known = book.entry(node).or_default();
        known.kept = known.kept.max(Some(upto));
    }

    /// A node granted a vote.
    pub fn note_vote(&self, node: NodeId, vote: Vote) {
        let mut book = self.lock();
        let known = book.entry(node).or_default();
        if later(known.vote, vote) {
            known.vote = Some(vote);
        }
    }

    /// A node was heard of.
    pub fn note_incarnation(&self, node: NodeId, epoch: u64, incarnation: Incarnation) {
        let mut book = self.lock();
        let known = book.entry(node).or_default();
        known.epoch = known.epoch.max(epoch);
        known.incarnation = Some(incarnation);
    }

    /// What is known of a node.
    pub fn known(&self, node: NodeId) -> Known {
        self.lock().get(&node).cloned().unwrap_or_default()
    }

    /// Another node refuses this one, because it was removed.
    pub fn note_removed(&self, reason: String) {
        self.removed.send_replace(Some(reason));
    }

    /// Why this node was removed, when it is told so.
    pub fn removed(&self) -> watch::Receiver<Option<String>> {
        self.removed.subscribe()
    }

    /// Everybody who was heard of, where they said they were.
    pub fn seen(&self) -> Vec<Member> {
        let book = self.lock();
        book.values().filter_map(|known| Some(known.incarnation.as_ref()?.member.clone())).collect()
    }

    /// Forgets a node that was removed for good.
    pub fn forget(&self, node: NodeId) {
        self.lock().remove(&node);
    }
}

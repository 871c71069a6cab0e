//! Reads the messages between nodes with code of its own, and shows every promise in them to the oracle.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use k3s_server::proto::node as wire;
use k3s_server::proto::node::append_reply::Result as Appended;
use k3s_server::raft::transport::{Method, StreamMethod};
use k3s_server::types::{LogId, LogIndex, NodeId, Term, Vote};
use prost::Message;

use crate::oracle::Oracle;

/// See the module documentation.
#[derive(Clone)]
pub(crate) struct Promises {
    oracle: Oracle,
}

/// What is promised on one stream: its answers come in the order of its requests.
#[derive(Clone)]
pub(crate) struct StreamPromises {
    promises: Promises,
    callee: NodeId,
    method: StreamMethod,
    asked: Arc<Mutex<VecDeque<Asked>>>,
}

enum Asked {
    Append(Vote),
    Snapshot(Vote, Option<LogId>),
}

fn log_id(id: &wire::LogId) -> LogId {
    LogId {
        term: Term::new(id.term),
        leader: NodeId::new(id.leader),
        index: LogIndex::new(id.index),
    }
}

fn vote(vote: &wire::Vote) -> Vote {
    Vote { term: Term::new(vote.term), node: NodeId::new(vote.node), committed: vote.committed }
}

impl Promises {
    pub(crate) fn new(oracle: Oracle) -> Self {
        Self { oracle }
    }

    /// A question leaves a node.
    pub(crate) fn asks(&self, node: NodeId, method: Method, request: &[u8]) {
        match method {
            Method::Append => {
                self.append(node, request);
            }
            Method::Vote => {
                let request = wire::VoteRequest::decode(request).unwrap_or_default();
                if let Some(asked) = &request.vote {
                    self.oracle.votes(node, vote(asked));
                }
            }
            Method::PreVote
            | Method::TransferLeader
            | Method::Following
            | Method::ReadIndex
            | Method::Propose
            | Method::ChangeMembers
            | Method::Hello
            | Method::Admit
            | Method::Lease => {}
        }
    }

    /// An answer leaves a node.
    pub(crate) fn answers(&self, node: NodeId, method: Method, request: &[u8], reply: &[u8]) {
        match method {
            Method::Append => {
                let request = wire::AppendRequest::decode(request).unwrap_or_default();
                let leader = request.vote.as_ref().map(vote).unwrap_or_default();
                let reply = wire::AppendReply::decode(reply).unwrap_or_default();
                self.appended(node, leader, &reply);
            }
            Method::Vote => {
                let request = wire::VoteRequest::decode(request).unwrap_or_default();
                let reply = wire::VoteReply::decode(reply).unwrap_or_default();
                if let (true, Some(granted)) = (reply.granted, &request.vote) {
                    self.oracle.votes(node, vote(granted));
                }
            }
            Method::PreVote
            | Method::TransferLeader
            | Method::Following
            | Method::ReadIndex
            | Method::Propose
            | Method::ChangeMembers
            | Method::Hello
            | Method::Admit
            | Method::Lease => {}
        }
    }

    /// A stream is opened to a node.
    pub(crate) fn stream(&self, callee: NodeId, method: StreamMethod) -> StreamPromises {
        StreamPromises { promises: self.clone(), callee, method, asked: Arc::default() }
    }

    fn append(&self, node: NodeId, request: &[u8]) -> Vote {
        let request = wire::AppendRequest::decode(request).unwrap_or_default();
        let leader = request.vote.as_ref().map(vote).unwrap_or_default();
        self.oracle.leads(node, leader, request.committed.as_ref().map(log_id));
        leader
    }

    fn appended(&self, node: NodeId, leader: Vote, reply: &wire::AppendReply) {
        if let Some(Appended::Appended(appended)) = &reply.result {
            self.oracle.acknowledges(node, leader, appended.upto.as_ref().map(log_id));
        }
    }
}

impl StreamPromises {
    /// The next message of the stream leaves the caller.
    pub(crate) fn asks(&self, caller: NodeId, message: &[u8]) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        match self.method {
            StreamMethod::Append => {
                asked.push_back(Asked::Append(self.promises.append(caller, message)))
            }
            // The header comes first; chunks follow.
            StreamMethod::Snapshot if asked.is_empty() => {
                let header = wire::SnapshotHeader::decode(message).unwrap_or_default();
                let leader = header.vote.as_ref().map(vote).unwrap_or_default();
                asked.push_back(Asked::Snapshot(leader, header.last.as_ref().map(log_id)));
            }
            StreamMethod::Snapshot => {}
        }
    }

    /// The next answer leaves the callee. One that only says how far it is, or that it is alive, answers nothing yet.
    pub(crate) fn answers(&self, message: &[u8]) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        match asked.front() {
            Some(Asked::Append(leader)) => {
                let reply = wire::AppendReply::decode(message).unwrap_or_default();
                if let Some(Appended::Working(_)) = reply.result {
                    return;
                }
                self.promises.appended(self.callee, *leader, &reply);
            }
            Some(Asked::Snapshot(leader, last)) => {
                let reply = wire::SnapshotReply::decode(message).unwrap_or_default();
                let Some(voted) = reply.vote.as_ref().map(vote) else { return };
                // A newer vote in the answer says no.
                if (voted.term, voted.node) == (leader.term, leader.node) {
                    self.promises.oracle.acknowledges(self.callee, *leader, *last);
                }
            }
            None => {}
        }
        asked.pop_front();
    }
}

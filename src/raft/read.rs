//! Confirms linearizable reads: from which log index on the local store may be read.
//!
//! openraft's own check waits for what the followers' cards are still writing, so one slow card would slow every read. Here
//! a leader asks "do you still follow me?" ([`Method::Following`]), which is answered from memory, and a follower asks its
//! leader for the index ([`Method::ReadIndex`]).
//!
//! # Shape
//!
//! One task per node takes whoever waits, asks once for all of them, and answers all; those who come meanwhile are the next
//! round. Whoever was not confirmed stays for the next round, until its own deadline.
//!
//! # Why no read is stale
//!
//! Let a read begin, and let `w` be any write acknowledged before. The round that confirms the read starts after it began: the
//! task takes those who wait *before* it looks at its position. Let L, leader of term T, confirm it with index i.
//!
//! - `w` was acknowledged in T: then it was committed on L before it was acknowledged, so its index is at most i, which is
//!   L's commit index read after the read began.
//! - `w` was acknowledged in an earlier term: then it is in L's log before L's first entry of T, because L was elected.
//!   L confirms nothing before an entry of T is committed; so i is beyond `w`.
//! - `w` was acknowledged in a later term: then the first leader after T had been elected before the read began, by a majority
//!   that shares a member with the majority L asks. That member promised a later vote *before* the round began, and its
//!   promise is visible in memory at once and never goes back. It answers "no". So L's round is lost, however long L was paused
//!   and whatever its timers say: no clock is part of the argument.
//!
//! Majorities share a member also while the members change: L asks a majority of each voter set of the newest membership in its
//! log. openraft changes one step at a time, each step committed before the next begins, the first only after an entry of the
//! leader's own term is committed; so the memberships that L and the next leader go by are the same or neighbours, and
//! majorities of neighbours overlap. A later leader exists only if the first one after T did.
//!
//! A pause *after* the confirmation does no harm either: the read is then served from a state at least as new as i, and i was
//! current at a moment within the read.
//!
//! # Not here
//!
//! Serializable reads: they ask nobody. Leases: nothing here relies on a clock.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::ServerState;
use prost::Message;
use tokio::sync::{mpsc, oneshot};

use super::quorum::{Tally, Verdict};
use super::transport::{CallError, Method, Refused, Transport};
use super::types::{self, Raft};
use super::{Member, Node, ReadBarrier, ReadError, wire};
use crate::mutants::{Mutant, is_planted};
use crate::proto::node;
use crate::types::{LogIndex, NodeId, Term, Vote};

/// Longest round. Whoever has not answered by then is asked anew.
const ROUND: Duration = Duration::from_millis(500);

/// Rest between a round that confirmed nothing and the next.
const PAUSE: Duration = Duration::from_millis(50);

/// How long a leader tries for a follower, before that asks again or elsewhere.
const FOR_FOLLOWER: Duration = Duration::from_millis(1_000);

/// Readers that may wait for the task; more wait for a place.
pub(super) const WAITING_MAX: usize = 4_096;

/// Somebody wants to read.
pub(super) struct Request {
    /// Who asks for another node is not sent on to a third one.
    leading_only: bool,
    answer: oneshot::Sender<Result<LogIndex, NotLeading>>,
}

/// This node does not lead; who does, as far as it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NotLeading(Option<NodeId>);

/// What a round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    Confirmed(LogIndex),
    NotConfirmed,
    /// Raft has stopped.
    Over,
}

/// Where this node stands when a round begins.
#[derive(Clone, Debug)]
enum Standing {
    /// It leads, and has committed in its term.
    Leads(Position),
    /// It leads, but does not know yet what is committed.
    Unsettled,
    /// It follows, or looks for whom to follow.
    Follows(Option<Member>),
}

/// What a leader knows when a round begins.
#[derive(Clone, Debug)]
struct Position {
    vote: Vote,
    index: LogIndex,
    sets: Vec<BTreeSet<NodeId>>,
    members: Vec<Member>,
}

/// The task. See the module documentation.
pub(super) struct Reader {
    pub(super) raft: Raft,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) id: NodeId,
    pub(super) requests: mpsc::Receiver<Request>,
}

impl Reader {
    pub(super) async fn run(mut self) {
        let mut waiting: Vec<Request> = Vec::new();
        loop {
            // Everybody who waits now shares the round that starts now; who comes later does not.
            if waiting.is_empty() && self.requests.recv_many(&mut waiting, WAITING_MAX).await == 0 {
                return;
            }
            while let Ok(request) = self.requests.try_recv() {
                waiting.push(request);
            }
            waiting.retain(|request| !request.answer.is_closed());
            if waiting.is_empty() {
                continue;
            }
            match self.round(&mut waiting).await {
                Round::Confirmed(index) => {
                    for request in waiting.drain(..) {
                        // A reader that went away needs no answer.
                        let _gone = request.answer.send(Ok(index));
                    }
                }
                Round::NotConfirmed => tokio::time::sleep(PAUSE).await,
                Round::Over => return,
            }
        }
    }

    async fn round(&self, waiting: &mut Vec<Request>) -> Round {
        let Ok(standing) = standing(&self.raft, self.id).await else { return Round::Over };
        match standing {
            Standing::Leads(position) => self.ask_voters(position).await,
            Standing::Unsettled => Round::NotConfirmed,
            Standing::Follows(leader) => {
                let hint = NotLeading(leader.as_ref().map(|leader| leader.id));
                for request in waiting.extract_if(.., |request| request.leading_only) {
                    let _gone = request.answer.send(Err(hint));
                }
                match leader {
                    Some(leader) if !waiting.is_empty() => self.ask_leader(&leader).await,
                    _ => Round::NotConfirmed,
                }
            }
        }
    }

    async fn ask_voters(&self, position: Position) -> Round {
        let Position { vote, index, sets, members } = position;
        let mut tally = Tally::new(sets);
        // Its own answer is the look at its position, which is part of this round.
        tally.heard(self.id, true);
        if tally.verdict() == Verdict::Won || is_planted(Mutant::ReadWithoutQuorum) {
            return Round::Confirmed(index);
        }
        let request = wire::encode_following(vote);
        let mut answers: FuturesUnordered<_> = tally
            .voters()
            .into_iter()
            .filter(|voter| *voter != self.id)
            .map(|voter| self.ask_voter(voter, &members, request.clone()))
            .collect();
        let decide = async {
            while let Some((voter, follows)) = answers.next().await {
                tally.heard(voter, follows);
                match tally.verdict() {
                    Verdict::Open => {}
                    Verdict::Won => return Round::Confirmed(index),
                    Verdict::Lost => return Round::NotConfirmed,
                }
            }
            Round::NotConfirmed
        };
        tokio::time::timeout(ROUND, decide).await.unwrap_or(Round::NotConfirmed)
    }

    async fn ask_voter(&self, voter: NodeId, members: &[Member], request: Bytes) -> (NodeId, bool) {
        let Some(member) = members.iter().find(|member| member.id == voter) else {
            return (voter, false);
        };
        let answer = self.transport.call(member, Method::Following, request, ROUND).await;
        let follows = answer.ok().and_then(|bytes| wire::decode_following_reply(bytes).ok());
        (voter, follows.is_some_and(|(follows, _)| follows))
    }

    /// One question for all who wait here.
    async fn ask_leader(&self, leader: &Member) -> Round {
        let call = self.transport.call(leader, Method::ReadIndex, Bytes::new(), FOR_FOLLOWER);
        let answer: Result<Bytes, CallError> = call.await;
        let index = answer.ok().and_then(|bytes| node::ReadIndexReply::decode(bytes).ok());
        index.map_or(Round::NotConfirmed, |reply| Round::Confirmed(LogIndex::new(reply.index)))
    }
}

/// Looks at Raft's state, in its own loop: one consistent moment.
async fn standing(raft: &Raft, id: NodeId) -> Result<Standing, ()> {
    let look = raft.with_raft_state(move |state| {
        let vote = types::vote(state.vote_ref());
        let membership = state.membership_state.effective();
        let members = types::members(membership.membership());
        if state.server_state != ServerState::Leader || vote.node != id {
            let leader = vote.committed.then_some(vote.node).filter(|leader| *leader != id);
            let leader = leader.and_then(|id| members.into_iter().find(|member| member.id == id));
            return Standing::Follows(leader);
        }
        let Some(committed) = state.cluster_committed().map(types::log_id) else {
            return Standing::Unsettled;
        };
        if (committed.term, committed.leader) != (vote.term, vote.node) {
            return Standing::Unsettled;
        }
        let sets = membership.membership().get_joint_config().iter();
        let sets = sets.map(|set| set.iter().copied().map(NodeId::new).collect()).collect();
        Standing::Leads(Position { vote, index: committed.index, sets, members })
    });
    look.await.map_err(|_fatal| ())
}

/// Whether one who promised `own` follows the leader with the vote `asked`. A promise to somebody else, older or newer, is a no.
fn follows(own: Vote, asked: Vote) -> bool {
    (own.term, own.node) == (asked.term, asked.node)
}

impl Node {
    /// Confirms with a majority that everything acknowledged before this call is in the local store.
    pub async fn read_barrier(&self, deadline: Instant) -> Result<ReadBarrier, ReadError> {
        let start = self.counters().now();
        let confirm = async {
            let index = self.read_index(false).await?;
            if is_planted(Mutant::ReadBeforeApplied) {
                return Ok(ReadBarrier(()));
            }
            self.wait_applied(index).await.map_err(|_stopped| ReadError::Stopped)?;
            Ok(ReadBarrier(()))
        };
        let result = match tokio::time::timeout_at(deadline.into(), confirm).await {
            Ok(result) => result,
            Err(_elapsed) if self.status().leader.is_none() => Err(ReadError::NoLeader),
            Err(_elapsed) => Err(ReadError::TimedOut),
        };
        self.counters().confirmed(start, &result);
        result
    }

    /// Confirms with a majority that this node leads in exactly this term, and that everything acknowledged before this call is
    /// in the local store. For what the leader of that term alone may promise, as how long a lease still has.
    ///
    /// The term is looked at after a majority has confirmed this node's leadership, which may have been in an earlier term;
    /// then a majority has elected it for this one since the call began.
    pub async fn leads_in(&self, term: Term, deadline: Instant) -> Result<ReadBarrier, ReadError> {
        let confirm = async {
            let index = self.read_index(true).await?;
            self.wait_applied(index).await.map_err(|_stopped| ReadError::Stopped)?;
            match self.leads(Some(term)).await {
                Ok(true) => Ok(ReadBarrier(())),
                Ok(false) => Err(ReadError::NoLeader),
                Err(_stopped) => Err(ReadError::Stopped),
            }
        };
        match tokio::time::timeout_at(deadline.into(), confirm).await {
            Ok(result) => result,
            Err(_elapsed) => Err(ReadError::TimedOut),
        }
    }

    async fn read_index(&self, leading_only: bool) -> Result<LogIndex, ReadError> {
        let (answer, index) = oneshot::channel();
        let request = Request { leading_only, answer };
        self.reads().send(request).await.map_err(|_closed| ReadError::Stopped)?;
        match index.await {
            Ok(Ok(index)) => Ok(index),
            Ok(Err(NotLeading(_))) => Err(ReadError::NoLeader),
            Err(_closed) => Err(ReadError::Stopped),
        }
    }

    /// Answers [`Method::ReadIndex`].
    pub(super) async fn answer_read_index(&self) -> Result<Bytes, Refused> {
        let index = tokio::time::timeout(FOR_FOLLOWER, self.read_index(true)).await;
        match index {
            Ok(Ok(index)) => Ok(node::ReadIndexReply { index: index.get() }.encode_to_vec().into()),
            Ok(Err(ReadError::NoLeader)) => Err(Refused::NotLeader(self.status().leader)),
            Ok(Err(ReadError::Stopped)) => Err(Refused::NotReady("stopping".to_owned())),
            Ok(Err(ReadError::TimedOut)) | Err(_) => Err(Refused::Busy),
        }
    }

    /// Answers [`Method::Following`] from memory: neither the card nor the store is asked.
    pub(super) async fn answer_following(
        &self,
        from: NodeId,
        request: Bytes,
    ) -> Result<Bytes, Refused> {
        let leader = wire::decode_following(request)?;
        wire::caller(from, &leader)?;
        let asked = types::vote(&leader);
        let own = self.raft().with_raft_state(|state| types::vote(state.vote_ref())).await;
        let own = own.map_err(|_fatal| Refused::NotReady("stopping".to_owned()))?;
        let stalled = self.wal().stalled_for().unwrap_or_default();
        Ok(wire::encode_following_reply(follows(own, asked), stalled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote(term: u64, node: u64, committed: bool) -> Vote {
        Vote { term: Term::new(term), node: NodeId::new(node), committed }
    }

    #[test]
    fn only_who_promised_nobody_else_follows() {
        let leader = vote(3, 1, true);
        for (own, expected) in [
            (vote(3, 1, true), true),
            // It granted the vote and has not heard of the result.
            (vote(3, 1, false), true),
            (vote(4, 2, false), false),
            (vote(4, 1, true), false),
            (vote(3, 2, false), false),
            // It does not remember its promise: it cannot speak for the time since.
            (vote(2, 1, true), false),
            (Vote::default(), false),
        ] {
            assert_eq!(follows(own, leader), expected, "{own}");
        }
    }
}

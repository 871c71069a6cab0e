//! Takes a command to the leader, from whichever member a client talks to, and brings its outcome back.
//!
//! # Shape
//!
//! [`Node::propose`] tries: here if this node leads, else at the leader ([`Method::Propose`]). Each try ends as an [`Attempt`];
//! [`judge`] reads it off what the carrier says. A member answers its client only when it has applied the entry itself, as
//! etcd does: whoever got an answer can read it here, serializably too.
//!
//! # Invariants
//!
//! - A command is offered again only if it surely entered no log: the carrier did not deliver it, or the callee refused it.
//!   After anything else the outcome is unknown, and that is what the client hears.
//! - Nobody passes on what was passed to him: a callee that does not lead says who does.
//! - Too much committed and not yet applied, here or at the leader, is said at once and not waited out.

use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::errors::ClientWriteError;
use prost::Message;
use tokio::sync::{oneshot, watch};

use super::outcome;
use super::transport::{CallError, Method, Refused};
use super::types::{self, Waiter};
use super::{Member, Node, ProposeError, Role, Status};
use crate::apply::Outcome;
use crate::command::{Command, Encoded};
use crate::limits;
use crate::mutants::{Mutant, is_planted};
use crate::proto::node as wire;
use crate::proto::node::ProposeFailure;
use crate::proto::node::propose_reply::Result as Answer;
use crate::types::{LogIndex, NodeId, Term};

/// Rest before a command that entered no log is offered again, unless somebody becomes leader sooner.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the answer of a leader that was replaced is waited for.
const DEPOSED: Duration = Duration::from_millis(500);

/// An outcome, and where its command stands in the log.
#[derive(Clone, Debug, PartialEq)]
struct Accepted {
    outcome: Outcome,
    index: LogIndex,
}

/// How one try ended.
#[derive(Clone, Debug, PartialEq)]
enum Attempt {
    /// It is applied at the leader.
    Done(Accepted),
    /// It entered no log; somebody else may lead.
    NotEntered(Option<NodeId>),
    /// It ends here.
    Failed(ProposeError),
}

/// Reads off an answer, or the lack of one, what became of the command.
fn judge(answer: Result<Bytes, CallError>) -> Attempt {
    match answer {
        Ok(bytes) => judge_reply(wire::ProposeReply::decode(bytes).unwrap_or_default()),
        Err(CallError::Unreachable(_)) => Attempt::NotEntered(None),
        Err(CallError::Interrupted(_)) if is_planted(Mutant::UnknownProposedAgain) => {
            Attempt::NotEntered(None)
        }
        Err(CallError::Interrupted(_)) => Attempt::Failed(ProposeError::LeaderChanged),
        Err(CallError::Refused(Refused::NotLeader(leader))) => Attempt::NotEntered(leader),
        Err(CallError::Refused(
            Refused::NotReady(_)
            | Refused::NotAMember
            | Refused::Removed(_)
            | Refused::WrongCluster(_)
            | Refused::Incompatible(_)
            | Refused::Malformed(_)
            | Refused::Busy
            | Refused::Duplicate(_),
        )) => Attempt::NotEntered(None),
    }
}

/// An answer that cannot be read came from one who had the command: what it did with it is unknown.
fn judge_reply(reply: wire::ProposeReply) -> Attempt {
    let unknown = Attempt::Failed(ProposeError::LeaderChanged);
    match reply.result {
        Some(Answer::Outcome(wire)) => match outcome::from_wire(wire) {
            Some(outcome) => Attempt::Done(Accepted { outcome, index: LogIndex::new(reply.index) }),
            None => unknown,
        },
        Some(Answer::Failure(failure)) => match ProposeFailure::try_from(failure) {
            Ok(ProposeFailure::TimedOut) => Attempt::Failed(ProposeError::TimedOut),
            Ok(ProposeFailure::NoLeader) => Attempt::NotEntered(None),
            Ok(ProposeFailure::TooManyRequests) => Attempt::Failed(ProposeError::TooManyRequests),
            // The callee stops, this node does not; what became of the command is unknown.
            Ok(
                ProposeFailure::LeaderChanged | ProposeFailure::Stopped | ProposeFailure::Unknown,
            )
            | Err(_) => unknown,
        },
        None => unknown,
    }
}

fn failure(error: &ProposeError) -> ProposeFailure {
    match error {
        ProposeError::TimedOut => ProposeFailure::TimedOut,
        ProposeError::NoLeader => ProposeFailure::NoLeader,
        ProposeError::LeaderChanged => ProposeFailure::LeaderChanged,
        ProposeError::TooManyRequests => ProposeFailure::TooManyRequests,
        ProposeError::Stopped => ProposeFailure::Stopped,
    }
}

/// Milliseconds until `deadline`, for a message.
pub(super) fn millis_until(now: Instant, deadline: Instant) -> u64 {
    u64::try_from(deadline.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX)
}

/// Longest a callee works on what it was asked, whatever the caller wants.
const ASKED_MAX: Duration = Duration::from_secs(60);

pub(super) fn asked_timeout(millis: u64) -> Duration {
    Duration::from_millis(millis).min(ASKED_MAX)
}

/// Whom to try: the one just named, if he is a member, else the one this node follows.
fn target(status: &Status, named: Option<NodeId>) -> Option<Member> {
    let member = |id| status.members.iter().find(|member| member.id == id).cloned();
    named.and_then(member).or_else(|| status.leader.and_then(member))
}

/// Follows the trail of who leads. A name is followed at once, but two names in a row are a rumour, and rumours rest.
pub(super) struct Trail {
    status: watch::Receiver<Status>,
    named: Option<NodeId>,
}

impl Trail {
    pub(super) const fn new(status: watch::Receiver<Status>) -> Self {
        Self { status, named: None }
    }

    /// Whom to try next.
    pub(super) fn target(&mut self) -> Option<Member> {
        target(&self.status.borrow_and_update(), self.named)
    }

    /// That one did not do it, and named somebody, or not. Returns when it makes sense to try again; false if the node stops.
    pub(super) async fn missed(&mut self, named: Option<NodeId>) -> bool {
        let rumour = self.named.is_some() || named.is_none();
        self.named = if rumour { None } else { named };
        if !rumour {
            return true;
        }
        let changed = tokio::time::timeout(PAUSE, self.status.changed()).await;
        !matches!(changed, Ok(Err(_closed)))
    }
}

impl Node {
    /// Replicates a command and returns what applying it answered. Any member may be asked.
    ///
    /// Waits out the absence of a leader until the deadline, because a proposal that never entered a log is safe to offer
    /// again. One that may have is never offered twice.
    pub async fn propose(
        &self,
        command: Command,
        deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        let _pending = self.counters().proposal();
        let result = self.propose_by(command.encode_in(self.format()), deadline).await;
        self.counters().proposed(&result);
        result
    }

    async fn propose_by(
        &self,
        encoded: Encoded,
        deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        self.check_backlog()?;
        let mut entered = false;
        let attempts = self.propose_until_accepted(encoded, deadline, &mut entered);
        match tokio::time::timeout_at(deadline.into(), attempts).await {
            Ok(result) => result,
            Err(_elapsed) if entered => Err(ProposeError::TimedOut),
            Err(_elapsed) => Err(ProposeError::NoLeader),
        }
    }

    /// `entered` is true while the command may be in a log.
    async fn propose_until_accepted(
        &self,
        encoded: Encoded,
        deadline: Instant,
        entered: &mut bool,
    ) -> Result<Outcome, ProposeError> {
        let mut trail = Trail::new(self.watch_status());
        loop {
            let attempt = match trail.target() {
                None => Attempt::NotEntered(None),
                Some(leader) => {
                    *entered = true;
                    if leader.id == self.id() {
                        self.offer(&encoded, None).await
                    } else {
                        self.forward(&leader, &encoded, deadline).await
                    }
                }
            };
            match attempt {
                Attempt::Done(Accepted { outcome, index }) => {
                    self.wait_applied(index).await?;
                    return Ok(outcome);
                }
                Attempt::Failed(error) => return Err(error),
                Attempt::NotEntered(named) => {
                    *entered = false;
                    if !trail.missed(named).await {
                        return Err(ProposeError::Stopped);
                    }
                }
            }
        }
    }

    /// Proposes only while this node leads in exactly this term, and nowhere else; else answers `NoLeader`, and nothing was
    /// written. For what only the leader of that term may decide, as which lease has run out.
    pub async fn propose_in_term(
        &self,
        command: Command,
        term: Term,
        deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        self.check_backlog()?;
        let _pending = self.counters().proposal();
        let encoded = command.encode_in(self.format());
        let mut entered = false;
        let attempts = self.propose_here(&encoded, Some(term), &mut entered);
        let result = match tokio::time::timeout_at(deadline.into(), attempts).await {
            Ok(result) => result.map(|accepted| accepted.outcome),
            Err(_elapsed) if entered => Err(ProposeError::TimedOut),
            Err(_elapsed) => Err(ProposeError::NoLeader),
        };
        self.counters().proposed(&result);
        result
    }

    /// Offers a command to this node's own log for as long as it leads, in this term if one is given.
    async fn propose_here(
        &self,
        encoded: &Encoded,
        term: Option<Term>,
        entered: &mut bool,
    ) -> Result<Accepted, ProposeError> {
        loop {
            *entered = true;
            let attempt = self.offer(encoded, term).await;
            match attempt {
                Attempt::Done(accepted) => return Ok(accepted),
                Attempt::Failed(error) => return Err(error),
                Attempt::NotEntered(_) => *entered = false,
            }
            if !self.leads(term).await? {
                return Err(ProposeError::NoLeader);
            }
            // It leads, but a majority has not been heard for a while.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Whether this node leads now, in this term if one is given.
    pub(super) async fn leads(&self, term: Option<Term>) -> Result<bool, ProposeError> {
        let id = self.id();
        let look = self.raft().with_raft_state(move |state| {
            let vote = types::vote(state.vote_ref());
            let leads = state.server_state == openraft::ServerState::Leader && vote.node == id;
            leads && term.is_none_or(|term| vote.term == term)
        });
        look.await.map_err(|_fatal| ProposeError::Stopped)
    }

    /// One try at this node's own log.
    async fn offer(&self, encoded: &Encoded, term: Option<Term>) -> Attempt {
        let (waiter, answer) = oneshot::channel();
        let mut write = self.raft().write(encoded.clone()).responder(Waiter(waiter));
        if let Some(term) = term {
            write = write.with_leader(types::leadership(term, self.id()));
        }
        if write.await.is_err() {
            return Attempt::Failed(ProposeError::Stopped);
        }
        match answer.await {
            Ok(Ok(written)) => {
                let index = LogIndex::new(written.log_id.index());
                match written.data.0 {
                    Some(outcome) => Attempt::Done(Accepted { outcome, index }),
                    None => Attempt::Failed(ProposeError::Stopped),
                }
            }
            Ok(Err(ClientWriteError::ForwardToLeader(forward))) => {
                let other = forward.leader_id.map(NodeId::new).filter(|id| *id != self.id());
                Attempt::NotEntered(other)
            }
            Ok(Err(ClientWriteError::LogEntryDiscarded(_))) => {
                Attempt::Failed(ProposeError::LeaderChanged)
            }
            Ok(Err(
                ClientWriteError::ChangeMembershipError(_)
                | ClientWriteError::PreconditionFailed(_),
            ))
            | Err(_) => Attempt::Failed(ProposeError::Stopped),
        }
    }

    /// One try at the leader.
    async fn forward(&self, leader: &Member, encoded: &Encoded, deadline: Instant) -> Attempt {
        tokio::select! {
            // Without a connection nothing leaves: whoever leads instead is asked at once.
            ready = self.transport().ready(leader) => if let Err(error) = ready {
                return judge(Err(error));
            },
            () = self.replaced(leader.id) => return Attempt::NotEntered(None),
        }
        let timeout_millis = millis_until(self.env().clock.now(), deadline);
        let request = wire::ProposeRequest { command: encoded.bytes().clone(), timeout_millis };
        let timeout = Duration::from_millis(timeout_millis);
        let request = request.encode_to_vec().into();
        tokio::select! {
            answer = self.transport().call(leader, Method::Propose, request, timeout) => judge(answer),
            () = self.deposed(leader.id) => Attempt::Failed(ProposeError::LeaderChanged),
        }
    }

    /// Completes when this one has not led for a while: one that lost its place in good order still answers, one that is gone or
    /// cut off does not, and its client need not wait until its deadline to hear that nobody knows.
    async fn deposed(&self, leader: NodeId) {
        self.replaced(leader).await;
        tokio::time::sleep(DEPOSED).await;
    }

    /// Completes when somebody else leads.
    async fn replaced(&self, leader: NodeId) {
        // Not the status: that one changes with every entry, and would wake everybody who waits here.
        let mut leads = self.watch_leader();
        let other = |now: &Option<NodeId>| now.is_some_and(|other| other != leader);
        if leads.wait_for(other).await.is_err() {
            std::future::pending().await
        }
    }

    fn check_backlog(&self) -> Result<(), ProposeError> {
        let watched = self.watch_status();
        let status = watched.borrow();
        let backlog = status.committed.get().saturating_sub(status.applied.get());
        if limits::APPLY_BACKLOG_MAX < backlog {
            return Err(ProposeError::TooManyRequests);
        }
        Ok(())
    }

    /// Returns when the local store has this entry.
    pub(super) async fn wait_applied(&self, index: LogIndex) -> Result<(), ProposeError> {
        let mut applied = self.counters().applied.subscribe();
        let reached = applied.wait_for(|applied| index <= *applied).await;
        reached.map(drop).map_err(|_closed| ProposeError::Stopped)
    }

    /// Answers a request that another member's client made.
    pub(super) async fn answer_forwarded(
        &self,
        method: Method,
        request: Bytes,
    ) -> Result<Bytes, Refused> {
        match method {
            Method::ReadIndex => self.answer_read_index().await,
            Method::Propose => self.answer_propose(request).await,
            Method::ChangeMembers => self.answer_change_members(request).await,
            Method::Append
            | Method::Vote
            | Method::PreVote
            | Method::TransferLeader
            | Method::Following
            | Method::Hello
            | Method::Admit
            | Method::Lease => Err(Refused::NotReady(format!("{method:?} is not sent on"))),
        }
    }

    /// Answers [`Method::Propose`]. What cannot be read here would stop every member once it stood in the log.
    pub(super) async fn answer_propose(&self, request: Bytes) -> Result<Bytes, Refused> {
        let request = wire::ProposeRequest::decode(request)
            .map_err(|error| Refused::Malformed(error.to_string()))?;
        let bytes = u64::try_from(request.command.len()).unwrap_or(u64::MAX);
        if limits::WAL_RECORD_BYTES_MAX < bytes {
            return Err(Refused::Malformed(format!("a command of {bytes} bytes")));
        }
        let encoded = Encoded::from_log(request.command);
        encoded.decode().map_err(|error| Refused::Malformed(error.to_string()))?;
        if self.status().role != Role::Leader {
            return Err(Refused::NotLeader(self.status().leader));
        }
        let _pending = self.counters().proposal();
        let result = self.propose_for(&encoded, asked_timeout(request.timeout_millis)).await;
        self.counters().proposed(&result);
        let reply = match result {
            Ok(Accepted { outcome, index }) => wire::ProposeReply {
                result: Some(Answer::Outcome(outcome::to_wire(outcome))),
                index: index.get(),
            },
            Err(ProposeError::NoLeader) if self.status().leader != Some(self.id()) => {
                return Err(Refused::NotLeader(self.status().leader));
            }
            Err(error) => wire::ProposeReply {
                result: Some(Answer::Failure(failure(&error).into())),
                index: 0,
            },
        };
        Ok(reply.encode_to_vec().into())
    }

    async fn propose_for(
        &self,
        encoded: &Encoded,
        timeout: Duration,
    ) -> Result<Accepted, ProposeError> {
        self.check_backlog()?;
        let mut entered = false;
        let attempts = self.propose_here(encoded, None, &mut entered);
        match tokio::time::timeout(timeout, attempts).await {
            Ok(result) => result,
            Err(_elapsed) if entered => Err(ProposeError::TimedOut),
            Err(_elapsed) => Err(ProposeError::NoLeader),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::Refusal;
    use crate::types::Revision;

    fn refused(refused: Refused) -> Result<Bytes, CallError> {
        Err(CallError::Refused(refused))
    }

    fn reply(result: Option<Answer>) -> Result<Bytes, CallError> {
        Ok(wire::ProposeReply { result, index: 7 }.encode_to_vec().into())
    }

    #[test]
    fn only_what_surely_entered_no_log_is_offered_again() {
        let other = Some(NodeId::new(9));
        let text = String::new;
        for (answer, leader) in [
            (Err(CallError::Unreachable(text())), None),
            (refused(Refused::NotLeader(other)), other),
            (refused(Refused::NotLeader(None)), None),
            (refused(Refused::NotReady(text())), None),
            (refused(Refused::Busy), None),
            (refused(Refused::NotAMember), None),
            (reply(Some(Answer::Failure(ProposeFailure::NoLeader.into()))), None),
        ] {
            assert_eq!(judge(answer.clone()), Attempt::NotEntered(leader), "{answer:?}");
        }
        let unknown = ProposeError::LeaderChanged;
        for (answer, error) in [
            (Err(CallError::Interrupted(text())), unknown.clone()),
            (Ok(Bytes::from_static(b"\xff\xff")), unknown.clone()),
            (reply(None), unknown.clone()),
            (reply(Some(Answer::Failure(99))), unknown.clone()),
            (reply(Some(Answer::Failure(ProposeFailure::Stopped.into()))), unknown.clone()),
            (reply(Some(Answer::Failure(ProposeFailure::LeaderChanged.into()))), unknown),
            (reply(Some(Answer::Failure(ProposeFailure::TimedOut.into()))), ProposeError::TimedOut),
            (
                reply(Some(Answer::Failure(ProposeFailure::TooManyRequests.into()))),
                ProposeError::TooManyRequests,
            ),
        ] {
            assert_eq!(judge(answer.clone()), Attempt::Failed(error), "{answer:?}");
        }
    }

    #[test]
    fn an_outcome_comes_with_its_place_in_the_log() {
        let outcome = Outcome { revision: Revision::new(3), reply: Err(Refusal::NoSpace) };
        let answer = reply(Some(Answer::Outcome(outcome::to_wire(outcome.clone()))));
        let accepted = Accepted { outcome, index: LogIndex::new(7) };
        assert_eq!(judge(answer), Attempt::Done(accepted));
    }

    #[test]
    fn every_error_of_a_proposal_has_its_number() {
        for (error, back) in [
            (ProposeError::TimedOut, Attempt::Failed(ProposeError::TimedOut)),
            (ProposeError::NoLeader, Attempt::NotEntered(None)),
            (ProposeError::LeaderChanged, Attempt::Failed(ProposeError::LeaderChanged)),
            (ProposeError::TooManyRequests, Attempt::Failed(ProposeError::TooManyRequests)),
            (ProposeError::Stopped, Attempt::Failed(ProposeError::LeaderChanged)),
        ] {
            let answer = reply(Some(Answer::Failure(failure(&error).into())));
            assert_eq!(judge(answer), back, "{error}");
        }
    }

    #[test]
    fn one_who_is_named_is_tried_before_the_one_who_is_followed() {
        let member = |id| Member { id: NodeId::new(id), ..Member::default() };
        let status = Status {
            leader: Some(NodeId::new(1)),
            members: vec![member(1), member(2)].into(),
            ..Status::default()
        };
        let tried = |named: Option<u64>| target(&status, named.map(NodeId::new)).map(|m| m.id);
        assert_eq!(tried(None), Some(NodeId::new(1)));
        assert_eq!(tried(Some(2)), Some(NodeId::new(2)));
        assert_eq!(tried(Some(77)), Some(NodeId::new(1)), "not a member");
        assert_eq!(target(&Status::default(), None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn two_who_name_each_other_are_not_asked_in_a_circle() {
        let (_status, watched) = watch::channel(Status::default());
        let mut trail = Trail::new(watched);
        let start = tokio::time::Instant::now();
        for _ in 0..10 {
            assert!(trail.missed(Some(NodeId::new(1))).await);
        }
        assert_eq!(start.elapsed(), 5 * PAUSE, "every other name rests");
    }
}

//! The other end of `network`: answers what other nodes ask of this one's Raft.
//!
//! # Invariants
//!
//! - Whoever asks speaks for itself: the vote in a request is of the node that the carrier has authenticated.
//! - An answer that promises something leaves only after [`Node::keep`] has looked at what is durable.
//! - A follower says that it follows from memory, never from its card.
//!
//! # Not here
//!
//! Reads, writes and changes of members that other nodes send on: `read`, `forward`, `change`. Joining and leases: the assembly.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use openraft::errors::{Fatal, RaftError};

use super::promise::Promise;
use super::snapshot;
use super::transport::{Answer, BoxStream, CallError, Method, Refused, StreamMethod};
use super::types::{self, RaftVote, TypeConfig};
use super::wire::{self, Append, AppendReply, Appended, AskVote, Voted};
use super::{Node, pipeline};
use crate::env::BoxFuture;
use crate::mutants::{Mutant, is_planted};
use crate::types::NodeId;

impl Answer for Node {
    fn answer(
        &self,
        from: NodeId,
        method: Method,
        request: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refused>> {
        let node = self.clone();
        Box::pin(async move {
            node.ready()?;
            match method {
                Method::Append => node.answer_append(from, request).await,
                Method::Vote => node.answer_vote(from, request).await,
                Method::PreVote => node.answer_pre_vote(from, request).await,
                Method::TransferLeader => node.answer_transfer(from, request).await,
                Method::Following => node.answer_following(from, request).await,
                Method::ReadIndex | Method::Propose | Method::ChangeMembers => {
                    node.answer_forwarded(method, request).await
                }
                Method::Hello | Method::Admit | Method::Lease => {
                    Err(Refused::NotReady(format!("raft does not answer {method:?}")))
                }
            }
        })
    }

    fn answer_stream(
        &self,
        from: NodeId,
        method: StreamMethod,
        requests: BoxStream<Result<Bytes, CallError>>,
    ) -> BoxStream<Result<Bytes, Refused>> {
        if let Err(refused) = self.ready() {
            return Box::pin(stream::iter([Err(refused)]));
        }
        match method {
            StreamMethod::Append => self.answer_appends(from, requests),
            StreamMethod::Snapshot => snapshot::answer(self.clone(), from, requests),
        }
    }
}

fn stopped(fatal: &Fatal<TypeConfig>) -> Refused {
    Refused::NotReady(fatal.to_string())
}

fn failed(error: RaftError<TypeConfig>) -> Refused {
    let RaftError::Fatal(fatal) = error;
    stopped(&fatal)
}

impl Node {
    async fn answer_append(&self, from: NodeId, request: Bytes) -> Result<Bytes, Refused> {
        let request = read_append(from, request)?;
        let vote = request.vote;
        let mut replies = Box::pin(self.raft().stream_append(stream::iter([request])));
        match replies.next().await {
            Some(Ok(appended)) => self.append_reply(vote, appended),
            Some(Err(fatal)) => Err(stopped(&fatal)),
            None => Err(Refused::NotReady("stopping".to_owned())),
        }
    }

    /// What an append promises: to follow its leader, and to have everything up to there.
    fn append_reply(&self, vote: RaftVote, appended: Appended) -> Result<Bytes, Refused> {
        match appended {
            Ok(upto) => self.keep(Promise { vote: Some(vote), upto })?,
            Err(_) => self.ready()?,
        }
        Ok(wire::encode_append_reply(&AppendReply::Done(appended)))
    }

    async fn answer_vote(&self, from: NodeId, request: Bytes) -> Result<Bytes, Refused> {
        let mut request = read_vote(from, request)?;
        if is_planted(Mutant::VoteForShorterLog) {
            request.last_log_id = Some(types::raft_log_id(crate::types::LogId {
                term: crate::types::Term::new(u64::MAX),
                ..crate::types::LogId::default()
            }));
        }
        let asked = request.vote;
        let reply = self.raft().vote(request).await.map_err(failed)?;
        // A candidate counts the vote by what it says, whether or not it calls itself granted.
        let granted = reply.vote_granted || reply.is_granted_to(&asked);
        let promise = Promise { vote: granted.then_some(asked), upto: None };
        self.keep(promise)?;
        Ok(wire::encode_vote_reply(&reply))
    }

    async fn answer_pre_vote(&self, from: NodeId, request: Bytes) -> Result<Bytes, Refused> {
        let request = read_vote(from, request)?;
        let reply: Voted = self.raft().pre_vote(request).await.map_err(failed)?;
        Ok(wire::encode_vote_reply(&reply))
    }

    async fn answer_transfer(&self, from: NodeId, request: Bytes) -> Result<Bytes, Refused> {
        let request = wire::decode_transfer(request)?;
        wire::caller(from, request.from_leader())?;
        let done = self.raft().handle_transfer_leader(request).await;
        done.map(|reply| wire::encode_transfer_reply(&reply)).map_err(|fatal| stopped(&fatal))
    }

    fn answer_appends(
        &self,
        from: NodeId,
        requests: BoxStream<Result<Bytes, CallError>>,
    ) -> BoxStream<Result<Bytes, Refused>> {
        let owed = Owed::default();
        let input = accepted_requests(from, requests, owed.clone());
        let replies = Box::pin(self.raft().stream_append(input));
        let open = (self.clone(), owed, replies);
        Box::pin(stream::unfold(Some(open), |open| async move {
            let (node, owed, mut replies) = open?;
            match node.next_append_reply(&owed, &mut replies).await? {
                Ok(reply) => Some((Ok(reply), Some((node, owed, replies)))),
                Err(refused) => Some((Err(refused), None)),
            }
        }))
    }

    /// The next answer on a stream; none at its end.
    async fn next_append_reply(
        &self,
        owed: &Owed,
        replies: &mut (impl Stream<Item = Result<Appended, Fatal<TypeConfig>>> + Unpin),
    ) -> Option<Result<Bytes, Refused>> {
        loop {
            match tokio::time::timeout(pipeline::SIGN_OF_LIFE, replies.next()).await {
                Ok(Some(Ok(appended))) => {
                    let Some(vote) = owed.lock().votes.pop_front() else {
                        unreachable!("an answer to an append that was not sent")
                    };
                    return Some(self.append_reply(vote, appended));
                }
                Ok(Some(Err(fatal))) => return Some(Err(stopped(&fatal))),
                Ok(None) => return owed.lock().refused.take().map(Err),
                Err(_elapsed) if owed.lock().votes.is_empty() => {}
                Err(_elapsed) => return Some(Ok(wire::encode_append_reply(&AppendReply::Working))),
            }
        }
    }
}

/// What the callee owes on an append stream.
#[derive(Clone, Debug, Default)]
struct Owed(Arc<Mutex<Answers>>);

#[derive(Debug, Default)]
struct Answers {
    /// The votes of the requests that have no answer, oldest first.
    votes: VecDeque<RaftVote>,
    /// What was wrong with the request after them: the last answer.
    refused: Option<Refused>,
}

impl Owed {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The requests that can be given to openraft, up to the first that cannot.
fn accepted_requests(
    from: NodeId,
    requests: BoxStream<Result<Bytes, CallError>>,
    owed: Owed,
) -> BoxStream<Append> {
    Box::pin(stream::unfold((requests, owed), move |(mut requests, owed)| async move {
        // A caller that is gone needs no answer.
        let message = requests.next().await?.ok()?;
        match read_append(from, message) {
            Ok(request) => {
                owed.lock().votes.push_back(request.vote);
                Some((request, (requests, owed)))
            }
            Err(refused) => {
                owed.lock().refused = Some(refused);
                None
            }
        }
    }))
}

fn read_append(from: NodeId, message: Bytes) -> Result<Append, Refused> {
    let mut request = wire::decode_append(message)?;
    if is_planted(Mutant::CommittedEarly) {
        let last = request.entries.last().map(|entry| entry.log_id);
        request.leader_commit = last.max(request.leader_commit);
    }
    wire::caller(from, &request.vote)?;
    Ok(request)
}

fn read_vote(from: NodeId, message: Bytes) -> Result<AskVote, Refused> {
    let request = wire::decode_vote(message)?;
    wire::caller(from, &request.vote)?;
    Ok(request)
}

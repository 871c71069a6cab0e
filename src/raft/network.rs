//! openraft's calls to other nodes, over [`Transport`].
//!
//! # Shape
//!
//! [`Peers`] makes a [`Peer`] for each of openraft's purposes: replication, which keeps a stream of appends open
//! (`pipeline`), heartbeats and votes, one call each, and snapshots (`snapshot`). A heartbeat therefore never waits behind
//! entries or a snapshot.
//!
//! # Invariants
//!
//! - No call outlives the time that openraft gives it.
//! - A pre-vote that nobody answered is not granted: openraft's own default would let a cut-off node believe in a majority.
//! - What a peer refuses is retried with growing pauses; what was interrupted, at once.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{
    NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption,
    RPCTypes,
};
use openraft::raft::SnapshotResponse;
use openraft::{OptionalSend, RaftNetworkFactory};

use super::Member;
use super::pipeline;
use super::snapshot::{self, Snapshot, SnapshotData};
use super::stats::Counters;
use super::transport::{CallError, Method, Refused, Transport};
use super::types::{Contact, RaftVote, TypeConfig};
use super::wire::{self, Append, AppendReply, Appended, AskVote, Malformed, Transfer, Transferred};
use crate::types::NodeId;

pub(super) type RpcError = RPCError<TypeConfig>;

/// Shortest and longest pause before a peer that cannot be reached is tried again.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Makes connections to peers.
#[derive(Clone)]
pub(super) struct Peers {
    transport: Arc<dyn Transport>,
    id: NodeId,
    counters: Arc<Counters>,
}

impl Peers {
    pub(super) fn new(transport: Arc<dyn Transport>, id: NodeId, counters: Arc<Counters>) -> Self {
        Self { transport, id, counters }
    }

    fn client(&self, target: u64, contact: &Contact, purpose: Purpose) -> Peer {
        Peer { to: contact.member(target, false), purpose, peers: self.clone() }
    }
}

/// What openraft wants a connection for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Replication,
    /// One small message at a time, whose answer must not wait.
    Heartbeat,
}

/// A connection to one peer.
pub(super) struct Peer {
    to: Member,
    purpose: Purpose,
    peers: Peers,
}

impl Peer {
    async fn call(
        &self,
        method: Method,
        request: Bytes,
        action: RPCTypes,
        option: &RPCOption,
    ) -> Result<Bytes, RpcError> {
        let timeout = option.soft_ttl();
        let call = self.peers.transport.call(&self.to, method, request, timeout);
        // The carrier has its own timer, which may be coarser.
        match tokio::time::timeout(timeout, call).await {
            Ok(answer) => answer.map_err(rpc_error),
            Err(_elapsed) => Err(self.timed_out(action, timeout)),
        }
    }

    fn timed_out(&self, action: RPCTypes, timeout: Duration) -> RpcError {
        let (id, target) = (self.peers.id.get(), self.to.id.get());
        RPCError::Timeout(Timeout { action, id, target, timeout })
    }

    /// Appends one after the other, a call each.
    fn one_by_one<'s, S>(
        &'s self,
        input: S,
        option: RPCOption,
    ) -> BoxStream<'s, Result<Appended, RpcError>>
    where
        S: Stream<Item = Append> + OptionalSend + Unpin + 'static,
    {
        Box::pin(input.then(move |request| {
            let option = option.clone();
            async move {
                let request = wire::encode_append(&request);
                let reply =
                    self.call(Method::Append, request, RPCTypes::AppendEntries, &option).await?;
                match wire::decode_append_reply(reply).map_err(not_understood)? {
                    AppendReply::Done(appended) => Ok(appended),
                    AppendReply::Working => {
                        Err(network_error("a call was answered with \"working\""))
                    }
                }
            }
        }))
    }

    /// A stream on which each append is sent as soon as there is one.
    async fn pipelined<S>(
        &self,
        input: S,
        option: RPCOption,
    ) -> Result<BoxStream<'static, Result<Appended, RpcError>>, RpcError>
    where
        S: Stream<Item = Append> + OptionalSend + Unpin + 'static,
    {
        let setup = option.soft_ttl();
        let open = pipeline::open(&*self.peers.transport, &self.to, Box::pin(input), setup);
        let timed_out = self.timed_out(RPCTypes::AppendEntries, setup);
        match tokio::time::timeout(setup, open).await {
            Ok(replies) => replies.map_err(rpc_error),
            Err(_elapsed) => Err(timed_out),
        }
    }
}

/// What openraft does about it: after `Unreachable` it waits, after `Network` it tries again.
pub(super) fn rpc_error(error: CallError) -> RpcError {
    match error {
        CallError::Interrupted(what) => network_error(what),
        CallError::Unreachable(_) | CallError::Refused(_) => {
            RPCError::Unreachable(Unreachable::from_string(error))
        }
    }
}

pub(super) fn network_error(what: impl ToString) -> RpcError {
    RPCError::Network(NetworkError::from_string(what))
}

/// An answer of another release, perhaps: trying at once again would not help.
pub(super) fn not_understood(error: Malformed) -> RpcError {
    rpc_error(CallError::Refused(Refused::Malformed(format!("in its answer: {error}"))))
}

impl RaftNetworkFactory<TypeConfig> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &Contact) -> Peer {
        self.client(target, node, Purpose::Replication)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Contact) -> Peer {
        self.client(target, node, Purpose::Heartbeat)
    }
}

impl NetBackoff<TypeConfig> for Peer {
    fn backoff(&self) -> Option<Backoff> {
        let pauses =
            std::iter::successors(Some(PAUSE_MIN), |pause| Some(PAUSE_MAX.min(*pause * 2)));
        Some(Backoff::new(pauses))
    }
}

impl NetStreamAppend<TypeConfig> for Peer {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<Appended, RpcError>>, RpcError>>
    where
        S: Stream<Item = Append> + OptionalSend + Unpin + 'static,
    {
        match self.purpose {
            Purpose::Heartbeat => {
                let replies = self.one_by_one(input, option);
                Box::pin(async move { Ok(replies) })
            }
            Purpose::Replication => Box::pin(async move {
                let replies: BoxStream<'s, _> = self.pipelined(input, option).await?;
                Ok(replies)
            }),
        }
    }
}

impl NetVote<TypeConfig> for Peer {
    async fn vote(&mut self, request: AskVote, option: RPCOption) -> Result<wire::Voted, RpcError> {
        let message = wire::encode_vote(&request);
        let reply = self.call(Method::Vote, message, RPCTypes::Vote, &option).await?;
        wire::decode_vote_reply(reply).map_err(not_understood)
    }

    async fn pre_vote(
        &mut self,
        request: AskVote,
        option: RPCOption,
    ) -> Result<wire::Voted, RpcError> {
        let message = wire::encode_vote(&request);
        let reply = self.call(Method::PreVote, message, RPCTypes::Vote, &option).await?;
        wire::decode_vote_reply(reply).map_err(not_understood)
    }
}

impl NetTransferLeader<TypeConfig> for Peer {
    async fn transfer_leader(
        &mut self,
        request: Transfer,
        option: RPCOption,
    ) -> Result<Transferred, RpcError> {
        let message = wire::encode_transfer(&request);
        let action = RPCTypes::TransferLeader;
        let reply = self.call(Method::TransferLeader, message, action, &option).await?;
        wire::decode_transfer_reply(reply, &request).map_err(not_understood)
    }
}

impl NetSnapshot<TypeConfig> for Peer {
    type SnapshotData = SnapshotData;

    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        // A transfer takes as long as it takes; `send` notices when nothing moves.
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let sent = {
            let Peers { transport, counters, .. } = &self.peers;
            snapshot::send(&**transport, &self.to, vote, snapshot, cancel, counters).await
        };
        let vote = sent.map_err(|error| match error {
            snapshot::SendError::Silent(timeout) => {
                self.timed_out(RPCTypes::InstallSnapshot, timeout).into()
            }
            snapshot::SendError::Streaming(error) => error,
        })?;
        Ok(SnapshotResponse::new(vote))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_interrupted_call_is_tried_again_at_once() {
        let text = || "why".to_owned();
        let interrupted = rpc_error(CallError::Interrupted(text()));
        assert!(matches!(interrupted, RPCError::Network(_)));
        for refused in [Refused::Busy, Refused::NotReady(text()), Refused::Removed(text())] {
            let error = rpc_error(CallError::Refused(refused.clone()));
            assert!(matches!(error, RPCError::Unreachable(_)), "{refused}");
            assert!(error.to_string().contains(&refused.to_string()), "{error}");
        }
        let unreachable = rpc_error(CallError::Unreachable(text()));
        assert!(matches!(unreachable, RPCError::Unreachable(_)));
    }
}

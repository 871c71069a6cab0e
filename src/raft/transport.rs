//! The way to other nodes, as this module needs it: messages in, answers out.
//!
//! What a message says is encoded and decoded here (`wire`), so every carrier carries the same bytes: `peers` over mutual TLS,
//! the simulator in memory. A carrier knows addresses and connections, and nothing of Raft.
//!
//! # Invariants
//!
//! - A carrier proves who the caller is: `from` in [`Answer`] comes from the caller's certificate, not from the message.
//! - `Unreachable` means that the callee did not see the message. Whoever is not sure says `Interrupted`.
//! - Messages of one stream arrive in order, each at most once, or the stream ends.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use thiserror::Error;

use super::Member;
use crate::env::BoxFuture;
use crate::types::NodeId;

/// A stream that is owned and sent between tasks.
pub type BoxStream<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

macro_rules! numbered {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $name:ident = $number:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $type {
            $($(#[$variant_doc])* $name,)+
        }

        impl $type {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The number on the wire, for ever.
            pub const fn number(self) -> u32 {
                match self { $(Self::$name => $number,)+ }
            }

            /// The one with this number.
            pub fn of_number(number: u32) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| one.number() == number)
            }
        }
    };
}

numbered! {
    /// What is asked of another node, one question and one answer.
    Method {
        /// Entries or a heartbeat, outside a stream: `AppendRequest`.
        Append = 1,
        /// `VoteRequest`.
        Vote = 2,
        /// `VoteRequest`: would you?
        PreVote = 3,
        /// `TransferLeaderRequest`.
        TransferLeader = 4,
        /// `FollowingRequest`: the quorum check of a linearizable read.
        Following = 5,
        /// Nothing in; `ReadIndexReply`: a follower's linearizable read.
        ReadIndex = 6,
        /// `ProposeRequest`: a follower's client wants a write.
        Propose = 7,
        /// `ChangeMembersRequest`: a follower's client wants other members.
        ChangeMembers = 8,
        /// `HelloRequest`: a node that starts asks what others remember of it.
        Hello = 9,
        /// `AdmitRequest`: a node that has the credentials wants to be a member.
        Admit = 10,
        /// `LeaseRequest`: a follower's client asks about a lease.
        Lease = 11,
    }
}

numbered! {
    /// What is sent as a stream.
    StreamMethod {
        /// `AppendRequest`s in, `AppendReply`s out in the same order.
        Append = 100,
        /// `SnapshotHeader`, then the state in chunks; one `SnapshotReply`.
        Snapshot = 101,
    }
}

/// Why a node did not do what it was asked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// It is starting or stopping.
    #[error("not ready: {0}")]
    NotReady(String),
    /// The caller is not a member, as far as the callee knows.
    #[error("the caller is not a member")]
    NotAMember,
    /// The caller was removed, for ever.
    #[error("the caller was removed from the cluster: {0}")]
    Removed(String),
    /// The callee belongs to another cluster.
    #[error("another cluster: {0}")]
    WrongCluster(String),
    /// The callee speaks other versions.
    #[error("incompatible versions: {0}")]
    Incompatible(String),
    /// The callee cannot read the request.
    #[error("malformed request: {0}")]
    Malformed(String),
    /// The callee has too much to do.
    #[error("busy")]
    Busy,
    /// The callee does not lead.
    #[error("not the leader")]
    NotLeader(Option<NodeId>),
    /// Another incarnation of the caller is alive.
    #[error("another incarnation of the caller is alive: {0}")]
    Duplicate(String),
}

/// Why a call has no answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CallError {
    /// The callee did not get the message.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The callee may or may not have got and done it: the connection ended, or time ran out.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// The callee said no, and did nothing.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Carries messages to other nodes.
pub trait Transport: Send + Sync + 'static {
    /// Asks one question. `to` carries the addresses as the cluster knows them; the carrier may know newer ones.
    fn call(
        &self,
        to: &Member,
        method: Method,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>>;

    /// Completes when a call would leave at once, or cannot: then nothing has left. A carrier that keeps no connections is always
    /// ready.
    fn ready(&self, _to: &Member) -> BoxFuture<'static, Result<(), CallError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Opens a stream. It ends when either side drops its end; how long it may be silent is the caller's business.
    fn stream(
        &self,
        to: &Member,
        method: StreamMethod,
        requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>>;
}

/// Answers other nodes. [`super::Node`] answers its own methods; the assembly adds the rest.
pub trait Answer: Send + Sync + 'static {
    /// Answers one question of a caller whose certificate says that it is `from`.
    fn answer(
        &self,
        from: NodeId,
        method: Method,
        request: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refused>>;

    /// Answers a stream. An `Err` in `requests` says that the caller is gone and ends it.
    fn answer_stream(
        &self,
        from: NodeId,
        method: StreamMethod,
        requests: BoxStream<Result<Bytes, CallError>>,
    ) -> BoxStream<Result<Bytes, Refused>>;
}

/// A transport without anybody at the other end: a cluster of one, before others join.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPeers;

impl Transport for NoPeers {
    fn call(
        &self,
        to: &Member,
        _method: Method,
        _request: Bytes,
        _timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let error = CallError::Unreachable(format!("no route to node {}", to.id));
        Box::pin(async move { Err(error) })
    }

    fn stream(
        &self,
        to: &Member,
        _method: StreamMethod,
        _requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>> {
        let error = CallError::Unreachable(format!("no route to node {}", to.id));
        Box::pin(async move { Err(error) })
    }
}

//! Listens to what other nodes promise this one, on their way through the transport, and writes it into the book.
//!
//! # Invariants
//!
//! - Only promises that are durable before they are given count: a granted vote, and entries acknowledged as kept. A node that
//!   refuses names a vote that may not be on its card yet.
//! - To be told that it was removed counts for this node only when it asks for something that a node with a leader of its own does
//!   not ask a third one for. A majority that goes on while another server is reset to a cluster of its own is none of that one's.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use prost::Message;

use super::book::HelloBook;
use super::wire;
use crate::env::BoxFuture;
use crate::proto::node::append_reply::Result as Appended;
use crate::proto::node::{AppendReply, VoteReply};
use crate::raft::Member;
use crate::raft::transport::{BoxStream, CallError, Method, Refused, StreamMethod, Transport};
use crate::types::NodeId;

/// A transport that also remembers. See the module documentation.
pub struct Witness {
    transport: Arc<dyn Transport>,
    book: Arc<HelloBook>,
}

impl Witness {
    /// Everything goes through `transport`; promises go into `book`.
    pub const fn new(transport: Arc<dyn Transport>, book: Arc<HelloBook>) -> Self {
        Self { transport, book }
    }
}

/// What cannot be read says nothing; whoever asked will notice.
fn note(book: &HelloBook, node: NodeId, method: Method, reply: &Bytes) {
    match method {
        Method::Append => note_appended(book, node, reply),
        Method::Vote => {
            if let Ok(VoteReply { vote: Some(vote), granted: true, .. }) =
                VoteReply::decode(reply.clone())
            {
                book.note_vote(node, wire::vote(&vote));
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

/// Whether a refusal of this says something of the node that asked.
const fn tells_of_us(method: Method) -> bool {
    match method {
        Method::Vote
        | Method::PreVote
        | Method::ReadIndex
        | Method::Propose
        | Method::ChangeMembers
        | Method::Lease => true,
        // Asked by leaders, of everybody; or answered in words.
        Method::Append
        | Method::Following
        | Method::TransferLeader
        | Method::Hello
        | Method::Admit => false,
    }
}

fn note_appended(book: &HelloBook, node: NodeId, reply: &Bytes) {
    if let Ok(AppendReply { result: Some(Appended::Appended(appended)) }) =
        AppendReply::decode(reply.clone())
        && let Some(upto) = appended.upto
    {
        book.note_kept(node, wire::log_id(&upto));
    }
}

impl Transport for Witness {
    fn call(
        &self,
        to: &Member,
        method: Method,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let (call, node) = (self.transport.call(to, method, request, timeout), to.id);
        let book = Arc::clone(&self.book);
        Box::pin(async move {
            let reply = call.await;
            match &reply {
                Ok(reply) => note(&book, node, method, reply),
                Err(CallError::Refused(Refused::Removed(reason))) if tells_of_us(method) => {
                    book.note_removed(reason.clone());
                }
                Err(_) => {}
            }
            reply
        })
    }

    fn ready(&self, to: &Member) -> BoxFuture<'static, Result<(), CallError>> {
        self.transport.ready(to)
    }

    fn stream(
        &self,
        to: &Member,
        method: StreamMethod,
        requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>> {
        let (stream, node) = (self.transport.stream(to, method, requests), to.id);
        let book = Arc::clone(&self.book);
        match method {
            StreamMethod::Snapshot => stream,
            StreamMethod::Append => Box::pin(async move {
                let replies = stream.await?.inspect(move |reply| {
                    if let Ok(reply) = reply {
                        note_appended(&book, node, reply);
                    }
                });
                let replies: BoxStream<Result<Bytes, CallError>> = Box::pin(replies);
                Ok(replies)
            }),
        }
    }
}

//! Answers other nodes: every question goes where its answer is.
//!
//! Hello is answered as soon as log and state are open, because a whole cluster may be starting; everything else when this node
//! takes part.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::stream;

use super::{admit, leases};
use crate::apply;
use crate::env::BoxFuture;
use crate::etcd::Api;
use crate::join::hello::{Answerer, HelloBook};
use crate::mvcc::Store;
use crate::peers::{Gate, Standing, Visitor};
use crate::raft::Node;
use crate::raft::transport::{Answer, BoxStream, CallError, Method, Refused, StreamMethod};
use crate::types::NodeId;

/// A node that takes part.
#[derive(Clone)]
pub(super) struct Taking {
    pub(super) node: Node,
    pub(super) api: Api,
}

/// See the module documentation.
pub(super) struct Dispatch {
    hello: Arc<Answerer>,
    taking: OnceLock<Taking>,
    waiting: Arc<admit::Waiting>,
}

fn starting() -> Refused {
    Refused::NotReady("starting".to_owned())
}

impl Dispatch {
    /// Answers hellos only.
    pub(super) fn new(hello: Arc<Answerer>) -> Self {
        Self { hello, taking: OnceLock::new(), waiting: Arc::default() }
    }

    /// Answers everything from here on.
    pub(super) fn takes_part(&self, taking: Taking) {
        // A second time there is nothing to change.
        drop(self.taking.set(taking));
    }
}

impl Answer for Dispatch {
    fn answer(
        &self,
        from: NodeId,
        method: Method,
        request: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refused>> {
        if method == Method::Hello {
            return self.hello.answer(from, &request);
        }
        let Some(Taking { node, api }) = self.taking.get().cloned() else {
            return Box::pin(async { Err(starting()) });
        };
        match method {
            Method::Admit => {
                let waiting = Arc::clone(&self.waiting);
                Box::pin(async move { admit::answer(&node, &waiting, from, request).await })
            }
            Method::Lease => Box::pin(async move { leases::answer(&api, request).await }),
            Method::Hello
            | Method::Append
            | Method::Vote
            | Method::PreVote
            | Method::TransferLeader
            | Method::Following
            | Method::ReadIndex
            | Method::Propose
            | Method::ChangeMembers => node.answer(from, method, request),
        }
    }

    fn answer_stream(
        &self,
        from: NodeId,
        method: StreamMethod,
        requests: BoxStream<Result<Bytes, CallError>>,
    ) -> BoxStream<Result<Bytes, Refused>> {
        match self.taking.get() {
            Some(taking) => taking.node.answer_stream(from, method, requests),
            None => Box::pin(stream::iter([Err(starting())])),
        }
    }
}

/// What this node knows of a caller.
pub(super) struct Doorman {
    pub(super) store: Store,
    pub(super) book: Arc<HelloBook>,
}

impl Gate for Doorman {
    fn standing(&self, visitor: &Visitor) -> Standing {
        // A store that cannot be read stops the node by its own channel.
        let record = self.store.read().and_then(|view| apply::node(&view, visitor.node));
        if let Ok(Some(record)) = record
            && record.retired
        {
            return Standing::Removed(record.retired_reason);
        }
        let known = self.book.known(visitor.node);
        match known.incarnation {
            // A start that we have not heard of yet has a higher number; a copy of the card, or what is left of an
            // earlier start, has not.
            Some(known_one)
                if known_one.number != visitor.passport.incarnation
                    && visitor.passport.epoch <= known.epoch =>
            {
                Standing::Duplicate(known_one.member.peer_urls.join(", "))
            }
            Some(_) | None => Standing::Member,
        }
    }
}

//! Answers a node that starts: what this node's card and memory know of it.
//!
//! # Invariants
//!
//! - Works from the log and the state, not from a running node: nodes that all start at once answer each other.
//! - A living incarnation is only claimed after it was heard: the old address is asked, and has to answer with the old number. A node
//!   that restarted does not stand in its own way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use super::book::{HelloBook, Incarnation, Known};
use super::wire;
use crate::announce;
use crate::apply;
use crate::env::BoxFuture;
use crate::events::{EventId, fields};
use crate::mvcc::{ReadTxn, Store};
use crate::proto::node::{self, HelloReply, HelloRequest};
use crate::raft::transport::{Method, Refused, Transport};
use crate::raft::{Member, inspect};
use crate::types::{ClusterId, LogId, NodeId, Vote};
use crate::versions;
use crate::wal::Wal;

/// How long an old incarnation has to show that it is alive.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers hellos. See the module documentation.
pub struct Answerer {
    cluster: ClusterId,
    node: NodeId,
    incarnation: u64,
    store: Store,
    wal: Wal,
    /// Starts that the log knew of when this node started, and its store did not.
    epochs: BTreeMap<NodeId, u64>,
    book: Arc<HelloBook>,
    transport: Arc<dyn Transport>,
}

/// Everything an [`Answerer`] works with.
pub struct Parts {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeId,
    /// The number of this run of the process.
    pub incarnation: u64,
    /// The state.
    pub store: Store,
    /// The log.
    pub wal: Wal,
    /// What others have promised.
    pub book: Arc<HelloBook>,
    /// How others are reached.
    pub transport: Arc<dyn Transport>,
}

impl Answerer {
    /// Reads what the log holds beyond the state, once.
    pub fn new(parts: Parts) -> Result<Self, String> {
        let view = parts.store.read().map_err(|error| error.to_string())?;
        let epochs = inspect::tail(&view, &parts.wal)?.epochs;
        let Parts { cluster, node, incarnation, store, wal, book, transport } = parts;
        Ok(Self { cluster, node, incarnation, store, wal, epochs, book, transport })
    }

    /// Answers a caller whose certificate says that it is `from`.
    pub fn answer(
        self: &Arc<Self>,
        from: NodeId,
        request: &Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refused>> {
        let (this, request) = (Arc::clone(self), request.clone());
        Box::pin(async move {
            let request = HelloRequest::decode(request)
                .map_err(|error| Refused::Malformed(error.to_string()))?;
            Ok(this.reply(from, &request).await?.encode_to_vec().into())
        })
    }

    async fn reply(&self, from: NodeId, request: &HelloRequest) -> Result<HelloReply, Refused> {
        if request.cluster != self.cluster.get() {
            return Err(Refused::WrongCluster(format!(
                "{:x} here, {:x} there",
                self.cluster.get(),
                request.cluster
            )));
        }
        let caller = request.self_.clone().unwrap_or_default();
        if caller.id != from.get() {
            return Err(Refused::Malformed(format!("node {from} says that it is {:x}", caller.id)));
        }
        let known = self.book.known(from);
        // Whoever probes gets no probe back: two nodes would ask each other for ever.
        let duplicate = if request.probe { None } else { self.duplicate(request, &known).await };
        let reply = self.describe(from, &known, duplicate.unwrap_or_default());
        let reply = reply.map_err(Refused::NotReady)?;
        say_if_older(&caller, request, &reply);
        // A refused copy must not take the place of the original.
        if reply.duplicate.is_empty() && !reply.retired && !request.probe {
            let member = wire::member(&caller, false);
            let incarnation = Incarnation { number: request.incarnation, member };
            self.book.note_incarnation(from, request.epoch, incarnation);
        }
        Ok(reply)
    }

    /// Where another incarnation of the caller lives, if one does.
    async fn duplicate(&self, request: &HelloRequest, known: &Known) -> Option<String> {
        let old = known.incarnation.as_ref()?;
        if old.number == request.incarnation {
            return None;
        }
        let probe = wire::probe(self.cluster, self.node, self.incarnation);
        let answer = self.transport.call(&old.member, Method::Hello, probe, PROBE_TIMEOUT);
        let reply = HelloReply::decode(answer.await.ok()?).ok()?;
        (reply.incarnation == old.number).then(|| {
            let Member { name, peer_urls, .. } = &old.member;
            format!("{name} at {}", peer_urls.join(", "))
        })
    }

    fn describe(
        &self,
        from: NodeId,
        known: &Known,
        duplicate: String,
    ) -> Result<HelloReply, String> {
        let view = self.store.read().map_err(|error| error.to_string())?;
        let record =
            apply::node(&view, from).map_err(|error| error.to_string())?.unwrap_or_default();
        let in_log = self.epochs.get(&from).copied().unwrap_or_default();
        let flags = apply::flags(&view).map_err(|error| error.to_string())?;
        let state = self.wal.hard_state();
        Ok(HelloReply {
            incarnation: self.incarnation,
            wire_version_min: *versions::own().wire.start(),
            wire_version_max: *versions::own().wire.end(),
            release: versions::own().name.to_owned(),
            epoch_known: record.epoch.max(in_log),
            vote_known: self.vote_known(from, known, state.vote).map(wire::wire_vote),
            kept_known: known.kept.map(wire::wire_log_id),
            retired: record.retired,
            retired_reason: record.retired_reason,
            duplicate,
            membership: Some(inspect::stored_membership(&view)?),
            vote: state.vote.map(wire::wire_vote),
            last: end(&view, &self.wal).map(wire::wire_log_id),
            flags: flags.unwrap_or_default(),
            seen: self.book.seen().iter().map(wire::wire_member).collect(),
            format: Some(apply::format(&view).map_err(|error| error.to_string())?),
        })
    }

    /// A node that led, as our own log tells, had voted for itself.
    fn vote_known(&self, from: NodeId, known: &Known, own: Option<Vote>) -> Option<Vote> {
        let led = own.filter(|vote| vote.committed && vote.node == from);
        match (known.vote, led) {
            (known, Some(led)) if super::verdict::later(known, led) => Some(led),
            (known, _) => known,
        }
    }
}

/// The caller will see from the reply that it does not read what the cluster writes. Said here, too, for whoever looks here first.
fn say_if_older(caller: &node::Member, request: &HelloRequest, reply: &HelloReply) {
    let cluster = reply.format.as_ref().map_or(versions::FORMAT_FIRST, |record| record.format);
    let reads = versions::announced(request.format);
    if reads < cluster && !request.probe {
        announce!(
            EventId::Incompatible,
            { fields::PEER } = %caller.name,
            "{} runs release {}, which reads data up to format {reads}; the cluster's is in format {cluster}: it takes no part",
            caller.name,
            request.release
        );
    }
}

/// The end of the log, or of the state if that is later: after a snapshot the log may be behind.
pub(super) fn end(view: &ReadTxn, wal: &Wal) -> Option<LogId> {
    wal.hard_state().last.max(view.applied())
}

//! The calling side: [`Transport`] over connections to each node.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prost::Message;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::Streaming;
use tonic::metadata::MetadataMap;

use super::address::Location;
use super::dial::{self, Link, Own};
use super::envelope::{self, MESSAGE_BYTES_MAX};
use super::lane::{Dialer, Peer, Use, lock};
use super::passport::Passport;
use super::tracked::Leash;
use super::traffic;
use crate::env::{BoxFuture, Entropy};
use crate::metrics::Page;
use crate::pki::{Pki, Role};
use crate::proto::node::{self as wire, Envelope};
use crate::raft::Member;
use crate::raft::transport::{BoxStream, CallError, Method, Refused, StreamMethod, Transport};
use crate::types::NodeId;

/// Names looked up at a time, for all nodes together.
const LOOKUPS_MAX: usize = 8;

/// Nodes known at a time. Certificates of the cluster are the only way in, and it has never had as many.
const NODES_MAX: usize = 256;

/// A stream is accepted or refused within this; the answer comes from memory.
const STREAM_TIMEOUT: Duration = Duration::from_secs(5);

/// The other nodes, as far as they can be reached. Clones are the same.
#[derive(Clone)]
pub struct Peers(pub(super) Arc<Shared>);

pub(super) struct Shared {
    dialer: Arc<Dialer>,
    node: NodeId,
    peers: Mutex<HashMap<NodeId, Arc<Peer>>>,
    hints: Mutex<Vec<Location>>,
    /// Connections of others to us, to cut them.
    doors: Mutex<HashMap<NodeId, Vec<Leash>>>,
    /// Processes that were told that their release does not fit, each node's last.
    refused: Mutex<HashMap<NodeId, u64>>,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers").field("node", &self.0.node).finish_non_exhaustive()
    }
}

impl Peers {
    /// Knows nobody yet. `member` is this node as others shall reach it, see [`Peers::announce`].
    pub fn new(pki: Pki, passport: Passport, member: &Member, entropy: Arc<dyn Entropy>) -> Self {
        let node = pki.identity(Role::Peer).node;
        let mut headers = MetadataMap::new();
        passport.write(&mut headers);
        let own = Own { passport, headers, announcement: announcement(member) };
        let own = Mutex::new(Arc::new(own));
        let resolving = Arc::new(Semaphore::new(LOOKUPS_MAX));
        Self(Arc::new(Shared {
            dialer: Arc::new(Dialer { pki, entropy, own, resolving }),
            node,
            peers: Mutex::default(),
            hints: Mutex::default(),
            doors: Mutex::default(),
            refused: Mutex::default(),
        }))
    }

    /// What this node says of itself.
    pub fn passport(&self) -> Passport {
        self.0.dialer.own().passport.clone()
    }

    /// This node's addresses have changed: others hear it within seconds, before it is committed anywhere.
    pub fn announce(&self, member: &Member) {
        let mut own = lock(&self.0.dialer.own);
        *own = Arc::new(Own { announcement: announcement(member), ..Own::clone(&own) });
    }

    /// Places where some member is or was: the `server` that this node joined through.
    pub fn hint(&self, hints: Vec<Location>) {
        for peer in lock(&self.0.peers).values() {
            lock(&peer.book).hint(&hints);
            peer.wake();
        }
        *lock(&self.0.hints) = hints;
    }

    /// Where `node` says it is, from somewhere else than its own greeting.
    pub fn learn(&self, node: NodeId, locations: impl IntoIterator<Item = Location>) {
        if let Some(peer) = self.0.peer(node)
            && lock(&peer.book).learn(locations)
        {
            peer.wake();
        }
    }

    /// Ends all connections to and from a node that was removed. Calls to it fail from now on; it may still call, and
    /// is told why nobody listens.
    pub fn forget(&self, node: NodeId) {
        let peer = lock(&self.0.peers).get(&node).cloned();
        if let Some(peer) = peer {
            peer.forget();
        }
        drop(lock(&self.0.doors).remove(&node));
    }

    /// Whether `node` was looked for and not found, and still is not.
    pub fn is_lost(&self, node: NodeId) -> bool {
        lock(&self.0.peers).get(&node).is_some_and(|peer| peer.is_lost())
    }

    /// Whether there is a connection to `node` right now.
    pub fn is_connected(&self, node: NodeId) -> bool {
        lock(&self.0.peers).get(&node).is_some_and(|peer| peer.is_connected())
    }
}

fn announcement(member: &Member) -> Bytes {
    let message = wire::Member {
        id: member.id.get(),
        name: member.name.clone(),
        peer_urls: member.peer_urls.clone(),
        ..wire::Member::default()
    };
    message.encode_to_vec().into()
}

impl Shared {
    /// The node with this id; `None` for this node itself, and beyond all bounds.
    pub(super) fn peer(&self, node: NodeId) -> Option<Arc<Peer>> {
        let mut peers = lock(&self.peers);
        if let Some(peer) = peers.get(&node) {
            return Some(Arc::clone(peer));
        }
        if node == self.node || NODES_MAX <= peers.len() {
            return None;
        }
        let peer = Arc::new(Peer::new(node, Arc::clone(&self.dialer)));
        lock(&peer.book).hint(&lock(&self.hints));
        peers.insert(node, Arc::clone(&peer));
        Some(peer)
    }

    fn member(&self, to: &Member) -> Result<Arc<Peer>, CallError> {
        let nobody = || CallError::Unreachable(format!("node {} is not another node", to.id));
        let peer = self.peer(to.id).ok_or_else(nobody)?;
        if lock(&peer.book).record(to) {
            peer.wake();
        }
        Ok(peer)
    }

    pub(super) fn own(&self) -> Arc<Own> {
        self.dialer.own()
    }

    /// A node greeted: it is where it calls from, and where it says that it is.
    pub(super) fn greeted(&self, node: NodeId, from: IpAddr, announcement: &[u8]) {
        let Ok(member) = wire::Member::decode(announcement) else { return };
        let Some(peer) = self.peer(node) else { return };
        let said = member.peer_urls.iter().filter_map(|url| Location::of_url(url));
        let mut locations: Vec<_> = said.take(4).collect();
        let mut book = lock(&peer.book);
        let port = locations.first().map_or_else(|| book.port(), Location::port);
        locations.push(Location::Address(SocketAddr::new(from.to_canonical(), port)));
        if book.learn(locations) {
            drop(book);
            peer.wake();
        }
    }

    /// Whether this process is refused for the first time, so that the journal hears it once.
    pub(super) fn is_first_refusal(&self, node: NodeId, incarnation: u64) -> bool {
        let mut refused = lock(&self.refused);
        if NODES_MAX <= refused.len() {
            refused.clear();
        }
        refused.insert(node, incarnation) != Some(incarnation)
    }

    /// A node has connected to us; the leash is for [`Peers::forget`].
    pub(super) fn opened(&self, node: NodeId, leash: Leash) {
        let mut doors = lock(&self.doors);
        // Those that closed are forgotten when somebody comes, so the map is no larger than the port's caps.
        doors.retain(|_, leashes| {
            leashes.retain(|leash| !leash.has_ended());
            !leashes.is_empty()
        });
        doors.entry(node).or_default().push(leash);
    }
}

impl Collector for Peers {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let peers = lock(&self.0.peers);
        let present = peers.values().filter(|peer| !peer.is_forgotten());
        let mut nodes: Vec<_> =
            present.map(|peer| (peer.node, Arc::clone(&peer.traffic))).collect();
        drop(peers);
        nodes.sort_by_key(|(node, _)| *node);
        traffic::write(&mut Page::new(encoder), self.0.node, &nodes)
    }
}

impl Transport for Peers {
    fn call(
        &self,
        to: &Member,
        method: Method,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let peer = self.0.member(to);
        Box::pin(async move {
            let peer = peer?;
            let result = call(&peer, method, request, Instant::now() + timeout).await;
            if matches!(result, Err(CallError::Unreachable(_) | CallError::Interrupted(_))) {
                peer.traffic.sending_failed();
            }
            result
        })
    }

    fn ready(&self, to: &Member) -> BoxFuture<'static, Result<(), CallError>> {
        let peer = self.0.member(to);
        Box::pin(async move { peer?.link(Use::Calls).await.map(drop) })
    }

    fn stream(
        &self,
        to: &Member,
        method: StreamMethod,
        requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>> {
        let peer = self.0.member(to);
        Box::pin(async move {
            let peer = peer?;
            let result = stream(&peer, method, requests).await;
            if matches!(result, Err(CallError::Unreachable(_) | CallError::Interrupted(_))) {
                peer.traffic.sending_failed();
            }
            result
        })
    }
}

async fn call(
    peer: &Arc<Peer>,
    method: Method,
    body: Bytes,
    deadline: Instant,
) -> Result<Bytes, CallError> {
    if MESSAGE_BYTES_MAX < body.len() {
        return Err(too_large(body.len()).into());
    }
    loop {
        let late = || CallError::Unreachable(format!("no connection to node {}", peer.node));
        let link = timeout_at(deadline, peer.link(Use::Calls)).await.map_err(|_| late())??;
        let envelope = envelope::open(method.number(), link.version, body.clone());
        let mut request = dial::request(&peer.own(), envelope);
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        let mut client = link.client();
        match timeout_at(deadline, client.call(request)).await {
            Ok(Ok(reply)) => {
                peer.traffic.sent(body.len());
                let reply = envelope::answered(reply.into_inner())?;
                peer.traffic.received(reply.len());
                return Ok(reply);
            }
            // It had ended before and nobody had noticed.
            Ok(Err(status)) if dial::was_not_sent(&status) => link.cut(),
            Ok(Err(status)) => return Err(CallError::Interrupted(dial::reason(&status))),
            Err(_) => return Err(CallError::Interrupted("no answer in time".to_owned())),
        }
    }
}

fn too_large(bytes: usize) -> Refused {
    Refused::Malformed(format!("found {bytes} bytes, expected at most {MESSAGE_BYTES_MAX}"))
}

async fn stream(
    peer: &Arc<Peer>,
    method: StreamMethod,
    requests: BoxStream<Bytes>,
) -> Result<BoxStream<Result<Bytes, CallError>>, CallError> {
    let purpose = match method {
        StreamMethod::Append => Use::Calls,
        StreamMethod::Snapshot => Use::Bulk,
    };
    let link = peer.link(purpose).await?;
    let (accept, accepted) = oneshot::channel();
    let (leash, unwanted) = oneshot::channel();
    let outgoing = Outgoing {
        stage: Stage::Opening(method.number(), link.version),
        accepted,
        unwanted,
        requests,
        peer: Arc::clone(peer),
    };
    let request = dial::request(&peer.own(), outgoing);
    // Until the callee has accepted, no message has left, so every failure is `Unreachable`.
    let unreachable = |why: String| CallError::Unreachable(format!("node {}: {why}", peer.node));
    let opening = async {
        let reply = link.client().stream(request).await;
        let mut replies = reply.map_err(|status| {
            if dial::was_not_sent(&status) {
                link.cut();
            }
            unreachable(dial::reason(&status))
        })?;
        let replies_stream = replies.get_mut();
        match replies_stream.message().await {
            Ok(Some(first)) => envelope::answered(first)?,
            Ok(None) => return Err(unreachable("the stream ended at once".to_owned())),
            Err(status) => return Err(unreachable(dial::reason(&status))),
        };
        Ok(replies.into_inner())
    };
    let late = || Err(unreachable("the stream was not accepted in time".to_owned()));
    let replies = timeout(STREAM_TIMEOUT, opening).await.unwrap_or_else(|_| late())?;
    // Gone only if the connection went; the replies say so.
    accept.send(()).ok();
    Ok(Box::pin(Replies { replies: Some((replies, leash)), peer: Arc::clone(peer), _link: link }))
}

enum Stage {
    Opening(u32, u32),
    Waiting,
    Sending,
    Ended,
}

/// What the caller sends: the opening, then, once that is accepted, the messages and the proper end. When nobody reads the
/// replies any more it stops without the proper end.
struct Outgoing {
    stage: Stage,
    accepted: oneshot::Receiver<()>,
    unwanted: oneshot::Receiver<()>,
    requests: BoxStream<Bytes>,
    peer: Arc<Peer>,
}

impl Stream for Outgoing {
    type Item = Envelope;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Envelope>> {
        let this = &mut *self;
        loop {
            match this.stage {
                Stage::Opening(method, version) => {
                    this.stage = Stage::Waiting;
                    return Poll::Ready(Some(envelope::open(method, version, Bytes::new())));
                }
                Stage::Waiting => {
                    this.stage = match ready!(Pin::new(&mut this.accepted).poll(cx)) {
                        Ok(()) => Stage::Sending,
                        Err(_) => Stage::Ended,
                    };
                }
                Stage::Sending => {
                    if Pin::new(&mut this.unwanted).poll(cx).is_ready() {
                        this.stage = Stage::Ended;
                        return Poll::Ready(None);
                    }
                    let Some(body) = ready!(this.requests.as_mut().poll_next(cx)) else {
                        this.stage = Stage::Ended;
                        return Poll::Ready(Some(envelope::last()));
                    };
                    if MESSAGE_BYTES_MAX < body.len() {
                        tracing::error!(bytes = body.len(), "a message is too large for a stream");
                        this.stage = Stage::Ended;
                        return Poll::Ready(None);
                    }
                    this.peer.traffic.sent(body.len());
                    return Poll::Ready(Some(envelope::message(body)));
                }
                Stage::Ended => return Poll::Ready(None),
            }
        }
    }
}

/// What the callee answers. Dropping it ends the stream.
struct Replies {
    /// `None` after the end. The sender's drop stops the requests.
    replies: Option<(Streaming<Envelope>, oneshot::Sender<()>)>,
    peer: Arc<Peer>,
    /// The connection lives as long as the stream.
    _link: Arc<Link>,
}

impl Stream for Replies {
    type Item = Result<Bytes, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((replies, _)) = &mut self.replies else { return Poll::Ready(None) };
        let item = match ready!(Pin::new(replies).poll_next(cx)) {
            Some(Ok(envelope)) => envelope::answered(envelope),
            Some(Err(status)) => {
                self.peer.traffic.sending_failed();
                Err(CallError::Interrupted(dial::reason(&status)))
            }
            None => {
                self.replies = None;
                return Poll::Ready(None);
            }
        };
        match &item {
            Ok(body) => self.peer.traffic.received(body.len()),
            // A refusal is the last word, and after an error there is no other.
            Err(_) => self.replies = None,
        }
        Poll::Ready(Some(item))
    }
}

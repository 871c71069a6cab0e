//! The answering side: who calls, whether it is heard, and what it wants.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::envelope;
use super::passport::Passport;
use super::traffic::Traffic;
use super::transport::Shared;
use crate::announce;
use crate::events::{EventId, fields};
use crate::pki::{Caller, Role};
use crate::proto::node::Envelope;
use crate::proto::node::peers_server::Peers as PeersService;
use crate::raft::transport::{Answer, BoxStream, CallError, Method, Refused, StreamMethod};
use crate::types::NodeId;

/// Whoever opens a stream says at once which.
const OPENING_TIMEOUT: Duration = Duration::from_secs(5);

/// A stream whose caller is gone has this long to end.
const GONE_TIMEOUT: Duration = Duration::from_secs(5);

/// A caller, as it is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visitor {
    /// Proved by its certificate.
    pub node: NodeId,
    /// Where it calls from.
    pub remote: SocketAddr,
    /// What it says of itself. Cluster and versions fit.
    pub passport: Passport,
}

/// What the cluster knows of a caller, as far as this node has heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Heard. Also the answer for a node that is not known yet: entries come from leaders that this node will only hear of
    /// in those entries.
    Member,
    /// Certainly not a member. It may say hello and ask for admission.
    Stranger,
    /// Removed for ever, and why. It may say hello, which tells it so.
    Removed(String),
    /// Another process with this id is alive, and where. It may say hello, which tells it so.
    Duplicate(String),
}

/// Knows the standing of callers.
pub trait Gate: Send + Sync + 'static {
    /// Asked for every call and stream, so it answers from memory.
    fn standing(&self, visitor: &Visitor) -> Standing;
}

impl<F: Fn(&Visitor) -> Standing + Send + Sync + 'static> Gate for F {
    fn standing(&self, visitor: &Visitor) -> Standing {
        self(visitor)
    }
}

/// Whether a caller of this standing may ask for this.
fn admit(standing: Standing, method: Method) -> Result<(), Refused> {
    let is_open_to_all = match method {
        Method::Hello | Method::Admit => true,
        Method::Append
        | Method::Vote
        | Method::PreVote
        | Method::TransferLeader
        | Method::Following
        | Method::ReadIndex
        | Method::Propose
        | Method::ChangeMembers
        | Method::Lease => false,
    };
    if is_open_to_all { Ok(()) } else { admit_to_all(standing) }
}

/// Whether a caller of this standing may ask for anything.
fn admit_to_all(standing: Standing) -> Result<(), Refused> {
    match standing {
        Standing::Member => Ok(()),
        Standing::Stranger => Err(Refused::NotAMember),
        Standing::Removed(why) => Err(Refused::Removed(why)),
        Standing::Duplicate(other) => Err(Refused::Duplicate(other)),
    }
}

/// The gRPC service.
pub(super) struct Service {
    pub(super) shared: Arc<Shared>,
    pub(super) answer: Arc<dyn Answer>,
    pub(super) gate: Arc<dyn Gate>,
}

impl Service {
    /// Who calls. Without a certificate nobody gets this far; if somebody does, it is a defect and not a caller.
    fn visitor<T>(&self, request: &Request<T>) -> Result<Result<Visitor, Refused>, Status> {
        let caller = request.extensions().get::<Caller>();
        let identity = caller.and_then(|caller| caller.identity).filter(|identity| {
            identity.role == Role::Peer && identity.cluster == self.shared.own().passport.cluster
        });
        let (Some(caller), Some(identity)) = (caller, identity) else {
            return Err(Status::unauthenticated("a peer certificate of this cluster is required"));
        };
        let (remote, node) = (caller.remote, identity.node);
        let passport = Passport::read(request.metadata());
        Ok(passport.and_then(|passport| {
            let fits = self.shared.own().passport.check(&passport);
            if let Err(refused @ Refused::Incompatible(_)) = &fits
                && self.shared.is_first_refusal(node, passport.incarnation)
            {
                announce!(
                    EventId::Incompatible,
                    { fields::PEER } = %node,
                    "node {node} at {} is not heard: {refused}",
                    remote.ip()
                );
            }
            fits?;
            Ok(Visitor { node, remote, passport })
        }))
    }

    /// Whether a message in this version can be read. Whoever names none speaks the first.
    fn reads(&self, version: u32) -> Result<(), Refused> {
        self.shared.own().passport.reads(version.max(1))
    }

    async fn answer(&self, visitor: Visitor, envelope: Envelope) -> Result<Bytes, Refused> {
        let standing = self.gate.standing(&visitor);
        if envelope.method == 0 {
            // Whoever is out, or somebody's double, shall not direct us anywhere.
            if matches!(standing, Standing::Member | Standing::Stranger) {
                let from = visitor.remote.ip();
                self.shared.greeted(visitor.node, from, &envelope.body);
            }
            return Ok(Bytes::new());
        }
        self.reads(envelope.wire_version)?;
        let method = Method::of_number(envelope.method);
        let method = method.ok_or_else(|| unknown(envelope.method))?;
        admit(standing, method)?;
        let peer = self.shared.peer(visitor.node);
        if let Some(peer) = &peer {
            peer.traffic.received(envelope.body.len());
        }
        let reply = self.answer.answer(visitor.node, method, envelope.body).await?;
        if let Some(peer) = &peer {
            peer.traffic.sent(reply.len());
        }
        Ok(reply)
    }

    /// Reads which stream it is to be, and starts it.
    async fn start(
        &self,
        visitor: Visitor,
        mut requests: Streaming<Envelope>,
    ) -> Result<BoxStream<Result<Bytes, Refused>>, Refused> {
        let malformed = |text: &str| Refused::Malformed(text.to_owned());
        let opening = tokio::time::timeout(OPENING_TIMEOUT, requests.message()).await;
        let opening = opening.map_err(|_| malformed("the stream did not begin in time"))?;
        let opening = opening.map_err(|status| Refused::Malformed(status.message().to_owned()))?;
        let opening = opening.ok_or_else(|| malformed("the stream ended before it began"))?;
        self.reads(opening.wire_version)?;
        let method = StreamMethod::of_number(opening.method);
        let method = method.ok_or_else(|| unknown(opening.method))?;
        admit_to_all(self.gate.standing(&visitor))?;
        let traffic = self.shared.peer(visitor.node).map(|peer| Arc::clone(&peer.traffic));
        let incoming = Incoming { requests: Some(requests), traffic: traffic.clone() };
        let replies = self.answer.answer_stream(visitor.node, method, Box::pin(incoming));
        Ok(Box::pin(apart(replies).inspect(move |reply| {
            if let (Ok(body), Some(traffic)) = (reply, &traffic) {
                traffic.sent(body.len());
            }
        })))
    }
}

/// Runs an answering stream in a task of its own. gRPC drops what it streams when the caller is gone; so the answer has the
/// time to hear of that in its requests, and to put in order what it had begun.
fn apart(mut replies: BoxStream<Result<Bytes, Refused>>) -> ReceiverStream<Result<Bytes, Refused>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let reply = tokio::select! {
                reply = replies.next() => reply,
                () = sender.closed() => break,
            };
            let Some(reply) = reply else { return };
            if sender.send(reply).await.is_err() {
                break;
            }
        }
        let rest = async { while replies.next().await.is_some() {} };
        if tokio::time::timeout(GONE_TIMEOUT, rest).await.is_err() {
            tracing::debug!("a stream was dropped whose caller had gone");
        }
    });
    ReceiverStream::new(receiver)
}

fn unknown(method: u32) -> Refused {
    Refused::Malformed(format!("method {method} is not known to this release"))
}

#[tonic::async_trait]
impl PeersService for Service {
    type StreamStream = BoxStream<Result<Envelope, Status>>;

    async fn call(&self, request: Request<Envelope>) -> Result<Response<Envelope>, Status> {
        let visitor = self.visitor(&request)?;
        let envelope = request.into_inner();
        let is_greeting = envelope.method == 0;
        let result = match visitor {
            Ok(visitor) => self.answer(visitor, envelope).await,
            Err(refused) => Err(refused),
        };
        let mut response = Response::new(envelope::answer(result));
        if is_greeting {
            *response.metadata_mut() = self.shared.own().headers.clone();
        }
        Ok(response)
    }

    async fn stream(
        &self,
        request: Request<Streaming<Envelope>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let started = match self.visitor(&request)? {
            Ok(visitor) => self.start(visitor, request.into_inner()).await,
            Err(refused) => Err(refused),
        };
        let first = match &started {
            Ok(_) => envelope::message(Bytes::new()),
            Err(refused) => envelope::answer(Err(refused.clone())),
        };
        let replies = started.unwrap_or_else(|_| Box::pin(stream::empty()));
        let replies = replies.map(|reply| Ok(envelope::answer(reply)));
        Ok(Response::new(Box::pin(stream::once(async { Ok(first) }).chain(replies))))
    }
}

/// What a caller sends in a stream, up to its proper end; anything else is the error that ends it.
struct Incoming {
    /// `None` after the end.
    requests: Option<Streaming<Envelope>>,
    traffic: Option<Arc<Traffic>>,
}

impl Stream for Incoming {
    type Item = Result<Bytes, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(requests) = &mut self.requests else { return Poll::Ready(None) };
        let broken = match ready!(Pin::new(requests).poll_next(cx)) {
            Some(Ok(envelope)) if envelope.last => None,
            Some(Ok(envelope)) => {
                if let Some(traffic) = &self.traffic {
                    traffic.received(envelope.body.len());
                }
                return Poll::Ready(Some(Ok(envelope.body)));
            }
            Some(Err(status)) => Some(super::dial::reason(&status)),
            None => Some("the caller ended the stream in the middle".to_owned()),
        };
        self.requests = None;
        if broken.is_some()
            && let Some(traffic) = &self.traffic
        {
            traffic.receiving_failed();
        }
        Poll::Ready(broken.map(|why| Err(CallError::Interrupted(why))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hello_and_admit_are_open_to_those_who_are_out() {
        let out = [
            (Standing::Stranger, Refused::NotAMember),
            (Standing::Removed("retired".to_owned()), Refused::Removed("retired".to_owned())),
            (Standing::Duplicate("pi-2".to_owned()), Refused::Duplicate("pi-2".to_owned())),
        ];
        for (standing, refused) in out {
            for method in Method::ALL {
                let is_open = [Method::Hello, Method::Admit].contains(method);
                let expected = if is_open { Ok(()) } else { Err(refused.clone()) };
                assert_eq!(admit(standing.clone(), *method), expected, "{method:?}");
            }
            assert_eq!(admit_to_all(standing), Err(refused));
        }
        for method in Method::ALL {
            assert_eq!(admit(Standing::Member, *method), Ok(()));
        }
    }
}

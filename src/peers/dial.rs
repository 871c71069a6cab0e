//! Opens one connection: TCP, TLS, HTTP/2, greeting.
//!
//! A connection is made once. When it ends, calls on it fail; whoever wants another one dials again and looks at who
//! answers.

use std::error::Error as _;
use std::fmt;
use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic::{Extensions, Request, Status};

use super::envelope::{self, ENVELOPE_BYTES_MAX};
use super::passport::Passport;
use super::tracked::{Leash, Tracked};
use super::traffic::{Connected, Traffic};
use crate::pki::WrongIdentity;
use crate::proto::node::peers_client::PeersClient;
use crate::raft::transport::{CallError, Refused};

/// A connection is dead when sent data stays unacknowledged for this long: a peer that lost power.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

/// An end that hears nothing for the first asks, and gives up after the second: together no more than [`USER_TIMEOUT`].
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(5);
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// What may be under way before the receiver has taken it, per stream and per connection. Several streams that are
/// not read leave room for the others.
pub(super) const STREAM_WINDOW_BYTES: u32 = 1 << 20;
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Everything up to the answer of the greeting. Generous: a Pi 3 under load takes a while to sign.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// Connects and finishes the handshake. The caller limits the time.
pub(super) async fn tls(
    address: SocketAddr,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let timeout = u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    setsockopt(&stream, sockopt::TcpUserTimeout, &timeout)?;
    // Names mean nothing here; the verifiers look at the certificate's owner.
    let name = ServerName::IpAddress(address.ip().into());
    TlsConnector::from(config).connect(name, stream).await
}

/// Speaks HTTP/2 on `stream` for as long as it lives.
pub(super) async fn http2<S>(stream: S) -> Result<Channel, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // The connection is there; the name only appears in headers.
    let endpoint = Endpoint::from_static("http://peer")
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    endpoint.connect_with_connector(Once(Arc::new(stream))).await
}

/// What calls fail with that were made after the connection had ended: they were not sent.
#[derive(Debug, thiserror::Error)]
#[error("the connection has ended")]
struct Ended;

/// Whether the call certainly never left this process.
pub(super) fn was_not_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<Ended>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// What is at the bottom of a failed call, for people.
pub(super) fn reason(status: &Status) -> String {
    let mut deepest: Option<&dyn std::error::Error> = None;
    let mut source = status.source();
    while let Some(error) = source {
        deepest = Some(error);
        source = error.source();
    }
    match deepest {
        Some(error) => error.to_string(),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// Gives the stream it has, once.
struct Once<S>(Arc<Mutex<Option<TokioIo<S>>>>);

impl<S> Service<Uri> for Once<S> {
    type Response = TokioIo<S>;
    type Error = Ended;
    type Future = Ready<Result<TokioIo<S>, Ended>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        ready(self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(Ended))
    }
}

/// Why there is no connection to a place.
#[derive(Debug)]
pub(super) enum Miss {
    /// Nobody answered, or not to the end.
    Failed(String),
    /// Somebody else answered.
    Stranger(String),
    /// The node answered, and wants nothing to do with this one.
    Refused(Refused),
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(text) => f.write_str(text),
            Self::Stranger(who) => write!(f, "is {who}"),
            Self::Refused(refused) => refused.fmt(f),
        }
    }
}

impl Miss {
    /// Failing handshakes say who it was, if they know.
    fn of(error: &io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
                match other.0.downcast_ref::<WrongIdentity>() {
                    Some(WrongIdentity::Other { found, .. }) => Self::Stranger(found.to_string()),
                    Some(WrongIdentity::Unnamed(_)) | None => Self::Stranger(other.to_string()),
                }
            }
            Some(rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            )) => Self::Stranger("not of this cluster".to_owned()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// What a node says of itself on every call, and its address in the greeting.
#[derive(Clone, Debug)]
pub(super) struct Own {
    pub(super) passport: Passport,
    pub(super) headers: MetadataMap,
    /// A `Member`, encoded.
    pub(super) announcement: Bytes,
}

/// A greeted connection to one node.
#[derive(Debug)]
pub(super) struct Link {
    client: PeersClient<Channel>,
    leash: Mutex<Option<Leash>>,
    pub(super) address: SocketAddr,
    /// Of the messages on it.
    pub(super) version: u32,
    _connected: Connected,
}

impl Link {
    /// Whether calls can only fail.
    pub(super) fn has_ended(&self) -> bool {
        let leash = self.leash.lock().unwrap_or_else(PoisonError::into_inner);
        leash.as_ref().is_none_or(Leash::has_ended)
    }

    /// Ends the connection and everything on it.
    pub(super) fn cut(&self) {
        drop(self.leash.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    pub(super) fn client(&self) -> PeersClient<Channel> {
        self.client.clone()
    }

    /// Greets again, to measure and to tell the newest address.
    pub(super) async fn greet(&self, own: &Own) -> Result<Duration, Miss> {
        greet(&self.client, own).await.map(|(took, _version)| took)
    }
}

/// Says who we are, hears who they are, and times it. The version is the one in which the two talk.
async fn greet(client: &PeersClient<Channel>, own: &Own) -> Result<(Duration, u32), Miss> {
    let greeting = envelope::open(0, 0, own.announcement.clone());
    let started = Instant::now();
    let reply = client.clone().call(request(own, greeting)).await;
    let took = started.elapsed();
    let reply = reply.map_err(|status| Miss::Failed(reason(&status)))?;
    let (headers, reply, _) = reply.into_parts();
    match envelope::answered(reply) {
        Ok(_) => {}
        Err(CallError::Refused(refused)) => return Err(Miss::Refused(refused)),
        Err(other) => return Err(Miss::Failed(other.to_string())),
    }
    let theirs = Passport::read(&headers).map_err(Miss::Refused)?;
    let version = own.passport.check(&theirs).map_err(Miss::Refused)?;
    Ok((took, version))
}

/// A request with our headers.
pub(super) fn request<T>(own: &Own, message: T) -> Request<T> {
    Request::from_parts(own.headers.clone(), Extensions::new(), message)
}

/// Connects to whoever `config` accepts at `address`, and greets.
pub(super) async fn connect(
    address: SocketAddr,
    config: Arc<ClientConfig>,
    own: &Own,
    traffic: &Arc<Traffic>,
) -> Result<Link, Miss> {
    let connecting = async {
        let stream = tls(address, config).await.map_err(|error| Miss::of(&error))?;
        let (stream, leash) = Tracked::new(stream);
        let channel = http2(stream).await.map_err(|error| Miss::Failed(error.to_string()))?;
        let client = PeersClient::new(channel)
            .max_decoding_message_size(ENVELOPE_BYTES_MAX)
            .max_encoding_message_size(ENVELOPE_BYTES_MAX);
        let (took, version) = greet(&client, own).await?;
        traffic.round_trip(took);
        let leash = Mutex::new(Some(leash));
        Ok(Link { client, leash, address, version, _connected: traffic.connected() })
    };
    let late = || Err(Miss::Failed("no answer in time".to_owned()));
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(|_| late())
}

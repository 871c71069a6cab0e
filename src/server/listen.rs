//! Accepts connections: addresses, caps, handshakes, and who is at the other end.
//!
//! # Shape
//!
//! [`Listeners::bind`] opens every address or none. [`Listeners::accept`] runs one accept loop per address and yields
//! established [`Connection`]s as a stream, ready for tonic's `serve_with_incoming_shutdown` and for `observe::http`. A
//! TLS handshake runs in a task of its own, so a client that stalls in it delays nobody. [`Admission`] is the pure part: it
//! counts and says yes or no.
//!
//! [`Listeners::accept_peers`] is for port 2380, where two kinds of callers come: nodes, and newcomers that have only a
//! token. What a caller asks for in its first message (ALPN) decides which; the two never meet again.
//!
//! # Invariants
//!
//! - Plain TCP is accepted on loopback addresses only, except for the read-only metrics port.
//! - A connection holds its place in the caps from accept to close, handshake included.
//! - A newcomer that finds no place is turned away before it costs a signature.
//! - A connection that reaches the stream has finished its handshake; its certificate's owner is in [`Caller`].
//! - Running out of file descriptors pauses accepting; it ends nothing.
//!
//! # Not here
//!
//! Timeouts of requests, limits per connection (tonic's settings), and membership checks of peers (`raft`).

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::ServerConfig;
use rustls::server::ClientHello;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use crate::announce;
use crate::events::{EventId, fields};
use crate::metrics::Connections;
use crate::pki::{ALPN_JOIN, Caller, ChannelBinding, Identity};

mod admission;
mod port_owner;

pub use admission::{Admission, Caps, Place};

/// A client has this long to finish its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection is dead when sent data stays unacknowledged for this long: a peer that lost power (F25).
const USER_TIMEOUT: Duration = Duration::from_secs(10);

/// An idle connection is probed after this long, and then as often.
const KEEPALIVE_SECS: u32 = 10;

/// Pause after the kernel ran out of something.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(250);

/// Established connections waiting for the server to take them. The server takes them at once.
const QUEUE: usize = 16;

/// How connections are protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Mutual TLS.
    Tls(Arc<ServerConfig>),
    /// Nothing: for tests and demos, on loopback addresses only.
    PlainLoopback,
    /// Nothing, on any address: for metrics and health, which have no secrets (`etcd-expose-metrics`).
    PlainReadOnly,
    /// The port is taken, but nobody is let in before [`Listeners::with_tls`].
    ClosedUntilTls,
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Plain TCP was asked for on an address that others can reach.
    #[error(
        "{purpose} without TLS is for loopback only: found {address}, expected 127.0.0.1 or [::1]"
    )]
    PlainExposed {
        /// What listens there.
        purpose: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// Another process has the port.
    #[error("{purpose} cannot listen on {address}: the port is in use by {holder}")]
    InUse {
        /// What was to listen there.
        purpose: &'static str,
        /// The address.
        address: SocketAddr,
        /// The process, as far as it can be seen.
        holder: String,
    },
    /// This machine does not have the address.
    #[error("{purpose} cannot listen on {address}: no network interface has this address")]
    NoSuchAddress {
        /// What was to listen there.
        purpose: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// Something else.
    #[error("{purpose} cannot listen on {address}: {source}")]
    Io {
        /// What was to listen there.
        purpose: &'static str,
        /// The address.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl ListenError {
    /// Where nobody can be heard now.
    pub const fn address(&self) -> SocketAddr {
        match self {
            Self::PlainExposed { address, .. }
            | Self::InUse { address, .. }
            | Self::NoSuchAddress { address, .. }
            | Self::Io { address, .. } => *address,
        }
    }

    /// What the operator can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::PlainExposed { .. } => {
                "remove the option that turns TLS off, or listen on 127.0.0.1".to_owned()
            }
            Self::InUse { address, .. } => format!(
                "stop the process that holds the port (`ss -ltnp sport = :{}` shows it); an upstream k3s with embedded etcd uses the same ports",
                address.port()
            ),
            Self::NoSuchAddress { .. } => {
                "check `node-ip` and `ip address`; the network may not be up yet".to_owned()
            }
            Self::Io { address, .. } if address.port() < 1024 => {
                "choose a port above 1023, or run with CAP_NET_BIND_SERVICE".to_owned()
            }
            Self::Io { .. } => "the message above is the kernel's own".to_owned(),
        }
    }
}

/// Bound sockets that do not accept yet.
#[derive(Debug)]
pub struct Listeners {
    listeners: Vec<TcpListener>,
    security: Security,
    purpose: &'static str,
}

impl Listeners {
    /// Listens on every address, or on none. `purpose` says in messages what listens, such as `the etcd API`.
    pub async fn bind(
        addresses: &[SocketAddr],
        security: Security,
        purpose: &'static str,
    ) -> Result<Self, ListenError> {
        let mut listeners = Vec::with_capacity(addresses.len());
        for &address in addresses {
            if matches!(security, Security::PlainLoopback) && !address.ip().is_loopback() {
                return Err(ListenError::PlainExposed { purpose, address });
            }
            let listener = TcpListener::bind(address).await;
            listeners.push(listener.map_err(|source| listen_error(purpose, address, source))?);
        }
        Ok(Self { listeners, security, purpose })
    }

    /// Mutual TLS from here on.
    #[must_use]
    pub fn with_tls(self, config: Arc<ServerConfig>) -> Self {
        Self { security: Security::Tls(config), ..self }
    }

    /// The addresses really listened on: port 0 has become a port.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// Starts accepting. Dropping the stream closes the sockets and gives up unfinished handshakes; connections that
    /// were taken from it live on.
    pub fn accept(self, caps: Caps, metrics: Connections) -> Incoming {
        let tls = match &self.security {
            Security::Tls(config) => Some(Arc::clone(config)),
            Security::PlainLoopback | Security::PlainReadOnly => None,
            Security::ClosedUntilTls => {
                unreachable!("{} accepts before it has certificates", self.purpose)
            }
        };
        let (incoming, loops) = self.run(tls, None, caps, metrics);
        Incoming { receiver: incoming, _loops: loops }
    }

    /// Starts accepting nodes, which have a certificate, and newcomers, which do not. Dropping the nodes' stream closes the
    /// sockets for both.
    pub fn accept_peers(self, doors: PeerDoors, metrics: Connections) -> PeersIncoming {
        let (sender, newcomers) = mpsc::channel(QUEUE);
        let side =
            SideDoor { tls: doors.newcomers, admission: Admission::new(Caps::JOINERS), sender };
        let (nodes, loops) = self.run(Some(doors.nodes), Some(side), Caps::PEERS, metrics);
        PeersIncoming {
            nodes: Incoming { receiver: nodes, _loops: loops },
            newcomers: Incoming { receiver: newcomers, _loops: JoinSet::new() },
        }
    }

    fn run(
        self,
        tls: Option<Arc<ServerConfig>>,
        side: Option<SideDoor>,
        caps: Caps,
        metrics: Connections,
    ) -> (mpsc::Receiver<Connection>, JoinSet<()>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let admission = Admission::new(caps);
        let acceptor = Acceptor { admission, metrics, tls, side, purpose: self.purpose, sender };
        let mut loops = JoinSet::new();
        for listener in self.listeners {
            loops.spawn(acceptor.clone().run(listener));
        }
        (receiver, loops)
    }
}

/// Both doors of port 2380.
#[derive(Clone, Debug)]
pub struct PeerDoors {
    /// For nodes: [`Port::Peers`](crate::pki::Port::Peers).
    pub nodes: Arc<ServerConfig>,
    /// For those who want to become one: [`Port::Join`](crate::pki::Port::Join).
    pub newcomers: Arc<ServerConfig>,
}

/// Established connections of port 2380.
#[derive(Debug)]
pub struct PeersIncoming {
    /// Their certificates say which nodes they are.
    pub nodes: Incoming,
    /// They have shown nothing; [`Caller::binding`] is there.
    pub newcomers: Incoming,
}

fn listen_error(purpose: &'static str, address: SocketAddr, source: io::Error) -> ListenError {
    if source.kind() == io::ErrorKind::AddrInUse {
        let holder = port_owner::find(address).to_string();
        return ListenError::InUse { purpose, address, holder };
    }
    if source.kind() == io::ErrorKind::AddrNotAvailable {
        return ListenError::NoSuchAddress { purpose, address };
    }
    ListenError::Io { purpose, address, source }
}

/// Established connections, in the order in which they were established.
#[derive(Debug)]
pub struct Incoming {
    receiver: mpsc::Receiver<Connection>,
    /// The accept loops and, inside them, the handshakes: aborted when this is dropped.
    _loops: JoinSet<()>,
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(ready!(self.receiver.poll_recv(cx)).map(Ok))
    }
}

/// What every accept loop shares.
#[derive(Clone)]
struct Acceptor {
    admission: Admission,
    metrics: Connections,
    tls: Option<Arc<ServerConfig>>,
    side: Option<SideDoor>,
    purpose: &'static str,
    sender: mpsc::Sender<Connection>,
}

/// Where callers go that ask to join: few at a time.
#[derive(Clone)]
struct SideDoor {
    tls: Arc<ServerConfig>,
    admission: Admission,
    sender: mpsc::Sender<Connection>,
}

/// What to do after `accept` failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AfterError {
    /// That connection is gone; the next one may be fine.
    Next,
    /// The kernel has run out of something; give it time.
    Pause,
}

/// Every error of accept(2) that can happen on a listening socket concerns one connection or passes with time.
fn after(error: &io::Error) -> AfterError {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(
            Errno::ECONNABORTED | Errno::ECONNRESET | Errno::EINTR | Errno::EPROTO | Errno::EPERM,
        ) => AfterError::Next,
        _ => AfterError::Pause,
    }
}

impl Acceptor {
    async fn run(self, listener: TcpListener) {
        let mut handshakes = JoinSet::new();
        let mut exhausted = false;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                // Finished handshakes are forgotten here, so the set does not grow.
                Some(_) = handshakes.join_next() => continue,
                () = self.sender.closed() => return,
            };
            match accepted {
                Ok((stream, remote)) => {
                    exhausted = false;
                    self.admit(stream, remote, &mut handshakes);
                }
                Err(error) if after(&error) == AfterError::Next => {}
                Err(error) => {
                    // Once per shortage: a line per attempt would fill the journal while the machine is in trouble.
                    if !exhausted {
                        tracing::warn!(%error, purpose = self.purpose, "connections cannot be accepted for now");
                    }
                    exhausted = true;
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
            }
        }
    }

    fn admit(&self, stream: TcpStream, remote: SocketAddr, handshakes: &mut JoinSet<()>) {
        let now = tokio::time::Instant::now().into_std();
        let Some(mut place) = self.admission.enter(remote.ip(), now) else {
            self.refused(remote);
            return;
        };
        let acceptor = self.clone();
        handshakes.spawn(async move {
            let metrics = acceptor.metrics.clone();
            let pushed_out = place.pushed_out();
            let shaken = acceptor.establish(stream, remote, place);
            let failure = tokio::select! {
                shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, shaken) => match shaken {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "it took too long".to_owned(),
                },
                () = pushed_out => "others came and it had not ended".to_owned(),
            };
            metrics.handshakes_failed.inc();
            tracing::debug!(%remote, %failure, "handshake failed");
        });
    }

    fn refused(&self, remote: SocketAddr) {
        self.metrics.refused.inc();
        // One text for all callers: what repeats is told with its number.
        announce!(
            EventId::ConnectionsRefused,
            { fields::ADDRESS } = %remote,
            "connections for {} are refused: too many are open",
            self.purpose
        );
    }

    async fn establish(
        self,
        stream: TcpStream,
        remote: SocketAddr,
        place: Place,
    ) -> io::Result<()> {
        tune(&stream)?;
        let local = stream.local_addr()?;
        let caller = Caller { remote, local, identity: None, binding: None };
        let Some(tls) = self.tls.clone() else {
            return self.hand_over(&self.sender, Io::Plain(stream), caller, place).await;
        };
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        if let Some(side) = &self.side
            && wants_to_join(&hello.client_hello())
        {
            // The place among the nodes' handshakes is free again from here on.
            drop(place);
            return self.establish_newcomer(side, hello, caller).await;
        }
        let stream = hello.into_stream(tls).await?;
        let caller = Caller { identity: Some(owner(&stream)?), ..caller };
        self.hand_over(&self.sender, Io::Tls(Box::new(stream)), caller, place).await
    }

    async fn establish_newcomer(
        &self,
        side: &SideDoor,
        hello: StartHandshake<TcpStream>,
        caller: Caller,
    ) -> io::Result<()> {
        let now = tokio::time::Instant::now().into_std();
        let Some(mut place) = side.admission.enter(caller.remote.ip(), now) else {
            self.refused(caller.remote);
            return Ok(());
        };
        let stream = tokio::select! {
            stream = hello.into_stream(Arc::clone(&side.tls)) => stream?,
            () = place.pushed_out() => return Err(io::ErrorKind::ConnectionAborted.into()),
        };
        let binding = ChannelBinding::of(stream.get_ref().1).map_err(io::Error::other)?;
        let caller = Caller { binding: Some(binding), ..caller };
        self.hand_over(&side.sender, Io::Tls(Box::new(stream)), caller, place).await
    }

    async fn hand_over(
        &self,
        to: &mpsc::Sender<Connection>,
        io: Io,
        caller: Caller,
        mut place: Place,
    ) -> io::Result<()> {
        if !place.established(tokio::time::Instant::now().into_std()) {
            self.refused(caller.remote);
            return Ok(());
        }
        let unwanted: PushedOut = Box::pin(place.pushed_out());
        self.metrics.accepted.inc();
        let open = Open { _place: place, gauge: self.metrics.open.clone() };
        open.gauge.inc();
        // The server may have stopped meanwhile; then nobody wants this connection.
        let connection = Connection { io, info: caller, unwanted, _open: open };
        let _unwanted = to.send(connection).await.is_err();
        Ok(())
    }
}

fn wants_to_join(hello: &ClientHello<'_>) -> bool {
    hello.alpn().is_some_and(|mut protocols| protocols.any(|protocol| protocol == ALPN_JOIN))
}

/// The owner of the certificate, which the verifier has accepted.
fn owner(stream: &TlsStream<TcpStream>) -> io::Result<Identity> {
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate = certificate.ok_or_else(|| io::Error::other("no client certificate"))?;
    Identity::of(certificate).map_err(io::Error::other)
}

/// No delay for small replies, and a dead peer is noticed in seconds instead of in a quarter of an hour.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_SECS)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_SECS)?;
    let timeout = u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    setsockopt(stream, sockopt::TcpUserTimeout, &timeout)?;
    Ok(())
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    // Boxed because it is many times larger than the other.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Counts an open connection, and gives its place back when it closes.
#[derive(Debug)]
struct Open {
    _place: Place,
    gauge: prometheus_client::metrics::gauge::Gauge,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// Completes when a connection has to make room for another one.
type PushedOut = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An established connection.
pub struct Connection {
    io: Io,
    info: Caller,
    unwanted: PushedOut,
    _open: Open,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("io", &self.io)
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Who is at the other end.
    pub const fn info(&self) -> &Caller {
        &self.info
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unwanted.as_mut().poll(cx).is_ready() {
            // Stays so: the other side of a server's connection is not polled after its end.
            self.unwanted = Box::pin(std::future::ready(()));
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests;

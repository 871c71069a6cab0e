//! Opens one connection: TCP, TLS, HTTP/2.
//!
//! A connection is made once. When it ends, calls on it fail; whoever wants another one dials again and looks at who
//! answers.

use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};

/// A connection is dead when sent data stays unacknowledged for this long: a peer that lost power.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

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
pub(super) async fn http2<S>(
    endpoint: Endpoint,
    stream: S,
) -> Result<Channel, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    endpoint.connect_with_connector(Once(Arc::new(stream))).await
}

/// What calls fail with that were made after the connection had ended: they were not sent.
#[derive(Debug, thiserror::Error)]
#[error("the connection has ended")]
pub(super) struct Ended;

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

//! Serves connections of port 2380 that `server::listen` has accepted: those of nodes, and those of newcomers.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{Request, Response};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::body::Body;
use tonic::codegen::Service as TowerService;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::dial::{CONNECTION_WINDOW_BYTES, PING_INTERVAL, PING_TIMEOUT, STREAM_WINDOW_BYTES};
use super::envelope::ENVELOPE_BYTES_MAX;
use super::join::MESSAGE_BYTES_MAX as JOIN_BYTES_MAX;
use super::service::{Gate, Service};
use super::tracked::Tracked;
use super::transport::Peers;
use crate::pki::Caller;
use crate::proto::node::peers_server::PeersServer;
use crate::raft::transport::Answer;

/// Calls and streams that one connection may have open.
const STREAMS_MAX: u32 = 256;

/// Headers of one request: ours are 200 bytes.
const HEADER_BYTES_MAX: u32 = 8 << 10;

/// Streams a caller may reset before they are looked at.
const PENDING_RESETS_MAX: usize = 64;

/// A newcomer has two or three small questions, one after the other.
const JOIN_STREAMS_MAX: u32 = 4;
const JOIN_CALL_TIMEOUT: Duration = Duration::from_secs(10);
const JOIN_CONNECTION_MAX: Duration = Duration::from_secs(60);
const JOIN_GRACE: Duration = Duration::from_secs(5);
const JOIN_WINDOW_BYTES: u32 = 64 << 10;

/// Answers other nodes until `shutdown`, and then until the calls under way are done.
///
/// `incoming` yields connections that have proved who they are, see [`Caller`]. An answer is dropped unfinished when
/// its caller hangs up or has waited long enough.
pub async fn serve<IO>(
    peers: &Peers,
    answer: Arc<dyn Answer>,
    gate: Arc<dyn Gate>,
    incoming: impl Stream<Item = io::Result<IO>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error>
where
    IO: AsyncRead + AsyncWrite + Connected<ConnectInfo = Caller> + Unpin + Send + 'static,
{
    let shared = Arc::clone(&peers.0);
    let service = Service { shared: Arc::clone(&shared), answer, gate };
    let service = PeersServer::new(service)
        .max_decoding_message_size(ENVELOPE_BYTES_MAX)
        .max_encoding_message_size(ENVELOPE_BYTES_MAX);
    let incoming = incoming.map(move |connection| {
        connection.map(|connection| {
            let node = connection.connect_info().identity.map(|identity| identity.node);
            let (connection, leash) = Tracked::new(connection);
            if let Some(node) = node {
                shared.opened(node, leash);
            }
            connection
        })
    });
    Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, shutdown)
        .await
}

/// Answers nodes that have only a token: `routes` and nothing else, in small bites and not for long.
pub async fn serve_join<IO>(
    routes: Routes,
    incoming: impl Stream<Item = io::Result<IO>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error>
where
    IO: AsyncRead + AsyncWrite + Connected<ConnectInfo = Caller> + Unpin + Send + 'static,
{
    Server::builder()
        .max_concurrent_streams(JOIN_STREAMS_MAX)
        .timeout(JOIN_CALL_TIMEOUT)
        .max_connection_age(JOIN_CONNECTION_MAX)
        .max_connection_age_grace(JOIN_GRACE)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .initial_stream_window_size(JOIN_WINDOW_BYTES)
        .initial_connection_window_size(JOIN_WINDOW_BYTES)
        .serve_with_incoming_shutdown(Small(routes.prepare()), incoming, shutdown)
        .await
}

/// Cuts requests off that are larger than a join needs, before they are gathered in memory.
#[derive(Clone)]
struct Small<S>(S);

impl<S> TowerService<Request<Body>> for Small<S>
where
    S: TowerService<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        // Five bytes of gRPC's own come before the message.
        let left = JOIN_BYTES_MAX + 5;
        self.0.call(request.map(|body| Body::new(Bounded { body, left })))
    }
}

/// A body that ends in an error when it goes on for too long.
struct Bounded {
    body: Body,
    left: usize,
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            let Some(left) = self.left.checked_sub(bytes) else {
                let text = format!("expected at most {JOIN_BYTES_MAX} bytes");
                return Poll::Ready(Some(Err(tonic::Status::resource_exhausted(text))));
            };
            self.left = left;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

//! Counts the gRPC calls that pass through a server: a tower layer for tonic.
//!
//! Counting happens on the bytes, below the generated code: the path names the method, the length prefixes in the bodies give the
//! number of messages, the trailers give the status. What it costs is one hash lookup and two small boxes per call.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use hyper::body::{Frame, SizeHint};
use prometheus_client::metrics::counter::Counter;
use tonic::codegen::Service;
use tower_layer::Layer;

use crate::metrics::Metrics;
use crate::metrics::grpc::{Call, Grpc};

/// gRPC's status when a reply carries none.
const UNKNOWN: u16 = 2;

/// Put it around a tonic server with `Server::builder().layer(…)`.
#[derive(Clone, Debug)]
pub struct CountCalls {
    grpc: Grpc,
    received_bytes: Counter,
    sent_bytes: Counter,
}

impl CountCalls {
    /// Counts into these metrics.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            grpc: metrics.grpc.clone(),
            received_bytes: metrics.network.client_received_bytes.clone(),
            sent_bytes: metrics.network.client_sent_bytes.clone(),
        }
    }
}

impl<S> Layer<S> for CountCalls {
    type Service = CountedService<S>;

    fn layer(&self, inner: S) -> CountedService<S> {
        CountedService { inner, counts: self.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Clone, Debug)]
pub struct CountedService<S> {
    inner: S,
    counts: CountCalls,
}

impl<S> Service<Request<Body>> for CountedService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(method) = self.counts.grpc.method(request.uri().path()) else {
            return Box::pin(self.inner.call(request));
        };
        let (method, mut call) = (method.clone(), method.call());
        let bytes = self.counts.received_bytes.clone();
        let request = request.map(|body| {
            let received = move |messages| method.received(messages);
            Body::new(CountedBody {
                body,
                bytes,
                messages: Messages::default(),
                tally: Requests(received),
            })
        });
        let sent_bytes = self.counts.sent_bytes.clone();
        let reply = self.inner.call(request);
        Box::pin(async move {
            let reply = reply.await?;
            // A reply without a body carries its status in the headers.
            if let Some(code) = status(reply.headers()) {
                call.finish(code);
            }
            Ok(reply.map(|body| {
                Body::new(CountedBody {
                    body,
                    bytes: sent_bytes,
                    messages: Messages::default(),
                    tally: Replies(call),
                })
            }))
        })
    }
}

/// The status in headers or trailers.
fn status(headers: &HeaderMap) -> Option<u16> {
    let code = headers.get("grpc-status")?;
    Some(code.to_str().ok().and_then(|code| code.parse().ok()).unwrap_or(UNKNOWN))
}

/// What to do with what a body carried.
trait Tally: Send + Unpin + 'static {
    fn messages(&mut self, count: u64);
    fn trailers(&mut self, trailers: &HeaderMap);
}

struct Requests<F>(F);

impl<F: FnMut(u64) + Send + Unpin + 'static> Tally for Requests<F> {
    fn messages(&mut self, count: u64) {
        (self.0)(count);
    }

    fn trailers(&mut self, _trailers: &HeaderMap) {}
}

struct Replies(Call);

impl Tally for Replies {
    fn messages(&mut self, count: u64) {
        self.0.sent(count);
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        self.0.finish(status(trailers).unwrap_or(UNKNOWN));
    }
}

/// A body that counts what passes. Dropped before its trailers, the call inside counts as canceled.
struct CountedBody<T> {
    body: Body,
    bytes: Counter,
    messages: Messages,
    tally: T,
}

impl<T: Tally> hyper::body::Body for CountedBody<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            if let Some(data) = frame.data_ref() {
                self.bytes.inc_by(data.len() as u64);
                let count = self.messages.ended_in(data);
                self.tally.messages(count);
            } else if let Some(trailers) = frame.trailers_ref() {
                self.tally.trailers(trailers);
            }
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

/// Finds the ends of gRPC messages in a stream of chunks: one flag byte, four length bytes, the message.
#[derive(Clone, Copy, Debug, Default)]
struct Messages {
    /// Bytes of the prefix seen so far.
    prefix: [u8; 5],
    prefix_len: usize,
    /// Bytes of the message still to come, once the prefix is complete.
    left: usize,
}

impl Messages {
    /// How many messages end in this chunk.
    fn ended_in(&mut self, mut chunk: &[u8]) -> u64 {
        let mut ended = 0;
        loop {
            let wanted = self.prefix.len() - self.prefix_len;
            let taken = wanted.min(chunk.len());
            self.prefix[self.prefix_len..][..taken].copy_from_slice(&chunk[..taken]);
            self.prefix_len += taken;
            chunk = &chunk[taken..];
            if self.prefix_len < self.prefix.len() {
                return ended;
            }
            if 0 < taken {
                let [_, length @ ..] = self.prefix;
                self.left = u32::from_be_bytes(length) as usize;
            }
            let taken = self.left.min(chunk.len());
            self.left -= taken;
            chunk = &chunk[taken..];
            if 0 < self.left {
                return ended;
            }
            self.prefix_len = 0;
            ended += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        bytes.resize(5 + length, 7);
        bytes
    }

    #[test]
    fn messages_are_counted_however_the_stream_is_cut() {
        let stream: Vec<u8> = [0, 1, 300, 0, 4].into_iter().flat_map(message).collect();
        for size in 1..=stream.len() {
            let mut messages = Messages::default();
            let ended: u64 = stream.chunks(size).map(|chunk| messages.ended_in(chunk)).sum();
            assert_eq!(ended, 5, "chunks of {size}");
        }
    }

    #[test]
    fn unfinished_message_does_not_count() {
        let mut messages = Messages::default();
        let bytes = message(10);
        assert_eq!(messages.ended_in(&bytes[..14]), 0);
        assert_eq!(messages.ended_in(&[]), 0);
        assert_eq!(messages.ended_in(&bytes[14..]), 1);
    }
}

//! Answers whose bytes are accounted for, from the store to the socket.
//!
//! tonic encodes a message when its connection asks for it, into a buffer that doubles as it grows and that a stream keeps for
//! good. Where size matters we encode ourselves: once, into exactly the room that was reserved, and the room is given
//! back when HTTP/2 drops the last reference to these bytes, because they were written or because nobody wants them.
//!
//! # Shape
//!
//! A [`Meter`] is a [`Permit`] that an answer in the making grows ([`Room`]). [`Held`] is an answer with its room;
//! [`Held::respond`] and [`stream`] make tonic responses whose message is empty and whose real bytes are in an extension;
//! [`unwrap_body`], which runs outside of tonic's services, puts them in place.
//!
//! # Invariants
//!
//! - The bytes of a frame and its permit live and die together.
//! - A body ends with trailers that carry its status, as gRPC wants.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::{BufMut, Bytes};
use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use http::HeaderMap;
use hyper::body::Frame;
use prost::Message;
use tonic::{Response, Status};

use super::budget::Permit;
use crate::apply::Room;
use crate::limits;

/// In front of each gRPC message: a flag and a length.
const PREFIX_BYTES: usize = 5;

/// Growing takes a lock, so it is done by at least this much.
const STEP_BYTES: u64 = 64 << 10;

/// Counts what an answer takes while it is made.
#[derive(Debug)]
pub(super) struct Meter {
    permit: RefCell<Permit>,
    granted: Cell<u64>,
    used: Cell<u64>,
}

impl Meter {
    /// `granted` is what the permit was reserved with.
    pub(super) const fn new(permit: Permit, granted: u64) -> Self {
        Self { permit: RefCell::new(permit), granted: Cell::new(granted), used: Cell::new(0) }
    }

    /// How much was asked for, whether or not it was there.
    pub(super) const fn used(&self) -> u64 {
        self.used.get()
    }

    /// Whether it is more than any client could take, and more than a small machine has.
    pub(super) fn is_absurd(&self) -> bool {
        limits::ANSWER_BYTES_LARGEST < self.used.get()
    }

    pub(super) fn into_permit(self) -> Permit {
        self.permit.into_inner()
    }
}

impl Room for Meter {
    fn keep(&self, bytes: usize) -> bool {
        let used = self.used.get() + bytes as u64;
        self.used.set(used);
        if used <= self.granted.get() {
            return true;
        }
        if self.is_absurd() {
            return false;
        }
        let mut permit = self.permit.borrow_mut();
        // Not so generous that the one large place is taken for nothing.
        let share = limits::ANSWER_BYTES_PER_CONNECTION_MAX;
        let generous = (used + STEP_BYTES.max(used / 4)).min(share.max(used));
        let granted = [generous, used].into_iter().find(|bytes| permit.grow(*bytes));
        if let Some(granted) = granted {
            self.granted.set(granted);
        }
        granted.is_some()
    }
}

/// An answer, and the room it takes. Answers of a few bytes take none.
#[derive(Debug)]
pub(super) struct Held<T> {
    pub(super) answer: T,
    pub(super) permit: Option<Permit>,
}

impl<T> Held<T> {
    pub(super) const fn new(answer: T, permit: Permit) -> Self {
        Self { answer, permit: Some(permit) }
    }

    /// Makes another answer of it, no larger than this one.
    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Held<U> {
        Held { answer: change(self.answer), permit: self.permit }
    }
}

impl<T: Message + Default> Held<T> {
    /// The response of a unary call.
    pub(super) fn respond(self) -> Response<T> {
        let Some(permit) = self.permit else { return Response::new(self.answer) };
        let frame = frame(vec![self.answer], permit);
        stand_in(T::default(), stream::once(async { Ok(frame) }).boxed())
    }
}

/// Encoded messages, one after the other, that give their room back when the last reference to them is dropped.
pub(super) fn frame<T: Message>(messages: Vec<T>, mut permit: Permit) -> Bytes {
    let lengths = messages.iter().map(Message::encoded_len);
    let mut bytes = Vec::with_capacity(lengths.map(|length| PREFIX_BYTES + length).sum());
    for message in messages {
        bytes.put_u8(0);
        // The meter stops far below 4 GiB, and so does the log.
        bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
        message.encode_raw(&mut bytes);
    }
    permit.settle(bytes.len() as u64);
    Bytes::from_owner(Charged { bytes, permit })
}

struct Charged {
    bytes: Vec<u8>,
    permit: Permit,
}

impl Drop for Charged {
    fn drop(&mut self) {
        self.permit.delivered();
    }
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The type of a streaming method's messages here: none, because the frames go another way.
pub(super) type NoMessages<T> = stream::Empty<Result<T, Status>>;

/// The response of a streaming call, of frames made by [`frame`].
pub(super) fn stream<T>(
    frames: impl Stream<Item = Result<Bytes, Status>> + Send + 'static,
) -> Response<NoMessages<T>> {
    stand_in(stream::empty(), frames.boxed())
}

type Frames = BoxStream<'static, Result<Bytes, Status>>;

/// What takes the place of a response's body. Extensions must be `Clone`; it is taken out once.
#[derive(Clone)]
struct StandIn(Arc<Mutex<Option<Frames>>>);

fn stand_in<T>(message: T, frames: Frames) -> Response<T> {
    let mut response = Response::new(message);
    response.extensions_mut().insert(StandIn(Arc::new(Mutex::new(Some(frames)))));
    response
}

/// Puts the real body in place.
pub(super) fn unwrap_body(response: http::Response<Body>) -> http::Response<Body> {
    let (mut parts, body) = response.into_parts();
    let stand_in = parts.extensions.remove::<StandIn>();
    let frames =
        stand_in.and_then(|one| one.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    let body = match frames {
        Some(frames) => Body::new(FrameBody { frames, ended: false }),
        None => body,
    };
    http::Response::from_parts(parts, body)
}

/// A gRPC body of ready frames.
struct FrameBody {
    frames: Frames,
    ended: bool,
}

impl hyper::body::Body for FrameBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match std::task::ready!(self.frames.as_mut().poll_next(cx)) {
            Some(Ok(frame)) => return Poll::Ready(Some(Ok(Frame::data(frame)))),
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.ended = true;
        let mut trailers = HeaderMap::new();
        status.add_header(&mut trailers)?;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// A body that is accounted for as a whole, in advance: for services whose code is not ours.
pub(super) fn charge_body(response: http::Response<Body>, permit: Permit) -> http::Response<Body> {
    response.map(|body| Body::new(ChargedBody { body, permit: Arc::new(permit) }))
}

struct ChargedBody {
    body: Body,
    permit: Arc<Permit>,
}

struct Shared {
    bytes: Bytes,
    _permit: Arc<Permit>,
}

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl hyper::body::Body for ChargedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        let charged = frame.map(|frame| {
            frame.map(|frame| {
                frame.map_data(|bytes| {
                    Bytes::from_owner(Shared { bytes, _permit: Arc::clone(&self.permit) })
                })
            })
        });
        Poll::Ready(charged)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use hyper::body::Body as _;

    use super::super::budget::Budget;
    use super::*;
    use crate::env::host;
    use crate::proto::etcdserverpb as pb;
    use futures_util::FutureExt as _;

    fn permit(budget: &Budget, bytes: u64) -> Permit {
        budget.open().reserve(bytes, None).now_or_never().unwrap().unwrap()
    }

    fn budget() -> Budget {
        Budget::new(host::env().clock)
    }

    fn range(value_bytes: usize) -> pb::RangeResponse {
        let value = vec![b'v'; value_bytes].into();
        let kv = crate::proto::mvccpb::KeyValue { value, ..Default::default() };
        pb::RangeResponse { kvs: vec![kv], count: 1, ..Default::default() }
    }

    fn next(body: &mut Body) -> Frame<Bytes> {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
        frame.now_or_never().unwrap().unwrap().unwrap()
    }

    fn body_of<T>(response: Response<T>) -> Body {
        let (_, _, extensions) = response.into_parts();
        let mut http = http::Response::new(Body::empty());
        *http.extensions_mut() = extensions;
        unwrap_body(http).into_body()
    }

    #[test]
    fn frame_is_what_grpc_sends_and_its_room_lives_as_long_as_any_part_of_it() {
        let budget = budget();
        let (one, two) = (range(100), range(3));
        let bytes = frame(vec![one.clone(), two.clone()], permit(&budget, 1 << 20));
        let mut expected = Vec::new();
        for message in [one, two] {
            expected.put_u8(0);
            expected.put_u32(u32::try_from(message.encoded_len()).unwrap());
            message.encode(&mut expected).unwrap();
        }
        assert_eq!(bytes, expected);
        assert_eq!(budget.used(), expected.len() as u64);
        let part = bytes.slice(7..9);
        drop(bytes);
        assert_eq!(budget.used(), expected.len() as u64);
        drop(part);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn unary_answer_is_its_message_and_an_ok_status() {
        let budget = budget();
        let response = Held::new(range(5_000), permit(&budget, 10_000)).respond();
        assert_eq!(response.get_ref(), &pb::RangeResponse::default());
        let mut body = body_of(response);
        let data = next(&mut body).into_data().unwrap();
        assert_eq!(pb::RangeResponse::decode(&data[PREFIX_BYTES..]), Ok(range(5_000)));
        assert!(!body.is_end_stream());
        let trailers = next(&mut body).into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "0");
        assert!(body.is_end_stream());
        drop(body);
        assert_ne!(budget.used(), 0, "the bytes are still somewhere");
        drop(data);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn answer_that_is_never_sent_gives_its_room_back() {
        let budget = budget();
        drop(Held::new(range(5_000), permit(&budget, 10_000)).respond());
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn stream_that_fails_says_why_in_its_trailers() {
        let failed = Status::out_of_range("etcdserver: mvcc: required revision has been compacted");
        let frames = [Ok(Bytes::from_static(b"frame")), Err(failed)];
        let mut body = body_of(stream::<pb::RangeResponse>(stream::iter(frames)));
        assert_eq!(next(&mut body).into_data().unwrap(), "frame");
        let trailers = next(&mut body).into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "11");
        assert!(body.is_end_stream());
    }

    #[test]
    fn meter_asks_for_more_in_steps_and_says_no_when_there_is_none() {
        let budget = budget();
        let account = budget.open();
        let reserve = |bytes| account.reserve(bytes, None).now_or_never();
        let meter = Meter::new(reserve(1_000).unwrap().unwrap(), 1_000);
        assert!(meter.keep(1_000));
        assert_eq!(budget.used(), 1_000);
        assert!(meter.keep(1));
        assert_eq!(budget.used(), 1_001 + STEP_BYTES);
        // Nearly all of the connection's room, and not the place for large answers.
        let share = usize::try_from(limits::ANSWER_BYTES_PER_CONNECTION_MAX).unwrap();
        assert!(meter.keep(share - 2_000));
        assert_eq!(budget.used(), share as u64);

        let second = Meter::new(reserve(0).unwrap().unwrap(), 0);
        assert!(!second.keep(1));
        assert!(meter.keep(2_000), "the one large answer");
        assert!(second.keep(share - 1), "its room is free then");
        assert!(!second.keep(1), "there is one place only");
        drop(meter);
        assert!(second.keep(1));
    }

    #[test]
    fn answer_beyond_all_measure_is_refused_even_with_all_the_room() {
        let budget = budget();
        let meter = Meter::new(permit(&budget, 1), 1);
        let most = usize::try_from(limits::ANSWER_BYTES_LARGEST).unwrap();
        assert!(meter.keep(most) && !meter.is_absurd());
        assert!(!meter.keep(usize::MAX / 2) && meter.is_absurd());
    }
}

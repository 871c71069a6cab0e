//! Bounds the memory of requests: on their way in, waiting, and being carried out.
//!
//! A client may open thousands of calls on a connection and push 1.5 MiB into each; what has arrived of them is in memory before
//! anybody has looked at it. So a request is let in only when there is room for all of it, which its first five bytes tell.
//!
//! # Shape
//!
//! [`Intake`] for the process, [`Lane`] for a connection. [`meter`] puts itself between a call's body and its service: [`Scan`]
//! (pure) finds where messages begin and how long they are; a body whose message has no room yet is not read, and HTTP/2's flow
//! control holds the client back. The room is given back when the call is answered, or in a stream when the next message begins.
//!
//! # Invariants
//!
//! - Nobody waits for room while holding some: there is no deadlock.
//! - Room is taken for a whole message, so whoever has it needs nothing but its own bytes; and those get through, because all that
//!   wait on a connection together never fill its window. More are refused at once, with etcd's text for too much work.
//! - Small requests wait for nobody, ordinary ones only for ordinary ones.
//! - Whoever has room and does not send loses it after [`limits::REQUEST_ARRIVAL_MAX`].
//!
//! # Not here
//!
//! Answers: `budget`. Entries that are committed and not applied: `raft` refuses beyond [`limits::APPLY_BACKLOG_MAX`].

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use hyper::body::Frame;
use tonic::Status;

use super::api::{Api, asked_timeout};
use super::budget::{Account, Budget, Permit};
use super::error::EtcdError;
use crate::env::{BoxFuture, Clock};
use crate::limits;

/// All room for requests. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Intake {
    ordinary: Budget,
    bulk: Budget,
    waiting: Arc<AtomicUsize>,
}

impl Intake {
    pub(super) fn new(clock: &Arc<dyn Clock>) -> Self {
        let room = |total, account| Budget::of_requests(Arc::clone(clock), total, account);
        Self {
            ordinary: room(limits::ORDINARY_BYTES_MAX, limits::ORDINARY_BYTES_PER_CONNECTION_MAX),
            bulk: room(limits::BULK_BYTES_MAX, limits::BULK_BYTES_PER_CONNECTION_MAX),
            waiting: Arc::default(),
        }
    }

    /// A lane for a new connection.
    pub(super) fn open(&self) -> Lane {
        Lane {
            ordinary: self.ordinary.open(),
            bulk: self.bulk.open(),
            waiting: Arc::default(),
            waiting_in_all: Arc::clone(&self.waiting),
        }
    }

    /// Whoever waits is told that the server stops.
    pub(super) fn close(&self) {
        self.ordinary.close();
        self.bulk.close();
    }
}

/// A connection's room for requests. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    ordinary: Account,
    bulk: Account,
    waiting: Arc<AtomicUsize>,
    waiting_in_all: Arc<AtomicUsize>,
}

/// What is said to whoever is one too many. The call was not even read, so trying again is safe, and the code says so.
fn too_many() -> Status {
    Status::resource_exhausted("etcdserver: too many requests")
}

impl Lane {
    /// Waits for room for one message.
    async fn reserve(&self, bytes: u64, deadline: Instant) -> Result<Permit, Status> {
        let account =
            if bytes <= limits::REQUEST_BYTES_ORDINARY { &self.ordinary } else { &self.bulk };
        if let Some(permit) = account.try_reserve(bytes) {
            return Ok(permit);
        }
        let own = Place::take(&self.waiting, limits::REQUESTS_WAITING_PER_CONNECTION_MAX);
        let _own = own.ok_or_else(too_many)?;
        let all = Place::take(&self.waiting_in_all, limits::REQUESTS_WAITING_MAX);
        let _all = all.ok_or_else(too_many)?;
        account.reserve(bytes, Some(deadline)).await.map_err(|error| {
            if error == EtcdError::TooManyRequests { too_many() } else { error.into() }
        })
    }
}

/// A place among those who wait, left when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(count: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let taken = count.fetch_update(Relaxed, Relaxed, |now| (now < most).then_some(now + 1));
        taken.ok().map(|_| Self(Arc::clone(count)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// What a call holds, shared by its body and by whoever waits for its answer.
#[derive(Clone, Default)]
pub(super) struct TakenIn(Arc<Mutex<Option<Permit>>>);

impl TakenIn {
    fn lock(&self) -> MutexGuard<'_, Option<Permit>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a call's body in message by message. What is returned besides is to be kept until the call is answered.
pub(super) fn meter(api: &Api, request: Request) -> (Request, TakenIn) {
    let taken_in = TakenIn::default();
    let Some(lane) = request.extensions().get::<Lane>().cloned() else {
        // Not a connection of ours: a test's.
        return (request, taken_in);
    };
    let asked = asked_timeout(request.headers());
    let body = Metered {
        lane,
        taken_in: taken_in.clone(),
        clock: Arc::clone(&api.parts().env.clock),
        until: asked.map(|asked| api.now() + asked),
        patience: api.settings().request_timeout(),
        largest: u64::try_from(api.settings().message_bytes_max()).unwrap_or(u64::MAX),
        scan: Scan::default(),
        waiting: None,
        arrival: None,
        held: None,
        body: Body::empty(),
    };
    let request = request.map(|inner| Body::new(Metered { body: inner, ..body }));
    (request, taken_in)
}

/// A body that is read only as far as there is room.
struct Metered {
    body: Body,
    lane: Lane,
    taken_in: TakenIn,
    clock: Arc<dyn Clock>,
    /// When the client gives up, if it says so; else it is given the usual time.
    until: Option<Instant>,
    patience: Duration,
    /// Longer messages are refused by their service as soon as it sees their length.
    largest: u64,
    scan: Scan,
    waiting: Option<BoxFuture<'static, Result<Permit, Status>>>,
    /// Completes when a message that has room has not arrived in time.
    arrival: Option<BoxFuture<'static, ()>>,
    /// The piece with the beginning of the message that waits.
    held: Option<Frame<Bytes>>,
}

impl Metered {
    /// Takes notice of a piece; asks for room if a message begins in it that needs some.
    fn notice(&mut self, piece: &[u8]) {
        let begun = self.scan.feed(piece);
        if self.scan.is_between() {
            self.arrival = None;
        }
        let needs =
            begun.filter(|bytes| (limits::REQUEST_BYTES_FREE + 1..=self.largest).contains(bytes));
        let Some(bytes) = needs else { return };
        // In a stream: the message before has been handled, or will be without this.
        drop(self.taken_in.lock().take());
        let now = self.clock.now();
        let longest = now + limits::REQUEST_WAIT_MAX;
        let deadline = self.until.map_or(now + self.patience, |until| until.min(longest));
        let lane = self.lane.clone();
        self.waiting = Some(Box::pin(async move { lane.reserve(bytes, deadline).await }));
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        let Some(waiting) = &mut self.waiting else { return Poll::Ready(Ok(())) };
        let permit = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        *self.taken_in.lock() = Some(permit?);
        if !self.scan.is_between() {
            self.arrival = Some(self.clock.sleep(limits::REQUEST_ARRIVAL_MAX));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_late(&mut self, cx: &mut Context<'_>) -> bool {
        self.arrival.as_mut().is_some_and(|arrival| arrival.as_mut().poll(cx).is_ready())
    }
}

impl hyper::body::Body for Metered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        loop {
            if let Err(status) = ready!(this.poll_room(cx)) {
                this.held = None;
                this.body = Body::empty();
                return Poll::Ready(Some(Err(axum::Error::new(status))));
            }
            if let Some(frame) = this.held.take() {
                return Poll::Ready(Some(Ok(frame)));
            }
            let frame = match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(ended) => return Poll::Ready(ended),
                Poll::Pending if this.poll_late(cx) => {
                    this.arrival = None;
                    drop(this.taken_in.lock().take());
                    this.body = Body::empty();
                    let late = Status::from(EtcdError::TimedOut);
                    return Poll::Ready(Some(Err(axum::Error::new(late))));
                }
                Poll::Pending => return Poll::Pending,
            };
            if let Some(piece) = frame.data_ref() {
                this.notice(piece);
            }
            this.held = Some(frame);
        }
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_none() && self.waiting.is_none() && self.body.is_end_stream()
    }
}

/// Follows gRPC's framing: one byte of flags, four of length, the message.
#[derive(Debug, Default)]
struct Scan {
    header: [u8; 5],
    have: usize,
    left: u64,
}

impl Scan {
    /// Takes notice of the next piece. The length of the longest message that begins in it, if one does.
    fn feed(&mut self, mut piece: &[u8]) -> Option<u64> {
        let mut longest = None;
        while !piece.is_empty() {
            if 0 < self.left {
                let skipped = usize::try_from(self.left).unwrap_or(usize::MAX).min(piece.len());
                piece = &piece[skipped..];
                self.left -= skipped as u64;
                continue;
            }
            let taken = (self.header.len() - self.have).min(piece.len());
            self.header[self.have..self.have + taken].copy_from_slice(&piece[..taken]);
            (self.have, piece) = (self.have + taken, &piece[taken..]);
            if self.have == self.header.len() {
                let [_, length @ ..] = self.header;
                self.have = 0;
                self.left = u64::from(u32::from_be_bytes(length));
                longest = longest.max(Some(self.left));
            }
        }
        longest
    }

    /// Whether the last message is complete and no other has begun.
    const fn is_between(&self) -> bool {
        self.left == 0 && self.have == 0
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use futures_util::FutureExt as _;
    use hyper::body::Body as _;

    use super::*;
    use crate::testkit::ManualClock;

    fn message(bytes: usize) -> Vec<u8> {
        let mut framed = vec![0];
        framed.extend(u32::try_from(bytes).unwrap().to_be_bytes());
        framed.resize(bytes + 5, b'm');
        framed
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let all = [message(7), message(0), message(300), message(1)].concat();
        for size in 1..all.len() {
            let mut scan = Scan::default();
            let found: Vec<u64> = all.chunks(size).filter_map(|piece| scan.feed(piece)).collect();
            assert!(found.contains(&300) && scan.is_between(), "{size}: {found:?}");
            if size == 1 {
                assert_eq!(found, [7, 0, 300, 1]);
            }
        }
        let mut scan = Scan::default();
        assert_eq!(scan.feed(&all), Some(300), "the longest of those that begin");
        assert_eq!(scan.feed(&message(9)[..8]), Some(9));
        assert!(!scan.is_between());
    }

    struct World {
        clock: Arc<dyn Clock>,
        manual: ManualClock,
        intake: Intake,
    }

    fn world() -> World {
        let manual = ManualClock::new();
        let clock: Arc<dyn Clock> = Arc::new(manual.clone());
        World { intake: Intake::new(&clock), clock, manual }
    }

    fn metered(world: &World, lane: &Lane, body: Vec<u8>) -> (Metered, TakenIn) {
        let taken_in = TakenIn::default();
        let metered = Metered {
            body: Body::from(body),
            lane: lane.clone(),
            taken_in: taken_in.clone(),
            clock: Arc::clone(&world.clock),
            until: None,
            patience: Duration::from_secs(7),
            largest: 2 << 20,
            scan: Scan::default(),
            waiting: None,
            arrival: None,
            held: None,
        };
        (metered, taken_in)
    }

    fn poll(body: &mut Metered) -> Poll<Option<Result<usize, String>>> {
        let polled = Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()));
        polled.map(|frame| {
            frame.map(|frame| match frame {
                Ok(frame) => Ok(frame.into_data().unwrap().len()),
                Err(error) => {
                    let status = Status::from_error(error.into());
                    Err(format!("{:?}: {}", status.code(), status.message()))
                }
            })
        })
    }

    #[tokio::test]
    async fn request_is_read_only_when_there_is_room_for_all_of_it() {
        let world = world();
        let lane = world.intake.open();
        let large = 1_400_000;
        let mut inside = Vec::new();
        loop {
            let (mut body, taken_in) = metered(&world, &lane, message(large));
            if poll(&mut body) == Poll::Pending {
                drop(taken_in);
                let (mut small, _) = metered(&world, &lane, message(4_096));
                assert_eq!(poll(&mut small), Poll::Ready(Some(Ok(4_101))), "small ones pass");
                let (mut ordinary, _) = metered(&world, &lane, message(60_000));
                assert_eq!(poll(&mut ordinary), Poll::Ready(Some(Ok(60_005))));
                let first: TakenIn = inside.remove(0);
                drop(first);
                assert_eq!(poll(&mut body), Poll::Ready(Some(Ok(large + 5))), "the next one");
                break;
            }
            drop(body);
            inside.push(taken_in);
        }
        let share = usize::try_from(limits::BULK_BYTES_PER_CONNECTION_MAX).unwrap() / large;
        assert_eq!(inside.len() + 1, share);
    }

    #[tokio::test]
    async fn whoever_is_one_too_many_is_refused_at_once_and_whoever_waits_in_the_end() {
        let world = world();
        let lane = world.intake.open();
        let fill = lane.bulk.reserve(limits::BULK_BYTES_PER_CONNECTION_MAX, None).now_or_never();
        let _full = fill.unwrap().unwrap();
        let most = limits::REQUESTS_WAITING_PER_CONNECTION_MAX;
        let mut waiting: Vec<_> =
            (0..most).map(|_| metered(&world, &lane, message(100_000)).0).collect();
        assert!(waiting.iter_mut().all(|body| poll(body) == Poll::Pending));
        let refused =
            Poll::Ready(Some(Err("ResourceExhausted: etcdserver: too many requests".to_owned())));
        let (mut more, _) = metered(&world, &lane, message(100_000));
        assert_eq!(poll(&mut more), refused);
        assert_eq!(poll(&mut more), Poll::Ready(None));
        let elsewhere = world.intake.open();
        let (mut other, _) = metered(&world, &elsewhere, message(100_000));
        assert_eq!(poll(&mut other), Poll::Ready(Some(Ok(100_005))), "another connection");
        world.manual.advance(Duration::from_secs(8));
        assert_eq!(poll(&mut waiting[0]), refused);
    }

    #[tokio::test]
    async fn room_is_for_others_when_the_request_does_not_come() {
        let world = world();
        let lane = world.intake.open();
        let (mut body, taken_in) = metered(&world, &lane, message(1_000_000)[..50].to_vec());
        let half = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::from(
            message(1_000_000)[..50].to_vec(),
        ))]);
        use futures_util::StreamExt as _;
        body.body = Body::from_stream(half.chain(futures_util::stream::pending()));
        assert_eq!(poll(&mut body), Poll::Ready(Some(Ok(50))));
        assert_eq!(poll(&mut body), Poll::Pending);
        assert!(taken_in.lock().is_some());
        world.manual.advance(limits::REQUEST_ARRIVAL_MAX);
        let late = "Unavailable: etcdserver: request timed out".to_owned();
        assert_eq!(poll(&mut body), Poll::Ready(Some(Err(late))));
        assert!(taken_in.lock().is_none());
    }

    #[tokio::test]
    async fn stream_holds_room_for_one_message_at_a_time() {
        let world = world();
        let lane = world.intake.open();
        let pieces = [message(100_000), message(10), message(200_000)].map(Ok::<_, std::io::Error>);
        let (mut body, taken_in) = metered(&world, &lane, Vec::new());
        body.body = Body::from_stream(futures_util::stream::iter(pieces));
        for (bytes, held) in [(100_005, 100_000), (15, 100_000), (200_005, 200_000)] {
            assert_eq!(poll(&mut body), Poll::Ready(Some(Ok(bytes))));
            assert_eq!(world.intake.bulk.used(), held);
        }
        drop(taken_in);
        assert_eq!(world.intake.bulk.used(), 200_000, "the stream goes on");
        drop(body);
        assert_eq!(world.intake.bulk.used(), 0);
    }
}

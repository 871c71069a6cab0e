//! A stream of appends to one follower, many under way at once.
//!
//! openraft's own default sends an append when the one before is answered. A follower may keep a lease renewal back for
//! company (`wal::Urgency::Lease`), and would then keep back every urgent write behind it; here the urgent one arrives, and
//! takes the renewal along.
//!
//! # Invariants
//!
//! - At most [`UNANSWERED_MAX`] requests, or [`UNANSWERED_BYTES_MAX`] and one more, have no answer: what a follower must
//!   hold, and what is sent again when the connection breaks.
//! - A peer that owes an answer and says nothing for [`PATIENCE`] ends the stream. One whose card is slow says so.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use super::Member;
use super::network::{RpcError, network_error, not_understood, rpc_error};
use super::transport::{BoxStream, CallError, StreamMethod, Transport};
use super::wire::{self, Append, AppendReply, Appended};

/// Most requests without an answer. openraft's receiving side takes 64.
const UNANSWERED_MAX: usize = 48;
const UNANSWERED_BYTES_MAX: usize = 2 << 20;

/// How long a peer may be silent that owes an answer, if openraft's own time is shorter: a full request takes that long on a
/// slow wireless link, and sending it once more would not make that better.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often a follower that owes an answer says that it is alive.
pub(super) const SIGN_OF_LIFE: Duration = Duration::from_millis(500);

/// Requests that were sent and not answered.
#[derive(Debug, Default)]
struct Unanswered {
    sizes: VecDeque<usize>,
    bytes: usize,
    /// When the peer last said something, or began to owe an answer.
    heard: Option<Instant>,
}

impl Unanswered {
    fn has_room(&self) -> bool {
        self.sizes.is_empty()
            || (self.sizes.len() < UNANSWERED_MAX && self.bytes < UNANSWERED_BYTES_MAX)
    }

    fn sent(&mut self, now: Instant, bytes: usize) {
        if self.sizes.is_empty() {
            self.heard = Some(now);
        }
        self.sizes.push_back(bytes);
        self.bytes += bytes;
    }

    fn answered(&mut self, now: Instant) {
        self.bytes -= self.sizes.pop_front().unwrap_or(0);
        self.working(now);
    }

    /// The peer is alive.
    fn working(&mut self, now: Instant) {
        self.heard = (!self.sizes.is_empty()).then_some(now);
    }
}

/// Opens the stream. When what this returns is dropped, so is `input`, whatever the carrier does: openraft's next stream
/// waits for that.
pub(super) async fn open(
    transport: &dyn Transport,
    to: &Member,
    input: BoxStream<Append>,
    soft_ttl: Duration,
) -> Result<BoxStream<Result<Appended, RpcError>>, CallError> {
    let (queue, requests) = mpsc::channel(1);
    let requests = Box::pin(ReceiverStream::new(requests));
    let mut outgoing = Outgoing { source: Some((input, queue)), unanswered: Unanswered::default() };
    let mut opening = transport.stream(to, StreamMethod::Append, requests);
    let replies = loop {
        tokio::select! {
            biased;
            replies = &mut opening => break replies?,
            () = outgoing.send_next() => {}
        }
    };
    let open = Open { replies, outgoing, patience: soft_ttl.max(PATIENCE) };
    Ok(Box::pin(stream::unfold(Some(open), |open| async move {
        let mut open = open?;
        match open.next().await? {
            Ok(Ok(upto)) => Some((Ok(Ok(upto)), Some(open))),
            last @ (Ok(Err(_)) | Err(_)) => Some((last, None)),
        }
    })))
}

/// Requests on their way to the carrier.
struct Outgoing {
    /// Where they come from and go to, until they end.
    source: Option<(BoxStream<Append>, mpsc::Sender<Bytes>)>,
    unanswered: Unanswered,
}

impl Outgoing {
    /// Hands one request to the carrier. Does not complete while there is none, or no room for its answer.
    async fn send_next(&mut self) {
        let Some((input, queue)) = self.source.as_mut().filter(|_| self.unanswered.has_room())
        else {
            return std::future::pending().await;
        };
        if let Ok(place) = queue.reserve().await
            && let Some(request) = input.next().await
        {
            let message = wire::encode_append(&request);
            self.unanswered.sent(Instant::now(), message.len());
            place.send(message);
            return;
        }
        self.source = None;
    }
}

struct Open {
    replies: BoxStream<Result<Bytes, CallError>>,
    outgoing: Outgoing,
    patience: Duration,
}

impl Open {
    /// The next answer; none when both sides are done.
    async fn next(&mut self) -> Option<Result<Appended, RpcError>> {
        loop {
            let silence = silence(self.outgoing.unanswered.heard, self.patience);
            let reply = tokio::select! {
                biased;
                reply = self.replies.next() => reply?,
                () = self.outgoing.send_next() => continue,
                () = silence => {
                    let patience = self.patience;
                    return Some(Err(network_error(format!("no answer for {patience:?}"))));
                }
            };
            let reply = match reply {
                Ok(reply) => reply,
                Err(error) => return Some(Err(rpc_error(error))),
            };
            let unanswered = &mut self.outgoing.unanswered;
            match wire::decode_append_reply(reply) {
                Ok(AppendReply::Working) => unanswered.working(Instant::now()),
                Ok(AppendReply::Done(appended)) => {
                    unanswered.answered(Instant::now());
                    return Some(Ok(appended));
                }
                Err(error) => return Some(Err(not_understood(error))),
            }
        }
    }
}

/// Completes when a peer that owes an answer has been silent for too long.
async fn silence(heard: Option<Instant>, patience: Duration) {
    match heard {
        Some(heard) => tokio::time::sleep_until(heard + patience).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_for_so_many_requests_and_bytes_and_always_for_one() {
        let now = Instant::now();
        let mut unanswered = Unanswered::default();
        unanswered.sent(now, 10 * UNANSWERED_BYTES_MAX);
        assert!(!unanswered.has_room());
        unanswered.answered(now);
        assert!(unanswered.has_room());
        for _ in 0..UNANSWERED_MAX {
            assert!(unanswered.has_room());
            unanswered.sent(now, 1);
        }
        assert!(!unanswered.has_room());
        unanswered.answered(now);
        assert!(unanswered.has_room());
        assert_eq!(unanswered.bytes, UNANSWERED_MAX - 1);
    }

    #[test]
    fn silence_counts_from_the_last_word_and_only_while_an_answer_is_owed() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut unanswered = Unanswered::default();
        unanswered.working(later(1));
        assert_eq!(unanswered.heard, None);
        unanswered.sent(later(2), 1);
        unanswered.sent(later(3), 1);
        assert_eq!(unanswered.heard, Some(later(2)));
        unanswered.working(later(4));
        assert_eq!(unanswered.heard, Some(later(4)));
        unanswered.answered(later(5));
        assert_eq!(unanswered.heard, Some(later(5)));
        unanswered.answered(later(6));
        assert_eq!(unanswered.heard, None);
    }
}

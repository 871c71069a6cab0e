//! The Watch service: one task a stream carries requests to the hub and messages to the client.
//!
//! # Invariants
//!
//! - While the client does not read, its requests are not read either: what it can make us queue is bounded.
//! - A message is taken from its queue, and history is read, only when there is room for it.
//! - A stream that asked for a leader ends with "no leader" when there has been none for three elections.

use std::future;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::answer::{self, NoMessages};
use super::api::{Api, Call, scan};
use super::budget::{Account, Permit};
use super::error::{EtcdError, store_failed};
use super::gate;
use crate::limits::GRPC_OVERHEAD_BYTES;
use crate::mvcc::{Store, StoreError};
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::watch_server::Watch;
use crate::watch::{Body, Create, Message, WatchError, WatchStream, fragments, response};

/// Messages handed to gRPC before it asks for more. Their bytes are accounted for.
const OUTBOX_MESSAGES: usize = 4;

/// Requests wait while so much is queued for the client.
const BACKLOG_BYTES_MAX: u64 = 256 << 10;

/// Previous versions looked up without leaving the task; more go to the blocking pool.
const INLINE_LOOKUPS_MAX: usize = 8;

/// A message may turn out larger than it was thought to be, by what `prev_kv` adds. It then waits for more room while it has
/// some, so not for long: the stream ends, and the client goes on where it was with another one.
const MORE_ROOM_TIMEOUT: Duration = Duration::from_secs(5);

/// etcd's shortest progress interval.
const PROGRESS_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// See the module documentation.
#[derive(Debug)]
pub(super) struct WatchService(pub(super) Api);

#[tonic::async_trait]
impl Watch for WatchService {
    type WatchStream = NoMessages<pb::WatchResponse>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let api = self.0.clone();
        let needs_leader = gate::needs_leader(request.metadata());
        let (outbox, responses) = mpsc::channel(OUTBOX_MESSAGES);
        let session = Session {
            stream: api.parts().hub.open(api.parts().node.store().clone()),
            store: api.parts().node.store().clone(),
            call: api.call(&request),
            api,
            outbox,
        };
        tokio::spawn(session.run(request.into_inner(), needs_leader));
        Ok(answer::stream(ReceiverStream::new(responses)))
    }
}

/// The next message of a stream, and its room.
pub(super) async fn next_message(
    stream: &WatchStream<Store>,
    caller: &Account,
) -> Result<(Message, Permit), Status> {
    loop {
        let bytes = stream.upcoming().await.map_err(|error| stream_failed(&error))?;
        // Once as it is, once encoded.
        let permit = caller.reserve(2 * bytes, None).await?;
        let message = stream.take().await.map_err(|error| stream_failed(&error))?;
        if let Some(message) = message {
            return Ok((message, permit));
        }
    }
}

struct Session {
    api: Api,
    call: Call,
    store: Store,
    stream: WatchStream<Store>,
    outbox: mpsc::Sender<Result<Bytes, Status>>,
}

impl Session {
    async fn run(self, mut requests: Streaming<pb::WatchRequest>, needs_leader: bool) {
        let result = self.serve(&mut requests, needs_leader).await;
        if let Err(status) = result {
            tracing::debug!(code = ?status.code(), reason = status.message(), "watch stream ended");
            // A client that is gone does not need to hear why.
            drop(self.outbox.send(Err(status)).await);
        }
    }

    /// Until the client ends the stream, goes away, or something fails.
    async fn serve(
        &self,
        requests: &mut Streaming<pb::WatchRequest>,
        needs_leader: bool,
    ) -> Result<(), Status> {
        let mut progress = tokio::time::interval(self.progress_interval());
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        progress.reset();
        let leader_lost = if needs_leader {
            gate::leader_lost(&self.api).boxed()
        } else {
            future::pending().boxed()
        };
        tokio::pin!(leader_lost);
        loop {
            let listen = self.stream.backlog() < BACKLOG_BYTES_MAX;
            tokio::select! {
                message = next_message(&self.stream, &self.call.account) => {
                    let (message, permit) = message?;
                    if !self.send(message, permit).await? {
                        return Ok(());
                    }
                }
                request = requests.message(), if listen => match request? {
                    Some(request) => self.take(request)?,
                    None => return Ok(()),
                },
                _ = progress.tick() => self.stream.tick(),
                () = &mut leader_lost => return Err(EtcdError::NoLeader.into()),
                () = self.outbox.closed() => return Ok(()),
            }
        }
    }

    /// With up to a tenth more at random, so that watchers made together are not told together.
    fn progress_interval(&self) -> Duration {
        let base = self.api.settings().progress_interval.max(PROGRESS_INTERVAL_MIN);
        let permille = self.api.parts().env.entropy.next_u64() % 100;
        base + base * u32::try_from(permille).unwrap_or(0) / 1_000
    }

    fn take(&self, request: pb::WatchRequest) -> Result<(), Status> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => {
                self.stream.create(Create::from_request(&create), self.api.revision()?);
            }
            Some(RequestUnion::CancelRequest(cancel)) => {
                self.stream.cancel(cancel.watch_id, self.api.revision()?);
            }
            Some(RequestUnion::ProgressRequest(_)) => self.stream.request_progress(),
            // As in etcd: a request of a kind from the future is no reason to end the stream.
            None => {}
        }
        Ok(())
    }

    /// `false` when the client is gone.
    async fn send(&self, message: Message, mut permit: Permit) -> Result<bool, Status> {
        let fragment = matches!(&message.body, Body::Events { options, .. } if options.fragment);
        let response = self.response(message).await?;
        let bytes = response.encoded_len() as u64;
        if !permit.grow(bytes) {
            let deadline = self.api.now() + MORE_ROOM_TIMEOUT;
            let more = self.call.account.reserve(bytes, Some(deadline)).await;
            // What the client may take for a lost connection.
            let more = more.map_err(|_| EtcdError::TimedOut)?;
            permit.settle(bytes);
            drop(more);
        }
        let pieces = if fragment {
            let overhead = super::usize_from(GRPC_OVERHEAD_BYTES);
            fragments(response, self.api.settings().request_bytes_max.saturating_add(overhead))
        } else {
            vec![response]
        };
        Ok(self.outbox.send(Ok(answer::frame(pieces, permit))).await.is_ok())
    }

    async fn response(&self, message: Message) -> Result<pb::WatchResponse, Status> {
        let header = self.api.header();
        let result = if lookups(&message) <= INLINE_LOOKUPS_MAX {
            with_previous(&self.store, message, header)
        } else {
            let store = self.store.clone();
            let slot = self.api.scan_slot(&self.call).await?;
            scan(slot, move || with_previous(&store, message, header)).await?
        };
        result.map_err(|error| store_failed(&error))
    }
}

/// How many previous versions a message needs at most.
fn lookups(message: &Message) -> usize {
    match &message.body {
        Body::Events { parts, options } if options.prev_kv => {
            parts.iter().map(|part| part.events().count()).sum()
        }
        Body::Events { .. }
        | Body::Created
        | Body::Refused(_)
        | Body::Canceled
        | Body::Compacted(_)
        | Body::Progress => 0,
    }
}

fn with_previous(
    store: &Store,
    message: Message,
    header: pb::ResponseHeader,
) -> Result<pb::WatchResponse, StoreError> {
    let mut view = None;
    response(message, header, |kv| {
        let view = match &view {
            Some(view) => view,
            None => view.insert(store.read()?),
        };
        view.previous(&kv.key, crate::types::Revision::new(kv.mod_revision))
    })
}

fn stream_failed(error: &WatchError) -> Status {
    match error {
        WatchError::Store(error) => store_failed(error),
        WatchError::Stuck(_) => Status::internal(format!("etcdserver: {error}")),
        WatchError::Stopped => EtcdError::Stopped.into(),
    }
}

//! The whole state, to a follower that lags too far behind for the log.
//!
//! Nothing is prepared and nothing held in memory: the sender reads the store as it is at this moment, chunk by chunk, no
//! faster than [`limits::SNAPSHOT_BYTES_PER_SECOND`], so that heartbeats and writes find the link and the card free. The
//! receiver stores the chunks in a new file beside its own and goes on with that until the new one is complete.
//!
//! # Invariants
//!
//! - Each side holds a few chunks at most.
//! - What is installed was checked to its last record and is durable; a crash at any point leaves the old state or the new one.
//! - A node receives one snapshot at a time.
//! - Whoever hears nothing for [`PATIENCE`] gives up; whoever is busy says every [`SIGN_OF_LIFE`] that it is alive.
//!
//! # Not here
//!
//! What a chunk looks like: `mvcc::dump`. When a follower needs a snapshot: openraft.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use openraft::StorageError;
use openraft::errors::{ReplicationClosed, StreamingError};
use openraft::type_config::TypeConfigExt as _;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::network::{RpcError, not_understood, rpc_error};
use super::promise::Promise;
use super::stats::{Counters, Moving};
use super::transport::{BoxStream, CallError, Refused, StreamMethod, Transport};
use super::types::{self, RaftVote, TypeConfig};
use super::wire::{self, SnapshotHeader, SnapshotReply};
use super::{Member, Node};
use crate::limits;
use crate::mvcc::{DumpStream, ReadTxn, Received, Receiving, Store, StoreError};
use crate::types::NodeId;

pub(super) type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// How long either side waits for the other to say anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the receiver says that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// What openraft hands around as a snapshot.
#[derive(Debug)]
pub enum SnapshotData {
    /// The store at some moment: what a sender reads from.
    Moment(Box<ReadTxn>),
    /// A file that came from another node, whole and durable, not yet in use.
    Received(Received),
}

/// Why a snapshot did not arrive.
pub(super) enum SendError {
    /// The receiver said nothing for so long.
    Silent(Duration),
    /// As openraft puts it.
    Streaming(StreamingError<TypeConfig>),
}

impl From<RpcError> for SendError {
    fn from(error: RpcError) -> Self {
        Self::Streaming(error.into())
    }
}

/// Sends a snapshot, and returns the receiver's vote once it is installed there, or not wanted.
pub(super) async fn send(
    transport: &dyn Transport,
    to: &Member,
    vote: RaftVote,
    snapshot: Snapshot,
    cancel: impl Future<Output = ReplicationClosed>,
    counters: &Arc<Counters>,
) -> Result<RaftVote, SendError> {
    let SnapshotData::Moment(view) = snapshot.snapshot else {
        unreachable!("only the store's own moment is ever sent; what was received is installed")
    };
    // For progress only.
    let records = view.counts().map_or(0, |counts| counts.keys + counts.changes);
    let header = SnapshotHeader { vote, meta: snapshot.meta, records_estimate: records };
    let (failed, failure) = oneshot::channel();
    let requests = Sending {
        header: Some(wire::encode_snapshot_header(&header)),
        units: view.into_stream(),
        free_at: Instant::now(),
        failed: Some(failed),
        moving: counters.sends_snapshot(records),
    };
    tokio::select! {
        biased;
        closed = cancel => Err(SendError::Streaming(closed.into())),
        error = broken(failure) => {
            let source = TypeConfig::err_from_error(&error);
            let error = StorageError::read_snapshot(None, source);
            Err(SendError::Streaming(error.into()))
        }
        done = deliver(transport, to, requests) => done,
    }
}

/// Completes when the store cannot be read.
async fn broken(failure: oneshot::Receiver<StoreError>) -> StoreError {
    match failure.await {
        Ok(error) => error,
        Err(_sent) => std::future::pending().await,
    }
}

async fn deliver(
    transport: &dyn Transport,
    to: &Member,
    requests: Sending,
) -> Result<RaftVote, SendError> {
    let moving = requests.moving.clone();
    let silent = |_elapsed| SendError::Silent(PATIENCE);
    let opened = transport.stream(to, StreamMethod::Snapshot, requests.into_stream());
    let opened = tokio::time::timeout(PATIENCE, opened).await.map_err(silent)?;
    let mut replies = opened.map_err(rpc_error)?;
    loop {
        let reply = tokio::time::timeout(PATIENCE, replies.next()).await.map_err(silent)?;
        let cut = || Err(CallError::Interrupted("the stream ended without an answer".to_owned()));
        let reply = reply.unwrap_or_else(cut).map_err(rpc_error)?;
        match wire::decode_snapshot_reply(reply).map_err(not_understood)? {
            SnapshotReply::Working(_chunks) => {}
            SnapshotReply::Done(vote) => {
                moving.done();
                return Ok(vote);
            }
        }
    }
}

/// A snapshot on its way to the carrier.
struct Sending {
    header: Option<Bytes>,
    units: DumpStream,
    /// When the next unit may go.
    free_at: Instant,
    failed: Option<oneshot::Sender<StoreError>>,
    moving: Moving,
}

impl Sending {
    fn into_stream(self) -> BoxStream<Bytes> {
        Box::pin(stream::unfold(self, |mut sending| async move {
            let message = sending.next().await?;
            Some((message, sending))
        }))
    }

    async fn next(&mut self) -> Option<Bytes> {
        if let Some(header) = self.header.take() {
            return Some(header);
        }
        tokio::time::sleep_until(self.free_at).await;
        match self.units.next_unit() {
            Ok(unit) => {
                let unit = unit?;
                self.moving.moved(unit.len() as u64, self.units.records());
                self.free_at = Instant::now() + time_of(unit.len() as u64);
                Some(unit)
            }
            Err(error) => {
                // The stream ends early, which the receiver notices. The sender tells openraft.
                if let Some(failed) = self.failed.take() {
                    drop(failed.send(error));
                }
                None
            }
        }
    }
}

/// How long so many bytes may take at least.
fn time_of(bytes: u64) -> Duration {
    let micros = bytes.saturating_mul(1_000_000) / limits::SNAPSHOT_BYTES_PER_SECOND;
    Duration::from_micros(micros)
}

/// Makes a file of its own from another store's moment.
pub(super) async fn copy(view: ReadTxn, store: &Store) -> Result<Received, StoreError> {
    let Some(mut receiving) = store.receive()? else {
        return Err(StoreError::Stream("another snapshot is being received".to_owned()));
    };
    let mut units = view.into_stream();
    while let Some(unit) = units.next_unit()? {
        receiving.take(&unit)?;
    }
    receiving.finish().await
}

/// Messages of a stream from another node.
type Requests = BoxStream<Result<Bytes, CallError>>;

/// Receives and installs a snapshot: the answers to its stream.
pub(super) fn answer(
    node: Node,
    from: NodeId,
    requests: Requests,
) -> BoxStream<Result<Bytes, Refused>> {
    let (chunks, stored) = watch::channel(0);
    let work = OwnTask(tokio::spawn(accept(node, from, requests, chunks)));
    Box::pin(stream::unfold(Some((work, stored)), |state| async move {
        let (mut work, stored) = state?;
        tokio::select! {
            biased;
            done = &mut work.0 => {
                let done = match done {
                    Ok(Ok(vote)) => Ok(wire::encode_snapshot_reply(SnapshotReply::Done(vote))),
                    Ok(Err(refused)) => Err(refused),
                    Err(_stopped) => Err(Refused::NotReady("stopping".to_owned())),
                };
                Some((done, None))
            }
            () = tokio::time::sleep(SIGN_OF_LIFE) => {
                let alive = SnapshotReply::Working(*stored.borrow());
                Some((Ok(wire::encode_snapshot_reply(alive)), Some((work, stored))))
            }
        }
    }))
}

/// A task that ends with its owner.
struct OwnTask<T>(JoinHandle<T>);

impl<T> Drop for OwnTask<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn accept(
    node: Node,
    from: NodeId,
    mut requests: Requests,
    stored: watch::Sender<u64>,
) -> Result<RaftVote, Refused> {
    let header = wire::decode_snapshot_header(next(&mut requests).await?)?;
    wire::caller(from, &header.vote)?;
    if let Some(vote) = not_wanted(&node, &header).await? {
        return Ok(vote);
    }
    let receiving = node.store().receive().map_err(|error| not_stored(&error))?;
    let Some(receiving) = receiving else { return Err(Refused::Busy) };
    let moving = node.counters().receives_snapshot(header.records_estimate);
    tracing::info!(%from, records = header.records_estimate, "receiving a snapshot");
    let received = store_all(receiving, &mut requests, &stored, &moving).await?;
    let expected = (header.meta.last_log_id, node.status().cluster);
    let last = received.applied().map(types::raft_log_id);
    if let Some(cluster) = received.cluster_id().filter(|found| *found != expected.1) {
        return Err(Refused::WrongCluster(format!("a snapshot of cluster {cluster}")));
    }
    if last != expected.0 {
        let found = received.applied().map_or_else(|| "nothing".to_owned(), |id| id.to_string());
        return Err(Refused::Malformed(format!("a snapshot up to {found}, not as announced")));
    }
    let promise = Promise { vote: Some(header.vote), upto: last };
    let snapshot = Snapshot { meta: header.meta, snapshot: SnapshotData::Received(received) };
    let done = node.raft().install_full_snapshot(header.vote, snapshot).await;
    let vote = done.map_err(|fatal| Refused::NotReady(fatal.to_string()))?.vote;
    if vote == header.vote {
        node.keep(promise)?;
        moving.done();
        tracing::info!(%from, "snapshot installed");
    }
    Ok(vote)
}

/// This node's vote, if it follows somebody newer or has everything already.
async fn not_wanted(node: &Node, header: &SnapshotHeader) -> Result<Option<RaftVote>, Refused> {
    let now =
        node.raft().with_raft_state(|state| (*state.vote_ref(), state.local_committed().copied()));
    let (vote, committed) = now.await.map_err(|fatal| Refused::NotReady(fatal.to_string()))?;
    if header.vote.leader_id < vote.leader_id {
        return Ok(Some(vote));
    }
    let has_it = header.meta.last_log_id <= committed;
    if has_it {
        // What is committed may still be on its way to this node's card, and the answer says that it is there.
        let _durable =
            node.wal().flush().await.map_err(|failed| Refused::NotReady(failed.to_string()))?;
        node.keep(Promise { vote: None, upto: header.meta.last_log_id })?;
    }
    Ok(has_it.then_some(header.vote))
}

async fn store_all(
    mut receiving: Receiving,
    requests: &mut Requests,
    stored: &watch::Sender<u64>,
    moving: &Moving,
) -> Result<Received, Refused> {
    while !receiving.has_ended() {
        let unit = next(requests).await?;
        receiving.take(&unit).map_err(|error| not_stored(&error))?;
        stored.send_modify(|chunks| *chunks += 1);
        moving.moved(unit.len() as u64, receiving.records());
        // Other tasks of this thread have their turn between two chunks.
        tokio::task::yield_now().await;
    }
    receiving.finish().await.map_err(|error| not_stored(&error))
}

async fn next(requests: &mut Requests) -> Result<Bytes, Refused> {
    match tokio::time::timeout(PATIENCE, requests.next()).await {
        Ok(Some(Ok(message))) => Ok(message),
        Ok(Some(Err(error))) => Err(Refused::Malformed(format!("cut off: {error}"))),
        Ok(None) => Err(Refused::Malformed("cut off".to_owned())),
        Err(_elapsed) => Err(Refused::Malformed(format!("nothing for {PATIENCE:?}"))),
    }
}

fn not_stored(error: &StoreError) -> Refused {
    tracing::warn!(%error, "a snapshot was not received");
    if let StoreError::Stream(what) = error {
        Refused::Malformed(what.clone())
    } else {
        Refused::NotReady(error.to_string())
    }
}

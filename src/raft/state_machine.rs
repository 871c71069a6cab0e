//! Feeds committed entries to [`crate::apply`] in batches, and tells everybody what came of it.
//!
//! One store transaction per batch: what openraft hands over at once becomes visible at once. Replies go out
//! only after the commit, so that whoever got an answer can read it.
//!
//! # Not here
//!
//! What a command means: `apply`. When the store becomes durable: `checkpoint`.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use futures_util::{Stream, StreamExt};
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use openraft::{OptionalSend, RaftSnapshotBuilder};
use prost::Message;
use tokio::sync::mpsc;

use super::checkpoint::CheckpointMark;
use super::snapshot::{self, Snapshot, SnapshotData};
use super::stats::Counters;
use super::types::{
    self, Entry, Payload, RaftLogId, Reply, SnapshotMeta, StoredMembership, TypeConfig,
};
use super::{AppliedBatch, Follow};
use crate::announce;
use crate::apply::{self, Applied, Operations};
use crate::command::Command;
use crate::events::{EventId, fields};
use crate::mutants::{Mutant, is_planted};
use crate::mvcc::{ReadTxn, Store, StoreError, WriteTxn};
use crate::proto::node as wire;
use crate::types::LogId;
use crate::wal::Wal;

/// Entries per store transaction: enough to share its cost, few enough that replies are not held back.
const BATCH_ENTRIES_MAX: usize = 512;
/// And bytes: what a transaction holds in memory.
const BATCH_BYTES_MAX: usize = 2 << 20;

/// What the checkpointer wants to know of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct AppliedNote {
    /// A compaction was among the entries.
    pub compaction: bool,
}

/// See the module documentation.
pub struct StateMachine {
    store: Store,
    wal: Wal,
    checkpoint: Arc<CheckpointMark>,
    followers: Vec<Arc<dyn Follow>>,
    notes: mpsc::UnboundedSender<AppliedNote>,
    counters: Arc<Counters>,
}

/// One committed entry, and whoever waits for it.
type Committed = EntryResponder<TypeConfig>;

/// What applying a batch came to.
#[derive(Default)]
struct Done {
    summary: AppliedBatch,
    compaction: bool,
    /// What the cluster knows of itself may have changed.
    cluster: bool,
    operations: Operations,
    replies: Vec<(ApplyResponder<TypeConfig>, Reply)>,
}

impl StateMachine {
    pub(super) fn new(
        store: Store,
        wal: Wal,
        checkpoint: Arc<CheckpointMark>,
        followers: Vec<Arc<dyn Follow>>,
        notes: mpsc::UnboundedSender<AppliedNote>,
        counters: Arc<Counters>,
    ) -> Self {
        Self { store, wal, checkpoint, followers, notes, counters }
    }

    /// Rewrites the store's file. Runs where entries are applied, so that none is applied meanwhile.
    pub(super) fn defragment(
        &self,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + 'static {
        let store = self.store.clone();
        async move { store.defragment().await.map(drop) }
    }

    /// Takes notice of the cluster's format: from here on it is what this node writes.
    fn note_format(&self) -> Result<(), StoreError> {
        let found = apply::format(&self.store.read()?)?;
        if self.counters.format.swap(found.format, Relaxed) < found.format {
            announce!(
                EventId::FormatRaised,
                { fields::COUNT } = found.format,
                "every server runs release {} or one that reads as much: data is written in format {} from now on",
                found.release,
                found.format
            );
        }
        Ok(())
    }

    /// Commits, then shows the batch to followers, then answers.
    fn apply_batch(&self, batch: Vec<Committed>) -> Result<(), StoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        let (start, entries) = (self.counters.now(), batch.len() as u64);
        let done = self.store.write(|txn| {
            let mut done = Done::default();
            for (entry, responder) in batch {
                let reply = done.apply(txn, entry)?;
                done.replies.extend(responder.map(|responder| (responder, reply)));
            }
            Ok(done)
        })?;
        if done.cluster {
            self.note_format()?;
        }
        for follower in &self.followers {
            follower.applied(&done.summary);
        }
        self.counters.count(done.operations);
        self.counters.applied(start, done.summary.applied.index, entries);
        for (responder, reply) in done.replies {
            responder.send(reply);
        }
        // The checkpointer has gone only when the node is stopping.
        let _gone = self.notes.send(AppliedNote { compaction: done.compaction });
        Ok(())
    }
}

impl Done {
    fn apply(&mut self, txn: &mut WriteTxn<'_>, entry: Entry) -> Result<Reply, StoreError> {
        let id = types::log_id(&entry.log_id);
        self.summary.applied = id;
        match entry.payload {
            Payload::Blank => {
                txn.set_applied(id);
                Ok(Reply(None))
            }
            Payload::Membership(membership) => {
                let stored = wire::StoredMembership {
                    log_id: Some(types::wire_log_id(id)),
                    membership: Some(types::wire_membership(&membership)),
                };
                txn.set_membership(&stored.encode_to_vec())?;
                txn.set_applied(id);
                Ok(Reply(None))
            }
            Payload::Normal(encoded) => {
                let command = encoded
                    .decode()
                    .map_err(|error| StoreError::Entry { id, what: error.to_string() })?;
                self.compaction |= matches!(command, Command::Compact(_));
                self.cluster |= matches!(command, Command::Cluster(_));
                let applied = apply::apply(txn, id, &command)?;
                Ok(self.note(applied))
            }
        }
    }

    fn note(&mut self, applied: Applied) -> Reply {
        self.summary.revision = applied.outcome.revision;
        if let Ok(reply) = &applied.outcome.reply {
            self.operations += Operations::of(reply);
        }
        self.summary.leases.extend(applied.leases);
        self.summary.events.extend(applied.events.map(Arc::new));
        Reply(Some(applied.outcome))
    }
}

fn bytes_of(entry: &Entry) -> usize {
    match &entry.payload {
        Payload::Normal(command) => command.bytes().len(),
        Payload::Blank | Payload::Membership(_) => 0,
    }
}

/// Reads the membership that the store remembers.
pub(super) fn stored_membership(view: &ReadTxn) -> io::Result<StoredMembership> {
    let Some(bytes) = view.membership().map_err(io::Error::other)? else {
        return Ok(StoredMembership::default());
    };
    let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
    let stored =
        wire::StoredMembership::decode(bytes).map_err(|error| invalid(error.to_string()))?;
    let membership =
        types::membership_from_wire(stored.membership.unwrap_or_default()).map_err(invalid)?;
    let log_id = stored.log_id.as_ref().map(|id| types::raft_log_id(types::log_id_from_wire(id)));
    Ok(StoredMembership::new(log_id, membership))
}

/// The store at this moment, as openraft's snapshot: nothing is copied until somebody reads it.
fn snapshot_of(view: ReadTxn) -> io::Result<Snapshot> {
    let meta = SnapshotMeta {
        last_log_id: view.applied().map(types::raft_log_id),
        last_membership: stored_membership(&view)?,
    };
    Ok(Snapshot { meta, snapshot: SnapshotData::Moment(Box::new(view)) })
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Checkpointed;

    async fn applied_state(&mut self) -> Result<(Option<RaftLogId>, StoredMembership), io::Error> {
        let view = self.store.read().map_err(io::Error::other)?;
        let applied = view.applied().filter(|_| !is_planted(Mutant::AppliedTwice));
        Ok((applied.map(types::raft_log_id), stored_membership(&view)?))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            bytes += bytes_of(&entry);
            batch.push((entry, responder));
            if BATCH_ENTRIES_MAX <= batch.len() || BATCH_BYTES_MAX <= bytes {
                self.apply_batch(std::mem::take(&mut batch)).map_err(io::Error::other)?;
                bytes = 0;
            }
        }
        self.apply_batch(batch).map_err(io::Error::other)
    }

    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<Checkpointed> {
        Some(Checkpointed { store: self.store.clone(), durable: self.checkpoint.durable() })
    }

    async fn get_snapshot_builder(&mut self) -> Checkpointed {
        Checkpointed { store: self.store.clone(), durable: self.checkpoint.durable() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let received = match snapshot {
            SnapshotData::Received(received) => received,
            SnapshotData::Moment(view) => {
                snapshot::copy(*view, &self.store).await.map_err(io::Error::other)?
            }
        };
        // Entries that the snapshot contradicts were cut off the log before this call. That must survive if the new
        // state does: they would stand behind a state that never had them.
        let _durable = self.wal.flush().await.map_err(io::Error::other)?;
        self.store.adopt(received).await.map_err(io::Error::other)?;
        if is_planted(Mutant::SnapshotWithoutMembership) {
            self.store.write(|txn| txn.set_membership(&[])).map_err(io::Error::other)?;
        }
        if let Some(last) = &meta.last_log_id {
            self.checkpoint.raise(types::log_id(last));
            self.counters.applied.send_replace(types::log_id(last).index);
        }
        self.note_format().map_err(io::Error::other)?;
        let revision = self.store.read().map_err(io::Error::other)?.revision();
        for follower in &self.followers {
            follower.restored(revision);
        }
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let view = self.store.read().map_err(io::Error::other)?;
        if view.applied().is_none() {
            return Ok(None);
        }
        snapshot_of(view).map(Some)
    }
}

/// Tells openraft how far the log may be purged: up to the last durable checkpoint. Builds nothing, because
/// the store's file is the snapshot.
#[derive(Debug)]
pub struct Checkpointed {
    store: Store,
    durable: Option<LogId>,
}

impl RaftSnapshotBuilder<TypeConfig> for Checkpointed {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let view = self.store.read().map_err(io::Error::other)?;
        let mut snapshot = snapshot_of(view)?;
        // The view may be ahead of what is durable; purging must not be.
        let durable = self.durable.map(types::raft_log_id);
        snapshot.meta.last_log_id = snapshot.meta.last_log_id.min(durable);
        Ok(snapshot)
    }
}

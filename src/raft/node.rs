//! A running Raft participant: openraft, the log and the store put together.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{ReadPolicy, ServerState, SnapshotPolicy};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::checkpoint::{self, CheckpointMark, Schedule};
use super::log_store::LogStore;
use super::network::Peers;
use super::state_machine::{AppliedNote, StateMachine};
use super::stats::{Counters, Stats};
use super::types::{self, Raft, TypeConfig, Waiter};
use super::{Follow, Member, ProposeError, ReadBarrier, ReadError, Role, Status};
use crate::announce;
use crate::apply::{Operations, Outcome};
use crate::command::{Command, Encoded};
use crate::env::Env;
use crate::events::{EventId, fields};
use crate::limits;
use crate::mvcc::{Store, StoreError};
use crate::types::{ByteCount, ClusterId, LogIndex, NodeId, Term};
use crate::wal::Wal;

/// Timing of the consensus. The defaults tolerate a card that stalls for seconds.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How often the leader says that it is there.
    pub heartbeat: Duration,
    /// Shortest silence after which a follower stands for election.
    pub election_min: Duration,
    /// Longest such silence.
    pub election_max: Duration,
    /// When the store is made durable.
    pub checkpoint: checkpoint::Policy,
}

/// What a node is made of.
#[allow(missing_debug_implementations, reason = "holds trait objects")]
pub struct Parts {
    /// The world.
    pub env: Env,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Itself, as its peers shall know it.
    pub member: Member,
    /// The log, open.
    pub wal: Wal,
    /// The state machine's store, open.
    pub store: Store,
    /// Who follows the store.
    pub followers: Vec<Arc<dyn Follow>>,
}

/// Why a node did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// Timing that contradicts itself.
    #[error("raft timing: {0}")]
    Timing(String),
    /// The log or the store could not be read, or contradict each other.
    #[error("raft storage: {0}")]
    Storage(String),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// See the module documentation.
#[derive(Clone)]
pub struct Node {
    shared: Arc<Shared>,
}

struct Shared {
    raft: Raft,
    wal: Wal,
    store: Store,
    env: Env,
    id: NodeId,
    status: watch::Receiver<Status>,
    /// Set when the node cannot go on; says why.
    failure: watch::Receiver<Option<String>>,
    counters: Arc<Counters>,
    mark: Arc<CheckpointMark>,
    checkpoint_requests: mpsc::UnboundedSender<CheckpointRequest>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

/// Somebody wants a checkpoint now, and to be told when it is durable.
struct CheckpointRequest(oneshot::Sender<Result<(), StoreError>>);

/// openraft's parameters that are not ours to choose at run time.
fn raft_config(cluster: ClusterId, options: &Options) -> Result<openraft::Config, StartError> {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let election_max = millis(options.election_max);
    openraft::Config {
        cluster_name: cluster.to_string(),
        heartbeat_interval: millis(options.heartbeat),
        election_timeout_min: millis(options.election_min),
        election_timeout_max: election_max,
        // A leader that restarts must be elected anew. With openraft's default it resumes in the same term and
        // gives the log ids of entries it lost before its own flush to other commands: two members then hold
        // different commands under one log id, for ever.
        enable_leader_restore: Some(false),
        // A node that was cut off must not depose a healthy leader when it comes back.
        enable_pre_vote: Some(true),
        // Followers get an entry before the leader's own card has it.
        broadcast_submitted_on_append: Some(true),
        // A majority that can talk to each other gets a leader even if the old one still reaches some of it.
        quorum_loss_probe_interval: Some(election_max.saturating_mul(3)),
        allow_log_reversion: Some(false),
        // Checkpoints are ours to time; the log is purged by bytes, not by entries.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        max_payload_entries: 128,
        // openraft's default channels hold 65,536 messages each: memory a Pi does not have.
        api_channel_size: Some(4096),
        notification_channel_size: Some(4096),
        state_machine_channel_size: Some(1024),
        ..openraft::Config::default()
    }
    .validate()
    .map_err(|error| StartError::Timing(error.to_string()))
}

impl Node {
    /// Starts taking part. Replays the log into the store before it returns.
    pub async fn start(parts: Parts, options: &Options) -> Result<Self, StartError> {
        let Parts { env, cluster, member, wal, store, followers } = parts;
        let id = member.id;
        let config = Arc::new(raft_config(cluster, options)?);
        let mark = Arc::new(CheckpointMark::new(store.read()?.applied()));
        let replay_end = wal.hard_state().last.map_or(LogIndex::new(0), |last| last.index.next());
        let clock = Arc::clone(&env.clock);
        let counters = Arc::new(Counters::new(clock, options.election_min, replay_end));
        let (notes, applied_notes) = mpsc::unbounded_channel();
        let log_store = LogStore::new(wal.clone(), Arc::clone(&mark));
        let machine = StateMachine::new(
            store.clone(),
            Arc::clone(&mark),
            followers,
            notes,
            Arc::clone(&counters),
        );
        let raft = Raft::new(id.get(), config, Peers, log_store, machine)
            .await
            .map_err(|error| StartError::Storage(error.to_string()))?;

        let (status, failure, follow) = follow_metrics(&raft, cluster, id, &counters);
        let (checkpoint_requests, requests) = mpsc::unbounded_channel();
        let checkpointer = Checkpointer {
            schedule: Schedule::new(options.checkpoint, env.clock.now(), bytes_written(&wal)),
            env: env.clone(),
            raft: raft.clone(),
            wal: wal.clone(),
            store: store.clone(),
            mark: Arc::clone(&mark),
            counters: Arc::clone(&counters),
        };
        let checkpoints = tokio::spawn(checkpointer.run(applied_notes, requests));
        let tasks = vec![follow, checkpoints];
        let shared = Shared {
            raft,
            wal,
            store,
            env,
            id,
            status,
            failure,
            counters,
            mark,
            checkpoint_requests,
            tasks,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes this node the only voter of a new cluster, if that has not happened yet, and has it elected.
    ///
    /// Safe to repeat after a crash at any point: a node whose first membership is already in its log skips
    /// straight to the election.
    pub async fn found(&self, member: &Member) -> Result<(), StartError> {
        let raft = &self.shared.raft;
        let storage = |error: String| StartError::Storage(error);
        if !raft.is_initialized().await.map_err(|error| storage(error.to_string()))? {
            let members = BTreeMap::from([(member.id.get(), types::Contact::of(member))]);
            raft.initialize(members).await.map_err(|error| storage(error.to_string()))?;
        }
        Ok(())
    }

    /// Stands for election at once if this node is the only voter: nobody else could be asked.
    pub async fn elect_if_alone(&self) -> Result<(), StartError> {
        let raft = &self.shared.raft;
        let alone = raft.voter_ids().all(|voter| voter == self.shared.id.get());
        if alone && !raft.is_leader() {
            raft.trigger()
                .elect(false)
                .await
                .map_err(|error| StartError::Storage(error.to_string()))?;
        }
        Ok(())
    }

    /// Replicates a command and returns what applying it answered.
    ///
    /// Waits out the absence of a leader until the deadline, because a proposal that never entered the log is
    /// safe to offer again. One that did is never offered twice.
    pub async fn propose(
        &self,
        command: Command,
        deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        let _pending = self.shared.counters.proposal();
        let result = self.propose_by(command, deadline).await;
        self.shared.counters.proposed(&result);
        result
    }

    async fn propose_by(
        &self,
        command: Command,
        deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        let status = self.shared.status.borrow().clone();
        let backlog = status.committed.get().saturating_sub(status.applied.get());
        if limits::APPLY_BACKLOG_MAX < backlog {
            return Err(ProposeError::TooManyRequests);
        }
        let encoded = command.encode();
        let mut submitted = false;
        let attempts = self.propose_until_accepted(encoded, &mut submitted);
        match tokio::time::timeout_at(deadline.into(), attempts).await {
            Ok(result) => result,
            Err(_elapsed) if submitted => Err(ProposeError::TimedOut),
            Err(_elapsed) => Err(ProposeError::NoLeader),
        }
    }

    async fn propose_until_accepted(
        &self,
        encoded: Encoded,
        submitted: &mut bool,
    ) -> Result<Outcome, ProposeError> {
        let mut status = self.shared.status.clone();
        loop {
            let (waiter, answer) = oneshot::channel();
            *submitted = true;
            self.shared
                .raft
                .client_write_ff(encoded.clone(), Some(Waiter(waiter)))
                .await
                .map_err(|_fatal| ProposeError::Stopped)?;
            match answer.await {
                Ok(Ok(written)) => return written.data.0.ok_or(ProposeError::Stopped),
                Ok(Err(ClientWriteError::LogEntryDiscarded(_))) => {
                    return Err(ProposeError::LeaderChanged);
                }
                Ok(Err(ClientWriteError::ForwardToLeader(_))) => {
                    *submitted = false;
                    status.changed().await.map_err(|_closed| ProposeError::Stopped)?;
                }
                Ok(Err(
                    ClientWriteError::ChangeMembershipError(_)
                    | ClientWriteError::PreconditionFailed(_),
                ))
                | Err(_) => {
                    return Err(ProposeError::Stopped);
                }
            }
        }
    }

    /// Confirms with a majority that everything acknowledged before this call is in the local store.
    pub async fn read_barrier(&self, deadline: Instant) -> Result<ReadBarrier, ReadError> {
        let start = self.shared.counters.now();
        let result = self.confirm_by(deadline).await;
        self.shared.counters.confirmed(start, &result);
        result
    }

    async fn confirm_by(&self, deadline: Instant) -> Result<ReadBarrier, ReadError> {
        let confirm = async {
            let mut status = self.shared.status.clone();
            loop {
                match self.shared.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
                    Ok(_) => return Ok(ReadBarrier(())),
                    Err(RaftError::APIError(
                        LinearizableReadError::ForwardToLeader(_)
                        | LinearizableReadError::QuorumNotEnough(_),
                    )) => {
                        status.changed().await.map_err(|_closed| ReadError::Stopped)?;
                    }
                    Err(RaftError::Fatal(_)) => return Err(ReadError::Stopped),
                }
            }
        };
        match tokio::time::timeout_at(deadline.into(), confirm).await {
            Ok(result) => result,
            Err(_elapsed) if self.status().leader.is_none() => Err(ReadError::NoLeader),
            Err(_elapsed) => Err(ReadError::TimedOut),
        }
    }

    /// The local store.
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    pub(super) fn raft(&self) -> &Raft {
        &self.shared.raft
    }

    /// Whether this node's card has room for deletes and compaction only.
    pub fn is_short_of_room(&self) -> bool {
        self.shared.store.is_short_of_room() || self.shared.wal.is_starved()
    }

    /// The log.
    pub fn wal(&self) -> &Wal {
        &self.shared.wal
    }

    /// The node's state now.
    pub fn status(&self) -> Status {
        self.shared.status.borrow().clone()
    }

    /// What the node did since it started.
    pub fn stats(&self) -> Stats {
        let checkpoint = self.shared.mark.durable().map_or(LogIndex::new(0), |id| id.index);
        self.shared.counters.snapshot(checkpoint)
    }

    /// Counts operations that were served from the store, without an entry; for [`Node::stats`].
    pub fn count(&self, done: Operations) {
        self.shared.counters.count(done);
    }

    /// The node's state, and every change of it.
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.shared.status.clone()
    }

    /// Becomes `Some(reason)` when the node cannot go on. Nothing is acknowledged from then on.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.shared.failure.clone()
    }

    /// Hands leadership to another voter, and returns when it leads.
    pub async fn transfer_leader(&self, to: NodeId, deadline: Instant) -> Result<(), ProposeError> {
        let transfer = async {
            self.shared
                .raft
                .trigger()
                .transfer_leader(to.get())
                .await
                .map_err(|_fatal| ProposeError::Stopped)?;
            let mut status = self.shared.status.clone();
            status
                .wait_for(|status| status.leader == Some(to))
                .await
                .map_err(|_closed| ProposeError::Stopped)?;
            Ok(())
        };
        match tokio::time::timeout_at(deadline.into(), transfer).await {
            Ok(result) => result,
            Err(_elapsed) => Err(ProposeError::TimedOut),
        }
    }

    /// Makes the store durable now, and returns when it is.
    pub async fn checkpoint(&self) -> Result<(), StoreError> {
        let (done, durable) = oneshot::channel();
        if self.shared.checkpoint_requests.send(CheckpointRequest(done)).is_err() {
            return Err(StoreError::Stopping);
        }
        durable.await.unwrap_or(Err(StoreError::Stopping))
    }

    /// Leaves: checkpoint, stop openraft, close the log. The last act of a node.
    pub async fn stop(&self) -> Result<(), StopError> {
        self.checkpoint().await?;
        self.shared.raft.shutdown().await.map_err(|error| StopError::Raft(error.to_string()))?;
        self.shared.wal.close().await.map_err(|error| StopError::Log(error.to_string()))?;
        Ok(())
    }

    /// Whether Raft's own loop answers. The watchdog hangs on it.
    pub async fn is_alive(&self) -> bool {
        self.shared.raft.with_raft_state(|_| ()).await.is_ok()
    }

    /// Rewrites the store's file without its free pages. Applying waits; readers and the log go on.
    pub async fn defragment(&self) -> Result<(), StoreError> {
        if self.shared.wal.flush().await.is_err() {
            return Err(StoreError::Stopping);
        }
        let done = self.shared.raft.with_state_machine(|machine| Box::pin(machine.defragment()));
        done.await.unwrap_or(Err(StoreError::Stopping))
    }

    /// The environment the node runs in.
    pub fn env(&self) -> &Env {
        &self.shared.env
    }
}

/// Why a node did not stop cleanly. Nothing acknowledged is lost; the next start replays more.
#[derive(Debug, Error)]
pub enum StopError {
    /// The last checkpoint failed.
    #[error("last checkpoint: {0}")]
    Store(#[from] StoreError),
    /// openraft's task ended badly.
    #[error("raft: {0}")]
    Raft(String),
    /// The log's last frame could not be written.
    #[error("log: {0}")]
    Log(String),
}

/// Translates openraft's metrics into [`Status`], and notices when it died.
#[allow(clippy::type_complexity, reason = "two receivers and their task")]
fn follow_metrics(
    raft: &Raft,
    cluster: ClusterId,
    id: NodeId,
    counters: &Arc<Counters>,
) -> (watch::Receiver<Status>, watch::Receiver<Option<String>>, JoinHandle<()>) {
    let mut metrics = raft.metrics();
    let counters = Arc::clone(counters);
    let (status_tx, status) = watch::channel(status_of(&metrics.borrow_watched(), cluster, id));
    let (failure_tx, failure) = watch::channel(None);
    let task = tokio::spawn(async move {
        while metrics.changed().await.is_ok() {
            let (next, fatal) = {
                let now = metrics.borrow_and_update();
                (status_of(&now, cluster, id), now.running_state.as_ref().err().map(reason))
            };
            status_tx.send_if_modified(|status| {
                let changed = *status != next;
                if next.leader.is_some() && next.leader != status.leader {
                    counters.leader_changes.fetch_add(1, Relaxed);
                }
                *status = next;
                changed
            });
            if let Some(reason) = fatal {
                failure_tx.send_replace(Some(reason));
            }
        }
    });
    (status, failure, task)
}

fn reason(fatal: &openraft::errors::Fatal<TypeConfig>) -> String {
    fatal.to_string()
}

fn status_of(
    metrics: &openraft::RaftMetrics<TypeConfig>,
    cluster: ClusterId,
    id: NodeId,
) -> Status {
    let role = match metrics.state {
        ServerState::Leader => Role::Leader,
        ServerState::Candidate => Role::Candidate,
        // What openraft says of every node before it has looked into its log.
        ServerState::Learner if metrics.membership_config.voter_ids().next().is_none() => {
            Role::Follower
        }
        ServerState::Learner => Role::Learner,
        ServerState::Follower | ServerState::Shutdown => Role::Follower,
    };
    let index = |id: &Option<types::RaftLogId>| {
        LogIndex::new(id.as_ref().map_or(0, openraft::LogId::index))
    };
    Status {
        cluster,
        node: id,
        role,
        term: Term::new(metrics.current_term),
        leader: metrics.current_leader.map(NodeId::new),
        last_index: LogIndex::new(metrics.last_log_index.unwrap_or(0)),
        committed: index(&metrics.local_committed),
        applied: index(&metrics.last_applied),
        members: types::members(metrics.membership_config.membership()),
    }
}

/// Carries out what [`Schedule`] decides.
struct Checkpointer {
    schedule: Schedule,
    env: Env,
    raft: Raft,
    wal: Wal,
    store: Store,
    mark: Arc<CheckpointMark>,
    counters: Arc<Counters>,
}

/// Newest segments that stay although a checkpoint covers them, so that a follower that lags needs no snapshot.
const KEPT_SEGMENTS: usize = limits::WAL_SLOTS_MIN;

fn bytes_written(wal: &Wal) -> ByteCount {
    ByteCount::new(wal.bytes_written())
}

/// How often time alone may make a checkpoint due.
const CHECKPOINT_TICK: Duration = Duration::from_secs(1);

impl Checkpointer {
    async fn run(
        mut self,
        mut applied: mpsc::UnboundedReceiver<AppliedNote>,
        mut requests: mpsc::UnboundedReceiver<CheckpointRequest>,
    ) {
        loop {
            tokio::select! {
                biased;
                request = requests.recv() => {
                    let Some(CheckpointRequest(done)) = request else { return };
                    let result = self.checkpoint().await;
                    drop(done.send(result));
                }
                note = applied.recv() => {
                    let Some(note) = note else { return };
                    self.schedule.applied(note.compaction);
                }
                () = self.env.clock.sleep(CHECKPOINT_TICK) => {}
            }
            if self.schedule.due(self.env.clock.now(), bytes_written(&self.wal))
                && let Err(error) = self.checkpoint().await
            {
                // The store's own failure channel stops the node; the log stays and replays.
                announce!(
                    EventId::CheckpointFailed,
                    { fields::REASON } = %error,
                    "checkpoint failed: {error}"
                );
            }
        }
    }

    async fn checkpoint(&mut self) -> Result<(), StoreError> {
        let result = self.make_durable().await;
        if result.is_err() {
            self.counters.checkpoints_failed.fetch_add(1, Relaxed);
        }
        result
    }

    async fn make_durable(&mut self) -> Result<(), StoreError> {
        self.schedule.started(self.env.clock.now(), bytes_written(&self.wal));
        // Applied may be ahead of locally durable: the log first, then the store.
        if self.wal.flush().await.is_err() {
            return Err(StoreError::Stopping);
        }
        let start = self.counters.now();
        let checkpoint = self.store.checkpoint()?;
        let Some(applied) = checkpoint.applied() else { return Ok(()) };
        checkpoint.durable().await?;
        self.counters.checkpointed(start);
        self.mark.raise(applied);
        self.purge().await;
        Ok(())
    }

    /// Lets the log forget what the checkpoint covers, but keeps some for followers that lag.
    async fn purge(&self) {
        let kept = self.wal.first_index_in_newest(KEPT_SEGMENTS);
        let (Some(durable), Some(kept)) = (self.mark.durable(), kept) else { return };
        let upto = durable.index.get().min(kept.get().saturating_sub(1));
        let trigger = self.raft.trigger();
        if trigger.snapshot().await.is_ok() {
            // A stopping node purges after its next start.
            drop(trigger.purge_log(upto).await);
        }
    }
}

//! A running Raft participant: openraft, the log and the store put together.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use openraft::{ServerState, SnapshotPolicy};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::checkpoint::{self, CheckpointMark, Schedule};
use super::lead;
use super::log_store::LogStore;
use super::network::Peers;
use super::promise::{self, Promise};
use super::read::{self, Reader};
use super::state_machine::{AppliedNote, StateMachine};
use super::stats::{Counters, Stats};
use super::transport::{Refused, Transport};
use super::types::{self, Raft, StoredMembership, TypeConfig};
use super::{Follow, Member, Role, Status};
use crate::announce;
use crate::apply::{self, Operations};
use crate::env::Env;
use crate::events::{EventId, fields};
use crate::limits;
use crate::mutants::{Mutant, is_planted};
use crate::mvcc::{Store, StoreError};
use crate::types::{ByteCount, ClusterId, LogIndex, NodeId, Term};
use crate::wal::Wal;

/// Timing of the consensus. The defaults tolerate a card that stalls for seconds.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How often the leader says that it is there.
    pub heartbeat: Duration,
    /// A follower stands for election after a silence of `election_max` and a time by chance between both: openraft gives a
    /// leader a lease of `election_max` first.
    pub election_min: Duration,
    /// See above. So a leader that died is replaced within twice this, and the time a vote takes.
    pub election_max: Duration,
    /// A learner that has not answered for so long is given up: [`limits::LEARNER_SILENT_MAX`], unless a test cannot wait.
    pub learner_silent_max: Duration,
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
    /// The way to other nodes.
    pub transport: Arc<dyn Transport>,
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

pub(super) struct Shared {
    raft: Raft,
    wal: Wal,
    store: Store,
    env: Env,
    id: NodeId,
    status: watch::Receiver<Status>,
    /// Whom it follows: a part of `status`, for those who wait for nothing else.
    leader: watch::Receiver<Option<NodeId>>,
    /// Set when the node cannot go on; says why.
    failure: watch::Receiver<Option<String>>,
    fail: Arc<watch::Sender<Option<String>>>,
    counters: Arc<Counters>,
    mark: Arc<CheckpointMark>,
    transport: Arc<dyn Transport>,
    checkpoint_requests: mpsc::UnboundedSender<CheckpointRequest>,
    reads: mpsc::Sender<read::Request>,
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
        enable_leader_restore: Some(is_planted(Mutant::LeaderRestored)),
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
        let Parts { env, cluster, member, wal, store, followers, transport } = parts;
        let id = member.id;
        let config = Arc::new(raft_config(cluster, options)?);
        let applied = store.read()?.applied();
        let mark = Arc::new(CheckpointMark::new(applied));
        let replay_end = wal.hard_state().last.map_or(LogIndex::new(0), |last| last.index.next());
        let clock = Arc::clone(&env.clock);
        let counters = Arc::new(Counters::new(clock, options.election_min, replay_end));
        counters.format.store(apply::format(&store.read()?)?.format, Relaxed);
        counters.applied.send_replace(applied.map_or(LogIndex::new(0), |id| id.index));
        let (notes, applied_notes) = mpsc::unbounded_channel();
        let log_store = LogStore::new(wal.clone(), Arc::clone(&mark));
        let machine = StateMachine::new(
            store.clone(),
            wal.clone(),
            Arc::clone(&mark),
            followers,
            notes,
            Arc::clone(&counters),
        );
        let peers = Peers::new(Arc::clone(&transport), id, Arc::clone(&counters));
        let raft = Raft::new(id.get(), config, peers, log_store, machine)
            .await
            .map_err(|error| StartError::Storage(error.to_string()))?;

        let (fail, failure) = watch::channel(None);
        let fail = Arc::new(fail);
        let (followed, follow) = follow_metrics(&raft, cluster, id, &counters, Arc::clone(&fail));
        let Followed { status, leader } = followed;
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
        let (reads, requests) = mpsc::channel(read::WAITING_MAX);
        let reader = Reader { raft: raft.clone(), transport: Arc::clone(&transport), id, requests };
        let tasks = vec![follow, checkpoints, tokio::spawn(reader.run())];
        let shared = Shared {
            raft,
            wal,
            store,
            env,
            id,
            status,
            leader,
            failure,
            fail,
            counters,
            mark,
            transport,
            checkpoint_requests,
            reads,
            tasks,
        };
        let shared = Arc::new(shared);
        let clock = Arc::clone(&shared.env.clock);
        tokio::spawn(lead::run(Arc::downgrade(&shared), clock, options.learner_silent_max));
        Ok(Self { shared })
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

    /// The local store.
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    pub(super) fn raft(&self) -> &Raft {
        &self.shared.raft
    }

    pub(super) const fn of(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(super) fn reads(&self) -> &mpsc::Sender<read::Request> {
        &self.shared.reads
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.shared.counters
    }

    /// Looks whether a power cut now would break a promise that is about to leave. If so the node stops, and nothing leaves.
    pub(super) fn keep(&self, promise: Promise) -> Result<(), Refused> {
        let (log, state) = (self.shared.wal.durable(), self.shared.mark.durable());
        if let Some(breach) = promise::breach(promise, &log, state) {
            let reason = format!("persist before reply: {breach}");
            tracing::error!(%reason, "the node would have promised what is not durable, and stops");
            first_reason(&self.shared.fail, reason);
            let raft = self.shared.raft.clone();
            tokio::spawn(async move { drop(raft.shutdown().await) });
        }
        self.ready()
    }

    /// Refuses once the node cannot go on: nothing is acknowledged from then on.
    pub(super) fn ready(&self) -> Result<(), Refused> {
        match &*self.shared.failure.borrow() {
            Some(reason) => Err(Refused::NotReady(reason.clone())),
            None => Ok(()),
        }
    }

    /// The way to other nodes.
    pub(super) fn transport(&self) -> &Arc<dyn Transport> {
        &self.shared.transport
    }

    /// Itself.
    pub(super) fn id(&self) -> NodeId {
        self.shared.id
    }

    /// Whether this node's card has room for deletes and compaction only.
    pub fn is_short_of_room(&self) -> bool {
        self.shared.store.is_short_of_room() || self.shared.wal.is_starved()
    }

    /// The log.
    pub fn wal(&self) -> &Wal {
        &self.shared.wal
    }

    /// The format in which the cluster's data is written, as far as this node knows: never too high.
    pub fn format(&self) -> u32 {
        self.shared.counters.format.load(Relaxed)
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

    /// Whom this node follows, and every change of that.
    pub(super) fn watch_leader(&self) -> watch::Receiver<Option<NodeId>> {
        self.shared.leader.clone()
    }

    /// Becomes `Some(reason)` when the node cannot go on. Nothing is acknowledged from then on.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.shared.failure.clone()
    }

    /// Makes the store durable now, and returns when it is.
    pub async fn checkpoint(&self) -> Result<(), StoreError> {
        let (done, durable) = oneshot::channel();
        if self.shared.checkpoint_requests.send(CheckpointRequest(done)).is_err() {
            return Err(StoreError::Stopping);
        }
        durable.await.unwrap_or(Err(StoreError::Stopping))
    }

    /// Leaves: let another voter lead, checkpoint, stop openraft, close the log. The last act of a node.
    pub async fn stop(&self) -> Result<(), StopError> {
        self.leave_leadership().await;
        self.checkpoint().await?;
        self.shared.raft.shutdown().await.map_err(|error| StopError::Raft(error.to_string()))?;
        self.shared.wal.close().await.map_err(|error| StopError::Log(error.to_string()))?;
        Ok(())
    }

    /// Whether Raft's own loop answers. The watchdog hangs on it.
    pub async fn is_alive(&self) -> bool {
        self.shared.raft.with_raft_state(|_| ()).await.is_ok()
    }

    /// Hangs Raft's own loop for good, and with it the thread it runs on. For the test of the watchdog.
    pub async fn hang(&self) {
        let hung = self.shared.raft.with_raft_state(|_| {
            loop {
                std::thread::park();
            }
        });
        // Nobody answers any more.
        drop(hung.await);
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

/// What [`follow_metrics`] keeps up to date.
struct Followed {
    status: watch::Receiver<Status>,
    leader: watch::Receiver<Option<NodeId>>,
}

/// Translates openraft's metrics into [`Status`], and notices when it died.
fn follow_metrics(
    raft: &Raft,
    cluster: ClusterId,
    id: NodeId,
    counters: &Arc<Counters>,
    fail: Arc<watch::Sender<Option<String>>>,
) -> (Followed, JoinHandle<()>) {
    let mut metrics = raft.metrics();
    let counters = Arc::clone(counters);
    let mut roster = Roster::default();
    let first = status_of(&metrics.borrow_watched(), cluster, id, &mut roster);
    let (leader_tx, leader) = watch::channel(first.leader);
    let (status_tx, status) = watch::channel(first);
    let task = tokio::spawn(async move {
        while metrics.changed().await.is_ok() {
            let (next, fatal) = {
                let now = metrics.borrow_and_update();
                let status = status_of(&now, cluster, id, &mut roster);
                (status, now.running_state.as_ref().err().map(reason))
            };
            let leads = next.leader;
            status_tx.send_if_modified(|status| {
                let changed = *status != next;
                if next.leader.is_some() && next.leader != status.leader {
                    counters.leader_changes.fetch_add(1, Relaxed);
                }
                *status = next;
                changed
            });
            leader_tx.send_if_modified(|leader| std::mem::replace(leader, leads) != leads);
            if let Some(reason) = fatal {
                first_reason(&fail, reason);
            }
        }
    });
    (Followed { status, leader }, task)
}

/// The members as they were translated last: entries come by the thousand, memberships hardly ever.
#[derive(Default)]
struct Roster {
    of: Option<Arc<StoredMembership>>,
    members: Arc<[Member]>,
}

impl Roster {
    fn members(&mut self, now: &Arc<StoredMembership>) -> Arc<[Member]> {
        if !self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, now)) {
            self.members = types::members(now.membership()).into();
            self.of = Some(Arc::clone(now));
        }
        Arc::clone(&self.members)
    }
}

/// The first reason stays: what follows are its consequences.
fn first_reason(fail: &watch::Sender<Option<String>>, reason: String) {
    fail.send_if_modified(|failure| {
        let first = failure.is_none();
        failure.get_or_insert(reason);
        first
    });
}

fn reason(fatal: &openraft::errors::Fatal<TypeConfig>) -> String {
    fatal.to_string()
}

fn status_of(
    metrics: &openraft::RaftMetrics<TypeConfig>,
    cluster: ClusterId,
    id: NodeId,
    roster: &mut Roster,
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
        members: roster.members(&metrics.membership_config),
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
        if is_planted(Mutant::PurgeBeyondCheckpoint) {
            self.mark.raise(applied);
            self.purge().await;
        }
        checkpoint.durable().await?;
        self.counters.checkpointed(start);
        self.mark.raise(applied);
        announce!(
            EventId::Checkpoint,
            { fields::INDEX } = applied.index.get(),
            "the state up to entry {applied} is on the card"
        );
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

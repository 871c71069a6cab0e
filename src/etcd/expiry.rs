//! Runs the lease clocks: feeds the lessor with what is applied, and proposes what it finds due.
//!
//! # Invariants
//!
//! - Only a leader that has just confirmed its leadership proposes an expiry.
//! - At most [`REVOCATIONS_MAX`] revocations are under way, and one per lease.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::Settings;
use crate::apply::{LeaseChange, Refusal};
use crate::command::Command;
use crate::env::Clock;
use crate::lease::{self, Lease, Lessor, RenewError};
use crate::mvcc::{Store, StoreError};
use crate::proto::etcdserverpb as pb;
use crate::raft::{Node, Role};
use crate::types::{LeaseId, Term};

/// Revocations under way at a time: enough to share barriers, few enough to leave clients their turn.
const REVOCATIONS_MAX: usize = 16;

/// Checkpoints in one log entry.
const CHECKPOINTS_MAX: usize = 1_000;

/// Sleep when nothing is scheduled. Every change wakes the task, so this is only a net under it.
const IDLE: Duration = Duration::from_secs(60);

/// The node's leases. The apply path feeds it; it never blocks.
pub struct Leases {
    lessor: Mutex<Lessor>,
    clock: Arc<dyn Clock>,
    /// Wakes the expiry task.
    due: Notify,
    /// Tells those who wait for the end of a revocation.
    changes: watch::Sender<()>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    granted: AtomicU64,
    revoked: AtomicU64,
    renewed: AtomicU64,
    expired: AtomicU64,
}

/// Sizes for metrics, and what happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseStatistics {
    /// Leases alive.
    pub alive: usize,
    /// Grants applied.
    pub granted: u64,
    /// Revocations applied, those of expired leases included.
    pub revoked: u64,
    /// Renewals answered by this node as leader.
    pub renewed: u64,
    /// Leases that ran out while this node led.
    pub expired: u64,
}

impl std::fmt::Debug for Leases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leases").field("lessor", &*self.lock()).finish_non_exhaustive()
    }
}

impl Leases {
    /// Starts with what the store says, as a follower.
    pub fn new(clock: Arc<dyn Clock>, store: &Store) -> Result<Self, StoreError> {
        let leases = Self {
            lessor: Mutex::new(Lessor::new(lease::Settings::default())),
            clock,
            due: Notify::new(),
            changes: watch::Sender::new(()),
            counters: Counters::default(),
        };
        leases.restored(store)?;
        Ok(leases)
    }

    /// These changes were applied.
    pub fn applied(&self, changes: &[LeaseChange]) {
        if changes.is_empty() {
            return;
        }
        let now = self.clock.now();
        let mut lessor = self.lock();
        for change in changes {
            match change {
                LeaseChange::Granted { id, ttl_secs } => {
                    lessor.granted(now, *id, *ttl_secs);
                    self.counters.granted.fetch_add(1, Relaxed);
                }
                LeaseChange::Revoked(id) => {
                    lessor.revoked(*id);
                    self.counters.revoked.fetch_add(1, Relaxed);
                }
                LeaseChange::Checkpointed { id, remaining_secs } => {
                    lessor.checkpointed(now, *id, *remaining_secs);
                }
            }
        }
        drop(lessor);
        self.wake();
    }

    /// The store was replaced.
    pub fn restored(&self, store: &Store) -> Result<(), StoreError> {
        let records = store.read()?.leases()?;
        let records = records.into_iter().map(|record| lease::Record {
            id: record.id,
            ttl_secs: record.ttl_secs,
            checkpoint_secs: record.remaining_secs,
        });
        self.lock().restore(self.clock.now(), records);
        self.wake();
        Ok(())
    }

    /// How many leases there are, and what happened to them.
    pub fn statistics(&self) -> LeaseStatistics {
        let Counters { granted, revoked, renewed, expired } = &self.counters;
        LeaseStatistics {
            alive: self.lock().count(),
            granted: granted.load(Relaxed),
            revoked: revoked.load(Relaxed),
            renewed: renewed.load(Relaxed),
            expired: expired.load(Relaxed),
        }
    }

    pub(super) fn renew(&self, id: LeaseId) -> Result<i64, RenewError> {
        let now = self.clock.now();
        let renewed = self.lock().renew(now, id);
        if renewed.is_ok() {
            self.counters.renewed.fetch_add(1, Relaxed);
        }
        renewed
    }

    pub(super) fn lease(&self, id: LeaseId) -> Option<Lease> {
        let now = self.clock.now();
        self.lock().lease(now, id)
    }

    pub(super) fn leases(&self) -> Vec<LeaseId> {
        self.lock().leases()
    }

    pub(super) fn leads(&self) -> bool {
        self.lock().leads()
    }

    pub(super) fn watch_changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    fn wake(&self) {
        self.due.notify_one();
        self.changes.send_replace(());
    }

    /// The lessor is changed by whole calls, so it is consistent even after a panic elsewhere.
    fn lock(&self) -> MutexGuard<'_, Lessor> {
        self.lessor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows leadership and proposes what is due, until `stop`.
    pub async fn run(
        self: Arc<Self>,
        node: Node,
        settings: Settings,
        stop: impl Future<Output = ()>,
    ) {
        let mut keeper = Keeper {
            status: node.watch_status(),
            node,
            settings,
            leases: self,
            led: None,
            revocations: JoinSet::new(),
        };
        tokio::pin!(stop);
        loop {
            keeper.follow();
            keeper.propose_due().await;
            let sleep = keeper.sleep();
            tokio::select! {
                () = &mut stop => return,
                () = keeper.leases.due.notified() => {}
                () = keeper.leases.clock.sleep(sleep) => {}
                Some(_) = keeper.revocations.join_next() => {}
                changed = keeper.status.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

struct Keeper {
    node: Node,
    settings: Settings,
    status: watch::Receiver<crate::raft::Status>,
    leases: Arc<Leases>,
    /// The term this node leads in.
    led: Option<Term>,
    revocations: JoinSet<()>,
}

impl Keeper {
    /// Starts the clocks when leadership comes and stops them when it goes.
    fn follow(&mut self) {
        let leads = {
            let status = self.status.borrow_and_update();
            (status.role == Role::Leader).then_some(status.term)
        };
        if leads == self.led {
            return;
        }
        let now = self.leases.clock.now();
        let mut lessor = self.leases.lock();
        lessor.demote();
        if leads.is_some() {
            lessor.promote(now, self.settings.election_timeout);
        }
        drop(lessor);
        self.leases.changes.send_replace(());
        self.led = leads;
    }

    fn sleep(&self) -> Duration {
        let now = self.leases.clock.now();
        let at = self.leases.lock().wake_at();
        let wait = at.map_or(IDLE, |at| at.saturating_duration_since(now));
        // With all hands busy, the next revocation waits for one to finish, not for its time.
        if self.revocations.len() < REVOCATIONS_MAX { wait.min(IDLE) } else { IDLE }
    }

    async fn propose_due(&mut self) {
        let Some(term) = self.led else { return };
        while self.revocations.try_join_next().is_some() {}
        let now = self.leases.clock.now();
        let room = REVOCATIONS_MAX.saturating_sub(self.revocations.len());
        let (expired, checkpoints) = {
            let mut lessor = self.leases.lock();
            (lessor.take_expired(now, room), lessor.take_checkpoints(now, CHECKPOINTS_MAX))
        };
        if expired.is_empty() && checkpoints.is_empty() {
            return;
        }
        if !self.still_leads(term).await {
            return;
        }
        for id in expired {
            let deadline = self.deadline();
            let (node, leases) = (self.node.clone(), Arc::clone(&self.leases));
            self.revocations.spawn(async move { revoke(&node, &leases, id, deadline).await });
        }
        if !checkpoints.is_empty() {
            let (node, deadline) = (self.node.clone(), self.deadline());
            self.revocations.spawn(async move { checkpoint(&node, checkpoints, deadline).await });
        }
    }

    /// A leader that was replaced without noticing would expire what its successor renewed.
    async fn still_leads(&self, term: Term) -> bool {
        let confirmed = self.node.read_barrier(self.deadline()).await.is_ok();
        let status = self.node.status();
        confirmed && status.role == Role::Leader && status.term == term
    }

    fn deadline(&self) -> Instant {
        self.leases.clock.now() + self.settings.request_timeout()
    }
}

async fn revoke(node: &Node, leases: &Leases, id: LeaseId, deadline: Instant) {
    let command = Command::LeaseRevoke(pb::LeaseRevokeRequest { id: id.get() });
    match node.propose(command, deadline).await {
        Ok(outcome) if outcome.reply == Err(Refusal::LeaseNotFound) => {
            leases.lock().revoked(id);
            leases.wake();
        }
        Ok(_) => {
            leases.counters.expired.fetch_add(1, Relaxed);
            tracing::debug!(lease = %id.get(), "lease expired");
        }
        Err(error) => {
            tracing::debug!(lease = %id.get(), %error, "the expiry of a lease will be tried again");
            let now = leases.clock.now();
            leases.lock().revoke_failed(now, id);
            leases.due.notify_one();
        }
    }
}

/// A lost checkpoint costs nothing but time given to the lease after a change of leader.
async fn checkpoint(node: &Node, remaining: Vec<(LeaseId, i64)>, deadline: Instant) {
    let checkpoints = remaining
        .into_iter()
        .map(|(id, remaining_ttl)| pb::LeaseCheckpoint { id: id.get(), remaining_ttl })
        .collect();
    let command = Command::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints });
    if let Err(error) = node.propose(command, deadline).await {
        tracing::debug!(%error, "lease checkpoint was not written");
    }
}

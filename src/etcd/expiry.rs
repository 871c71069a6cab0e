//! Runs the lease clocks: feeds the lessor with what is applied, and proposes what it finds due.
//!
//! # Why no lease ends early
//!
//! Renewals are not in the log: only the leader of a term knows of those it answered. So whether a lease has run out can
//! only be decided by the leader of a term, and only for that term. Let A lead in term T.
//!
//! - *What A decides enters the log in T, from A, or not at all.* [`Node::propose_in_term`] checks the term where the entry is
//!   appended. A plain proposal would be carried to whoever leads by then, who may have renewed the lease. An entry of A in T
//!   that is committed at all stands in the log of every later leader before that one's first own entry.
//! - *A renewal is answered only by the leader of a term who was confirmed after it was asked*
//!   ([`Node::leads_in`], which also waits until everything committed before is applied). So a later leader's renewal comes
//!   after any revocation that A got into the log: the lease is gone then, and the answer is 0. And A's renewal comes before
//!   the election of the next leader, B.
//! - *B starts every clock when it has been elected*, with the lease's full time or that of its last checkpoint, and an election
//!   timeout more for clients that were looking for a leader. The client of A's last renewal counted from before it was asked,
//!   which was before B was elected; so B's clock ends after the client's.
//! - *A checkpoint shortens what B starts with*, so it too enters the log in T from A only, and A renews no lease whose
//!   checkpoint is on its way or in the log; it clears it there first.
//!
//! Whether this node leads is learnt with a delay, and that does no harm: late to start, leases end late; late to stop, what it
//! proposes is refused, and what it would renew is not confirmed.
//!
//! # Invariants
//!
//! - Only a leader that has just confirmed its leadership proposes an expiry, and only in the term in which it found it.
//! - At most [`REVOCATIONS_MAX`] revocations are under way, and one per lease.

use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::Settings;
use crate::apply::{LeaseChange, Outcome, Refusal};
use crate::command::Command;
use crate::env::Clock;
use crate::lease::{self, Lease, Lessor, RenewError};
use crate::mvcc::{Store, StoreError};
use crate::proto::etcdserverpb as pb;
use crate::raft::{Node, ProposeError, Role, Status};
use crate::types::{LeaseId, Term};

/// Revocations under way at a time: enough to share barriers, few enough to leave clients their turn.
const REVOCATIONS_MAX: usize = 16;

/// Checkpoints in one log entry.
const CHECKPOINTS_MAX: usize = 1_000;

/// Sleep when nothing is scheduled. Every change wakes the task, so this is only a net under it.
const IDLE: Duration = Duration::from_secs(60);

/// What the clocks need of the node. [`Node`] is one; tests have another.
pub(super) trait Leadership: Clone + Send + Sync + 'static {
    /// The node's state, which may lag behind.
    fn watch_status(&self) -> watch::Receiver<Status>;
    /// Whether this node led in this term at some moment after the call, as a majority confirms.
    fn leads_in(&self, term: Term, deadline: Instant) -> impl Future<Output = bool> + Send;
    /// Writes a command to the log as the leader of this term, or not at all.
    fn propose_in_term(
        &self,
        command: Command,
        term: Term,
        deadline: Instant,
    ) -> impl Future<Output = Result<Outcome, ProposeError>> + Send;
}

impl Leadership for Node {
    fn watch_status(&self) -> watch::Receiver<Status> {
        Self::watch_status(self)
    }

    async fn leads_in(&self, term: Term, deadline: Instant) -> bool {
        Self::leads_in(self, term, deadline).await.is_ok()
    }

    async fn propose_in_term(
        &self,
        command: Command,
        term: Term,
        deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        Self::propose_in_term(self, command, term, deadline).await
    }
}

/// The node's leases. The apply path feeds it; it never blocks.
pub struct Leases {
    lessor: Mutex<Led>,
    clock: Arc<dyn Clock>,
    /// Wakes the expiry task.
    due: Notify,
    /// Tells those who wait for the end of a revocation.
    changes: watch::Sender<()>,
    counters: Counters,
}

/// The lessor, and the term in which its clocks run.
#[derive(Debug)]
struct Led {
    lessor: Lessor,
    term: Option<Term>,
}

impl Deref for Led {
    type Target = Lessor;

    fn deref(&self) -> &Lessor {
        &self.lessor
    }
}

impl DerefMut for Led {
    fn deref_mut(&mut self) -> &mut Lessor {
        &mut self.lessor
    }
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
        f.debug_struct("Leases").field("led", &*self.lock()).finish_non_exhaustive()
    }
}

impl Leases {
    /// Starts with what the store says, as a follower.
    pub fn new(clock: Arc<dyn Clock>, store: &Store) -> Result<Self, StoreError> {
        let leases = Self {
            lessor: Mutex::new(Led { lessor: Lessor::new(lease::Settings::default()), term: None }),
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

    /// Renews a lease whose clock runs in this term, which must have been confirmed.
    pub(super) fn renew(&self, id: LeaseId, term: Term) -> Result<i64, RenewError> {
        let now = self.clock.now();
        let mut led = self.lock();
        if led.term != Some(term) {
            return Err(RenewError::NotLeader);
        }
        let renewed = led.renew(now, id);
        drop(led);
        if renewed.is_ok() {
            self.counters.renewed.fetch_add(1, Relaxed);
        }
        renewed
    }

    /// A lease whose clock runs in this term; `Err` if none does.
    pub(super) fn lease(&self, id: LeaseId, term: Term) -> Result<Option<Lease>, RenewError> {
        let now = self.clock.now();
        let led = self.lock();
        if led.term != Some(term) {
            return Err(RenewError::NotLeader);
        }
        Ok(led.lease(now, id))
    }

    /// The term in which the clocks run; `None` where this node does not lead.
    pub(super) fn term(&self) -> Option<Term> {
        self.lock().term
    }

    pub(super) fn leases(&self) -> Vec<LeaseId> {
        self.lock().leases()
    }

    pub(super) fn watch_changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    fn wake(&self) {
        self.due.notify_one();
        self.changes.send_replace(());
    }

    /// The lessor is changed by whole calls, so it is consistent even after a panic elsewhere.
    fn lock(&self) -> MutexGuard<'_, Led> {
        self.lessor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows leadership and proposes what is due, until `stop`.
    pub async fn run(
        self: Arc<Self>,
        node: Node,
        settings: Settings,
        stop: impl Future<Output = ()>,
    ) {
        self.run_with(node, settings, stop).await;
    }

    async fn run_with(
        self: Arc<Self>,
        node: impl Leadership,
        settings: Settings,
        stop: impl Future<Output = ()>,
    ) {
        let mut keeper = Keeper {
            status: node.watch_status(),
            node,
            settings,
            leases: self,
            revocations: JoinSet::new(),
        };
        tokio::pin!(stop);
        loop {
            keeper.follow();
            keeper.propose_due().await;
            let sleep = keeper.sleep();
            tokio::select! {
                () = &mut stop => break,
                () = keeper.leases.due.notified() => {}
                () = keeper.leases.clock.sleep(sleep) => {}
                Some(_) = keeper.revocations.join_next() => {}
                changed = keeper.status.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
            }
        }
        keeper.lead(None);
    }
}

struct Keeper<L> {
    node: L,
    settings: Settings,
    status: watch::Receiver<Status>,
    leases: Arc<Leases>,
    revocations: JoinSet<()>,
}

impl<L: Leadership> Keeper<L> {
    /// Starts the clocks when leadership comes and stops them when it goes.
    fn follow(&mut self) {
        let leads = {
            let status = self.status.borrow_and_update();
            (status.role == Role::Leader).then_some(status.term)
        };
        self.lead(leads);
    }

    /// The clocks start anew with each term, also where this node led in the one before.
    fn lead(&self, term: Option<Term>) {
        let now = self.leases.clock.now();
        let mut led = self.leases.lock();
        if led.term == term {
            return;
        }
        led.demote();
        if term.is_some() {
            led.promote(now, self.settings.election_timeout);
        }
        led.term = term;
        drop(led);
        self.leases.changes.send_replace(());
    }

    fn sleep(&self) -> Duration {
        let now = self.leases.clock.now();
        let at = self.leases.lock().wake_at();
        let wait = at.map_or(IDLE, |at| at.saturating_duration_since(now));
        // With all hands busy, the next revocation waits for one to finish, not for its time.
        if self.revocations.len() < REVOCATIONS_MAX { wait.min(IDLE) } else { IDLE }
    }

    async fn propose_due(&mut self) {
        while self.revocations.try_join_next().is_some() {}
        let now = self.leases.clock.now();
        let room = REVOCATIONS_MAX.saturating_sub(self.revocations.len());
        let (term, expired, checkpoints) = {
            let mut led = self.leases.lock();
            let Some(term) = led.term else { return };
            (term, led.take_expired(now, room), led.take_checkpoints(now, CHECKPOINTS_MAX))
        };
        if expired.is_empty() && checkpoints.is_empty() {
            return;
        }
        // Whoever lost its majority would only fill its log with what is thrown away.
        if !self.node.leads_in(term, self.deadline()).await {
            let ids = checkpoints.iter().map(|(id, _)| *id);
            self.leases.lock().checkpoints_ended(ids, true);
            return;
        }
        for id in expired {
            let decided = self.decided(term);
            self.revocations.spawn(async move { decided.revoke(id).await });
        }
        if !checkpoints.is_empty() {
            let decided = self.decided(term);
            self.revocations.spawn(async move { decided.checkpoint(checkpoints).await });
        }
    }

    fn decided(&self, term: Term) -> Decided<L> {
        let (node, leases) = (self.node.clone(), Arc::clone(&self.leases));
        Decided { node, leases, term, deadline: self.deadline() }
    }

    fn deadline(&self) -> Instant {
        self.leases.clock.now() + self.settings.request_timeout()
    }
}

/// What the leader of a term decided, on its way into the log.
struct Decided<L> {
    node: L,
    leases: Arc<Leases>,
    term: Term,
    deadline: Instant,
}

impl<L: Leadership> Decided<L> {
    async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        self.node.propose_in_term(command, self.term, self.deadline).await
    }

    async fn revoke(self, id: LeaseId) {
        let command = Command::LeaseRevoke(pb::LeaseRevokeRequest { id: id.get() });
        match self.propose(command).await {
            Ok(outcome) if outcome.reply == Err(Refusal::LeaseNotFound) => {
                self.leases.lock().revoked(id);
                self.leases.wake();
            }
            Ok(_) => {
                self.leases.counters.expired.fetch_add(1, Relaxed);
                tracing::debug!(lease = %id.get(), "lease expired");
            }
            Err(error) => {
                tracing::debug!(lease = %id.get(), %error, "the expiry of a lease will be tried again");
                let now = self.leases.clock.now();
                self.leases.lock().revoke_failed(now, id);
                self.leases.due.notify_one();
            }
        }
    }

    /// A lost checkpoint costs nothing but time given to the lease after a change of leader.
    async fn checkpoint(self, remaining: Vec<(LeaseId, i64)>) {
        let ids: Vec<_> = remaining.iter().map(|(id, _)| *id).collect();
        let checkpoints = remaining
            .into_iter()
            .map(|(id, remaining_ttl)| pb::LeaseCheckpoint { id: id.get(), remaining_ttl })
            .collect();
        let command = Command::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints });
        let written = self.propose(command).await;
        if let Err(error) = &written {
            tracing::debug!(%error, "lease checkpoint was not written");
        }
        // What surely entered no log is as good as settled.
        let settled = matches!(written, Ok(_) | Err(ProposeError::NoLeader));
        self.leases.lock().checkpoints_ended(ids, settled);
        self.leases.wake();
    }
}

#[cfg(test)]
#[path = "expiry_tests.rs"]
mod tests;

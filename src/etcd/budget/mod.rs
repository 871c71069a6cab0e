//! Bounds the memory of answers that are being made, wait for their connection or for their client.
//!
//! HTTP/2 lets a client ask for 4,096 answers at once and read none of them: 400 ranges of 4 MiB, a few kilobytes of
//! requests, took 1.3 GiB. So whoever makes an answer first reserves room for it, and the room is given back when
//! the answer's last byte has left for the socket, or when nobody wants it any more.
//!
//! # Shape
//!
//! One [`Budget`] for the process, one [`Account`] for a connection. [`Account::reserve`] waits for a [`Permit`], which
//! an answer in the making may [`Permit::grow`] and which [`super::answer`] ties to the answer's bytes. `core`
//! decides who gets what; [`connection`] closes a connection that holds room others wait for and takes nothing.
//!
//! # Invariants
//!
//! - Nobody waits for room while holding some, except for a bounded time: there is no deadlock. An answer too large for an
//!   account waits only for another such answer.
//! - A wait ends with its deadline, with its caller (a dropped future leaves the queue), and when the server stops.
//! - One connection cannot keep the others from being served: see `core` for the arithmetic.
//!
//! # Not here
//!
//! Answers of a few bytes (puts, renewals): a call costs more than its answer there, and calls are counted by
//! [`crate::limits::CONCURRENT_STREAMS_MAX`].

mod connection;
mod core;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot};

use self::core::{AccountKey, Core, Granted, Hold, Limits, Ticket};
use super::error::EtcdError;
use crate::env::Clock;
use crate::limits;

pub(super) use connection::{Observed, Payer};

/// Scans of many keys that one connection may have running, of those that run in all.
const SCANS_PER_ACCOUNT: usize = 4;

/// Those who wait look this often whether somebody holds room and does not use it.
const PATIENCE: Duration = Duration::from_secs(1);

/// A connection that was written nothing for so long, though answers wait for it, takes nothing. (The kernel gives a
/// client that leaves a full socket alone twice the time, `listen::USER_TIMEOUT`; this one asks for room meanwhile.)
const STALLED: Duration = Duration::from_secs(5);

/// All room for answers. Clones are the same one.
#[derive(Clone)]
pub(super) struct Budget(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    /// Whether a connection that holds room and takes nothing loses it.
    closes: bool,
}

struct State {
    core: Core,
    waiting: HashMap<Ticket, oneshot::Sender<Hold>>,
    accounts: HashMap<AccountKey, Weak<connection::Activity>>,
    closed: bool,
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("used", &self.lock().core.used()).finish_non_exhaustive()
    }
}

impl Budget {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        let limits = Limits {
            total: limits::ANSWER_BYTES_MAX,
            account: limits::ANSWER_BYTES_PER_CONNECTION_MAX,
            account_min: limits::ANSWER_BYTES_PER_CONNECTION_MIN,
        };
        Self::with_limits(clock, limits, true)
    }

    /// Room for requests instead: so much in all, and for one connection. What they wait for is this server's own work, so
    /// nobody loses a connection over it.
    pub(super) fn of_requests(clock: Arc<dyn Clock>, total: u64, account: u64) -> Self {
        Self::with_limits(clock, Limits { total, account, account_min: 0 }, false)
    }

    fn with_limits(clock: Arc<dyn Clock>, limits: Limits, closes: bool) -> Self {
        let state = State {
            core: Core::new(limits),
            waiting: HashMap::new(),
            accounts: HashMap::new(),
            closed: false,
        };
        Self(Arc::new(Shared { state: Mutex::new(state), clock, closes }))
    }

    /// An account for a new connection.
    pub(super) fn open(&self) -> Account {
        let activity = Arc::new(connection::Activity::new(Arc::clone(&self.0.clock)));
        let mut state = self.lock();
        let key = state.core.open();
        state.accounts.insert(key, Arc::downgrade(&activity));
        drop(state);
        let scans = Arc::new(Semaphore::new(SCANS_PER_ACCOUNT));
        Account(Arc::new(Inner { budget: self.clone(), key, scans, activity }))
    }

    /// What is held of all parts.
    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        self.lock().core.used()
    }

    /// Whoever waits is told that the server stops, now and later.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        // A dropped sender is the message.
        state.waiting.clear();
    }

    /// The core is changed by whole calls, so it is consistent even after a panic elsewhere.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(state: &mut State, granted: Granted) {
        for (ticket, hold) in granted {
            // Whoever waits takes the room out of its channel even when it gives up; see `Wait`.
            if let Some(waiting) = state.waiting.remove(&ticket) {
                drop(waiting.send(hold));
            }
        }
    }

    /// Closes connections that hold room and do not read.
    fn close_stalled(&self) {
        let state = self.lock();
        for (account, activity) in &state.accounts {
            if 0 < state.core.held(*account)
                && let Some(activity) = activity.upgrade()
                && STALLED <= activity.idle()
                && activity.end()
            {
                tracing::info!(
                    "a client connection is closed: it did not take its answers while others waited for room"
                );
            }
        }
    }

    /// Closes every connection, whatever is under way on it.
    pub(super) fn end_connections(&self) {
        for activity in self.lock().accounts.values().filter_map(Weak::upgrade) {
            activity.end();
        }
    }
}

/// A connection's room for answers. Clones are the same one.
#[derive(Clone)]
pub(super) struct Account(Arc<Inner>);

struct Inner {
    budget: Budget,
    key: AccountKey,
    scans: Arc<Semaphore>,
    activity: Arc<connection::Activity>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.budget.lock().accounts.remove(&self.key);
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("key", &self.0.key).finish_non_exhaustive()
    }
}

impl Account {
    /// Room for so many bytes at once, or none.
    pub(super) fn try_reserve(&self, bytes: u64) -> Option<Permit> {
        let mut state = self.0.budget.lock();
        if state.closed {
            return None;
        }
        let hold = state.core.take(self.0.key, bytes)?;
        Some(self.permit(&state, hold))
    }

    /// Waits for room for so many bytes. Without a deadline it waits for as long as its caller does.
    pub(super) async fn reserve(
        &self,
        bytes: u64,
        deadline: Option<Instant>,
    ) -> Result<Permit, EtcdError> {
        let budget = &self.0.budget;
        let mut wait = {
            let mut state = budget.lock();
            if state.closed {
                return Err(EtcdError::Stopped);
            }
            if let Some(hold) = state.core.take(self.0.key, bytes) {
                return Ok(self.permit(&state, hold));
            }
            let (sender, grant) = oneshot::channel();
            let ticket = state.core.wait(self.0.key, bytes);
            state.waiting.insert(ticket, sender);
            Wait { account: self, ticket, grant }
        };
        let clock = &budget.0.clock;
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(clock.now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(EtcdError::TooManyRequests);
            }
            tokio::select! {
                hold = &mut wait.grant => {
                    let hold = hold.map_err(|_closed| EtcdError::Stopped)?;
                    return Ok(self.permit(&budget.lock(), hold));
                }
                () = clock.sleep(left.map_or(PATIENCE, |left| left.min(PATIENCE))) => {}
            }
            if budget.0.closes && budget.lock().core.is_kept_waiting(self.0.key, bytes) {
                budget.close_stalled();
            }
        }
    }

    /// Scans of this connection that may run.
    pub(super) fn scans(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0.scans)
    }

    fn permit(&self, state: &State, hold: Hold) -> Permit {
        if let Hold::Part(bytes) = hold
            && state.core.held(self.0.key) == bytes
        {
            // The first since a while: idle until now was nobody's fault.
            self.0.activity.touch();
        }
        Permit { account: self.clone(), hold: Some(hold) }
    }
}

/// A place in the queue, left when dropped: whatever was granted meanwhile goes back.
struct Wait<'a> {
    account: &'a Account,
    ticket: Ticket,
    grant: oneshot::Receiver<Hold>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut state = self.account.0.budget.lock();
        state.core.leave(self.ticket);
        state.waiting.remove(&self.ticket);
        // Grants are sent under the same lock, so none can come after this.
        if let Ok(hold) = self.grant.try_recv() {
            let granted = state.core.give_back(self.account.0.key, hold);
            Budget::deliver(&mut state, granted);
        }
    }
}

/// Room for an answer, given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    account: Account,
    /// `None` only while it is dropped.
    hold: Option<Hold>,
}

impl Permit {
    /// Makes it at least `bytes` large; `false`, and nothing changed, if there is no room.
    pub(super) fn grow(&mut self, bytes: u64) -> bool {
        let Some(hold) = &mut self.hold else { return false };
        let mut state = self.account.0.budget.lock();
        let Some(granted) = state.core.grow(self.account.0.key, hold, bytes) else { return false };
        Budget::deliver(&mut state, granted);
        true
    }

    /// The answer has left, or is no longer wanted: the client is alive.
    pub(super) fn delivered(&self) {
        self.account.0.activity.touch();
    }

    /// Makes it what the answer really takes, now that this is known. What it has too much is free for others; what it has
    /// too little counts all the same, and delays whatever comes next on this connection.
    pub(super) fn settle(&mut self, bytes: u64) {
        let Some(hold) = &mut self.hold else { return };
        let mut state = self.account.0.budget.lock();
        let granted = state.core.force(self.account.0.key, hold, bytes);
        Budget::deliver(&mut state, granted);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(hold) = self.hold.take() else { return };
        let mut state = self.account.0.budget.lock();
        let granted = state.core.give_back(self.account.0.key, hold);
        Budget::deliver(&mut state, granted);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

//! The clockwork of leases; see the module documentation of [`crate::lease`].

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::types::LeaseId;

/// How the lessor behaves.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How often the remaining time of a long lease is written to the log.
    pub checkpoint_interval: Duration,
    /// How long an unanswered revocation may take before it is tried again.
    pub revoke_retry: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { checkpoint_interval: Duration::from_secs(300), revoke_retry: Duration::from_secs(3) }
    }
}

/// Why a lease was not renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenewError {
    /// Another node leads, or none.
    NotLeader,
    /// There is no such lease.
    NotFound,
    /// It ran out and is being revoked: wait for the end of that.
    Expired,
    /// Write a checkpoint of zero first, then ask again.
    ClearCheckpoint,
    /// A checkpoint is being written that would outlive the renewal: wait for the end of that.
    CheckpointUnderWay,
}

/// A lease as the replicated state knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The lease.
    pub id: LeaseId,
    /// Seconds granted.
    pub ttl_secs: i64,
    /// Seconds left at the last checkpoint; 0 if there was none.
    pub checkpoint_secs: i64,
}

/// A lease as this leader sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Seconds granted.
    pub ttl_secs: i64,
    /// Whole seconds left, 0 when it ran out.
    pub remaining_secs: i64,
}

/// What the log may come to hold of a checkpoint that this leader wrote and the store does not show yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    /// Nothing.
    No,
    /// It is on its way.
    UnderWay,
    /// Nobody knows: it may be applied later, or never.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct State {
    ttl_secs: i64,
    /// Of the last checkpoint applied; 0 if there is none.
    checkpoint_secs: i64,
    written: Written,
    /// Known to the leader only.
    expires: Option<Instant>,
    /// When the remaining time should next be written.
    checkpoint_due: Option<Instant>,
    /// When the revocation under way may be tried again.
    revoking_until: Option<Instant>,
}

/// All leases, and on the leader their clocks.
#[derive(Debug)]
pub struct Lessor {
    settings: Settings,
    leader: bool,
    leases: HashMap<LeaseId, State>,
    expiries: BTreeSet<(Instant, LeaseId)>,
    checkpoints: BTreeSet<(Instant, LeaseId)>,
}

impl Lessor {
    /// Starts empty, as a follower.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            leader: false,
            leases: HashMap::new(),
            expiries: BTreeSet::new(),
            checkpoints: BTreeSet::new(),
        }
    }

    /// Replaces everything by what the store says: at start and after a snapshot. On the leader the clocks start
    /// anew.
    pub fn restore(&mut self, now: Instant, records: impl IntoIterator<Item = Record>) {
        self.leases.clear();
        self.expiries.clear();
        self.checkpoints.clear();
        for record in records {
            self.leases.insert(record.id, State::new(record.ttl_secs, record.checkpoint_secs));
            if self.leader {
                self.start_clock(now, record.id, Duration::ZERO);
            }
        }
    }

    /// A grant was applied.
    pub fn granted(&mut self, now: Instant, id: LeaseId, ttl_secs: i64) {
        self.revoked(id);
        self.leases.insert(id, State::new(ttl_secs, 0));
        if self.leader {
            self.start_clock(now, id, Duration::ZERO);
        }
    }

    /// A revocation was applied.
    pub fn revoked(&mut self, id: LeaseId) {
        if let Some(state) = self.leases.remove(&id) {
            self.unschedule(id, &state);
        }
    }

    /// A checkpoint was applied. It changes no running clock; the next leader starts from it.
    pub fn checkpointed(&mut self, now: Instant, id: LeaseId, remaining_secs: i64) {
        if let Some(state) = self.leases.get_mut(&id) {
            state.checkpoint_secs = remaining_secs;
            // A leader clears a checkpoint only when none is on its way, so this came after all that it wrote.
            if remaining_secs == 0 {
                state.written = Written::No;
            }
            self.schedule_checkpoint(now, id);
        }
    }

    /// The checkpoints of these leases, handed out by [`Lessor::take_checkpoints`], were written, or may have been.
    pub fn checkpoints_ended(&mut self, ids: impl IntoIterator<Item = LeaseId>, applied: bool) {
        for id in ids {
            if let Some(state) = self.leases.get_mut(&id)
                && state.written == Written::UnderWay
            {
                state.written = if applied { Written::No } else { Written::Unknown };
            }
        }
    }

    /// This node leads now: every clock starts, `extend` later than the lease's own time, so that clients that
    /// could not reach the old leader have time to renew.
    pub fn promote(&mut self, now: Instant, extend: Duration) {
        self.leader = true;
        let ids: Vec<LeaseId> = self.leases.keys().copied().collect();
        for id in ids {
            self.start_clock(now, id, extend);
        }
    }

    /// This node leads no more: all clocks stop.
    pub fn demote(&mut self) {
        self.leader = false;
        self.expiries.clear();
        self.checkpoints.clear();
        for state in self.leases.values_mut() {
            state.expires = None;
            state.checkpoint_due = None;
            state.revoking_until = None;
            // What becomes of it is settled before this node can lead again: a leader begins with all of the log applied.
            state.written = Written::No;
        }
    }

    /// Whether the clocks run.
    pub const fn leads(&self) -> bool {
        self.leader
    }

    /// Starts a lease's time again; returns the seconds it now has.
    pub fn renew(&mut self, now: Instant, id: LeaseId) -> Result<i64, RenewError> {
        if !self.leader {
            return Err(RenewError::NotLeader);
        }
        let Some(state) = self.leases.get(&id) else { return Err(RenewError::NotFound) };
        if state.expires.is_some_and(|expires| expires <= now) {
            return Err(RenewError::Expired);
        }
        match state.written {
            Written::UnderWay => return Err(RenewError::CheckpointUnderWay),
            Written::Unknown => return Err(RenewError::ClearCheckpoint),
            Written::No if 0 < state.checkpoint_secs => return Err(RenewError::ClearCheckpoint),
            Written::No => {}
        }
        let ttl_secs = state.ttl_secs;
        self.start_clock(now, id, Duration::ZERO);
        Ok(ttl_secs)
    }

    /// One lease, or `None` if it does not exist or this node does not lead.
    pub fn lease(&self, now: Instant, id: LeaseId) -> Option<Lease> {
        let state = self.leases.get(&id)?;
        let left = state.expires?.saturating_duration_since(now);
        let remaining_secs = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
        Some(Lease { ttl_secs: state.ttl_secs, remaining_secs })
    }

    /// Whether a lease exists, whoever leads.
    pub fn exists(&self, id: LeaseId) -> bool {
        self.leases.contains_key(&id)
    }

    /// How many leases exist.
    pub fn count(&self) -> usize {
        self.leases.len()
    }

    /// All leases: on the leader the one that expires next first, elsewhere by id.
    pub fn leases(&self) -> Vec<LeaseId> {
        let mut all: Vec<_> = self.leases.iter().map(|(id, s)| (s.expires, *id)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, id)| id).collect()
    }

    /// Up to `count` leases that ran out, oldest first. Each is handed out once per `revoke_retry`.
    pub fn take_expired(&mut self, now: Instant, count: usize) -> Vec<LeaseId> {
        let retry = later(now, self.settings.revoke_retry);
        let mut out = Vec::new();
        for (expires, id) in &self.expiries {
            if now < *expires || out.len() == count {
                break;
            }
            let Some(state) = self.leases.get_mut(id) else { continue };
            if state.revoking_until.is_none_or(|until| until <= now) {
                state.revoking_until = Some(retry);
                out.push(*id);
            }
        }
        out
    }

    /// A revocation ended without an outcome: the lease may be handed out again after `revoke_retry`.
    pub fn revoke_failed(&mut self, now: Instant, id: LeaseId) {
        let retry = later(now, self.settings.revoke_retry);
        if let Some(state) = self.leases.get_mut(&id) {
            state.revoking_until = Some(retry);
        }
    }

    /// Up to `count` leases whose remaining seconds should be written now, to be followed by
    /// [`Lessor::checkpoints_ended`]. Rounded up: never early.
    pub fn take_checkpoints(&mut self, now: Instant, count: usize) -> Vec<(LeaseId, i64)> {
        let due: Vec<LeaseId> = self
            .checkpoints
            .iter()
            .take_while(|(at, _)| *at <= now)
            .take(count)
            .map(|(_, id)| *id)
            .collect();
        let mut out = Vec::new();
        for id in due {
            self.schedule_checkpoint(now, id);
            let Some(state) = self.leases.get_mut(&id) else { continue };
            let Some(expires) = state.expires else { continue };
            let remaining_secs = round_up(expires.saturating_duration_since(now));
            if 0 < remaining_secs && remaining_secs < state.ttl_secs && state.written == Written::No
            {
                state.written = Written::UnderWay;
                out.push((id, remaining_secs));
            }
        }
        out
    }

    /// When there is something to do next.
    pub fn wake_at(&self) -> Option<Instant> {
        let mut expiry: Option<Instant> = None;
        for (expires, id) in &self.expiries {
            // Whatever comes later in the order cannot be due before this.
            if expiry.is_some_and(|at| at <= *expires) {
                break;
            }
            let until = self.leases.get(id).and_then(|state| state.revoking_until);
            let at = until.map_or(*expires, |until| until.max(*expires));
            expiry = Some(expiry.map_or(at, |other| other.min(at)));
        }
        let checkpoint = self.checkpoints.first().map(|(at, _)| *at);
        [expiry, checkpoint].into_iter().flatten().min()
    }

    fn start_clock(&mut self, now: Instant, id: LeaseId, extend: Duration) {
        let Some(state) = self.leases.get_mut(&id) else { return };
        if let Some(expires) = state.expires {
            self.expiries.remove(&(expires, id));
        }
        let expires = later(later(now, seconds(state.left_secs())), extend);
        state.expires = Some(expires);
        state.revoking_until = None;
        self.expiries.insert((expires, id));
        self.schedule_checkpoint(now, id);
    }

    fn schedule_checkpoint(&mut self, now: Instant, id: LeaseId) {
        let Some(state) = self.leases.get_mut(&id) else { return };
        if let Some(due) = state.checkpoint_due.take() {
            self.checkpoints.remove(&(due, id));
        }
        if self.leader && self.settings.checkpoint_interval < seconds(state.left_secs()) {
            let due = later(now, self.settings.checkpoint_interval);
            state.checkpoint_due = Some(due);
            self.checkpoints.insert((due, id));
        }
    }

    fn unschedule(&mut self, id: LeaseId, state: &State) {
        if let Some(expires) = state.expires {
            self.expiries.remove(&(expires, id));
        }
        if let Some(due) = state.checkpoint_due {
            self.checkpoints.remove(&(due, id));
        }
    }
}

impl State {
    const fn new(ttl_secs: i64, checkpoint_secs: i64) -> Self {
        Self {
            ttl_secs,
            checkpoint_secs,
            written: Written::No,
            expires: None,
            checkpoint_due: None,
            revoking_until: None,
        }
    }

    /// Seconds a new clock starts with.
    const fn left_secs(&self) -> i64 {
        if 0 < self.checkpoint_secs { self.checkpoint_secs } else { self.ttl_secs }
    }
}

fn seconds(secs: i64) -> Duration {
    Duration::from_secs(u64::try_from(secs).unwrap_or(0))
}

fn round_up(left: Duration) -> i64 {
    let whole = left.as_secs() + u64::from(0 < left.subsec_nanos());
    i64::try_from(whole).unwrap_or(i64::MAX)
}

/// `now + wait`; a wait past the end of the clock becomes a century, which is as good.
fn later(now: Instant, wait: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    now.checked_add(wait).unwrap_or_else(|| now + CENTURY)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: LeaseId = LeaseId::new(1);
    const B: LeaseId = LeaseId::new(2);
    const RETRY: Duration = Duration::from_secs(3);

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn leader(now: Instant) -> Lessor {
        let mut lessor = Lessor::new(Settings::default());
        lessor.promote(now, Duration::ZERO);
        lessor
    }

    #[test]
    fn lease_expires_at_its_ttl_and_not_a_nanosecond_before() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 10);
        let end = start + secs(10);
        assert_eq!(lessor.wake_at(), Some(end));
        assert!(lessor.take_expired(end - Duration::from_nanos(1), 9).is_empty());
        assert_eq!(lessor.take_expired(end, 9), [A]);
    }

    #[test]
    fn renewal_starts_the_time_again() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 10);
        assert_eq!(lessor.renew(start + secs(9), A), Ok(10));
        assert!(lessor.take_expired(start + secs(18), 9).is_empty());
        assert_eq!(lessor.take_expired(start + secs(19), 9), [A]);
        assert_eq!(lessor.renew(start + secs(19), A), Err(RenewError::Expired));
        assert_eq!(lessor.renew(start, B), Err(RenewError::NotFound));
    }

    #[test]
    fn one_revocation_is_under_way_and_a_lost_one_is_tried_again() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 10);
        lessor.granted(start, B, 10);
        let end = start + secs(10);
        assert_eq!(lessor.take_expired(end, 1), [A]);
        assert_eq!(lessor.take_expired(end, 9), [B]);
        assert!(lessor.take_expired(end, 9).is_empty());
        lessor.revoked(B);
        assert_eq!(lessor.wake_at(), Some(end + RETRY));
        assert_eq!(lessor.take_expired(end + RETRY, 9), [A]);
        lessor.revoke_failed(end + secs(5), A);
        assert!(lessor.take_expired(end + secs(7), 9).is_empty());
        assert_eq!(lessor.take_expired(end + secs(8), 9), [A]);
        lessor.revoked(A);
        assert_eq!(lessor.wake_at(), None);
    }

    #[test]
    fn lease_waiting_for_its_revocation_does_not_hide_the_next_one() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 10);
        lessor.granted(start, B, 11);
        assert_eq!(lessor.take_expired(start + secs(10), 9), [A]);
        assert_eq!(lessor.wake_at(), Some(start + secs(11)));
    }

    #[test]
    fn follower_expires_nothing_and_a_new_leader_starts_every_lease_afresh() {
        let start = Instant::now();
        let mut lessor = Lessor::new(Settings::default());
        lessor.granted(start, A, 10);
        assert_eq!(lessor.renew(start, A), Err(RenewError::NotLeader));
        assert_eq!((lessor.wake_at(), lessor.lease(start, A)), (None, None));

        let later = start + secs(1_000);
        lessor.promote(later, secs(2));
        assert!(lessor.take_expired(later + secs(11), 9).is_empty());
        lessor.demote();
        assert!(lessor.take_expired(later + secs(99), 9).is_empty());
        lessor.promote(later, secs(2));
        assert_eq!(lessor.take_expired(later + secs(12), 9), [A]);
    }

    #[test]
    fn long_lease_is_checkpointed_and_the_next_leader_starts_there() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 1_000);
        lessor.granted(start, B, 300);
        assert!(lessor.take_checkpoints(start + secs(299), 9).is_empty());
        let now = start + Duration::from_millis(300_001);
        assert_eq!(lessor.take_checkpoints(now, 9), [(A, 700)]);
        assert!(lessor.take_checkpoints(now, 9).is_empty());
        lessor.checkpointed(now, A, 700);
        lessor.checkpoints_ended([A], true);

        let mut next = Lessor::new(Settings::default());
        next.restore(now, [Record { id: A, ttl_secs: 1_000, checkpoint_secs: 700 }]);
        next.promote(now, Duration::ZERO);
        let left = Lease { ttl_secs: 1_000, remaining_secs: 700 };
        assert_eq!(next.lease(now, A), Some(left));
        assert_eq!(lessor.lease(now, A).map(|lease| lease.remaining_secs), Some(699));
    }

    #[test]
    fn checkpoint_is_cleared_before_a_renewal_counts() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 1_000);
        lessor.checkpointed(start, A, 400);
        assert_eq!(lessor.renew(start, A), Err(RenewError::ClearCheckpoint));
        lessor.checkpointed(start, A, 0);
        assert_eq!(lessor.renew(start, A), Ok(1_000));
    }

    /// Else the renewal's full time would be promised, and the next leader would go by the checkpoint.
    #[test]
    fn renewal_waits_for_a_checkpoint_on_its_way_and_clears_what_may_have_been_written() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 1_000);
        let now = start + secs(301);
        assert_eq!(lessor.take_checkpoints(now, 9), [(A, 699)]);
        assert_eq!(lessor.renew(now, A), Err(RenewError::CheckpointUnderWay));
        // Nobody knows what became of it.
        lessor.checkpoints_ended([A], false);
        assert_eq!(lessor.renew(now, A), Err(RenewError::ClearCheckpoint));
        assert!(lessor.take_checkpoints(now + secs(301), 9).is_empty(), "one at a time");
        lessor.checkpointed(now, A, 699);
        assert_eq!(lessor.renew(now, A), Err(RenewError::ClearCheckpoint));
        lessor.checkpointed(now, A, 0);
        assert_eq!(lessor.renew(now, A), Ok(1_000));

        let now = now + secs(301);
        assert_eq!(lessor.take_checkpoints(now, 9), [(A, 699)]);
        lessor.checkpointed(now, A, 699);
        lessor.checkpoints_ended([A], true);
        assert_eq!(lessor.renew(now, A), Err(RenewError::ClearCheckpoint));
        lessor.demote();
        lessor.promote(now, Duration::ZERO);
        assert_eq!(lessor.renew(now, A), Err(RenewError::ClearCheckpoint), "it is in the store");
    }

    #[test]
    fn largest_ttl_does_not_overflow_the_clock() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, crate::limits::LEASE_TTL_SECS_MAX);
        lessor.granted(start, B, i64::MAX);
        lessor.granted(start, LeaseId::new(3), -5);
        assert_eq!(lessor.take_expired(start + secs(1), 9), [LeaseId::new(3)]);
        assert_eq!(lessor.leases().len(), 3);
    }

    #[test]
    fn granting_again_replaces_the_old_clock() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 10);
        lessor.granted(start, A, 50);
        assert!(lessor.take_expired(start + secs(10), 9).is_empty());
        assert_eq!(lessor.leases(), [A]);
    }

    #[test]
    fn list_is_ordered_by_what_expires_next() {
        let start = Instant::now();
        let mut lessor = leader(start);
        lessor.granted(start, A, 50);
        lessor.granted(start, B, 10);
        assert_eq!(lessor.leases(), [B, A]);
    }
}

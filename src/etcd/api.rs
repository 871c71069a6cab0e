//! What every service needs: deadlines, barriers, headers and the way to propose.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use super::answer::Meter;
use super::budget::{Account, Budget, Permit};
use super::error::{EtcdError, store_failed};
use super::intake::Intake;
use super::validate::Cost;
use super::{Parts, Settings};
use crate::apply::{ReadError, Refusal, Reply};
use crate::command::Command;
use crate::limits;
use crate::mvcc::{ReadTxn, StoreError};
use crate::proto::etcdserverpb as pb;
use crate::raft;
use crate::raft::ReadBarrier;
use crate::types::Revision;

/// Scans of many keys that run at once, of all connections.
const SCANS_MAX: usize = 8;

/// Backups under way: each holds a thread, and a moment of the store whose later changes cannot reuse its pages.
const BACKUPS_MAX: usize = 4;

/// What is reserved for an answer before anything is known of it.
const FIRST_BYTES_ONE_KEY: u64 = 4 << 10;
const FIRST_BYTES_MANY_KEYS: u64 = limits::ANSWER_BYTES_PER_CONNECTION_MIN;

/// The services' common ground. Clones are the same one.
#[derive(Clone)]
pub struct Api {
    parts: Arc<Parts>,
    status: watch::Receiver<raft::Status>,
    scans: Arc<Semaphore>,
    backups: Arc<Semaphore>,
    budget: Budget,
    intake: Intake,
}

/// Who asks, and until when the answer is of use.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) deadline: Instant,
    pub(super) account: Account,
}

/// How much of the store a read may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// So little that it is read at once.
    FewKeys,
    /// So much that it is read away from the threads that serve everybody.
    ManyKeys,
}

/// What was read, the revision it shows, and its room.
pub(super) type Read<T> = (T, Revision, Permit);

/// Whether a read may show old data.
#[derive(Debug)]
pub(super) enum Freshness {
    /// Everything acknowledged before the barrier shows.
    Linearizable(ReadBarrier),
    /// Whatever this node has; the client said that this is enough.
    Serializable,
}

/// A command's reply and the store's revision after it.
pub(super) type Applied = (Reply, Revision);

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl Api {
    /// Takes the parts.
    pub fn new(parts: Parts) -> Self {
        let status = parts.node.watch_status();
        let budget = Budget::new(Arc::clone(&parts.env.clock));
        let intake = Intake::new(&parts.env.clock);
        let [scans, backups] =
            [SCANS_MAX, BACKUPS_MAX].map(|count| Arc::new(Semaphore::new(count)));
        Self { parts: Arc::new(parts), status, scans, backups, budget, intake }
    }

    /// Ends what would never end by itself, now and later: watches, renewals, waits for locks and for room.
    pub(super) fn stop(&self) {
        self.parts.hub.close();
        self.budget.close();
        self.intake.close();
    }

    /// Completes when [`Api::stop`] was called.
    pub(super) async fn stopped(&self) {
        self.parts.hub.closed().await;
    }

    pub(super) const fn budget(&self) -> &Budget {
        &self.budget
    }

    pub(super) const fn intake(&self) -> &Intake {
        &self.intake
    }

    /// Who asks. A request that came over no connection of ours has an account of its own.
    pub(super) fn call<T>(&self, request: &Request<T>) -> Call {
        let account = request.extensions().get::<Account>().cloned();
        Call {
            deadline: self.deadline(request.metadata()),
            account: account.unwrap_or_else(|| self.budget.open()),
        }
    }

    /// A request of ours on behalf of a caller.
    pub(super) fn own_call(&self, caller: &Account) -> Call {
        Call { deadline: self.own_deadline(), account: caller.clone() }
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.parts.settings
    }

    /// The node's state. Do not hold it across an await.
    pub(super) fn status(&self) -> watch::Ref<'_, raft::Status> {
        self.status.borrow()
    }

    pub(super) fn watch_status(&self) -> watch::Receiver<raft::Status> {
        self.status.clone()
    }

    /// Now, by the node's clock.
    pub fn now(&self) -> Instant {
        self.parts.env.clock.now()
    }

    /// When a request of ours, not a client's, must be done.
    pub(super) fn own_deadline(&self) -> Instant {
        self.now() + self.settings().request_timeout()
    }

    /// When a request must be done: etcd's limit, or the client's if that is sooner.
    pub(super) fn deadline(&self, metadata: &MetadataMap) -> Instant {
        let limit = self.settings().request_timeout();
        self.now() + asked_timeout(metadata.as_ref()).unwrap_or(limit).min(limit)
    }

    /// A header with everything but the revision.
    pub(super) fn header(&self) -> pb::ResponseHeader {
        let status = self.status();
        pb::ResponseHeader {
            cluster_id: status.cluster.get(),
            member_id: status.node.get(),
            revision: 0,
            raft_term: status.term.get(),
        }
    }

    /// A complete header.
    pub(super) fn header_at(&self, revision: Revision) -> Option<pb::ResponseHeader> {
        Some(pb::ResponseHeader { revision: revision.get(), ..self.header() })
    }

    /// A complete header, with the store's revision now.
    pub(super) fn header_now(&self) -> Result<Option<pb::ResponseHeader>, Status> {
        Ok(self.header_at(self.revision()?))
    }

    /// The store's revision now.
    pub(super) fn revision(&self) -> Result<Revision, Status> {
        Ok(self.local_view()?.revision())
    }

    /// Replicates a command.
    pub(super) async fn propose(
        &self,
        command: Command,
        deadline: Instant,
    ) -> Result<Applied, Status> {
        let outcome = self.parts.node.propose(command, deadline).await.map_err(EtcdError::from)?;
        let reply = outcome.reply.map_err(EtcdError::from)?;
        Ok((reply, outcome.revision))
    }

    /// Confirms with a majority that a local read shows everything acknowledged.
    pub(super) async fn barrier(&self, deadline: Instant) -> Result<Freshness, Status> {
        let barrier = self.parts.node.read_barrier(deadline).await.map_err(EtcdError::from)?;
        Ok(Freshness::Linearizable(barrier))
    }

    /// What a read with this wish needs.
    pub(super) async fn freshness(
        &self,
        serializable: bool,
        deadline: Instant,
    ) -> Result<Freshness, Status> {
        if serializable { Ok(Freshness::Serializable) } else { self.barrier(deadline).await }
    }

    /// The store as it is now.
    pub(super) fn view(&self, _freshness: &Freshness) -> Result<ReadTxn, Status> {
        self.local_view()
    }

    fn local_view(&self) -> Result<ReadTxn, Status> {
        self.parts.node.store().read().map_err(|error| store_failed(&error))
    }

    /// Reads what may be much, as soon as there is room for it. When the room that was free proves too small, what was read
    /// is dropped and read again when there is more: nobody waits for room while holding some.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        call: &Call,
        freshness: &Freshness,
        extent: Extent,
        read: impl Fn(&ReadTxn, &Meter) -> Result<Result<T, Refusal>, ReadError>
        + Clone
        + Send
        + 'static,
    ) -> Result<Read<T>, Status> {
        let mut bytes = match extent {
            Extent::FewKeys => FIRST_BYTES_ONE_KEY,
            Extent::ManyKeys => FIRST_BYTES_MANY_KEYS,
        };
        loop {
            let permit = call.account.reserve(bytes, Some(call.deadline)).await?;
            let meter = Meter::new(permit, bytes);
            // Taken late, a view shows more than the barrier asks for, and keeps less of the past alive.
            let (found, revision, meter) = match extent {
                Extent::FewKeys => {
                    let view = self.view(freshness)?;
                    (read(&view, &meter), view.revision(), meter)
                }
                Extent::ManyKeys => {
                    let slot = self.scan_slot(call).await?;
                    let (view, read) = (self.view(freshness)?, read.clone());
                    scan(slot, move || (read(&view, &meter), view.revision(), meter)).await?
                }
            };
            match found {
                Ok(found) => {
                    let found = found.map_err(EtcdError::from)?;
                    return Ok((found, revision, meter.into_permit()));
                }
                Err(ReadError::Store(error)) => return Err(store_failed(&error)),
                Err(ReadError::NoRoom) if meter.is_absurd() => return Err(answer_too_large()),
                Err(ReadError::NoRoom) => bytes = 2 * meter.used().max(bytes),
            }
        }
    }

    /// Reads much for an answer of a few bytes.
    pub(super) async fn digest<T: Send + 'static>(
        &self,
        call: &Call,
        view: ReadTxn,
        read: impl FnOnce(&ReadTxn) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let slot = self.scan_slot(call).await?;
        scan(slot, move || read(&view)).await?.map_err(|error| store_failed(&error))
    }

    /// The right to scan. One connection gets fewer than there are, so that it cannot keep others from theirs.
    pub(super) async fn scan_slot(&self, call: &Call) -> Result<ScanSlot, EtcdError> {
        let acquire = |semaphore: Arc<Semaphore>| async {
            semaphore.acquire_owned().await.map_err(|_closed| EtcdError::Stopped)
        };
        Ok(ScanSlot {
            _of_account: acquire(call.account.scans()).await?,
            _of_all: acquire(Arc::clone(&self.scans)).await?,
        })
    }

    /// The right to make a backup, now or not at all.
    pub(super) fn backup_slot(&self) -> Result<OwnedSemaphorePermit, EtcdError> {
        Arc::clone(&self.backups).try_acquire_owned().map_err(|_full| EtcdError::TooManyRequests)
    }

    /// A learner answers only serializable ranges, its status and snapshots.
    pub(super) fn refuse_on_learner(&self) -> Result<(), EtcdError> {
        match self.status().role {
            raft::Role::Learner => Err(EtcdError::NotSupportedForLearner),
            raft::Role::Leader | raft::Role::Follower | raft::Role::Candidate => Ok(()),
        }
    }

    /// Refuses what would not fit, and then raises the alarm, once.
    pub(super) async fn check_quota(&self, request: &impl Cost) -> Result<(), Status> {
        let cost = request.cost();
        // The alarm says so too, but only when it has been through the log; until then puts would wait for a card
        // that cannot take them.
        if 0 < cost && self.parts.node.is_short_of_room() {
            return Err(EtcdError::NoSpace.into());
        }
        let Some(quota) = self.settings().quota_bytes.filter(|_| 0 < cost) else { return Ok(()) };
        let size = self.parts.node.store().size().map_err(|error| store_failed(&error))?;
        if size.total.saturating_add(cost) < quota {
            return Ok(());
        }
        let member = self.status().node;
        let no_space = pb::AlarmType::Nospace;
        let alarms = self.local_view()?.alarms().map_err(|error| store_failed(&error))?;
        if !alarms.contains(&(member, no_space.into())) {
            let alarm = pb::AlarmRequest {
                action: pb::alarm_request::AlarmAction::Activate.into(),
                member_id: member.get(),
                alarm: no_space.into(),
            };
            // As in etcd, the answer is the same whether or not the alarm could be raised.
            if let Err(status) = self.propose(Command::Alarm(alarm), self.own_deadline()).await {
                tracing::warn!(reason = status.message(), "the NOSPACE alarm was not raised");
            }
        }
        Err(EtcdError::NoSpace.into())
    }
}

/// The right to read many keys.
#[derive(Debug)]
pub(super) struct ScanSlot {
    _of_account: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

/// What grpc-go says of a message above its limit.
fn answer_too_large() -> Status {
    let max = limits::ANSWER_BYTES_LARGEST / 2;
    Status::resource_exhausted(format!("grpc: trying to send message larger than max ({max})"))
}

/// Runs away from the threads that serve everybody.
pub(super) async fn scan<T: Send + 'static>(
    slot: ScanSlot,
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    let scan = tokio::task::spawn_blocking(move || {
        let result = read();
        drop(slot);
        result
    });
    scan.await.map_err(|_| EtcdError::Stopped.into())
}

/// A reply that does not belong to the command that was proposed: a bug, but not one worth the process.
pub(super) fn wrong_reply(reply: &Reply) -> Status {
    tracing::error!(?reply, "the state machine answered another command");
    Status::internal("etcdserver: the state machine answered another command")
}

/// How long the client waits, as it says itself.
pub(super) fn asked_timeout(headers: &http::HeaderMap) -> Option<Duration> {
    parse_timeout(headers.get("grpc-timeout")?.to_str().ok()?)
}

/// Reads gRPC's timeout: up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let unit_at = text.len().checked_sub(1)?;
    let (digits, unit) = (text.get(..unit_at)?, text.get(unit_at..)?);
    if digits.is_empty() || 8 < digits.len() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_and_nonsense_is_not() {
        assert_eq!(parse_timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(parse_timeout("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse_timeout("7u"), Some(Duration::from_micros(7)));
        for bad in ["", "S", "5", "5x", "-5S", "+5S", "123456789S", "5\u{e9}", "\u{e9}"] {
            assert_eq!(parse_timeout(bad), None, "{bad:?}");
        }
    }
}

//! What every service needs: deadlines, barriers, headers and the way to propose.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::error::{EtcdError, store_failed};
use super::validate::Cost;
use super::{Parts, Settings};
use crate::apply::Reply;
use crate::command::Command;
use crate::mvcc::{ReadTxn, StoreError};
use crate::proto::etcdserverpb as pb;
use crate::raft;
use crate::raft::ReadBarrier;
use crate::types::Revision;

/// Scans of many keys that run at once. Each may hold a whole response in memory.
const SCANS_MAX: usize = 8;

/// The services' common ground. Clones are the same one.
#[derive(Clone)]
pub struct Api {
    parts: Arc<Parts>,
    status: watch::Receiver<raft::Status>,
    scans: Arc<Semaphore>,
}

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
        Self { parts: Arc::new(parts), status, scans: Arc::new(Semaphore::new(SCANS_MAX)) }
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

    pub(super) fn now(&self) -> Instant {
        self.parts.env.clock.now()
    }

    /// When a request of ours, not a client's, must be done.
    pub(super) fn own_deadline(&self) -> Instant {
        self.now() + self.settings().request_timeout()
    }

    /// When a request must be done: etcd's limit, or the client's if that is sooner.
    pub(super) fn deadline(&self, metadata: &MetadataMap) -> Instant {
        let limit = self.settings().request_timeout();
        let asked = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
        let asked = asked.and_then(parse_timeout).unwrap_or(limit);
        self.now() + asked.min(limit)
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

    /// Reads many keys away from the threads that serve everybody. Only so many at a time.
    pub(super) async fn scan<T: Send + 'static>(
        &self,
        view: ReadTxn,
        read: impl FnOnce(&ReadTxn) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let permit = Arc::clone(&self.scans).acquire_owned().await;
        let scan = tokio::task::spawn_blocking(move || {
            let result = read(&view);
            drop(permit);
            result
        });
        let result = scan.await.map_err(|_| Status::from(EtcdError::Stopped))?;
        result.map_err(|error| store_failed(&error))
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

/// A reply that does not belong to the command that was proposed: a bug, but not one worth the process.
pub(super) fn wrong_reply(reply: &Reply) -> Status {
    tracing::error!(?reply, "the state machine answered another command");
    Status::internal("etcdserver: the state machine answered another command")
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

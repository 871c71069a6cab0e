//! The Admin service: what our own commands need and etcd's API has no word for.
//!
//! On port 2379, so whoever may call it has a client certificate of the cluster and may read and write everything anyway.
//!
//! # Invariants
//!
//! - A changed flag is one compare-and-set in the log: two operators at once do not undo each other.
//! - Every change, and every refused one, is said in the journal with who asked for it.

use std::time::{Instant, UNIX_EPOCH};

use bytes::Bytes;
use tonic::{Request, Response, Status};

use super::api::{Api, wrong_reply};
use super::error::store_failed;
use crate::announce;
use crate::apply::{self, Reply};
use crate::command::Command;
use crate::critical::{ChangeRefused, Changed, ClusterFlags, change, line};
use crate::events::{EventId, fields, trouble};
use crate::metrics::process;
use crate::metrics::today::TODAY;
use crate::pki::Caller;
use crate::proto::etcdserverpb::AlarmType;
use crate::proto::node::admin_server::Admin;
use crate::proto::node::cluster_change::Change;
use crate::proto::node::cluster_reply::Result as Answer;
use crate::proto::node::{
    ChangeFlagReply, ChangeFlagRequest, ClusterChange, FlagsReply, FlagsRequest, KnownNode,
    NodesReply, NodesRequest, ServerStatus, ServerStatusRequest, SetFlag,
};
use crate::raft::Role;

/// Others may change flags at the same moment; nobody does that this often.
const ATTEMPTS: usize = 8;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct AdminService(pub(super) Api);

fn refused(refusal: &ChangeRefused) -> Status {
    let text = refusal.to_string();
    match refusal {
        ChangeRefused::Never { .. } | ChangeRefused::Same { .. } => {
            Status::failed_precondition(text)
        }
        ChangeRefused::Unknown { .. } | ChangeRefused::Invalid(_) => Status::invalid_argument(text),
    }
}

fn unreadable(error: impl ToString) -> Status {
    Status::data_loss(error.to_string())
}

fn unrecorded() -> Status {
    Status::failed_precondition("the cluster has not recorded its critical flags yet")
}

impl AdminService {
    fn record(&self) -> Result<Bytes, Status> {
        let view = self.0.parts().node.store().read().map_err(|error| store_failed(&error))?;
        let record = apply::flags(&view).map_err(|error| store_failed(&error))?;
        Ok(record.unwrap_or_default())
    }

    fn own_name(&self) -> String {
        let status = self.0.status();
        let own = status.members.iter().find(|member| member.id == status.node);
        own.map_or_else(|| status.node.to_string(), |member| member.name.clone())
    }

    /// For people: the server whose certificate was used, by name.
    fn name_of(&self, caller: Option<&Caller>) -> String {
        let Some(caller) = caller else { return self.own_name() };
        let Some(identity) = caller.identity else {
            return format!("{} (without a certificate)", self.own_name());
        };
        let status = self.0.status();
        let member = status.members.iter().find(|member| member.id == identity.node);
        member.map_or_else(|| identity.to_string(), |member| member.name.clone())
    }

    async fn change_flag(
        &self,
        request: &ChangeFlagRequest,
        by: &str,
        deadline: Instant,
    ) -> Result<Changed, Status> {
        for _ in 0..ATTEMPTS {
            let _barrier = self.0.barrier(deadline).await?;
            let expected = self.record()?;
            if expected.is_empty() {
                return Err(unrecorded());
            }
            let record = ClusterFlags::decode(&expected).map_err(unreadable)?;
            let now = self.0.parts().env.clock.wall();
            let changed = change(&record, &request.flag, &request.value, now, by)
                .map_err(|refusal| refused(&refusal))?;
            let set = SetFlag {
                flags: changed.record.encode().into(),
                expected,
                flag: changed.flag.name().to_owned(),
            };
            let change = ClusterChange { change: Some(Change::SetFlag(set)) };
            let (reply, _) = self.0.propose(Command::Cluster(change), deadline).await?;
            let Reply::Cluster(answer) = reply else { return Err(wrong_reply(&reply)) };
            if answer.result() == Answer::Done {
                return Ok(changed);
            }
        }
        Err(Status::aborted("the flags are being changed by somebody else; look and try again"))
    }
}

/// A change is said at the place where it was asked for. That it happened is in every server's record.
fn audit(request: &ChangeFlagRequest, by: &str, from: &str, result: &Result<Changed, Status>) {
    match result {
        Ok(changed) => announce!(
            EventId::FlagChanged,
            { fields::FLAG } = changed.flag.name(),
            { fields::VALUE_CLUSTER } = %changed.new,
            { fields::BY } = by,
            { fields::ADDRESS } = from,
            "{} changed from {} to {} by {by}, from {from}",
            changed.flag,
            changed.old,
            changed.new
        ),
        Err(status) => tracing::warn!(
            { fields::FLAG } = request.flag.as_str(),
            { fields::BY } = by,
            { fields::ADDRESS } = from,
            { fields::REASON } = status.message(),
            "a change of {:?} by {by}, from {from}, was refused: {}",
            request.flag,
            status.message()
        ),
    }
}

const fn role(role: Role) -> &'static str {
    match role {
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Learner => "learner",
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn flags(&self, request: Request<FlagsRequest>) -> Result<Response<FlagsReply>, Status> {
        if !request.get_ref().local {
            let deadline = self.0.deadline(request.metadata());
            let _barrier = self.0.barrier(deadline).await?;
        }
        let name = self.own_name();
        let own = self.0.parts().flags.encode(&name).into();
        Ok(Response::new(FlagsReply { record: self.record()?, own, name }))
    }

    async fn change_flag(
        &self,
        request: Request<ChangeFlagRequest>,
    ) -> Result<Response<ChangeFlagReply>, Status> {
        let deadline = self.0.deadline(request.metadata());
        let caller = request.extensions().get::<Caller>().cloned();
        let by = self.name_of(caller.as_ref());
        let from = caller.map_or_else(|| "here".to_owned(), |caller| caller.remote.to_string());
        let request = request.into_inner();
        let result = Self::change_flag(self, &request, &by, deadline).await;
        audit(&request, &by, &from, &result);
        let Changed { flag, old, new, .. } = result?;
        let (old, line) = (old.to_string(), line(flag, &new));
        Ok(Response::new(ChangeFlagReply { old, new: new.to_string(), line }))
    }

    async fn status(
        &self,
        _request: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatus>, Status> {
        let parts = self.0.parts();
        let (status, stats) = (parts.node.status(), parts.node.stats());
        let barriers = parts.node.wal().stats().barrier_micros;
        let micros = |share| if barriers.count == 0 { 0 } else { barriers.quantile(share) };
        let view = parts.node.store().read().map_err(|error| store_failed(&error))?;
        let size = parts.node.store().size().map_err(|error| store_failed(&error))?;
        let alarms = view.alarms().map_err(|error| store_failed(&error))?;
        let process = process::read();
        let written = TODAY.look(parts.env.clock.wall(), process.written_bytes.unwrap_or(0));
        let since = written.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let alarm = |(member, kind): (crate::types::NodeId, i32)| {
            let kind = AlarmType::try_from(kind).unwrap_or_default();
            format!("{} ({member})", kind.as_str_name())
        };
        Ok(Response::new(ServerStatus {
            cluster: status.cluster.get(),
            node: status.node.get(),
            name: self.own_name(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            role: role(status.role).to_owned(),
            leader: status.leader.map_or(0, crate::types::NodeId::get),
            term: status.term.get(),
            last: status.last_index.get(),
            committed: status.committed.get(),
            applied: status.applied.get(),
            checkpoint: stats.checkpoint_index.get(),
            revision: view.revision().get(),
            store_bytes: size.total,
            quota_bytes: parts.settings.quota_bytes.unwrap_or(0),
            barriers: barriers.count,
            barrier_p50: micros(0.5),
            barrier_p90: micros(0.9),
            barrier_p99: micros(0.99),
            barrier_slowest: micros(1.0),
            written: written.bytes,
            written_since: i64::try_from(since).unwrap_or(i64::MAX),
            alarms: alarms.into_iter().map(alarm).collect(),
            last_error: trouble::last().unwrap_or_default(),
            pid: std::process::id(),
            resident_bytes: process.resident_bytes.unwrap_or(0),
        }))
    }

    async fn nodes(&self, _request: Request<NodesRequest>) -> Result<Response<NodesReply>, Status> {
        let view = self.0.parts().node.store().read().map_err(|error| store_failed(&error))?;
        let nodes = apply::nodes(&view).map_err(|error| store_failed(&error))?;
        let known = |(id, record): (crate::types::NodeId, _)| KnownNode {
            id: id.get(),
            record: Some(record),
        };
        Ok(Response::new(NodesReply { nodes: nodes.into_iter().map(known).collect() }))
    }
}

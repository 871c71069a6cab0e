//! Carries questions about leases between the member a client talks to and the leader, who alone knows how long they have.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status};

use crate::env::BoxFuture;
use crate::etcd::error::EtcdError;
use crate::etcd::{Api, LeaderLeases};
use crate::proto::etcdserverpb as pb;
use crate::proto::node::lease_reply::Reply;
use crate::proto::node::lease_request::Request;
use crate::proto::node::{LeaseReply, LeaseRequest, RpcError};
use crate::raft::Node;
use crate::raft::transport::{CallError, Method, Refused, Transport};
use crate::types::{LeaseId, NodeId};

/// How long the leader may take for an answer, whatever the client is ready to wait: clients ask again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The asking side.
pub(super) struct LeasesOfLeader {
    pub(super) node: Node,
    pub(super) transport: Arc<dyn Transport>,
}

impl LeasesOfLeader {
    async fn ask(
        &self,
        leader: NodeId,
        request: Request,
        deadline: Instant,
    ) -> Result<Reply, Status> {
        let members = self.node.status().members;
        let Some(leader) = members.iter().find(|member| member.id == leader) else {
            return Err(EtcdError::NoLeader.into());
        };
        let request = LeaseRequest { request: Some(request) }.encode_to_vec();
        let left = deadline.saturating_duration_since(self.node.env().clock.now());
        let answer = self
            .transport
            .call(leader, Method::Lease, request.into(), left.min(ANSWER_TIMEOUT))
            .await
            .map_err(|error| status_of(&error))?;
        match LeaseReply::decode(answer).ok().and_then(|answer| answer.reply) {
            Some(Reply::Error(error)) => {
                Err(Status::new(Code::from_i32(error.code), error.message))
            }
            Some(reply) => Ok(reply),
            None => Err(EtcdError::LeaderChanged.into()),
        }
    }
}

/// A renewal may be asked for again, so an unknown outcome is no worse than none.
fn status_of(error: &CallError) -> Status {
    match error {
        CallError::Interrupted(_) => EtcdError::TimedOut.into(),
        CallError::Unreachable(_) => EtcdError::NoLeader.into(),
        CallError::Refused(_) => EtcdError::LeaderChanged.into(),
    }
}

impl LeaderLeases for LeasesOfLeader {
    fn renew(
        &self,
        leader: NodeId,
        id: LeaseId,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<i64, Status>> {
        Box::pin(async move {
            match self.ask(leader, Request::Renew(id.get()), deadline).await? {
                Reply::Renewed(ttl) => Ok(ttl),
                Reply::TimeToLive(_) | Reply::Error(_) => Err(EtcdError::LeaderChanged.into()),
            }
        })
    }

    fn time_to_live(
        &self,
        leader: NodeId,
        request: pb::LeaseTimeToLiveRequest,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<pb::LeaseTimeToLiveResponse, Status>> {
        Box::pin(async move {
            match self.ask(leader, Request::TimeToLive(request), deadline).await? {
                Reply::TimeToLive(response) => Ok(response),
                Reply::Renewed(_) | Reply::Error(_) => Err(EtcdError::LeaderChanged.into()),
            }
        })
    }
}

/// The answering side: what another member's client asked.
pub(super) async fn answer(api: &Api, request: Bytes) -> Result<Bytes, Refused> {
    let request = LeaseRequest::decode(request)
        .map_err(|error| Refused::Malformed(error.to_string()))?
        .request
        .ok_or_else(|| {
            Refused::Malformed("a question about leases without a question".to_owned())
        })?;
    let deadline = api.now() + ANSWER_TIMEOUT;
    let answer = match request {
        Request::Renew(id) => api.renew_here(LeaseId::new(id), deadline).await.map(Reply::Renewed),
        Request::TimeToLive(request) => {
            api.time_to_live_here(&request, deadline).await.map(Reply::TimeToLive)
        }
    };
    let reply = answer.unwrap_or_else(|status| {
        let (code, message) = (i32::from(status.code()), status.message().to_owned());
        Reply::Error(RpcError { code, message })
    });
    Ok(LeaseReply { reply: Some(reply) }.encode_to_vec().into())
}

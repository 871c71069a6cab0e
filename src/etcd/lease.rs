//! The Lease service.
//!
//! Grants and revocations are written to the log. Renewals and remaining times are the leader's business: this node
//! answers them when it leads, after confirming that it still does, and otherwise asks the leader. `expiry` says why this
//! suffices.

use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::stream::{self, Stream};
use prost::Message as _;
use tonic::{Code, Request, Response, Status, Streaming};

use super::answer::{Held, Meter};
use super::api::{Api, Call, Extent, Freshness, wrong_reply};
use super::error::{EtcdError, store_failed};
use super::{LeaderLeases, gate, validate};
use crate::apply::{ReadError as ReadFailure, Reply, Room as _};
use crate::command::{Command, lease_id_from};
use crate::lease::RenewError;
use crate::mvcc::ReadTxn;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::lease_server::Lease;
use crate::raft::{ReadError, Role};
use crate::types::{LeaseId, NodeId, Term};

/// What etcd answers for the remaining time of a lease that is not there.
const NO_SUCH_LEASE: i64 = -1;

/// Rest before it is asked again who answers for leases, unless that changes sooner.
const PAUSE: Duration = Duration::from_millis(50);

/// See the module documentation.
#[derive(Debug)]
pub(super) struct LeaseService(pub(super) Api);

/// Who answers for leases now.
enum Keeper {
    Here,
    There(NodeId),
}

impl Api {
    pub(super) async fn grant(
        &self,
        mut request: pb::LeaseGrantRequest,
        deadline: Instant,
    ) -> Result<pb::LeaseGrantResponse, Status> {
        self.check_quota(&request).await?;
        if request.id == 0 {
            request.id = lease_id_from(self.parts().env.entropy.next_u64()).get();
        }
        request.ttl = validate::ttl(request.ttl, self.settings().lease_ttl_min_secs)?;
        match self.propose(Command::LeaseGrant(request), deadline).await? {
            (Reply::LeaseGrant(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(response)
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    async fn revoke(
        &self,
        request: pb::LeaseRevokeRequest,
        deadline: Instant,
    ) -> Result<pb::LeaseRevokeResponse, Status> {
        match self.propose(Command::LeaseRevoke(request), deadline).await? {
            (Reply::LeaseRevoke(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(response)
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    fn keeper(&self) -> Result<Keeper, EtcdError> {
        let status = self.status();
        match (status.role, status.leader) {
            (Role::Leader, _) => Ok(Keeper::Here),
            (Role::Follower | Role::Candidate | Role::Learner, Some(leader)) => {
                Ok(Keeper::There(leader))
            }
            (Role::Follower | Role::Candidate | Role::Learner, None) => Err(EtcdError::NoLeader),
        }
    }

    /// One renewal. The header is made before it, so that a revocation at a later revision cannot seem to come first.
    async fn keep_alive(
        &self,
        request: pb::LeaseKeepAliveRequest,
    ) -> Result<pb::LeaseKeepAliveResponse, Status> {
        let header = self.header_now()?;
        let deadline = self.own_deadline();
        let id = LeaseId::new(request.id);
        let ttl = loop {
            let renewed = match self.keeper() {
                Ok(Keeper::Here) => self.renew_here(id, deadline).await,
                Ok(Keeper::There(leader)) => match &self.parts().leader_leases {
                    Some(leases) => leases.renew(leader, id, deadline).await,
                    None => Err(EtcdError::LeaderChanged.into()),
                },
                Err(error) => Err(error.into()),
            };
            match renewed {
                Ok(ttl) => break ttl,
                Err(status) => self.wait_for_keeper(status, deadline).await?,
            }
        };
        Ok(pb::LeaseKeepAliveResponse { header, id: request.id, ttl })
    }

    /// Waits until it makes sense to ask again who answers for leases. Asking twice does no harm, and during an election
    /// there is nobody; so, as in etcd, the client need not hear of it before the deadline.
    async fn wait_for_keeper(&self, status: Status, deadline: Instant) -> Result<(), Status> {
        let clock = &self.parts().env.clock;
        let stopped = status.message() == EtcdError::Stopped.text();
        if status.code() != Code::Unavailable || stopped || deadline <= clock.now() {
            return Err(status);
        }
        let mut node = self.watch_status();
        tokio::select! {
            // This node is stopping.
            changed = node.changed() => changed.map_err(|_closed| EtcdError::Stopped.into()),
            () = clock.sleep(PAUSE) => Ok(()),
        }
    }

    /// Renews a lease of this leader; 0 if there is none. Also what another member's keep-alive ends in.
    pub async fn renew_here(&self, id: LeaseId, deadline: Instant) -> Result<i64, Status> {
        let leases = &self.parts().leases;
        loop {
            let mut changes = leases.watch_changes();
            let term = self.confirm_term(deadline).await?;
            match leases.renew(id, term) {
                Ok(ttl) => return Ok(ttl),
                Err(RenewError::NotFound) => return Ok(0),
                Err(RenewError::NotLeader) => return Err(EtcdError::LeaderChanged.into()),
                Err(RenewError::ClearCheckpoint) => {
                    let checkpoint = pb::LeaseCheckpoint { id: id.get(), remaining_ttl: 0 };
                    let request = pb::LeaseCheckpointRequest { checkpoints: vec![checkpoint] };
                    self.propose(Command::LeaseCheckpoint(request), deadline).await?;
                    if leases.renew(id, term) == Err(RenewError::ClearCheckpoint) {
                        wait_for_change(self, &mut changes, deadline).await?;
                    }
                }
                // Its revocation, or its checkpoint, is under way: the answer is known when that is done.
                Err(RenewError::Expired | RenewError::CheckpointUnderWay) => {
                    wait_for_change(self, &mut changes, deadline).await?;
                }
            }
        }
    }

    /// The term in which the lease clocks run here, after a majority has confirmed that this node still leads in it: a deposed
    /// leader would keep promising time that its successor does not give.
    async fn confirm_term(&self, deadline: Instant) -> Result<Term, Status> {
        let term = self.parts().leases.term().ok_or(EtcdError::LeaderChanged)?;
        match self.parts().node.leads_in(term, deadline).await {
            Ok(_barrier) => Ok(term),
            // It leads in another term by now, or not at all.
            Err(ReadError::NoLeader) => Err(EtcdError::LeaderChanged.into()),
            Err(error) => Err(EtcdError::from(error).into()),
        }
    }

    /// Answers for a lease of this leader: what another member's question ends in.
    pub async fn time_to_live_here(
        &self,
        request: &pb::LeaseTimeToLiveRequest,
        deadline: Instant,
    ) -> Result<pb::LeaseTimeToLiveResponse, Status> {
        let call = Call { deadline, account: self.budget().open() };
        Ok(self.own_time_to_live(request, &call).await?.answer)
    }

    async fn own_time_to_live(
        &self,
        request: &pb::LeaseTimeToLiveRequest,
        call: &Call,
    ) -> Result<Held<pb::LeaseTimeToLiveResponse>, Status> {
        let term = self.confirm_term(call.deadline).await?;
        let id = LeaseId::new(request.id);
        let header = self.header_now()?;
        let lease = self.parts().leases.lease(id, term).map_err(|_| EtcdError::LeaderChanged)?;
        let mut answer =
            pb::LeaseTimeToLiveResponse { header, id: request.id, ..Default::default() };
        let Some(lease) = lease else {
            answer.ttl = NO_SUCH_LEASE;
            return Ok(Held { answer, permit: None });
        };
        answer.ttl = lease.remaining_secs;
        answer.granted_ttl = lease.ttl_secs;
        if !request.keys {
            return Ok(Held { answer, permit: None });
        }
        let keys = move |view: &ReadTxn, room: &Meter| {
            let keys = view.lease_keys(id)?;
            let bytes = keys.iter().map(|key| 2 * key.len() + size_of::<Bytes>()).sum();
            if room.keep(bytes) { Ok(Ok(keys)) } else { Err(ReadFailure::NoRoom) }
        };
        // Everything committed before the confirmation is applied, so the local store is new enough.
        let read = self.read(call, &Freshness::Serializable, Extent::ManyKeys, keys).await?;
        let (keys, _, permit) = read;
        answer.keys = keys;
        Ok(Held::new(answer, permit))
    }

    async fn time_to_live(
        &self,
        request: pb::LeaseTimeToLiveRequest,
        call: &Call,
    ) -> Result<Held<pb::LeaseTimeToLiveResponse>, Status> {
        loop {
            let answered = match (self.keeper(), &self.parts().leader_leases) {
                (Ok(Keeper::Here), _) => self.own_time_to_live(&request, call).await,
                (Ok(Keeper::There(leader)), Some(leases)) => {
                    self.their_time_to_live(leader, &**leases, request, call).await
                }
                (Ok(Keeper::There(_)), None) => Err(EtcdError::LeaderChanged.into()),
                (Err(error), _) => Err(error.into()),
            };
            match answered {
                Ok(answer) => return Ok(answer),
                Err(status) => self.wait_for_keeper(status, call.deadline).await?,
            }
        }
    }

    async fn their_time_to_live(
        &self,
        leader: NodeId,
        leases: &dyn LeaderLeases,
        request: pb::LeaseTimeToLiveRequest,
        call: &Call,
    ) -> Result<Held<pb::LeaseTimeToLiveResponse>, Status> {
        let revision = self.revision()?;
        let mut answer = leases.time_to_live(leader, request, call.deadline).await?;
        answer.header = self.header_at(revision);
        let permit = call.account.reserve(answer.encoded_len() as u64, Some(call.deadline)).await?;
        Ok(Held::new(answer, permit))
    }

    async fn leases(&self, call: &Call) -> Result<Held<pb::LeaseLeasesResponse>, Status> {
        const BYTES_PER_LEASE: u64 = 64;
        let bytes = self.parts().leases.statistics().alive as u64 * BYTES_PER_LEASE;
        let permit = call.account.reserve(bytes, Some(call.deadline)).await?;
        let view = self.view(&super::api::Freshness::Serializable)?;
        let ids = if self.parts().leases.term().is_some() {
            self.parts().leases.leases()
        } else {
            let records = view.leases().map_err(|error| store_failed(&error))?;
            records.into_iter().map(|record| record.id).collect()
        };
        let leases = ids.into_iter().map(|id| pb::LeaseStatus { id: id.get() }).collect();
        let header = self.header_at(view.revision());
        Ok(Held::new(pb::LeaseLeasesResponse { header, leases }, permit))
    }
}

async fn wait_for_change(
    api: &Api,
    changes: &mut tokio::sync::watch::Receiver<()>,
    deadline: Instant,
) -> Result<(), Status> {
    let left = deadline.saturating_duration_since(api.now());
    tokio::select! {
        changed = changes.changed() => changed.map_err(|_| EtcdError::Stopped.into()),
        () = api.parts().env.clock.sleep(left) => Err(EtcdError::TimedOut.into()),
    }
}

type KeepAlives = Pin<Box<dyn Stream<Item = Result<pb::LeaseKeepAliveResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Lease for LeaseService {
    type LeaseKeepAliveStream = KeepAlives;

    async fn lease_grant(
        &self,
        request: Request<pb::LeaseGrantRequest>,
    ) -> Result<Response<pb::LeaseGrantResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.grant(request.into_inner(), deadline).await?))
    }

    async fn lease_revoke(
        &self,
        request: Request<pb::LeaseRevokeRequest>,
    ) -> Result<Response<pb::LeaseRevokeResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.revoke(request.into_inner(), deadline).await?))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<pb::LeaseKeepAliveRequest>>,
    ) -> Result<Response<KeepAlives>, Status> {
        let api = self.0.clone();
        let needs_leader = gate::needs_leader(request.metadata());
        let end = {
            let api = api.clone();
            async move {
                let lost = async {
                    if needs_leader {
                        gate::leader_lost(&api).await;
                    } else {
                        std::future::pending().await
                    }
                };
                tokio::select! {
                    () = lost => EtcdError::NoLeader,
                    () = api.stopped() => EtcdError::Stopped,
                }
            }
        };
        let state = (api, request.into_inner(), end.boxed());
        let answers = stream::try_unfold(state, |(api, mut requests, mut end)| async move {
            let request = tokio::select! {
                request = requests.message() => request?,
                error = &mut end => return Err(error.into()),
            };
            let Some(request) = request else { return Ok(None) };
            let response = tokio::select! {
                response = api.keep_alive(request) => response?,
                error = &mut end => return Err(error.into()),
            };
            Ok(Some((response, (api, requests, end))))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<pb::LeaseTimeToLiveRequest>,
    ) -> Result<Response<pb::LeaseTimeToLiveResponse>, Status> {
        let call = self.0.call(&request);
        Ok(self.0.time_to_live(request.into_inner(), &call).await?.respond())
    }

    async fn lease_leases(
        &self,
        request: Request<pb::LeaseLeasesRequest>,
    ) -> Result<Response<pb::LeaseLeasesResponse>, Status> {
        let call = self.0.call(&request);
        Ok(self.0.leases(&call).await?.respond())
    }
}

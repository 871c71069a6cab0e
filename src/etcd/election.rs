//! The Election service: the leader is the first in a queue of keys, and its key's value is what it proclaims.

use bytes::Bytes;
use futures_util::stream;
use tonic::{Request, Response, Status};

use super::answer::{self, Held, NoMessages};
use super::api::Api;
use super::budget::{Account, Permit};
use super::concurrency::{
    Entry, Queue, Waiting, created_at, delete, get, kvs, next_events, op, put, revision_of,
};
use super::error::{EtcdError, through_own_client};
use crate::mvcc::{KeyRange, Store};
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::request_op::Request as Op;
use crate::proto::mvccpb::event::EventType;
use crate::proto::mvccpb::{Event, KeyValue};
use crate::proto::v3electionpb::election_server::Election;
use crate::proto::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
    ProclaimResponse, ResignRequest, ResignResponse,
};
use crate::types::Revision;
use crate::watch::{Options, WatchStream};

/// See the module documentation.
#[derive(Debug)]
pub(super) struct ElectionService(pub(super) Api);

impl ElectionService {
    async fn campaign(
        &self,
        request: CampaignRequest,
        caller: &Account,
    ) -> Result<CampaignResponse, Status> {
        let api = &self.0;
        let lease = api.session(request.lease).await?;
        let queue = Queue::new(&request.name);
        let key = queue.key(lease);
        let join = pb::TxnRequest {
            compare: vec![created_at(&key, 0)],
            success: vec![put(&key, request.value.clone(), lease)],
            failure: vec![op(Op::RequestRange(get(&key)))],
        };
        let joined = api.txn(join, &api.own_call(caller)).await?.answer;
        let mut entry = Entry { key: key.clone(), created: revision_of(joined.header.as_ref()) };
        let mut old_value = None;
        if let (false, Some(kv)) = (joined.succeeded, kvs(&joined, 0).first()) {
            entry.created = kv.create_revision;
            old_value = Some(kv.value.clone());
        }
        let created = entry.created;
        let waiting = Waiting::new(api.clone(), caller.clone(), entry.clone());
        if old_value.is_some_and(|value| value != request.value) {
            self.announce(&entry, lease, request.value, caller).await?;
        }
        api.wait_for_turn(&queue, created - 1, caller).await?;
        waiting.succeeded();
        let leader = Some(LeaderKey { name: request.name, key, rev: created, lease });
        Ok(CampaignResponse { header: joined.header, leader })
    }

    /// Changes the value of an entry that is still there.
    async fn announce(
        &self,
        entry: &Entry,
        lease: i64,
        value: Bytes,
        caller: &Account,
    ) -> Result<Option<pb::ResponseHeader>, Status> {
        let request = pb::TxnRequest {
            compare: vec![created_at(&entry.key, entry.created)],
            success: vec![put(&entry.key, value, lease)],
            failure: vec![],
        };
        let response = self.0.txn(request, &self.0.own_call(caller)).await?.answer;
        if !response.succeeded {
            return Err(EtcdError::ElectionNotLeader.into());
        }
        Ok(response.header)
    }

    async fn proclaim(
        &self,
        request: ProclaimRequest,
        caller: &Account,
    ) -> Result<ProclaimResponse, Status> {
        let leader = request.leader.ok_or(EtcdError::MissingLeaderKey)?;
        let lease = self.0.session(leader.lease).await?;
        let entry = Entry { key: leader.key, created: leader.rev };
        let header = self.announce(&entry, lease, request.value, caller).await?;
        Ok(ProclaimResponse { header })
    }

    async fn resign(
        &self,
        request: ResignRequest,
        caller: &Account,
    ) -> Result<ResignResponse, Status> {
        let leader = request.leader.ok_or(EtcdError::MissingLeaderKey)?;
        let request = pb::TxnRequest {
            compare: vec![created_at(&leader.key, leader.rev)],
            success: vec![delete(&leader.key)],
            failure: vec![],
        };
        let response = self.0.txn(request, &self.0.own_call(caller)).await?.answer;
        Ok(ResignResponse { header: response.header })
    }

    async fn leader(
        &self,
        request: &LeaderRequest,
        caller: &Account,
    ) -> Result<Held<LeaderResponse>, Status> {
        let first = Queue::new(&request.name).first();
        let first = self.0.range(first, &self.0.own_call(caller)).await?;
        if first.answer.kvs.is_empty() {
            return Err(EtcdError::ElectionNoLeader.into());
        }
        Ok(first
            .map(|first| LeaderResponse { header: first.header, kv: first.kvs.into_iter().next() }))
    }
}

/// Follows who leads: each leader's key from the value it had when found until it is deleted.
struct Observer {
    api: Api,
    caller: Account,
    queue: Queue,
    following: Option<WatchStream<Store>>,
}

impl Observer {
    /// The next leaders or values, one message or several.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, Status> {
        loop {
            let Some(stream) = &self.following else {
                let found = self.find().await?;
                return Ok(Some((found, self)));
            };
            let (events, room) = next_events(stream, &self.caller).await?;
            let told = self.take(events);
            if !told.is_empty() {
                return Ok(Some((answer::frame(told, room), self)));
            }
        }
    }

    /// The leader now, or the first one to come.
    async fn find(&mut self) -> Result<Bytes, Status> {
        let first = self.queue.first();
        let first = self.api.range(first, &self.api.own_call(&self.caller)).await?;
        let revision = revision_of(first.answer.header.as_ref());
        let (kv, revision, room) = match (first.answer.kvs.into_iter().next(), first.permit) {
            (Some(kv), Some(room)) => (kv, revision, room),
            (_, room) => {
                drop(room);
                self.first_put(revision).await?
            }
        };
        let range = KeyRange::One(kv.key.clone());
        self.following = Some(self.api.follow(range, revision + 1, Options::default())?);
        Ok(answer::frame(vec![self.tell(kv, revision)], room))
    }

    async fn first_put(&self, since: i64) -> Result<(KeyValue, i64, Permit), Status> {
        let options = Options { no_delete: true, ..Options::default() };
        let stream = self.api.follow(self.queue.range(), since, options)?;
        loop {
            let (events, room) = next_events(&stream, &self.caller).await?;
            if let Some(kv) = events.into_iter().find_map(|event| event.kv) {
                let revision = kv.mod_revision;
                return Ok((kv, revision, room));
            }
        }
    }

    /// What is to be told of these events: up to the end of this leader's time.
    fn take(&mut self, events: Vec<Event>) -> Vec<LeaderResponse> {
        let mut told = Vec::new();
        for event in events {
            if event.r#type() == EventType::Delete {
                self.following = None;
                break;
            }
            if let Some(kv) = event.kv {
                let revision = kv.mod_revision;
                told.push(self.tell(kv, revision));
            }
        }
        told
    }

    fn tell(&self, kv: KeyValue, revision: i64) -> LeaderResponse {
        LeaderResponse { header: self.api.header_at(Revision::new(revision)), kv: Some(kv) }
    }
}

#[tonic::async_trait]
impl Election for ElectionService {
    type ObserveStream = NoMessages<LeaderResponse>;

    async fn campaign(
        &self,
        request: Request<CampaignRequest>,
    ) -> Result<Response<CampaignResponse>, Status> {
        let caller = self.0.call(&request).account;
        let won = Self::campaign(self, request.into_inner(), &caller).await;
        won.map(Response::new).map_err(|status| through_own_client(&status))
    }

    async fn proclaim(
        &self,
        request: Request<ProclaimRequest>,
    ) -> Result<Response<ProclaimResponse>, Status> {
        let caller = self.0.call(&request).account;
        let done = Self::proclaim(self, request.into_inner(), &caller).await;
        done.map(Response::new).map_err(|status| through_own_client(&status))
    }

    async fn leader(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<LeaderResponse>, Status> {
        let caller = self.0.call(&request).account;
        let leader = Self::leader(self, request.get_ref(), &caller).await;
        leader.map(Held::respond).map_err(|status| through_own_client(&status))
    }

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let observer = Observer {
            api: self.0.clone(),
            caller: self.0.call(&request).account,
            queue: Queue::new(&request.into_inner().name),
            following: None,
        };
        Ok(answer::stream(stream::try_unfold(observer, |observer| async move {
            observer.next().await.map_err(|status| through_own_client(&status))
        })))
    }

    async fn resign(
        &self,
        request: Request<ResignRequest>,
    ) -> Result<Response<ResignResponse>, Status> {
        let caller = self.0.call(&request).account;
        let done = Self::resign(self, request.into_inner(), &caller).await;
        done.map(Response::new).map_err(|status| through_own_client(&status))
    }
}

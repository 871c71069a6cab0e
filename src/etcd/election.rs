//! The Election service: the leader is the first in a queue of keys, and its key's value is what it proclaims.

use std::pin::Pin;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use tonic::{Request, Response, Status};

use super::api::Api;
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
use crate::watch::{Options, WatchStream};

type Leaders = Pin<Box<dyn Stream<Item = Result<LeaderResponse, Status>> + Send>>;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct ElectionService(pub(super) Api);

impl ElectionService {
    async fn campaign(&self, request: CampaignRequest) -> Result<CampaignResponse, Status> {
        let api = &self.0;
        let lease = api.session(request.lease).await?;
        let queue = Queue::new(&request.name);
        let key = queue.key(lease);
        let join = pb::TxnRequest {
            compare: vec![created_at(&key, 0)],
            success: vec![put(&key, request.value.clone(), lease)],
            failure: vec![op(Op::RequestRange(get(&key)))],
        };
        let joined = api.txn(join, api.own_deadline()).await?;
        let mut entry = Entry { key: key.clone(), created: revision_of(joined.header.as_ref()) };
        let mut old_value = None;
        if let (false, Some(kv)) = (joined.succeeded, kvs(&joined, 0).first()) {
            entry.created = kv.create_revision;
            old_value = Some(kv.value.clone());
        }
        let created = entry.created;
        let waiting = Waiting::new(api.clone(), entry.clone());
        if old_value.is_some_and(|value| value != request.value) {
            self.announce(&entry, lease, request.value).await?;
        }
        api.wait_for_turn(&queue, created - 1).await?;
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
    ) -> Result<Option<pb::ResponseHeader>, Status> {
        let request = pb::TxnRequest {
            compare: vec![created_at(&entry.key, entry.created)],
            success: vec![put(&entry.key, value, lease)],
            failure: vec![],
        };
        let response = self.0.txn(request, self.0.own_deadline()).await?;
        if !response.succeeded {
            return Err(EtcdError::ElectionNotLeader.into());
        }
        Ok(response.header)
    }

    async fn proclaim(&self, request: ProclaimRequest) -> Result<ProclaimResponse, Status> {
        let leader = request.leader.ok_or(EtcdError::MissingLeaderKey)?;
        let lease = self.0.session(leader.lease).await?;
        let entry = Entry { key: leader.key, created: leader.rev };
        let header = self.announce(&entry, lease, request.value).await?;
        Ok(ProclaimResponse { header })
    }

    async fn resign(&self, request: ResignRequest) -> Result<ResignResponse, Status> {
        let leader = request.leader.ok_or(EtcdError::MissingLeaderKey)?;
        let request = pb::TxnRequest {
            compare: vec![created_at(&leader.key, leader.rev)],
            success: vec![delete(&leader.key)],
            failure: vec![],
        };
        let response = self.0.txn(request, self.0.own_deadline()).await?;
        Ok(ResignResponse { header: response.header })
    }

    async fn leader(&self, request: &LeaderRequest) -> Result<LeaderResponse, Status> {
        let first = Queue::new(&request.name).first();
        let first = self.0.range(first, self.0.own_deadline()).await?;
        match first.kvs.into_iter().next() {
            Some(kv) => Ok(LeaderResponse { header: first.header, kv: Some(kv) }),
            None => Err(EtcdError::ElectionNoLeader.into()),
        }
    }
}

/// Follows who leads: each leader's key from the value it had when found until it is deleted.
struct Observer {
    api: Api,
    queue: Queue,
    following: Option<WatchStream<Store>>,
    /// Seen and not yet told.
    pending: std::collections::VecDeque<LeaderResponse>,
}

impl Observer {
    async fn next(mut self) -> Result<Option<(LeaderResponse, Self)>, Status> {
        loop {
            if let Some(response) = self.pending.pop_front() {
                return Ok(Some((response, self)));
            }
            match &self.following {
                None => self.find().await?,
                Some(stream) => {
                    let events = next_events(stream).await?;
                    self.take(events);
                }
            }
        }
    }

    /// The leader now, or the first one to come.
    async fn find(&mut self) -> Result<(), Status> {
        let first = self.api.range(self.queue.first(), self.api.own_deadline()).await?;
        let revision = revision_of(first.header.as_ref());
        let (kv, since) = match first.kvs.into_iter().next() {
            Some(kv) => (kv, revision),
            None => {
                let kv = self.first_put(revision).await?;
                let since = kv.mod_revision;
                (kv, since)
            }
        };
        let range = KeyRange::One(kv.key.clone());
        self.following = Some(self.api.follow(range, since + 1, Options::default())?);
        self.tell(kv, since);
        Ok(())
    }

    async fn first_put(&self, since: i64) -> Result<KeyValue, Status> {
        let options = Options { no_delete: true, ..Options::default() };
        let stream = self.api.follow(self.queue.range(), since, options)?;
        loop {
            if let Some(kv) = next_events(&stream).await?.into_iter().find_map(|event| event.kv) {
                return Ok(kv);
            }
        }
    }

    fn take(&mut self, events: Vec<Event>) {
        for event in events {
            if event.r#type() == EventType::Delete {
                self.following = None;
                return;
            }
            if let Some(kv) = event.kv {
                let revision = kv.mod_revision;
                self.tell(kv, revision);
            }
        }
    }

    fn tell(&mut self, kv: KeyValue, revision: i64) {
        let header = self.api.header_at(crate::types::Revision::new(revision));
        self.pending.push_back(LeaderResponse { header, kv: Some(kv) });
    }
}

#[tonic::async_trait]
impl Election for ElectionService {
    type ObserveStream = Leaders;

    async fn campaign(
        &self,
        request: Request<CampaignRequest>,
    ) -> Result<Response<CampaignResponse>, Status> {
        let won = Self::campaign(self, request.into_inner()).await;
        won.map(Response::new).map_err(|status| through_own_client(&status))
    }

    async fn proclaim(
        &self,
        request: Request<ProclaimRequest>,
    ) -> Result<Response<ProclaimResponse>, Status> {
        let done = Self::proclaim(self, request.into_inner()).await;
        done.map(Response::new).map_err(|status| through_own_client(&status))
    }

    async fn leader(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<LeaderResponse>, Status> {
        let leader = Self::leader(self, request.get_ref()).await;
        leader.map(Response::new).map_err(|status| through_own_client(&status))
    }

    async fn observe(&self, request: Request<LeaderRequest>) -> Result<Response<Leaders>, Status> {
        let observer = Observer {
            api: self.0.clone(),
            queue: Queue::new(&request.into_inner().name),
            following: None,
            pending: std::collections::VecDeque::new(),
        };
        let leaders = stream::try_unfold(observer, |observer| async move {
            observer.next().await.map_err(|status| through_own_client(&status))
        });
        Ok(Response::new(Box::pin(leaders)))
    }

    async fn resign(
        &self,
        request: Request<ResignRequest>,
    ) -> Result<Response<ResignResponse>, Status> {
        let done = Self::resign(self, request.into_inner()).await;
        done.map(Response::new).map_err(|status| through_own_client(&status))
    }
}

//! The KV service: range, put, delete, transactions, compaction.
//!
//! The inherent methods are the service without gRPC; Lock and Election use them too.

use std::sync::Arc;
use std::time::Instant;

use tonic::{Request, Response, Status};

use super::answer::{self, Held, NoMessages};
use super::api::{Api, Call, Extent, Freshness, Read, wrong_reply};
use super::budget::Permit;
use super::range_stream;
use super::validate::{self, Previous};
use crate::apply::{self, Operations, Reply};
use crate::command::Command;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::kv_server::Kv;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct KvService(pub(super) Api);

impl Api {
    /// Serves a range, in full.
    pub(super) async fn range(
        &self,
        request: pb::RangeRequest,
        call: &Call,
    ) -> Result<Held<pb::RangeResponse>, Status> {
        validate::range(&request)?;
        if !request.serializable {
            self.refuse_on_learner()?;
        }
        let freshness = self.freshness(request.serializable, call.deadline).await?;
        let (mut response, revision, permit) = self.read_range(request, &freshness, call).await?;
        self.parts().node.count(Operations::RANGE);
        response.header = self.header_at(revision);
        Ok(Held::new(response, permit))
    }

    /// A range without its header.
    pub(super) async fn read_range(
        &self,
        request: pb::RangeRequest,
        freshness: &Freshness,
        call: &Call,
    ) -> Result<Read<pb::RangeResponse>, Status> {
        let extent = if request.range_end.is_empty() { Extent::FewKeys } else { Extent::ManyKeys };
        let request = Arc::new(request);
        self.read(call, freshness, extent, move |view, room| {
            apply::range_within(view, &request, room)
        })
        .await
    }

    /// Room for what a write answers beside its header: what it asks to get, and what was there before. It cannot be put
    /// off once it is in the log, so this is found out before, from the store as it is now. What changes in between is
    /// counted when the answer is there.
    async fn room_for(&self, answer: Previous, call: &Call) -> Result<Option<Permit>, Status> {
        if answer.ranges.is_empty() {
            return Ok(None);
        }
        let ranges = Arc::new(answer.ranges);
        let few = ranges.iter().all(|range| range.range_end.is_empty()) && ranges.len() <= 4;
        let extent = if few { Extent::FewKeys } else { Extent::ManyKeys };
        let measure = move |view: &_, room: &_| {
            for range in ranges.iter() {
                // A range that is refused here has no answer; whether it is refused is not decided here.
                drop(apply::range_within(view, range, room)?);
            }
            Ok(Ok(()))
        };
        let ((), _, permit) = self.read(call, &Freshness::Serializable, extent, measure).await?;
        Ok(Some(permit))
    }

    pub(super) async fn put(
        &self,
        request: pb::PutRequest,
        call: &Call,
    ) -> Result<Held<pb::PutResponse>, Status> {
        self.check_quota(&request).await?;
        validate::put(&request)?;
        validate::size(&request, self.settings().request_bytes_max)?;
        let permit = self.room_for(Previous::of_put(&request), call).await?;
        match self.propose(Command::Put(request), call.deadline).await? {
            (Reply::Put(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(Held { answer: response, permit })
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    pub(super) async fn delete_range(
        &self,
        request: pb::DeleteRangeRequest,
        call: &Call,
    ) -> Result<Held<pb::DeleteRangeResponse>, Status> {
        validate::delete_range(&request)?;
        validate::size(&request, self.settings().request_bytes_max)?;
        let permit = self.room_for(Previous::of_delete(&request), call).await?;
        match self.propose(Command::DeleteRange(request), call.deadline).await? {
            (Reply::DeleteRange(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(Held { answer: response, permit })
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    pub(super) async fn txn(
        &self,
        request: pb::TxnRequest,
        call: &Call,
    ) -> Result<Held<pb::TxnResponse>, Status> {
        self.check_quota(&request).await?;
        validate::txn(&request, self.settings().txn_ops_max)?;
        if apply::is_read_only(&request) {
            return self.read_txn(request, call).await;
        }
        validate::size(&request, self.settings().request_bytes_max)?;
        let permit = self.room_for(Previous::of_txn(&request), call).await?;
        match self.propose(Command::Txn(request), call.deadline).await? {
            (Reply::Txn(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(Held { answer: response, permit })
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    /// A transaction that only reads costs no log entry.
    async fn read_txn(
        &self,
        request: pb::TxnRequest,
        call: &Call,
    ) -> Result<Held<pb::TxnResponse>, Status> {
        let serializable = validate::is_serializable(&request);
        let freshness = self.freshness(serializable, call.deadline).await?;
        let request = Arc::new(request);
        let read = move |view: &_, room: &_| apply::read_only_txn_within(view, &request, room);
        let (mut response, revision, permit) =
            self.read(call, &freshness, Extent::ManyKeys, read).await?;
        self.parts().node.count(Operations::of_txn(&response));
        response.header = self.header_at(revision);
        Ok(Held::new(response, permit))
    }

    async fn compact(
        &self,
        request: pb::CompactionRequest,
        deadline: Instant,
    ) -> Result<pb::CompactionResponse, Status> {
        match self.propose(Command::Compact(request), deadline).await? {
            (Reply::Compact(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(response)
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }
}

#[tonic::async_trait]
impl Kv for KvService {
    type RangeStreamStream = NoMessages<pb::RangeStreamResponse>;

    async fn range(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<pb::RangeResponse>, Status> {
        let call = self.0.call(&request);
        Ok(self.0.range(request.into_inner(), &call).await?.respond())
    }

    async fn range_stream(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let call = self.0.call(&request);
        let chunks = range_stream::open(self.0.clone(), request.into_inner(), call).await?;
        Ok(answer::stream(chunks))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        let call = self.0.call(&request);
        Ok(self.0.put(request.into_inner(), &call).await?.respond())
    }

    async fn delete_range(
        &self,
        request: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, Status> {
        let call = self.0.call(&request);
        Ok(self.0.delete_range(request.into_inner(), &call).await?.respond())
    }

    async fn txn(
        &self,
        request: Request<pb::TxnRequest>,
    ) -> Result<Response<pb::TxnResponse>, Status> {
        let call = self.0.call(&request);
        Ok(self.0.txn(request.into_inner(), &call).await?.respond())
    }

    async fn compact(
        &self,
        request: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.compact(request.into_inner(), deadline).await?))
    }
}

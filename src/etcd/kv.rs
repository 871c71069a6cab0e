//! The KV service: range, put, delete, transactions, compaction.
//!
//! The inherent methods are the service without gRPC; Lock and Election use them too.

use std::time::Instant;

use tonic::{Request, Response, Status};

use super::api::{Api, wrong_reply};
use super::error::EtcdError;
use super::range_stream::{self, RangeChunks};
use super::validate;
use crate::apply::{self, Operations, Refusal, Reply};
use crate::command::Command;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::kv_server::Kv;
use crate::types::Revision;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct KvService(pub(super) Api);

impl Api {
    /// Serves a range, in full.
    pub(super) async fn range(
        &self,
        request: pb::RangeRequest,
        deadline: Instant,
    ) -> Result<pb::RangeResponse, Status> {
        validate::range(&request)?;
        if !request.serializable {
            self.refuse_on_learner()?;
        }
        let freshness = self.freshness(request.serializable, deadline).await?;
        let view = self.view(&freshness)?;
        let revision = view.revision();
        let read = if request.range_end.is_empty() {
            apply::range(&view, &request).map_err(|error| super::error::store_failed(&error))?
        } else {
            self.scan(view, move |view| apply::range(view, &request)).await?
        };
        let mut response = read.map_err(EtcdError::from)?;
        self.parts().node.count(Operations::RANGE);
        response.header = self.header_at(revision);
        Ok(response)
    }

    pub(super) async fn put(
        &self,
        request: pb::PutRequest,
        deadline: Instant,
    ) -> Result<pb::PutResponse, Status> {
        self.check_quota(&request).await?;
        validate::put(&request)?;
        validate::size(&request, self.settings().request_bytes_max)?;
        match self.propose(Command::Put(request), deadline).await? {
            (Reply::Put(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(response)
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    pub(super) async fn delete_range(
        &self,
        request: pb::DeleteRangeRequest,
        deadline: Instant,
    ) -> Result<pb::DeleteRangeResponse, Status> {
        validate::delete_range(&request)?;
        validate::size(&request, self.settings().request_bytes_max)?;
        match self.propose(Command::DeleteRange(request), deadline).await? {
            (Reply::DeleteRange(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(response)
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    pub(super) async fn txn(
        &self,
        request: pb::TxnRequest,
        deadline: Instant,
    ) -> Result<pb::TxnResponse, Status> {
        self.check_quota(&request).await?;
        validate::txn(&request, self.settings().txn_ops_max)?;
        let (mut response, revision) = if apply::is_read_only(&request) {
            self.read_txn(request, deadline).await?
        } else {
            validate::size(&request, self.settings().request_bytes_max)?;
            match self.propose(Command::Txn(request), deadline).await? {
                (Reply::Txn(response), revision) => (response, revision),
                (other, _) => return Err(wrong_reply(&other)),
            }
        };
        response.header = self.header_at(revision);
        Ok(response)
    }

    /// A transaction that only reads costs no log entry.
    async fn read_txn(
        &self,
        request: pb::TxnRequest,
        deadline: Instant,
    ) -> Result<(pb::TxnResponse, Revision), Status> {
        let serializable = validate::is_serializable(&request);
        let freshness = self.freshness(serializable, deadline).await?;
        let view = self.view(&freshness)?;
        let revision = view.revision();
        let read: Result<pb::TxnResponse, Refusal> =
            self.scan(view, move |view| apply::read_only_txn(view, &request)).await?;
        let response = read.map_err(EtcdError::from)?;
        self.parts().node.count(Operations::of_txn(&response));
        Ok((response, revision))
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
    type RangeStreamStream = RangeChunks;

    async fn range(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<pb::RangeResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.range(request.into_inner(), deadline).await?))
    }

    async fn range_stream(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<RangeChunks>, Status> {
        let deadline = self.0.deadline(request.metadata());
        let chunks = range_stream::open(self.0.clone(), request.into_inner(), deadline).await?;
        Ok(Response::new(chunks))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.put(request.into_inner(), deadline).await?))
    }

    async fn delete_range(
        &self,
        request: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.delete_range(request.into_inner(), deadline).await?))
    }

    async fn txn(
        &self,
        request: Request<pb::TxnRequest>,
    ) -> Result<Response<pb::TxnResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.txn(request.into_inner(), deadline).await?))
    }

    async fn compact(
        &self,
        request: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.compact(request.into_inner(), deadline).await?))
    }
}

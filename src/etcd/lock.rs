//! The Lock service: a lock is being first in a queue of keys.

use bytes::Bytes;
use tonic::{Request, Response, Status};

use super::api::Api;
use super::budget::Account;
use super::concurrency::{Entry, Queue, Waiting, created_at, get, kvs, op, put, revision_of};
use super::error::{EtcdError, through_own_client};
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::request_op::Request as Op;
use crate::proto::v3lockpb::lock_server::Lock;
use crate::proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};

/// See the module documentation.
#[derive(Debug)]
pub(super) struct LockService(pub(super) Api);

/// Joins the queue, or finds the caller's entry in it, and asks in the same breath who is first.
fn join(queue: &Queue, key: &Bytes, lease: i64) -> pb::TxnRequest {
    let first = op(Op::RequestRange(queue.first()));
    pb::TxnRequest {
        compare: vec![created_at(key, 0)],
        success: vec![put(key, Bytes::new(), lease), first.clone()],
        failure: vec![op(Op::RequestRange(get(key))), first],
    }
}

impl LockService {
    async fn acquire(
        &self,
        request: LockRequest,
        caller: &Account,
    ) -> Result<LockResponse, Status> {
        let api = &self.0;
        let lease = api.session(request.lease).await?;
        let queue = Queue::new(&request.name);
        let key = queue.key(lease);
        let joined = api.txn(join(&queue, &key, lease), &api.own_call(caller)).await?.answer;
        let created = if joined.succeeded {
            revision_of(joined.header.as_ref())
        } else {
            kvs(&joined, 0).first().map_or(0, |kv| kv.create_revision)
        };
        let owner = kvs(&joined, 1).first();
        if owner.is_none_or(|owner| owner.create_revision == created) {
            return Ok(LockResponse { header: joined.header, key });
        }
        let waiting =
            Waiting::new(api.clone(), caller.clone(), Entry { key: key.clone(), created });
        api.wait_for_turn(&queue, created - 1, caller).await?;
        // The lease may have run out meanwhile, and the lock with it.
        let mine = api.range(get(&key), &api.own_call(caller)).await?.answer;
        if mine.kvs.is_empty() {
            return Err(EtcdError::SessionExpired.into());
        }
        waiting.succeeded();
        Ok(LockResponse { header: mine.header, key })
    }
}

#[tonic::async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let caller = self.0.call(&request).account;
        let acquired = self.acquire(request.into_inner(), &caller).await;
        acquired.map(Response::new).map_err(|status| through_own_client(&status))
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        let call = self.0.own_call(&self.0.call(&request).account);
        let key = request.into_inner().key;
        let delete = pb::DeleteRangeRequest { key, ..Default::default() };
        let deleted = self.0.delete_range(delete, &call).await;
        let deleted = deleted.map_err(|status| through_own_client(&status))?.answer;
        Ok(Response::new(UnlockResponse { header: deleted.header }))
    }
}

//! etcd's rules, one by one, and then all together against a model.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::wildcard_enum_match_arm,
    reason = "the model is as short as it can be, and its numbers are small"
)]

mod model;
mod random;
mod rules;

use bytes::Bytes;
use pb::request_op::Request;
use pb::response_op::Response;
use tempfile::TempDir;

use super::*;
use crate::env::host;
use crate::mvcc::{DrainOn, Options, Store};
use crate::proto::mvccpb::KeyValue;
use crate::testkit::wait;
use crate::types::{LogIndex, NodeId, Term};

pub(super) const OPTIONS: Options = Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };

/// A store and the entries applied to it so far.
pub(super) struct Machine {
    pub(super) store: Store,
    pub(super) dir: TempDir,
    index: u64,
}

impl Machine {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&host::env(), &dir.path().join("state.redb"), &OPTIONS).unwrap();
        Self { store, dir, index: 0 }
    }

    /// Applies commands as one batch.
    pub(super) fn batch(&mut self, commands: &[Command]) -> Vec<Applied> {
        let first = self.index;
        self.index += commands.len() as u64;
        self.store
            .write(|txn| {
                (first..)
                    .zip(commands)
                    .map(|(index, command)| apply(txn, log_id(index), command))
                    .collect()
            })
            .unwrap()
    }

    pub(super) fn apply(&mut self, command: Command) -> Applied {
        self.batch(&[command]).remove(0)
    }

    /// The reply to a command that must succeed.
    pub(super) fn reply(&mut self, command: Command) -> Reply {
        self.apply(command).outcome.reply.unwrap()
    }

    /// Why a command was refused; nothing may have changed.
    pub(super) fn refusal(&mut self, command: Command) -> Refusal {
        let before = self.store.read().unwrap().revision();
        let applied = self.apply(command);
        assert_eq!(applied.events, None);
        assert_eq!(applied.leases, []);
        assert_eq!(self.store.read().unwrap().revision(), before);
        applied.outcome.reply.unwrap_err()
    }

    pub(super) fn put(&mut self, key: &str, value: &str) {
        self.reply(put(key, value));
    }

    /// Forgets the last entries, which a restored snapshot does not hold.
    pub(super) const fn rewind(&mut self, entries: u64) {
        self.index -= entries;
    }

    pub(super) fn revision(&self) -> i64 {
        self.store.read().unwrap().revision().get()
    }

    pub(super) fn get(&self, key: &str) -> Option<KeyValue> {
        self.store.read().unwrap().get(key.as_bytes(), None).unwrap()
    }

    /// A hash of all keys and their history.
    pub(super) fn keys(&self) -> u32 {
        self.store.read().unwrap().hash_kv(None).unwrap().unwrap().0
    }

    pub(super) fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, Refusal> {
        super::range(&self.store.read().unwrap(), &request).unwrap()
    }
}

pub(super) fn log_id(index: u64) -> LogId {
    LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) }
}

pub(super) fn b(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub(super) fn put_request(key: &str, value: &str) -> pb::PutRequest {
    pb::PutRequest { key: b(key), value: b(value), ..Default::default() }
}

pub(super) fn put(key: &str, value: &str) -> Command {
    Command::Put(put_request(key, value))
}

pub(super) fn delete_request(key: &str, end: &str) -> pb::DeleteRangeRequest {
    pb::DeleteRangeRequest { key: b(key), range_end: b(end), prev_kv: false }
}

pub(super) fn grant(id: i64) -> Command {
    Command::LeaseGrant(pb::LeaseGrantRequest { id, ttl: 60 })
}

pub(super) fn all() -> pb::RangeRequest {
    pb::RangeRequest { key: b("\0"), range_end: b("\0"), ..Default::default() }
}

pub(super) fn op(request: Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

pub(super) fn put_op(key: &str, value: &str) -> pb::RequestOp {
    op(Request::RequestPut(put_request(key, value)))
}

pub(super) fn get_op(key: &str) -> pb::RequestOp {
    op(Request::RequestRange(pb::RangeRequest { key: b(key), ..Default::default() }))
}

pub(super) fn delete_op(key: &str) -> pb::RequestOp {
    op(Request::RequestDeleteRange(delete_request(key, "")))
}

pub(super) fn txn(
    compare: Vec<pb::Compare>,
    success: Vec<pb::RequestOp>,
    failure: Vec<pb::RequestOp>,
) -> pb::TxnRequest {
    pb::TxnRequest { compare, success, failure }
}

pub(super) fn keys(kvs: &[KeyValue]) -> String {
    kvs.iter().map(|kv| kv.key.escape_ascii().to_string()).collect::<Vec<_>>().join(" ")
}

pub(super) fn inner_revision(response: &pb::ResponseOp) -> i64 {
    let header = match response.response.as_ref().unwrap() {
        Response::ResponseRange(response) => &response.header,
        Response::ResponsePut(response) => &response.header,
        Response::ResponseDeleteRange(response) => &response.header,
        Response::ResponseTxn(response) => &response.header,
    };
    header.as_ref().unwrap().revision
}

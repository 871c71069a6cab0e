//! Queues of keys: what locks and elections have in common.
//!
//! Whoever wants the lock or the office puts a key `name/<lease in hex>`; the one with the smallest create
//! revision has it, the others wait until those before them are gone. Everything is ordinary keys, so etcd's client
//! libraries and these services may share a queue.

use std::time::Duration;

use bytes::Bytes;
use tonic::Status;

use super::api::Api;
use super::budget::{Account, Permit};
use super::error::EtcdError;
use super::watch::next_message;
use crate::mvcc::KeyRange;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::compare::{CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::mvccpb::{Event, KeyValue};
use crate::watch::{Body, Create, Options, WatchStream};

/// Time of a lease made for a caller that brought none: etcd's session default.
const SESSION_TTL_SECS: i64 = 60;

/// Pause before a failed clean-up is tried again.
const CLEAN_UP_PAUSE: Duration = Duration::from_secs(1);

/// How often a clean-up is tried. The lease ends the entry in any case.
const CLEAN_UP_TRIES: usize = 5;

/// All keys below `name/`.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    prefix: Bytes,
    end: Bytes,
}

/// One's own key in a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: Bytes,
    pub(super) created: i64,
}

impl Queue {
    pub(super) fn new(name: &Bytes) -> Self {
        let mut prefix = name.to_vec();
        prefix.push(b'/');
        let mut end = prefix.clone();
        end.pop();
        // '/' + 1: the first key that does not begin with the prefix.
        end.push(b'/' + 1);
        Self { prefix: prefix.into(), end: end.into() }
    }

    pub(super) fn key(&self, lease: i64) -> Bytes {
        let mut key = self.prefix.to_vec();
        key.extend_from_slice(hex(lease).as_bytes());
        key.into()
    }

    /// The first in the queue.
    pub(super) fn first(&self) -> pb::RangeRequest {
        pb::RangeRequest {
            key: self.prefix.clone(),
            range_end: self.end.clone(),
            limit: 1,
            sort_order: SortOrder::Ascend.into(),
            sort_target: SortTarget::Create.into(),
            ..Default::default()
        }
    }

    /// The last of those that came at or before a create revision.
    fn last_until(&self, created: i64) -> pb::RangeRequest {
        pb::RangeRequest {
            key: self.prefix.clone(),
            range_end: self.end.clone(),
            limit: 1,
            sort_order: SortOrder::Descend.into(),
            sort_target: SortTarget::Create.into(),
            max_create_revision: created,
            ..Default::default()
        }
    }

    pub(super) fn range(&self) -> KeyRange {
        KeyRange::Span(self.prefix.clone(), self.end.clone())
    }
}

/// Go prints a negative number in hexadecimal with its sign.
fn hex(lease: i64) -> String {
    let sign = if lease < 0 { "-" } else { "" };
    format!("{sign}{:x}", lease.unsigned_abs())
}

pub(super) fn get(key: &Bytes) -> pb::RangeRequest {
    pb::RangeRequest { key: key.clone(), ..Default::default() }
}

pub(super) fn op(request: Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

pub(super) fn delete(key: &Bytes) -> pb::RequestOp {
    op(Request::RequestDeleteRange(pb::DeleteRangeRequest {
        key: key.clone(),
        ..Default::default()
    }))
}

pub(super) fn put(key: &Bytes, value: Bytes, lease: i64) -> pb::RequestOp {
    let key = key.clone();
    op(Request::RequestPut(pb::PutRequest { key, value, lease, ..Default::default() }))
}

/// "The key was created at this revision"; 0 for "does not exist".
pub(super) fn created_at(key: &Bytes, created: i64) -> pb::Compare {
    pb::Compare {
        target: CompareTarget::Create.into(),
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(created)),
        ..Default::default()
    }
}

/// The key-values of one of a transaction's ranges.
pub(super) fn kvs(response: &pb::TxnResponse, index: usize) -> &[KeyValue] {
    match response.responses.get(index).and_then(|op| op.response.as_ref()) {
        Some(Response::ResponseRange(range)) => &range.kvs,
        Some(
            Response::ResponsePut(_) | Response::ResponseDeleteRange(_) | Response::ResponseTxn(_),
        )
        | None => &[],
    }
}

pub(super) fn revision_of(header: Option<&pb::ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

impl Api {
    /// The caller's lease, or a new one.
    pub(super) async fn session(&self, lease: i64) -> Result<i64, Status> {
        if lease != 0 {
            return Ok(lease);
        }
        let request = pb::LeaseGrantRequest { ttl: SESSION_TTL_SECS, id: 0 };
        Ok(self.grant(request, self.own_deadline()).await?.id)
    }

    /// Waits until nobody who came at or before `created` is left in the queue.
    pub(super) async fn wait_for_turn(
        &self,
        queue: &Queue,
        created: i64,
        caller: &Account,
    ) -> Result<(), Status> {
        loop {
            let last = self.range(queue.last_until(created), &self.own_call(caller)).await?.answer;
            let Some(before) = last.kvs.first() else { return Ok(()) };
            let (key, since) = (before.key.clone(), revision_of(last.header.as_ref()));
            // It may be long, and what was read is not needed for it.
            drop(last);
            self.wait_for_delete(key, since + 1, caller).await?;
        }
    }

    async fn wait_for_delete(
        &self,
        key: Bytes,
        start: i64,
        caller: &Account,
    ) -> Result<(), Status> {
        let options = Options { no_put: true, ..Options::default() };
        let events = self.follow(KeyRange::One(key), start, options)?;
        while next_events(&events, caller).await?.0.is_empty() {}
        Ok(())
    }

    /// Watches keys from a revision on.
    pub(super) fn follow(
        &self,
        range: KeyRange,
        start: i64,
        options: Options,
    ) -> Result<WatchStream<crate::mvcc::Store>, Status> {
        let stream = self.parts().hub.open(self.parts().node.store().clone());
        stream.create(Create { id: 0, range, start, options }, self.revision()?);
        Ok(stream)
    }

    /// Takes an entry out of its queue when the call that made it was abandoned or failed.
    pub(super) async fn leave(&self, entry: Entry, caller: &Account) {
        for _ in 0..CLEAN_UP_TRIES {
            let request = pb::TxnRequest {
                compare: vec![created_at(&entry.key, entry.created)],
                success: vec![delete(&entry.key)],
                failure: vec![],
            };
            match self.txn(request, &self.own_call(caller)).await {
                Ok(_) => return,
                Err(status) => {
                    tracing::debug!(reason = status.message(), "leaving a queue will be retried");
                    self.parts().env.clock.sleep(CLEAN_UP_PAUSE).await;
                }
            }
        }
    }
}

/// The next events and their room; none when the message was about something else.
pub(super) async fn next_events(
    stream: &WatchStream<crate::mvcc::Store>,
    caller: &Account,
) -> Result<(Vec<Event>, Permit), Status> {
    let (message, permit) = next_message(stream, caller).await?;
    match message.body {
        Body::Events { parts, .. } => {
            let events = parts.iter().flat_map(|part| part.events().cloned().collect::<Vec<_>>());
            Ok((events.collect(), permit))
        }
        Body::Compacted(_) => Err(EtcdError::Compacted.into()),
        Body::Created | Body::Refused(_) | Body::Canceled | Body::Progress => {
            Ok((Vec::new(), permit))
        }
    }
}

/// Leaves the queue unless told that the caller has what it waited for: a client that hangs up while it waits
/// must not block those behind it.
#[derive(Debug)]
pub(super) struct Waiting {
    api: Api,
    caller: Account,
    entry: Option<Entry>,
}

impl Waiting {
    pub(super) const fn new(api: Api, caller: Account, entry: Entry) -> Self {
        Self { api, caller, entry: Some(entry) }
    }

    /// The turn has come: the entry stays.
    pub(super) fn succeeded(mut self) {
        self.entry = None;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (api, caller) = (self.api.clone(), self.caller.clone());
            runtime.spawn(async move { api.leave(entry, &caller).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_etcds_client_library() {
        let queue = Queue::new(&Bytes::from_static(b"lock"));
        assert_eq!(queue.key(0x694d_7a1b), Bytes::from_static(b"lock/694d7a1b"));
        assert_eq!(queue.key(-255), Bytes::from_static(b"lock/-ff"));
    }

    #[test]
    fn queue_is_everything_below_the_name_and_nothing_else() {
        let queue = Queue::new(&Bytes::from_static(b"lock"));
        let KeyRange::Span(start, end) = queue.range() else { panic!("expected a span") };
        let inside = |key: &str| start <= key.as_bytes() && key.as_bytes() < end.as_ref();
        assert!(inside("lock/1") && inside("lock/\u{7f}"));
        assert!(!inside("lock") && !inside("lock0") && !inside("lock-2/1"));
    }
}

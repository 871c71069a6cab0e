//! Streams a large range in pieces that fit a gRPC message, all at one revision.
//!
//! Kubernetes 1.37 lists through this call. Each piece is read on its own at the revision of the first, so that a slow
//! client holds neither a thread nor an old state of the store; if that revision is compacted meanwhile, the
//! stream ends with etcd's compacted error.
//!
//! # Invariants
//!
//! - Keys ascend, none is repeated or missing.
//! - Header, `more` and `count` are on the last piece only.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use prost::Message;
use tonic::Status;

use super::answer;
use super::api::{Api, Call, Freshness};
use super::budget::Permit;
use super::validate;
use crate::apply::Operations;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};

/// Keys in the first piece, before anything is known of their size.
const FIRST_KEYS: i64 = 10;

/// A call's deadline is for its beginning. After that a client may take its time, and other streams of its connection
/// may be in the way; it hangs up when it has waited enough.
const PIECE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Where a stream stands.
struct Cursor {
    api: Api,
    call: Call,
    /// The range that is left; its limit is what is left of the client's, its revision that of the first piece.
    request: pb::RangeRequest,
    freshness: Freshness,
    pieces: Pieces,
    /// Of the whole range; known after the first piece.
    count: Option<i64>,
}

/// Checks the request and waits for the read barrier, so that errors come before the first piece.
pub(super) async fn open(
    api: Api,
    request: pb::RangeRequest,
    call: Call,
) -> Result<impl Stream<Item = Result<Bytes, Status>> + Send + 'static, Status> {
    validate::range(&request)?;
    if !is_plain(&request) {
        return Err(Status::unimplemented(
            "etcdserver: range stream with a sort order or revision filters is not supported",
        ));
    }
    let freshness = api.freshness(request.serializable, call.deadline).await?;
    api.parts().node.count(Operations::RANGE);
    let pieces = Pieces::new(api.settings().request_bytes_max);
    let cursor = Cursor { api, call, request, freshness, pieces, count: None };
    Ok(stream::try_unfold(Some(cursor), |cursor| async move {
        match cursor {
            Some(cursor) => cursor.piece().await.map(Some),
            None => Ok(None),
        }
    }))
}

/// Only the natural order can be cut into pieces.
fn is_plain(request: &pb::RangeRequest) -> bool {
    let natural =
        request.sort_order() != SortOrder::Descend && request.sort_target() == SortTarget::Key;
    let unfiltered = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ]
    .iter()
    .all(|bound| *bound == 0);
    unfiltered && (natural || request.sort_order() == SortOrder::None)
}

impl Cursor {
    /// The next piece, read when the one before is on its way.
    async fn piece(mut self) -> Result<(Bytes, Option<Self>), Status> {
        let keys = self.pieces.keys(self.request.limit);
        let request = pb::RangeRequest { limit: keys, ..self.request.clone() };
        let deadline = self.api.now() + PIECE_TIMEOUT;
        let call = Call { deadline, ..self.call.clone() };
        let read = self.api.read_range(request, &self.freshness, &call).await?;
        let (mut response, revision, permit) = read;

        if self.request.revision <= 0 {
            self.request.revision = revision.get();
        }
        let count = *self.count.get_or_insert(response.count);
        let whole_limit = self.request.limit == keys;
        if response.more && !whole_limit && !response.kvs.is_empty() {
            self.advance(&response);
            response.more = false;
            response.count = 0;
            return Ok((wrap(response, permit), Some(self)));
        }
        response.count = count;
        response.header = self.api.header_at(revision);
        Ok((wrap(response, permit), None))
    }

    fn advance(&mut self, sent: &pb::RangeResponse) {
        self.pieces.sent(sent.kvs.len(), sent.encoded_len());
        if let Some(last) = sent.kvs.last() {
            self.request.key = after(&last.key);
        }
        if 0 < self.request.limit {
            let sent = i64::try_from(sent.kvs.len()).unwrap_or(i64::MAX);
            self.request.limit -= sent;
        }
    }
}

fn wrap(response: pb::RangeResponse, permit: Permit) -> Bytes {
    answer::frame(vec![pb::RangeStreamResponse { range_response: Some(response) }], permit)
}

/// The first key after this one.
fn after(key: &Bytes) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.put_slice(key);
    next.put_u8(0);
    next.freeze()
}

/// How many keys the next piece gets: as many as filled a message last time, growing at most twofold, so that
/// one run of large values does not make a message nobody accepts.
#[derive(Debug)]
struct Pieces {
    keys: i64,
    bytes_max: usize,
}

impl Pieces {
    const fn new(bytes_max: usize) -> Self {
        Self { keys: FIRST_KEYS, bytes_max }
    }

    fn keys(&self, limit: i64) -> i64 {
        if 0 < limit { self.keys.min(limit) } else { self.keys }
    }

    fn sent(&mut self, keys: usize, bytes: usize) {
        let per_key = (bytes / keys.max(1)).max(1);
        let fit = i64::try_from(self.bytes_max / per_key).unwrap_or(i64::MAX);
        self.keys = fit.clamp(1, self.keys.saturating_mul(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_grow_twofold_towards_the_message_size_and_shrink_at_once() {
        let mut pieces = Pieces::new(1_000_000);
        assert_eq!(pieces.keys(0), 10);
        pieces.sent(10, 10_000);
        assert_eq!(pieces.keys(0), 20);
        for _ in 0..20 {
            pieces.sent(20, 20_000);
        }
        assert_eq!(pieces.keys(0), 1_000);
        assert_eq!(pieces.keys(7), 7);
        pieces.sent(10, 5_000_000);
        assert_eq!(pieces.keys(0), 2);
        pieces.sent(1, 50_000_000);
        assert_eq!(pieces.keys(0), 1);
    }

    #[test]
    fn only_natural_order_without_filters_is_streamed() {
        let plain = pb::RangeRequest::default();
        assert!(is_plain(&plain));
        assert!(is_plain(&pb::RangeRequest { sort_order: 1, ..plain.clone() }));
        assert!(!is_plain(&pb::RangeRequest { sort_order: 2, ..plain.clone() }));
        assert!(!is_plain(&pb::RangeRequest { sort_order: 1, sort_target: 3, ..plain.clone() }));
        assert!(!is_plain(&pb::RangeRequest { max_create_revision: 4, ..plain }));
    }

    #[test]
    fn next_key_is_the_smallest_larger_one() {
        assert_eq!(after(&Bytes::from_static(b"ab")), Bytes::from_static(b"ab\0"));
    }
}

//! Fills in the revisions that etcd puts on the answers inside a transaction.
//!
//! An inner answer carries only a revision: what the store's revision was, as seen from inside, when the operation ran.
//! That is the transaction's own revision once anything was written, and the one before it until then. The header of
//! a nested transaction is there and empty.

use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::response_op::Response;
use crate::types::Revision;

/// Fills the inner headers that are missing. `revision` is the store's after the transaction.
pub(super) fn stamp(responses: &mut [pb::ResponseOp], revision: Revision) {
    let after = revision.get();
    let before = if responses.iter().any(wrote) { after - 1 } else { after };
    let mut now = before;
    stamp_each(responses, after, &mut now);
}

fn wrote(op: &pb::ResponseOp) -> bool {
    match &op.response {
        Some(Response::ResponsePut(_)) => true,
        Some(Response::ResponseDeleteRange(delete)) => 0 < delete.deleted,
        Some(Response::ResponseTxn(txn)) => txn.responses.iter().any(wrote),
        Some(Response::ResponseRange(_)) | None => false,
    }
}

fn stamp_each(responses: &mut [pb::ResponseOp], after: i64, now: &mut i64) {
    for op in responses {
        if !matches!(op.response, Some(Response::ResponseTxn(_))) && wrote(op) {
            *now = after;
        }
        let only_revision = pb::ResponseHeader { revision: *now, ..Default::default() };
        match &mut op.response {
            Some(Response::ResponseRange(range)) => {
                range.header.get_or_insert(only_revision);
            }
            Some(Response::ResponsePut(put)) => {
                put.header.get_or_insert(only_revision);
            }
            Some(Response::ResponseDeleteRange(delete)) => {
                delete.header.get_or_insert(only_revision);
            }
            Some(Response::ResponseTxn(txn)) => {
                txn.header.get_or_insert_default();
                stamp_each(&mut txn.responses, after, now);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(response: Response) -> pb::ResponseOp {
        pb::ResponseOp { response: Some(response) }
    }

    fn range() -> pb::ResponseOp {
        op(Response::ResponseRange(pb::RangeResponse::default()))
    }

    fn put() -> pb::ResponseOp {
        op(Response::ResponsePut(pb::PutResponse::default()))
    }

    fn delete(deleted: i64) -> pb::ResponseOp {
        op(Response::ResponseDeleteRange(pb::DeleteRangeResponse { deleted, ..Default::default() }))
    }

    fn txn(responses: Vec<pb::ResponseOp>) -> pb::ResponseOp {
        op(Response::ResponseTxn(pb::TxnResponse { responses, ..Default::default() }))
    }

    fn revisions(responses: &[pb::ResponseOp]) -> Vec<i64> {
        let mut out = Vec::new();
        for op in responses {
            let (header, inner) = match op.response.as_ref().unwrap() {
                Response::ResponseRange(r) => (&r.header, None),
                Response::ResponsePut(r) => (&r.header, None),
                Response::ResponseDeleteRange(r) => (&r.header, None),
                Response::ResponseTxn(r) => (&r.header, Some(&r.responses)),
            };
            let header = header.as_ref().unwrap();
            assert_eq!((header.cluster_id, header.member_id, header.raft_term), (0, 0, 0));
            out.push(header.revision);
            out.extend(inner.map(|inner| revisions(inner)).unwrap_or_default());
        }
        out
    }

    fn stamped(mut responses: Vec<pb::ResponseOp>) -> Vec<i64> {
        stamp(&mut responses, Revision::new(9));
        revisions(&responses)
    }

    #[test]
    fn reads_before_the_first_write_see_the_revision_before() {
        assert_eq!(stamped(vec![range(), put(), range()]), [8, 9, 9]);
        assert_eq!(stamped(vec![delete(0), delete(2), range()]), [8, 9, 9]);
    }

    #[test]
    fn transaction_that_wrote_nothing_shows_the_current_revision() {
        assert_eq!(stamped(vec![range(), delete(0)]), [9, 9]);
    }

    #[test]
    fn nested_header_is_empty_and_its_writes_count() {
        let nested = txn(vec![range(), put()]);
        assert_eq!(stamped(vec![range(), nested, range()]), [8, 0, 8, 9, 9]);
    }
}

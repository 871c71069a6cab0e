//! Counts what a reply says was done; for metrics.

use std::ops::AddAssign;

use super::Reply;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::response_op::Response;

/// Operations on keys, those inside transactions included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operations {
    /// Puts.
    pub puts: u64,
    /// Deletions; one may delete many keys.
    pub deletes: u64,
    /// Ranges.
    pub ranges: u64,
    /// Transactions.
    pub txns: u64,
}

impl AddAssign for Operations {
    fn add_assign(&mut self, other: Self) {
        self.puts += other.puts;
        self.deletes += other.deletes;
        self.ranges += other.ranges;
        self.txns += other.txns;
    }
}

impl Operations {
    /// One range.
    pub const RANGE: Self = Self { puts: 0, deletes: 0, ranges: 1, txns: 0 };

    /// What a command did. Commands that are not about keys did nothing here.
    pub fn of(reply: &Reply) -> Self {
        let mut done = Self::default();
        match reply {
            Reply::Put(_) => done.puts = 1,
            Reply::DeleteRange(_) => done.deletes = 1,
            Reply::Txn(response) => done.add_txn(response),
            Reply::Compact(_)
            | Reply::LeaseGrant(_)
            | Reply::LeaseRevoke(_)
            | Reply::LeaseCheckpoint
            | Reply::Alarm(_)
            | Reply::Cluster(_) => {}
        }
        done
    }

    /// What a transaction did: the branch that was taken.
    pub fn of_txn(response: &pb::TxnResponse) -> Self {
        let mut done = Self::default();
        done.add_txn(response);
        done
    }

    fn add_txn(&mut self, response: &pb::TxnResponse) {
        self.txns += 1;
        // As deep as the request, whose nesting is bounded.
        for op in &response.responses {
            match &op.response {
                Some(Response::ResponsePut(_)) => self.puts += 1,
                Some(Response::ResponseDeleteRange(_)) => self.deletes += 1,
                Some(Response::ResponseRange(_)) => self.ranges += 1,
                Some(Response::ResponseTxn(nested)) => self.add_txn(nested),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(response: Response) -> pb::ResponseOp {
        pb::ResponseOp { response: Some(response) }
    }

    #[test]
    fn operations_of_nested_transactions_count() {
        let inner = pb::TxnResponse {
            responses: vec![
                op(Response::ResponsePut(pb::PutResponse::default())),
                op(Response::ResponseRange(pb::RangeResponse::default())),
            ],
            ..Default::default()
        };
        let outer = pb::TxnResponse {
            responses: vec![
                op(Response::ResponseTxn(inner)),
                op(Response::ResponseDeleteRange(pb::DeleteRangeResponse::default())),
                op(Response::ResponsePut(pb::PutResponse::default())),
            ],
            ..Default::default()
        };
        let expected = Operations { puts: 2, deletes: 1, ranges: 1, txns: 2 };
        assert_eq!(Operations::of_txn(&outer), expected);
        assert_eq!(Operations::of(&Reply::Txn(outer)), expected);
        assert_eq!(Operations::of(&Reply::LeaseCheckpoint), Operations::default());
    }
}

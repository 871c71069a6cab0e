//! Says whether an answer to another node promises more than a power cut would leave.
//!
//! Every safety argument of Raft rests on it: a vote that was granted, an entry that was acknowledged and an accepted leader
//! survive the next power cut. openraft and the log each keep to it; this looks at the answer itself, in release builds
//! too, because a promise that was broken is not noticed before it has cost somebody's writes.

use super::types::{self, RaftLogId, RaftVote};
use crate::types::LogId;
use crate::wal::HardState;

/// What an answer promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Promise {
    /// To follow nobody older.
    pub(super) vote: Option<RaftVote>,
    /// To have everything up to here.
    pub(super) upto: Option<RaftLogId>,
}

/// What of the promise a power cut now would break. `log` and `state` are what is durable.
pub(super) fn breach(promise: Promise, log: &HardState, state: Option<LogId>) -> Option<String> {
    if let Some(vote) = promise.vote {
        let durable = log.vote.map(types::raft_vote);
        // Whether a majority granted it is knowledge, not a promise.
        if durable.is_none_or(|durable| durable.leader_id < vote.leader_id) {
            let found = log.vote.map_or_else(|| "none".to_owned(), |vote| vote.to_string());
            return Some(format!("vote {vote} was promised, durable is {found}"));
        }
    }
    let upto = promise.upto.as_ref().map(types::log_id)?;
    let in_state = state.is_some_and(|state| upto.index <= state.index);
    // Of two logs, the one with the newer last entry has what the other has that is committed or being committed.
    if !in_state && log.last < Some(upto) {
        let found = log.last.map_or_else(|| "none".to_owned(), |last| last.to_string());
        return Some(format!("entry {upto} was promised, the last durable one is {found}"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogIndex, NodeId, Term, Vote};

    fn id(term: u64, index: u64) -> LogId {
        LogId { term: Term::new(term), leader: NodeId::new(1), index: LogIndex::new(index) }
    }

    fn vote(term: u64, node: u64) -> Vote {
        Vote { term: Term::new(term), node: NodeId::new(node), committed: false }
    }

    fn upto(id: LogId) -> Promise {
        Promise { upto: Some(types::raft_log_id(id)), ..Promise::default() }
    }

    #[test]
    fn entries_must_be_in_the_log_or_in_the_state() {
        let log = HardState { last: Some(id(2, 7)), ..HardState::default() };
        for kept in [id(2, 7), id(2, 3), id(1, 9)] {
            assert_eq!(breach(upto(kept), &log, None), None, "{kept}");
        }
        for lost in [id(2, 8), id(3, 7)] {
            let said = breach(upto(lost), &log, None).unwrap();
            assert!(said.contains(&lost.to_string()), "{said}");
        }
        assert_eq!(breach(upto(id(3, 8)), &log, Some(id(3, 8))), None, "a snapshot brought it");
        assert!(breach(upto(id(3, 9)), &log, Some(id(3, 8))).is_some());
        assert!(breach(upto(id(1, 0)), &HardState::default(), None).is_some());
        assert_eq!(breach(Promise::default(), &HardState::default(), None), None);
    }

    #[test]
    fn votes_must_be_as_new() {
        let log = HardState { vote: Some(vote(5, 2)), ..HardState::default() };
        let promised = |vote| Promise { vote: Some(types::raft_vote(vote)), upto: None };
        for kept in [vote(5, 2), vote(5, 1), vote(4, 9), Vote { committed: true, ..vote(5, 2) }] {
            assert_eq!(breach(promised(kept), &log, None), None, "{kept}");
        }
        for lost in [vote(5, 3), vote(6, 1)] {
            assert!(breach(promised(lost), &log, None).is_some(), "{lost}");
        }
        assert!(breach(promised(vote(1, 1)), &HardState::default(), None).is_some());
    }
}

//! Checks that log, state and identity in a data directory are one node's, of one time.
//!
//! A part that was lost, copied or restored alone looks healthy by itself. To go on with it would forget acknowledged writes,
//! or a vote, without anybody noticing.
//!
//! # Invariants
//!
//! - The log is durable before the state is ([`crate::raft`] flushes it before a checkpoint), so it never ends earlier.
//! - The log forgets only what the state has durably, so the state never ends before the log begins.
//! - A refusal has written nothing: with the lost part put back, the node starts. The log is read once more for that, from
//!   the page cache.

use std::path::Path;

use thiserror::Error;

use super::data_dir::{DataDirError, wal_dir};
use crate::env::Env;
use crate::join::Identity;
use crate::mvcc::{ReadTxn, Store};
use crate::raft;
use crate::types::{ClusterId, LogId};
use crate::wal::{self, HardState, inspect};

/// How the parts of a data directory contradict each other.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Mismatch {
    /// There is no log at all.
    #[error("there is no log, but the state has applied entry {applied}")]
    LogMissing {
        /// The state's last entry.
        applied: LogId,
    },
    /// Entries that the state has are missing at the log's end, and then others may be.
    #[error("the log ends {}, but the state has applied entry {applied}", at(*last))]
    LogTooShort {
        /// The log's end.
        last: Option<LogId>,
        /// The state's last entry.
        applied: LogId,
    },
    /// Entries between the two are missing.
    #[error("the log begins after entry {purged}, but the state ends {}", at(*applied))]
    StateTooOld {
        /// The last entry that the log has forgotten.
        purged: LogId,
        /// The state's last entry.
        applied: Option<LogId>,
    },
    /// The state is another cluster's.
    #[error("the state is of cluster {found}, expected {expected}, as node.json says")]
    Cluster {
        /// In the state.
        found: ClusterId,
        /// In `node.json`.
        expected: ClusterId,
    },
}

fn at(id: Option<LogId>) -> String {
    id.map_or_else(|| "before its first entry".to_owned(), |id| format!("at entry {id}"))
}

fn mismatch(path: &Path, mismatch: Mismatch) -> DataDirError {
    DataDirError::Mismatch { path: path.display().to_string(), mismatch }
}

/// Refuses parts that do not belong together, before anything is written; gives a new state its cluster.
pub(super) fn check(
    env: &Env,
    path: &Path,
    store: &Store,
    identity: Identity,
) -> Result<(), DataDirError> {
    let view = store.read()?;
    let (found, expected) = (view.cluster_id(), identity.cluster);
    if let Some(found) = found.filter(|found| *found != expected) {
        return Err(mismatch(path, Mismatch::Cluster { found, expected }));
    }
    let applied = view.applied();
    if has_log(env, path)? {
        // What cannot be read, and what is another node's, is told in detail by the opening that follows.
        let owner = wal::Identity { cluster: identity.cluster, node: identity.node };
        if let Ok(log) = inspect::verify(&*env.disk, &wal_dir(path))
            && log.damage.is_none()
            && log.identity.is_none_or(|found| found == owner)
            && let Some(found) = contradiction(applied, &log.state, is_alone(&view, identity))
        {
            return Err(mismatch(path, found));
        }
    } else if let Some(applied) = applied {
        return Err(mismatch(path, Mismatch::LogMissing { applied }));
    }
    if found.is_none() {
        store.write(|txn| {
            txn.set_cluster_id(expected);
            Ok(())
        })?;
    }
    Ok(())
}

/// Whether there is a log, in whatever condition.
fn has_log(env: &Env, path: &Path) -> Result<bool, DataDirError> {
    let dir = wal_dir(path);
    let failed = |source| DataDirError::Directory { path: dir.display().to_string(), source };
    if !env.disk.exists(&dir).map_err(failed)? {
        return Ok(false);
    }
    let files = env.disk.list(&dir).map_err(failed)?;
    Ok(files.iter().any(|file| file.extension().is_some_and(|extension| extension == "wal")))
}

/// Whether this node is the only voter, as far as the state knows.
fn is_alone(view: &ReadTxn, identity: Identity) -> bool {
    // A membership that cannot be read is reported by Raft, which needs it.
    let voters = raft::inspect::voters(view).unwrap_or_default();
    voters.len() == 1 && voters.contains(&identity.node)
}

/// With other voters, a snapshot may have come from them and the log's own end with it got lost in a crash.
fn contradiction(applied: Option<LogId>, log: &HardState, alone: bool) -> Option<Mismatch> {
    let index = |id: Option<LogId>| id.map(|id| id.index);
    if let Some(purged) = log.purged
        && index(applied) < Some(purged.index)
    {
        return Some(Mismatch::StateTooOld { purged, applied });
    }
    if let Some(applied) = applied
        && alone
        && index(log.last) < Some(applied.index)
    {
        return Some(Mismatch::LogTooShort { last: log.last, applied });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogIndex, NodeId, Term};

    fn id(index: u64) -> LogId {
        LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) }
    }

    fn log(purged: Option<u64>, last: Option<u64>) -> HardState {
        HardState { purged: purged.map(id), last: last.map(id), ..HardState::default() }
    }

    #[test]
    fn halves_of_one_node_fit() {
        for (applied, log) in [
            (None, log(None, None)),
            (None, log(None, Some(5))),
            (Some(5), log(None, Some(5))),
            (Some(5), log(Some(5), Some(5))),
            (Some(7), log(Some(5), Some(9))),
        ] {
            assert_eq!(contradiction(applied.map(id), &log, true), None, "{applied:?} {log:?}");
        }
    }

    #[test]
    fn a_log_that_ends_before_the_state_lost_something() {
        let (applied, last) = (id(6), Some(id(5)));
        let found = contradiction(Some(applied), &log(None, Some(5)), true);
        assert_eq!(found, Some(Mismatch::LogTooShort { last, applied }));
        let after_snapshot = contradiction(Some(applied), &log(None, Some(5)), false);
        assert_eq!(after_snapshot, None);
    }

    #[test]
    fn a_state_that_ends_before_the_log_begins_lost_something() {
        for applied in [None, Some(id(4))] {
            for alone in [false, true] {
                let found = contradiction(applied, &log(Some(5), Some(9)), alone);
                assert_eq!(found, Some(Mismatch::StateTooOld { purged: id(5), applied }));
            }
        }
    }
}

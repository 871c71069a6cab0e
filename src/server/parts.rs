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

use std::io;
use std::path::Path;

use thiserror::Error;

use super::data_dir::{DataDirError, wal_dir};
use crate::env::Env;
use crate::join::Identity;
use crate::mvcc::{ReadTxn, Store};
use crate::raft;
use crate::types::{ClusterId, LogId};
use crate::wal::{self, HardState, Record, Urgency, Wal, inspect};

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

/// Drops what of a log contradicts the state: entries that were never committed, under indexes that the state has from
/// elsewhere.
///
/// A snapshot is durable when it is installed; that the log forgets what is in its way is written with the next frame.
/// After a crash in between the log still has, say, entry 50 of term 1, and the state has applied entry 50 of term 2.
pub(super) fn reconcile(wal: &Wal, applied: Option<LogId>) -> Result<(), DataDirError> {
    let state = wal.hard_state();
    let Some(applied) = applied else { return Ok(()) };
    let is_here = state.purged < state.last
        && state.purged.is_none_or(|purged| purged.index < applied.index)
        && state.last.is_some_and(|last| applied.index <= last.index);
    if !is_here {
        return Ok(());
    }
    let failed = |source| wal::OpenError::Io { action: "read", path: wal.dir().to_owned(), source };
    let found = wal.entries(applied.index..applied.index.next(), u64::MAX).map_err(failed)?;
    if found.first().is_none_or(|entry| entry.id == applied) {
        return Ok(());
    }
    tracing::info!(%applied, "the log's end was never committed; the state has what took its place");
    let records = vec![Record::TruncateAfter(state.purged), Record::Purge(applied)];
    let done = wal.append(records, Urgency::RideAlong, |_| ());
    done.map_err(|refused| failed(io::Error::other(refused)))?;
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
pub(super) fn is_alone(view: &ReadTxn, identity: Identity) -> bool {
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
    use crate::testkit::{self, FaultDisk, ManualClock};
    use crate::types::{LogIndex, NodeId, Term};

    fn id(index: u64) -> LogId {
        LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) }
    }

    async fn reconciled(log: Vec<Record>, applied: LogId) -> HardState {
        let disk = FaultDisk::with_dir(Path::new("/db"));
        let env = testkit::env(&disk, &ManualClock::new(), 1);
        let options = wal::Options { segment_bytes: 64 << 10, ..wal::Options::default() };
        let owner = wal::Identity::default();
        let (wal, _, writer) = Wal::open(&env, Path::new("/db/wal"), owner, options).await.unwrap();
        wal.append(log, Urgency::Urgent, |_| ()).unwrap();
        reconcile(&wal, Some(applied)).unwrap();
        let state = wal.hard_state();
        assert!(
            wal.append(vec![entry(9, applied.index.get() + 1)], Urgency::Urgent, |_| ()).is_ok()
        );
        drop(writer);
        state
    }

    fn entry(term: u64, index: u64) -> Record {
        let id = LogId { term: Term::new(term), ..id(index) };
        Record::Entry { id, payload: bytes::Bytes::from_static(b"x") }
    }

    /// A crash between installing a snapshot and forgetting the entries that it replaces: openraft refused to start.
    #[tokio::test]
    async fn uncommitted_entries_under_an_applied_index_are_dropped() {
        let log = || (1..=5).map(|index| entry(1, index)).collect::<Vec<_>>();
        let of_term_2 = |index| LogId { term: Term::new(2), ..id(index) };

        let state = reconciled(log(), of_term_2(4)).await;
        assert_eq!((state.purged, state.last), (Some(of_term_2(4)), Some(of_term_2(4))));

        let purged = [log(), vec![Record::Purge(id(2))]].concat();
        let state = reconciled(purged, of_term_2(5)).await;
        assert_eq!((state.purged, state.last), (Some(of_term_2(5)), Some(of_term_2(5))));
    }

    #[tokio::test]
    async fn entries_that_the_state_has_applied_stay() {
        let log = (1..=5).map(|index| entry(1, index)).collect();
        let state = reconciled(log, id(5)).await;
        assert_eq!((state.purged, state.last), (None, Some(id(5))));
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

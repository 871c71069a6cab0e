//! Opens what a node keeps on disk, in the one order in which a crash in between does no harm.
//!
//! ```text
//! <db-dir>/lock         held while a node runs
//!          node.json    who this node is; written first, at founding
//!          tls/         certificates and keys
//!          state.redb   the state machine at its last checkpoint, with its checksum tables
//!          wal/         the log since then
//! ```

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::env::Env;
use crate::join::{Identity, IdentityError};
use crate::limits;
use crate::mvcc::backend::OpenError;
use crate::mvcc::{self, DrainOn, Store, StoreError};
use crate::raft;
use crate::types::{ClusterId, LogId};
use crate::wal::{self, HardState, Recovery, Wal};

/// Why a data directory cannot be used.
#[derive(Debug, Error)]
pub enum DataDirError {
    /// It cannot be made or entered.
    #[error("cannot use the data directory {path}: {source}")]
    Directory {
        /// The directory.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another process runs on it.
    #[error("the data directory {path} is in use by another process")]
    InUse {
        /// The directory.
        path: String,
    },
    /// Who this node is cannot be told.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Something else has its name.
    #[error("the data directory {path} is a file, expected a directory")]
    NotADirectory {
        /// The path.
        path: String,
    },
    /// The state cannot be opened.
    #[error("{path}: {source}")]
    Store {
        /// Its file.
        path: String,
        /// What is wrong with it.
        source: StoreError,
    },
    /// The log cannot be opened.
    #[error(transparent)]
    Wal(#[from] wal::OpenError),
    /// Files of a node are there, but not the one that says whose they are.
    #[error("{path} holds {found} but no node.json, which says whose it is")]
    Orphan {
        /// The directory.
        path: String,
        /// What was found.
        found: &'static str,
    },
    /// Log, state and identity are not one node's, of one time.
    #[error("the parts of the data directory {path} do not belong together: {mismatch}")]
    Mismatch {
        /// The directory.
        path: String,
        /// What contradicts what.
        mismatch: Mismatch,
    },
}

/// How the parts of a data directory contradict each other. To go on would forget acknowledged writes, or votes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Mismatch {
    /// There is no log at all.
    #[error("there is no log, but the state has applied entry {applied}")]
    LogMissing {
        /// The state's last entry.
        applied: LogId,
    },
    /// The log is durable before the state is, so it cannot end earlier.
    #[error("the log ends {}, but the state has applied entry {applied}", at(*last))]
    LogTooShort {
        /// The log's end.
        last: Option<LogId>,
        /// The state's last entry.
        applied: LogId,
    },
    /// The log forgets only what the state has durably.
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

impl DataDirError {
    /// What the operator can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Directory { path, .. } => format!(
                "make {path} writable for the user that runs k3s-server, or set `db-dir` to a directory that is"
            ),
            Self::InUse { .. } => {
                "stop the other process (`systemctl status k3s-server`), or set another `db-dir`".to_owned()
            }
            Self::NotADirectory { path } => {
                format!("set `db-dir` to a directory, or move the file {path} away")
            }
            Self::Identity(_) | Self::Orphan { .. } => {
                "restore node.json from a backup of this node; without one, move the directory away and start as a new node"
                    .to_owned()
            }
            Self::Store { source: StoreError::Format { .. }, .. } | Self::Wal(wal::OpenError::Version { .. }) => {
                "start the newer release that wrote it; nothing was changed".to_owned()
            }
            Self::Store { source: StoreError::Io(_) | StoreError::Open(OpenError::Io(_)), .. }
            | Self::Wal(wal::OpenError::Io { .. }) => {
                "check that the user that runs k3s-server owns everything in `db-dir`, that the card is not read-only or full, and `journalctl -k -g mmc`"
                    .to_owned()
            }
            Self::Store { .. } => {
                "with other servers running, remove this node from the cluster and join it again; alone, restore a backup"
                    .to_owned()
            }
            Self::Wal(wal::OpenError::Identity { .. }) | Self::Mismatch { .. } => {
                "nothing was changed; a part was lost, copied from another node or restored alone: put the whole directory back as it was at one time; with other servers running, remove this node and join it again"
                    .to_owned()
            }
            Self::Wal(wal::OpenError::Corrupt(_)) => {
                "nothing was changed; `k3s-server wal verify` shows the damage; with other servers running, remove this node and join it again"
                    .to_owned()
            }
        }
    }
}

/// An open data directory.
pub struct DataDir {
    /// Where it is.
    pub path: PathBuf,
    /// Who this node is.
    pub identity: Identity,
    /// Whether this start made the directory's contents.
    pub created: bool,
    /// The state machine's store.
    pub store: Store,
    /// The log.
    pub wal: Wal,
    /// What opening the log found.
    pub recovery: Recovery,
    /// To be dropped when everything above is closed.
    pub lock: Lock,
}

/// Keeps other processes off a data directory.
pub struct Lock(#[allow(dead_code, reason = "held, not used")] Box<dyn Send + Sync>);

/// The state machine's file inside a data directory.
pub const STATE_FILE: &str = "state.redb";

/// The log's directory inside a data directory.
pub fn wal_dir(path: &Path) -> PathBuf {
    path.join("wal")
}

impl DataDir {
    /// Opens the directory, or makes it. Repeating it after a crash at any point finishes the job.
    pub async fn open(
        env: &Env,
        path: &Path,
        linger: std::time::Duration,
    ) -> Result<Self, DataDirError> {
        let lock = lock(env, path)?;
        let (identity, created) = identity(env, path).await?;
        let store = open_store(env, path)?;
        let applied = adopt(&store, path, identity)?;
        if let Some(applied) = applied
            && !has_log(env, path)?
        {
            return Err(mismatch(path, Mismatch::LogMissing { applied }));
        }
        let owner = wal::Identity { cluster: identity.cluster, node: identity.node };
        let options = wal::Options { linger, ..wal::Options::default() };
        let (wal, recovery, writer) = Wal::open(env, &wal_dir(path), owner, options).await?;
        let alone = is_alone(&store, path, identity)?;
        compare(applied, &wal.hard_state(), alone).map_err(|found| mismatch(path, found))?;
        writer.spawn_thread().map_err(|source| directory_error(path, source))?;
        let path = path.to_owned();
        Ok(Self { path, identity, created, store, wal, recovery, lock })
    }
}

fn directory_error(path: &Path, source: io::Error) -> DataDirError {
    let path = path.display().to_string();
    match source.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            DataDirError::NotADirectory { path }
        }
        _ => DataDirError::Directory { path, source },
    }
}

fn store_error(path: &Path, source: StoreError) -> DataDirError {
    DataDirError::Store { path: path.join(STATE_FILE).display().to_string(), source }
}

fn open_store(env: &Env, path: &Path) -> Result<Store, DataDirError> {
    let options = mvcc::Options { cache_bytes: limits::STATE_CACHE_BYTES, drain: DrainOn::Thread };
    Store::open(env, &path.join(STATE_FILE), &options).map_err(|error| store_error(path, error))
}

fn mismatch(path: &Path, mismatch: Mismatch) -> DataDirError {
    DataDirError::Mismatch { path: path.display().to_string(), mismatch }
}

/// Gives a new state its cluster, or checks that an old one has it. Returns the last entry that the state has.
fn adopt(store: &Store, path: &Path, identity: Identity) -> Result<Option<LogId>, DataDirError> {
    let failed = |error| store_error(path, error);
    let view = store.read().map_err(failed)?;
    match view.cluster_id() {
        Some(found) if found == identity.cluster => {}
        Some(found) => {
            let expected = identity.cluster;
            return Err(mismatch(path, Mismatch::Cluster { found, expected }));
        }
        None => {
            let name = store.write(|txn| {
                txn.set_cluster_id(identity.cluster);
                Ok(())
            });
            name.map_err(failed)?;
        }
    }
    Ok(view.applied())
}

/// Whether there is a log, in whatever condition.
fn has_log(env: &Env, path: &Path) -> Result<bool, DataDirError> {
    let dir = wal_dir(path);
    if !env.disk.exists(&dir).map_err(|source| directory_error(path, source))? {
        return Ok(false);
    }
    let files = env.disk.list(&dir).map_err(|source| directory_error(&dir, source))?;
    Ok(files.iter().any(|file| file.extension().is_some_and(|extension| extension == "wal")))
}

/// Whether this node is the only voter, as far as the state knows.
fn is_alone(store: &Store, path: &Path, identity: Identity) -> Result<bool, DataDirError> {
    let view = store.read().map_err(|error| store_error(path, error))?;
    // A membership that cannot be read is reported by Raft, which needs it.
    let voters = raft::inspect::voters(&view).unwrap_or_default();
    Ok(voters.len() == 1 && voters.contains(&identity.node))
}

/// Whether log and state can be two halves of one node. With other voters, a snapshot may have come from them and
/// the log's own end with it got lost in a crash.
fn compare(applied: Option<LogId>, log: &HardState, alone: bool) -> Result<(), Mismatch> {
    let index = |id: Option<LogId>| id.map(|id| id.index);
    if let Some(purged) = log.purged
        && index(applied) < Some(purged.index)
    {
        return Err(Mismatch::StateTooOld { purged, applied });
    }
    if let Some(applied) = applied
        && alone
        && index(log.last) < Some(applied.index)
    {
        return Err(Mismatch::LogTooShort { last: log.last, applied });
    }
    Ok(())
}

fn lock(env: &Env, path: &Path) -> Result<Lock, DataDirError> {
    env.disk.create_dir_all(path).map_err(|source| directory_error(path, source))?;
    env.disk.lock(&path.join("lock")).map(Lock).map_err(|source| {
        if source.kind() == io::ErrorKind::WouldBlock {
            DataDirError::InUse { path: path.display().to_string() }
        } else {
            directory_error(path, source)
        }
    })
}

/// Who this node is; a new one if the directory is new. The second value says which.
async fn identity(env: &Env, path: &Path) -> Result<(Identity, bool), DataDirError> {
    if let Some(identity) = Identity::load(env, path)? {
        return Ok((identity, false));
    }
    for found in [STATE_FILE, "wal"] {
        let exists = env.disk.exists(&path.join(found));
        if exists.map_err(|source| directory_error(path, source))? {
            return Err(DataDirError::Orphan { path: path.display().to_string(), found });
        }
    }
    let identity = Identity::random(env);
    identity.store(env, path).await?;
    Ok((identity, true))
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
            assert_eq!(compare(applied.map(id), &log, true), Ok(()), "{applied:?} {log:?}");
        }
    }

    #[test]
    fn a_log_that_ends_before_the_state_lost_something() {
        let (applied, last) = (id(6), Some(id(5)));
        let expected = Err(Mismatch::LogTooShort { last, applied });
        assert_eq!(compare(Some(applied), &log(None, Some(5)), true), expected);
        assert_eq!(compare(Some(applied), &log(None, Some(5)), false), Ok(()), "a snapshot came");
    }

    #[test]
    fn a_state_that_ends_before_the_log_begins_lost_something() {
        for applied in [None, Some(id(4))] {
            for alone in [false, true] {
                let expected = Err(Mismatch::StateTooOld { purged: id(5), applied });
                assert_eq!(compare(applied, &log(Some(5), Some(9)), alone), expected);
            }
        }
    }
}

//! Opens what a node keeps on disk, in the one order in which a crash in between does no harm.
//!
//! ```text
//! <db-dir>/lock         held while a node runs
//!          node.json    who this node is; written first, at founding
//!          tls/         certificates and keys
//!          ballast      given back when the card is full
//!          scrubbed     when the card was last checked
//!          state.redb   the state machine at its last checkpoint, with its checksum tables
//!          wal/         the log since then
//!          flags        the critical flags as seen last; a hint
//! ```

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::mend::{self, CarryOutError, Unmendable};
use super::parts::{self, Mismatch};
use super::tuning::Tuning;
use crate::env::Env;
use crate::join::{Identity, IdentityError};
use crate::limits;
use crate::mvcc::backend::OpenError;
use crate::mvcc::ballast::{Sizes, Space, SpaceGuard};
use crate::mvcc::{self, DrainOn, Store, StoreError};
use crate::proto::node::FormatRecord;
use crate::raft::inspect;
use crate::versions;
use crate::wal::{self, Old, Recovery, Wal};

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
    #[error("{path} is a file, expected a directory")]
    NotADirectory {
        /// The path.
        path: String,
    },
    /// The state cannot be opened.
    #[error("{STATE_FILE}: {0}")]
    Store(#[from] StoreError),
    /// The log cannot be opened.
    #[error(transparent)]
    Wal(#[from] wal::OpenError),
    /// The log is damaged, and this node cannot go on without what is missing in it.
    #[error("write-ahead log: {damage}; {why}")]
    Damaged {
        /// The directory.
        path: String,
        /// Where.
        damage: Box<wal::Damage>,
        /// What keeps it from going on.
        why: Unmendable,
    },
    /// Written, or about to be written, in a format that this release does not read.
    #[error(
        "the data in {path} is in format {found}{}, release {} reads up to {}",
        raised_by(release), versions::own().name, versions::own().format
    )]
    Newer {
        /// The directory.
        path: String,
        /// Its format.
        found: u32,
        /// The release that raised it, if that is known.
        release: String,
    },
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

impl From<CarryOutError> for DataDirError {
    fn from(error: CarryOutError) -> Self {
        match error {
            CarryOutError::Store(error) => Self::Store(error),
            CarryOutError::Wal(error) => Self::Wal(error),
        }
    }
}

impl DataDirError {
    /// Whether a newer release wrote it: starting this one again changes nothing.
    pub const fn is_newer(&self) -> bool {
        matches!(
            self,
            Self::Newer { .. }
                | Self::Store(StoreError::Format { .. })
                | Self::Wal(wal::OpenError::Version { .. })
                | Self::Identity(IdentityError::Format { .. })
        )
    }

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
            Self::Store(StoreError::Format { .. })
            | Self::Wal(wal::OpenError::Version { .. })
            | Self::Newer { .. } => {
                "the data is untouched; install the release that the other servers run, or a later one"
                    .to_owned()
            }
            Self::Store(StoreError::Io(_) | StoreError::Open(OpenError::Io(_)))
            | Self::Wal(wal::OpenError::Io { .. }) => {
                "check that the user that runs k3s-server owns everything in `db-dir`, that the card is neither full nor read-only, and `journalctl -k -g mmc`"
                    .to_owned()
            }
            Self::Store(_) => {
                "with other servers running, remove this node from the cluster and join it again; alone, restore a backup"
                    .to_owned()
            }
            Self::Wal(wal::OpenError::Identity { .. }) | Self::Mismatch { .. } => {
                "a part was lost, copied from another node or restored alone; put the whole directory back as it was at one time; with other servers running, remove this node and join it again"
                    .to_owned()
            }
            Self::Wal(wal::OpenError::Corrupt(_))
            | Self::Damaged { why: Unmendable::OtherVoters, .. } => {
                "nothing was changed; `k3s-server wal verify` shows the damage; with other servers running, remove this node and join it again"
                    .to_owned()
            }
            Self::Damaged { why: Unmendable::EmptyState | Unmendable::State(_), .. } => {
                "nothing was changed; restore the last backup".to_owned()
            }
            Self::Damaged { path, why: Unmendable::Lost(_), .. } => format!(
                "nothing was changed; restore the last backup, or go on without these entries: `k3s-server wal repair --accept-data-loss {path}`, which keeps the damaged log aside"
            ),
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
    /// Watches the room on the card.
    pub space: SpaceGuard,
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

/// A data directory that is ours and is not open yet.
pub struct Locked {
    /// Where it is.
    pub path: PathBuf,
    lock: Lock,
}

impl Locked {
    /// Makes the directory if need be, and keeps other processes off it.
    pub fn take(env: &Env, path: &Path) -> Result<Self, DataDirError> {
        Ok(Self { path: path.to_owned(), lock: lock(env, path)? })
    }

    /// Who this node is; `None` in a new directory.
    pub fn identity(&self, env: &Env) -> Result<Option<Identity>, DataDirError> {
        let path = &self.path;
        if let Some(identity) = Identity::load(env, path)? {
            return Ok(Some(identity));
        }
        for found in [STATE_FILE, "wal"] {
            let exists = env.disk.exists(&path.join(found));
            if exists.map_err(|source| directory_error(path, source))? {
                return Err(DataDirError::Orphan { path: path.display().to_string(), found });
            }
        }
        Ok(None)
    }

    /// Opens log and state, or makes them. Repeating it after a crash at any point finishes the job.
    pub async fn open(
        self,
        env: &Env,
        identity: Identity,
        tuning: &Tuning,
    ) -> Result<DataDir, DataDirError> {
        let Self { path, lock } = self;
        let created = !env
            .disk
            .exists(&path.join(STATE_FILE))
            .map_err(|source| directory_error(&path, source))?;
        // Before the store: a card that is full gets the ballast back, so that replaying the log has room.
        let space = SpaceGuard::open(env, &path.join("ballast"), Sizes::default())
            .map_err(|source| directory_error(&path, source))?;
        let options =
            mvcc::Options { cache_bytes: limits::STATE_CACHE_BYTES, drain: DrainOn::Thread };
        let store = Store::open(env, &path.join(STATE_FILE), &options)?;
        store.set_room_low(*space.space().borrow() == Space::Low);
        parts::check(env, &path, &store, identity)?;
        let Tuning { linger, fill_pause, .. } = *tuning;
        let options = wal::Options { linger, fill_pause, ..wal::Options::default() };
        let (wal, recovery, writer) = open_log(env, &path, &store, identity, options).await?;
        refuse_newer(&path, &store, &wal)?;
        parts::reconcile(&wal, store.read()?.applied())?;
        writer.spawn_thread().map_err(|source| directory_error(&path, source))?;
        Ok(DataDir { path, identity, created, space, store, wal, recovery, lock })
    }
}

fn raised_by(release: &str) -> String {
    if release.is_empty() { String::new() } else { format!(" (raised with release {release})") }
}

/// Refuses what this release cannot go on with, before it takes part in anything.
fn refuse_newer(path: &Path, store: &Store, wal: &Wal) -> Result<(), DataDirError> {
    // What cannot be read is told by whoever needs it.
    let Ok(tail) = inspect::tail(&store.read()?, wal) else { return Ok(()) };
    let FormatRecord { format: found, release } = tail.format;
    if found <= versions::own().format {
        return Ok(());
    }
    Err(DataDirError::Newer { path: path.display().to_string(), found, release })
}

/// Opens the log; a damaged one begins anew, if nothing is lost by that.
async fn open_log(
    env: &Env,
    path: &Path,
    store: &Store,
    identity: Identity,
    options: wal::Options,
) -> Result<(Wal, Recovery, wal::Writer), DataDirError> {
    let (dir, owner) = (wal_dir(path), mend::owner(identity));
    let damage = match Wal::open(env, &dir, owner, options).await {
        Err(wal::OpenError::Corrupt(damage)) => damage,
        other => return Ok(other?),
    };
    let plan = mend::plan(env, path, store, identity)?.and_then(|plan| match plan.salvage.lost {
        None => Ok(plan),
        Some(lost) => Err(Unmendable::Lost(lost)),
    });
    let plan = match plan {
        Ok(plan) => plan,
        Err(why) => {
            mend::announce_unmendable(path, &damage, &why);
            return Err(DataDirError::Damaged { path: path.display().to_string(), damage, why });
        }
    };
    mend::carry_out(env, path, store, identity, &plan, Old::Remove).await?;
    mend::announce_mended(path, &plan);
    Ok(Wal::open(env, &dir, owner, options).await?)
}

fn directory_error(path: &Path, source: io::Error) -> DataDirError {
    let path = path.display().to_string();
    if matches!(source.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory) {
        return DataDirError::NotADirectory { path };
    }
    DataDirError::Directory { path, source }
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

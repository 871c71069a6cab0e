//! `wal repair`: begins a damaged log anew, also where that gives up acknowledged writes, if the operator says so.
//!
//! Only for a node that is the only voter, and stopped. What nothing is lost by, a start does by itself ([`super::mend`]);
//! this is for what it refuses. Nothing is changed before what will be lost has been printed and accepted, and the damaged log
//! is moved aside, not removed.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::data_dir::{STATE_FILE, wal_dir};
use super::mend::{self, CarryOutError, Plan, Unmendable};
use crate::env::{Env, host};
use crate::join::{Identity, IdentityError};
use crate::limits;
use crate::mvcc::{self, DrainOn, Store, StoreError};
use crate::wal::{self, Lost, Old, inspect};

/// Why a log was not repaired. Nothing was changed, unless it says so.
#[derive(Debug, Error)]
pub enum RepairError {
    /// A node runs on the directory.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// There is no node here.
    #[error("{} holds no node: there is no node.json", path.display())]
    NoNode {
        /// The directory.
        path: PathBuf,
    },
    /// Acknowledged writes would be given up, and nobody has agreed to that.
    #[error("acknowledged writes would be lost; nothing was changed")]
    NotAccepted,
    /// It would be unsafe, or there is nothing to go on with.
    #[error("{0}; nothing was changed")]
    Unmendable(#[from] Unmendable),
    /// Who the node is cannot be told.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The log cannot be read at all.
    #[error(transparent)]
    Log(#[from] wal::OpenError),
    /// The state cannot be opened.
    #[error("{STATE_FILE}: {0}")]
    Store(#[from] StoreError),
    /// A file, or the output.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl RepairError {
    /// What the operator can do, where there is something.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::InUse { .. } => Some("stop it first: `systemctl stop k3s-server`"),
            Self::NoNode { .. } => Some("give the directory that `db-dir` names"),
            Self::NotAccepted => Some(
                "restore a backup that has them; or give them up for good with `--accept-data-loss`",
            ),
            Self::Unmendable(Unmendable::OtherVoters) => Some(
                "remove this node from the cluster and join it again; the others have everything",
            ),
            Self::Unmendable(_) => Some("restore the last backup"),
            Self::Identity(_) | Self::Log(_) | Self::Store(_) | Self::Io(_) => None,
        }
    }
}

impl From<CarryOutError> for RepairError {
    fn from(error: CarryOutError) -> Self {
        match error {
            CarryOutError::Store(error) => Self::Store(error),
            CarryOutError::Wal(error) => Self::Log(error),
        }
    }
}

/// Repairs the log of a stopped node. Prints what is wrong, what is kept and what is lost.
pub fn repair(
    directory: &Path,
    accept_data_loss: bool,
    out: &mut dyn Write,
) -> Result<(), RepairError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(repair_in(&host::env(), directory, accept_data_loss, out))
}

async fn repair_in(
    env: &Env,
    path: &Path,
    accept_data_loss: bool,
    out: &mut dyn Write,
) -> Result<(), RepairError> {
    let Some(identity) = Identity::load(env, path)? else {
        return Err(RepairError::NoNode { path: path.to_owned() });
    };
    let _lock = env.disk.lock(&path.join("lock")).map_err(|error| {
        if error.kind() == io::ErrorKind::WouldBlock {
            RepairError::InUse { path: path.to_owned() }
        } else {
            RepairError::Io(error)
        }
    })?;
    let report = inspect::verify(&*env.disk, &wal_dir(path))?;
    if report.damage.is_none() {
        writeln!(out, "the log is whole; nothing was changed")?;
        return Ok(());
    }
    let options = mvcc::Options { cache_bytes: limits::STATE_CACHE_BYTES, drain: DrainOn::Thread };
    let store = Store::open(env, &path.join(STATE_FILE), &options)?;
    let repaired = repair_with(env, path, &store, identity, accept_data_loss, out).await;
    let closed = store.close().await;
    repaired?;
    Ok(closed?)
}

async fn repair_with(
    env: &Env,
    path: &Path,
    store: &Store,
    identity: Identity,
    accept_data_loss: bool,
    out: &mut dyn Write,
) -> Result<(), RepairError> {
    let plan = mend::plan(env, path, store, identity)??;
    print(&plan, out)?;
    if plan.salvage.lost.is_some() && !accept_data_loss {
        return Err(RepairError::NotAccepted);
    }
    let aside = aside(env, path)?;
    mend::carry_out(env, path, store, identity, &plan, Old::MoveTo(&aside)).await?;
    writeln!(out, "done; the damaged log is in {}", aside.display())?;
    Ok(())
}

fn print(plan: &Plan, out: &mut dyn Write) -> io::Result<()> {
    for damage in &plan.salvage.damage {
        writeln!(out, "damage: {damage}")?;
    }
    writeln!(out, "kept: everything up to entry {}, from the state", plan.covered.index)?;
    let entries = &plan.salvage.entries;
    if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
        writeln!(out, "kept: entries {} to {}, from the log", first.id.index, last.id.index)?;
    }
    match plan.salvage.lost {
        None => writeln!(out, "lost: nothing"),
        Some(Lost { first, last_seen: Some(last) }) => {
            writeln!(out, "lost: entries {first} to {last}, and any that followed")
        }
        Some(Lost { first, last_seen: None }) => {
            writeln!(out, "lost: entry {first} and any that followed, if there were any")
        }
    }
}

/// A directory that is not there yet.
fn aside(env: &Env, path: &Path) -> io::Result<PathBuf> {
    for number in 1_u32.. {
        let aside = path.join(format!("wal.damaged-{number}"));
        if !env.disk.exists(&aside)? {
            return Ok(aside);
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

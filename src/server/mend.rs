//! Lets a node that is alone go on with a damaged log, where the state has all that the damage can have hidden.
//!
//! A damaged log may have forgotten a vote, or entries that it acknowledged. A node with peers must not go on with it: they
//! have what it lost, and it joins again under a new id. A single voter has nobody to ask; but nobody else has its promises
//! either, and everything up to its last checkpoint stands in the state a second time. So it begins its log anew after the
//! checkpoint, with the entries that follow, if every one of them can still be read.
//!
//! # Invariants
//!
//! - Nothing is begun anew unless the whole state, block by block and record by record, is what was written.
//! - The state is durable before the log that led to it goes.
//! - The new vote's term is above every term that can be read in the old log.
//!
//! # Not here
//!
//! What a damaged log still proves: `wal::salvage`. How a log is replaced without a moment in between: `wal::start_over`.

use std::path::Path;

use thiserror::Error;

use super::data_dir::wal_dir;
use super::parts::is_alone;
use crate::announce;
use crate::env::Env;
use crate::events::{EventId, fields};
use crate::join::Identity;
use crate::mvcc::{Store, StoreError};
use crate::raft::inspect::{Content, content};
use crate::types::{LogId, Term, Vote};
use crate::wal::{self, Beginning, Entry, Lost, Old, Salvage};

/// Why a node cannot go on with a damaged log.
#[derive(Debug, Error)]
pub enum Unmendable {
    /// They have what it lost.
    #[error("this node is not the only voter, and may have forgotten what it promised the others")]
    OtherVoters,
    /// There is nothing that could stand in for the log.
    #[error("the state is empty, so nothing stands in for what is damaged")]
    EmptyState,
    /// What should stand in for the log is damaged too.
    #[error("the state, which could stand in for it, is damaged too: {0}")]
    State(StoreError),
    /// Acknowledged entries would be missing.
    #[error("{}", lost(.0))]
    Lost(Lost),
}

fn lost(lost: &Lost) -> String {
    let first = lost.first;
    match lost.last_seen {
        Some(last) => format!(
            "entry {first} and what follows it, up to entry {last} at least, cannot be read and is not in the state"
        ),
        None => {
            format!("entry {first} and what may follow it cannot be read and is not in the state")
        }
    }
}

/// What can be done about a damaged log.
#[derive(Debug)]
pub(super) struct Plan {
    /// The last entry that the state has.
    pub(super) covered: LogId,
    pub(super) salvage: Salvage,
}

/// Looks at a damaged log and at the state. Changes nothing.
pub(super) fn plan(
    env: &Env,
    path: &Path,
    store: &Store,
    identity: Identity,
) -> Result<Result<Plan, Unmendable>, wal::OpenError> {
    let view = match store.read() {
        Ok(view) => view,
        Err(error) => return Ok(Err(Unmendable::State(error))),
    };
    if !is_alone(&view, identity) {
        return Ok(Err(Unmendable::OtherVoters));
    }
    let Some(covered) = view.applied() else { return Ok(Err(Unmendable::EmptyState)) };
    if let Err(error) = store.verify() {
        return Ok(Err(Unmendable::State(error)));
    }
    let salvage = wal::salvage(&*env.disk, &wal_dir(path), Some(owner(identity)), covered)?;
    if salvage.entries.iter().any(|entry| names_others(entry, identity)) {
        return Ok(Err(Unmendable::OtherVoters));
    }
    Ok(Ok(Plan { covered, salvage }))
}

/// Whether somebody else votes from this entry on; also if that cannot be told.
fn names_others(entry: &Entry, identity: Identity) -> bool {
    match content(&entry.payload) {
        Ok(Content::Voters(voters)) => voters.iter().any(|voter| *voter != identity.node),
        Ok(Content::Blank | Content::Command(_)) => false,
        Err(_) => true,
    }
}

pub(super) const fn owner(identity: Identity) -> wal::Identity {
    wal::Identity { cluster: identity.cluster, node: identity.node }
}

/// Begins the log anew as planned, whatever is lost by it.
pub(super) async fn carry_out(
    env: &Env,
    path: &Path,
    store: &Store,
    identity: Identity,
    plan: &Plan,
    old: Old<'_>,
) -> Result<(), CarryOutError> {
    // What was read of the state may have been in the page cache only, left by a process that was killed.
    store.checkpoint()?.durable().await?;
    let term = Term::new(plan.salvage.term.get() + 1);
    let beginning = Beginning {
        after: Some(plan.covered),
        vote: Some(Vote { term, node: identity.node, committed: false }),
        entries: plan.salvage.entries.clone(),
    };
    let options = wal::Options::default();
    wal::start_over(env, &wal_dir(path), owner(identity), &options, &beginning, old).await?;
    Ok(())
}

/// Why a planned repair was not made. The old log is still there.
#[derive(Debug, Error)]
pub enum CarryOutError {
    /// The state did not become durable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The new log could not be written.
    #[error(transparent)]
    Wal(#[from] wal::OpenError),
}

/// Says what was done.
pub(super) fn announce_mended(path: &Path, plan: &Plan) {
    let (covered, kept) = (plan.covered.index, plan.salvage.entries.len());
    for damage in &plan.salvage.damage {
        announce!(
            EventId::LogStartedOver,
            { fields::PATH } = %wal_dir(path).display(),
            { fields::INDEX } = covered.get(),
            { fields::REASON } = %damage,
            "the log was damaged ({damage}), but the state has everything up to entry {covered}: the log begins anew after it, with the {kept} entries that follow; nothing was lost"
        );
    }
}

/// Says that nothing can be done here.
pub(super) fn announce_unmendable(path: &Path, damage: &wal::Damage, why: &Unmendable) {
    announce!(
        EventId::LogCorrupt,
        { fields::PATH } = %wal_dir(path).display(),
        { fields::REASON } = %damage,
        "the log is damaged: {damage}; {why}"
    );
}

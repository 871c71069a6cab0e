//! Keeps a server's critical flags and the cluster's record together: at its start, and while it runs.
//!
//! # Shape
//!
//! [`local`] compares before Raft runs, with what the disk has; [`establish`] once Raft runs: it records the flags where
//! there is no record yet, which is how a cluster is founded. [`follow`] notices when an operator changes the record.
//!
//! # Invariants
//!
//! - A start that was interrupted before the record was written writes it at the next start.
//! - A running server goes on with flags that were changed under it: it says so, and is refused at its next start.

use std::time::{Duration, Instant};

use bytes::Bytes;
use thiserror::Error;

use crate::announce;
use crate::apply::{self, Reply};
use crate::critical::{CriticalFlags, FlagsError, MatchedFlags, gate};
use crate::events::EventId;
use crate::mvcc::{ReadTxn, StoreError};
use crate::raft::{Node, ProposeError};

/// How often the record is looked at, at most. It changes once in a cluster's life, if ever.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Why a server could not be matched with its cluster.
#[derive(Debug, Error)]
pub enum EstablishError {
    /// It does not match, or that cannot be told.
    #[error(transparent)]
    Flags(#[from] FlagsError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The record could not be written.
    #[error("recording the critical flags: {0}")]
    Propose(#[from] ProposeError),
}

/// Compares with the local copy, which may be behind. `None`: there is no record in it.
pub fn local(own: &CriticalFlags, view: &ReadTxn) -> Result<Option<MatchedFlags>, EstablishError> {
    match apply::flags(view)? {
        None => Ok(None),
        Some(record) => Ok(Some(gate::against(own, &record)?)),
    }
}

/// Compares with the record, and writes it first where there is none: then these flags are the cluster's.
pub async fn establish(
    node: &Node,
    own: &CriticalFlags,
    node_name: &str,
    deadline: Instant,
) -> Result<MatchedFlags, EstablishError> {
    if let Some(matched) = local(own, &node.store().read()?)? {
        return Ok(matched);
    }
    let (record, _) = own.found(node.env().clock.wall(), node_name);
    let outcome = node.propose(gate::founding(&record), deadline).await?;
    if let Ok(Reply::Cluster(answer)) = &outcome.reply {
        // With a conflict somebody else was first; then theirs counts.
        tracing::debug!(result = ?answer.result(), "the critical flags were offered as the cluster's");
    }
    local(own, &node.store().read()?)?.ok_or_else(|| FlagsError::Unrecorded.into())
}

/// Compares whenever the record changes, for as long as the node runs, and says where this server differs.
pub async fn follow(node: Node, own: CriticalFlags) {
    let mut status = node.watch_status();
    let clock = std::sync::Arc::clone(&node.env().clock);
    let mut seen = Bytes::new();
    loop {
        match record(&node) {
            Ok(record) if record != seen => {
                report(&own, &record);
                seen = record;
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the critical flags cannot be read"),
        }
        clock.sleep(LOOK_INTERVAL).await;
        if status.changed().await.is_err() {
            return;
        }
    }
}

fn record(node: &Node) -> Result<Bytes, StoreError> {
    Ok(apply::flags(&node.store().read()?)?.unwrap_or_default())
}

fn report(own: &CriticalFlags, record: &[u8]) {
    match gate::against(own, record) {
        Ok(_) => announce!(EventId::FlagsMatch, "the critical flags are those of the cluster"),
        Err(FlagsError::Differ(mismatches)) => mismatches.announce_outdated(),
        Err(FlagsError::Unrecorded) => {}
        Err(error @ FlagsError::Record(_)) => {
            tracing::warn!(%error, "the critical flags cannot be compared");
        }
    }
}

//! Keeps a server's critical flags and the cluster's record together: at its start, and while it runs.
//!
//! # Shape
//!
//! [`local`] compares before Raft runs, with what the disk has; [`establish`] once Raft runs: it records the flags where
//! there is no record yet, which is how a cluster is founded. [`follow`] notices when an operator changes the record, and
//! keeps what it saw last in a file ([`seen`]), so that a start that will be refused is noticed before anything is opened.
//!
//! # Invariants
//!
//! - A start that was interrupted before the record was written writes it at the next start.
//! - The file is a hint: it may be old, and decides nothing by itself.
//! - A running server goes on with flags that were changed under it: it says so, and is refused at its next start.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use thiserror::Error;

use crate::announce;
use crate::apply::{self, Reply};
use crate::critical::{CriticalFlags, FlagsError, MatchedFlags, gate};
use crate::env::Env;
use crate::events::EventId;
use crate::mvcc::{ReadTxn, StoreError};
use crate::proto::node::SeenCluster;
use crate::raft::{Node, ProposeError};

/// In the data directory: a [`SeenCluster`] and its CRC-32C.
pub const FILE: &str = "flags";

const CRC_BYTES: usize = 4;

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

/// The cluster as this server saw it last. A file that is damaged is none.
pub fn seen(env: &Env, dir: &Path) -> io::Result<Option<SeenCluster>> {
    let Some(bytes) = super::file::read(&*env.disk, &dir.join(FILE))? else { return Ok(None) };
    let Some((message, crc)) = bytes.split_last_chunk::<CRC_BYTES>() else { return Ok(None) };
    let sound = crc32c::crc32c(message) == u32::from_le_bytes(*crc);
    Ok(sound.then(|| SeenCluster::decode(message).ok()).flatten())
}

/// Keeps it for [`seen`]; writes only what is new.
pub async fn keep(env: &Env, dir: &Path, cluster: &SeenCluster) -> io::Result<()> {
    if seen(env, dir)?.as_ref() == Some(cluster) {
        return Ok(());
    }
    let mut bytes = cluster.encode_to_vec();
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    super::file::replace(env, &dir.join(FILE), &bytes).await
}

/// Compares whenever the record changes, for as long as the node runs; says where this server differs, and keeps what it saw
/// in `dir`.
pub async fn follow(node: Node, own: CriticalFlags, dir: PathBuf) {
    let mut status = node.watch_status();
    let clock = Arc::clone(&node.env().clock);
    let mut last = SeenCluster::default();
    loop {
        match look(&node) {
            Ok(cluster) if cluster != last => {
                if cluster.flags != last.flags {
                    report(&own, &cluster.flags);
                }
                if let Err(error) = keep(node.env(), &dir, &cluster).await {
                    // A refusal is noticed later then, and nothing else is lost.
                    tracing::debug!(%error, "{FILE} was not written");
                }
                last = cluster;
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

fn look(node: &Node) -> Result<SeenCluster, StoreError> {
    let flags = apply::flags(&node.store().read()?)?.unwrap_or_default();
    let status = node.status();
    let others = status.members.iter().filter(|member| member.id != status.node);
    let client_urls = others.flat_map(|member| member.client_urls.clone()).collect();
    Ok(SeenCluster { flags, client_urls })
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::env::host;

    #[tokio::test]
    async fn what_was_seen_is_kept_and_damage_is_not_believed() {
        let (env, dir) = (host::env(), tempfile::tempdir().unwrap());
        let cluster = |flags: &'static str, urls: &[&str]| SeenCluster {
            flags: flags.into(),
            client_urls: urls.iter().map(|url| (*url).to_owned()).collect(),
        };
        assert_eq!(seen(&env, dir.path()).unwrap(), None);
        for one in [cluster("first", &[]), cluster("second", &["a", "b"]), cluster("", &[])] {
            keep(&env, dir.path(), &one).await.unwrap();
            assert_eq!(seen(&env, dir.path()).unwrap(), Some(one));
        }
        keep(&env, dir.path(), &cluster("record", &["https://10.0.0.2:2379"])).await.unwrap();
        let path = dir.path().join(FILE);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            assert_eq!(seen(&env, dir.path()).unwrap(), None, "byte {at}");
            fs::write(&path, &good[..at]).unwrap();
            assert_eq!(seen(&env, dir.path()).unwrap(), None, "cut at {at}");
        }
    }
}

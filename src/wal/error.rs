//! Says why the log cannot be opened, why it stopped, and what it refuses.
//!
//! Grouped by what the caller does next: [`OpenError::Corrupt`] is repaired from peers or by the operator,
//! [`OpenError::Identity`] is an operator's mistake, [`Failed`] stops the node.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use super::Identity;
use super::format::Defect;
use crate::limits::WAL_BLOCK_BYTES;
use crate::types::{LogId, SegmentNo};

/// Bytes that were durable once and are not what was written.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{} is damaged at byte {offset}: {defect}", path.display())]
pub struct Damage {
    /// The slot, or the log's directory if a whole slot is missing.
    pub path: PathBuf,
    /// The segment in it, where its header can be read.
    pub segment: Option<SegmentNo>,
    /// Where the damaged structure starts.
    pub offset: u64,
    /// The last entry that can be read before the damage.
    pub last_good: Option<LogId>,
    /// What is wrong.
    pub defect: Defect,
}

impl Damage {
    /// The block it starts at.
    pub(super) fn block(&self) -> u32 {
        u32::try_from(self.offset / WAL_BLOCK_BYTES).unwrap_or(u32::MAX)
    }
}

/// Why the log does not open.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Something acknowledged may be lost: this node must not vote or acknowledge with this log.
    #[error("write-ahead log: {0}")]
    Corrupt(Box<Damage>),
    /// Another node's log, or another cluster's.
    #[error(
        "{} belongs to node {} of cluster {}, expected node {} of cluster {}",
        path.display(), found.node, found.cluster, expected.node, expected.cluster
    )]
    Identity {
        /// The slot.
        path: PathBuf,
        /// Whose it is.
        found: Identity,
        /// Who asks.
        expected: Identity,
    },
    /// Written by a newer release.
    #[error("{} has log format {found}, this release reads up to {}", path.display(), super::format::FORMAT_VERSION)]
    Version {
        /// The slot.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl From<Damage> for OpenError {
    fn from(damage: Damage) -> Self {
        Self::Corrupt(Box::new(damage))
    }
}

impl OpenError {
    /// For `map_err`: what was tried, on what.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// Why the log takes and acknowledges nothing any more. Final.
#[derive(Clone, Debug, Error)]
pub enum Failed {
    /// A write or a barrier failed. What it covered may or may not be on the card.
    #[error("cannot {action} {}: {source}; stopping so that nothing unsafe is acknowledged", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: Arc<io::Error>,
    },
    /// The log was closed, or its writer is gone.
    #[error("the write-ahead log is closed")]
    Closed,
}

impl Failed {
    /// Whether the card is full.
    pub(super) fn is_for_lack_of_room(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Closed => false,
        }
    }

    /// For `map_err`: what was tried, on what.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source: Arc::new(source) }
    }
}

/// Why an append was not taken. Nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// The entry does not continue the log.
    #[error("entry {found} does not continue a log that ends at {last}")]
    Gap {
        /// The entry.
        found: LogId,
        /// The log's end.
        last: LogId,
    },
    /// No frame can hold it.
    #[error("record of {found} bytes, expected at most {expected}")]
    TooLarge {
        /// Its size.
        found: usize,
        /// The limit.
        expected: usize,
    },
}

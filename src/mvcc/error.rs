//! Says what is wrong with the store's file, grouped by what the caller does next.

use std::io;

use thiserror::Error;

use super::backend::{self, Failure, Fault, OpenError};
use crate::types::LogId;

/// The store failed underneath: nothing a client did.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Stored bytes are not what was written. This node's copy cannot be trusted: stop serving it, refill from
    /// peers.
    #[error("state table {table} is damaged: {what}")]
    Damaged {
        /// The table.
        table: &'static str,
        /// What was found, and where.
        what: String,
    },
    /// Written by a newer release: nothing is wrong with it.
    #[error("state file has format version {found}, this release reads up to {supported}")]
    Format {
        /// The file's version.
        found: u32,
        /// The newest version this build reads.
        supported: u32,
    },
    /// The files around the store cannot be made, renamed or removed.
    #[error("state file: {0}")]
    Io(#[from] io::Error),
    /// The store was closed.
    #[error("state file is closed")]
    Closed,
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Writing to the card failed, or a block read from it is not what was written.
    #[error(transparent)]
    Card(Failure),
    /// The file was to be replaced, and a write came in meanwhile. Nothing was changed.
    #[error("state file was written while it was being replaced; nothing was changed, try again")]
    Overtaken,
    /// An entry of the log that this release cannot apply.
    #[error("cannot apply entry {id}: {what}")]
    Entry {
        /// The entry.
        id: LogId,
        /// What is wrong with it.
        what: String,
    },
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopping,
    /// A snapshot stream is not one, is cut off, or does not add up. The receiver's store is unchanged.
    #[error("snapshot stream: {0}")]
    Stream(String),
    /// The B-tree refuses what it is asked; a bug of ours, or of it.
    #[error("state engine: {0}")]
    Engine(String),
}

impl StoreError {
    /// What it means for the node; `None` if the store is as good as before.
    pub fn fault(&self) -> Option<Fault> {
        match self {
            Self::Damaged { .. } => Some(Fault::Damaged),
            Self::Card(failure) => Some(failure.fault()),
            Self::Io(error) | Self::Open(OpenError::Io(error)) => {
                Some(if backend::is_full(error) { Fault::Full } else { Fault::Card })
            }
            Self::Open(
                OpenError::Length { .. }
                | OpenError::NotBlocks(_)
                | OpenError::Unverified(_)
                | OpenError::Damaged(_),
            ) => Some(Fault::Damaged),
            Self::Format { .. }
            | Self::Closed
            | Self::Overtaken
            | Self::Entry { .. }
            | Self::Stopping
            | Self::Stream(_)
            | Self::Engine(_) => None,
        }
    }

    /// Whether the card is full: deletes and compaction may help, a new card need not.
    pub fn is_no_space(&self) -> bool {
        self.fault() == Some(Fault::Full)
    }

    /// Whether stored bytes are not what was written: this node's copy must not be served any more.
    pub fn is_damage(&self) -> bool {
        self.fault() == Some(Fault::Damaged)
    }

    /// What has made the file useless, if this is about the file.
    pub(super) fn failure(&self) -> Option<Failure> {
        match self {
            Self::Damaged { table, what } => Some(Failure::Record { table, what: what.clone() }),
            Self::Card(failure) => Some(failure.clone()),
            Self::Format { .. }
            | Self::Io(_)
            | Self::Closed
            | Self::Open(_)
            | Self::Overtaken
            | Self::Entry { .. }
            | Self::Stopping
            | Self::Stream(_)
            | Self::Engine(_) => None,
        }
    }

    pub(crate) fn damaged(table: &'static str, what: impl Into<String>) -> Self {
        Self::Damaged { table, what: what.into() }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Record { table, what } => Self::Damaged { table, what },
            card @ (Failure::Io { .. } | Failure::Damaged(_) | Failure::Abandoned) => {
                Self::Card(card)
            }
        }
    }
}

impl From<redb::Error> for StoreError {
    #[allow(clippy::wildcard_enum_match_arm, reason = "redb's enum is non-exhaustive")]
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::Corrupted(what) => Self::damaged("file", what),
            redb::Error::Io(error) => match Failure::inside(&error) {
                Some(failure) => Self::Card(failure.clone()),
                None => Self::Io(error),
            },
            redb::Error::PreviousIo | redb::Error::DatabaseClosed => Self::Closed,
            redb::Error::TableDoesNotExist(table) => {
                Self::damaged("file", format!("table {table} is missing"))
            }
            other => Self::Engine(other.to_string()),
        }
    }
}

/// redb has one error type for each kind of call; they all mean the same to us.
macro_rules! from_redb {
    ($($kind:ident),+) => {
        $(impl From<redb::$kind> for StoreError {
            fn from(error: redb::$kind) -> Self {
                Self::from(redb::Error::from(error))
            }
        })+
    };
}

from_redb!(
    StorageError,
    TableError,
    TransactionError,
    CommitError,
    DatabaseError,
    SetDurabilityError
);

//! Says what is wrong with the store's file, grouped by what the caller does next.

use std::io;

use thiserror::Error;

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
    /// Reading or writing failed. The handle is of no use any more; the store has to be opened anew.
    #[error("state file: {0}")]
    Io(#[from] io::Error),
    /// An earlier I/O error has made the handle useless; the store has to be opened anew.
    #[error("state file was closed after an earlier I/O error")]
    Closed,
    /// A snapshot stream is not one, is cut off, or does not add up. The receiver's store is unchanged.
    #[error("snapshot stream: {0}")]
    Stream(String),
    /// The B-tree refuses what it is asked; a bug of ours, or of it.
    #[error("state engine: {0}")]
    Engine(String),
}

impl StoreError {
    /// Whether the card is full: deletes and compaction may help, a new card need not.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::StorageFull)
    }

    pub(super) fn damaged(table: &'static str, what: impl Into<String>) -> Self {
        Self::Damaged { table, what: what.into() }
    }
}

impl From<redb::Error> for StoreError {
    #[allow(clippy::wildcard_enum_match_arm, reason = "redb's enum is non-exhaustive")]
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::Corrupted(what) => Self::damaged("file", what),
            redb::Error::Io(error) => Self::Io(error),
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

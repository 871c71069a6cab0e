//! Says what went wrong with the state file, and to whom.

use std::fmt;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;

/// A block of the database file does not hold what was written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "state file damaged at block {block} (offset {offset}): checksum {found:08x}, expected {expected:08x}"
)]
pub struct DamagedBlock {
    /// Number of the 4 KiB block.
    pub block: u32,
    /// Its place in the file, in bytes.
    pub offset: u64,
    /// Checksum of what was read.
    pub found: u32,
    /// Checksum of what was written.
    pub expected: u32,
}

impl DamagedBlock {
    /// The damage inside an error that redb passed on, if that is what it is about.
    ///
    /// Only the operation that met the damage carries it; redb answers later ones with `PreviousIo`. Use
    /// [`super::Backend::failure`] to learn of it in any case.
    pub fn cause_of(error: &redb::StorageError) -> Option<Self> {
        let redb::StorageError::Io(error) = error else { return None };
        Self::inside(error)
    }

    /// The same for a bare I/O error.
    pub fn inside(error: &io::Error) -> Option<Self> {
        match Failure::inside(error)? {
            Failure::Damaged(damage) => Some(*damage),
            Failure::Io { .. } | Failure::Record { .. } | Failure::Abandoned => None,
        }
    }
}

/// What the backend was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading the database file.
    Read,
    /// Writing the database file.
    Write,
    /// Cutting or extending the database file.
    SetLen,
    /// A barrier on the database file.
    Sync,
    /// Making, writing or syncing a table file.
    Table,
    /// Putting another file in its place.
    Replace,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "reading the state file",
            Self::Write => "writing the state file",
            Self::SetLen => "resizing the state file",
            Self::Sync => "the barrier on the state file",
            Self::Table => "writing the state file's checksum table",
            Self::Replace => "replacing the state file",
        })
    }
}

/// What a failure means for the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The card has no room. Nothing is wrong with what is on it: make room, open the file again.
    Full,
    /// What is on the card is not what was written: refill the node from the log or its peers.
    Damaged,
    /// The card, or the way to it, does not work: nothing written from now on can be trusted.
    Card,
}

/// Why the state file cannot be used any more by this process.
#[derive(Clone, Debug, Error)]
pub enum Failure {
    /// The kernel said no.
    #[error("{operation} failed: {error}")]
    Io {
        /// What failed.
        operation: Operation,
        /// The kernel's answer.
        #[source]
        error: Arc<io::Error>,
    },
    /// A block read from the card is not what was written.
    #[error(transparent)]
    Damaged(#[from] DamagedBlock),
    /// The blocks are whole, but what whoever reads them found inside makes no sense.
    #[error("state table {table} is damaged: {what}")]
    Record {
        /// The table.
        table: &'static str,
        /// What was found, and where.
        what: String,
    },
    /// The drain was dropped, or panicked, with writes left.
    #[error("the state file's writer stopped with writes left")]
    Abandoned,
}

impl Failure {
    /// The kernel's answer to an operation.
    pub fn io(operation: Operation, error: io::Error) -> Self {
        Self::Io { operation, error: Arc::new(error) }
    }

    /// What it means for the node.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Io { error, .. } if is_full(error) => Fault::Full,
            Self::Io { .. } | Self::Abandoned => Fault::Card,
            Self::Damaged(_) | Self::Record { .. } => Fault::Damaged,
        }
    }

    /// Whether the file system is full: the one failure after which reopening makes sense.
    pub fn is_full(&self) -> bool {
        self.fault() == Fault::Full
    }

    /// The failure inside an error that redb passed on.
    pub fn inside(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    pub(super) fn to_io(&self) -> io::Error {
        let kind = match self {
            Self::Io { error, .. } => error.kind(),
            Self::Damaged(_) | Self::Record { .. } => io::ErrorKind::InvalidData,
            Self::Abandoned => io::ErrorKind::BrokenPipe,
        };
        io::Error::new(kind, self.clone())
    }
}

/// Whether the kernel said that there is no room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Where a backend tells its owner what happened to it. Clones tell the same owner.
#[derive(Clone, Debug)]
pub struct Reports {
    failure: watch::Sender<Option<Failure>>,
    starved: watch::Sender<bool>,
}

impl Default for Reports {
    fn default() -> Self {
        Self { failure: watch::Sender::new(None), starved: watch::Sender::new(false) }
    }
}

impl Reports {
    /// The first failure.
    pub fn failure(&self) -> watch::Receiver<Option<Failure>> {
        self.failure.subscribe()
    }

    /// Whether writes wait for room on the card.
    pub fn starved(&self) -> watch::Receiver<bool> {
        self.starved.subscribe()
    }

    /// Whether they wait now.
    pub fn is_starved(&self) -> bool {
        *self.starved.borrow()
    }

    pub(super) fn fail(&self, failure: &Failure) {
        self.failure.send_if_modified(|first| {
            let news = first.is_none();
            if news {
                *first = Some(failure.clone());
            }
            news
        });
    }

    pub(super) fn starve(&self, starved: bool) {
        self.starved.send_if_modified(|now| std::mem::replace(now, starved) != starved);
    }
}

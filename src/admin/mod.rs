//! Commands for a person at a server: who is a member, which flags the cluster agreed on, and whether this one fits.
//!
//! # Shape
//!
//! [`crate::client`] calls port 2379 with a client certificate. [`flags`], [`members`] and [`check`] are one
//! command each: ask, decide what to say (pure), print. [`run`] is the way in.
//!
//! # Invariants
//!
//! - Nothing here writes to a data directory: whatever changes is changed by the cluster itself.
//! - A refusal says what the server said, and the numbers behind it.
//!
//! # Not here
//!
//! The command line (`cli`); the answers (`etcd`).

pub mod check;
pub mod flags;
pub mod members;
pub mod status;

mod table;

use std::io::{self, Write};

use thiserror::Error;

use self::members::MemberError;
use crate::client::{self, Connection, ConnectionError};

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Print the flags.
    FlagsShow,
    /// Give a flag another value.
    FlagsSet {
        /// Which.
        flag: String,
        /// As on a command line.
        value: String,
    },
    /// Print the members.
    MemberList,
    /// Remove a member, by name or id.
    MemberRemove {
        /// Name or id.
        member: String,
        /// Without asking.
        yes: bool,
    },
    /// Give a learner its vote.
    MemberPromote {
        /// Name or id.
        member: String,
    },
}

/// Form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For a configuration file.
    Yaml,
}

/// Why a command did not do what was asked.
#[derive(Debug, Error)]
pub enum AdminError {
    /// No server could be asked.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// A server said no.
    #[error("{0}")]
    Refused(String),
    /// There is no such member, or it cannot be told which is meant.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// Somebody thought better of it.
    #[error("nothing was changed")]
    NotConfirmed,
    /// The output cannot be written, or a runtime cannot be had.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl AdminError {
    /// What the operator can do.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Connection(error) => Some(error.remedy()),
            Self::Member(_) => Some("`k3s-server member list` shows names and ids".to_owned()),
            Self::NotConfirmed => {
                Some("answer `y`, or add --yes where nobody can be asked".to_owned())
            }
            Self::Refused(_) | Self::Io(_) => None,
        }
    }
}

impl From<tonic::Status> for AdminError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused(status.message().to_owned())
    }
}

/// Asks a person a question that is answered by yes or no.
pub type Confirm<'a> = &'a dyn Fn(&str) -> bool;

/// Does it.
pub fn run(
    connection: &Connection,
    action: &Action,
    format: Format,
    confirm: Confirm<'_>,
    out: &mut dyn Write,
) -> Result<(), AdminError> {
    client::block_on(async {
        match action {
            Action::FlagsShow => flags::show(connection, format, out).await,
            Action::FlagsSet { flag, value } => flags::set(connection, flag, value, out).await,
            Action::MemberList => members::list(connection, format, out).await,
            Action::MemberRemove { member, yes } => {
                let sure: Confirm<'_> = if *yes { &|_| true } else { confirm };
                members::remove(connection, member, sure, out).await
            }
            Action::MemberPromote { member } => members::promote(connection, member, out).await,
        }
    })?
}

//! Why a server did not start or cannot go on, what to do about it, and how that is told.

use std::io;
use std::net::IpAddr;

use thiserror::Error;

use super::data_dir::DataDirError;
use super::listen::ListenError;
use crate::announce;
use crate::critical::FlagsError;
use crate::etcd::ServeError;
use crate::events::{EventId, fields};
use crate::join::reset::ResetRefused;
use crate::join::token::{EstablishError, FoundingToken, ObtainError};
use crate::join::{AdoptError, IdentityError, JoinError, PlanError, flags};
use crate::mvcc::StoreError;
use crate::observe::logging::{self, Logging, LoggingError, Output};
use crate::pki::{NamesError, PkiError};
use crate::raft::reset::ResetError;
use crate::raft::{StartError, StopError};

/// Why the server did not run, or did not end well.
#[derive(Debug, Error)]
pub enum RunError {
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// Raft did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A name for the certificate cannot be used.
    #[error("tls-san: {0}")]
    Names(#[from] NamesError),
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Upstream k3s has the port, for an etcd of its own.
    #[error("{source}; {unit} keeps its own etcd there")]
    Upstream {
        /// Its unit, and what it does.
        unit: String,
        /// What was tried.
        #[source]
        source: ListenError,
    },
    /// The services could not be put together.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The process could not be set up.
    #[error("process: {0}")]
    Process(#[from] io::Error),
    /// Logging could not be set up.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// What is on disk and what is asked for make no start.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Another server did not let this one in.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Credentials could not be kept.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// Who this node is could not be kept.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The token cannot be had.
    #[error(transparent)]
    Token(#[from] ObtainError),
    /// The token is another cluster's.
    #[error(transparent)]
    FoundingToken(#[from] FoundingToken),
    /// The token cannot be kept, or is not the cluster's.
    #[error(transparent)]
    EstablishToken(#[from] EstablishError),
    /// The critical flags are not the cluster's.
    #[error(transparent)]
    Flags(#[from] FlagsError),
    /// They could not be compared.
    #[error(transparent)]
    CompareFlags(#[from] flags::EstablishError),
    /// What this node has could not be read for the others.
    #[error("hello: {0}")]
    Hello(String),
    /// This node was removed.
    #[error("this server was removed from the cluster: {0}")]
    Retired(String),
    /// Its double is alive.
    #[error("another server runs with this server's identity: {0}")]
    Duplicate(String),
    /// Another server has its name.
    #[error("the node name is taken: {0}")]
    NameTaken(String),
    /// The others run another release.
    #[error("this release does not work with the cluster's: {0}")]
    Incompatible(String),
    /// `cluster-reset` could not be done.
    #[error("cluster-reset: {0}")]
    Reset(#[source] ResetError),
    /// `cluster-reset` is not begun.
    #[error(transparent)]
    ResetRefused(#[from] ResetRefused),
    /// `cluster-reset` is done, and this is what to do now. No failure, but the process ends, as in K3s.
    #[error("{0}")]
    HasReset(String),
    /// This node has a new id, and begins anew with it.
    #[error("starting over as a new node")]
    StartOver,
    /// This host has another address, and the server begins anew there.
    #[error("going on at {0}")]
    Moved(IpAddr),
    /// Other nodes could not be answered.
    #[error("port of the other servers: {0}")]
    Peers(#[from] tonic::transport::Error),
    /// It ran, and a part of it failed.
    #[error("{0}")]
    Failed(String),
    /// It ran, and did not stop cleanly.
    #[error(transparent)]
    Stop(#[from] StopError),
}

impl RunError {
    /// Whether the process goes on.
    pub(super) const fn starts_over(&self) -> bool {
        matches!(self, Self::StartOver | Self::Moved(_))
    }

    /// What the operator can do, where there is something.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::DataDir(error) => Some(error.remedy()),
            Self::Pki(error) => Some(error.remedy().to_owned()),
            Self::Listen(error) => Some(error.remedy()),
            Self::Upstream { .. } => EventId::UpstreamConflict.remedy().map(str::to_owned),
            Self::Join(error) => Some(error.remedy().to_owned()),
            Self::Token(error) => Some(error.remedy()),
            Self::FoundingToken(error) => Some(error.remedy().to_owned()),
            Self::EstablishToken(error) => Some(error.remedy()),
            Self::Flags(error) | Self::CompareFlags(flags::EstablishError::Flags(error)) => {
                error.remedy().map(str::to_owned)
            }
            Self::Retired(_) => Some(
                "to join again as a new server, move the data directory away, set `server` and `token`, and start".to_owned(),
            ),
            Self::Duplicate(_) => Some(
                "one of the two cards is a copy: switch that one off; to make it a server of its own, move its data directory away, set `server` and `token`, and start".to_owned(),
            ),
            Self::NameTaken(_) => Some(
                "set another `node-name`, or remove the server that has this one (`k3s-server member remove`)".to_owned(),
            ),
            Self::Incompatible(_) => {
                Some("install a release on this server that the others' can work with; upgrade one server at a time".to_owned())
            }
            Self::Start(_)
            | Self::Store(_)
            | Self::Names(_)
            | Self::Serve(_)
            | Self::Process(_)
            | Self::Logging(_)
            | Self::Plan(_)
            | Self::Adopt(_)
            | Self::Identity(_)
            | Self::CompareFlags(_)
            | Self::Hello(_)
            | Self::Reset(_)
            | Self::ResetRefused(_)
            | Self::HasReset(_)
            | Self::StartOver
            | Self::Moved(_)
            | Self::Peers(_)
            | Self::Failed(_)
            | Self::Stop(_) => None,
        }
    }

    /// Whether starting again changes nothing before somebody changes something.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Flags(error) | Self::CompareFlags(flags::EstablishError::Flags(error)) => {
                error.is_configuration()
            }
            Self::Join(error) => !error.may_pass(),
            Self::DataDir(error) if error.is_newer() => true,
            Self::Incompatible(_)
            | Self::Token(ObtainError::Token { .. })
            | Self::FoundingToken(_)
            | Self::EstablishToken(EstablishError::Founding(_) | EstablishError::Differs { .. })
            | Self::Plan(_)
            | Self::Retired(_)
            | Self::Duplicate(_)
            | Self::NameTaken(_)
            | Self::Reset(_)
            | Self::ResetRefused(ResetRefused::Done { .. })
            | Self::Names(_)
            | Self::Logging(_)
            | Self::Upstream { .. }
            | Self::DataDir(DataDirError::NotADirectory { .. })
            | Self::Listen(ListenError::PlainExposed { .. })
            | Self::Start(StartError::Timing(_)) => true,
            Self::DataDir(_)
            | Self::Start(_)
            | Self::Store(_)
            | Self::Pki(_)
            | Self::Listen(_)
            | Self::Serve(_)
            | Self::Process(_)
            | Self::Adopt(_)
            | Self::Identity(_)
            | Self::Token(_)
            | Self::EstablishToken(_)
            | Self::CompareFlags(_)
            | Self::Hello(_)
            | Self::ResetRefused(_)
            | Self::HasReset(_)
            | Self::StartOver
            | Self::Moved(_)
            | Self::Peers(_)
            | Self::Failed(_)
            | Self::Stop(_) => false,
        }
    }
}

/// How a server ended that did not end well.
#[derive(Debug)]
pub struct Ended {
    /// Why.
    pub error: RunError,
    /// The journal has it already, with its number and the remedy: no need to print it once more.
    pub told: bool,
}

/// Says in the journal that the configuration cannot be used; `false` where nobody reads that, so that it has to be printed.
pub fn refuse(problems: &str) -> bool {
    let Ok(logs) = logging::init(&Logging::default()) else { return false };
    let is_journal = logs.output == Output::Journal;
    if is_journal {
        announce!(EventId::ConfigurationError, "the configuration cannot be used\n{problems}");
    }
    is_journal
}

/// Says it with its number, unless that was done where it happened.
pub(super) fn tell(error: &RunError) -> bool {
    let fix = || error.remedy().map_or_else(String::new, |fix| format!("\n  fix: {fix}"));
    if let RunError::Listen(listen) = error {
        announce!(
            EventId::ListenFailed,
            { fields::ADDRESS } = %listen.address(),
            { fields::REASON } = %listen,
            "{listen}{}",
            fix()
        );
    } else if let RunError::Upstream { .. } = error {
        announce!(EventId::UpstreamConflict, "{error}");
    } else if let RunError::Flags(_) | RunError::CompareFlags(_) = error {
        // Each flag was told by itself; the table with all of them is printed.
        return false;
    } else if error.is_configuration() {
        announce!(EventId::ConfigurationError, "{error}{}", fix());
    } else {
        announce!(EventId::Failed, { fields::REASON } = %error, "{error}{}", fix());
    }
    true
}

//! What can be wrong with keys and certificates, and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::Identity;

/// Why the certificates cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The disk failed.
    #[error("{path} cannot be {doing}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// `read`, `written`, …
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Others can read a private key.
    #[error(
        "{path} holds a private key and is open to others: found mode {mode:04o}, expected 0600"
    )]
    PermissionsTooOpen {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A key file is not a key.
    #[error("{path} is damaged: {found}, expected a private key in PEM form")]
    KeyDamaged {
        /// The key file.
        path: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// A certificate file is not a certificate.
    #[error("{path} is damaged: {found}, expected a certificate in PEM form")]
    CertificateDamaged {
        /// The certificate file.
        path: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// Certificate and key do not belong together.
    #[error("{certificate} does not belong to {key}: their public keys differ")]
    KeyMismatch {
        /// The certificate file.
        certificate: PathBuf,
        /// The key file.
        key: PathBuf,
    },
    /// Another authority signed it.
    #[error("{certificate} was not signed by {authority}")]
    WrongAuthority {
        /// The certificate file.
        certificate: PathBuf,
        /// The authority's certificate file.
        authority: PathBuf,
    },
    /// It belongs to another cluster, node or role.
    #[error("{path} names the wrong owner: {wrong}")]
    WrongOwner {
        /// The certificate file.
        path: PathBuf,
        /// Found and expected.
        #[source]
        wrong: WrongIdentity,
    },
    /// It has run out and cannot be renewed here.
    #[error("{path} has expired: valid until {not_after} (Unix time), the clock says {now}")]
    Expired {
        /// The certificate file.
        path: PathBuf,
        /// Its last second.
        not_after: i64,
        /// The time it was compared with.
        now: i64,
    },
    /// There are certificates but not the authority that signed them.
    #[error("{path} is missing, but certificates signed by it are there")]
    AuthorityMissing {
        /// Where the authority's certificate belongs.
        path: PathBuf,
    },
    /// A certificate has to be made and the authority's key is not on this node.
    #[error("{path} is missing, and {certificate} cannot be made without it")]
    AuthorityKeyMissing {
        /// Where the authority's key belongs.
        path: PathBuf,
        /// The certificate that is needed.
        certificate: PathBuf,
    },
    /// The certificate library refused.
    #[error("a certificate cannot be made: {0}")]
    Issue(#[from] rcgen::Error),
    /// The TLS library refused.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

impl PkiError {
    /// What the operator can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Io { path, .. } => {
                format!("check that the service's user owns {} and that the card is not read-only", path.display())
            }
            Self::PermissionsTooOpen { path, .. } => format!(
                "run `chmod 600 {}`; if others had accounts on this machine, make new certificates",
                path.display()
            ),
            Self::KeyDamaged { path, .. } | Self::CertificateDamaged { path, .. } => format!(
                "restore {} from a backup of this node, or move the whole pair away and start again: a new pair is made if this node holds ca.key",
                path.display()
            ),
            Self::KeyMismatch { certificate, .. } | Self::WrongAuthority { certificate, .. } => {
                format!(
                    "files of two clusters or nodes were mixed; restore the directory from one backup, or move {} away and start again",
                    certificate.display()
                )
            }
            Self::WrongOwner { .. } => {
                "this directory was copied from another node or cluster; give this node its own data directory and join it".to_owned()
            }
            Self::Expired { path, .. } => format!(
                "check the clock with `timedatectl`; if it is right, join this node again to get a new {}",
                path.display()
            ),
            Self::AuthorityMissing { path } | Self::AuthorityKeyMissing { path, .. } => {
                format!("restore {} from a backup of the node that founded the cluster", path.display())
            }
            Self::Issue(_) | Self::Tls(_) => {
                "this is a defect of k3s-server; please report it with this message".to_owned()
            }
        }
    }
}

/// A certificate that is genuine, but not the one expected here.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrongIdentity {
    /// It does not say whose it is.
    #[error("the certificate has no usable `k3s-server://` name: {0}")]
    Unnamed(String),
    /// It says so, and it is someone else's.
    #[error("the certificate is {found}, expected {expected}")]
    Other {
        /// Whose it is.
        found: Identity,
        /// Whose it should be; a `*` stands for any node.
        expected: String,
    },
}

/// The sentence. rustls shows the errors of a verifier only in this form, and people read them in the journal.
impl fmt::Debug for WrongIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A name that cannot go into a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamesError {
    /// Not a host name and not an address.
    #[error("`{0}` is not usable as a certificate name: expected a host name or an IP address")]
    Invalid(String),
    /// Too many of them.
    #[error("too many certificate names: found more than {0}")]
    TooMany(usize),
}

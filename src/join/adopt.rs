//! Makes a server out of a data directory and a cluster's credentials, so that a crash at any point is finished or undone.
//!
//! ```text
//! <db-dir>/joining      marker: what follows is not finished
//!          tls/ca.crt, tls/ca.key
//!          token
//!          contacts     the members, to find them by before there is a log
//!          node.json    last: from here on this is a node of the cluster
//! ```
//!
//! # Invariants
//!
//! - Without `node.json`, everything that the marker covers is removed by the next start ([`undo_unfinished`]): the join begins
//!   anew, perhaps with another cluster. With it, the marker is.
//! - Nothing is removed that the marker does not cover: an authority's key may be the only copy.

use std::io;
use std::path::{Path, PathBuf};

use prost::Message;
use thiserror::Error;

use super::enrol::Enrolled;
use super::file;
use super::identity::{self, Identity, IdentityError, Phase};
use super::token::{self, ObtainError};
use crate::critical::MatchedFlags;
use crate::env::Env;
use crate::pki::{Pki, PkiError};
use crate::proto::node::StoredMembership;

/// Says that a join has begun.
const MARKER: &str = "joining";
/// The members as the cluster named them.
const CONTACTS: &str = "contacts";
/// Of the contacts' file: version, then a checksum, then the message.
const CONTACTS_VERSION: u8 = 1;
const TLS: &str = "tls";

/// Why the credentials cannot be kept or read back.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// The disk.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The token.
    #[error(transparent)]
    Token(#[from] ObtainError),
    /// The identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The members' file is not what this program wrote.
    #[error("{path} is damaged: {found}")]
    Contacts {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        found: &'static str,
    },
}

fn failed(path: PathBuf) -> impl FnOnce(io::Error) -> AdoptError {
    move |source| AdoptError::Io { path, source }
}

/// Keeps what a server of the cluster gave, under a new node id. Before this, nothing was written; when it returns, this is a
/// node that is to be admitted.
pub async fn adopt(
    env: &Env,
    dir: &Path,
    enrolled: &Enrolled,
    _flags: MatchedFlags,
) -> Result<Identity, AdoptError> {
    let marker = dir.join(MARKER);
    file::replace(env, &marker, b"a join has begun; see node.json\n")
        .await
        .map_err(failed(marker.clone()))?;
    let (certificate, key) = (&enrolled.authority_pem, &enrolled.authority_key_pem);
    Pki::adopt(env, &dir.join(TLS), enrolled.cluster, certificate, key).await?;
    token::store(env, dir, &enrolled.token).await?;
    store_contacts(env, dir, &enrolled.membership).await?;
    let phase = Phase::Joining { replaces: None };
    let node = identity::random_node(env);
    let identity = Identity { cluster: enrolled.cluster, node, epoch: 0, phase };
    identity.store(env, dir).await?;
    file::remove(&*env.disk, &marker).map_err(failed(marker))?;
    env.disk.sync_dir(dir).map_err(failed(dir.to_owned()))?;
    Ok(identity)
}

/// Finishes or undoes a join that a crash interrupted. The first thing a start does with a data directory. Tells whether there
/// was something to undo.
pub async fn undo_unfinished(env: &Env, dir: &Path) -> Result<bool, AdoptError> {
    let marker = dir.join(MARKER);
    if !env.disk.exists(&marker).map_err(failed(marker.clone()))? {
        file::remove_unfinished(&*env.disk, &marker).map_err(failed(marker))?;
        return Ok(false);
    }
    let finished = Identity::load(env, dir)?.is_some();
    if !finished {
        Pki::forget(env, &dir.join(TLS))?;
        for name in [token::FILE, CONTACTS, identity::FILE] {
            let path = dir.join(name);
            file::remove(&*env.disk, &path).map_err(failed(path))?;
        }
        // Before the marker goes, so that what it covers is gone for good.
        env.disk.sync_dir(dir).map_err(failed(dir.to_owned()))?;
    }
    file::remove(&*env.disk, &marker).map_err(failed(marker))?;
    env.disk.sync_dir(dir).map_err(failed(dir.to_owned()))?;
    Ok(!finished)
}

/// Keeps the members, for a node that is not one of them yet.
pub(super) async fn store_contacts(
    env: &Env,
    dir: &Path,
    membership: &StoredMembership,
) -> Result<(), AdoptError> {
    let message = membership.encode_to_vec();
    let mut bytes = vec![CONTACTS_VERSION];
    bytes.extend(crc32c::crc32c(&message).to_le_bytes());
    bytes.extend(message);
    let path = dir.join(CONTACTS);
    file::replace(env, &path, &bytes).await.map_err(failed(path))
}

/// The members as the cluster named them when this node got its credentials; `None` if it was never told.
pub fn contacts(env: &Env, dir: &Path) -> Result<Option<StoredMembership>, AdoptError> {
    let path = dir.join(CONTACTS);
    let bytes = file::read(&*env.disk, &path).map_err(failed(path.clone()))?;
    let Some(bytes) = bytes else { return Ok(None) };
    let damaged = |found| AdoptError::Contacts { path: path.clone(), found };
    let Some((&version, rest)) = bytes.split_first() else { return Err(damaged("it is empty")) };
    if version != CONTACTS_VERSION {
        return Err(damaged("it has a version that this release does not know"));
    }
    let Some((check, message)) = rest.split_first_chunk() else {
        return Err(damaged("it is too short"));
    };
    if u32::from_le_bytes(*check) != crc32c::crc32c(message) {
        return Err(damaged("its checksum does not match"));
    }
    StoredMembership::decode(message).map(Some).map_err(|_| damaged("it is not a membership"))
}

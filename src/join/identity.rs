//! The file that says who this node is: `node.json` in the data directory.
//!
//! It is the first thing a founder writes and the first thing every start reads. The log and the state carry
//! the same ids, so a file that was copied, edited or restored from elsewhere is noticed.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::env::{Env, Open};
use crate::types::{ClusterId, NodeId};

/// Name of the file in the data directory.
pub const FILE: &str = "node.json";

const FORMAT: u32 = 1;
/// Far more than the file ever holds; a larger one is not ours.
const BYTES_MAX: u64 = 64 * 1024;

/// Who this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Itself.
    pub node: NodeId,
}

/// Why the identity could not be read or made.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What it said.
        source: io::Error,
    },
    /// The file is not what this program wrote.
    #[error("{path} is not a node identity: {found}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        found: String,
    },
    /// Written by a newer release.
    #[error("{path} has format {found}, this release reads {FORMAT}")]
    Format {
        /// The file.
        path: String,
        /// Its format number.
        found: u32,
    },
}

/// The file's contents. `check` covers the ids, so that one flipped digit does not make another node.
#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    cluster: String,
    node: String,
    check: u32,
}

fn check(identity: Identity) -> u32 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&identity.cluster.get().to_le_bytes());
    bytes[8..].copy_from_slice(&identity.node.get().to_le_bytes());
    crc32c::crc32c(&bytes)
}

impl Identity {
    /// Makes a random one. 0 is left out: on the wire it means "none".
    pub fn random(env: &Env) -> Self {
        let nonzero = || std::iter::repeat_with(|| env.entropy.next_u64()).find(|id| *id != 0);
        Self {
            cluster: ClusterId::new(nonzero().unwrap_or(1)),
            node: NodeId::new(nonzero().unwrap_or(1)),
        }
    }

    /// Reads the identity from a data directory; `None` if the node has none yet.
    pub fn load(env: &Env, dir: &Path) -> Result<Option<Self>, IdentityError> {
        let path = dir.join(FILE);
        let io = |source| IdentityError::Io { path: path.display().to_string(), source };
        if !env.disk.exists(&path).map_err(io)? {
            return Ok(None);
        }
        let file = env.disk.open(&path, Open::Read).map_err(io)?;
        let len = file.len().map_err(io)?;
        let damaged =
            |found: String| IdentityError::Damaged { path: path.display().to_string(), found };
        if BYTES_MAX < len {
            return Err(damaged(format!("{len} bytes, expected fewer than {BYTES_MAX}")));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut bytes, 0).map_err(io)?;
        let document: Document =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if document.format != FORMAT {
            let path = path.display().to_string();
            return Err(IdentityError::Format { path, found: document.format });
        }
        let id = |name: &str, text: &str| {
            u64::from_str_radix(text, 16)
                .map_err(|_| damaged(format!("{name} is {text:?}, expected hexadecimal digits")))
        };
        let identity = Self {
            cluster: ClusterId::new(id("cluster", &document.cluster)?),
            node: NodeId::new(id("node", &document.node)?),
        };
        if document.check != check(identity) {
            return Err(damaged("the check number does not match the ids".to_owned()));
        }
        Ok(Some(identity))
    }

    /// Writes the identity: whole and durable, or not at all.
    pub async fn store(self, env: &Env, dir: &Path) -> Result<(), IdentityError> {
        let path = dir.join(FILE);
        let io = |source| IdentityError::Io { path: path.display().to_string(), source };
        let document = Document {
            format: FORMAT,
            cluster: self.cluster.to_string(),
            node: self.node.to_string(),
            check: check(self),
        };
        let mut text =
            serde_json::to_vec_pretty(&document).map_err(|error| io(io::Error::other(error)))?;
        text.push(b'\n');
        let temporary = dir.join(format!("{FILE}.new"));
        if env.disk.exists(&temporary).map_err(io)? {
            env.disk.remove(&temporary).map_err(io)?;
        }
        let file = env.disk.open(&temporary, Open::Create).map_err(io)?;
        file.write_at(&text, 0).map_err(io)?;
        file.sync().await.map_err(io)?;
        env.disk.rename(&temporary, &path).map_err(io)?;
        env.disk.sync_dir(dir).map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::host;

    fn identity() -> Identity {
        Identity { cluster: ClusterId::new(0xfeed), node: NodeId::new(0xbeef) }
    }

    #[tokio::test]
    async fn what_was_stored_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let env = host::env();
        assert_eq!(Identity::load(&env, dir.path()).unwrap(), None);
        identity().store(&env, dir.path()).await.unwrap();
        identity().store(&env, dir.path()).await.unwrap();
        assert_eq!(Identity::load(&env, dir.path()).unwrap(), Some(identity()));
    }

    #[tokio::test]
    async fn every_flipped_bit_is_noticed_or_harmless() {
        let dir = tempfile::tempdir().unwrap();
        let env = host::env();
        identity().store(&env, dir.path()).await.unwrap();
        let path = dir.path().join(FILE);
        let good = std::fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bad).unwrap();
            if let Ok(Some(found)) = Identity::load(&env, dir.path()) {
                assert_eq!(found, identity(), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"format":9,"cluster":"1","node":"2","check":0}"#;
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let error = Identity::load(&host::env(), dir.path()).unwrap_err();
        assert!(error.to_string().contains("has format 9, this release reads 1"), "{error}");
    }
}

//! The file that says who this node is, and how far it has come: `node.json` in the data directory.
//!
//! The log and the state carry the same ids, so a file that was copied, edited or restored from elsewhere is noticed. The epoch
//! counts starts: the cluster remembers the highest it has seen of a node, so an old image and a copied card are noticed too.
//!
//! # Format
//!
//! Version 2. Version 1 had no epoch and no phase; it is read as a founding that may not be finished, because finishing it
//! again does nothing.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::file;
use crate::env::Env;
use crate::types::{ClusterId, NodeId};

/// Name of the file in the data directory.
pub const FILE: &str = "node.json";

const FORMAT: u32 = 2;
const FORMAT_OLDEST: u32 = 1;

/// How far a node has come on its way into a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It founds a cluster: every step is to be repeated until the first membership is applied.
    Founding,
    /// It has the cluster's credentials and is to be admitted, in the place of the node it was before if there is one.
    Joining {
        /// The id it had before.
        replaces: Option<NodeId>,
    },
    /// It does not trust what it remembers: its log and state are to be set aside (`quarantine`), then it joins in the place
    /// of the node it was.
    SettingAside {
        /// The id it had before.
        replaces: NodeId,
    },
    /// It was given up before it had a vote: as [`Phase::SettingAside`], but nobody will ever miss what it holds.
    GivenUp {
        /// The id it had before.
        replaces: NodeId,
    },
    /// It is a member.
    Member,
}

impl Phase {
    const FOUNDING: &str = "founding";
    const JOINING: &str = "joining";
    const SETTING_ASIDE: &str = "setting-aside";
    const GIVEN_UP: &str = "given-up";
    const MEMBER: &str = "member";

    const fn name(self) -> &'static str {
        match self {
            Self::Founding => Self::FOUNDING,
            Self::Joining { .. } => Self::JOINING,
            Self::SettingAside { .. } => Self::SETTING_ASIDE,
            Self::GivenUp { .. } => Self::GIVEN_UP,
            Self::Member => Self::MEMBER,
        }
    }

    /// Whether it is to be admitted, or will be once its old data is out of the way.
    pub const fn joins(self) -> bool {
        match self {
            Self::Joining { .. } | Self::SettingAside { .. } | Self::GivenUp { .. } => true,
            Self::Founding | Self::Member => false,
        }
    }

    /// The id that this node had before, if it has to be replaced.
    pub const fn replaces(self) -> Option<NodeId> {
        match self {
            Self::Joining { replaces } => replaces,
            Self::SettingAside { replaces } | Self::GivenUp { replaces } => Some(replaces),
            Self::Founding | Self::Member => None,
        }
    }

    fn of(name: &str, replaces: Option<NodeId>) -> Option<Self> {
        match (name, replaces) {
            (Self::FOUNDING, None) => Some(Self::Founding),
            (Self::JOINING, replaces) => Some(Self::Joining { replaces }),
            (Self::SETTING_ASIDE, Some(replaces)) => Some(Self::SettingAside { replaces }),
            (Self::GIVEN_UP, Some(replaces)) => Some(Self::GivenUp { replaces }),
            (Self::MEMBER, None) => Some(Self::Member),
            _ => None,
        }
    }
}

/// Who this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Itself.
    pub node: NodeId,
    /// Counts its starts. 0 before the first.
    pub epoch: u64,
    /// How far it has come.
    pub phase: Phase,
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
    #[error("{path} has format {found}, this release reads {FORMAT_OLDEST} to {FORMAT}")]
    Format {
        /// The file.
        path: String,
        /// Its format number.
        found: u32,
    },
}

/// The file's contents. `check` covers everything that decides something, so that one flipped digit does not make another
/// node.
#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    cluster: String,
    node: String,
    #[serde(default)]
    epoch: u64,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    phase: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<String>,
    check: u32,
}

/// What version 1 checked.
fn check_ids(identity: &Identity) -> Vec<u8> {
    let mut bytes = identity.cluster.get().to_le_bytes().to_vec();
    bytes.extend(identity.node.get().to_le_bytes());
    bytes
}

fn check(identity: &Identity) -> u32 {
    let mut bytes = check_ids(identity);
    bytes.extend(identity.epoch.to_le_bytes());
    bytes.extend(identity.phase.replaces().unwrap_or_default().get().to_le_bytes());
    bytes.extend(identity.phase.name().as_bytes());
    crc32c::crc32c(&bytes)
}

fn id(name: &str, text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16)
        .map_err(|_| format!("{name} is {text:?}, expected hexadecimal digits"))
}

impl Document {
    fn identity(&self) -> Result<Identity, String> {
        let cluster = ClusterId::new(id("cluster", &self.cluster)?);
        let node = NodeId::new(id("node", &self.node)?);
        if self.format == FORMAT_OLDEST {
            let identity = Identity { cluster, node, epoch: 0, phase: Phase::Founding };
            return if self.check == crc32c::crc32c(&check_ids(&identity)) {
                Ok(identity)
            } else {
                Err("the check number does not match the ids".to_owned())
            };
        }
        let replaces = self.replaces.as_ref().map(|text| id("replaces", text)).transpose()?;
        let phase = Phase::of(&self.phase, replaces.map(NodeId::new)).ok_or_else(|| {
            format!("phase is {:?}, which this release does not know", self.phase)
        })?;
        let identity = Identity { cluster, node, epoch: self.epoch, phase };
        if self.check == check(&identity) {
            Ok(identity)
        } else {
            Err("the check number does not match the rest".to_owned())
        }
    }
}

impl Identity {
    /// Makes a random one that founds a cluster. 0 is left out: on the wire it means "none".
    pub fn random(env: &Env) -> Self {
        let cluster = ClusterId::new(nonzero(env));
        Self { cluster, node: random_node(env), epoch: 0, phase: Phase::Founding }
    }

    /// Reads the identity from a data directory; `None` if the node has none yet.
    pub fn load(env: &Env, dir: &Path) -> Result<Option<Self>, IdentityError> {
        let path = dir.join(FILE);
        let shown = || path.display().to_string();
        let damaged = |found: String| IdentityError::Damaged { path: shown(), found };
        let bytes = match file::read(&*env.disk, &path) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(damaged(error.to_string()));
            }
            Err(source) => return Err(IdentityError::Io { path: shown(), source }),
        };
        let document: Document =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if !(FORMAT_OLDEST..=FORMAT).contains(&document.format) {
            return Err(IdentityError::Format { path: shown(), found: document.format });
        }
        document.identity().map(Some).map_err(damaged)
    }

    /// Writes the identity: whole and durable, or not at all.
    pub async fn store(self, env: &Env, dir: &Path) -> Result<(), IdentityError> {
        let path = dir.join(FILE);
        let io = |source| IdentityError::Io { path: path.display().to_string(), source };
        let document = Document {
            format: FORMAT,
            cluster: self.cluster.to_string(),
            node: self.node.to_string(),
            epoch: self.epoch,
            phase: self.phase.name().to_owned(),
            replaces: self.phase.replaces().map(|node| node.to_string()),
            check: check(&self),
        };
        let mut text =
            serde_json::to_vec_pretty(&document).map_err(|error| io(io::Error::other(error)))?;
        text.push(b'\n');
        file::replace(env, &path, &text).await.map_err(io)
    }

    /// Counts a start: durable when it returns, so no two starts of this card have the same epoch. Call it once per start,
    /// before anybody hears of this node.
    pub async fn next_epoch(self, env: &Env, dir: &Path) -> Result<Self, IdentityError> {
        let next = Self { epoch: self.epoch.saturating_add(1), ..self };
        next.store(env, dir).await?;
        Ok(next)
    }

    /// The node is a member from now on. Does nothing if it was before.
    pub async fn become_member(self, env: &Env, dir: &Path) -> Result<Self, IdentityError> {
        if self.phase == Phase::Member {
            return Ok(self);
        }
        let member = Self { phase: Phase::Member, ..self };
        member.store(env, dir).await?;
        Ok(member)
    }
}

fn nonzero(env: &Env) -> u64 {
    std::iter::repeat_with(|| env.entropy.next_u64()).find(|id| *id != 0).unwrap_or(1)
}

/// An id that no node has had.
pub(super) fn random_node(env: &Env) -> NodeId {
    NodeId::new(nonzero(env))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::host;
    use crate::testkit::disk::{Fate, Fault};
    use crate::testkit::{self, FaultDisk, ManualClock};

    fn identity(phase: Phase) -> Identity {
        Identity { cluster: ClusterId::new(0xfeed), node: NodeId::new(0xbeef), epoch: 7, phase }
    }

    fn phases() -> [Phase; 6] {
        let replaces = NodeId::new(0xdead);
        [
            Phase::Founding,
            Phase::Joining { replaces: None },
            Phase::Joining { replaces: Some(replaces) },
            Phase::SettingAside { replaces },
            Phase::GivenUp { replaces },
            Phase::Member,
        ]
    }

    #[tokio::test]
    async fn what_was_stored_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let env = host::env();
        assert_eq!(Identity::load(&env, dir.path()).unwrap(), None);
        for identity in phases().map(identity) {
            identity.store(&env, dir.path()).await.unwrap();
            identity.store(&env, dir.path()).await.unwrap();
            assert_eq!(Identity::load(&env, dir.path()).unwrap(), Some(identity));
        }
    }

    #[tokio::test]
    async fn every_flipped_bit_is_noticed_or_harmless() {
        let dir = tempfile::tempdir().unwrap();
        let env = host::env();
        for identity in phases().map(identity) {
            identity.store(&env, dir.path()).await.unwrap();
            let path = dir.path().join(FILE);
            let good = std::fs::read(&path).unwrap();
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                std::fs::write(&path, &bad).unwrap();
                if let Ok(Some(found)) = Identity::load(&env, dir.path()) {
                    assert_eq!(found, identity, "bit {bit}");
                }
            }
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"format":9,"cluster":"1","node":"2","check":0}"#;
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let error = Identity::load(&host::env(), dir.path()).unwrap_err();
        assert!(error.to_string().contains("has format 9, this release reads 1 to 2"), "{error}");
    }

    /// Written by release 0.1.0.
    #[test]
    fn format_1_is_read_as_a_founding_to_be_finished() {
        let dir = tempfile::tempdir().unwrap();
        let ids = check_ids(&identity(Phase::Founding));
        let check = crc32c::crc32c(&ids);
        let text = format!(r#"{{"format":1,"cluster":"feed","node":"beef","check":{check}}}"#);
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let found = Identity::load(&host::env(), dir.path()).unwrap().unwrap();
        assert_eq!(found, Identity { epoch: 0, ..identity(Phase::Founding) });
    }

    /// Whatever a power cut leaves, the next start has an epoch that no earlier start has shown to anybody.
    #[test]
    fn no_two_starts_have_the_same_epoch() {
        let dir = Path::new("db");
        for nth in 1..=8 {
            for fate in [Fate::KEPT, Fate::LOST] {
                let disk = FaultDisk::with_dir(dir);
                let env = testkit::env(&disk, &ManualClock::new(), 1);
                testkit::wait(identity(Phase::Member).store(&env, dir)).unwrap();
                disk.fail(Fault::power_loss(nth));
                let started = Identity::load(&env, dir).unwrap().unwrap();
                let shown = testkit::wait(started.next_epoch(&env, dir)).ok().map(|it| it.epoch);
                disk.power_cut(|_| fate);
                let next = Identity::load(&env, dir).unwrap().unwrap();
                let next = testkit::wait(next.next_epoch(&env, dir)).unwrap().epoch;
                assert!(shown < Some(next), "{shown:?} then {next}, power lost at {nth}");
            }
        }
    }
}

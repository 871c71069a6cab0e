//! Takes a node that has forgotten what it promised out of service, and lets it come back as a new one.
//!
//! Its log and state may lack votes and acknowledgements that others build on, so nothing of them is used again. They are set aside,
//! not deleted: should the other cards be lost, they may be all there is.
//!
//! ```text
//! 1  contacts      the members, while the state can still be read
//! 2  node.json     a new node id, "setting aside": from here on there is no way back
//! 3  quarantine-<old id>-<epoch>/   everything that belongs to the old id is moved there, file by file
//! 4  node.json     "joining", in the place of the old id
//! ```
//!
//! A learner that the leader has given up goes the same way ("given up"). What it holds is a part of what the others have, and it may
//! be given up again and again, so there is one place for that, `given-up/`, and the last one's stays.
//!
//! # Invariants
//!
//! - The old id is not used again once step 2 is durable; before it nothing has changed.
//! - A start that finds step 2 repeats step 3, which is the same from wherever it was cut.
//! - Nothing that a voter held is deleted or replaced.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use super::adopt::{self, AdoptError};
use super::identity::{Identity, Phase, random_node};
use crate::env::Env;
use crate::pki::Role;
use crate::proto::node::StoredMembership;

/// Where the data of a learner goes that was given up.
const GIVEN_UP: &str = "given-up";

fn failed(path: &Path) -> impl FnOnce(io::Error) -> AdoptError {
    let path = path.to_owned();
    move |source| AdoptError::Io { path, source }
}

/// Begins: gives this node a new id. The caller then stops everything that has the log or the state open, and calls
/// [`finish`], now or at the next start.
pub async fn begin(
    env: &Env,
    dir: &Path,
    identity: Identity,
    membership: &StoredMembership,
) -> Result<Identity, AdoptError> {
    adopt::store_contacts(env, dir, membership).await?;
    begin_as(env, dir, identity, Phase::SettingAside { replaces: identity.node }).await
}

/// As [`begin`], for a learner that was given up. One that has no membership yet finds the others as it found them before.
pub async fn begin_given_up(
    env: &Env,
    dir: &Path,
    identity: Identity,
    membership: &StoredMembership,
) -> Result<Identity, AdoptError> {
    if membership.log_id.is_some() {
        adopt::store_contacts(env, dir, membership).await?;
    }
    begin_as(env, dir, identity, Phase::GivenUp { replaces: identity.node }).await
}

async fn begin_as(
    env: &Env,
    dir: &Path,
    identity: Identity,
    phase: Phase,
) -> Result<Identity, AdoptError> {
    // The card goes on counting: the number tells its quarantines apart.
    let next = Identity { node: random_node(env), phase, ..identity };
    next.store(env, dir).await?;
    Ok(next)
}

/// Finishes what [`begin`] began; does nothing for any other node. Called at every start, before the log or the state is
/// opened. Returns who this node is, and where its old data is if it was moved now.
pub async fn finish(
    env: &Env,
    dir: &Path,
    identity: Identity,
) -> Result<(Identity, Option<PathBuf>), AdoptError> {
    let (replaces, aside) = match identity.phase {
        Phase::SettingAside { replaces } => {
            (replaces, aside(env, dir, &format!("{replaces}-{}", identity.epoch))?)
        }
        Phase::GivenUp { replaces } => (replaces, dir.join(GIVEN_UP)),
        Phase::Founding | Phase::Joining { .. } | Phase::Member => return Ok((identity, None)),
    };
    set_aside(env, dir, &aside)?;
    let phase = Phase::Joining { replaces: Some(replaces) };
    let joining = Identity { phase, ..identity };
    joining.store(env, dir).await?;
    Ok((joining, Some(aside)))
}

/// The directory for one quarantine. The epoch may have been counted on by a start that was cut: then the directory that it began
/// is gone on with.
fn aside(env: &Env, dir: &Path, name: &str) -> Result<PathBuf, AdoptError> {
    let (id, _) = name.rsplit_once('-').unwrap_or((name, ""));
    let begun = format!("quarantine-{id}-");
    for path in env.disk.list(dir).map_err(failed(dir))? {
        let found = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        if found.starts_with(&begun) {
            return Ok(dir.join(found));
        }
    }
    Ok(dir.join(format!("quarantine-{name}")))
}

/// Moves everything that belongs to the old id. File by file: what was moved already is not there any more.
fn set_aside(env: &Env, dir: &Path, aside: &Path) -> Result<(), AdoptError> {
    let disk = &*env.disk;
    // Its own name first: files that are moved into a directory that a power cut takes away are gone.
    disk.create_dir_all(aside).map_err(failed(aside))?;
    disk.sync_dir(dir).map_err(failed(dir))?;
    let wal = dir.join("wal");
    let state = |name: &OsStr| name.to_str().is_some_and(|name| name.starts_with("state.redb"));
    let leaves: Vec<String> =
        Role::ALL.iter().flat_map(|role| [format!("{role}.crt"), format!("{role}.key")]).collect();
    let leaf = |name: &OsStr| leaves.iter().any(|leaf| OsStr::new(leaf) == name);
    move_files(env, &wal, &aside.join("wal"), &|_| true)?;
    move_files(env, dir, aside, &state)?;
    // Certificates name the node; new ones are issued.
    move_files(env, &dir.join("tls"), &aside.join("tls"), &leaf)?;
    disk.sync_dir(dir).map_err(failed(dir))
}

fn move_files(
    env: &Env,
    from: &Path,
    to: &Path,
    which: &dyn Fn(&OsStr) -> bool,
) -> Result<(), AdoptError> {
    let disk = &*env.disk;
    if !disk.exists(from).map_err(failed(from))? {
        return Ok(());
    }
    let names: Vec<_> = disk
        .list(from)
        .map_err(failed(from))?
        .iter()
        .filter_map(|path| path.file_name().map(OsStr::to_owned))
        .filter(|name| which(name))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    disk.create_dir_all(to).map_err(failed(to))?;
    disk.sync_dir(to.parent().unwrap_or(to)).map_err(failed(to))?;
    for name in names {
        disk.rename(&from.join(&name), &to.join(&name)).map_err(failed(&to.join(&name)))?;
    }
    // The new names first: a file that has both is moved again, one that has none is lost.
    disk.sync_dir(to).map_err(failed(to))?;
    disk.sync_dir(from).map_err(failed(from))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::env::Open;
    use crate::testkit::disk::{Fate, Fault, random};
    use crate::testkit::{self, FaultDisk, ManualClock, Random};
    use crate::types::{ClusterId, NodeId};

    const DIR: &str = "db";
    const OLD: [&str; 6] =
        ["wal/0.wal", "wal/1.wal", "state.redb", "state.redb.sums", "tls/peer.crt", "tls/peer.key"];
    const KEPT: [&str; 4] = ["tls/ca.crt", "tls/ca.key", "token", "ballast"];

    fn world(seed: u64) -> (FaultDisk, Env, Identity) {
        let disk = FaultDisk::with_dir(Path::new(DIR));
        let env = testkit::env(&disk, &ManualClock::new(), seed);
        for sub in ["wal", "tls"] {
            env.disk.create_dir_all(&Path::new(DIR).join(sub)).unwrap();
        }
        for name in OLD.iter().chain(&KEPT) {
            let path = Path::new(DIR).join(name);
            let file = env.disk.open(&path, Open::Create).unwrap();
            file.write_at(name.as_bytes(), 0).unwrap();
            testkit::wait(file.sync()).unwrap();
            env.disk.sync_dir(path.parent().unwrap()).unwrap();
        }
        env.disk.sync_dir(Path::new(DIR)).unwrap();
        let (cluster, node) = (ClusterId::new(1), NodeId::new(0xa));
        let identity = Identity { cluster, node, epoch: 7, phase: Phase::Member };
        testkit::wait(identity.store(&env, Path::new(DIR))).unwrap();
        (disk, env, identity)
    }

    /// What a start does, from whatever it finds.
    fn start(env: &Env) -> Identity {
        let dir = Path::new(DIR);
        let identity = Identity::load(env, dir).unwrap().unwrap();
        let identity = testkit::wait(identity.next_epoch(env, dir)).unwrap();
        testkit::wait(finish(env, dir, identity)).unwrap().0
    }

    fn contents(disk: &FaultDisk) -> BTreeMap<PathBuf, Vec<u8>> {
        disk.files().into_iter().map(|path| (path.clone(), disk.content(&path).unwrap())).collect()
    }

    /// Everything of the old id is aside, once, and nothing else is.
    fn check_moved(disk: &FaultDisk, identity: Identity) {
        assert_ne!(identity.node, NodeId::new(0xa));
        assert_eq!(identity.phase, Phase::Joining { replaces: Some(NodeId::new(0xa)) });
        let contents = contents(disk);
        for name in OLD {
            let found: Vec<_> = contents.iter().filter(|(path, _)| path.ends_with(name)).collect();
            assert_eq!(found.len(), 1, "{name}: {found:?}");
            let (path, bytes) = found[0];
            assert!(
                path.starts_with("db/quarantine-a-7") || path.starts_with("db/quarantine-a-8"),
                "{path:?}"
            );
            assert_eq!(bytes, name.as_bytes());
        }
        for name in KEPT {
            assert_eq!(contents[&Path::new(DIR).join(name)], name.as_bytes());
        }
    }

    #[test]
    fn everything_that_belongs_to_the_old_id_is_set_aside_and_nothing_else() {
        let (disk, env, identity) = world(1);
        let dir = Path::new(DIR);
        let next = testkit::wait(begin(&env, dir, identity, &StoredMembership::default())).unwrap();
        let (next, aside) = testkit::wait(finish(&env, dir, next)).unwrap();
        assert_eq!(aside, Some(dir.join("quarantine-a-7")));
        check_moved(&disk, next);
        assert_eq!(testkit::wait(finish(&env, dir, next)).unwrap(), (next, None));
    }

    #[test]
    fn what_learners_held_that_were_given_up_is_kept_once() {
        let (disk, env, identity) = world(2);
        let (dir, none) = (Path::new(DIR), StoredMembership::default());
        let first = testkit::wait(begin_given_up(&env, dir, identity, &none)).unwrap();
        let (first, aside) = testkit::wait(finish(&env, dir, first)).unwrap();
        assert_eq!(aside, Some(dir.join("given-up")));
        assert_eq!(first.phase, Phase::Joining { replaces: Some(identity.node) });
        assert_ne!(first.node, identity.node);
        for name in ["wal/0.wal", "state.redb"] {
            let file = env.disk.open(&dir.join(name), Open::Create).unwrap();
            file.write_at(b"newer", 0).unwrap();
        }
        let second = testkit::wait(begin_given_up(&env, dir, first, &none)).unwrap();
        testkit::wait(finish(&env, dir, second)).unwrap();
        let there = contents(&disk);
        assert_eq!(there[&dir.join("given-up/state.redb")], b"newer");
        assert_eq!(there[&dir.join("given-up/wal/1.wal")], b"wal/1.wal");
        let elsewhere = there.keys().filter(|path| path.ends_with("state.redb")).count();
        assert_eq!(elsewhere, 1, "{there:?}");
    }

    #[test]
    fn quarantine_cut_at_every_disk_operation_is_finished_or_not_begun() {
        let dir = Path::new(DIR);
        let (mut begun, mut nth) = (0, 0);
        loop {
            nth += 1;
            for seed in 0..4 {
                let (disk, env, identity) = world(seed);
                disk.fail(Fault::power_loss(nth));
                let result = testkit::wait(async {
                    let next = begin(&env, dir, identity, &StoredMembership::default()).await?;
                    finish(&env, dir, next).await
                });
                if result.is_ok() && !disk.has_failed() {
                    assert!(20 < begun, "{begun}");
                    return;
                }
                match seed {
                    0 => disk.power_cut(|_| Fate::KEPT),
                    1 => disk.power_cut(|_| Fate::LOST),
                    _ => disk.power_cut(random(Random::new(seed * 1_000 + nth))),
                }
                let identity = start(&env);
                if identity.phase == Phase::Member {
                    assert_eq!(identity.node, NodeId::new(0xa));
                    let there = contents(&disk);
                    assert!(OLD.iter().all(|name| there.contains_key(&dir.join(name))));
                } else {
                    begun += 1;
                    check_moved(&disk, identity);
                }
            }
        }
    }
}

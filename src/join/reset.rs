//! Keeps `cluster-reset` from happening twice: a flag on the card says that it was done, until a normal start.
//!
//! As K3s, whose texts these are: with the argument left in the configuration, every restart would throw the others out again.
//!
//! # Not here
//!
//! What a reset writes: `raft::reset`.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::file;
use crate::env::Env;
use crate::raft::Member;

/// Name of the flag in the data directory; K3s' own.
pub const FILE: &str = "reset-flag";

/// Why a reset is not begun.
#[derive(Debug, Error)]
pub enum ResetRefused {
    /// It was done.
    #[error(
        "cluster-reset was successfully performed, please remove the cluster-reset flag and start k3s-server normally; if you need to perform another cluster reset, you must first manually delete the file at {path}"
    )]
    Done {
        /// The flag.
        path: PathBuf,
    },
    /// The flag cannot be looked up or written.
    #[error("{path}: {source}")]
    Io {
        /// The flag.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ResetRefused {
    let path = path.to_owned();
    move |source| ResetRefused::Io { path, source }
}

/// Refuses a second reset. Asked before anything is opened.
pub fn check(env: &Env, dir: &Path) -> Result<(), ResetRefused> {
    let path = dir.join(FILE);
    if env.disk.exists(&path).map_err(failed(&path))? {
        return Err(ResetRefused::Done { path });
    }
    Ok(())
}

/// Remembers that the reset was done. After it: a crash in between repeats the reset, which then changes nothing that counts.
pub async fn done(env: &Env, dir: &Path) -> Result<(), ResetRefused> {
    let path = dir.join(FILE);
    file::replace(env, &path, b"").await.map_err(failed(&path))
}

/// A normal start: the next reset is a new decision.
pub fn forget(env: &Env, dir: &Path) -> Result<(), ResetRefused> {
    let path = dir.join(FILE);
    if !env.disk.exists(&path).map_err(failed(&path))? {
        return Ok(());
    }
    file::remove(&*env.disk, &path).map_err(failed(&path))?;
    env.disk.sync_dir(dir).map_err(failed(&path))
}

/// What to tell the operator when a reset is done.
pub fn guidance(left: &[Member], db_dir: &Path) -> String {
    let mut text = "Managed etcd cluster membership has been reset, restart without --cluster-reset flag now. "
        .to_owned();
    if left.is_empty() {
        text.push_str("There were no other members.");
        return text;
    }
    let names: Vec<String> =
        left.iter().map(|one| format!("{} ({})", one.name, one.peer_urls.join(", "))).collect();
    text.push_str(&format!(
        "Left behind and refused from now on: {}. On each of them: stop k3s-server, move {} away, and start it with `server` and the token of this server to rejoin",
        names.join("; "),
        db_dir.display()
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{self, FaultDisk, ManualClock};

    #[test]
    fn second_reset_is_refused_until_a_normal_start() {
        let dir = Path::new("db");
        let disk = FaultDisk::with_dir(dir);
        let env = testkit::env(&disk, &ManualClock::new(), 1);
        check(&env, dir).unwrap();
        testkit::wait(done(&env, dir)).unwrap();
        let refused = check(&env, dir).unwrap_err();
        assert!(refused.to_string().contains("db/reset-flag"), "{refused}");
        for _ in 0..2 {
            forget(&env, dir).unwrap();
            check(&env, dir).unwrap();
        }
    }

    #[test]
    fn guidance_names_everybody_who_was_left_behind() {
        let member = |name: &str| Member {
            name: name.to_owned(),
            peer_urls: vec![format!("https://{name}:2380")],
            ..Member::default()
        };
        let text = guidance(&[member("pi-2"), member("pi-3")], Path::new("/var/lib/k3s-server"));
        for expected in ["pi-2", "https://pi-3:2380", "/var/lib/k3s-server", "--cluster-reset"] {
            assert!(text.contains(expected), "{text}");
        }
        assert!(guidance(&[], Path::new("db")).contains("no other members"));
    }
}

//! Has a server filled again by the others when a check of its card has found damage, if they can do without it meanwhile.
//!
//! Damage that nobody has needed yet is the best time to act: the others have everything. The server asks the leader to take it out of
//! the cluster, which the leader does only if the others are a majority without it; then it sets its data aside and joins again, empty.
//!
//! # Invariants
//!
//! - Who may go is decided by the leader, through the log, one after the other: two servers that find damage at the same moment do not
//!   both take it for granted that the other one stays.
//! - A card that is damaged again soon after is failing. Its server stays as it is, and the operator is told: filling it every week
//!   would wear out the rest of it, and the others'.
//! - What was not copied elsewhere is not touched: a server without others only tells.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::enter::Rejoin;
use super::failed::RunError;
use super::life::stopped;
use super::patience::Patience;
use super::{stamp, supervise};
use crate::announce;
use crate::env::{Env, Open};
use crate::events::{EventId, fields};
use crate::limits;
use crate::raft::{ChangeError, Leaving, Node};

/// How long the leader may take.
const ASIDE: Duration = Duration::from_secs(30);

/// A node whose card is checked.
pub(super) struct Healer {
    pub(super) env: Env,
    pub(super) node: Node,
    pub(super) rejoin: Rejoin,
    /// The data directory.
    pub(super) path: PathBuf,
    pub(super) patience: Patience,
    /// Damaged places that the last check has found.
    pub(super) damaged: watch::Receiver<u64>,
}

/// What the decision hangs on.
#[derive(Clone, Debug)]
struct Situation {
    /// Voters other than this one.
    others: usize,
    /// Whether this one is.
    votes: bool,
    wall: SystemTime,
    /// When it was filled again the last time.
    last: Option<SystemTime>,
    /// Bytes free on the card, and how many the others' data will take.
    free: u64,
    needed: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    /// If the leader agrees.
    Refill,
    /// Something else has to happen before; what.
    Wait(String),
    /// It stays as it is; why, and what to do.
    Stay(String),
}

fn decide(situation: &Situation) -> Decision {
    let Situation { others, votes, wall, last, free, needed } = situation;
    if *others == 0 {
        return Decision::Stay(
            "no other server has the data: make a backup now (`etcdctl snapshot save`), then replace the card".to_owned(),
        );
    }
    if let Some(last) = last {
        // A clock that was set back makes it look as if it had just been.
        let ago = wall.duration_since(*last).unwrap_or_default();
        if ago < limits::HEAL_REST {
            return Decision::Stay(format!(
                "the other servers have filled it again {} days ago already, so it is failing: replace it",
                ago.as_secs() / 86_400
            ));
        }
    }
    if !votes {
        return Decision::Wait("this server is being filled at the moment".to_owned());
    }
    if free < needed {
        return Decision::Wait(format!(
            "to be filled again by the others, this server needs {} MiB of free space, and the card has {}: delete old `quarantine-…` directories in the data directory, or replace the card",
            needed >> 20,
            free >> 20
        ));
    }
    Decision::Refill
}

/// Waits for damage and acts on it. Ends with the server, or with the order to start over.
pub(super) async fn run(
    mut healer: Healer,
    stopping: watch::Receiver<bool>,
) -> Result<(), RunError> {
    tokio::select! {
        ended = healer.watch() => Err(ended),
        () = stopped(stopping) => Ok(()),
    }
}

fn record(path: &Path) -> PathBuf {
    path.join("refilled")
}

impl Healer {
    async fn watch(&mut self) -> RunError {
        loop {
            if self.damaged.wait_for(|damaged| 0 < *damaged).await.is_err() {
                return std::future::pending().await;
            }
            let mut said = None;
            // Until the next check finds nothing, or this server starts over.
            while 0 < *self.damaged.borrow_and_update() {
                let (why, again) = match self.situation().map(|now| decide(&now)) {
                    Ok(Decision::Refill) => match self.refill().await {
                        Ok(over) => return over,
                        Err(why) => (why, true),
                    },
                    Ok(Decision::Wait(why)) => (why, true),
                    Ok(Decision::Stay(why)) => (why, false),
                    Err(why) => (why, true),
                };
                if said.as_ref() != Some(&why) {
                    announce!(
                        EventId::StateDamaged,
                        { fields::PATH } = %self.path.display(),
                        { fields::REASON } = %why,
                        "this server's card is damaged, and stays in use: {why}"
                    );
                    said = Some(why);
                }
                tokio::select! {
                    changed = self.damaged.changed() => if changed.is_err() {
                        return std::future::pending().await;
                    },
                    () = self.env.clock.sleep(self.patience.heal_retry), if again => {}
                }
            }
        }
    }

    fn situation(&self) -> Result<Situation, String> {
        let status = self.node.status();
        let voters = || status.members.iter().filter(|member| !member.learner);
        let io = |error: std::io::Error| error.to_string();
        let disk = &self.env.disk;
        let state = disk.open(self.node.store().path(), Open::Read).map_err(io)?;
        Ok(Situation {
            others: voters().filter(|member| member.id != status.node).count(),
            votes: voters().any(|member| member.id == status.node),
            wall: self.env.clock.wall(),
            last: stamp::read(&self.env, &record(&self.path)).map_err(io)?,
            free: disk.free_bytes(&self.path).map_err(io)?,
            needed: state.len().map_err(io)?
                + limits::WAL_SLOTS_MIN as u64 * limits::WAL_SEGMENT_BYTES
                + limits::SPACE_ENOUGH_BYTES,
        })
    }

    /// Goes, if the leader lets it; else why not.
    async fn refill(&self) -> Result<RunError, String> {
        let env = &self.env;
        // Before: whatever happens next, it happens once.
        let now = env.clock.wall();
        stamp::write(env, &record(&self.path), now).await.map_err(|error| error.to_string())?;
        let aside = self.node.set_aside(env.clock.now() + ASIDE).await;
        let Err(error) = aside else {
            let reason = Leaving::SetAside.words().to_owned();
            supervise::announce_retired(&reason);
            return Ok(self.rejoin.retired(reason).await);
        };
        if error == ChangeError::TimedOut {
            // Perhaps it is out, and the connection with it; then the others tell it when it asks them anything.
            env.clock.sleep(ASIDE).await;
        }
        let removed = env.disk.remove(&record(&self.path));
        Err(removed.err().map_or(error.to_string(), |error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn server_is_filled_again_if_others_vote_the_card_has_room_and_it_was_not_done_lately() {
        let wall = UNIX_EPOCH + 20_000 * DAY;
        let usual =
            Situation { others: 2, votes: true, wall, last: None, free: 10 << 30, needed: 1 << 30 };
        let last = |last| Situation { last: Some(last), ..usual.clone() };
        for (what, situation, expected) in [
            ("usual", usual.clone(), None),
            ("one of two", Situation { others: 1, ..usual.clone() }, None),
            ("long ago", last(wall - 22 * DAY), None),
            ("alone", Situation { others: 0, ..usual.clone() }, Some("etcdctl snapshot save")),
            ("a week ago", last(wall - 8 * DAY), Some("8 days ago already")),
            ("clock set back", last(wall + 900 * DAY), Some("0 days ago already")),
            ("learner", Situation { votes: false, ..usual.clone() }, Some("being filled")),
            ("full", Situation { free: 1 << 20, ..usual.clone() }, Some("needs 1024 MiB")),
        ] {
            match (decide(&situation), expected) {
                (Decision::Refill, None) => {}
                (Decision::Wait(why) | Decision::Stay(why), Some(text)) => {
                    assert!(why.contains(text), "{what}: {why}");
                }
                (decision, _) => panic!("{what}: {decision:?}"),
            }
        }
    }
}

//! Keeps room on the card for the day it is full: a file that can be given back, and the rule when.
//!
//! The log is preallocated, so a full card does not touch it. The state file grows when it is written, and the
//! very commands that make room (deletes, compaction) have to be written first.
//!
//! # Shape
//!
//! - [`Ballast`]: the file. Really allocated, block by block, with bytes that no file system can compress.
//! - [`Rule`] (pure): from what is seen, whether to give it back or take it again, and whether clients may put.
//! - [`SpaceGuard`]: looks every second, and at once when the store starves. It tells the store
//!   ([`Store::is_short_of_room`]), by which this node refuses puts at once; its owner raises and clears the cluster's
//!   NOSPACE alarm as [`Space`] says, which takes its way through the log.
//!
//! # What happens on a full card
//!
//! 1. Free space falls below [`limits::SPACE_LOW_BYTES`]: this node refuses puts, and the alarm does everywhere, while
//!    everything still works; the ballast is given back, so that deletes, compaction and a checkpoint have room.
//! 2. Something else takes the last block at once: the store *starves* ([`Store::starved`]). It holds its writes
//!    in memory and goes on; the ballast is given back and the drain tries again. Nothing is reopened, because
//!    nothing was lost: the same bytes go to the same places.
//! 3. Even that is not enough: the store fails with [`super::Fault::Full`], and the *process* ends. Opening the
//!    file again inside it would take the state back behind what openraft believes to be applied, so all of
//!    raft would have to start again with it; that is what a start does, in the same time. The next start opens
//!    a guard first, which gives the ballast back before the log is replayed.
//!
//! # Invariants
//!
//! - A file as long as the ballast is allocated as a whole: it is only ever extended by writing.
//! - Between giving back and taking again lies more than the ballast itself, so that it does not flutter.

use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;

use crate::env::{Env, Open};
use crate::limits;

use super::{Store, backend};

/// How often free space is looked at. A system call without I/O; and what clients can put meanwhile has to fit the room
/// that is left when puts end.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Largest single write.
const CHUNK_BYTES: u64 = 128 << 10;

/// Pause after each chunk and its barrier: the log's turn.
const PAUSE: Duration = Duration::from_millis(20);

/// How much room there is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of the ballast.
    pub ballast: u64,
    /// With less free space than this, puts end.
    pub low: u64,
    /// With this much free space beside the ballast, puts begin again.
    pub enough: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            ballast: limits::BALLAST_BYTES,
            low: limits::SPACE_LOW_BYTES,
            enough: limits::SPACE_ENOUGH_BYTES,
        }
    }
}

/// What the card has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Space {
    /// Anything.
    #[default]
    Enough,
    /// Reads, deletes and compaction: the NOSPACE alarm is to be raised.
    Low,
}

/// What is known at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Bytes that may be allocated.
    pub free: u64,
    /// Bytes the ballast holds.
    pub held: u64,
    /// The store waits for room.
    pub starved: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Rest,
    /// Give the ballast back.
    Release,
    /// Make the ballast whole.
    Take,
}

/// The decision.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    sizes: Sizes,
    space: Space,
}

impl Rule {
    /// Starts with the best hopes.
    pub const fn new(sizes: Sizes) -> Self {
        Self { sizes, space: Space::Enough }
    }

    /// What the card has room for, as of the last step.
    pub const fn space(&self) -> Space {
        self.space
    }

    /// Takes notice of what is seen, and says what to do.
    pub fn step(&mut self, seen: Seen) -> Step {
        if seen.starved || seen.free < self.sizes.low {
            self.space = Space::Low;
            return if 0 < seen.held { Step::Release } else { Step::Rest };
        }
        let missing = self.sizes.ballast.saturating_sub(seen.held);
        if seen.free < self.sizes.enough.saturating_add(missing) {
            return Step::Rest;
        }
        if 0 < missing {
            return Step::Take;
        }
        self.space = Space::Enough;
        Step::Rest
    }
}

/// A file whose only use is to be removed.
#[derive(Debug)]
pub struct Ballast {
    env: Env,
    path: PathBuf,
    bytes: u64,
    held: u64,
}

impl Ballast {
    /// Looks for the file. Makes nothing yet.
    pub fn open(env: &Env, path: &Path, bytes: u64) -> io::Result<Self> {
        let held = match env.disk.exists(path)? {
            true => env.disk.open(path, Open::Read)?.len()?,
            false => 0,
        };
        Ok(Self { env: env.clone(), path: path.to_path_buf(), bytes, held })
    }

    /// Bytes it holds now.
    pub const fn held(&self) -> u64 {
        self.held
    }

    /// Gives the room back. Works on a full card.
    pub fn release(&mut self) -> io::Result<()> {
        if self.env.disk.exists(&self.path)? {
            self.env.disk.remove(&self.path)?;
        }
        self.held = 0;
        // A file system may hand out freed blocks only once their release is durable.
        self.env.disk.sync_dir(dir_of(&self.path))
    }

    /// Takes the room, slowly enough not to be in the log's way. What a full card leaves of it is given back.
    ///
    /// On the host it blocks, as barriers do.
    pub async fn ensure(&mut self) -> io::Result<()> {
        let taken = self.extend().await;
        if taken.is_err() {
            // The first error says what is wrong.
            drop(self.release());
        }
        taken
    }

    async fn extend(&mut self) -> io::Result<()> {
        let disk = &self.env.disk;
        let file = if disk.exists(&self.path)? {
            disk.open(&self.path, Open::Write)?
        } else {
            let file = disk.open(&self.path, Open::Create)?;
            disk.sync_dir(dir_of(&self.path))?;
            file
        };
        // Zeros would cost nothing on a file system that compresses, and be worth as much.
        let mut chunk = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(usize::MAX)];
        self.env.entropy.fill(&mut chunk);
        self.held = file.len()?;
        while self.held < self.bytes {
            let len = CHUNK_BYTES.min(self.bytes - self.held);
            let part = chunk.get(..usize::try_from(len).unwrap_or(usize::MAX)).unwrap_or(&chunk);
            file.write_at(part, self.held)?;
            file.sync().await?;
            self.held += len;
            self.env.clock.sleep(PAUSE).await;
        }
        Ok(())
    }
}

fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Watches the room on the card. See the module documentation.
#[derive(Debug)]
pub struct SpaceGuard {
    env: Env,
    ballast: Ballast,
    rule: Rule,
    space: watch::Sender<Space>,
}

impl SpaceGuard {
    /// Looks at the card, and gives the ballast back if it is full. Before the store is opened, because
    /// replaying the log takes room.
    pub fn open(env: &Env, ballast: &Path, sizes: Sizes) -> io::Result<Self> {
        let mut guard = Self {
            env: env.clone(),
            ballast: Ballast::open(env, ballast, sizes.ballast)?,
            rule: Rule::new(sizes),
            space: watch::Sender::new(Space::Enough),
        };
        let step = guard.rule.step(guard.look(false)?);
        guard.space.send_replace(guard.rule.space());
        if step == Step::Release {
            guard.ballast.release()?;
        }
        Ok(guard)
    }

    /// What the card has room for, and every change of that.
    pub fn space(&self) -> watch::Receiver<Space> {
        self.space.subscribe()
    }

    /// Watches over the room that `store` needs, until it is closed. On the host it blocks now and then: see
    /// [`SpaceGuard::spawn_thread`].
    pub async fn run(mut self, store: Store) {
        let mut starved = store.starved();
        let mut complaint = None;
        while !store.is_closed() {
            let is_starved = *starved.borrow_and_update();
            match self.act(&store, is_starved).await {
                Ok(()) => complaint = None,
                Err(error) => {
                    // Once, not every few seconds.
                    if complaint.replace(error.kind()) != Some(error.kind()) {
                        let path = self.ballast.path.display();
                        tracing::warn!(%error, "cannot keep room on the card in {path}");
                    }
                }
            }
            tokio::select! {
                // Closed with the store, which the next round finds out.
                _ = starved.changed() => {}
                () = self.env.clock.sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Runs on a thread of its own.
    pub fn spawn_thread(self, store: Store) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        std::thread::Builder::new()
            .name("space-guard".to_owned())
            .spawn(move || runtime.block_on(self.run(store)))
    }

    async fn act(&mut self, store: &Store, starved: bool) -> io::Result<()> {
        let step = self.rule.step(self.look(starved)?);
        // Before giving back anything, which may take as long as the card likes.
        self.tell(store);
        match step {
            Step::Rest => {}
            Step::Release => {
                self.ballast.release()?;
                store.room_made();
            }
            Step::Take => match self.ballast.ensure().await {
                // Somebody was faster; the next look decides.
                Err(error) if backend::is_full(&error) => {}
                taken => {
                    taken?;
                    let _: Step = self.rule.step(self.look(starved)?);
                }
            },
        }
        self.tell(store);
        Ok(())
    }

    fn tell(&self, store: &Store) {
        let space = self.rule.space();
        store.set_room_low(space == Space::Low);
        self.space.send_if_modified(|now| std::mem::replace(now, space) != space);
    }

    fn look(&self, starved: bool) -> io::Result<Seen> {
        let free = self.env.disk.free_bytes(dir_of(&self.ballast.path))?;
        Ok(Seen { free, held: self.ballast.held(), starved })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::host;
    use crate::testkit::wait;

    const SIZES: Sizes = Sizes { ballast: 32, low: 32, enough: 96 };

    fn steps(seen: &[(u64, u64, bool)]) -> Vec<(Step, Space)> {
        let mut rule = Rule::new(SIZES);
        seen.iter()
            .map(|(free, held, starved)| {
                let seen = Seen { free: *free, held: *held, starved: *starved };
                (rule.step(seen), rule.space())
            })
            .collect()
    }

    #[test]
    fn ballast_is_taken_only_where_there_is_plenty_of_room() {
        use Space::Enough;
        assert_eq!(
            steps(&[(127, 0, false), (128, 0, false)]),
            [(Step::Rest, Enough), (Step::Take, Enough)]
        );
        assert_eq!(
            steps(&[(111, 16, false), (112, 16, false)]),
            [(Step::Rest, Enough), (Step::Take, Enough)]
        );
    }

    #[test]
    fn ballast_is_given_back_on_a_full_card_and_does_not_flutter() {
        use Space::{Enough, Low};
        let life = [
            (96, 32, false),
            (32, 32, false),
            (31, 32, false),
            (63, 0, false),
            (127, 0, false),
            (128, 0, false),
            (95, 32, false),
            (96, 32, false),
        ];
        assert_eq!(
            steps(&life),
            [
                (Step::Rest, Enough),
                (Step::Rest, Enough),
                (Step::Release, Low),
                (Step::Rest, Low),
                (Step::Rest, Low),
                (Step::Take, Low),
                (Step::Rest, Low),
                (Step::Rest, Enough),
            ]
        );
    }

    #[test]
    fn starving_store_gets_the_ballast_whatever_the_file_system_says() {
        assert_eq!(
            steps(&[(1_000, 32, true), (1_000, 0, true)]),
            [(Step::Release, Space::Low), (Step::Rest, Space::Low)]
        );
    }

    #[test]
    fn ballast_is_really_allocated_kept_across_starts_and_completed_after_a_crash() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ballast");
        let bytes = CHUNK_BYTES * 2 + 5_000;
        let open = || Ballast::open(&host::env(), &path, bytes).unwrap();

        let mut ballast = open();
        assert_eq!(ballast.held(), 0);
        wait(ballast.ensure()).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), open().held()), (bytes, bytes));
        assert!(bytes <= metadata.blocks() * 512, "sparse: {} blocks", metadata.blocks());

        std::fs::File::options().write(true).open(&path).unwrap().set_len(CHUNK_BYTES).unwrap();
        let mut ballast = open();
        assert_eq!(ballast.held(), CHUNK_BYTES);
        wait(ballast.ensure()).unwrap();
        assert_eq!(open().held(), bytes);

        ballast.release().unwrap();
        ballast.release().unwrap();
        assert!(!path.exists());
        assert_eq!(open().held(), 0);
    }
}

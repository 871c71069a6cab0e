//! Planted faults, to prove that the simulator sees them. Nothing of this is in a build without the feature `mutants`.
//!
//! A test that has never failed proves little. Each [`Mutant`] is one mistake that is easy to make in code like this; with the
//! feature, a run switches one on, and some run must then fail. Without it, [`is_planted`] is `false` at compile time.

macro_rules! mutants {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// A mistake that can be planted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mutant {
            $($(#[$doc])* $variant,)+
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// What it is called on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

mutants! {
    /// An appended entry is acknowledged before its barrier.
    AckEarly = "ack-early",
    /// A vote is answered before its barrier.
    VoteNotSynced = "vote-not-synced",
    /// A barrier that failed counts as one that returned.
    SyncErrorIgnored = "sync-error-ignored",
    /// A damaged frame in the middle of the log ends the log, as if it were torn.
    DamageTakenForTear = "damage-taken-for-tear",
    /// Opening the log does not repeat the last frame, which may be in the page cache only.
    LastFrameNotRepeated = "last-frame-not-repeated",
    /// A truncation is not written down.
    TruncationLost = "truncation-lost",
    /// The log forgets entries that no checkpoint covers.
    PurgeBeyondCheckpoint = "purge-beyond-checkpoint",
    /// After a restart, entries that the state has are applied again.
    AppliedTwice = "applied-twice",
    /// A restarted leader leads on in the same term.
    LeaderRestored = "leader-restored",
    /// A vote is granted to a candidate whose log is shorter.
    VoteForShorterLog = "vote-for-shorter-log",
    /// A follower takes for committed what it has just been sent.
    CommittedEarly = "committed-early",
    /// Compaction removes the newest revision of a key as well.
    CompactionRemovesLive = "compaction-removes-live",
    /// The name of a new slot is not made durable.
    NameNotSynced = "name-not-synced",
    /// A command whose outcome is unknown is proposed again.
    UnknownProposedAgain = "unknown-proposed-again",
    /// A linearizable read does not ask a majority.
    ReadWithoutQuorum = "read-without-quorum",
    /// A linearizable read does not wait until what is committed is applied.
    ReadBeforeApplied = "read-before-applied",
    /// A snapshot is installed without the membership in it.
    SnapshotWithoutMembership = "snapshot-without-membership",
    /// A node goes on with an old image of its card.
    RollbackAccepted = "rollback-accepted",
}

#[cfg(feature = "mutants")]
mod planted {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::Mutant;

    /// Position in [`Mutant::ALL`] plus one; 0 is none.
    static PLANTED: AtomicUsize = AtomicUsize::new(0);

    /// Plants a mistake in this process.
    pub fn plant(mutant: Mutant) {
        let position = Mutant::ALL.iter().position(|one| *one == mutant);
        PLANTED.store(position.map_or(0, |position| position + 1), Relaxed);
    }

    /// Whether it is.
    pub fn is_planted(mutant: Mutant) -> bool {
        let planted = PLANTED.load(Relaxed).checked_sub(1);
        planted.and_then(|position| Mutant::ALL.get(position)) == Some(&mutant)
    }
}

#[cfg(feature = "mutants")]
pub use planted::{is_planted, plant};

/// Whether a mistake is planted: never in this build.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is_planted(_mutant: Mutant) -> bool {
    false
}

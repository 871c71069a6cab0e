//! Which versions of messages and of data this release works with: the one place where a release says so.
//!
//! # How releases of different age live together
//!
//! - **Messages.** A release reads a range of versions. Two nodes talk in the newest that both read; each connection finds it by
//!   itself (`peers::passport`). Nodes without a common one refuse each other, and say which versions they have.
//! - **Data.** The *format* is one number for everything that outlives a process and that others may have to read: commands in the
//!   log, the replicated state, snapshots. A release reads its own and all older ones. What is *written* is the cluster's format,
//!   which is part of the replicated state: 1 when it is founded, raised by the leader when every member has announced that it
//!   reads more (`raft::duties`). Until then every member can go back to the release it came from; afterwards a release that reads
//!   less is refused before it touches anything.
//!
//! # Rules for a new release
//!
//! - A new kind of command, a new meaning of an old one, a new record in the state: a new format, written only by nodes whose
//!   store says that the cluster has it.
//! - A new message that an older node would misunderstand: a new message version; the range keeps the former one for a release.
//! - Files of one node alone (`node.json`, the log's segments, the state's blocks) have versions of their own. A new one is written
//!   only when the cluster's format is the one that came with it.

use std::ops::RangeInclusive;

/// The format in which every cluster is founded.
pub const FORMAT_FIRST: u32 = 1;

/// What a release works with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Its name.
    pub name: &'static str,
    /// Versions of the messages between nodes that it reads. Raised when an older node would misunderstand, not for every new
    /// field.
    pub wire: RangeInclusive<u32>,
    /// The newest format that it reads; it reads all older ones, too.
    pub format: u32,
}

const THIS: Release =
    Release { name: env!("CARGO_PKG_VERSION"), wire: 1..=1, format: FORMAT_FIRST };

/// This release.
#[cfg(not(any(test, feature = "testkit")))]
pub fn own() -> &'static Release {
    static OWN: Release = THIS;
    &OWN
}

/// This release, or one that a test has this process pretend to be: `next` has one more version of everything, `far` has none
/// in common with this one. A release build does not look.
#[cfg(any(test, feature = "testkit"))]
pub fn own() -> &'static Release {
    static OWN: std::sync::OnceLock<Release> = std::sync::OnceLock::new();
    OWN.get_or_init(|| match std::env::var(PRETEND).as_deref() {
        Ok("next") => Release { name: "0.2.0-pretended", wire: 1..=2, format: 2 },
        Ok("far") => Release { name: "0.9.0-pretended", wire: 8..=9, format: 9 },
        Ok(_) | Err(_) => THIS,
    })
}

/// Names the release that a process of a test pretends to be: see [`own`].
#[cfg(any(test, feature = "testkit"))]
pub const PRETEND: &str = "K3S_SERVER_TEST_RELEASE";

/// The newest version that both read, if there is one.
pub fn common(ours: &RangeInclusive<u32>, theirs: &RangeInclusive<u32>) -> Option<u32> {
    let newest = *ours.end().min(theirs.end());
    (*ours.start() <= newest && *theirs.start() <= newest).then_some(newest)
}

/// Versions, for people.
pub fn in_words(range: &RangeInclusive<u32>) -> String {
    if range.start() == range.end() {
        format!("version {}", range.start())
    } else {
        format!("versions {} to {}", range.start(), range.end())
    }
}

/// A format as it is announced: nodes that announce none read the first.
pub const fn announced(format: u32) -> u32 {
    if format < FORMAT_FIRST { FORMAT_FIRST } else { format }
}

const _: () = assert!(FORMAT_FIRST <= THIS.format);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_talk_in_the_newest_version_that_both_read() {
        for (ours, theirs, expected) in [
            (1..=1, 1..=1, Some(1)),
            (1..=2, 1..=1, Some(1)),
            (1..=2, 2..=3, Some(2)),
            (1..=4, 2..=3, Some(3)),
            (1..=1, 2..=3, None),
            (4..=5, 2..=3, None),
        ] {
            assert_eq!(common(&ours, &theirs), expected, "{ours:?} {theirs:?}");
            assert_eq!(common(&theirs, &ours), expected, "{theirs:?} {ours:?}");
        }
    }
}

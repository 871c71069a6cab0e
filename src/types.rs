//! Gives every quantity of the system its own type, so that a term cannot be passed for an index.
//!
//! No I/O, no async, no serialisation: what goes to disk or over the wire is written out by hand in the
//! `format.rs` of the module that owns the file.

use std::fmt;

/// Declares a newtype over an integer: private field, `new`, `get`, ordered, printed as the number.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident($raw:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($raw);

        impl $name {
            /// Wraps the raw number.
            pub const fn new(raw: $raw) -> Self {
                Self(raw)
            }

            /// The raw number.
            pub const fn get(self) -> $raw {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

/// Identifiers that people read are printed in hexadecimal, as etcd does.
macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Wraps the raw number.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:x}", self.0)
            }
        }
    };
}

identifier!(
    /// A Raft participant. Random, made once, never reused; in etcd's API the *member id*.
    NodeId
);
identifier!(
    /// A cluster. Random, made when the cluster is founded.
    ClusterId
);

number!(
    /// Raft's election epoch.
    Term(u64)
);
number!(
    /// Position of an entry in the Raft log. The first entry has index 0 or 1, as Raft chooses.
    LogIndex(u64)
);
number!(
    /// Order of writes to the log files. Never goes back, unlike [`LogIndex`] after a truncation.
    WriteSeq(u64)
);
number!(
    /// Number of a log file, counting up.
    SegmentNo(u64)
);
number!(
    /// A count of bytes.
    ByteCount(u64)
);
number!(
    /// MVCC time: one per transaction that wrote something. etcd's *main revision*.
    Revision(i64)
);
number!(
    /// A lease. Positive; 0 on the wire means "none" or "choose one for me".
    LeaseId(i64)
);

impl WriteSeq {
    /// The write after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl SegmentNo {
    /// The segment after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl LogIndex {
    /// The entry after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Revision {
    /// The revision after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl ByteCount {
    /// The sum, at most the largest count there is.
    #[must_use]
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

/// Names one entry for ever: entries with equal log ids are equal.
///
/// Ordered by term, then leader, then index, as Raft compares logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId {
    /// Term of the leader that wrote the entry.
    pub term: Term,
    /// The leader that wrote the entry. Terms may have several candidates' leaders in openraft's
    /// advanced mode, so the node is part of the identity.
    pub leader: NodeId,
    /// Position in the log.
    pub index: LogIndex,
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "T{}-{}.{}", self.term, self.leader, self.index)
    }
}

/// A promise to follow nobody older than this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Vote {
    /// Term the vote is for.
    pub term: Term,
    /// Candidate the vote is for.
    pub node: NodeId,
    /// Whether a majority is known to have granted it.
    pub committed: bool,
}

impl fmt::Display for Vote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.committed { "committed" } else { "asked" };
        write!(f, "T{}-{} {state}", self.term, self.node)
    }
}

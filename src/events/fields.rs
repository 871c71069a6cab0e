//! Names of the fields that log events carry.
//!
//! In the journal `k3s.term` becomes `K3S_TERM`, so `journalctl K3S_PEER=pi-2` works. Names are part of the interface:
//! people write queries against them. Use them as `{ fields::TERM } = term.get()`.

/// The event's own id; the journal's `MESSAGE_ID`, by which `journalctl -x` finds the explanation.
pub const MESSAGE_ID: &str = "message_id";
/// What to do about a warning or an error.
pub const REMEDY: &str = "k3s.remedy";
/// This node's id.
pub const NODE: &str = "k3s.node";
/// The cluster's id.
pub const CLUSTER: &str = "k3s.cluster";
/// The other node an event is about.
pub const PEER: &str = "k3s.peer";
/// The leader's node id.
pub const LEADER: &str = "k3s.leader";
/// Raft's term.
pub const TERM: &str = "k3s.term";
/// A log index.
pub const INDEX: &str = "k3s.index";
/// An MVCC revision.
pub const REVISION: &str = "k3s.revision";
/// A configuration key, as the user writes it.
pub const FLAG: &str = "k3s.flag";
/// A flag's value on this server.
pub const VALUE_HERE: &str = "k3s.value_here";
/// A flag's value in the cluster.
pub const VALUE_CLUSTER: &str = "k3s.value_cluster";
/// Who did it: a server, by name.
pub const BY: &str = "k3s.by";
/// Since when it is so.
pub const SINCE: &str = "k3s.since";
/// A file or directory.
pub const PATH: &str = "k3s.path";
/// A network address.
pub const ADDRESS: &str = "k3s.address";
/// What went wrong, in the words of the error.
pub const REASON: &str = "k3s.reason";
/// A time in milliseconds.
pub const MILLIS: &str = "k3s.millis";
/// A count of bytes.
pub const BYTES: &str = "k3s.bytes";
/// A count of things, named in the message.
pub const COUNT: &str = "k3s.count";
/// An alarm: `NOSPACE` or `CORRUPT`.
pub const ALARM: &str = "k3s.alarm";
/// A certificate's role.
pub const ROLE: &str = "k3s.role";
/// A version of the daemon.
pub const VERSION: &str = "k3s.version";
/// Log lines that were dropped because the journal did not keep up.
pub const LINES_LOST: &str = "k3s.lines_lost";

#[cfg(test)]
pub(super) const ALL: &[&str] = &[
    MESSAGE_ID,
    REMEDY,
    NODE,
    CLUSTER,
    PEER,
    LEADER,
    TERM,
    INDEX,
    REVISION,
    FLAG,
    VALUE_HERE,
    VALUE_CLUSTER,
    BY,
    SINCE,
    PATH,
    ADDRESS,
    REASON,
    MILLIS,
    BYTES,
    COUNT,
    ALARM,
    ROLE,
    VERSION,
    LINES_LOST,
];

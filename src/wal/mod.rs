//! Keeps every acknowledged write through any crash, at one 4 KiB block and one device flush for an isolated one.
//!
//! On an SD card the barrier is the cost, and a file that grows pays it twice: once for the data, once for the
//! metadata. So log files (*slots*) are zero-filled once, in the background, and overwritten for ever after; every
//! batch is one frame in blocks of its own; and whatever arrives while a barrier runs shares the next one.
//!
//! # Shape
//!
//! [`Wal`] is the handle: [`append`](Wal::append) makes records readable at once and calls back when they are
//! durable. [`Writer`] is the shell that does the writing, on a thread of its own or as a task in a simulation. The
//! log knows bytes, order, log ids and what Raft must remember; it does not know Raft.
//!
//! - `format`: bytes on disk. `batch`: when to write (pure; start reading there). `log`: what the log holds (pure).
//! - `frame`, `segment`: one frame in memory, one slot on disk. `recovery`: what a directory holds after any crash.
//! - `salvage`: what a damaged log still proves. `start_over`: a log that begins anew, in place of another.
//! - `writer`: the only code that writes frames of a running log. `prepare`: fills slots ahead. `reader`, `scrub`,
//!   `inspect`: read only.
//!
//! # Invariants
//!
//! - A record is acknowledged only with a [`Durable`], which only a barrier that started after the record was
//!   written can make.
//! - Votes, entries, truncations and purges share one order, the order of `append`.
//! - A block that holds acknowledged data is not written again until a later *durable* segment header says that
//!   the whole segment is not needed.
//! - One frame, one barrier, one at a time: a valid frame proves that every frame before it was durable. So a bad
//!   frame before a valid one is corruption, and a bad frame at the end was promised to nobody.
//! - The first failed write or barrier is final: nothing is acknowledged afterwards, nothing is retried.
//! - In steady state no file is created, renamed, extended or removed.
//!
//! # Decisions
//!
//! - *Slots keep their names.* Recycling writes a new header (new random generation) in the same write as the
//!   segment's first frame, so a switch costs no barrier of its own and touches no directory.
//! - *A slot is free only when the newest durable header says so*, not when a purge is durable: then the header that
//!   recovery starts from always finds every segment it names.
//! - *Opening repeats the last frame it found in a new one, behind a barrier.* After a failed `fdatasync` the page
//!   cache shows data that is not on the card, and after a kill it shows data that is not there yet; nobody may be
//!   told about either. The repeated frame also takes the place of a torn one, whose remains can then never
//!   complete into something valid.
//! - *An orderly stop writes one more frame*, so damage to the last acknowledged frame is found at the next start
//!   instead of passing for a torn write.
//!
//! # Not here
//!
//! The data directory's lock and its ballast file (whoever opens the directory), the meaning of payloads, retries.

pub mod batch;
pub mod format;

mod error;
mod frame;
mod log;
mod segment;
mod stats;

mod recovery;
mod salvage;
mod start_over;

mod handle;
mod prepare;
mod reader;
mod scrub;
mod writer;

pub mod inspect;

#[cfg(test)]
mod tests;

use std::time::Duration;

use bytes::Bytes;

use crate::limits;
use crate::types::{ClusterId, LogId, NodeId, Vote};

pub use batch::{Durable, Urgency};
pub use error::{Damage, Failed, OpenError, Refused};
pub use handle::Wal;
pub use recovery::{Cut, Recovery};
pub use salvage::{Lost, Salvage, salvage};
pub use scrub::Scrub;
pub use start_over::{Beginning, Old, start_over};
pub use stats::Stats;
pub use writer::Writer;

/// One thing the log must remember, in the order in which it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The next entry.
    Entry {
        /// Its name; its index continues the log.
        id: LogId,
        /// Its content; opaque here.
        payload: Bytes,
    },
    /// The promise this node made last.
    Vote(Vote),
    /// Entries up to here are known to be on a majority.
    Committed(LogId),
    /// Forget every entry after this one; `None` forgets all that are not purged.
    TruncateAfter(Option<LogId>),
    /// Forget every entry up to this one; it may lie beyond the end, after a snapshot was installed.
    Purge(LogId),
}

/// An entry as it was appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub id: LogId,
    /// Its content.
    pub payload: Bytes,
}

/// What Raft must not forget besides the entries themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// The promise made last.
    pub vote: Option<Vote>,
    /// Known to be on a majority; a hint that saves waiting after a restart.
    pub committed: Option<LogId>,
    /// The last entry that was forgotten because a checkpoint or snapshot covers it.
    pub purged: Option<LogId>,
    /// The end of the log; equal to `purged` when there are no entries.
    pub last: Option<LogId>,
}

/// Whose log it is. A card that was cloned, or put into another node, is noticed by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
}

/// How to keep the log. The default is what production uses.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Longest time a lease-class entry waits for company.
    pub linger: Duration,
    /// A batch of this size does not wait.
    pub batch_bytes_max: u64,
    /// Length of a slot; existing slots keep theirs.
    pub segment_bytes: u64,
    /// Slots filled ahead.
    pub slots_min: usize,
    /// Free slots are removed while there are more than this.
    pub slots_max: usize,
    /// Newest durable entries kept in memory.
    pub cache_bytes: u64,
    /// Pause between two chunks of background filling.
    pub fill_pause: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            linger: limits::WAL_LINGER,
            batch_bytes_max: limits::WAL_BATCH_BYTES_MAX,
            segment_bytes: limits::WAL_SEGMENT_BYTES,
            slots_min: limits::WAL_SLOTS_MIN,
            slots_max: limits::WAL_SLOTS_MAX,
            cache_bytes: limits::WAL_CACHE_BYTES,
            fill_pause: Duration::from_millis(50),
        }
    }
}

//! Tells every watcher of every change it asked for: in order, once, a revision at a time.
//!
//! Kubernetes is built on this promise. One write may concern thousands of watchers, and one client that stopped
//! reading must cost the writer and the other clients nothing. So the publisher only appends references to queues
//! that are bounded in bytes; a watcher whose queue is full is marked *behind* and later reads what it
//! missed from the store, on its own stream's time.
//!
//! # Shape
//!
//! [`Hub`] is fed by the apply path ([`Hub::publish`], [`Hub::restored`]) and never blocks it. A client's stream is a
//! [`WatchStream`]: [`WatchStream::create`], [`WatchStream::cancel`], [`WatchStream::next`]. All decisions are in
//! `core`, which does no I/O; `interest` finds the watchers of a key, `ring` keeps the newest history,
//! `response` makes etcd's messages.
//!
//! etcd's words map to ours so: *synced* is live, *unsynced* and *victim* are behind.
//!
//! # Invariants
//!
//! - Per watcher, revisions never repeat, never go back and are never skipped.
//! - All events of one revision are in one message.
//! - The created message of an id precedes its events.
//! - A progress message never names a revision whose events are not queued before it.
//! - The bytes queued for a stream, and for all streams together, are bounded (a single message may exceed the
//!   bound when nothing else is queued).
//!
//! # Not here
//!
//! gRPC, headers and permissions: `etcd::watch`.

mod core;
mod hub;
mod interest;
mod response;
mod ring;

use std::sync::Arc;

use bytes::Bytes;

use crate::mvcc::{KeyRange, RevisionEvents};
use crate::proto::etcdserverpb as pb;
use crate::proto::mvccpb::event::EventType;
use crate::types::Revision;

pub use core::Replayed;
pub use hub::{History, Hub, Statistics, WatchError, WatchStream};
pub use response::{fragments, response};

/// The id on messages that concern no single watcher.
pub const NO_WATCHER: i64 = -1;

/// Bounds of the hub's memory.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Recent events kept for watchers that fell behind a little.
    pub ring_bytes_max: u64,
    /// Queued for one stream before its watchers fall behind.
    pub stream_bytes_max: u64,
    /// Queued for all streams before any stream with a backlog falls behind.
    pub hub_bytes_max: u64,
    /// History in one message. etcd sends up to 1,000 revisions, however large; most gRPC clients refuse messages
    /// above 4 MiB.
    pub replay_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            ring_bytes_max: 4 << 20,
            stream_bytes_max: 1 << 20,
            hub_bytes_max: 16 << 20,
            replay_bytes_max: 3 << 20,
        }
    }
}

/// What a watcher wants besides its keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// No puts.
    pub no_put: bool,
    /// No deletes.
    pub no_delete: bool,
    /// Each event with the key-value before it.
    pub prev_kv: bool,
    /// A message now and then while nothing happens.
    pub progress_notify: bool,
    /// Large messages may be cut.
    pub fragment: bool,
}

impl Options {
    fn wants(self, kind: EventType) -> bool {
        match kind {
            EventType::Put => !self.no_put,
            EventType::Delete => !self.no_delete,
        }
    }
}

/// A request for a watcher, checked for nothing yet.
#[derive(Clone, Debug)]
pub struct Create {
    /// 0: choose one.
    pub id: i64,
    /// The keys.
    pub range: KeyRange,
    /// 0: from now on.
    pub start: i64,
    /// The rest.
    pub options: Options,
}

impl Create {
    /// Reads etcd's request. An empty key means the smallest one; an end of one zero byte means "no end".
    pub fn from_request(request: &pb::WatchCreateRequest) -> Self {
        let key =
            if request.key.is_empty() { Bytes::from_static(&[0]) } else { request.key.clone() };
        let range = KeyRange::new(key, request.range_end.clone());
        let filtered =
            |kind: pb::watch_create_request::FilterType| request.filters.contains(&i32::from(kind));
        Self {
            id: request.watch_id,
            range,
            start: request.start_revision,
            options: Options {
                no_put: filtered(pb::watch_create_request::FilterType::Noput),
                no_delete: filtered(pb::watch_create_request::FilterType::Nodelete),
                prev_kv: request.prev_kv,
                progress_notify: request.progress_notify,
                fragment: request.fragment,
            },
        }
    }
}

/// Something for the client of a stream.
#[derive(Clone, Debug)]
pub struct Message {
    /// The watcher, or [`NO_WATCHER`].
    pub id: i64,
    /// For the header. 0 when a watcher is canceled because of compaction, as in etcd.
    pub revision: Revision,
    /// What it says.
    pub body: Body,
}

/// What a message says.
#[derive(Clone, Debug)]
pub enum Body {
    /// The watcher exists.
    Created,
    /// The watcher was never created; why.
    Refused(&'static str),
    /// The watcher is gone because the client said so.
    Canceled,
    /// The watcher is gone: what it wants next is compacted up to here.
    Compacted(Revision),
    /// Everything up to the message's revision was sent.
    Progress,
    /// Changes.
    Events {
        /// Whole revisions, ascending.
        parts: Vec<Part>,
        /// How the watcher wants them.
        options: Options,
    },
}

impl Body {
    fn event_count(&self) -> u64 {
        match self {
            Self::Events { parts, .. } => parts.iter().map(Part::count).sum(),
            Self::Created
            | Self::Refused(_)
            | Self::Canceled
            | Self::Compacted(_)
            | Self::Progress => 0,
        }
    }
}

/// The events of one revision that concern one watcher.
#[derive(Clone, Debug)]
pub struct Part {
    events: Arc<RevisionEvents>,
    picks: Picks,
}

/// Which events of a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Picks {
    All,
    Some(Box<[u32]>),
}

impl Part {
    /// The events, oldest first.
    pub fn events(&self) -> impl Iterator<Item = &crate::proto::mvccpb::Event> {
        let all = self.events.events.as_slice();
        let (whole, some): (&[_], &[u32]) = match &self.picks {
            Picks::All => (all, &[]),
            Picks::Some(indexes) => (&[], indexes),
        };
        whole.iter().chain(some.iter().filter_map(move |index| all.get(*index as usize)))
    }

    /// How many events that is.
    fn count(&self) -> u64 {
        let count = match &self.picks {
            Picks::All => self.events.events.len(),
            Picks::Some(indexes) => indexes.len(),
        };
        count as u64
    }

    fn bytes(&self) -> u64 {
        self.events().map(event_bytes).sum()
    }
}

/// What an event costs in memory, about.
fn event_bytes(event: &crate::proto::mvccpb::Event) -> u64 {
    const OVERHEAD: u64 = 64;
    let payload = event.kv.as_ref().map_or(0, |kv| kv.key.len() + kv.value.len());
    OVERHEAD + payload as u64
}

//! Decides which stream gets which message, and when a watcher must read history instead.
//!
//! A watcher is *live* while every published revision is put straight into its stream's queue. It is *behind* when
//! it asked for the past, or when its stream's queue was full at a publish. A watcher that is behind gets its
//! events from the ring or the store, only when its stream's queue is empty, and turns live when nothing
//! published is left.
//!
//! # Shape
//!
//! Pure: no I/O, no clock, no waiting. [`Core::step`] says what a stream should do next; when that is reading
//! the store, the caller reads and reports with [`Core::replayed`].
//!
//! # Invariants
//!
//! - A live watcher is in `interest`; one that is behind is in its stream's `behind`; never both.
//! - A live watcher was given everything in `next ..= published` that it wants.
//! - `queued_bytes` is the sum over all queues.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use super::interest::Interest;
use super::ring::Ring;
use super::{Body, Create, Limits, Message, NO_WATCHER, Options, Part, Picks};
use crate::mvcc::{KeyRange, RevisionEvents};
use crate::types::Revision;

const DUPLICATE_ID: &str = "mvcc: duplicate watch ID provided on the WatchStream";
const EMPTY_RANGE: &str = "mvcc: watcher range is empty";
const NEGATIVE_START: &str = "etcdserver: mvcc: required revision has been compacted";

/// Queue cost of a message that carries no events.
const MESSAGE_BYTES: u64 = 64;

/// A watcher, unique while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct WatcherKey(pub(super) u64);

/// A stream, unique while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct StreamKey(u64);

/// What a stream should do now.
#[derive(Debug)]
pub(super) enum Step {
    /// Give this to the client.
    Send(Message),
    /// Read history, then call [`Core::replayed`].
    Replay(Replay),
    /// Wait for a wake-up.
    Idle,
}

/// History that a watcher needs.
#[derive(Clone, Debug)]
pub(super) struct Replay {
    pub(super) watcher: WatcherKey,
    pub(super) range: KeyRange,
    pub(super) from: Revision,
}

/// History that was read.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// Whole revisions, ascending.
    pub events: Vec<RevisionEvents>,
    /// Every revision up to here was looked at.
    pub looked: Revision,
    /// The store's newest revision.
    pub current: Revision,
    /// The store's compacted revision.
    pub compacted: Revision,
}

/// The read did not get past where it began, although there is more: a broken store.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stuck;

#[derive(Debug)]
struct Watcher {
    stream: StreamKey,
    id: i64,
    range: KeyRange,
    /// The first revision it asked for; 0 for "from now on".
    start: Revision,
    /// While behind: the first revision not sent. While live: nothing below it is sent.
    next: Revision,
    live: bool,
    /// History has confirmed that its start is not compacted. Until then the ring must not serve it: what is in
    /// memory may be compacted.
    known: bool,
    options: Options,
    /// Events were queued since the last progress tick.
    active: bool,
}

#[derive(Debug, Default)]
struct Stream {
    queue: VecDeque<(Message, u64)>,
    bytes: u64,
    watchers: BTreeMap<i64, WatcherKey>,
    next_id: i64,
    behind: BTreeSet<WatcherKey>,
    /// The one served last, so that they take turns.
    served: Option<WatcherKey>,
}

/// All watchers and streams. See the module documentation.
#[derive(Debug)]
pub(super) struct Core {
    limits: Limits,
    published: Revision,
    ring: Ring,
    interest: Interest,
    watchers: HashMap<WatcherKey, Watcher>,
    streams: HashMap<StreamKey, Stream>,
    keys_made: u64,
    queued_bytes: u64,
    /// Events given to streams since the start; for metrics.
    events_sent: u64,
    woken: BTreeSet<StreamKey>,
}

impl Core {
    pub(super) fn new(published: Revision, limits: Limits) -> Self {
        Self {
            limits,
            published,
            ring: Ring::new(published, limits.ring_bytes_max),
            interest: Interest::default(),
            watchers: HashMap::new(),
            streams: HashMap::new(),
            keys_made: 0,
            queued_bytes: 0,
            events_sent: 0,
            woken: BTreeSet::new(),
        }
    }

    pub(super) const fn published(&self) -> Revision {
        self.published
    }

    pub(super) fn watcher_count(&self) -> usize {
        self.watchers.len()
    }

    pub(super) fn stream_count(&self) -> usize {
        self.streams.len()
    }

    pub(super) fn behind_count(&self) -> usize {
        self.streams.values().map(|stream| stream.behind.len()).sum()
    }

    pub(super) const fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    pub(super) const fn events_sent(&self) -> u64 {
        self.events_sent
    }

    /// Streams that have something to do since the last call.
    pub(super) fn take_woken(&mut self) -> BTreeSet<StreamKey> {
        std::mem::take(&mut self.woken)
    }

    pub(super) fn open(&mut self) -> StreamKey {
        self.keys_made += 1;
        let key = StreamKey(self.keys_made);
        self.streams.insert(key, Stream::default());
        key
    }

    pub(super) fn close(&mut self, key: StreamKey) {
        let Some(stream) = self.streams.remove(&key) else { return };
        self.queued_bytes -= stream.bytes;
        for watcher in stream.watchers.into_values() {
            if let Some(watcher_state) = self.watchers.remove(&watcher) {
                self.interest.remove(&watcher_state.range, watcher);
            }
        }
    }

    /// Bytes waiting for the client of a stream.
    pub(super) fn backlog(&self, key: StreamKey) -> u64 {
        self.streams.get(&key).map_or(0, |stream| stream.bytes)
    }

    /// Makes a watcher, or says why not. `current` is the store's revision, which may be ahead of what was
    /// published; "from now on" counts from there.
    pub(super) fn create(&mut self, key: StreamKey, create: Create, current: Revision) {
        let current = current.max(self.published);
        match self.admit(key, &create) {
            Err(reason) => self.push(key, NO_WATCHER, current, Body::Refused(reason)),
            Ok(id) => {
                self.push(key, id, current, Body::Created);
                self.start(key, id, create, current);
            }
        }
    }

    fn admit(&mut self, key: StreamKey, create: &Create) -> Result<i64, &'static str> {
        if create.start < 0 {
            return Err(NEGATIVE_START);
        }
        if let KeyRange::Span(start, end) = &create.range
            && end <= start
        {
            return Err(EMPTY_RANGE);
        }
        let Some(stream) = self.streams.get_mut(&key) else { return Err(EMPTY_RANGE) };
        if create.id != 0 {
            let taken = stream.watchers.contains_key(&create.id);
            return if taken { Err(DUPLICATE_ID) } else { Ok(create.id) };
        }
        while stream.watchers.contains_key(&stream.next_id) {
            stream.next_id += 1;
        }
        stream.next_id += 1;
        Ok(stream.next_id - 1)
    }

    fn start(&mut self, stream: StreamKey, id: i64, create: Create, current: Revision) {
        let start = Revision::new(create.start);
        let next = if create.start == 0 { current.next() } else { start };
        let live = self.published < next;
        self.keys_made += 1;
        let key = WatcherKey(self.keys_made);
        let Some(state) = self.streams.get_mut(&stream) else { return };
        state.watchers.insert(id, key);
        if live {
            self.interest.insert(&create.range, key);
        } else {
            state.behind.insert(key);
        }
        let Create { range, options, .. } = create;
        self.watchers.insert(
            key,
            Watcher { stream, id, range, start, next, live, known: live, options, active: false },
        );
    }

    /// Removes a watcher at the client's wish. An unknown id changes nothing, as in etcd.
    pub(super) fn cancel(&mut self, key: StreamKey, id: i64, current: Revision) {
        let watcher = self.streams.get(&key).and_then(|stream| stream.watchers.get(&id));
        if let Some(watcher) = watcher.copied() {
            self.remove(watcher);
            self.push(key, id, current.max(self.published), Body::Canceled);
        }
    }

    /// Answers a progress request: one message for all watchers of the stream, or nothing while one of them
    /// still has something to receive or has not started.
    pub(super) fn request_progress(&mut self, key: StreamKey) {
        let Some(stream) = self.streams.get(&key) else { return };
        let mut keys = stream.watchers.values().peekable();
        let ready = keys.peek().is_some() && keys.all(|watcher| self.is_current(*watcher));
        if ready {
            self.push(key, NO_WATCHER, self.published, Body::Progress);
        }
    }

    /// The progress timer of a stream fired: a message for each watcher that wants one and had no events since.
    pub(super) fn tick(&mut self, key: StreamKey) {
        let Some(stream) = self.streams.get(&key) else { return };
        let full = self.limits.stream_bytes_max <= stream.bytes;
        let watchers: Vec<_> = stream.watchers.values().copied().collect();
        for watcher in watchers {
            let current = self.is_current(watcher);
            let Some(state) = self.watchers.get_mut(&watcher) else { continue };
            if !state.options.progress_notify {
                continue;
            }
            let quiet = !std::mem::replace(&mut state.active, false);
            let id = state.id;
            if quiet && current && !full {
                self.push(key, id, self.published, Body::Progress);
            }
        }
    }

    fn is_current(&self, watcher: WatcherKey) -> bool {
        self.watchers
            .get(&watcher)
            .is_some_and(|watcher| watcher.live && watcher.start <= self.published)
    }

    /// Takes over what was applied. Revisions are consecutive; a gap means that some were not seen, and then
    /// everybody reads history.
    pub(super) fn publish(&mut self, batch: &[Arc<RevisionEvents>], revision: Revision) {
        for events in batch {
            if events.revision <= self.published {
                continue;
            }
            if self.published.next() < events.revision {
                self.restored(Revision::new(events.revision.get() - 1));
            }
            self.deliver(events);
            self.ring.push(Arc::clone(events));
            self.published = events.revision;
        }
        if self.published < revision {
            self.restored(revision);
        }
    }

    /// The store jumped to `revision`: what is between is only there. Live watchers that need it fall behind.
    pub(super) fn restored(&mut self, revision: Revision) {
        let sent = self.published.next();
        let live: Vec<_> =
            self.watchers.iter().filter(|(_, w)| w.live).map(|(key, w)| (*key, w.next)).collect();
        for (watcher, next) in live {
            let next = next.max(sent);
            if next <= revision {
                self.fall_behind(watcher, next);
            }
        }
        self.published = revision;
        self.ring.reset(revision);
    }

    fn deliver(&mut self, events: &Arc<RevisionEvents>) {
        let mut found: Vec<(WatcherKey, u32)> = Vec::new();
        for (index, event) in (0_u32..).zip(&events.events) {
            let Some(kv) = &event.kv else { continue };
            self.interest.visit(&kv.key, |watcher| found.push((watcher, index)));
        }
        found.sort_unstable();
        for one in found.chunk_by(|a, b| a.0 == b.0) {
            if let Some((watcher, _)) = one.first() {
                self.offer(*watcher, events, one.iter().map(|(_, index)| *index));
            }
        }
    }

    fn offer(
        &mut self,
        key: WatcherKey,
        events: &Arc<RevisionEvents>,
        indexes: impl Iterator<Item = u32> + Clone,
    ) {
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        if events.revision < watcher.next {
            return;
        }
        let Some(part) = part(events, watcher.options, indexes) else { return };
        let bytes = part.bytes() + MESSAGE_BYTES;
        let (stream, id, options) = (watcher.stream, watcher.id, watcher.options);
        watcher.active = true;
        if self.has_room(stream, bytes) {
            let body = Body::Events { parts: vec![part], options };
            self.enqueue(stream, Message { id, revision: events.revision, body }, bytes);
        } else {
            self.fall_behind(key, events.revision);
        }
    }

    fn has_room(&self, key: StreamKey, bytes: u64) -> bool {
        let backlog = self.backlog(key);
        let fits = backlog + bytes <= self.limits.stream_bytes_max
            && self.queued_bytes + bytes <= self.limits.hub_bytes_max;
        fits || backlog == 0
    }

    fn fall_behind(&mut self, key: WatcherKey, next: Revision) {
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        watcher.live = false;
        watcher.next = next;
        self.interest.remove(&watcher.range, key);
        if let Some(stream) = self.streams.get_mut(&watcher.stream) {
            stream.behind.insert(key);
        }
        self.woken.insert(watcher.stream);
    }

    fn turn_live(&mut self, key: WatcherKey) {
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        watcher.live = true;
        self.interest.insert(&watcher.range, key);
        if let Some(stream) = self.streams.get_mut(&watcher.stream) {
            stream.behind.remove(&key);
        }
    }

    fn remove(&mut self, key: WatcherKey) {
        let Some(watcher) = self.watchers.remove(&key) else { return };
        self.interest.remove(&watcher.range, key);
        if let Some(stream) = self.streams.get_mut(&watcher.stream) {
            stream.watchers.remove(&watcher.id);
            stream.behind.remove(&key);
        }
    }

    fn push(&mut self, key: StreamKey, id: i64, revision: Revision, body: Body) {
        self.enqueue(key, Message { id, revision, body }, MESSAGE_BYTES);
    }

    fn enqueue(&mut self, key: StreamKey, message: Message, bytes: u64) {
        let Some(stream) = self.streams.get_mut(&key) else { return };
        stream.queue.push_back((message, bytes));
        stream.bytes += bytes;
        self.queued_bytes += bytes;
        self.woken.insert(key);
    }

    /// About how many bytes the next message of a stream takes; `None` when there is nothing to do.
    pub(super) fn upcoming(&self, key: StreamKey) -> Option<u64> {
        let stream = self.streams.get(&key)?;
        let history = || (!stream.behind.is_empty()).then_some(self.limits.replay_bytes_max as u64);
        stream.queue.front().map(|(_, bytes)| *bytes).or_else(history)
    }

    /// What the stream should do now: first what is queued, then what its watchers missed.
    pub(super) fn step(&mut self, key: StreamKey) -> Step {
        loop {
            let Some(stream) = self.streams.get_mut(&key) else { return Step::Idle };
            if let Some((message, bytes)) = stream.queue.pop_front() {
                stream.bytes -= bytes;
                self.queued_bytes -= bytes;
                self.events_sent += message.body.event_count();
                return Step::Send(message);
            }
            let after = stream.served.map_or(WatcherKey(0), |served| WatcherKey(served.0 + 1));
            let turn = stream.behind.range(after..).next().or_else(|| stream.behind.first());
            let Some(watcher) = turn.copied() else { return Step::Idle };
            stream.served = Some(watcher);
            let known = self.watchers.get(&watcher).is_some_and(|watcher| watcher.known);
            if !(known && self.replay_from_ring(watcher))
                && let Some(state) = self.watchers.get(&watcher)
            {
                let range = state.range.clone();
                return Step::Replay(Replay { watcher, range, from: state.next });
            }
        }
    }

    /// Serves a watcher from memory; `false` if the ring does not reach back far enough.
    fn replay_from_ring(&mut self, key: WatcherKey) -> bool {
        let Some(watcher) = self.watchers.get(&key) else { return true };
        let Some(revisions) = self.ring.since(watcher.next) else { return false };
        let mut parts = Vec::new();
        let mut bytes = 0;
        let mut looked = self.published;
        for events in revisions {
            let Some(part) = matching(events, &watcher.range, watcher.options) else { continue };
            bytes += part.bytes();
            parts.push(part);
            if self.limits.replay_bytes_max as u64 <= bytes {
                looked = events.revision;
                break;
            }
        }
        self.advance(key, parts, looked, self.published);
        true
    }

    /// Takes over what [`Step::Replay`] asked for. A watcher that was canceled meanwhile changes nothing.
    pub(super) fn replayed(&mut self, replay: &Replay, read: Replayed) -> Result<(), Stuck> {
        let Some(watcher) = self.watchers.get_mut(&replay.watcher) else { return Ok(()) };
        watcher.known = true;
        if watcher.live || watcher.next != replay.from {
            return Ok(());
        }
        if replay.from < read.compacted {
            let (stream, id) = (watcher.stream, watcher.id);
            self.remove(replay.watcher);
            self.push(stream, id, Revision::new(0), Body::Compacted(read.compacted));
            return Ok(());
        }
        if read.looked < replay.from {
            return Err(Stuck);
        }
        let parts = read
            .events
            .into_iter()
            .filter_map(|events| matching(&Arc::new(events), &watcher.range, watcher.options))
            .collect();
        self.advance(replay.watcher, parts, read.looked, read.current);
        Ok(())
    }

    /// Queues replayed events; the watcher turns live if nothing published is left for it.
    fn advance(&mut self, key: WatcherKey, parts: Vec<Part>, looked: Revision, current: Revision) {
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        watcher.next = looked.next();
        let caught_up = self.published < watcher.next;
        if !parts.is_empty() {
            watcher.active = true;
            let bytes = MESSAGE_BYTES + parts.iter().map(Part::bytes).sum::<u64>();
            let (stream, id, options) = (watcher.stream, watcher.id, watcher.options);
            let revision = current.max(self.published);
            let body = Body::Events { parts, options };
            self.enqueue(stream, Message { id, revision, body }, bytes);
        }
        if caught_up {
            self.turn_live(key);
        }
    }
}

fn matching(events: &Arc<RevisionEvents>, range: &KeyRange, options: Options) -> Option<Part> {
    let inside = (0_u32..)
        .zip(&events.events)
        .filter(|(_, event)| event.kv.as_ref().is_some_and(|kv| range.contains(&kv.key)))
        .map(|(index, _)| index);
    part(events, options, inside)
}

/// The events at `indexes` that the options let through, if any. Needs no memory when that is all of them.
fn part(
    events: &Arc<RevisionEvents>,
    options: Options,
    indexes: impl Iterator<Item = u32> + Clone,
) -> Option<Part> {
    let wanted = indexes.filter(|index| {
        events.events.get(*index as usize).is_some_and(|event| options.wants(event.r#type()))
    });
    let count = wanted.clone().count();
    let picks =
        if count == events.events.len() { Picks::All } else { Picks::Some(wanted.collect()) };
    (0 < count).then(|| Part { events: Arc::clone(events), picks })
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;

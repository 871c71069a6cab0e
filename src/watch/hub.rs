//! Connects the decisions of `core` to tasks: one lock, one wake-up per stream, reads of history on the blocking pool.
//!
//! The lock is held for memory operations only. The publisher takes it once per applied batch.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tokio::sync::{Notify, watch};

use super::core::{Core, Replay, Replayed, Step, StreamKey};
use super::{Create, Limits, Message};
use crate::mvcc::{KeyRange, RevisionEvents, Store, StoreError};
use crate::types::Revision;

/// Where watchers read what they missed.
pub trait History: Clone + Send + 'static {
    /// Events in `range` from `from` on, whole revisions, about `bytes_max` of them. May block.
    fn replay(
        &self,
        from: Revision,
        range: &KeyRange,
        bytes_max: usize,
    ) -> Result<Replayed, StoreError>;
}

impl History for Store {
    fn replay(
        &self,
        from: Revision,
        range: &KeyRange,
        bytes_max: usize,
    ) -> Result<Replayed, StoreError> {
        let view = self.read()?;
        let (current, compacted) = (view.revision(), view.compacted());
        if from < compacted {
            return Ok(Replayed { events: Vec::new(), looked: from, current, compacted });
        }
        let (events, looked) = view.events(from, Some(range), bytes_max)?;
        Ok(Replayed { events, looked, current, compacted })
    }
}

/// Why a stream cannot go on.
#[derive(Debug, Error)]
pub enum WatchError {
    /// The store failed.
    #[error("reading history: {0}")]
    Store(#[from] StoreError),
    /// The store returned nothing although it has newer revisions.
    #[error("reading history from revision {0} made no progress")]
    Stuck(Revision),
    /// The process is stopping.
    #[error("stopped")]
    Stopped,
}

/// Sizes for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Open streams.
    pub streams: usize,
    /// Watchers on them.
    pub watchers: usize,
    /// Watchers that read history.
    pub behind: usize,
    /// Bytes queued for clients.
    pub queued_bytes: u64,
    /// Events given to streams since the start.
    pub events_sent: u64,
}

/// All watchers of this node. Clones are the same hub.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Mutex<Shared>>,
    closing: watch::Sender<bool>,
    replay_bytes_max: usize,
}

struct Shared {
    core: Core,
    /// The process is stopping: every stream ends.
    closed: bool,
    wakers: HashMap<StreamKey, Arc<Notify>>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("statistics", &self.statistics()).finish()
    }
}

impl Hub {
    /// Starts without watchers, at the store's revision.
    pub fn new(revision: Revision, limits: Limits) -> Self {
        let shared =
            Shared { core: Core::new(revision, limits), closed: false, wakers: HashMap::new() };
        Self {
            shared: Arc::new(Mutex::new(shared)),
            closing: watch::Sender::new(false),
            replay_bytes_max: limits.replay_bytes_max,
        }
    }

    /// These revisions are applied and readable; `revision` is the newest. Never blocks on a client.
    pub fn publish(&self, batch: &[Arc<RevisionEvents>], revision: Revision) {
        self.change(|core| core.publish(batch, revision));
    }

    /// The store was replaced and now ends at `revision`.
    pub fn restored(&self, revision: Revision) {
        self.change(|core| core.restored(revision));
    }

    /// Ends every stream, now and later: the process is stopping, and watches never end by themselves.
    pub fn close(&self) {
        let mut shared = self.lock();
        shared.closed = true;
        for waker in shared.wakers.values() {
            waker.notify_one();
        }
        drop(shared);
        self.closing.send_replace(true);
    }

    /// Completes when the hub is closed: for other streams that never end by themselves.
    pub async fn closed(&self) {
        // The sender is ours, so it is not gone.
        drop(self.closing.subscribe().wait_for(|closed| *closed).await);
    }

    /// The newest published revision.
    pub fn published(&self) -> Revision {
        self.lock().core.published()
    }

    /// Sizes for metrics.
    pub fn statistics(&self) -> Statistics {
        let shared = self.lock();
        Statistics {
            streams: shared.core.stream_count(),
            watchers: shared.core.watcher_count(),
            behind: shared.core.behind_count(),
            queued_bytes: shared.core.queued_bytes(),
            events_sent: shared.core.events_sent(),
        }
    }

    /// Opens a stream for one client.
    pub fn open<H: History>(&self, history: H) -> WatchStream<H> {
        let waker = Arc::new(Notify::new());
        let mut shared = self.lock();
        let key = shared.core.open();
        shared.wakers.insert(key, Arc::clone(&waker));
        drop(shared);
        WatchStream { hub: self.clone(), key, waker, history }
    }

    /// A panic while the lock was held cannot leave `Core` half changed in a way that memory safety depends on,
    /// and the process stops on panics anyway.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Core) -> T) -> T {
        let mut shared = self.lock();
        let out = change(&mut shared.core);
        for key in shared.core.take_woken() {
            if let Some(waker) = shared.wakers.get(&key) {
                waker.notify_one();
            }
        }
        out
    }
}

/// One client's watchers. Dropping it removes them.
#[derive(Debug)]
pub struct WatchStream<H> {
    hub: Hub,
    key: StreamKey,
    waker: Arc<Notify>,
    history: H,
}

impl<H> Drop for WatchStream<H> {
    fn drop(&mut self) {
        let mut shared = self.hub.lock();
        shared.core.close(self.key);
        shared.wakers.remove(&self.key);
    }
}

impl<H: History> WatchStream<H> {
    /// Makes a watcher; the answer comes through [`WatchStream::next`]. `current` is the store's revision.
    pub fn create(&self, create: Create, current: Revision) {
        self.hub.change(|core| core.create(self.key, create, current));
    }

    /// Removes a watcher; the answer comes through [`WatchStream::next`].
    pub fn cancel(&self, id: i64, current: Revision) {
        self.hub.change(|core| core.cancel(self.key, id, current));
    }

    /// Asks for a progress message for all watchers together.
    pub fn request_progress(&self) {
        self.hub.change(|core| core.request_progress(self.key));
    }

    /// The progress timer fired.
    pub fn tick(&self) {
        self.hub.change(|core| core.tick(self.key));
    }

    /// Bytes waiting for the client. Requests should wait while it is large.
    pub fn backlog(&self) -> u64 {
        self.hub.lock().core.backlog(self.key)
    }

    /// Waits until there is something to do: about how many bytes the next message takes, or the history that must be read
    /// for it. Nothing is taken yet, so that whoever has no room for it leaves it in a queue that is bounded.
    pub async fn upcoming(&self) -> Result<u64, WatchError> {
        loop {
            let woken = self.waker.notified();
            let upcoming = {
                let shared = self.hub.lock();
                if shared.closed {
                    return Err(WatchError::Stopped);
                }
                shared.core.upcoming(self.key)
            };
            match upcoming {
                Some(bytes) => return Ok(bytes),
                None => woken.await,
            }
        }
    }

    /// The next message, read from history if need be; `None` if there is none after all. Does not wait for others.
    /// Cancel-safe: a message is taken only when it is returned.
    pub async fn take(&self) -> Result<Option<Message>, WatchError> {
        loop {
            if self.hub.lock().closed {
                return Err(WatchError::Stopped);
            }
            let step = self.hub.change(|core| core.step(self.key));
            match step {
                Step::Send(message) => return Ok(Some(message)),
                Step::Replay(replay) => self.replay(replay).await?,
                Step::Idle => return Ok(None),
            }
        }
    }

    /// The next message, for whoever has room for any. Cancel-safe.
    pub async fn next(&self) -> Result<Message, WatchError> {
        loop {
            self.upcoming().await?;
            if let Some(message) = self.take().await? {
                return Ok(message);
            }
        }
    }

    async fn replay(&self, replay: Replay) -> Result<(), WatchError> {
        let history = self.history.clone();
        let (range, from, bytes_max) =
            (replay.range.clone(), replay.from, self.hub.replay_bytes_max);
        let read = tokio::task::spawn_blocking(move || history.replay(from, &range, bytes_max));
        let read = read.await.map_err(|_| WatchError::Stopped)??;
        self.hub
            .change(|core| core.replayed(&replay, read))
            .map_err(|_| WatchError::Stuck(replay.from))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Body, Options};
    use super::*;
    use crate::proto::mvccpb::{Event, KeyValue};
    use bytes::Bytes;

    /// History that is a list; revision n is at n - 2.
    #[derive(Clone)]
    struct List(Arc<Vec<RevisionEvents>>);

    impl History for List {
        fn replay(
            &self,
            from: Revision,
            _range: &KeyRange,
            _bytes_max: usize,
        ) -> Result<Replayed, StoreError> {
            let events: Vec<_> =
                self.0.iter().filter(|e| from <= e.revision).take(1).cloned().collect();
            let current = self.0.last().map_or(Revision::new(1), |e| e.revision);
            let looked = events.last().map_or(current, |e| e.revision);
            Ok(Replayed { events, looked, current, compacted: Revision::new(0) })
        }
    }

    fn revision(n: i64) -> RevisionEvents {
        let kv = KeyValue { key: Bytes::from_static(b"k"), mod_revision: n, ..Default::default() };
        let event = Event { kv: Some(kv), ..Default::default() };
        RevisionEvents { revision: Revision::new(n), events: vec![event] }
    }

    fn create(start: i64) -> Create {
        let range = KeyRange::One(Bytes::from_static(b"k"));
        Create { id: 0, range, start, options: Options::default() }
    }

    fn revisions(message: &Message) -> Vec<i64> {
        match &message.body {
            Body::Events { parts, .. } => parts
                .iter()
                .flat_map(|part| part.events())
                .filter_map(|event| event.kv.as_ref().map(|kv| kv.mod_revision))
                .collect(),
            Body::Created
            | Body::Refused(_)
            | Body::Canceled
            | Body::Compacted(_)
            | Body::Progress => Vec::new(),
        }
    }

    #[tokio::test]
    async fn closing_the_hub_ends_streams_that_wait_and_streams_opened_later() {
        let hub = Hub::new(Revision::new(1), Limits::default());
        let stream = hub.open(List(Arc::new(vec![])));
        let close = async {
            tokio::task::yield_now().await;
            hub.close();
        };

        let (ended, ()) = tokio::join!(stream.next(), close);

        assert!(matches!(ended, Err(WatchError::Stopped)));
        let late = hub.open(List(Arc::new(vec![])));
        assert!(matches!(late.next().await, Err(WatchError::Stopped)));
    }

    #[tokio::test]
    async fn watcher_reads_history_and_then_live_events_without_a_gap() {
        let history: Vec<_> = (2..=20).map(revision).collect();
        let hub = Hub::new(Revision::new(20), Limits::default());
        let stream = hub.open(List(Arc::new(history)));
        stream.create(create(2), Revision::new(20));
        let publisher = {
            let hub = hub.clone();
            tokio::spawn(async move {
                for n in 21..=40 {
                    hub.publish(&[Arc::new(revision(n))], Revision::new(n));
                    tokio::task::yield_now().await;
                }
            })
        };

        let mut seen = Vec::new();
        while seen.len() < 39 {
            seen.extend(revisions(&stream.next().await.unwrap()));
        }

        publisher.await.unwrap();
        assert_eq!(seen, (2..=40).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn message_stays_in_its_queue_until_there_is_room_for_it() {
        let hub = Hub::new(Revision::new(1), Limits::default());
        let stream = hub.open(List(Arc::new((2..=4).map(revision).collect())));
        assert!(matches!(stream.take().await, Ok(None)));
        stream.create(create(2), Revision::new(4));
        hub.publish(&[], Revision::new(4));
        let created = stream.upcoming().await.unwrap();
        assert!(matches!(stream.take().await, Ok(Some(Message { body: Body::Created, .. }))));

        // History is asked for in full, whatever of it the watcher will want; nothing is read meanwhile.
        let history = stream.upcoming().await.unwrap();
        assert_eq!(history, Limits::default().replay_bytes_max as u64);
        assert_eq!(hub.statistics().queued_bytes, 0);
        for n in 2..=4 {
            let message = stream.take().await.unwrap().unwrap();
            assert_eq!(revisions(&message), [n]);
        }

        assert!(matches!(stream.take().await, Ok(None)));
        hub.publish(&[Arc::new(revision(5))], Revision::new(5));
        let live = stream.upcoming().await.unwrap();
        assert!(created < live && live < history);
        assert_eq!(stream.upcoming().await.unwrap(), live);
        assert_eq!(hub.statistics().queued_bytes, live);
        assert_eq!(revisions(&stream.take().await.unwrap().unwrap()), [5]);
        hub.close();
        assert!(stream.upcoming().await.is_err() && stream.take().await.is_err());
        hub.closed().await;
    }

    #[tokio::test]
    async fn dropping_a_stream_removes_its_watchers() {
        let hub = Hub::new(Revision::new(1), Limits::default());
        let stream = hub.open(List(Arc::new(Vec::new())));
        stream.create(create(0), Revision::new(1));
        hub.publish(&[Arc::new(revision(2))], Revision::new(2));
        drop(stream);
        assert_eq!(hub.statistics(), Statistics::default());
    }

    #[tokio::test]
    async fn store_that_makes_no_progress_ends_the_stream_instead_of_spinning() {
        #[derive(Clone)]
        struct Broken;
        impl History for Broken {
            fn replay(&self, _: Revision, _: &KeyRange, _: usize) -> Result<Replayed, StoreError> {
                let zero = Revision::new(0);
                Ok(Replayed { events: vec![], looked: zero, current: zero, compacted: zero })
            }
        }
        let hub = Hub::new(Revision::new(9), Limits::default());
        let stream = hub.open(Broken);
        stream.create(create(5), Revision::new(9));
        assert!(matches!(stream.next().await.unwrap().body, Body::Created));
        assert!(matches!(stream.next().await, Err(WatchError::Stuck(r)) if r.get() == 5));
    }
}

//! A network in memory: per direction it can be cut, slow, or lose messages, and one seed gives one run.
//!
//! Carries [`Transport`] between nodes of one process. A call over a cut link is lost, and the caller waits until its time is
//! up, as it would on a real network. A message of a stream is late instead of lost, as over TCP: it arrives when the link
//! is whole again.
//!
//! # Invariants
//!
//! - Messages of one stream arrive in order, each at most once.
//! - A node that has left, or whose connections were broken, gets nothing more over them.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

use super::Random;
use crate::env::BoxFuture;
use crate::raft::Member;
use crate::raft::transport::{Answer, BoxStream, CallError, Method, StreamMethod, Transport};
use crate::types::NodeId;

/// One direction between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Messages arrive.
    pub open: bool,
    /// How long a message takes at least.
    pub delay: Duration,
    /// How much longer it may take.
    pub jitter: Duration,
    /// How many calls in a hundred are lost.
    pub lost_percent: u64,
}

impl Default for Link {
    fn default() -> Self {
        let (delay, jitter) = (Duration::from_micros(300), Duration::from_micros(200));
        Self { open: true, delay, jitter, lost_percent: 0 }
    }
}

/// The network. Clones share it.
#[derive(Clone)]
pub struct Network(Arc<Shared>);

struct Shared {
    wires: Mutex<Wires>,
    /// Told when a link changes.
    changed: watch::Sender<()>,
}

/// Told of every message that a node sends: from, to, its size.
type Tap = Arc<dyn Fn(NodeId, NodeId, usize) + Send + Sync>;

struct Wires {
    random: Random,
    tap: Option<Tap>,
    answers: BTreeMap<NodeId, Arc<dyn Answer>>,
    links: BTreeMap<(NodeId, NodeId), Link>,
    /// What carries messages between two nodes.
    carriers: Vec<Carrier>,
}

struct Carrier {
    from: NodeId,
    to: NodeId,
    task: AbortHandle,
    broken: Arc<AtomicBool>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("links", &self.lock().links).finish_non_exhaustive()
    }
}

impl Network {
    /// A network without anybody.
    pub fn new(seed: u64) -> Self {
        let wires = Wires {
            random: Random::new(seed),
            tap: None,
            answers: BTreeMap::new(),
            links: BTreeMap::new(),
            carriers: Vec::new(),
        };
        Self(Arc::new(Shared { wires: Mutex::new(wires), changed: watch::Sender::new(()) }))
    }

    /// The way from one node to all others.
    pub fn transport(&self, from: NodeId) -> Arc<dyn Transport> {
        Arc::new(Way { network: self.clone(), from })
    }

    /// From now on, this answers what others ask of a node.
    pub fn join(&self, node: NodeId, answer: Arc<dyn Answer>) {
        self.lock().answers.insert(node, answer);
    }

    /// The node is gone: nobody answers for it, and everything under way from or to it is lost.
    pub fn leave(&self, node: NodeId) {
        let gone = self.lock().answers.remove(&node);
        // It may own this network; it is dropped without the lock.
        drop(gone);
        self.break_connections(|from, to| from == node || to == node);
    }

    /// Breaks what is under way between these nodes, as a reset of the connection does.
    pub fn break_connections(&self, between: impl Fn(NodeId, NodeId) -> bool) {
        let mut wires = self.lock();
        for carrier in wires.carriers.extract_if(.., |carrier| between(carrier.from, carrier.to)) {
            carrier.broken.store(true, Relaxed);
            carrier.task.abort();
        }
    }

    /// How messages go in one direction.
    pub fn link(&self, from: NodeId, to: NodeId) -> Link {
        self.lock().link(from, to)
    }

    /// Changes how messages go in one direction.
    pub fn set_link(&self, from: NodeId, to: NodeId, link: Link) {
        self.lock().links.insert((from, to), link);
        self.0.changed.send_replace(());
    }

    /// Cuts one direction.
    pub fn cut(&self, from: NodeId, to: NodeId) {
        self.set_link(from, to, Link { open: false, ..self.link(from, to) });
    }

    /// Cuts both directions.
    pub fn separate(&self, one: NodeId, other: NodeId) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// From now on, `tap` is told of every message that a node sends: from, to, its size.
    pub fn tap(&self, tap: impl Fn(NodeId, NodeId, usize) + Send + Sync + 'static) {
        self.lock().tap = Some(Arc::new(tap));
    }

    fn note(&self, from: NodeId, to: NodeId, bytes: usize) {
        let tap = self.lock().tap.clone();
        if let Some(tap) = tap {
            tap(from, to, bytes);
        }
    }

    /// All links are as they were at the beginning.
    pub fn heal(&self) {
        self.lock().links.clear();
        self.0.changed.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, Wires> {
        self.0.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a task that is aborted when the connection breaks.
    fn spawn<T: Send + 'static>(
        &self,
        from: NodeId,
        to: NodeId,
        task: impl Future<Output = T> + Send + 'static,
    ) -> (OwnTask<T>, Arc<AtomicBool>) {
        let (task, broken) = (tokio::spawn(task), Arc::new(AtomicBool::new(false)));
        let mut wires = self.lock();
        wires.carriers.retain(|carrier| !carrier.task.is_finished());
        let handle = task.abort_handle();
        wires.carriers.push(Carrier { from, to, task: handle, broken: Arc::clone(&broken) });
        (OwnTask(task), broken)
    }

    /// Carries one message of a call. False if it is lost.
    async fn deliver(&self, from: NodeId, to: NodeId) -> bool {
        let (delay, lost) = {
            let mut wires = self.lock();
            let link = wires.link(from, to);
            let lost = !link.open || wires.random.percent(link.lost_percent);
            (wires.delay(link), lost)
        };
        tokio::time::sleep(delay).await;
        !lost && self.link(from, to).open
    }

    async fn until_open(&self, from: NodeId, to: NodeId) {
        let mut changed = self.0.changed.subscribe();
        while !self.link(from, to).open {
            if changed.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    fn arrival(&self, from: NodeId, to: NodeId) -> Instant {
        let mut wires = self.lock();
        let link = wires.link(from, to);
        Instant::now() + wires.delay(link)
    }

    fn answer_of(&self, to: NodeId) -> Result<Arc<dyn Answer>, CallError> {
        let answer = self.lock().answers.get(&to).cloned();
        answer.ok_or_else(|| CallError::Unreachable(format!("node {to} is down")))
    }
}

impl Wires {
    fn link(&self, from: NodeId, to: NodeId) -> Link {
        self.links.get(&(from, to)).copied().unwrap_or_default()
    }

    fn delay(&mut self, link: Link) -> Duration {
        let jitter = u64::try_from(link.jitter.as_nanos()).unwrap_or(u64::MAX);
        link.delay + Duration::from_nanos(self.random.below(jitter.saturating_add(1)))
    }
}

/// A task that ends with its owner.
struct OwnTask<T>(JoinHandle<T>);

impl<T> Drop for OwnTask<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The way from one node to all others.
struct Way {
    network: Network,
    from: NodeId,
}

impl Transport for Way {
    fn call(
        &self,
        to: &Member,
        method: Method,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let (network, from, to) = (self.network.clone(), self.from, to.id);
        Box::pin(async move {
            let carrier = network.clone();
            let call = async move {
                network.note(from, to, request.len());
                if !network.deliver(from, to).await {
                    return std::future::pending().await;
                }
                let answer = network.answer_of(to)?.answer(from, method, request).await;
                if !network.deliver(to, from).await {
                    return std::future::pending().await;
                }
                answer.map_err(CallError::Refused)
            };
            // A task: what was asked is done, whether or not the caller waits for the answer.
            let (mut task, _) = carrier.spawn(from, to, tokio::time::timeout(timeout, call));
            let interrupted = |what: String| Err(CallError::Interrupted(what));
            match (&mut task.0).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_elapsed)) => interrupted(format!("no answer for {timeout:?}")),
                Err(_aborted) => interrupted("the connection broke".to_owned()),
            }
        })
    }

    /// To connect takes both directions; through a link that is cut it takes for ever.
    fn ready(&self, to: &Member) -> BoxFuture<'static, Result<(), CallError>> {
        let (network, from, to) = (self.network.clone(), self.from, to.id);
        Box::pin(async move {
            network.until_open(from, to).await;
            network.until_open(to, from).await;
            network.answer_of(to).map(drop)
        })
    }

    fn stream(
        &self,
        to: &Member,
        method: StreamMethod,
        requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>> {
        let (network, from, to) = (self.network.clone(), self.from, to.id);
        Box::pin(async move {
            network.until_open(from, to).await;
            tokio::time::sleep_until(network.arrival(from, to)).await;
            let answer = network.answer_of(to)?;
            let there = Pipe { network: network.clone(), from, to };
            let back = Pipe { network: network.clone(), from: to, to: from };
            let tapped = network.clone();
            let requests = requests.inspect(move |request| tapped.note(from, to, request.len()));
            let (sent, asked) = there.lay(Box::pin(requests));
            let asked = asked.map(|message| match message {
                Some(message) => Ok(message),
                None => Err(CallError::Interrupted("the caller is gone".to_owned())),
            });
            let (answering, answers) =
                back.lay(answer.answer_stream(from, method, Box::pin(asked)));
            let answers = answers.map(move |message| {
                let _carried_until_dropped = (&sent, &answering);
                match message {
                    Some(Ok(message)) => Ok(message),
                    Some(Err(refused)) => Err(CallError::Refused(refused)),
                    None => Err(CallError::Interrupted("the connection broke".to_owned())),
                }
            });
            let answers: BoxStream<_> = Box::pin(answers);
            Ok(answers)
        })
    }
}

/// One direction of a stream.
struct Pipe {
    network: Network,
    from: NodeId,
    to: NodeId,
}

/// What is in a pipe: a message and when it arrives, or the orderly end.
type InPipe<T> = Option<(Instant, T)>;

impl Pipe {
    /// Carries a stream. What arrives ends with `None` if the connection broke.
    fn lay<T: Send + 'static>(
        self,
        mut source: BoxStream<T>,
    ) -> (OwnTask<()>, BoxStream<Option<T>>) {
        let Self { network, from, to } = self;
        let (sender, receiver) = mpsc::channel::<InPipe<T>>(16);
        let (whole, ended) = oneshot::channel::<()>();
        let carrier = network.clone();
        let (task, broken) = network.spawn(from, to, async move {
            let _whole = whole;
            loop {
                let message = tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    message = source.next() => message,
                };
                let ended = message.is_none();
                let item = message.map(|message| (carrier.arrival(from, to), message));
                if sender.send(item).await.is_err() {
                    return;
                }
                if ended {
                    // The connection may still break before all of it has arrived.
                    return sender.closed().await;
                }
            }
        });
        let pipe = (receiver, ended, broken, network);
        let arriving = stream::unfold(Some(pipe), move |state| async move {
            let (mut receiver, mut ended, broken, network) = state?;
            let arrived = async {
                let (at, message) = receiver.recv().await??;
                tokio::time::sleep_until(at).await;
                network.until_open(from, to).await;
                Some(message)
            };
            tokio::select! {
                biased;
                _ = &mut ended => Some((None, None)),
                message = arrived => match message? {
                    // The task is told to end, but may not have noticed yet.
                    _ if broken.load(Relaxed) => Some((None, None)),
                    message => Some((Some(message), Some((receiver, ended, broken, network)))),
                },
            }
        });
        (task, Box::pin(arriving))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::transport::Refused;

    const ONE: NodeId = NodeId::new(1);
    const TWO: NodeId = NodeId::new(2);

    /// Answers with what it was asked.
    struct Echo;

    impl Answer for Echo {
        fn answer(
            &self,
            _from: NodeId,
            _method: Method,
            request: Bytes,
        ) -> BoxFuture<'static, Result<Bytes, Refused>> {
            Box::pin(async move { Ok(request) })
        }

        fn answer_stream(
            &self,
            _from: NodeId,
            _method: StreamMethod,
            requests: BoxStream<Result<Bytes, CallError>>,
        ) -> BoxStream<Result<Bytes, Refused>> {
            Box::pin(requests.map(|request| request.map_err(|_gone| Refused::Busy)))
        }
    }

    fn network() -> Network {
        let network = Network::new(7);
        network.join(TWO, Arc::new(Echo));
        network
    }

    fn member(id: NodeId) -> Member {
        Member { id, ..Member::default() }
    }

    async fn call(network: &Network, to: NodeId) -> Result<Bytes, CallError> {
        let request = Bytes::from_static(b"hello");
        let timeout = Duration::from_secs(1);
        network.transport(ONE).call(&member(to), Method::Vote, request, timeout).await
    }

    async fn open(network: &Network, count: u8) -> BoxStream<Result<Bytes, CallError>> {
        let requests = stream::iter((0..count).map(|n| Bytes::copy_from_slice(&[n])));
        let way = network.transport(ONE);
        way.stream(&member(TWO), StreamMethod::Append, Box::pin(requests)).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn calls_are_answered_unless_the_link_or_the_node_is_gone() {
        let network = network();
        assert_eq!(call(&network, TWO).await.unwrap(), "hello");
        let down = call(&network, NodeId::new(3)).await.unwrap_err();
        assert!(matches!(down, CallError::Unreachable(_)), "{down}");
        for (from, to) in [(ONE, TWO), (TWO, ONE)] {
            network.cut(from, to);
            let start = Instant::now();
            let error = call(&network, TWO).await.unwrap_err();
            assert!(matches!(error, CallError::Interrupted(_)), "{error}");
            assert_eq!(start.elapsed(), Duration::from_secs(1), "the whole timeout");
            network.heal();
        }
        network.set_link(ONE, TWO, Link { lost_percent: 100, ..Link::default() });
        assert!(call(&network, TWO).await.is_err());
        network.heal();
        network.leave(TWO);
        assert!(matches!(call(&network, TWO).await, Err(CallError::Unreachable(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn messages_of_a_stream_keep_their_order_whatever_each_would_take() {
        let network = network();
        let jitter = Duration::from_millis(50);
        network.set_link(ONE, TWO, Link { jitter, ..Link::default() });
        let answers: Vec<_> =
            open(&network, 100).await.map(|answer| answer.unwrap()[0]).collect().await;
        assert_eq!(answers, (0..100).collect::<Vec<u8>>());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_link_holds_a_stream_and_a_broken_connection_ends_it() {
        let network = network();
        let mut answers = open(&network, 3).await;
        network.cut(ONE, TWO);
        let hour = Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, answers.next()).await.is_err(), "nothing got through");
        network.heal();
        assert_eq!(answers.next().await.unwrap().unwrap(), [0].as_slice());
        network.break_connections(|from, _| from == TWO);
        let last = answers.by_ref().collect::<Vec<_>>().await.pop().unwrap();
        assert!(matches!(last, Err(CallError::Interrupted(_))), "{last:?}");
    }
}

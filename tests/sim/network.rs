//! The network between nodes: carries the real messages, and cuts, delays and loses them.
//!
//! # Shape
//!
//! [`Network`] knows who listens; [`Wire`] is the [`Transport`] of one incarnation of one node. A cut is one direction of one
//! pair, so every shape of partition can be made of cuts. Every answer passes the oracle before it leaves.
//!
//! # Invariants
//!
//! - Nothing that a crashed incarnation says arrives, and nothing arrives at it.
//! - `Unreachable` is said only where the message was not delivered.
//! - A stream delivers in order and at most once, or ends; like TCP, it survives a short cut.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use k3s_server::env::BoxFuture;
use k3s_server::raft::Member;
use k3s_server::raft::transport::{
    Answer, BoxStream, CallError, Method, Refused, StreamMethod, Transport,
};
use k3s_server::testkit::Random;
use k3s_server::types::NodeId;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

use crate::promises::Promises;
use crate::world::{World, trace};

/// How long TCP tries before a connection is given up.
const PATIENCE: Duration = Duration::from_secs(4);

/// Messages of one stream that are under way at a time.
const WINDOW: usize = 64;

/// One life of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Incarnation {
    pub(crate) node: NodeId,
    pub(crate) number: u64,
}

/// Delays and losses that hold for all links.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    pub(crate) delay_min: Duration,
    pub(crate) delay_max: Duration,
    pub(crate) loss_percent: u64,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            delay_min: Duration::from_micros(200),
            delay_max: Duration::from_millis(2),
            loss_percent: 0,
        }
    }
}

/// See the module documentation. Clones share the network.
#[derive(Clone)]
pub(crate) struct Network {
    world: World,
    promises: Promises,
    state: Arc<Mutex<State>>,
}

struct State {
    random: Random,
    weather: Weather,
    cuts: BTreeSet<(u64, u64)>,
    listeners: BTreeMap<u64, (u64, Arc<dyn Answer>)>,
    alive: BTreeMap<u64, u64>,
    messages: u64,
}

impl Network {
    pub(crate) fn new(world: World, promises: Promises) -> Self {
        let state = State {
            random: world.random(),
            weather: Weather::default(),
            cuts: BTreeSet::new(),
            listeners: BTreeMap::new(),
            alive: BTreeMap::new(),
            messages: 0,
        };
        Self { world, promises, state: Arc::new(Mutex::new(state)) }
    }

    /// The transport of a process that starts.
    pub(crate) fn wire(&self, who: Incarnation) -> Wire {
        self.lock().alive.insert(who.node.get(), who.number);
        Wire { network: self.clone(), who }
    }

    /// From now on the process answers.
    pub(crate) fn listen(&self, who: Incarnation, answer: Arc<dyn Answer>) {
        let mut state = self.lock();
        if state.alive.get(&who.node.get()) == Some(&who.number) {
            state.listeners.insert(who.node.get(), (who.number, answer));
        }
    }

    /// The process is gone, from one moment to the next.
    pub(crate) fn gone(&self, node: NodeId) {
        let mut state = self.lock();
        state.alive.remove(&node.get());
        state.listeners.remove(&node.get());
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// Nothing goes from one to the other.
    pub(crate) fn cut(&self, from: NodeId, to: NodeId) {
        self.lock().cuts.insert((from.get(), to.get()));
    }

    /// All links work again.
    pub(crate) fn heal(&self) {
        self.lock().cuts.clear();
    }

    /// Messages delivered so far.
    pub(crate) fn messages(&self) -> u64 {
        self.lock().messages
    }

    fn is_alive(&self, who: Incarnation) -> bool {
        self.lock().alive.get(&who.node.get()) == Some(&who.number)
    }

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.lock().cuts.contains(&(from.get(), to.get()))
    }

    fn listener(&self, node: NodeId) -> Option<(Incarnation, Arc<dyn Answer>)> {
        let state = self.lock();
        let (number, answer) = state.listeners.get(&node.get())?;
        Some((Incarnation { node, number: *number }, Arc::clone(answer)))
    }

    fn delay(&self) -> Duration {
        let mut state = self.lock();
        let Weather { delay_min, delay_max, .. } = state.weather;
        let micros = u64::try_from((delay_max - delay_min).as_micros()).unwrap_or(0);
        delay_min + Duration::from_micros(state.random.below(micros.max(1)))
    }

    fn loses(&self) -> bool {
        let mut state = self.lock();
        let percent = state.weather.loss_percent;
        percent != 0 && state.random.percent(percent)
    }

    /// One message on its way. False if it does not arrive.
    async fn carry(&self, from: NodeId, to: NodeId) -> bool {
        let lost = self.is_cut(from, to) || self.loses();
        sleep(self.delay()).await;
        let arrives = !lost && !self.is_cut(from, to);
        self.lock().messages += u64::from(arrives);
        arrives
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(
        self,
        from: Incarnation,
        to: NodeId,
        method: Method,
        request: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let deadline = Instant::now() + timeout;
        if !self.is_alive(from) {
            // A ghost: it must not even spin.
            sleep(timeout.max(Duration::from_secs(1))).await;
            return Err(CallError::Unreachable("this process has crashed".to_owned()));
        }
        trace!(self.world, "call {} -> {to} {method:?} {}", from.node, request.len());
        self.promises.asks(from.node, method, &request);
        let Some((callee, answer)) = self.listener(to) else {
            sleep(self.delay()).await;
            return Err(CallError::Unreachable(format!("nobody listens at node {to}")));
        };
        let exchange = self.clone().exchange(from, callee, answer, method, request);
        // A task of its own: the callee goes on when the caller has lost patience.
        let exchange = tokio::spawn(exchange);
        match tokio::time::timeout_at(deadline, exchange).await {
            Ok(Ok(Some(answer))) => answer.map_err(CallError::Refused),
            Ok(Ok(None) | Err(_)) => {
                sleep_until(deadline).await;
                Err(CallError::Interrupted("no answer in time".to_owned()))
            }
            Err(_elapsed) => Err(CallError::Interrupted("no answer in time".to_owned())),
        }
    }

    /// `None` if no answer arrives.
    async fn exchange(
        self,
        from: Incarnation,
        callee: Incarnation,
        answer: Arc<dyn Answer>,
        method: Method,
        request: Bytes,
    ) -> Option<Result<Bytes, Refused>> {
        let arrived = self.carry(from.node, callee.node).await;
        if !arrived || !self.is_alive(callee) {
            return None;
        }
        let reply = answer.answer(from.node, method, request.clone()).await;
        if !self.is_alive(callee) {
            return None;
        }
        if let Ok(reply) = &reply {
            self.promises.answers(callee.node, method, &request, reply);
        }
        let arrived = self.carry(callee.node, from.node).await;
        (arrived && self.is_alive(from)).then_some(reply)
    }

    async fn open(
        self,
        from: Incarnation,
        to: NodeId,
        method: StreamMethod,
        requests: BoxStream<Bytes>,
    ) -> Result<BoxStream<Result<Bytes, CallError>>, CallError> {
        let unreachable = |why: &str| Err(CallError::Unreachable(format!("node {to}: {why}")));
        if !self.is_alive(from) {
            sleep(Duration::from_secs(1)).await;
            return unreachable("this process has crashed");
        }
        let Some((callee, answer)) = self.listener(to) else {
            sleep(self.delay()).await;
            return unreachable("nobody listens");
        };
        trace!(self.world, "open {} -> {to} {method:?}", from.node);
        if !self.carry(from.node, to).await || !self.carry(to, from.node).await {
            sleep(PATIENCE).await;
            return unreachable("no connection in time");
        }
        if !self.is_alive(callee) {
            return unreachable("connection reset");
        }
        let there = Link { network: self.clone(), from, to: callee };
        let back = Link { network: self.clone(), from: callee, to: from };
        let (ask, asked) = mpsc::channel(WINDOW);
        let (reply, replies) = mpsc::channel(WINDOW);
        let promises = self.promises.stream(callee.node, method);
        let asking = promises.clone();
        let requests = requests.map(move |request| {
            asking.asks(from.node, &request);
            Ok(request)
        });
        let requests: BoxStream<Result<Bytes, CallError>> = Box::pin(requests);
        let pump = tokio::spawn(there.pump(requests, ask));
        let asked = ends_with_an_error(asked);
        let answered = answer.answer_stream(from.node, method, Box::pin(asked));
        let network = self.clone();
        let answered = answered.map(move |reply| {
            if let Ok(reply) = &reply
                && network.is_alive(callee)
            {
                promises.answers(reply);
            }
            reply.map_err(CallError::Refused)
        });
        let back = tokio::spawn(back.pump(Box::pin(answered), reply));
        let guards = vec![pump.abort_handle(), back.abort_handle()];
        Ok(Box::pin(Replies { inner: Box::pin(ends_with_an_error(replies)), guards }))
    }
}

/// One message of a stream, or its orderly end.
enum Item {
    Message(Result<Bytes, CallError>),
    End,
}

/// Turns a channel into a stream that ends with an error unless it was ended in order.
fn ends_with_an_error(
    receiver: mpsc::Receiver<Item>,
) -> impl Stream<Item = Result<Bytes, CallError>> + Send {
    futures_util::stream::unfold(Some(receiver), |receiver| async move {
        let mut receiver = receiver?;
        match receiver.recv().await {
            Some(Item::Message(message)) => Some((message, Some(receiver))),
            Some(Item::End) => None,
            None => Some((Err(CallError::Interrupted("connection reset".to_owned())), None)),
        }
    })
}

/// The caller's end of a stream: dropping it ends everything.
struct Replies {
    inner: BoxStream<Result<Bytes, CallError>>,
    guards: Vec<AbortHandle>,
}

impl Stream for Replies {
    type Item = Result<Bytes, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(context)
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        for guard in &self.guards {
            guard.abort();
        }
    }
}

/// One direction of a connection.
struct Link {
    network: Network,
    from: Incarnation,
    to: Incarnation,
}

impl Link {
    /// Carries a stream until it ends or the connection breaks.
    async fn pump(
        self,
        mut messages: BoxStream<Result<Bytes, CallError>>,
        out: mpsc::Sender<Item>,
    ) {
        let (sent, arriving) = mpsc::channel(WINDOW);
        let network = self.network.clone();
        let deliver = tokio::spawn(self.deliver(arriving, out));
        let _ends_with_this = AbortOnDrop(deliver.abort_handle());
        let mut at = Instant::now();
        loop {
            let message = messages.next().await;
            at = at.max(Instant::now() + network.delay());
            let last = !matches!(message, Some(Ok(_)));
            let item = message.map_or(Item::End, Item::Message);
            if sent.send((at, item)).await.is_err() || last {
                break;
            }
        }
        drop(sent);
        deliver.await.ok();
    }

    async fn deliver(self, mut arriving: mpsc::Receiver<(Instant, Item)>, out: mpsc::Sender<Item>) {
        while let Some((at, item)) = arriving.recv().await {
            sleep_until(at).await;
            if !self.gets_through().await {
                return;
            }
            if let Item::Message(Ok(bytes)) = &item {
                trace!(
                    self.network.world,
                    "stream {} -> {} {}",
                    self.from.node,
                    self.to.node,
                    bytes.len()
                );
            }
            self.network.lock().messages += 1;
            if out.send(item).await.is_err() {
                return;
            }
        }
    }

    /// TCP repeats what was lost, for a while.
    async fn gets_through(&self) -> bool {
        let Self { network, from, to } = self;
        let patience = Instant::now() + PATIENCE;
        loop {
            if !network.is_alive(*from) || !network.is_alive(*to) {
                return false;
            }
            if !network.is_cut(from.node, to.node) && !network.loses() {
                return true;
            }
            if patience < Instant::now() {
                return false;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }
}

/// A task that ends with whoever holds this.
pub(crate) struct AbortOnDrop(pub(crate) AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What one process sees of the network.
#[derive(Clone)]
pub(crate) struct Wire {
    network: Network,
    who: Incarnation,
}

impl Transport for Wire {
    fn call(
        &self,
        to: &Member,
        method: Method,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        Box::pin(self.network.clone().call(self.who, to.id, method, request, timeout))
    }

    fn stream(
        &self,
        to: &Member,
        method: StreamMethod,
        requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>> {
        Box::pin(self.network.clone().open(self.who, to.id, method, requests))
    }
}

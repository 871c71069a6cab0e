//! A board with a card, and the process on it: put together from the same parts as the real server.
//!
//! # Shape
//!
//! [`Machine`] outlives its processes. [`Machine::start`] begins a life: it opens log and store, starts the node and lets it
//! answer. [`Machine::power_cut`] and [`Machine::kill`] end it at once: the task that was starting is dropped wherever it
//! waited, the card refuses the old handles, the network drops the old process's messages.
//!
//! # Invariants
//!
//! - A crashed incarnation has no effect: not on the card, not on the network, not on clients, not in the checks.
//! - A start fails only if a fault was injected for it; any other refusal is a violation.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use k3s_server::apply::Reply;
use k3s_server::command::Command;
use k3s_server::env::{BoxFuture, Env};
use k3s_server::join::hello::{self, Answerer, Asked, Hello, HelloBook, Verdict, Witness};
use k3s_server::join::identity::{Identity, Phase};
use k3s_server::limits;
use k3s_server::mutants::{Mutant, is_planted};
use k3s_server::mvcc::{self, DrainOn, Store};
use k3s_server::proto::node::cluster_change::Change;
use k3s_server::proto::node::{Boot, ClusterChange, StoredMembership};
use k3s_server::raft::checkpoint::Policy;
use k3s_server::raft::transport::{
    Answer, BoxStream, CallError, Method, Refused, StreamMethod, Transport,
};
use k3s_server::raft::{AppliedBatch, Follow, Member, Node, Options, Parts, Status};
use k3s_server::testkit::{FaultDisk, Random, SeededEntropy};
use k3s_server::types::{ByteCount, ClusterId, NodeId, Revision};
use k3s_server::wal::{self, Wal};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::card::Card;
use crate::network::{AbortOnDrop, Incarnation, Network};
use crate::oracle::Oracle;
use crate::world::{SimClock, World, trace};

pub(crate) const CLUSTER: ClusterId = ClusterId::new(0xc1);

/// Where the node keeps everything.
pub(crate) const DIR: &str = "/db";

/// How often a process that ended by itself is started again, as systemd would.
const RESTART_AFTER: Duration = Duration::from_millis(500);

/// What machines of one run share.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) world: World,
    pub(crate) network: Network,
    pub(crate) oracle: Oracle,
    pub(crate) raft: Options,
}

/// Small limits, so that a run of two minutes sees checkpoints, purges and snapshots.
pub(crate) fn raft_options() -> Options {
    Options {
        heartbeat: limits::HEARTBEAT,
        election_min: limits::ELECTION_MIN,
        election_max: limits::election_max(limits::ELECTION_MIN),
        learner_silent_max: limits::LEARNER_SILENT_MAX,
        checkpoint: Policy {
            interval: Duration::from_secs(20),
            log_bytes: ByteCount::new(512 << 10),
        },
    }
}

/// See the module documentation. Clones share the machine.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) id: NodeId,
    pub(crate) card: Card,
    pub(crate) clock: SimClock,
    around: Surroundings,
    state: Arc<Mutex<State>>,
}

struct State {
    random: Random,
    incarnation: u64,
    /// It founds the cluster.
    founder: bool,
    /// Faults that are injected at the moment: it may end by itself, or fail to start.
    excused: u32,
    /// The life that met a fault: it may end by itself whenever it notices.
    struck: u64,
    life: Option<Life>,
    /// It stays off.
    retired: bool,
    /// Its card does not hold what it promised, and it said so: it is to be replaced.
    out: bool,
    /// The life whose start is known to the cluster.
    known: u64,
    /// Who the members are, as a joiner is told.
    contacts: Option<StoredMembership>,
}

/// One life of the process.
struct Life {
    process: AbortHandle,
    node: Option<Node>,
    down: watch::Sender<bool>,
}

/// A running node, as a client sees it.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) node: Node,
    pub(crate) down: watch::Receiver<bool>,
}

impl Live {
    /// Completes when the process is gone.
    pub(crate) async fn gone(&self) {
        let mut down = self.down.clone();
        down.wait_for(|down| *down).await.ok();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// A board with an empty card.
    pub(crate) fn new(around: &Surroundings, id: NodeId, founder: bool, typical: Duration) -> Self {
        let oracle = around.oracle.clone();
        let on_durable = Arc::new(move |records: &[_], log: &_| oracle.durable(id, records, log));
        let card = Card::new(Path::new(DIR), around.world.random(), typical, on_durable);
        around.oracle.add(id, card.clone());
        let state = State {
            random: around.world.random(),
            incarnation: 0,
            founder,
            excused: 0,
            struck: 0,
            life: None,
            retired: false,
            out: false,
            known: 0,
            contacts: None,
        };
        Self {
            id,
            card,
            clock: SimClock::new(),
            around: around.clone(),
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Itself, as members know it.
    pub(crate) fn member(&self) -> Member {
        Member {
            id: self.id,
            name: format!("pi-{}", self.id),
            peer_urls: vec![format!("https://pi-{}:2380", self.id)],
            client_urls: vec![format!("https://pi-{}:2379", self.id)],
            learner: false,
            ..Member::default()
        }
    }

    /// The node, if it runs and has started.
    pub(crate) fn live(&self) -> Option<Live> {
        let state = lock(&self.state);
        let life = state.life.as_ref()?;
        Some(Live { node: life.node.clone()?, down: life.down.subscribe() })
    }

    /// A fault is injected: until [`Machine::trust`] is called as often, lives may end by themselves or not begin.
    pub(crate) fn excuse(&self) {
        lock(&self.state).excused += 1;
    }

    /// That fault is lifted.
    pub(crate) fn trust(&self) {
        let mut state = lock(&self.state);
        state.excused -= 1;
        if self.card.disk().has_failed() {
            state.struck = state.incarnation;
        }
        drop(state);
        self.card.disk().heal();
    }

    /// A joiner is told who the members are.
    pub(crate) fn tell(&self, contacts: StoredMembership) {
        lock(&self.state).contacts.get_or_insert(contacts);
    }

    /// Which life this is.
    pub(crate) fn incarnation(&self) -> u64 {
        lock(&self.state).incarnation
    }

    /// Whether the cluster knows of this start.
    pub(crate) fn is_known(&self) -> bool {
        let state = lock(&self.state);
        state.life.is_some() && state.known == state.incarnation
    }

    /// Whether it has found that its card does not hold what it promised.
    pub(crate) fn is_out(&self) -> bool {
        lock(&self.state).out
    }

    /// An older image of the card is put into the board.
    pub(crate) fn roll_back(&self, image: &FaultDisk) {
        self.power_cut();
        trace!(self.around.world, "old image {}", self.id);
        self.card.put_back(image);
        self.around.oracle.rolled_back(self.id);
        if let Err(what) = self.card.accept(&Path::new(DIR).join("wal")) {
            self.around.world.violation(|| format!("image of node {}: {what}", self.id));
        }
    }

    /// A bit flips in the log, and the process starts anew. False if the damage was noticed and the node cannot go on.
    pub(crate) fn rot(&self, random: &mut Random) -> bool {
        let wal = Path::new(DIR).join("wal");
        self.kill();
        if !self.card.rot(&wal, random) {
            return true;
        }
        trace!(self.around.world, "a bit flips {}", self.id);
        self.around.oracle.rolled_back(self.id);
        match self.card.settle_rotten(&wal) {
            Ok(usable) => {
                lock(&self.state).out |= !usable;
                usable
            }
            Err(what) => {
                self.around.world.violation(|| format!("node {}: {what}", self.id));
                false
            }
        }
    }

    /// It is never started again.
    pub(crate) fn retire(&self) {
        self.kill();
        lock(&self.state).retired = true;
    }

    /// Starts a process, if none runs.
    pub(crate) fn start(&self) {
        let mut state = lock(&self.state);
        if state.life.is_some() || state.retired || state.out {
            return;
        }
        state.incarnation += 1;
        let who = Incarnation { node: self.id, number: state.incarnation };
        let seed = state.random.next_u64();
        trace!(self.around.world, "start {} life {}", self.id, who.number);
        let wire = Arc::new(self.around.network.wire(who));
        let env = Env {
            disk: Arc::new(self.card.mount()),
            clock: Arc::new(self.clock.clone()),
            entropy: Arc::new(SeededEntropy::new(seed)),
        };
        self.around.oracle.started(self.id);
        let founder = state.founder;
        let machine = self.clone();
        let process = tokio::spawn(async move {
            let ended = machine.clone().run(who, env, wire, founder).await;
            machine.ended(who, &ended).await;
        });
        let down = watch::channel(false).0;
        state.life = Some(Life { process: process.abort_handle(), node: None, down });
    }

    /// The power goes. Unsynced writes are lost, or half there.
    pub(crate) fn power_cut(&self) {
        if !self.end("power cut") && !self.card.has_no_power() {
            return;
        }
        let fate = Random::new(lock(&self.state).random.next_u64());
        self.card.power_cut(fate);
        self.settle(true);
    }

    /// The power goes, and nothing that no barrier has covered is there afterwards.
    pub(crate) fn power_cut_losing_everything(&self) {
        if self.end("hard power cut") {
            self.card.power_cut_losing_everything();
            self.settle(true);
        }
    }

    /// The process is killed.
    pub(crate) fn kill(&self) {
        if self.end("kill") {
            self.card.kill();
            self.settle(false);
        }
    }

    fn settle(&self, power_lost: bool) {
        let settled = self.card.settle(&Path::new(DIR).join("wal"), power_lost);
        if let Err(what) = settled
            && lock(&self.state).excused == 0
        {
            self.around.world.violation(|| format!("node {}: {what}", self.id));
        }
    }

    /// Takes the process away. False if there was none.
    fn end(&self, how: &str) -> bool {
        let life = lock(&self.state).life.take();
        let Some(life) = life else { return false };
        trace!(self.around.world, "{how} {}", self.id);
        self.around.network.gone(self.id);
        life.down.send_replace(true);
        life.process.abort();
        true
    }

    /// The process ended by itself; systemd starts it again.
    async fn ended(&self, who: Incarnation, ended: &Result<(), String>) {
        {
            let state = lock(&self.state);
            if state.life.is_none() || state.incarnation != who.number {
                return;
            }
            if state.excused == 0 && state.struck != who.number && !state.out {
                let what = format!("node {} ended by itself: {ended:?}", self.id);
                self.around.world.violation(|| what);
            }
        }
        trace!(self.around.world, "ended {} {ended:?}", self.id);
        if self.card.has_no_power() {
            // Nothing starts again before the power is back.
            self.end("out of power");
            return;
        }
        // Taken by a crash meanwhile, or by this; the abort that comes with it finds nothing left to do.
        let machine = self.clone();
        tokio::spawn(async move {
            machine.kill();
            tokio::time::sleep(RESTART_AFTER).await;
            machine.start();
        });
    }

    async fn run(
        self,
        who: Incarnation,
        env: Env,
        wire: Arc<crate::network::Wire>,
        founder: bool,
    ) -> Result<(), String> {
        let dir = Path::new(DIR);
        let _lock = env.disk.lock(&dir.join("lock")).map_err(text)?;
        let identity = self.identify(&env, founder).await?;
        let store = Store::open(&env, &dir.join("state.redb"), &STORE).map_err(text)?;
        let owner = wal::Identity { cluster: identity.cluster, node: identity.node };
        let (log, _recovery, writer) =
            Wal::open(&env, &dir.join("wal"), owner, LOG).await.map_err(text)?;
        tokio::spawn(writer.run());
        self.around.oracle.runs(self.id, log.clone());
        let ties = Ties::new(&env, wire, identity, &store, &log)?;
        self.around.network.listen(who, Arc::clone(&ties.desk) as Arc<dyn Answer>);
        self.greet(&env, &ties, identity, &store, &log).await?;
        let follower = Applied { machine: self.clone(), who, store: store.clone() };
        let member = self.member();
        let mut store_failed = Box::pin(store.failed());
        let parts = Parts {
            env: env.clone(),
            cluster: identity.cluster,
            member: member.clone(),
            wal: log,
            store,
            followers: vec![Arc::new(follower)],
            transport: ties.transport,
        };
        let node = Node::start(parts, &self.around.raft).await.map_err(text)?;
        // The only node at this desk.
        drop(ties.desk.node.set(node.clone()));
        if founder {
            node.found(&member).await.map_err(text)?;
        }
        node.elect_if_alone().await.map_err(text)?;
        if !self.started(who, &node) {
            return Ok(());
        }
        let mut failure = node.failure();
        let settle = tokio::spawn(self.clone().settle_in(who, env, identity, node));
        let _ends_with_this = AbortOnDrop(settle.abort_handle());
        tokio::select! {
            biased;
            failure = &mut store_failed => Err(failure.to_string()),
            reason = failure.wait_for(Option::is_some) => match reason {
                Ok(reason) => Err(format!("{:?}", *reason)),
                Err(_closed) => Err("raft is gone".to_owned()),
            },
        }
    }

    /// Who this card says it is, this start counted; a new card is told.
    async fn identify(&self, env: &Env, founder: bool) -> Result<Identity, String> {
        let dir = Path::new(DIR);
        let identity = match Identity::load(env, dir).map_err(text)? {
            Some(identity) => identity,
            None => {
                let phase =
                    if founder { Phase::Founding } else { Phase::Joining { replaces: None } };
                let identity = Identity { cluster: CLUSTER, node: self.id, epoch: 0, phase };
                identity.store(env, dir).await.map_err(text)?;
                identity
            }
        };
        identity.next_epoch(env, dir).await.map_err(text)
    }

    /// Asks the others whether this still is the node they remember.
    async fn greet(
        &self,
        env: &Env,
        ties: &Ties,
        identity: Identity,
        store: &Store,
        log: &Wal,
    ) -> Result<(), String> {
        if is_planted(Mutant::RollbackAccepted) {
            return Ok(());
        }
        let contacts = self.contacts(identity).await;
        let asked = Asked {
            env,
            transport: Arc::clone(&ties.transport),
            book: Arc::clone(&ties.book),
            identity,
            incarnation: ties.incarnation,
            member: &self.member(),
            store,
            wal: log,
            contacts,
            compare: Arc::new(|_| None),
        };
        let verdict = Hello::new(asked)?.run().await;
        trace!(self.around.world, "hello {}: {verdict:?}", self.id);
        match verdict {
            Verdict::Welcome | Verdict::Wait { .. } => Ok(()),
            verdict @ (Verdict::Amnesia { .. } | Verdict::Retired { .. }) => {
                lock(&self.state).out = true;
                Err(format!("{verdict:?}"))
            }
            verdict @ (Verdict::Duplicate { .. }
            | Verdict::Incompatible { .. }
            | Verdict::FlagsDiffer { .. }) => Err(format!("{verdict:?}")),
        }
    }

    /// A joiner knows the others from its credentials; here it waits for somebody to tell.
    async fn contacts(&self, identity: Identity) -> Option<StoredMembership> {
        loop {
            let contacts = lock(&self.state).contacts.clone();
            if contacts.is_some() || !matches!(identity.phase, Phase::Joining { .. }) {
                return contacts;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Makes this start known, and writes down that this node is a member.
    async fn settle_in(self, who: Incarnation, env: Env, identity: Identity, node: Node) {
        let boot = Boot {
            node: self.id.get(),
            epoch: identity.epoch,
            name: self.member().name,
            release: "sim".to_owned(),
            wire_version: 1,
            format: 1,
        };
        let change = ClusterChange { change: Some(Change::Boot(boot)) };
        let is_member =
            |status: &Status| status.members.iter().any(|m| m.id == self.id && !m.learner);
        node.watch_status().wait_for(is_member).await.ok();
        loop {
            let by = tokio::time::Instant::now() + Duration::from_secs(5);
            let outcome = node.propose(Command::Cluster(change.clone()), by.into_std()).await;
            if let Ok(outcome) = outcome
                && matches!(outcome.reply, Ok(Reply::Cluster(_)))
            {
                break;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        // A card that fails here fails the log as well, which says so.
        drop(identity.become_member(&env, Path::new(DIR)).await);
        if self.is_current(who) {
            lock(&self.state).known = who.number;
        }
    }

    fn started(&self, who: Incarnation, node: &Node) -> bool {
        let mut state = lock(&self.state);
        let current = state.incarnation == who.number;
        if let Some(life) = state.life.as_mut().filter(|_| current) {
            life.node = Some(node.clone());
            trace!(self.around.world, "started {}", self.id);
        }
        current
    }

    fn is_current(&self, who: Incarnation) -> bool {
        let state = lock(&self.state);
        state.life.is_some() && state.incarnation == who.number
    }
}

/// What binds a node to the others.
struct Ties {
    book: Arc<HelloBook>,
    transport: Arc<dyn Transport>,
    desk: Arc<Desk>,
    incarnation: u64,
}

impl Ties {
    fn new(
        env: &Env,
        wire: Arc<dyn Transport>,
        identity: Identity,
        store: &Store,
        log: &Wal,
    ) -> Result<Self, String> {
        let (book, incarnation) = (Arc::new(HelloBook::default()), env.entropy.next_u64());
        let transport: Arc<dyn Transport> = Arc::new(Witness::new(wire, Arc::clone(&book)));
        let answerer = Answerer::new(hello::answer::Parts {
            cluster: identity.cluster,
            node: identity.node,
            incarnation,
            store: store.clone(),
            wal: log.clone(),
            book: Arc::clone(&book),
            transport: Arc::clone(&transport),
        })?;
        let desk = Arc::new(Desk { hello: Arc::new(answerer), node: OnceLock::new() });
        Ok(Self { book, transport, desk, incarnation })
    }
}

/// Answers hellos at once, and everything else when the node takes part, as the server's dispatch does.
struct Desk {
    hello: Arc<Answerer>,
    node: OnceLock<Node>,
}

impl Answer for Desk {
    fn answer(
        &self,
        from: NodeId,
        method: Method,
        request: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refused>> {
        match (method, self.node.get()) {
            (Method::Hello, _) => self.hello.answer(from, &request),
            (_, Some(node)) => node.answer(from, method, request),
            (_, None) => Box::pin(async { Err(Refused::NotReady("starting".to_owned())) }),
        }
    }

    fn answer_stream(
        &self,
        from: NodeId,
        method: StreamMethod,
        requests: BoxStream<Result<Bytes, CallError>>,
    ) -> BoxStream<Result<Bytes, Refused>> {
        match self.node.get() {
            Some(node) => node.answer_stream(from, method, requests),
            None => {
                let refused = Err(Refused::NotReady("starting".to_owned()));
                Box::pin(futures_util::stream::iter([refused]))
            }
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

const STORE: mvcc::Options = mvcc::Options { cache_bytes: 512 << 10, drain: DrainOn::Task };

const LOG: wal::Options = wal::Options {
    linger: Duration::from_millis(250),
    batch_bytes_max: 64 << 10,
    segment_bytes: 128 << 10,
    slots_min: 2,
    slots_max: 8,
    cache_bytes: 32 << 10,
    fill_pause: Duration::from_millis(50),
};

/// Shows what a node applies to the oracle.
struct Applied {
    machine: Machine,
    who: Incarnation,
    store: Store,
}

impl Follow for Applied {
    fn applied(&self, batch: &AppliedBatch) {
        if self.machine.is_current(self.who) {
            self.machine.around.oracle.applied(self.machine.id, batch);
        }
    }

    fn restored(&self, revision: Revision) {
        if self.machine.is_current(self.who) {
            trace!(self.machine.around.world, "restored {} revision {revision}", self.machine.id);
            if let Ok(view) = self.store.read()
                && let (Some(applied), Ok(hash)) = (view.applied(), view.state_hash())
            {
                self.machine.around.oracle.has_snapshot(self.machine.id, applied);
                self.machine.around.oracle.state(self.machine.id, applied, hash);
            }
        }
    }
}

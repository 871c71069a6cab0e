//! The phases of a server's life, in order.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::again::Again;
use super::cockpit::Cockpit;
use super::collect::NodeMetrics;
use super::data_dir::{DataDir, DataDirError, Lock};
use super::dispatch::Taking;
use super::enter::{self, Entered, enter};
use super::follow::{LeaseClocks, Watchers};
use super::heal::{self, Healer};
use super::health::NodeHealth;
use super::leases::LeasesOfLeader;
use super::listen::{Caps, ListenError, Listeners};
use super::membership::NodeMembership;
use super::patience::Patience;
use super::scrub::{self, ScrubMetrics, Scrubber};
use super::settle::Settling;
use super::{address, backup, desk, figures, neighbour, supervise};
use crate::announce;
use crate::client;
use crate::config::{Config, Loaded, Quota, Severity};
use crate::critical::FlagsError;
use crate::env::{Clock, Env, host};
use crate::etcd::{self, Api, Leases, ServeError, Settings};
use crate::events::{EventId, fields};
use crate::join::hello::Finder;
use crate::join::reset::ResetRefused;
use crate::join::token::{EstablishError, FoundingToken, ObtainError};
use crate::join::{AdoptError, IdentityError, JoinError, Phase, PlanError, flags};
use crate::limits;
use crate::metrics::{Metrics, Versions, process};
use crate::mvcc::StoreError;
use crate::observe::grpc;
use crate::observe::http::{self, Version};
use crate::observe::logging::{self, Logging, LoggingError, Logs, Output};
use crate::observe::repeat::Repeats;
use crate::pki::{Names, NamesError, PkiError};
use crate::raft::reset::ResetError;
use crate::raft::{self, Node, Parts, StartError, StopError};
use crate::systemd::{
    Latch, Notifier, Phase as ServerPhase, Phases, Pulse, Readiness, Shutdown, StopReason,
    Watchdog, extend_while_moving,
};
use crate::watch::{Hub, Limits as WatchLimits};

/// What `k3s-server` exits with: `cli` decides it, and this is only told.
const EXIT_FAILED: u8 = 1;
const EXIT_CONFIGURATION: u8 = 78;

/// How long calls under way may take when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long tasks of the life before may take to let go of its ports, in a process that starts over.
const CLOSING_MAX: Duration = Duration::from_secs(10);
const CLOSING_POLL: Duration = Duration::from_millis(50);

/// Why the server did not run, or did not end well.
#[derive(Debug, Error)]
pub enum RunError {
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// Raft did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A name for the certificate cannot be used.
    #[error("tls-san: {0}")]
    Names(#[from] NamesError),
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Upstream k3s has the port, for an etcd of its own.
    #[error("{source}; {unit} keeps its own etcd there")]
    Upstream {
        /// Its unit, and what it does.
        unit: String,
        /// What was tried.
        #[source]
        source: ListenError,
    },
    /// The services could not be put together.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The process could not be set up.
    #[error("process: {0}")]
    Process(#[from] io::Error),
    /// Logging could not be set up.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// What is on disk and what is asked for make no start.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Another server did not let this one in.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Credentials could not be kept.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// Who this node is could not be kept.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The token cannot be had.
    #[error(transparent)]
    Token(#[from] ObtainError),
    /// The token is another cluster's.
    #[error(transparent)]
    FoundingToken(#[from] FoundingToken),
    /// The token cannot be kept, or is not the cluster's.
    #[error(transparent)]
    EstablishToken(#[from] EstablishError),
    /// The critical flags are not the cluster's.
    #[error(transparent)]
    Flags(#[from] FlagsError),
    /// They could not be compared.
    #[error(transparent)]
    CompareFlags(#[from] flags::EstablishError),
    /// What this node has could not be read for the others.
    #[error("hello: {0}")]
    Hello(String),
    /// This node was removed.
    #[error("this server was removed from the cluster: {0}")]
    Retired(String),
    /// Its double is alive.
    #[error("another server runs with this server's identity: {0}")]
    Duplicate(String),
    /// Another server has its name.
    #[error("the node name is taken: {0}")]
    NameTaken(String),
    /// The others run another release.
    #[error("this release does not work with the cluster's: {0}")]
    Incompatible(String),
    /// `cluster-reset` could not be done.
    #[error("cluster-reset: {0}")]
    Reset(#[source] ResetError),
    /// `cluster-reset` is not begun.
    #[error(transparent)]
    ResetRefused(#[from] ResetRefused),
    /// `cluster-reset` is done, and this is what to do now. No failure, but the process ends, as in K3s.
    #[error("{0}")]
    HasReset(String),
    /// This node has a new id, and begins anew with it.
    #[error("starting over as a new node")]
    StartOver,
    /// This host has another address, and the server begins anew there.
    #[error("going on at {0}")]
    Moved(IpAddr),
    /// Other nodes could not be answered.
    #[error("port of the other servers: {0}")]
    Peers(#[from] tonic::transport::Error),
    /// It ran, and a part of it failed.
    #[error("{0}")]
    Failed(String),
    /// It ran, and did not stop cleanly.
    #[error(transparent)]
    Stop(#[from] StopError),
}

impl RunError {
    /// Whether the process goes on.
    const fn starts_over(&self) -> bool {
        matches!(self, Self::StartOver | Self::Moved(_))
    }

    /// What the operator can do, where there is something.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::DataDir(error) => Some(error.remedy()),
            Self::Pki(error) => Some(error.remedy().to_owned()),
            Self::Listen(error) => Some(error.remedy()),
            Self::Upstream { .. } => EventId::UpstreamConflict.remedy().map(str::to_owned),
            Self::Join(error) => Some(error.remedy().to_owned()),
            Self::Token(error) => Some(error.remedy()),
            Self::FoundingToken(error) => Some(error.remedy().to_owned()),
            Self::EstablishToken(error) => Some(error.remedy()),
            Self::Flags(error) | Self::CompareFlags(flags::EstablishError::Flags(error)) => {
                error.remedy().map(str::to_owned)
            }
            Self::Retired(_) => Some(
                "to join again as a new server, move the data directory away, set `server` and `token`, and start".to_owned(),
            ),
            Self::Duplicate(_) => Some(
                "one of the two cards is a copy: switch that one off; to make it a server of its own, move its data directory away, set `server` and `token`, and start".to_owned(),
            ),
            Self::NameTaken(_) => Some(
                "set another `node-name`, or remove the server that has this one (`k3s-server member remove`)".to_owned(),
            ),
            Self::Incompatible(_) => {
                Some("install a release on this server that the others' can work with; upgrade one server at a time".to_owned())
            }
            Self::Start(_)
            | Self::Store(_)
            | Self::Names(_)
            | Self::Serve(_)
            | Self::Process(_)
            | Self::Logging(_)
            | Self::Plan(_)
            | Self::Adopt(_)
            | Self::Identity(_)
            | Self::CompareFlags(_)
            | Self::Hello(_)
            | Self::Reset(_)
            | Self::ResetRefused(_)
            | Self::HasReset(_)
            | Self::StartOver
            | Self::Moved(_)
            | Self::Peers(_)
            | Self::Failed(_)
            | Self::Stop(_) => None,
        }
    }

    /// Whether starting again changes nothing before somebody changes something.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Flags(error) | Self::CompareFlags(flags::EstablishError::Flags(error)) => {
                error.is_configuration()
            }
            Self::Join(error) => !error.may_pass(),
            Self::DataDir(error) if error.is_newer() => true,
            Self::Incompatible(_)
            | Self::Token(ObtainError::Token { .. })
            | Self::FoundingToken(_)
            | Self::EstablishToken(EstablishError::Founding(_) | EstablishError::Differs { .. })
            | Self::Plan(_)
            | Self::Retired(_)
            | Self::Duplicate(_)
            | Self::NameTaken(_)
            | Self::Reset(_)
            | Self::ResetRefused(ResetRefused::Done { .. })
            | Self::Names(_)
            | Self::Logging(_)
            | Self::Upstream { .. }
            | Self::DataDir(DataDirError::NotADirectory { .. })
            | Self::Listen(ListenError::PlainExposed { .. })
            | Self::Start(StartError::Timing(_)) => true,
            Self::DataDir(_)
            | Self::Start(_)
            | Self::Store(_)
            | Self::Pki(_)
            | Self::Listen(_)
            | Self::Serve(_)
            | Self::Process(_)
            | Self::Adopt(_)
            | Self::Identity(_)
            | Self::Token(_)
            | Self::EstablishToken(_)
            | Self::CompareFlags(_)
            | Self::Hello(_)
            | Self::ResetRefused(_)
            | Self::HasReset(_)
            | Self::StartOver
            | Self::Moved(_)
            | Self::Peers(_)
            | Self::Failed(_)
            | Self::Stop(_) => false,
        }
    }
}

/// How a server ended that did not end well.
#[derive(Debug)]
pub struct Ended {
    /// Why.
    pub error: RunError,
    /// The journal has it already, with its number and the remedy: no need to print it once more.
    pub told: bool,
}

/// Runs a server until it is told to stop or cannot go on.
pub fn run(loaded: &Loaded) -> Result<(), Ended> {
    let config = &loaded.config;
    let filter = std::env::var("K3S_SERVER_LOG").ok();
    // Dropped last: what is still queued for the journal is written then.
    let logs = logging::init(&Logging { debug: config.debug, filter })
        .map_err(|error| Ended { error: error.into(), told: false })?;
    announce_warnings(&loaded.problems);
    let ended = run_to_the_end(loaded, &logs);
    ended.map_err(|error| Ended { told: logs.output == Output::Journal && tell(&error), error })
}

/// Says in the journal that the configuration cannot be used; `false` where nobody reads that, so that it has to be printed.
pub fn refuse(problems: &str) -> bool {
    let Ok(logs) = logging::init(&Logging::default()) else { return false };
    let is_journal = logs.output == Output::Journal;
    if is_journal {
        announce!(EventId::ConfigurationError, "the configuration cannot be used\n{problems}");
    }
    is_journal
}

/// Says it with its number, unless that was done where it happened.
fn tell(error: &RunError) -> bool {
    let fix = || error.remedy().map_or_else(String::new, |fix| format!("\n  fix: {fix}"));
    if let RunError::Listen(listen) = error {
        announce!(
            EventId::ListenFailed,
            { fields::ADDRESS } = %listen.address(),
            { fields::REASON } = %listen,
            "{listen}{}",
            fix()
        );
    } else if let RunError::Upstream { .. } = error {
        announce!(EventId::UpstreamConflict, "{error}");
    } else if let RunError::Flags(_) | RunError::CompareFlags(_) = error {
        // Each flag was told by itself; the table with all of them is printed.
        return false;
    } else if error.is_configuration() {
        announce!(EventId::ConfigurationError, "{error}{}", fix());
    } else {
        announce!(EventId::Failed, { fields::REASON } = %error, "{error}{}", fix());
    }
    true
}

fn run_to_the_end(loaded: &Loaded, logs: &Logs) -> Result<(), RunError> {
    // Two to four slow cores: more threads would only take turns. Blocking work has its own.
    let workers = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(16)
        .thread_name("k3s-server")
        .enable_all()
        .build()?;
    runtime.block_on(serve(loaded, host::env(), logs.repeats.clone()))
}

/// What every life of a server shares.
struct Stage {
    env: Env,
    notifier: Notifier,
    shutdown: Shutdown,
    phases: Phases,
    cockpit: Arc<Cockpit>,
    repeats: Repeats,
}

/// A server that runs, and what is needed to stop it.
struct Running {
    node: Node,
    shutdown: Shutdown,
    stop_serving: watch::Sender<bool>,
    hub: Hub,
    serving: JoinSet<Result<(), RunError>>,
    background: Vec<JoinHandle<()>>,
    store: crate::mvcc::Store,
    _lock: Lock,
}

impl Stage {
    fn new(
        loaded: &Loaded,
        env: Env,
        notifier: Notifier,
        phases: Phases,
        repeats: Repeats,
    ) -> Result<Self, RunError> {
        let cockpit = Arc::new(Cockpit::new(loaded, &env, &phases)?);
        Ok(Self { env, notifier, shutdown: Shutdown::new(), phases, cockpit, repeats })
    }
}

async fn serve(loaded: &Loaded, env: Env, repeats: Repeats) -> Result<(), RunError> {
    let config = &loaded.config;
    let (notifier, phases) = (Notifier::from_environment(), Phases::from_environment());
    let stage = Stage::new(loaded, env, notifier, phases, repeats)?;
    let signals = stage.shutdown.on_signals()?;
    announce!(
        EventId::Starting,
        { fields::NODE } = config.node_name.as_str(),
        { fields::VERSION } = env!("CARGO_PKG_VERSION"),
        "k3s-server {} starting, datastore in {}",
        env!("CARGO_PKG_VERSION"),
        config.db_dir.display()
    );
    stage.phases.set(ServerPhase::Opening, "opening its log and state");
    let desk = tokio::spawn(desk::run(Arc::clone(&stage.cockpit), stage.env.clone()));
    let ended = Lives::new(config, &stage).run().await;
    match &ended {
        Ok(()) => stage.phases.set(ServerPhase::Stopping, "stopped"),
        Err(error) => {
            let exit = if error.is_configuration() { EXIT_CONFIGURATION } else { EXIT_FAILED };
            stage.phases.failed(exit, error.to_string());
        }
    }
    desk.abort();
    signals.abort();
    ended
}

/// One life after the other, and what lasts longer than one.
struct Lives<'a> {
    stage: &'a Stage,
    /// As it was read, and where this host is now.
    config: Config,
    rejoins: Again,
    moves: Again,
    /// Ports of the life before may still be taken for so long.
    closing_until: Option<Instant>,
}

impl<'a> Lives<'a> {
    fn new(config: &Config, stage: &'a Stage) -> Self {
        Self {
            stage,
            config: config.clone(),
            rejoins: Again::rejoining(),
            moves: Again::moving(),
            closing_until: None,
        }
    }

    async fn run(mut self) -> Result<(), RunError> {
        let stage = self.stage;
        loop {
            let lived = live(&self).await;
            let next = tokio::select! {
                biased;
                // How a life ended comes first: whoever fails has asked everybody else to stop.
                next = self.next(lived) => next,
                _reason = stage.shutdown.begun() => Some(Ok(())),
            };
            if let Some(ended) = next {
                return ended;
            }
        }
    }

    /// Ends one life when this host has another address.
    fn follow_address(
        &self,
        stopping: watch::Receiver<bool>,
    ) -> impl Future<Output = Result<(), RunError>> + Send + 'static {
        let clock = Arc::clone(&self.stage.env.clock);
        let pause = self.moves.pause(clock.now());
        address::follow(self.config.clone(), clock, pause, stopping)
    }

    /// This host is at another address now.
    fn move_to(&mut self, address: IpAddr) -> Result<(), RunError> {
        self.config = self.config.at_address(address);
        self.stage.cockpit.moved(&self.config)
    }

    /// After one life: how the process ends, or nothing if another life begins.
    async fn next(&mut self, lived: Result<(), RunError>) -> Option<Result<(), RunError>> {
        let clock = Arc::clone(&self.stage.env.clock);
        let closing = self.closing_until.is_some_and(|until| clock.now() < until);
        match lived {
            // A node that has to become another one begins anew, in the same process.
            Err(RunError::StartOver) => {
                let pause = self.rejoins.pause(clock.now());
                if !pause.is_zero() {
                    tracing::info!("beginning anew in {} s", pause.as_secs());
                    clock.sleep(pause).await;
                }
                self.rejoins.count(clock.now());
            }
            Err(RunError::Moved(to)) => {
                if let Err(error) = self.move_to(to) {
                    return Some(Err(error));
                }
                self.moves.count(clock.now());
            }
            Err(RunError::Listen(ListenError::InUse { .. })) if closing => {
                clock.sleep(CLOSING_POLL).await;
                return None;
            }
            Err(RunError::Listen(error @ ListenError::InUse { .. })) => {
                return Some(Err(neighbour::explain(error).await));
            }
            // An address that was found, and has gone again before it was taken.
            Err(RunError::Listen(ListenError::NoSuchAddress { .. }))
                if closing && address::is_found(&self.config) =>
            {
                clock.sleep(CLOSING_POLL).await;
                let moved = address::of_default_route().map_or(Ok(()), |to| self.move_to(to));
                return moved.err().map(Err);
            }
            Err(RunError::HasReset(guidance)) => {
                tracing::info!("{guidance}");
                return Some(Ok(()));
            }
            lived => return Some(lived),
        }
        self.closing_until = Some(clock.now() + CLOSING_MAX);
        None
    }
}

/// Bytes that this process has handed to the card: what grows while a start or a stop gets somewhere.
fn bytes_written() -> Option<u64> {
    process::read().written_bytes
}

/// One life of a node: from taking the ports to the end.
async fn live(lives: &Lives<'_>) -> Result<(), RunError> {
    let stage = lives.stage;
    let mut running = tokio::select! {
        started = start(lives) => started?,
        // A node that waits for others, perhaps for hours, can be told to stop.
        reason = stage.shutdown.begun() => {
            announce!(
                EventId::Stopping,
                { fields::REASON } = %reason,
                "stopping before this node took part: {reason}"
            );
            return Ok(());
        }
        () = extend_while_moving(stage.notifier, &*stage.env.clock, bytes_written) => {
            unreachable!("asks for time until it is dropped")
        }
        () = feed_before_raft(stage.notifier, &*stage.env.clock) => {
            unreachable!("feeds until it is dropped")
        }
    };
    let (reason, error) = wait(&mut running).await;
    if !error.as_ref().is_some_and(RunError::starts_over) {
        stage.notifier.stopping();
        stage.phases.set(ServerPhase::Stopping, reason.to_string());
        announce!(EventId::Stopping, { fields::REASON } = %reason, "stopping: {reason}");
    }
    stage.cockpit.show(None);
    let stopped = tokio::select! {
        stopped = stop(running) => stopped,
        () = extend_while_moving(stage.notifier, &*stage.env.clock, bytes_written) => {
            unreachable!("asks for time until it is dropped")
        }
    };
    if let Some(error) = error {
        return Err(error);
    }
    match reason {
        StopReason::Failed(what) => Err(RunError::Failed(what)),
        StopReason::Signal(_) | StopReason::Requested(_) => {
            stopped?;
            announce!(EventId::Stopped, "stopped; everything is on the card");
            Ok(())
        }
    }
}

/// A process that was ready once and starts over has no Raft to feed for, perhaps for hours while the others are away; systemd, which
/// counts from the first READY=1, would kill it.
async fn feed_before_raft(notifier: Notifier, clock: &dyn Clock) {
    let Some(watchdog) = Watchdog::from_environment() else { return std::future::pending().await };
    loop {
        notifier.watchdog();
        clock.sleep(watchdog.period()).await;
    }
}

async fn start(lives: &Lives<'_>) -> Result<Running, RunError> {
    let (mut running, unsettled) = begin(&lives.config, lives.stage).await?;
    let stopping = unsettled.stopping.clone();
    running.serving.spawn(lives.follow_address(stopping));
    running.serving.spawn(unsettled.settling.run(unsettled.settled, unsettled.stopping));
    Ok(running)
}

/// The last steps of a node that runs already, and whom to tell when they are taken.
struct Unsettled {
    settling: Settling,
    settled: Latch,
    stopping: watch::Receiver<bool>,
}

async fn begin(config: &Config, stage: &Stage) -> Result<(Running, Unsettled), RunError> {
    let Stage { env, notifier, shutdown, phases, cockpit, .. } = stage;
    let (readiness, [settled, serving_latch]) =
        Readiness::new(*notifier, ["membership", "client and health ports"]);
    let mut metrics = Metrics::new(versions().0, env.clock.wall());
    let (stop_serving, stopping) = watch::channel(false);
    let entered = enter(config, env, &metrics, phases, &stopping).await?;
    let Entered { dir, pki, peers, transport, dispatch, flags, .. } = &entered;
    enter::announce_client_files(pki);
    metrics.collect(peers.clone());
    let live = Live::start(config, env, &entered).await?;
    cockpit.show(Some(live.node.clone()));
    phases.set(ServerPhase::Settling, "taking part, not up to date yet");
    let settings = settings(config);
    let scrubbing = Arc::new(scrub::Progress::default());
    metrics.collect(ScrubMetrics(Arc::clone(&scrubbing)));
    let api = Api::new(live.parts(env, settings, &entered));
    dispatch.takes_part(Taking { node: live.node.clone(), api: api.clone() });

    let settling = settling(env, &live.node, &entered, *notifier);
    let unsettled = Unsettled { settling, settled, stopping: stopping.clone() };
    let finder = Finder {
        cluster: dir.identity.cluster,
        node: dir.identity.node,
        incarnation: peers.passport().incarnation,
        transport: Arc::clone(transport),
    };
    let (own_flags, peers, pki) = ((**flags).clone(), peers.clone(), pki.clone());
    let (patience, damaged) = (Patience::of_process(), watch::Sender::default());
    let healer = healer(env, &live.node, &entered, patience, damaged.subscribe());
    let member = removable(env, &live.node, &entered);
    let addresses = entered.member.client_urls.join(", ");
    let Entered { dir, clients, observers, mut serving, .. } = entered;
    live.serve(&mut serving, settings, api, metrics, clients, observers, &stopping);
    serving_latch.set();
    serving.spawn(supervise::leave_when_removed(member, stopping.clone()));
    serving.spawn(heal::run(healer, stopping.clone()));

    let Live { node, hub, leases } = live;
    let ready =
        supervise::announce_ready(readiness, *notifier, phases.clone(), node.clone(), addresses);
    let watched = stopping.clone();
    let mut background = vec![
        tokio::spawn(leases.run(node.clone(), settings, stopped(stopping))),
        tokio::spawn(supervise::keep_certificates(pki, cockpit.names.subscribe())),
        tokio::spawn(scrub::run(scrubber(env, &dir, scrubbing, patience, damaged))),
        tokio::spawn(ready),
        tokio::spawn(supervise::find_lost(node.clone(), peers.clone(), finder)),
        tokio::spawn(supervise::forget_removed(node.clone(), peers)),
        tokio::spawn(flags::follow(node.clone(), own_flags, dir.path.clone())),
    ];
    background.extend(watch_over(&node, stage, &dir, watched)?);
    let store = dir.store;
    // Ends with the store; what it does is seen in the store and in the alarm.
    drop(dir.space.spawn_thread(store.clone())?);
    let shutdown = shutdown.clone();
    let running =
        Running { node, shutdown, stop_serving, hub, serving, background, store, _lock: dir.lock };
    Ok((running, unsettled))
}

fn removable(env: &Env, node: &Node, entered: &Entered) -> supervise::Removable {
    supervise::Removable {
        node: node.clone(),
        book: Arc::clone(&entered.book),
        transport: Arc::clone(&entered.transport),
        contacts: entered.contacts.clone(),
        rejoin: enter::Rejoin::of(env, &entered.dir),
    }
}

fn healer(
    env: &Env,
    node: &Node,
    entered: &Entered,
    patience: Patience,
    damaged: watch::Receiver<u64>,
) -> Healer {
    let dir = &entered.dir;
    let rejoin = enter::Rejoin::of(env, dir);
    let (env, node, path) = (env.clone(), node.clone(), dir.path.clone());
    Healer { env, node, rejoin, path, patience, damaged }
}

fn scrubber(
    env: &Env,
    dir: &DataDir,
    progress: Arc<scrub::Progress>,
    patience: Patience,
    damaged: watch::Sender<u64>,
) -> Scrubber {
    let (env, store, wal, path) =
        (env.clone(), dir.store.clone(), dir.wal.clone(), dir.path.clone());
    Scrubber { env, store, wal, path, progress, patience, damaged }
}

/// The tasks that look at a running node, and tell systemd and the journal.
fn watch_over(
    node: &Node,
    stage: &Stage,
    dir: &DataDir,
    stopping: watch::Receiver<bool>,
) -> io::Result<Vec<JoinHandle<()>>> {
    let Stage { env, notifier, shutdown, repeats, .. } = stage;
    let mut tasks = vec![
        tokio::spawn(figures::report_status(node.clone(), *notifier)),
        tokio::spawn(figures::report_alarms(node.clone())),
        tokio::spawn(figures::keep_count(env.clone(), repeats.clone())),
        tokio::spawn(supervise::watch_failures(node.clone(), shutdown.clone())),
        tokio::spawn(supervise::keep_space_alarm(node.clone(), dir.space.space())),
        tokio::spawn(supervise::hang_on_signal(node.clone())),
    ];
    if let Some(watchdog) = Watchdog::from_environment() {
        let pulse = Pulse::new(Arc::clone(&env.clock));
        tasks.push(tokio::spawn(supervise::pulse(node.clone(), pulse.clone())));
        feed(watchdog, watchdog.feed(*notifier, pulse, shutdown.clone()), stopping)?;
    }
    Ok(tasks)
}

/// On a thread of its own: a thread that hangs inside a task can keep the whole runtime from seeing its timers, and then nobody
/// would say what hangs.
fn feed(
    watchdog: Watchdog,
    feeding: impl Future<Output = ()> + Send + 'static,
    stopping: watch::Receiver<bool>,
) -> io::Result<()> {
    tracing::debug!(?watchdog, "feeding the watchdog");
    let life = async {
        tokio::select! {
            () = feeding => {}
            () = stopped(stopping) => {}
        }
    };
    // Nobody waits for the thread: it ends with the life that it feeds for.
    std::thread::Builder::new()
        .name("watchdog".to_owned())
        .spawn(move || client::block_on(life).unwrap_or_default())
        .map(drop)
}

fn settling(env: &Env, node: &Node, entered: &Entered, notifier: Notifier) -> Settling {
    let Entered { dir, member, contacts, transport, flags, .. } = entered;
    Settling {
        node: node.clone(),
        identity: dir.identity,
        member: member.clone(),
        contacts: contacts.clone(),
        transport: Arc::clone(transport),
        flags: Arc::clone(flags),
        path: dir.path.clone(),
        rejoin: enter::Rejoin::of(env, dir),
        notifier,
    }
}

/// A node that takes part, and those who follow its store.
struct Live {
    node: Node,
    hub: Hub,
    leases: Arc<Leases>,
}

impl Live {
    async fn start(config: &Config, env: &Env, entered: &Entered) -> Result<Self, RunError> {
        let dir = &entered.dir;
        let revision = dir.store.read()?.revision();
        let hub = Hub::new(revision, WatchLimits::default());
        let leases = Arc::new(Leases::new(Arc::clone(&env.clock), &dir.store)?);
        let node = start_node(config, env, entered, &hub, &leases).await?;
        Ok(Self { node, hub, leases })
    }

    /// Serves clients and health checks until `stopping`.
    #[allow(clippy::too_many_arguments, reason = "one of everything that serves")]
    fn serve(
        &self,
        serving: &mut JoinSet<Result<(), RunError>>,
        settings: Settings,
        api: Api,
        mut metrics: Metrics,
        clients: Listeners,
        observers: Listeners,
        stopping: &watch::Receiver<bool>,
    ) {
        let incoming = clients.accept(Caps::CLIENTS, metrics.connections.clone());
        let counted = grpc::CountCalls::new(&metrics);
        let stop = stopped(stopping.clone());
        serving.spawn(async move {
            Ok(etcd::serve(api, move |routes| routes.layer(counted), incoming, stop).await?)
        });

        let health = NodeHealth { node: self.node.clone(), timeout: settings.request_timeout() };
        let incoming = observers.accept(Caps::OBSERVERS, metrics.connections.clone());
        metrics.collect(NodeMetrics {
            node: self.node.clone(),
            hub: self.hub.clone(),
            leases: Arc::clone(&self.leases),
            quota_bytes: settings.quota_bytes,
        });
        let router = http::router(Arc::new(health), Arc::new(metrics), versions().1);
        let stop = stopped(stopping.clone());
        serving.spawn(async move {
            http::serve(incoming, router, stop).await;
            Ok(())
        });
    }

    fn parts(&self, env: &Env, settings: Settings, entered: &Entered) -> etcd::Parts {
        let node = &self.node;
        let transport = Arc::clone(&entered.transport);
        etcd::Parts {
            node: node.clone(),
            hub: self.hub.clone(),
            leases: Arc::clone(&self.leases),
            env: env.clone(),
            membership: Arc::new(NodeMembership(node.clone())),
            leader_leases: Some(Arc::new(LeasesOfLeader { node: node.clone(), transport })),
            backup: backup::source(node.clone()),
            defragment: supervise::defragment(node.clone()),
            settings,
            flags: Arc::clone(&entered.flags),
        }
    }
}

/// Completes when the node is to stop serving.
pub(super) async fn stopped(mut stopping: watch::Receiver<bool>) {
    // A sender that is gone means the same.
    drop(stopping.wait_for(|stop| *stop).await);
}

/// Waits until something asks to stop. A service that ends by itself is a failure; the error says more than the reason.
async fn wait(running: &mut Running) -> (StopReason, Option<RunError>) {
    tokio::select! {
        reason = running.shutdown.begun() => (reason, None),
        ended = running.serving.join_next() => {
            let (what, error) = match ended {
                Some(Ok(Ok(()))) | None => ("a service ended by itself".to_owned(), None),
                Some(Ok(Err(error))) => (error.to_string(), Some(error)),
                Some(Err(error)) => (error.to_string(), None),
            };
            let reason = StopReason::Failed(what);
            if !error.as_ref().is_some_and(RunError::starts_over) {
                running.shutdown.begin(reason.clone());
            }
            (reason, error)
        }
    }
}

/// From the outside in: no new calls, then Raft, then the store and the log.
async fn stop(mut running: Running) -> Result<(), RunError> {
    running.stop_serving.send_replace(true);
    running.hub.close();
    let drained = async { while running.serving.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        // Lease streams never end by themselves; the client connects elsewhere.
        running.serving.abort_all();
    }
    for task in &running.background {
        task.abort();
    }
    running.node.stop().await?;
    drop(running.node);
    running.store.close().await?;
    Ok(())
}

fn versions() -> (Versions, Version) {
    let metrics =
        Versions { server: etcd::VERSION, cluster: "3.6", daemon: env!("CARGO_PKG_VERSION") };
    let http = Version {
        server: etcd::VERSION,
        cluster: etcd::CLUSTER_VERSION,
        storage: etcd::CLUSTER_VERSION,
    };
    (metrics, http)
}

fn settings(config: &Config) -> Settings {
    let etcd = &config.etcd;
    let election = etcd.election_timeout.unwrap_or(limits::ELECTION_MIN);
    Settings {
        request_bytes_max: usize::try_from(etcd.max_request_bytes).unwrap_or(usize::MAX),
        txn_ops_max: etcd.max_txn_ops,
        concurrent_streams_max: etcd.max_concurrent_streams,
        progress_interval: etcd.watch_progress_notify_interval,
        quota_bytes: match etcd.quota {
            Quota::Bytes(bytes) => Some(bytes),
            Quota::Unlimited => None,
        },
        election_timeout: election,
        ..Settings::default()
    }
}

pub(super) fn names(config: &Config) -> Result<Names, RunError> {
    let mut names = Names::loopback();
    names.add(&config.node_name)?;
    for address in config.node_ips.iter().chain(&config.node_external_ips) {
        names.add_address(*address)?;
    }
    for name in &config.tls_sans {
        names.add(name)?;
    }
    Ok(names)
}

async fn start_node(
    config: &Config,
    env: &Env,
    entered: &Entered,
    hub: &Hub,
    leases: &Arc<Leases>,
) -> Result<Node, RunError> {
    let Entered { dir, member, .. } = entered;
    let parts = Parts {
        env: env.clone(),
        cluster: dir.identity.cluster,
        member: member.clone(),
        wal: dir.wal.clone(),
        store: dir.store.clone(),
        followers: vec![
            Arc::new(Watchers(hub.clone())),
            Arc::new(LeaseClocks { leases: Arc::clone(leases), store: dir.store.clone() }),
        ],
        transport: Arc::clone(&entered.transport),
    };
    let election_min = config.etcd.election_timeout.unwrap_or(limits::ELECTION_MIN);
    let options = raft::Options {
        heartbeat: config.etcd.heartbeat_interval.unwrap_or(limits::HEARTBEAT),
        election_min,
        election_max: limits::election_max(election_min),
        learner_silent_max: Patience::of_process().learner_silent,
        checkpoint: entered.tuning.checkpoint,
    };
    let node = Node::start(parts, &options).await?;
    if dir.identity.phase == Phase::Founding {
        node.found(member).await?;
    }
    node.elect_if_alone().await?;
    Ok(node)
}

/// Says what was wrong with the configuration without being an error.
fn announce_warnings(problems: &crate::config::Problems) {
    for problem in problems.iter().filter(|problem| problem.severity == Severity::Warning) {
        announce!(
            EventId::ConfigurationWarning,
            { fields::PATH } = %problem.origin,
            "{problem}"
        );
    }
}

#[cfg(test)]
#[path = "cut_tests.rs"]
mod tests;

//! The phases of a server's life, in order.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::collect::NodeMetrics;
use super::data_dir::{DataDir, DataDirError, Lock};
use super::follow::{LeaseClocks, Watchers};
use super::health::NodeHealth;
use super::listen::{Caps, ListenError, Listeners, Security};
use super::membership::NodeMembership;
use super::scrub::{self, ScrubMetrics, Scrubber};
use super::{backup, supervise};
use crate::announce;
use crate::config::{Config, Loaded, Quota, Severity};
use crate::env::{Env, host};
use crate::etcd::{self, Api, Leases, ServeError, Settings};
use crate::events::{EventId, fields};
use crate::limits;
use crate::metrics::{Metrics, Versions};
use crate::mvcc::StoreError;
use crate::observe::grpc;
use crate::observe::http::{self, Version};
use crate::observe::logging::{self, Logging, LoggingError};
use crate::pki::{Names, NamesError, Owner, Pki, PkiError, Port, Role as CertificateRole};
use crate::raft::checkpoint::Policy;
use crate::raft::{self, Member, Node, Parts, StartError, StopError};
use crate::systemd::{Notifier, Pulse, Readiness, Shutdown, StopReason, Watchdog};
use crate::types::ByteCount;
use crate::watch::{Hub, Limits as WatchLimits};

/// K3s' timing for embedded etcd, which tolerates what cards do.
const HEARTBEAT: Duration = Duration::from_millis(500);
const ELECTION_MIN: Duration = Duration::from_secs(2);

/// How long calls under way may take when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

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
    /// The services could not be put together.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The process could not be set up.
    #[error("process: {0}")]
    Process(#[from] io::Error),
    /// Logging could not be set up.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// It ran, and a part of it failed.
    #[error("{0}")]
    Failed(String),
    /// It ran, and did not stop cleanly.
    #[error(transparent)]
    Stop(#[from] StopError),
}

impl RunError {
    /// What the operator can do, where there is something.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::DataDir(error) => Some(error.remedy()),
            Self::Pki(error) => Some(error.remedy().to_owned()),
            Self::Listen(error) => Some(error.remedy()),
            Self::Start(_)
            | Self::Store(_)
            | Self::Names(_)
            | Self::Serve(_)
            | Self::Process(_)
            | Self::Logging(_)
            | Self::Failed(_)
            | Self::Stop(_) => None,
        }
    }
}

impl RunError {
    /// Whether starting again changes nothing before somebody changes the configuration.
    pub const fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::Names(_)
                | Self::Logging(_)
                | Self::DataDir(DataDirError::NotADirectory { .. })
                | Self::Listen(ListenError::PlainExposed { .. })
                | Self::Start(StartError::Timing(_))
        )
    }
}

/// Runs a server until it is told to stop or cannot go on.
pub fn run(loaded: &Loaded) -> Result<(), RunError> {
    let config = &loaded.config;
    let filter = std::env::var("K3S_SERVER_LOG").ok();
    // Dropped last: what is still queued for the journal is written then.
    let _logs = logging::init(&Logging { debug: config.debug, filter })?;
    announce_warnings(&loaded.problems);
    // Two to four slow cores: more threads would only take turns. Blocking work has its own.
    let workers = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(16)
        .thread_name("k3s-server")
        .enable_all()
        .build()?;
    runtime.block_on(serve(config, host::env()))
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

async fn serve(config: &Config, env: Env) -> Result<(), RunError> {
    let shutdown = Shutdown::new();
    let signals = shutdown.on_signals()?;
    let notifier = Notifier::from_environment();
    announce!(
        EventId::Starting,
        { fields::NODE } = config.node_name.as_str(),
        "k3s-server {} starting, datastore in {}",
        env!("CARGO_PKG_VERSION"),
        config.db_dir.display()
    );
    let mut running = start(config, &env, notifier, shutdown).await?;
    running.background.push(signals);
    let reason = wait(&mut running).await;
    notifier.stopping();
    announce!(EventId::Stopping, "stopping: {reason}");
    let stopped = stop(running).await;
    match reason {
        StopReason::Failed(what) => {
            announce!(EventId::Failed, "stopped because a part failed: {what}");
            Err(RunError::Failed(what))
        }
        StopReason::Signal(_) | StopReason::Requested(_) => {
            stopped?;
            announce!(EventId::Stopped, "stopped; everything is on the card");
            Ok(())
        }
    }
}

async fn start(
    config: &Config,
    env: &Env,
    notifier: Notifier,
    shutdown: Shutdown,
) -> Result<Running, RunError> {
    let (readiness, [raft_latch, serving_latch]) =
        Readiness::new(notifier, ["raft", "client and health ports"]);
    let ports = open(config, env).await?;
    let Ports { dir, pki, clients, observers, member } = ports;
    let addresses = member.client_urls.join(", ");
    let live = Live::start(config, env, &dir, &member).await?;
    raft_latch.set();

    let (stop_serving, stopping) = watch::channel(false);
    let settings = settings(config);
    let mut metrics = Metrics::new(versions().0, env.clock.wall());
    let scrubbing = Arc::new(scrub::Progress::default());
    metrics.collect(ScrubMetrics(Arc::clone(&scrubbing)));
    let serving = live.serve(env, settings, metrics, clients, observers, &stopping);
    serving_latch.set();

    let Live { node, hub, leases } = live;
    let mut background = vec![
        tokio::spawn(leases.run(node.clone(), settings, stopped(stopping))),
        tokio::spawn(supervise::report_status(node.clone(), notifier)),
        tokio::spawn(supervise::watch_failures(node.clone(), shutdown.clone())),
        tokio::spawn(supervise::keep_space_alarm(node.clone(), dir.space.space())),
        tokio::spawn(supervise::keep_certificates(pki, names(config)?)),
        tokio::spawn(scrub::run(Scrubber {
            env: env.clone(),
            store: dir.store.clone(),
            wal: dir.wal.clone(),
            path: dir.path.clone(),
            progress: scrubbing,
        })),
        tokio::spawn(supervise::announce_ready(readiness, notifier, node.clone(), addresses)),
    ];
    if let Some(watchdog) = Watchdog::from_environment() {
        let pulse = Pulse::new(Arc::clone(&env.clock));
        background.push(tokio::spawn(supervise::pulse(node.clone(), pulse.clone())));
        background.push(tokio::spawn(watchdog.feed(notifier, pulse, shutdown.clone())));
    }
    let store = dir.store;
    // Ends with the store; what it does is seen in the store and in the alarm.
    drop(dir.space.spawn_thread(store.clone())?);
    Ok(Running { node, shutdown, stop_serving, hub, serving, background, store, _lock: dir.lock })
}

/// What a server holds before it takes part in anything: its data, its certificates and its ports.
struct Ports {
    dir: DataDir,
    pki: Pki,
    clients: Listeners,
    observers: Listeners,
    member: Member,
}

async fn open(config: &Config, env: &Env) -> Result<Ports, RunError> {
    // A port in use is a mistake to report before anything is touched.
    let addresses = config.metrics_listen.addresses(&config.node_ips);
    let observers =
        Listeners::bind(&addresses, Security::PlainReadOnly, "metrics and health").await?;
    let addresses = config.client_listen.addresses(&config.node_ips);
    let security =
        if config.insecure_http { Security::PlainLoopback } else { Security::ClosedUntilTls };
    let mut clients = Listeners::bind(&addresses, security, "the etcd API").await?;

    let dir = DataDir::open(env, &config.db_dir, config.wal_linger).await?;
    supervise::announce_opened(&dir);
    let pki = establish_pki(config, env, &dir).await?;
    if !config.insecure_http {
        clients = clients.with_tls(pki.accept(Port::Clients)?);
    }
    let member = member(config, &dir, &clients.addresses()?);
    Ok(Ports { dir, pki, clients, observers, member })
}

/// A node that takes part, and those who follow its store.
struct Live {
    node: Node,
    hub: Hub,
    leases: Arc<Leases>,
}

impl Live {
    async fn start(
        config: &Config,
        env: &Env,
        dir: &DataDir,
        member: &Member,
    ) -> Result<Self, RunError> {
        let revision = dir.store.read()?.revision();
        let hub = Hub::new(revision, WatchLimits::default());
        let leases = Arc::new(Leases::new(Arc::clone(&env.clock), &dir.store)?);
        let node = start_node(config, env, dir, member, &hub, &leases).await?;
        Ok(Self { node, hub, leases })
    }

    /// Serves clients and health checks until `stopping`.
    fn serve(
        &self,
        env: &Env,
        settings: Settings,
        mut metrics: Metrics,
        clients: Listeners,
        observers: Listeners,
        stopping: &watch::Receiver<bool>,
    ) -> JoinSet<Result<(), RunError>> {
        let mut serving = JoinSet::new();
        let api = Api::new(self.parts(env, settings));
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
        serving
    }

    fn parts(&self, env: &Env, settings: Settings) -> etcd::Parts {
        let node = &self.node;
        etcd::Parts {
            node: node.clone(),
            hub: self.hub.clone(),
            leases: Arc::clone(&self.leases),
            env: env.clone(),
            membership: Arc::new(NodeMembership(node.clone())),
            leader_leases: None,
            backup: backup::source(node.clone()),
            defragment: supervise::defragment(node.clone()),
            settings,
        }
    }
}

/// Completes when the node is to stop serving.
async fn stopped(mut stopping: watch::Receiver<bool>) {
    // A sender that is gone means the same.
    drop(stopping.wait_for(|stop| *stop).await);
}

/// Waits until something asks to stop. A service that ends by itself is a failure.
async fn wait(running: &mut Running) -> StopReason {
    tokio::select! {
        reason = running.shutdown.begun() => reason,
        ended = running.serving.join_next() => {
            let what = match ended {
                Some(Ok(Ok(()))) | None => "a service ended by itself".to_owned(),
                Some(Ok(Err(error))) => error.to_string(),
                Some(Err(error)) => error.to_string(),
            };
            let reason = StopReason::Failed(what);
            running.shutdown.begin(reason.clone());
            reason
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
    let election = etcd.election_timeout.unwrap_or(ELECTION_MIN);
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

fn names(config: &Config) -> Result<Names, RunError> {
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

async fn establish_pki(config: &Config, env: &Env, dir: &DataDir) -> Result<Pki, RunError> {
    let owner = Owner { cluster: dir.identity.cluster, node: dir.identity.node };
    let (pki, issued) = Pki::establish(env, &dir.path.join("tls"), owner, &names(config)?).await?;
    for one in issued {
        supervise::announce_issued(&one);
    }
    let client = pki.paths(CertificateRole::Client);
    tracing::info!(
        "clients: etcdctl --cacert {} --cert {} --key {}",
        client.authority.display(),
        client.certificate.display(),
        client.key.display()
    );
    Ok(pki)
}

/// This node, as other members and clients shall know it.
fn member(config: &Config, dir: &DataDir, clients: &[SocketAddr]) -> Member {
    let scheme = if config.insecure_http { "http" } else { "https" };
    let urls = |scheme: &str, addresses: &[SocketAddr]| {
        addresses.iter().map(|address| format!("{scheme}://{address}")).collect()
    };
    Member {
        id: dir.identity.node,
        name: config.node_name.clone(),
        peer_urls: urls("https", &config.peer_listen.addresses(&config.node_ips)),
        client_urls: urls(scheme, clients),
        learner: false,
    }
}

async fn start_node(
    config: &Config,
    env: &Env,
    dir: &DataDir,
    member: &Member,
    hub: &Hub,
    leases: &Arc<Leases>,
) -> Result<Node, RunError> {
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
    };
    let election_min = config.etcd.election_timeout.unwrap_or(ELECTION_MIN);
    let options = raft::Options {
        heartbeat: config.etcd.heartbeat_interval.unwrap_or(HEARTBEAT),
        election_min,
        election_max: election_min * 2,
        checkpoint: Policy {
            interval: limits::CHECKPOINT_INTERVAL,
            log_bytes: ByteCount::new(limits::CHECKPOINT_LOG_BYTES),
        },
    };
    let node = Node::start(parts, &options).await?;
    node.found(member).await?;
    node.elect_if_alone().await?;
    Ok(node)
}

/// Says what was wrong with the configuration without being an error.
fn announce_warnings(problems: &crate::config::Problems) {
    for problem in problems.iter().filter(|problem| problem.severity == Severity::Warning) {
        announce!(EventId::ConfigurationWarning, "{problem}");
    }
}

//! One life of a node: what is started, in which order, and how it is stopped.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::collect::NodeMetrics;
use super::data_dir::{DataDir, Lock};
use super::dispatch::Taking;
use super::enter::{self, Entered, enter};
use super::failed::RunError;
use super::follow::{LeaseClocks, Watchers};
use super::heal::{self, Healer};
use super::health::NodeHealth;
use super::leases::LeasesOfLeader;
use super::listen::{Caps, Listeners};
use super::membership::NodeMembership;
use super::patience::Patience;
use super::scrub::{self, ScrubMetrics, Scrubber};
use super::settle::Settling;
use super::stage::Stage;
use super::{backup, figures, supervise};
use crate::client;
use crate::config::{Config, Quota};
use crate::env::Env;
use crate::etcd::{self, Api, Leases, Settings};
use crate::join::hello::Finder;
use crate::join::{Phase, flags};
use crate::limits;
use crate::metrics::{Metrics, Versions};
use crate::observe::grpc;
use crate::observe::http::{self, Version};
use crate::pki::Names;
use crate::raft::{self, Node, Parts};
use crate::systemd::{
    Latch, Notifier, Phase as ServerPhase, Pulse, Readiness, Shutdown, StopReason, Watchdog,
};
use crate::watch::{Hub, Limits as WatchLimits};

/// How long calls under way may take when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A server that runs, and what is needed to stop it.
pub(super) struct Running {
    node: Node,
    shutdown: Shutdown,
    stop_serving: watch::Sender<bool>,
    hub: Hub,
    pub(super) serving: JoinSet<Result<(), RunError>>,
    background: Vec<JoinHandle<()>>,
    store: crate::mvcc::Store,
    _lock: Lock,
}

/// The last steps of a node that runs already, and whom to tell when they are taken.
pub(super) struct Unsettled {
    pub(super) settling: Settling,
    pub(super) settled: Latch,
    pub(super) stopping: watch::Receiver<bool>,
}

pub(super) async fn begin(
    config: &Config,
    stage: &Stage,
) -> Result<(Running, Unsettled), RunError> {
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
pub(super) async fn wait(running: &mut Running) -> (StopReason, Option<RunError>) {
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
pub(super) async fn stop(mut running: Running) -> Result<(), RunError> {
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

#[cfg(test)]
#[path = "cut_tests.rs"]
mod tests;

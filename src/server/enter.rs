//! How a start becomes a node that may take part: found, join or go on; then prove to the others that it still is who it was.
//!
//! ```text
//! ports ─> lock ─> who am I ─┬─ nobody: found, or join with the token ─┐
//!                            └─ a node: go on, or reset ───────────────┴─> count this start ─> log and state
//!   ─> certificates ─> port 2380 answers hellos ─> hello to a majority ─> Raft may run
//! ```
//!
//! # Invariants
//!
//! - Nothing is written before the configuration is known to fit: a joiner compares its critical flags first.
//! - Raft does not run before a majority has said that this node has forgotten nothing.
//! - A node that has forgotten does not go on: its data is set aside, and it starts over as another one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::service::Routes;

use super::data_dir::{DataDir, Locked};
use super::dial::Network;
use super::dispatch::{Dispatch, Doorman};
use super::doorway::OwnCredentials;
use super::listen::{Listeners, PeerDoors, Security};
use super::run::{RunError, names, stopped};
use super::supervise;
use super::tuning::{Tuning, medium_of, tuning};
use crate::announce;
use crate::config::{Config, ServerUrl, Start, TokenSource};
use crate::critical::{CriticalFlags, FlagsError, gate};
use crate::env::Env;
use crate::events::EventId;
use crate::join::hello::{self, Answerer, Asked, Hello, HelloBook, Verdict, Witness};
use crate::join::{
    AuthorityHash, Door, Enrolment, House, Identity, Phase, Plan, Token, enrol, quarantine,
    start_plan, token,
};
use crate::metrics::Metrics;
use crate::mvcc::Store;
use crate::peers::address::Location;
use crate::peers::{self, Passport, Peers};
use crate::pki::{Owner, Pki, Port, Role};
use crate::proto::node::join_server::JoinServer;
use crate::raft::transport::Transport;
use crate::raft::{Member, inspect, reset};
use crate::wal::Wal;

/// A node that may take part, and everything it holds.
pub(super) struct Entered {
    /// What the directory lives on has decided these.
    pub(super) tuning: Tuning,
    pub(super) dir: DataDir,
    pub(super) pki: Pki,
    pub(super) peers: Peers,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) dispatch: Arc<Dispatch>,
    pub(super) member: Member,
    pub(super) contacts: Vec<Member>,
    pub(super) flags: Arc<CriticalFlags>,
    pub(super) clients: Listeners,
    pub(super) observers: Listeners,
    /// Answers other nodes already.
    pub(super) serving: JoinSet<Result<(), RunError>>,
}

/// The ports, taken before anything is touched: one in use is a mistake to report first.
struct Ports {
    observers: Listeners,
    clients: Listeners,
    peers: Listeners,
}

impl Ports {
    async fn bind(config: &Config) -> Result<Self, RunError> {
        let addresses = config.metrics_listen.addresses(&config.node_ips);
        let observers =
            Listeners::bind(&addresses, Security::PlainReadOnly, "metrics and health").await?;
        let addresses = config.client_listen.addresses(&config.node_ips);
        let security =
            if config.insecure_http { Security::PlainLoopback } else { Security::ClosedUntilTls };
        let clients = Listeners::bind(&addresses, security, "the etcd API").await?;
        let addresses = config.peer_listen.addresses(&config.node_ips);
        let peers = Listeners::bind(&addresses, Security::ClosedUntilTls, "other servers").await?;
        Ok(Self { observers, clients, peers })
    }
}

/// See the module documentation.
pub(super) async fn enter(
    config: &Config,
    env: &Env,
    metrics: &Metrics,
    stopping: &watch::Receiver<bool>,
) -> Result<Entered, RunError> {
    let flags = Arc::new(CriticalFlags::of(config));
    let ports = Ports::bind(config).await?;
    let locked = Locked::take(env, &config.db_dir)?;
    let identity = identify(config, env, &locked, &flags).await?;
    let path = locked.path.clone();
    let tuning = tuning(config.storage_medium, medium_of(&path), config.wal_linger);
    let dir = locked.open(env, identity, &tuning).await?;
    supervise::announce_opened(&dir);

    let owner = Owner { cluster: identity.cluster, node: identity.node };
    let (pki, issued) = Pki::establish(env, &path.join("tls"), owner, &names(config)?).await?;
    for one in issued {
        supervise::announce_issued(&one);
    }
    let token = establish_token(config, env, &dir, &pki).await?;
    let clients = if config.insecure_http {
        ports.clients
    } else {
        ports.clients.with_tls(pki.accept(Port::Clients)?)
    };
    let member = member(config, identity, &clients.addresses()?, &ports.peers.addresses()?);
    if let Start::Reset { .. } = config.start {
        return Err(reset(&dir, &member).await);
    }
    let passport = Passport::new(identity.cluster, identity.epoch, &*env.entropy);
    let peers = Peers::new(pki.clone(), passport, &member, Arc::clone(&env.entropy));
    if let Start::Join(server) = &config.start
        && let Some(hint) = Location::new(server.host(), server.join_port())
    {
        peers.hint(vec![hint]);
    }
    let book = Arc::new(HelloBook::default());
    let witness = Witness::new(Arc::new(peers.clone()), Arc::clone(&book));
    let transport: Arc<dyn Transport> = Arc::new(witness);
    let parts = hello::answer::Parts {
        cluster: identity.cluster,
        node: identity.node,
        incarnation: peers.passport().incarnation,
        store: dir.store.clone(),
        wal: dir.wal.clone(),
        book: Arc::clone(&book),
        transport: Arc::clone(&transport),
    };
    let dispatch =
        Arc::new(Dispatch::new(Arc::new(Answerer::new(parts).map_err(RunError::Hello)?)));
    let doors = PeerDoors { nodes: pki.accept(Port::Peers)?, newcomers: pki.accept(Port::Join)? };
    let incoming = ports.peers.accept_peers(doors, metrics.connections.clone());
    let serving = Serving { env, dir: &dir, pki: &pki, token: &token, peers: &peers, book: &book };
    let serving = serving.start(&dispatch, incoming, stopping);

    let contacts = crate::join::contacts(env, &path)?;
    greet(env, &dir, &peers, &transport, &book, &member, &flags, contacts.clone()).await?;
    let mut contacts = contacts.map(|stored| hello::members(&stored)).unwrap_or_default();
    contacts.retain(|contact| contact.id != member.id);
    let observers = ports.observers;
    Ok(Entered {
        tuning,
        dir,
        pki,
        peers,
        transport,
        dispatch,
        member,
        contacts,
        flags,
        clients,
        observers,
        serving,
    })
}

/// Who this node is, this start counted.
async fn identify(
    config: &Config,
    env: &Env,
    locked: &Locked,
    flags: &CriticalFlags,
) -> Result<Identity, RunError> {
    let path = &locked.path;
    if crate::join::undo_unfinished(env, path).await? {
        tracing::info!("undid a join that was interrupted");
    }
    let found = locked.identity(env)?;
    let plan = start_plan(found.as_ref(), config)?;
    if let Some(note) = plan.note() {
        tracing::info!("{note}");
    }
    let identity = match (found, plan) {
        (Some(identity), _) => identity,
        (None, Plan::Join(server)) => join(config, env, locked, flags, server).await?,
        (None, Plan::Found | Plan::Continue { .. } | Plan::Reset { .. }) => {
            check_founding_token(config, env).await?;
            let identity = Identity::random(env);
            identity.store(env, path).await?;
            identity
        }
    };
    let identity = identity.next_epoch(env, path).await?;
    let (identity, aside) = quarantine::finish(env, path, identity).await?;
    if let Some(aside) = aside {
        announce!(EventId::SetAside, "the old data is in {}", aside.display());
    }
    Ok(identity)
}

/// A token that cannot found a cluster is refused before there is one.
async fn check_founding_token(config: &Config, env: &Env) -> Result<(), RunError> {
    if let Some(source) = &config.token {
        token::obtain(env, source).await?.check_founding(None)?;
    }
    Ok(())
}

async fn join(
    config: &Config,
    env: &Env,
    locked: &Locked,
    flags: &CriticalFlags,
    server: ServerUrl,
) -> Result<Identity, RunError> {
    let Some(source) = &config.token else { unreachable!("a plan to join was made with a token") };
    let token = token::obtain(env, source).await?;
    announce!(EventId::Joining, "joining through {server}");
    let listens = config.peer_listen.addresses(&config.node_ips);
    let local = config.node_ips.clone();
    let enrolment = Enrolment {
        env: env.clone(),
        dial: Arc::new(Network),
        server,
        token,
        is_own: Box::new(move |address| enrol::is_own(address, &listens, &local)),
    };
    let enrolled = enrolment.run().await?;
    let matched = gate::against(flags, &enrolled.flags).inspect_err(FlagsError::announce)?;
    Ok(crate::join::adopt(env, &locked.path, &enrolled, matched).await?)
}

/// The token that lets others in. What is kept counts; a configured one that differs is refused, as in K3s.
async fn establish_token(
    config: &Config,
    env: &Env,
    dir: &DataDir,
    pki: &Pki,
) -> Result<Token, RunError> {
    let kept = token::load(env, &dir.path)?;
    let configured = match (&config.token, &kept) {
        // Not waited for: with a token of its own a node needs no file.
        (None, _) | (Some(TokenSource::File(_)), Some(_)) => None,
        (Some(source), _) => Some(token::obtain(env, source).await?),
    };
    let authority = AuthorityHash::of(pki.authority_pem().as_bytes());
    let token = token::establish(env, &dir.path, configured.as_ref(), authority).await?;
    if kept.is_none() {
        let path = dir.path.join(token::FILE);
        announce!(EventId::TokenKept, "other servers join with the token in {}", path.display());
    }
    Ok(token)
}

/// This node, as other members and clients shall know it.
fn member(
    config: &Config,
    identity: Identity,
    clients: &[SocketAddr],
    peers: &[SocketAddr],
) -> Member {
    let scheme = if config.insecure_http { "http" } else { "https" };
    let urls = |scheme: &str, addresses: &[SocketAddr]| {
        // Loopback is of no use to others, unless there is nothing else.
        let reachable = addresses.iter().filter(|address| !address.ip().is_loopback());
        let mut urls: Vec<String> =
            reachable.map(|address| format!("{scheme}://{address}")).collect();
        if urls.is_empty() {
            urls = addresses.iter().map(|address| format!("{scheme}://{address}")).collect();
        }
        urls
    };
    Member {
        id: identity.node,
        name: config.node_name.clone(),
        peer_urls: urls("https", peers),
        client_urls: urls(scheme, clients),
        learner: false,
        replaces: None,
    }
}

/// What port 2380 answers with.
struct Serving<'a> {
    env: &'a Env,
    dir: &'a DataDir,
    pki: &'a Pki,
    token: &'a Token,
    peers: &'a Peers,
    book: &'a Arc<HelloBook>,
}

impl Serving<'_> {
    fn start(
        &self,
        dispatch: &Arc<Dispatch>,
        incoming: super::listen::PeersIncoming,
        stopping: &watch::Receiver<bool>,
    ) -> JoinSet<Result<(), RunError>> {
        let mut serving = JoinSet::new();
        let doorman = Doorman { store: self.dir.store.clone(), book: Arc::clone(self.book) };
        let (peers, answer) = (self.peers.clone(), Arc::clone(dispatch));
        let stop = stopped(stopping.clone());
        serving.spawn(async move {
            Ok(peers::serve(&peers, answer, Arc::new(doorman), incoming.nodes, stop).await?)
        });
        let identity = self.dir.identity;
        let house = House {
            cluster: identity.cluster,
            authority_pem: self.pki.authority_pem().to_owned().into(),
            password: self.token.password.clone(),
        };
        let grant = OwnCredentials {
            cluster: identity.cluster,
            pki: self.pki.clone(),
            store: self.dir.store.clone(),
        };
        let door = Door::new(self.env, house, Arc::new(grant));
        let routes = Routes::new(JoinServer::new(door));
        let stop = stopped(stopping.clone());
        serving
            .spawn(async move { Ok(peers::serve_join(routes, incoming.newcomers, stop).await?) });
        serving
    }
}

/// Asks the others whether this still is the node they remember.
#[allow(clippy::too_many_arguments, reason = "everything a node is")]
async fn greet(
    env: &Env,
    dir: &DataDir,
    peers: &Peers,
    transport: &Arc<dyn Transport>,
    book: &Arc<HelloBook>,
    member: &Member,
    flags: &Arc<CriticalFlags>,
    contacts: Option<crate::proto::node::StoredMembership>,
) -> Result<(), RunError> {
    // The comparison keeps what it found, for the table that the operator sees.
    let found: Arc<Mutex<Option<FlagsError>>> = Arc::default();
    let (keep, own) = (Arc::clone(&found), Arc::clone(flags));
    let compare = move |record: &[u8]| match gate::against(&own, record) {
        Err(error @ FlagsError::Differ(_)) => {
            let text = error.to_string();
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            Some(text)
        }
        Ok(_) | Err(_) => None,
    };
    let asked = Asked {
        env,
        transport: Arc::clone(transport),
        book: Arc::clone(book),
        identity: dir.identity,
        incarnation: peers.passport().incarnation,
        member,
        store: &dir.store,
        wal: &dir.wal,
        contacts,
        compare: Arc::new(compare),
    };
    match Hello::new(asked).map_err(RunError::Hello)?.run().await {
        Verdict::Welcome | Verdict::Wait { .. } => Ok(()),
        Verdict::Amnesia { what, who } => {
            announce!(EventId::Quarantined, "{what}, as node {who} remembers");
            Err(Rejoin::of(env, dir).begin().await)
        }
        // A joiner that was given up asks again, as somebody else.
        Verdict::Retired { .. } if matches!(dir.identity.phase, Phase::Joining { .. }) => {
            Err(Rejoin::of(env, dir).begin().await)
        }
        Verdict::Retired { reason, .. } => Err(RunError::Retired(reason)),
        Verdict::Duplicate { found, .. } => Err(RunError::Duplicate(found)),
        Verdict::Incompatible { found, .. } => Err(RunError::Incompatible(found)),
        Verdict::FlagsDiffer { found: text, .. } => {
            let kept = found.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(error) = kept else { return Err(RunError::Hello(text)) };
            error.announce();
            Err(RunError::Flags(error))
        }
    }
}

/// Gives a node a new id, under which it comes back.
pub(super) struct Rejoin {
    env: Env,
    path: PathBuf,
    identity: Identity,
    store: Store,
    wal: Wal,
}

impl Rejoin {
    /// Of the node in this data directory.
    pub(super) fn of(env: &Env, dir: &DataDir) -> Self {
        let (store, wal) = (dir.store.clone(), dir.wal.clone());
        Self { env: env.clone(), path: dir.path.clone(), identity: dir.identity, store, wal }
    }

    /// The caller closes everything and starts over; the data is set aside then.
    pub(super) async fn begin(self) -> RunError {
        match self.try_begin().await {
            Ok(()) => RunError::StartOver,
            Err(error) => error,
        }
    }

    async fn try_begin(&self) -> Result<(), RunError> {
        let view = self.store.read()?;
        let tail = inspect::tail(&view, &self.wal).map_err(RunError::Hello)?;
        quarantine::begin(&self.env, &self.path, self.identity, &tail.membership).await?;
        Ok(())
    }
}

/// `cluster-reset`. Ends the process either way, as in K3s.
async fn reset(dir: &DataDir, member: &Member) -> RunError {
    match reset::only_member(&dir.wal, &dir.store, member).await {
        Ok(left) => RunError::HasReset(left.into_iter().map(|one| one.name).collect()),
        Err(error) => RunError::Reset(error),
    }
}

/// Where clients find their certificates, for people.
pub(super) fn announce_client_files(pki: &Pki) {
    let client = pki.paths(Role::Client);
    tracing::info!(
        "clients: etcdctl --cacert {} --cert {} --key {}",
        client.authority.display(),
        client.certificate.display(),
        client.key.display()
    );
}

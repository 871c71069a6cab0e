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
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::service::Routes;

use super::data_dir::{DataDir, DataDirError, Locked, STATE_FILE};
use super::dial::Network;
use super::dispatch::{Dispatch, Doorman};
use super::doorway::OwnCredentials;
use super::early;
use super::failed::RunError;
use super::life::{names, stopped};
use super::listen::{Listeners, PeerDoors, PeersIncoming, Security};
use super::mend::Unmendable;
use super::supervise;
use super::tuning::{Tuning, medium_of, tuning};
use crate::announce;
use crate::config::{Config, ServerUrl, Start, TokenSource};
use crate::critical::{CriticalFlags, FlagsError, gate};
use crate::env::Env;
use crate::events::EventId;
use crate::join::hello::ask::CompareFlags;
use crate::join::hello::{self, Answerer, Asked, Hello, HelloBook, Verdict, Witness};
use crate::join::{
    self, AuthorityHash, Door, Enrolment, House, Identity, Plan, Token, enrol, quarantine,
    start_plan, token,
};
use crate::metrics::Metrics;
use crate::mvcc::{self, DrainOn, Store};
use crate::peers::address::Location;
use crate::peers::{self, Passport, Peers};
use crate::pki::{Owner, Pki, Port, Role};
use crate::proto::node::StoredMembership;
use crate::raft::transport::Transport;
use crate::raft::{Leaving, Member, inspect, reset};
use crate::systemd::{Phase as Stage, Phases};
use crate::wal::Wal;

/// A node that may take part, and everything it holds.
pub(super) struct Entered {
    /// What the directory lives on has decided these.
    pub(super) tuning: Tuning,
    pub(super) dir: DataDir,
    pub(super) pki: Pki,
    pub(super) peers: Peers,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) book: Arc<HelloBook>,
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
    phases: &Phases,
    stopping: &watch::Receiver<bool>,
) -> Result<Entered, RunError> {
    let flags = Arc::new(CriticalFlags::of(config));
    let ports = Ports::bind(config).await?;
    let locked = Locked::take(env, &config.db_dir)?;
    let identity = identify(config, env, &locked, &flags, phases).await?;
    let path = locked.path.clone();
    let tuning = tuning(config.storage_medium, medium_of(&path), config.wal_linger);
    let dir = match locked.open(env, identity, &tuning).await {
        Ok(dir) => dir,
        Err(error) => return Err(refill(env, &path, identity, error).await),
    };
    supervise::announce_opened(&dir);
    compare_alone(&dir, &flags)?;

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
        return Err(reset(env, &dir, &member).await);
    }
    let contacts = join::contacts(env, &path)?;
    let ties = Ties::new(config, env, &dir, &pki, &member)?;
    let doors = PeerDoors { nodes: pki.accept(Port::Peers)?, newcomers: pki.accept(Port::Join)? };
    let incoming = ports.peers.accept_peers(doors, metrics.connections.clone());
    let serving = ties.serve(env, &dir, &pki, &token, incoming, stopping);
    phases.set(Stage::Meeting, "asking the other servers whether this one has forgotten anything");
    ties.greet(env, &dir, &member, &flags, contacts.clone()).await?;

    let mut contacts = contacts.map(|stored| hello::members(&stored)).unwrap_or_default();
    contacts.retain(|contact| contact.id != member.id);
    let Ties { peers, transport, book, dispatch } = ties;
    let observers = ports.observers;
    Ok(Entered {
        tuning,
        dir,
        pki,
        peers,
        transport,
        book,
        dispatch,
        member,
        contacts,
        flags,
        clients,
        observers,
        serving,
    })
}

/// Compares critical flags with the record on this card, if nobody else can have a newer one: then this node does not begin to take
/// part. Others say by their hello what the record is.
fn compare_alone(dir: &DataDir, flags: &CriticalFlags) -> Result<(), RunError> {
    let tail = inspect::tail(&dir.store.read()?, &dir.wal).map_err(RunError::Hello)?;
    let sets = tail.membership.membership.unwrap_or_default().configs;
    let own = dir.identity.node.get();
    let alone = !sets.is_empty() && sets.iter().flat_map(|set| &set.ids).all(|id| *id == own);
    let Some(record) = tail.flags.filter(|_| alone) else { return Ok(()) };
    match gate::against(flags, &record) {
        Err(error @ FlagsError::Differ(_)) => {
            error.announce();
            Err(RunError::Flags(error))
        }
        // What cannot be read is reported when it is used.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// What is damaged here the others have: this node sets it aside and is filled by them. Alone, it stops.
async fn refill(env: &Env, path: &Path, identity: Identity, error: DataDirError) -> RunError {
    match others(env, path, identity, &error).await {
        Some(membership) => {
            announce!(EventId::Quarantined, "{error}; the other servers have what is missing");
            match quarantine::begin(env, path, identity, &membership).await {
                Ok(_) => RunError::StartOver,
                Err(error) => error.into(),
            }
        }
        None => error.into(),
    }
}

/// The members, if others vote beside this node and the damage is one that they make good.
async fn others(
    env: &Env,
    path: &Path,
    identity: Identity,
    error: &DataDirError,
) -> Option<StoredMembership> {
    let told = || join::contacts(env, path).ok().flatten();
    let membership = if let DataDirError::Damaged { why: Unmendable::OtherVoters, .. } = error {
        let options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };
        let store = Store::open(env, &path.join(STATE_FILE), &options).ok()?;
        let stored = inspect::stored_membership(&store.read().ok()?).ok();
        // What is not closed cleanly is set aside all the same.
        drop(store.close().await);
        stored.or_else(told)
    } else if let DataDirError::Store(error) = error
        && error.is_damage()
    {
        told()
    } else {
        None
    }?;
    let others = hello::members(&membership);
    others.iter().any(|one| one.id != identity.node && !one.learner).then_some(membership)
}

/// Who this node is, this start counted.
async fn identify(
    config: &Config,
    env: &Env,
    locked: &Locked,
    flags: &CriticalFlags,
    phases: &Phases,
) -> Result<Identity, RunError> {
    let path = &locked.path;
    if matches!(config.start, Start::Reset { .. }) {
        join::reset::check(env, path)?;
    } else {
        join::reset::forget(env, path)?;
    }
    if join::undo_unfinished(env, path).await? {
        tracing::info!("undid a join that was interrupted");
    }
    let found = locked.identity(env)?;
    let plan = start_plan(found.as_ref(), config)?;
    if let Some(note) = plan.note() {
        tracing::info!("{note}");
    }
    if matches!(plan, Plan::Continue { .. }) {
        early::refuse_early(config, env, flags).await?;
    }
    let identity = match (found, plan) {
        (Some(identity), _) => identity,
        (None, Plan::Join(server)) => {
            phases.set(Stage::Joining, format!("asking {server} to be let in"));
            let identity = enrol_and_adopt(config, env, locked, flags, server).await?;
            phases.set(Stage::Opening, "opening its log and state");
            identity
        }
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

async fn enrol_and_adopt(
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
    Ok(join::adopt(env, &locked.path, &enrolled, matched).await?)
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
        (None, _) | (Some(TokenSource::File(_) | TokenSource::Credential(_)), Some(_)) => None,
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

/// What binds a node to the others: how it reaches them, what it remembers of them, what it answers them.
struct Ties {
    peers: Peers,
    book: Arc<HelloBook>,
    transport: Arc<dyn Transport>,
    dispatch: Arc<Dispatch>,
}

impl Ties {
    fn new(
        config: &Config,
        env: &Env,
        dir: &DataDir,
        pki: &Pki,
        member: &Member,
    ) -> Result<Self, RunError> {
        let Identity { cluster, node, epoch, .. } = dir.identity;
        let passport = Passport::new(cluster, epoch, &*env.entropy);
        let incarnation = passport.incarnation;
        let peers = Peers::new(pki.clone(), passport, member, Arc::clone(&env.entropy));
        if let Start::Join(server) = &config.start
            && let Some(hint) = Location::new(server.host(), server.join_port())
        {
            peers.hint(vec![hint]);
        }
        let book = Arc::new(HelloBook::default());
        let transport: Arc<dyn Transport> =
            Arc::new(Witness::new(Arc::new(peers.clone()), Arc::clone(&book)));
        let answerer = Answerer::new(hello::answer::Parts {
            cluster,
            node,
            incarnation,
            store: dir.store.clone(),
            wal: dir.wal.clone(),
            book: Arc::clone(&book),
            transport: Arc::clone(&transport),
        });
        let dispatch = Arc::new(Dispatch::new(Arc::new(answerer.map_err(RunError::Hello)?)));
        Ok(Self { peers, book, transport, dispatch })
    }

    /// Answers on port 2380: other nodes, and those who have only the token.
    fn serve(
        &self,
        env: &Env,
        dir: &DataDir,
        pki: &Pki,
        token: &Token,
        incoming: PeersIncoming,
        stopping: &watch::Receiver<bool>,
    ) -> JoinSet<Result<(), RunError>> {
        let mut serving = JoinSet::new();
        let cluster = dir.identity.cluster;
        let doorman = Doorman { store: dir.store.clone(), book: Arc::clone(&self.book) };
        let (peers, answer) = (self.peers.clone(), Arc::clone(&self.dispatch));
        let stop = stopped(stopping.clone());
        serving.spawn(async move {
            Ok(peers::serve(&peers, answer, Arc::new(doorman), incoming.nodes, stop).await?)
        });
        let house = House {
            cluster,
            authority_pem: pki.authority_pem().to_owned().into(),
            password: token.password.clone(),
        };
        let grant = OwnCredentials { cluster, pki: pki.clone(), store: dir.store.clone() };
        let door = Door::new(env, house, Arc::new(grant));
        let routes = Routes::new(Arc::new(door).service());
        let stop = stopped(stopping.clone());
        serving
            .spawn(async move { Ok(peers::serve_join(routes, incoming.newcomers, stop).await?) });
        serving
    }

    /// Asks the others whether this still is the node they remember.
    async fn greet(
        &self,
        env: &Env,
        dir: &DataDir,
        member: &Member,
        flags: &Arc<CriticalFlags>,
        contacts: Option<StoredMembership>,
    ) -> Result<(), RunError> {
        let (compare, differing) = comparison(flags);
        let asked = Asked {
            env,
            transport: Arc::clone(&self.transport),
            book: Arc::clone(&self.book),
            identity: dir.identity,
            incarnation: self.peers.passport().incarnation,
            member,
            store: &dir.store,
            wal: &dir.wal,
            contacts,
            compare,
        };
        let verdict = Hello::new(asked).map_err(RunError::Hello)?.run().await;
        if !matches!(verdict, Verdict::FlagsDiffer { .. }) {
            // Differing flags are told one by one, below.
            verdict.announce();
        }
        match verdict {
            Verdict::Welcome | Verdict::Wait { .. } => Ok(()),
            Verdict::Amnesia { .. } => Err(Rejoin::of(env, dir).begin().await),
            Verdict::Retired { reason, .. } => Err(Rejoin::of(env, dir).retired(reason).await),
            Verdict::Duplicate { found, .. } => Err(RunError::Duplicate(found)),
            Verdict::Incompatible { found, .. } => Err(RunError::Incompatible(found)),
            Verdict::FlagsDiffer { found, .. } => {
                let kept = differing.lock().unwrap_or_else(PoisonError::into_inner).take();
                let Some(error) = kept else { return Err(RunError::Hello(found)) };
                error.announce();
                Err(RunError::Flags(error))
            }
        }
    }
}

/// Compares this server's flags with a record, and keeps how they differ, for the table that the operator sees.
fn comparison(flags: &Arc<CriticalFlags>) -> (CompareFlags, Arc<Mutex<Option<FlagsError>>>) {
    let differing: Arc<Mutex<Option<FlagsError>>> = Arc::default();
    let (keep, own) = (Arc::clone(&differing), Arc::clone(flags));
    let compare = move |record: &[u8]| match gate::against(&own, record) {
        Err(error @ FlagsError::Differ(_)) => {
            let text = error.to_string();
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            Some(text)
        }
        Ok(_) | Err(_) => None,
    };
    (Arc::new(compare), differing)
}

/// Gives a node a new id, under which it comes back.
#[derive(Clone)]
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
    pub(super) async fn begin(&self) -> RunError {
        match self.try_begin(false).await {
            Ok(()) => RunError::StartOver,
            Err(error) => error,
        }
    }

    /// The others have retired this node. One that may come back does; nobody else can tell it to.
    pub(super) async fn retired(&self, reason: String) -> RunError {
        if !Leaving::may_join_again(&reason) {
            return RunError::Retired(reason);
        }
        match self.try_begin(reason == Leaving::GivenUp.words()).await {
            Ok(()) => RunError::StartOver,
            Err(error) => error,
        }
    }

    async fn try_begin(&self, given_up: bool) -> Result<(), RunError> {
        let view = self.store.read()?;
        let membership = match inspect::tail(&view, &self.wal) {
            Ok(tail) => tail.membership,
            // A damaged log: what the state knows is as good for finding the others.
            Err(_) => inspect::stored_membership(&view).map_err(RunError::Hello)?,
        };
        let Self { env, path, identity, .. } = self;
        if given_up {
            quarantine::begin_given_up(env, path, *identity, &membership).await?;
        } else {
            quarantine::begin(env, path, *identity, &membership).await?;
        }
        Ok(())
    }
}

/// `cluster-reset`. The process ends either way, as in K3s.
async fn reset(env: &Env, dir: &DataDir, member: &Member) -> RunError {
    match try_reset(env, dir, member).await {
        Ok(guidance) => RunError::HasReset(guidance),
        Err(error) => error,
    }
}

async fn try_reset(env: &Env, dir: &DataDir, member: &Member) -> Result<String, RunError> {
    let left = reset::only_member(&dir.wal, &dir.store, member).await.map_err(RunError::Reset)?;
    join::reset::done(env, &dir.path).await?;
    Ok(join::reset::guidance(&left, &dir.path))
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

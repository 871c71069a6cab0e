//! Founding and joining, cut at every step on the card and at every await: the next start with the same configuration finishes
//! or undoes what was begun.
//!
//! The whole server runs, on loopback and a card in memory; a *life* is a runtime of its own, so cutting it drops every task at
//! the await where it stands, as `kill -9` does. What the card keeps of it is decided by the power cut.
//!
//! Every cut is a founding or a join of its own, and there are hundreds: each run makes every third, begun by chance, and
//! `make cuts` makes all.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::apply;
use crate::command::Command;
use crate::config::{Host, Loaded, Paths, Problems, Request, Source, resolve};
use crate::env::{BoxFuture, Disk, DiskFile, Open, host};
use crate::join::{AuthorityHash, Identity, token};
use crate::observe::repeat::Repeats;
use crate::proto::etcdserverpb as pb;
use crate::systemd::Phases;
use crate::testkit::disk::{Fate, Fault, Operation, random};
use crate::testkit::{FaultDisk, Random, SeededEntropy};

const DIR: &str = "/db";
const SECRET: &str = "correct-horse-battery";

/// Longest time that a life may take to settle, on a loaded machine.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// How often a life looks whether the power went.
const LOOK: Duration = Duration::from_millis(1);

// ---- The card: counts the steps that change it, and ends at one of them. ----

/// One step: what was done to which file. What is done again and again to one file, as when a slot is filled, is one step.
type Step = (Operation, PathBuf);

#[derive(Default)]
struct Taken {
    steps: Vec<Step>,
    cut_at: Option<usize>,
}

/// A card whose power goes at a certain step, as one life sees it: threads that outlive their life by a moment reach nothing.
#[derive(Clone)]
struct Card {
    disk: FaultDisk,
    taken: Arc<Mutex<Taken>>,
    over: Arc<AtomicBool>,
}

/// Free space that no ballast is made of: it would be most of the work.
const FREE_BYTES: u64 = 64 << 20;

impl Card {
    fn new(disk: FaultDisk) -> Self {
        Self { disk, taken: Arc::default(), over: Arc::default() }
    }

    /// For the next life.
    fn mount(&mut self) -> Self {
        self.over.store(true, Ordering::Relaxed);
        self.over = Arc::default();
        self.clone()
    }

    fn is_there(&self) -> io::Result<&FaultDisk> {
        if self.over.load(Ordering::Relaxed) {
            return Err(io::Error::other("this life is over"));
        }
        Ok(&self.disk)
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on steps are counted anew; the power goes at this one.
    fn arm(&self, cut_at: Option<usize>) {
        *self.taken() = Taken { steps: Vec::new(), cut_at };
    }

    fn steps(&self) -> Vec<Step> {
        self.taken().steps.clone()
    }

    fn step(&self, operation: Operation, path: &Path) {
        // Made beside everything else, bit by bit: their steps come at any time.
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let aside = name == "ballast" || name.ends_with(".wal") && name != "slot-00.wal";
        let mut taken = self.taken();
        let step = (operation, path.to_owned());
        let over = self.over.load(Ordering::Relaxed);
        if aside || over || taken.steps.last() == Some(&step) {
            return;
        }
        taken.steps.push(step);
        if taken.cut_at == Some(taken.steps.len()) {
            self.disk.fail(Fault::power_loss(1));
        }
    }
}

#[derive(Debug)]
struct CardFile {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    card: Card,
}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Card")
    }
}

impl Disk for Card {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.is_there()?.open(path, how)?;
        Ok(Arc::new(CardFile { file, path: path.to_owned(), card: self.clone() }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.is_there()?.list(dir)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.step(Operation::CreateDir, dir);
        self.is_there()?.create_dir_all(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(Operation::Rename, to);
        self.is_there()?.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(Operation::Remove, path);
        self.is_there()?.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step(Operation::SyncDir, dir);
        self.is_there()?.sync_dir(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.is_there()?.exists(path)
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        self.is_there().map(|_| FREE_BYTES)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        Disk::lock(self.is_there()?, path)
    }
}

impl DiskFile for CardFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }

    fn read_uncached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_uncached_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.card.step(Operation::Write, &self.path);
        self.file.write_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.card.step(Operation::SetLen, &self.path);
        self.file.set_len(len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        self.card.step(Operation::Sync, &self.path);
        // A real one takes time, so that somebody may be cut while he waits.
        let mut waited = false;
        let wait = std::future::poll_fn(move |context| {
            if std::mem::replace(&mut waited, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        });
        Box::pin(async move {
            wait.await;
            self.file.sync().await
        })
    }
}

// ---- A server: a card, an address, a configuration. ----

/// Addresses of their own for everything that runs at once.
fn street() -> [u8; 2] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(37) + NEXT.fetch_add(1, Ordering::Relaxed);
    let [.., high, low] = (number % (200 * 250)).to_be_bytes();
    [high % 200 + 10, low]
}

struct Server {
    card: Card,
    loaded: Loaded,
    seed: u64,
    /// How often the last life was polled.
    polls: Arc<AtomicUsize>,
}

impl Server {
    fn new(disk: FaultDisk, [high, low]: [u8; 2], number: u8, lines: &str) -> Self {
        let address = Ipv4Addr::new(127, high, low, number);
        let text = format!(
            "node-name: pi-{number}\nnode-ip: {address}\ndb-dir: {DIR}\ntoken: {SECRET}\n\
             client-listen: {address}:2379\npeer-listen: {address}:2380\n\
             metrics-listen: {address}:2381\n{lines}"
        );
        let request = Request {
            command_line: Vec::new(),
            environment: BTreeMap::new(),
            host: Host {
                name: Some(format!("pi-{number}")),
                address: Some(address.into()),
                token_credential: None,
            },
            paths: Paths::default(),
        };
        let source =
            Source { name: "config.yaml".to_owned(), bytes: text.into_bytes(), mode: 0o600 };
        let loaded = resolve(&[source], Problems::default(), &request).unwrap();
        let seed = u64::from(number);
        Self { card: Card::new(disk), loaded, seed, polls: Arc::default() }
    }

    fn founder(disk: FaultDisk, street: [u8; 2]) -> Self {
        Self::new(disk, street, 1, "cluster-init: true\n")
    }

    fn joiner(street: [u8; 2]) -> Self {
        let [high, low] = street;
        let disk = FaultDisk::with_dir(Path::new(DIR));
        Self::new(disk, street, 2, &format!("server: https://127.{high}.{low}.1:6443\n"))
    }

    fn env(&mut self) -> Env {
        self.seed += 1_000;
        let entropy = Arc::new(SeededEntropy::new(self.seed));
        Env { disk: Arc::new(self.card.mount()), clock: host::env().clock, entropy }
    }

    /// Runs until the last step is taken, in lives as many as the server itself asks for.
    async fn settled(&self, env: &Env) -> Result<Running, RunError> {
        loop {
            let (notifier, phases) = (Notifier::silent(), Phases::new(None));
            let repeats = Repeats::new(Arc::clone(&env.clock));
            let stage = Stage::new(&self.loaded, env.clone(), notifier, phases, repeats)?;
            let begun = begin(&self.loaded.config, &stage).await;
            let lived = match begun {
                Ok((running, unsettled)) => match unsettled.settling.settle().await {
                    Ok(()) => return Ok(running),
                    Err(error) => {
                        stop(running).await?;
                        error
                    }
                },
                Err(error) => error,
            };
            if !matches!(lived, RunError::StartOver) {
                return Err(lived);
            }
        }
    }

    /// A life that is cut at a step, or after so many polls. False if it settled before.
    fn cut(&mut self, cut: Cut) -> bool {
        let env = self.env();
        self.card.arm(if let Cut::Step(step) = cut { Some(step) } else { None });
        let runtime = runtime();
        let settled = runtime.block_on(async {
            let mut life: Pin<Box<dyn Future<Output = _>>> = Box::pin(self.settled(&env));
            // Polled when it was woken, and not when somebody looks at the card.
            let mut lives = FuturesUnordered::new();
            let polls = Arc::clone(&self.polls);
            polls.store(0, Ordering::Relaxed);
            lives.push(std::future::poll_fn(move |context| {
                let polled = polls.fetch_add(1, Ordering::Relaxed) + 1;
                if cut == Cut::Poll(polled) {
                    return Poll::Ready(None);
                }
                life.as_mut().poll(context).map(Some)
            }));
            let no_power = async {
                while !self.card.disk.has_failed() {
                    tokio::time::sleep(LOOK).await;
                }
            };
            tokio::select! {
                biased;
                () = no_power => false,
                lived = lives.next() => match lived.unwrap() {
                    Some(Ok(_running)) => !self.card.disk.has_failed(),
                    Some(Err(error)) => {
                        assert!(self.card.disk.has_failed(), "{cut:?}: {error}");
                        false
                    }
                    None => false,
                },
            }
        });
        runtime.shutdown_background();
        settled
    }

    /// What is found after a crash.
    fn crash(&self, fate: u64) {
        match fate {
            LOST => self.card.disk.power_cut(|_| Fate::LOST),
            KEPT => self.card.disk.power_cut(|_| Fate::KEPT),
            // The process alone is gone; a step that lost its power is none of these.
            _ if fate.is_multiple_of(4) && !self.card.disk.has_failed() => self.card.disk.restart(),
            _ => self.card.disk.power_cut(random(Random::new(fate))),
        }
        self.card.arm(None);
    }

    fn identity(&self) -> Option<Identity> {
        let env = Env { disk: Arc::new(self.card.disk.clone()), ..host::env() };
        Identity::load(&env, Path::new(DIR)).unwrap()
    }

    /// Nothing of the way here is left, and what is there belongs together.
    fn check_files(&self) {
        let env = Env { disk: Arc::new(self.card.disk.clone()), ..host::env() };
        for path in self.card.disk.files() {
            let name = path.file_name().unwrap().to_str().unwrap();
            let left = name.ends_with(".new") || name == "joining";
            assert!(!left, "{} is left", path.display());
        }
        let identity = self.identity().unwrap();
        assert_eq!(identity.phase, Phase::Member);
        let authority = self.card.disk.content(&Path::new(DIR).join("tls/ca.crt")).unwrap();
        let kept = token::load(&env, Path::new(DIR)).unwrap().unwrap();
        assert_eq!(kept.authority, Some(AuthorityHash::of(&authority)));
    }
}

/// Where a life is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Step(usize),
    Poll(usize),
    Never,
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// One voter for each name, nobody on the way, and a record of nobody else. A node hears of its members a moment after they are.
async fn check_cluster(node: &Node, names: &[&str]) {
    let mut status = node.watch_status();
    let all_vote = status.wait_for(|status| {
        let members = &status.members;
        members.len() == names.len() && members.iter().all(|member| !member.learner)
    });
    drop(tokio::time::timeout(SETTLED_WITHIN, all_vote).await);
    let members = node.status().members;
    let mut found: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
    found.sort_unstable();
    assert_eq!(found, names, "{members:?}");
    assert!(members.iter().all(|member| !member.learner), "{members:?}");
    let view = node.store().read().unwrap();
    assert!(apply::flags(&view).unwrap().is_some());
    for (id, record) in apply::nodes(&view).unwrap() {
        let is_member = members.iter().any(|member| member.id == id);
        assert!(is_member != record.retired, "node {id}: {record:?}, {members:?}");
    }
}

async fn write(node: &Node, key: &str) -> Result<(), String> {
    let deadline = node.env().clock.now() + Duration::from_secs(20);
    let put = pb::PutRequest { key: key.to_owned().into(), ..pb::PutRequest::default() };
    let outcome = node.propose(Command::Put(put), deadline).await;
    outcome.map_err(|error| error.to_string())?.reply.map(|_| ()).map_err(|no| format!("{no:?}"))
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let Ok(done) = tokio::time::timeout(SETTLED_WITHIN, future).await else {
        panic!("{what}: not within {SETTLED_WITHIN:?}")
    };
    done
}

/// A founder that was cut is started again: it is the same one, alone, and serves.
fn founded_after(server: &mut Server, cut: Cut) {
    let before = server.identity();
    let env = server.env();
    let runtime = runtime();
    runtime.block_on(async {
        let running = within(&format!("{cut:?}"), server.settled(&env)).await;
        let running = running.unwrap_or_else(|error| panic!("{cut:?}: {error}"));
        check_cluster(&running.node, &["pi-1"]).await;
        write(&running.node, "founded").await.unwrap();
        stop(running).await.unwrap();
    });
    runtime.shutdown_background();
    server.check_files();
    let after = server.identity().unwrap();
    if let Some(before) = before {
        let ids = |identity: Identity| (identity.cluster, identity.node);
        assert_eq!(ids(before), ids(after), "{cut:?}: what was on the card is kept");
        assert!(before.epoch < after.epoch, "{cut:?}: no start is counted twice");
    }
}

/// Cuts a founding, and starts it again. False if it had settled before.
fn founding(street: [u8; 2], cut: Cut, fate: u64) -> bool {
    let mut server = Server::founder(FaultDisk::with_dir(Path::new(DIR)), street);
    let settled = server.cut(cut);
    server.crash(fate);
    founded_after(&mut server, cut);
    !settled
}

/// A cluster of one that runs, from a card on which it was founded.
struct Founder {
    runtime: Option<Runtime>,
    running: Running,
}

impl Founder {
    fn start(image: &FaultDisk, street: [u8; 2]) -> Self {
        let mut server = Server::founder(image.fork(), street);
        let env = server.env();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let running = runtime.block_on(within("founder", server.settled(&env)));
        Self { runtime: Some(runtime), running: running.unwrap() }
    }
}

impl Drop for Founder {
    fn drop(&mut self) {
        // Until every task is gone, and with it every port.
        self.runtime.take().unwrap().shutdown_timeout(SETTLED_WITHIN);
    }
}

/// Cuts a join, and starts it again: the same card has one vote, or would still have none. False if it had settled before.
fn joining(image: &FaultDisk, street: [u8; 2], cut: Cut, fate: u64) -> bool {
    let founder = Founder::start(image, street);
    let mut joiner = Server::joiner(street);
    let settled = joiner.cut(cut);
    joiner.crash(fate);
    let before = joiner.identity();
    let env = joiner.env();
    let runtime = runtime();
    runtime.block_on(async {
        let running = within(&format!("{cut:?}"), joiner.settled(&env)).await;
        let running = running.unwrap_or_else(|error| panic!("{cut:?}: {error}"));
        check_cluster(&running.node, &["pi-1", "pi-2"]).await;
        check_cluster(&founder.running.node, &["pi-1", "pi-2"]).await;
        write(&running.node, "joined").await.unwrap();
        assert_eq!(running.node.status().cluster, founder.running.node.status().cluster);
    });
    runtime.shutdown_background();
    joiner.card.disk.restart();
    joiner.check_files();
    let after = joiner.identity().unwrap();
    if let Some(before) = before {
        assert_eq!(before.node, after.node, "{cut:?}: who it was to be is kept");
        assert!(before.epoch < after.epoch, "{cut:?}: no start is counted twice");
    }
    !settled
}

/// A card on which a cluster was founded, and the steps of founding it.
fn founded() -> (FaultDisk, Vec<Step>) {
    let mut server = Server::founder(FaultDisk::with_dir(Path::new(DIR)), street());
    assert!(server.cut(Cut::Never));
    let steps = server.card.steps();
    server.crash(KEPT);
    founded_after(&mut server, Cut::Never);
    (server.card.disk, steps)
}

/// What power cuts leave: see [`Server::crash`].
const LOST: u64 = 0;
const KEPT: u64 = 1;

/// Every third, or all of them if `$CUT_ALL` is set.
fn share(mut cuts: Vec<(Cut, u64)>, random: &mut Random) -> Vec<(Cut, u64)> {
    if std::env::var_os("CUT_ALL").is_none() {
        let mut at = random.index(3);
        cuts.retain(|_| {
            at += 1;
            at.is_multiple_of(3)
        });
    }
    cuts
}

/// Works through cuts with two threads; each has addresses of its own.
fn all(cuts: &[(Cut, u64)], one: impl Fn([u8; 2], Cut, u64) -> bool + Sync) -> usize {
    let (left, struck) = (Mutex::new(cuts.iter().copied()), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let street = street();
                loop {
                    let next = left.lock().unwrap().next();
                    let Some((cut, fate)) = next else { return };
                    if one(street, cut, fate) {
                        struck.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    struck.into_inner()
}

/// Chance of a run; printed, and taken again from the environment.
fn chance() -> Random {
    let seed = std::env::var("CUT_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| host::env().entropy.next_u64() >> 16);
    println!("CUT_SEED={seed}");
    Random::new(seed)
}

/// A cut at every step; every other time with the worst that a power cut can leave, else with something by chance.
fn steps(count: usize, random: &mut Random) -> Vec<(Cut, u64)> {
    let mut fate = || if random.percent(50) { LOST } else { random.next_u64() };
    (1..=count).map(|step| (Cut::Step(step), fate())).collect()
}

/// How many polls a life of a settled server had; not the same every time.
fn polls(server: &Server) -> usize {
    server.polls.load(Ordering::Relaxed)
}

#[test]
fn init_crashed_at_every_durable_step_is_finished_by_the_next_start() {
    let mut random = chance();
    let (_, taken) = founded();
    assert!(60 < taken.len(), "{taken:?}");
    let cuts = share(steps(taken.len(), &mut random), &mut random);
    let struck = all(&cuts, founding);
    println!("{} steps, {struck} of {} cuts", taken.len(), cuts.len());
    assert!(cuts.len() * 9 / 10 <= struck, "{struck} of {}", cuts.len());
}

#[test]
fn init_crashed_at_every_await_is_finished_by_the_next_start() {
    let mut random = chance();
    let mut server = Server::founder(FaultDisk::with_dir(Path::new(DIR)), street());
    assert!(server.cut(Cut::Never));
    let most = polls(&server);
    let cuts: Vec<_> = (1..=most).map(|poll| (Cut::Poll(poll), random.next_u64())).collect();
    let cuts = share(cuts, &mut random);
    let struck = all(&cuts, founding);
    println!("{most} polls, {struck} of {} cuts", cuts.len());
    assert!(5 < most && cuts.len() / 2 <= struck, "{struck} of {}", cuts.len());
}

#[test]
fn join_crashed_at_every_durable_step_is_finished_or_undone_by_the_next_start() {
    let mut random = chance();
    let (image, _) = founded();
    let street = street();
    let founder = Founder::start(&image, street);
    let mut joiner = Server::joiner(street);
    assert!(joiner.cut(Cut::Never));
    let taken = joiner.card.steps();
    drop(founder);
    assert!(60 < taken.len(), "{taken:?}");
    let cuts = share(steps(taken.len(), &mut random), &mut random);
    let struck = all(&cuts, |street, cut, fate| joining(&image, street, cut, fate));
    println!("{} steps, {struck} of {} cuts", taken.len(), cuts.len());
    assert!(cuts.len() * 9 / 10 <= struck, "{struck} of {}", cuts.len());
}

#[test]
fn join_crashed_at_every_await_is_finished_or_undone_by_the_next_start() {
    /// About forty times a join is woken; more only if the machine is slow.
    const CUTS: usize = 80;
    let mut random = chance();
    let (image, _) = founded();
    let street = street();
    let founder = Founder::start(&image, street);
    let mut joiner = Server::joiner(street);
    assert!(joiner.cut(Cut::Never));
    drop(founder);
    let most = polls(&joiner);
    let mut at: Vec<usize> = (1..=most).collect();
    while CUTS < at.len() {
        at.swap_remove(random.index(at.len()));
    }
    let cuts = at.into_iter().map(|poll| (Cut::Poll(poll), random.next_u64())).collect();
    let cuts = share(cuts, &mut random);
    let struck = all(&cuts, |street, cut, fate| joining(&image, street, cut, fate));
    println!("{most} polls, {struck} of {} cuts", cuts.len());
    assert!(5 < most && 0 < struck, "{struck} of {most}");
}

//! Keeps a connection to one node, made when it is needed and made again when it ends.
//!
//! # Invariants
//!
//! - At most one attempt at a time per lane, shared by everyone who waits for it. It goes on when they give up.
//! - Between failed attempts there is a pause, except when there is news of where the node is.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, Shared as SharedFuture};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::address::{AddressBook, Location};
use super::dial::{self, Link, Miss, Own};
use super::traffic::Traffic;
use crate::env::Entropy;
use crate::pki::Pki;
use crate::raft::transport::CallError;
use crate::types::NodeId;

/// A place has this long to answer before the next one is tried beside it.
const HEAD_START: Duration = Duration::from_millis(250);

/// An attempt ends after this, whatever is still open.
const ATTEMPT_MAX: Duration = Duration::from_secs(12);

/// A host name has this long to become an address. mDNS for a name that nobody has takes as long as it is given.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Addresses taken of one name.
const ADDRESSES_PER_NAME_MAX: usize = 4;

/// The first pause after a failure, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How often the round trip is measured, and a changed address told.
const PROBE_INTERVAL: Duration = Duration::from_secs(15);

/// What a connection is for. Bulk never delays a heartbeat, because it has a connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Calls, and streams of entries.
    Calls,
    /// Snapshots.
    Bulk,
}

/// What all lanes share.
pub(super) struct Dialer {
    pub(super) pki: Pki,
    pub(super) entropy: Arc<dyn Entropy>,
    pub(super) own: Mutex<Arc<Own>>,
    /// Look-ups under way; a resolver that hangs cannot be cancelled.
    pub(super) resolving: Arc<Semaphore>,
}

impl Dialer {
    /// What we say of ourselves now.
    pub(super) fn own(&self) -> Arc<Own> {
        Arc::clone(&lock(&self.own))
    }
}

/// One other node.
pub(super) struct Peer {
    pub(super) node: NodeId,
    pub(super) book: Mutex<AddressBook>,
    pub(super) traffic: Arc<Traffic>,
    dialer: Arc<Dialer>,
    calls: Mutex<Lane>,
    bulk: Mutex<Lane>,
    /// There is news of where the node is.
    news: Notify,
}

type Dialing = SharedFuture<BoxFuture<'static, Result<Arc<Link>, CallError>>>;

#[derive(Default)]
struct Lane {
    state: State,
    /// Attempts that failed since the last connection.
    failures: u32,
}

#[derive(Default)]
enum State {
    #[default]
    Down,
    Dialing(Dialing),
    Up(Arc<Link>),
    /// Nobody wants a connection any more.
    Forgotten,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peer {
    pub(super) fn new(node: NodeId, dialer: Arc<Dialer>) -> Self {
        Self {
            node,
            book: Mutex::default(),
            traffic: Arc::default(),
            dialer,
            calls: Mutex::default(),
            bulk: Mutex::default(),
            news: Notify::new(),
        }
    }

    pub(super) fn own(&self) -> Arc<Own> {
        self.dialer.own()
    }

    fn lane(&self, purpose: Use) -> MutexGuard<'_, Lane> {
        lock(match purpose {
            Use::Calls => &self.calls,
            Use::Bulk => &self.bulk,
        })
    }

    /// A connection that has not ended as far as is known.
    pub(super) async fn link(self: &Arc<Self>, purpose: Use) -> Result<Arc<Link>, CallError> {
        let dialing = {
            let mut lane = self.lane(purpose);
            match &lane.state {
                State::Up(link) if !link.has_ended() => return Ok(Arc::clone(link)),
                State::Forgotten => return Err(self.unreachable("it was removed")),
                State::Dialing(dialing) => dialing.clone(),
                State::Up(_) | State::Down => {
                    let dialing = self.start(purpose, lane.failures);
                    lane.state = State::Dialing(dialing.clone());
                    dialing
                }
            }
        };
        dialing.await
    }

    /// Whether it was removed.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self.lane(Use::Calls).state, State::Forgotten)
    }

    /// Whether calls need not wait for a connection.
    pub(super) fn is_connected(&self) -> bool {
        matches!(&self.lane(Use::Calls).state, State::Up(link) if !link.has_ended())
    }

    /// Whether the last attempt to connect failed.
    pub(super) fn is_lost(&self) -> bool {
        let lane = self.lane(Use::Calls);
        0 < lane.failures && !matches!(lane.state, State::Forgotten)
    }

    /// Where the node may be has changed: what waits tries again now.
    pub(super) fn wake(&self) {
        self.news.notify_waiters();
    }

    /// Ends everything, for ever.
    pub(super) fn forget(&self) {
        for purpose in [Use::Calls, Use::Bulk] {
            let mut lane = self.lane(purpose);
            if let State::Up(link) = std::mem::replace(&mut lane.state, State::Forgotten) {
                link.cut();
            }
        }
        self.wake();
    }

    fn start(self: &Arc<Self>, purpose: Use, failures: u32) -> Dialing {
        let peer = Arc::clone(self);
        let pause = pause(failures, self.dialer.entropy.next_u64());
        let task = tokio::spawn(async move {
            tokio::select! {
                () = sleep(pause) => {}
                () = peer.news.notified() => {}
            }
            let dialed = timeout(ATTEMPT_MAX, peer.dial()).await;
            let dialed = dialed.unwrap_or_else(|_| Err(peer.unreachable("no answer in time")));
            peer.finished(purpose, dialed)
        });
        let stopped = self.unreachable("this process is stopping");
        async move { task.await.unwrap_or(Err(stopped)) }.boxed().shared()
    }

    /// Takes the outcome of an attempt over into the lane.
    fn finished(
        self: &Arc<Self>,
        purpose: Use,
        dialed: Result<Link, CallError>,
    ) -> Result<Arc<Link>, CallError> {
        let mut lane = self.lane(purpose);
        if matches!(lane.state, State::Forgotten) {
            return Err(self.unreachable("it was removed"));
        }
        match dialed {
            Ok(link) => {
                let (link, failures) = (Arc::new(link), std::mem::take(&mut lane.failures));
                lane.state = State::Up(Arc::clone(&link));
                if purpose == Use::Calls {
                    let (name, address, version) = (self.name(), link.address, link.version);
                    tracing::info!(node = %self.node, %address, failures, version, "connected to {name}");
                    tokio::spawn(probe(Arc::downgrade(self), Arc::downgrade(&link)));
                }
                Ok(link)
            }
            Err(error) => {
                lane.failures = lane.failures.saturating_add(1);
                lane.state = State::Down;
                // Once per loss: the next attempts fail for the same reason, every two seconds.
                if lane.failures == 1 && purpose == Use::Calls {
                    tracing::warn!(node = %self.node, %error, "{} cannot be reached", self.name());
                } else {
                    tracing::debug!(node = %self.node, %error, "{} cannot be reached", self.name());
                }
                Err(error)
            }
        }
    }

    fn name(&self) -> String {
        let name = lock(&self.book).name().to_owned();
        if name.is_empty() { format!("node {}", self.node) } else { name }
    }

    fn unreachable(&self, why: &str) -> CallError {
        CallError::Unreachable(format!("{}: {why}", self.name()))
    }

    /// Tries one place after the other, each with a head start over the next; the first that proves to be the node wins.
    async fn dial(&self) -> Result<Link, CallError> {
        let config = self.dialer.pki.call_peer(self.node);
        let config = config.map_err(|error| self.unreachable(&error.to_string()))?;
        let own = self.own();
        let mut waiting: VecDeque<Location> = lock(&self.book).candidates().into();
        let (mut racing, mut tried) = (FuturesUnordered::new(), HashSet::new());
        let mut misses = Vec::new();
        let mut next_start = Instant::now();
        loop {
            tokio::select! {
                () = sleep_until(next_start), if !waiting.is_empty() => {
                    let Some(location) = waiting.pop_front() else { continue };
                    if let Location::Address(address) = location && !tried.insert(address) {
                        continue;
                    }
                    next_start = Instant::now() + HEAD_START;
                    let (config, own) = (Arc::clone(&config), Arc::clone(&own));
                    racing.push(self.try_one(location, config, own));
                }
                Some(outcome) = racing.next(), if !racing.is_empty() => match outcome {
                    Tried::Reached(link) => {
                        lock(&self.book).found(link.address);
                        return Ok(link);
                    }
                    Tried::Resolved(addresses) => {
                        next_start = Instant::now();
                        for address in addresses.into_iter().rev() {
                            waiting.push_front(Location::Address(address));
                        }
                    }
                    Tried::Missed(_, Miss::Refused(refused)) => return Err(refused.into()),
                    Tried::Missed(location, miss) => {
                        next_start = Instant::now();
                        self.note(&location, &miss);
                        misses.push(format!("{location}: {miss}"));
                    }
                },
                else => break,
            }
        }
        if misses.is_empty() {
            misses.push("no address is known".to_owned());
        }
        Err(self.unreachable(&misses.join("; ")))
    }

    async fn try_one(
        &self,
        location: Location,
        config: Arc<rustls::ClientConfig>,
        own: Arc<Own>,
    ) -> Tried {
        match location {
            Location::Address(address) => {
                match dial::connect(address, config, &own, &self.traffic).await {
                    Ok(link) => Tried::Reached(link),
                    Err(miss) => Tried::Missed(location, miss),
                }
            }
            Location::Name(ref host, port) => match self.resolve(host, port).await {
                Ok(addresses) => Tried::Resolved(addresses),
                Err(error) => Tried::Missed(location, Miss::Failed(error)),
            },
        }
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        let Ok(permit) = Arc::clone(&self.dialer.resolving).try_acquire_owned() else {
            return Err("too many names are being looked up".to_owned());
        };
        let host = host.to_owned();
        let looking_up = tokio::spawn(async move {
            let found = tokio::net::lookup_host((host, port)).await;
            // Kept until the resolver has come back, however long nobody waits any more.
            drop(permit);
            found.map(|addresses| addresses.take(ADDRESSES_PER_NAME_MAX).collect::<Vec<_>>())
        });
        match timeout(RESOLVE_TIMEOUT, looking_up).await {
            Ok(Ok(Ok(addresses))) => Ok(addresses),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the name was not resolved in time".to_owned()),
        }
    }

    /// Remembers who was there instead, and says so once.
    fn note(&self, location: &Location, miss: &Miss) {
        if let (Location::Address(address), Miss::Stranger(who)) = (location, miss) {
            self.traffic.stranger();
            if lock(&self.book).stranger(*address, who) {
                let name = self.name();
                tracing::info!(node = %self.node, %address, "{name} is not at {address}: that is {who}");
            }
        }
    }
}

/// What came of trying one place.
enum Tried {
    Reached(Link),
    Resolved(Vec<SocketAddr>),
    Missed(Location, Miss),
}

/// Greets now and then for as long as the connection is used.
async fn probe(peer: Weak<Peer>, link: Weak<Link>) {
    loop {
        sleep(PROBE_INTERVAL).await;
        let (Some(peer), Some(link)) = (peer.upgrade(), link.upgrade()) else { return };
        if link.has_ended() {
            return;
        }
        match timeout(PROBE_INTERVAL, link.greet(&peer.own())).await {
            Ok(Ok(took)) => peer.traffic.round_trip(took),
            Ok(Err(miss)) => tracing::debug!(node = %peer.node, %miss, "probe failed"),
            Err(_) => tracing::debug!(node = %peer.node, "probe had no answer in time"),
        }
    }
}

/// How long to wait after so many failures: doubling, and between half and the whole of it by chance, so that nodes
/// that lost each other at the same moment do not come back at the same moment.
fn pause(failures: u32, chance: u64) -> Duration {
    let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
    let whole = PAUSE_MIN.saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX));
    let half = whole.min(PAUSE_MAX) / 2;
    let micros = u64::try_from(half.as_micros()).unwrap_or(u64::MAX);
    half + Duration::from_micros(chance % micros.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_two_seconds_and_never_come_in_step() {
        assert_eq!(pause(0, u64::MAX), Duration::ZERO);
        for (failures, whole) in [(1, 100), (2, 200), (5, 1_600), (6, 2_000), (u32::MAX, 2_000)] {
            let whole = Duration::from_millis(whole);
            let pauses: HashSet<_> = (0..50).map(|seed| pause(failures, seed * 7_919)).collect();
            assert!(pauses.iter().all(|pause| (whole / 2..=whole).contains(pause)), "{pauses:?}");
            assert!(40 < pauses.len());
        }
    }
}

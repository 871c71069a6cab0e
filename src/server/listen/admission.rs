//! Counts open connections and decides whether one more may come in.
//!
//! Pure bookkeeping: no sockets, and time is an argument. Who has not proved anything yet is counted apart from who has, so that
//! strangers compete with strangers only. Loopback is exempt from what counts per address, because everything on this node
//! comes from one address: the API server alone opens a hundred connections.
//!
//! # Invariants
//!
//! - An established connection never makes room for another one, and no number of unfinished handshakes takes its place; except where
//!   nobody proves anything by a handshake ([`Caps::yields_after`]): there the network that holds most places gives one back, its oldest.
//! - When too many handshakes are open, the oldest ends and the newest may try: whoever is quick gets in, even while
//!   others do nothing but open connections.
//! - Memory is bounded by the caps.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// Most connections at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Established ones, in all.
    pub total: usize,
    /// Established ones from one address, loopback excepted.
    pub per_address: usize,
    /// Still in the handshake, in all.
    pub handshakes: usize,
    /// Still in the handshake, from one address, loopback excepted: idle connections must not lock others out.
    pub handshakes_per_address: usize,
    /// For callers who have proved nothing: an IPv6 network of the size that one household gets counts as one address, and when all
    /// places are taken, a connection this old makes room for a new one.
    pub yields_after: Option<Duration>,
}

impl Caps {
    /// For the etcd API: more than any cluster of Pis needs, and well below the descriptor limit.
    pub const CLIENTS: Self = Self {
        total: 2_048,
        per_address: 512,
        handshakes: 512,
        handshakes_per_address: 32,
        yields_after: None,
    };
    /// For peers: a budget of their own, so clients cannot use it up.
    pub const PEERS: Self = Self {
        total: 256,
        per_address: 64,
        handshakes: 128,
        handshakes_per_address: 16,
        yields_after: None,
    };
    /// For nodes that have only a token. They need one connection each, for a second or two.
    pub const JOINERS: Self = Self {
        total: 16,
        per_address: 4,
        handshakes: 16,
        handshakes_per_address: 4,
        yields_after: Some(Duration::from_secs(5)),
    };
    /// For metrics and health.
    pub const OBSERVERS: Self = Self {
        total: 64,
        per_address: 16,
        handshakes: 64,
        handshakes_per_address: 16,
        yields_after: None,
    };
}

/// Handshakes that one address may fail before it has to wait, and how soon it may fail another one. A handshake costs
/// this node a signature; those that succeed are not counted.
const FAILURES_MAX: u32 = 64;
const FAILURE_FORGIVEN: Duration = Duration::from_millis(125);

/// Addresses share this many counters by chance: no caller can make the table grow.
const BUCKETS: usize = 512;

/// The connections of one port. Clones share the counts.
#[derive(Clone, Debug)]
pub struct Admission {
    caps: Caps,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug)]
struct Counts {
    established: usize,
    by_address: HashMap<IpAddr, OfAddress>,
    /// Open handshakes in the order in which they began, and how to end them.
    handshakes: BTreeMap<u64, oneshot::Sender<()>>,
    next_handshake: u64,
    /// Established connections that may have to go, in the order in which they began.
    yielding: BTreeMap<u64, Yielding>,
    failures: Failures,
}

/// An established connection that has proved nothing.
#[derive(Debug)]
struct Yielding {
    address: IpAddr,
    since: Instant,
    end: oneshot::Sender<()>,
}

/// One address's share. Absent from the map when it has no connection, so the map is as small as the caps.
#[derive(Clone, Copy, Debug, Default)]
struct OfAddress {
    established: usize,
    handshakes: usize,
}

/// The right to be connected. Given back when dropped.
#[derive(Debug)]
#[must_use = "the connection's place is given back when this is dropped"]
pub struct Place {
    admission: Admission,
    address: IpAddr,
    /// Numbers are given in the order of coming.
    number: u64,
    /// Whether the handshake goes on.
    shakes_hands: bool,
    pushed_out: Option<oneshot::Receiver<()>>,
}

impl Admission {
    /// Nobody is connected.
    pub fn new(caps: Caps) -> Self {
        let counts = Counts {
            established: 0,
            by_address: HashMap::new(),
            handshakes: BTreeMap::new(),
            next_handshake: 0,
            yielding: BTreeMap::new(),
            failures: Failures::default(),
        };
        Self { caps, counts: Arc::new(Mutex::new(counts)) }
    }

    /// A place for one more connection, which begins with a handshake, if there is one.
    pub fn enter(&self, address: IpAddr, now: Instant) -> Option<Place> {
        // An IPv4 caller on an IPv6 socket is the same caller.
        let address = self.caps.counted(address.to_canonical());
        let mut counts = self.lock();
        let of_address = counts.by_address.get(&address).copied().unwrap_or_default();
        if self.caps.total <= counts.established && !counts.can_yield(self.caps, now) {
            return None;
        }
        if !address.is_loopback()
            && (self.caps.per_address <= of_address.established
                || self.caps.handshakes_per_address <= of_address.handshakes
                || !counts.failures.may_try(address, now))
        {
            return None;
        }
        if self.caps.handshakes <= counts.handshakes.len()
            && let Some((_, oldest)) = counts.handshakes.pop_first()
        {
            // A task that is not there to hear it has ended anyway.
            oldest.send(()).ok();
        }
        let (sender, pushed_out) = oneshot::channel();
        let number = counts.next_handshake;
        counts.next_handshake += 1;
        counts.handshakes.insert(number, sender);
        counts.by_address.entry(address).or_default().handshakes += 1;
        drop(counts);
        let admission = self.clone();
        let pushed_out = Some(pushed_out);
        Some(Place { admission, address, number, shakes_hands: true, pushed_out })
    }

    /// Connections open now, those in the handshake included.
    pub fn open(&self) -> usize {
        let counts = self.lock();
        counts.established + counts.handshakes.len()
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Completes when this handshake, or this connection, has to make room for another one.
    pub fn pushed_out(&mut self) -> impl Future<Output = ()> + Send + 'static {
        let pushed_out = self.pushed_out.take();
        async move {
            let told = match pushed_out {
                Some(receiver) => receiver.await.is_ok(),
                None => false,
            };
            if !told {
                // The handshake has ended before, one way or the other.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The handshake is over and went well. False if everything is full meanwhile.
    #[must_use]
    pub fn established(&mut self, now: Instant) -> bool {
        if !self.shakes_hands {
            return true;
        }
        let caps = self.admission.caps;
        let mut counts = self.admission.lock();
        let counts = &mut *counts;
        counts.failures.succeeded(self.address);
        let own = counts.by_address.get(&self.address).copied().unwrap_or_default();
        if caps.per_address <= own.established && !self.address.is_loopback() {
            return false;
        }
        if caps.total <= counts.established && !counts.make_room(caps, now) {
            return false;
        }
        self.shakes_hands = false;
        counts.handshakes.remove(&self.number);
        counts.established += 1;
        let of_address = counts.by_address.entry(self.address).or_default();
        of_address.handshakes = of_address.handshakes.saturating_sub(1);
        of_address.established += 1;
        if caps.yields_after.is_some() {
            let (end, pushed_out) = oneshot::channel();
            self.pushed_out = Some(pushed_out);
            counts
                .yielding
                .insert(self.number, Yielding { address: self.address, since: now, end });
        }
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.admission.lock();
        let counts = &mut *counts;
        if self.shakes_hands {
            counts.handshakes.remove(&self.number);
            counts.left(self.address, |of_address| &mut of_address.handshakes);
        } else if self.admission.caps.yields_after.is_none()
            || counts.yielding.remove(&self.number).is_some()
        {
            counts.established -= 1;
            counts.left(self.address, |of_address| &mut of_address.established);
        }
    }
}

impl Caps {
    /// What connections are counted for.
    fn counted(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V6(six) if self.yields_after.is_some() && !six.is_loopback() => {
                IpAddr::V6((six.to_bits() >> 64 << 64).into())
            }
            IpAddr::V4(_) | IpAddr::V6(_) => address,
        }
    }
}

impl Counts {
    /// One of an address's connections or handshakes is over.
    fn left(&mut self, address: IpAddr, which: fn(&mut OfAddress) -> &mut usize) {
        let Some(of_address) = self.by_address.get_mut(&address) else { return };
        let count = which(of_address);
        *count = count.saturating_sub(1);
        if of_address.established + of_address.handshakes == 0 {
            self.by_address.remove(&address);
        }
    }

    /// Who has to go first: the oldest of whoever holds most, if it has had its time.
    fn first_to_go(&self, caps: Caps, now: Instant) -> Option<u64> {
        let old = caps.yields_after?;
        let had_its_time =
            |yielding: &Yielding| old <= now.saturating_duration_since(yielding.since);
        let holds = |address: &IpAddr| self.by_address.get(address).map_or(0, |of| of.established);
        let oldest = self.yielding.iter().filter(|(_, one)| had_its_time(one));
        oldest
            .max_by_key(|(number, one)| (holds(&one.address), std::cmp::Reverse(**number)))
            .map(|(number, _)| *number)
    }

    fn can_yield(&self, caps: Caps, now: Instant) -> bool {
        self.first_to_go(caps, now).is_some()
    }

    /// Ends a connection for a new one. Its place is free at once; the connection notices.
    fn make_room(&mut self, caps: Caps, now: Instant) -> bool {
        let Some(gone) = self.first_to_go(caps, now).and_then(|gone| self.yielding.remove(&gone))
        else {
            return false;
        };
        self.established -= 1;
        self.left(gone.address, |of_address| &mut of_address.established);
        // A connection that is not there to hear it has ended anyway.
        gone.end.send(()).ok();
        true
    }
}

/// How many handshakes addresses have begun and not finished well, lately: a leaky bucket for each.
#[derive(Debug)]
struct Failures {
    hasher: RandomState,
    buckets: Vec<Bucket>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    failures: u32,
    counted_at: Option<Instant>,
}

impl Default for Failures {
    fn default() -> Self {
        Self { hasher: RandomState::new(), buckets: vec![Bucket::default(); BUCKETS] }
    }
}

impl Failures {
    /// Counts the attempt as failed until [`Failures::succeeded`].
    fn may_try(&mut self, address: IpAddr, now: Instant) -> bool {
        let Some(bucket) = self.bucket(address) else { return true };
        if let Some(counted_at) = bucket.counted_at {
            let passed = now.saturating_duration_since(counted_at).as_millis();
            let forgiven = passed / FAILURE_FORGIVEN.as_millis();
            bucket.failures =
                bucket.failures.saturating_sub(forgiven.try_into().unwrap_or(u32::MAX));
            if 0 < forgiven {
                bucket.counted_at = Some(now);
            }
        } else {
            bucket.counted_at = Some(now);
        }
        if FAILURES_MAX <= bucket.failures {
            return false;
        }
        bucket.failures += 1;
        true
    }

    fn succeeded(&mut self, address: IpAddr) {
        if let Some(bucket) = self.bucket(address).filter(|_| !address.is_loopback()) {
            bucket.failures = bucket.failures.saturating_sub(1);
        }
    }

    /// A network of IPv6 counts as one address: everybody in it has as many as they like.
    fn bucket(&mut self, address: IpAddr) -> Option<&mut Bucket> {
        let network = match address {
            IpAddr::V4(address) => u64::from(address.to_bits()),
            IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
        };
        let index = self.hasher.hash_one(network) % (BUCKETS as u64);
        self.buckets.get_mut(usize::try_from(index).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps {
        total: 5,
        per_address: 3,
        handshakes: 4,
        handshakes_per_address: 2,
        yields_after: None,
    };

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn enter(admission: &Admission, from: &str) -> Option<Place> {
        admission.enter(address(from), Instant::now())
    }

    fn settled(admission: &Admission, from: &str) -> Option<Place> {
        let mut place = enter(admission, from)?;
        place.established(Instant::now()).then_some(place)
    }

    #[test]
    fn one_address_cannot_take_every_place() {
        let admission = Admission::new(CAPS);
        let places: Vec<_> = (0..3).map(|_| settled(&admission, "10.0.0.1").unwrap()).collect();
        assert!(enter(&admission, "10.0.0.1").is_none());
        assert!(enter(&admission, "::ffff:10.0.0.1").is_none(), "same caller over IPv6");
        assert!(settled(&admission, "10.0.0.2").is_some());
        drop(places);
        assert!(settled(&admission, "10.0.0.1").is_some());
    }

    #[test]
    fn stalled_handshakes_of_one_address_are_capped_before_its_connections_are() {
        let admission = Admission::new(CAPS);
        let mut first = enter(&admission, "10.0.0.1").unwrap();
        let _second = enter(&admission, "10.0.0.1").unwrap();
        assert!(enter(&admission, "10.0.0.1").is_none());
        assert!(first.established(Instant::now()));
        assert!(enter(&admission, "10.0.0.1").is_some());
    }

    #[tokio::test]
    async fn the_oldest_handshake_makes_room_for_the_newest() {
        let admission = Admission::new(CAPS);
        let mut places: Vec<_> = (0..4).map(|_| enter(&admission, "127.0.0.1").unwrap()).collect();
        let newest = enter(&admission, "10.0.0.9").unwrap();
        places.remove(0).pushed_out().await;
        let second = places[0].pushed_out();
        tokio::select! {
            biased;
            () = second => panic!("one had to go, not two"),
            () = tokio::task::yield_now() => {}
        }
        drop(newest);
        assert_eq!(admission.open(), 3);
    }

    #[test]
    fn open_handshakes_take_no_place_of_established_connections() {
        let admission = Admission::new(CAPS);
        let stalled: Vec<_> = (0..9).map(|_| enter(&admission, "127.0.0.1").unwrap()).collect();
        let members: Vec<_> = (0..5).map(|_| settled(&admission, "127.0.0.1").unwrap()).collect();
        assert!(enter(&admission, "127.0.0.1").is_none(), "the port is full");
        drop((stalled, members));
        assert_eq!(admission.open(), 0);
    }

    #[test]
    fn a_handshake_that_ends_when_all_places_are_taken_gets_none() {
        let admission = Admission::new(CAPS);
        let mut late = enter(&admission, "127.0.0.1").unwrap();
        let _members: Vec<_> = (0..5).map(|_| settled(&admission, "127.0.0.1").unwrap()).collect();
        assert!(!late.established(Instant::now()));
        drop(late);
        assert_eq!(admission.open(), 5);
    }

    #[test]
    fn an_address_that_keeps_failing_has_to_wait_and_one_that_succeeds_does_not() {
        let admission = Admission::new(CAPS);
        let mut now = Instant::now();
        for _ in 0..FAILURES_MAX {
            assert!(admission.enter(address("10.0.0.1"), now).is_some());
        }
        assert!(admission.enter(address("10.0.0.1"), now).is_none());
        assert!(admission.enter(address("127.0.0.1"), now).is_some(), "loopback is exempt");
        now += FAILURE_FORGIVEN;
        assert!(admission.enter(address("10.0.0.1"), now).is_some());
        assert!(admission.enter(address("10.0.0.1"), now).is_none());

        let admission = Admission::new(CAPS);
        for _ in 0..4 * FAILURES_MAX {
            let mut place = admission.enter(address("10.0.0.1"), now).unwrap();
            assert!(place.established(now));
        }
    }

    #[test]
    fn one_ipv6_network_counts_as_one_address() {
        let admission = Admission::new(CAPS);
        let now = Instant::now();
        for host in 0..FAILURES_MAX {
            let from = address(&format!("2001:db8:1:2::{host:x}"));
            assert!(admission.enter(from, now).is_some());
        }
        assert!(admission.enter(address("2001:db8:1:2:ffff::1"), now).is_none());
    }

    fn held(admission: &Admission, from: &str, now: Instant) -> Option<Place> {
        let mut place = admission.enter(address(from), now)?;
        place.established(now).then_some(place)
    }

    async fn has_to_go(place: &mut Place) -> bool {
        let pushed_out = place.pushed_out();
        tokio::time::timeout(Duration::ZERO, pushed_out).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn newcomers_that_stay_make_room_for_new_ones_whoever_holds_most_first() {
        let caps = Caps { yields_after: Some(Duration::from_secs(5)), ..CAPS };
        let (admission, start) = (Admission::new(caps), Instant::now());
        let one = held(&admission, "10.0.0.1", start).unwrap();
        let mut many: Vec<_> =
            (0..3).map(|_| held(&admission, "10.0.0.2", start).unwrap()).collect();
        let third = held(&admission, "10.0.0.3", start).unwrap();
        let soon = start + Duration::from_secs(4);
        assert!(held(&admission, "10.0.0.4", soon).is_none(), "they have their time");
        let late = start + Duration::from_secs(5);
        assert!(held(&admission, "10.0.0.2", late).is_none(), "more of the same do not get in");
        let mut new = held(&admission, "10.0.0.4", late).unwrap();
        assert!(has_to_go(&mut many[0]).await);
        assert!(!has_to_go(&mut many[1]).await && !has_to_go(&mut new).await);
        assert_eq!(admission.open(), 5);
        drop((one, many, third, new));
        assert_eq!(admission.open(), 0);
        assert!(admission.lock().by_address.is_empty() && admission.lock().yielding.is_empty());
    }

    #[test]
    fn newcomers_from_one_ipv6_network_share_its_places() {
        let caps = Caps { yields_after: Some(Duration::from_secs(5)), ..CAPS };
        let (admission, now) = (Admission::new(caps), Instant::now());
        let from = |host: u16| format!("2001:db8:1:2::{host:x}");
        let places: Vec<_> = (0..9).filter_map(|host| held(&admission, &from(host), now)).collect();
        assert_eq!(places.len(), 3);
        assert!(held(&admission, "2001:db8:1:3::1", now).is_some());
    }

    #[test]
    fn nothing_is_remembered_of_callers_that_left() {
        let admission = Admission::new(CAPS);
        for last in 0..=255 {
            drop(enter(&admission, &format!("10.0.0.{last}")).unwrap());
        }
        assert_eq!(admission.open(), 0);
        assert!(admission.lock().by_address.is_empty());
    }
}

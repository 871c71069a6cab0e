//! Counts open connections and decides whether one more may come in.
//!
//! Pure bookkeeping: no sockets, no time. Loopback is exempt from the cap per address, because everything on this node comes from
//! one address: the API server alone opens a hundred connections.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most connections at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// In all.
    pub total: usize,
    /// From one address, loopback excepted.
    pub per_address: usize,
    /// Still in the handshake, from one address, loopback excepted: idle connections must not lock others out.
    pub handshakes_per_address: usize,
}

impl Caps {
    /// For the etcd API: more than any cluster of Pis needs, and well below the descriptor limit.
    pub const CLIENTS: Self = Self { total: 2_048, per_address: 512, handshakes_per_address: 32 };
    /// For peers: a budget of their own, so clients cannot use it up.
    pub const PEERS: Self = Self { total: 256, per_address: 64, handshakes_per_address: 16 };
    /// For metrics and health.
    pub const OBSERVERS: Self = Self { total: 64, per_address: 16, handshakes_per_address: 16 };
}

/// The connections of one port. Clones share the counts.
#[derive(Clone, Debug)]
pub struct Admission {
    caps: Caps,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    by_address: HashMap<IpAddr, OfAddress>,
}

/// One address's share. Absent from the map when it has no connection, so the map is as small as the caps.
#[derive(Clone, Copy, Debug, Default)]
struct OfAddress {
    open: usize,
    handshakes: usize,
}

/// The right to be connected. Given back when dropped.
#[derive(Debug)]
#[must_use = "the connection's place is given back when this is dropped"]
pub struct Place {
    counts: Arc<Mutex<Counts>>,
    address: IpAddr,
    in_handshake: bool,
}

impl Admission {
    /// Nobody is connected.
    pub fn new(caps: Caps) -> Self {
        Self { caps, counts: Arc::default() }
    }

    /// A place for one more connection, if there is one.
    pub fn enter(&self, address: IpAddr) -> Option<Place> {
        // An IPv4 caller on an IPv6 socket is the same caller.
        let address = address.to_canonical();
        let mut counts = lock(&self.counts);
        if self.caps.total <= counts.total {
            return None;
        }
        let of_address = counts.by_address.get(&address).copied().unwrap_or_default();
        let full = self.caps.per_address <= of_address.open
            || self.caps.handshakes_per_address <= of_address.handshakes;
        if full && !address.is_loopback() {
            return None;
        }
        counts.total += 1;
        let of_address = counts.by_address.entry(address).or_default();
        of_address.open += 1;
        of_address.handshakes += 1;
        Some(Place { counts: Arc::clone(&self.counts), address, in_handshake: true })
    }

    /// Connections open now, those in the handshake included.
    pub fn open(&self) -> usize {
        lock(&self.counts).total
    }
}

impl Place {
    /// The handshake is over.
    pub fn established(&mut self) {
        if std::mem::take(&mut self.in_handshake)
            && let Some(of_address) = lock(&self.counts).by_address.get_mut(&self.address)
        {
            of_address.handshakes -= 1;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.established();
        let mut counts = lock(&self.counts);
        counts.total -= 1;
        if let Some(of_address) = counts.by_address.get_mut(&self.address) {
            of_address.open -= 1;
            if of_address.open == 0 {
                counts.by_address.remove(&self.address);
            }
        }
    }
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps { total: 5, per_address: 3, handshakes_per_address: 2 };

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn settled(admission: &Admission, from: &str) -> Option<Place> {
        let mut place = admission.enter(address(from))?;
        place.established();
        Some(place)
    }

    #[test]
    fn one_address_cannot_take_every_place() {
        let admission = Admission::new(CAPS);
        let places: Vec<_> = (0..3).map(|_| settled(&admission, "10.0.0.1").unwrap()).collect();
        assert!(admission.enter(address("10.0.0.1")).is_none());
        assert!(admission.enter(address("::ffff:10.0.0.1")).is_none(), "same caller over IPv6");
        assert!(settled(&admission, "10.0.0.2").is_some());
        drop(places);
        assert!(settled(&admission, "10.0.0.1").is_some());
    }

    #[test]
    fn stalled_handshakes_are_capped_before_connections_are() {
        let admission = Admission::new(CAPS);
        let mut first = admission.enter(address("10.0.0.1")).unwrap();
        let _second = admission.enter(address("10.0.0.1")).unwrap();
        assert!(admission.enter(address("10.0.0.1")).is_none());
        first.established();
        assert!(admission.enter(address("10.0.0.1")).is_some());
    }

    #[test]
    fn loopback_is_bound_by_the_total_only() {
        let admission = Admission::new(CAPS);
        let places: Vec<_> =
            (0..5).map(|_| admission.enter(address("127.0.0.1")).unwrap()).collect();
        assert!(admission.enter(address("127.0.0.1")).is_none());
        assert!(admission.enter(address("10.0.0.1")).is_none());
        assert_eq!(admission.open(), 5);
        drop(places);
    }

    #[test]
    fn nothing_is_remembered_of_callers_that_left() {
        let admission = Admission::new(CAPS);
        for last in 0..=255 {
            drop(admission.enter(IpAddr::from([10, 0, 0, last])).unwrap());
        }
        assert_eq!(admission.open(), 0);
        assert!(lock(&admission.counts).by_address.is_empty());
    }
}

//! Decides who may try a token now, and remembers the exchanges under way.
//!
//! An attempt costs the server a few multiplications on a curve, and an attacker one guess. Both are bounded before any work is
//! done: per source, so that one does not shut out the others, and for all together.
//!
//! # Shape
//!
//! Pure: time is an argument, and it is monotonic.
//!
//! # Invariants
//!
//! - No more than [`SESSIONS_MAX`] exchanges and [`SOURCES_MAX`] sources are remembered, whoever asks.
//! - A session is used at most once, and not after [`SESSION_LIFE`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Exchanges under way. The global rate admits fewer than this within a session's life.
pub const SESSIONS_MAX: usize = 128;
/// How long an exchange may take.
pub const SESSION_LIFE: Duration = Duration::from_secs(10);
/// Sources remembered; the one that was heard of least recently gives way.
pub const SOURCES_MAX: usize = 1_024;
/// How often refusals are written to the journal.
pub const MENTION_INTERVAL: Duration = Duration::from_secs(1);

/// Attempts of one source: a few at once, then one in two seconds.
const SOURCE: Rate = Rate { burst: 5, interval: Duration::from_secs(2) };
/// Attempts of all together.
const GLOBAL: Rate = Rate { burst: 20, interval: Duration::from_millis(200) };

const _: () = {
    let in_a_life = SESSION_LIFE.as_millis() / GLOBAL.interval.as_millis() + GLOBAL.burst as u128;
    assert!(in_a_life < SESSIONS_MAX as u128);
};

/// How fast a bucket fills.
#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: u32,
    interval: Duration,
}

/// A token bucket, kept as the instant at which it will be full.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    full_at: Instant,
}

impl Bucket {
    const fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, full_at: now }
    }

    /// Zero if one may be taken now, else how long to wait.
    fn wait(&self, now: Instant) -> Duration {
        let after = self.full_at.max(now) + self.rate.interval;
        after.saturating_duration_since(now + self.rate.interval * self.rate.burst)
    }

    fn take(&mut self, now: Instant) {
        self.full_at = self.full_at.max(now) + self.rate.interval;
    }

    fn give_back(&mut self) {
        if let Some(full_at) = self.full_at.checked_sub(self.rate.interval) {
            self.full_at = full_at;
        }
    }
}

/// Whom attempts are counted for: an IPv4 address, or an IPv6 network of the size that one household gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Source(IpAddr);

impl Source {
    fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => {
                let mut octets = address.octets();
                octets[8..].fill(0);
                IpAddr::V6(Ipv6Addr::from(octets))
            }
        })
    }
}

/// Names an exchange under way: random, so that it cannot be guessed.
pub type SessionId = [u8; 16];

struct Open<T> {
    session: T,
    source: Source,
    ends: Instant,
}

/// See the module documentation. `T` is what a session holds.
pub struct Gate<T> {
    global: Bucket,
    sources: BTreeMap<Source, Bucket>,
    sessions: BTreeMap<SessionId, Open<T>>,
}

/// Proof that an attempt is within bounds and has been counted.
#[must_use]
#[derive(Debug)]
pub struct Admitted(Source);

/// It is not; how long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany {
    /// Until the next attempt may succeed.
    pub wait: Duration,
}

impl<T> Gate<T> {
    /// Nobody has tried yet.
    pub const fn new(now: Instant) -> Self {
        let global = Bucket::new(GLOBAL, now);
        Self { global, sources: BTreeMap::new(), sessions: BTreeMap::new() }
    }

    /// Counts an attempt, if it is within bounds. One that is not costs nobody else anything.
    pub fn admit(&mut self, now: Instant, address: IpAddr) -> Result<Admitted, TooMany> {
        self.sessions.retain(|_, open| now < open.ends);
        let source = Source::of(address);
        let mut bucket =
            self.sources.get(&source).copied().unwrap_or_else(|| Bucket::new(SOURCE, now));
        let wait = bucket.wait(now).max(self.global.wait(now));
        if !wait.is_zero() {
            return Err(TooMany { wait });
        }
        if SESSIONS_MAX <= self.sessions.len() {
            return Err(TooMany { wait: SESSION_LIFE });
        }
        bucket.take(now);
        self.global.take(now);
        self.remember(now, source, bucket);
        Ok(Admitted(source))
    }

    fn remember(&mut self, now: Instant, source: Source, bucket: Bucket) {
        if SOURCES_MAX <= self.sources.len() && !self.sources.contains_key(&source) {
            // A full bucket says nothing that a new one would not say.
            self.sources.retain(|_, bucket| now < bucket.full_at);
            let oldest = self.sources.iter().min_by_key(|(_, bucket)| bucket.full_at);
            if SOURCES_MAX <= self.sources.len()
                && let Some(oldest) = oldest.map(|(source, _)| *source)
            {
                self.sources.remove(&oldest);
            }
        }
        self.sources.insert(source, bucket);
    }

    /// Remembers an exchange that was admitted.
    pub fn open(&mut self, now: Instant, admitted: Admitted, id: SessionId, session: T) {
        let open = Open { session, source: admitted.0, ends: now + SESSION_LIFE };
        self.sessions.insert(id, open);
    }

    /// Takes an exchange out, if this source has begun it and it has not ended. It cannot be taken again.
    pub fn take(&mut self, now: Instant, address: IpAddr, id: &[u8]) -> Option<T> {
        let id: SessionId = id.try_into().ok()?;
        let open = self.sessions.remove(&id)?;
        (now < open.ends && open.source == Source::of(address)).then_some(open.session)
    }

    /// The attempt was right: it does not count.
    pub fn forgive(&mut self, address: IpAddr) {
        self.global.give_back();
        if let Some(bucket) = self.sources.get_mut(&Source::of(address)) {
            bucket.give_back();
        }
    }
}

/// Says at most one line a second, and how many it left out.
#[derive(Debug, Default)]
pub struct Mentions {
    last: Option<Instant>,
    left_out: u64,
}

impl Mentions {
    /// Whether to say it; with how many that were not said since.
    pub fn mention(&mut self, now: Instant) -> Option<u64> {
        let due = |last| MENTION_INTERVAL <= now.saturating_duration_since(last);
        if !self.last.is_none_or(due) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 168, 1, last])
    }

    #[test]
    fn one_source_gets_five_at_once_and_then_one_in_two_seconds() {
        let mut now = Instant::now();
        let mut gate = Gate::<()>::new(now);
        let mut admitted = |now| gate.admit(now, address(1)).is_ok();
        assert_eq!((0..100).filter(|_| admitted(now)).count(), 5);
        now += Duration::from_secs(2);
        assert_eq!((0..100).filter(|_| admitted(now)).count(), 1);
        now += Duration::from_secs(3_600);
        assert_eq!((0..100).filter(|_| admitted(now)).count(), 5, "saved up an hour's");
    }

    #[test]
    fn wait_that_is_told_is_enough() {
        let mut now = Instant::now();
        let mut gate = Gate::<()>::new(now);
        for _ in 0..50 {
            if let Err(TooMany { wait }) = gate.admit(now, address(1)) {
                now += wait;
                assert!(gate.admit(now, address(1)).is_ok());
            }
        }
    }

    #[test]
    fn one_source_does_not_shut_out_another() {
        let now = Instant::now();
        let mut gate = Gate::<()>::new(now);
        for _ in 0..100_000 {
            gate.admit(now, address(1)).ok();
        }
        assert!(gate.admit(now, address(2)).is_ok());
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let now = Instant::now();
        let mut gate = Gate::<()>::new(now);
        let many = (0..1_000u16).map(|host| IpAddr::from([0xfd00, 0, 0, 1, host, 2, 3, 4]));
        assert_eq!(many.filter(|address| gate.admit(now, *address).is_ok()).count(), 5);
        let mapped: IpAddr = "::ffff:192.168.1.9".parse().unwrap();
        assert_eq!(Source::of(mapped), Source::of(address(9)));
    }

    #[test]
    fn flood_from_everywhere_is_bounded_in_memory_and_rate() {
        let begun = Instant::now();
        let mut gate = Gate::new(begun);
        let mut admitted = 0;
        // 100,000 attempts from as many addresses within ten seconds.
        for attempt in 0..100_000u32 {
            let now = begun + Duration::from_micros(u64::from(attempt) * 100);
            let source = IpAddr::from((0x0a00_0000 + attempt).to_be_bytes());
            if let Ok(proof) = gate.admit(now, source) {
                admitted += 1;
                let mut id = [0; 16];
                id[..4].copy_from_slice(&attempt.to_be_bytes());
                gate.open(now, proof, id, ());
            }
            assert!(gate.sources.len() <= SOURCES_MAX && gate.sessions.len() <= SESSIONS_MAX);
        }
        assert_eq!(admitted, 20 + 49, "20 at once, and 5 a second in not quite ten seconds");
    }

    #[test]
    fn session_is_used_once_and_not_late() {
        let now = Instant::now();
        let mut gate = Gate::new(now);
        for (id, later, from, expected) in [
            ([1; 16], Duration::ZERO, address(1), Some("first")),
            ([2; 16], SESSION_LIFE, address(1), None),
            ([3; 16], Duration::ZERO, address(2), None),
        ] {
            let proof = gate.admit(now, address(1)).unwrap();
            gate.open(now, proof, id, "first");
            assert_eq!(gate.take(now, address(1), &id[..15]), None, "a part of an id");
            assert_eq!(gate.take(now + later, from, &id), expected);
            assert_eq!(gate.take(now, address(1), &id), None, "used twice");
        }
    }

    #[test]
    fn right_attempts_do_not_count() {
        let now = Instant::now();
        let mut gate = Gate::<()>::new(now);
        for _ in 0..100 {
            drop(gate.admit(now, address(1)).unwrap());
            gate.forgive(address(1));
        }
    }

    #[test]
    fn refusals_are_mentioned_once_a_second_with_a_count() {
        let now = Instant::now();
        let mut mentions = Mentions::default();
        assert_eq!(mentions.mention(now), Some(0));
        for _ in 0..9 {
            assert_eq!(mentions.mention(now), None);
        }
        assert_eq!(mentions.mention(now + MENTION_INTERVAL), Some(9));
    }
}

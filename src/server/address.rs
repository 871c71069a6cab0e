//! Notices that this host has another address, and has the server begin anew there.
//!
//! Only where `node-ip` is not written: then the address was found on the host, as K3s does it, and another one is found when a
//! router gives another one. A written address is what the operator wants, and is kept.
//!
//! # Shape
//!
//! [`Follow`] decides, from what is seen every two seconds. A start over in the same process does the rest: it listens there, has
//! certificates with the new address, tells the others by its hello and its greetings, and then the cluster, through its log. A leader
//! hands over before.
//!
//! # Invariants
//!
//! - An address that the host still has is kept, whatever others it gets: a second interface, or IPv6 addresses that change daily, move
//!   nobody.
//! - Nothing is done for an address that is not there for a while, and the while grows if addresses flap.
//! - Without any address the server stays where it is: the network may come back as it was.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use tokio::sync::watch;

use super::failed::RunError;
use super::life::stopped;
use crate::announce;
use crate::config::Config;
use crate::env::Clock;
use crate::events::{EventId, fields};

/// How often the host is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// An address must be there for so long.
const SETTLE: Duration = Duration::from_secs(5);

/// What the host has.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// The address from which the default route starts.
    route: Option<IpAddr>,
    /// Whether some interface still has the address in use. Only looked up when the route has another one.
    keeps: bool,
}

/// The decision. See the module documentation.
#[derive(Debug)]
struct Follow {
    current: Option<IpAddr>,
    settle: Duration,
    /// The address that is there instead, and since when.
    instead: Option<(IpAddr, Instant)>,
}

impl Follow {
    const fn new(current: Option<IpAddr>, settle: Duration) -> Self {
        Self { current, settle, instead: None }
    }

    /// Where to go on, if it is time to.
    fn see(&mut self, now: Instant, seen: &Seen) -> Option<IpAddr> {
        let other = seen.route.filter(|route| Some(*route) != self.current && !seen.keeps);
        let Some(other) = other else {
            self.instead = None;
            return None;
        };
        let since = match self.instead {
            Some((known, since)) if known == other => since,
            Some(_) | None => {
                self.instead = Some((other, now));
                now
            }
        };
        (self.settle <= now.saturating_duration_since(since)).then_some(other)
    }
}

/// The address from which the default route starts. Asking the kernel for a route to an address set aside for documentation sends
/// nothing.
pub fn of_default_route() -> Option<IpAddr> {
    let from = |local: &str, remote: &str| {
        let socket = UdpSocket::bind(local).ok()?;
        socket.connect(remote).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    from("0.0.0.0:0", "192.0.2.1:9").or_else(|| from("[::]:0", "[2001:db8::1]:9"))
}

fn look(current: Option<IpAddr>) -> Seen {
    let route = of_default_route();
    let Some(current) = current.filter(|current| route != Some(*current)) else {
        return Seen { route, keeps: false };
    };
    // What cannot be asked for has not changed.
    let keeps = getifaddrs().map_or(true, |all| {
        all.filter_map(|one| one.address).any(|address| {
            let four = address.as_sockaddr_in().map(|four| IpAddr::V4(four.ip()));
            let six = address.as_sockaddr_in6().map(|six| IpAddr::V6(six.ip()));
            four.or(six) == Some(current)
        })
    });
    Seen { route, keeps }
}

/// Whether this server's address is found, not written.
pub(super) fn is_found(config: &Config) -> bool {
    config.settings().items("node-ip").is_empty()
}

/// Ends when the host has another address, or the server stops. `pause` is how long another one must be there at least.
pub(super) async fn follow(
    config: Config,
    clock: Arc<dyn Clock>,
    pause: Duration,
    stopping: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let stopped = stopped(stopping);
    tokio::pin!(stopped);
    let current = config.node_ips.first().copied();
    let mut follow = Follow::new(current, SETTLE.max(pause));
    loop {
        tokio::select! {
            () = &mut stopped => return Ok(()),
            () = clock.sleep(LOOK_EVERY) => {}
        }
        if !is_found(&config) {
            continue;
        }
        if let Some(to) = follow.see(clock.now(), &look(current)) {
            let before = current.map_or_else(|| "none".to_owned(), |before| before.to_string());
            announce!(
                EventId::MembersChanged,
                { fields::ADDRESS } = %to,
                "this host has another address: {to}, before {before}; going on there"
            );
            return Err(RunError::Moved(to));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([192, 168, 1, last])
    }

    fn at(last: u8) -> Seen {
        Seen { route: Some(ip(last)), keeps: false }
    }

    #[test]
    fn another_address_is_followed_when_the_old_one_is_gone_and_the_new_one_stays() {
        let start = Instant::now();
        let secs = |secs| start + Duration::from_secs(secs);
        let keeps = |last| Seen { keeps: true, ..at(last) };
        let nothing = Seen::default;
        let moves = |seen: &[(u64, Seen)], current: Option<IpAddr>| {
            let mut follow = Follow::new(current, SETTLE);
            seen.iter().find_map(|(second, seen)| follow.see(secs(*second), seen))
        };
        let here = Some(ip(1));
        for (what, seen, current, expected) in [
            ("it stays", vec![(0, at(1)), (60, at(1))], here, None),
            ("it moves", vec![(0, at(2)), (4, at(2)), (5, at(2))], here, Some(ip(2))),
            ("not long enough", vec![(0, at(2)), (4, at(2))], here, None),
            ("there and back", vec![(0, at(2)), (4, at(1)), (5, at(2)), (9, at(2))], here, None),
            ("another one each time", vec![(0, at(2)), (4, at(3)), (8, at(2))], here, None),
            ("a second interface", vec![(0, keeps(2)), (60, keeps(2))], here, None),
            ("no network", vec![(0, nothing()), (600, nothing())], here, None),
            ("lost in between", vec![(0, at(2)), (3, nothing()), (5, at(2))], here, None),
            ("the first one comes late", vec![(0, at(2)), (5, at(2))], None, Some(ip(2))),
        ] {
            assert_eq!(moves(&seen, current), expected, "{what}");
        }
    }

    #[test]
    fn an_address_that_some_interface_has_is_kept_and_one_that_none_has_is_not() {
        let kept = look(Some("127.0.0.1".parse().unwrap()));
        assert!(kept.keeps || kept.route == Some("127.0.0.1".parse().unwrap()), "{kept:?}");
        assert!(!look(Some("203.0.113.77".parse().unwrap())).keeps);
    }
}

//! Decides where to look for a node: every place where it may be, the likeliest first.
//!
//! Addresses come from a router that may give others tomorrow, to one node or to all of them at once. So an address is
//! only a guess, from whoever knows one: the membership, the node itself when it last called, its name, what the
//! operator wrote. The certificate of whoever answers says whether the guess was right.
//!
//! # Invariants
//!
//! - A place where another node answered is still tried, but last: the node may come back there.
//! - The book has bounds, whatever a node says of itself.
//!
//! # Not here
//!
//! Connecting (`dial`), resolving names (`lane`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::raft::Member;

/// Port on which nodes listen for each other, if nothing else is said.
const PORT: u16 = 2380;

/// Places tried in one attempt.
const CANDIDATES_MAX: usize = 12;

/// Places kept of those that a node gave itself.
const LEARNED_MAX: usize = 8;

/// Wrong nodes remembered.
const STRANGERS_MAX: usize = 32;

/// The longest host name there is.
const NAME_BYTES_MAX: usize = 253;

/// A place where a node may be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Location {
    /// Known exactly.
    Address(SocketAddr),
    /// To be resolved: a host name, or an address on one network interface (`fe80::1%eth0`).
    Name(String, u16),
}

impl Location {
    /// Reads `https://host[:port]`. `None` for anything else, and for addresses that are no place (`0.0.0.0`).
    pub fn of_url(url: &str) -> Option<Self> {
        let authority = url.strip_prefix("https://")?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, tail) = rest.split_once(']')?;
                (host, if tail.is_empty() { None } else { Some(tail.strip_prefix(':')?) })
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let port = match port {
            Some(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok()?,
            Some(_) => return None,
            None => PORT,
        };
        Self::new(host, port)
    }

    /// A host name or an IP address without brackets.
    pub fn new(host: &str, port: u16) -> Option<Self> {
        if port == 0 {
            return None;
        }
        // In a URL the percent sign before an interface is written `%25`.
        let host = host.replace("%25", "%");
        if let Ok(address) = host.parse::<IpAddr>() {
            let nowhere = address.is_unspecified()
                || address.is_multicast()
                || address == IpAddr::V4(Ipv4Addr::BROADCAST);
            return (!nowhere).then_some(Self::Address(SocketAddr::new(address, port)));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:%".contains(&byte);
        let usable = !host.is_empty() && host.len() <= NAME_BYTES_MAX && host.bytes().all(plain);
        usable.then(|| Self::Name(host.to_ascii_lowercase(), port))
    }

    /// The port.
    pub const fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Name(_, port) => *port,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// Everything known about where one node may be.
#[derive(Debug, Default)]
pub struct AddressBook {
    name: String,
    recorded: Vec<Location>,
    /// Newest first.
    learned: Vec<Location>,
    hints: Vec<Location>,
    good: Option<SocketAddr>,
    /// Where somebody else answered, and who.
    strangers: Vec<(SocketAddr, String)>,
}

impl AddressBook {
    /// Takes over what the cluster has on record. True if that is news.
    pub fn record(&mut self, member: &Member) -> bool {
        let urls = member.peer_urls.iter().take(CANDIDATES_MAX);
        let locations = || urls.clone().filter_map(|url| Location::of_url(url));
        if self.name == member.name && locations().eq(self.recorded.iter().cloned()) {
            return false;
        }
        self.name.clone_from(&member.name);
        self.recorded = locations().collect();
        self.believe_again();
        true
    }

    /// Takes over where the node says that it is, or called from. True if that is news.
    pub fn learn(&mut self, locations: impl IntoIterator<Item = Location>) -> bool {
        let mut learned = Vec::with_capacity(LEARNED_MAX);
        let given = locations.into_iter().take(LEARNED_MAX);
        for location in given.chain(self.learned.iter().cloned()) {
            if learned.len() < LEARNED_MAX && !learned.contains(&location) {
                learned.push(location);
            }
        }
        if learned == self.learned {
            return false;
        }
        self.learned = learned;
        self.believe_again();
        true
    }

    /// Takes over where some member is, perhaps this one.
    pub fn hint(&mut self, hints: &[Location]) {
        self.hints = hints.to_vec();
    }

    /// What people call the node; empty as long as nobody has said.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The port that the node listens on, as far as one can tell.
    pub fn port(&self) -> u16 {
        let own = self.learned.first().or_else(|| self.recorded.first());
        own.map_or(PORT, Location::port)
    }

    /// The node was found here.
    pub fn found(&mut self, address: SocketAddr) {
        self.good = Some(address);
        self.strangers.retain(|(known, _)| *known != address);
    }

    /// Somebody else answered here. True if that is news.
    pub fn stranger(&mut self, address: SocketAddr, who: &str) -> bool {
        if self.good == Some(address) {
            self.good = None;
        }
        if self.strangers.iter().any(|(known, name)| *known == address && name == who) {
            return false;
        }
        self.strangers.retain(|(known, _)| *known != address);
        if self.strangers.len() == STRANGERS_MAX {
            self.strangers.remove(0);
        }
        self.strangers.push((address, who.to_owned()));
        true
    }

    /// Where to look, in this order.
    pub fn candidates(&self) -> Vec<Location> {
        let named = |suffix: &str| Location::new(&format!("{}{suffix}", self.name), self.port());
        let names = if self.name.is_empty() { [None, None] } else { [named(""), named(".local")] };
        let all = self.good.map(Location::Address).into_iter();
        let all = all.chain(self.learned.iter().cloned()).chain(self.recorded.iter().cloned());
        let all = all.chain(self.hints.iter().cloned()).chain(names.into_iter().flatten());
        let (mut likely, mut unlikely) = (Vec::new(), Vec::new());
        for location in all {
            let list = if self.is_strange(&location) { &mut unlikely } else { &mut likely };
            if !list.contains(&location) {
                list.push(location);
            }
        }
        likely.append(&mut unlikely);
        likely.truncate(CANDIDATES_MAX);
        likely
    }

    fn is_strange(&self, location: &Location) -> bool {
        matches!(location, Location::Address(address)
            if self.strangers.iter().any(|(known, _)| known == address))
    }

    /// Places may have been swapped: news about one node puts the old verdicts in doubt.
    fn believe_again(&mut self) {
        self.strangers.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::NodeId;

    fn at(text: &str) -> Location {
        Location::of_url(&format!("https://{text}")).unwrap()
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn member(urls: &[&str]) -> Member {
        Member {
            id: NodeId::new(7),
            name: "pi-7".to_owned(),
            peer_urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            ..Member::default()
        }
    }

    fn shown(book: &AddressBook) -> Vec<String> {
        book.candidates().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn urls_of_every_kind_are_read() {
        for (url, location) in [
            ("https://10.0.0.1:2380", "10.0.0.1:2380"),
            ("https://10.0.0.1", "10.0.0.1:2380"),
            ("https://[fd00::1]:12380/", "[fd00::1]:12380"),
            ("https://[fd00::1]", "[fd00::1]:2380"),
            ("https://Pi-1.LAN:2380", "pi-1.lan:2380"),
            ("https://[fe80::1%25eth0]:2380", "fe80::1%eth0:2380"),
        ] {
            assert_eq!(Location::of_url(url).unwrap().to_string(), location, "{url}");
        }
    }

    #[test]
    fn what_is_no_place_is_left_out() {
        for url in [
            "",
            "https://",
            "https://:2380",
            "http://10.0.0.1:2380",
            "10.0.0.1:2380",
            "https://0.0.0.0:2380",
            "https://[::]:2380",
            "https://224.0.0.1:2380",
            "https://10.0.0.1:0",
            "https://10.0.0.1:65536",
            "https://10.0.0.1:+80",
            "https://[fd00::1",
            "https://[fd00::1]2380",
            "https://pi 1:2380",
            "https://pi/path:2380",
            "https://user@pi:2380",
        ] {
            assert_eq!(Location::of_url(url), None, "{url}");
        }
        let long = format!("https://{}:2380", "a".repeat(254));
        assert_eq!(Location::of_url(&long), None);
    }

    #[test]
    fn the_last_good_place_is_first_and_names_are_last() {
        let mut book = AddressBook::default();
        assert!(book.record(&member(&["https://10.0.0.1:2381", "https://[fd00::1]:2381"])));
        assert!(book.learn([at("10.0.0.2:2381")]));
        book.hint(&[at("10.0.0.9:2380")]);
        book.found(address("10.0.0.3:2381"));

        let expected = [
            "10.0.0.3:2381",
            "10.0.0.2:2381",
            "10.0.0.1:2381",
            "[fd00::1]:2381",
            "10.0.0.9:2380",
            "pi-7:2381",
            "pi-7.local:2381",
        ];
        assert_eq!(shown(&book), expected);
    }

    #[test]
    fn the_newest_address_of_a_node_comes_before_older_ones() {
        let mut book = AddressBook::default();
        assert!(book.learn([at("10.0.0.1")]));
        assert!(book.learn([at("10.0.0.2")]));
        assert!(!book.learn([at("10.0.0.2")]));
        assert!(book.learn([at("10.0.0.1")]));
        assert_eq!(shown(&book), ["10.0.0.1:2380", "10.0.0.2:2380"]);
    }

    #[test]
    fn a_place_with_another_node_is_tried_last_until_there_is_news() {
        let mut book = AddressBook::default();
        book.record(&member(&["https://10.0.0.1", "https://10.0.0.2"]));
        book.found(address("10.0.0.1:2380"));
        assert!(book.stranger(address("10.0.0.1:2380"), "node 8"));
        assert!(!book.stranger(address("10.0.0.1:2380"), "node 8"), "said once");
        assert!(book.stranger(address("10.0.0.1:2380"), "node 9"), "somebody new");
        assert_eq!(shown(&book)[0], "10.0.0.2:2380");
        assert_eq!(shown(&book).last().unwrap(), "10.0.0.1:2380");

        book.learn([at("10.0.0.1")]);
        assert_eq!(shown(&book)[0], "10.0.0.1:2380");
    }

    #[test]
    fn a_node_cannot_fill_the_book() {
        let mut book = AddressBook::default();
        for number in 0..100 {
            book.learn((0..100).map(|host| at(&format!("10.0.{number}.{host}"))));
            book.stranger(SocketAddr::from(([10, 1, 1, number], 2380)), "node 8");
        }
        let many: Vec<String> = (0..100).map(|n| format!("https://10.2.0.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        book.record(&member(&many));
        assert_eq!(book.learned.len(), LEARNED_MAX);
        assert_eq!(book.candidates().len(), CANDIDATES_MAX);
        assert!(book.strangers.len() <= STRANGERS_MAX);
        assert!(!book.record(&member(&many)), "the same is not news");
    }
}

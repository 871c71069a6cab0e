//! The host names and addresses a certificate is valid for.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::NamesError;

/// Most names in one certificate. Fixed by configuration, never grown by what clients ask for (CVE-2023-32187).
const NAMES_MAX: usize = 64;

/// A set of names; loopback is in it from the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    hosts: BTreeSet<String>,
    addresses: BTreeSet<IpAddr>,
}

impl Default for Names {
    fn default() -> Self {
        Self::loopback()
    }
}

impl Names {
    /// `localhost` and the loopback addresses.
    pub fn loopback() -> Self {
        Self {
            hosts: BTreeSet::from(["localhost".to_owned()]),
            addresses: BTreeSet::from([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]),
        }
    }

    /// No names at all: for certificates that nobody is called by.
    pub(super) const fn none() -> Self {
        Self { hosts: BTreeSet::new(), addresses: BTreeSet::new() }
    }

    /// Adds a host name, a wildcard like `*.lan`, or an address: what `tls-san` takes.
    pub fn add(&mut self, name: &str) -> Result<(), NamesError> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return self.add_address(address);
        }
        if !is_host(name) {
            return Err(NamesError::Invalid(name.to_owned()));
        }
        self.room()?;
        self.hosts.insert(name.to_ascii_lowercase());
        Ok(())
    }

    /// Adds an address of this node.
    pub fn add_address(&mut self, address: IpAddr) -> Result<(), NamesError> {
        self.room()?;
        self.addresses.insert(address);
        Ok(())
    }

    /// Host names in order.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().map(String::as_str)
    }

    /// Addresses in order.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().copied()
    }

    /// Exactly these names, as read from a certificate.
    pub(super) fn of(hosts: BTreeSet<String>, addresses: BTreeSet<IpAddr>) -> Self {
        Self { hosts, addresses }
    }

    fn room(&self) -> Result<(), NamesError> {
        if self.hosts.len() + self.addresses.len() < NAMES_MAX {
            Ok(())
        } else {
            Err(NamesError::TooMany(NAMES_MAX))
        }
    }
}

/// Letters, digits, `-` and `_` in labels of 1 to 63, at most 253 in all; the first label may be `*`. Something made of digits
/// and dots only is a mistyped address, not a host.
fn is_host(name: &str) -> bool {
    let rest = name.strip_prefix("*.").unwrap_or(name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253
        && rest.split('.').all(label)
        && !rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_addresses_are_told_apart() {
        let mut names = Names::loopback();
        for name in ["Pi-1.local", "*.lan", "192.168.1.10", "fd00::10"] {
            names.add(name).unwrap();
        }
        assert_eq!(names.hosts().collect::<Vec<_>>(), ["*.lan", "localhost", "pi-1.local"]);
        assert_eq!(names.addresses().count(), 4);
    }

    #[test]
    fn what_is_neither_is_refused_by_name() {
        let long = "a".repeat(64);
        for name in
            ["", "pi 1", "pi..lan", ".lan", "-pi", "192.168.1", "1.2.3.4.5", "a/b", "pié", &long]
        {
            let error = Names::loopback().add(name).unwrap_err();
            assert_eq!(error, NamesError::Invalid(name.to_owned()));
        }
    }

    #[test]
    fn the_number_of_names_is_bounded() {
        let mut names = Names::loopback();
        let added = (0..100).take_while(|n| names.add(&format!("pi-{n}")).is_ok()).count();
        assert_eq!(added, NAMES_MAX - 3);
    }
}

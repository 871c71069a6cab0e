//! Networks in CIDR notation, kept in one canonical form so that equal networks compare equal.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::kinds::Wrong;

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The version of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Bits in an address.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A network. The host bits of its address are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Makes a network, unless host bits are set or the prefix is too long.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let network = Self { address, prefix };
        (prefix <= Family::of(address).bits() && network.masked() == address).then_some(network)
    }

    /// Reads `10.42.0.0/16`.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let wrong =
            || Wrong::new("is not a network", "a network such as 10.42.0.0/16 or fd00:42::/56");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let decimal = prefix.bytes().all(|b| b.is_ascii_digit())
            && (prefix == "0" || !prefix.starts_with('0'));
        let prefix: u8 = prefix.parse().ok().filter(|_| decimal).ok_or_else(wrong)?;
        if Family::of(address).bits() < prefix {
            return Err(wrong());
        }
        let network = Self { address: Self { address, prefix }.masked(), prefix };
        if network.address != address {
            let right = network.to_string();
            return Err(Wrong::new("is an address inside a network, not a network", right.clone())
                .value(right));
        }
        Ok(network)
    }

    /// The network's own address.
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// Length of the network part in bits.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// IP version.
    pub const fn family(self) -> Family {
        Family::of(self.address)
    }

    /// Whether an address lies inside.
    pub fn contains(self, address: IpAddr) -> bool {
        Family::of(address) == self.family() && Self { address, ..self }.masked() == self.address
    }

    /// Whether two networks share an address.
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.address) || other.contains(self.address)
    }

    /// The address `offset` after the network's own, if it is inside.
    pub fn nth(self, offset: u32) -> Option<IpAddr> {
        let address = match self.address {
            IpAddr::V4(base) => {
                IpAddr::V4(Ipv4Addr::from_bits(base.to_bits().checked_add(offset)?))
            }
            IpAddr::V6(base) => {
                IpAddr::V6(Ipv6Addr::from_bits(base.to_bits().checked_add(u128::from(offset))?))
            }
        };
        self.contains(address).then_some(address)
    }

    fn masked(self) -> IpAddr {
        let host_bits = u32::from(self.family().bits() - self.prefix);
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & mask))
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
            }
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        Cidr::parse(text).unwrap()
    }

    #[test]
    fn one_network_has_one_form() {
        assert_eq!(cidr("fd00:42:0:0::/56"), cidr("FD00:42::/56"));
        assert_eq!(cidr("fd00:0042::/56").to_string(), "fd00:42::/56");
        assert_eq!(cidr("0.0.0.0/0").to_string(), "0.0.0.0/0");
        assert_eq!(cidr("::/0").to_string(), "::/0");
    }

    #[test]
    fn host_bits_are_refused_with_the_network_to_write() {
        let wrong = Cidr::parse("10.42.0.1/16").unwrap_err();

        assert_eq!(wrong.value.as_deref(), Some("10.42.0.0/16"));
        assert_eq!(Cidr::new("10.42.0.1".parse().unwrap(), 16), None);
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "/",
            "10.42.0.0",
            "10.42.0.0/",
            "10.42.0.0/33",
            "10.42.0/16",
            "::/129",
            "10.42.0.0/016",
            "10.42.0.0/+8",
            "10.42.0.0/16/8",
            " 10.42.0.0/16",
        ] {
            assert!(Cidr::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn overlap_is_containment_either_way() {
        assert!(cidr("10.0.0.0/8").overlaps(cidr("10.42.0.0/16")));
        assert!(cidr("10.42.0.0/16").overlaps(cidr("10.0.0.0/8")));
        assert!(!cidr("10.42.0.0/16").overlaps(cidr("10.43.0.0/16")));
        assert!(!cidr("0.0.0.0/0").overlaps(cidr("::/0")));
    }

    #[test]
    fn nth_address_stays_inside() {
        assert_eq!(cidr("10.43.0.0/16").nth(10), Some("10.43.0.10".parse().unwrap()));
        assert_eq!(cidr("fd00:43::/112").nth(10), Some("fd00:43::a".parse().unwrap()));
        assert_eq!(cidr("10.43.0.0/30").nth(10), None);
        assert_eq!(cidr("255.255.255.255/32").nth(1), None);
    }
}

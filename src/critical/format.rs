//! Bytes of the replicated record.
//!
//! ```text
//! record  = version u8 (1), count u16, entry*          integers little-endian
//! entry   = flag u8, length u32, body                   flags ascending
//! body    = since u64 (seconds since 1970), name text, value
//! text    = length u32, UTF-8
//! value   = 1, u8 (0 or 1)                              switch
//!         | 2, text                                     word
//!         | 3, count u8, (family u8, address, prefix u8)*   networks
//!         | 4, count u8, (family u8, address)*          addresses
//!         | 5, count u16, text*                         set, ascending
//! ```
//!
//! A value has one encoding. An entry with an unknown flag number is kept as bytes: its length says where the
//! next one begins. The record as a whole is protected by whoever stores it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::Cidr;

use super::compare::{ClusterFlags, Recorded};
use super::flag::Flag;
use super::value::Value;

const VERSION: u8 = 1;
const SWITCH: u8 = 1;
const TEXT: u8 = 2;
const NETWORKS: u8 = 3;
const ADDRESSES: u8 = 4;
const SET: u8 = 5;
const FAMILY_V4: u8 = 4;
const FAMILY_V6: u8 = 6;

/// Why bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a later version.
    #[error(
        "record of the critical flags has an unknown version: found {found}, expected {VERSION}"
    )]
    Version {
        /// What the first byte says.
        found: u8,
    },
    /// Not what [`ClusterFlags::encode`] writes.
    #[error("record of the critical flags is damaged: {what}")]
    Damaged {
        /// Which part.
        what: &'static str,
    },
}

const fn damaged(what: &'static str) -> DecodeError {
    DecodeError::Damaged { what }
}

/// A time as the record keeps it: whole seconds, not before 1970.
pub(super) fn whole_seconds(time: SystemTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(unix_seconds(time))
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl ClusterFlags {
    /// The record as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let known =
            self.entries.iter().map(|(flag, recorded)| (flag.number(), encode_body(recorded)));
        let unknown = self.unknown.iter().map(|(number, body)| (*number, body.clone()));
        let mut entries: Vec<(u8, Vec<u8>)> = known.chain(unknown).collect();
        entries.sort_by_key(|(number, _)| *number);
        let mut bytes = vec![VERSION];
        bytes.extend(u16::try_from(entries.len()).unwrap_or(u16::MAX).to_le_bytes());
        for (number, body) in entries {
            bytes.push(number);
            put_bytes(&mut bytes, &body);
        }
        bytes
    }

    /// Reads a record back.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut rest = Rest(bytes);
        let version = rest.byte()?;
        if version != VERSION {
            return Err(DecodeError::Version { found: version });
        }
        let count = rest.count()?;
        let mut flags = Self::default();
        let mut previous = None;
        for _ in 0..count {
            let number = rest.byte()?;
            if previous.is_some_and(|previous| number <= previous) {
                return Err(damaged("flags are not in order"));
            }
            previous = Some(number);
            let body = rest.bytes()?;
            match Flag::of_number(number) {
                Some(flag) => {
                    flags.entries.insert(flag, decode_body(body)?);
                }
                None => {
                    flags.unknown.insert(number, body.to_vec());
                }
            }
        }
        rest.end()?;
        Ok(flags)
    }
}

fn encode_body(recorded: &Recorded) -> Vec<u8> {
    let mut bytes = unix_seconds(recorded.since).to_le_bytes().to_vec();
    put_bytes(&mut bytes, recorded.set_by.as_bytes());
    match &recorded.value {
        Value::Switch(on) => bytes.extend([SWITCH, u8::from(*on)]),
        Value::Text(text) => {
            bytes.push(TEXT);
            put_bytes(&mut bytes, text.as_bytes());
        }
        Value::Networks(networks) => {
            bytes.extend([NETWORKS, small_count(networks.len())]);
            for network in networks {
                put_address(&mut bytes, network.address());
                bytes.push(network.prefix());
            }
        }
        Value::Addresses(addresses) => {
            bytes.extend([ADDRESSES, small_count(addresses.len())]);
            for address in addresses {
                put_address(&mut bytes, *address);
            }
        }
        Value::Set(words) => {
            bytes.push(SET);
            bytes.extend(u16::try_from(words.len()).unwrap_or(u16::MAX).to_le_bytes());
            for word in words {
                put_bytes(&mut bytes, word.as_bytes());
            }
        }
    }
    bytes
}

fn decode_body(bytes: &[u8]) -> Result<Recorded, DecodeError> {
    let mut rest = Rest(bytes);
    let seconds = u64::from_le_bytes(rest.array()?);
    let since = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or(damaged("time"))?;
    let set_by = rest.text()?;
    let value = match rest.byte()? {
        SWITCH => match rest.byte()? {
            0 => Value::Switch(false),
            1 => Value::Switch(true),
            _ => return Err(damaged("switch")),
        },
        TEXT => Value::Text(rest.text()?),
        NETWORKS => {
            let count = rest.byte()?;
            let networks: Result<_, _> = (0..count).map(|_| rest.network()).collect();
            Value::Networks(networks?)
        }
        ADDRESSES => {
            let count = rest.byte()?;
            let addresses: Result<_, _> = (0..count).map(|_| rest.address()).collect();
            Value::Addresses(addresses?)
        }
        SET => {
            let count = rest.count()?;
            let mut words = BTreeSet::new();
            for _ in 0..count {
                let word = rest.text()?;
                if words.last().is_some_and(|last| word <= *last) {
                    return Err(damaged("set is not in order"));
                }
                words.insert(word);
            }
            Value::Set(words)
        }
        _ => return Err(damaged("kind of value")),
    };
    rest.end()?;
    Ok(Recorded { value, since, set_by })
}

/// Networks and addresses are at most a handful: validation allows two networks.
fn small_count(count: usize) -> u8 {
    assert!(count <= usize::from(u8::MAX), "{count} networks or addresses");
    u8::try_from(count).unwrap_or(u8::MAX)
}

fn put_bytes(bytes: &mut Vec<u8>, part: &[u8]) {
    assert!(part.len() <= usize::from(u16::MAX) << 8, "a flag of {} bytes", part.len());
    bytes.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(part);
}

fn put_address(bytes: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => {
            bytes.push(FAMILY_V4);
            bytes.extend(address.octets());
        }
        IpAddr::V6(address) => {
            bytes.push(FAMILY_V6);
            bytes.extend(address.octets());
        }
    }
}

/// What is left to read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (part, rest) = self.0.split_at_checked(count).ok_or(damaged("it ends too early"))?;
        self.0 = rest;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        self.take(N)?.try_into().map_err(|_| damaged("it ends too early"))
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn count(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = u32::from_le_bytes(self.array()?);
        self.take(usize::try_from(length).map_err(|_| damaged("length"))?)
    }

    fn text(&mut self) -> Result<String, DecodeError> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| damaged("text is not UTF-8"))
    }

    fn address(&mut self) -> Result<IpAddr, DecodeError> {
        match self.byte()? {
            FAMILY_V4 => Ok(IpAddr::V4(Ipv4Addr::from(self.array::<4>()?))),
            FAMILY_V6 => Ok(IpAddr::V6(Ipv6Addr::from(self.array::<16>()?))),
            _ => Err(damaged("address family")),
        }
    }

    fn network(&mut self) -> Result<Cidr, DecodeError> {
        let address = self.address()?;
        Cidr::new(address, self.byte()?).ok_or(damaged("network"))
    }

    fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(damaged("it goes on after its end")) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::flags;
    use super::*;

    fn record(text: &str) -> ClusterFlags {
        flags(text).found(UNIX_EPOCH + Duration::new(1_700_000_000, 999), "pi-1").0
    }

    const DUAL: &str = "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: 10.43.0.0/16,fd00:43::/112\n\
        disable: traefik,servicelb\nsystem-default-registry: registry.example\n";

    #[test]
    fn what_was_written_is_read_back() {
        for text in ["", DUAL] {
            let record = record(text);
            assert_eq!(ClusterFlags::decode(&record.encode()), Ok(record));
        }
        assert_eq!(
            ClusterFlags::decode(&ClusterFlags::default().encode()),
            Ok(ClusterFlags::default())
        );
    }

    #[test]
    fn bytes_on_disk_do_not_change() {
        let mut flags = ClusterFlags::default();
        let at = UNIX_EPOCH + Duration::from_secs(0x0102_0304);
        flags.set(
            Flag::ClusterCidr,
            Value::Networks(vec![Cidr::parse("10.42.0.0/16").unwrap()]),
            at,
            "a",
        );
        flags.set(Flag::ClusterDns, Value::Addresses(vec!["::1".parse().unwrap()]), at, "");
        flags.set(Flag::ClusterDomain, Value::Text("c.l".to_owned()), at, "");
        flags.set(Flag::Disable, Value::Set(["x".to_owned()].into()), at, "");
        flags.set(Flag::SecretsEncryption, Value::Switch(true), at, "");
        let hex: String = flags.encode().iter().map(|byte| format!("{byte:02x}")).collect();

        assert_eq!(
            hex,
            concat!(
                "01",
                "0500",
                "01",
                "15000000",
                "0403020100000000",
                "01000000",
                "61",
                "03",
                "01",
                "04",
                "0a2a0000",
                "10",
                "03",
                "1f000000",
                "0403020100000000",
                "00000000",
                "04",
                "01",
                "06",
                "00000000000000000000000000000001",
                "04",
                "14000000",
                "0403020100000000",
                "00000000",
                "02",
                "03000000",
                "632e6c",
                "05",
                "14000000",
                "0403020100000000",
                "00000000",
                "05",
                "0100",
                "01000000",
                "78",
                "0f",
                "0e000000",
                "0403020100000000",
                "00000000",
                "01",
                "01",
            )
        );
    }

    #[test]
    fn flags_of_a_later_version_survive_a_rewrite() {
        let mut later = record("");
        later.unknown.insert(200, vec![1, 2, 3]);
        let mut read = ClusterFlags::decode(&later.encode()).unwrap();

        assert_eq!(read.unknown_count(), 1);
        read.set(Flag::Disable, Value::Set(BTreeSet::new()), UNIX_EPOCH, "pi-2");
        assert_eq!(ClusterFlags::decode(&read.encode()).unwrap().unknown, later.unknown);
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_harmless() {
        let record = record(DUAL);
        let bytes = record.encode();
        for end in 0..bytes.len() {
            assert!(ClusterFlags::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        for at in 0..bytes.len() {
            for change in 1..=u8::MAX {
                let mut changed = bytes.clone();
                changed[at] ^= change;
                // A change may hit a letter of a name, and then reads as another record; it never reads as
                // this one, and what reads has one encoding only.
                if let Ok(read) = ClusterFlags::decode(&changed) {
                    assert_ne!(read, record, "byte {at}");
                    assert_eq!(read.encode(), changed, "byte {at}");
                }
            }
        }
    }

    #[test]
    fn other_versions_are_named() {
        assert_eq!(ClusterFlags::decode(&[9, 0, 0]), Err(DecodeError::Version { found: 9 }));
        assert_eq!(
            DecodeError::Version { found: 9 }.to_string(),
            "record of the critical flags has an unknown version: found 9, expected 1"
        );
    }

    #[test]
    fn clocks_before_1970_do_not_break_the_record() {
        let early = UNIX_EPOCH - Duration::from_secs(5);

        assert_eq!(whole_seconds(early), UNIX_EPOCH);
    }
}

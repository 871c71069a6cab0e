//! What each side says of itself in the headers of every call, and whether the two fit together.
//!
//! The certificate proves which node it is. The rest a node can only claim: which release it runs, which messages it
//! reads, which start of the process this is. HTTP/2 sends headers that do not change as one byte each.

use std::ops::RangeInclusive;

use tonic::metadata::MetadataMap;

use crate::env::Entropy;
use crate::raft::transport::Refused;
use crate::types::ClusterId;
use crate::versions;

const CLUSTER: &str = "k3s-cluster";
const WIRE: &str = "k3s-wire";
const RELEASE: &str = "k3s-release";
const INCARNATION: &str = "k3s-incarnation";
const EPOCH: &str = "k3s-epoch";

/// A longer release name is none of ours.
const RELEASE_BYTES_MAX: usize = 64;

/// One process of one node, as it presents itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passport {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Versions of the messages between nodes that it reads.
    pub wire: RangeInclusive<u32>,
    /// Its release.
    pub release: String,
    /// Random, new with every start of the process.
    pub incarnation: u64,
    /// Number of its starts.
    pub epoch: u64,
}

impl Passport {
    /// Of this process: this release, a new incarnation.
    pub fn new(cluster: ClusterId, epoch: u64, entropy: &dyn Entropy) -> Self {
        Self {
            cluster,
            wire: versions::own().wire.clone(),
            release: versions::own().name.to_owned(),
            incarnation: entropy.next_u64(),
            epoch,
        }
    }

    /// Whether messages of `theirs` may be read, and in which version the two talk: the newest that both read. `theirs` is the other
    /// end of a connection.
    pub fn check(&self, theirs: &Self) -> Result<u32, Refused> {
        if self.cluster != theirs.cluster {
            let text = format!("found {}, expected {}", theirs.cluster, self.cluster);
            return Err(Refused::WrongCluster(text));
        }
        versions::common(&self.wire, &theirs.wire).ok_or_else(|| {
            Refused::Incompatible(format!(
                "release {} speaks {}, release {} speaks {}",
                theirs.release,
                versions::in_words(&theirs.wire),
                self.release,
                versions::in_words(&self.wire),
            ))
        })
    }

    /// Whether a message in this version may be read.
    pub(super) fn reads(&self, version: u32) -> Result<(), Refused> {
        if self.wire.contains(&version) {
            return Ok(());
        }
        let (release, reads) = (&self.release, versions::in_words(&self.wire));
        let text = format!("a message in version {version}, release {release} speaks {reads}");
        Err(Refused::Incompatible(text))
    }

    pub(super) fn write(&self, headers: &mut MetadataMap) {
        let mut put = |name: &'static str, value: String| {
            // Digits, dashes and a release name are always valid; a name that is not is left out and then missed.
            if let Ok(value) = value.parse() {
                headers.insert(name, value);
            }
        };
        put(CLUSTER, self.cluster.to_string());
        put(WIRE, format!("{}-{}", self.wire.start(), self.wire.end()));
        put(RELEASE, self.release.clone());
        put(INCARNATION, format!("{:x}", self.incarnation));
        put(EPOCH, self.epoch.to_string());
    }

    pub(super) fn read(headers: &MetadataMap) -> Result<Self, Refused> {
        let malformed = |name: &str| Refused::Malformed(format!("no usable header `{name}`"));
        let text = |name| {
            let value = headers.get(name).and_then(|value| value.to_str().ok());
            value.ok_or_else(|| malformed(name))
        };
        let number =
            |name, radix| u64::from_str_radix(text(name)?, radix).map_err(|_| malformed(name));
        let version = |text: &str| text.parse::<u32>().map_err(|_| malformed(WIRE));
        let (first, last) = text(WIRE)?.split_once('-').ok_or_else(|| malformed(WIRE))?;
        let (first, last) = (version(first)?, version(last)?);
        let release = text(RELEASE)?;
        if last < first {
            return Err(malformed(WIRE));
        }
        if RELEASE_BYTES_MAX < release.len() {
            return Err(malformed(RELEASE));
        }
        Ok(Self {
            cluster: ClusterId::new(number(CLUSTER, 16)?),
            wire: first..=last,
            release: release.to_owned(),
            incarnation: number(INCARNATION, 16)?,
            epoch: number(EPOCH, 10)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passport(wire: RangeInclusive<u32>, release: &str) -> Passport {
        Passport {
            cluster: ClusterId::new(0xc1),
            wire,
            release: release.to_owned(),
            incarnation: 0xfeed,
            epoch: 3,
        }
    }

    #[test]
    fn passport_survives_the_way_through_headers() {
        let mut headers = MetadataMap::new();
        passport(1..=2, "0.1.0").write(&mut headers);
        assert_eq!(Passport::read(&headers), Ok(passport(1..=2, "0.1.0")));
    }

    #[test]
    fn every_missing_or_bent_header_is_named() {
        for (name, bent) in [
            (CLUSTER, "x1"),
            (WIRE, "2-1"),
            (RELEASE, "a-release-name-that-goes-on-and-on-and-on-and-on-and-on-and-on-and-on"),
            (INCARNATION, "-1"),
            (EPOCH, "18446744073709551616"),
        ] {
            let mut headers = MetadataMap::new();
            passport(1..=1, "0.1.0").write(&mut headers);
            let expected = Err(Refused::Malformed(format!("no usable header `{name}`")));
            headers.insert(name, bent.parse().unwrap());
            assert_eq!(Passport::read(&headers), expected, "{name}: {bent}");
            headers.remove(name);
            assert_eq!(Passport::read(&headers), expected, "{name} missing");
        }
    }

    #[test]
    fn ranges_that_meet_are_compatible() {
        for (ours, theirs, fits) in [
            (1..=1, 1..=1, Some(1)),
            (1..=2, 2..=3, Some(2)),
            (2..=3, 1..=2, Some(2)),
            (1..=4, 2..=3, Some(3)),
            (1..=1, 2..=3, None),
            (2..=3, 1..=1, None),
        ] {
            let checked = passport(ours.clone(), "a").check(&passport(theirs.clone(), "b"));
            assert_eq!(checked.ok(), fits, "{ours:?} {theirs:?}");
        }
        assert_eq!(passport(1..=2, "a").reads(2), Ok(()));
        let refused = passport(1..=2, "a").reads(3).unwrap_err().to_string();
        assert_eq!(
            refused,
            "incompatible versions: a message in version 3, release a speaks versions 1 to 2"
        );
    }

    #[test]
    fn a_refusal_names_both_releases_and_their_versions() {
        let error = passport(1..=1, "0.1.0").check(&passport(2..=3, "0.9.0")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "incompatible versions: release 0.9.0 speaks versions 2 to 3, release 0.1.0 speaks version 1"
        );
        let foreign = Passport { cluster: ClusterId::new(0xc2), ..passport(1..=1, "0.1.0") };
        let error = passport(1..=1, "0.1.0").check(&foreign).unwrap_err();
        assert_eq!(error.to_string(), "another cluster: found c2, expected c1");
    }
}

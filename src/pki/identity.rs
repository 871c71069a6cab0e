//! Whose certificate it is: cluster, role and node in one URI.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::types::{ClusterId, NodeId};

use super::WrongIdentity;

/// Our own URI scheme: nobody else's certificates can carry it by accident.
const SCHEME: &str = "k3s-server://";

/// What a certificate is for. Each role opens one door only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Answers on port 2379.
    Server,
    /// Talks to other nodes on port 2380, both ways.
    Peer,
    /// Calls port 2379.
    Client,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Server, Self::Peer, Self::Client];

    /// The word in URIs, file names and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Peer => "peer",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The owner of a certificate, written as `k3s-server://<cluster>/<role>/<node>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The cluster it is valid in.
    pub cluster: ClusterId,
    /// What it is for.
    pub role: Role,
    /// The node it was issued to.
    pub node: NodeId,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.cluster, self.role, self.node)
    }
}

impl FromStr for Identity {
    type Err = WrongIdentity;

    fn from_str(text: &str) -> Result<Self, WrongIdentity> {
        let unnamed = || WrongIdentity::Unnamed(text.to_owned());
        let mut parts = text.strip_prefix(SCHEME).ok_or_else(unnamed)?.split('/');
        let (Some(cluster), Some(role), Some(node), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(unnamed());
        };
        let identity = Self {
            cluster: ClusterId::new(u64::from_str_radix(cluster, 16).map_err(|_| unnamed())?),
            role: Role::ALL.into_iter().find(|known| known.name() == role).ok_or_else(unnamed)?,
            node: NodeId::new(u64::from_str_radix(node, 16).map_err(|_| unnamed())?),
        };
        // One spelling per identity: no leading zeros, signs or capitals.
        if identity.to_string() == text { Ok(identity) } else { Err(unnamed()) }
    }
}

impl Identity {
    /// Reads the owner out of a certificate. Says nothing about whether the certificate is genuine.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, WrongIdentity> {
        match uris(certificate)?.as_slice() {
            [one] => one.parse(),
            other => Err(WrongIdentity::Unnamed(format!("found {} URIs", other.len()))),
        }
    }

    /// Refuses anything but this cluster's certificate of this role, and of this node if one is named.
    pub fn expect(
        self,
        cluster: ClusterId,
        role: Role,
        node: Option<NodeId>,
    ) -> Result<Self, WrongIdentity> {
        let right_node = node.is_none_or(|node| node == self.node);
        if self.cluster == cluster && self.role == role && right_node {
            return Ok(self);
        }
        let node = node.map_or_else(|| "*".to_owned(), |node| node.to_string());
        Err(WrongIdentity::Other {
            found: self,
            expected: format!("{SCHEME}{cluster}/{role}/{node}"),
        })
    }
}

/// The URI in the authority's own certificate.
pub(super) fn authority_uri(cluster: ClusterId) -> String {
    format!("{SCHEME}{cluster}/authority")
}

/// All URIs among a certificate's names.
pub(super) fn uris(certificate: &CertificateDer<'_>) -> Result<Vec<String>, WrongIdentity> {
    let unreadable =
        |error: &dyn fmt::Display| WrongIdentity::Unnamed(format!("not readable: {error}"));
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| unreadable(&error))?;
    let names = parsed.subject_alternative_name().map_err(|error| unreadable(&error))?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    Ok(names
        .iter()
        .filter_map(
            |name| if let GeneralName::URI(uri) = name { Some((*uri).to_owned()) } else { None },
        )
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: ClusterId = ClusterId::new(0xc1);

    fn peer() -> Identity {
        Identity { cluster: CLUSTER, role: Role::Peer, node: NodeId::new(0xab) }
    }

    #[test]
    fn identity_survives_the_way_through_its_text() {
        assert_eq!(peer().to_string(), "k3s-server://c1/peer/ab");
        assert_eq!("k3s-server://c1/peer/ab".parse(), Ok(peer()));
    }

    #[test]
    fn every_other_spelling_is_refused() {
        for text in [
            "",
            "spiffe://c1/peer/ab",
            "k3s-server://c1/peer",
            "k3s-server://c1/peer/ab/",
            "k3s-server://c1/peer/ab/x",
            "k3s-server://C1/peer/ab",
            "k3s-server://0c1/peer/ab",
            "k3s-server://+c1/peer/ab",
            "k3s-server://c1/Peer/ab",
            "k3s-server://c1/root/ab",
            "k3s-server://c1/peer/10000000000000000",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }

    #[test]
    fn wrong_cluster_role_and_node_are_each_refused() {
        let node = NodeId::new(0xab);
        assert!(peer().expect(CLUSTER, Role::Peer, None).is_ok());
        assert!(peer().expect(CLUSTER, Role::Peer, Some(node)).is_ok());
        assert!(peer().expect(ClusterId::new(1), Role::Peer, None).is_err());
        assert!(peer().expect(CLUSTER, Role::Client, None).is_err());
        let error = peer().expect(CLUSTER, Role::Peer, Some(NodeId::new(1))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the certificate is k3s-server://c1/peer/ab, expected k3s-server://c1/peer/1"
        );
    }
}

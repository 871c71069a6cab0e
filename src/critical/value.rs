//! Canonical values: two settings mean the same exactly if their values are equal.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use crate::config::keys::find;
use crate::config::{Cidr, Config};

use super::flag::Flag;

/// What a flag is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// On or off.
    Switch(bool),
    /// A word. Empty: not set.
    Text(String),
    /// Networks, in an order that means something: the first family is the cluster's primary one.
    Networks(Vec<Cidr>),
    /// Addresses, in the order of the service networks.
    Addresses(Vec<IpAddr>),
    /// Words without order.
    Set(BTreeSet<String>),
}

impl Value {
    /// The value of a flag in a configuration, default filled in.
    pub fn of(flag: Flag, config: &Config) -> Self {
        match flag {
            Flag::ClusterCidr => Self::Networks(config.network.cluster_cidrs.clone()),
            Flag::ServiceCidr => Self::Networks(config.network.service_cidrs.clone()),
            Flag::ClusterDns => Self::Addresses(config.network.cluster_dns.clone()),
            Flag::Disable => {
                Self::Set(config.texts(flag.name()).into_iter().map(str::to_owned).collect())
            }
            Flag::DisableCloudController
            | Flag::DisableHelmController
            | Flag::DisableKubeProxy
            | Flag::DisableNetworkPolicy
            | Flag::EmbeddedRegistry
            | Flag::FlannelExternalIp
            | Flag::FlannelIpv6Masq
            | Flag::SecretsEncryption
            | Flag::SupervisorMetrics => Self::Switch(config.boolean(flag.name())),
            Flag::ClusterDomain
            | Flag::EgressSelectorMode
            | Flag::FlannelBackend
            | Flag::SecretsEncryptionProvider
            | Flag::ServiceNodePortRange
            | Flag::ServicelbNamespace
            | Flag::SystemDefaultRegistry
            | Flag::CriticalExtraConfig => Self::Text(config.text(flag.name()).to_owned()),
        }
    }

    /// What an older record that does not name the flag is taken to mean. Networks have always been recorded.
    pub fn default_of(flag: Flag) -> Option<Self> {
        match flag {
            Flag::ClusterCidr | Flag::ServiceCidr | Flag::ClusterDns => None,
            Flag::Disable => Some(Self::Set(BTreeSet::new())),
            Flag::DisableCloudController
            | Flag::DisableHelmController
            | Flag::DisableKubeProxy
            | Flag::DisableNetworkPolicy
            | Flag::EmbeddedRegistry
            | Flag::FlannelExternalIp
            | Flag::FlannelIpv6Masq
            | Flag::SecretsEncryption
            | Flag::SupervisorMetrics => Some(Self::Switch(false)),
            Flag::ClusterDomain
            | Flag::EgressSelectorMode
            | Flag::FlannelBackend
            | Flag::SecretsEncryptionProvider
            | Flag::ServiceNodePortRange
            | Flag::ServicelbNamespace
            | Flag::SystemDefaultRegistry
            | Flag::CriticalExtraConfig => {
                find(flag.name()).map(|key| Self::Text(key.default.to_owned()))
            }
        }
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Switch(_) => false,
            Self::Text(text) => text.is_empty(),
            Self::Networks(networks) => networks.is_empty(),
            Self::Addresses(addresses) => addresses.is_empty(),
            Self::Set(words) => words.is_empty(),
        }
    }

    /// As it is written after `--flag=`, and, in quotes where needed, in a file.
    pub fn text(&self) -> String {
        fn joined<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
            items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(",")
        }
        match self {
            Self::Switch(on) => on.to_string(),
            Self::Text(text) => text.clone(),
            Self::Networks(networks) => joined(networks),
            Self::Addresses(addresses) => joined(addresses),
            Self::Set(words) => joined(words),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("(none)");
        }
        f.write_str(&self.text().replace(',', ", "))
    }
}

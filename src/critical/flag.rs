//! The flags that must be equal on all servers.

use std::fmt;

/// One flag. The number is its name in the replicated record and never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Flag {
    /// `cluster-cidr`
    ClusterCidr = 1,
    /// `service-cidr`
    ServiceCidr = 2,
    /// `cluster-dns`
    ClusterDns = 3,
    /// `cluster-domain`
    ClusterDomain = 4,
    /// `disable`
    Disable = 5,
    /// `disable-cloud-controller`
    DisableCloudController = 6,
    /// `disable-helm-controller`
    DisableHelmController = 7,
    /// `disable-kube-proxy`
    DisableKubeProxy = 8,
    /// `disable-network-policy`
    DisableNetworkPolicy = 9,
    /// `egress-selector-mode`
    EgressSelectorMode = 10,
    /// `embedded-registry`
    EmbeddedRegistry = 11,
    /// `flannel-backend`
    FlannelBackend = 12,
    /// `flannel-external-ip`
    FlannelExternalIp = 13,
    /// `flannel-ipv6-masq`
    FlannelIpv6Masq = 14,
    /// `secrets-encryption`
    SecretsEncryption = 15,
    /// `secrets-encryption-provider`
    SecretsEncryptionProvider = 16,
    /// `service-node-port-range`
    ServiceNodePortRange = 17,
    /// `servicelb-namespace`
    ServicelbNamespace = 18,
    /// `supervisor-metrics`
    SupervisorMetrics = 19,
    /// `system-default-registry`
    SystemDefaultRegistry = 20,
    /// `critical-extra-config`
    CriticalExtraConfig = 21,
}

/// Whether a living cluster can get another value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Yes, by a replicated operation and a restart of every server.
    WithRestart,
    /// No, and why.
    Never(&'static str),
}

impl Flag {
    /// All of them, in the order of messages.
    pub const ALL: [Self; 21] = [
        Self::ClusterCidr,
        Self::ServiceCidr,
        Self::ClusterDns,
        Self::ClusterDomain,
        Self::Disable,
        Self::DisableCloudController,
        Self::DisableHelmController,
        Self::DisableKubeProxy,
        Self::DisableNetworkPolicy,
        Self::EgressSelectorMode,
        Self::EmbeddedRegistry,
        Self::FlannelBackend,
        Self::FlannelExternalIp,
        Self::FlannelIpv6Masq,
        Self::SecretsEncryption,
        Self::SecretsEncryptionProvider,
        Self::ServiceNodePortRange,
        Self::ServicelbNamespace,
        Self::SupervisorMetrics,
        Self::SystemDefaultRegistry,
        Self::CriticalExtraConfig,
    ];

    /// Their names, in the same order.
    pub const NAMES: [&str; Self::ALL.len()] = {
        let mut names = [""; Self::ALL.len()];
        let mut at = 0;
        while at < names.len() {
            names[at] = Self::ALL[at].name();
            at += 1;
        }
        names
    };

    /// Its name in files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterCidr => "cluster-cidr",
            Self::ServiceCidr => "service-cidr",
            Self::ClusterDns => "cluster-dns",
            Self::ClusterDomain => "cluster-domain",
            Self::Disable => "disable",
            Self::DisableCloudController => "disable-cloud-controller",
            Self::DisableHelmController => "disable-helm-controller",
            Self::DisableKubeProxy => "disable-kube-proxy",
            Self::DisableNetworkPolicy => "disable-network-policy",
            Self::EgressSelectorMode => "egress-selector-mode",
            Self::EmbeddedRegistry => "embedded-registry",
            Self::FlannelBackend => "flannel-backend",
            Self::FlannelExternalIp => "flannel-external-ip",
            Self::FlannelIpv6Masq => "flannel-ipv6-masq",
            Self::SecretsEncryption => "secrets-encryption",
            Self::SecretsEncryptionProvider => "secrets-encryption-provider",
            Self::ServiceNodePortRange => "service-node-port-range",
            Self::ServicelbNamespace => "servicelb-namespace",
            Self::SupervisorMetrics => "supervisor-metrics",
            Self::SystemDefaultRegistry => "system-default-registry",
            Self::CriticalExtraConfig => "critical-extra-config",
        }
    }

    /// The flag of a name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|flag| flag.name() == name)
    }

    /// Its number in the record.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The flag of a number.
    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|flag| flag.number() == number)
    }

    /// Whether a living cluster can get another value.
    pub const fn change(self) -> Change {
        match self {
            Self::ClusterCidr => {
                Change::Never("every node keeps the pod network it was given when it registered")
            }
            Self::ServiceCidr => {
                Change::Never("existing services keep addresses of the old network")
            }
            Self::ClusterDns => {
                Change::Never("running pods keep the old DNS address, and so does the DNS service")
            }
            Self::ClusterDomain => {
                Change::Never("running pods and certificates keep the old domain")
            }
            Self::Disable
            | Self::DisableCloudController
            | Self::DisableHelmController
            | Self::DisableKubeProxy
            | Self::DisableNetworkPolicy
            | Self::EgressSelectorMode
            | Self::EmbeddedRegistry
            | Self::FlannelBackend
            | Self::FlannelExternalIp
            | Self::FlannelIpv6Masq
            | Self::SecretsEncryption
            | Self::SecretsEncryptionProvider
            | Self::ServiceNodePortRange
            | Self::ServicelbNamespace
            | Self::SupervisorMetrics
            | Self::SystemDefaultRegistry
            | Self::CriticalExtraConfig => Change::WithRestart,
        }
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::keys::KEYS;

    #[test]
    fn flags_are_the_critical_rows_of_the_table() {
        let table: BTreeSet<_> =
            KEYS.iter().filter(|key| key.critical).map(|key| key.name).collect();
        let flags: BTreeSet<_> = Flag::ALL.iter().map(|flag| flag.name()).collect();

        assert_eq!(flags, table);
    }

    #[test]
    fn names_and_numbers_lead_back() {
        for flag in Flag::ALL {
            assert_eq!(Flag::of_name(flag.name()), Some(flag));
            assert_eq!(Flag::of_number(flag.number()), Some(flag));
        }
        assert_eq!(Flag::of_number(0), None);
    }
}

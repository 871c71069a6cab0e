//! Compares this server's flags with the cluster's.

use std::collections::BTreeMap;
use std::time::SystemTime;

use crate::config::{Config, Origin};

use super::flag::Flag;
use super::value::Value;

/// Proof that a server's flags are those of its cluster. Made by [`CriticalFlags::found`], [`CriticalFlags::matches`]
/// and [`ClusterFlags::agrees_with`] only; whoever adds or starts a member asks for it.
#[must_use = "the right to become or to be a member"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatchedFlags(());

/// This server's flags, with the place each was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriticalFlags {
    entries: BTreeMap<Flag, (Value, Origin)>,
}

/// One flag as the cluster has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The value.
    pub value: Value,
    /// When it was set, by the clock of the server that set it, in whole seconds.
    pub since: SystemTime,
    /// Name of the server that set it.
    pub set_by: String,
}

/// The cluster's flags, as replicated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterFlags {
    pub(super) entries: BTreeMap<Flag, Recorded>,
    /// Flags of a later version: number and bytes, kept as they are.
    pub(super) unknown: BTreeMap<u8, Vec<u8>>,
}

/// The cluster's side of a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterSide {
    /// It was set.
    Recorded(Recorded),
    /// The record is older than the flag, which was then at its default.
    Default(Value),
}

impl ClusterSide {
    /// The value that this server must have.
    pub const fn value(&self) -> &Value {
        match self {
            Self::Recorded(recorded) => &recorded.value,
            Self::Default(value) => value,
        }
    }

    /// Name of the server that set it, if anybody did.
    pub fn set_by(&self) -> Option<&str> {
        match self {
            Self::Recorded(recorded) => Some(&recorded.set_by),
            Self::Default(_) => None,
        }
    }
}

/// One flag that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Which.
    pub flag: Flag,
    /// The value here.
    pub here: Value,
    /// Where it was written here.
    pub origin: Origin,
    /// The cluster's.
    pub cluster: ClusterSide,
}

/// All flags that differ; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatches(pub(super) Vec<Mismatch>);

impl Mismatches {
    /// In the order of [`Flag::ALL`].
    pub fn iter(&self) -> std::slice::Iter<'_, Mismatch> {
        self.0.iter()
    }
}

impl std::error::Error for Mismatches {}

impl CriticalFlags {
    /// The flags of a configuration, defaults filled in.
    pub fn of(config: &Config) -> Self {
        let entry = |flag: Flag| (flag, (Value::of(flag, config), config.origin(flag.name())));
        Self { entries: Flag::ALL.into_iter().map(entry).collect() }
    }

    /// The value of a flag.
    pub fn value(&self, flag: Flag) -> Option<&Value> {
        self.entries.get(&flag).map(|(value, _)| value)
    }

    /// For the leader that is asked to admit this server: a record as if it had founded the cluster.
    pub fn encode(&self, node_name: &str) -> Vec<u8> {
        self.record(SystemTime::UNIX_EPOCH, node_name).encode()
    }

    fn record(&self, since: SystemTime, node_name: &str) -> ClusterFlags {
        let mut cluster = ClusterFlags::default();
        for (flag, (value, _)) in &self.entries {
            cluster.set(*flag, value.clone(), since, node_name);
        }
        cluster
    }

    /// Makes the record of a new cluster.
    pub fn found(&self, since: SystemTime, node_name: &str) -> (ClusterFlags, MatchedFlags) {
        (self.record(since, node_name), MatchedFlags(()))
    }

    /// Compares with the record of a cluster.
    pub fn matches(&self, cluster: &ClusterFlags) -> Result<MatchedFlags, Mismatches> {
        let differs = |(flag, (here, origin)): (&Flag, &(Value, Origin))| {
            let side = cluster.side(*flag)?;
            (side.value() != here).then(|| Mismatch {
                flag: *flag,
                here: here.clone(),
                origin: origin.clone(),
                cluster: side,
            })
        };
        let mismatches: Vec<Mismatch> = self.entries.iter().filter_map(differs).collect();
        if mismatches.is_empty() { Ok(MatchedFlags(())) } else { Err(Mismatches(mismatches)) }
    }
}

impl ClusterFlags {
    /// Sets a flag. The time is kept in whole seconds, so that a record equals what was read back from it.
    pub fn set(&mut self, flag: Flag, value: Value, since: SystemTime, node_name: &str) {
        let since = super::format::whole_seconds(since);
        self.entries.insert(flag, Recorded { value, since, set_by: node_name.to_owned() });
    }

    /// A flag, if it was recorded.
    pub fn recorded(&self, flag: Flag) -> Option<&Recorded> {
        self.entries.get(&flag)
    }

    /// The value of a flag, its default filled in. `None` only for a network that an incomplete record lacks.
    pub fn value(&self, flag: Flag) -> Option<Value> {
        self.side(flag).map(|side| side.value().clone())
    }

    /// Flags in the record that only a later version knows, and which were therefore not compared.
    pub fn unknown_count(&self) -> usize {
        self.unknown.len()
    }

    /// Every flag with a value, defaults filled in, in the order of [`Flag::ALL`].
    pub fn sides(&self) -> impl Iterator<Item = (Flag, ClusterSide)> + '_ {
        Flag::ALL.into_iter().filter_map(|flag| Some((flag, self.side(flag)?)))
    }

    /// Compares with a server's flags as it sent them, or names the flags that differ.
    pub fn agrees_with(&self, server: &Self) -> Result<MatchedFlags, Vec<Flag>> {
        let differs = |flag: &Flag| self.value(*flag) != server.value(*flag);
        let differing: Vec<Flag> = Flag::ALL.into_iter().filter(differs).collect();
        if differing.is_empty() { Ok(MatchedFlags(())) } else { Err(differing) }
    }

    fn side(&self, flag: Flag) -> Option<ClusterSide> {
        match self.entries.get(&flag) {
            Some(recorded) => Some(ClusterSide::Recorded(recorded.clone())),
            None => Value::default_of(flag).map(ClusterSide::Default),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::super::tests::flags;
    use super::*;

    fn cluster(text: &str) -> ClusterFlags {
        flags(text).found(UNIX_EPOCH + Duration::from_secs(1), "pi-1").0
    }

    fn differing(here: &str, there: &str) -> Vec<&'static str> {
        match flags(here).matches(&cluster(there)) {
            Ok(_) => Vec::new(),
            Err(mismatches) => mismatches.iter().map(|mismatch| mismatch.flag.name()).collect(),
        }
    }

    /// Every flag with its default as a user would write it.
    const DEFAULTS: &str = "cluster-cidr: 10.42.0.0/16\nservice-cidr: 10.43.0.0/16\ncluster-dns: 10.43.0.10\n\
        cluster-domain: cluster.local\ndisable: []\ndisable-cloud-controller: false\n\
        disable-helm-controller: no\ndisable-kube-proxy: \"F\"\ndisable-network-policy: off\n\
        egress-selector-mode: agent\nembedded-registry: 0\nflannel-backend: vxlan\n\
        flannel-external-ip: false\nflannel-ipv6-masq: false\nsecrets-encryption: false\n\
        secrets-encryption-provider: aescbc\nservice-node-port-range: 30000-32767\n\
        servicelb-namespace: kube-system\nsupervisor-metrics: false\nsystem-default-registry: \"\"\n\
        critical-extra-config: \"\"\n";

    #[test]
    fn defaults_written_out_equal_defaults_left_out() {
        for flag in Flag::ALL {
            assert!(DEFAULTS.contains(&format!("{flag}: ")), "{flag} is not in the test");
        }
        assert_eq!(differing(DEFAULTS, ""), [""; 0]);
        assert_eq!(differing("", DEFAULTS), [""; 0]);
    }

    /// One other value for every flag.
    const OTHERS: [(&str, &str); 21] = [
        ("cluster-cidr", "10.44.0.0/16"),
        ("service-cidr", "10.45.0.0/16"),
        ("cluster-dns", "10.43.0.11"),
        ("cluster-domain", "k8s.local"),
        ("disable", "traefik"),
        ("disable-cloud-controller", "true"),
        ("disable-helm-controller", "true"),
        ("disable-kube-proxy", "true"),
        ("disable-network-policy", "true"),
        ("egress-selector-mode", "pod"),
        ("embedded-registry", "true"),
        ("flannel-backend", "host-gw"),
        ("flannel-external-ip", "true"),
        ("flannel-ipv6-masq", "true"),
        ("secrets-encryption", "true"),
        ("secrets-encryption-provider", "secretbox"),
        ("service-node-port-range", "30000-32000"),
        ("servicelb-namespace", "other"),
        ("supervisor-metrics", "true"),
        ("system-default-registry", "registry.example"),
        ("critical-extra-config", "x"),
    ];

    #[test]
    fn every_flag_alone_is_enough_to_refuse() {
        for (name, value) in OTHERS {
            let line = format!("{name}: {value}\n");
            // Another service network moves the default of cluster-dns too.
            let expected =
                if name == "service-cidr" { vec![name, "cluster-dns"] } else { vec![name] };
            assert_eq!(differing(&line, ""), expected);
            assert_eq!(differing("", &line), expected);
            assert_eq!(differing(&line, &line), [""; 0]);
        }
    }

    #[test]
    fn all_differences_come_at_once() {
        let all: String = OTHERS
            .iter()
            .filter(|(name, _)| *name != "cluster-dns")
            .map(|(name, value)| format!("{name}: {value}\n"))
            .collect();

        assert_eq!(differing(&all, "").len(), Flag::ALL.len());
    }

    #[test]
    fn disable_is_a_set() {
        let one = "disable: [traefik, servicelb]\n";

        assert_eq!(differing(one, "disable: servicelb,traefik,traefik\n"), [""; 0]);
        assert_eq!(differing(one, "disable: [traefik]\ndisable+: [' servicelb ']\n"), [""; 0]);
        assert_eq!(differing(one, "disable: traefik\n"), ["disable"]);
    }

    #[test]
    fn networks_compare_by_meaning_and_order() {
        let dual =
            "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: 10.43.0.0/16,fd00:43::/112\n";
        let spelled = "cluster-cidr: [10.42.0.0/16, 'fd00:0042:0::/56']\nservice-cidr: [10.43.0.0/16, 'FD00:43:0::/112']\n";
        let turned =
            "cluster-cidr: fd00:42::/56,10.42.0.0/16\nservice-cidr: fd00:43::/112,10.43.0.0/16\n";

        assert_eq!(differing(dual, spelled), [""; 0]);
        assert_eq!(differing(dual, turned), ["cluster-cidr", "service-cidr", "cluster-dns"]);
        assert_eq!(differing(dual, ""), ["cluster-cidr", "service-cidr", "cluster-dns"]);
    }

    #[test]
    fn first_node_address_decides_the_default_family() {
        assert_eq!(
            differing(
                "node-ip: fd00::5\n",
                "cluster-cidr: fd00:42::/56\nservice-cidr: fd00:43::/112\n"
            ),
            [""; 0]
        );
        assert_eq!(
            differing("node-ip: fd00::5\n", "node-ip: 10.0.0.5\n"),
            ["cluster-cidr", "service-cidr", "cluster-dns"]
        );
    }

    #[test]
    fn flags_missing_in_an_old_record_count_as_their_default() {
        let mut old = cluster("");
        old.entries.retain(|flag, _| flag.number() <= 4);

        assert!(flags("").matches(&old).is_ok());
        let mismatches = flags("supervisor-metrics: true\n").matches(&old).unwrap_err();
        let only: Vec<_> = mismatches.iter().collect();
        assert_eq!(only.len(), 1);
        assert_eq!(only[0].cluster, ClusterSide::Default(Value::Switch(false)));
    }

    #[test]
    fn differences_carry_place_time_and_author() {
        let mismatches =
            flags("debug: true\ndisable: traefik\n").matches(&cluster("")).unwrap_err();
        let mismatch = mismatches.iter().next().unwrap();

        assert_eq!(mismatch.origin.to_string(), "config.yaml:2:10");
        let ClusterSide::Recorded(recorded) = &mismatch.cluster else { panic!() };
        assert_eq!(recorded.set_by, "pi-1");
        assert_eq!(recorded.since, UNIX_EPOCH + Duration::from_secs(1));
    }
}

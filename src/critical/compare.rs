//! Compares this server's flags with the cluster's.

use std::collections::BTreeMap;
use std::time::SystemTime;

use crate::config::{Config, Origin};

use super::flag::Flag;
use super::value::Value;

/// Proof that this server's flags are those of its cluster. Made by [`CriticalFlags::found`] and
/// [`CriticalFlags::matches`] only; whoever adds or starts a member asks for it.
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

    /// Makes the record of a new cluster.
    pub fn found(&self, since: SystemTime, node_name: &str) -> (ClusterFlags, MatchedFlags) {
        let mut cluster = ClusterFlags::default();
        for (flag, (value, _)) in &self.entries {
            cluster.set(*flag, value.clone(), since, node_name);
        }
        (cluster, MatchedFlags(()))
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

    /// Flags in the record that only a later version knows, and which were therefore not compared.
    pub fn unknown_count(&self) -> usize {
        self.unknown.len()
    }

    fn side(&self, flag: Flag) -> Option<ClusterSide> {
        match self.entries.get(&flag) {
            Some(recorded) => Some(ClusterSide::Recorded(recorded.clone())),
            None => Value::default_of(flag).map(ClusterSide::Default),
        }
    }
}

//! Gives one flag of a cluster another value, on purpose.
//!
//! The value is checked by the rules of the configuration file, together with all others of the record: what this accepts,
//! a server can be started with.

use std::collections::BTreeMap;
use std::time::SystemTime;

use thiserror::Error;

use crate::config::keys::find;
use crate::config::{Given, Host, Paths, Problems, Request, nearest, resolve};

use super::compare::{ClusterFlags, CriticalFlags};
use super::flag::{Change, Flag};
use super::value::Value;

/// A record in which one flag has a new value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The new record.
    pub record: ClusterFlags,
    /// Which flag.
    pub flag: Flag,
    /// What it was.
    pub old: Value,
    /// What it is.
    pub new: Value,
}

/// Why a flag keeps its value.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ChangeRefused {
    /// No such flag.
    #[error("{name} is no critical flag{}", suggestion(.nearest))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What may have been meant.
        nearest: Option<&'static str>,
    },
    /// A living cluster cannot get another value.
    #[error("{flag} of a living cluster cannot be changed: {reason}")]
    Never {
        /// The flag.
        flag: Flag,
        /// Why.
        reason: &'static str,
    },
    /// The value is wrong, by itself or beside the others.
    #[error("{0}")]
    Invalid(Problems),
    /// It is that already.
    #[error("{flag} is {value} already")]
    Same {
        /// The flag.
        flag: Flag,
        /// Its value.
        value: Value,
    },
}

fn suggestion(nearest: &Option<&'static str>) -> String {
    match nearest {
        Some(name) => format!(", did you mean {name}?"),
        None => "; `k3s-server flags show` lists them".to_owned(),
    }
}

/// Checks a wish and makes the record it leads to. `text` is as on a command line; empty: nothing, or the default.
pub fn change(
    record: &ClusterFlags,
    name: &str,
    text: &str,
    since: SystemTime,
    node_name: &str,
) -> Result<Changed, ChangeRefused> {
    let Some(flag) = Flag::of_name(name) else {
        let nearest = nearest(name, Flag::ALL.into_iter().map(Flag::name));
        return Err(ChangeRefused::Unknown { name: printable(name), nearest });
    };
    if let Change::Never(reason) = flag.change() {
        return Err(ChangeRefused::Never { flag, reason });
    }
    let wanted = values(record, flag, text).map_err(ChangeRefused::Invalid)?;
    let (Some(old), Some(new)) = (record.value(flag), wanted.value(flag).cloned()) else {
        unreachable!("only networks, which never change, may lack a value: {flag}")
    };
    if old == new {
        return Err(ChangeRefused::Same { flag, value: old });
    }
    let mut record = record.clone();
    record.set(flag, new.clone(), since, node_name);
    Ok(Changed { record, flag, old, new })
}

/// The flags of a server whose configuration is the record, and `text` for this flag.
fn values(record: &ClusterFlags, flag: Flag, text: &str) -> Result<CriticalFlags, Problems> {
    let given = |(other, value): (Flag, String)| {
        let text = if other == flag { text.trim().to_owned() } else { value };
        let key = find(other.name()).filter(|_| !text.is_empty())?;
        Some(Given::new(key, &text))
    };
    let texts = record.sides().map(|(flag, side)| (flag, side.value().text()));
    let request = Request {
        command_line: texts.filter_map(given).collect(),
        environment: BTreeMap::new(),
        host: Host::default(),
        paths: Paths::default(),
    };
    let loaded = resolve(&[], Problems::default(), &request)?;
    Ok(CriticalFlags::of(&loaded.config))
}

/// A name that somebody typed, for a message.
fn printable(name: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 64;
    name.chars().filter(|c| !c.is_control()).take(SHOWN_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::super::tests::flags;
    use super::*;

    const LATER: SystemTime = UNIX_EPOCH;

    fn set(record: &ClusterFlags, name: &str, text: &str) -> Result<Changed, ChangeRefused> {
        change(record, name, text, LATER + Duration::from_secs(60), "pi-2")
    }

    fn record(text: &str) -> ClusterFlags {
        flags(text).found(UNIX_EPOCH, "pi-1").0
    }

    fn refused(name: &str, text: &str) -> String {
        set(&record(""), name, text).unwrap_err().to_string()
    }

    #[test]
    fn a_changed_flag_is_in_canonical_form_and_says_who_and_when() {
        let before = record("disable: traefik\n");
        let changed = set(&before, "disable", "traefik, metrics-server,traefik").unwrap();

        assert_eq!(
            (changed.old.text(), changed.new.text()),
            ("traefik".into(), "metrics-server,traefik".into())
        );
        let now = changed.record.recorded(Flag::Disable).unwrap();
        assert_eq!((now.set_by.as_str(), now.since), ("pi-2", LATER + Duration::from_secs(60)));
        let other = changed.record.recorded(Flag::ClusterDomain).unwrap();
        assert_eq!(other.set_by, "pi-1", "nothing else was touched");
        assert!(flags("disable: [metrics-server, traefik]\n").matches(&changed.record).is_ok());
        assert!(flags("disable: traefik\n").matches(&changed.record).is_err());
    }

    #[test]
    fn every_changeable_flag_can_be_changed_and_the_others_give_the_reason() {
        for (name, text) in [
            ("cluster-cidr", "10.50.0.0/16"),
            ("service-cidr", "10.51.0.0/16"),
            ("cluster-dns", "10.43.0.11"),
            ("cluster-domain", "k8s.local"),
            ("disable", "traefik"),
            ("disable-cloud-controller", "true"),
            ("disable-helm-controller", "1"),
            ("disable-kube-proxy", "T"),
            ("disable-network-policy", "true"),
            ("egress-selector-mode", "pod"),
            ("embedded-registry", "true"),
            ("flannel-backend", "host-gw"),
            ("flannel-external-ip", "true"),
            ("flannel-ipv6-masq", "true"),
            ("secrets-encryption", "true"),
            ("secrets-encryption-provider", "secretbox"),
            ("service-node-port-range", "30000-32000"),
            ("servicelb-namespace", "lb"),
            ("supervisor-metrics", "true"),
            ("system-default-registry", "registry.example:5000"),
            ("critical-extra-config", "x: y"),
        ] {
            let flag = Flag::of_name(name).unwrap();
            match (flag.change(), set(&record(""), name, text)) {
                (Change::WithRestart, Ok(changed)) => assert_ne!(changed.old, changed.new),
                (Change::Never(reason), Err(error @ ChangeRefused::Never { .. })) => {
                    assert!(error.to_string().contains(reason), "{error}");
                }
                (change, result) => panic!("{name}: {change:?} {result:?}"),
            }
        }
    }

    #[test]
    fn wrong_values_are_refused_by_the_rules_of_the_configuration() {
        for (name, text, why) in [
            ("disable", "treafik", "names an unknown component: found treafik"),
            ("disable-kube-proxy", "maybe", "is not a boolean"),
            ("flannel-backend", "ipip", "has an unknown value"),
            ("service-node-port-range", "5-4", "is not a range of ports"),
            ("critical-extra-config", "a\0b", "holds a zero byte"),
            ("cluster-domian", "x", "did you mean cluster-domain?"),
            ("token", "x", "token is no critical flag; `k3s-server flags show` lists them"),
            ("disable-kube-proxy", "F", "disable-kube-proxy is false already"),
        ] {
            let text = refused(name, text);
            assert!(text.contains(why), "{text}");
        }
    }

    #[test]
    fn an_empty_value_takes_a_flag_back_to_its_default() {
        let record = record("disable: traefik\nsystem-default-registry: r.example\n");

        assert!(set(&record, "disable", "").unwrap().new.is_empty());
        assert!(set(&record, "system-default-registry", "").unwrap().new.is_empty());
        assert!(matches!(set(&record, "flannel-backend", ""), Err(ChangeRefused::Same { .. })));
    }

    #[test]
    fn dual_stack_records_can_be_changed_too() {
        let record = record(
            "cluster-cidr: fd00:42::/56,10.42.0.0/16\nservice-cidr: fd00:43::/112,10.43.0.0/16\n",
        );

        let changed = set(&record, "flannel-ipv6-masq", "true").unwrap();
        assert_eq!(changed.record.value(Flag::ClusterCidr), record.value(Flag::ClusterCidr));
    }
}

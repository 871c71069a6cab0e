//! Decides at every door of the cluster whether a server's flags open it.
//!
//! | door | compared | with |
//! |---|---|---|
//! | founding | nothing: the flags become the record | |
//! | a start | own configuration | the record in the local copy; peers may be down |
//! | joining | own configuration | the record in the credentials, before anything is written |
//! | admission, on the leader | the joiner's flags | the leader's record |
//! | first contact with the leader | own configuration | the leader's record: the local copy may be behind |
//!
//! Pure. A record is bytes to whoever carries it.
//!
//! # Not here
//!
//! Changing a flag on purpose: [`super::change`]. Who asks whom, and when: `join` and `server`.

use bytes::Bytes;
use thiserror::Error;

use crate::announce;
use crate::command::Command;
use crate::events::{EventId, fields};
use crate::proto::node::admit_reply::Result as Answer;
use crate::proto::node::cluster_change::Change;
use crate::proto::node::{AdmitReply, ClusterChange, RecordFlags};

use super::compare::{ClusterFlags, CriticalFlags, MatchedFlags, Mismatches};
use super::flag::Flag;
use super::format::DecodeError;

/// Why a server may not take part.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FlagsError {
    /// Its settings differ from the cluster's.
    #[error(transparent)]
    Differ(#[from] Mismatches),
    /// The cluster's record cannot be read.
    #[error(transparent)]
    Record(#[from] DecodeError),
    /// The cluster is being founded, and its founder has not come to that yet.
    #[error("the cluster has not recorded its critical flags yet")]
    Unrecorded,
}

impl FlagsError {
    /// Whether starting again changes nothing before somebody changes the configuration.
    pub const fn is_configuration(&self) -> bool {
        matches!(self, Self::Differ(_))
    }

    /// What the operator can do. For differing flags, the text itself ends with it.
    pub const fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Differ(_) => None,
            Self::Record(DecodeError::Version { .. }) => {
                Some("the cluster runs a newer release; install it on this server too")
            }
            Self::Record(DecodeError::Damaged { .. }) => {
                Some("with other servers running, remove this node and join it again")
            }
            Self::Unrecorded => Some("wait until the first server is ready, then start this one"),
        }
    }

    /// Says it in the journal: one event for each flag, so that `journalctl K3S_FLAG=service-cidr` finds it.
    pub fn announce(&self) {
        let mismatches = match self {
            Self::Differ(mismatches) => mismatches,
            Self::Record(_) | Self::Unrecorded => {
                tracing::error!("critical flags cannot be compared: {self}");
                return;
            }
        };
        for mismatch in mismatches.iter() {
            announce!(
                EventId::FlagsMismatch,
                { fields::FLAG } = mismatch.flag.name(),
                { fields::VALUE_HERE } = %mismatch.here,
                { fields::VALUE_CLUSTER } = %mismatch.cluster.value(),
                { fields::PATH } = %mismatch.origin,
                { fields::BY } = mismatch.cluster.set_by(),
                { fields::SINCE } = mismatch.cluster.since().as_deref(),
                "{}",
                mismatch.sentence()
            );
        }
    }
}

impl Mismatches {
    /// Says that the cluster's flags were changed while this server runs with the old ones.
    pub fn announce_outdated(&self) {
        for mismatch in self.iter() {
            announce!(
                EventId::FlagsOutdated,
                { fields::FLAG } = mismatch.flag.name(),
                { fields::VALUE_HERE } = %mismatch.here,
                { fields::VALUE_CLUSTER } = %mismatch.cluster.value(),
                { fields::PATH } = %mismatch.origin,
                { fields::BY } = mismatch.cluster.set_by(),
                { fields::SINCE } = mismatch.cluster.since().as_deref(),
                "this server still runs with another value, and will not start again with it: {}",
                mismatch.sentence()
            );
        }
    }
}

/// The command that records the flags of a new cluster. May be repeated: a record that is there stays.
pub fn founding(record: &ClusterFlags) -> Command {
    let flags = record.encode().into();
    Command::Cluster(ClusterChange { change: Some(Change::RecordFlags(RecordFlags { flags })) })
}

/// Compares this server's flags with a record as it is carried. Empty: there is none yet.
pub fn against(own: &CriticalFlags, record: &[u8]) -> Result<MatchedFlags, FlagsError> {
    if record.is_empty() {
        return Err(FlagsError::Unrecorded);
    }
    Ok(own.matches(&ClusterFlags::decode(record)?)?)
}

/// Why the leader does not admit a joiner.
#[derive(Clone, Debug, PartialEq)]
pub enum NotAdmitted {
    /// For the joiner, as it stands.
    Answer(AdmitReply),
    /// The joiner's flags cannot be read.
    Malformed(DecodeError),
    /// Our own record cannot be read.
    Damaged(DecodeError),
}

/// Compares a joiner's flags with the leader's record.
pub fn admission(record: &Bytes, joiner: &[u8]) -> Result<MatchedFlags, NotAdmitted> {
    let answer = |result: Answer, detail: String| {
        let flags = record.clone();
        Err(NotAdmitted::Answer(AdmitReply { result: result.into(), flags, detail }))
    };
    if record.is_empty() {
        return answer(Answer::Later, FlagsError::Unrecorded.to_string());
    }
    let cluster = ClusterFlags::decode(record).map_err(NotAdmitted::Damaged)?;
    let joiner = ClusterFlags::decode(joiner).map_err(NotAdmitted::Malformed)?;
    match cluster.agrees_with(&joiner) {
        Ok(matched) => Ok(matched),
        Err(differing) => {
            let names: Vec<&str> = differing.into_iter().map(Flag::name).collect();
            answer(Answer::FlagsDiffer, names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::super::tests::flags;
    use super::*;

    fn record(text: &str) -> Bytes {
        let at = UNIX_EPOCH + Duration::from_secs(1);
        flags(text).found(at, "pi-1").0.encode().into()
    }

    #[test]
    fn a_start_is_compared_with_the_record_it_carries() {
        let own = flags("disable: traefik\n");

        assert!(against(&own, &record("disable: [traefik]\n")).is_ok());
        let differs = against(&own, &record("")).unwrap_err();
        assert!(differs.is_configuration() && differs.to_string().contains("disable"));
    }

    #[test]
    fn no_record_and_an_unreadable_one_are_not_a_match_and_not_the_configurations_fault() {
        let own = flags("");
        for (bytes, text) in [
            (&[][..], "the cluster has not recorded its critical flags yet"),
            (
                &[9, 0, 0],
                "record of the critical flags has an unknown version: found 9, expected 1",
            ),
            (&[1, 1], "record of the critical flags is damaged: it ends too early"),
        ] {
            let error = against(&own, bytes).unwrap_err();
            assert_eq!(error.to_string(), text);
            assert!(!error.is_configuration() && error.remedy().is_some(), "{error}");
        }
    }

    #[test]
    fn founding_records_what_a_restart_then_matches() {
        let own = flags("disable: [servicelb, traefik]\ncluster-domain: k8s.local\n");
        let (record, _proof) = own.found(UNIX_EPOCH, "pi-1");
        let Command::Cluster(ClusterChange { change: Some(Change::RecordFlags(change)) }) =
            founding(&record)
        else {
            panic!("another command")
        };

        assert!(against(&own, &change.flags).is_ok());
    }

    #[test]
    fn leader_names_all_flags_in_which_a_joiner_differs_and_sends_its_record() {
        let ours = record("disable: traefik\n");
        let joiner = record("cluster-domain: k8s.local\n");

        assert!(admission(&ours, &ours).is_ok());
        let Err(NotAdmitted::Answer(answer)) = admission(&ours, &joiner) else { panic!() };
        assert_eq!(answer.result(), Answer::FlagsDiffer);
        assert_eq!(answer.detail, "cluster-domain, disable");
        assert_eq!(answer.flags, ours);
    }

    #[test]
    fn leader_without_a_record_admits_nobody_yet() {
        let Err(NotAdmitted::Answer(answer)) = admission(&Bytes::new(), &record("")) else {
            panic!()
        };
        assert_eq!(answer.result(), Answer::Later);
        assert!(matches!(admission(&record(""), &[7]), Err(NotAdmitted::Malformed(_))));
        assert!(matches!(
            admission(&Bytes::from_static(&[7]), &record("")),
            Err(NotAdmitted::Damaged(_))
        ));
    }
}

//! Lays out the store as etcd's own database file: which buckets there are, and how their keys are spelled.
//!
//! etcd keeps one bbolt file per member: every revision of every key in bucket `key`, and around it small buckets
//! with what the member knows of its cluster. `etcdctl snapshot save` stores that file with its SHA-256 behind it,
//! and `etcdutl snapshot restore` makes a new member of it.
//!
//! # Shape
//!
//! An [`EtcdFile`] borrows the facts and a [`Revisions`] source. [`EtcdFile::plan`] walks the source once and yields
//! the size, [`EtcdFile::write`] walks it again. Revisions are handed over one at a time; leases, alarms and members
//! are few and come as slices.
//!
//! # Invariants
//!
//! - Keys of bucket `key` are (main, sub) in big-endian, so byte order is revision order.
//! - Every bucket that any etcd from 3.4 on expects is there, empty if need be.
//! - No auth data and no v2 store: we have neither, and etcd reads their absence as "off".

use std::io::Write;

use prost::Message;

use super::bolt::{FileWriter, Plan, WriteError};
use crate::mvcc::LeaseRecord;
use crate::proto::etcdserverpb::AlarmMember;
use crate::raft::Member;
use crate::types::{LogIndex, NodeId, Revision, Term};

/// One write of one key, as bucket `key` stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevisionRow<'a> {
    /// The transaction.
    pub main: Revision,
    /// Which write of the transaction.
    pub sub: i64,
    /// Whether the write deleted the key.
    pub tombstone: bool,
    /// An encoded `mvccpb.KeyValue`; of a tombstone, one with nothing but the key.
    pub key_value: &'a [u8],
}

/// Hands out every stored revision, in (main, sub) order, and the same ones each time.
pub trait Revisions {
    /// Calls `visit` for each. An error from `visit` ends the walk and is returned.
    fn walk(
        &self,
        visit: &mut dyn FnMut(RevisionRow<'_>) -> Result<(), WriteError>,
    ) -> Result<(), WriteError>;
}

/// Everything that goes into the file.
pub struct EtcdFile<'a> {
    /// The history.
    pub revisions: &'a dyn Revisions,
    /// History below this is gone; 0 before the first compaction.
    pub compacted: Revision,
    /// The last applied entry.
    pub applied: LogIndex,
    /// Its term.
    pub term: Term,
    /// Live leases, in any order.
    pub leases: &'a [LeaseRecord],
    /// Raised alarms: (member, etcd's alarm type).
    pub alarms: &'a [(NodeId, i32)],
    /// The cluster's members.
    pub members: &'a [Member],
    /// The etcd version whose file this is, such as `3.6.0`; 3.5 and older ignore it.
    pub version: &'a str,
}

impl EtcdFile<'_> {
    /// Walks the content once, for its size.
    pub fn plan(&self) -> Result<Plan, WriteError> {
        Plan::measure(|file| self.fill(file))
    }

    /// Walks the content again and writes the file.
    pub fn write(&self, plan: &Plan, sink: &mut dyn Write) -> Result<(), WriteError> {
        plan.write(sink, |file| self.fill(file))
    }

    fn fill(&self, file: &mut FileWriter<'_>) -> Result<(), WriteError> {
        small_bucket(file, "alarm", self.alarm_rows())?;
        for empty in ["auth", "authRoles", "authUsers", "members_removed"] {
            small_bucket(file, empty, Vec::new())?;
        }
        let version = self.version.as_bytes().to_vec();
        small_bucket(file, "cluster", vec![(b"clusterVersion".to_vec(), version)])?;
        file.bucket("key", |bucket| {
            self.revisions.walk(&mut |row| bucket.put(&row.key(), row.key_value))
        })?;
        small_bucket(file, "lease", self.lease_rows())?;
        small_bucket(file, "members", self.member_rows())?;
        small_bucket(file, "meta", self.meta_rows())
    }

    fn alarm_rows(&self) -> Rows {
        let row = |&(member, alarm): &(NodeId, i32)| {
            (AlarmMember { member_id: member.get(), alarm }.encode_to_vec(), Vec::new())
        };
        self.alarms.iter().map(row).collect()
    }

    fn lease_rows(&self) -> Rows {
        let row = |lease: &LeaseRecord| {
            let stored = StoredLease {
                id: lease.id.get(),
                ttl: lease.ttl_secs,
                remaining_ttl: lease.remaining_secs,
            };
            (lease.id.get().to_be_bytes().to_vec(), stored.encode_to_vec())
        };
        self.leases.iter().map(row).collect()
    }

    fn member_rows(&self) -> Rows {
        let row = |member: &Member| (member.id.to_string().into_bytes(), member_json(member));
        self.members.iter().map(row).collect()
    }

    fn meta_rows(&self) -> Rows {
        let mut rows = vec![
            (b"confState".to_vec(), self.membership_json().into_bytes()),
            (b"consistent_index".to_vec(), self.applied.get().to_be_bytes().to_vec()),
            (b"storageVersion".to_vec(), self.version.as_bytes().to_vec()),
            (b"term".to_vec(), self.term.get().to_be_bytes().to_vec()),
        ];
        if Revision::new(0) < self.compacted {
            let compacted = revision_key(self.compacted, 0).to_vec();
            rows.push((b"finishedCompactRev".to_vec(), compacted.clone()));
            rows.push((b"scheduledCompactRev".to_vec(), compacted));
        }
        rows
    }

    /// raft's membership, in the words of etcd's raft library.
    fn membership_json(&self) -> String {
        let ids = |learner: bool| -> Vec<String> {
            self.members
                .iter()
                .filter(|member| member.learner == learner)
                .map(|member| member.id.get().to_string())
                .collect()
        };
        let mut out = format!("{{\"voters\":[{}]", ids(false).join(","));
        let learners = ids(true);
        if !learners.is_empty() {
            out.push_str(&format!(",\"learners\":[{}]", learners.join(",")));
        }
        out.push_str(",\"auto_leave\":false}");
        out
    }
}

type Rows = Vec<(Vec<u8>, Vec<u8>)>;

fn small_bucket(file: &mut FileWriter<'_>, name: &str, mut rows: Rows) -> Result<(), WriteError> {
    rows.sort();
    file.bucket(name, |bucket| rows.iter().try_for_each(|(key, value)| bucket.put(key, value)))
}

const KEY_BYTES: usize = 8 + 1 + 8;

fn revision_key(main: Revision, sub: i64) -> [u8; KEY_BYTES] {
    let mut key = [b'_'; KEY_BYTES];
    key[..8].copy_from_slice(&main.get().to_be_bytes());
    key[9..].copy_from_slice(&sub.to_be_bytes());
    key
}

impl RevisionRow<'_> {
    /// The row's key: 17 bytes, and a mark behind them if the write was a delete.
    fn key(&self) -> Vec<u8> {
        let mut key = revision_key(self.main, self.sub).to_vec();
        if self.tombstone {
            key.push(b't');
        }
        key
    }
}

fn member_json(member: &Member) -> Vec<u8> {
    let mut out = serde_json::json!({
        "id": member.id.get(),
        "peerURLs": member.peer_urls,
        "name": member.name,
        "clientURLs": member.client_urls,
    });
    if member.learner {
        out["isLearner"] = true.into();
    }
    out.to_string().into_bytes()
}

/// `leasepb.Lease`, which only ever appears in this file.
#[derive(Clone, PartialEq, Eq, Message)]
struct StoredLease {
    #[prost(int64, tag = "1")]
    id: i64,
    #[prost(int64, tag = "2")]
    ttl: i64,
    #[prost(int64, tag = "3")]
    remaining_ttl: i64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaseId;

    #[test]
    fn revision_keys_sort_as_revisions_and_mark_tombstones() {
        let row = |main, sub, tombstone| RevisionRow {
            main: Revision::new(main),
            sub,
            tombstone,
            key_value: b"",
        };
        assert_eq!(row(2, 1, false).key(), b"\0\0\0\0\0\0\0\x02_\0\0\0\0\0\0\0\x01");
        assert_eq!(row(2, 1, true).key(), b"\0\0\0\0\0\0\0\x02_\0\0\0\0\0\0\0\x01t");
        assert!(row(2, 1, true).key() < row(2, 2, false).key());
        assert!(row(255, 9, false).key() < row(256, 0, false).key());
    }

    #[test]
    fn the_small_buckets_are_spelled_as_etcd_spells_them() {
        struct Nothing;
        impl Revisions for Nothing {
            fn walk(
                &self,
                _visit: &mut dyn FnMut(RevisionRow<'_>) -> Result<(), WriteError>,
            ) -> Result<(), WriteError> {
                Ok(())
            }
        }
        let member = |id: u64, learner| Member {
            id: NodeId::new(id),
            name: "pi1".into(),
            peer_urls: vec!["https://10.0.0.1:2380".into()],
            client_urls: vec!["https://10.0.0.1:2379".into()],
            replaces: None,
            learner,
        };
        let file = EtcdFile {
            revisions: &Nothing,
            compacted: Revision::new(7),
            applied: LogIndex::new(9),
            term: Term::new(3),
            leases: &[LeaseRecord { id: LeaseId::new(5), ttl_secs: 60, remaining_secs: 0 }],
            alarms: &[(NodeId::new(1), 1)],
            members: &[member(0x1f, false), member(2, true)],
            version: "3.6.0",
        };
        assert_eq!(file.membership_json(), r#"{"voters":[31],"learners":[2],"auto_leave":false}"#);
        assert_eq!(file.lease_rows(), [(vec![0, 0, 0, 0, 0, 0, 0, 5], vec![8, 5, 16, 60])]);
        assert_eq!(file.alarm_rows(), [(vec![8, 1, 16, 1], vec![])]);
        let members = file.member_rows();
        assert_eq!(members[0].0, b"1f");
        assert_eq!(
            String::from_utf8_lossy(&members[1].1),
            r#"{"clientURLs":["https://10.0.0.1:2379"],"id":2,"isLearner":true,"name":"pi1","peerURLs":["https://10.0.0.1:2380"]}"#
        );
        let compacted = b"\0\0\0\0\0\0\0\x07_\0\0\0\0\0\0\0\0".to_vec();
        assert!(file.meta_rows().contains(&(b"finishedCompactRev".to_vec(), compacted)));
    }
}

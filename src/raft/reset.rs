//! Makes a stopped node the only member of its cluster (`cluster-reset`): the way back when a majority of the cards is lost.
//!
//! Raft cannot do this, and must not: whatever the lost cards acknowledged after this node last heard of them is gone. What is done
//! instead is written as what a leader of a new term would have written: a vote, and at the log's end a membership of one, then
//! the retirement of everybody else. The next start elects itself and commits all of it.
//!
//! # Invariants
//!
//! - Entries at the log's end that were not known to be committed are kept. They may have been acknowledged; those who could tell are
//!   gone.
//! - One batch of the log, durable when [`only_member`] returns: a crash leaves all of it or none.
//! - The other nodes' ids never come back: a card that was believed lost is told that it was left behind.

use std::collections::BTreeMap;

use thiserror::Error;

use super::Member;
use super::inspect;
use super::types::{self, Contact, Membership, Payload};
use crate::command::Command;
use crate::mvcc::{Store, StoreError};
use crate::proto::node::cluster_change::Change;
use crate::proto::node::{ClusterChange, Retire};
use crate::types::{LogId, NodeId, Term, Vote};
use crate::wal::{Failed, Record, Refused, Urgency, Wal};

/// Why a node cannot become the only member.
#[derive(Debug, Error)]
pub enum ResetError {
    /// There is nothing to keep.
    #[error("there is no cluster in this data directory to reset")]
    Empty,
    /// Its data may be incomplete.
    #[error(
        "this server is not a voting member ({found}): its data may be incomplete, and a reset would make it the cluster's"
    )]
    NotAVoter {
        /// Who is.
        found: String,
    },
    /// The state cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log or the membership in it cannot be read.
    #[error("{0}")]
    Unreadable(String),
    /// The log did not take it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The log failed.
    #[error(transparent)]
    Failed(#[from] Failed),
}

/// Writes the log's end anew, so that the next start is alone. The node must not be running. Returns who was left behind.
pub async fn only_member(
    wal: &Wal,
    store: &Store,
    member: &Member,
) -> Result<Vec<Member>, ResetError> {
    let view = store.read()?;
    let membership = inspect::tail(&view, wal).map_err(ResetError::Unreadable)?.membership;
    let membership = types::membership_from_wire(membership.membership.unwrap_or_default())
        .map_err(ResetError::Unreadable)?;
    let members = types::members(&membership);
    if members.is_empty() {
        return Err(ResetError::Empty);
    }
    if !members.iter().any(|one| one.id == member.id && !one.learner) {
        let voters = members.iter().filter(|one| !one.learner);
        let names: Vec<String> = voters.map(|one| format!("{} {}", one.name, one.id)).collect();
        return Err(ResetError::NotAVoter { found: format!("voting: {}", names.join(", ")) });
    }
    let left: Vec<Member> = members.into_iter().filter(|one| one.id != member.id).collect();
    let records = records(wal, view.applied(), member, &left)?;
    wal.append(records, Urgency::Urgent, |_| {})?;
    let _durable = wal.flush().await?;
    Ok(left)
}

fn records(
    wal: &Wal,
    applied: Option<LogId>,
    member: &Member,
    left: &[Member],
) -> Result<Vec<Record>, ResetError> {
    let state = wal.hard_state();
    let mut records = Vec::new();
    let mut last = state.last;
    if let Some(applied) = applied
        && last.map(|id| id.index) < Some(applied.index)
    {
        // After a snapshot the state may be ahead of the log.
        records.push(Record::Purge(applied));
        last = Some(applied);
    }
    let last = last.ok_or(ResetError::Empty)?;
    let term = state.vote.map_or(last.term, |vote| vote.term.max(last.term));
    let term = Term::new(term.get() + 1);
    records.push(Record::Vote(Vote { term, node: member.id, committed: true }));
    let mut index = last.index;
    let mut entry = |payload: &Payload| {
        index = index.next();
        let id = LogId { term, leader: member.id, index };
        Record::Entry { id, payload: types::encode_payload(payload) }
    };
    let id = member.id.get();
    let alone = Membership::new(vec![[id].into()], BTreeMap::from([(id, Contact::of(member))]))
        .map_err(|error| ResetError::Unreadable(error.to_string()))?;
    records.push(entry(&Payload::Membership(alone)));
    for one in left {
        records.push(entry(&Payload::Normal(retire(one.id, member).encode())));
    }
    Ok(records)
}

fn retire(node: NodeId, by: &Member) -> Command {
    let reason = format!("the cluster was reset to {} ({}) alone", by.name, by.id);
    let change = Change::Retire(Retire { node: node.get(), reason });
    Command::Cluster(ClusterChange { change: Some(change) })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use bytes::Bytes;

    use super::super::tests::{OPTIONS, open_as};
    use super::super::transport::NoPeers;
    use super::super::{Node, Parts, Role};
    use super::*;
    use crate::apply;
    use crate::env::host;
    use crate::proto::etcdserverpb::PutRequest;
    use crate::types::{ClusterId, LogIndex};

    const CLUSTER: ClusterId = ClusterId::new(0xc1);

    fn member(id: u64) -> Member {
        Member { id: NodeId::new(id), name: format!("pi-{id}"), ..Member::default() }
    }

    /// What a follower of three has when the others are lost: entries, the last ones not known to be committed.
    fn follower(wal: &Wal, voters: &[u64]) {
        let members: BTreeMap<u64, Contact> =
            [1, 2, 3].map(|id| (id, Contact::of(&member(id)))).into();
        let voters = vec![voters.iter().copied().collect()];
        let membership = Payload::Membership(Membership::new(voters, members).unwrap());
        let id = |index| LogId {
            term: Term::new(4),
            leader: NodeId::new(2),
            index: LogIndex::new(index),
        };
        let put = |key: &'static str| {
            let key = Bytes::from_static(key.as_bytes());
            Payload::Normal(Command::Put(PutRequest { key, ..PutRequest::default() }).encode())
        };
        let vote = Vote { term: Term::new(4), node: NodeId::new(2), committed: true };
        let mut records = vec![Record::Vote(vote)];
        for (index, payload) in [(0, membership), (1, put("known")), (2, put("perhaps"))] {
            let payload = types::encode_payload(&payload);
            records.push(Record::Entry { id: id(index), payload });
        }
        records.push(Record::Committed(id(1)));
        wal.append(records, Urgency::Urgent, |_| {}).unwrap();
    }

    async fn start(dir: &Path) -> Node {
        let (wal, store) = open_as(dir, NodeId::new(1)).await;
        let parts = Parts {
            env: host::env(),
            cluster: CLUSTER,
            member: member(1),
            wal,
            store,
            followers: vec![],
            transport: Arc::new(NoPeers),
        };
        let node = Node::start(parts, &OPTIONS).await.unwrap();
        node.elect_if_alone().await.unwrap();
        node
    }

    #[tokio::test]
    async fn last_server_keeps_everything_and_leads_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (wal, store) = open_as(dir.path(), NodeId::new(1)).await;
        follower(&wal, &[1, 2, 3]);
        for _ in 0..2 {
            // A second time, as after a crash before the flag was written: the same in the end.
            only_member(&wal, &store, &member(1)).await.unwrap();
        }
        wal.close().await.unwrap();
        store.close().await.unwrap();

        let node = start(dir.path()).await;
        let deadline = Instant::now() + Duration::from_secs(20);
        let barrier = node.read_barrier(deadline).await.unwrap();
        drop(barrier);
        let status = node.status();
        assert_eq!((status.role, status.members.len()), (Role::Leader, 1));
        assert!(Term::new(4) < status.term);
        let view = node.store().read().unwrap();
        for key in ["known", "perhaps"] {
            assert!(view.get(key.as_bytes(), None).unwrap().is_some(), "{key} is lost");
        }
        for id in [2, 3] {
            let record = apply::node(&view, NodeId::new(id)).unwrap().unwrap();
            assert!(record.retired && record.retired_reason.contains("pi-1"), "{record:?}");
        }
        drop(view);
        node.stop().await.unwrap();
    }

    #[tokio::test]
    async fn learner_and_empty_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (wal, store) = open_as(dir.path(), NodeId::new(1)).await;
        let refused = only_member(&wal, &store, &member(1)).await;
        assert!(matches!(refused, Err(ResetError::Empty)), "{refused:?}");
        follower(&wal, &[2, 3]);
        let refused = only_member(&wal, &store, &member(1)).await;
        assert!(matches!(refused, Err(ResetError::NotAVoter { .. })), "{refused:?}");
        assert_eq!(wal.hard_state().vote.unwrap().term, Term::new(4), "something was written");
    }
}

//! Asks the other members what they remember of this node, until there is a verdict.
//!
//! # Invariants
//!
//! - Nothing is decided here but whom to ask and when: see `verdict`.
//! - A verdict other than welcome ends it at once; a welcome waits a little for those who have not answered, because one of them
//!   may remember more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use prost::Message;

use super::book::{HelloBook, Incarnation};
use super::verdict::{Own, Said, Verdict, decide};
use super::{answer, wire};
use crate::env::Env;
use crate::join::Identity;
use crate::mvcc::Store;
use crate::proto::node::{HelloReply, HelloRequest, StoredMembership};
use crate::raft::transport::{CallError, Method, Refused, Transport};
use crate::raft::{Member, inspect};
use crate::types::NodeId;
use crate::versions;
use crate::wal::Wal;

/// How long one other may take. Longer than its own probe of an old incarnation.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a welcome waits for the rest.
const GRACE: Duration = Duration::from_secs(1);
/// Between two rounds.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LAST: Duration = Duration::from_secs(2);
/// Rounds between two lines of the journal.
const MENTION_EVERY: u32 = 8;

/// Compares recorded flags with this node's: how they differ, or `None`.
pub type CompareFlags = Arc<dyn Fn(&[u8]) -> Option<String> + Send + Sync>;

/// One question to all, under way.
pub struct Hello {
    env: Env,
    transport: Arc<dyn Transport>,
    book: Arc<HelloBook>,
    own: Own,
    request: Bytes,
    others: Vec<Member>,
    compare: CompareFlags,
    said: BTreeMap<NodeId, Said>,
}

/// Everything a [`Hello`] works with.
pub struct Asked<'a> {
    /// The world.
    pub env: &'a Env,
    /// How others are reached.
    pub transport: Arc<dyn Transport>,
    /// Where the others' incarnations are noted.
    pub book: Arc<HelloBook>,
    /// Who this node is, its start counted.
    pub identity: Identity,
    /// The number of this run of the process.
    pub incarnation: u64,
    /// Its name and addresses now.
    pub member: &'a Member,
    /// The state.
    pub store: &'a Store,
    /// The log.
    pub wal: &'a Wal,
    /// The members as they were told to a node that has no state yet: `join::contacts`.
    pub contacts: Option<StoredMembership>,
    /// Compares critical flags.
    pub compare: CompareFlags,
}

impl Hello {
    /// Reads what this node has. The error says what cannot be read.
    pub fn new(asked: Asked<'_>) -> Result<Self, String> {
        let Asked { env, transport, book, identity, incarnation, member, store, wal, .. } = asked;
        let view = store.read().map_err(|error| error.to_string())?;
        let tail = inspect::tail(&view, wal)?;
        let membership = match (tail.membership.log_id, asked.contacts) {
            (None, Some(contacts)) => contacts,
            (_, _) => tail.membership,
        };
        let own = Own {
            node: identity.node,
            epoch: identity.epoch,
            vote: wal.hard_state().vote,
            last: answer::end(&view, wal),
            voters: wire::voters(&membership),
            joining: identity.phase.joins(),
            wire_versions: versions::own().wire.clone(),
            format: versions::own().format,
        };
        let request = HelloRequest {
            cluster: identity.cluster.get(),
            epoch: identity.epoch,
            incarnation,
            wire_version_min: *versions::own().wire.start(),
            wire_version_max: *versions::own().wire.end(),
            release: versions::own().name.to_owned(),
            self_: Some(wire::wire_member(member)),
            vote: own.vote.map(wire::wire_vote),
            last: own.last.map(wire::wire_log_id),
            probe: false,
            format: versions::own().format,
        };
        let mut others = wire::members(&membership);
        others.retain(|other| other.id != identity.node);
        let (env, request) = (env.clone(), request.encode_to_vec().into());
        let (compare, said) = (asked.compare, BTreeMap::new());
        Ok(Self { env, transport, book, own, request, others, compare, said })
    }

    /// What this node has, as it is compared.
    pub const fn own(&self) -> &Own {
        &self.own
    }

    /// Asks until there is a verdict that is not to wait: never that one.
    pub async fn run(mut self) -> Verdict {
        let mut pause = PAUSE_FIRST;
        let mut rounds = 0u32;
        loop {
            let verdict = self.round().await;
            let Verdict::Wait { missing } = &verdict else { return verdict };
            if rounds.is_multiple_of(MENTION_EVERY) {
                self.mention(missing);
            }
            rounds = rounds.saturating_add(1);
            self.env.clock.sleep(pause).await;
            pause = (pause * 2).min(PAUSE_LAST);
        }
    }

    fn mention(&self, missing: &BTreeSet<NodeId>) {
        let name = |node: &NodeId| {
            let other = self.others.iter().find(|other| other.id == *node);
            other.map_or_else(
                || node.to_string(),
                |other| format!("{} ({})", other.name, other.peer_urls.join(", ")),
            )
        };
        let names: Vec<String> = missing.iter().map(name).collect();
        tracing::info!(
            "waiting for a majority of the servers before taking part; no answer yet from {}",
            names.join(", ")
        );
    }

    /// Asks everybody who has not answered, once.
    async fn round(&mut self) -> Verdict {
        let mut calls: FuturesUnordered<_> = self
            .others
            .iter()
            .filter(|other| !self.said.contains_key(&other.id))
            .map(|other| {
                let request = self.request.clone();
                let call = self.transport.call(other, Method::Hello, request, CALL_TIMEOUT);
                let other = other.clone();
                async move { (other, call.await) }
            })
            .collect();
        let mut verdict = decide(&self.own, &self.said);
        let mut grace = None;
        loop {
            if verdict == Verdict::Welcome && grace.is_none() {
                grace = Some(self.env.clock.sleep(GRACE));
            }
            let answered = match &mut grace {
                None => calls.next().await,
                Some(over) => tokio::select! {
                    biased;
                    answered = calls.next() => answered,
                    () = over => None,
                },
            };
            let Some((other, result)) = answered else { return verdict };
            self.note(&other, result);
            verdict = decide(&self.own, &self.said);
            if !matches!(verdict, Verdict::Welcome | Verdict::Wait { .. }) {
                return verdict;
            }
        }
    }

    fn note(&mut self, other: &Member, result: Result<Bytes, CallError>) {
        let said = match result {
            Ok(reply) => match HelloReply::decode(reply) {
                Ok(reply) => {
                    let number = reply.incarnation;
                    let incarnation = Incarnation { number, member: other.clone() };
                    self.book.note_incarnation(other.id, 0, incarnation);
                    let recorded = Some(&reply.flags).filter(|flags| !flags.is_empty());
                    Some(wire::said(&reply, recorded.and_then(|flags| (self.compare)(flags))))
                }
                Err(error) => Some(Said { release: error.to_string(), ..Said::default() }),
            },
            Err(CallError::Refused(refused)) => refusal(refused),
            Err(CallError::Unreachable(_) | CallError::Interrupted(_)) => None,
        };
        if let Some(said) = said {
            self.said.insert(other.id, said);
        }
    }
}

/// What a refusal says of us, if it will not change by asking again.
fn refusal(refused: Refused) -> Option<Said> {
    match refused {
        Refused::Removed(reason) => Some(Said { retired: Some(reason), ..Said::default() }),
        Refused::Duplicate(found) => Some(Said { duplicate: Some(found), ..Said::default() }),
        Refused::Incompatible(found) => Some(Said { release: found, ..Said::default() }),
        // It may be behind, or starting; the others know.
        Refused::NotReady(_)
        | Refused::NotAMember
        | Refused::WrongCluster(_)
        | Refused::Malformed(_)
        | Refused::Busy
        | Refused::NotLeader(_) => None,
    }
}

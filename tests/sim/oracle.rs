//! Holds every node against what Raft promises, at every message, every barrier and every applied batch.
//!
//! End-to-end checks alone do not see much: a vote that is not synced was missed by 1,550 runs that only looked for lost
//! writes. So the oracle looks at each promise when it leaves a node.
//!
//! # Invariants that it checks
//!
//! - *Persist before reply*: an acknowledged entry and a granted vote are on the callee's card when the answer leaves it; a
//!   candidate's vote for itself is on its own.
//! - *Log matching*: one log id, one content, one predecessor, on all cards, for ever.
//! - *Commitment*: what is said to be committed is on the cards of a majority of the voters, and is never anything else later.
//! - *Leader completeness*: whoever leads has everything that was committed.
//! - *Monotonic*: the vote on a card, and the applied entry and the revision of a running node.
//! - *Equal states*: every revision has the same events on all nodes, and equal applied entries mean equal state hashes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k3s_server::mvcc::{RevisionEvents, StateHash};
use k3s_server::raft::AppliedBatch;
use k3s_server::types::{LogId, NodeId, Revision, Vote};
use k3s_server::wal::{self, Record, Wal};

use crate::card::Card;
use crate::log_model::{LogModel, hash_of, rank};
use crate::membership::Voters;
use crate::world::{World, trace};

/// See the module documentation. Clones share what was seen.
#[derive(Clone)]
pub(crate) struct Oracle {
    world: World,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    cards: BTreeMap<u64, Card>,
    /// The logs of running nodes, as the nodes see them.
    logs: BTreeMap<u64, Wal>,
    entries: HashMap<LogId, Entry>,
    committed: BTreeMap<u64, LogId>,
    memberships: BTreeMap<u64, Voters>,
    votes: BTreeMap<u64, Vote>,
    nodes: BTreeMap<u64, Running>,
    /// The last entry that each node acknowledged, and the same of cards that an older image has replaced since: such an answer
    /// was true when it left, and may still be under way.
    acknowledged: BTreeMap<u64, LogId>,
    replaced: BTreeMap<u64, LogId>,
    revisions: BTreeMap<i64, Arc<RevisionEvents>>,
    hashes: BTreeMap<u64, (StateHash, NodeId)>,
    checked: Checked,
}

struct Entry {
    payload_hash: u64,
    previous: Option<LogId>,
}

/// What one incarnation has shown.
#[derive(Default)]
struct Running {
    applied: Option<LogId>,
    revision: Revision,
    /// Whether it has led in this term already.
    led: Option<u64>,
}

/// How often each invariant was looked at: a check that never runs proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Checked {
    pub(crate) replies: u64,
    pub(crate) votes: u64,
    pub(crate) commits: u64,
    pub(crate) leaders: u64,
    pub(crate) entries: u64,
    pub(crate) batches: u64,
    pub(crate) hashes: u64,
}

impl Oracle {
    pub(crate) fn new(world: World) -> Self {
        Self { world, seen: Arc::default() }
    }

    /// A node lives on this card.
    pub(crate) fn add(&self, node: NodeId, card: Card) {
        self.lock().cards.insert(node.get(), card);
    }

    /// How often things were checked.
    pub(crate) fn checked(&self) -> Checked {
        self.lock().checked
    }

    /// All revisions that were applied anywhere.
    pub(crate) fn revisions(&self) -> BTreeMap<i64, Arc<RevisionEvents>> {
        self.lock().revisions.clone()
    }

    /// A node starts: what it applied before may be applied again.
    pub(crate) fn started(&self, node: NodeId) {
        self.lock().nodes.insert(node.get(), Running::default());
    }

    /// Records became durable on a node's card.
    pub(crate) fn durable(&self, node: NodeId, records: &[Record], log: &LogModel) {
        let mut seen = self.lock();
        for record in records {
            match record {
                Record::Entry { id, payload } => {
                    if let Err(what) = seen.entry(node, *id, payload, log) {
                        self.world.violation(|| what);
                    }
                }
                Record::Vote(vote) => {
                    let before = seen.votes.insert(node.get(), *vote);
                    if let Some(before) = before.filter(|before| rank(*vote) < rank(*before)) {
                        self.world.violation(|| {
                            format!("node {node} forgot its vote {before} for {vote}")
                        });
                    }
                }
                Record::Committed(_) | Record::TruncateAfter(_) | Record::Purge(_) => {}
            }
        }
    }

    /// An old image was put back: the node's card knows less than it did.
    pub(crate) fn rolled_back(&self, node: NodeId) {
        let mut seen = self.lock();
        seen.votes.remove(&node.get());
        seen.nodes.remove(&node.get());
        if let Some(last) = seen.acknowledged.remove(&node.get()) {
            seen.replaced.insert(node.get(), last);
        }
    }

    /// A node says that it keeps everything up to an entry, for a leader with this vote.
    pub(crate) fn acknowledges(&self, node: NodeId, leader: Vote, upto: Option<LogId>) {
        let mut seen = self.lock();
        seen.checked.replies += 1;
        let Some(card) = seen.cards.get(&node.get()) else { return };
        let held = card.durable(|log| upto.is_none_or(|upto| log.holds(upto)));
        let promised = card.durable(|log| log.vote);
        if let Some(upto) = upto {
            seen.acknowledged.insert(node.get(), upto);
        }
        drop(seen);
        if !held {
            let last = self.card(node).durable(LogModel::last);
            self.world.violation(|| {
                format!("persist before reply: node {node} acknowledges {upto:?}, its card ends at {last:?}")
            });
        }
        if promised.is_none_or(|promised| rank(promised) < rank(leader)) {
            self.world.violation(|| {
                format!(
                    "persist before reply: node {node} follows {leader}, its card says {promised:?}"
                )
            });
        }
    }

    /// A snapshot has replaced a node's state, durably: from now on it stands for its log's beginning.
    pub(crate) fn has_snapshot(&self, node: NodeId, last: LogId) {
        if let Some(card) = self.lock().cards.get(&node.get()) {
            card.covered(last);
        }
    }

    /// A node grants its vote, or asks for others' after granting its own.
    pub(crate) fn votes(&self, node: NodeId, vote: Vote) {
        let mut seen = self.lock();
        seen.checked.votes += 1;
        let Some(card) = seen.cards.get(&node.get()) else { return };
        let durable = card.durable(|log| log.vote);
        drop(seen);
        if durable.is_none_or(|durable| rank(durable) < rank(vote)) {
            self.world.violation(|| {
                format!("persist before reply: node {node} votes {vote}, its card says {durable:?}")
            });
        }
    }

    /// A node runs with this log.
    pub(crate) fn runs(&self, node: NodeId, log: Wal) {
        self.lock().logs.insert(node.get(), log);
    }

    /// A leader tells others what is committed.
    pub(crate) fn leads(&self, node: NodeId, vote: Vote, committed: Option<LogId>) {
        let mut seen = self.lock();
        let first = seen.running(node).led.replace(vote.term.get()) != Some(vote.term.get());
        let newest = seen.committed.values().next_back().copied();
        if first {
            seen.checked.leaders += 1;
            trace!(self.world, "leader {node} {vote}");
            // What a later leader committed since is not this one's to know.
            if let Some(newest) = newest.filter(|newest| newest.term <= vote.term)
                && seen.logs.get(&node.get()).is_some_and(|log| !has_entry(log, newest))
            {
                self.world.violation(|| {
                    format!("leader completeness: {node} leads with {vote} without {newest}, which is committed")
                });
            }
        }
        if let Some(committed) = committed
            && let Err(what) = seen.commit(node, committed)
        {
            self.world.violation(|| what);
        }
    }

    /// A node applied a batch.
    pub(crate) fn applied(&self, node: NodeId, batch: &AppliedBatch) {
        trace!(self.world, "applied {node} {} revision {}", batch.applied, batch.revision);
        let mut seen = self.lock();
        let seen = &mut *seen;
        seen.checked.batches += 1;
        let running = seen.nodes.entry(node.get()).or_default();
        let index = batch.applied.index;
        let backwards = running.applied.is_some_and(|applied| index <= applied.index)
            || batch.revision < running.revision && batch.revision.get() != 0;
        if backwards {
            let (applied, revision) = (running.applied, running.revision);
            self.world.violation(|| {
                format!(
                    "node {node} applied {} revision {} after {applied:?} revision {revision}",
                    batch.applied, batch.revision
                )
            });
        }
        running.applied = Some(batch.applied);
        running.revision = running.revision.max(batch.revision);
        for events in &batch.events {
            let known =
                seen.revisions.entry(events.revision.get()).or_insert_with(|| Arc::clone(events));
            if known != events {
                self.world.violation(|| {
                    format!(
                        "revision {} is {:?} on one node and {:?} on node {node}",
                        events.revision, known, events
                    )
                });
            }
        }
        if let Err(what) = seen.commit(node, batch.applied) {
            self.world.violation(|| what);
        }
    }

    /// A node's state after an entry.
    pub(crate) fn state(&self, node: NodeId, applied: LogId, hash: StateHash) {
        let mut seen = self.lock();
        seen.checked.hashes += 1;
        let (known, by) = *seen.hashes.entry(applied.index.get()).or_insert((hash, node));
        if known != hash {
            self.world.violation(|| {
                format!("after {applied} the state of node {node} is {hash:?}, that of node {by} is {known:?}")
            });
        }
    }

    fn card(&self, node: NodeId) -> Card {
        match self.lock().cards.get(&node.get()) {
            Some(card) => card.clone(),
            None => unreachable!("node {node} has no card"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn running(&mut self, node: NodeId) -> &mut Running {
        self.nodes.entry(node.get()).or_default()
    }

    fn entry(
        &mut self,
        node: NodeId,
        id: LogId,
        payload: &[u8],
        log: &LogModel,
    ) -> Result<(), String> {
        self.checked.entries += 1;
        let index = id.index.get();
        let payload_hash = hash_of(payload);
        let previous = index.checked_sub(1).and_then(|before| log.id_at(before));
        let known = self.entries.entry(id).or_insert(Entry { payload_hash, previous });
        if known.payload_hash != payload_hash {
            return Err(format!(
                "log matching: two entries are called {id}, one of them on node {node}"
            ));
        }
        match (known.previous, previous) {
            (Some(known), Some(found)) if known != found => Err(format!(
                "log matching: before {id} stands {known} on one node and {found} on node {node}"
            )),
            (None, Some(_)) => {
                known.previous = previous;
                Ok(())
            }
            (Some(_) | None, _) => Ok(()),
        }
    }

    /// `node` knows that an entry is committed.
    fn commit(&mut self, node: NodeId, id: LogId) -> Result<(), String> {
        let index = id.index.get();
        if let Some(known) = self.committed.get(&index) {
            return if *known == id {
                Ok(())
            } else {
                Err(format!("commitment: node {node} takes {id} for committed, which was {known}"))
            };
        }
        self.checked.commits += 1;
        self.check_quorum(node, id)?;
        self.committed.insert(index, id);
        self.learn_before(node, id);
        Ok(())
    }

    /// What stands before a committed entry is committed too.
    fn learn_before(&mut self, node: NodeId, id: LogId) {
        let mut newest = Some(id);
        while let Some(id) = newest {
            newest = self.entries.get(&id).and_then(|entry| entry.previous);
            let Some(before) = newest else { break };
            if self.committed.insert(before.index.get(), before).is_some() {
                break;
            }
        }
        let Some(card) = self.cards.get(&node.get()) else { return };
        let known = card.durable(|log| {
            log.memberships
                .range(..=id.index.get())
                .map(|(index, voters)| (*index, voters.clone()))
                .collect::<Vec<_>>()
        });
        self.memberships.extend(known);
    }

    /// Whether a card held an entry, as its node said, when an older image replaced it.
    fn held(&self, node: u64, id: LogId) -> bool {
        let last = self.replaced.get(&node);
        last.is_some_and(|last| {
            (last.term, last.leader) == (id.term, id.leader) && id.index <= last.index
        })
    }

    fn check_quorum(&self, node: NodeId, id: LogId) -> Result<(), String> {
        let index = id.index.get();
        let holders: Vec<u64> = self
            .cards
            .iter()
            .filter(|(node, card)| card.durable(|log| log.holds(id)) || self.held(**node, id))
            .map(|(node, _)| *node)
            .collect();
        let mut known = self.memberships.clone();
        for card in holders.iter().filter_map(|holder| self.cards.get(holder)) {
            card.durable(|log| known.extend(log.memberships.iter().map(|(i, v)| (*i, v.clone()))));
        }
        if let Some(log) = self.logs.get(&node.get()) {
            known.extend(memberships_after(log, id));
        }
        let at = known.range(..=index).next_back().map(|(at, _)| *at).unwrap_or_default();
        // A leader counts by the newest membership in its log, which may stand behind the entry.
        let decided =
            known.range(at..).any(|(_, voters)| voters.is_quorum(|id| holders.contains(&id)));
        if decided || known.is_empty() && holders.len() == 1 {
            return Ok(());
        }
        Err(format!(
            "commitment: node {node} takes {id} for committed, which is on the cards of {holders:x?} of {:x?}",
            known.range(..=index).next_back().map(|(_, voters)| voters.ids())
        ))
    }
}

/// Whether a node sees an entry in its own log, or has a checkpoint that covers it.
fn has_entry(log: &Wal, id: LogId) -> bool {
    let state = log.hard_state();
    if state.purged.is_some_and(|purged| id.index <= purged.index) {
        return true;
    }
    let found = log.entries(id.index..id.index.next(), u64::MAX);
    // A log that fails is the card's business, not this check's.
    found.map_or(true, |entries| entries.first().is_some_and(|entry| entry.id == id))
}

/// Memberships that stand in a node's log behind an entry, whether or not they are on its card already.
fn memberships_after(log: &Wal, id: LogId) -> Vec<(u64, Voters)> {
    let start = id.index.next();
    let end = log.hard_state().last.map_or(start, |last| last.index.next().max(start));
    let entries = log.entries(start..end, u64::MAX).unwrap_or_default();
    let voters =
        |entry: &wal::Entry| Some((entry.id.index.get(), Voters::of_payload(&entry.payload)?));
    entries.iter().filter_map(voters).collect()
}

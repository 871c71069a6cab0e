//! Decides whether a node that starts is the node that the others remember.
//!
//! An old card image, a card that lied about what it had kept, and a copied card all look healthy by themselves. Only the others can
//! tell: they know starts, votes and acknowledgements that this card has forgotten. A node that has forgotten a promise and takes
//! part again can break Raft: with one such card in three it did in more than half of the simulated runs.
//!
//! # Shape
//!
//! Pure: what this node has, and what the others say of it, in; a [`Verdict`] out.
//!
//! # Invariants
//!
//! - Nobody is welcome before a majority, this node included, has answered.
//! - One answer is enough to refuse: what one other has seen has happened.
//! - The order of the answers makes no difference.
//!
//! # What counts as forgotten
//!
//! - A start: the epoch of this start is known already, or a higher one.
//! - A vote: a higher one than this node has. The flag `committed` is left aside: it is no promise.
//! - An acknowledgement: an entry that this node has promised to keep is beyond its log's end. Unless this node has voted in a later
//!   term: its log keeps one order for votes and entries, so the vote proves that the entry was there, and a later leader
//!   has cut it off.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use crate::announce;
use crate::events::{EventId, fields};
use crate::raft::Leaving;
use crate::types::{LogId, NodeId, Vote};
use crate::versions;

/// Who has a vote. One set, or two while it changes; a majority of each is needed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Voters {
    /// The entry that says so; the later one counts.
    pub log_id: Option<LogId>,
    /// The sets.
    pub configs: Vec<BTreeSet<NodeId>>,
    /// All members, with a vote or without.
    pub members: BTreeSet<NodeId>,
}

impl Voters {
    fn all(&self) -> BTreeSet<NodeId> {
        self.configs.iter().flatten().copied().collect()
    }

    fn have_majority(&self, answered: &BTreeSet<NodeId>) -> bool {
        self.configs.iter().all(|config| {
            let found = config.iter().filter(|voter| answered.contains(*voter)).count();
            config.len() / 2 < found
        })
    }
}

/// What this node has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Itself.
    pub node: NodeId,
    /// Of this start.
    pub epoch: u64,
    /// Its vote, from its log.
    pub vote: Option<Vote>,
    /// The end of its log, or of its state if that is later.
    pub last: Option<LogId>,
    /// The members, as its state has them; for a joiner, as it was told.
    pub voters: Voters,
    /// Whether it is still to be admitted: then nobody remembers it, and one answer is enough.
    pub joining: bool,
    /// Versions of the messages it reads.
    pub wire_versions: RangeInclusive<u32>,
    /// The newest format that it reads.
    pub format: u32,
}

/// What another node says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// The highest epoch it knows of us; 0 if none.
    pub epoch: u64,
    /// The highest vote it knows of us.
    pub vote: Option<Vote>,
    /// The highest entry that it knows we promised to keep.
    pub kept: Option<LogId>,
    /// We were removed, and why.
    pub retired: Option<String>,
    /// Another incarnation of us is alive; where.
    pub duplicate: Option<String>,
    /// The members it knows.
    pub voters: Voters,
    /// Its log's end: who is further ahead has the newer flags.
    pub last: Option<LogId>,
    /// How our critical flags differ from those it has recorded; `None` if they do not.
    pub flags_differ: Option<String>,
    /// Versions of the messages it reads; `None` if it refused us for ours.
    pub wire_versions: Option<RangeInclusive<u32>>,
    /// The cluster's format, as far as it knows.
    pub format: u32,
    /// Its release, for people.
    pub release: String,
}

/// What a node has forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgotten {
    /// A start.
    Epoch {
        /// Of this start.
        here: u64,
        /// Known.
        known: u64,
    },
    /// A vote.
    Vote {
        /// In the log.
        here: Option<Vote>,
        /// Known.
        known: Vote,
    },
    /// An entry that it promised to keep.
    Entry {
        /// The end of the log.
        here: Option<LogId>,
        /// Known.
        known: LogId,
    },
}

impl std::fmt::Display for Forgotten {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        fn or_none<T: std::fmt::Display>(value: Option<T>) -> String {
            value.map_or_else(|| "none".to_owned(), |value| value.to_string())
        }
        match self {
            Self::Epoch { here, known } => {
                write!(
                    f,
                    "this is start number {here} of the card, but number {known} is known already"
                )
            }
            Self::Vote { here, known } => {
                write!(f, "the last vote here is {}, but the vote {known} is known", or_none(*here))
            }
            Self::Entry { here, known } => {
                write!(f, "the log ends at {}, but entry {known} was acknowledged", or_none(*here))
            }
        }
    }
}

/// What becomes of a node that starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It takes part.
    Welcome,
    /// Too few have answered yet.
    Wait {
        /// Voters that have not.
        missing: BTreeSet<NodeId>,
    },
    /// It has forgotten something it had promised.
    Amnesia {
        /// What.
        what: Forgotten,
        /// Who remembers.
        who: NodeId,
    },
    /// It was removed.
    Retired {
        /// Why.
        reason: String,
        /// Who says so.
        who: NodeId,
    },
    /// Another incarnation of it is alive.
    Duplicate {
        /// Where.
        found: String,
        /// Who says so.
        who: NodeId,
    },
    /// Its release does not work with the others'.
    Incompatible {
        /// What the other runs and reads.
        found: String,
        /// Who says so.
        who: NodeId,
    },
    /// Its critical flags are not the cluster's.
    FlagsDiffer {
        /// Which, and how.
        found: String,
        /// Who says so.
        who: NodeId,
    },
}

impl Verdict {
    /// Tells the journal why a node does not take part, and what to do. Says nothing of a welcome, of waiting, and of flags,
    /// which their own module explains better.
    pub fn announce(&self) {
        match self {
            Self::Welcome | Self::Wait { .. } | Self::FlagsDiffer { .. } => {}
            Self::Amnesia { what, who } => announce!(
                EventId::Quarantined,
                { fields::PEER } = %who,
                "this node has forgotten what it promised: {what} to node {who}"
            ),
            Self::Retired { reason, who } if Leaving::may_join_again(reason) => announce!(
                EventId::LearnerGivenUp,
                { fields::PEER } = %who,
                "this node was {reason}, as node {who} says; it joins again under a new id"
            ),
            Self::Retired { reason, who } => announce!(
                EventId::NodeRetired,
                { fields::PEER } = %who,
                "this node was removed from the cluster: {reason}, as node {who} says"
            ),
            Self::Duplicate { found, who } => announce!(
                EventId::NodeDuplicate,
                { fields::PEER } = %who,
                "this node runs already: {found}, as node {who} has just checked"
            ),
            Self::Incompatible { found, who } => announce!(
                EventId::Incompatible,
                { fields::PEER } = %who,
                "node {who} runs a release that does not work with this one ({}): {found}",
                versions::own().name
            ),
        }
    }
}

/// Decides, given all that was said so far.
pub fn decide(own: &Own, said: &BTreeMap<NodeId, Said>) -> Verdict {
    for (who, said) in said {
        if let Some(reason) = said.retired.clone() {
            return Verdict::Retired { reason, who: *who };
        }
    }
    for (who, said) in said {
        if let Some(found) = said.duplicate.clone() {
            return Verdict::Duplicate { found, who: *who };
        }
    }
    // What one has written all have to read: its word is enough. Before what this node may have
    // forgotten, because then its data stays where it is.
    for (who, said) in said {
        if own.format < said.format {
            let found = format!(
                "the cluster's data is in format {}, release {} reads up to {}",
                said.format,
                versions::own().name,
                own.format
            );
            return Verdict::Incompatible { found, who: *who };
        }
    }
    for (who, said) in said {
        if let Some(what) = forgotten(own, said) {
            return Verdict::Amnesia { what, who: *who };
        }
    }
    let usable: BTreeMap<NodeId, &Said> =
        said.iter().filter(|(_, said)| speaks(own, said)).map(|(who, said)| (*who, said)).collect();
    if let Some(verdict) = removed(own, &usable) {
        return verdict;
    }
    if let Some((who, found)) = flags(&usable) {
        return Verdict::FlagsDiffer { found, who };
    }
    gather(own, said, &usable)
}

/// What this node has forgotten, by what one other remembers.
fn forgotten(own: &Own, said: &Said) -> Option<Forgotten> {
    if own.epoch <= said.epoch {
        return Some(Forgotten::Epoch { here: own.epoch, known: said.epoch });
    }
    let promise = |vote: Vote| (vote.term, vote.node);
    let voted = own.vote.map(promise);
    if let Some(known) = said.vote
        && voted < Some(promise(known))
    {
        return Some(Forgotten::Vote { here: own.vote, known });
    }
    if let Some(known) = said.kept
        && own.last < Some(known)
        && voted <= Some((known.term, known.leader))
    {
        return Some(Forgotten::Entry { here: own.last, known });
    }
    None
}

fn speaks(own: &Own, said: &Said) -> bool {
    let ours = &own.wire_versions;
    said.wire_versions.as_ref().is_some_and(|theirs| versions::common(ours, theirs).is_some())
}

/// The newest membership that anybody knows.
fn newest<'a>(own: &'a Own, usable: &BTreeMap<NodeId, &'a Said>) -> &'a Voters {
    let known = usable.values().map(|said| &said.voters);
    known.fold(
        &own.voters,
        |newest, other| if newest.log_id < other.log_id { other } else { newest },
    )
}

/// A membership is only told when it is committed: who is not in a newer one than its own was removed.
fn removed(own: &Own, usable: &BTreeMap<NodeId, &Said>) -> Option<Verdict> {
    if own.joining {
        return None;
    }
    let (who, said) = usable.iter().max_by_key(|(_, said)| said.voters.log_id)?;
    let newer = own.voters.log_id < said.voters.log_id;
    (newer && !said.voters.members.contains(&own.node)).then(|| Verdict::Retired {
        reason: "it is no longer among the members".to_owned(),
        who: *who,
    })
}

/// By whoever is furthest ahead: the others may not have heard of a change yet.
fn flags(usable: &BTreeMap<NodeId, &Said>) -> Option<(NodeId, String)> {
    let (who, said) = usable.iter().max_by_key(|(_, said)| said.last)?;
    said.flags_differ.clone().map(|found| (*who, found))
}

/// Whether enough have answered.
fn gather(own: &Own, said: &BTreeMap<NodeId, Said>, usable: &BTreeMap<NodeId, &Said>) -> Verdict {
    let voters = newest(own, usable);
    let mut answered: BTreeSet<NodeId> = usable.keys().copied().collect();
    let enough = if own.joining {
        !answered.is_empty()
    } else {
        answered.insert(own.node);
        voters.have_majority(&answered)
    };
    if enough {
        return Verdict::Welcome;
    }
    // Would it be enough if all those could be understood who have answered and cannot?
    let mute: BTreeSet<NodeId> =
        said.keys().filter(|who| !usable.contains_key(who)).copied().collect();
    let missing: BTreeSet<NodeId> =
        voters.all().difference(&answered).copied().filter(|voter| *voter != own.node).collect();
    let waiting_helps = voters.have_majority(
        &answered.union(&missing).copied().filter(|voter| !mute.contains(voter)).collect(),
    );
    if let Some(who) = mute.first().copied()
        && (!waiting_helps || own.joining)
        && let Some(said) = said.get(&who)
    {
        return Verdict::Incompatible { found: in_words(own, said), who };
    }
    Verdict::Wait { missing }
}

fn in_words(own: &Own, said: &Said) -> String {
    match &said.wire_versions {
        Some(theirs) => format!(
            "release {} speaks {}, this one {}",
            said.release,
            versions::in_words(theirs),
            versions::in_words(&own.wire_versions)
        ),
        None => format!("it refuses this release: {}", said.release),
    }
}

/// Whether a vote is for a later term than another; for those who keep the highest.
pub(super) fn later(known: Option<Vote>, vote: Vote) -> bool {
    let promise = |vote: Vote| (vote.term, vote.node);
    known.map(promise) < Some(promise(vote))
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;

//! Counts votes: who has said yes, and whether a majority is left after a change of members.
//!
//! # Invariants
//!
//! - While the members change there are two sets of voters, and a majority of each is needed.
//! - An answer counts once, and only from a voter.

use std::collections::BTreeSet;
use std::fmt;

use crate::proto::node as wire;
use crate::types::NodeId;

/// How many of `voters` are a majority.
pub(super) const fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

/// Where a question to all voters stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Those who have not answered yet decide.
    Open,
    /// A majority of each set said yes.
    Won,
    /// No majority can say yes any more.
    Lost,
}

/// The answers to one question.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    sets: Vec<BTreeSet<NodeId>>,
    yes: BTreeSet<NodeId>,
    no: BTreeSet<NodeId>,
}

impl Tally {
    /// Nobody has answered yet.
    pub(super) const fn new(sets: Vec<BTreeSet<NodeId>>) -> Self {
        Self { sets, yes: BTreeSet::new(), no: BTreeSet::new() }
    }

    /// Everybody who is asked.
    pub(super) fn voters(&self) -> BTreeSet<NodeId> {
        self.sets.iter().flatten().copied().collect()
    }

    /// `from` answered, or will not.
    pub(super) fn heard(&mut self, from: NodeId, yes: bool) {
        if yes {
            self.yes.insert(from);
        } else {
            self.no.insert(from);
        }
    }

    /// What the answers so far come to.
    pub(super) fn verdict(&self) -> Verdict {
        let won =
            |set: &BTreeSet<NodeId>| majority(set.len()) <= set.intersection(&self.yes).count();
        let lost = |set: &BTreeSet<NodeId>| {
            let no = set.iter().filter(|id| self.no.contains(id) && !self.yes.contains(id)).count();
            set.len() - no < majority(set.len())
        };
        if self.sets.is_empty() || self.sets.iter().any(lost) {
            Verdict::Lost
        } else if self.sets.iter().all(won) {
            Verdict::Won
        } else {
            Verdict::Open
        }
    }
}

/// Why a change of members is refused: what it would leave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QuorumNumbers {
    /// The change, in words: `removing pi-2`.
    pub change: String,
    /// Voters now.
    pub voters: usize,
    /// Those of them that answer.
    pub alive: usize,
    /// Voters after the change.
    pub voters_left: usize,
    /// Those of them that answer.
    pub alive_left: usize,
}

impl QuorumNumbers {
    /// What changing `before` into `after` comes to, when `alive` answer.
    pub(super) fn of(
        change: String,
        before: &BTreeSet<NodeId>,
        after: &BTreeSet<NodeId>,
        alive: &BTreeSet<NodeId>,
    ) -> Self {
        Self {
            change,
            voters: before.len(),
            alive: before.intersection(alive).count(),
            voters_left: after.len(),
            alive_left: after.intersection(alive).count(),
        }
    }

    /// How many must answer after the change.
    pub const fn needed(&self) -> usize {
        majority(self.voters_left)
    }

    /// Whether the cluster goes on after the change.
    pub const fn keeps_quorum(&self) -> bool {
        0 < self.voters_left && self.needed() <= self.alive_left
    }

    pub(super) fn to_wire(&self) -> wire::QuorumNumbers {
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        wire::QuorumNumbers {
            change: self.change.clone(),
            voters: count(self.voters),
            alive: count(self.alive),
            voters_left: count(self.voters_left),
            alive_left: count(self.alive_left),
        }
    }

    pub(super) fn of_wire(wire: wire::QuorumNumbers) -> Self {
        let count = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        Self {
            change: wire.change,
            voters: count(wire.voters),
            alive: count(wire.alive),
            voters_left: count(wire.voters_left),
            alive_left: count(wire.alive_left),
        }
    }
}

impl fmt::Display for QuorumNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { change, voters, alive, voters_left, alive_left } = self;
        let plural = if *voters == 1 { "" } else { "s" };
        if *voters_left == 0 {
            return write!(f, "{voters} voter{plural}; {change} leaves none");
        }
        let needed = self.needed();
        write!(
            f,
            "{voters} voter{plural}, {alive} alive; {change} leaves {alive_left} of {voters_left} alive, {needed} needed"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId::new).collect()
    }

    fn verdict(sets: &[&[u64]], yes: &[u64], no: &[u64]) -> Verdict {
        let mut tally = Tally::new(sets.iter().map(|set| ids(set)).collect());
        yes.iter().for_each(|id| tally.heard(NodeId::new(*id), true));
        no.iter().for_each(|id| tally.heard(NodeId::new(*id), false));
        tally.verdict()
    }

    #[test]
    fn majority_of_every_set_decides() {
        let three: &[&[u64]] = &[&[1, 2, 3]];
        let joint: &[&[u64]] = &[&[1, 2, 3], &[3, 4, 5]];
        for (sets, yes, no, expected) in [
            (three, &[1][..], &[][..], Verdict::Open),
            (three, &[1, 3], &[], Verdict::Won),
            (three, &[1], &[2], Verdict::Open),
            (three, &[1], &[2, 3], Verdict::Lost),
            (three, &[1, 9, 8], &[], Verdict::Open),
            (joint, &[1, 2, 3], &[], Verdict::Open),
            (joint, &[1, 3, 4], &[], Verdict::Won),
            (joint, &[1, 2, 3], &[4, 5], Verdict::Lost),
            (&[&[1]], &[1], &[], Verdict::Won),
            (&[], &[1], &[], Verdict::Lost),
            (&[&[1, 2]], &[1], &[], Verdict::Open),
        ] {
            assert_eq!(verdict(sets, yes, no), expected, "{sets:?} yes {yes:?} no {no:?}");
        }
    }

    #[test]
    fn an_answer_counts_once_and_yes_stays_yes() {
        assert_eq!(verdict(&[&[1, 2, 3]], &[1, 1, 1], &[]), Verdict::Open);
        assert_eq!(verdict(&[&[1, 2, 3]], &[1, 2], &[2, 3]), Verdict::Won);
    }

    #[test]
    fn change_that_loses_the_majority_is_told_with_its_numbers() {
        let numbers = |after: &[u64], alive: &[u64]| {
            QuorumNumbers::of(
                "removing pi-2".to_owned(),
                &ids(&[1, 2, 3]),
                &ids(after),
                &ids(alive),
            )
        };
        let live_one = numbers(&[1, 3], &[1, 2]);
        assert!(!live_one.keeps_quorum());
        assert_eq!(
            live_one.to_string(),
            "3 voters, 2 alive; removing pi-2 leaves 1 of 2 alive, 2 needed"
        );
        assert!(numbers(&[1, 3], &[1, 3]).keeps_quorum(), "the dead one of three");
        assert!(numbers(&[1, 3], &[1, 2, 3]).keeps_quorum());
        let last = QuorumNumbers::of("removing pi-1".to_owned(), &ids(&[1]), &ids(&[]), &ids(&[1]));
        assert!(!last.keeps_quorum());
        assert_eq!(last.to_string(), "1 voter; removing pi-1 leaves none");
        assert_eq!(QuorumNumbers::of_wire(live_one.to_wire()), live_one);
    }
}

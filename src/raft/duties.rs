//! Decides what a leader does for its cluster by itself: who gets a vote, who is given up, who leads next.
//!
//! # Shape
//!
//! A pure state machine. [`super::lead`] shows it the members once a second and carries out the [`Duty`]s it returns. Whatever
//! is decided here is checked once more, against the same members, when it is made (`change`).
//!
//! # Invariants
//!
//! - Each learner is judged alone: one that is stuck delays nobody.
//! - Half a change, and a removal that nobody wrote down, are finished by whoever leads next. Before it touches what another node may
//!   still be busy with, it looks twice.
//! - Leadership is not handed over for a pause that the others bridge: while the leader's card hangs, commits go on with the
//!   others' cards, and a transfer is an election. It is handed over before the node gives up on its card
//!   ([`limits::CARD_HUNG_EXIT`]), because the exit would be a longer gap; and earlier if what waits for the card fills memory.
//! - A hand-over that did not work is not repeated at once.
//! - Who is written down as gone gets no vote.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::change::LAG_MAX;
use crate::limits;
use crate::types::{LogIndex, NodeId};

/// A member other than the leader, as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) id: NodeId,
    pub(super) learner: bool,
    /// Whose vote it takes over.
    pub(super) replaces: Option<NodeId>,
    /// The last entry that it surely has.
    pub(super) matched: Option<LogIndex>,
    /// `None` if it does not answer, else for how long its card has kept a barrier waiting.
    pub(super) stalled: Option<Duration>,
}

impl Peer {
    const fn is_alive(&self) -> bool {
        self.stalled.is_some()
    }

    pub(super) fn has_caught_up(&self, last: LogIndex) -> bool {
        self.matched.is_some_and(|matched| last.get() <= matched.get() + LAG_MAX)
    }
}

/// What a leader sees.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    /// End of the leader's log.
    pub(super) last_index: LogIndex,
    /// For how long the leader's own card has kept a barrier waiting.
    pub(super) stalled: Duration,
    /// Bytes of the log that wait for the leader's card.
    pub(super) waiting_bytes: u64,
    /// A change of members is half done.
    pub(super) joint: bool,
    pub(super) peers: Vec<Peer>,
    /// Nodes that were started once, are not members, and are not written down as gone.
    pub(super) strangers: BTreeSet<NodeId>,
    /// Members that are written down as gone.
    pub(super) ghosts: BTreeSet<NodeId>,
    /// The format that the cluster could have, if it has an older one: what every member reads.
    pub(super) format_due: Option<u32>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    /// Take the second step of a change of members.
    FinishChange,
    /// Let this voter lead.
    HandOver(NodeId),
    /// Give this learner a vote.
    Promote(NodeId),
    /// Give this learner the vote of that member.
    Replace {
        /// Who leaves.
        old: NodeId,
        /// Who comes.
        new: NodeId,
    },
    /// Give this learner up: it has made no progress for so long.
    GiveUp(NodeId, Duration),
    /// Write down that this node is gone.
    Retire(NodeId),
    /// Remove this member: it is written down as gone.
    Evict(NodeId),
    /// Write data in this format from now on.
    RaiseFormat(u32),
}

/// What is remembered between two looks. Starts anew with every term.
#[derive(Clone, Debug)]
pub(super) struct Duties {
    /// A learner that has not answered for so long is given up.
    silent_max: Duration,
    joint_before: bool,
    strangers_before: BTreeSet<NodeId>,
    format_due_before: Option<u32>,
    handed_over_at: Option<Instant>,
    progress: BTreeMap<NodeId, Progress>,
}

/// How far a learner was, and since when it has been there.
#[derive(Clone, Copy, Debug)]
struct Progress {
    matched: Option<LogIndex>,
    moved_at: Instant,
    heard_at: Instant,
}

impl Default for Duties {
    fn default() -> Self {
        Self::new(limits::LEARNER_SILENT_MAX)
    }
}

impl Duties {
    /// Nothing is remembered yet.
    pub(super) const fn new(silent_max: Duration) -> Self {
        Self {
            silent_max,
            joint_before: false,
            strangers_before: BTreeSet::new(),
            format_due_before: None,
            handed_over_at: None,
            progress: BTreeMap::new(),
        }
    }

    /// What to do now.
    pub(super) fn decide(&mut self, now: Instant, view: &View) -> Vec<Duty> {
        let mut duties = Vec::new();
        duties.extend(self.hand_over(now, view));
        let joint_before = std::mem::replace(&mut self.joint_before, view.joint);
        if view.joint {
            // Nothing else about members can be done until this is.
            duties.extend(joint_before.then_some(Duty::FinishChange));
            return duties;
        }
        self.judge_learners(now, view, &mut duties);
        duties.extend(view.ghosts.iter().copied().map(Duty::Evict));
        let seen_twice = view.strangers.intersection(&self.strangers_before);
        duties.extend(seen_twice.copied().map(Duty::Retire));
        self.strangers_before.clone_from(&view.strangers);
        let due_before = std::mem::replace(&mut self.format_due_before, view.format_due);
        duties
            .extend(view.format_due.filter(|due| due_before == Some(*due)).map(Duty::RaiseFormat));
        duties
    }

    fn hand_over(&mut self, now: Instant, view: &View) -> Option<Duty> {
        let hangs = limits::HAND_OVER_STALL <= view.stalled;
        let fills = limits::HAND_OVER_STALL_MIN <= view.stalled
            && limits::HAND_OVER_BYTES <= view.waiting_bytes;
        let tried = self.handed_over_at.is_some_and(|at| now < at + limits::HAND_OVER_COOLDOWN);
        if !(hangs || fills) || tried {
            return None;
        }
        let to = successor(view)?;
        self.handed_over_at = Some(now);
        Some(Duty::HandOver(to))
    }

    fn judge_learners(&mut self, now: Instant, view: &View, duties: &mut Vec<Duty>) {
        let stays = |peer: &&Peer| peer.learner && !view.ghosts.contains(&peer.id);
        let learners = || view.peers.iter().filter(stays);
        self.progress.retain(|id, _| learners().any(|learner| learner.id == *id));
        for learner in learners() {
            let progress = self.progress.entry(learner.id).or_insert(Progress {
                matched: learner.matched,
                moved_at: now,
                heard_at: now,
            });
            if learner.is_alive() {
                progress.heard_at = now;
            }
            if progress.matched != learner.matched || learner.has_caught_up(view.last_index) {
                *progress = Progress { matched: learner.matched, moved_at: now, ..*progress };
            }
            duties.extend(judge(now, view, learner, *progress, self.silent_max));
        }
    }
}

fn judge(
    now: Instant,
    view: &View,
    learner: &Peer,
    progress: Progress,
    silent_max: Duration,
) -> Option<Duty> {
    if learner.is_alive() && learner.has_caught_up(view.last_index) {
        return Some(match learner.replaces {
            Some(old) => Duty::Replace { old, new: learner.id },
            None => Duty::Promote(learner.id),
        });
    }
    let silent = now.saturating_duration_since(progress.heard_at);
    let stuck = now.saturating_duration_since(progress.moved_at);
    if silent_max <= silent {
        Some(Duty::GiveUp(learner.id, silent))
    } else if limits::LEARNER_STUCK_MAX <= stuck {
        Some(Duty::GiveUp(learner.id, stuck))
    } else {
        None
    }
}

/// The voter that can lead best: it answers, its card does, and it lacks least. Nobody if the others are no majority without it
/// and the leader's card, because then an election would not help.
pub(super) fn successor(view: &View) -> Option<NodeId> {
    let voters = || view.peers.iter().filter(|peer| !peer.learner);
    let healthy = |peer: &&Peer| {
        peer.stalled.is_some_and(|stalled| stalled < limits::CARD_SLOW)
            && peer.has_caught_up(view.last_index)
    };
    let (all, able) = (voters().count() + 1, voters().filter(healthy).count());
    if limits::HAND_OVER_STALL_MIN <= view.stalled && able < super::quorum::majority(all) {
        return None;
    }
    voters()
        .filter(healthy)
        .max_by_key(|peer| (peer.matched, std::cmp::Reverse(peer.id)))
        .map(|peer| peer.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAST: LogIndex = LogIndex::new(1_000);

    fn id(id: u64) -> NodeId {
        NodeId::new(id)
    }

    fn voter(number: u64) -> Peer {
        Peer {
            id: id(number),
            learner: false,
            replaces: None,
            matched: Some(LAST),
            stalled: Some(Duration::ZERO),
        }
    }

    fn learner(number: u64, matched: Option<u64>) -> Peer {
        Peer { learner: true, matched: matched.map(LogIndex::new), ..voter(number) }
    }

    fn dead(peer: Peer) -> Peer {
        Peer { stalled: None, ..peer }
    }

    fn view(peers: &[Peer]) -> View {
        View { last_index: LAST, peers: peers.to_vec(), ..View::default() }
    }

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn learner_gets_its_vote_when_it_has_the_log_and_answers() {
        let start = Instant::now();
        for (peer, expected) in [
            (learner(2, Some(1_000)), vec![Duty::Promote(id(2))]),
            (learner(2, Some(1_000 - LAG_MAX)), vec![Duty::Promote(id(2))]),
            (learner(2, Some(999 - LAG_MAX)), vec![]),
            (learner(2, None), vec![]),
            (dead(learner(2, Some(1_000))), vec![]),
            (voter(2), vec![]),
            (
                Peer { replaces: Some(id(7)), ..learner(2, Some(1_000)) },
                vec![Duty::Replace { old: id(7), new: id(2) }],
            ),
        ] {
            let decided = Duties::default().decide(start, &view(&[voter(3), peer.clone()]));
            assert_eq!(decided, expected, "{peer:?}");
        }
    }

    #[test]
    fn learner_that_is_stuck_is_given_up_and_delays_nobody() {
        let (mut duties, start) = (Duties::default(), Instant::now());
        let silent = dead(learner(2, None));
        assert_eq!(duties.decide(start, &view(std::slice::from_ref(&silent))), []);
        let other = learner(3, Some(1_000));
        let both = view(&[silent.clone(), other]);
        assert_eq!(duties.decide(start + secs(60), &both), [Duty::Promote(id(3))]);
        let late = start + limits::LEARNER_SILENT_MAX;
        let decided = duties.decide(late, &view(&[silent]));
        assert_eq!(decided, [Duty::GiveUp(id(2), limits::LEARNER_SILENT_MAX)]);
    }

    #[test]
    fn learner_that_moves_or_is_being_filled_keeps_its_place() {
        let (mut duties, start) = (Duties::default(), Instant::now());
        let minutes = |minutes: u64| start + secs(60 * minutes);
        for minute in 0..60 {
            let moving = learner(2, Some(minute));
            assert_eq!(duties.decide(minutes(minute), &view(&[moving])), [], "{minute}");
        }
        // It answers and stays where it is, as while a snapshot is on its way: patience, but not for ever.
        let standing = view(&[learner(2, Some(59))]);
        let give_up = limits::LEARNER_STUCK_MAX;
        assert_eq!(duties.decide(minutes(59) + give_up - secs(1), &standing), []);
        let decided = duties.decide(minutes(59) + give_up, &standing);
        assert_eq!(decided, [Duty::GiveUp(id(2), give_up)]);
    }

    #[test]
    fn a_learner_that_has_all_waits_for_its_vote_for_as_long_as_it_takes() {
        let (mut duties, start) = (Duties::default(), Instant::now());
        let ready = view(&[dead(voter(3)), learner(2, Some(1_000))]);
        for hour in 0..3 {
            let decided = duties.decide(start + secs(3_600 * hour), &ready);
            assert_eq!(decided, [Duty::Promote(id(2))]);
        }
    }

    #[test]
    fn a_card_that_pauses_moves_no_leadership_and_one_that_hangs_does() {
        let start = Instant::now();
        let hand_over = |stalled, waiting_bytes| {
            let view = View { stalled, waiting_bytes, ..view(&[voter(2), voter(3)]) };
            Duties::default().decide(start, &view)
        };
        assert_eq!(hand_over(secs(12), 1 << 20), [], "the others bridge it");
        assert_eq!(hand_over(limits::HAND_OVER_STALL, 0), [Duty::HandOver(id(2))]);
        assert_eq!(hand_over(secs(4), limits::HAND_OVER_BYTES), [Duty::HandOver(id(2))]);
        assert_eq!(hand_over(secs(2), limits::HAND_OVER_BYTES), []);
    }

    #[test]
    fn a_hand_over_that_failed_rests_before_the_next() {
        let (mut duties, start) = (Duties::default(), Instant::now());
        let hung = View { stalled: limits::HAND_OVER_STALL, ..view(&[voter(2), voter(3)]) };
        assert_eq!(duties.decide(start, &hung), [Duty::HandOver(id(2))]);
        assert_eq!(duties.decide(start + secs(1), &hung), []);
        let rested = start + limits::HAND_OVER_COOLDOWN;
        assert_eq!(duties.decide(rested, &hung), [Duty::HandOver(id(2))]);
    }

    #[test]
    fn the_voter_that_lacks_least_succeeds_if_its_card_answers() {
        let behind =
            |number, by| Peer { matched: Some(LogIndex::new(1_000 - by)), ..voter(number) };
        let slow = |number| Peer { stalled: Some(limits::CARD_SLOW), ..voter(number) };
        let hung = limits::HAND_OVER_STALL;
        for (peers, stalled, expected) in [
            (vec![behind(2, 3), voter(3)], hung, Some(3)),
            (vec![voter(3), voter(2)], hung, Some(2)),
            (vec![slow(2), voter(3)], hung, None),
            (vec![slow(2), voter(3)], Duration::ZERO, Some(3)),
            (vec![dead(voter(2)), voter(3)], hung, None),
            (vec![dead(voter(2)), voter(3), voter(4), voter(5)], hung, Some(3)),
            (vec![voter(2), behind(3, LAG_MAX + 1)], Duration::ZERO, Some(2)),
            (vec![learner(2, Some(1_000))], Duration::ZERO, None),
            (vec![voter(2)], hung, None),
            (vec![voter(2)], Duration::ZERO, Some(2)),
            (vec![], Duration::ZERO, None),
        ] {
            let view = View { stalled, ..view(&peers) };
            assert_eq!(successor(&view), expected.map(id), "{peers:?} {stalled:?}");
        }
    }

    #[test]
    fn format_that_everybody_reads_is_raised_at_the_second_look() {
        let (mut duties, start) = (Duties::default(), Instant::now());
        let due = |format_due| View { format_due, ..view(&[voter(2), voter(3)]) };
        for (format_due, expected) in [
            (Some(2), vec![]),
            (Some(2), vec![Duty::RaiseFormat(2)]),
            (Some(3), vec![]),
            (None, vec![]),
            (Some(3), vec![]),
            (Some(3), vec![Duty::RaiseFormat(3)]),
        ] {
            assert_eq!(duties.decide(start, &due(format_due)), expected, "{format_due:?}");
        }
        let joint = View { joint: true, ..due(Some(3)) };
        assert_eq!(
            duties.decide(start, &joint),
            [],
            "while members change nobody is sure who they are"
        );
    }

    #[test]
    fn what_a_dead_leader_left_half_done_is_finished_after_a_second_look() {
        let (mut duties, start) = (Duties::default(), Instant::now());
        let joint = View { joint: true, ..view(&[voter(2), learner(3, Some(1_000))]) };
        assert_eq!(duties.decide(start, &joint), [], "perhaps it is being done now");
        assert_eq!(duties.decide(start, &joint), [Duty::FinishChange], "and no promotion");
        let gone = View { strangers: [id(9)].into(), ..view(&[voter(2)]) };
        assert_eq!(duties.decide(start, &gone), []);
        assert_eq!(duties.decide(start, &gone), [Duty::Retire(id(9))]);
        let back = View { ghosts: [id(2)].into(), ..view(&[voter(2)]) };
        assert_eq!(duties.decide(start, &back), [Duty::Evict(id(2))]);
        // Given up, and not removed yet, and now it is there: it comes back as another one.
        let late = View { ghosts: [id(2)].into(), ..view(&[learner(2, Some(1_000))]) };
        assert_eq!(duties.decide(start, &late), [Duty::Evict(id(2))]);
    }
}

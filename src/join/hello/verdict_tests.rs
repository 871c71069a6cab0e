//! Every row of what can have happened to a card, as a table.

use super::*;
use crate::types::{LogIndex, Term};

const ME: NodeId = NodeId::new(1);
const B: NodeId = NodeId::new(2);
const C: NodeId = NodeId::new(3);

fn id(term: u64, leader: u64, index: u64) -> LogId {
    LogId { term: Term::new(term), leader: NodeId::new(leader), index: LogIndex::new(index) }
}

fn vote(term: u64, node: u64) -> Vote {
    Vote { term: Term::new(term), node: NodeId::new(node), committed: false }
}

fn voters(at: u64, ids: &[NodeId]) -> Voters {
    let set: BTreeSet<NodeId> = ids.iter().copied().collect();
    Voters { log_id: Some(id(1, 1, at)), configs: vec![set.clone()], members: set }
}

/// Start 5, voted for B in term 3, log to index 100, three voters.
fn own() -> Own {
    Own {
        node: ME,
        epoch: 5,
        vote: Some(vote(3, 2)),
        last: Some(id(3, 2, 100)),
        voters: voters(1, &[ME, B, C]),
        joining: false,
        wire_versions: 1..=1,
        format: 1,
    }
}

/// Somebody who remembers exactly what we have.
fn said() -> Said {
    Said {
        epoch: 4,
        vote: Some(vote(3, 2)),
        kept: Some(id(3, 2, 100)),
        voters: voters(1, &[ME, B, C]),
        last: Some(id(3, 2, 100)),
        wire_versions: Some(1..=1),
        format: 1,
        release: "0.2.0".to_owned(),
        ..Said::default()
    }
}

fn by(said: impl IntoIterator<Item = (NodeId, Said)>) -> BTreeMap<NodeId, Said> {
    said.into_iter().collect()
}

fn one(said: Said) -> Verdict {
    decide(&own(), &by([(B, said)]))
}

#[test]
fn node_that_is_what_the_others_remember_is_welcome() {
    assert_eq!(one(said()), Verdict::Welcome);
    assert_eq!(decide(&own(), &by([(B, said()), (C, said())])), Verdict::Welcome);
}

#[test]
fn nobody_is_welcome_without_a_majority() {
    let missing = BTreeSet::from([B, C]);
    assert_eq!(decide(&own(), &by([])), Verdict::Wait { missing });
    let five = Own { voters: voters(1, &[ME, B, C, NodeId::new(4), NodeId::new(5)]), ..own() };
    let missing = BTreeSet::from([C, NodeId::new(4), NodeId::new(5)]);
    assert_eq!(decide(&five, &by([(B, said())])), Verdict::Wait { missing });
}

#[test]
fn single_voter_needs_nobody() {
    let alone = Own { voters: voters(1, &[ME]), ..own() };
    assert_eq!(decide(&alone, &by([])), Verdict::Welcome);
}

#[test]
fn while_members_change_both_majorities_are_needed() {
    let mut changing = voters(9, &[ME, B, C]);
    let new = [B, C, NodeId::new(4)];
    changing.configs.push(new.into());
    let own = Own { voters: changing, ..own() };
    let missing = BTreeSet::from([C, NodeId::new(4)]);
    assert_eq!(decide(&own, &by([(B, said())])), Verdict::Wait { missing });
    assert_eq!(decide(&own, &by([(B, said()), (C, said())])), Verdict::Welcome);
}

/// F16, and a copied card that is started after the original (F14).
#[test]
fn start_that_is_known_already_is_amnesia() {
    for known in [5, 6, 100] {
        let what = Forgotten::Epoch { here: 5, known };
        assert_eq!(one(Said { epoch: known, ..said() }), Verdict::Amnesia { what, who: B });
    }
}

/// F3, F16: a vote that the card has lost.
#[test]
fn forgotten_vote_is_amnesia() {
    for known in [vote(4, 1), vote(3, 3)] {
        let what = Forgotten::Vote { here: own().vote, known };
        let verdict = one(Said { vote: Some(known), ..said() });
        assert_eq!(verdict, Verdict::Amnesia { what, who: B });
    }
    let none = Own { vote: None, last: None, ..own() };
    let verdict = decide(&none, &by([(B, said())]));
    assert!(matches!(verdict, Verdict::Amnesia { what: Forgotten::Vote { .. }, .. }));
}

#[test]
fn committed_is_no_promise() {
    let known = Vote { committed: true, ..vote(3, 2) };
    assert_eq!(one(Said { vote: Some(known), ..said() }), Verdict::Welcome);
}

/// F3: acknowledged, and not on the card.
#[test]
fn forgotten_entry_is_amnesia() {
    let known = id(3, 2, 101);
    let what = Forgotten::Entry { here: own().last, known };
    assert_eq!(one(Said { kept: Some(known), ..said() }), Verdict::Amnesia { what, who: B });
    let empty = Own { last: None, ..own() };
    let verdict = decide(&empty, &by([(B, said())]));
    assert!(matches!(verdict, Verdict::Amnesia { what: Forgotten::Entry { .. }, .. }));
}

/// The leader of term 3 cut off what the leader of term 2 had sent and never committed.
#[test]
fn entry_that_a_later_leader_cut_off_is_not_forgotten() {
    let replaced = Said { kept: Some(id(2, 3, 140)), ..said() };
    assert_eq!(one(replaced.clone()), Verdict::Welcome);
    // The same, when power went between the cut and the first new entry.
    let cut = Own { last: Some(id(2, 3, 90)), ..own() };
    assert_eq!(decide(&cut, &by([(B, replaced)])), Verdict::Welcome);
}

#[test]
fn one_memory_is_enough_whatever_the_others_say() {
    let remembers = Said { epoch: 9, ..said() };
    for said in [[(B, remembers.clone()), (C, said())], [(B, said()), (C, remembers)]] {
        assert!(matches!(decide(&own(), &by(said)), Verdict::Amnesia { .. }));
    }
}

/// A removed node that comes back.
#[test]
fn retired_node_is_told_so_first() {
    let reason = "removed by an operator".to_owned();
    let retired = Said { retired: Some(reason.clone()), epoch: 9, ..said() };
    assert_eq!(one(retired), Verdict::Retired { reason, who: B });
    let others = Said { voters: voters(50, &[B, C]), ..said() };
    assert!(matches!(one(others.clone()), Verdict::Retired { .. }));
    // An older membership than ours, from before we were added, says nothing.
    let newer = Own { voters: voters(60, &[ME, B, C]), ..own() };
    assert_eq!(decide(&newer, &by([(B, others)])), Verdict::Welcome);
}

/// F14: the original is alive; its own starts are known too, but it is the copy that is refused.
#[test]
fn copy_of_a_living_node_is_a_duplicate_not_an_amnesiac() {
    let found = "pi-1 at https://192.168.1.10:2380".to_owned();
    let alive = Said { duplicate: Some(found.clone()), epoch: 9, ..said() };
    assert_eq!(one(alive), Verdict::Duplicate { found, who: B });
}

#[test]
fn release_that_a_majority_does_not_understand_is_refused_by_name() {
    let newer = Said { wire_versions: Some(3..=4), release: "9.0".to_owned(), ..said() };
    let verdict = decide(&own(), &by([(B, newer.clone()), (C, newer.clone())]));
    let Verdict::Incompatible { found, .. } = verdict else { panic!("{verdict:?}") };
    assert!(
        found.contains("9.0") && found.contains("3 to 4") && found.contains("version 1"),
        "{found}"
    );
    // One of three may be understood by nobody: the others are a majority.
    assert_eq!(decide(&own(), &by([(B, newer.clone()), (C, said())])), Verdict::Welcome);
    assert!(matches!(one(newer.clone()), Verdict::Wait { .. }), "the third may be understood");
    let two = Own { voters: voters(1, &[ME, B]), ..own() };
    assert!(matches!(decide(&two, &by([(B, newer)])), Verdict::Incompatible { .. }));
}

#[test]
fn release_that_does_not_read_the_clusters_format_is_refused_by_one_word() {
    let raised = Said { format: 2, ..said() };
    let verdict = decide(&own(), &by([(B, raised.clone()), (C, said())]));
    let Verdict::Incompatible { found, who: B } = verdict else { panic!("{verdict:?}") };
    assert!(found.contains("in format 2") && found.contains("reads up to 1"), "{found}");
    let newer = Own { format: 2, ..own() };
    assert_eq!(decide(&newer, &by([(B, raised)])), Verdict::Welcome);
}

#[test]
fn flags_are_compared_with_whoever_is_furthest_ahead() {
    let found = "service-cidr differs".to_owned();
    let differs = Some(found.clone());
    let behind = Said { flags_differ: differs.clone(), last: Some(id(2, 2, 50)), ..said() };
    let ahead = Said { last: Some(id(3, 2, 200)), ..said() };
    assert_eq!(decide(&own(), &by([(B, behind), (C, ahead.clone())])), Verdict::Welcome);
    let ahead = Said { flags_differ: differs, ..ahead };
    let verdict = decide(&own(), &by([(B, said()), (C, ahead)]));
    assert_eq!(verdict, Verdict::FlagsDiffer { found, who: C });
}

/// F26: nobody remembers a joiner, and it is in no membership.
#[test]
fn joiner_needs_one_answer() {
    let joiner = Own {
        epoch: 1,
        vote: None,
        last: None,
        joining: true,
        voters: voters(1, &[B, C]),
        ..own()
    };
    let fresh = Said { epoch: 0, vote: None, kept: None, voters: voters(1, &[B, C]), ..said() };
    assert_eq!(decide(&joiner, &by([(C, fresh.clone())])), Verdict::Welcome);
    assert!(matches!(decide(&joiner, &by([])), Verdict::Wait { .. }));
    let retired = Said { retired: Some("stuck".to_owned()), ..fresh };
    assert!(matches!(decide(&joiner, &by([(C, retired)])), Verdict::Retired { .. }));
}

/// F27: the founder alone, before its first membership is durable.
#[test]
fn founder_without_a_membership_is_welcome() {
    let founder = Own { epoch: 1, vote: None, last: None, voters: Voters::default(), ..own() };
    assert_eq!(decide(&founder, &by([])), Verdict::Welcome);
}

/// All three cards lose power and come back, in any order: each asks the others while they ask.
#[test]
fn whole_cluster_that_lost_power_comes_back() {
    // The others have restarted too and remember only what their own cards tell: the epoch.
    let forgetful = Said { vote: None, kept: None, ..said() };
    assert_eq!(one(forgetful), Verdict::Welcome);
}

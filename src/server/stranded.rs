//! Decides whether a cluster can have a leader at all, when servers have come back without what they had promised.
//!
//! A card image that is put back makes its server forget; it comes back under a new id, without a vote, and is let in by the leader.
//! If so many forget at once that the others are no majority, there is no leader to let them in. Nothing unsafe happens, and nothing
//! happens by itself: an operator has to say whose data counts.
//!
//! Pure. Told by those who wait, and by those who are waited for.

use std::collections::BTreeSet;

use crate::raft::Member;
use crate::types::NodeId;

/// What to tell the operator, if no leader can come of it. `forgot` are voters that surely do not come back as who they were,
/// `there` those that answer as who they were.
pub(super) fn stranded(
    members: &[Member],
    forgot: &BTreeSet<NodeId>,
    there: &BTreeSet<NodeId>,
) -> Option<String> {
    let voters: Vec<&Member> = members.iter().filter(|member| !member.learner).collect();
    let needed = voters.len() / 2 + 1;
    let intact = |voter: &&&Member| there.contains(&voter.id) && !forgot.contains(&voter.id);
    let gone = |voter: &&&Member| forgot.contains(&voter.id);
    let missing = |voter: &&&Member| !there.contains(&voter.id) && !forgot.contains(&voter.id);
    if !voters.iter().any(|voter| gone(&voter)) || needed <= voters.iter().filter(intact).count() {
        return None;
    }
    let (intact, gone) = (names(voters.iter().filter(intact)), names(voters.iter().filter(gone)));
    let missing = names(voters.iter().filter(missing));
    let mut text = format!(
        "no majority: {} servers vote and {needed} are needed; without what it had promised: {}",
        voters.len(),
        gone.join(", ")
    );
    if !missing.is_empty() {
        text.push_str(&format!("; switched off, cut off, or the same: {}", missing.join(", ")));
    }
    let whose = if intact.is_empty() {
        "the one with the newest data".to_owned()
    } else {
        text.push_str(&format!("; there as it was: {}", intact.join(", ")));
        intact.join(" or ")
    };
    text.push_str(". ");
    if !missing.is_empty() {
        text.push_str(&format!("Start {}. If that cannot be: ", missing.join(", ")));
    }
    text.push_str(&format!(
        "Put the newest card of {} back in, if there is one; else, on {whose}: stop k3s-server, run `k3s-server server --cluster-reset`, start it again, and the others fill themselves from it",
        gone.join(" or ")
    ));
    Some(text)
}

fn names<'a>(voters: impl Iterator<Item = &'a &'a Member>) -> Vec<String> {
    voters.map(|voter| voter.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn members(voters: u64, learners: u64) -> Vec<Member> {
        let member = |id: u64| Member {
            id: NodeId::new(id),
            name: format!("pi-{id}"),
            learner: voters < id,
            ..Member::default()
        };
        (1..=voters + learners).map(member).collect()
    }

    fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId::new).collect()
    }

    fn told(voters: u64, forgot: &[u64], there: &[u64]) -> Option<String> {
        stranded(&members(voters, 2), &ids(forgot), &ids(there))
    }

    #[test]
    fn cluster_is_stranded_only_if_the_others_are_no_majority_without_those_who_forgot() {
        for (voters, forgot, there, expected) in [
            (3, &[3][..], &[1, 2][..], false),
            (3, &[3], &[1], true),
            (3, &[2, 3], &[1], true),
            (3, &[2, 3], &[1, 2, 3], true),
            (3, &[], &[1], false),
            (5, &[4, 5], &[1, 2, 3], false),
            (5, &[3, 4, 5], &[1, 2], true),
            (1, &[], &[1], false),
            // Neither a learner nor a stranger has a vote to lose, or to give.
            (3, &[4], &[1], false),
            (3, &[3], &[1, 4, 9], true),
        ] {
            let text = told(voters, forgot, there);
            assert_eq!(text.is_some(), expected, "{voters} {forgot:?} {there:?}: {text:?}");
        }
    }

    #[test]
    fn operator_hears_who_is_missing_and_what_to_do() {
        expect!["no majority: 3 servers vote and 2 are needed; without what it had promised: pi-2, pi-3; there as it was: pi-1. Put the newest card of pi-2 or pi-3 back in, if there is one; else, on pi-1: stop k3s-server, run `k3s-server server --cluster-reset`, start it again, and the others fill themselves from it"]
            .assert_eq(&told(3, &[2, 3], &[1]).unwrap());
        expect!["no majority: 3 servers vote and 2 are needed; without what it had promised: pi-3; switched off, cut off, or the same: pi-1, pi-2. Start pi-1, pi-2. If that cannot be: Put the newest card of pi-3 back in, if there is one; else, on the one with the newest data: stop k3s-server, run `k3s-server server --cluster-reset`, start it again, and the others fill themselves from it"]
            .assert_eq(&told(3, &[3], &[]).unwrap());
    }
}

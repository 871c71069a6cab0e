//! The sentence in `systemctl status`, and what is looked at every few seconds for the journal: alarms, lines left out.

use std::collections::BTreeSet;
use std::time::Duration;

use super::cockpit::{leader_name, quantile_seconds, role, written_today};
use crate::announce;
use crate::env::Env;
use crate::events::{EventId, fields};
use crate::metrics::Observations;
use crate::observe::repeat::Repeats;
use crate::proto::etcdserverpb::AlarmType;
use crate::raft::{Node, Status};
use crate::systemd::Notifier;
use crate::types::NodeId;

/// How often numbers in the sentence are renewed.
const RENEW: Duration = Duration::from_secs(10);

/// `systemctl status`: who this node is at the moment, and how its card does.
fn sentence(status: &Status, barriers: &Observations) -> String {
    let voters = status.voters();
    let servers = if voters == 1 { "server" } else { "servers" };
    let mut said = format!("{} of {voters} {servers}", role(status.role));
    match leader_name(status) {
        Some(leader) if status.leader != Some(status.node) => {
            said.push_str(&format!(", leader is {leader}"));
        }
        Some(_) => {}
        None => said.push_str(", no leader: writes wait"),
    }
    said.push_str(&format!(", term {}", status.term));
    let lag = status.committed.get().saturating_sub(status.applied.get());
    if 0 < lag {
        said.push_str(&format!(", {lag} entries behind"));
    }
    if 0 < barriers.count {
        let millis = quantile_seconds(barriers, 0.99) * 1e3;
        said.push_str(&format!(", card p99 {millis:.0} ms"));
    }
    said
}

/// Keeps STATUS= and the journal up with leadership.
pub(super) async fn report_status(node: Node, notifier: Notifier) {
    let mut status = node.watch_status();
    let mut said: Option<(Status, String)> = None;
    loop {
        let now = status.borrow_and_update().clone();
        let text = sentence(&now, &node.wal().stats().barrier_micros);
        let before = said.as_ref();
        if before.is_none_or(|(_, before)| *before != text) {
            notifier.status(&text);
        }
        if before.map(|(before, _)| before.leader) != Some(now.leader) {
            announce_leader(&now, before.is_some());
        }
        said = Some((now, text));
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = node.env().clock.sleep(RENEW) => {}
        }
    }
}

fn announce_leader(status: &Status, had_one: bool) {
    match leader_name(status) {
        Some(name) => announce!(
            EventId::LeaderChanged,
            { fields::TERM } = status.term.get(),
            { fields::LEADER } = name.as_str(),
            "leader is {name}, term {}",
            status.term
        ),
        None if had_one => announce!(EventId::LeaderLost, "no leader; writes wait"),
        None => {}
    }
}

/// Tells of alarms that are raised or cleared anywhere in the cluster.
pub(super) async fn report_alarms(node: Node) {
    let mut known: BTreeSet<(NodeId, AlarmType)> = BTreeSet::new();
    loop {
        // A store that cannot be read tells it elsewhere.
        if let Ok(alarms) = node.store().read().and_then(|view| view.alarms()) {
            let now = alarms
                .into_iter()
                .filter_map(|(member, kind)| Some((member, AlarmType::try_from(kind).ok()?)))
                .collect();
            announce_alarms(&node.status(), &known, &now);
            known = now;
        }
        node.env().clock.sleep(RENEW).await;
    }
}

fn announce_alarms(
    status: &Status,
    before: &BTreeSet<(NodeId, AlarmType)>,
    now: &BTreeSet<(NodeId, AlarmType)>,
) {
    let name = |id: NodeId| {
        let member = status.members.iter().find(|member| member.id == id);
        member.map_or_else(|| id.to_string(), |member| member.name.clone())
    };
    for (member, kind) in now.difference(before) {
        let (alarm, member) = (kind.as_str_name(), name(*member));
        announce!(
            EventId::AlarmRaised,
            { fields::ALARM } = alarm,
            { fields::PEER } = member.as_str(),
            "{member} has raised the alarm {alarm}"
        );
    }
    for (member, kind) in before.difference(now) {
        let (alarm, member) = (kind.as_str_name(), name(*member));
        announce!(
            EventId::AlarmCleared,
            { fields::ALARM } = alarm,
            { fields::PEER } = member.as_str(),
            "the alarm {alarm} of {member} is cleared"
        );
    }
}

/// Says how often lines were left out, and keeps the day's count of bytes.
pub(super) async fn keep_count(env: Env, repeats: Repeats) {
    loop {
        env.clock.sleep(RENEW).await;
        repeats.tell(false);
        let _so_far = written_today(&env);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Histogram, MICROS};
    use crate::raft::{Member, Role};
    use crate::types::{LogIndex, Term};

    fn member(id: u64, name: &str) -> Member {
        Member { id: NodeId::new(id), name: name.to_owned(), ..Member::default() }
    }

    fn status(role: Role, leader: Option<u64>) -> Status {
        Status {
            node: NodeId::new(1),
            role,
            term: Term::new(7),
            leader: leader.map(NodeId::new),
            committed: LogIndex::new(120),
            applied: LogIndex::new(120),
            members: vec![member(1, "pi-1"), member(2, "pi-2"), member(3, "pi-3")].into(),
            ..Status::default()
        }
    }

    #[test]
    fn sentence_tells_role_leader_term_lag_and_the_cards_pace() {
        let none = Histogram::new(&MICROS).snapshot();
        let barriers = Histogram::new(&MICROS);
        barriers.observe(15_000);
        let barriers = barriers.snapshot();
        let lagging = Status { applied: LogIndex::new(100), ..status(Role::Follower, Some(2)) };
        for (status, barriers, expected) in [
            (status(Role::Leader, Some(1)), &none, "leader of 3 servers, term 7"),
            (
                status(Role::Leader, Some(1)),
                &barriers,
                "leader of 3 servers, term 7, card p99 16 ms",
            ),
            (lagging, &none, "follower of 3 servers, leader is pi-2, term 7, 20 entries behind"),
            (
                status(Role::Candidate, None),
                &none,
                "candidate of 3 servers, no leader: writes wait, term 7",
            ),
        ] {
            assert_eq!(sentence(&status, barriers), expected);
        }
    }
}

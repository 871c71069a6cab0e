//! Carries out what a leader does by itself: looks at the members once a second, asks [`super::duties`], acts.
//!
//! # Shape
//!
//! One task on every node. It acts only while the node leads; on every node it warns of an even number of voters. It holds
//! the node weakly and ends with it.
//!
//! # Not here
//!
//! What to do: `duties`. How members are changed: `change`.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::change::{Change, ChangeError, Leaving, Roster};
use super::duties::{Duties, Duty, Peer, View, successor};
use super::node::Shared;
use super::{Node, ProposeError, Role, Status};
use crate::command::Command;
use crate::env::Clock;
use crate::events::{EventId, fields};
use crate::proto::node::{ClusterChange, NodeRecord, RaiseFormat, cluster_change};
use crate::types::{NodeId, Term};
use crate::{announce, apply, limits, versions};

/// How often the leader looks.
const TICK: Duration = Duration::from_secs(1);

/// How long one duty may take before the next look.
const DUTY: Duration = Duration::from_secs(10);

/// How long a leader that stops waits for its successor.
const STEP_ASIDE: Duration = Duration::from_secs(2);

/// How long a named successor may take.
const HAND_OVER: Duration = Duration::from_secs(5);

/// Looks and acts until the node is gone.
pub(super) async fn run(node: Weak<Shared>, clock: Arc<dyn Clock>, learner_silent_max: Duration) {
    let mut duties = (Term::default(), Duties::new(learner_silent_max));
    let mut warned = None;
    loop {
        clock.sleep(TICK).await;
        let Some(shared) = node.upgrade() else { return };
        let node = Node::of(shared);
        let status = node.status();
        warn_of_even_voters(&status, &mut warned);
        if status.role != Role::Leader {
            continue;
        }
        if duties.0 != status.term {
            duties = (status.term, Duties::new(learner_silent_max));
        }
        node.look_and_act(&mut duties.1).await;
    }
}

/// Two of two are as many as two of three, and two of three bear a failure: an even number only adds a card that can fail.
fn warn_of_even_voters(status: &Status, warned: &mut Option<usize>) {
    let voters = status.voters();
    if !status.has_even_voters() {
        *warned = None;
        return;
    }
    if warned.replace(voters) != Some(voters) {
        let bears = voters.div_ceil(2) - 1;
        announce!(
            EventId::EvenVoters,
            { fields::COUNT } = voters,
            "{voters} servers vote: the cluster bears the loss of {bears}, no more than with {}",
            voters - 1
        );
    }
}

/// The format that the cluster could have, if it has an older one. Whoever has not started yet has announced nothing.
fn format_due(now: u32, members: &BTreeSet<NodeId>, known: &[(NodeId, NodeRecord)]) -> Option<u32> {
    let reads = |id: &NodeId| {
        let record = known.iter().find(|(known, _)| known == id);
        record.map_or(versions::FORMAT_FIRST, |(_, record)| versions::announced(record.format))
    };
    // This leader may know less than all others.
    let newest = members.iter().map(reads).min()?.min(versions::own().format);
    Some(newest).filter(|newest| now < *newest)
}

impl Node {
    /// Members that answer now, this one included. The leader asks; on others it is empty.
    pub async fn alive(&self) -> BTreeSet<NodeId> {
        let Ok(roster) = self.roster().await else { return BTreeSet::new() };
        let mut alive: BTreeSet<NodeId> = self.probe(&roster).await.into_keys().collect();
        alive.insert(self.id());
        alive
    }

    async fn look_and_act(&self, duties: &mut Duties) {
        let Ok(roster) = self.roster().await else { return };
        if !roster.settled {
            return;
        }
        let view = match self.view(&roster).await {
            Ok(view) => view,
            Err(error) => {
                tracing::warn!(%error, "the leader cannot read who was started");
                return;
            }
        };
        for duty in duties.decide(self.env().clock.now(), &view) {
            match tokio::time::timeout(DUTY, self.carry_out(duty, &roster)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(?duty, %error, "not now"),
                Err(_elapsed) => tracing::debug!(?duty, "not within {} s", DUTY.as_secs()),
            }
        }
    }

    /// What the duties are decided on.
    async fn view(&self, roster: &Roster) -> Result<View, crate::mvcc::StoreError> {
        let (matched, alive) = (self.matched(), self.probe(roster).await);
        let others = roster.members.iter().filter(|member| member.id != self.id());
        let peers = others.map(|member| Peer {
            id: member.id,
            learner: member.learner,
            replaces: member.replaces,
            matched: matched.get(&member.id).copied(),
            stalled: alive.get(&member.id).copied(),
        });
        let members: BTreeSet<NodeId> = roster.members.iter().map(|member| member.id).collect();
        let known = apply::nodes(&self.store().read()?)?;
        let is_member = |id: &NodeId| members.contains(id);
        let ids = |wanted: fn(bool, bool) -> bool| -> BTreeSet<NodeId> {
            let found = known.iter().filter(|(id, record)| wanted(is_member(id), record.retired));
            found.map(|(id, _)| *id).collect()
        };
        Ok(View {
            last_index: roster.last_index,
            stalled: self.wal().stalled_for().unwrap_or_default(),
            waiting_bytes: self.wal().waiting_bytes(),
            joint: roster.joint,
            peers: peers.collect(),
            strangers: ids(|member, retired| !member && !retired),
            ghosts: ids(|member, retired| member && retired),
            format_due: format_due(self.format(), &members, &known),
        })
    }

    pub(super) async fn carry_out(&self, duty: Duty, roster: &Roster) -> Result<(), ChangeError> {
        match duty {
            Duty::FinishChange => self.finish_change(roster).await,
            Duty::HandOver(to) => {
                self.hand_over(to, roster).await?;
                let stalled = self.wal().stalled_for().unwrap_or_default();
                let millis = u64::try_from(stalled.as_millis()).unwrap_or(u64::MAX);
                announce!(
                    EventId::LeaderHandedOver,
                    { fields::PEER } = %roster.name(to),
                    { fields::MILLIS } = millis,
                    "handed leadership to {}: this card has kept a write waiting for {} s",
                    roster.name(to),
                    stalled.as_secs()
                );
                Ok(())
            }
            Duty::Promote(id) => self.change_to_its_end(Change::Promote(id)).await,
            Duty::Replace { old, new } => {
                self.change_to_its_end(Change::Replace { old, new }).await
            }
            Duty::GiveUp(id, idle) => {
                self.change_to_its_end(Change::Remove(id, Leaving::GivenUp)).await?;
                announce!(
                    EventId::LearnerGivenUp,
                    { fields::PEER } = %roster.name(id),
                    "gave {} up: it has not moved for {} s while joining",
                    roster.name(id),
                    idle.as_secs()
                );
                Ok(())
            }
            Duty::Retire(id) => self.retire(id, Leaving::Removed.words().to_owned()).await,
            Duty::Evict(id) => self.change_to_its_end(Change::Remove(id, Leaving::Removed)).await,
            Duty::RaiseFormat(format) => self.raise_format(format).await,
        }
    }

    /// Has the cluster write in this format; whether every member reads it is looked at once more where the entry is applied.
    async fn raise_format(&self, format: u32) -> Result<(), ChangeError> {
        let release = versions::own().name.to_owned();
        let raise = cluster_change::Change::RaiseFormat(RaiseFormat { format, release });
        let command = Command::Cluster(ClusterChange { change: Some(raise) });
        let deadline = self.env().clock.now() + DUTY;
        let proposed = self.propose(command, deadline).await;
        proposed.map(drop).map_err(|error| match error {
            ProposeError::TimedOut => ChangeError::TimedOut,
            ProposeError::NoLeader | ProposeError::LeaderChanged => ChangeError::NoLeader,
            ProposeError::TooManyRequests => ChangeError::Busy,
            ProposeError::Stopped => ChangeError::Stopped,
        })
    }

    /// Lets `to` lead, as the leader, and returns when somebody else does.
    ///
    /// openraft's leader takes no more writes from the moment it is told, whether or not the other takes over, so it is
    /// told only when that one is there and has the log.
    pub(super) async fn hand_over(&self, to: NodeId, roster: &Roster) -> Result<(), ChangeError> {
        if to == self.id() {
            return Ok(());
        }
        if !roster.voters().contains(&to) {
            return Err(ChangeError::NotFound);
        }
        let view = self.view(roster).await.map_err(|_store| ChangeError::Stopped)?;
        let able = |peer: &Peer| {
            peer.id == to
                && peer.stalled.is_some_and(|stalled| stalled < limits::CARD_SLOW)
                && peer.has_caught_up(view.last_index)
        };
        if !view.peers.iter().any(able) {
            return Err(ChangeError::NotReady);
        }
        let mut status = self.watch_status();
        let triggered = self.raft().trigger().transfer_leader(to.get()).await;
        triggered.map_err(|_fatal| ChangeError::Stopped)?;
        let me = self.id();
        let taken = status.wait_for(|status| status.leader.is_some_and(|leader| leader != me));
        match tokio::time::timeout(HAND_OVER, taken).await {
            Ok(Ok(status)) if status.leader == Some(to) => Ok(()),
            // Another one was faster: it is asked next.
            Ok(Ok(_)) => Err(ChangeError::NoLeader),
            Ok(Err(_closed)) => Err(ChangeError::Stopped),
            Err(_elapsed) => Err(ChangeError::TimedOut),
        }
    }

    /// Lets the best other voter lead.
    pub(super) async fn step_aside(&self, roster: &Roster) -> Result<(), ChangeError> {
        let view = self.view(roster).await.map_err(|_store| ChangeError::Stopped)?;
        let to = successor(&view).ok_or(ChangeError::NotReady)?;
        self.hand_over(to, roster).await
    }

    /// Before this node stops: if it leads and another voter can, that one does, so that nobody has to notice a silence.
    pub async fn leave_leadership(&self) {
        let leave = async {
            if let Ok(roster) = self.roster().await
                && 1 < roster.voters().len()
            {
                let left = self.step_aside(&roster).await;
                tracing::debug!(?left, "leadership before the stop");
            }
        };
        // Without a successor in time, the others elect one.
        let _elapsed = tokio::time::timeout(STEP_ASIDE, leave).await;
    }
}

//! What a node that takes part still has to do before it is ready: be admitted, be known as started, be found where it is.
//!
//! Runs beside everything else: other nodes and clients are answered meanwhile. Each step is tried until it is done; what cannot
//! be done ends the server with the reason.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::admit::{self, Asked};
use super::enter::Rejoin;
use super::failed::RunError;
use super::life::stopped;
use super::stranded::stranded;
use super::supervise;
use crate::announce;
use crate::apply::{self, Reply};
use crate::command::Command;
use crate::critical::{CriticalFlags, FlagsError, gate};
use crate::events::EventId;
use crate::join::{Identity, flags};
use crate::proto::node::admit_reply::Result as Answer;
use crate::proto::node::cluster_change::Change;
use crate::proto::node::cluster_reply::Result as Recorded;
use crate::proto::node::{AdmitReply, Boot, ClusterChange};
use crate::raft::transport::Transport;
use crate::raft::{Member, Node, Role};
use crate::systemd::{Latch, Notifier};
use crate::types::NodeId;
use crate::versions;

/// Between two attempts.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_LAST: Duration = Duration::from_secs(5);
/// Attempts between two lines of the journal that say the same.
const MENTION_EVERY: u32 = 8;
/// Attempts to be admitted before it is said that nobody can lead: others may still be starting.
const STRANDED_AFTER: u32 = 5;
/// How long one proposal may take.
const PROPOSAL: Duration = Duration::from_secs(10);

/// A node on its last steps.
pub(super) struct Settling {
    pub(super) node: Node,
    pub(super) identity: Identity,
    pub(super) member: Member,
    /// Members as they were named to a joiner.
    pub(super) contacts: Vec<Member>,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) flags: Arc<CriticalFlags>,
    pub(super) path: PathBuf,
    /// Gives the node a new id.
    pub(super) rejoin: Rejoin,
    /// Hears how far a joiner is.
    pub(super) notifier: Notifier,
}

/// What an attempt came to.
enum Step {
    Done,
    /// Not now; why.
    Again(String),
}

/// Why a node stops settling.
enum Stop {
    /// It has forgotten something, and goes on as another one.
    Forgot,
    /// It was retired, for this reason.
    Retired(String),
    Failed(RunError),
}

impl From<RunError> for Stop {
    fn from(error: RunError) -> Self {
        Self::Failed(error)
    }
}

impl Settling {
    /// Takes all steps, opens the latch, and then rests until the server stops: a service that ends is taken for a failure.
    pub(super) async fn run(
        self,
        settled: Latch,
        stopping: watch::Receiver<bool>,
    ) -> Result<(), RunError> {
        self.settle().await?;
        settled.set();
        stopped(stopping).await;
        Ok(())
    }

    /// Takes all steps.
    pub(super) async fn settle(mut self) -> Result<(), RunError> {
        let joins = self.identity.phase.joins();
        match self.steps().await {
            Ok(()) => {}
            Err(Stop::Failed(error)) => return Err(error),
            Err(Stop::Forgot) => return Err(self.rejoin.begin().await),
            Err(Stop::Retired(reason)) => {
                supervise::announce_retired(&reason);
                return Err(self.rejoin.retired(reason).await);
            }
        }
        if joins {
            filled(&self.node, |progress| self.notifier.status(progress)).await;
        }
        Ok(())
    }

    async fn steps(&mut self) -> Result<(), Stop> {
        if self.identity.phase.joins() {
            self.admitted().await?;
        }
        self.is_member().await;
        let env = self.node.env().clone();
        self.identity = self
            .identity
            .become_member(&env, &self.path)
            .await
            .map_err(|error| RunError::DataDir(error.into()))?;
        self.flags_match().await?;
        self.known_as_started().await?;
        self.found_here().await?;
        Ok(())
    }

    async fn pause(&self, attempt: u32, what: &str, why: &str) {
        if attempt.is_multiple_of(MENTION_EVERY) && 0 < attempt {
            tracing::info!("still {what}: {why}");
        }
        let pause = PAUSE_FIRST.saturating_mul(1 << attempt.min(8)).min(PAUSE_LAST);
        self.node.env().clock.sleep(pause).await;
    }

    /// Asks the leader to make this node a member, until it does.
    async fn admitted(&self) -> Result<(), Stop> {
        let own = self.flags.encode(&self.member.name);
        let request = admit::request(&self.member, own, self.identity.phase.replaces());
        let mut told = None;
        for attempt in 0_u32.. {
            if self.is_in(&self.node.status().members) {
                return Ok(());
            }
            let why = match admit::ask(&*self.transport, &self.contacts, &request).await {
                Asked::Nobody { why, there } => {
                    if STRANDED_AFTER <= attempt {
                        self.tell_if_stranded(&there, &mut told);
                    }
                    why
                }
                Asked::Answered(reply) => match self.judge(reply)? {
                    Step::Done => return Ok(()),
                    Step::Again(why) => why,
                },
            };
            self.pause(attempt, "waiting to be admitted", &why).await;
        }
        Ok(())
    }

    /// Says so, once, if nobody can lead any more because too many have forgotten what they promised.
    fn tell_if_stranded(&self, there: &BTreeSet<NodeId>, told: &mut Option<String>) {
        let forgot: BTreeSet<NodeId> = self.identity.phase.replaces().into_iter().collect();
        let text = stranded(&self.contacts, &forgot, there);
        if let Some(text) = text
            && told.as_ref() != Some(&text)
        {
            announce!(EventId::MajorityForgot, "{text}");
            *told = Some(text);
        }
    }

    fn judge(&self, reply: AdmitReply) -> Result<Step, Stop> {
        match reply.result() {
            Answer::Admitted => {
                announce!(EventId::Admitted, "admitted by the leader; being filled with its data");
                Ok(Step::Done)
            }
            Answer::FlagsDiffer => match gate::against(&self.flags, &reply.flags) {
                Err(error @ FlagsError::Differ(_)) => {
                    error.announce();
                    Err(RunError::Flags(error).into())
                }
                Ok(_) | Err(_) => Ok(Step::Again(reply.detail)),
            },
            Answer::NameTaken => Err(RunError::NameTaken(reply.detail).into()),
            Answer::Retired => Err(Stop::Retired(reply.detail)),
            Answer::Incompatible => Err(RunError::Incompatible(reply.detail).into()),
            Answer::Later | Answer::Unknown => Ok(Step::Again(reply.detail)),
        }
    }

    fn is_in(&self, members: &[Member]) -> bool {
        members.iter().any(|member| member.id == self.member.id)
    }

    /// Waits until this node's own log says that it is a member and somebody leads.
    async fn is_member(&self) {
        let mut status = self.node.watch_status();
        let settled =
            status.wait_for(|status| status.leader.is_some() && self.is_in(&status.members));
        // A node that is gone needs no more steps.
        drop(settled.await);
    }

    /// Compares with the record as the leader has it, and makes the record if this node founds the cluster.
    async fn flags_match(&self) -> Result<(), Stop> {
        for attempt in 0_u32.. {
            let deadline = self.node.env().clock.now() + PROPOSAL;
            let why = match self.node.read_barrier(deadline).await {
                // A learner may not ask for barriers everywhere; what it has been sent is compared.
                Err(error) => error.to_string(),
                Ok(_barrier) => {
                    let name = &self.member.name;
                    match flags::establish(&self.node, &self.flags, name, deadline).await {
                        Ok(_matched) => {
                            announce!(EventId::FlagsMatch, "critical flags match the cluster's");
                            return Ok(());
                        }
                        Err(flags::EstablishError::Flags(error @ FlagsError::Differ(_))) => {
                            error.announce();
                            return Err(RunError::Flags(error).into());
                        }
                        Err(error) => error.to_string(),
                    }
                }
            };
            self.pause(attempt, "comparing critical flags", &why).await;
        }
        Ok(())
    }

    /// Tells the cluster that this start has happened. One that is known already came from another card.
    async fn known_as_started(&self) -> Result<(), Stop> {
        let boot = Boot {
            node: self.identity.node.get(),
            epoch: self.identity.epoch,
            name: self.member.name.clone(),
            release: versions::own().name.to_owned(),
            wire_version: *versions::own().wire.end(),
            format: versions::own().format,
        };
        let command = Command::Cluster(ClusterChange { change: Some(Change::Boot(boot)) });
        let mut unsure = false;
        for attempt in 0_u32.. {
            let deadline = self.node.env().clock.now() + PROPOSAL;
            let why = match self.node.propose(command.clone(), deadline).await {
                Err(error) => {
                    // The first one may have been written after all.
                    unsure = true;
                    error.to_string()
                }
                Ok(outcome) => match outcome.reply {
                    Ok(Reply::Cluster(reply)) => match reply.result() {
                        Recorded::Done => return Ok(()),
                        Recorded::StaleEpoch if unsure && reply.epoch == self.identity.epoch => {
                            return Ok(());
                        }
                        Recorded::StaleEpoch => {
                            announce!(
                                EventId::Quarantined,
                                "this is start number {} of the card, but number {} is known already",
                                self.identity.epoch,
                                reply.epoch
                            );
                            return Err(Stop::Forgot);
                        }
                        Recorded::Retired => return Err(Stop::Retired(self.retired_because()?)),
                        Recorded::Conflict => "the leader runs another release".to_owned(),
                    },
                    Ok(other) => format!("an answer to something else: {other:?}"),
                    Err(refusal) => format!("{refusal:?}"),
                },
            };
            self.pause(attempt, "telling the cluster of this start", &why).await;
        }
        Ok(())
    }

    /// The words of this node's record, which says that it is retired.
    fn retired_because(&self) -> Result<String, Stop> {
        let view = self.node.store().read().map_err(RunError::from)?;
        let record = apply::node(&view, self.member.id).map_err(RunError::from)?;
        Ok(record.unwrap_or_default().retired_reason)
    }

    /// Has the cluster's record of this node's name and addresses corrected, if they have changed.
    async fn found_here(&self) -> Result<(), Stop> {
        for attempt in 0_u32.. {
            let members = self.node.status().members;
            let Some(known) = members.iter().find(|one| one.id == self.member.id) else {
                return Ok(());
            };
            let same = known.name == self.member.name
                && known.peer_urls == self.member.peer_urls
                && known.client_urls == self.member.client_urls;
            if same {
                return Ok(());
            }
            let wanted =
                Member { learner: known.learner, replaces: known.replaces, ..self.member.clone() };
            let deadline = self.node.env().clock.now() + PROPOSAL;
            match self.node.update_member(&wanted, deadline).await {
                Ok(()) => {
                    let addresses = self.member.peer_urls.join(", ");
                    announce!(
                        EventId::MembersChanged,
                        "the cluster knows this node at {addresses}"
                    );
                    return Ok(());
                }
                Err(error) => {
                    self.pause(attempt, "telling the cluster of new addresses", &error.to_string())
                        .await;
                }
            }
        }
        Ok(())
    }
}

/// Waits until a joiner has everything and its vote; says how far it is.
async fn filled(node: &Node, say: impl Fn(&str)) {
    let mut status = node.watch_status();
    loop {
        {
            let now = status.borrow_and_update();
            let votes = now.members.iter().any(|one| one.id == now.node && !one.learner);
            if now.leader.is_some() && votes && now.role != Role::Learner {
                return;
            }
        }
        if let Some(progress) = node.stats().receiving {
            let (percent, rate) = (progress.percent(), progress.bytes_per_second() / 1024);
            let left = progress.remaining().map_or(0, |left| left.as_secs());
            say(&format!("joining: {percent} % of the data is here, {rate} KiB/s, {left} s left"));
        }
        let tick = node.env().clock.sleep(Duration::from_secs(1));
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = tick => {}
        }
    }
}

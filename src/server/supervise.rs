//! The small tasks around a running node: what it says to systemd and the journal, and what stops it.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::data_dir::DataDir;
use super::enter::Rejoin;
use super::run::{RunError, stopped};
use crate::announce;
use crate::command::Command;
use crate::etcd::Defragment;
use crate::events::{EventId, fields};
use crate::join::hello::{Finder, HelloBook};
use crate::limits;
use crate::mvcc::ballast::Space;
use crate::mvcc::{Failure, Fault};
use crate::peers::Peers;
use crate::peers::address::Location;
use crate::pki::{Issued, Names, Pki};
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::{AlarmRequest, AlarmType};
use crate::raft::transport::{Method, Transport};
use crate::raft::{self, Leaving, Node, Role};
use crate::systemd::{Notifier, Phase, Phases, Pulse, Readiness, Shutdown, StopReason};
use crate::types::NodeId;

/// How often the log is looked at and the pulse is taken.
const TICK: Duration = Duration::from_secs(1);

/// How often a learner makes sure that it still is one.
const LEARNER_ASKS: Duration = Duration::from_secs(5);

/// Between two rounds of asking for members that cannot be found.
const FIND_INTERVAL: Duration = Duration::from_secs(2);

/// A barrier that takes longer is worth a line.
const SLOW_BARRIER: Duration = Duration::from_secs(3);

/// How long changing an alarm may take.
const ALARM_TIMEOUT: Duration = Duration::from_secs(10);

/// Tells what opening the data directory found.
pub(super) fn announce_opened(dir: &DataDir) {
    let (cluster, node) = (dir.identity.cluster, dir.identity.node);
    if dir.created {
        announce!(
            EventId::DatastoreCreated,
            { fields::CLUSTER } = %cluster,
            { fields::NODE } = %node,
            { fields::PATH } = %dir.path.display(),
            "new datastore for cluster {cluster}, this is node {node}"
        );
    } else {
        announce!(
            EventId::DatastoreFound,
            { fields::CLUSTER } = %cluster,
            { fields::NODE } = %node,
            { fields::PATH } = %dir.path.display(),
            { fields::INDEX } = dir.wal.hard_state().last.map_or(0, |last| last.index.get()),
            "found the datastore of cluster {cluster}, this is node {node}"
        );
    }
    if let Some(cut) = &dir.recovery.cut {
        announce!(
            EventId::TornTailCut,
            "the last write before a crash was torn ({} at {}); nothing acknowledged was in it",
            cut.path.display(),
            cut.offset
        );
    }
}

/// Ends the connections of members that leave.
pub(super) async fn forget_removed(node: Node, peers: Peers) {
    let mut status = node.watch_status();
    let mut known = BTreeSet::new();
    loop {
        let now: BTreeSet<NodeId> =
            status.borrow_and_update().members.iter().map(|member| member.id).collect();
        for gone in known.difference(&now) {
            peers.forget(*gone);
        }
        known = now;
        if status.changed().await.is_err() {
            return;
        }
    }
}

/// Tells that this node is out, for good or to come back.
pub(super) fn announce_retired(reason: &str) {
    if reason == Leaving::SetAside.words() {
        announce!(
            EventId::Quarantined,
            "this server's card is damaged; the other servers have everything, so this one sets its data aside and is filled by them"
        );
    } else if Leaving::may_join_again(reason) {
        announce!(
            EventId::LearnerGivenUp,
            { fields::PEER } = "this node",
            "this node was {reason}; it joins again under a new id"
        );
    } else {
        announce!(EventId::NodeRetired, "this node was removed from the cluster: {reason}");
    }
}

/// A node that others may have removed.
pub(super) struct Removable {
    pub(super) node: Node,
    pub(super) book: Arc<HelloBook>,
    pub(super) transport: Arc<dyn Transport>,
    /// The members as it was told before it had a log.
    pub(super) contacts: Vec<raft::Member>,
    pub(super) rejoin: Rejoin,
}

/// Ends the server when this node was removed; one that may come back begins anew.
pub(super) async fn leave_when_removed(
    member: Removable,
    stopping: watch::Receiver<bool>,
) -> Result<(), RunError> {
    tokio::select! {
        reason = member.removed() => {
            announce_retired(&reason);
            Err(member.rejoin.retired(reason).await)
        }
        () = stopped(stopping) => Ok(()),
    }
}

impl Removable {
    /// Completes when this node is told that it was removed, with the reason. Who removes it cannot tell it: from then on nothing is
    /// sent to it. It learns when it looks for a leader, and a learner, which never does, by asking.
    async fn removed(&self) -> String {
        let node = &self.node;
        let mut told = self.book.removed();
        loop {
            if let Some(reason) = told.borrow_and_update().clone() {
                return reason;
            }
            let status = node.status();
            // One that was removed before it heard of its own membership knows no members at all.
            if status.role == Role::Learner || status.members.is_empty() {
                let known =
                    if status.members.is_empty() { &*self.contacts } else { &*status.members };
                for other in known.iter().filter(|other| other.id != status.node) {
                    // The refusal is what counts, and it is in the book.
                    drop(self.transport.call(other, Method::ReadIndex, Bytes::new(), TICK).await);
                }
            }
            tokio::select! {
                changed = told.changed() => if changed.is_err() { return pending().await },
                () = node.env().clock.sleep(LEARNER_ASKS) => {}
            }
        }
    }
}

/// Asks others where members are that this node cannot find.
pub(super) async fn find_lost(node: Node, peers: Peers, finder: Finder) {
    loop {
        node.env().clock.sleep(FIND_INTERVAL).await;
        let status = node.status();
        let others = status.members.iter().filter(|member| member.id != status.node);
        let (lost, there): (Vec<_>, Vec<_>) = others.partition(|member| peers.is_lost(member.id));
        if lost.is_empty() {
            continue;
        }
        for via in &there {
            for seen in finder.ask(via).await {
                if lost.iter().any(|member| member.id == seen.id) {
                    let urls = seen.peer_urls.iter();
                    peers.learn(seen.id, urls.filter_map(|url| Location::of_url(url)));
                }
            }
        }
    }
}

/// Tells of a certificate.
pub(super) fn announce_issued(issued: &Issued) {
    announce!(
        EventId::CertificateRenewed,
        { fields::ROLE } = %issued.role,
        { fields::REASON } = %issued.reason,
        "issued {}: {}",
        issued.path.display(),
        issued.reason
    );
}

/// Renews certificates before they end, and when `names` is told anew.
pub(super) async fn keep_certificates(pki: Pki, names: watch::Receiver<Names>) {
    pki.keep_fresh(names, |renewed| match renewed {
        Ok(issued) => announce_issued(&issued),
        Err(error) => {
            announce!(EventId::CertificateProblem, { fields::REASON } = %error, "{error}");
        }
    })
    .await;
}

/// READY=1 once every part has reported in and there is a leader.
pub(super) async fn announce_ready(
    readiness: Readiness,
    notifier: Notifier,
    phases: Phases,
    node: Node,
    addresses: String,
) {
    readiness.ready().await;
    let mut status = node.watch_status();
    if status.wait_for(|status| status.leader.is_some()).await.is_err() {
        return;
    }
    notifier.ready();
    phases.set(Phase::Ready, format!("serving etcd clients on {addresses}"));
    announce!(EventId::Ready, "ready, serving etcd clients on {addresses}");
}

/// Ends the process when the node cannot go on.
pub(super) async fn watch_failures(node: Node, shutdown: Shutdown) {
    let mut raft = node.failure();
    let store = node.store().failed();
    tokio::pin!(store);
    let mut slow = false;
    loop {
        tokio::select! {
            failed = raft.wait_for(Option::is_some) => {
                let reason = failed.ok().and_then(|reason| reason.clone());
                let reason = match node.wal().failed() {
                    Some(failed) => {
                        announce_barrier(&node, &failed);
                        failed.to_string()
                    }
                    None => reason.unwrap_or_else(|| "raft stopped".to_owned()),
                };
                shutdown.begin(StopReason::Failed(reason));
                return;
            }
            failure = &mut store => {
                announce_failure(&node, &failure);
                shutdown.begin(StopReason::Failed(failure.to_string()));
                return;
            }
            () = node.env().clock.sleep(TICK) => {
                let stalled = node.wal().stats().stalled_for.unwrap_or_default();
                if limits::CARD_HUNG_EXIT <= stalled {
                    let seconds = stalled.as_secs();
                    let reason = format!("the card has not answered a write barrier for {seconds} s");
                    announce_barrier(&node, &reason);
                    shutdown.begin(StopReason::Failed(reason));
                    return;
                }
                if SLOW_BARRIER <= stalled && !slow {
                    let seconds = stalled.as_secs();
                    let millis = u64::try_from(stalled.as_millis()).unwrap_or(u64::MAX);
                    announce!(EventId::SlowBarrier, { fields::MILLIS } = millis, "a write barrier has been waiting for {seconds} s");
                }
                slow = SLOW_BARRIER <= stalled;
            }
        }
    }
}

fn announce_barrier(node: &Node, reason: &impl Display) {
    announce!(
        EventId::BarrierFailed,
        { fields::PATH } = %node.wal().dir().display(),
        { fields::REASON } = %reason,
        "{reason}"
    );
}

fn announce_failure(node: &Node, failure: &Failure) {
    let path = node.store().path().display();
    match failure.fault() {
        Fault::Full => announce!(EventId::DiskFull, { fields::PATH } = %path, "{failure}"),
        Fault::Damaged => announce!(
            EventId::StateDamaged,
            { fields::PATH } = %path,
            { fields::REASON } = %failure,
            "{failure}"
        ),
        Fault::Card => announce!(
            EventId::BarrierFailed,
            { fields::PATH } = %path,
            { fields::REASON } = %failure,
            "{failure}"
        ),
    }
}

/// Raises the NOSPACE alarm when the card is nearly full, and clears it when it was this that raised it.
pub(super) async fn keep_space_alarm(node: Node, mut space: watch::Receiver<Space>) {
    let mut raised = false;
    loop {
        let now = *space.borrow_and_update();
        let wanted = now == Space::Low;
        if wanted != raised && propose_space_alarm(&node, wanted).await {
            raised = wanted;
            if raised {
                announce!(
                    EventId::DiskFull,
                    { fields::PATH } = %node.store().path().display(),
                    "the card is nearly full; writes are refused until there is room"
                );
            } else {
                tracing::info!("there is room on the card again");
            }
        }
        if space.changed().await.is_err() {
            return;
        }
    }
}

/// Whether the alarm is now as wanted.
async fn propose_space_alarm(node: &Node, raise: bool) -> bool {
    let action = if raise { AlarmAction::Activate } else { AlarmAction::Deactivate };
    let request = AlarmRequest {
        action: action.into(),
        member_id: node.status().node.get(),
        alarm: AlarmType::Nospace.into(),
    };
    let deadline = node.env().clock.now() + ALARM_TIMEOUT;
    let proposed = node.propose(Command::Alarm(request), deadline).await;
    if let Err(error) = &proposed {
        tracing::warn!(%error, raise, "the NOSPACE alarm could not be changed; tried again when the room changes");
    }
    proposed.is_ok()
}

/// Ticks while Raft answers: what the watchdog watches.
pub(super) async fn pulse(node: Node, pulse: Pulse) {
    loop {
        if node.is_alive().await {
            pulse.tick();
        }
        node.env().clock.sleep(TICK).await;
    }
}

/// Set by the test of the watchdog: then SIGUSR2 hangs Raft's loop.
const TEST_HANG: &str = "K3S_SERVER_TEST_HANG";

/// Lets a test see what the watchdog does when Raft hangs. Does nothing unless the environment asks for it.
pub(super) async fn hang_on_signal(node: Node) {
    if std::env::var_os(TEST_HANG).is_none_or(|value| value != "raft") {
        return;
    }
    let Ok(mut asked) = signal(SignalKind::user_defined2()) else { return };
    asked.recv().await;
    tracing::warn!("hanging the Raft loop, because {TEST_HANG} and SIGUSR2 ask for it");
    node.hang().await;
}

/// `etcdctl defrag`.
pub(super) fn defragment(node: Node) -> Defragment {
    let handle = tokio::runtime::Handle::current();
    Arc::new(move || handle.block_on(node.defragment()).map(drop).map_err(io::Error::other))
}

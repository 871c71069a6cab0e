//! Two members' lease clocks on one log, through changes of leader that one of them hears of late.

use std::collections::BTreeMap;
use std::path::Path;

use tempfile::TempDir;
use tokio::sync::watch;

use super::*;
use crate::apply::Reply;
use crate::env::host;
use crate::mvcc::{DrainOn, Options};
use crate::testkit::ManualClock;
use crate::types::Revision;

const LEASE: LeaseId = LeaseId::new(7);

/// What the members agree on. A command is applied by both when it is written.
struct Log {
    leader: Option<(usize, Term)>,
    leases: BTreeMap<LeaseId, i64>,
    /// Who wrote what in which term.
    written: Vec<(usize, Term, &'static str)>,
}

struct Cluster {
    log: Mutex<Log>,
    clock: ManualClock,
    members: Vec<Arc<Leases>>,
    statuses: Vec<watch::Sender<Status>>,
    /// Closed, what a member proposes is held up on its way into the log.
    gates: Vec<watch::Sender<bool>>,
    _dirs: Vec<TempDir>,
}

#[derive(Clone)]
struct MemberNode {
    number: usize,
    cluster: Arc<Cluster>,
}

fn store(dir: &Path) -> Store {
    let options = Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };
    Store::open(&host::env(), &dir.join("state.redb"), &options).unwrap()
}

impl Cluster {
    /// Two members whose clocks are run.
    async fn start() -> Arc<Self> {
        let clock = ManualClock::new();
        let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir().unwrap()).collect();
        let leases =
            |dir: &TempDir| Leases::new(Arc::new(clock.clone()), &store(dir.path())).unwrap();
        let members: Vec<_> = dirs.iter().map(|dir| Arc::new(leases(dir))).collect();
        let cluster = Arc::new(Self {
            log: Mutex::new(Log { leader: None, leases: BTreeMap::new(), written: Vec::new() }),
            clock,
            members,
            statuses: (0..2).map(|_| watch::Sender::new(Status::default())).collect(),
            gates: (0..2).map(|_| watch::Sender::new(true)).collect(),
            _dirs: dirs,
        });
        for number in 0..2 {
            let node = MemberNode { number, cluster: Arc::clone(&cluster) };
            let leases = Arc::clone(&cluster.members[number]);
            tokio::spawn(leases.run_with(node, Settings::default(), std::future::pending()));
        }
        cluster.settle().await;
        cluster
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    /// Everything that can happen without time passing has happened.
    async fn settle(&self) {
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
    }

    async fn pass(&self, millis: u64) {
        self.clock.advance(Duration::from_millis(millis));
        self.settle().await;
    }

    /// A member leads from now on. Who led before is told later, or never.
    async fn elect(&self, number: usize, term: u64) {
        self.log().leader = Some((number, Term::new(term)));
        let status = Status { role: Role::Leader, term: Term::new(term), ..Status::default() };
        self.statuses[number].send_replace(status);
        self.settle().await;
    }

    async fn tell_deposed(&self, number: usize) {
        self.statuses[number].send_replace(Status::default());
        self.settle().await;
    }

    async fn gate(&self, number: usize, open: bool) {
        self.gates[number].send_replace(open);
        self.settle().await;
    }

    fn apply(&self, changes: &[LeaseChange]) {
        self.members.iter().for_each(|member| member.applied(changes));
    }

    async fn grant(&self, ttl_secs: i64) {
        self.log().leases.insert(LEASE, ttl_secs);
        self.apply(&[LeaseChange::Granted { id: LEASE, ttl_secs }]);
        self.settle().await;
    }

    fn is_alive(&self) -> bool {
        self.log().leases.contains_key(&LEASE)
    }

    fn written(&self) -> Vec<(usize, u64, &'static str)> {
        self.log().written.iter().map(|(who, term, what)| (*who, term.get(), *what)).collect()
    }
}

impl Leadership for MemberNode {
    fn watch_status(&self) -> watch::Receiver<Status> {
        self.cluster.statuses[self.number].subscribe()
    }

    /// Confirmed too soon: what it says may be wrong by the time the proposal is made.
    async fn leads_in(&self, _term: Term, _deadline: Instant) -> bool {
        true
    }

    async fn propose_in_term(
        &self,
        command: Command,
        term: Term,
        _deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        let mut gate = self.cluster.gates[self.number].subscribe();
        gate.wait_for(|open| *open).await.unwrap();
        let mut log = self.cluster.log();
        if log.leader != Some((self.number, term)) {
            return Err(ProposeError::NoLeader);
        }
        log.written.push((self.number, term, command.kind()));
        let (changes, reply) = match command {
            Command::LeaseRevoke(request) => {
                let id = LeaseId::new(request.id);
                match log.leases.remove(&id) {
                    Some(_) => (
                        vec![LeaseChange::Revoked(id)],
                        Ok(Reply::LeaseRevoke(pb::LeaseRevokeResponse::default())),
                    ),
                    None => (vec![], Err(Refusal::LeaseNotFound)),
                }
            }
            Command::LeaseCheckpoint(request) => {
                let changes = request.checkpoints.iter().map(|one| LeaseChange::Checkpointed {
                    id: LeaseId::new(one.id),
                    remaining_secs: one.remaining_ttl,
                });
                (changes.collect(), Ok(Reply::LeaseCheckpoint))
            }
            Command::Put(_)
            | Command::DeleteRange(_)
            | Command::Txn(_)
            | Command::Compact(_)
            | Command::LeaseGrant(_)
            | Command::Alarm(_)
            | Command::Cluster(_) => panic!("not a matter of the clocks"),
        };
        drop(log);
        self.cluster.apply(&changes);
        Ok(Outcome { revision: Revision::new(1), reply })
    }
}

#[tokio::test]
async fn only_the_leader_ends_a_lease_and_not_before_its_time() {
    let cluster = Cluster::start().await;
    cluster.elect(0, 1).await;
    cluster.grant(10).await;
    cluster.pass(9_999).await;
    assert!(cluster.is_alive());
    cluster.pass(1).await;
    assert!(!cluster.is_alive());
    assert_eq!(cluster.written(), [(0, 1, "lease_revoke")]);
    assert_eq!(cluster.members.iter().map(|one| one.statistics().alive).sum::<usize>(), 0);
    assert_eq!(cluster.members[0].statistics().expired, 1);
}

#[tokio::test]
async fn new_leader_gives_every_lease_its_time_again_and_an_election_more() {
    let cluster = Cluster::start().await;
    cluster.elect(0, 1).await;
    cluster.grant(10).await;
    cluster.pass(9_000).await;
    cluster.elect(1, 2).await;
    cluster.tell_deposed(0).await;
    let election = u64::try_from(Settings::default().election_timeout.as_millis()).unwrap();
    cluster.pass(10_000 + election - 1).await;
    assert!(cluster.is_alive());
    cluster.pass(1).await;
    assert_eq!(cluster.written(), [(1, 2, "lease_revoke")]);
}

/// It was the leader, and is again: somebody else may have renewed in between, even if it never heard of that.
#[tokio::test]
async fn leader_of_a_later_term_starts_anew_even_if_it_led_before() {
    let cluster = Cluster::start().await;
    cluster.elect(0, 1).await;
    cluster.grant(10).await;
    cluster.pass(9_000).await;
    cluster.elect(0, 3).await;
    cluster.pass(10_000).await;
    assert!(cluster.is_alive());
    cluster.pass(1_000).await;
    assert_eq!(cluster.written(), [(0, 3, "lease_revoke")]);
}

#[tokio::test]
async fn expiry_that_a_deposed_leader_still_had_on_its_way_ends_nothing() {
    let cluster = Cluster::start().await;
    cluster.elect(0, 1).await;
    cluster.grant(10).await;
    cluster.gate(0, false).await;
    cluster.pass(10_000).await;
    assert!(cluster.is_alive(), "it is on its way");

    cluster.elect(1, 2).await;
    let (first, second) = (Term::new(1), Term::new(2));
    assert_eq!(cluster.members[1].renew(LEASE, second), Ok(10));
    cluster.gate(0, true).await;

    assert!(cluster.is_alive());
    assert_eq!(cluster.written(), []);
    // It may try again for as long as it believes in itself.
    cluster.pass(5_000).await;
    assert_eq!(cluster.written(), []);
    // Nobody is promised time by it: not in the old term, in which nobody confirms it, nor in the new one.
    assert_eq!(cluster.members[0].renew(LEASE, first), Err(RenewError::Expired));
    assert_eq!(cluster.members[0].renew(LEASE, second), Err(RenewError::NotLeader));
    cluster.tell_deposed(0).await;
    assert_eq!(cluster.members[0].renew(LEASE, first), Err(RenewError::NotLeader));
    assert_eq!(cluster.members[0].term(), None);

    cluster.pass(4_999).await;
    assert!(cluster.is_alive(), "ten seconds since the renewal");
    // It is looked at again when its time would have ended without the renewal: late, never early.
    cluster.pass(1_001).await;
    assert_eq!(cluster.written(), [(1, 2, "lease_revoke")]);
}

#[tokio::test]
async fn checkpoint_that_a_deposed_leader_still_had_on_its_way_shortens_nothing() {
    let cluster = Cluster::start().await;
    cluster.elect(0, 1).await;
    cluster.grant(1_000).await;
    cluster.gate(0, false).await;
    cluster.pass(300_001).await;
    let waits = cluster.members[0].renew(LEASE, Term::new(1));
    assert_eq!(waits, Err(RenewError::CheckpointUnderWay));

    cluster.elect(1, 2).await;
    assert_eq!(cluster.members[1].renew(LEASE, Term::new(2)), Ok(1_000));
    cluster.gate(0, true).await;
    cluster.elect(0, 3).await;

    assert_eq!(cluster.written(), []);
    let lease = cluster.members[0].lease(LEASE, Term::new(3)).unwrap().unwrap();
    assert_eq!(lease.remaining_secs, 1_001, "its whole time and an election");
    // In its own term it does write one, and the lease is renewed when that is settled.
    cluster.pass(300_001).await;
    assert_eq!(cluster.written(), [(0, 3, "lease_checkpoint")]);
    let clear = cluster.members[0].renew(LEASE, Term::new(3));
    assert_eq!(clear, Err(RenewError::ClearCheckpoint));
}

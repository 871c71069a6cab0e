//! Speaks etcd's v3 API for this node, so that its clients cannot tell the difference.
//!
//! # Shape
//!
//! [`Parts`] is what the assembly provides; [`Api`] is what the services share: deadlines, barriers, headers, the way
//! to propose. One file a service: `kv` (with `range_stream`), `watch`, `lease`, `cluster`, `maintenance`, `auth`,
//! `lock`, `election`, and `admin` for our own commands. `validate` and `error` hold what is decided about requests and
//! answers without a node.
//! [`serve`] puts them on connections, behind `gate`; `http` answers `/version` and `/health` on the same port.
//! `budget` bounds the memory of answers, and `answer` carries it with their bytes.
//! [`Leases`] runs the lease clocks and must be fed by the apply path, as [`crate::watch::Hub`] must.
//!
//! # Invariants
//!
//! - A reply to a write is sent only for an outcome that the node returned: durable on a majority and applied.
//! - A linearizable read is served only with a [`crate::raft::ReadBarrier`] in hand.
//! - An answer of more than a few bytes is not made before there is room for it.
//! - Nothing is logged per request above DEBUG.
//!
//! # Not here
//!
//! Sockets and TLS: `server`. Metrics, `/livez`, `/readyz`: `observe`.

pub mod error;
pub mod validate;

mod admin;
mod answer;
mod api;
mod auth;
mod budget;
mod cluster;
mod concurrency;
mod election;
mod expiry;
mod gate;
mod http;
mod intake;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod range_stream;
mod server;
mod watch;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::Status;

use crate::critical::CriticalFlags;
use crate::env::{BoxFuture, Env};
use crate::limits;
use crate::proto::etcdserverpb as pb;
use crate::raft::{Member, Node};
use crate::types::{LeaseId, NodeId};
use crate::watch::Hub;

pub use api::Api;
pub use expiry::{LeaseStatistics, Leases};
pub use http::{HealthQuery, Unhealthy};
pub use server::{ServeError, serve};

/// The etcd release whose answers we give. Clients read it: Kubernetes asks for progress notifications only from
/// servers that say 3.5.13 or later.
pub const VERSION: &str = "3.6.14";
/// The cluster version that belongs to it.
pub const CLUSTER_VERSION: &str = "3.6.0";

/// What an operator may set, under etcd's names (`etcd-arg`) where etcd has one.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `max-request-bytes`.
    pub request_bytes_max: usize,
    /// `max-txn-ops`.
    pub txn_ops_max: usize,
    /// `max-concurrent-streams`, per connection.
    pub concurrent_streams_max: u32,
    /// `grpc-keepalive-interval`: how long a connection may be silent before it is pinged.
    pub keepalive_interval: Duration,
    /// `grpc-keepalive-timeout`: how long it may leave the ping unanswered.
    pub keepalive_timeout: Duration,
    /// `watch-progress-notify-interval`.
    pub progress_interval: Duration,
    /// `quota-backend-bytes`; `None` is no quota (a negative value in etcd).
    pub quota_bytes: Option<u64>,
    /// `election-timeout`, which bounds how long requests wait.
    pub election_timeout: Duration,
    /// Leases live at least so long.
    pub lease_ttl_min_secs: i64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            request_bytes_max: usize_from(limits::REQUEST_BYTES_MAX),
            txn_ops_max: limits::TXN_OPS_MAX,
            concurrent_streams_max: limits::CONCURRENT_STREAMS_MAX,
            keepalive_interval: Duration::from_secs(2 * 3600),
            keepalive_timeout: Duration::from_secs(20),
            progress_interval: Duration::from_secs(600),
            quota_bytes: Some(limits::QUOTA_BACKEND_BYTES),
            election_timeout: Duration::from_secs(1),
            lease_ttl_min_secs: 2,
        }
    }
}

impl Settings {
    /// How long a request may take, as in etcd: 5 s and two elections.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(5) + 2 * self.election_timeout
    }

    /// Largest gRPC message that is read.
    pub fn message_bytes_max(&self) -> usize {
        self.request_bytes_max.saturating_add(usize_from(limits::GRPC_OVERHEAD_BYTES))
    }
}

/// Bounds of ours fit any machine's addresses.
fn usize_from(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Changes who is a member. The caller has checked what can be seen in the member list.
pub trait Membership: Send + Sync + 'static {
    /// Makes a new member with these peer URLs and returns it.
    fn add(
        &self,
        peer_urls: Vec<String>,
        learner: bool,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<Member, MembershipError>>;
    /// Removes a member for good.
    fn remove(&self, id: NodeId, deadline: Instant) -> BoxFuture<'_, Result<(), MembershipError>>;
    /// Gives a learner its vote.
    fn promote(&self, id: NodeId, deadline: Instant) -> BoxFuture<'_, Result<(), MembershipError>>;
    /// Changes where a member is reached.
    fn update(
        &self,
        id: NodeId,
        peer_urls: Vec<String>,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<(), MembershipError>>;
}

/// Why the members stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembershipError {
    /// There is no such member, or it was removed.
    NotFound,
    /// It has a vote already.
    NotLearner,
    /// It is too far behind for a vote.
    LearnerNotReady,
    /// As many learners as are allowed.
    TooManyLearners,
    /// Another member has one of the URLs.
    PeerUrlExists,
    /// Too few members would remain that run.
    NotEnoughStarted,
    /// Some members cannot be reached.
    Unhealthy,
    /// No leader within the deadline.
    NoLeader,
    /// The outcome is unknown.
    TimedOut,
    /// The process is stopping.
    Stopped,
}

/// Asks the leader about leases when it is another node: renewals are not written to the log.
pub trait LeaderLeases: Send + Sync + 'static {
    /// Renews on the leader; the seconds it now has, 0 if the lease is gone.
    fn renew(
        &self,
        leader: NodeId,
        id: LeaseId,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<i64, Status>>;
    /// Asks the leader how long a lease still has.
    fn time_to_live(
        &self,
        leader: NodeId,
        request: pb::LeaseTimeToLiveRequest,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<pb::LeaseTimeToLiveResponse, Status>>;
}

/// A backup as etcd's tools read it, being made.
pub struct Backup {
    /// Exactly how many bytes `reader` returns.
    pub bytes: u64,
    /// The bytes of a bbolt file.
    pub reader: Box<dyn io::Read + Send>,
}

/// Starts a backup of the store as it is now. May block.
pub type BackupSource = Arc<dyn Fn() -> io::Result<Backup> + Send + Sync>;

/// Gives back the space of the store's file that holds nothing. May block.
pub type Defragment = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What the services are made of.
#[derive(Clone)]
pub struct Parts {
    /// The node.
    pub node: Node,
    /// Its watchers.
    pub hub: Hub,
    /// Its leases.
    pub leases: Arc<Leases>,
    /// Time and chance.
    pub env: Env,
    /// Changes of members.
    pub membership: Arc<dyn Membership>,
    /// The way to the leader; `None` where there is only one member.
    pub leader_leases: Option<Arc<dyn LeaderLeases>>,
    /// `etcdctl snapshot save`.
    pub backup: BackupSource,
    /// `etcdctl defrag`.
    pub defragment: Defragment,
    /// What an operator may set.
    pub settings: Settings,
    /// This server's critical flags.
    pub flags: Arc<CriticalFlags>,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("settings", &self.settings).finish_non_exhaustive()
    }
}

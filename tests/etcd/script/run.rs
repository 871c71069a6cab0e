//! Sends requests to one server and prints its replies.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "each service takes its calls and passes the rest on"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::BoxFuture;
use k3s_server::proto::etcdserverpb as pb;
use k3s_server::proto::v3electionpb::election_client::ElectionClient;
use k3s_server::proto::v3lockpb::lock_client::LockClient;
use pb::auth_client::AuthClient;
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::watch_client::WatchClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::parse::{AuthCall, Call, parse};
use super::print::{self, Ids};
use crate::support::Endpoint;

/// Longest time for one reply. Generous: the machine may be busy.
const REPLY_MAX: Duration = Duration::from_secs(15);
/// How long `watch quiet` listens.
const QUIET: Duration = Duration::from_millis(250);
/// Replies may be large in some tests.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// A client of one server, with its watch streams.
pub struct Session {
    channel: Channel,
    ids: Ids,
    /// Whether the server reports 3.6 or later.
    is_36: bool,
    with_leader: bool,
    watches: BTreeMap<String, WatchStream>,
}

struct WatchStream {
    requests: mpsc::Sender<pb::WatchRequest>,
    responses: mpsc::Receiver<Result<pb::WatchResponse, Status>>,
    /// Creations that were not answered yet. etcd answers them on another way than progress requests, which may
    /// overtake them.
    unanswered: usize,
    /// Watchers that were created and not canceled.
    live: BTreeSet<i64>,
    /// Those of them whose cancellation was sent and not confirmed. Of an unknown id it never is.
    canceling: BTreeSet<i64>,
}

type Lines = Vec<String>;

impl Session {
    /// Connects over plain HTTP and learns the server's ids.
    pub async fn connect(endpoint: &Endpoint) -> Self {
        assert!(endpoint.tls.is_none(), "scripts speak plain HTTP");
        let channel = Channel::from_shared(endpoint.url()).expect("a URL").connect().await;
        let channel = channel.expect("a server that answers");
        let mut maintenance = MaintenanceClient::new(channel.clone());
        let status = maintenance.status(pb::StatusRequest {}).await.expect("a status").into_inner();
        let header = status.header.expect("a status with a header");
        let mut cluster = ClusterClient::new(channel.clone());
        let members = cluster.member_list(pb::MemberListRequest { linearizable: false }).await;
        let members = members.expect("a list of members").into_inner().members;
        let own = members.iter().find(|member| member.id == header.member_id);
        let own = own.expect("the member is in its own list");
        let ids = Ids {
            cluster: header.cluster_id,
            member: header.member_id,
            term: status.raft_term,
            leases: Vec::new(),
            client_url: own.client_ur_ls.first().expect("a client URL").clone(),
            peer_url: own.peer_ur_ls.first().expect("a peer URL").clone(),
        };
        let minor = status.version.split('.').nth(1).and_then(|minor| minor.parse().ok());
        let is_36 = minor.is_some_and(|minor: u32| 6 <= minor);
        Self { channel, ids, is_36, with_leader: false, watches: BTreeMap::new() }
    }

    /// Whether the server reports version 3.6 or later.
    pub const fn is_36(&self) -> bool {
        self.is_36
    }

    /// Runs one line. Panics on a line that is not in the language.
    pub async fn run(&mut self, line: &str) -> Lines {
        let call = parse(&self.ids.fill_in(line)).unwrap_or_else(|what| panic!("{line}: {what}"));
        let lines = self.call(call).await;
        lines.iter().map(|line| self.ids.name_in(line)).collect()
    }

    fn call(&mut self, call: Call) -> BoxFuture<'_, Lines> {
        Box::pin(async move {
            match call {
                Call::HasLeader(call) => {
                    self.with_leader = true;
                    let lines = self.call(*call).await;
                    self.with_leader = false;
                    lines
                }
                Call::Watch { .. }
                | Call::WatchReceive { .. }
                | Call::WatchQuiet { .. }
                | Call::WatchDrain { .. } => self.watch_call(call).await,
                Call::Auth(call) => self.auth_call(call).await,
                call => self.unary_call(call).await,
            }
        })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(REPLY_MAX);
        if self.with_leader {
            request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        }
        request
    }

    async fn unary_call(&mut self, call: Call) -> Lines {
        let mut kv =
            KvClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let ids = &self.ids;
        match call {
            Call::Put(put) => {
                lines(kv.put(self.request(put)).await, |reply| print::put(ids, reply))
            }
            Call::Range(range) => {
                lines(kv.range(self.request(range)).await, |reply| print::range(ids, reply))
            }
            Call::RangeStream(range) => self.range_stream(range).await,
            Call::DeleteRange(delete) => {
                lines(kv.delete_range(self.request(delete)).await, |reply| {
                    print::delete_range(ids, reply)
                })
            }
            Call::Txn(txn) => {
                lines(kv.txn(self.request(txn)).await, |reply| print::txn(ids, reply))
            }
            Call::Compact(compact) => lines(kv.compact(self.request(compact)).await, |reply| {
                vec![ids.header(reply.header.as_ref())]
            }),
            call => self.lease_call(call).await,
        }
    }

    /// Prints the chunks as one reply: how the server cuts it is its own business.
    async fn range_stream(&self, range: pb::RangeRequest) -> Lines {
        let mut kv =
            KvClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let mut stream = match kv.range_stream(self.request(range)).await {
            Ok(reply) => reply.into_inner(),
            Err(status) => return print::status(&status),
        };
        let mut whole = pb::RangeResponse::default();
        loop {
            match stream.message().await {
                Ok(Some(chunk)) => {
                    let Some(chunk) = chunk.range_response else {
                        return vec!["an empty chunk".into()];
                    };
                    if whole.header.is_some() {
                        return vec!["a chunk after the one with the header".into()];
                    }
                    whole.kvs.extend(chunk.kvs);
                    (whole.header, whole.more, whole.count) =
                        (chunk.header, chunk.more, chunk.count);
                }
                Ok(None) => return print::range(&self.ids, &whole),
                Err(status) => return print::status(&status),
            }
        }
    }

    async fn lease_call(&mut self, call: Call) -> Lines {
        let mut lease = LeaseClient::new(self.channel.clone());
        match call {
            Call::LeaseGrant(grant) => {
                let reply = lease.lease_grant(self.request(grant)).await;
                if let Ok(reply) = &reply {
                    self.ids.learn_lease(reply.get_ref().id);
                }
                lines(reply, |reply| print::lease_grant(&self.ids, reply))
            }
            Call::LeaseRevoke(revoke) => {
                lines(lease.lease_revoke(self.request(revoke)).await, |reply| {
                    vec![self.ids.header(reply.header.as_ref())]
                })
            }
            Call::LeaseKeepAlive(keep) => {
                let stream = lease.lease_keep_alive(self.request(tokio_stream::once(keep))).await;
                let reply = match stream {
                    Ok(stream) => stream.into_inner().message().await,
                    Err(status) => Err(status),
                };
                match reply {
                    Ok(Some(reply)) => print::keep_alive(&self.ids, &reply),
                    Ok(None) => vec!["end of stream".into()],
                    Err(status) => print::status(&status),
                }
            }
            Call::LeaseTimeToLive(ttl) => {
                lines(lease.lease_time_to_live(self.request(ttl)).await, |reply| {
                    print::time_to_live(&self.ids, reply)
                })
            }
            Call::LeaseLeases => {
                let reply = lease.lease_leases(self.request(pb::LeaseLeasesRequest {})).await;
                lines(reply, |reply| print::leases(&self.ids, reply))
            }
            call => self.maintenance_call(call).await,
        }
    }

    async fn maintenance_call(&self, call: Call) -> Lines {
        let mut maintenance = MaintenanceClient::new(self.channel.clone());
        let ids = &self.ids;
        match call {
            Call::Status => {
                let reply = maintenance.status(self.request(pb::StatusRequest {})).await;
                lines(reply, |reply| print::status_reply(ids, reply))
            }
            Call::StatusNewFields => {
                let reply = maintenance.status(self.request(pb::StatusRequest {})).await;
                lines(reply, print::status_of_36)
            }
            Call::Alarm(alarm) => lines(maintenance.alarm(self.request(alarm)).await, |reply| {
                print::alarm(ids, reply)
            }),
            Call::Defragment => {
                let reply = maintenance.defragment(self.request(pb::DefragmentRequest {})).await;
                lines(reply, |reply| vec![ids.header(reply.header.as_ref())])
            }
            Call::Hash => {
                let reply = maintenance.hash(self.request(pb::HashRequest {})).await;
                lines(reply, |reply| {
                    let hash = if reply.hash == 0 { "no hash" } else { "<hash>" };
                    vec![format!("{}, {hash}", ids.header(reply.header.as_ref()))]
                })
            }
            Call::HashKv(hash) => lines(maintenance.hash_kv(self.request(hash)).await, |reply| {
                print::hash_kv(ids, reply)
            }),
            Call::Snapshot => self.snapshot().await,
            Call::MoveLeader(to) => {
                lines(maintenance.move_leader(self.request(to)).await, |reply| {
                    vec![ids.header(reply.header.as_ref())]
                })
            }
            Call::Downgrade(downgrade) => {
                lines(maintenance.downgrade(self.request(downgrade)).await, |reply| {
                    vec![format!(
                        "{}, version {}",
                        ids.header(reply.header.as_ref()),
                        reply.version
                    )]
                })
            }
            call => self.cluster_call(call).await,
        }
    }

    /// Checks the stream's framing; what is in it is checked by restoring it, in the etcdctl tests.
    async fn snapshot(&self) -> Lines {
        use sha2::Digest as _;
        let mut maintenance = MaintenanceClient::new(self.channel.clone());
        let mut stream = match maintenance.snapshot(self.request(pb::SnapshotRequest {})).await {
            Ok(reply) => reply.into_inner(),
            Err(status) => return print::status(&status),
        };
        let (mut all, mut last_remaining) = (Vec::new(), 0);
        loop {
            match stream.message().await {
                Ok(Some(part)) => {
                    all.extend_from_slice(&part.blob);
                    last_remaining = part.remaining_bytes;
                }
                Ok(None) => break,
                Err(status) => return print::status(&status),
            }
        }
        let file = all.len().saturating_sub(32);
        let is_whole = sha2::Sha256::digest(&all[..file])[..] == all[file..];
        vec![format!(
            "{} bytes over a multiple of 512, last remaining {last_remaining}, checksum {}",
            all.len() % 512,
            if is_whole { "right" } else { "wrong" }
        )]
    }

    async fn cluster_call(&self, call: Call) -> Lines {
        let mut cluster = ClusterClient::new(self.channel.clone());
        let ids = &self.ids;
        match call {
            Call::MemberList(list) => {
                lines(cluster.member_list(self.request(list)).await, |reply| {
                    print::members(ids, reply.header.as_ref(), &reply.members)
                })
            }
            Call::MemberAdd(add) => lines(cluster.member_add(self.request(add)).await, |reply| {
                print::members(ids, reply.header.as_ref(), &reply.members)
            }),
            Call::MemberRemove(remove) => {
                lines(cluster.member_remove(self.request(remove)).await, |reply| {
                    print::members(ids, reply.header.as_ref(), &reply.members)
                })
            }
            Call::MemberUpdate(update) => {
                lines(cluster.member_update(self.request(update)).await, |reply| {
                    print::members(ids, reply.header.as_ref(), &reply.members)
                })
            }
            Call::MemberPromote(promote) => {
                lines(cluster.member_promote(self.request(promote)).await, |reply| {
                    print::members(ids, reply.header.as_ref(), &reply.members)
                })
            }
            call => self.lock_or_election_call(call).await,
        }
    }

    async fn lock_or_election_call(&self, call: Call) -> Lines {
        let mut lock = LockClient::new(self.channel.clone());
        let mut election = ElectionClient::new(self.channel.clone());
        let ids = &self.ids;
        match call {
            Call::Lock(request) => lines(lock.lock(self.request(request)).await, |reply| {
                vec![format!(
                    "{}, key {}",
                    ids.header(reply.header.as_ref()),
                    print::quote(&reply.key)
                )]
            }),
            Call::Unlock(request) => lines(lock.unlock(self.request(request)).await, |reply| {
                vec![ids.header(reply.header.as_ref())]
            }),
            Call::Campaign(request) => {
                lines(election.campaign(self.request(request)).await, |reply| {
                    let leader = reply.leader.clone().unwrap_or_default();
                    vec![format!(
                        "{}, leader {} {} {} {}",
                        ids.header(reply.header.as_ref()),
                        print::quote(&leader.name),
                        print::quote(&leader.key),
                        leader.rev,
                        leader.lease
                    )]
                })
            }
            Call::Proclaim(request) => {
                lines(election.proclaim(self.request(request)).await, |reply| {
                    vec![ids.header(reply.header.as_ref())]
                })
            }
            Call::Leader(request) => {
                lines(election.leader(self.request(request)).await, |reply| leader(ids, reply))
            }
            Call::Observe(request) => {
                let reply = match election.observe(self.request(request)).await {
                    Ok(stream) => stream.into_inner().message().await,
                    Err(status) => Err(status),
                };
                match reply {
                    Ok(Some(reply)) => leader(ids, &reply),
                    Ok(None) => vec!["end of stream".into()],
                    Err(status) => print::status(&status),
                }
            }
            Call::Resign(request) => lines(election.resign(self.request(request)).await, |reply| {
                vec![ids.header(reply.header.as_ref())]
            }),
            other => unreachable!("{other:?} has a function of its own"),
        }
    }

    async fn auth_call(&self, call: AuthCall) -> Lines {
        let mut auth = AuthClient::new(self.channel.clone());
        macro_rules! reply {
            ($method:ident, $request:expr) => {
                lines(auth.$method(self.request($request)).await, |reply| {
                    vec![self.ids.header(reply.header.as_ref())]
                })
            };
        }
        match call {
            AuthCall::Enable => reply!(auth_enable, pb::AuthEnableRequest {}),
            AuthCall::Disable => reply!(auth_disable, pb::AuthDisableRequest {}),
            AuthCall::Status => {
                let reply = auth.auth_status(self.request(pb::AuthStatusRequest {})).await;
                lines(reply, |reply| {
                    let header = self.ids.header(reply.header.as_ref());
                    vec![format!(
                        "{header}, enabled {} auth rev {}",
                        reply.enabled, reply.auth_revision
                    )]
                })
            }
            AuthCall::Authenticate(request) => reply!(authenticate, request),
            AuthCall::UserAdd(request) => reply!(user_add, request),
            AuthCall::UserGet(request) => reply!(user_get, request),
            AuthCall::UserList => reply!(user_list, pb::AuthUserListRequest {}),
            AuthCall::UserDelete(request) => reply!(user_delete, request),
            AuthCall::UserChangePassword(request) => reply!(user_change_password, request),
            AuthCall::UserGrantRole(request) => reply!(user_grant_role, request),
            AuthCall::UserRevokeRole(request) => reply!(user_revoke_role, request),
            AuthCall::RoleAdd(request) => reply!(role_add, request),
            AuthCall::RoleGet(request) => reply!(role_get, request),
            AuthCall::RoleList => reply!(role_list, pb::AuthRoleListRequest {}),
            AuthCall::RoleDelete(request) => reply!(role_delete, request),
            AuthCall::RoleGrantPermission(request) => reply!(role_grant_permission, request),
            AuthCall::RoleRevokePermission(request) => reply!(role_revoke_permission, request),
        }
    }

    async fn watch_call(&mut self, call: Call) -> Lines {
        match call {
            Call::Watch { stream, request } => {
                self.watch_stream(&stream).send(request).await;
                Vec::new()
            }
            Call::WatchReceive { stream, count } => {
                let mut all = Vec::new();
                for _ in 0..count {
                    let response = self.watch_stream(&stream).next(REPLY_MAX).await;
                    let id = response.as_ref().map_or(i64::MAX, |response| response.watch_id);
                    let lines = response.map_or_else(|what| what, |r| print::watch(&self.ids, &r));
                    all.push((id, lines));
                }
                // Which of several watchers hears first is left to chance in etcd.
                all.sort_by_key(|(id, _)| *id);
                all.into_iter().flat_map(|(_, lines)| lines).collect()
            }
            Call::WatchQuiet { stream } => {
                let response = self.watch_stream(&stream).next(QUIET).await;
                response.map_or_else(|what| what, |r| print::watch(&self.ids, &r))
            }
            Call::WatchDrain { stream } => self.drain(&stream).await,
            other => unreachable!("{other:?} is not about a watch"),
        }
    }

    fn watch_stream(&mut self, name: &str) -> &mut WatchStream {
        let (channel, with_leader) = (&self.channel, self.with_leader);
        self.watches
            .entry(name.to_owned())
            .or_insert_with(|| WatchStream::open(channel.clone(), with_leader))
    }

    /// Everything up to the current revision, by watcher. How a server cuts history into responses is its own
    /// business, so only events and the ends of watchers are printed.
    async fn drain(&mut self, name: &str) -> Lines {
        let now = KvClient::new(self.channel.clone())
            .range(self.request(pb::RangeRequest { key: "~".into(), ..Default::default() }))
            .await
            .map(|reply| reply.into_inner().header.map_or(0, |header| header.revision));
        let now = match now {
            Ok(now) => now,
            Err(status) => return print::status(&status),
        };
        let ids = self.ids.clone();
        let stream = self.watch_stream(name);
        let mut by_watcher: BTreeMap<i64, Lines> = BTreeMap::new();
        let mut caught_up = false;
        let deadline = tokio::time::Instant::now() + REPLY_MAX;
        while tokio::time::Instant::now() < deadline {
            // etcd answers a progress request only when every watcher has caught up, so it is asked again.
            stream
                .send(pb::watch_request::RequestUnion::ProgressRequest(pb::WatchProgressRequest {}))
                .await;
            while !(caught_up && stream.owes_nothing()) {
                let Ok(response) = stream.next(QUIET).await else { break };
                let revision = response.header.as_ref().map_or(0, |header| header.revision);
                let lines = by_watcher.entry(response.watch_id).or_default();
                if response.created || response.canceled {
                    let mut ends = response.clone();
                    ends.events.clear();
                    lines.extend(print::watch(&ids, &ends));
                } else if response.events.is_empty() {
                    caught_up |= response.watch_id == -1 && now <= revision;
                }
                lines.extend(response.events.iter().flat_map(print::watch_event));
            }
            if caught_up && stream.owes_nothing() {
                stream.discard_progress().await;
                let lines = by_watcher.into_iter().flat_map(|(id, lines)| {
                    lines.into_iter().map(move |line| format!("{id}: {line}"))
                });
                return lines.collect();
            }
        }
        vec![format!("never caught up with revision {now}; so far {by_watcher:?}")]
    }
}

fn leader(ids: &Ids, reply: &k3s_server::proto::v3electionpb::LeaderResponse) -> Lines {
    let kv = reply.kv.as_ref().map_or_else(|| "nobody".to_owned(), print::key_value);
    vec![format!("{}, {kv}", ids.header(reply.header.as_ref()))]
}

fn lines<T>(reply: Result<Response<T>, Status>, print: impl FnOnce(&T) -> Lines) -> Lines {
    match reply {
        Ok(reply) => print(reply.get_ref()),
        Err(status) => print::status(&status),
    }
}

impl WatchStream {
    fn open(channel: Channel, with_leader: bool) -> Self {
        let (requests, to_send) = mpsc::channel(64);
        let (received, responses) = mpsc::channel(4096);
        // The call returns only with the first response, which needs the first request.
        tokio::spawn(async move {
            let mut client = WatchClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let mut request = Request::new(ReceiverStream::new(to_send));
            if with_leader {
                request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
            }
            let mut stream = match client.watch(request).await {
                Ok(reply) => reply.into_inner(),
                Err(status) => return drop(received.send(Err(status)).await),
            };
            while let Some(message) = stream.message().await.transpose() {
                let ended = message.is_err();
                if received.send(message).await.is_err() || ended {
                    return;
                }
            }
        });
        Self {
            requests,
            responses,
            unanswered: 0,
            live: BTreeSet::new(),
            canceling: BTreeSet::new(),
        }
    }

    async fn send(&mut self, request: pb::watch_request::RequestUnion) {
        use pb::watch_request::RequestUnion;
        match request {
            RequestUnion::CreateRequest(_) => self.unanswered += 1,
            RequestUnion::CancelRequest(ref cancel) => {
                self.canceling.extend(self.live.get(&cancel.watch_id));
            }
            RequestUnion::ProgressRequest(_) => {}
        }
        // A stream that the server ended shows at the next receive.
        let _ = self.requests.send(pb::WatchRequest { request_union: Some(request) }).await;
    }

    /// The next response, or what to print instead.
    async fn next(&mut self, longest: Duration) -> Result<pb::WatchResponse, Lines> {
        match tokio::time::timeout(longest, self.responses.recv()).await {
            Err(_) => Err(vec!["nothing".into()]),
            Ok(None) => Err(vec!["end of stream".into()]),
            Ok(Some(Err(status))) => Err(print::status(&status)),
            Ok(Some(Ok(response))) => {
                self.unanswered = self.unanswered.saturating_sub(usize::from(response.created));
                if response.canceled {
                    self.live.remove(&response.watch_id);
                    self.canceling.remove(&response.watch_id);
                } else if response.created {
                    self.live.insert(response.watch_id);
                }
                Ok(response)
            }
        }
    }

    /// Whether every creation and cancellation was answered.
    fn owes_nothing(&self) -> bool {
        self.unanswered == 0 && self.canceling.is_empty()
    }

    /// Leaves no answer to an earlier progress request behind.
    async fn discard_progress(&mut self) {
        while let Ok(Some(Ok(response))) =
            tokio::time::timeout(Duration::from_millis(1), self.responses.recv()).await
        {
            assert!(
                response.watch_id == -1 && response.events.is_empty(),
                "an event after all watchers were reported to have caught up: {response:?}"
            );
        }
    }
}

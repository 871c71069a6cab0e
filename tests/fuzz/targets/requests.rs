//! What clients send: every request message, its checks, its way into the log and through the state machine.
//!
//! An input of the target `requests` is a session: several requests, applied one after the other to a small store.

use std::path::Path;

use bytes::Bytes;
use k3s_server::apply;
use k3s_server::command::{Command, Encoded};
use k3s_server::etcd::validate;
use k3s_server::mvcc::{DrainOn, KeyRange, Options, StateHash, Store, View};
use k3s_server::proto::{etcdserverpb as pb, node, v3electionpb as election, v3lockpb as lock};
use k3s_server::testkit::wait;
use k3s_server::types::{LogId, LogIndex, NodeId, Term};
use k3s_server::watch::Create;
use prost::Message;

use super::memory::MemoryDisk;
use super::{Input, put_piece};

/// More requests than this are not looked at.
const SESSION_MAX: usize = 24;

// --- log commands -----------------------------------------------------------------------------------------------

pub fn command_seeds() -> Vec<Vec<u8>> {
    commands().iter().map(|command| command.encode().bytes().to_vec()).collect()
}

/// What decodes must encode to something that decodes to the same.
pub fn run_command(input: &[u8]) {
    let encoded = Encoded::from_log(Bytes::copy_from_slice(input));
    // Neither may depend on the rest being well.
    let (_, _) = (encoded.class(), encoded.message());
    if let Ok(command) = encoded.decode() {
        assert!(!command.kind().is_empty());
        let again = command.encode().decode();
        assert_eq!(again.as_ref(), Ok(&command), "a command changes when it is written again");
    }
}

/// One of each command, with every field in use.
fn commands() -> Vec<Command> {
    use pb::request_op::Request;
    let put = pb::PutRequest {
        key: Bytes::from_static(b"key"),
        value: Bytes::from_static(b"value"),
        lease: 7,
        prev_kv: true,
        ..Default::default()
    };
    let range = pb::RangeRequest {
        key: Bytes::from_static(b"a"),
        range_end: Bytes::from_static(b"\0"),
        limit: 5,
        revision: 3,
        sort_order: 2,
        sort_target: 4,
        min_mod_revision: 1,
        max_create_revision: 9,
        ..Default::default()
    };
    let delete = pb::DeleteRangeRequest {
        key: Bytes::from_static(b"a"),
        range_end: Bytes::from_static(b"b"),
        prev_kv: true,
    };
    let compare = pb::Compare {
        result: 3,
        target: 3,
        key: Bytes::from_static(b"key"),
        range_end: Bytes::from_static(b"kez"),
        target_union: Some(pb::compare::TargetUnion::Value(Bytes::from_static(b"value"))),
    };
    let op = |request| pb::RequestOp { request: Some(request) };
    let inner = pb::TxnRequest {
        compare: vec![compare.clone()],
        success: vec![op(Request::RequestPut(put.clone()))],
        failure: vec![op(Request::RequestDeleteRange(delete.clone()))],
    };
    let txn = pb::TxnRequest {
        compare: vec![compare],
        success: vec![op(Request::RequestRange(range)), op(Request::RequestTxn(inner.clone()))],
        failure: vec![op(Request::RequestTxn(inner))],
    };
    let checkpoints = vec![pb::LeaseCheckpoint { id: 7, remaining_ttl: 50 }];
    vec![
        Command::LeaseGrant(pb::LeaseGrantRequest { ttl: 60, id: 7 }),
        Command::Put(put),
        Command::Txn(txn),
        Command::DeleteRange(delete),
        Command::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints }),
        Command::Compact(pb::CompactionRequest { revision: 3, physical: true }),
        Command::LeaseRevoke(pb::LeaseRevokeRequest { id: 7 }),
        Command::Alarm(pb::AlarmRequest { action: 1, member_id: 1, alarm: 1 }),
    ]
}

// --- sessions ---------------------------------------------------------------------------------------------------

/// A request that was understood.
enum Request {
    Write(Command),
    Range(pb::RangeRequest),
    Watch(pb::WatchCreateRequest),
}

type Decode = fn(&[u8]) -> Option<Request>;

/// Decodes as a message that is of no further interest here: it must only not panic.
fn only<M: Message + Default>(bytes: &[u8]) -> Option<Request> {
    drop(M::decode(bytes));
    None
}

fn write<M: Message + Default>(bytes: &[u8], command: fn(M) -> Command) -> Option<Request> {
    M::decode(bytes).ok().map(|message| Request::Write(command(message)))
}

fn watch(bytes: &[u8]) -> Option<Request> {
    use pb::watch_request::RequestUnion;
    match pb::WatchRequest::decode(bytes).ok()?.request_union? {
        RequestUnion::CreateRequest(create) => Some(Request::Watch(create)),
        RequestUnion::CancelRequest(_) | RequestUnion::ProgressRequest(_) => None,
    }
}

/// Every request a client, a node or a joiner can send, and what our own nodes write. The first eight are those of [`commands`].
const DECODERS: &[(&str, Decode)] = &[
    ("LeaseGrantRequest", |bytes| write(bytes, Command::LeaseGrant)),
    ("PutRequest", |bytes| write(bytes, Command::Put)),
    ("TxnRequest", |bytes| write(bytes, Command::Txn)),
    ("DeleteRangeRequest", |bytes| write(bytes, Command::DeleteRange)),
    ("LeaseCheckpointRequest", |bytes| write(bytes, Command::LeaseCheckpoint)),
    ("CompactionRequest", |bytes| write(bytes, Command::Compact)),
    ("LeaseRevokeRequest", |bytes| write(bytes, Command::LeaseRevoke)),
    ("AlarmRequest", |bytes| write(bytes, Command::Alarm)),
    ("RangeRequest", |bytes| pb::RangeRequest::decode(bytes).ok().map(Request::Range)),
    ("WatchRequest", watch),
    ("HashRequest", only::<pb::HashRequest>),
    ("HashKVRequest", only::<pb::HashKvRequest>),
    ("SnapshotRequest", only::<pb::SnapshotRequest>),
    ("WatchCreateRequest", only::<pb::WatchCreateRequest>),
    ("WatchCancelRequest", only::<pb::WatchCancelRequest>),
    ("WatchProgressRequest", only::<pb::WatchProgressRequest>),
    ("LeaseKeepAliveRequest", only::<pb::LeaseKeepAliveRequest>),
    ("LeaseTimeToLiveRequest", only::<pb::LeaseTimeToLiveRequest>),
    ("LeaseLeasesRequest", only::<pb::LeaseLeasesRequest>),
    ("MemberAddRequest", only::<pb::MemberAddRequest>),
    ("MemberRemoveRequest", only::<pb::MemberRemoveRequest>),
    ("MemberUpdateRequest", only::<pb::MemberUpdateRequest>),
    ("MemberListRequest", only::<pb::MemberListRequest>),
    ("MemberPromoteRequest", only::<pb::MemberPromoteRequest>),
    ("DefragmentRequest", only::<pb::DefragmentRequest>),
    ("MoveLeaderRequest", only::<pb::MoveLeaderRequest>),
    ("DowngradeRequest", only::<pb::DowngradeRequest>),
    ("DowngradeVersionTestRequest", only::<pb::DowngradeVersionTestRequest>),
    ("StatusRequest", only::<pb::StatusRequest>),
    ("AuthEnableRequest", only::<pb::AuthEnableRequest>),
    ("AuthDisableRequest", only::<pb::AuthDisableRequest>),
    ("AuthStatusRequest", only::<pb::AuthStatusRequest>),
    ("AuthenticateRequest", only::<pb::AuthenticateRequest>),
    ("AuthUserAddRequest", only::<pb::AuthUserAddRequest>),
    ("AuthUserGetRequest", only::<pb::AuthUserGetRequest>),
    ("AuthUserDeleteRequest", only::<pb::AuthUserDeleteRequest>),
    ("AuthUserChangePasswordRequest", only::<pb::AuthUserChangePasswordRequest>),
    ("AuthUserGrantRoleRequest", only::<pb::AuthUserGrantRoleRequest>),
    ("AuthUserRevokeRoleRequest", only::<pb::AuthUserRevokeRoleRequest>),
    ("AuthRoleAddRequest", only::<pb::AuthRoleAddRequest>),
    ("AuthRoleGetRequest", only::<pb::AuthRoleGetRequest>),
    ("AuthUserListRequest", only::<pb::AuthUserListRequest>),
    ("AuthRoleListRequest", only::<pb::AuthRoleListRequest>),
    ("AuthRoleDeleteRequest", only::<pb::AuthRoleDeleteRequest>),
    ("AuthRoleGrantPermissionRequest", only::<pb::AuthRoleGrantPermissionRequest>),
    ("AuthRoleRevokePermissionRequest", only::<pb::AuthRoleRevokePermissionRequest>),
    ("LockRequest", only::<lock::LockRequest>),
    ("UnlockRequest", only::<lock::UnlockRequest>),
    ("CampaignRequest", only::<election::CampaignRequest>),
    ("LeaderRequest", only::<election::LeaderRequest>),
    ("ResignRequest", only::<election::ResignRequest>),
    ("ProclaimRequest", only::<election::ProclaimRequest>),
    ("Membership", only::<node::Membership>),
    ("StoredMembership", only::<node::StoredMembership>),
    ("AppendRequest", only::<node::AppendRequest>),
    ("VoteRequest", only::<node::VoteRequest>),
    ("TransferLeaderRequest", only::<node::TransferLeaderRequest>),
    ("FollowingRequest", only::<node::FollowingRequest>),
    ("ProposeRequest", only::<node::ProposeRequest>),
    ("HelloRequest", only::<node::HelloRequest>),
    ("AdmitRequest", only::<node::AdmitRequest>),
    ("ChangeMembersRequest", only::<node::ChangeMembersRequest>),
    ("LeaseRequest", only::<node::LeaseRequest>),
    ("IntroduceRequest", only::<node::IntroduceRequest>),
    ("BeginRequest", only::<node::BeginRequest>),
    ("FinishRequest", only::<node::FinishRequest>),
    ("FlagsRequest", only::<node::FlagsRequest>),
    ("ServerStatusRequest", only::<node::ServerStatusRequest>),
    ("ChangeFlagRequest", only::<node::ChangeFlagRequest>),
    ("NodesRequest", only::<node::NodesRequest>),
];

/// The messages that are decoded.
pub fn messages() -> impl Iterator<Item = &'static str> {
    DECODERS.iter().map(|(name, _)| *name)
}

pub fn session_seeds() -> Vec<Vec<u8>> {
    let commands: Vec<_> = commands().iter().map(|command| command.encode().message()).collect();
    let range = |range_end: &'static [u8], sort_target| pb::RangeRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(range_end),
        limit: 2,
        sort_order: 1,
        sort_target,
        ..Default::default()
    };
    let create = pb::WatchCreateRequest {
        key: Bytes::from_static(b"a"),
        start_revision: 1,
        filters: vec![0, 1],
        ..Default::default()
    };
    let watch = pb::WatchRequest {
        request_union: Some(pb::watch_request::RequestUnion::CreateRequest(create)),
    };
    let session = |messages: &[(usize, Vec<u8>)]| {
        let mut out = Vec::new();
        for (kind, message) in messages {
            out.push(u8::try_from(*kind).unwrap());
            put_piece(&mut out, message);
        }
        out
    };
    let all: Vec<_> = commands.iter().map(|message| message.to_vec()).enumerate().collect();
    let reads = vec![
        (8, range(b"\0", 0).encode_to_vec()),
        (8, range(b"z", 4).encode_to_vec()),
        (9, watch.encode_to_vec()),
    ];
    let puts: Vec<_> = [b"a", b"b", b"a", b"c"]
        .map(|key| pb::PutRequest { key: Bytes::from_static(key), ..Default::default() })
        .map(|put| (1, put.encode_to_vec()))
        .into();
    vec![
        session(&all),
        session(&[all.clone(), reads.clone(), all.clone()].concat()),
        session(&[puts.clone(), reads, all[2..6].to_vec(), puts].concat()),
        session(&[(2, nested(60))]),
        session(&[all[0..2].to_vec(), vec![(2, nested(20))]].concat()),
    ]
}

/// A transaction in a transaction in a transaction.
fn nested(depth: usize) -> Vec<u8> {
    let mut txn = pb::TxnRequest::default();
    for _ in 0..depth {
        let request = Some(pb::request_op::Request::RequestTxn(txn));
        txn = pb::TxnRequest { success: vec![pb::RequestOp { request }], ..Default::default() };
    }
    txn.encode_to_vec()
}

/// Every request has a definite outcome, twice the same, and the store stays readable and whole.
pub fn run_session(input: &[u8]) {
    let requests = decode(input);
    for request in &requests {
        check(request);
    }
    let first = wait(async { apply_all(&requests) });
    let second = wait(async { apply_all(&requests) });
    assert_eq!(first, second, "the same requests made another state");
}

fn decode(input: &[u8]) -> Vec<Request> {
    let (mut input, mut requests) = (Input(input), Vec::new());
    for _ in 0..SESSION_MAX {
        if input.is_empty() {
            break;
        }
        let (_, decode) = DECODERS[usize::from(input.byte()) % DECODERS.len()];
        let length = input.u16();
        requests.extend(decode(input.piece(length)));
    }
    requests
}

/// What the services do before anything is proposed. Refusals are fine, and change nothing below: the state machine
/// must cope with everything that decodes.
fn check(request: &Request) {
    let _ = match request {
        Request::Write(Command::Put(put)) => validate::put(put).and(validate::size(put, 512)),
        Request::Write(Command::Txn(txn)) => {
            let _ = (validate::is_serializable(txn), apply::is_read_only(txn));
            validate::txn(txn, 8).and(validate::size(txn, 512))
        }
        Request::Write(Command::DeleteRange(delete)) => validate::delete_range(delete),
        Request::Write(Command::LeaseGrant(grant)) => validate::ttl(grant.ttl, 2).map(drop),
        Request::Write(_) => Ok(()),
        Request::Range(range) => validate::range(range),
        Request::Watch(create) => {
            drop(Create::from_request(create));
            Ok(())
        }
    };
}

/// Applies through the bytes of the log, as a node does.
fn apply_all(requests: &[Request]) -> StateHash {
    let options = Options { cache_bytes: 1 << 20, drain: DrainOn::Task };
    let disk = MemoryDisk::default();
    let store = Store::open(&disk.env(), Path::new("state.redb"), &options).unwrap();
    let mut index = LogIndex::new(1);
    for request in requests {
        match request {
            Request::Write(command) => {
                let command = command.encode().decode().expect("our own bytes");
                let id = LogId { term: Term::new(1), leader: NodeId::new(1), index };
                let before = store.read().unwrap().revision();
                let applied = store.write(|txn| apply::apply(txn, id, &command)).unwrap();
                let view = store.read().unwrap();
                assert_eq!(applied.outcome.revision, view.revision());
                assert!(before <= view.revision(), "the revision went back");
                let grew = before < view.revision();
                assert_eq!(applied.events.is_some(), grew, "a revision without events");
                assert_eq!(view.applied(), Some(id));
                index = index.next();
            }
            Request::Range(range) => {
                let view = store.read().unwrap();
                if let Ok(found) = apply::range(&view, range).unwrap() {
                    assert!(
                        i64::try_from(found.kvs.len()).unwrap() <= found.count || range.count_only
                    );
                }
            }
            Request::Watch(create) => {
                let range = Create::from_request(create).range;
                drop(
                    store
                        .read()
                        .unwrap()
                        .scan(&range, store.read().unwrap().revision(), None)
                        .unwrap(),
                );
            }
        }
    }
    whole(&store)
}

/// Reads everything there is.
fn whole(store: &Store) -> StateHash {
    let view = store.read().unwrap();
    let everything = KeyRange::new(Bytes::from_static(b"\0"), Bytes::from_static(b"\0"));
    let newest = view.scan(&everything, view.revision(), None).unwrap();
    assert_eq!(newest.count, newest.kvs.len() as u64);
    assert!(view.hash_kv(None).unwrap().is_ok());
    view.state_hash().unwrap()
}

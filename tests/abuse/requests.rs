//! Requests that are wrong, absurd or not requests: each has a definite answer, in etcd's words where etcd has words.
//!
//! The table is held against a real etcd as well, where `.ci/setup` unpacked one: there the expected answers come from.
#![allow(clippy::too_many_lines, reason = "tables")]

use bytes::Bytes;
use k3s_server::proto::{etcdserverpb as pb, v3electionpb as election, v3lockpb as lock};
use pb::request_op::Request;
use prost::Message;
use tonic::Code;
use tonic::transport::Channel;

use crate::client;
use crate::host::Host;
use crate::support::{self, Options, etcd};

/// What the server is to say.
#[derive(Clone, Copy, Debug)]
enum Says {
    /// The call succeeds.
    Ok,
    /// This code and text, as etcd says them.
    Exactly(Code, &'static str),
    /// This code and the beginning of the text; how it goes on differs between libraries.
    Begins(Code, &'static str),
    /// An answer of our own; why is written beside. A real etcd is not asked.
    Ours(Code, &'static str),
    /// Any definite answer. A real etcd is not asked: it differs between versions, or ends the process.
    Anything,
}

struct Case {
    what: &'static str,
    path: &'static str,
    message: Vec<u8>,
    says: Says,
}

const RANGE: &str = "/etcdserverpb.KV/Range";
const PUT: &str = "/etcdserverpb.KV/Put";
const DELETE: &str = "/etcdserverpb.KV/DeleteRange";
const TXN: &str = "/etcdserverpb.KV/Txn";
const COMPACT: &str = "/etcdserverpb.KV/Compact";
const GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
const REVOKE: &str = "/etcdserverpb.Lease/LeaseRevoke";
const TIME_TO_LIVE: &str = "/etcdserverpb.Lease/LeaseTimeToLive";

const EMPTY_KEY: Says = Says::Exactly(Code::InvalidArgument, "etcdserver: key is not provided");
const TOO_MANY_OPS: Says =
    Says::Exactly(Code::InvalidArgument, "etcdserver: too many operations in txn request");
const DUPLICATE: Says =
    Says::Exactly(Code::InvalidArgument, "etcdserver: duplicate key given in txn request");
const TOO_LARGE: Says = Says::Exactly(Code::InvalidArgument, "etcdserver: request is too large");
const FUTURE: Says =
    Says::Exactly(Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision");
const COMPACTED: Says =
    Says::Exactly(Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted");
const NO_LEASE: Says = Says::Exactly(Code::NotFound, "etcdserver: requested lease not found");
const NO_SORT: Says = Says::Ours(Code::InvalidArgument, "etcdserver: invalid sort option");
const UNREADABLE: Says = Says::Begins(Code::Internal, "grpc: error unmarshalling request: ");

fn key(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn range(change: impl FnOnce(&mut pb::RangeRequest)) -> Vec<u8> {
    let mut range = pb::RangeRequest { key: key("a"), range_end: key("z"), ..Default::default() };
    change(&mut range);
    range.encode_to_vec()
}

fn put(change: impl FnOnce(&mut pb::PutRequest)) -> Vec<u8> {
    let mut put = pb::PutRequest { key: key("a"), value: key("v"), ..Default::default() };
    change(&mut put);
    put.encode_to_vec()
}

fn op(request: Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn put_op(name: &str) -> pb::RequestOp {
    op(Request::RequestPut(pb::PutRequest { key: key(name), ..Default::default() }))
}

fn txn(success: Vec<pb::RequestOp>) -> Vec<u8> {
    pb::TxnRequest { success, ..Default::default() }.encode_to_vec()
}

fn compare(change: impl FnOnce(&mut pb::Compare)) -> Vec<u8> {
    let mut compare = pb::Compare { key: key("a"), ..Default::default() };
    change(&mut compare);
    let compare = vec![compare];
    pb::TxnRequest { compare, success: vec![put_op("c")], failure: vec![put_op("f")] }
        .encode_to_vec()
}

/// A transaction in a transaction, so many times, written from the inside out without any library's limit.
fn nested(depth: usize) -> Vec<u8> {
    const SUCCESS: u8 = 2 << 3 | 2;
    const REQUEST_TXN: u8 = 4 << 3 | 2;
    // Both lengths in front of each level, outermost last; reversed at the end.
    let (mut reversed, mut length) = (Vec::new(), 0_u64);
    for _ in 0..depth {
        for tag in [REQUEST_TXN, SUCCESS] {
            let mut prefix = vec![tag];
            prost::encoding::encode_varint(length, &mut prefix);
            length += prefix.len() as u64;
            reversed.extend(prefix.iter().rev());
        }
    }
    reversed.reverse();
    reversed
}

fn kv_cases() -> Vec<Case> {
    let case = |what, path, message, says| Case { what, path, message, says };
    vec![
        case("a range without a key", RANGE, range(|r| r.key = Bytes::new()), EMPTY_KEY),
        case("a range backwards", RANGE, range(|r| r.range_end = key("A")), Says::Ok),
        case("a negative limit", RANGE, range(|r| r.limit = -5), Says::Ok),
        case("the largest limit", RANGE, range(|r| r.limit = i64::MAX), Says::Ok),
        case("the smallest limit", RANGE, range(|r| r.limit = i64::MIN), Says::Ok),
        case("a negative revision", RANGE, range(|r| r.revision = -1), Says::Ok),
        case("the largest revision", RANGE, range(|r| r.revision = i64::MAX), FUTURE),
        case(
            "revisions upside down",
            RANGE,
            range(|r| (r.min_mod_revision, r.max_mod_revision) = (9, -9)),
            Says::Ok,
        ),
        // As etcd 3.6. 3.5 takes any order, and an unknown target ends the process.
        case("an unknown order", RANGE, range(|r| r.sort_order = 99), NO_SORT),
        case("an unknown sort target", RANGE, range(|r| r.sort_target = -1), NO_SORT),
        case("a put without a key", PUT, put(|p| p.key = Bytes::new()), EMPTY_KEY),
        case("a put on no lease", PUT, put(|p| p.lease = -1), NO_LEASE),
        case(
            "a put of two values",
            PUT,
            put(|p| p.ignore_value = true),
            Says::Exactly(Code::InvalidArgument, "etcdserver: value is provided"),
        ),
        case(
            "a put on two leases",
            PUT,
            put(|p| (p.ignore_lease, p.lease) = (true, 1)),
            Says::Exactly(Code::InvalidArgument, "etcdserver: lease is provided"),
        ),
        case(
            "a put that keeps nothing",
            PUT,
            put(|p| (p.key, p.value, p.ignore_value) = (key("none"), Bytes::new(), true)),
            Says::Exactly(Code::InvalidArgument, "etcdserver: key not found"),
        ),
        case("a put of 1.5 MiB", PUT, put(|p| p.value = vec![0; 3 << 19].into()), TOO_LARGE),
        case(
            "a put of 3 MiB",
            PUT,
            put(|p| p.value = vec![0; 3 << 20].into()),
            Says::Exactly(
                Code::ResourceExhausted,
                "grpc: received message larger than max (3145736 vs. 2097152)",
            ),
        ),
        case("a delete without a key", DELETE, vec![], EMPTY_KEY),
        case(
            "a delete of 1.8 MiB",
            DELETE,
            pb::DeleteRangeRequest { key: vec![b'k'; 1_800_000].into(), ..Default::default() }
                .encode_to_vec(),
            TOO_LARGE,
        ),
        case(
            "a compaction of the future",
            COMPACT,
            pb::CompactionRequest { revision: i64::MAX, physical: true }.encode_to_vec(),
            FUTURE,
        ),
        case(
            "a compaction before time",
            COMPACT,
            pb::CompactionRequest { revision: -7, physical: false }.encode_to_vec(),
            COMPACTED,
        ),
        case(
            "the oldest compaction",
            COMPACT,
            pb::CompactionRequest { revision: i64::MIN, physical: true }.encode_to_vec(),
            COMPACTED,
        ),
    ]
}

fn txn_cases() -> Vec<Case> {
    let case = |what, message, says| Case { what, path: TXN, message, says };
    let many = |count: usize| (0..count).map(|n| put_op(&format!("m{n}"))).collect::<Vec<_>>();
    let no_depth =
        Says::Ours(Code::InvalidArgument, "etcdserver: too many operations in txn request");
    vec![
        case("a txn of nothing", vec![], Says::Ok),
        case("128 operations", txn(many(128)), Says::Ok),
        case("129 operations", txn(many(129)), TOO_MANY_OPS),
        case("100,000 operations", txn(vec![put_op("x"); 100_000]), TOO_MANY_OPS),
        case(
            "129 compares",
            pb::TxnRequest {
                compare: vec![pb::Compare { key: key("a"), ..Default::default() }; 129],
                ..Default::default()
            }
            .encode_to_vec(),
            TOO_MANY_OPS,
        ),
        case("a compare without a key", compare(|c| c.key = Bytes::new()), EMPTY_KEY),
        case("a compare with an unknown result", compare(|c| c.result = 77), Says::Ok),
        case("a compare with an unknown target", compare(|c| c.target = -77), Says::Ok),
        case("one key twice", txn(vec![put_op("a"), put_op("a")]), DUPLICATE),
        case(
            "an operation that is none",
            txn(vec![pb::RequestOp::default()]),
            Says::Exactly(Code::InvalidArgument, "etcdserver: key not found"),
        ),
        case(
            "a range of the future",
            txn(vec![op(Request::RequestRange(pb::RangeRequest {
                key: key("a"),
                revision: i64::MAX,
                ..Default::default()
            }))]),
            FUTURE,
        ),
        case(
            "a lease that is not there",
            txn(vec![op(Request::RequestPut(pb::PutRequest {
                key: key("a"),
                lease: i64::MIN,
                ..Default::default()
            }))]),
            NO_LEASE,
        ),
        case(
            // etcd 3.5.30 ends here.
            "a put that keeps a value deleted before it",
            txn(vec![
                put_op("kept"),
                op(Request::RequestDeleteRange(pb::DeleteRangeRequest {
                    key: key("a"),
                    range_end: key("\0"),
                    prev_kv: false,
                })),
                op(Request::RequestPut(pb::PutRequest {
                    key: key("a"),
                    ignore_value: true,
                    ..Default::default()
                })),
            ]),
            Says::Ours(Code::InvalidArgument, "etcdserver: key not found"),
        ),
        case("50 levels", nested(49), Says::Ok),
        // etcd recurses for as long as operations are left, 129 levels; ours is what the decoder accepts.
        case("52 levels", nested(51), no_depth),
        case("129 levels", nested(128), no_depth),
        case("200 levels", nested(200), TOO_MANY_OPS),
        case("5,000 levels", nested(5_000), TOO_MANY_OPS),
        case("100,000 levels", nested(100_000), TOO_MANY_OPS),
    ]
}

fn lease_cases() -> Vec<Case> {
    let case = |what, path, message, says| Case { what, path, message, says };
    let grant = |ttl, id| pb::LeaseGrantRequest { ttl, id }.encode_to_vec();
    vec![
        case(
            "a lease for ever",
            GRANT,
            grant(i64::MAX, 1),
            Says::Exactly(Code::OutOfRange, "etcdserver: too large lease TTL"),
        ),
        case("a lease of no time", GRANT, grant(0, 91), Says::Ok),
        case("a lease of less than no time", GRANT, grant(i64::MIN, 92), Says::Ok),
        case("a negative lease", GRANT, grant(1_000, -5), Says::Ok),
        case(
            "the same again",
            GRANT,
            grant(1_000, -5),
            Says::Exactly(Code::FailedPrecondition, "etcdserver: lease already exists"),
        ),
        case("lease 0 revoked", REVOKE, vec![], NO_LEASE),
        case(
            "a lease that is not there",
            REVOKE,
            pb::LeaseRevokeRequest { id: i64::MAX }.encode_to_vec(),
            NO_LEASE,
        ),
        case(
            "how long no lease lives",
            TIME_TO_LIVE,
            pb::LeaseTimeToLiveRequest { id: 404, keys: true }.encode_to_vec(),
            Says::Ok,
        ),
    ]
}

fn other_cases() -> Vec<Case> {
    let case = |what, path, message, says| Case { what, path, message, says };
    let cluster = |urls: &[&str]| {
        pb::MemberAddRequest {
            peer_ur_ls: urls.iter().map(|url| (*url).to_owned()).collect(),
            ..Default::default()
        }
        .encode_to_vec()
    };
    let bad_urls =
        Says::Exactly(Code::InvalidArgument, "etcdserver: given member URLs are invalid");
    let alarm = |action, alarm| pb::AlarmRequest { action, member_id: 9, alarm }.encode_to_vec();
    vec![
        case("a member without a URL", "/etcdserverpb.Cluster/MemberAdd", cluster(&[]), bad_urls),
        case(
            "a member of noise",
            "/etcdserverpb.Cluster/MemberAdd",
            cluster(&["\u{1}\u{0}://%%"]),
            bad_urls,
        ),
        case(
            "no member removed",
            "/etcdserverpb.Cluster/MemberRemove",
            vec![],
            Says::Exactly(Code::NotFound, "etcdserver: member not found"),
        ),
        case(
            "no member promoted",
            "/etcdserverpb.Cluster/MemberPromote",
            pb::MemberPromoteRequest { id: u64::MAX }.encode_to_vec(),
            Says::Exactly(Code::NotFound, "etcdserver: member not found"),
        ),
        case(
            "leadership to nobody",
            "/etcdserverpb.Maintenance/MoveLeader",
            pb::MoveLeaderRequest { target_id: 404 }.encode_to_vec(),
            Says::Anything,
        ),
        case(
            "an alarm of no kind",
            "/etcdserverpb.Maintenance/Alarm",
            alarm(0, 99),
            Says::Anything,
        ),
        case(
            "an alarm action of no kind",
            "/etcdserverpb.Maintenance/Alarm",
            alarm(-3, 1),
            Says::Anything,
        ),
        case(
            "an alarm cleared that is not raised",
            "/etcdserverpb.Maintenance/Alarm",
            alarm(2, 1),
            Says::Ok,
        ),
        case(
            "a hash of the future",
            "/etcdserverpb.Maintenance/HashKV",
            pb::HashKvRequest { revision: i64::MAX }.encode_to_vec(),
            FUTURE,
        ),
        case(
            "a hash before time",
            "/etcdserverpb.Maintenance/HashKV",
            pb::HashKvRequest { revision: i64::MIN }.encode_to_vec(),
            Says::Anything,
        ),
        case(
            "a downgrade to nowhere",
            "/etcdserverpb.Maintenance/Downgrade",
            pb::DowngradeRequest { action: 0, version: "\u{fffd}".to_owned() }.encode_to_vec(),
            Says::Exactly(
                Code::InvalidArgument,
                "etcdserver: wrong downgrade target version format",
            ),
        ),
        case(
            "a user without a name",
            "/etcdserverpb.Auth/UserAdd",
            vec![],
            Says::Exactly(Code::InvalidArgument, "etcdserver: user name is empty"),
        ),
        case(
            "a lock of nothing",
            "/v3lockpb.Lock/Lock",
            lock::LockRequest { lease: 404, ..Default::default() }.encode_to_vec(),
            Says::Begins(Code::Unknown, "etcdserver: requested lease not found"),
        ),
        case(
            "a campaign on no lease",
            "/v3electionpb.Election/Campaign",
            election::CampaignRequest { lease: -1, ..Default::default() }.encode_to_vec(),
            Says::Begins(Code::Unknown, "etcdserver: requested lease not found"),
        ),
        case(
            "a resignation by nobody",
            "/v3electionpb.Election/Resign",
            vec![],
            Says::Exactly(Code::Unknown, "\"leader\" field must be provided"),
        ),
    ]
}

/// Bytes that are not the message that the path takes.
fn unreadable_cases() -> Vec<Case> {
    let case = |what, path, message, says| Case { what, path, message, says };
    let whole = put(|_| ());
    let long_varint = [0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    vec![
        case("a message cut off", PUT, whole[..whole.len() - 1].to_vec(), UNREADABLE),
        case("a length beyond the end", PUT, vec![0x0a, 0x7f, b'k'], UNREADABLE),
        case("a length of 2^63", PUT, [&[0x0a][..], &[0xff; 9], &[0x01]].concat(), UNREADABLE),
        case("a number without end", RANGE, long_varint.to_vec(), UNREADABLE),
        case("a wrong wire type", RANGE, vec![0x0d, 0, 0, 0, 0], UNREADABLE),
        case("field number 0", RANGE, vec![0x02, 0x00], UNREADABLE),
        case("noise", TXN, (0..3_000_u32).map(|n| (n * 167 % 251) as u8).collect(), UNREADABLE),
        case("an unknown field", PUT, [&whole[..], &[0xfa, 0x07, 0x01, 0x00]].concat(), Says::Ok),
        // etcd 3.5 takes any bytes for text.
        case(
            "text that is not UTF-8",
            "/etcdserverpb.Auth/UserAdd",
            vec![0x0a, 2, 0xff, 0xfe],
            Says::Anything,
        ),
        case(
            "an unknown method",
            "/etcdserverpb.KV/Steal",
            vec![],
            Says::Exactly(Code::Unimplemented, "unknown method Steal for service etcdserverpb.KV"),
        ),
        case(
            "an unknown service",
            "/etcdserverpb.Nothing/Steal",
            vec![],
            Says::Exactly(Code::Unimplemented, "unknown service etcdserverpb.Nothing"),
        ),
    ]
}

fn cases() -> Vec<Case> {
    [kv_cases(), txn_cases(), lease_cases(), other_cases(), unreadable_cases()]
        .into_iter()
        .flatten()
        .collect()
}

/// What is wrong with an answer, if something is.
async fn wrong(channel: &Channel, case: &Case, ours: bool) -> Option<String> {
    let answer = client::call(channel, case.path, Bytes::from(case.message.clone())).await;
    let (code, text) = match &answer {
        Ok(_) => (Code::Ok, ""),
        Err(status) => (status.code(), status.message()),
    };
    let right = match case.says {
        Says::Ok => code == Code::Ok,
        Says::Exactly(expected, words) => (code, text) == (expected, words),
        Says::Begins(expected, words) => code == expected && text.starts_with(words),
        Says::Ours(expected, words) => (code, text) == (expected, words),
        Says::Anything => true,
    };
    // A client takes this for a lost connection and tries again.
    let definite = code != Code::Unavailable && code != Code::DeadlineExceeded;
    let found = || format!("{}: {code:?} {text:?}, expected {:?}", case.what, case.says);
    (!right || (ours && !definite)).then(found)
}

async fn all_wrong(channel: &Channel, ours: bool) -> Vec<String> {
    let mut all = Vec::new();
    for case in cases() {
        if !ours && matches!(case.says, Says::Ours(..) | Says::Anything) {
            continue;
        }
        all.extend(wrong(channel, &case, ours).await);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_request_has_a_definite_answer() {
    let mut host = Host::plain().await;
    let wrong = all_wrong(&host.channel(), true).await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    host.is_well().await;
    host.survives_a_kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_etcd_answers_bad_requests_the_same() {
    let Some(release) = etcd::Release::newest() else {
        support::skip("no real etcd below target/etcd");
        return;
    };
    let etcd = etcd::Etcd::start(&release, &Options::default());
    let channel = client::channel(etcd.endpoint()).await.unwrap();
    let wrong = all_wrong(&channel, false).await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

//! Messages there and back, the bytes they must stay, and what is refused.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use openraft::raft::{StreamAppendError, TransferLeaderError};
use prost::Message;

use crate::command::Command;
use crate::proto::etcdserverpb as pb;
use crate::proto::node as proto;
use crate::raft::types::{
    self, Contact, Entry, Membership, Payload, RaftLogId, RaftVote, SnapshotMeta, StoredMembership,
};
use crate::raft::wire::{self, Append, AppendReply, AskVote, SnapshotHeader, SnapshotReply, Voted};
use crate::testkit::Random;
use crate::types::{LogId, LogIndex, NodeId, Term};

const LEADER: u64 = 0x11;

fn id(term: u64, index: u64) -> RaftLogId {
    types::raft_log_id(LogId {
        term: Term::new(term),
        leader: NodeId::new(LEADER),
        index: LogIndex::new(index),
    })
}

fn leader(term: u64) -> RaftVote {
    RaftVote::new_committed(term, LEADER)
}

fn membership() -> Membership {
    let contact = |name: &str| Contact {
        name: name.to_owned(),
        peer_urls: vec![format!("https://{name}:2380")],
        client_urls: vec![],
        replaces: 0x33,
    };
    let members = BTreeMap::from([(LEADER, contact("pi-1")), (0x22, contact("pi-2"))]);
    Membership::new(vec![BTreeSet::from([LEADER])], members).unwrap()
}

fn command(value: &'static [u8]) -> Payload {
    let put = pb::PutRequest {
        key: Bytes::from_static(b"/registry/a"),
        value: Bytes::from_static(value),
        ..Default::default()
    };
    Payload::Normal(Command::Put(put).encode())
}

fn append() -> Append {
    let entry = |term, index, payload| Entry { log_id: id(term, index), payload };
    Append {
        vote: leader(3),
        prev_log_id: Some(id(2, 6)),
        entries: vec![
            entry(3, 7, Payload::Blank),
            entry(3, 8, command(b"value")),
            entry(3, 9, Payload::Membership(membership())),
        ],
        leader_commit: Some(id(2, 5)),
    }
}

fn text<T: std::fmt::Debug>(value: T) -> String {
    format!("{value:?}")
}

#[test]
fn append_arrives_as_it_was_sent() {
    for request in [
        append(),
        Append { entries: vec![], ..append() },
        Append { prev_log_id: None, entries: vec![], leader_commit: None, ..append() },
    ] {
        let found = wire::decode_append(wire::encode_append(&request)).unwrap();
        assert_eq!(text(&found), text(&request));
    }
    let first = Entry { log_id: id(0, 0), payload: Payload::Membership(membership()) };
    let request = Append { prev_log_id: None, entries: vec![first], ..append() };
    assert!(wire::decode_append(wire::encode_append(&request)).is_ok());
}

#[test]
fn values_are_slices_of_the_message() {
    let message = wire::encode_append(&append());
    let range = message.as_ptr_range();
    let found = wire::decode_append(message.clone()).unwrap();
    let Payload::Normal(command) = &found.entries[1].payload else { panic!("{found:?}") };
    assert!(range.contains(&command.bytes().as_ptr()), "the value was copied");
}

#[test]
fn answers_arrive_as_they_were_sent() {
    for reply in [
        AppendReply::Working,
        AppendReply::Done(Ok(None)),
        AppendReply::Done(Ok(Some(id(3, 9)))),
        AppendReply::Done(Err(StreamAppendError::Conflict(id(2, 6)))),
        AppendReply::Done(Err(StreamAppendError::HigherVote(RaftVote::new(4, 0x22)))),
    ] {
        assert_eq!(wire::decode_append_reply(wire::encode_append_reply(&reply)), Ok(reply));
    }
    for reply in [SnapshotReply::Working(7), SnapshotReply::Done(leader(3))] {
        assert_eq!(wire::decode_snapshot_reply(wire::encode_snapshot_reply(reply)), Ok(reply));
    }
    for granted in [false, true] {
        let reply = Voted::new(leader(3), Some(id(3, 9)), granted);
        assert_eq!(wire::decode_vote_reply(wire::encode_vote_reply(&reply)), Ok(reply));
    }
    let request = wire::Transfer::new(leader(3), 0x22, Some(id(3, 9)));
    for reply in [
        Ok(()),
        Err(TransferLeaderError::VoteChanged { expected: leader(3), actual: leader(4) }),
        Err(TransferLeaderError::LogNotFlushed { expected: Some(id(3, 9)), actual: None }),
    ] {
        let message = wire::encode_transfer_reply(&reply);
        assert_eq!(wire::decode_transfer_reply(message, &request), Ok(reply));
    }
}

#[test]
fn votes_and_transfers_arrive_as_they_were_sent() {
    for leadership_transfer in [false, true] {
        let mut asked = AskVote::new(RaftVote::new(4, 0x22), Some(id(3, 9)));
        asked.leadership_transfer = leadership_transfer;
        assert_eq!(wire::decode_vote(wire::encode_vote(&asked)), Ok(asked));
    }
    let request = wire::Transfer::new(leader(3), 0x22, None);
    assert_eq!(wire::decode_transfer(wire::encode_transfer(&request)), Ok(request));
}

fn header() -> SnapshotHeader {
    let last_membership = StoredMembership::new(Some(id(1, 2)), membership());
    let meta = SnapshotMeta { last_log_id: Some(id(3, 9)), last_membership };
    SnapshotHeader { vote: leader(3), meta, records_estimate: 1000 }
}

#[test]
fn snapshot_header_arrives_as_it_was_sent() {
    assert_eq!(wire::decode_snapshot_header(wire::encode_snapshot_header(&header())), Ok(header()));
}

/// Other releases read these bytes: they may grow, but what stands here stays.
#[test]
fn messages_are_the_bytes_they_have_always_been() {
    let hex = |bytes: Bytes| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let expect = expect_test::expect![[r#"
        0a0d08031111000000000000001801120d080211110000000000000018061a120a0d080311110000000000000018071201001a280a0d0803111100000000000000180812170101000a0b2f72656769737472792f61120576616c75651a780a0d080311110000000000000018091267800a0a0a081100000000000000122b091100000000000000120470692d311a1168747470733a2f2f70692d313a32333830293300000000000000122b092200000000000000120470692d321a1168747470733a2f2f70692d323a32333830293300000000000000220d08021111000000000000001805
        0a0f0a0d08031111000000000000001809
        2200
        0a0b0804112200000000000000120d08031111000000000000001809
        0a0d080311110000000000000018011001
        0a0d080311110000000000000018011122000000000000001a0d08031111000000000000001809
        0a0d08031111000000000000001801120d080311110000000000000018091a770a0d0801111100000000000000180212660a0a0a081100000000000000122b091100000000000000120470692d311a1168747470733a2f2f70692d313a32333830293300000000000000122b092200000000000000120470692d321a1168747470733a2f2f70692d323a3233383029330000000000000020e807
        0a0d08031111000000000000001801"#]];
    let votes = AskVote::new(RaftVote::new(4, 0x22), Some(id(3, 9)));
    let transfer = wire::Transfer::new(leader(3), 0x22, Some(id(3, 9)));
    expect.assert_eq(
        &[
            hex(wire::encode_append(&append())),
            hex(wire::encode_append_reply(&AppendReply::Done(Ok(Some(id(3, 9)))))),
            hex(wire::encode_append_reply(&AppendReply::Working)),
            hex(wire::encode_vote(&votes)),
            hex(wire::encode_vote_reply(&Voted::new(leader(3), None, true))),
            hex(wire::encode_transfer(&transfer)),
            hex(wire::encode_snapshot_header(&header())),
            hex(wire::encode_snapshot_reply(SnapshotReply::Done(leader(3)))),
        ]
        .join("\n"),
    );
}

/// What the message would be that `change` makes of the good one.
fn refused(change: impl FnOnce(&mut proto::AppendRequest)) -> String {
    let mut request = proto::AppendRequest::decode(wire::encode_append(&append())).unwrap();
    change(&mut request);
    wire::decode_append(request.encode_to_vec().into()).unwrap_err().to_string()
}

#[test]
fn appends_that_would_break_a_log_are_refused_by_what_is_wrong() {
    let cases = [
        (refused(|request| request.vote = None), "no vote"),
        (
            refused(|request| request.vote.as_mut().unwrap().committed = false),
            "vote <T3-N17:-> of a candidate",
        ),
        (refused(|request| request.entries[0].id = None), "entry without id"),
        (refused(|request| drop(request.entries.remove(1))), "expected index 8"),
        (refused(|request| request.previous = None), "expected index 0"),
        (
            refused(|request| request.entries[2].id.as_mut().unwrap().term = 1),
            "is of an older leader than the one before",
        ),
        (
            refused(|request| request.vote.as_mut().unwrap().term = 2),
            "an entry of term 3 from a leader with vote",
        ),
        (
            refused(|request| request.entries[0].payload = Bytes::from_static(&[0xff])),
            "entry has unknown kind 255",
        ),
        (refused(|request| request.entries[0].payload = Bytes::new()), "entry has no payload"),
        (
            refused(|request| request.entries[2].payload = Bytes::from_static(&[0x80, 0xff])),
            "membership entry",
        ),
    ];
    for (found, expected) in cases {
        assert!(found.contains(expected), "{found:?}, expected {expected:?}");
    }
}

#[test]
fn a_snapshot_from_before_its_leader_is_refused() {
    let of = |header: &SnapshotHeader| {
        wire::decode_snapshot_header(wire::encode_snapshot_header(header)).map(drop)
    };
    assert!(of(&header()).is_ok());
    let error = of(&SnapshotHeader { vote: leader(2), ..header() }).unwrap_err().to_string();
    assert!(error.contains("a snapshot up to T3-"), "{error}");
    let meta = SnapshotMeta { last_log_id: None, ..header().meta };
    let error = of(&SnapshotHeader { meta, ..header() }).unwrap_err().to_string();
    assert_eq!(error, "a snapshot of nothing");
}

#[test]
fn whoever_sends_speaks_for_itself() {
    assert!(wire::caller(NodeId::new(LEADER), &leader(3)).is_ok());
    assert!(wire::caller(NodeId::new(0x22), &leader(3)).is_err());
    assert!(wire::decode_vote(wire::encode_vote(&AskVote::new(leader(3), None))).is_err());
}

#[test]
fn no_bytes_make_decoding_panic() {
    let seeds = [
        wire::encode_append(&append()),
        wire::encode_append_reply(&AppendReply::Done(Ok(Some(id(3, 9))))),
        wire::encode_vote(&AskVote::new(RaftVote::new(4, 0x22), Some(id(3, 9)))),
        wire::encode_snapshot_header(&header()),
    ];
    let transfer = wire::Transfer::new(leader(3), 0x22, None);
    let mut random = Random::new(3);
    for _ in 0..20_000 {
        let mut bytes = seeds[random.index(seeds.len())].to_vec();
        for _ in 0..=random.below(3) {
            let at = random.index(bytes.len());
            bytes[at] = u8::try_from(random.below(256)).unwrap();
        }
        bytes.truncate(random.index(bytes.len() + 1));
        let bytes = Bytes::from(bytes);
        drop(wire::decode_append(bytes.clone()));
        drop(wire::decode_append_reply(bytes.clone()));
        drop(wire::decode_vote(bytes.clone()));
        drop(wire::decode_vote_reply(bytes.clone()));
        drop(wire::decode_transfer(bytes.clone()));
        drop(wire::decode_transfer_reply(bytes.clone(), &transfer));
        drop(wire::decode_following(bytes.clone()));
        drop(wire::decode_snapshot_header(bytes.clone()));
        drop(wire::decode_snapshot_reply(bytes));
    }
}

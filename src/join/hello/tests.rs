//! Nodes that ask and answer each other, over a transport in memory, each with a log and a state of its own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tempfile::TempDir;

use super::ask::{Asked, Hello};
use super::book::HelloBook;
use super::{Answerer, Forgotten, Verdict, Witness, answer};
use crate::apply;
use crate::command::Command;
use crate::env::{BoxFuture, Env, host};
use crate::join::{Identity, Phase};
use crate::mvcc::{self, DrainOn, Store};
use crate::proto::node::cluster_change::Change;
use crate::proto::node::{
    self as wire, AppendReply, Boot, ClusterChange, Retire, StoredMembership, VoteReply,
};
use crate::raft::Member;
use crate::raft::transport::{BoxStream, CallError, Method, Refused, StreamMethod, Transport};
use crate::types::{ClusterId, LogId, LogIndex, NodeId, Term, Vote};
use crate::wal::{self, Record, Urgency, Wal};

const CLUSTER: ClusterId = ClusterId::new(0xc1);
const NODES: [u64; 3] = [1, 2, 3];

/// Who can be reached, and by which address; the sender is in the connection.
#[derive(Default)]
struct Wires(Mutex<BTreeMap<String, Arc<Answerer>>>);

/// One node's way to the others.
struct Connected {
    from: NodeId,
    wires: Arc<Wires>,
}

impl Transport for Connected {
    fn call(
        &self,
        to: &Member,
        method: Method,
        request: Bytes,
        _timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        assert_eq!(method, Method::Hello);
        let found =
            to.peer_urls.first().and_then(|url| self.wires.0.lock().unwrap().get(url).cloned());
        let from = self.from;
        Box::pin(async move {
            let answerer =
                found.ok_or_else(|| CallError::Unreachable("nobody there".to_owned()))?;
            answerer.answer(from, &request).await.map_err(CallError::Refused)
        })
    }

    fn stream(
        &self,
        _to: &Member,
        _method: StreamMethod,
        _requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>> {
        Box::pin(async { Err(CallError::Unreachable("no streams here".to_owned())) })
    }
}

/// A node's card.
struct Card {
    env: Env,
    id: u64,
    wal: Wal,
    store: Store,
    _dir: TempDir,
}

fn url(id: u64) -> String {
    format!("https://10.0.0.{id}:2380")
}

fn member(id: u64, url: String) -> Member {
    Member {
        id: NodeId::new(id),
        name: format!("pi-{id}"),
        peer_urls: vec![url],
        ..Member::default()
    }
}

fn membership(ids: &[u64]) -> StoredMembership {
    let members = ids
        .iter()
        .map(|id| wire::Member {
            id: *id,
            name: format!("pi-{id}"),
            peer_urls: vec![url(*id)],
            client_urls: vec![],
            ..wire::Member::default()
        })
        .collect();
    let configs = vec![wire::VoterSet { ids: ids.to_vec() }];
    let log_id = Some(wire::LogId { term: 1, leader: 1, index: 1 });
    StoredMembership { log_id, membership: Some(wire::Membership { configs, members }) }
}

fn log_id(term: u64, leader: u64, index: u64) -> LogId {
    LogId { term: Term::new(term), leader: NodeId::new(leader), index: LogIndex::new(index) }
}

fn vote(term: u64, node: u64) -> Vote {
    Vote { term: Term::new(term), node: NodeId::new(node), committed: false }
}

impl Card {
    /// Everybody's log and state are the same: three voters, a vote in term 1, entries up to 9, start 4 of everybody known.
    async fn new(id: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (env, path) = (host::env(), dir.path());
        let options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };
        let store = Store::open(&env, &path.join("state.redb"), &options).unwrap();
        let identity = wal::Identity { cluster: CLUSTER, node: NodeId::new(id) };
        let options =
            wal::Options { segment_bytes: 1 << 20, slots_min: 1, ..wal::Options::default() };
        let opened = Wal::open(&env, &path.join("wal"), identity, options).await;
        let (wal, _, writer) = opened.unwrap();
        writer.spawn_thread().unwrap();
        let card = Self { env, id, wal, store, _dir: dir };
        card.store.write(|txn| txn.set_membership(&membership(&NODES).encode_to_vec())).unwrap();
        for id in NODES {
            card.change(Change::Boot(Boot { node: id, epoch: 4, ..Boot::default() }));
        }
        card.append(vec![Record::Vote(vote(1, 1))]);
        for index in 4..10 {
            let payload = Bytes::from_static(&[0]);
            card.append(vec![Record::Entry { id: log_id(1, 1, index), payload }]);
        }
        card
    }

    fn append(&self, records: Vec<Record>) {
        self.wal.append(records, Urgency::Urgent, |_| {}).unwrap();
    }

    fn change(&self, change: Change) {
        let command = Command::Cluster(ClusterChange { change: Some(change) });
        self.store
            .write(|txn| {
                let index = txn.applied().map_or(1, |applied| applied.index.get() + 1);
                apply::apply(txn, log_id(1, 1, index), &command).map(drop)
            })
            .unwrap();
    }

    /// Starts to answer at an address.
    fn answer(&self, wires: &Arc<Wires>, url: &str, incarnation: u64) -> Arc<HelloBook> {
        let book = Arc::new(HelloBook::default());
        let parts = answer::Parts {
            cluster: CLUSTER,
            node: NodeId::new(self.id),
            incarnation,
            store: self.store.clone(),
            wal: self.wal.clone(),
            book: Arc::clone(&book),
            transport: self.transport(wires),
        };
        let answerer = Arc::new(Answerer::new(parts).unwrap());
        wires.0.lock().unwrap().insert(url.to_owned(), answerer);
        book
    }

    fn transport(&self, wires: &Arc<Wires>) -> Arc<dyn Transport> {
        Arc::new(Connected { from: NodeId::new(self.id), wires: Arc::clone(wires) })
    }

    fn hello(&self, wires: &Arc<Wires>, url: &str, epoch: u64, incarnation: u64) -> Hello {
        self.hello_as(wires, url, epoch, incarnation, Phase::Member, None)
    }

    fn hello_as(
        &self,
        wires: &Arc<Wires>,
        url: &str,
        epoch: u64,
        incarnation: u64,
        phase: Phase,
        contacts: Option<StoredMembership>,
    ) -> Hello {
        let node = NodeId::new(self.id);
        let asked = Asked {
            env: &self.env,
            transport: self.transport(wires),
            book: Arc::new(HelloBook::default()),
            identity: Identity { cluster: CLUSTER, node, epoch, phase },
            incarnation,
            member: &member(self.id, url.to_owned()),
            store: &self.store,
            wal: &self.wal,
            contacts,
            compare: Arc::new(|flags| {
                (flags != b"ours").then(|| "service-cidr differs".to_owned())
            }),
        };
        Hello::new(asked).unwrap()
    }
}

async fn cards() -> [Card; 3] {
    [Card::new(1).await, Card::new(2).await, Card::new(3).await]
}

#[tokio::test(start_paused = true)]
async fn whole_cluster_that_lost_power_comes_back_whatever_the_order() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let (cards, wires) = (cards().await, Arc::new(Wires::default()));
        let mut starting = Vec::new();
        for index in order {
            let card = &cards[index];
            card.answer(&wires, &url(card.id), 0x100 + card.id);
            let hello = card.hello(&wires, &url(card.id), 5, 0x100 + card.id);
            starting.push(tokio::spawn(hello.run()));
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        for start in starting {
            assert_eq!(start.await.unwrap(), Verdict::Welcome, "{order:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_of_three_waits_and_two_are_enough() {
    let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
    let waiting = tokio::spawn(a.hello(&wires, &url(1), 5, 0x101).run());
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(!waiting.is_finished(), "welcome alone");
    b.answer(&wires, &url(2), 0x102);
    assert_eq!(waiting.await.unwrap(), Verdict::Welcome);
}

/// F16: the card of a week ago.
#[tokio::test(start_paused = true)]
async fn old_image_is_noticed_by_its_epoch() {
    let ([a, b, c], wires) = (cards().await, Arc::new(Wires::default()));
    for card in [&b, &c] {
        card.answer(&wires, &url(card.id), 0x100);
    }
    let verdict = a.hello(&wires, &url(1), 3, 0x101).run().await;
    let what = Forgotten::Epoch { here: 3, known: 4 };
    assert!(
        matches!(verdict, Verdict::Amnesia { what: found, .. } if found == what),
        "{verdict:?}"
    );
}

/// The record of a start may be in the log only: the state's last checkpoint is minutes old.
#[tokio::test(start_paused = true)]
async fn start_that_only_the_log_knows_is_remembered() {
    let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
    let change =
        ClusterChange { change: Some(Change::Boot(Boot { node: 1, epoch: 9, ..Boot::default() })) };
    let payload = Command::Cluster(change).encode().bytes().clone();
    b.append(vec![Record::Entry { id: log_id(1, 1, 10), payload }]);
    b.answer(&wires, &url(2), 0x102);
    let verdict = a.hello(&wires, &url(1), 7, 0x101).run().await;
    let what = Forgotten::Epoch { here: 7, known: 9 };
    assert!(
        matches!(verdict, Verdict::Amnesia { what: found, .. } if found == what),
        "{verdict:?}"
    );
}

/// F3: the others remember what was promised to them.
#[tokio::test(start_paused = true)]
async fn lost_promises_are_noticed_by_those_who_got_them() {
    for (kept, granted) in [(Some(log_id(1, 1, 20)), None), (None, Some(vote(4, 2)))] {
        let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
        let book = b.answer(&wires, &url(2), 0x102);
        let witness = Witness::new(b.transport(&wires), Arc::clone(&book));
        drop(witness);
        if let Some(kept) = kept {
            book.note_kept(NodeId::new(1), kept);
        }
        if let Some(granted) = granted {
            book.note_vote(NodeId::new(1), granted);
        }
        let verdict = a.hello(&wires, &url(1), 5, 0x101).run().await;
        assert!(matches!(verdict, Verdict::Amnesia { .. }), "{verdict:?}");
    }
}

/// A leader whose vote for itself is gone: those who followed it have it in their own logs.
#[tokio::test(start_paused = true)]
async fn lost_vote_of_a_leader_is_noticed_by_its_followers() {
    let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
    b.append(vec![Record::Vote(Vote { committed: true, ..vote(6, 1) })]);
    b.answer(&wires, &url(2), 0x102);
    let verdict = a.hello(&wires, &url(1), 5, 0x101).run().await;
    assert!(
        matches!(verdict, Verdict::Amnesia { what: Forgotten::Vote { .. }, .. }),
        "{verdict:?}"
    );
}

/// F14: the original answers at its address while its copy starts at another one.
#[tokio::test(start_paused = true)]
async fn copy_is_refused_while_the_original_lives_and_a_restart_is_not() {
    let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
    b.answer(&wires, &url(2), 0x102);
    a.answer(&wires, &url(1), 0x101);
    assert_eq!(a.hello(&wires, &url(1), 5, 0x101).run().await, Verdict::Welcome);

    let copy = a.hello(&wires, "https://10.0.0.77:2380", 6, 0x777).run().await;
    let Verdict::Duplicate { found, .. } = copy else { panic!("{copy:?}") };
    assert!(found.contains("pi-1") && found.contains("10.0.0.1"), "{found}");

    // The original restarts, at its old address and at a new one: its old incarnation is silent, or answers as the new one.
    a.answer(&wires, &url(1), 0x105);
    assert_eq!(a.hello(&wires, &url(1), 7, 0x105).run().await, Verdict::Welcome);
    wires.0.lock().unwrap().remove(&url(1));
    a.answer(&wires, "https://10.0.0.9:2380", 0x106);
    assert_eq!(a.hello(&wires, "https://10.0.0.9:2380", 8, 0x106).run().await, Verdict::Welcome);
}

#[tokio::test(start_paused = true)]
async fn removed_node_is_told_who_removed_it() {
    let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
    b.change(Change::Retire(Retire { node: 1, reason: "removed by an operator".to_owned() }));
    b.answer(&wires, &url(2), 0x102);
    let verdict = a.hello(&wires, &url(1), 5, 0x101).run().await;
    let reason = "removed by an operator".to_owned();
    assert_eq!(verdict, Verdict::Retired { reason, who: NodeId::new(2) });
}

#[tokio::test(start_paused = true)]
async fn flags_that_differ_are_told() {
    let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
    b.change(Change::RecordFlags(wire::RecordFlags { flags: Bytes::from_static(b"theirs") }));
    b.answer(&wires, &url(2), 0x102);
    let verdict = a.hello(&wires, &url(1), 5, 0x101).run().await;
    assert!(matches!(verdict, Verdict::FlagsDiffer { .. }), "{verdict:?}");
}

/// F26: a joiner has no state; it finds the members by what it was told.
#[tokio::test(start_paused = true)]
async fn joiner_finds_the_members_by_its_contacts() {
    let (cards, wires) = (cards().await, Arc::new(Wires::default()));
    cards[1].answer(&wires, &url(2), 0x102);
    let mut joiner = Card::new(9).await;
    let dir = tempfile::tempdir().unwrap();
    let options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };
    joiner.store = Store::open(&joiner.env, &dir.path().join("state.redb"), &options).unwrap();
    let phase = Phase::Joining { replaces: None };
    let contacts = Some(membership(&NODES));
    let hello = joiner.hello_as(&wires, &url(9), 1, 0x109, phase, contacts);
    assert_eq!(hello.run().await, Verdict::Welcome);
}

#[tokio::test]
async fn another_clusters_and_malformed_hellos_are_refused() {
    let ([a, b, _c], wires) = (cards().await, Arc::new(Wires::default()));
    b.answer(&wires, &url(2), 0x102);
    let to = member(2, url(2));
    let hello = |cluster, id| wire::HelloRequest {
        cluster,
        self_: Some(wire::Member { id, ..wire::Member::default() }),
        ..wire::HelloRequest::default()
    };
    let transport = a.transport(&wires);
    let call = |request: Bytes| transport.call(&to, Method::Hello, request, Duration::from_secs(1));
    let foreign = call(hello(0xbad, 1).encode_to_vec().into()).await;
    assert!(matches!(foreign, Err(CallError::Refused(Refused::WrongCluster(_)))), "{foreign:?}");
    let other = call(hello(0xc1, 3).encode_to_vec().into()).await;
    assert!(matches!(other, Err(CallError::Refused(Refused::Malformed(_)))), "{other:?}");
    let noise = call(Bytes::from_static(&[0xff; 9])).await;
    assert!(matches!(noise, Err(CallError::Refused(Refused::Malformed(_)))), "{noise:?}");
    assert!(call(hello(0xc1, 1).encode_to_vec().into()).await.is_ok());
}

/// Answers everything with the same bytes.
struct Says(Bytes);

impl Transport for Says {
    fn call(
        &self,
        _to: &Member,
        _method: Method,
        _request: Bytes,
        _timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let reply = self.0.clone();
        Box::pin(async move { Ok(reply) })
    }

    fn stream(
        &self,
        _to: &Member,
        _method: StreamMethod,
        _requests: BoxStream<Bytes>,
    ) -> BoxFuture<'static, Result<BoxStream<Result<Bytes, CallError>>, CallError>> {
        let replies = [Ok(self.0.clone())];
        let replies: BoxStream<_> = Box::pin(futures_util::stream::iter(replies));
        Box::pin(async move { Ok(replies) })
    }
}

#[tokio::test]
async fn witness_notes_promises_and_nothing_else() {
    use futures_util::StreamExt;
    use wire::append_reply::Result as Appended;
    let appended = |result| Bytes::from(AppendReply { result: Some(result) }.encode_to_vec());
    let id = wire::LogId { term: 3, leader: 1, index: 7 };
    let kept = appended(Appended::Appended(wire::Appended { upto: Some(id) }));
    let conflict = appended(Appended::Conflict(id));
    let voted = |granted| {
        let vote = Some(wire::Vote { term: 5, node: 1, committed: false });
        Bytes::from(VoteReply { vote, granted, last: None }.encode_to_vec())
    };
    let (no, node) = (Bytes::new(), NodeId::new(2));
    for (method, reply, expected) in [
        (Some(Method::Append), kept.clone(), (Some(log_id(3, 1, 7)), None)),
        (Some(Method::Append), conflict, (None, None)),
        (Some(Method::Vote), voted(true), (None, Some(vote(5, 1)))),
        (Some(Method::Vote), voted(false), (None, None)),
        (Some(Method::PreVote), voted(true), (None, None)),
        (None, kept, (Some(log_id(3, 1, 7)), None)),
        (Some(Method::Append), Bytes::from_static(&[0xff]), (None, None)),
    ] {
        let book = Arc::new(HelloBook::default());
        let witness = Witness::new(Arc::new(Says(reply.clone())), Arc::clone(&book));
        let to = member(2, url(2));
        match method {
            Some(method) => {
                let passed = witness.call(&to, method, no.clone(), Duration::ZERO).await;
                assert_eq!(passed.unwrap(), reply);
            }
            None => {
                let requests: BoxStream<Bytes> = Box::pin(futures_util::stream::empty());
                let stream = witness.stream(&to, StreamMethod::Append, requests).await;
                let passed: Vec<_> = stream.unwrap().collect().await;
                assert_eq!(passed, [Ok(reply)]);
            }
        }
        let known = book.known(node);
        assert_eq!((known.kept, known.vote), expected, "{method:?}");
    }
}

#[test]
fn book_keeps_the_highest() {
    let (book, node) = (HelloBook::default(), NodeId::new(2));
    for index in [5, 9, 7] {
        book.note_kept(node, log_id(1, 1, index));
    }
    for term in [2, 4, 3] {
        book.note_vote(node, vote(term, 1));
    }
    let known = book.known(node);
    assert_eq!((known.kept, known.vote), (Some(log_id(1, 1, 9)), Some(vote(4, 1))));
    book.forget(node);
    assert_eq!(book.known(node), super::book::Known::default());
}

#[tokio::test]
async fn member_that_moved_is_found_through_one_that_has_heard_from_it() {
    let wires = Arc::new(Wires::default());
    let (a, b, c) = (Card::new(1).await, Card::new(2).await, Card::new(3).await);
    c.answer(&wires, &url(3), 30);
    // Both have moved and say hello to the third one from where they are now.
    for (card, moved) in [(&a, "https://10.9.9.1:2380"), (&b, "https://10.9.9.2:2380")] {
        card.answer(&wires, moved, card.id * 10);
        card.hello(&wires, moved, 5, card.id * 10).run().await;
    }
    let finder = super::Finder {
        cluster: CLUSTER,
        node: NodeId::new(1),
        incarnation: 10,
        transport: a.transport(&wires),
    };

    let seen = finder.ask(&member(3, url(3))).await;

    let found = seen.iter().find(|one| one.id == NodeId::new(2)).expect("heard of");
    assert_eq!(found.peer_urls, ["https://10.9.9.2:2380"]);
    assert!(finder.ask(&member(3, "https://10.9.9.3:2380".to_owned())).await.is_empty());
}

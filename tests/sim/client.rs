//! Clients: they put, compare and swap, delete and read through any node, and write down what they were answered.

use std::time::Duration;

use bytes::Bytes;
use k3s_server::apply::{self, Reply};
use k3s_server::command::Command;
use k3s_server::proto::etcdserverpb as pb;
use k3s_server::raft::ProposeError;
use k3s_server::testkit::Random;
use tokio::time::{Instant, sleep};

use crate::cluster::Cluster;
use crate::history::{Contents, History, Saw};
use crate::machine::Live;
use crate::world::{World, trace};

/// A client's patience: etcd's request timeout is of this order.
const PATIENCE: Duration = Duration::from_secs(5);

const KEYS: u64 = 8;

/// One client.
pub(crate) struct Client {
    pub(crate) number: u64,
    pub(crate) world: World,
    pub(crate) cluster: Cluster,
    pub(crate) history: History,
    pub(crate) random: Random,
    /// Mean pause between two calls.
    pub(crate) pause: Duration,
}

fn key(number: u64) -> Bytes {
    Bytes::from(format!("k{number}"))
}

impl Client {
    /// Calls until it is dropped.
    pub(crate) async fn run(mut self) {
        let mut calls = 0;
        // What it saw last, to compare with.
        let mut known = Contents::new();
        loop {
            let pause = u64::try_from(self.pause.as_micros()).unwrap_or(0);
            sleep(Duration::from_micros(self.random.below(2 * pause + 1))).await;
            let Some(live) = self.cluster.any_live(&mut self.random) else { continue };
            calls += 1;
            self.call(&live, calls, &mut known).await;
        }
    }

    async fn call(&mut self, live: &Live, number: u64, known: &mut Contents) {
        let key = key(self.random.below(KEYS));
        let tag = Bytes::from(format!("c{}-{number}", self.number));
        let choice = self.random.below(100);
        let expected = known.get(&key).cloned();
        let (tag, command) = match choice {
            0..35 => (Some(tag.clone()), Some(put(&key, &tag))),
            35..55 => (Some(tag.clone()), Some(swap(&key, expected.as_ref(), &tag))),
            55..65 => (None, Some(delete(&key))),
            _ => (None, None),
        };
        let began = self.history.begin(tag.clone());
        let saw = tokio::select! {
            biased;
            () = live.gone() => Saw::Unknown,
            saw = ask(live, command, key, expected) => saw,
        };
        trace!(
            self.world,
            "client {} at {} {:?}: {saw:?}",
            self.number,
            live.node.status().node,
            tag
        );
        if let Saw::Read { contents, .. } = &saw {
            known.clone_from(contents);
        }
        if let Err(what) = self.history.end(began, saw) {
            self.world.violation(|| what);
        }
    }
}

/// Writes one value that nobody else writes, and says when it was acknowledged.
pub(crate) async fn write_once(live: &Live, history: &History, tag: Bytes) -> Result<Saw, String> {
    let key = key(0);
    let began = history.begin(Some(tag.clone()));
    let saw = tokio::select! {
        biased;
        () = live.gone() => Saw::Unknown,
        saw = ask(live, Some(put(&key, &tag)), key.clone(), None) => saw,
    };
    history.end(began, saw.clone())?;
    Ok(saw)
}

async fn ask(live: &Live, command: Option<Command>, key: Bytes, expected: Option<Bytes>) -> Saw {
    let deadline = Instant::now() + PATIENCE;
    let Some(command) = command else { return read(live, deadline).await };
    let swaps = matches!(command, Command::Txn(_));
    match live.node.propose(command, deadline.into_std()).await {
        Ok(outcome) => {
            let revision = outcome.revision.get();
            match outcome.reply {
                Ok(Reply::Put(_)) => Saw::Wrote { revision },
                Ok(Reply::DeleteRange(reply)) if reply.deleted != 0 => {
                    Saw::Deleted { key, revision }
                }
                Ok(Reply::DeleteRange(_)) => Saw::Found { key, value: None, revision },
                Ok(Reply::Txn(reply)) if reply.succeeded => {
                    Saw::Swapped { key, expected, revision }
                }
                Ok(Reply::Txn(_)) if swaps => Saw::Differed { key, expected, revision },
                // Refused by the state machine: nothing was changed.
                Err(_) => Saw::Refused,
                Ok(other) => unreachable!("{other:?} in answer to what a client asked"),
            }
        }
        Err(ProposeError::NoLeader | ProposeError::TooManyRequests) => Saw::Refused,
        Err(ProposeError::TimedOut | ProposeError::LeaderChanged | ProposeError::Stopped) => {
            Saw::Unknown
        }
    }
}

async fn read(live: &Live, deadline: Instant) -> Saw {
    let Ok(_barrier) = live.node.read_barrier(deadline.into_std()).await else {
        return Saw::Refused;
    };
    let request = pb::RangeRequest {
        key: Bytes::from_static(b"k"),
        range_end: Bytes::from_static(b"l"),
        ..Default::default()
    };
    let Ok(view) = live.node.store().read() else { return Saw::Refused };
    let revision = view.revision().get();
    match apply::range(&view, &request) {
        Ok(Ok(response)) => {
            let contents = response.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect();
            Saw::Read { contents, revision }
        }
        Ok(Err(_)) | Err(_) => Saw::Refused,
    }
}

fn put(key: &Bytes, value: &Bytes) -> Command {
    Command::Put(put_request(key, value))
}

fn put_request(key: &Bytes, value: &Bytes) -> pb::PutRequest {
    pb::PutRequest { key: key.clone(), value: value.clone(), ..Default::default() }
}

fn delete(key: &Bytes) -> Command {
    Command::DeleteRange(pb::DeleteRangeRequest { key: key.clone(), ..Default::default() })
}

/// Writes if the key has the expected value, or none if none is expected.
fn swap(key: &Bytes, expected: Option<&Bytes>, value: &Bytes) -> Command {
    use pb::compare::{CompareResult, CompareTarget, TargetUnion};
    let (target, union) = match expected {
        Some(value) => (CompareTarget::Value, TargetUnion::Value(value.clone())),
        None => (CompareTarget::Version, TargetUnion::Version(0)),
    };
    Command::Txn(pb::TxnRequest {
        compare: vec![pb::Compare {
            result: CompareResult::Equal.into(),
            target: target.into(),
            key: key.clone(),
            target_union: Some(union),
            ..Default::default()
        }],
        success: vec![pb::RequestOp {
            request: Some(pb::request_op::Request::RequestPut(put_request(key, value))),
        }],
        failure: Vec::new(),
    })
}

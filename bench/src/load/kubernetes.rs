//! What an idle Kubernetes cluster of three servers and five nodes does to its datastore.
//!
//! # Shape
//! Each holder of a lease is a task on its own server's connection, and writes as the API server does: a transaction that compares
//! the object's revision. A reconstruction from Kubernetes' own intervals, not a recording: controllers' leases every
//! 2 s, nodes', API servers' and masterleases every 10 s, an event every 20 s, a node's status every 5 minutes, compaction every
//! 5 minutes; one read every half second and five watches per server.

use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KvClient, PutOptions, Txn, TxnOp, TxnOpResponse,
    WatchOptions,
};
use tokio::task::JoinSet;

use super::{Random, Recorder};

const CONTROLLERS: &[&str] =
    &["kube-controller-manager", "kube-scheduler", "cloud-controller-manager"];
const SERVERS: usize = 3;
const NODES: usize = 5;

/// An object that is written again and again.
struct Object {
    key: String,
    revision: i64,
    size: usize,
}

impl Object {
    fn new(key: String, size: usize) -> Self {
        Self { key, revision: 0, size }
    }

    /// One update, if nobody else has changed it; reads its revision otherwise, and the next update goes through.
    async fn update(
        &mut self,
        client: &mut KvClient,
        recorder: &Recorder,
        operation: &str,
        random: &mut Random,
        lease: i64,
    ) {
        let options = (lease != 0).then(|| PutOptions::new().with_lease(lease));
        let value = random.object(self.size);
        let bytes = self.key.len() + value.len();
        let transaction = Txn::new()
            .when([Compare::mod_revision(self.key.clone(), CompareOp::Equal, self.revision)])
            .and_then([TxnOp::put(self.key.clone(), value, options)])
            .or_else([TxnOp::get(self.key.clone(), None::<GetOptions>)]);
        let begin = Instant::now();
        match client.txn(transaction).await {
            Ok(response) if response.succeeded() => {
                self.revision = response.header().map_or(0, |header| header.revision());
                recorder.succeeded(operation, begin.elapsed(), bytes);
            }
            Ok(response) => {
                for answer in response.op_responses() {
                    if let TxnOpResponse::Get(found) = answer {
                        self.revision = found.kvs().first().map_or(0, |kv| kv.mod_revision());
                    }
                }
            }
            Err(error) => recorder.failed(&error),
        }
    }
}

/// One idle cluster, for `length`.
pub async fn idle(connections: &[Client], length: Duration) -> Recorder {
    let recorder = Recorder::new();
    let mut tasks = JoinSet::new();
    let at = |index: usize| connections[index % connections.len()].clone();
    for (index, name) in CONTROLLERS.iter().enumerate() {
        let object = Object::new(format!("/registry/leases/kube-system/{name}"), 480);
        tasks.spawn(renew(at(index), recorder.clone(), object, 2.0, 0.3 * index as f64));
    }
    for node in 0..NODES {
        let phase = node as f64 / NODES as f64;
        let lease = Object::new(format!("/registry/leases/kube-node-lease/node{node}"), 420);
        tasks.spawn(renew(at(node), recorder.clone(), lease, 10.0, phase));
        let status = Object::new(format!("/registry/minions/node{node}"), 9_000);
        tasks.spawn(renew(at(node), recorder.clone(), status, 300.0, phase));
    }
    for server in 0..SERVERS {
        let phase = server as f64 / SERVERS as f64;
        let key = format!("/registry/leases/kube-system/apiserver-{server:032x}");
        let object = Object::new(key, 460);
        tasks.spawn(renew(at(server), recorder.clone(), object, 10.0, 0.1 + phase));
        tasks.spawn(reconcile_endpoint(at(server), recorder.clone(), server, phase));
        tasks.spawn(read_leases(at(server), recorder.clone()));
        for kind in ["leases", "minions", "events", "pods", "masterleases"] {
            tasks.spawn(follow(at(server), recorder.clone(), format!("/registry/{kind}/")));
        }
    }
    tasks.spawn(emit_events(at(0), recorder.clone()));
    tasks.spawn(compact(at(0), recorder.clone()));
    recorder.run_for(length).await;
    tasks.join_all().await;
    recorder
}

/// Updates one object every `seconds`; the first time after the fraction `phase` of that.
async fn renew(client: Client, recorder: Recorder, mut object: Object, seconds: f64, phase: f64) {
    let mut client = client.kv_client();
    let mut random = Random::new(object.key.len() as u64 + (phase * 1e3) as u64);
    let begin = Instant::now();
    for round in 0.. {
        let due = begin + Duration::from_secs_f64(seconds * (f64::from(round) + phase));
        if !recorder.pause_until(due).await {
            return;
        }
        object.update(&mut client, &recorder, "renew", &mut random, 0).await;
    }
}

/// What the API server's endpoint reconciler does every 10 s: a lease of 15 s, and a key under it.
async fn reconcile_endpoint(client: Client, recorder: Recorder, server: usize, phase: f64) {
    let (mut kv, mut leases) = (client.kv_client(), client.lease_client());
    let mut object = Object::new(format!("/registry/masterleases/10.0.0.{server}"), 140);
    let mut random = Random::new(900 + server as u64);
    let begin = Instant::now();
    for round in 0.. {
        let due = begin + Duration::from_secs_f64(10.0 * (f64::from(round) + phase));
        if !recorder.pause_until(due).await {
            return;
        }
        let asked = Instant::now();
        match leases.grant(15, None).await {
            Ok(lease) => {
                recorder.succeeded("grant", asked.elapsed(), 16);
                object.update(&mut kv, &recorder, "masterlease", &mut random, lease.id()).await;
            }
            Err(error) => recorder.failed(&error),
        }
    }
}

/// An event every 20 s under a lease of an hour, which the API server shares between the events of a minute.
async fn emit_events(client: Client, recorder: Recorder) {
    let (mut kv, mut leases) = (client.kv_client(), client.lease_client());
    let mut random = Random::new(4242);
    let mut lease = 0;
    let begin = Instant::now();
    for round in 0u32.. {
        if !recorder.pause_until(begin + Duration::from_secs(20) * round).await {
            return;
        }
        if round % 3 == 0 {
            match leases.grant(3_660, None).await {
                Ok(granted) => lease = granted.id(),
                Err(error) => recorder.failed(&error),
            }
        }
        let key = format!("/registry/events/default/event.{:016x}", random.next());
        let mut event = Object::new(key, 850);
        event.update(&mut kv, &recorder, "event", &mut random, lease).await;
    }
}

/// What the API servers do every 5 minutes: agree on a revision, and compact up to the one before.
async fn compact(client: Client, recorder: Recorder) {
    let mut client = client.kv_client();
    let mut object = Object::new("compact_rev_key".to_owned(), 8);
    let mut random = Random::new(77);
    let begin = Instant::now();
    for round in 0u32.. {
        let due = begin + Duration::from_secs(150) + Duration::from_secs(300) * round;
        if !recorder.pause_until(due).await {
            return;
        }
        let last = object.revision;
        object.update(&mut client, &recorder, "compact-key", &mut random, 0).await;
        if last > 0
            && let Err(error) = client.compact(last, None).await
        {
            recorder.failed(&error);
        }
    }
}

/// Those who do not hold a lease look at it.
async fn read_leases(client: Client, recorder: Recorder) {
    let mut client = client.kv_client();
    let begin = Instant::now();
    for round in 0u32.. {
        if !recorder.pause_until(begin + Duration::from_millis(500) * round).await {
            return;
        }
        let name = CONTROLLERS[round as usize % CONTROLLERS.len()];
        let asked = Instant::now();
        match client.get(format!("/registry/leases/kube-system/{name}"), None).await {
            Ok(_) => recorder.succeeded("read", asked.elapsed(), 0),
            Err(error) => recorder.failed(&error),
        }
    }
}

/// The watch cache of an API server.
async fn follow(mut client: Client, recorder: Recorder, prefix: String) {
    let options = WatchOptions::new().with_prefix().with_progress_notify();
    let Ok(mut stream) = client.watch(prefix, Some(options)).await else {
        recorder.failed(&"a watch was refused");
        return;
    };
    while recorder.goes_on() {
        let next = tokio::time::timeout(Duration::from_millis(500), stream.message()).await;
        if matches!(next, Ok(Err(_) | Ok(None))) {
            recorder.failed(&"a watch ended");
            return;
        }
    }
}

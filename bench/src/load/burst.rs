//! A burst of pods that come and go: everything the control plane writes for each, from creation to deletion.

use std::time::{Duration, Instant};

use etcd_client::{Client, Compare, CompareOp, KvClient, Txn, TxnOp};
use tokio::task::JoinSet;

use super::{Random, Recorder};

/// Pods that come and go at the same time.
const AT_ONCE: usize = 16;

/// `pods` pods come and go, as fast as it goes.
pub async fn churn(connections: &[Client], pods: usize) -> Recorder {
    let recorder = Recorder::new();
    let mut tasks = JoinSet::new();
    for number in 0..AT_ONCE {
        let mut client = connections[number % connections.len()].kv_client();
        let recorder = recorder.clone();
        tasks.spawn(async move {
            let mut random = Random::new(number as u64 + 1);
            for pod in (number..pods).step_by(AT_ONCE) {
                live_and_die(&mut client, &recorder, &mut random, pod).await;
            }
        });
    }
    tasks.join_all().await;
    recorder.run_for(Duration::ZERO).await;
    recorder
}

/// Created, bound, started, ready, listed in its slice, deleted; with the events that go with it.
async fn live_and_die(client: &mut KvClient, recorder: &Recorder, random: &mut Random, pod: usize) {
    let key = format!("/registry/pods/default/burst-{pod:05}");
    let mut revision = 0;
    for (step, size) in [2_600, 2_700, 3_300, 3_600].into_iter().enumerate() {
        write(client, recorder, &key, &mut revision, random.object(size)).await;
        let event = format!("/registry/events/default/burst-{pod:05}.{step}");
        write(client, recorder, &event, &mut 0, random.object(700)).await;
    }
    let slice = format!("/registry/endpointslices/default/burst-{pod:05}");
    write(client, recorder, &slice, &mut 0, random.object(1_200)).await;
    let begin = Instant::now();
    let transaction = Txn::new()
        .when([Compare::mod_revision(key.clone(), CompareOp::Equal, revision)])
        .and_then([TxnOp::delete(key.clone(), None)]);
    match client.txn(transaction).await {
        Ok(_) => recorder.succeeded("delete", begin.elapsed(), key.len()),
        Err(error) => recorder.failed(&error),
    }
}

async fn write(
    client: &mut KvClient,
    recorder: &Recorder,
    key: &str,
    revision: &mut i64,
    value: Vec<u8>,
) {
    let bytes = key.len() + value.len();
    let transaction = Txn::new()
        .when([Compare::mod_revision(key, CompareOp::Equal, *revision)])
        .and_then([TxnOp::put(key, value, None)])
        .or_else([TxnOp::get(key, None)]);
    let begin = Instant::now();
    match client.txn(transaction).await {
        Ok(response) if response.succeeded() => {
            *revision = response.header().map_or(0, |header| header.revision());
            recorder.succeeded("txn", begin.elapsed(), bytes);
        }
        Ok(_) => recorder.failed(&"another revision than the one just written"),
        Err(error) => recorder.failed(&error),
    }
}

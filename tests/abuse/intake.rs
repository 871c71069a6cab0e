//! Requests as large as they may be, pushed in by the hundred. They cost the client nothing but bandwidth, and the server memory.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k3s_server::proto::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use prost::Message;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::client;
use crate::host::Host;
use crate::wire::{Wire, call, message, stream};

const CONNECTIONS: usize = 4;
const PUTS_PER_CONNECTION: usize = 100;
const VALUE_BYTES: usize = 1_400_000;
/// Few, so that what is there at one moment stays small.
const KEYS: usize = 16;

/// Largest memory meanwhile. Without a bound it would be 560 MB of requests alone, each about three times.
const RSS_MIB_MAX: u64 = 256;

/// A small request beside them is answered within this, on a busy machine.
const PROMPT: Duration = Duration::from_secs(4);

fn value(number: usize) -> Vec<u8> {
    let mut value = vec![u8::try_from(number % 251).unwrap(); VALUE_BYTES];
    value[..8].copy_from_slice(&(number as u64).to_be_bytes());
    value
}

/// Puts that were acknowledged, with their revisions; and what the others were told.
type Pushed = (Vec<(usize, i64)>, Vec<String>);

/// Puts so much at once through one connection; which were acknowledged, and what the others were told.
async fn push(host: &Host, connection: usize, ready: Arc<Barrier>) -> Pushed {
    let channel = client::channel(host.endpoint()).await.unwrap();
    let mut puts = JoinSet::new();
    ready.wait().await;
    for number in 0..PUTS_PER_CONNECTION {
        let number = connection * PUTS_PER_CONNECTION + number;
        let mut kv = KvClient::new(channel.clone());
        puts.spawn(async move {
            // Over a few keys, so that the store stays small; each value says which put it was.
            let key = format!("bulk/{}", number % KEYS);
            let put = pb::PutRequest {
                key: key.into(),
                value: value(number).into(),
                ..Default::default()
            };
            let mut request = tonic::Request::new(put);
            // As clients with a deadline say it; others get the usual few seconds.
            request.set_timeout(Duration::from_secs(60));
            (number, kv.put(request).await)
        });
    }
    let (mut kept, mut refused) = (Vec::new(), Vec::new());
    while let Some(done) = puts.join_next().await {
        match done.unwrap() {
            (number, Ok(reply)) => kept.push((number, reply.into_inner().header.unwrap().revision)),
            (_, Err(status)) => refused.push(format!("{:?}: {}", status.code(), status.message())),
        }
    }
    (kept, refused)
}

/// What a well-behaved client sees meanwhile: renewals of a lease and small writes.
async fn meanwhile(host: &Host, until: Arc<tokio::sync::Notify>) -> (Duration, u64, usize) {
    let mut leases = LeaseClient::new(host.channel());
    let grant = pb::LeaseGrantRequest { ttl: 600, id: 77 };
    leases.lease_grant(grant).await.expect("a lease");
    let (mut slowest, mut rss, mut rounds) = (Duration::ZERO, 0, 0);
    loop {
        let begun = Instant::now();
        let left = pb::LeaseTimeToLiveRequest { id: 77, keys: false };
        leases.lease_time_to_live(left).await.expect("a lease that lives");
        let put = pb::PutRequest { key: "small".into(), value: "v".into(), ..Default::default() };
        host.kv().put(put).await.expect("a small put");
        slowest = slowest.max(begun.elapsed());
        rss = rss.max(host.rss_mib());
        rounds += 1;
        if tokio::time::timeout(Duration::from_millis(20), until.notified()).await.is_ok() {
            return (slowest, rss, rounds);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn four_hundred_of_the_largest_puts_at_once_cost_bounded_memory_and_none_is_lost() {
    let mut host = Host::plain().await;
    let calm = host.rss_mib();
    let (ready, over) = (Arc::new(Barrier::new(CONNECTIONS)), Arc::new(tokio::sync::Notify::new()));
    let begun = Instant::now();
    let pushing = async {
        let pushes = (0..CONNECTIONS).map(|at| push(&host, at, Arc::clone(&ready)));
        let done = futures_util::future::join_all(pushes).await;
        over.notify_one();
        done
    };
    let (pushed, (slowest, rss, rounds)) =
        tokio::join!(pushing, meanwhile(&host, Arc::clone(&over)));
    let took = begun.elapsed();
    let (mut kept, mut refused) = (BTreeSet::new(), BTreeSet::new());
    let mut refusals = 0;
    for (numbers, told) in pushed {
        refusals += told.len();
        kept.extend(numbers);
        refused.extend(told);
    }
    println!(
        "400 puts of 1.4 MB: {} kept, {refusals} refused {refused:?}, in {took:?}; {calm} MiB before, {rss} MiB at most; \
         {rounds} small rounds, the slowest {slowest:?}",
        kept.len()
    );
    assert!(rss <= RSS_MIB_MAX, "{rss} MiB");
    assert!(slowest <= PROMPT, "{slowest:?}");
    assert!(100 <= kept.len(), "hardly anything got through: {}", kept.len());
    let known = ["etcdserver: too many requests", "etcdserver: request timed out"];
    assert!(
        refused.iter().all(|told| known.iter().any(|text| told.ends_with(text))),
        "{refused:?}"
    );

    // Every acknowledged put is in the history of its key, at the revision that it was told.
    for (number, revision) in kept {
        let key = format!("bulk/{}", number % KEYS).into();
        // Comparing every value would take longer than all the rest.
        let keys_only = number % 8 != 0;
        let range = pb::RangeRequest { key, revision, keys_only, ..Default::default() };
        let found = host.kv().range(range).await.unwrap().into_inner().kvs;
        assert_eq!(found.len(), 1, "put {number} is lost");
        let is_it = found[0].mod_revision == revision;
        assert!(
            is_it && (keys_only || found[0].value == value(number)),
            "put {number} is not what is there at revision {revision}"
        );
    }
    host.write("after", "the flood").await;
    host.survives_a_kill().await;
}

/// A client says that it sends much, sends a little, and no more: its room is for others.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_never_arrive_do_not_keep_others_out() {
    const PUT: &str = "/etcdserverpb.KV/Put";
    let mut host = Host::plain().await;
    let put = pb::PutRequest { key: "never".into(), value: value(0).into(), ..Default::default() };
    let framed = message(1, 0, &put.encode_to_vec());
    // HTTP/2's frame of the first piece, and in it gRPC's header of the whole.
    let piece = &framed[9..9 + 200];
    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut wire = Wire::listening(host.endpoint()).await;
        for number in 0..8 {
            let id = stream(number);
            wire.send(&call(id, PUT)).await.unwrap();
            wire.send(&crate::wire::frame(0, 0, id, piece)).await.unwrap();
        }
        idle.push(wire);
    }
    let begun = Instant::now();
    let mut most = Duration::ZERO;
    while begun.elapsed() < Duration::from_secs(3) {
        let round = Instant::now();
        host.write("small", "served").await;
        most = most.max(round.elapsed());
    }
    println!("64 requests that never arrive: small writes take {most:?} at most");
    assert!(most <= PROMPT, "{most:?}");
    host.is_well().await;
    drop(idle);
    host.write("large", value(1)).await;
    host.stops().await;
}

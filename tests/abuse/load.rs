//! More of everything than a server on a small board has room for, by clients who break no rule.

use std::time::Duration;

use bytes::Bytes;
use k3s_server::limits::REQUEST_BYTES_MAX;
use k3s_server::proto::etcdserverpb as pb;
use pb::lease_client::LeaseClient;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use prost::Message;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::host::Host;
use crate::wire::{Wire, call, message, stream};

const PATIENCE: Duration = Duration::from_secs(60);
const WATCH: &str = "/etcdserverpb.Watch/Watch";

fn create(create: pb::WatchCreateRequest) -> pb::WatchRequest {
    pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

fn watch_everything() -> pb::WatchRequest {
    create(pb::WatchCreateRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        prev_kv: true,
        ..Default::default()
    })
}

fn put(key: String, value: Vec<u8>) -> pb::PutRequest {
    pb::PutRequest { key: key.into(), value: value.into(), ..Default::default() }
}

/// Puts many keys, many at a time.
async fn puts(host: &Host, prefix: &str, count: usize, value_bytes: usize) {
    const AT_ONCE: usize = 64;
    let mut running = JoinSet::new();
    for number in 0..count {
        if running.len() == AT_ONCE {
            running.join_next().await.unwrap().unwrap();
        }
        let (mut kv, key) = (host.kv(), format!("{prefix}{number:06}"));
        running.spawn(async move {
            kv.put(put(key, vec![b'v'; value_bytes])).await.unwrap();
        });
    }
    running.join_all().await;
}

async fn watch(
    host: &Host,
    requests: Vec<pb::WatchRequest>,
) -> tonic::Streaming<pb::WatchResponse> {
    let (sender, receiver) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        for request in requests {
            if sender.send(request).await.is_err() {
                return;
            }
        }
        // The stream stays open until the watcher goes.
        sender.closed().await;
    });
    let mut client = WatchClient::new(host.channel()).max_decoding_message_size(usize::MAX);
    client.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_that_never_read_cost_others_nothing() {
    const PUTS: usize = 2_000;
    let mut host = Host::plain().await;
    let calm = host.rss_mib();
    let mut deaf = Vec::new();
    for _ in 0..8 {
        let mut wire = Wire::deaf(host.endpoint()).await;
        for number in 0..4 {
            let id = stream(number);
            wire.send(&call(id, WATCH)).await.unwrap();
            wire.send(&message(id, 0, &watch_everything().encode_to_vec())).await.unwrap();
        }
        deaf.push(wire);
    }
    let mut reader = watch(&host, vec![watch_everything()]).await;
    let created = timeout(PATIENCE, reader.next()).await.unwrap().unwrap().unwrap();
    assert!(created.created);

    let (seen, ()) = tokio::join!(
        async {
            let mut revisions = Vec::new();
            while revisions.len() < PUTS {
                let response = timeout(PATIENCE, reader.next()).await.expect("events in time");
                let response = response.expect("an open stream").expect("no error");
                revisions
                    .extend(response.events.iter().map(|e| e.kv.as_ref().unwrap().mod_revision));
            }
            revisions
        },
        puts(&host, "w", PUTS, 4_000)
    );

    assert!(seen.windows(2).all(|pair| pair[0] + 1 == pair[1]), "events out of order or missing");
    println!("32 deaf watchers, 8 MB of events: {} MiB more", host.rss_mib() - calm);
    host.is_well().await;
    drop(deaf);
    host.is_well().await;
    host.survives_a_kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_watches_on_one_stream_all_hear() {
    const WATCHES: usize = 10_000;
    let mut host = Host::plain().await;
    let calm = host.rss_mib();
    let requests = (0..WATCHES).map(|_| {
        create(pb::WatchCreateRequest { key: Bytes::from_static(b"one"), ..Default::default() })
    });
    let mut responses = watch(&host, requests.collect()).await;
    let mut ids = Vec::new();
    while ids.len() < WATCHES {
        let response = timeout(PATIENCE, responses.next()).await.unwrap().unwrap().unwrap();
        assert!(response.created && !response.canceled, "{response:?}");
        ids.push(response.watch_id);
    }
    println!("{WATCHES} watches: {} MiB more", host.rss_mib() - calm);

    host.write("one", "event for all").await;

    let mut heard = Vec::new();
    while heard.len() < WATCHES {
        let response = timeout(PATIENCE, responses.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(response.events.len(), 1, "{response:?}");
        heard.push(response.watch_id);
    }
    heard.sort_unstable();
    ids.sort_unstable();
    assert!(heard == ids, "not every watch heard once");
    host.is_well().await;
    drop(responses);
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_leases_are_kept() {
    const LEASES: i64 = 10_000;
    const AT_ONCE: usize = 256;
    let mut host = Host::plain().await;
    let calm = host.rss_mib();
    let mut granting = JoinSet::new();
    for id in 1..=LEASES {
        if granting.len() == AT_ONCE {
            granting.join_next().await.unwrap().unwrap();
        }
        let mut leases = LeaseClient::new(host.channel());
        granting.spawn(async move {
            let grant = pb::LeaseGrantRequest { ttl: 100_000, id };
            leases.lease_grant(grant).await.unwrap();
        });
    }
    granting.join_all().await;
    println!("{LEASES} leases: {} MiB more", host.rss_mib() - calm);

    let mut leases = LeaseClient::new(host.channel());
    let listed = leases.lease_leases(pb::LeaseLeasesRequest {}).await.unwrap().into_inner();
    let mut ids: Vec<_> = listed.leases.iter().map(|lease| lease.id).collect();
    ids.sort_unstable();
    assert!(ids == (1..=LEASES).collect::<Vec<_>>(), "{} leases are listed", ids.len());
    host.is_well().await;
    host.survives_a_kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_request_is_taken_and_one_byte_more_is_not() {
    let mut host = Host::plain().await;
    let largest = usize::try_from(REQUEST_BYTES_MAX).unwrap();
    // What is around key and value in a request of this size, and in etcd's envelope of it.
    let overhead = put("k".to_owned(), vec![0; largest - 100]).encoded_len() - (largest - 100) - 1;
    let fits = largest - 17 - overhead;

    host.write("large-value", vec![b'v'; fits - "large-value".len()]).await;
    let mut large_key = b"large-key-".to_vec();
    large_key.resize(fits, b'k');
    host.write(large_key, "").await;
    let refused = host.kv().put(put("k".to_owned(), vec![0; fits])).await.unwrap_err();

    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert_eq!(refused.message(), "etcdserver: request is too large");
    host.is_well().await;
    host.survives_a_kill().await;
}

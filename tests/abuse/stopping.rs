//! Calls that never end by themselves must not hold up the end of the server.

use std::time::{Duration, Instant};

use k3s_server::proto::etcdserverpb as pb;
use k3s_server::proto::v3electionpb::election_client::ElectionClient;
use k3s_server::proto::v3electionpb::{CampaignRequest, LeaderRequest};
use k3s_server::proto::v3lockpb::LockRequest;
use k3s_server::proto::v3lockpb::lock_client::LockClient;
use pb::lease_client::LeaseClient;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::client;
use crate::host::Host;

/// Less than the server's patience with calls under way, so that one which waits for that is seen.
const STOP_MAX: Duration = Duration::from_millis(1_400);

fn ended(status: &Status, what: &str) {
    // What a client takes as a reason to go to another member.
    assert_eq!(status.code(), Code::Unavailable, "{what}: {status}");
    assert_eq!(status.message(), "etcdserver: server stopped", "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn open_streams_and_waiting_calls_end_when_the_server_begins_to_stop() {
    let host = Host::plain().await;
    let channel = client::channel(host.endpoint()).await.unwrap();
    let mut leases = LeaseClient::new(channel.clone());
    let grant = pb::LeaseGrantRequest { ttl: 600, id: 7 };
    leases.lease_grant(grant).await.unwrap();

    let (alive, renewals) = mpsc::channel(1);
    let renewed = leases.lease_keep_alive(ReceiverStream::new(renewals)).await.unwrap();
    let mut renewed = renewed.into_inner();
    alive.send(pb::LeaseKeepAliveRequest { id: 7 }).await.unwrap();
    assert_eq!(renewed.next().await.unwrap().unwrap().ttl, 600);

    let (watch, requests) = mpsc::channel(1);
    let mut watches = WatchClient::new(channel.clone());
    let watched = watches.watch(ReceiverStream::new(requests)).await.unwrap();
    let mut watched = watched.into_inner();
    let create = pb::WatchCreateRequest { key: "k".into(), ..Default::default() };
    let create = pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    watch.send(create).await.unwrap();
    assert!(watched.next().await.unwrap().unwrap().created);

    let mut elections = ElectionClient::new(channel.clone());
    let campaign =
        |lease| CampaignRequest { name: "e".into(), lease, value: format!("{lease}").into() };
    elections.campaign(campaign(7)).await.unwrap();
    let observed = elections.observe(LeaderRequest { name: "e".into() }).await.unwrap();
    let mut observed = observed.into_inner();
    assert_eq!(observed.next().await.unwrap().unwrap().kv.unwrap().value, "7");
    let mut second = elections.clone();
    let campaigning = tokio::spawn(async move { second.campaign(campaign(0)).await });

    let mut locks = LockClient::new(channel.clone());
    let lock = |lease| LockRequest { name: "l".into(), lease };
    locks.lock(lock(7)).await.unwrap();
    let waiting = tokio::spawn(async move { locks.lock(lock(0)).await });
    // Both stand in their queues.
    let queued = |queue: &'static str| pb::RangeRequest {
        key: format!("{queue}/").into(),
        range_end: format!("{queue}0").into(),
        count_only: true,
        ..Default::default()
    };
    for queue in ["e", "l"] {
        while host.kv().range(queued(queue)).await.unwrap().into_inner().count < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    let start = Instant::now();
    host.stops().await;
    let took = start.elapsed();

    assert!(took < STOP_MAX, "stopping took {took:?}");
    ended(&renewed.next().await.unwrap().unwrap_err(), "renewals");
    ended(&watched.next().await.unwrap().unwrap_err(), "a watch");
    for (answer, what) in [
        (observed.next().await.unwrap().map(drop), "an observer"),
        (campaigning.await.unwrap().map(drop), "a campaign"),
        (waiting.await.unwrap().map(drop), "a lock"),
    ] {
        // Through a client of its own, as in etcd, which keeps the text.
        let status = answer.unwrap_err();
        assert_eq!(status.message(), "etcdserver: server stopped", "{what}: {status}");
    }
}

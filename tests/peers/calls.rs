//! Questions and answers: what arrives, what a failure says, and what happens when a node goes away and comes back.

use std::time::Duration;

use bytes::Bytes;
use k3s_server::peers::MESSAGE_BYTES_MAX;
use k3s_server::raft::transport::{CallError, Method, Refused, Transport};

use crate::node::{Cluster, HANG, Node, SOON, id, member};

#[tokio::test]
async fn a_call_arrives_with_the_callers_proven_id_and_is_answered() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);

    let reply = one.peers.call(&two.member(), Method::Vote, "question".into(), SOON).await;
    assert_eq!(reply, Ok(Bytes::from("question")));
    let back = two.peers.call(&one.member(), Method::Hello, Bytes::new(), SOON).await;
    assert_eq!(back, Ok(Bytes::new()));

    let calls = two.echo.calls.lock().unwrap().clone();
    assert_eq!(calls, [(id(1), Method::Vote, Bytes::from("question"))]);
    let visitor = two.echo.visitors.lock().unwrap().last().unwrap().clone();
    assert_eq!(visitor.node, id(1));
    assert_eq!(visitor.passport, one.peers.passport());
    assert!(one.peers.is_connected(id(2)));
}

#[tokio::test]
async fn many_calls_share_one_connection() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let member = two.member();
    let calls = (0..500_u32).map(|number| {
        let body = Bytes::from(number.to_string());
        let call = one.peers.call(&member, Method::Append, body.clone(), SOON);
        async move { assert_eq!(call.await, Ok(body)) }
    });
    futures_util::future::join_all(calls).await;
    assert_eq!(two.metrics.connections.accepted.get(), 1);
}

#[tokio::test]
async fn large_messages_pass_and_too_large_ones_are_named() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    for bytes in [3 << 20, MESSAGE_BYTES_MAX] {
        let body = Bytes::from(vec![7; bytes]);
        let reply = one.peers.call(&two.member(), Method::Append, body.clone(), SOON).await;
        assert!(reply == Ok(body), "{bytes} bytes");
    }
    let body = Bytes::from(vec![7; MESSAGE_BYTES_MAX + 1]);
    let reply = one.peers.call(&two.member(), Method::Append, body, SOON).await;
    let text = reply.unwrap_err().to_string();
    assert_eq!(text, "malformed request: found 8388609 bytes, expected at most 8388608");
}

#[tokio::test]
async fn a_refusal_comes_back_as_it_was_said() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    for refusal in [Refused::NotLeader(Some(id(3))), Refused::NotReady("starting".to_owned())] {
        *two.echo.refusal.lock().unwrap() = Some(refusal.clone());
        let reply = one.peers.call(&two.member(), Method::Propose, Bytes::new(), SOON).await;
        assert_eq!(reply, Err(CallError::Refused(refusal)));
    }
}

#[tokio::test]
async fn a_node_that_does_not_run_is_unreachable() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let member = two.member();
    two.kill().await;
    let reply = one.peers.call(&member, Method::Vote, Bytes::new(), SOON).await;
    assert!(matches!(reply, Err(CallError::Unreachable(_))), "{reply:?}");
    assert!(!one.peers.is_connected(id(2)));
}

#[tokio::test]
async fn a_node_without_any_address_is_unreachable_in_words() {
    let cluster = Cluster::new();
    let one = cluster.node(1).await;
    let reply = one.peers.call(&member(id(2), &[]), Method::Vote, Bytes::new(), SOON).await;
    let text = reply.unwrap_err().to_string();
    assert_eq!(text, "unreachable: node 2: no address is known");
    let own = one.peers.call(&one.member(), Method::Vote, Bytes::new(), SOON).await;
    assert_eq!(own.unwrap_err().to_string(), "unreachable: node 1 is not another node");
}

#[tokio::test]
async fn a_call_without_an_answer_is_interrupted_at_its_deadline() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let wait = Duration::from_millis(300);
    let reply = one.peers.call(&two.member(), HANG, Bytes::new(), wait).await;
    assert!(matches!(reply, Err(CallError::Interrupted(_))), "{reply:?}");
    // The connection is fine.
    let reply = one.peers.call(&two.member(), Method::Vote, Bytes::new(), SOON).await;
    assert_eq!(reply, Ok(Bytes::new()));
    assert_eq!(two.metrics.connections.accepted.get(), 1);
}

#[tokio::test]
async fn a_call_under_way_when_the_node_dies_is_interrupted_not_unreachable() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let call = one.peers.call(&two.member(), HANG, Bytes::new(), SOON);
    let call = tokio::spawn(call);
    two.echo.waiting.notified().await;
    two.kill().await;
    let reply = call.await.unwrap();
    assert!(matches!(reply, Err(CallError::Interrupted(_))), "{reply:?}");
}

#[tokio::test]
async fn a_node_that_was_restarted_is_found_again_without_a_failed_call() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let member = two.member();
    for _ in 0..3 {
        one.peers.call(&member, Method::Vote, Bytes::new(), SOON).await.unwrap();
    }
    let (address, pki) = (two.address, two.kill().await);
    while one.peers.is_connected(id(2)) {
        tokio::task::yield_now().await;
    }
    let _two = Node::start(pki, &cluster.env, address).await;
    one.peers.call(&member, Method::Vote, Bytes::new(), SOON).await.unwrap();
    assert!(one.peers.is_connected(id(2)));
}

#[tokio::test]
async fn traffic_is_counted_under_etcds_names() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    one.peers.call(&two.member(), Method::Vote, "12345".into(), SOON).await.unwrap();
    let absent = member(id(3), &[]);
    one.peers.call(&absent, Method::Vote, Bytes::new(), SOON).await.unwrap_err();

    let (mut one, mut two) = (one, two);
    one.metrics.collect(one.peers.clone());
    two.metrics.collect(two.peers.clone());
    let page = one.metrics.text();
    for line in [
        "etcd_network_peer_sent_bytes_total{To=\"2\"} 5",
        "etcd_network_peer_received_bytes_total{From=\"2\"} 5",
        "etcd_network_peer_sent_failures_total{To=\"2\"} 0",
        "etcd_network_peer_sent_failures_total{To=\"3\"} 1",
        "etcd_network_peer_received_failures_total{From=\"2\"} 0",
        "etcd_network_active_peers{Local=\"1\",Remote=\"2\"} 1",
        "etcd_network_active_peers{Local=\"1\",Remote=\"3\"} 0",
        "etcd_network_peer_round_trip_time_seconds_count{To=\"2\"} 1",
        "k3s_server_peer_connects_total{To=\"2\"} 1",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is missing:\n{page}");
    }
    let page = two.metrics.text();
    for line in [
        "etcd_network_peer_sent_bytes_total{To=\"1\"} 5",
        "etcd_network_peer_received_bytes_total{From=\"1\"} 5",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is missing:\n{page}");
    }
}

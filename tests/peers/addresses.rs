//! Nodes move, and others take their places.

use bytes::Bytes;
use k3s_server::peers::address::Location;
use k3s_server::raft::transport::{CallError, Method, Transport};

use crate::node::{Cluster, Node, SOON, id, member};

#[tokio::test]
async fn another_node_at_an_address_is_passed_over() {
    let cluster = Cluster::new();
    let (one, two, three) = (cluster.node(1).await, cluster.node(2).await, cluster.node(3).await);
    let recorded = member(id(2), &[three.address, one.address, two.address]);
    let reply = one.peers.call(&recorded, Method::Vote, "for two".into(), SOON).await;
    assert_eq!(reply, Ok("for two".into()));
    assert!(three.echo.calls.lock().unwrap().is_empty());
    assert!(one.echo.calls.lock().unwrap().is_empty());
}

#[tokio::test]
async fn if_only_another_node_answers_the_error_says_who() {
    let cluster = Cluster::new();
    let (one, three) = (cluster.node(1).await, cluster.node(3).await);
    let recorded = member(id(2), &[three.address]);
    let error = one.peers.call(&recorded, Method::Vote, Bytes::new(), SOON).await.unwrap_err();
    let expected = format!("unreachable: node 2: {}: is k3s-server://c1/peer/3", three.address);
    assert_eq!(error, CallError::Unreachable(expected["unreachable: ".len()..].to_owned()));
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn a_node_that_moved_is_found_once_it_has_called() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let recorded = two.member();
    one.peers.call(&recorded, Method::Vote, Bytes::new(), SOON).await.unwrap();

    // Another port here stands for another address there.
    let two = Node::start(two.kill().await, &cluster.env, "127.0.0.1:0".parse().unwrap()).await;
    assert_ne!(two.member(), recorded);
    let waiting = tokio::spawn(one.peers.call(&recorded, Method::Vote, "again".into(), SOON));
    two.peers.call(&one.member(), Method::Hello, Bytes::new(), SOON).await.unwrap();
    // Either the waiting call gets through or it was one of those that failed before the news.
    drop(waiting.await.unwrap());
    let reply = one.peers.call(&recorded, Method::Vote, "again".into(), SOON).await;
    assert_eq!(reply, Ok("again".into()));
}

#[tokio::test]
async fn both_nodes_moved_and_one_knows_a_hint() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let recorded = member(id(2), &["127.0.0.1:1".parse().unwrap()]);
    one.peers.hint(vec![Location::Address(two.address)]);
    let reply = one.peers.call(&recorded, Method::Vote, "hint".into(), SOON).await;
    assert_eq!(reply, Ok("hint".into()));
}

#[tokio::test]
async fn host_names_are_resolved() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let mut recorded = member(id(2), &[]);
    recorded.peer_urls = vec![format!("https://localhost:{}", two.address.port())];
    let reply = one.peers.call(&recorded, Method::Vote, "name".into(), SOON).await;
    assert_eq!(reply, Ok("name".into()));
}

#[tokio::test]
async fn addresses_of_ipv6_are_called() {
    let cluster = Cluster::new();
    if tokio::net::TcpListener::bind("[::1]:0").await.is_err() {
        return eprintln!("skipped: this machine has no IPv6");
    }
    let (one, two) = (cluster.node(1).await, cluster.node_on(2, "[::1]:0").await);
    let reply = one.peers.call(&two.member(), Method::Vote, "six".into(), SOON).await;
    assert_eq!(reply, Ok("six".into()));
}

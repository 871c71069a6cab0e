//! Strangers in great number, while nodes want to talk and a newcomer wants in.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::peers::join;
use k3s_server::pki;
use k3s_server::proto::node::BeginRequest;
use k3s_server::proto::node::join_client::JoinClient;
use k3s_server::raft::transport::{Method, Transport};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::node::{Cluster, Node, SOON};

/// Both ends of every connection are in this process.
const DESCRIPTORS: u64 = 6_000;

fn room() -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = DESCRIPTORS.max(soft).min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).unwrap();
    DESCRIPTORS <= wanted
}

/// A call on the connection that is there, and one by a node that has just come.
async fn nodes_talk(cluster: &Cluster, known: &Node, to: &Node, newcomer: u64) {
    let started = Instant::now();
    let reply = known.peers.call(&to.member(), Method::Vote, Bytes::new(), SOON).await;
    reply.expect("the connection is there");
    let other = cluster.node(newcomer).await;
    let reply = other.peers.call(&to.member(), Method::Vote, Bytes::new(), SOON).await;
    reply.expect("there is room for a node");
    println!("a known and a new node were answered after {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_idle_connections_keep_no_node_out() {
    if !room() {
        return eprintln!("skipped: too few file descriptors");
    }
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    nodes_talk(&cluster, &one, &two, 3).await;
    let mut idle = Vec::new();
    for number in 0..5_000_u32 {
        idle.push(TcpStream::connect(two.address).await.unwrap());
        if number % 1_000 == 999 {
            nodes_talk(&cluster, &one, &two, 10 + u64::from(number)).await;
        }
    }
    // Far fewer are kept than came: the oldest made room.
    let mut byte = [0];
    let first = tokio::time::timeout(SOON, idle[0].read(&mut byte)).await.expect("it was closed");
    assert!(matches!(first, Ok(0) | Err(_)));
}

/// Connects, shakes hands as a stranger at the nodes' door, is refused, and again.
async fn flood(address: SocketAddr, stop: Arc<AtomicBool>) -> u64 {
    let mut config = rustls::ClientConfig::clone(&pki::call_stranger().unwrap());
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let mut count = 0;
    while !stop.load(Relaxed) {
        let Ok(stream) = TcpStream::connect(address).await else { continue };
        let name = ServerName::try_from("127.0.0.1").unwrap();
        if let Ok(mut stream) = connector.connect(name, stream).await {
            drop(stream.read(&mut [0; 16]).await);
            count += 1;
        }
    }
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_handshakes_keeps_no_node_out() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    nodes_talk(&cluster, &one, &two, 3).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut floods = JoinSet::new();
    for _ in 0..32 {
        floods.spawn(flood(two.address, Arc::clone(&stop)));
    }
    for number in 10..15 {
        nodes_talk(&cluster, &one, &two, number).await;
    }
    stop.store(true, Relaxed);
    let handshakes: u64 = floods.join_all().await.into_iter().sum();
    println!("{handshakes} handshakes of strangers");
    assert!(100 < handshakes, "that was no flood: {handshakes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomers_that_stay_take_no_place_of_nodes_and_few_of_newcomers() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let mut staying = Vec::new();
    while let Ok(connection) = join::connect(two.address).await {
        let mut client = JoinClient::new(connection.channel);
        if client.begin(BeginRequest::default()).await.is_err() {
            break;
        }
        staying.push(client);
        assert!(staying.len() < 100, "there is no end to them");
    }
    assert_eq!(staying.len(), 16);
    nodes_talk(&cluster, &one, &two, 3).await;

    // They stay, and one after the other makes room for who comes.
    let mut later = Vec::new();
    let started = Instant::now();
    while later.len() < 3 {
        assert!(started.elapsed() < SOON, "nobody may join while others stay");
        if let Ok(connection) = join::connect(two.address).await {
            let mut client = JoinClient::new(connection.channel);
            if client.begin(BeginRequest::default()).await.is_ok() {
                later.push(client);
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("three new ones were let in after {:?}, beside 16 that stay", started.elapsed());

    drop((staying, later));
    let started = Instant::now();
    while started.elapsed() < SOON {
        if let Ok(connection) = join::connect(two.address).await
            && JoinClient::new(connection.channel).begin(BeginRequest::default()).await.is_ok()
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("nobody may join any more");
}

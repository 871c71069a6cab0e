//! Who is not let in: every kind of wrong certificate, wrong release, and those who are out.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use k3s_server::env::Env;
use k3s_server::peers::{Passport, Standing};
use k3s_server::pki::validity::{LEAF_LIFE, RELEASED};
use k3s_server::raft::transport::{CallError, Method, Refused, StreamMethod, Transport};
use k3s_server::testkit::ManualClock;

use crate::node::{CLUSTER, Cluster, Node, SOON, id};

const LOOPBACK: &str = "127.0.0.1:0";

#[tokio::test]
async fn nodes_of_another_cluster_are_refused_at_both_ends() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let (one, two) = (ours.node(1).await, theirs.node(2).await);
    for (from, to) in [(&one, &two), (&two, &one)] {
        let error = from.peers.call(&to.member(), Method::Hello, Bytes::new(), SOON).await;
        let error = error.unwrap_err();
        assert!(matches!(&error, CallError::Unreachable(_)), "{error}");
        assert!(error.to_string().contains("not of this cluster"), "{error}");
        assert!(to.echo.calls.lock().unwrap().is_empty());
        assert!(to.echo.visitors.lock().unwrap().is_empty());
    }
}

fn at(seconds: i64, env: &Env) -> Env {
    let clock = ManualClock::new();
    clock.set_wall(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.unsigned_abs()));
    Env { clock: Arc::new(clock), ..env.clone() }
}

#[tokio::test]
async fn expired_certificates_are_refused_at_both_ends() {
    let cluster = Cluster::new();
    let early = at(RELEASED, &cluster.env);
    let late = at(RELEASED + LEAF_LIFE + 24 * 3_600, &cluster.env);
    let old = Node::start(cluster.pki_at(&early, 1).await, &early, LOOPBACK.parse().unwrap()).await;
    let new = Node::start(cluster.pki_at(&late, 2).await, &late, LOOPBACK.parse().unwrap()).await;
    // To the one with the right clock the other's certificate has expired, whoever calls.
    let error = new.peers.call(&old.member(), Method::Hello, Bytes::new(), SOON).await.unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
    let error = old.peers.call(&new.member(), Method::Hello, Bytes::new(), SOON).await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable(_)), "{error}");
    assert!(new.echo.visitors.lock().unwrap().is_empty());
    assert!(old.echo.visitors.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_clock_in_1970_keeps_nobody_out() {
    let cluster = Cluster::new();
    let unset = at(0, &cluster.env);
    let one = Node::start(cluster.pki_at(&unset, 1).await, &unset, LOOPBACK.parse().unwrap()).await;
    let two = cluster.node(2).await;
    one.peers.call(&two.member(), Method::Hello, Bytes::new(), SOON).await.unwrap();
    two.peers.call(&one.member(), Method::Hello, Bytes::new(), SOON).await.unwrap();
}

#[tokio::test]
async fn an_incompatible_release_is_refused_by_name_before_anything_is_said() {
    let cluster = Cluster::new();
    let one = cluster.node(1).await;
    let passport = Passport {
        wire: 7..=9,
        release: "9.0.0".to_owned(),
        ..Passport::new(CLUSTER, 1, &*cluster.env.entropy)
    };
    let pki = cluster.pki(2).await;
    let two = Node::start_as(pki, &cluster.env, LOOPBACK.parse().unwrap(), passport).await;
    let ours = env!("CARGO_PKG_VERSION");
    for (from, to) in [(&one, &two), (&two, &one)] {
        let error = from.peers.call(&to.member(), Method::Vote, Bytes::new(), SOON).await;
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("incompatible versions: "), "{text}");
        assert!(text.contains("release 9.0.0 speaks versions 7 to 9"), "{text}");
        assert!(text.contains(&format!("release {ours} speaks version 1")), "{text}");
        assert!(to.echo.calls.lock().unwrap().is_empty());
        assert!(to.echo.visitors.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_removed_node_hears_it_and_may_still_say_hello() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    one.peers.call(&two.member(), Method::Vote, Bytes::new(), SOON).await.unwrap();
    let (_sender, requests) = tokio::sync::mpsc::channel(1);
    let requests = Box::pin(tokio_stream::wrappers::ReceiverStream::new(requests));
    let replies = one.peers.stream(&two.member(), StreamMethod::Append, requests).await.unwrap();

    let removed = Refused::Removed("its card was lost".to_owned());
    *two.standing.lock().unwrap() = Standing::Removed("its card was lost".to_owned());
    two.peers.forget(id(1));
    // What was open is cut.
    let (_, end) = two.echo.ended().await;
    assert!(matches!(end, Err(CallError::Interrupted(_))), "{end:?}");
    drop(replies);
    while one.peers.is_connected(id(2)) {
        tokio::task::yield_now().await;
    }

    let reply = one.peers.call(&two.member(), Method::Vote, Bytes::new(), SOON).await;
    assert_eq!(reply, Err(CallError::Refused(removed)));
    let reply = one.peers.call(&two.member(), Method::Hello, "who am I".into(), SOON).await;
    assert_eq!(reply, Ok("who am I".into()));
    // And nobody calls it.
    let reply = two.peers.call(&one.member(), Method::Vote, Bytes::new(), SOON).await;
    assert_eq!(reply.unwrap_err().to_string(), "unreachable: node 1: it was removed");
}

#[tokio::test]
async fn a_second_process_with_the_same_id_can_be_told_apart() {
    let cluster = Cluster::new();
    let two = cluster.node(2).await;
    let pki = cluster.pki(1).await;
    let first = Node::start(pki.clone(), &cluster.env, LOOPBACK.parse().unwrap()).await;
    let clone = Node::start(pki, &cluster.env, LOOPBACK.parse().unwrap()).await;
    for node in [&first, &clone] {
        node.peers.call(&two.member(), Method::Hello, Bytes::new(), SOON).await.unwrap();
    }
    let visitors = two.echo.visitors.lock().unwrap().clone();
    let incarnations: std::collections::HashSet<u64> =
        visitors.iter().map(|visitor| visitor.passport.incarnation).collect();
    assert!(visitors.iter().all(|visitor| visitor.node == id(1)));
    assert_eq!(incarnations.len(), 2);

    *two.standing.lock().unwrap() = Standing::Duplicate("it is at 10.0.0.1".to_owned());
    let reply = clone.peers.call(&two.member(), Method::Vote, Bytes::new(), SOON).await;
    let expected = "another incarnation of the caller is alive: it is at 10.0.0.1";
    assert_eq!(reply.unwrap_err().to_string(), expected);
}

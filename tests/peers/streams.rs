//! Streams: order, ends of both kinds, and memory that does not grow with what is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use k3s_server::raft::transport::{CallError, Method, Refused, StreamMethod, Transport};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::node::{Cluster, SOON};

#[tokio::test]
async fn messages_come_in_order_and_are_answered_one_by_one() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let (sender, requests) = mpsc::channel(1);
    let requests = Box::pin(ReceiverStream::new(requests));
    let mut replies =
        one.peers.stream(&two.member(), StreamMethod::Append, requests).await.unwrap();
    // One at a time: nothing waits for more to send.
    for number in 0..100_u32 {
        let body = Bytes::from(number.to_string());
        sender.send(body.clone()).await.unwrap();
        assert_eq!(replies.next().await, Some(Ok(body)));
    }
    drop(sender);
    assert_eq!(two.echo.ended().await, (190, Ok(())));
    assert_eq!(replies.next().await, Some(Ok("190".into())));
    assert_eq!(replies.next().await, None);
}

#[tokio::test]
async fn a_stream_that_is_refused_sends_nothing() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let removed = "it was lost".to_owned();
    *two.standing.lock().unwrap() = k3s_server::peers::Standing::Removed(removed.clone());
    let requests = stream::once(async { panic!("a message was asked for") });
    let opened = one.peers.stream(&two.member(), StreamMethod::Append, Box::pin(requests)).await;
    assert_eq!(opened.err(), Some(CallError::Refused(Refused::Removed(removed))));
}

#[tokio::test]
async fn a_caller_that_stops_listening_is_gone_in_the_middle() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let (sender, requests) = mpsc::channel(1);
    let requests = Box::pin(ReceiverStream::new(requests));
    let mut replies =
        one.peers.stream(&two.member(), StreamMethod::Append, requests).await.unwrap();
    sender.send("first".into()).await.unwrap();
    replies.next().await.unwrap().unwrap();
    drop(replies);
    let (bytes, end) = two.echo.ended().await;
    assert_eq!(bytes, 5);
    assert!(matches!(end, Err(CallError::Interrupted(_))), "{end:?}");
    sender.closed().await;
}

#[tokio::test]
async fn a_callee_that_dies_ends_the_replies_with_an_error() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let requests = Box::pin(stream::pending());
    let mut replies =
        one.peers.stream(&two.member(), StreamMethod::Append, requests).await.unwrap();
    two.kill().await;
    let reply = tokio::time::timeout(SOON, replies.next()).await.unwrap();
    assert!(matches!(reply, Some(Err(CallError::Interrupted(_)))), "{reply:?}");
    assert_eq!(replies.next().await, None);
}

/// Counts what is made, so that a test can compare it with what was taken.
fn chunks(
    count: u64,
    bytes: usize,
    made: &Arc<AtomicU64>,
) -> impl stream::Stream<Item = Bytes> + use<> {
    let (chunk, made) = (Bytes::from(vec![0x5a; bytes]), Arc::clone(made));
    stream::iter(0..count).map(move |_| {
        made.fetch_add(chunk.len() as u64, Relaxed);
        chunk.clone()
    })
}

#[tokio::test]
async fn a_snapshot_of_64_mib_is_never_in_memory_as_a_whole() {
    const CHUNK: usize = 1 << 20;
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    let made = Arc::new(AtomicU64::new(0));
    let taken = two.echo.taken.subscribe();
    let mut most = 0;
    let requests = chunks(64, CHUNK, &made);
    let (watched, far) = (Arc::clone(&made), taken.clone());
    let requests = requests.map(move |chunk| {
        most = most.max(watched.load(Relaxed) - *far.borrow());
        assert!(most <= 12 << 20, "{most} bytes were made and not taken");
        chunk
    });
    let mut replies =
        one.peers.stream(&two.member(), StreamMethod::Snapshot, Box::pin(requests)).await.unwrap();
    let reply = tokio::time::timeout(SOON * 3, replies.next()).await.unwrap();
    assert_eq!(reply, Some(Ok(Bytes::from((64 * CHUNK).to_string()))));
    assert_eq!(two.echo.ended().await, (64 << 20, Ok(())));
}

#[tokio::test]
async fn a_stream_that_nobody_reads_stops_and_delays_no_call() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1).await, cluster.node(2).await);
    two.echo.reads.send_replace(false);
    let made = Arc::new(AtomicU64::new(0));
    let mut streams = Vec::new();
    for method in [StreamMethod::Append, StreamMethod::Append, StreamMethod::Snapshot] {
        let requests = Box::pin(chunks(64, 1 << 20, &made));
        streams.push(one.peers.stream(&two.member(), method, requests).await.unwrap());
    }
    // It stops when the windows are full: wait until a while passes without progress.
    let mut before = u64::MAX;
    while before != made.load(Relaxed) {
        before = made.load(Relaxed);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!((1 << 20..=24 << 20).contains(&before), "{before} bytes were made");

    for _ in 0..20 {
        let reply = one.peers.call(&two.member(), Method::PreVote, "x".into(), SOON).await;
        assert_eq!(reply, Ok("x".into()));
    }
    two.echo.reads.send_replace(true);
    let mut replies = streams.pop().unwrap();
    assert_eq!(replies.next().await, Some(Ok((64 << 20).to_string().into())));
}

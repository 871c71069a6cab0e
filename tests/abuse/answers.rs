//! Answers that are asked for and never read. They cost a few kilobytes to ask for and megabytes to hold.

use std::time::{Duration, Instant};

use k3s_server::proto::etcdserverpb as pb;
use pb::request_op::Request;
use prost::Message;

use crate::host::Host;
use crate::support::Endpoint;
use crate::wire::{END_STREAM, SETTINGS, WINDOW_UPDATE, Wire, call, frame, message, stream};

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";
const DELETE: &str = "/etcdserverpb.KV/DeleteRange";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const SNAPSHOT: &str = "/etcdserverpb.Maintenance/Snapshot";
const RANGE_STREAM: &str = "/etcdserverpb.KV/RangeStream";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// Each answer is so large.
const VALUES: usize = 4;
const VALUE_BYTES: usize = 1 << 20;
const CALLS: u32 = 400;

/// Well-behaved clients are served meanwhile, for so long.
const MEANWHILE: Duration = Duration::from_secs(2);

/// A read of one key is answered at once, on a busy machine; it is not held up behind megabytes.
const PROMPT: Duration = Duration::from_secs(1);

/// The budget for answers is 64 MiB. Beside it there are an idle server, its caches, and what glibc's allocator keeps of what
/// was free in each of its arenas, which is more than as much again. Without the budget it would be 2 GiB.
const RSS_MIB_MAX: u64 = 256;

/// How a client does not read.
#[derive(Clone, Copy, Debug)]
enum Deafness {
    /// It leaves the socket full.
    Socket,
    /// So, but it said that anything may be sent.
    SocketWithEndlessWindow,
    /// It reads the socket and never opens a window.
    Window,
}

const ALL: [Deafness; 3] = [Deafness::Socket, Deafness::SocketWithEndlessWindow, Deafness::Window];

async fn connect(endpoint: &Endpoint, deafness: Deafness) -> Wire {
    let mut wire = match deafness {
        Deafness::Socket | Deafness::SocketWithEndlessWindow => Wire::deaf(endpoint).await,
        Deafness::Window => Wire::listening(endpoint).await,
    };
    if matches!(deafness, Deafness::SocketWithEndlessWindow) {
        let window = [&[0, 4][..], &0x7fff_ffff_u32.to_be_bytes()].concat();
        wire.send(&frame(SETTINGS, 0, 0, &window)).await.unwrap();
        let more = (0x7fff_ffff_u32 - 65_535).to_be_bytes();
        wire.send(&frame(WINDOW_UPDATE, 0, 0, &more)).await.unwrap();
    }
    wire
}

/// Asks for the same again and again.
async fn ask(wire: &mut Wire, calls: u32, path: &str, request: &impl Message) {
    let request = request.encode_to_vec();
    let taken = wire
        .flood(calls, |number| {
            let id = stream(number);
            [call(id, path), message(id, END_STREAM, &request)].concat()
        })
        .await;
    assert_eq!(taken, calls, "the requests were not even read");
}

fn everything_big() -> pb::RangeRequest {
    pb::RangeRequest { key: "big/".into(), range_end: "big0".into(), ..Default::default() }
}

async fn with_big_values() -> Host {
    let mut host = Host::plain().await;
    for number in 0..VALUES {
        host.write(format!("big/{number}"), vec![b'v'; VALUE_BYTES]).await;
    }
    host.write("small", "value").await;
    host
}

async fn get(host: &Host, range: pb::RangeRequest) -> (Duration, usize) {
    let start = Instant::now();
    let answer = host.kv().range(range).await.expect("an ordinary get").into_inner();
    (start.elapsed(), answer.kvs.iter().map(|kv| kv.value.len()).sum())
}

/// What well-behaved clients see while others misbehave.
#[derive(Debug, Default)]
struct Meanwhile {
    slowest_get: Duration,
    slowest_list: Duration,
    rss_mib_max: u64,
}

async fn meanwhile(host: &Host) -> Meanwhile {
    let mut seen = Meanwhile::default();
    let start = Instant::now();
    while start.elapsed() < MEANWHILE {
        let small = pb::RangeRequest { key: "small".into(), ..Default::default() };
        let (took, bytes) = get(host, small).await;
        assert_eq!(bytes, "value".len());
        seen.slowest_get = seen.slowest_get.max(took);
        let (took, bytes) = get(host, everything_big()).await;
        assert_eq!(bytes, VALUES * VALUE_BYTES);
        seen.slowest_list = seen.slowest_list.max(took);
        seen.rss_mib_max = seen.rss_mib_max.max(host.rss_mib());
    }
    seen
}

async fn is_bounded(host: &mut Host, calm: u64, what: &str) {
    let seen = meanwhile(host).await;
    println!("{what}: {calm} MiB before, then {seen:?}");
    assert!(seen.rss_mib_max <= RSS_MIB_MAX, "{what}: {seen:?}");
    assert!(seen.slowest_get <= PROMPT, "{what}: {seen:?}");
    assert!(seen.slowest_list <= 5 * PROMPT, "{what}: {seen:?}");
    host.is_well().await;
}

/// One connection asks 400 times for 4 MiB and reads nothing, in each way of not reading.
async fn nobody_reads(path: &str, request: impl Message) {
    for deafness in ALL {
        let mut host = with_big_values().await;
        let calm = host.rss_mib();
        let mut wire = connect(host.endpoint(), deafness).await;
        ask(&mut wire, CALLS, path, &request).await;

        is_bounded(&mut host, calm, &format!("400 of {path}, {deafness:?}")).await;

        drop(wire);
        host.is_well().await;
        host.stops().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_that_nobody_reads_are_bounded_and_others_are_served() {
    nobody_reads(RANGE, everything_big()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn range_streams_that_nobody_reads_are_bounded() {
    nobody_reads(RANGE_STREAM, everything_big()).await;
}

/// What a write answers is made where it is applied, which cannot wait.
#[tokio::test(flavor = "multi_thread")]
async fn writes_whose_answers_nobody_reads_are_bounded() {
    let op = |request| pb::RequestOp { request: Some(request) };
    let put = pb::PutRequest { key: "k".into(), ..Default::default() };
    nobody_reads(
        TXN,
        pb::TxnRequest {
            success: vec![
                op(Request::RequestPut(put)),
                op(Request::RequestRange(everything_big())),
            ],
            ..Default::default()
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn previous_values_that_nobody_reads_are_bounded() {
    let host = with_big_values().await;
    let calm = host.rss_mib();
    let mut wire = connect(host.endpoint(), Deafness::Socket).await;
    // Nothing is there to be deleted after the first, but none of them can know.
    let delete =
        pb::DeleteRangeRequest { key: "big/".into(), range_end: "big0".into(), prev_kv: true };
    ask(&mut wire, CALLS, DELETE, &delete).await;
    let gone = async {
        while !host.kv().range(everything_big()).await.unwrap().into_inner().kvs.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PROMPT * 10, gone).await.expect("the first delete was applied");
    assert!(host.rss_mib() <= RSS_MIB_MAX, "{calm} MiB, then {}", host.rss_mib());
    drop(wire);
    host.stops().await;
}

/// All history, 400 times, to a client that hears nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn watches_of_history_that_nobody_reads_are_bounded() {
    let create = pb::WatchCreateRequest {
        key: "big/".into(),
        range_end: "big0".into(),
        start_revision: 1,
        prev_kv: true,
        ..Default::default()
    };
    let request = pb::WatchRequest {
        request_union: Some(pb::watch_request::RequestUnion::CreateRequest(create)),
    };
    let request = request.encode_to_vec();
    for deafness in ALL {
        let mut host = with_big_values().await;
        let calm = host.rss_mib();
        let mut wire = connect(host.endpoint(), deafness).await;
        // The streams stay open.
        let open = |number| {
            let id = stream(number);
            [call(id, WATCH), message(id, 0, &request)].concat()
        };
        assert_eq!(wire.flood(CALLS, open).await, CALLS);

        is_bounded(&mut host, calm, &format!("400 watches, {deafness:?}")).await;

        drop(wire);
        host.is_well().await;
        host.stops().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_and_descriptors_that_nobody_reads_are_bounded() {
    let file = b"rpc.proto";
    // ServerReflectionRequest.file_by_filename.
    let descriptor = [&[0x1a, u8::try_from(file.len()).unwrap()][..], file].concat();
    for deafness in ALL {
        let mut host = with_big_values().await;
        let calm = host.rss_mib();
        let mut backups = connect(host.endpoint(), deafness).await;
        ask(&mut backups, CALLS, SNAPSHOT, &pb::SnapshotRequest::default()).await;
        let mut descriptors = connect(host.endpoint(), deafness).await;
        let open = |number| {
            let id = stream(number);
            [call(id, REFLECTION), message(id, END_STREAM, &descriptor)].concat()
        };
        assert_eq!(descriptors.flood(4_000, open).await, 4_000);

        is_bounded(&mut host, calm, &format!("backups and descriptors, {deafness:?}")).await;

        drop((backups, descriptors));
        host.is_well().await;
        host.stops().await;
    }
}

/// Told to stop, the server does not wait for clients that take nothing.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_do_not_keep_the_server_from_stopping() {
    for deafness in ALL {
        let host = with_big_values().await;
        let mut wires = Vec::new();
        for (path, request) in [
            (RANGE, everything_big().encode_to_vec()),
            (RANGE_STREAM, everything_big().encode_to_vec()),
            (SNAPSHOT, Vec::new()),
        ] {
            let mut wire = connect(host.endpoint(), deafness).await;
            let open = |number| {
                let id = stream(number);
                [call(id, path), message(id, END_STREAM, &request)].concat()
            };
            assert_eq!(wire.flood(20, open).await, 20);
            wires.push(wire);
        }
        // They are at work: another connection was answered after theirs were asked.
        get(&host, everything_big()).await;

        let start = Instant::now();
        host.stops().await;

        // Two seconds on an idle machine. Without the cut it waits for ever.
        println!("{deafness:?}: stopped in {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(30), "{deafness:?}: {:?}", start.elapsed());
        drop(wires);
    }
}

/// Sixty connections want 2 GiB. None of them reads, so all of the room is taken, yet whoever wants little gets it at once;
/// and whoever wants much gets it when the first of them have lost their connection.
#[tokio::test(flavor = "multi_thread")]
async fn many_connections_that_do_not_read_leave_room_for_one_that_does() {
    const CONNECTIONS: u32 = 60;
    for deafness in ALL {
        let mut host = with_big_values().await;
        let calm = host.rss_mib();
        let mut wires = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut wire = connect(host.endpoint(), deafness).await;
            ask(&mut wire, 8, RANGE, &everything_big()).await;
            wires.push(wire);
        }

        let mut slowest = Duration::ZERO;
        let mut rss_mib_max = 0;
        // Another connection, so that one's wait is not the other's.
        let channel = crate::client::channel(host.endpoint()).await.unwrap();
        let listed = async move {
            let mut kv =
                pb::kv_client::KvClient::new(channel).max_decoding_message_size(usize::MAX);
            while let Err(status) = kv.range(everything_big()).await {
                assert_eq!(status.message(), "etcdserver: too many requests");
            }
        };
        let mut listed = Box::pin(listed);
        let start = Instant::now();
        loop {
            let small = pb::RangeRequest { key: "small".into(), ..Default::default() };
            let (took, _) = get(&host, small).await;
            slowest = slowest.max(took);
            rss_mib_max = rss_mib_max.max(host.rss_mib());
            tokio::select! {
                biased;
                () = &mut listed => break,
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
            assert!(start.elapsed() < Duration::from_secs(30), "a list was never answered");
        }
        println!(
            "60 connections, {deafness:?}: list after {:?}, slowest get {slowest:?}, {calm} MiB, then {rss_mib_max}",
            start.elapsed()
        );
        assert!(slowest <= PROMPT, "{slowest:?}");
        assert!(rss_mib_max <= RSS_MIB_MAX, "{calm} MiB, then {rss_mib_max}");
        drop(wires);
        host.is_well().await;
        host.stops().await;
    }
}

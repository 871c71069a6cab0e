//! Floods and malformed frames. A connection may be lost by them, but only that connection.

use std::time::Duration;

use k3s_server::proto::etcdserverpb as pb;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::host::Host;
use crate::wire::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, Wire, block, call, call_headers, frame, message, stream,
};

const RANGE: &str = "/etcdserverpb.KV/Range";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_reset_at_once_end_the_connection() {
    let mut host = Host::plain().await;
    let mut wire = Wire::listening(host.endpoint()).await;
    let cancel = 8_u32.to_be_bytes();

    wire.flood(20_000, |number| {
        let id = stream(number);
        [call(id, RANGE), frame(RST_STREAM, 0, id, &cancel)].concat()
    })
    .await;

    assert!(wire.is_closed_within(PATIENCE).await, "20,000 resets were put up with");
    assert_eq!(wire.seen().count(GOAWAY), 1);
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_opened_and_left_cost_little() {
    let mut host = Host::plain().await;
    let calm = host.rss_mib();
    let mut wire = Wire::listening(host.endpoint()).await;

    let taken = wire.flood(20_000, |number| call(stream(number), RANGE)).await;
    println!("{taken} open calls: {} MiB more", host.rss_mib() - calm);

    host.is_well().await;
    drop(wire);
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn header_lists_without_measure_are_refused() {
    let mut host = Host::plain().await;
    let long = "x".repeat(8 << 10);
    let headers = call_headers(RANGE).into_iter().chain((0..64).map(|_| ("x-long", &*long)));
    let block = block(headers);
    let mut wire = Wire::listening(host.endpoint()).await;

    let chunks: Vec<_> = block.chunks(16 << 10).collect();
    let mut bytes = frame(HEADERS, END_STREAM, 1, chunks[0]);
    for (number, chunk) in chunks.iter().enumerate().skip(1) {
        let last = number + 1 == chunks.len();
        bytes.extend(frame(CONTINUATION, if last { END_HEADERS } else { 0 }, 1, chunk));
    }
    // It need not be read to its end.
    drop(wire.send(&bytes).await);

    assert!(wire.is_answered_within(PATIENCE).await, "half a MiB of headers was taken for a call");
    assert_eq!(wire.seen().count(DATA), 0);
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_end_close_the_connection() {
    let mut host = Host::plain().await;
    for filler in [0, 1, 1_000] {
        let mut wire = Wire::listening(host.endpoint()).await;
        let start = frame(HEADERS, 0, 1, &block(call_headers(RANGE)));
        wire.send(&start).await.unwrap();
        let header = block([("x", &*"y".repeat(filler))]);
        let empty = Vec::new();
        let piece = if filler == 0 { &empty } else { &header };

        let taken = wire.flood(200_000, |_| frame(CONTINUATION, 0, 1, piece)).await;

        assert!(
            wire.is_closed_within(PATIENCE).await,
            "{taken} frames of {filler} were put up with"
        );
    }
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_are_not_piled_up() {
    let mut host = Host::plain().await;
    let frames = [
        frame(PING, 0, 0, &[7; 8]),
        frame(SETTINGS, 0, 0, &[]),
        frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0xff, 0xff]),
    ];
    let mut wires = Vec::new();
    for one in &frames {
        let mut wire = Wire::deaf(host.endpoint()).await;
        wire.flood(300_000, |_| one.clone()).await;
        wires.push(wire);
    }
    host.is_well().await;
    drop(wires);
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_break_the_rules_close_only_their_connection() {
    let mut host = Host::plain().await;
    let broken: Vec<(&str, Vec<u8>)> = vec![
        ("data on stream 0", frame(DATA, 0, 0, b"x")),
        ("data on an idle stream", frame(DATA, 0, 9, b"x")),
        ("headers on an even stream", call(2, RANGE)),
        ("a frame larger than allowed", frame(DATA, 0, 1, &[0; 20_000])),
        ("settings of a wrong length", frame(SETTINGS, 0, 0, &[1])),
        ("settings on a stream", frame(SETTINGS, 0, 1, &[])),
        ("a ping of a wrong length", frame(PING, 0, 0, &[1])),
        ("a window update by zero", frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
        (
            "a window beyond 2 GiB",
            [[0x7f, 0xff, 0xff, 0xff]; 2].map(|by| frame(WINDOW_UPDATE, 0, 0, &by)).concat(),
        ),
        ("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, b"")),
        ("a header block that is none", frame(HEADERS, END_HEADERS, 1, &[0xff; 40])),
        (
            "an upper-case header",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM,
                1,
                &block(call_headers(RANGE).into_iter().chain([("X-Upper", "1")])),
            ),
        ),
        ("padding longer than the frame", frame(HEADERS, END_HEADERS | 8, 1, &[200, 0])),
        ("a stream opened backwards", [call(9, RANGE), call(3, RANGE)].concat()),
        ("noise", (0..4_000_u32).map(|n| (n * 167 % 251) as u8).collect()),
    ];
    for (what, bytes) in broken {
        let mut wire = Wire::listening(host.endpoint()).await;
        drop(wire.send(&bytes).await);
        assert!(wire.is_closed_within(PATIENCE).await, "{what}: the connection stays");
    }
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_break_the_rules_are_refused_alone() {
    let mut host = Host::plain().await;
    let bad: Vec<(&str, Vec<u8>)> = vec![
        (
            "no path",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM,
                1,
                &block([(":method", "POST"), (":scheme", "http")]),
            ),
        ),
        (
            "a header of a connection",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM,
                1,
                &block(call_headers(RANGE).into_iter().chain([("connection", "close")])),
            ),
        ),
        (
            "a message that never comes",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(call_headers(RANGE))),
        ),
        (
            "half a message",
            [call(1, RANGE), frame(DATA, END_STREAM, 1, &[0, 0, 0, 1, 0, 9])].concat(),
        ),
        (
            "a length of 4 GiB",
            [call(1, RANGE), frame(DATA, END_STREAM, 1, &[0, 0xff, 0xff, 0xff, 0xff])].concat(),
        ),
        (
            "an unknown compression flag",
            [call(1, RANGE), frame(DATA, END_STREAM, 1, &[7, 0, 0, 0, 0])].concat(),
        ),
    ];
    for (what, bytes) in bad {
        let wire = {
            let mut wire = Wire::listening(host.endpoint()).await;
            wire.send(&bytes).await.unwrap();
            wire
        };
        assert!(wire.is_answered_within(PATIENCE).await, "{what}: no answer");
        assert_eq!(wire.seen().count(GOAWAY), 0, "{what}: the connection was closed");
    }
    host.is_well().await;
    host.stops().await;
}

/// Only what goes out is bounded by the client's window; so what comes in must be, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_sends_without_being_read_is_held_back() {
    let mut host = Host::plain().await;
    let create = pb::WatchRequest {
        request_union: Some(pb::watch_request::RequestUnion::CreateRequest(
            pb::WatchCreateRequest { key: b"k".to_vec().into(), ..Default::default() },
        )),
    };
    let create = create.encode_to_vec();
    let mut wire = Wire::deaf(host.endpoint()).await;
    wire.send(&call(1, WATCH)).await.unwrap();
    // More than a window of requests, each of which costs an answer.
    wire.flood(100_000, |_| message(1, 0, &create)).await;
    host.is_well().await;
    drop(wire);
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_http2_gets_no_further() {
    let mut host = Host::plain().await;
    let request = b"GET /health HTTP/1.1\r\nHost: x\r\n";
    // Half a request each, for as long as the server puts up with it.
    let mut half = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(&host.endpoint().address).await.unwrap();
        stream.write_all(request).await.unwrap();
        half.push(stream);
    }
    for bytes in [
        b"PRI * HTTP/3.0\r\n\r\n".to_vec(),
        b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
        [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 2 << 20]].concat(),
        [b"GET /".to_vec(), vec![b'x'; 2 << 20]].concat(),
        b"GET http://[ HTTP/9.9\r\n\r\n".to_vec(),
    ] {
        let mut stream = TcpStream::connect(&host.endpoint().address).await.unwrap();
        drop(timeout(PATIENCE, stream.write_all(&bytes)).await.expect("read or refused"));
        let mut answer = Vec::new();
        drop(
            timeout(PATIENCE, stream.read_to_end(&mut answer))
                .await
                .unwrap_or_else(|_| panic!("no end after {}", bytes[..20].escape_ascii())),
        );
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", answer.escape_ascii());
    }
    host.is_well().await;
    drop(half);
    host.stops().await;
}

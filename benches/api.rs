//! What the whole path costs: put, range and watch through gRPC, against the real program.
//!
//! With a real etcd unpacked by `.ci/setup`, both are measured in turn, in one run, and the ratio is what counts: absolute
//! figures belong to the machine. `BENCH_SECONDS` (default 3) is the length of each measurement; the data lies in the system's
//! temporary directory, so point `TMPDIR` at the card.
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "a bench prints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the bench")]
#![allow(clippy::let_underscore_must_use, reason = "the shared test support drops what is gone")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::proto::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::watch_client::WatchClient;
use support::{Endpoint, Options, etcd, ours};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

const CLIENTS: [usize; 4] = [1, 16, 64, 256];
const CONNECTIONS: usize = 8;
const KEYS: u64 = 10_000;
const VALUE_BYTES: usize = 256;
const WATCHERS: usize = 1_000;
const WATCHED_PUTS: usize = 200;

/// One line of the table.
struct Figure {
    name: String,
    per_second: f64,
    p99: Duration,
}

fn main() {
    // `cargo test --benches` only wants to know that it builds.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let seconds = std::env::var("BENCH_SECONDS").ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(3));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();

    let ours = ours::Ours::start(&Options::default());
    let mine = runtime.block_on(measure(ours.endpoint(), time));
    drop(ours);
    let Some(release) = etcd::Release::newest() else {
        println!("no etcd below target/etcd to compare with; `.ci/setup` gets one");
        print_table(&mine, None);
        return;
    };
    let etcd = etcd::Etcd::start(&release, &Options::default());
    let theirs = runtime.block_on(measure(etcd.endpoint(), time));
    println!("compared with etcd {}", release.version());
    print_table(&mine, Some(&theirs));
}

fn print_table(mine: &[Figure], theirs: Option<&[Figure]>) {
    println!("{:24} {:>10} {:>10} {:>10} {:>10}", "", "ours/s", "p99 ms", "x etcd/s", "x p99");
    for (index, figure) in mine.iter().enumerate() {
        let Figure { name, per_second, p99 } = figure;
        let p99_ms = p99.as_secs_f64() * 1e3;
        print!("{name:24} {per_second:>10.0} {p99_ms:>10.2}");
        if let Some(other) = theirs.map(|theirs| &theirs[index]) {
            let rate = per_second / other.per_second;
            print!(" {rate:>10.2} {:>10.2}", p99.as_secs_f64() / other.p99.as_secs_f64());
        }
        println!();
    }
}

async fn channels(endpoint: &Endpoint) -> Vec<Channel> {
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        let channel = Channel::from_shared(endpoint.url()).unwrap();
        channels.push(channel.tcp_nodelay(true).connect().await.unwrap());
    }
    channels
}

fn key(number: u64) -> Bytes {
    format!("/bench/{:08}", number % KEYS).into()
}

fn put(number: u64) -> pb::PutRequest {
    let value = vec![(number % 251) as u8; VALUE_BYTES];
    pb::PutRequest { key: key(number), value: value.into(), ..Default::default() }
}

async fn measure(endpoint: &Endpoint, time: Duration) -> Vec<Figure> {
    let channels = channels(endpoint).await;
    let mut figures = Vec::new();
    for clients in CLIENTS {
        let figure = load(&channels, clients, time, |mut kv, number| async move {
            kv.put(put(number)).await.unwrap();
        });
        figures.push(figure.await.named(format!("put x{clients}")));
    }
    let get = load(&channels, 64, time, |mut kv, number| async move {
        kv.range(pb::RangeRequest { key: key(number), ..Default::default() }).await.unwrap();
    });
    figures.push(get.await.named("get x64".to_owned()));
    let list = load(&channels, 4, time, |mut kv, _| async move {
        let (key, range_end) = (Bytes::from_static(b"/bench/"), Bytes::from_static(b"/bench0"));
        let list = pb::RangeRequest { key, range_end, limit: 500, ..Default::default() };
        kv.range(list).await.unwrap();
    });
    figures.push(list.await.named("list of 500 x4".to_owned()));
    figures.push(watch(&channels).await);
    figures
}

impl Figure {
    fn named(self, name: String) -> Self {
        Self { name, ..self }
    }

    fn of(mut latencies: Vec<Duration>, took: Duration) -> Self {
        latencies.sort();
        let p99 = latencies[(latencies.len() * 99 / 100).min(latencies.len() - 1)];
        let per_second = latencies.len() as f64 / took.as_secs_f64();
        Self { name: String::new(), per_second, p99 }
    }
}

/// So many clients, each with one request under way.
async fn load<F, R>(channels: &[Channel], clients: usize, time: Duration, request: F) -> Figure
where
    F: Fn(KvClient<Channel>, u64) -> R + Clone + Send + 'static,
    R: Future<Output = ()> + Send,
{
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let kv = KvClient::new(channels[client % channels.len()].clone());
        let request = request.clone();
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            let mut number = client as u64 * 7_919;
            while start.elapsed() < time {
                let began = Instant::now();
                request(kv.clone(), number).await;
                latencies.push(began.elapsed());
                number += 1;
            }
            latencies
        });
    }
    let latencies = tasks.join_all().await.concat();
    Figure::of(latencies, start.elapsed())
}

/// Many watchers of one prefix on a few streams: how fast events reach all of them.
async fn watch(channels: &[Channel]) -> Figure {
    let mut streams = Vec::new();
    for channel in channels {
        let (requests, receiver) = tokio::sync::mpsc::channel(WATCHERS);
        for _ in 0..WATCHERS / channels.len() {
            let create = pb::WatchCreateRequest {
                key: Bytes::from_static(b"/watched/"),
                range_end: Bytes::from_static(b"/watched0"),
                ..Default::default()
            };
            let create = pb::watch_request::RequestUnion::CreateRequest(create);
            requests.send(pb::WatchRequest { request_union: Some(create) }).await.unwrap();
        }
        let mut client = WatchClient::new(channel.clone());
        let mut answers = client.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        for _ in 0..WATCHERS / channels.len() {
            assert!(answers.message().await.unwrap().unwrap().created);
        }
        streams.push((requests, answers));
    }
    let start = Instant::now();
    let mut readers = JoinSet::new();
    for (requests, mut answers) in streams {
        readers.spawn(async move {
            let mut events = 0;
            while events < WATCHED_PUTS * (WATCHERS / CONNECTIONS) {
                events += answers.message().await.unwrap().unwrap().events.len();
            }
            drop(requests);
            events
        });
    }
    let mut kv = KvClient::new(channels[0].clone());
    let mut latencies = Vec::new();
    for number in 0..WATCHED_PUTS {
        let began = Instant::now();
        let request = pb::PutRequest { key: format!("/watched/{number}").into(), ..put(0) };
        kv.put(request).await.unwrap();
        latencies.push(began.elapsed());
    }
    let events: usize = readers.join_all().await.into_iter().sum();
    let figure = Figure::of(latencies, start.elapsed());
    let per_second = events as f64 / start.elapsed().as_secs_f64();
    Figure { name: format!("events to {WATCHERS} watchers"), per_second, ..figure }
}

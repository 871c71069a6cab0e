//! Strangers in great number at all doors of three servers, which go on serving those who belong there.
//!
//! The servers have 1,024 file descriptors each, as a service has that nobody configured.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use k3s_server::pki;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::Channel;

use crate::client;
use crate::servers::{LONG, Servers, serves};
use crate::support::{Endpoint, skip};
use crate::wire::{
    CONTINUATION, END_HEADERS, HEADERS, RST_STREAM, Wire, block, call, call_headers, frame, stream,
};

/// What the servers are started with.
const FEW_DESCRIPTORS: &str = "ulimit -n 1024";

/// Connections that are held open and do nothing, or next to nothing.
const IDLE: usize = 5_000;

/// How long a client waits for an answer at the very most: Kubernetes gives a lease renewal ten seconds.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long the strangers are at it.
const SIEGE: Duration = Duration::from_secs(8);

fn has_room() -> bool {
    const OTHERS: u64 = 1_000;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = (IDLE as u64 + OTHERS).max(soft).min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).unwrap();
    IDLE as u64 + OTHERS <= wanted
}

/// What strangers did.
#[derive(Default)]
struct Counts {
    opened: AtomicU64,
    closed: AtomicU64,
    handshakes: AtomicU64,
    floods: AtomicU64,
}

/// Strangers at work. Dropped, they go home.
struct Siege {
    doors: Arc<Vec<SocketAddr>>,
    counts: Arc<Counts>,
    over: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Drop for Siege {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
    }
}

impl Siege {
    /// Of every door of every server.
    fn of(servers: &Servers) -> Self {
        let doors = servers
            .all
            .iter()
            .flat_map(|server| [2379, 2380, 2381].map(|port| server.door(port).parse().unwrap()));
        Self {
            doors: Arc::new(doors.collect()),
            counts: Arc::default(),
            over: Arc::default(),
            tasks: JoinSet::new(),
        }
    }

    fn doors(&self, ports: &[u16]) -> Vec<SocketAddr> {
        self.doors.iter().copied().filter(|door| ports.contains(&door.port())).collect()
    }

    /// Keeps connections open on which nothing comes, or only the beginning of something.
    fn idle(&mut self, connections: usize) {
        let doors = self.doors(&[2379, 2380, 2381]);
        let each = connections.div_ceil(doors.len());
        for door in doors {
            let (counts, over) = (Arc::clone(&self.counts), Arc::clone(&self.over));
            self.tasks.spawn(keep_open(door, each, counts, over));
        }
    }

    /// Shakes hands without a certificate, again and again.
    fn handshakes(&mut self, callers: usize) {
        let doors = self.doors(&[2379, 2380]);
        for number in 0..callers {
            let door = doors[number % doors.len()];
            let (counts, over) = (Arc::clone(&self.counts), Arc::clone(&self.over));
            self.tasks.spawn(async move {
                let config = stranger("h2");
                while !over.load(Relaxed) {
                    match timeout(ANSWER_MAX, shake_hands(door, &config)).await {
                        Ok(true) => drop(counts.handshakes.fetch_add(1, Relaxed)),
                        // It is gone, or full; no use in asking at once.
                        Ok(false) | Err(_) => tokio::time::sleep(PAUSE).await,
                    }
                }
            });
        }
    }

    /// Abuses HTTP/2 where a stranger may speak it: at the doors for newcomers, one caller a kind and door.
    fn frames(&mut self) {
        for door in self.doors(&[2380]) {
            for abuse in [Abuse::Resets, Abuse::Continuations, Abuse::SlowHeaders] {
                let (counts, over) = (Arc::clone(&self.counts), Arc::clone(&self.over));
                self.tasks.spawn(async move {
                    while !over.load(Relaxed) {
                        match abuse.of(door).await {
                            Some(()) => drop(counts.floods.fetch_add(1, Relaxed)),
                            None => tokio::time::sleep(PAUSE).await,
                        }
                    }
                });
            }
        }
    }

    async fn end(mut self) {
        self.over.store(true, Relaxed);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        timeout(LONG, ended).await.expect("strangers go home");
        let Counts { opened, closed, handshakes, floods } = &*self.counts;
        println!(
            "{opened:?} connections, {closed:?} of them closed by servers; {handshakes:?} handshakes, {floods:?} floods of frames"
        );
    }
}

const PAUSE: Duration = Duration::from_millis(50);

/// Beginnings of things that never go on.
const BEGINNINGS: [&[u8]; 4] = [
    b"",
    b"\x16",
    // Half a greeting of TLS.
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ",
];

async fn keep_open(door: SocketAddr, count: usize, counts: Arc<Counts>, over: Arc<AtomicBool>) {
    let mut open: Vec<TcpStream> = Vec::new();
    let mut number = 0;
    while !over.load(Relaxed) {
        let before = open.len();
        open.retain(|stream| {
            let mut byte = [0; 64];
            matches!(stream.try_read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
        });
        counts.closed.fetch_add((before - open.len()) as u64, Relaxed);
        while open.len() < count && !over.load(Relaxed) {
            let Ok(Ok(stream)) = timeout(ANSWER_MAX, TcpStream::connect(door)).await else { break };
            drop(stream.try_write(BEGINNINGS[number % BEGINNINGS.len()]));
            number += 1;
            counts.opened.fetch_add(1, Relaxed);
            open.push(stream);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn stranger(protocol: &str) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(&pki::call_stranger().unwrap());
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    Arc::new(config)
}

/// Whether there was a handshake.
async fn shake_hands(door: SocketAddr, config: &Arc<ClientConfig>) -> bool {
    let Ok(stream) = TcpStream::connect(door).await else { return false };
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let Ok(mut stream) = TlsConnector::from(Arc::clone(config)).connect(name, stream).await else {
        return false;
    };
    // The end of it, with the server's opinion.
    drop(stream.read(&mut [0; 16]).await);
    true
}

/// What can be done to HTTP/2.
#[derive(Clone, Copy)]
enum Abuse {
    Resets,
    Continuations,
    SlowHeaders,
}

impl Abuse {
    /// Nothing if the door was shut.
    async fn of(self, door: SocketAddr) -> Option<()> {
        const BEGIN: &str = "/node.Join/Begin";
        const FRAMES: u32 = 20_000;
        let connecting = async {
            let stream = TcpStream::connect(door).await.ok()?;
            let name = ServerName::try_from("127.0.0.1").unwrap();
            TlsConnector::from(stranger("k3s-join")).connect(name, stream).await.ok()
        };
        let connection = timeout(ANSWER_MAX, connecting).await.ok()??;
        let mut wire = Wire::over(Box::new(connection)).await.ok()?;
        let first = frame(HEADERS, 0, 1, &block(call_headers(BEGIN)));
        match self {
            Self::Resets => {
                let cancel = 8_u32.to_be_bytes();
                let one = |number| {
                    let id = stream(number);
                    [call(id, BEGIN), frame(RST_STREAM, 0, id, &cancel)].concat()
                };
                wire.flood(FRAMES, one).await;
            }
            Self::Continuations => {
                wire.send(&first).await.ok()?;
                wire.flood(FRAMES, |_| frame(CONTINUATION, 0, 1, &block([("x", "y")]))).await;
            }
            Self::SlowHeaders => {
                wire.send(&first).await.ok()?;
                tokio::time::sleep(Duration::from_secs(2)).await;
                wire.send(&frame(CONTINUATION, END_HEADERS, 1, b"")).await.ok()?;
            }
        }
        Some(())
    }
}

/// How long good clients waited.
#[derive(Default)]
struct Waits(Vec<Duration>);

impl Waits {
    fn add(&mut self, began: Instant) {
        self.0.push(began.elapsed());
    }

    fn say(mut self, who: &str) {
        self.0.sort_unstable();
        let at = |percent: usize| self.0[(self.0.len() - 1) * percent / 100];
        println!(
            "{who}: {} answers, half of them within {:?}, 99 in 100 within {:?}, all within {:?}",
            self.0.len(),
            at(50),
            at(99),
            at(100)
        );
    }
}

/// A write and a read, in time.
async fn is_served(channel: Channel, name: &str) {
    let served = timeout(ANSWER_MAX, serves(channel, name)).await;
    served.unwrap_or_else(|_| panic!("{name}: no answer")).unwrap();
}

/// Clients that were there before, one at each server: none of their calls may fail.
async fn old_clients(channels: Vec<Channel>, until: Instant) -> Waits {
    let mut waits = Waits::default();
    while Instant::now() < until {
        for channel in &channels {
            let began = Instant::now();
            is_served(channel.clone(), "an old client").await;
            waits.add(began);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    waits
}

/// Clients that come now. A connection may fail, as it may at any full door; a client tries again, and is served soon.
async fn new_clients(endpoints: Vec<Endpoint>, until: Instant) -> (Waits, u32) {
    let (mut waits, mut failures) = (Waits::default(), 0);
    while Instant::now() < until {
        for endpoint in &endpoints {
            let began = Instant::now();
            loop {
                let served = async {
                    let channel = client::channel(endpoint).await.ok()?;
                    serves(channel, "a new client").await.ok()
                };
                if let Ok(Some(())) = timeout(ANSWER_MAX, served).await {
                    break;
                }
                failures += 1;
                assert!(began.elapsed() < ANSWER_MAX, "a new client is not let in");
            }
            waits.add(began);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    (waits, failures)
}

/// Leader and term, as every server sees them: all agree.
async fn leadership(servers: &Servers) -> (u64, u64) {
    let mut seen = Vec::new();
    for server in servers.all.iter().filter(|server| server.runs()) {
        let status = server.status().await;
        seen.push((status.leader, status.raft_term));
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:?}");
    seen[0]
}

async fn all_are_served(servers: &Servers, siege: Siege) {
    let before = leadership(servers).await;
    let mut channels = Vec::new();
    for server in &servers.all {
        channels.push(server.channel().await);
    }
    let endpoints = servers.all.iter().map(|server| server.endpoint()).collect();
    let until = Instant::now() + SIEGE;

    let (old, (new, failures)) =
        tokio::join!(old_clients(channels, until), new_clients(endpoints, until));

    old.say("clients that were there");
    new.say("clients that came");
    println!("{failures} attempts of clients that came failed");
    assert_eq!(leadership(servers).await, before, "the leader did not keep its place");
    siege.end().await;
    for server in &servers.all {
        println!("{}: {:?}", server.name, server.usage());
        assert!(!server.printed().contains("panicked"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_by_the_thousand_stop_nobody() {
    if !has_room() {
        return skip("6,000 file descriptors for 5,000 idle connections");
    }
    let servers = Servers::three(FEW_DESCRIPTORS);
    let mut siege = Siege::of(&servers);
    siege.idle(IDLE);
    all_are_served(&servers, siege).await;
    servers.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_handshakes_and_frames_stop_nobody_and_no_election() {
    if !has_room() {
        return skip("6,000 file descriptors for 5,000 idle connections");
    }
    let mut servers = Servers::three(FEW_DESCRIPTORS);
    let mut siege = Siege::of(&servers);
    siege.idle(1_000);
    siege.handshakes(24);
    siege.frames();
    all_are_served(&servers, siege).await;

    // The same again, and the leader is gone.
    let mut siege = Siege::of(&servers);
    siege.idle(1_000);
    siege.handshakes(24);
    siege.frames();
    let (leader, term) = leadership(&servers).await;
    let mut ids = Vec::new();
    for server in &servers.all {
        ids.push(server.status().await.header.unwrap().member_id);
    }
    let at = ids.iter().position(|id| *id == leader).unwrap();
    let others: Vec<_> = (0..3).filter(|one| *one != at).collect();
    let channel = servers.all[others[0]].channel().await;
    servers.all[at].kill();
    let began = Instant::now();
    loop {
        if let Ok(Ok(())) = timeout(ANSWER_MAX, serves(channel.clone(), "without it")).await {
            break;
        }
        assert!(began.elapsed() < LONG, "nobody leads");
    }
    println!("served again {:?} after the leader was killed", began.elapsed());
    let (new, later) = leadership(&servers).await;
    assert!(new != leader && term < later, "term {later} after {term}, leader {new:x}");
    siege.end().await;
    servers.stop();
}

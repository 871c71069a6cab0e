//! Connections that do nothing, or next to nothing, in great number.

use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::client;
use crate::host::Host;
use crate::support::Endpoint;

/// The server gives a handshake 5 seconds.
const HANDSHAKE_MAX: Duration = Duration::from_secs(20);

/// More than any cluster has, less than the server's own limit.
const IDLE: usize = 1_200;

/// Makes room for sockets, as far as the machine allows; how many connections fit.
fn room_for(connections: usize) -> usize {
    const OTHERS: u64 = 200;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = (connections as u64 + OTHERS).max(soft).min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).unwrap();
    connections.min(usize::try_from(wanted - OTHERS).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_never_end_delay_nobody_and_are_given_up() {
    let mut host = Host::with_tls().await;
    let beginnings: [&[u8]; 3] = [&[], &[22], &[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]];
    let started = Instant::now();
    let mut slow = Vec::new();
    for number in 0..300 {
        let mut stream = TcpStream::connect(&host.endpoint().address).await.unwrap();
        stream.write_all(beginnings[number % beginnings.len()]).await.unwrap();
        slow.push(stream);
    }

    host.is_well().await;
    // A newcomer is served too, while the slow ones still hold their places.
    let newcomer = client::channel(host.endpoint()).await.unwrap();
    let health = client::call(&newcomer, "/grpc.health.v1.Health/Check", bytes::Bytes::new());
    timeout(Duration::from_secs(3), health).await.expect("in time").expect("a healthy server");
    println!("served beside 300 open handshakes after {:?}", started.elapsed());

    for mut stream in slow {
        let mut answer = Vec::new();
        let ended = timeout(HANDSHAKE_MAX, stream.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "a handshake of {:?} is still waited for", started.elapsed());
    }
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_idle_connections_disturb_nobody() {
    let mut host = Host::with_tls().await;
    let (calm, count) = (host.rss_mib(), room_for(IDLE));
    let mut connections = connect(host.endpoint(), count).await;
    println!("{} idle connections: {} MiB more", connections.len(), host.rss_mib() - calm);

    host.is_well().await;

    // They were not dropped behind our back: a few of them, picked from all over, still speak HTTP/2.
    for stream in connections.iter_mut().step_by(97) {
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let mut header = [0; 9];
        timeout(Duration::from_secs(10), stream.read_exact(&mut header)).await.unwrap().unwrap();
        assert_eq!(header[3], crate::wire::SETTINGS);
    }
    drop(connections);
    host.is_well().await;
    host.stops().await;
}

async fn connect(endpoint: &Endpoint, count: usize) -> Vec<Box<dyn client::Stream>> {
    const AT_ONCE: usize = 32;
    let (mut dialing, mut connected) = (JoinSet::new(), Vec::new());
    for _ in 0..count {
        if dialing.len() == AT_ONCE {
            connected.push(dialing.join_next().await.unwrap().unwrap());
        }
        let endpoint = endpoint.clone();
        dialing.spawn(async move { client::dial_endpoint(&endpoint).await.unwrap() });
    }
    connected.extend(dialing.join_all().await);
    connected
}

/// Beyond the limit newcomers are turned away at once, and there is room again when somebody leaves.
#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_are_refused_and_nobody_else_suffers() {
    const LIMIT: usize = 2_048;
    let mut host = Host::plain().await;
    if room_for(LIMIT + 64) < LIMIT + 64 {
        return eprintln!("skipped: too few file descriptors for 2,112 connections");
    }
    let mut open = Vec::new();
    let mut refused = 0;
    for _ in 0..LIMIT + 64 {
        let Ok(mut stream) = TcpStream::connect(&host.endpoint().address).await else {
            refused += 1;
            continue;
        };
        // Whoever is let in hears nothing; whoever is not hears the end.
        let mut byte = [0];
        if LIMIT - 8 < open.len()
            && let Ok(Ok(0) | Err(_)) =
                timeout(Duration::from_millis(500), stream.read(&mut byte)).await
        {
            refused += 1;
            if 3 <= refused {
                break;
            }
            continue;
        }
        open.push(stream);
    }
    assert!(3 <= refused, "{} connections were let in", open.len());

    // The well-behaved client was there before.
    host.is_well().await;
    drop(open);
    host.is_well().await;
    let newcomer = async {
        while client::channel(host.endpoint()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), newcomer).await.expect("room for a newcomer");
    host.stops().await;
}

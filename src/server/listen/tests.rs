//! Listeners on loopback, with real sockets and real handshakes.

use std::process::Command;
use std::time::SystemTime;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt;

use super::*;
use crate::env::host;
use crate::metrics::{Metrics, Versions};
use crate::observe::grpc::CountCalls;
use crate::pki::{Names, Owner, Pki, Port, Role};
use crate::types::{ClusterId, NodeId};

const CAPS: Caps = Caps {
    total: 100,
    per_address: 100,
    handshakes: 100,
    handshakes_per_address: 100,
    yields_after: None,
};

fn metrics() -> Metrics {
    let versions = Versions { server: "3.6.5", cluster: "3.6", daemon: "0.1.0" };
    Metrics::new(versions, SystemTime::UNIX_EPOCH)
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

async fn listen(security: Security, caps: Caps, metrics: &Metrics) -> (SocketAddr, Incoming) {
    let listeners = Listeners::bind(&[loopback()], security, "the test").await.unwrap();
    let address = listeners.addresses().unwrap()[0];
    (address, listeners.accept(caps, metrics.connections.clone()))
}

async fn pki() -> (tempfile::TempDir, Pki) {
    let dir = tempfile::tempdir().unwrap();
    let owner = Owner { cluster: ClusterId::new(0xc1), node: NodeId::new(0xab) };
    let tls = dir.path().join("tls");
    let (pki, _) = Pki::establish(&host::env(), &tls, owner, &Names::loopback()).await.unwrap();
    (dir, pki)
}

/// Whether the other end has closed: it sends nothing else.
async fn is_closed(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 1]).await, Ok(0) | Err(_))
}

#[tokio::test]
async fn plain_tcp_is_refused_where_others_could_reach_it() {
    let exposed: SocketAddr = "0.0.0.0:0".parse().unwrap();
    let error =
        Listeners::bind(&[loopback(), exposed], Security::PlainLoopback, "the etcd API").await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "the etcd API without TLS is for loopback only: found 0.0.0.0:0, expected 127.0.0.1 or [::1]"
    );
}

#[tokio::test]
async fn port_in_use_names_address_and_holder() {
    let (address, _incoming) = listen(Security::PlainLoopback, CAPS, &metrics()).await;
    let error = Listeners::bind(&[address], Security::PlainLoopback, "the etcd API").await;
    let error = error.unwrap_err();
    let text = error.to_string();
    let expected = format!("the etcd API cannot listen on {address}: the port is in use by `");
    assert!(text.starts_with(&expected), "{text}");
    assert!(text.ends_with(&format!("(process {})", std::process::id())), "{text}");
    assert!(error.remedy().contains(&address.port().to_string()));
}

#[tokio::test]
async fn address_of_another_machine_is_named() {
    let foreign: SocketAddr = "192.0.2.1:2379".parse().unwrap();
    let error = Listeners::bind(&[foreign], Security::PlainReadOnly, "metrics").await.unwrap_err();
    assert!(matches!(error, ListenError::NoSuchAddress { .. }), "{error}");
}

#[tokio::test]
async fn tls_connection_carries_the_identity_of_its_certificate() {
    let (_dir, pki) = pki().await;
    let metrics = metrics();
    let security = Security::Tls(pki.accept(Port::Clients).unwrap());
    let (address, mut incoming) = listen(security, CAPS, &metrics).await;
    let connector = TlsConnector::from(pki.call_server().unwrap());
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();

    let (client, accepted) = tokio::join!(connector.connect(name, stream), incoming.next());
    let (mut client, mut server) = (client.unwrap(), accepted.unwrap().unwrap());
    assert_eq!(server.info().identity, Some(pki.identity(Role::Client)));
    assert_eq!(server.info().local, address);

    client.write_all(b"ping").await.unwrap();
    client.flush().await.unwrap();
    let mut buffer = [0; 4];
    server.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"ping");
    assert_eq!(metrics.connections.open.get(), 1);
    drop(server);
    assert_eq!(metrics.connections.open.get(), 0);
}

/// With the clock paused, tokio moves it whenever all tasks wait: the five seconds take no time.
#[tokio::test(start_paused = true)]
async fn stalled_handshake_is_cut_off_after_five_seconds() {
    let (_dir, pki) = pki().await;
    let metrics = metrics();
    let security = Security::Tls(pki.accept(Port::Clients).unwrap());
    let (address, _incoming) = listen(security, CAPS, &metrics).await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    let started = tokio::time::Instant::now();
    assert!(is_closed(&mut silent).await);
    assert!(started.elapsed() >= HANDSHAKE_TIMEOUT);
    assert_eq!(metrics.connections.handshakes_failed.get(), 1);
    assert_eq!(metrics.connections.accepted.get(), 0);
}

#[tokio::test]
async fn clients_that_stall_in_the_handshake_delay_nobody() {
    let (_dir, pki) = pki().await;
    let security = Security::Tls(pki.accept(Port::Clients).unwrap());
    let (address, mut incoming) = listen(security, CAPS, &metrics()).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let connector = TlsConnector::from(pki.call_server().unwrap());
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let (client, accepted) = tokio::join!(connector.connect(name, stream), incoming.next());
    assert!(client.is_ok() && accepted.unwrap().is_ok());
}

#[tokio::test]
async fn connections_above_the_cap_are_closed_and_places_come_back() {
    let metrics = metrics();
    let caps = Caps { total: 2, ..CAPS };
    let (address, mut incoming) = listen(Security::PlainLoopback, caps, &metrics).await;
    let mut clients = Vec::new();
    let mut servers = Vec::new();
    for _ in 0..2 {
        clients.push(TcpStream::connect(address).await.unwrap());
        servers.push(incoming.next().await.unwrap().unwrap());
    }
    let mut third = TcpStream::connect(address).await.unwrap();
    assert!(is_closed(&mut third).await);
    assert_eq!(metrics.connections.refused.get(), 1);

    servers.pop();
    let _fourth = TcpStream::connect(address).await.unwrap();
    assert!(incoming.next().await.unwrap().is_ok());
}

#[tokio::test]
async fn dropping_the_stream_closes_the_port_and_keeps_established_connections() {
    let (address, mut incoming) = listen(Security::PlainLoopback, CAPS, &metrics()).await;
    let mut client = TcpStream::connect(address).await.unwrap();
    let mut server = incoming.next().await.unwrap().unwrap();
    drop(incoming);
    // The accept loop ends at the next turn of the runtime.
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    server.write_all(b"still here").await.unwrap();
    drop(server);
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "still here");
}

#[test]
fn only_errors_of_one_connection_go_on_at_once() {
    let of = |errno: Errno| after(&io::Error::from_raw_os_error(errno as i32));
    assert_eq!(of(Errno::ECONNABORTED), AfterError::Next);
    assert_eq!(of(Errno::EMFILE), AfterError::Pause);
    assert_eq!(of(Errno::ENFILE), AfterError::Pause);
    assert_eq!(of(Errno::ENOMEM), AfterError::Pause);
    assert_eq!(after(&io::Error::other("anything else")), AfterError::Pause);
}

/// Runs itself again in a process with few file descriptors, so that other tests keep theirs.
#[test]
fn listener_survives_running_out_of_descriptors() {
    const INSIDE: &str = "K3S_SERVER_TEST_FEW_DESCRIPTORS";
    const NAME: &str = "server::listen::tests::listener_survives_running_out_of_descriptors";
    if std::env::var_os(INSIDE).is_some() {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(exhaust_descriptors());
        return;
    }
    let output = Command::new("sh")
        .args(["-c", "ulimit -n 48 && exec \"$0\" --exact --nocapture --test-threads=1 \"$1\""])
        .arg(std::env::current_exe().unwrap())
        .arg(NAME)
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

async fn exhaust_descriptors() {
    let (address, mut incoming) = listen(Security::PlainLoopback, CAPS, &metrics()).await;
    let mut held = Vec::new();
    let mut servers = Vec::new();
    // The client's ends are in this process too, so both run out together.
    while let Ok(client) = TcpStream::connect(address).await {
        held.push(client);
        let next = tokio::time::timeout(Duration::from_millis(100), incoming.next()).await;
        match next {
            Ok(server) => servers.push(server.unwrap().unwrap()),
            Err(_) => break,
        }
    }
    assert!(10 < held.len(), "only {} connections", held.len());

    held.clear();
    servers.clear();
    let client = TcpStream::connect(address).await.unwrap();
    let local = client.local_addr().unwrap();
    // Connections that were waiting in the kernel's queue may come first.
    while incoming.next().await.unwrap().unwrap().info().remote != local {}
}

/// The whole way of a call: TLS, caps, call counters, a tonic service, and back.
#[tokio::test]
async fn grpc_calls_through_the_listener_are_counted() {
    let metrics = metrics();
    let (address, incoming) = listen(Security::PlainLoopback, CAPS, &metrics).await;
    let (_reporter, health) = tonic_health::server::health_reporter();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let routes = tonic::service::Routes::new(health).into_axum_router();
    let server = tonic::transport::Server::builder()
        .add_routes(routes.layer(CountCalls::new(&metrics)).into())
        .serve_with_incoming_shutdown(incoming, async { stopped.await.unwrap() });
    let server = tokio::spawn(server);

    let channel = tonic::transport::Channel::from_shared(format!("http://{address}"))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let request =
        |service: &str| tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
    client.check(request("")).await.unwrap();
    client.check(request("unknown")).await.unwrap_err();
    let mut watch = client.watch(request("")).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    drop(watch);
    drop(client);
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();

    let page = metrics.text();
    let check = "{grpc_type=\"unary\",grpc_service=\"grpc.health.v1.Health\",grpc_method=\"Check\"";
    let watch =
        "{grpc_type=\"server_stream\",grpc_service=\"grpc.health.v1.Health\",grpc_method=\"Watch\"";
    for line in [
        format!("grpc_server_started_total{check}}} 2"),
        format!("grpc_server_handled_total{check},grpc_code=\"OK\"}} 1"),
        format!("grpc_server_handled_total{check},grpc_code=\"NotFound\"}} 1"),
        format!("grpc_server_msg_received_total{check}}} 2"),
        format!("grpc_server_msg_sent_total{check}}} 1"),
        format!("grpc_server_handling_seconds_count{check}}} 2"),
        format!("grpc_server_msg_sent_total{watch}}} 1"),
        format!("grpc_server_handled_total{watch},grpc_code=\"Canceled\"}} 1"),
        "k3s_server_connections_accepted_total 1".to_owned(),
        "k3s_server_connections_open 0".to_owned(),
    ] {
        assert!(page.contains(&line), "`{line}` is missing from:\n{page}");
    }
    assert!(!page.contains("etcd_network_client_grpc_received_bytes_total 0"));
}

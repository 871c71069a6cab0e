//! Every RPC at every door with every kind of credentials: only the right ones are heard, and only what belongs behind that door
//! is there.
//!
//! The RPCs come from the compiled protocol, so that a new one is in the table before anybody thinks of it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use k3s_server::proto::DESCRIPTORS;
use prost::Message;
use prost_types::FileDescriptorSet;
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::client;
use crate::servers::{LONG, Servers, serves};
use crate::shown::all_kinds;
use crate::support::TlsFiles;
use crate::support::certificates::{Shown, from_files};
use crate::wire::{END_STREAM, SETTINGS, call, frame, message};

const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;

/// Longest wait for an answer that may never come.
const PATIENCE: Duration = Duration::from_secs(3);

const PEER_SERVICE: &str = "/node.Peers/";
const JOIN_SERVICE: &str = "/node.Join/";

/// The path of every RPC there is, those of the helpers of gRPC included.
pub fn every_rpc() -> Vec<String> {
    let sets = [
        DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let mut paths = Vec::new();
    for set in sets {
        for file in FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                for method in &service.method {
                    paths.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
    }
    for known in ["/etcdserverpb.KV/Put", "/node.Peers/Stream", "/node.Join/Finish"] {
        assert!(paths.iter().any(|path| path == known), "{known} is missing in {paths:?}");
    }
    paths
}

/// A call of HTTP/2, from the first byte on.
fn whole_call(path: &str) -> Vec<u8> {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice();
    [preface, &frame(SETTINGS, 0, 0, &[]), &call(1, path), &message(1, END_STREAM, b"")].concat()
}

/// What a server says, inside of TLS, to somebody who calls; nothing if it hangs up.
async fn heard(address: &str, config: Arc<ClientConfig>, path: &str) -> Vec<u8> {
    let Ok(mut stream) = client::dial(address, Some(config)).await else { return Vec::new() };
    // It may have hung up already.
    drop(stream.write_all(&whole_call(path)).await);
    drop(stream.flush().await);
    let mut answer = vec![0; 4_096];
    let read = timeout(LONG, stream.read(&mut answer)).await;
    let count = read.expect("it answers or hangs up").unwrap_or(0);
    answer.truncate(count);
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn no_rpc_is_heard_without_the_right_certificate() {
    let servers = Servers::one();
    let server = &servers.all[0];
    let kinds = all_kinds(&server.tls_dir());
    let paths = every_rpc();
    let at_once = Arc::new(Semaphore::new(16));
    let mut calls = JoinSet::new();
    for kind in &kinds {
        for port in [CLIENTS, PEERS] {
            for path in &paths {
                let (address, config, path) =
                    (server.door(port), kind.config.clone(), path.clone());
                let (what, opens, at_once) = (kind.what, kind.opens == Some(port), at_once.clone());
                calls.spawn(async move {
                    let _turn = at_once.acquire().await.unwrap();
                    let answer = heard(&address, config, &path).await;
                    assert_eq!(
                        !answer.is_empty(),
                        opens,
                        "{path} on {port} with {what}: {}",
                        answer.escape_ascii()
                    );
                });
            }
        }
    }
    let count = calls.join_all().await.len();
    println!("{count} calls: {} RPCs, 2 doors, {} kinds of credentials", paths.len(), kinds.len());
    assert_eq!(count, paths.len() * 2 * kinds.len());
    serves(server.channel().await, "after all").await.unwrap();
    servers.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_rpc_is_heard_without_tls_or_with_an_old_one() {
    let servers = Servers::one();
    let server = &servers.all[0];
    let files = server.endpoint().tls.unwrap();
    for port in [CLIENTS, PEERS] {
        for path in every_rpc() {
            let mut stream = TcpStream::connect(server.door(port)).await.unwrap();
            stream.write_all(&whole_call(&path)).await.unwrap();
            let mut answer = Vec::new();
            // An alert of TLS at most, then the end.
            let end = timeout(LONG, stream.read_to_end(&mut answer)).await;
            drop(end.expect("it hangs up"));
            assert!(answer.len() <= 7, "{path} on {port}: {}", answer.escape_ascii());
        }
    }
    let shown = from_files(&server.tls_dir(), "peer");
    let old = old_tls(&files, shown);
    assert!(heard(&server.door(PEERS), old, "/node.Peers/Call").await.is_empty(), "TLS 1.2");
    // Debian's tools may not speak a newer one to the client API; there it is not the version that keeps anybody out.
    let old = old_tls(&files, from_files(&server.tls_dir(), "client"));
    assert!(!heard(&server.door(CLIENTS), old, "/etcdserverpb.KV/Range").await.is_empty());
    assert!(heard(&server.door(CLIENTS), old_tls(&files, None), "/x/y").await.is_empty());
    servers.stop();
}

/// TLS 1.2 only.
fn old_tls(files: &TlsFiles, shown: Shown) -> Arc<ClientConfig> {
    let mut config = client::tls_with(files, None);
    if let Some((chain, key)) = shown {
        let provider = rustls::crypto::ring::default_provider();
        let certified = rustls::sign::CertifiedKey::from_der(chain, key, &provider).unwrap();
        config.client_auth_cert_resolver =
            Arc::new(rustls::sign::SingleCertAndKey::from(certified));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut old = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots(&files.ca))
        .with_no_client_auth();
    old.client_auth_cert_resolver = config.client_auth_cert_resolver;
    old.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(old)
}

fn roots(ca: &Path) -> rustls::RootCertStore {
    use rustls::pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls::pki_types::CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    roots
}

/// Whether a service answered, be it with a refusal: `false` says that there is no such RPC behind this door.
async fn is_there(channel: &Channel, path: &str) -> bool {
    loop {
        // Some wait for more, or for something to happen: these are there.
        let status = match timeout(PATIENCE, client::call(channel, path, Bytes::new())).await {
            Ok(Ok(_)) | Err(_) => return true,
            Ok(Err(status)) => status,
        };
        let failure = std::error::Error::source(&status).map(|source| format!("{source:?}"));
        let Some(failure) = failure else { return !is_unknown(&status) };
        // The door has a few places for calls, and the one of a call that has just ended may not be free yet.
        assert!(failure.contains("REFUSED_STREAM"), "{path}: the connection failed: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// gRPC says nothing more of a method that nobody has; etcd's door has words of its own for it.
fn is_unknown(status: &Status) -> bool {
    let text = status.message();
    status.code() == Code::Unimplemented && (text.is_empty() || text.starts_with("unknown "))
}

/// Which RPCs are behind a door, asked all at once.
async fn behind(address: &str, config: &ClientConfig) -> Vec<String> {
    let channel = client::channel_with(address, Some(config.clone())).await.unwrap();
    let mut asked = JoinSet::new();
    for path in every_rpc() {
        let channel = channel.clone();
        asked.spawn(async move { is_there(&channel, &path).await.then_some(path) });
    }
    let mut found: Vec<_> = asked.join_all().await.into_iter().flatten().collect();
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn each_door_leads_to_its_own_services_and_to_no_others() {
    let servers = Servers::one();
    let server = &servers.all[0];
    let tls = server.tls_dir();
    let files = server.endpoint().tls.unwrap();
    let expected = |belongs: &dyn Fn(&str) -> bool| {
        let mut paths = every_rpc();
        paths.retain(|path| belongs(path));
        paths.sort();
        paths
    };
    let peer = client::tls_with(&files, from_files(&tls, "peer"));
    let found = behind(&server.door(PEERS), &peer).await;
    assert_eq!(found, expected(&|path| path.starts_with(PEER_SERVICE)));

    // Whoever asks to join gets to the Join service, whatever else it asks for and whatever it shows.
    for protocols in [&["k3s-join"][..], &["k3s-join", "h2"], &["h2", "k3s-join"]] {
        for shown in [None, from_files(&tls, "peer"), from_files(&tls, "client")] {
            let mut config = client::tls_with(&files, shown);
            config.alpn_protocols =
                protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
            let found = behind(&server.door(PEERS), &config).await;
            assert_eq!(found, expected(&|path| path.starts_with(JOIN_SERVICE)), "{protocols:?}");
        }
    }
    // There is no such door for clients.
    for shown in [None, from_files(&tls, "client")] {
        let mut config = client::tls_with(&files, shown);
        config.alpn_protocols = vec![b"k3s-join".to_vec()];
        let config = Arc::new(config);
        for path in every_rpc() {
            assert!(heard(&server.door(CLIENTS), config.clone(), &path).await.is_empty());
        }
    }

    let client = client::tls_with(&files, from_files(&tls, "client"));
    let found = behind(&server.door(CLIENTS), &client).await;
    let inside = |path: &str| !path.starts_with(PEER_SERVICE) && !path.starts_with(JOIN_SERVICE);
    assert_eq!(found, expected(&inside));
    servers.stop();
}

//! Keys and certificates from the outside: every role at every door, every crash while founding, every clock.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use k3s_server::env::{BoxFuture, Clock, Disk, DiskFile, Entropy, Env, Open, host};
use k3s_server::pki::validity::{LEAF_LIFE, RELEASED};
use k3s_server::pki::{Due, Identity, Issued, Names, Owner, Paths, Pki, PkiError, Port, Role};
use k3s_server::types::{ClusterId, NodeId};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

const DAY: i64 = 24 * 60 * 60;
const OWNER: Owner = Owner { cluster: ClusterId::new(0xc1), node: NodeId::new(0xab) };

/// Monotonic time is tokio's; the wall shows what the test says.
#[derive(Debug)]
struct TestClock(AtomicI64);

impl Clock for TestClock {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn wall(&self) -> SystemTime {
        let seconds = self.0.load(Ordering::Relaxed);
        UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap())
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// A counter, so that runs are the same. Serial numbers need to differ, not to be secret.
#[derive(Debug, Default)]
struct TestEntropy(AtomicU64);

impl Entropy for TestEntropy {
    fn fill(&self, buffer: &mut [u8]) {
        for byte in buffer {
            let count = self.0.fetch_add(1, Ordering::Relaxed);
            *byte = u8::try_from(count * 167 % 251).unwrap();
        }
    }
}

fn env_at(wall: i64) -> (Env, Arc<TestClock>) {
    let clock = Arc::new(TestClock(AtomicI64::new(wall)));
    let env = Env {
        disk: Arc::new(host::HostDisk),
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
        entropy: Arc::new(TestEntropy::default()),
    };
    (env, clock)
}

/// A node on a real directory.
struct Node {
    dir: tempfile::TempDir,
    env: Env,
    clock: Arc<TestClock>,
    owner: Owner,
}

impl Node {
    fn new(owner: Owner, wall: i64) -> Self {
        let (env, clock) = env_at(wall);
        Self { dir: tempfile::tempdir().unwrap(), env, clock, owner }
    }

    /// Another node of the same cluster, with the authority handed to it.
    fn joined(first: &Self, node: u64, wall: i64) -> Self {
        let node = Self::new(Owner { node: NodeId::new(node), ..first.owner }, wall);
        fs::create_dir_all(node.tls()).unwrap();
        for file in ["ca.crt", "ca.key"] {
            fs::copy(first.tls().join(file), node.tls().join(file)).unwrap();
        }
        node
    }

    fn tls(&self) -> PathBuf {
        self.dir.path().join("tls")
    }

    async fn open(&self) -> Result<(Pki, Vec<Issued>), PkiError> {
        Pki::establish(&self.env, &self.tls(), self.owner, &Names::loopback()).await
    }

    async fn pki(&self) -> Pki {
        self.open().await.unwrap().0
    }
}

async fn founded() -> (Node, Pki) {
    let node = Node::new(OWNER, RELEASED + DAY);
    let pki = node.pki().await;
    (node, pki)
}

type Ends = (server::TlsStream<DuplexStream>, client::TlsStream<DuplexStream>);

/// A handshake in memory, with one byte each way: under TLS 1.3 a client learns only by reading that it was refused.
async fn handshake(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> Result<Ends, String> {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from("localhost").unwrap();
    let (accepted, connected) = tokio::join!(
        TlsAcceptor::from(server).accept(near),
        TlsConnector::from(client).connect(name, far)
    );
    let (mut accepted, mut connected) = match (accepted, connected) {
        (Ok(accepted), Ok(connected)) => (accepted, connected),
        // The side that refuses knows why; the other one only hears an alert.
        (Err(refused), Ok(mut connected)) => {
            assert!(connected.read_u8().await.is_err(), "refused, but the client did not notice");
            return Err(refused.to_string());
        }
        (Ok(_), Err(refused)) => return Err(refused.to_string()),
        (Err(server), Err(client)) => return Err(format!("{server} / {client}")),
    };
    talk(&mut accepted, &mut connected).await;
    Ok((accepted, connected))
}

async fn talk(
    server: &mut server::TlsStream<DuplexStream>,
    client: &mut client::TlsStream<DuplexStream>,
) {
    client.write_all(b"?").await.unwrap();
    client.flush().await.unwrap();
    assert_eq!(server.read_u8().await.unwrap(), b'?');
    server.write_all(b"!").await.unwrap();
    server.flush().await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');
}

fn caller(ends: &Ends) -> Identity {
    Identity::of(&ends.0.get_ref().1.peer_certificates().unwrap()[0]).unwrap()
}

fn callee(ends: &Ends) -> CertificateDer<'static> {
    ends.1.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

/// A client that presents this pair of files and trusts that authority, as etcdctl would: no check of ours in it.
fn foreign_client(authority: &Path, pair: Option<&Paths>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match pair {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let certificate = CertificateDer::from_pem_file(&pair.certificate).unwrap();
            let key = PrivateKeyDer::from_pem_file(&pair.key).unwrap();
            builder.with_client_auth_cert(vec![certificate], key).unwrap()
        }
    };
    Arc::new(config)
}

#[tokio::test]
async fn every_role_opens_its_own_door_and_no_other() {
    let (_node, pki) = founded().await;
    let authority = pki.paths(Role::Server).authority;
    for (port, allowed) in [(Port::Clients, Role::Client), (Port::Peers, Role::Peer)] {
        for role in Role::ALL {
            let client = foreign_client(&authority, Some(&pki.paths(role)));
            let result = handshake(pki.accept(port).unwrap(), client).await;
            if role == allowed {
                assert_eq!(caller(&result.unwrap()), pki.identity(role));
            } else {
                let error = result.err().unwrap_or_else(|| panic!("{role} got in at {port:?}"));
                let reason = match role {
                    // It cannot be a client at all; webpki says so before we look at the name.
                    Role::Server => "does not allow extended key usage for client authentication",
                    Role::Peer | Role::Client => "the certificate is k3s-server://c1/",
                };
                assert!(error.contains(reason), "{role} at {port:?}: {error}");
            }
        }
    }
}

#[tokio::test]
async fn nobody_gets_in_without_a_certificate() {
    let (_node, pki) = founded().await;
    for port in [Port::Clients, Port::Peers] {
        let client = foreign_client(&pki.paths(Role::Client).authority, None);
        let error = handshake(pki.accept(port).unwrap(), client).await.err().unwrap();
        assert!(error.contains("no certificates"), "{port:?}: {error}");
    }
}

/// Same cluster id, same node id, same names: only the authority's key differs.
#[tokio::test]
async fn certificates_of_another_authority_are_refused_in_both_directions() {
    let (_node, pki) = founded().await;
    let (_other_node, other) = founded().await;
    let authority = pki.paths(Role::Client).authority;
    for (port, role) in [(Port::Clients, Role::Client), (Port::Peers, Role::Peer)] {
        let client = foreign_client(&authority, Some(&other.paths(role)));
        let error = handshake(pki.accept(port).unwrap(), client).await.err().unwrap();
        assert!(error.contains("BadSignature") || error.contains("UnknownIssuer"), "{error}");
    }
    let error = handshake(other.accept(Port::Clients).unwrap(), pki.call_server().unwrap()).await;
    let error = error.err().unwrap();
    assert!(error.contains("BadSignature") || error.contains("UnknownIssuer"), "{error}");
}

#[tokio::test]
async fn expired_certificate_is_refused() {
    let old = Node::new(OWNER, RELEASED);
    let old_pki = old.pki().await;
    let later = RELEASED + LEAF_LIFE + DAY;
    let new = Node::joined(&old, 0xcd, later);
    let new_pki = new.pki().await;
    let client =
        foreign_client(&new_pki.paths(Role::Client).authority, Some(&old_pki.paths(Role::Client)));
    let error = handshake(new_pki.accept(Port::Clients).unwrap(), client).await.err().unwrap();
    assert!(error.contains("xpired"), "{error}");

    new.clock.0.store(RELEASED + LEAF_LIFE - DAY, Ordering::Relaxed);
    let client = old_pki.call_server().unwrap();
    handshake(new_pki.accept(Port::Clients).unwrap(), client).await.unwrap();
}

#[tokio::test]
async fn peers_are_recognised_by_their_node_id() {
    let (node, pki) = founded().await;
    let other = Node::joined(&node, 0xcd, RELEASED + DAY);
    let other_pki = other.pki().await;
    let ends = handshake(
        other_pki.accept(Port::Peers).unwrap(),
        pki.call_peer(NodeId::new(0xcd)).unwrap(),
    )
    .await
    .unwrap();
    assert_eq!(caller(&ends), pki.identity(Role::Peer));

    let wrong = pki.call_peer(NodeId::new(0xee)).unwrap();
    let error = handshake(other_pki.accept(Port::Peers).unwrap(), wrong).await.err().unwrap();
    assert!(error.contains("expected k3s-server://c1/peer/ee"), "{error}");
    let wrong_door = pki.call_peer(NodeId::new(0xcd)).unwrap();
    assert!(handshake(other_pki.accept(Port::Clients).unwrap(), wrong_door).await.is_err());
}

#[tokio::test]
async fn old_tls_is_for_clients_only_and_http1_for_nobody() {
    let (_node, pki) = founded().await;
    let authority = pki.paths(Role::Client).authority;
    for (port, role, welcome) in
        [(Port::Clients, Role::Client, true), (Port::Peers, Role::Peer, false)]
    {
        let pair = pki.paths(role);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&authority).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let old = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(&pair.certificate).unwrap()],
                PrivateKeyDer::from_pem_file(&pair.key).unwrap(),
            )
            .unwrap();
        let result = handshake(pki.accept(port).unwrap(), Arc::new(old)).await;
        assert_eq!(result.is_ok(), welcome, "{port:?}");
    }
    let mut http1 = (*foreign_client(&authority, Some(&pki.paths(Role::Client)))).clone();
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    assert!(handshake(pki.accept(Port::Clients).unwrap(), Arc::new(http1)).await.is_err());
}

#[tokio::test]
async fn renewal_reaches_new_handshakes_and_leaves_old_connections_alone() {
    let (node, pki) = founded().await;
    let (accept, call) = (pki.accept(Port::Clients).unwrap(), pki.call_server().unwrap());
    let mut old = handshake(Arc::clone(&accept), Arc::clone(&call)).await.unwrap();
    assert_eq!(pki.renew(&Names::loopback()).await.unwrap(), []);

    node.clock.0.store(RELEASED + 300 * DAY, Ordering::Relaxed);
    let issued = pki.renew(&Names::loopback()).await.unwrap();
    assert_eq!(issued.iter().map(|one| one.role).collect::<Vec<_>>(), Role::ALL);
    assert!(issued.iter().all(|one| one.reason == Due::Ends { days_left: 66 }), "{issued:?}");

    let new = handshake(accept, call).await.unwrap();
    assert_ne!(callee(&new), callee(&old));
    let on_disk = CertificateDer::from_pem_file(&pki.paths(Role::Server).certificate).unwrap();
    assert_eq!(callee(&new), on_disk);
    talk(&mut old.0, &mut old.1).await;

    let (_again, issued) = node.open().await.unwrap();
    assert_eq!(issued, [], "a restart finds nothing to do");
}

#[tokio::test]
async fn changed_address_issues_the_servers_certificates_and_not_the_clients() {
    let (node, pki) = founded().await;
    let mut names = Names::loopback();
    names.add("192.168.1.10").unwrap();
    let issued = pki.renew(&names).await.unwrap();
    assert_eq!(issued.iter().map(|one| one.role).collect::<Vec<_>>(), [Role::Server, Role::Peer]);
    assert!(issued.iter().all(|one| one.reason == Due::NamesChanged));

    let (_pki, issued) =
        Pki::establish(&node.env, &node.tls(), OWNER, &Names::loopback()).await.unwrap();
    assert_eq!(issued.len(), 2, "back to the old address");
}

/// On a Pi the clock jumps from 1970 to today some time after the start.
#[tokio::test(start_paused = true)]
async fn clock_that_jumps_forward_renews_within_the_hour() {
    let node = Node::new(OWNER, 0);
    let pki = node.pki().await;
    let (issued, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let (names_sender, names) = watch::channel(Names::loopback());
    let task = tokio::spawn({
        let pki = pki.clone();
        async move { pki.keep_fresh(names, move |one| issued.send(one.unwrap()).unwrap()).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(heard.try_recv().is_err());

    let started = tokio::time::Instant::now();
    node.clock.0.store(RELEASED + 2 * LEAF_LIFE, Ordering::Relaxed);
    assert_eq!(heard.recv().await.unwrap().reason, Due::Ends { days_left: 0 });
    assert!(started.elapsed() <= Duration::from_secs(3600));
    heard.recv().await.unwrap();
    heard.recv().await.unwrap();

    let mut moved = Names::loopback();
    moved.add("192.168.1.11").unwrap();
    let started = tokio::time::Instant::now();
    names_sender.send(moved).unwrap();
    assert_eq!(heard.recv().await.unwrap().reason, Due::NamesChanged);
    assert!(started.elapsed() < Duration::from_secs(1), "a new address does not wait");
    task.abort();
}

#[tokio::test]
async fn cluster_comes_up_with_no_clock_at_all() {
    for wall in [0, 1, RELEASED - 1] {
        let first = Node::new(OWNER, wall);
        let pki = first.pki().await;
        let second = Node::joined(&first, 0xcd, RELEASED + 30 * DAY);
        let second_pki = second.pki().await;
        let (accept, call) = (second_pki.accept(Port::Peers), pki.call_peer(NodeId::new(0xcd)));
        handshake(accept.unwrap(), call.unwrap()).await.unwrap();
        let (accept, call) = (pki.accept(Port::Peers), second_pki.call_peer(OWNER.node));
        handshake(accept.unwrap(), call.unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn files_are_private_and_the_token_hash_is_that_of_the_file() {
    use sha2::Digest;
    let (node, pki) = founded().await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&node.tls()), 0o700);
    let mut names = Vec::new();
    for entry in fs::read_dir(node.tls()).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    let expected = [
        "ca.crt",
        "ca.key",
        "client.crt",
        "client.key",
        "peer.crt",
        "peer.key",
        "server.crt",
        "server.key",
    ];
    assert_eq!(names, expected);

    let bytes = fs::read(node.tls().join("ca.crt")).unwrap();
    let digest = sha2::Sha256::digest(&bytes);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(pki.authority_hash(), hex);
    assert_eq!(pki.authority_pem().as_bytes(), bytes);
}

/// An independent reader of X.509, strict about the standard: what it accepts, Go's does too.
#[tokio::test]
async fn openssl_accepts_each_certificate_for_its_purpose_only() {
    let (node, pki) = founded().await;
    let verify = |purpose: &str, role: Role| {
        let paths = pki.paths(role);
        std::process::Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"])
            .arg(&paths.authority)
            .arg(&paths.certificate)
            .output()
    };
    for role in Role::ALL {
        for (purpose, fit) in
            [("sslserver", role != Role::Client), ("sslclient", role != Role::Server)]
        {
            let output = match verify(purpose, role) {
                Ok(output) => output,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    eprintln!("SKIPPED: openssl is not installed");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), fit, "{role} as {purpose}: {text}");
        }
    }
    drop(node);
}

/// Changes one thing in a good directory and tries to open it.
async fn after(damage: impl FnOnce(&Node)) -> PkiError {
    let (node, _pki) = founded().await;
    damage(&node);
    let error = node.open().await.map(|_| ()).expect_err("opened in spite of the damage");
    assert!(!error.remedy().is_empty());
    let text = format!("{error} {error:?}");
    assert!(!text.contains("PRIVATE KEY") && !text.contains("MIG"), "a key is in: {text}");
    error
}

#[tokio::test]
async fn damaged_files_are_named_and_nothing_is_replaced_silently() {
    let write = |file: &'static str, text: &'static str| {
        move |node: &Node| fs::write(node.tls().join(file), text).unwrap()
    };
    for (file, text) in [("peer.key", ""), ("peer.key", "not a key"), ("ca.key", "\u{fe}")] {
        let error = after(write(file, text)).await;
        assert!(
            matches!(&error, PkiError::KeyDamaged { path, .. } if path.ends_with(file)),
            "{error}"
        );
    }
    for file in ["ca.crt", "server.crt"] {
        let error = after(write(file, "-----BEGIN CERTIFICATE-----\n")).await;
        assert!(
            matches!(&error, PkiError::CertificateDamaged { path, .. } if path.ends_with(file)),
            "{error}"
        );
    }
    let error = after(|node| fs::remove_file(node.tls().join("peer.key")).unwrap()).await;
    assert!(matches!(error, PkiError::KeyDamaged { .. }), "{error}");
    let error = after(|node| fs::remove_file(node.tls().join("ca.crt")).unwrap()).await;
    assert!(matches!(error, PkiError::AuthorityMissing { .. }), "{error}");
}

#[tokio::test]
async fn mixed_up_files_are_told_apart() {
    let swap = |from: &'static str, to: &'static str| {
        move |node: &Node| {
            fs::copy(node.tls().join(from), node.tls().join(to)).unwrap();
        }
    };
    let error = after(swap("client.key", "peer.key")).await;
    assert!(matches!(error, PkiError::KeyMismatch { .. }), "{error}");
    let error = after(swap("client.key", "ca.key")).await;
    assert!(matches!(error, PkiError::KeyMismatch { .. }), "{error}");
    let error = after(|node| {
        swap("client.key", "peer.key")(node);
        swap("client.crt", "peer.crt")(node);
    })
    .await;
    assert!(matches!(error, PkiError::WrongOwner { .. }), "{error}");

    let (other, _pki) = founded().await;
    let error = after(|node| {
        for file in ["ca.crt", "ca.key"] {
            fs::copy(other.tls().join(file), node.tls().join(file)).unwrap();
        }
    })
    .await;
    assert!(matches!(error, PkiError::WrongAuthority { .. }), "{error}");
}

#[tokio::test]
async fn directory_of_another_cluster_or_node_is_refused() {
    let (mut node, _pki) = founded().await;
    node.owner.node = NodeId::new(1);
    let error = node.open().await.err().unwrap();
    assert!(matches!(error, PkiError::WrongOwner { .. }), "{error}");
    assert!(error.to_string().contains("expected k3s-server://c1/server/1"), "{error}");
    node.owner = Owner { cluster: ClusterId::new(2), ..OWNER };
    let error = node.open().await.err().unwrap();
    assert!(error.to_string().contains("expected k3s-server://2/authority"), "{error}");
}

#[tokio::test]
async fn key_that_others_can_read_is_refused() {
    for mode in [0o640, 0o604, 0o660] {
        let error = after(|node| {
            let key = node.tls().join("server.key");
            fs::set_permissions(key, fs::Permissions::from_mode(mode)).unwrap();
        })
        .await;
        assert!(
            matches!(error, PkiError::PermissionsTooOpen { mode: found, .. } if found == mode),
            "{error}"
        );
    }
}

#[tokio::test]
async fn node_without_the_authoritys_key_lives_until_its_certificates_end() {
    let (node, _pki) = founded().await;
    fs::remove_file(node.tls().join("ca.key")).unwrap();
    node.clock.0.store(RELEASED + LEAF_LIFE - DAY, Ordering::Relaxed);
    let (pki, issued) = node.open().await.unwrap();
    assert_eq!(issued, []);
    assert_eq!(pki.renew(&Names::loopback()).await.unwrap(), []);
    node.clock.0.store(RELEASED + LEAF_LIFE + 2 * DAY, Ordering::Relaxed);
    let error = node.open().await.err().unwrap();
    assert!(matches!(error, PkiError::Expired { .. }), "{error}");

    fs::remove_file(node.tls().join("client.crt")).unwrap();
    node.clock.0.store(RELEASED, Ordering::Relaxed);
    let error = node.open().await.err().unwrap();
    assert!(matches!(error, PkiError::AuthorityKeyMissing { .. }), "{error}");
}

/// A disk in memory that loses power after a given number of changes, and with it what was not made durable.
#[derive(Clone, Debug, Default)]
struct PowerCutDisk(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    files: Vec<FileState>,
    /// Names as the kernel shows them, and as they are on the card.
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Changes until the power fails; `None`: it does not.
    changes_left: Option<usize>,
}

#[derive(Debug, Default)]
struct FileState {
    bytes: Vec<u8>,
    durable: Vec<u8>,
}

#[derive(Debug)]
struct OpenFile(PowerCutDisk, usize);

impl PowerCutDisk {
    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap()
    }

    fn change(&self) -> io::Result<MutexGuard<'_, Contents>> {
        let mut contents = self.contents();
        match &mut contents.changes_left {
            None => Ok(contents),
            Some(0) => Err(io::Error::other("the power is off")),
            Some(left) => {
                *left -= 1;
                Ok(contents)
            }
        }
    }

    /// The power comes back. What was not durable is gone, or happens to be there: both can be.
    fn restart(&self, lost: bool) {
        let mut contents = self.contents();
        contents.changes_left = None;
        if lost {
            contents.names = contents.durable_names.clone();
            for file in &mut contents.files {
                file.bytes = file.durable.clone();
            }
        }
    }

    fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let contents = self.contents();
        contents.names.get(path).map(|file| contents.files[*file].bytes.clone())
    }
}

impl Disk for PowerCutDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let found = self.contents().names.get(path).copied();
        let file = match (how, found) {
            (Open::Create, None) => {
                let mut contents = self.change()?;
                contents.files.push(FileState::default());
                let file = contents.files.len() - 1;
                contents.names.insert(path.to_owned(), file);
                file
            }
            (Open::Create, Some(_)) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Open::Read | Open::Write, found) => found.ok_or(io::ErrorKind::NotFound)?,
        };
        Ok(Arc::new(OpenFile(self.clone(), file)))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.contents().names.keys().filter(|path| path.starts_with(dir)).cloned().collect())
    }

    fn create_dir_all(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut contents = self.change()?;
        let file = contents.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        contents.names.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change()?.names.remove(path).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut contents = self.change()?;
        contents.durable_names = contents.names.clone();
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.contents().names.contains_key(path))
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn lock(&self, _path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl DiskFile for OpenFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let contents = self.0.contents();
        let start = usize::try_from(offset).unwrap();
        let bytes = contents.files[self.1].bytes.get(start..start + buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert_eq!(offset, 0);
        self.0.change()?.files[self.1].bytes = bytes.to_vec();
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.contents().files[self.1].bytes.len() as u64)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::Error::other("certificates are not resized"))
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        let result = self.0.change().map(|mut contents| {
            let file = &mut contents.files[self.1];
            file.durable = file.bytes.clone();
        });
        Box::pin(std::future::ready(result))
    }
}

fn env_on(disk: &PowerCutDisk, wall: i64) -> Env {
    Env { disk: Arc::new(disk.clone()), ..env_at(wall).0 }
}

/// Runs `work` with the power failing after 0, 1, 2, … changes, until it gets through. Returns how many cuts there were.
async fn cut_power_everywhere<F, T, E>(
    disk: impl Fn() -> PowerCutDisk,
    work: impl Fn(PowerCutDisk) -> F,
    check: impl AsyncFn(PowerCutDisk, PathBuf),
) -> usize
where
    F: Future<Output = Result<T, E>>,
    E: fmt::Debug,
{
    for cuts in 0.. {
        for lost in [true, false] {
            let disk = disk();
            disk.contents().changes_left = Some(cuts);
            let done = work(disk.clone()).await.is_ok();
            disk.restart(lost);
            check(disk, PathBuf::from("/tls")).await;
            if done {
                return cuts;
            }
        }
    }
    unreachable!()
}

#[tokio::test]
async fn power_cut_at_any_moment_of_founding_is_finished_by_the_next_start() {
    let dir = Path::new("/tls");
    let names = Names::loopback();
    let cuts = cut_power_everywhere(
        PowerCutDisk::default,
        |disk| {
            let names = names.clone();
            async move { Pki::establish(&env_on(&disk, RELEASED), dir, OWNER, &names).await }
        },
        async |disk, dir| {
            let authority = disk.read(&dir.join("ca.crt"));
            let env = env_on(&disk, RELEASED);
            let (pki, _) = Pki::establish(&env, &dir, OWNER, &Names::loopback()).await.unwrap();
            if let Some(authority) = authority {
                assert_eq!(pki.authority_pem().as_bytes(), authority, "the authority changed");
            }
            let (accept, call) = (pki.accept(Port::Clients), pki.call_server());
            handshake(accept.unwrap(), call.unwrap()).await.unwrap();
            assert!(disk.list(&dir).unwrap().iter().all(|path| path.extension().unwrap() != "tmp"));
        },
    )
    .await;
    assert_eq!(cuts, 8 * 5, "eight files, five changes each");
}

#[tokio::test]
async fn power_cut_at_any_moment_of_renewal_leaves_usable_pairs() {
    let later = RELEASED + 300 * DAY;
    let dir = Path::new("/tls");
    let good = PowerCutDisk::default();
    let names = Names::loopback();
    Pki::establish(&env_on(&good, RELEASED), dir, OWNER, &names).await.unwrap();
    let copy = || {
        let from = good.contents();
        let files = from
            .files
            .iter()
            .map(|file| FileState { bytes: file.bytes.clone(), durable: file.durable.clone() });
        let contents = Contents {
            files: files.collect(),
            names: from.names.clone(),
            durable_names: from.durable_names.clone(),
            changes_left: None,
        };
        PowerCutDisk(Arc::new(Mutex::new(contents)))
    };
    let cuts = cut_power_everywhere(
        copy,
        |disk| {
            let names = names.clone();
            async move { Pki::establish(&env_on(&disk, later), dir, OWNER, &names).await }
        },
        async |disk, dir| {
            let env = env_on(&disk, later);
            let (pki, _) = Pki::establish(&env, &dir, OWNER, &Names::loopback()).await.unwrap();
            let (accept, call) = (pki.accept(Port::Peers), pki.call_peer(OWNER.node));
            handshake(accept.unwrap(), call.unwrap()).await.unwrap();
        },
    )
    .await;
    assert_eq!(cuts, 3 * 5, "three certificates, five changes each; the keys stay");
}

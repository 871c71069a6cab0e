//! Whole joins: a real authority, a real TLS connection in memory, a door and a joiner; and whoever sits in between.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConnection, ServerConnection};
use tonic::{Request, Response, Status};

use super::adopt::{self, adopt, undo_unfinished};
use super::door::{Door, Grant, House};
use super::enrol::{Call, Dial, Enrolled, Enrolment, JoinCalls, JoinError, Stranger, is_own};
use super::token::{self, AuthorityHash, Token};
use super::{Identity, Phase};
use crate::config::ServerUrl;
use crate::critical::CriticalFlags;
use crate::env::{BoxFuture, Env};
use crate::pki::{Caller, ChannelBinding, Names, Owner, Pki, Port, call_stranger};
use crate::proto::node::join_server::Join;
use crate::proto::node::{
    BeginReply, BeginRequest, Credentials, FinishReply, FinishRequest, IntroduceReply,
    IntroduceRequest, Member, Membership, StoredMembership, VoterSet,
};
use crate::testkit::disk::{Fate, Fault, random};
use crate::testkit::{self, FaultDisk, ManualClock, Random};
use crate::types::{ClusterId, NodeId};

const PASSWORD: &str = "correct-horse-battery";
const TLS: &str = "db/tls";

fn membership() -> StoredMembership {
    let member = Member { id: 0xa, name: "pi-1".to_owned(), ..Member::default() };
    let configs = vec![VoterSet { ids: vec![0xa] }];
    let membership = Some(Membership { configs, members: vec![member] });
    StoredMembership { log_id: None, membership }
}

/// A server of a cluster, with everything that joining needs of it.
struct Server {
    env: Env,
    clock: ManualClock,
    pki: Pki,
    door: Arc<Door>,
    hash: AuthorityHash,
    key_pem: Bytes,
}

struct Gives(Credentials);

impl Grant for Gives {
    fn credentials(&self) -> Result<Credentials, String> {
        Ok(self.0.clone())
    }
}

fn server(cluster: u64, password: &str) -> Server {
    let (disk, clock) = (FaultDisk::with_dir(Path::new("db")), ManualClock::new());
    let env = testkit::env(&disk, &clock, cluster);
    let owner = Owner { cluster: ClusterId::new(cluster), node: NodeId::new(0xa) };
    let names = Names::loopback();
    let establish = Pki::establish(&env, Path::new(TLS), owner, &names);
    let (pki, _) = testkit::wait(establish).unwrap();
    let content = |name: &str| Bytes::from(disk.content(&Path::new(TLS).join(name)).unwrap());
    let (authority_pem, key_pem) = (content("ca.crt"), content("ca.key"));
    let credentials = Credentials {
        cluster,
        authority_pem: authority_pem.clone(),
        authority_key_pem: key_pem.clone(),
        membership: Some(membership()),
        flags: Bytes::from_static(b"flags"),
    };
    let password = Token::parse(password).unwrap().password;
    let hash = AuthorityHash::of(&authority_pem);
    let house = House { cluster: owner.cluster, authority_pem, password };
    let door = Arc::new(Door::new(&env, house, Arc::new(Gives(credentials))));
    Server { env, clock, pki, door, hash, key_pem }
}

/// A finished handshake with a server: what its two ends know.
fn handshake(server: &Server) -> (ChannelBinding, ChannelBinding, Vec<CertificateDer<'static>>) {
    let name = ServerName::try_from("join").unwrap();
    let mut client = ClientConnection::new(call_stranger().unwrap(), name).unwrap();
    let mut served = ServerConnection::new(server.pki.accept(Port::Join).unwrap()).unwrap();
    while client.is_handshaking() || served.is_handshaking() {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut bytes_in = bytes.as_slice();
        while !bytes_in.is_empty() {
            served.read_tls(&mut bytes_in).unwrap();
            served.process_new_packets().unwrap();
        }
        let mut bytes = Vec::new();
        while served.wants_write() {
            served.write_tls(&mut bytes).unwrap();
        }
        let mut bytes_in = bytes.as_slice();
        while !bytes_in.is_empty() {
            client.read_tls(&mut bytes_in).unwrap();
            client.process_new_packets().unwrap();
        }
    }
    let chain = client.peer_certificates().unwrap();
    let chain = chain.iter().map(|one| one.clone().into_owned()).collect();
    (ChannelBinding::of(&client).unwrap(), ChannelBinding::of(&served).unwrap(), chain)
}

/// Calls a door over one connection, and remembers every byte that the joiner sent.
struct Wire {
    door: Arc<Door>,
    caller: Caller,
    sent: Arc<Mutex<Vec<u8>>>,
    begun: Arc<AtomicUsize>,
    /// What the man in the middle says in the place of the introduction.
    introduction: Option<IntroduceReply>,
}

impl Wire {
    fn to(server: &Server, binding: ChannelBinding, world: &World) -> Self {
        let remote = SocketAddr::from(([192, 168, 1, 9], 40_000));
        let local = SocketAddr::from(([192, 168, 1, 1], 2380));
        let caller = Caller { remote, local, identity: None, binding: Some(binding) };
        let (sent, begun) = (Arc::clone(&world.sent), Arc::clone(&world.begun));
        Self { door: Arc::clone(&server.door), caller, sent, begun, introduction: None }
    }

    fn request<T: Message>(&self, message: T) -> Request<T> {
        self.sent.lock().unwrap().extend(message.encode_to_vec());
        let mut request = Request::new(message);
        request.extensions_mut().insert(self.caller.clone());
        request
    }
}

impl JoinCalls for Wire {
    fn introduce(&self, request: IntroduceRequest) -> Call<'_, IntroduceReply> {
        let request = self.request(request);
        Box::pin(async move {
            match &self.introduction {
                Some(reply) => Ok(reply.clone()),
                None => self.door.introduce(request).await.map(Response::into_inner),
            }
        })
    }

    fn begin(&self, request: BeginRequest) -> Call<'_, BeginReply> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let request = self.request(request);
        Box::pin(async move { self.door.begin(request).await.map(Response::into_inner) })
    }

    fn finish(&self, request: FinishRequest) -> Call<'_, FinishReply> {
        let request = self.request(request);
        Box::pin(async move { self.door.finish(request).await.map(Response::into_inner) })
    }
}

/// The joiner's side of a test.
#[derive(Default)]
struct World {
    sent: Arc<Mutex<Vec<u8>>>,
    begun: Arc<AtomicUsize>,
}

/// Hands out connections that were prepared.
struct Prepared(Mutex<Vec<Result<Stranger, io::ErrorKind>>>);

impl Dial for Prepared {
    fn resolve(&self, _host: &str, port: u16) -> BoxFuture<'_, io::Result<Vec<SocketAddr>>> {
        let address = SocketAddr::from(([192, 168, 1, 1], port));
        Box::pin(async move { Ok(vec![address]) })
    }

    fn connect(&self, _address: SocketAddr) -> BoxFuture<'_, io::Result<Stranger>> {
        let next = self.0.lock().unwrap().pop();
        Box::pin(async move {
            next.unwrap_or(Err(io::ErrorKind::ConnectionRefused)).map_err(Into::into)
        })
    }
}

fn enrolment(env: &Env, token: &str, strangers: Vec<Result<Stranger, io::ErrorKind>>) -> Enrolment {
    Enrolment {
        env: env.clone(),
        dial: Arc::new(Prepared(Mutex::new(strangers))),
        server: ServerUrl::parse("https://pi-1:6443").unwrap(),
        token: Token::parse(token).unwrap(),
        is_own: Box::new(|_| false),
    }
}

/// A connection to `server`, with nobody in between.
fn straight(server: &Server, world: &World) -> Stranger {
    let (ours, theirs, chain) = handshake(server);
    Stranger { calls: Box::new(Wire::to(server, theirs, world)), chain, binding: ours }
}

fn join(server: &Server, token: &str, world: &World) -> Result<Enrolled, JoinError> {
    let strangers = vec![Ok(straight(server, world))];
    testkit::wait(enrolment(&server.env, token, strangers).attempt())
}

fn full(server: &Server, password: &str) -> String {
    format!("K10{}::server:{password}", server.hash)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn whoever_knows_the_token_gets_the_credentials() {
    let server = server(0xc1, PASSWORD);
    for token in [full(&server, PASSWORD), PASSWORD.to_owned()] {
        let world = World::default();
        let enrolled = join(&server, &token, &world).unwrap();
        assert_eq!(enrolled.cluster, ClusterId::new(0xc1));
        assert_eq!(enrolled.authority_key_pem, server.key_pem);
        assert_eq!(enrolled.membership, membership());
        assert_eq!(enrolled.flags, "flags");
        assert_eq!(enrolled.token.authority, Some(server.hash), "kept with the hash");
        assert!(!contains(&world.sent.lock().unwrap(), PASSWORD.as_bytes()));
        assert!(!format!("{enrolled:?}").contains("PRIVATE KEY"));
    }
}

#[test]
fn wrong_password_is_final_and_says_so() {
    let server = server(0xc1, PASSWORD);
    let error = join(&server, "another-password", &World::default()).unwrap_err();
    assert!(matches!(error, JoinError::WrongPassword { .. }), "{error}");
    assert!(!error.may_pass() && !error.to_string().contains("another"));
}

#[test]
fn another_authority_than_the_tokens_ends_it_before_anything_is_sent() {
    let (ours, foreign) = (server(0xc1, PASSWORD), server(0xc2, PASSWORD));
    let world = World::default();
    let error = join(&foreign, &full(&ours, PASSWORD), &world).unwrap_err();
    let expected = format!(
        "token CA hash does not match the Cluster CA certificate hash: {} != {}",
        ours.hash, foreign.hash
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(world.begun.load(Ordering::Relaxed), 0, "the exchange was begun");
}

/// A man in the middle: TLS with his own certificates to the joiner, TLS to the real server behind him, every message
/// passed on.
fn relay(real: &Server, middle: &Server, world: &World, pretends: bool) -> Stranger {
    let (_, behind, _) = handshake(real);
    let (ours, _, chain) = handshake(middle);
    let mut wire = Wire::to(real, behind, world);
    if !pretends {
        // He introduces himself with his own authority.
        let authority_pem = Bytes::copy_from_slice(middle.pki.authority_pem().as_bytes());
        wire.introduction = Some(IntroduceReply {
            authority_pem,
            cluster: 0xc2,
            wire_version_min: 1,
            wire_version_max: 1,
            release: String::new(),
        });
    }
    Stranger { calls: Box::new(wire), chain, binding: ours }
}

#[test]
fn man_in_the_middle_who_shows_the_real_authority_is_an_impostor() {
    let (real, middle) = (server(0xc1, PASSWORD), server(0xc2, "his-own-password"));
    for token in [full(&real, PASSWORD), PASSWORD.to_owned()] {
        let world = World::default();
        let strangers = vec![Ok(relay(&real, &middle, &world, true))];
        let error = testkit::wait(enrolment(&real.env, &token, strangers).attempt()).unwrap_err();
        assert!(matches!(error, JoinError::Impostor { .. }), "{error}");
        assert_eq!(world.begun.load(Ordering::Relaxed), 0, "the exchange was begun");
    }
}

/// With a bare password the joiner cannot know the authority. The exchange still fails, on the server's side, and neither
/// side has given anything away.
#[test]
fn man_in_the_middle_who_relays_a_bare_password_learns_nothing() {
    let (real, middle) = (server(0xc1, PASSWORD), server(0xc2, "his-own-password"));
    let world = World::default();
    let strangers = vec![Ok(relay(&real, &middle, &world, false))];
    let error = testkit::wait(enrolment(&real.env, PASSWORD, strangers).attempt()).unwrap_err();
    assert!(matches!(error, JoinError::WrongPassword { .. }), "{error}");
    assert_eq!(world.begun.load(Ordering::Relaxed), 1);
    assert!(!contains(&world.sent.lock().unwrap(), PASSWORD.as_bytes()));
}

/// He answers himself, with a guess.
#[test]
fn man_in_the_middle_who_guesses_wrong_learns_nothing() {
    let middle = server(0xc2, "his-own-password");
    let world = World::default();
    let error = join(&middle, PASSWORD, &world).unwrap_err();
    assert!(matches!(error, JoinError::WrongPassword { .. }), "{error}");
    assert!(!contains(&world.sent.lock().unwrap(), PASSWORD.as_bytes()));
}

#[test]
fn own_address_is_noticed_before_connecting() {
    let server = server(0xc1, PASSWORD);
    let mut enrolment = enrolment(&server.env, PASSWORD, Vec::new());
    enrolment.is_own =
        Box::new(|address| is_own(address, &["192.168.1.1:2380".parse().unwrap()], &[]));
    let error = testkit::wait(enrolment.attempt()).unwrap_err();
    assert!(matches!(error, JoinError::OwnAddress { .. }), "{error}");
    assert!(!error.may_pass());
}

#[test]
fn own_addresses_are_those_of_the_port_and_the_host() {
    let local: [IpAddr; 1] = ["192.168.1.5".parse().unwrap()];
    let all = ["0.0.0.0:2380".parse().unwrap()];
    let one = ["127.0.0.2:2380".parse().unwrap()];
    for (address, listens, expected) in [
        ("192.168.1.5:2380", &all, true),
        ("192.168.1.6:2380", &all, false),
        ("127.0.0.1:2380", &all, true),
        ("192.168.1.5:2381", &all, false),
        ("127.0.0.2:2380", &one, true),
        ("127.0.0.1:2380", &one, false),
    ] {
        assert_eq!(is_own(address.parse().unwrap(), listens, &local), expected, "{address}");
    }
}

#[tokio::test]
async fn server_that_is_not_there_yet_is_waited_for() {
    let server = tokio::task::spawn_blocking(|| server(0xc1, PASSWORD)).await.unwrap();
    let world = World::default();
    // Taken from the end.
    let refused = || Err(io::ErrorKind::ConnectionRefused);
    let strangers = vec![Ok(straight(&server, &world)), refused(), refused(), refused()];
    let enrolment = enrolment(&server.env, &full(&server, PASSWORD), strangers);
    let joining = tokio::spawn(async move { enrolment.run().await });
    while !joining.is_finished() {
        tokio::task::yield_now().await;
        server.clock.advance_to_next();
    }
    assert!(joining.await.unwrap().is_ok());
}

fn begin(server: &Server, binding: ChannelBinding, exchange: Bytes) -> Result<BeginReply, Status> {
    let wire = Wire::to(server, binding, &World::default());
    testkit::wait(wire.begin(BeginRequest { exchange }))
}

#[test]
fn flood_of_bad_requests_is_cheap_and_shuts_out_nobody_for_long() {
    let server = server(0xc1, PASSWORD);
    let (_, theirs, _) = handshake(&server);
    let wire = Wire::to(&server, theirs, &World::default());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut answered = 0;
    for round in 0..100_000u32 {
        // Right in form, so that only the gate stands between them and the arithmetic.
        let mut message = vec![0x41; super::pake::MESSAGE_BYTES];
        message[1..5].copy_from_slice(&round.to_le_bytes());
        let reply = runtime.block_on(wire.begin(BeginRequest { exchange: message.into() }));
        answered += usize::from(
            !matches!(reply, Err(status) if status.code() == tonic::Code::ResourceExhausted),
        );
        wire.sent.lock().unwrap().clear();
    }
    assert_eq!(answered, 5, "attempts that cost arithmetic");
    server.clock.advance(Duration::from_secs(2));
    assert!(join(&server, PASSWORD, &World::default()).is_ok());
}

#[test]
fn truncated_and_repeated_messages_get_nothing() {
    let server = server(0xc1, PASSWORD);
    let (_, theirs, _) = handshake(&server);
    for length in [0, 1, 32, 34, 4_000] {
        let status = begin(&server, theirs, vec![0x41; length].into()).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{length} bytes");
    }
    let wire = Wire::to(&server, theirs, &World::default());
    let password = Token::parse(PASSWORD).unwrap().password;
    let context = super::pake::Context {
        authority: server.hash,
        cluster: ClusterId::new(0xc1),
        exporter: *theirs.bytes(),
    };
    let (joiner, exchange) = super::pake::Joiner::begin(&*server.env.entropy, &password, context);
    let begun = testkit::wait(wire.begin(BeginRequest { exchange })).unwrap();
    let (_, confirmation) = joiner.finish(&begun.exchange).unwrap();
    let finish = FinishRequest { session: begun.session, confirmation };
    assert!(testkit::wait(wire.finish(finish.clone())).is_ok());
    let again = testkit::wait(wire.finish(finish)).unwrap_err();
    assert_eq!(again.code(), tonic::Code::NotFound, "a session used twice");
}

#[test]
fn connection_of_another_kind_is_refused() {
    let server = server(0xc1, PASSWORD);
    let request = BeginRequest { exchange: vec![0x41; 33].into() };
    let status = testkit::wait(server.door.begin(Request::new(request))).unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
}

fn matched() -> crate::critical::MatchedFlags {
    let request = crate::config::Request {
        command_line: Vec::new(),
        environment: std::collections::BTreeMap::new(),
        host: crate::config::Host {
            name: Some("pi-2".to_owned()),
            address: None,
            token_credential: None,
        },
        paths: crate::config::Paths::default(),
    };
    let loaded = crate::config::resolve(&[], crate::config::Problems::default(), &request);
    let loaded = loaded.unwrap_or_else(|problems| panic!("{problems}"));
    CriticalFlags::of(&loaded.config).found(std::time::SystemTime::UNIX_EPOCH, "pi-2").1
}

/// Starts on a disk as the program would: first what a crash left, then who this is.
fn start(env: &Env) -> Option<Identity> {
    let dir = Path::new("db");
    testkit::wait(undo_unfinished(env, dir)).unwrap();
    Identity::load(env, dir).unwrap()
}

#[test]
fn join_cut_at_every_disk_operation_is_finished_or_undone() {
    let server = server(0xc1, PASSWORD);
    let enrolled = join(&server, PASSWORD, &World::default()).unwrap();
    let (dir, flags) = (Path::new("db"), matched());
    let (mut finished, mut undone, mut nth) = (0, 0, 0);
    loop {
        nth += 1;
        for seed in 0..4 {
            let disk = FaultDisk::with_dir(dir);
            let env = testkit::env(&disk, &server.clock, seed);
            disk.fail(Fault::power_loss(nth));
            let result = testkit::wait(adopt(&env, dir, &enrolled, flags));
            if result.is_ok() && !disk.has_failed() {
                assert!(5 < finished && 5 < undone, "{finished} finished, {undone} undone");
                return;
            }
            match seed {
                0 => disk.power_cut(|_| Fate::KEPT),
                1 => disk.power_cut(|_| Fate::LOST),
                _ => disk.power_cut(random(Random::new(seed * 1_000 + nth))),
            }
            match start(&env) {
                Some(identity) => {
                    finished += 1;
                    assert_eq!(identity.phase, Phase::Joining { replaces: None });
                    check_adopted(&env, identity);
                }
                None => {
                    undone += 1;
                    let left: Vec<_> = disk.files();
                    assert!(left.is_empty(), "cut at {nth}, seed {seed}: {left:?}");
                    let identity = testkit::wait(adopt(&env, dir, &enrolled, flags)).unwrap();
                    check_adopted(&env, identity);
                }
            }
        }
    }
}

/// Everything is there that the next steps need, and issues certificates that the cluster takes.
fn check_adopted(env: &Env, identity: Identity) {
    let dir = Path::new("db");
    assert_eq!(adopt::contacts(env, dir).unwrap(), Some(membership()));
    let kept = token::load(env, dir).unwrap().unwrap();
    assert!(kept.password.equals(&Token::parse(PASSWORD).unwrap().password));
    assert!(kept.authority.is_some());
    let owner = Owner { cluster: identity.cluster, node: identity.node };
    let names = Names::loopback();
    let establish = Pki::establish(env, Path::new(TLS), owner, &names);
    let (_, issued) = testkit::wait(establish).unwrap();
    assert_eq!(issued.len(), 3);
}

#[test]
fn second_power_cut_while_undoing_leaves_nothing_either() {
    let server = server(0xc1, PASSWORD);
    let enrolled = join(&server, PASSWORD, &World::default()).unwrap();
    let (dir, flags) = (Path::new("db"), matched());
    for first in [8, 14, 18] {
        for second in 1..=12 {
            let disk = FaultDisk::with_dir(dir);
            let env = testkit::env(&disk, &server.clock, second);
            disk.fail(Fault::power_loss(first));
            drop(testkit::wait(adopt(&env, dir, &enrolled, flags)));
            disk.power_cut(random(Random::new(first)));
            disk.fail(Fault::power_loss(second));
            drop(testkit::wait(undo_unfinished(&env, dir)));
            disk.power_cut(random(Random::new(second)));
            if start(&env).is_none() {
                assert_eq!(disk.files(), Vec::<std::path::PathBuf>::new(), "{first}, {second}");
            }
        }
    }
}

#[test]
fn authority_that_does_not_fit_is_not_adopted() {
    let (one, other) = (server(0xc1, PASSWORD), server(0xc2, PASSWORD));
    let good = one.pki.authority_pem().to_owned();
    let (disk, clock) = (FaultDisk::with_dir(Path::new("db")), ManualClock::new());
    let env = testkit::env(&disk, &clock, 1);
    let cluster = ClusterId::new(0xc1);
    let twice = format!("{good}{good}");
    let leaf = std::str::from_utf8(&other.key_pem).unwrap().to_owned();
    for (what, cluster, certificate, key) in [
        ("the other's key", cluster, good.as_str(), &other.key_pem),
        ("another cluster", ClusterId::new(0xc3), good.as_str(), &one.key_pem),
        ("the other's authority", cluster, other.pki.authority_pem(), &other.key_pem),
        ("two certificates", cluster, twice.as_str(), &one.key_pem),
        ("no certificate", cluster, "", &one.key_pem),
        ("a key for a certificate", cluster, leaf.as_str(), &one.key_pem),
    ] {
        let adopt = Pki::adopt(&env, Path::new(TLS), cluster, certificate.as_bytes(), key);
        assert!(testkit::wait(adopt).is_err(), "{what}");
        assert_eq!(disk.files(), Vec::<std::path::PathBuf>::new(), "{what}");
    }
    // Ten years and a day later.
    clock.set_wall(
        std::time::UNIX_EPOCH + Duration::from_secs(60 * 365 * 24 * 3_600 + 40 * 365 * 24 * 3_600),
    );
    let adopt = Pki::adopt(&env, Path::new(TLS), cluster, good.as_bytes(), &one.key_pem);
    assert!(matches!(testkit::wait(adopt), Err(crate::pki::PkiError::Expired { .. })));
}

//! Certificates that have ended, and boards that do not know what day it is: the rules of `pki::validity`, with real handshakes
//! and, where a real clock will do, real servers.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k3s_server::env::{Env, host};
use k3s_server::pki::validity::{RELEASED, certificate_time};
use k3s_server::pki::{Names, Owner, Pki, PkiError, Port, Role};
use k3s_server::testkit::ManualClock;
use k3s_server::types::{ClusterId, NodeId};
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::servers::{Server, Servers, serves};
use crate::support::certificates::{Wish, authority, uri};

const CLUSTER: ClusterId = ClusterId::new(0xc1);
const DAY: u64 = 24 * 60 * 60;

/// What a board believes.
fn day(number: i64) -> SystemTime {
    let seconds = u64::try_from(RELEASED).unwrap();
    let days = Duration::from_secs(number.unsigned_abs() * DAY);
    let released = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    if number < 0 { released - days } else { released + days }
}

/// 1970: no network has told it yet.
const UNSET: SystemTime = SystemTime::UNIX_EPOCH;

/// A node with a clock of its own.
struct Board {
    id: NodeId,
    clock: ManualClock,
    pki: Pki,
}

impl Board {
    async fn new(dir: &Path, number: u64, wall: SystemTime) -> Result<Self, PkiError> {
        let tls = dir.join(number.to_string());
        let clock = ManualClock::new();
        clock.set_wall(wall);
        let env = Env { clock: Arc::new(clock.clone()), ..host::env() };
        let id = NodeId::new(number);
        fs::create_dir_all(&tls).unwrap();
        let founder = dir.join("1");
        if number != 1 {
            for file in ["ca.crt", "ca.key"] {
                fs::copy(founder.join(file), tls.join(file)).unwrap();
            }
        }
        let owner = Owner { cluster: CLUSTER, node: id };
        let (pki, _) = Pki::establish(&env, &tls, owner, &Names::loopback()).await?;
        Ok(Self { id, clock, pki })
    }

    async fn renew(&self) -> usize {
        self.pki.renew(&Names::loopback()).await.unwrap().len()
    }

    fn door(&self) -> Arc<ServerConfig> {
        self.pki.accept(Port::Peers).unwrap()
    }

    fn key_to(&self, other: &Self) -> Arc<ClientConfig> {
        self.pki.call_peer(other.id).unwrap()
    }

    /// Whether it can call the other one.
    async fn reaches(&self, other: &Self) -> bool {
        shake_hands(self.key_to(other), other.door()).await.is_some()
    }
}

type Ends = (client::TlsStream<DuplexStream>, server::TlsStream<DuplexStream>);

/// A connection over which a byte has gone each way, if both ends want it.
async fn shake_hands(caller: Arc<ClientConfig>, callee: Arc<ServerConfig>) -> Option<Ends> {
    let (near, far) = tokio::io::duplex(64 << 10);
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let (near, far) = tokio::join!(
        TlsConnector::from(caller).connect(name, near),
        TlsAcceptor::from(callee).accept(far)
    );
    let mut ends = (near.ok()?, far.ok()?);
    speaks(&mut ends).await.then_some(ends)
}

async fn speaks((near, far): &mut Ends) -> bool {
    let mut byte = [0];
    near.write_all(b"?").await.is_ok()
        && near.flush().await.is_ok()
        && far.read_exact(&mut byte).await.is_ok()
        && far.write_all(b"!").await.is_ok()
        && far.flush().await.is_ok()
        && near.read_exact(&mut byte).await.is_ok()
}

fn shown(ends: &Ends) -> CertificateDer<'static> {
    ends.0.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

#[tokio::test]
async fn boards_in_1970_and_boards_of_today_form_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let mut boards = Vec::new();
    for (number, wall) in [(1, UNSET), (2, UNSET), (3, day(-3_000)), (4, day(0)), (5, day(200))] {
        boards.push(Board::new(dir.path(), number, wall).await.unwrap());
    }
    for one in &boards {
        for other in &boards {
            if one.id != other.id {
                assert!(one.reaches(other).await, "{} to {}", one.id, other.id);
            }
        }
    }
}

/// Its own certificates last; it is the others' that have ended, as far as it knows. Nobody else is disturbed, and with its clock
/// put right it belongs to them again, with what it issued meanwhile.
#[tokio::test]
async fn a_board_years_ahead_is_alone_until_its_clock_is_right_and_spoils_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let first = Board::new(dir.path(), 1, day(10)).await.unwrap();
    let second = Board::new(dir.path(), 2, day(10)).await.unwrap();
    let ahead = Board::new(dir.path(), 3, day(10 + 800)).await.unwrap();
    let twin = Board::new(dir.path(), 4, day(10 + 800)).await.unwrap();

    assert!(!ahead.reaches(&first).await && !first.reaches(&ahead).await);
    assert!(first.reaches(&second).await && second.reaches(&first).await);
    assert!(ahead.reaches(&twin).await, "two that agree on the time");

    ahead.clock.set_wall(day(10));
    assert_eq!(ahead.renew().await, 0);
    assert!(ahead.reaches(&first).await && first.reaches(&ahead).await);
}

/// Ten years are the authority's life, and no clock can make it longer.
#[tokio::test]
async fn a_board_beyond_the_authoritys_life_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Board::new(dir.path(), 1, day(0)).await.unwrap();
    let refused = Board::new(dir.path(), 2, day(3_653 + 1)).await.err();
    assert!(matches!(refused, Some(PkiError::Expired { .. })), "{refused:?}");
}

#[tokio::test]
async fn all_clocks_jump_ahead_and_connections_stay_while_certificates_are_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let one = Board::new(dir.path(), 1, UNSET).await.unwrap();
    let two = Board::new(dir.path(), 2, UNSET).await.unwrap();
    // Made once, as a server makes them, and never again.
    let (key, door) = (one.key_to(&two), two.door());
    let mut old = shake_hands(Arc::clone(&key), Arc::clone(&door)).await.unwrap();

    for board in [&one, &two] {
        board.clock.set_wall(day(400));
    }
    assert!(shake_hands(Arc::clone(&key), Arc::clone(&door)).await.is_none(), "they had ended");
    assert_eq!(one.renew().await + two.renew().await, 2 * Role::ALL.len());

    let new = shake_hands(key, door).await.expect("renewed");
    assert_ne!(shown(&old), shown(&new));
    assert!(speaks(&mut old).await, "the old connection was cut");
}

/// The hour of `keep_fresh` passes in no time.
#[tokio::test]
async fn renewal_comes_by_itself_within_the_hour() {
    let dir = tempfile::tempdir().unwrap();
    let board = Board::new(dir.path(), 1, UNSET).await.unwrap();
    let (_names, names) = tokio::sync::watch::channel(Names::loopback());
    let (sender, mut renewed) = tokio::sync::mpsc::unbounded_channel();
    let pki = board.pki.clone();
    let keeping = tokio::spawn(async move {
        pki.keep_fresh(names, move |one| sender.send(one.unwrap().role).unwrap()).await;
    });
    board.clock.set_wall(day(300));
    let mut roles = Vec::new();
    while roles.len() < Role::ALL.len() {
        // It may have looked before the clock was set, and sleep now.
        board.clock.advance_to_next();
        match tokio::time::timeout(Duration::from_millis(20), renewed.recv()).await {
            Ok(role) => roles.push(role.unwrap()),
            Err(_) => tokio::task::yield_now().await,
        }
    }
    roles.sort();
    assert_eq!(roles, Role::ALL);
    keeping.abort();
}

/// Gives a server certificates with this end, for the keys it has.
fn replace_certificates(server: &Server, until: OffsetDateTime) {
    let tls = server.tls_dir();
    let issuer = authority(&tls);
    for (role, usages) in [
        ("server", vec![ServerAuth]),
        ("peer", vec![ServerAuth, ClientAuth]),
        ("client", vec![ClientAuth]),
    ] {
        let key = fs::read_to_string(tls.join(format!("{role}.key"))).unwrap();
        let key = KeyPair::from_pem(&key).unwrap();
        let wish = Wish { until, usages, ..Wish::of(&uri(&tls, role)) };
        // From the first second that ours have, as the check of a certificate's signature expects.
        let wish = Wish { from: OffsetDateTime::UNIX_EPOCH + time::Duration::days(18_262), ..wish };
        fs::write(tls.join(format!("{role}.crt")), wish.issue_for(&key, &issuer)).unwrap();
    }
}

/// Three boards that lay in a drawer for longer than their certificates last.
#[tokio::test(flavor = "multi_thread")]
async fn three_servers_whose_certificates_have_ended_start_and_serve() {
    let mut servers = Servers::three("");
    servers.all.iter_mut().for_each(Server::stop);
    let before: Vec<_> = servers.all.iter().map(|server| server.printed().len()).collect();
    let now =
        OffsetDateTime::from_unix_timestamp(certificate_time(host::env().clock.wall())).unwrap();
    let (yesterday, soon) = (now - time::Duration::days(1), now + time::Duration::days(30));
    for (server, until) in servers.all.iter().zip([yesterday, yesterday, soon]) {
        replace_certificates(server, until);
    }

    servers.all.iter_mut().for_each(Server::start);
    servers.all.iter_mut().for_each(Server::ready);

    for (server, before) in servers.all.iter().zip(before) {
        let log = &server.printed()[before..];
        let words = [".crt: it had expired", ".crt: it would have expired in "];
        let count: usize = words.iter().map(|words| log.matches(words).count()).sum();
        assert_eq!(count, 3, "{log}");
        serves(server.channel().await, "again").await.unwrap();
    }
    servers.stop();
}

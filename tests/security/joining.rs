//! The door for newcomers: a man in the middle, guesses, and noise.

use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::env::host;
use k3s_server::join::pake::{Context, Joiner, MESSAGE_BYTES};
use k3s_server::join::{AuthorityHash, Token};
use k3s_server::pki::Identity;
use k3s_server::proto::node::{BeginRequest, Credentials, FinishRequest, IntroduceRequest};
use k3s_server::types::ClusterId;
use prost::Message;
use tokio::task::JoinSet;
use tonic::Code;

use crate::client;
use crate::middle::{Middle, Ruse, Visit};
use crate::secrets::Secrets;
use crate::servers::{CONFIGURATION, LONG, Server, Servers, serves};
use crate::support::certificates::uri;

const REFUSED: &str = "refused an attempt to join";
const GIVEN: &str = "gave the cluster's credentials";

fn cluster(server: &Server) -> ClusterId {
    uri(&server.tls_dir(), "peer").parse::<Identity>().unwrap().cluster
}

fn token(server: &Server) -> String {
    fs::read_to_string(server.token_file()).unwrap().trim().to_owned()
}

/// What follows `server:`.
fn password(server: &Server) -> String {
    token(server).rsplit_once(':').unwrap().1.to_owned()
}

/// The secrets that a join is about.
fn secrets(server: &Server) -> Secrets {
    let mut secrets = Secrets::new();
    secrets.add("the password", password(server).as_bytes());
    let key = fs::read_to_string(server.tls_dir().join("ca.key")).unwrap();
    secrets.add_key("the authority's key", &key);
    secrets
}

/// What a joiner that was refused leaves behind: no file of the cluster.
fn has_nothing(joiner: &Server) {
    for file in ["tls", "token", "node.json", "wal", "state.redb"] {
        assert!(!joiner.db_dir().join(file).exists(), "{file} is there");
    }
}

fn count(text: &str, what: &str) -> usize {
    text.matches(what).count()
}

/// Joins through the middle with this token and is refused, in these words.
async fn is_refused(servers: &mut Servers, ruse: Ruse, token: &str, words: &str) -> String {
    let first = &servers.all[0];
    let (door, cluster, before) = (first.door(2380), cluster(first), first.printed());
    let secrets = secrets(first);
    let at = servers.free_addresses()[0];
    let middle = Middle::start(ruse, at, door, cluster).await;
    let joiner = servers.add();
    joiner.configure(&format!("server: https://{at}:6443\ntoken: \"{token}\"\n"));
    joiner.start();
    let mut joiner = servers.all.pop().unwrap();
    let (status, printed) = tokio::task::block_in_place(|| joiner.ended());
    let captured = middle.captured();

    assert_eq!(status, Some(CONFIGURATION), "{ruse:?}: {printed}");
    assert!(printed.contains(words), "{ruse:?}: {printed}");
    assert!(printed.contains("fix: "), "{ruse:?}: {printed}");
    assert!(!captured.is_empty(), "{ruse:?}: nothing went through the middle");
    secrets.are_not_in(&format!("what {ruse:?} captured"), &captured);
    secrets.are_not_in(&format!("what the joiner printed ({ruse:?})"), printed.as_bytes());
    has_nothing(&joiner);
    fs::remove_dir_all(joiner.db_dir()).ok();
    let log = servers.all[0].printed()[before.len()..].to_owned();
    assert_eq!(count(&log, GIVEN), 0, "{ruse:?}: {log}");
    log
}

#[tokio::test(flavor = "multi_thread")]
async fn a_man_in_the_middle_of_a_join_learns_nothing_and_gets_nothing() {
    let mut servers = Servers::one();
    let (full, bare) = (token(&servers.all[0]), password(&servers.all[0]));

    // The token names the authority: anybody else is found out before anything secret happens.
    for ruse in [Ruse::Guess, Ruse::RelayExchange] {
        let log = is_refused(&mut servers, ruse, &full, "token CA hash does not match").await;
        assert_eq!(count(&log, REFUSED), 0, "{log}");
    }
    for token in [&full, &bare] {
        let words = "is not what it says: its certificate is not one of its authority's";
        is_refused(&mut servers, Ruse::Relay, token, words).await;
    }
    // A password alone: whoever does not know it proves nothing, and whoever hands it on is another connection.
    let words = "has not proved that it knows the token's password";
    is_refused(&mut servers, Ruse::Guess, &bare, words).await;
    let words = "its password is not the one of this cluster";
    let log = is_refused(&mut servers, Ruse::RelayExchange, &bare, words).await;
    assert_eq!(count(&log, REFUSED), 1, "one line for the one attempt: {log}");

    serves(servers.all[0].channel().await, "after all").await.unwrap();
    servers.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiretap_on_a_join_that_succeeds_hears_no_secret() {
    let mut servers = Servers::one();
    let first = &servers.all[0];
    let (secrets, token_file) = (secrets(first), first.token_file());
    let at = servers.free_addresses()[0];
    let middle = Middle::start(Ruse::Wiretap, at, first.door(2380), cluster(first)).await;
    let joiner = servers.add();
    let token_file = token_file.display();
    joiner.configure(&format!("server: https://{at}:6443\ntoken-file: {token_file}\n"));
    joiner.start();
    tokio::task::block_in_place(|| joiner.ready());

    assert_eq!(count(&servers.all[0].printed(), GIVEN), 1);
    let captured = middle.captured();
    println!("{} bytes went over the wire", captured.len());
    assert!(2_000 < captured.len(), "the join did not go through the wiretap");
    secrets.are_not_in("the wire", &captured);
    for server in &servers.all {
        secrets.are_not_in("the log", server.printed().as_bytes());
    }
    servers.stop();
}

/// How an attempt ended.
#[derive(Debug)]
enum Guess {
    Right(Credentials),
    Wrong,
    /// Not even looked at.
    TooMany,
}

/// What anybody can know of a server.
#[derive(Clone)]
struct Target {
    door: String,
    authority: AuthorityHash,
    cluster: ClusterId,
}

impl Target {
    fn of(server: &Server) -> Self {
        let ca = fs::read(server.tls_dir().join("ca.crt")).unwrap();
        let authority = AuthorityHash::of(&ca);
        Self { door: server.door(2380), authority, cluster: cluster(server) }
    }
}

/// One attempt to join with a password.
async fn guess(source: Ipv4Addr, target: &Target, password: &str) -> Guess {
    let mut visit = Visit::from(source, &target.door).await.unwrap();
    let Target { authority, cluster, .. } = *target;
    let context = Context { authority, cluster, exporter: *visit.binding.bytes() };
    let password = Token::parse(password).unwrap().password;
    let (joiner, exchange) = Joiner::begin(&*host::env().entropy, &password, context);
    let begun = match visit.client.begin(BeginRequest { exchange }).await {
        Ok(begun) => begun.into_inner(),
        Err(status) => {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            return Guess::TooMany;
        }
    };
    let (expecting, confirmation) = joiner.finish(&begun.exchange).unwrap();
    let request = FinishRequest { session: begun.session, confirmation };
    match visit.client.finish(request).await {
        Ok(reply) => {
            let reply = reply.into_inner();
            let confirmed = expecting.confirm(&reply.confirmation).unwrap();
            let opened = confirmed.open(&reply.sealed).unwrap();
            Guess::Right(Credentials::decode(opened.as_slice()).unwrap())
        }
        Err(status) => {
            assert_eq!(status.code(), Code::PermissionDenied, "{status}");
            Guess::Wrong
        }
    }
}

/// `count` wrong guesses, each from the next of these addresses, some at a time; how many were looked at, of how many, and how
/// long it took.
async fn wrong_guesses(target: &Target, count: u32, sources: u32) -> (usize, Duration) {
    const AT_ONCE: usize = 8;
    let began = Instant::now();
    let mut guesses = JoinSet::new();
    let mut wrong = 0;
    let mut judge = |guess| match guess {
        Guess::Wrong => wrong += 1,
        Guess::TooMany => {}
        Guess::Right(_) => panic!("a wrong password was right"),
    };
    for number in 0..count {
        if guesses.len() == AT_ONCE {
            judge(guesses.join_next().await.unwrap().unwrap());
        }
        let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 1, 1)) + number % sources);
        let target = target.clone();
        guesses.spawn(async move {
            guess(source, &target, &format!("a-wrong-password-{number}")).await
        });
    }
    guesses.join_all().await.into_iter().for_each(&mut judge);
    (wrong, began.elapsed())
}

/// Bounds are those of the gate: five at once and one in two seconds for one source; twenty and five a second for all.
#[tokio::test(flavor = "multi_thread")]
async fn guesses_are_few_whoever_guesses() {
    let servers = Servers::one();
    let server = &servers.all[0];
    let target = Target::of(server);

    let (looked_at, took) = wrong_guesses(&target, 100, 1).await;
    println!("one address: 100 guesses, {looked_at} looked at, in {took:?}");
    let most = 5 + took.as_millis() as usize / 2_000 + 1;
    assert!((1..=most).contains(&looked_at), "{looked_at}, expected at most {most}");

    let (looked_at, took) = wrong_guesses(&target, 400, 200).await;
    println!("200 addresses: 400 guesses, {looked_at} looked at, in {took:?}");
    let most = 20 + took.as_millis() as usize / 200 + 1;
    assert!((1..=most).contains(&looked_at), "{looked_at}, expected at most {most}");

    // Somebody who knows it gets in meanwhile, when there is room again.
    let began = Instant::now();
    let credentials = loop {
        match guess(Ipv4Addr::new(127, 2, 2, 2), &target, &token(server)).await {
            Guess::Right(credentials) => break credentials,
            Guess::TooMany => assert!(began.elapsed() < LONG, "there is never room"),
            Guess::Wrong => panic!("the right password was wrong"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(credentials.cluster, cluster(server).get());
    let key = fs::read(server.tls_dir().join("ca.key")).unwrap();
    assert_eq!(credentials.authority_key_pem, key);

    let printed = server.printed();
    secrets(server).are_not_in("the log", printed.as_bytes());
    assert_eq!(count(&printed, GIVEN), 1);
    servers.stop();
}

/// What may be asked at the door without knowing anything, and the status it has to have.
fn noise() -> Vec<(&'static str, Bytes, Code)> {
    const INTRODUCE: &str = "/node.Join/Introduce";
    const BEGIN: &str = "/node.Join/Begin";
    const FINISH: &str = "/node.Join/Finish";
    let begin = |bytes: usize| {
        let exchange = (0..bytes).map(|n| (n * 167 % 251) as u8).collect::<Vec<_>>();
        BeginRequest { exchange: exchange.into() }.encode_to_vec().into()
    };
    let finish = |bytes: usize| {
        let session: Bytes = vec![9; bytes].into();
        FinishRequest { confirmation: session.clone(), session }.encode_to_vec().into()
    };
    let new =
        IntroduceRequest { wire_version_min: 900, wire_version_max: 901, ..Default::default() };
    let new = new.encode_to_vec().into();
    vec![
        (INTRODUCE, Bytes::new(), Code::FailedPrecondition),
        (INTRODUCE, new, Code::FailedPrecondition),
        (INTRODUCE, Bytes::from_static(b"\xff\xff\xff"), Code::Internal),
        (BEGIN, begin(0), Code::InvalidArgument),
        (BEGIN, begin(MESSAGE_BYTES - 1), Code::InvalidArgument),
        (BEGIN, begin(3_000), Code::InvalidArgument),
        // Of the right form: after the first few it is not even looked at.
        (BEGIN, begin(MESSAGE_BYTES), Code::ResourceExhausted),
        (BEGIN, Bytes::from_static(b"\x0a\xff\xff"), Code::Internal),
        (FINISH, finish(0), Code::NotFound),
        (FINISH, finish(16), Code::NotFound),
        (FINISH, finish(1_500), Code::NotFound),
        ("/node.Join/Nothing", Bytes::new(), Code::Unimplemented),
        ("/node.Peers/Call", Bytes::new(), Code::Unimplemented),
        ("/etcdserverpb.KV/Range", Bytes::new(), Code::Unimplemented),
    ]
}

/// Sends so many requests, a few at a time.
async fn make_noise(server: &Server, requests: usize) {
    const CONNECTIONS: usize = 4;
    const STREAMS: usize = 4;
    let mut callers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let visit = Visit::from(Ipv4Addr::LOCALHOST, &server.door(2380)).await.unwrap();
        for _ in 0..STREAMS {
            let channel = visit.channel.clone();
            callers.spawn(async move {
                for (path, message, code) in
                    noise().into_iter().cycle().take(requests / CONNECTIONS / STREAMS)
                {
                    let status = client::call(&channel, path, message).await.unwrap_err();
                    // The door looks at one in two seconds of the right form, and finds it to be none.
                    let looked_at =
                        code == Code::ResourceExhausted && status.code() == Code::InvalidArgument;
                    assert!(status.code() == code || looked_at, "{path}: {status}");
                }
            });
        }
    }
    callers.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_bad_requests_cost_little() {
    const REQUESTS: usize = 10_000;
    const RSS_KIB_MAX: u64 = 8 << 10;
    let servers = Servers::one();
    let server = &servers.all[0];
    make_noise(server, 800).await;

    let (began, before, printed) = (Instant::now(), server.usage(), server.printed());
    make_noise(server, REQUESTS).await;
    let (took, after) = (began.elapsed(), server.usage());

    let growth = after.rss_kib.saturating_sub(before.rss_kib);
    let each = (after.processor - before.processor) / REQUESTS as u32;
    println!("{REQUESTS} bad requests in {took:?}: {each:?} of processor each, {growth} KiB more");
    assert!(growth <= RSS_KIB_MAX, "{growth} KiB more, expected at most {RSS_KIB_MAX}");
    let lines = server.printed()[printed.len()..].to_owned();
    let most = took.as_secs() as usize + 2;
    assert!(count(&lines, REFUSED) <= most, "in {took:?}, expected at most {most}:\n{lines}");
    // What to do about it stands on a line of its own.
    let said = lines.lines().filter(|line| !line.trim_start().starts_with("fix:"));
    let others = said.filter(|line| !line.contains(REFUSED) && line.contains("join"));
    assert_eq!(others.count(), 0, "{lines}");
    serves(server.channel().await, "after all").await.unwrap();
    servers.stop();
}

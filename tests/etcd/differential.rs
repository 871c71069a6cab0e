//! The same random requests into a real etcd and into our server: every reply and every watched event must agree.
//!
//! Requests are lines of [`crate::script`], so a difference is reported as the shortest script that could be found
//! for it, ready to be pasted into a transcript.
//!
//! - `DIFFERENTIAL_SEED=n` repeats a run.
//! - `DIFFERENTIAL_SECONDS=n` runs for so long, with another seed each time.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::script::Session;
use crate::support::etcd::{Etcd, Release};
use crate::support::random::Random;
use crate::support::{Endpoint, Options, Subject, skip};

const SECONDS: u64 = 60;
/// A run without settings is the same every time: this seed, and so many requests.
const SEED: u64 = 20_261_120;
const REQUESTS: usize = 4_000;
/// Lines per round; every round is a new pair of stores' worth of keys, not of servers.
const LINES: usize = 120;

/// Few keys, so that requests meet. Fewer than twelve: etcd's sort is stable only for short lists.
const KEYS: [&str; 9] = ["a", "a1", "a2", "b", "b\\0", "c/x", "c/y", "d", "\\xff"];
const VALUES: [&str; 6] = ["\"\"", "v", "w", "\"\\0\"", "longer-value", "z*300"];
const LEASES: [i64; 4] = [11, 12, 13, 14];
const STREAMS: [&str; 2] = ["s", "t"];

/// Makes up requests. Knows just enough of the state to make most of them succeed.
struct Generator {
    random: Random,
    /// A guess at the current revision.
    revision: i64,
    /// The last revision that was compacted; known exactly.
    compacted: i64,
    watchers: i64,
    /// Streams used for one watcher each.
    single_streams: usize,
}

impl Generator {
    fn new(random: Random) -> Self {
        Self { random, revision: 1, compacted: 0, watchers: 0, single_streams: 0 }
    }

    fn key(&mut self) -> String {
        format!("\"{}\"", self.random.pick(&KEYS))
    }

    fn value(&mut self) -> String {
        (*self.random.pick(&VALUES)).to_owned()
    }

    fn range(&mut self) -> String {
        let key = self.key();
        match self.random.below(6) {
            0 | 1 => key,
            2 => format!("{key} prefix"),
            3 => format!("{key} from"),
            4 => "\"\\0\" from".to_owned(),
            _ => format!("{key} end={}", self.key()),
        }
    }

    /// Mostly revisions that exist; some compacted, some from the future.
    fn some_revision(&mut self) -> i64 {
        let span = usize::try_from(self.revision.max(1)).unwrap_or(1);
        let back = i64::try_from(self.random.below(span.min(40) + 2)).unwrap_or(0);
        self.revision + 1 - back
    }

    fn put(&mut self) -> String {
        let mut line = format!("put {} {}", self.key(), self.value());
        if self.random.one_in(3) {
            let _ = write!(line, " lease={}", self.random.pick(&LEASES));
        }
        for (option, chance) in [("prev_kv", 3), ("ignore_lease", 12)] {
            if self.random.one_in(chance) {
                let _ = write!(line, " {option}");
            }
        }
        if self.random.one_in(10) {
            line = format!("put {} \"\" ignore_value", self.key());
        }
        line
    }

    fn del(&mut self) -> String {
        let prev = if self.random.one_in(2) { " prev_kv" } else { "" };
        format!("del {}{prev}", self.range())
    }

    fn get(&mut self) -> String {
        let mut line = format!("get {}", self.range());
        let sort = ["KEY", "VERSION", "CREATE", "MOD", "VALUE"];
        let order = ["NONE", "ASCEND", "DESCEND"];
        if self.random.one_in(3) {
            let _ = write!(line, " limit={}", self.random.below(5));
        }
        if self.random.one_in(3) {
            let _ = write!(line, " rev={}", self.some_revision());
        }
        if self.random.one_in(3) {
            let _ = write!(line, " sort={}:{}", self.random.pick(&sort), self.random.pick(&order));
        }
        for option in ["serializable", "keys_only", "count_only"] {
            if self.random.one_in(6) {
                let _ = write!(line, " {option}");
            }
        }
        for option in ["min_mod", "max_mod", "min_create", "max_create"] {
            if self.random.one_in(8) {
                let _ = write!(line, " {option}={}", self.some_revision());
            }
        }
        line
    }

    fn compare(&mut self) -> String {
        let end = match self.random.below(8) {
            0 => " prefix",
            1 => " from",
            _ => "",
        };
        let (target, value) = match self.random.below(5) {
            0 => ("version", self.random.below(4).to_string()),
            1 => ("create", self.some_revision().to_string()),
            2 => ("mod", self.some_revision().to_string()),
            3 => ("lease", self.random.pick(&LEASES).to_string()),
            _ => ("value", self.value()),
        };
        let result = *self.random.pick(&["=", "!=", "<", ">"]);
        format!("{target} {}{end} {result} {value}", self.key())
    }

    fn operations(&mut self, depth: usize) -> String {
        let count = self.random.below(4);
        let operations: Vec<_> = (0..count)
            .map(|_| match self.random.below(if depth < 2 { 8 } else { 7 }) {
                0..=2 => self.put(),
                3 | 4 => self.get(),
                5 | 6 => self.del(),
                _ => self.txn(depth + 1),
            })
            .collect();
        operations.join("; ")
    }

    fn txn(&mut self, depth: usize) -> String {
        let count = self.random.below(3);
        let compares: Vec<_> = (0..count).map(|_| self.compare()).collect();
        let (then, other) = (self.operations(depth), self.operations(depth));
        format!("txn if({}) then({then}) else({other})", compares.join("; "))
    }

    fn lease(&mut self) -> String {
        let id = *self.random.pick(&LEASES);
        match self.random.below(6) {
            0 | 1 => format!("grant 5000 id={id}"),
            2 => format!("revoke {id}"),
            3 => format!("keepalive {id}"),
            4 => "leases".to_owned(),
            _ => format!("ttl {id} keys"),
        }
    }

    fn watch(&mut self) -> Vec<String> {
        let stream = *self.random.pick(&STREAMS);
        if self.random.one_in(4) && 0 < self.watchers {
            let id = self.random.below(usize::try_from(self.watchers).unwrap_or(1));
            // Which events come before the cancellation is a race, so all that are due come first.
            return vec![
                format!("watch {stream} drain"),
                format!("watch {stream} cancel {id}"),
                format!("watch {stream} drain"),
            ];
        }
        if 0 < self.compacted && self.random.one_in(6) {
            // etcd never answers a progress request again on a stream that had a watcher canceled by compaction.
            self.single_streams += 1;
            let (stream, range) = (self.single_streams, self.range());
            let start = 1 + self.random.below(usize::try_from(self.compacted).unwrap_or(1));
            let create = format!("watch single{stream} create {range} rev={start}");
            let count = 1 + usize::from(i64::try_from(start).unwrap_or(0) < self.compacted);
            return vec![create, format!("watch single{stream} recv {count}")];
        }
        self.watchers += 1;
        let mut line = format!("watch {stream} create {}", self.range());
        if self.random.one_in(2) {
            // A watcher from the future holds back the answers to progress requests.
            let oldest = self.compacted.max(1);
            let start = self.some_revision().clamp(oldest, self.revision.max(oldest));
            let _ = write!(line, " rev={start}");
        }
        for (option, chance) in [("prev_kv", 2), ("fragment", 8), ("noput", 8), ("nodelete", 8)] {
            if self.random.one_in(chance) {
                let _ = write!(line, " {option}");
            }
        }
        vec![line, format!("watch {stream} drain")]
    }

    /// The next few lines.
    fn lines(&mut self) -> Vec<String> {
        match self.random.below(60) {
            0..=17 => vec![self.put()],
            18..=23 => vec![self.del()],
            24..=33 => vec![self.get()],
            34..=48 => vec![without_what_crashes_etcd(self.txn(0))],
            49..=54 => vec![self.lease()],
            55 | 56 => self.watch(),
            57 => self.drain(),
            _ => self.compact(),
        }
    }

    fn drain(&mut self) -> Vec<String> {
        STREAMS.iter().map(|stream| format!("watch {stream} drain")).collect()
    }

    /// Watchers that are behind would race with the compaction.
    fn compact(&mut self) -> Vec<String> {
        let mut lines = self.drain();
        let physical = if self.random.one_in(2) { " physical" } else { "" };
        lines.push(format!("compact {}{physical}", self.some_revision()));
        lines
    }

    /// Corrects the guess from a printed header.
    fn learn(&mut self, line: &str, reply: &[String]) {
        let digits = reply
            .first()
            .and_then(|line| line.strip_prefix("rev "))
            .map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
        if let Some(revision) = digits.and_then(|digits| digits.parse().ok()) {
            self.revision = self.revision.max(revision);
            let compacted = line.strip_prefix("compact ").and_then(|rest| rest.split(' ').next());
            let compacted = compacted.and_then(|digits| digits.parse().ok()).unwrap_or(0);
            self.compacted = self.compacted.max(compacted);
        }
    }
}

/// etcd overlooks that a delete from a key on (range_end "\\0") overlaps a put. A put in the same transaction that
/// keeps the value or lease of a key deleted like this then ends the process: "unexpected error during txn with
/// writes", seen with 3.5.30.
fn without_what_crashes_etcd(txn: String) -> String {
    // A prefix of nothing but 0xff has no end either.
    if txn.contains(" from") || txn.contains("\"\\xff\" prefix") {
        txn.replace(" ignore_value", "").replace(" ignore_lease", "")
    } else {
        txn
    }
}

/// What two servers answered differently.
#[derive(Debug)]
struct Difference {
    script: Vec<String>,
    replies: [Vec<String>; 2],
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in &self.script {
            writeln!(f, "> {line}")?;
        }
        let [expected, found] = &self.replies;
        write!(f, "etcd:\n  {}\nours:\n  {}", expected.join("\n  "), found.join("\n  "))
    }
}

/// Two servers and what they were both sent.
struct Pair {
    sessions: [Session; 2],
    script: Vec<String>,
}

impl Pair {
    async fn connect(endpoints: [&Endpoint; 2]) -> Self {
        let sessions = [Session::connect(endpoints[0]).await, Session::connect(endpoints[1]).await];
        Self { sessions, script: Vec::new() }
    }

    /// Sends a line to both. The reply, or how they differ.
    async fn send(&mut self, line: &str) -> Result<Vec<String>, Box<Difference>> {
        self.script.push(line.to_owned());
        let [one, two] = &mut self.sessions;
        if std::env::var_os("DIFFERENTIAL_TRACE").is_some() {
            println!("> {line}");
        }
        let (one, two) = tokio::join!(one.run(line), two.run(line));
        if std::env::var_os("DIFFERENTIAL_TRACE").is_some() {
            println!("{}", one.join("\n"));
        }
        for (name, reply) in [("etcd", &one), ("ours", &two)] {
            let is_gone = reply.iter().any(|line| {
                ["never caught up", "error Unavailable", "error Unknown: transport"]
                    .iter()
                    .any(|start| line.starts_with(start))
            });
            assert!(
                !is_gone,
                "{name} does not answer {line}: {reply:?}\n{}",
                self.script.join("\n")
            );
        }
        if one == two || differ_in_order_of_checks(line, &one, &two) {
            return Ok(one);
        }
        Err(Box::new(Difference { script: self.script.clone(), replies: [one, two] }))
    }
}

/// A transaction may be wrong in two ways at once. Up to 3.5, etcd looks at all its puts first; later it goes in the
/// order of its operations, as we do. Nothing is applied either way.
fn differ_in_order_of_checks(line: &str, one: &[String], two: &[String]) -> bool {
    let checked = |reply: &[String]| {
        let errors =
            ["requested lease not found", "revision has been compacted", "future revision"];
        reply.len() == 1 && errors.iter().any(|error| reply[0].ends_with(error))
    };
    line.starts_with("txn ") && checked(one) && checked(two)
}

/// Runs rounds until so many requests were sent or the time is up. The first difference ends it.
async fn run(
    endpoints: [&Endpoint; 2],
    random: Random,
    requests_max: usize,
    time: Duration,
    change: impl Fn(&str) -> String,
) -> (usize, Option<Box<Difference>>) {
    let deadline = Instant::now() + time;
    let mut generator = Generator::new(random);
    let mut sent = 0;
    while sent < requests_max && Instant::now() < deadline {
        let mut pair = Pair::connect(endpoints).await;
        generator.watchers = 0;
        for stream in STREAMS {
            // etcd answers progress requests only on streams that have a watcher.
            let create = format!("watch {stream} create ~ id=1000");
            for line in [create, format!("watch {stream} drain")] {
                if let Err(difference) = pair.send(&line).await {
                    return (sent, Some(difference));
                }
            }
        }
        let mut left = LINES;
        while 0 < left && sent < requests_max && Instant::now() < deadline {
            for line in generator.lines() {
                left = left.saturating_sub(1);
                sent += 1;
                match pair.send(&change(&line)).await {
                    Ok(reply) => generator.learn(&line, &reply),
                    Err(difference) => return (sent, Some(difference)),
                }
            }
        }
        for stream in STREAMS {
            if let Err(difference) = pair.send(&format!("watch {stream} drain")).await {
                return (sent, Some(difference));
            }
        }
        if let Err(difference) = pair.send("get \"\\0\" from").await {
            return (sent, Some(difference));
        }
    }
    (sent, None)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn random_requests_get_the_same_answers_as_from_a_real_etcd() {
    let Some(release) = Release::newest() else { return skip("no etcd below target/etcd") };
    let seconds = std::env::var("DIFFERENTIAL_SECONDS").ok();
    let (random, seed) = match &seconds {
        Some(_) => Random::from_env("DIFFERENTIAL_SEED"),
        None => Random::from_env_or("DIFFERENTIAL_SEED", SEED),
    };
    let requests_max = if seconds.is_some() { usize::MAX } else { REQUESTS };
    let seconds = seconds.map_or(SECONDS, |text| text.parse().expect("DIFFERENTIAL_SECONDS"));
    let etcd = Etcd::start(&release, &Options::default());
    let subject = Subject::start(&Options::default());
    let endpoints = [etcd.endpoint(), subject.endpoint()];
    let time = Duration::from_secs(seconds);
    let (sent, difference) =
        runtime().block_on(run(endpoints, random, requests_max, time, str::to_owned));
    println!("{sent} requests compared with etcd {}", release.version());
    assert!(difference.is_some() || 100 < sent, "only {sent} requests in {seconds} s");
    if let Some(difference) = difference {
        panic!("DIFFERENTIAL_SEED={seed} differs after {sent} requests:\n{difference}");
    }
}

/// A comparison that finds nothing proves something only if it would have found something.
#[test]
fn a_planted_difference_is_found() {
    let Some(release) = Release::newest() else { return skip("no etcd below target/etcd") };
    let (one, two) =
        (Etcd::start(&release, &Options::default()), Etcd::start(&release, &Options::default()));
    runtime().block_on(async {
        // The second server alone has one more write, so all its revisions are off by one.
        let mut session = Session::connect(two.endpoint()).await;
        session.run("put planted 1").await;
        session.run("del planted").await;
        let endpoints = [one.endpoint(), two.endpoint()];
        let time = Duration::from_secs(10);
        let (sent, difference) =
            run(endpoints, Random::new(1), usize::MAX, time, str::to_owned).await;
        let difference = difference.expect("a planted difference");
        assert!(sent < 20, "found only after {sent} requests: {difference}");
    });
}

/// Watches are compared as thoroughly as replies.
#[test]
fn a_watched_event_that_differs_is_found() {
    let Some(release) = Release::newest() else { return skip("no etcd below target/etcd") };
    let (one, two) =
        (Etcd::start(&release, &Options::default()), Etcd::start(&release, &Options::default()));
    runtime().block_on(async {
        let mut pair = Pair::connect([one.endpoint(), two.endpoint()]).await;
        pair.send("watch s create a prefix prev_kv").await.unwrap();
        pair.send("put a 1").await.unwrap();
        pair.sessions[0].run("put a1 one").await;
        pair.sessions[1].run("put a1 two").await;
        pair.send("put a2 1").await.unwrap();
        let difference = pair.send("watch s drain").await.expect_err("the events differ");
        assert!(difference.to_string().contains("\"one\""), "{difference}");
    });
}

//! Reads `etcd-arg`: settings by the names etcd gives them.
//!
//! Names that mean something here are checked and honoured. Names of things that do not exist here (bbolt
//! tuning, snapshot counts) are accepted with a warning, so that a K3s file works unchanged; names that would
//! move what this daemon decides itself (addresses, certificates) point to the key that does.

use std::time::Duration;

use crate::limits;

use super::key::Kind;
use super::kinds::{self, Wrong};
use super::layer::Item;
use super::problem::{Problem, Problems};
use super::suggest;

/// How large the datastore may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// Above this, only reads, deletes and compactions work.
    Bytes(u64),
    /// Until the card is full.
    Unlimited,
}

/// When old revisions are dropped by the server itself. Kubernetes compacts on its own, so: off by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Only on request.
    Off,
    /// Keep this much time.
    Periodic(Duration),
    /// Keep this many revisions.
    Revisions(i64),
}

/// What etcd's own flags say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EtcdOptions {
    /// `quota-backend-bytes`.
    pub quota: Quota,
    /// `heartbeat-interval`; `None`: what the consensus module chose.
    pub heartbeat_interval: Option<Duration>,
    /// `election-timeout`; `None`: what the consensus module chose.
    pub election_timeout: Option<Duration>,
    /// `watch-progress-notify-interval`.
    pub watch_progress_notify_interval: Duration,
    /// `max-request-bytes`.
    pub max_request_bytes: u64,
    /// `max-txn-ops`.
    pub max_txn_ops: usize,
    /// `max-concurrent-streams`.
    pub max_concurrent_streams: u32,
    /// `auto-compaction-mode` and `auto-compaction-retention`.
    pub auto_compaction: AutoCompaction,
    /// `log-level`, as etcd names it.
    pub log_level: LogLevel,
    /// `metrics=extensive`.
    pub extensive_metrics: bool,
}

/// etcd's log levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Everything.
    Debug,
    /// State changes.
    Info,
    /// Trouble.
    Warn,
    /// Failures.
    Error,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            quota: Quota::Bytes(limits::QUOTA_BACKEND_BYTES),
            heartbeat_interval: None,
            election_timeout: None,
            // K3s' setting; etcd's own default of 10 min delays the API server's consistent reads from cache.
            watch_progress_notify_interval: Duration::from_secs(5),
            max_request_bytes: limits::REQUEST_BYTES_MAX,
            max_txn_ops: limits::TXN_OPS_MAX,
            max_concurrent_streams: limits::CONCURRENT_STREAMS_MAX,
            auto_compaction: AutoCompaction::Off,
            log_level: LogLevel::Info,
            extensive_metrics: false,
        }
    }
}

/// Names that are known but do nothing here, with the reason.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("snapshot-count", "the log is purged by size here"),
    ("snapshot-catchup-entries", "the log is purged by size here"),
    ("max-snapshots", "there are no snapshot files here"),
    ("max-wals", "log files are recycled here"),
    ("backend-batch-interval", "there is no bbolt backend here"),
    ("backend-batch-limit", "there is no bbolt backend here"),
    ("backend-bbolt-freelist-type", "there is no bbolt backend here"),
    ("bootstrap-defrag-threshold-megabytes", "space is reused without it here"),
    ("compaction-batch-limit", "compaction walks only what changed here"),
    ("compaction-sleep-interval", "compaction walks only what changed here"),
    ("initial-corrupt-check", "values are always checked here"),
    ("corrupt-check-time", "values are always checked here"),
    ("compact-hash-check-enabled", "values are always checked here"),
    ("compact-hash-check-time", "values are always checked here"),
    ("enable-lease-checkpoint", "leases are always checkpointed here"),
    ("enable-lease-checkpoint-persist", "leases are always checkpointed here"),
    ("pre-vote", "it is always on here"),
    ("strict-reconfig-check", "it is always on here"),
    ("initial-election-tick-advance", "elections are timed differently here"),
    ("unsafe-no-fsync", "this daemon never acknowledges what is not on the card"),
    ("logger", "logs go to the journal"),
    ("log-outputs", "logs go to the journal"),
    ("log-format", "logs go to the journal"),
    ("enable-pprof", "there is no Go runtime here"),
    ("enable-v2", "the v2 API does not exist here"),
    ("socket-reuse-port", "not needed here"),
    ("socket-reuse-address", "not needed here"),
    ("warning-apply-duration", "not used here"),
    ("warning-unary-request-duration", "not used here"),
    ("max-learners", "the number of learners is not limited by a flag here"),
    ("grpc-keepalive-min-time", "not used here"),
    ("grpc-keepalive-interval", "not used here"),
    ("grpc-keepalive-timeout", "not used here"),
    ("auth-token", "authentication is by certificate here"),
    ("bcrypt-cost", "authentication is by certificate here"),
];

/// Names of things that have their own key, or that this daemon decides.
const ELSEWHERE: &[(&str, &str)] = &[
    ("listen-client-urls", "use `client-listen`"),
    ("advertise-client-urls", "use `node-ip`"),
    ("listen-peer-urls", "use `peer-listen`"),
    ("initial-advertise-peer-urls", "use `node-ip`"),
    ("listen-metrics-urls", "use `metrics-listen`"),
    ("listen-client-http-urls", "use `metrics-listen`"),
    ("data-dir", "use `db-dir`"),
    ("wal-dir", "use `db-dir`"),
    ("name", "use `node-name`"),
    ("initial-cluster", "use `server` and `token`"),
    ("initial-cluster-state", "use `cluster-init` or `server`"),
    ("initial-cluster-token", "use `token`"),
    ("force-new-cluster", "use `cluster-reset`"),
    ("cert-file", "certificates are made by k3s-server"),
    ("key-file", "certificates are made by k3s-server"),
    ("trusted-ca-file", "certificates are made by k3s-server"),
    ("client-cert-auth", "it is always on here"),
    ("peer-cert-file", "certificates are made by k3s-server"),
    ("peer-key-file", "certificates are made by k3s-server"),
    ("peer-trusted-ca-file", "certificates are made by k3s-server"),
    ("peer-client-cert-auth", "it is always on here"),
];

/// Names that mean something here.
const HONOURED: &[&str] = &[
    "quota-backend-bytes",
    "heartbeat-interval",
    "election-timeout",
    "watch-progress-notify-interval",
    "max-request-bytes",
    "max-txn-ops",
    "max-concurrent-streams",
    "auto-compaction-mode",
    "auto-compaction-retention",
    "log-level",
    "metrics",
];

/// etcd elects in at most this many milliseconds.
const ELECTION_MILLIS_MAX: i64 = 50_000;

/// Reads all items, later ones winning. Problems are complete; wrong items leave the default in place.
pub fn read(items: &[Item], problems: &mut Problems) -> EtcdOptions {
    let mut reading = Reading::default();
    for item in items {
        // A malformed item was reported when its kind was checked.
        let Ok((name, value)) = kinds::argument(&item.text) else {
            continue;
        };
        let name = name.strip_prefix("experimental-").unwrap_or(name);
        if !HONOURED.contains(&name) {
            problems.push(without_effect(item, name));
            continue;
        }
        let result = match value {
            Some(value) => reading.apply(name, value, item),
            None => Err(Wrong::new("has no value", format!("{name}=VALUE"))),
        };
        if let Err(wrong) = result {
            let found = value.unwrap_or("nothing").to_owned();
            problems.push(
                Problem::error(item.origin.clone(), format!("etcd-arg {name} {}", wrong.what))
                    .found(found)
                    .expected(wrong.expected),
            );
        }
    }
    reading.finish(problems)
}

fn without_effect(item: &Item, name: &str) -> Problem {
    let problem = |text: String| Problem::warning(item.origin.clone(), text);
    let look_up = |table: &[(&str, &'static str)]| {
        table.iter().find(|(known, _)| *known == name).map(|(_, reason)| *reason)
    };
    if let Some(advice) = look_up(ELSEWHERE) {
        return problem(format!("etcd-arg {name} is ignored")).fix(advice);
    }
    if let Some(reason) = look_up(WITHOUT_EFFECT) {
        return problem(format!("etcd-arg {name} is ignored: {reason}"));
    }
    let shown: String = name.chars().take(64).collect();
    let unknown = problem(format!("etcd-arg {shown} is ignored: it has no meaning here"));
    match suggest::nearest(name, HONOURED.iter().copied()) {
        Some(near) => unknown.fix(format!("write `{near}=...` if that is what you mean")),
        None => unknown,
    }
}

#[derive(Default)]
struct Reading<'a> {
    options: EtcdOptions,
    compaction_by_revision: bool,
    retention: Option<(&'a str, &'a Item)>,
    election: Option<&'a Item>,
}

impl<'a> Reading<'a> {
    fn apply(&mut self, name: &str, value: &'a str, item: &'a Item) -> Result<(), Wrong> {
        let options = &mut self.options;
        match name {
            "quota-backend-bytes" => options.quota = quota(value)?,
            "heartbeat-interval" => options.heartbeat_interval = Some(millis(value, 10, 10_000)?),
            "election-timeout" => {
                options.election_timeout = Some(millis(value, 50, ELECTION_MILLIS_MAX)?);
                self.election = Some(item);
            }
            "watch-progress-notify-interval" => {
                let interval = kinds::duration(value)?;
                if interval.is_zero() {
                    return Err(Wrong::new("is too short", "a duration above 0, such as 5s"));
                }
                options.watch_progress_notify_interval = interval;
            }
            "max-request-bytes" => {
                let max = i64::try_from(limits::REQUEST_BYTES_MAX).unwrap_or(i64::MAX);
                options.max_request_bytes = kinds::integer(value, 1, max)?.unsigned_abs();
            }
            "max-txn-ops" => {
                let ops = kinds::integer(value, 1, 100_000)?.unsigned_abs();
                options.max_txn_ops = usize::try_from(ops).unwrap_or(usize::MAX);
            }
            "max-concurrent-streams" => {
                let streams = kinds::integer(value, 1, i64::from(u32::MAX))?.unsigned_abs();
                options.max_concurrent_streams = u32::try_from(streams).unwrap_or(u32::MAX);
            }
            "auto-compaction-mode" => {
                kinds::check(Kind::OneOf(&["periodic", "revision"]), value)?;
                self.compaction_by_revision = value == "revision";
            }
            "auto-compaction-retention" => self.retention = Some((value, item)),
            "log-level" => options.log_level = log_level(value)?,
            "metrics" => {
                kinds::check(Kind::OneOf(&["basic", "extensive"]), value)?;
                options.extensive_metrics = value == "extensive";
            }
            _ => unreachable!("{name} is listed as honoured and is not"),
        }
        Ok(())
    }

    /// Settles what depends on more than one name.
    fn finish(mut self, problems: &mut Problems) -> EtcdOptions {
        if let Some((value, item)) = self.retention {
            match retention(value, self.compaction_by_revision) {
                Ok(compaction) => self.options.auto_compaction = compaction,
                Err(wrong) => problems.push(
                    Problem::error(
                        item.origin.clone(),
                        format!("etcd-arg auto-compaction-retention {}", wrong.what),
                    )
                    .found(value)
                    .expected(wrong.expected),
                ),
            }
        }
        if let (Some(election), Some(item)) = (self.options.election_timeout, self.election) {
            let heartbeat = self.options.heartbeat_interval.unwrap_or(HEARTBEAT);
            if election < heartbeat * 5 {
                problems.push(
                    Problem::error(
                        item.origin.clone(),
                        "etcd-arg election-timeout is too short for the heartbeat interval",
                    )
                    .found(format!("{} ms", election.as_millis()))
                    .expected(format!("at least 5 x {} ms", heartbeat.as_millis())),
                );
            }
        }
        self.options
    }
}

/// K3s' heartbeat interval and ours.
const HEARTBEAT: Duration = Duration::from_millis(500);

fn quota(value: &str) -> Result<Quota, Wrong> {
    /// Room for the tables themselves.
    const BYTES_MIN: u64 = 16 << 20;
    let bytes = kinds::integer(value, i64::MIN, i64::MAX)?;
    match u64::try_from(bytes) {
        Err(_) => Ok(Quota::Unlimited),
        Ok(0) => Ok(Quota::Bytes(limits::QUOTA_BACKEND_BYTES)),
        Ok(bytes) if bytes < BYTES_MIN => Err(Wrong::new(
            "is too small",
            format!("at least {BYTES_MIN}, 0 for the default, below 0 for no quota"),
        )),
        Ok(bytes) => Ok(Quota::Bytes(bytes)),
    }
}

fn millis(value: &str, min: i64, max: i64) -> Result<Duration, Wrong> {
    let millis = kinds::integer(value, min, max)
        .map_err(|wrong| Wrong::new(wrong.what, format!("milliseconds from {min} to {max}")))?;
    Ok(Duration::from_millis(millis.unsigned_abs()))
}

/// A bare number means hours in periodic mode, as in etcd.
fn retention(value: &str, by_revision: bool) -> Result<AutoCompaction, Wrong> {
    if by_revision {
        return Ok(match kinds::integer(value, 0, i64::MAX)? {
            0 => AutoCompaction::Off,
            revisions => AutoCompaction::Revisions(revisions),
        });
    }
    let period = match kinds::integer(value, 0, 100_000) {
        Ok(hours) => Duration::from_secs(hours.unsigned_abs() * 3_600),
        Err(_) => kinds::duration(value)?,
    };
    Ok(if period.is_zero() { AutoCompaction::Off } else { AutoCompaction::Periodic(period) })
}

fn log_level(value: &str) -> Result<LogLevel, Wrong> {
    match value {
        "debug" => Ok(LogLevel::Debug),
        "info" => Ok(LogLevel::Info),
        "warn" => Ok(LogLevel::Warn),
        "error" | "dpanic" | "panic" | "fatal" => Ok(LogLevel::Error),
        _ => Err(Wrong::new("has an unknown value", "one of debug, info, warn, error")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::origin::Origin;

    fn options(texts: &[&str]) -> (EtcdOptions, String) {
        let items: Vec<Item> = texts
            .iter()
            .map(|text| Item { text: (*text).to_owned(), origin: Origin::CommandLine })
            .collect();
        let mut problems = Problems::default();
        let options = read(&items, &mut problems);
        (options, problems.to_string())
    }

    #[test]
    fn honoured_names_are_honoured() {
        let (options, problems) = options(&[
            "quota-backend-bytes=4294967296",
            "--heartbeat-interval=200",
            "election-timeout=3000",
            "experimental-watch-progress-notify-interval=1m",
            "max-request-bytes=1000000",
            "max-txn-ops=1024",
            "max-concurrent-streams=64",
            "auto-compaction-retention=2",
            "log-level=fatal",
            "metrics=extensive",
        ]);

        assert_eq!(problems, "");
        assert_eq!(
            options,
            EtcdOptions {
                quota: Quota::Bytes(4 << 30),
                heartbeat_interval: Some(Duration::from_millis(200)),
                election_timeout: Some(Duration::from_secs(3)),
                watch_progress_notify_interval: Duration::from_secs(60),
                max_request_bytes: 1_000_000,
                max_txn_ops: 1024,
                max_concurrent_streams: 64,
                auto_compaction: AutoCompaction::Periodic(Duration::from_secs(7_200)),
                log_level: LogLevel::Error,
                extensive_metrics: true,
            }
        );
    }

    #[test]
    fn every_honoured_name_reaches_its_reader() {
        for name in HONOURED {
            let mut reading = Reading::default();
            let item = Item { text: String::new(), origin: Origin::Default };
            drop(reading.apply(name, "1", &item));
        }
    }

    #[test]
    fn later_items_win_and_quota_has_its_two_special_values() {
        assert_eq!(options(&["max-txn-ops=5", "max-txn-ops=6"]).0.max_txn_ops, 6);
        assert_eq!(options(&["quota-backend-bytes=-1"]).0.quota, Quota::Unlimited);
        assert_eq!(options(&["quota-backend-bytes=0"]).0, EtcdOptions::default());
    }

    #[test]
    fn retention_is_read_after_its_mode_whatever_the_order() {
        let (options, problems) =
            options(&["auto-compaction-retention=1000", "auto-compaction-mode=revision"]);

        assert_eq!(problems, "");
        assert_eq!(options.auto_compaction, AutoCompaction::Revisions(1_000));
    }

    #[test]
    fn wrong_values_are_errors_and_leave_the_default() {
        for text in [
            "quota-backend-bytes=2GB",
            "quota-backend-bytes=1000",
            "heartbeat-interval=0",
            "heartbeat-interval=1s",
            "election-timeout=100000",
            "watch-progress-notify-interval=0",
            "max-request-bytes=10485760",
            "max-txn-ops=0",
            "max-txn-ops",
            "auto-compaction-mode=x",
            "auto-compaction-retention=x",
            "log-level=loud",
            "metrics=",
        ] {
            let (options, problems) = options(&[text]);
            assert_eq!(options, EtcdOptions::default(), "{text}");
            assert!(problems.starts_with("command line: etcd-arg "), "{text}: {problems}");
        }
        let (_, problems) = options(&["election-timeout=1000"]);
        assert!(problems.contains("too short for the heartbeat interval"), "{problems}");
    }

    #[test]
    fn other_names_warn_and_say_what_to_use() {
        let (_, problems) = options(&[
            "snapshot-count=1",
            "listen-client-urls=http://x",
            "max-txn-opps=1",
            "zzz=1",
        ]);

        assert_eq!(problems.matches("warning").count(), 4, "{problems}");
        assert!(problems.contains("fix: use `client-listen`"));
        assert!(problems.contains("fix: write `max-txn-ops=...`"));
    }
}

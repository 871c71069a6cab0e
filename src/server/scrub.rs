//! Reads the whole state and the closed log on the card once a week, so that rot is found while there are copies.
//!
//! What nobody reads, nobody misses, until it is all that is left. A checksum is only worth something if it is looked at.
//!
//! # Shape
//!
//! [`Schedule`] (pure) says how long to wait, from what is known of the last scrub and of both clocks. [`run`] waits, reads
//! slowly, tells, and writes down when: in a small file beside the log, once a week.
//!
//! # Invariants
//!
//! - Never faster than [`limits::SCRUB_BYTES_PER_SECOND`], and never in the first minutes of a start.
//! - Damage is told, with its place. It stops nothing: most blocks are not needed now, and whoever needs one finds out. [`super::heal`]
//!   has the node filled again, if others can do that.
//!
//! # Not here
//!
//! What is checked, and how: `mvcc::backend`, `wal::scrub`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use tokio::sync::watch;

use super::patience::Patience;
use super::stamp;
use crate::announce;
use crate::env::Env;
use crate::events::{EventId, fields};
use crate::limits;
use crate::metrics::Page;
use crate::mvcc::{SCRUB_BLOCKS, Store, StoreError};
use crate::wal::{OpenError, Wal};

/// Longest sleep: the wall clock may be set meanwhile.
const LOOK_EVERY: Duration = Duration::from_secs(3_600);

/// Damaged places that are named one by one; a card that is dying has thousands.
const NAMED_MAX: usize = 16;

/// What is read at once.
const STEP_BYTES: u64 = SCRUB_BLOCKS as u64 * limits::WAL_BLOCK_BYTES;

/// When the last scrub was completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    /// Nobody knows.
    Never,
    /// By the wall clock, before this start.
    At(SystemTime),
    /// In this process.
    Here(Instant),
}

/// The decision.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    started: Instant,
    last: Last,
    patience: Patience,
}

impl Schedule {
    /// How long to wait; zero: now.
    fn wait(&self, now: Instant, wall: SystemTime) -> Duration {
        let Patience { scrub_interval: interval, scrub_settle: settle, .. } = self.patience;
        let up = now.saturating_duration_since(self.started);
        let settled = settle.saturating_sub(up);
        match self.last {
            Last::Never => settled,
            Last::Here(at) => interval.saturating_sub(now.saturating_duration_since(at)),
            Last::At(at) => match wall.duration_since(at) {
                Ok(age) => interval.saturating_sub(age).max(settled),
                // The wall clock is not set, or was wrong then: only this start's own time counts.
                Err(_) => interval.saturating_sub(up),
            },
        }
    }
}

/// What the metrics page shows of it.
#[derive(Debug, Default)]
pub(super) struct Progress {
    running: AtomicU64,
    completed: AtomicU64,
    read_bytes: AtomicU64,
    damaged: AtomicU64,
    /// Seconds since 1970.
    last: AtomicU64,
}

/// For the metrics page.
#[derive(Clone, Debug)]
pub(super) struct ScrubMetrics(pub(super) Arc<Progress>);

impl Collector for ScrubMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page::new(encoder);
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        page.counters(&[
            (
                "k3s_server_scrub_completed",
                "Times that the whole state and the closed log were read from the card and checked",
                value(&self.0.completed),
            ),
            (
                "k3s_server_scrub_read_bytes",
                "Bytes read from the card to check them",
                value(&self.0.read_bytes),
            ),
        ])?;
        page.gauges(&[
            (
                "k3s_server_scrub_running",
                "Whether the card is being checked. 1 is yes, 0 is no",
                value(&self.0.running),
            ),
            (
                "k3s_server_scrub_damaged",
                "Damaged places that the last check of the card has found",
                value(&self.0.damaged),
            ),
            (
                "k3s_server_scrub_last_timestamp_seconds",
                "When the card was last checked, in seconds since 1970, 0 if never",
                value(&self.0.last),
            ),
        ])
    }
}

/// What is scrubbed, and where that is remembered.
pub(super) struct Scrubber {
    pub(super) env: Env,
    pub(super) store: Store,
    pub(super) wal: Wal,
    /// The data directory.
    pub(super) path: PathBuf,
    pub(super) progress: Arc<Progress>,
    pub(super) patience: Patience,
    /// Damaged places that the last scrub found, for whoever can do something about it.
    pub(super) damaged: watch::Sender<u64>,
}

/// What one scrub came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    state_bytes: u64,
    log_bytes: u64,
    damaged: u64,
}

/// Scrubs whenever it is due. Ends when the store is closed.
pub(super) async fn run(scrubber: Scrubber) {
    let clock = Arc::clone(&scrubber.env.clock);
    let last = match stamp::read(&scrubber.env, &record(&scrubber.path)) {
        Ok(Some(at)) => Last::At(at),
        // A record that cannot be read costs one scrub.
        Ok(None) | Err(_) => Last::Never,
    };
    if let Last::At(at) = last {
        scrubber.progress.last.store(stamp::seconds(at), Ordering::Relaxed);
    }
    let mut schedule = Schedule { started: clock.now(), last, patience: scrubber.patience };
    while !scrubber.store.is_closed() {
        let wait = schedule.wait(clock.now(), clock.wall());
        if !wait.is_zero() {
            clock.sleep(wait.min(LOOK_EVERY)).await;
            continue;
        }
        let result = scrubber.scrub().await;
        schedule.last = Last::Here(clock.now());
        match result {
            Ok(found) => scrubber.complete(&found).await,
            // The store is closed or failed, and whoever owns it has been told why.
            Err(error) => tracing::debug!(%error, "the scrub was cut short"),
        }
    }
}

impl Scrubber {
    async fn scrub(&self) -> Result<Found, StoreError> {
        self.progress.running.store(1, Ordering::Relaxed);
        let mut found = Found::default();
        let result = match self.scrub_state(&mut found).await {
            Ok(()) => self.scrub_log(&mut found).await,
            Err(error) => Err(error),
        };
        self.progress.running.store(0, Ordering::Relaxed);
        result.map(|()| found)
    }

    async fn scrub_state(&self, found: &mut Found) -> Result<(), StoreError> {
        let mut next = Some(0);
        while let Some(from) = next {
            let store = self.store.clone();
            let scrubbed = blocking(move || store.scrub(from, SCRUB_BLOCKS)).await??;
            for failure in scrubbed.damaged {
                found.damaged += 1;
                if found.damaged <= NAMED_MAX as u64 {
                    announce!(
                        EventId::StateDamaged,
                        { fields::PATH } = %self.store.path().display(),
                        { fields::REASON } = %failure,
                        "found when the card was checked: {failure}"
                    );
                }
            }
            let bytes = u64::from(scrubbed.checked) * limits::WAL_BLOCK_BYTES;
            found.state_bytes += bytes;
            self.pace(bytes).await;
            next = scrubbed.next;
        }
        Ok(())
    }

    async fn scrub_log(&self, found: &mut Found) -> Result<(), StoreError> {
        let mut scrub = self.wal.scrub();
        loop {
            let step;
            (scrub, step) = blocking(move || {
                let step = scrub.step(STEP_BYTES);
                (scrub, step)
            })
            .await?;
            match step {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    found.log_bytes += bytes;
                    self.pace(bytes).await;
                }
                Err(error) => {
                    found.damaged += 1;
                    self.announce_log(&error);
                    self.pace(0).await;
                }
            }
        }
    }

    fn announce_log(&self, error: &OpenError) {
        announce!(
            EventId::LogCorrupt,
            { fields::PATH } = %self.wal.dir().display(),
            { fields::REASON } = %error,
            "found when the card was checked: {error}"
        );
    }

    /// Gives the card to others for as long as reading so much is to take.
    async fn pace(&self, bytes: u64) {
        self.progress.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        let millis = bytes * 1_000 / limits::SCRUB_BYTES_PER_SECOND;
        self.env.clock.sleep(Duration::from_millis(millis)).await;
    }

    /// Tells and remembers that everything was read.
    async fn complete(&self, found: &Found) {
        let wall = self.env.clock.wall();
        self.progress.completed.fetch_add(1, Ordering::Relaxed);
        self.progress.damaged.store(found.damaged, Ordering::Relaxed);
        self.progress.last.store(stamp::seconds(wall), Ordering::Relaxed);
        let Found { state_bytes, log_bytes, damaged } = *found;
        announce!(
            EventId::ScrubCompleted,
            { fields::BYTES } = state_bytes + log_bytes,
            { fields::COUNT } = damaged,
            "checked the card: {} KiB of state and {} KiB of log, {damaged} damaged places",
            state_bytes / 1024,
            log_bytes / 1024
        );
        self.damaged.send_replace(damaged);
        if let Err(error) = stamp::write(&self.env, &record(&self.path), wall).await {
            // Then the next start scrubs once more than it must.
            tracing::warn!(%error, "cannot write down when the card was checked");
        }
    }
}

/// Away from the threads that serve everybody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.map_err(|_stopping| StoreError::Stopping)
}

fn record(path: &Path) -> PathBuf {
    path.join("scrubbed")
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::env::host;
    use crate::metrics::{Metrics, Versions};
    use crate::mvcc::{self, DrainOn};
    use crate::testkit::FaultDisk;
    use crate::types::{LogId, LogIndex, NodeId, Term};
    use crate::wal::{self, Record, Urgency};

    const WEEK: Duration = limits::SCRUB_INTERVAL;
    const SETTLE: Duration = limits::SCRUB_SETTLE;
    const HOUR: Duration = Duration::from_secs(3_600);

    fn wall(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn card_is_checked_a_week_after_the_last_time_and_never_right_after_a_start() {
        let started = Instant::now();
        let now = wall(1_800_000_000);
        let patience = Patience::usual();
        let wait = |last, up: Duration, wall| {
            Schedule { started, last, patience }.wait(started + up, wall)
        };
        for (last, up, wall, expected) in [
            (Last::Never, Duration::ZERO, now, SETTLE),
            (Last::Never, SETTLE, now, Duration::ZERO),
            (Last::At(now - HOUR), SETTLE, now, WEEK - HOUR),
            (Last::At(now - 2 * WEEK), Duration::ZERO, now, SETTLE),
            (Last::At(now - 2 * WEEK), SETTLE * 2, now, Duration::ZERO),
            // A board without a clock: 1970 again, until somebody sets it.
            (Last::At(now - 2 * WEEK), HOUR, wall(5), WEEK - HOUR),
            (Last::At(now - 2 * WEEK), WEEK, wall(5), Duration::ZERO),
            // In this process only its own time counts, wherever the wall clock jumps.
            (Last::Here(started + HOUR), HOUR * 2, wall(5), WEEK - HOUR),
            (Last::Here(started + HOUR), HOUR + WEEK, now + 9 * WEEK, Duration::ZERO),
        ] {
            assert_eq!(wait(last, up, wall), expected, "{last:?} {up:?}");
        }
    }

    async fn scrubber(disk: &FaultDisk) -> Scrubber {
        let env = Env { disk: Arc::new(disk.clone()), ..host::env() };
        let path = PathBuf::from("/db");
        let options = mvcc::Options { cache_bytes: 64 << 10, drain: DrainOn::Task };
        let store = Store::open(&env, &path.join("state.redb"), &options).unwrap();
        let options = wal::Options {
            segment_bytes: 64 << 10,
            slots_min: 1,
            cache_bytes: 0,
            ..wal::Options::default()
        };
        let owner = wal::Identity::default();
        let (wal, _, writer) = Wal::open(&env, &path.join("wal"), owner, options).await.unwrap();
        tokio::spawn(writer.run());
        let (patience, damaged) = (Patience::usual(), watch::Sender::default());
        Scrubber { env, store, wal, path, progress: Arc::default(), patience, damaged }
    }

    async fn fill(scrubber: &Scrubber) {
        for index in 1..=40 {
            let id =
                LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) };
            let entry = Record::Entry { id, payload: vec![7; 900].into() };
            scrubber.wal.append(vec![entry], Urgency::Urgent, |_| ()).unwrap();
            scrubber.wal.flush().await.map(|_durable| ()).unwrap();
        }
        let put = |n: u32| {
            scrubber.store.write(|txn| {
                txn.put(&format!("key{n}").into(), &vec![9; 3_000].into(), 0)?;
                txn.end_revision();
                Ok(())
            })
        };
        (0..100).for_each(|n| put(n).unwrap());
        scrubber.store.checkpoint().unwrap().durable().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn bits_flipped_in_cold_places_are_found_and_serving_goes_on() {
        let disk = FaultDisk::with_dir(Path::new("/db"));
        let scrubber = scrubber(&disk).await;
        fill(&scrubber).await;
        let whole = scrubber.scrub().await.unwrap();
        assert_eq!(whole.damaged, 0);
        let state = disk.content(Path::new("/db/state.redb")).unwrap().len() as u64;
        assert!(whole.state_bytes == state && 60_000 < whole.log_bytes, "{whole:?}");

        disk.flip(Path::new("/db/state.redb"), state / 8192 * 4096 + 99, 3);
        disk.flip(Path::new("/db/wal/slot-00.wal"), 7 * 4096 + 99, 3);
        let failed = scrubber.store.failed();
        let found = scrubber.scrub().await.unwrap();

        assert_eq!((found.damaged, found.state_bytes), (2, whole.state_bytes));
        assert!(scrubber.store.read().is_ok() && scrubber.wal.failed().is_none());
        assert!(tokio::time::timeout(HOUR, failed).await.is_err(), "a scrub stops nothing");
        scrubber.complete(&found).await;
        let versions = Versions { server: "", cluster: "", daemon: "" };
        let mut metrics = Metrics::new(versions, UNIX_EPOCH);
        metrics.collect(ScrubMetrics(Arc::clone(&scrubber.progress)));
        let page = metrics.text();
        let read = 2 * whole.state_bytes + whole.log_bytes + found.log_bytes;
        for line in [
            "k3s_server_scrub_completed_total 1\n".to_owned(),
            "k3s_server_scrub_running 0\n".to_owned(),
            "k3s_server_scrub_damaged 2\n".to_owned(),
            format!("k3s_server_scrub_read_bytes_total {read}\n"),
            "k3s_server_scrub_last_timestamp_seconds 1".to_owned(),
        ] {
            assert!(page.contains(&line), "no `{line}` in\n{page}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_takes_its_time_comes_once_a_week_and_is_remembered_across_starts() {
        let disk = FaultDisk::with_dir(Path::new("/db"));
        let first = scrubber(&disk).await;
        fill(&first).await;
        let before = first.env.clock.now();
        let found = first.scrub().await.unwrap();
        let took = first.env.clock.now() - before;
        let bytes = found.state_bytes + found.log_bytes;
        let seconds = bytes as f64 / limits::SCRUB_BYTES_PER_SECOND as f64;
        assert!(seconds * 0.9 < took.as_secs_f64(), "{bytes} bytes in {took:?}");

        let (progress, store) = (Arc::clone(&first.progress), first.store.clone());
        let env = first.env.clone();
        let completed = || progress.completed.load(Ordering::Relaxed);
        let running = tokio::spawn(run(first));
        tokio::time::sleep(SETTLE + HOUR).await;
        assert_eq!(completed(), 1);
        let at = stamp::read(&env, Path::new("/db/scrubbed")).unwrap().unwrap();
        assert!(at <= env.clock.wall() && env.clock.wall() < at + HOUR);
        tokio::time::sleep(WEEK).await;
        assert_eq!(completed(), 2);
        store.close().await.unwrap();
        tokio::time::sleep(WEEK * 2).await;
        running.await.unwrap();
        assert_eq!(completed(), 2);
    }

    #[tokio::test]
    async fn record_of_the_last_scrub_that_is_nonsense_is_none() {
        let disk = FaultDisk::with_dir(Path::new("/db"));
        let env = Env { disk: Arc::new(disk.clone()), ..host::env() };
        let dir = Path::new("/db");
        assert_eq!(stamp::read(&env, &record(dir)).unwrap(), None);
        for seconds in [5, 1_800_000_000] {
            stamp::write(&env, &record(dir), wall(seconds)).await.unwrap();
            disk.power_cut(|_| crate::testkit::disk::Fate::LOST);
            assert_eq!(stamp::read(&env, &record(dir)).unwrap(), Some(wall(seconds)));
        }
        disk.overwrite(&record(dir), 0, b"x");
        assert_eq!(stamp::read(&env, &record(dir)).unwrap(), None);
        disk.overwrite(&record(dir), 0, &[0xff; 11]);
        assert_eq!(stamp::read(&env, &record(dir)).unwrap(), None);
    }
}

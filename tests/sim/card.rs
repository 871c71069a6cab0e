//! A machine's SD card: the fault-injecting disk, with an observer that reads the log's frames as they pass.
//!
//! The observer decodes every frame that is written to a log file and counts it as durable when the barrier after it
//! has returned. So "is this promise on the card?" is answered by the card, whatever the code above believes.
//!
//! # Invariants
//!
//! - What a power cut leaves is the durable frames and some prefix of those written after them; anything else that is found is a
//!   violation.
//! - Handles of a crashed incarnation change nothing: the disk refuses them, and nothing they tried is counted.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k3s_server::env::{BoxFuture, Disk, DiskFile, Open};
use k3s_server::testkit::disk::{Fate, SyncDelay, random};
use k3s_server::testkit::{FaultDisk, Random};
use k3s_server::types::LogId;
use k3s_server::wal::format::{BLOCK, SlotHeader, decode_frame};
use k3s_server::wal::{Record, inspect};

use crate::log_model::{Held, LogModel, rank};

/// Called with the records of every frame that has become durable, and the log as it is after them. The card is locked
/// meanwhile, so it must not be asked anything.
pub(crate) type OnDurable = Arc<dyn Fn(&[Record], &LogModel) + Send + Sync>;

/// See the module documentation. Clones share the card.
#[derive(Clone)]
pub(crate) struct Card {
    disk: FaultDisk,
    log: Arc<Mutex<Log>>,
    speed: Arc<Mutex<Speed>>,
    on_durable: OnDurable,
    /// Counts crashes.
    life: Arc<Mutex<u64>>,
}

#[derive(Default)]
struct Log {
    durable: LogModel,
    /// The lowest entry in the last durable frame, and whether there was a vote in it.
    last_frame: Option<u64>,
    last_frame_votes: bool,
    /// Written, in order; not covered by a barrier.
    written: Vec<Written>,
    count: u64,
}

struct Written {
    number: u64,
    path: PathBuf,
    records: Vec<Record>,
}

/// How long barriers take.
struct Speed {
    random: Random,
    typical: Duration,
    /// Nothing returns before.
    stalled_until: tokio::time::Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Card {
    /// An empty card.
    pub(crate) fn new(
        dir: &Path,
        random: Random,
        typical: Duration,
        on_durable: OnDurable,
    ) -> Self {
        let card = Self {
            disk: FaultDisk::with_dir(dir),
            log: Arc::default(),
            speed: Arc::new(Mutex::new(Speed {
                random,
                typical,
                stalled_until: tokio::time::Instant::now(),
            })),
            on_durable,
            life: Arc::default(),
        };
        card.arm();
        card
    }

    /// The disk beneath, for faults.
    pub(crate) fn disk(&self) -> &FaultDisk {
        &self.disk
    }

    /// The power went at some write, and is not back.
    pub(crate) fn has_no_power(&self) -> bool {
        self.disk.has_failed() && self.disk.exists(Path::new("/")).is_err()
    }

    /// What is durable now.
    pub(crate) fn durable<T>(&self, look: impl FnOnce(&LogModel) -> T) -> T {
        look(&lock(&self.log).durable)
    }

    /// Barriers take this long on average from now on.
    pub(crate) fn set_typical(&self, typical: Duration) {
        lock(&self.speed).typical = typical;
    }

    /// No barrier returns for this long.
    pub(crate) fn stall(&self, duration: Duration) {
        let until = tokio::time::Instant::now() + duration;
        let mut speed = lock(&self.speed);
        speed.stalled_until = speed.stalled_until.max(until);
    }

    /// The power goes and comes back, and nothing that no barrier has covered is there.
    pub(crate) fn power_cut_losing_everything(&self) {
        self.disk.power_cut(|_| Fate::LOST);
        lock(&self.speed).stalled_until = tokio::time::Instant::now();
        self.arm();
    }

    /// The power goes and comes back. What no barrier has covered is lost, there, or half there.
    pub(crate) fn power_cut(&self, random_fate: Random) {
        self.disk.power_cut(random(random_fate));
        lock(&self.speed).stalled_until = tokio::time::Instant::now();
        self.arm();
    }

    /// The process dies; the kernel lives on.
    pub(crate) fn kill(&self) {
        self.disk.restart();
        self.arm();
    }

    /// Finds out which of the frames under way are there after a crash. An error says what else was found.
    pub(crate) fn settle(&self, wal: &Path, power_lost: bool) -> Result<(), String> {
        let found = read_log(&self.disk, wal)?;
        let mut log = lock(&self.log);
        let mut expected = log.durable.clone();
        let mut settled = agrees(&expected, &found).then(|| expected.clone());
        for frame in &log.written {
            frame.records.iter().for_each(|record| expected.apply(record));
            if agrees(&expected, &found) {
                settled = Some(expected.clone());
            }
        }
        let Some(settled) = settled else {
            return Err(format!(
                "the log after a crash is none of the {} that may be there: found vote {:?} and entries {:?} to {:?}, \
                 durable were vote {:?} and entries to {:?}",
                log.written.len() + 1,
                found.vote,
                found.purged,
                found.last(),
                log.durable.vote,
                log.durable.last(),
            ));
        };
        // Without a power cut everything is found, and still no barrier has covered it.
        if power_lost {
            log.durable = settled;
            log.written.clear();
        }
        Ok(())
    }

    /// One bit of the log flips. False if there is no log yet.
    pub(crate) fn rot(&self, wal: &Path, random: &mut Random) -> bool {
        let slots = self.disk.list(wal).unwrap_or_default();
        if slots.is_empty() {
            return false;
        }
        let slot = &slots[random.index(slots.len())];
        let content = self.disk.durable(slot).unwrap_or_default();
        let Some(end) = content.iter().rposition(|byte| *byte != 0) else { return false };
        self.disk.flip(
            slot,
            random.below(end as u64 + 1),
            u8::try_from(random.below(8)).unwrap_or(0),
        );
        true
    }

    /// After a bit has flipped: `Ok(false)` if the log is known to be damaged, `Ok(true)` if it can be used, which it can if
    /// nothing is missing but what was in the last frame. An error says what was silently forgotten.
    pub(crate) fn settle_rotten(&self, wal: &Path) -> Result<bool, String> {
        let Ok(found) = read_log(&self.disk, wal) else { return Ok(false) };
        let mut log = lock(&self.log);
        let first = log.durable.purged.max(found.purged).map_or(0, |purged| purged.index.get() + 1);
        let is_missing = |(index, held): &(&u64, &Held)| found.entries.get(index) != Some(held);
        let missing = log.durable.entries.range(first..).find(is_missing).map(|(index, _)| *index);
        let last_frame = log.last_frame.unwrap_or(u64::MAX);
        if missing.is_some_and(|missing| missing < last_frame) {
            return Err(format!(
                "a damaged log was taken for torn: entry {missing:?} of {:?} is missing, the last frame began at {last_frame}",
                log.durable.last()
            ));
        }
        if found.vote.map(rank) < log.durable.vote.map(rank) && !log.last_frame_votes {
            return Err(format!(
                "a damaged log forgot its vote {:?} for {:?}",
                log.durable.vote, found.vote
            ));
        }
        log.written.clear();
        log.durable.forget_from(missing, found.vote);
        Ok(true)
    }

    /// The card is overwritten with an older image of itself.
    pub(crate) fn put_back(&self, image: &FaultDisk) {
        self.disk.put_back(image);
        self.arm();
    }

    /// Takes the log as it is found, after an image was put back or damage was done on purpose.
    pub(crate) fn accept(&self, wal: &Path) -> Result<(), String> {
        let found = read_log(&self.disk, wal)?;
        let mut log = lock(&self.log);
        log.written.clear();
        log.durable = found;
        Ok(())
    }

    /// A copy of the whole card as it would be found after pulling it out now.
    pub(crate) fn image(&self) -> FaultDisk {
        let copy = self.disk.fork();
        copy.power_cut(|_| Fate::LOST);
        copy
    }

    /// A snapshot that covers everything up to `last` is durable on this node, wherever its log ends.
    pub(crate) fn covered(&self, last: LogId) {
        lock(&self.log).durable.apply(&Record::Purge(last));
    }

    /// The card, for a process that starts now.
    pub(crate) fn mount(&self) -> Mounted {
        Mounted { card: self.clone(), life: *lock(&self.life) }
    }

    /// The disk has been restarted: its latency is to be set anew, and nobody has it mounted any more.
    fn arm(&self) {
        *lock(&self.life) += 1;
        let speed = Arc::clone(&self.speed);
        let delay: SyncDelay = Arc::new(move |_| {
            let until = lock(&speed).next();
            Box::pin(tokio::time::sleep_until(until))
        });
        self.disk.set_sync_delay(Some(delay));
    }

    fn wrote(&self, path: &Path, bytes: &[u8]) {
        let frame = match SlotHeader::decode(bytes) {
            Ok(_) => bytes.get(BLOCK..).unwrap_or_default(),
            Err(_) => bytes,
        };
        let Ok((_, records)) = decode_frame(frame) else { return };
        let mut log = lock(&self.log);
        log.count += 1;
        let number = log.count;
        log.written.push(Written { number, path: path.to_owned(), records });
    }

    fn synced(&self, path: &Path, upto: u64, done: bool) {
        let mut log = lock(&self.log);
        let mine = |frame: &Written| frame.path == path && frame.number <= upto;
        if !done {
            log.written.retain(|frame| !mine(frame));
            return;
        }
        let Some(newest) = log.written.iter().filter(|frame| mine(frame)).map(|f| f.number).max()
        else {
            return;
        };
        // Frames are chained: an older one in another file is repeated in a newer one, or was never under way.
        let frames: Vec<Written> =
            log.written.extract_if(.., |frame| frame.number <= newest).collect();
        for frame in frames.iter().filter(|frame| mine(frame)) {
            log.note_frame(&frame.records);
            frame.records.iter().for_each(|record| log.durable.apply(record));
            (self.on_durable)(&frame.records, &log.durable);
        }
    }
}

impl Log {
    fn note_frame(&mut self, records: &[Record]) {
        self.last_frame = records.iter().find_map(|record| match record {
            Record::Entry { id, .. } => Some(id.index.get()),
            Record::Vote(_)
            | Record::Committed(_)
            | Record::TruncateAfter(_)
            | Record::Purge(_) => None,
        });
        self.last_frame_votes = records.iter().any(|record| matches!(record, Record::Vote(_)));
    }
}

impl Speed {
    fn next(&mut self) -> tokio::time::Instant {
        let micros = u64::try_from(self.typical.as_micros()).unwrap_or(0);
        let micros = micros / 2 + self.random.below(micros.max(1));
        let usual = tokio::time::Instant::now() + Duration::from_micros(micros);
        usual.max(self.stalled_until)
    }
}

fn agrees(expected: &LogModel, found: &LogModel) -> bool {
    // What was purged may be remembered or not where nothing depends on it: the snapshot that covers it is in the state.
    let first = expected.purged.max(found.purged).map_or(0, |purged| purged.index.get() + 1);
    expected.vote == found.vote && expected.entries.range(first..).eq(found.entries.range(first..))
}

fn read_log(disk: &FaultDisk, wal: &Path) -> Result<LogModel, String> {
    let mut model = LogModel::default();
    if !disk.exists(wal).map_err(|error| error.to_string())? {
        return Ok(model);
    }
    let dump = inspect::entries(disk, wal).map_err(|error| format!("log: {error}"))?;
    let state = dump.state();
    model.vote = state.vote;
    if let Some(purged) = state.purged {
        model.apply(&Record::Purge(purged));
    }
    for entry in dump {
        let entry = entry.map_err(|error| format!("log: {error}"))?;
        model.apply(&Record::Entry { id: entry.id, payload: entry.payload });
    }
    Ok(model)
}

/// The card as one life of the process sees it: when that has ended, nothing can be opened or changed any more, also not by a
/// task that nobody stopped.
#[derive(Clone)]
pub(crate) struct Mounted {
    card: Card,
    life: u64,
}

impl Mounted {
    fn disk(&self) -> io::Result<&FaultDisk> {
        if *lock(&self.card.life) == self.life {
            Ok(&self.card.disk)
        } else {
            Err(io::Error::other("this process has crashed"))
        }
    }
}

impl Disk for Mounted {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk()?.open(path, how)?;
        if path.extension().is_none_or(|extension| extension != "wal") {
            return Ok(file);
        }
        Ok(Arc::new(LogFile { card: self.card.clone(), file, path: path.to_owned() }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.disk()?.list(dir)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.disk()?.create_dir_all(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk()?.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk()?.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk()?.sync_dir(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.disk()?.exists(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.disk()?.free_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        Disk::lock(self.disk()?, path)
    }
}

/// An open file of the log.
struct LogFile {
    card: Card,
    file: Arc<dyn DiskFile>,
    path: PathBuf,
}

impl std::fmt::Debug for LogFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LogFile({})", self.path.display())
    }
}

impl DiskFile for LogFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let had_failed = self.card.disk.has_failed();
        let written = self.file.write_at(bytes, offset);
        // A write during which the power goes may have reached the card; nothing works from then on.
        let power_went = || !had_failed && self.card.disk.has_failed() && self.file.len().is_err();
        if written.is_ok() || power_went() {
            self.card.wrote(&self.path, bytes);
        }
        written
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let upto = lock(&self.card.log).count;
            let synced = self.file.sync().await;
            // A barrier that was cut off by a crash says nothing about what is on the card; one that failed does.
            let cut_off = synced.is_err() && self.file.len().is_err();
            if !cut_off {
                self.card.synced(&self.path, upto, synced.is_ok());
            }
            synced
        })
    }
}

//! Runs a log on a faulty disk beside its model.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k3s_server::testkit::{self, FaultDisk, ManualClock};
use k3s_server::types::{ClusterId, LogIndex, NodeId};
use k3s_server::wal::{Entry, Identity, OpenError, Options, Record, Recovery, Urgency, Wal};

use crate::model::Model;

pub(crate) const DIR: &str = "/data/wal";

/// Largest payload that fits a slot of these tests.
pub(crate) const PAYLOAD_MAX: u64 = 48 * 1024;

pub(crate) const IDENTITY: Identity =
    Identity { cluster: ClusterId::new(0xc1), node: NodeId::new(0x0de) };

pub(crate) fn options() -> Options {
    Options {
        linger: Duration::from_millis(1),
        segment_bytes: 64 * 1024,
        slots_min: 2,
        slots_max: 4,
        cache_bytes: 2000,
        fill_pause: Duration::ZERO,
        ..Options::default()
    }
}

pub(crate) fn disk() -> FaultDisk {
    FaultDisk::with_dir(Path::new("/data"))
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A running log, what was appended to it, and how much of that was acknowledged.
pub(crate) struct Run {
    pub(crate) wal: Wal,
    pub(crate) recovery: Recovery,
    writer: tokio::task::JoinHandle<()>,
    /// The model before any append, after the first, and so on.
    pub(crate) history: Vec<Model>,
    acknowledged: Arc<AtomicUsize>,
    order: Arc<Mutex<Vec<usize>>>,
}

/// What is known about a log that crashed.
pub(crate) struct Crashed {
    pub(crate) history: Vec<Model>,
    pub(crate) acknowledged: usize,
}

impl Run {
    pub(crate) async fn open(disk: &FaultDisk, seed: u64) -> Result<Self, OpenError> {
        let env = testkit::env(disk, &ManualClock::new(), seed);
        let (wal, recovery, writer) = Wal::open(&env, Path::new(DIR), IDENTITY, options()).await?;
        let history = vec![read(&wal)];
        Ok(Self {
            wal,
            recovery,
            writer: tokio::spawn(writer.run()),
            history,
            acknowledged: Arc::default(),
            order: Arc::default(),
        })
    }

    pub(crate) fn model(&self) -> &Model {
        self.history.last().unwrap()
    }

    pub(crate) fn append(&mut self, records: Vec<Record>) {
        let mut model = self.model().clone();
        for record in &records {
            model.apply(record);
        }
        let number = self.history.len();
        let (acknowledged, order) = (Arc::clone(&self.acknowledged), Arc::clone(&self.order));
        let done = move |result: Result<_, _>| {
            order.lock().unwrap().push(number);
            if result.is_ok() {
                acknowledged.store(number, Ordering::Relaxed);
            }
        };
        self.wal.append(records, Urgency::Urgent, done).unwrap();
        self.history.push(model);
        if self.wal.failed().is_none() {
            assert_eq!(self.wal.hard_state(), self.model().state, "state is not visible at once");
        }
    }

    pub(crate) async fn flush(&self) -> bool {
        self.wal.flush().await.is_ok()
    }

    /// Appends everything, each with its own barrier; stops at the first failure.
    pub(crate) async fn follow(&mut self, script: &[Vec<Record>]) {
        for records in script {
            self.append(records.clone());
            if !self.flush().await {
                return;
            }
        }
    }

    pub(crate) async fn close(self) {
        self.wal.close().await.unwrap();
        self.writer.await.unwrap();
    }

    /// The process is gone.
    pub(crate) async fn crash(self) -> Crashed {
        self.writer.abort();
        self.writer.await.ok();
        let order = self.order.lock().unwrap();
        assert!(order.is_sorted(), "called back out of order: {order:?}");
        assert_eq!(order.len(), self.history.len() - 1, "not everybody was called back");
        let acknowledged = self.acknowledged.load(Ordering::Relaxed);
        Crashed { history: self.history, acknowledged }
    }
}

/// Everything a log holds, read back in small portions.
pub(crate) fn read(wal: &Wal) -> Model {
    let mut model = Model { state: wal.hard_state(), ..Model::default() };
    let mut next = LogIndex::new(0);
    loop {
        let entries = wal.entries(next..LogIndex::new(u64::MAX), 5000).unwrap();
        let Some(last) = entries.last() else { return model };
        next = last.id.index.next();
        insert(&mut model, entries);
    }
}

fn insert(model: &mut Model, entries: Vec<Entry>) {
    for entry in entries {
        model.entries.insert(entry.id.index.get(), entry);
    }
}

impl Crashed {
    /// Opens what is left and checks that it is the model after some append that may be the last.
    pub(crate) async fn check(&self, disk: &FaultDisk, seed: u64, what: &str) -> Model {
        let run = match Run::open(disk, seed).await {
            Ok(run) => run,
            Err(error) => panic!("{what}: does not open: {error}"),
        };
        let found = run.model().clone();
        self.check_model(&found, what);
        run.crash().await;
        found
    }

    /// Returns how many appends survived, at the least.
    pub(crate) fn check_model(&self, found: &Model, what: &str) -> usize {
        let possible = &self.history[self.acknowledged..];
        match possible.iter().position(|model| model == found) {
            Some(position) => self.acknowledged + position,
            None => panic!(
                "{what}: {} of {} appends were acknowledged, found {:?} with entries {:?}, expected one of {:?}",
                self.acknowledged,
                self.history.len() - 1,
                found.state,
                found.entries.keys(),
                possible
                    .iter()
                    .map(|m| (m.state, m.entries.keys().collect::<Vec<_>>()))
                    .collect::<Vec<_>>(),
            ),
        }
    }
}

/// The log can be used: takes an entry, and has it after an orderly stop.
pub(crate) async fn check_usable(disk: &FaultDisk, seed: u64, what: &str) {
    let mut run = Run::open(disk, seed).await.unwrap();
    let records = vec![crate::model::entry(9, run.model().next_index(), "after the crash")];
    run.append(records);
    assert!(run.flush().await, "{what}: cannot write after recovery");
    let expected = run.model().clone();
    run.close().await;
    let run = Run::open(disk, seed + 1).await.unwrap();
    assert!(run.recovery.clean, "{what}: an orderly stop was not noticed");
    assert_eq!(*run.model(), expected, "{what}");
    run.close().await;
}

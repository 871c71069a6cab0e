//! A load that remembers what was promised to it, and holds the cluster to that.
//!
//! Every write has a key of its own, so that one with an unknown outcome says nothing about any other.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, TlsOptions};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::machine::{LONG, Machine, until};

/// Between two attempts of a writer that was refused.
const REST: Duration = Duration::from_millis(20);

/// A client of one machine, through the crate `etcd-client`.
pub async fn connect(machine: &Machine) -> Client {
    connect_within(machine, Duration::from_secs(20)).await
}

/// A client whose calls take so long at most.
pub async fn connect_within(machine: &Machine, timeout: Duration) -> Client {
    let (options, url) = options(machine, timeout);
    Client::connect([url], Some(options)).await.unwrap()
}

fn options(machine: &Machine, timeout: Duration) -> (ConnectOptions, String) {
    let file = |name: &str| fs::read(machine.db_dir().join("tls").join(name)).unwrap();
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(file("ca.crt")))
        .identity(Identity::from_pem(file("client.crt"), file("client.key")));
    let options = ConnectOptions::new().with_tls(tls).with_timeout(timeout);
    (options, machine.client_url())
}

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// One writer's promises: key and the revision that was answered.
#[derive(Debug, Default)]
struct Promises {
    kept: Vec<(String, i64)>,
    failed: usize,
    /// From the moment one write was answered to that of the next.
    gap: Duration,
}

/// Writers that run.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: Vec<JoinHandle<Promises>>,
    runtime: Runtime,
}

async fn write(
    options: ConnectOptions,
    url: String,
    name: String,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
) -> Promises {
    let mut client = Client::connect([url], Some(options)).await.unwrap();
    let mut promises = Promises::default();
    let mut last = Instant::now();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("ledger/{name}/{number}");
        match client.put(key.clone(), key.clone(), None).await {
            Ok(reply) => {
                promises.kept.push((key, reply.header().unwrap().revision()));
                acknowledged.fetch_add(1, Ordering::Relaxed);
                promises.gap = promises.gap.max(last.elapsed());
                last = Instant::now();
            }
            Err(_) => {
                promises.failed += 1;
                tokio::time::sleep(REST).await;
            }
        }
    }
    promises
}

impl Load {
    /// One writer through each of these machines.
    pub fn start<'a>(machines: impl IntoIterator<Item = &'a Machine>) -> Self {
        let runtime = runtime();
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::<AtomicU64>::default();
        let writers = machines.into_iter().map(|machine| {
            let (options, url) = options(machine, Duration::from_secs(3));
            let (stop, acknowledged) = (Arc::clone(&stop), Arc::clone(&acknowledged));
            runtime.spawn(write(options, url, machine.name.clone(), stop, acknowledged))
        });
        let writers = writers.collect();
        Self { stop, acknowledged, writers, runtime }
    }

    /// Waits until so many more writes were answered.
    pub fn goes_on(&self, more: u64) -> Duration {
        let target = self.acknowledged.load(Ordering::Relaxed) + more;
        until("writes go on", || target <= self.acknowledged.load(Ordering::Relaxed))
    }

    /// Ends the load.
    pub fn stop(self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        let mut ledger = Ledger::default();
        for writer in self.writers {
            let ended = async { tokio::time::timeout(LONG, writer).await };
            let promises = self.runtime.block_on(ended).expect("a writer that ends").unwrap();
            let mut before = 0;
            for (key, revision) in promises.kept {
                assert!(before < revision, "{key} got revision {revision} after {before}");
                before = revision;
                ledger.kept.insert(key, revision);
            }
            ledger.failed += promises.failed;
            ledger.gap = ledger.gap.max(promises.gap);
        }
        ledger
    }
}

/// What was promised to all writers.
#[derive(Debug, Default)]
pub struct Ledger {
    kept: BTreeMap<String, i64>,
    pub failed: usize,
    /// Longest time without an answer, over the writers that had one afterwards.
    pub gap: Duration,
}

impl Ledger {
    /// Reads everything through this machine, and compares.
    pub fn check(&self, machine: &Machine) {
        assert!(!self.kept.is_empty(), "nothing was promised, so nothing was tested");
        let found: BTreeMap<String, (String, i64)> = runtime().block_on(async {
            let mut client = connect(machine).await;
            let options = GetOptions::new().with_prefix();
            let reply = client.get("ledger/", Some(options)).await.unwrap();
            let kvs = reply.kvs().iter();
            kvs.map(|kv| {
                let (key, value) = (kv.key_str().unwrap(), kv.value_str().unwrap());
                (key.to_owned(), (value.to_owned(), kv.mod_revision()))
            })
            .collect()
        });
        for (key, revision) in &self.kept {
            let Some((value, found_at)) = found.get(key) else {
                panic!("{key} was promised at revision {revision} and is lost on {}", machine.name)
            };
            assert_eq!((value, found_at), (key, revision), "{key} on {}", machine.name);
        }
    }

    pub fn promises(&self) -> usize {
        self.kept.len()
    }
}

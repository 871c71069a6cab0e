//! Many watchers of one prefix, and writers that keep them busy.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, WatchOptions, WatchStream};
use tokio::task::JoinSet;

use super::{Random, Recorder};

const PREFIX: &str = "/watched/";
/// Watchers that share a stream, as those of an API server do.
const PER_STREAM: usize = 50;

/// Open watches.
pub struct Watchers {
    streams: Vec<WatchStream>,
}

impl Watchers {
    /// Opens `count` watches of the whole prefix.
    pub async fn open(connections: &mut [Client], count: usize) -> Result<Self, Box<dyn Error>> {
        let options = || Some(WatchOptions::new().with_prefix());
        let mut streams = Vec::new();
        for index in 0..count.div_ceil(PER_STREAM) {
            let next = index % connections.len();
            let mut stream = connections[next].watch(PREFIX, options()).await?;
            let watches = PER_STREAM.min(count - index * PER_STREAM);
            for _ in 1..watches {
                stream.watch(PREFIX, options()).await?;
            }
            // All are created before anything is written.
            let mut created = 0;
            while created < watches {
                let message = stream.message().await?.ok_or("the stream ended")?;
                created += usize::from(message.created());
            }
            streams.push(stream);
        }
        Ok(Self { streams })
    }

    /// `writers` write for `length`; how many events arrived, everything that was due included, and in how many seconds.
    pub async fn deliver(
        self,
        connections: &[Client],
        writers: usize,
        length: Duration,
    ) -> (Recorder, u64, f64) {
        let recorder = Recorder::new();
        let delivered = Arc::new(AtomicU64::new(0));
        let watchers = self.streams.len();
        let mut readers = JoinSet::new();
        for stream in self.streams {
            readers.spawn(count(stream, Arc::clone(&delivered)));
        }
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for number in 0..writers {
            let client = connections[number % connections.len()].clone();
            tasks.spawn(write_on(client, recorder.clone(), number as u64 + 1));
        }
        recorder.run_for(length).await;
        tasks.join_all().await;
        // Until nothing more comes for a second.
        let mut last = (delivered.load(Ordering::Relaxed), Instant::now());
        while last.1.elapsed() < Duration::from_secs(1) && watchers > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = delivered.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
        }
        let seconds = (last.1 - begin).as_secs_f64();
        readers.abort_all();
        (recorder, last.0, seconds)
    }
}

async fn count(mut stream: WatchStream, delivered: Arc<AtomicU64>) {
    while let Ok(Some(message)) = stream.message().await {
        delivered.fetch_add(message.events().len() as u64, Ordering::Relaxed);
    }
}

async fn write_on(client: Client, recorder: Recorder, seed: u64) {
    let mut random = Random::new(seed);
    let mut client = client.kv_client();
    while recorder.goes_on() {
        let key = format!("{PREFIX}{:06}", random.next() % 1_000);
        let begin = Instant::now();
        match client.put(key, random.object(256), None).await {
            Ok(_) => recorder.succeeded("put", begin.elapsed(), 256),
            Err(error) => recorder.failed(&error),
        }
    }
}

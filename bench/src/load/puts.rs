//! Plain writes, and reads beside them: as many clients as asked for, or as many writes a second.

use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions};
use tokio::task::JoinSet;

use super::{Random, Recorder};

const KEYS: u64 = 10_000;
const PREFIX: &str = "/bench/";

fn key(number: u64) -> String {
    format!("{PREFIX}{number:012}")
}

/// `clients` clients write values of `size` bytes one after the other for `length`.
pub async fn closed_loop(
    connections: &[Client],
    clients: usize,
    size: usize,
    length: Duration,
) -> Recorder {
    let recorder = Recorder::new();
    let mut tasks = JoinSet::new();
    for number in 0..clients {
        let client = connections[number % connections.len()].clone();
        tasks.spawn(write_on(client, recorder.clone(), number as u64 + 1, size));
    }
    recorder.run_for(length).await;
    tasks.join_all().await;
    recorder
}

async fn write_on(client: Client, recorder: Recorder, seed: u64, size: usize) {
    let mut random = Random::new(seed);
    let mut client = client.kv_client();
    while recorder.goes_on() {
        let key = key(random.next() % KEYS);
        let bytes = key.len() + size;
        let value = random.noise(size);
        let begin = Instant::now();
        match client.put(key, value, None).await {
            Ok(_) => recorder.succeeded("put", begin.elapsed(), bytes),
            Err(error) => {
                recorder.failed(&error);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// `rate` writes a second whatever becomes of them, in turn over the connections. A latency begins when the write was due. Writes
/// through connection `n` are recorded as `put-n`.
pub async fn open_loop(connections: &[Client], rate: f64, length: Duration) -> Recorder {
    let recorder = Recorder::new().with_points();
    let begin = Instant::now();
    let mut random = Random::new(1);
    let mut tasks = JoinSet::new();
    for number in 0.. {
        let due = begin + Duration::from_secs_f64(f64::from(number) / rate);
        if due > begin + length {
            break;
        }
        tokio::time::sleep_until(due.into()).await;
        let index = number as usize % connections.len();
        let mut client = connections[index].kv_client();
        let (key, value) = (key(random.next() % KEYS), random.noise(256));
        let recorder = recorder.clone();
        tasks.spawn(async move {
            let bytes = key.len() + value.len();
            match client.put(key, value, None).await {
                Ok(_) => recorder.succeeded(&format!("put-{index}"), due.elapsed(), bytes),
                Err(error) => recorder.failed(&error),
            }
        });
        while tasks.try_join_next().is_some() {}
    }
    tasks.join_all().await;
    recorder
}

/// A third of the clients' calls are writes, the others reads of every kind.
pub async fn mixed(connections: &[Client], clients: usize, length: Duration) -> Recorder {
    let recorder = Recorder::new();
    let mut tasks = JoinSet::new();
    for number in 0..clients {
        let client = connections[number % connections.len()].clone();
        tasks.spawn(mixed_on(client, recorder.clone(), number as u64 + 1));
    }
    recorder.run_for(length).await;
    tasks.join_all().await;
    recorder
}

async fn mixed_on(client: Client, recorder: Recorder, seed: u64) {
    let mut random = Random::new(seed);
    let mut client = client.kv_client();
    while recorder.goes_on() {
        let key = key(random.next() % KEYS);
        let choice = random.fraction();
        let begin = Instant::now();
        let (operation, bytes, done) = if choice < 0.05 {
            let options = GetOptions::new().with_prefix().with_limit(500);
            ("read-list", 0, client.get(PREFIX, Some(options)).await.map(drop))
        } else if choice < 0.35 {
            let options = GetOptions::new().with_serializable();
            ("read-serializable", 0, client.get(key, Some(options)).await.map(drop))
        } else if choice < 0.70 {
            ("read", 0, client.get(key, None).await.map(drop))
        } else {
            let bytes = key.len() + 256;
            ("put", bytes, client.put(key, random.object(256), None).await.map(drop))
        };
        match done {
            Ok(()) => recorder.succeeded(operation, begin.elapsed(), bytes),
            Err(error) => recorder.failed(&error),
        }
    }
}

/// Writes `count` new keys of `size` bytes as fast as it goes.
pub async fn fill(connections: &[Client], count: u64, size: usize) -> Recorder {
    let recorder = Recorder::new();
    let mut tasks = JoinSet::new();
    let clients = 64;
    for number in 0..clients {
        let mut client = connections[number as usize % connections.len()].kv_client();
        let recorder = recorder.clone();
        tasks.spawn(async move {
            let mut random = Random::new(number + 1);
            for index in (number..count).step_by(clients as usize) {
                let begin = Instant::now();
                match client.put(key(index), random.noise(size), None).await {
                    Ok(_) => recorder.succeeded("put", begin.elapsed(), size),
                    Err(error) => recorder.failed(&error),
                }
            }
        });
    }
    tasks.join_all().await;
    recorder
}

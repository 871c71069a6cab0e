//! A server under abuse, beside a well-behaved client that remembers what it was promised.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use k3s_server::proto::etcdserverpb as pb;
use pb::kv_client::KvClient;
use tonic::transport::Channel;

use crate::client;
use crate::support::ours::Ours;
use crate::support::{Endpoint, Options};

/// Longest time a well-behaved client waits for an answer, on a busy machine.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Memory that abuse may cost, whatever it is. Measured: an idle server of this build has 30 MiB.
const RSS_MIB_MAX: u64 = 192;

pub struct Host {
    ours: Ours,
    channel: Channel,
    written: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Host {
    /// Plain HTTP/2: for everything that is not about TLS.
    pub async fn plain() -> Self {
        Self::start(&Options::default()).await
    }

    /// As in production.
    pub async fn with_tls() -> Self {
        Self::start(&Options { tls: true, ..Options::default() }).await
    }

    /// Blocks the test's own thread, on purpose: a server dies with the thread that started it.
    pub async fn start(options: &Options) -> Self {
        let ours = Ours::start(options);
        let channel = client::channel(ours.endpoint()).await.unwrap();
        let mut host = Self { ours, channel, written: BTreeMap::new() };
        host.write("before", "any abuse").await;
        host
    }

    pub fn endpoint(&self) -> &Endpoint {
        self.ours.endpoint()
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    /// Writes a key that must never be lost again.
    pub async fn write(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        let (key, value) = (key.into(), value.into());
        let put = pb::PutRequest {
            key: key.clone().into(),
            value: value.clone().into(),
            ..Default::default()
        };
        let answer = tokio::time::timeout(ANSWER_MAX, self.kv().put(put)).await;
        answer.expect("an answer in time").expect("an ordinary put");
        self.written.insert(key, value);
    }

    /// The server is there, serves, has a bounded size, and everything it promised.
    pub async fn is_well(&mut self) {
        self.write(format!("after-{}", self.written.len()), "abuse").await;
        self.has_everything().await;
        let rss = self.rss_mib();
        assert!(rss <= RSS_MIB_MAX, "{rss} MiB, expected at most {RSS_MIB_MAX}");
        self.has_not_panicked();
    }

    async fn has_everything(&self) {
        for (key, value) in &self.written {
            let range = pb::RangeRequest { key: key.clone().into(), ..Default::default() };
            let answer = tokio::time::timeout(ANSWER_MAX, self.kv().range(range)).await;
            let found = answer.expect("an answer in time").expect("an ordinary get").into_inner();
            let found: Vec<_> = found.kvs.iter().map(|kv| &kv.value[..]).collect();
            assert!(found == [&value[..]], "lost {}", key.escape_ascii());
        }
    }

    /// Killed and started again, it still has everything.
    pub async fn survives_a_kill(mut self) {
        self.has_not_panicked();
        self.ours.kill();
        self.ours.restart();
        self.channel = client::channel(self.ours.endpoint()).await.unwrap();
        self.has_everything().await;
        self.stops().await;
    }

    /// Told to stop, it does, with status 0.
    pub async fn stops(mut self) {
        drop(self.channel);
        let log = log(self.ours.pid());
        let stopped = self.ours.stop();
        let printed = fs::read_to_string(log).unwrap();
        assert!(stopped, "did not stop with status 0:\n{printed}");
        assert!(!printed.contains("panicked"), "{printed}");
    }

    pub fn rss_mib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.ours.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: u64 = line.trim().strip_suffix(" kB").unwrap().trim().parse().unwrap();
        kib / 1024
    }

    fn has_not_panicked(&self) {
        let printed = fs::read_to_string(log(self.ours.pid())).unwrap();
        assert!(!printed.contains("panicked"), "{printed}");
    }
}

/// The file that a child's output goes to.
fn log(pid: u32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/fd/1")).expect("the server runs")
}

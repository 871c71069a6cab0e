//! Real etcds of several versions, as `.ci/setup` unpacked them below target/etcd/.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::certificates::{self, ServerFiles};
use super::process::{Process, free_ports};
use super::{Endpoint, Options};

/// One unpacked version: the programs etcd, etcdctl and (from 3.5 on) etcdutl.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// 3.5.16 as [3, 5, 16], so that the newest is the largest.
    numbers: Vec<u32>,
    dir: PathBuf,
}

impl Release {
    /// All that are there, oldest first.
    pub fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/etcd");
        let Ok(entries) = root.read_dir() else { return Vec::new() };
        let mut found: Vec<_> = entries
            .filter_map(|entry| {
                let dir = entry.ok()?.path();
                let name = dir.file_name()?.to_str()?;
                let numbers: Result<Vec<u32>, _> = name.split('.').map(str::parse).collect();
                let numbers = numbers.ok()?;
                dir.join("etcd").is_file().then_some(Self { numbers, dir })
            })
            .collect();
        found.sort();
        found
    }

    /// The newest of all.
    pub fn newest() -> Option<Self> {
        Self::all().pop()
    }

    /// The one with this version. Panics with what there is if there is none.
    pub fn named(version: &str) -> Self {
        let all = Self::all();
        let known: Vec<_> = all.iter().map(Self::version).collect();
        let found = all.iter().find(|release| release.version() == version);
        found.unwrap_or_else(|| panic!("no etcd {version} here, only {known:?}")).clone()
    }

    /// Such as `3.5.30`.
    pub fn version(&self) -> String {
        let numbers: Vec<_> = self.numbers.iter().map(u32::to_string).collect();
        numbers.join(".")
    }

    /// Whether it is this version or a later one.
    pub fn is_at_least(&self, major: u32, minor: u32) -> bool {
        [major, minor].as_slice() <= self.numbers.as_slice()
    }

    /// `etcdctl` for this endpoint.
    pub fn etcdctl(&self, endpoint: &Endpoint) -> Command {
        let mut command = Command::new(self.dir.join("etcdctl"));
        // Only what the test says, whatever the developer has set.
        command.env_clear().env("ETCDCTL_API", "3").args(endpoint.etcdctl_flags());
        command
    }

    /// The program that works on files: `etcdutl`, before 3.5 still part of `etcdctl`.
    pub fn etcdutl(&self) -> Command {
        let program = if self.is_at_least(3, 5) { "etcdutl" } else { "etcdctl" };
        let mut command = Command::new(self.dir.join(program));
        command.env_clear().env("ETCDCTL_API", "3");
        command
    }
}

/// A running real etcd with one member.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    endpoint: Endpoint,
    release: Release,
    arguments: Vec<String>,
    dir: TempDir,
}

impl Etcd {
    /// Starts one on new data.
    pub fn start(release: &Release, options: &Options) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data = dir.path().join("data");
        Self::start_in(release, options, dir, &data, "default")
    }

    /// Starts one on a data directory below `dir` that something else made, for instance a restore.
    pub fn start_in(
        release: &Release,
        options: &Options,
        dir: TempDir,
        data: &Path,
        name: &str,
    ) -> Self {
        let [client, peer, metrics] = free_ports().map(|port| format!("127.0.0.1:{port}"));
        let (server, client_files) = certificates::write(dir.path());
        let endpoint = Endpoint {
            address: client,
            metrics_address: metrics,
            tls: options.tls.then_some(client_files),
        };
        let peer = format!("http://{peer}");
        let mut arguments = vec![
            format!("--name={name}"),
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls={}", endpoint.url()),
            format!("--advertise-client-urls={}", endpoint.url()),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster={name}={peer}"),
            format!("--listen-metrics-urls=http://{}", endpoint.metrics_address),
            "--log-level=warn".to_owned(),
        ];
        if options.tls {
            arguments.extend(tls_arguments(&server));
        }
        if release.is_at_least(3, 5) {
            arguments.push("--unsafe-no-fsync".to_owned());
        }
        arguments.extend(options.etcd_settings.iter().map(|setting| format!("--{setting}")));
        let process = launch(release, &arguments, &endpoint, dir.path());
        Self { process, endpoint, release: release.clone(), arguments, dir }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub fn release(&self) -> &Release {
        &self.release
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn stop(&mut self) -> bool {
        let status = self.process.stop();
        // etcd re-raises the signal after a clean shutdown.
        status.success() || status.code().is_none()
    }

    pub fn restart(&mut self) {
        self.process = launch(&self.release, &self.arguments, &self.endpoint, self.dir.path());
    }
}

fn launch(release: &Release, arguments: &[String], endpoint: &Endpoint, dir: &Path) -> Process {
    let mut command = Command::new(release.dir.join("etcd"));
    command.env_clear().args(arguments);
    let mut process = Process::start(&mut command, &dir.join("etcd.log"));
    process.wait_for_port(&endpoint.address);
    // The port opens before there is a leader; /health answers 200 only after.
    process.wait_until("is healthy", || is_healthy(endpoint));
    process
}

fn tls_arguments(files: &ServerFiles) -> [String; 4] {
    [
        format!("--trusted-ca-file={}", files.ca.display()),
        format!("--cert-file={}", files.certificate.display()),
        format!("--key-file={}", files.key.display()),
        "--client-cert-auth".to_owned(),
    ]
}

/// Whether `/health` answers 200.
pub fn is_healthy(endpoint: &Endpoint) -> bool {
    http_get(&endpoint.metrics_address, "/health")
        .is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// A plain HTTP GET, status line and headers included.
pub fn http_get(address: &str, path: &str) -> Option<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer).into_owned())
}

//! Servers as processes, each on a loopback address of its own, and three of them as a cluster.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use k3s_server::proto::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::client;
use crate::support::etcd::http_get;
use crate::support::ours::program;
use crate::support::process::Process;
use crate::support::{Endpoint, TlsFiles};

/// Exit status: somebody has to change something first.
pub const CONFIGURATION: i32 = 78;

/// Longest time anything may take on a loaded machine.
pub const LONG: Duration = Duration::from_secs(60);

/// Addresses 127.x.y.1 to 127.x.y.9 for one test, on which nobody listens. Other tests of several servers stay below
/// 127.211, so runs at the same time do not meet.
fn addresses() -> [Ipv4Addr; 9] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = std::process::id().wrapping_mul(37) + NEXT.fetch_add(1, Ordering::Relaxed);
        let (high, low) = (211 + number / 250 % 40, number % 250);
        let all =
            std::array::from_fn(|last| Ipv4Addr::new(127, high as u8, low as u8, last as u8 + 1));
        if all.iter().all(|address| TcpListener::bind((*address, 2380)).is_ok()) {
            return all;
        }
    }
}

/// One server that may run.
#[derive(Debug)]
pub struct Server {
    pub name: String,
    pub address: Ipv4Addr,
    dir: PathBuf,
    process: Option<Process>,
}

impl Server {
    fn new(dir: &Path, name: &str, address: Ipv4Addr) -> Self {
        let dir = dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        Self { name: name.to_owned(), address, dir, process: None }
    }

    pub fn db_dir(&self) -> PathBuf {
        self.dir.join("db")
    }

    pub fn tls_dir(&self) -> PathBuf {
        self.db_dir().join("tls")
    }

    pub fn token_file(&self) -> PathBuf {
        self.db_dir().join("token")
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("config.yaml")
    }

    /// Host and port of a door.
    pub fn door(&self, port: u16) -> String {
        format!("{}:{port}", self.address)
    }

    /// Lines of a configuration that joins through this one.
    pub fn joining(&self) -> String {
        format!(
            "server: https://{}:6443\ntoken-file: {}\n",
            self.address,
            self.token_file().display()
        )
    }

    /// Writes the configuration: what every server here needs, and these lines.
    pub fn configure(&self, lines: &str) {
        let Self { name, address, .. } = self;
        let text = format!(
            "node-name: {name}\nnode-ip: {address}\ndb-dir: {}\nclient-listen: {address}:2379\n\
             peer-listen: {address}:2380\nmetrics-listen: {address}:2381\n{lines}",
            self.db_dir().display()
        );
        fs::write(self.config(), text).unwrap();
    }

    /// A command of the program with this server's configuration.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program();
        command.args(arguments).arg("--config").arg(self.config());
        command
    }

    /// The same to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub fn start(&mut self) {
        self.start_as("", &[]);
    }

    /// Starts it after a line of shell such as `umask 0`, with these variables.
    pub fn start_as(&mut self, before: &str, environment: &[(&str, &str)]) {
        let server = self.command(&["server"]);
        let mut command = Command::new("/bin/sh");
        command.env_clear().envs(environment.iter().copied());
        command.arg("-c").arg(format!("{before}\nexec \"$0\" \"$@\""));
        command.arg(server.get_program()).args(server.get_args());
        self.process = Some(Process::start(&mut command, &self.dir.join("log")));
    }

    /// Waits until it is a member that serves.
    pub fn ready(&mut self) {
        let door = self.door(2381);
        let process = self.process.as_mut().expect("it runs");
        process.wait_until("is ready", || {
            http_get(&door, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
        });
    }

    /// Waits until it ends by itself; its status and everything it printed.
    pub fn ended(&mut self) -> (Option<i32>, String) {
        let mut process = self.process.take().expect("it runs");
        let status = process.ended();
        (status.code(), process.printed())
    }

    pub fn printed(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").pid()
    }

    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// SIGTERM must end in status 0.
    pub fn stop(&mut self) {
        let status = self.process.take().expect("it runs").stop();
        let printed = self.printed();
        assert!(status.success(), "{status}: {printed}");
        assert!(!printed.contains("panicked"), "{printed}");
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// A client with this server's own client certificate.
    pub fn endpoint(&self) -> Endpoint {
        let tls = self.tls_dir();
        let (ca, certificate) = (tls.join("ca.crt"), tls.join("client.crt"));
        Endpoint {
            address: self.door(2379),
            metrics_address: self.door(2381),
            tls: Some(TlsFiles { ca, certificate, key: tls.join("client.key") }),
        }
    }

    pub async fn channel(&self) -> Channel {
        client::channel(&self.endpoint()).await.unwrap()
    }

    pub async fn status(&self) -> pb::StatusResponse {
        let mut client = MaintenanceClient::new(self.channel().await);
        client.status(pb::StatusRequest::default()).await.unwrap().into_inner()
    }

    /// Memory and processor time so far.
    pub fn usage(&self) -> Usage {
        Usage::of(self.pid())
    }
}

/// Writes and reads back.
pub async fn serves(channel: Channel, value: &str) -> Result<(), tonic::Status> {
    let mut client = KvClient::new(channel);
    let value = value.as_bytes().to_vec();
    let put = pb::PutRequest {
        key: b"served".to_vec().into(),
        value: value.clone().into(),
        ..Default::default()
    };
    client.put(put).await?;
    let range = pb::RangeRequest { key: b"served".to_vec().into(), ..Default::default() };
    let found = client.range(range).await?.into_inner();
    assert_eq!(found.kvs.len(), 1);
    Ok(())
}

/// What a process uses.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub rss_kib: u64,
    pub processor: Duration,
}

impl Usage {
    fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let rss_kib = line.trim().strip_suffix(" kB").unwrap().trim().parse().unwrap();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        // The name in parentheses may hold anything; fields are counted after it.
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        // The kernel's USER_HZ is 100 everywhere.
        Self { rss_kib, processor: Duration::from_millis(ticks * 10) }
    }
}

/// Servers of one test.
#[derive(Debug)]
pub struct Servers {
    pub all: Vec<Server>,
    addresses: [Ipv4Addr; 9],
    // Dropped last: the processes above write into it.
    dir: TempDir,
}

impl Servers {
    pub fn none() -> Self {
        Self { all: Vec::new(), addresses: addresses(), dir: tempfile::tempdir().unwrap() }
    }

    /// One server that founded its cluster and runs.
    pub fn one() -> Self {
        let mut servers = Self::none();
        let first = servers.add();
        first.configure("cluster-init: true\n");
        first.start();
        first.ready();
        servers
    }

    /// A cluster of three. `before` is a line of shell before each start.
    pub fn three(before: &str) -> Self {
        let mut servers = Self::none();
        for number in 0..3 {
            servers.add();
            let lines = match number {
                0 => "cluster-init: true\n".to_owned(),
                _ => servers.all[0].joining(),
            };
            servers.all[number].configure(&lines);
            servers.all[number].start_as(before, &[]);
            if number == 0 {
                servers.all[0].ready();
            }
        }
        servers.all.iter_mut().for_each(Server::ready);
        servers
    }

    /// One more, without a configuration.
    pub fn add(&mut self) -> &mut Server {
        let number = self.all.len();
        let name = format!("pi-{}", number + 1);
        self.all.push(Server::new(self.dir.path(), &name, self.addresses[number]));
        self.all.last_mut().unwrap()
    }

    /// Addresses that no server of this test has.
    pub fn free_addresses(&self) -> &[Ipv4Addr] {
        &self.addresses[self.all.len().max(5)..]
    }

    pub fn stop(mut self) {
        self.all.iter_mut().filter(|server| server.runs()).for_each(Server::stop);
    }
}

//! One server: a loopback address, a directory with configuration, data and output, and a process that may run.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use k3s_server::versions::PRETEND;
use serde_json::Value;

use crate::lan::{Place, inside};
use crate::support::etcd::http_get;
use crate::support::ours::program;
use crate::support::process::Process;

/// A configuration that has to be changed before another start makes sense.
pub const CONFIGURATION: i32 = 78;

/// Longest time anything may take on a loaded machine.
pub const LONG: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(20);

/// Waits until something holds, and says how long that took.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LONG, "never: {what}");
        thread::sleep(POLL);
    }
    began.elapsed()
}

/// Addresses 127.x.y.* for one test: no two tests of one run share them, and two runs at a time hardly ever do.
#[derive(Clone, Copy, Debug)]
pub struct Street {
    high: u8,
    low: u8,
}

impl Street {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = std::process::id().wrapping_mul(31) + NEXT.fetch_add(1, Ordering::Relaxed);
        let [.., high, low] = (number % (200 * 250)).to_be_bytes();
        // Neither 127.0 nor a broadcast address.
        Self { high: high % 200 + 10, low }
    }

    pub const fn address(self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.high, self.low, number)
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    pub address: Ipv4Addr,
    pub dir: PathBuf,
    /// Data, if not in `dir`: a card that was put into another machine.
    db_dir: PathBuf,
    process: Option<Process>,
    runs: u32,
    /// The release that its process pretends to be: see `k3s_server::versions`.
    pub release: Option<&'static str>,
    /// On a network of its own.
    pub place: Option<Place>,
    /// Its configuration says nothing of addresses.
    pub finds_address: bool,
    /// More variables for its process.
    pub environment: Vec<(&'static str, &'static str)>,
}

impl Machine {
    /// A machine that has never run.
    pub fn new(dir: &Path, name: &str, address: Ipv4Addr) -> Self {
        let dir = dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        let db_dir = dir.join("db");
        Self {
            name: name.to_owned(),
            address,
            dir,
            db_dir,
            process: None,
            runs: 0,
            release: None,
            place: None,
            finds_address: false,
            environment: Vec::new(),
        }
    }

    pub fn db_dir(&self) -> &Path {
        &self.db_dir
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("config.yaml")
    }

    pub fn token_file(&self) -> PathBuf {
        self.db_dir.join("token")
    }

    /// The token that others join with.
    pub fn token(&self) -> String {
        fs::read_to_string(self.token_file()).unwrap().trim().to_owned()
    }

    /// As upstream's servers are named to joining ones.
    pub fn url(&self) -> String {
        format!("https://{}:6443", self.address)
    }

    pub fn client_url(&self) -> String {
        format!("https://{}:2379", self.address)
    }

    pub fn peer_url(&self) -> String {
        format!("https://{}:2380", self.address)
    }

    /// Lines of a configuration that joins through another machine.
    pub fn joining(&self, through: &Self) -> String {
        format!("server: {}\ntoken-file: {}\n", through.url(), through.token_file().display())
    }

    /// Writes the configuration: what a machine needs here, and these lines. Line numbers of `lines` begin at
    /// [`Self::FIRST_LINE`].
    pub fn configure(&self, lines: &str) {
        let Self { name, address, db_dir, .. } = self;
        let db_dir = db_dir.display();
        let addresses = if self.finds_address {
            String::new()
        } else {
            format!(
                "node-ip: {address}\nclient-listen: {address}:2379\npeer-listen: {address}:2380\n\
                 metrics-listen: {address}:2381\n"
            )
        };
        let text = format!("node-name: {name}\ndb-dir: {db_dir}\n{addresses}{lines}");
        fs::write(self.config(), text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(self.config(), mode).unwrap();
    }

    /// Where the lines given to [`Self::configure`] begin in the file.
    pub const FIRST_LINE: usize = 7;

    /// Starts the process and does not wait for anything.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// Starts the process with more arguments.
    pub fn start_with(&mut self, arguments: &[&str]) {
        assert!(self.process.is_none(), "{} runs already", self.name);
        let mut command = program();
        command.arg("server").arg("--config").arg(self.config()).args(arguments);
        command.envs(self.environment.iter().copied());
        self.spawn(&mut command);
    }

    /// Starts this command as the server's process.
    pub fn spawn(&mut self, command: &mut Command) {
        self.runs += 1;
        if let Some(release) = self.release {
            command.env(PRETEND, release);
        }
        let log = self.dir.join(format!("log-{}", self.runs));
        self.process = Some(match self.place {
            None => Process::start(command, &log),
            Some(place) => Process::start(&mut inside(place.own, command), &log),
        });
    }

    fn process(&mut self) -> &mut Process {
        let name = &self.name;
        self.process.as_mut().unwrap_or_else(|| panic!("{name} does not run"))
    }

    /// What this start has printed so far.
    pub fn printed(&self) -> String {
        let log = self.dir.join(format!("log-{}", self.runs));
        fs::read_to_string(log).unwrap_or_default()
    }

    /// Waits for READY, and says how long it took.
    pub fn ready(&mut self) -> Duration {
        let began = Instant::now();
        let address = format!("{}:2381", self.address);
        self.process().wait_until_printed("ready, serving");
        if self.place.is_some() {
            return began.elapsed();
        }
        until("readyz", || {
            http_get(&address, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
        });
        began.elapsed()
    }

    /// Waits until this start has said something.
    pub fn says(&mut self, text: &str) {
        self.process().wait_until_printed(text);
    }

    /// Starts and waits for READY.
    pub fn up(&mut self) -> Duration {
        self.start();
        self.ready()
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process().kill();
        self.process = None;
    }

    /// SIGTERM must end in status 0.
    pub fn stop(&mut self) {
        let status = self.process().stop();
        assert!(status.success(), "{} ended with {status}:\n{}", self.name, self.printed());
        self.process = None;
    }

    /// SIGSTOP: a machine that hangs.
    pub fn pause(&mut self) {
        self.process().pause();
    }

    /// SIGCONT.
    pub fn resume(&mut self) {
        self.process().resume();
    }

    /// Waits for the process to end by itself. Its status, and what it printed.
    pub fn ended(&mut self) -> (i32, String) {
        let status = self.process().ended();
        self.process = None;
        (status.code().unwrap_or(-1), self.printed())
    }

    /// Starts, and expects a refusal that no repetition changes. What it printed.
    pub fn refused(&mut self) -> String {
        self.start();
        let (status, printed) = self.ended();
        assert_eq!(status, CONFIGURATION, "{}:\n{printed}", self.name);
        printed
    }

    /// Runs a command of ours with this machine's configuration.
    pub fn command(&self, arguments: &[&str]) -> (i32, String) {
        let config = self.config();
        let config = config.to_str().unwrap();
        said(program().args(arguments).args(["--config", config]).output().unwrap())
    }

    /// A command of ours that must succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let (status, said) = self.command(arguments);
        assert_eq!(status, 0, "{arguments:?}: {said}");
        said
    }

    fn file(&self, name: &str) -> String {
        self.db_dir.join("tls").join(name).display().to_string()
    }

    /// `etcdctl`, asking this machine only.
    pub fn etcdctl(&self, arguments: &[&str]) -> (i32, String) {
        self.etcdctl_at(&self.client_url(), arguments)
    }

    /// `etcdctl` with this machine's certificates, asking these endpoints.
    pub fn etcdctl_at(&self, endpoints: &str, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new("etcdctl");
        command.env_clear().env("ETCDCTL_API", "3").args([
            format!("--endpoints={endpoints}"),
            format!("--cacert={}", self.file("ca.crt")),
            format!("--cert={}", self.file("client.crt")),
            format!("--key={}", self.file("client.key")),
            "--command-timeout=20s".to_owned(),
            "--dial-timeout=10s".to_owned(),
        ]);
        command.args(arguments);
        if let Some(place) = self.place {
            command = inside(place.router, &command);
        }
        said(command.output().expect("etcdctl (Debian: etcd-client)"))
    }

    /// An `etcdctl` that must succeed.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let (status, said) = self.etcdctl(arguments);
        assert_eq!(status, 0, "{}: etcdctl {arguments:?}: {said}", self.name);
        said
    }

    /// An `etcdctl` that must succeed, as JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ctl(&[arguments, &["-w", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    pub fn put(&self, key: &str, value: &str) {
        assert_eq!(self.ctl(&["put", key, value]).trim(), "OK");
    }

    /// A linearizable read.
    pub fn value(&self, key: &str) -> String {
        self.ctl(&["get", key, "--print-value-only"]).trim().to_owned()
    }

    /// Whether it says that it leads.
    pub fn leads(&self) -> bool {
        if self.place.is_none() {
            let metrics =
                http_get(&format!("{}:2381", self.address), "/metrics").unwrap_or_default();
            return metrics.lines().any(|line| line.starts_with("etcd_server_is_leader 1"));
        }
        let (status, said) = self.etcdctl(&["endpoint", "status", "-w", "json"]);
        let said: Value = serde_json::from_str(&said).unwrap_or_default();
        status == 0 && said[0]["Status"]["leader"] == self.id()
    }

    /// Its member id, as it is written in its identity.
    pub fn id(&self) -> u64 {
        let text = fs::read_to_string(self.db_dir.join("node.json")).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        u64::from_str_radix(json["node"].as_str().unwrap(), 16).unwrap()
    }

    /// Moves to another address; to be configured anew.
    pub fn move_to(&mut self, address: Ipv4Addr) {
        assert!(self.process.is_none(), "{} runs", self.name);
        self.address = address;
    }

    /// Copies the card as it is now.
    pub fn image(&self, to: &Path) {
        copy_dir(&self.db_dir, to);
    }

    /// Puts a card in.
    pub fn insert(&mut self, card: PathBuf) {
        self.db_dir = card;
    }
}

fn said(output: Output) -> (i32, String) {
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), said)
}

/// Everything below `from`, with the modes of the files.
pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

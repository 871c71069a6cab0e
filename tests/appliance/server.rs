//! A server with an environment of the test's choice, as systemd would give it one.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::ours::program;
use crate::support::process::{Process, free_ports};

/// Longest wait for anything, on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A directory, a configuration, a notify socket, and a runtime directory.
pub struct Server {
    dir: TempDir,
    /// What the service manager hears.
    notified: Receiver<String>,
    pub metrics: String,
    pub client: String,
}

impl Server {
    pub fn configure(extra: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [client, peer, metrics] = free_ports().map(|port| format!("127.0.0.1:{port}"));
        let config = format!(
            "node-name: pi-1\nnode-ip: 127.0.0.1\ndb-dir: {}\nclient-listen: \"{client}\"\npeer-listen: \"{peer}\"\n\
             metrics-listen: \"{metrics}\"\n{extra}",
            dir.path().join("db").display()
        );
        std::fs::write(dir.path().join("config.yaml"), config).unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        Self { dir, notified: listen(notify), metrics, client }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn append(&self, line: &str) {
        let path = self.path("config.yaml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, format!("{text}{line}\n")).unwrap();
    }

    pub fn start(&self, variables: &[(&str, &str)]) -> Process {
        let mut command = program();
        command.arg("server").arg("--config").arg(self.path("config.yaml"));
        command.env("NOTIFY_SOCKET", self.path("notify"));
        command.env("RUNTIME_DIRECTORY", self.path("run"));
        command.envs(variables.iter().copied());
        Process::start(&mut command, &self.path("log"))
    }

    /// Runs a command of the program to its end.
    pub fn run(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
        let mut command = program();
        command.args(arguments).envs(variables.iter().copied());
        command.output().unwrap()
    }

    /// The next messages to the service manager, up to one that begins like this.
    pub fn notified(&self, start: &str) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let Some(message) = self.next_within(deadline) else {
                panic!("no {start}; seen: {seen:#?}");
            };
            seen.push(message.clone());
            if message.starts_with(start) {
                return seen;
            }
        }
    }

    /// The next message that comes before `end`.
    pub fn next_within(&self, end: Instant) -> Option<String> {
        self.notified.recv_timeout(end.saturating_duration_since(Instant::now())).ok()
    }

    pub fn phase(&self) -> serde_json::Value {
        let text = std::fs::read(self.path("run").join("phase.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

/// Takes messages as they come, as a service manager does: a full socket would make the server wait.
fn listen(notify: UnixDatagram) -> Receiver<String> {
    let (heard, notified) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = notify.recv(&mut buffer) {
            let message = String::from_utf8_lossy(&buffer[..length]).trim_end().to_owned();
            if heard.send(message).is_err() {
                return;
            }
        }
    });
    notified
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn display(path: &Path) -> String {
    path.display().to_string()
}

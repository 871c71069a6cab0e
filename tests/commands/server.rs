//! A server with a configuration of the test's choice, and the commands that are run beside it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value as Json;
use tempfile::TempDir;

use crate::support::ours::program;
use crate::support::process::{Process, free_ports};

/// A directory with a configuration, and perhaps a server that runs on it.
pub struct Server {
    dir: TempDir,
    common: String,
    pub peer: String,
    pub metrics: String,
    process: Option<Process>,
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            status: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// The output of a command that must have worked.
    pub fn done(self) -> String {
        assert_eq!((self.status, self.err.as_str()), (0, ""), "{}", self.out);
        self.out
    }

    pub fn json(self) -> Json {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Server {
    /// Makes the directory and the configuration: name, host address and whatever else.
    pub fn configure(name: &str, host: &str, config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [client, peer, metrics] = free_ports().map(|port| format!("{host}:{port}"));
        let common = format!(
            "node-name: {name}\nnode-ip: {host}\ndb-dir: {}\nclient-listen: \"{client}\"\npeer-listen: \"{peer}\"\n\
             metrics-listen: \"{metrics}\"\n",
            dir.path().join("db").display()
        );
        let server = Self { dir, common, peer, metrics, process: None };
        server.write(config);
        server
    }

    /// Replaces the part of the configuration that is not about addresses.
    pub fn write(&self, config: &str) {
        let path = self.config();
        fs::write(&path, format!("{}{config}", self.common)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config.yaml")
    }

    pub fn db_dir(&self) -> PathBuf {
        self.dir.path().join("db")
    }

    /// How others are told to join through this one.
    pub fn url(&self) -> String {
        format!("https://{}", self.peer)
    }

    pub fn start(mut self) -> Self {
        self.restart();
        self
    }

    /// Starts and waits until it is ready.
    pub fn restart(&mut self) {
        let mut command = program();
        command.arg("server").arg("--config").arg(self.config());
        let mut process = Process::start(&mut command, &self.dir.path().join("log"));
        let address = self.metrics.clone();
        process.wait_until("is ready", || is_ready(&address));
        self.process = Some(process);
    }

    pub fn stop(&mut self) {
        let status = self.process.take().expect("a server that runs").stop();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// Starts, expecting that it ends by itself.
    pub fn refused(&self) -> Ran {
        let mut command = program();
        let output = command.arg("server").arg("--config").arg(self.config()).output().unwrap();
        Ran::of(&output)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.take().expect("a server that runs").kill();
    }

    /// Three that run, with the same settings.
    pub fn three(config: &str) -> [Self; 3] {
        let first = format!("cluster-init: true\n{config}");
        let first = Self::configure("pi-1", "127.0.0.1", &first).start();
        let token = first.run(&["token", "--show"]).done();
        let join = format!("server: {}\ntoken: \"{}\"\n{config}", first.url(), token.trim());
        let second = Self::configure("pi-2", "127.0.0.2", &join).start();
        let third = Self::configure("pi-3", "127.0.0.3", &join).start();
        [first, second, third]
    }

    /// Puts lines into the configuration, in the place of those with the same keys.
    pub fn put(&self, lines: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        let keys: Vec<&str> = lines.lines().filter_map(|line| line.split(':').next()).collect();
        let kept =
            text.lines().filter(|line| !keys.contains(&line.split(':').next().unwrap_or("")));
        let kept: String = kept.map(|line| format!("{line}\n")).collect();
        fs::write(self.config(), kept + lines).unwrap();
    }

    /// Waits until something is true of it.
    pub fn wait_until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let mut process = self.process.take().expect("a server that runs");
        process.wait_until(what, || holds(self));
        self.process = Some(process);
    }

    /// Waits until the log says it.
    pub fn wait_for_log(&mut self, text: &str) {
        let path = self.dir.path().join("log");
        let process = self.process.as_mut().expect("a server that runs");
        process.wait_until(&format!("said {text:?}"), || {
            fs::read_to_string(&path).unwrap_or_default().contains(text)
        });
    }

    /// A command on this server's configuration.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = program();
        command.args(arguments).arg("--config").arg(self.config());
        Ran::of(&command.output().unwrap())
    }

    /// Every file below the data directory with its content.
    pub fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        collect(&self.db_dir(), &mut found);
        found
    }
}

fn collect(dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
}

fn is_ready(address: &str) -> bool {
    use std::io::{Read as _, Write as _};
    let Ok(mut stream) = std::net::TcpStream::connect(address) else { return false };
    let request = "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let mut reply = String::new();
    stream.write_all(request.as_bytes()).is_ok()
        && stream.read_to_string(&mut reply).is_ok()
        && reply.starts_with("HTTP/1.1 200")
}

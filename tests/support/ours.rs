//! Our server as a process. The one file that knows its command line, its configuration keys and its file names.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::etcd::is_healthy;
use super::process::{Process, free_ports};
use super::{Endpoint, Options, TlsFiles};

/// A client's files below `db-dir`.
const CA: &str = "tls/ca.crt";
const CLIENT_CERTIFICATE: &str = "tls/client.crt";
const CLIENT_KEY: &str = "tls/client.key";

/// A running k3s-server with one voter.
#[derive(Debug)]
pub struct Ours {
    process: Process,
    endpoint: Endpoint,
    config: PathBuf,
    db_dir: PathBuf,
    dir: TempDir,
}

impl Ours {
    /// Starts one on new data.
    pub fn start(options: &Options) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let db_dir = dir.path().join("db");
        Self::start_at(options, dir, db_dir)
    }

    /// Starts one with its data in `db_dir`, and its other files in `dir`.
    pub fn start_at(options: &Options, dir: TempDir, db_dir: PathBuf) -> Self {
        let [client, peer, metrics] = free_ports().map(|port| format!("127.0.0.1:{port}"));
        let tls = options.tls.then(|| TlsFiles {
            ca: db_dir.join(CA),
            certificate: db_dir.join(CLIENT_CERTIFICATE),
            key: db_dir.join(CLIENT_KEY),
        });
        let mut text = format!(
            "db-dir: {}\nclient-listen: \"{client}\"\npeer-listen: \"{peer}\"\n\
             metrics-listen: \"{metrics}\"\ninsecure-http: {}\n",
            db_dir.display(),
            !options.tls
        );
        if !options.etcd_settings.is_empty() {
            text.push_str("etcd-arg:\n");
            for setting in &options.etcd_settings {
                // Writing to a string cannot fail.
                let _ = writeln!(text, "  - \"{setting}\"");
            }
        }
        let config = dir.path().join("config.yaml");
        std::fs::write(&config, text).expect("a writable directory");
        let endpoint = Endpoint { address: client, metrics_address: metrics, tls };
        let process = launch(&config, &endpoint, dir.path());
        Self { process, endpoint, config, db_dir, dir }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Where the log and the state are.
    pub fn db_dir(&self) -> &Path {
        &self.db_dir
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM must end in status 0.
    pub fn stop(&mut self) -> bool {
        self.process.stop().success()
    }

    pub fn restart(&mut self) {
        self.process = launch(&self.config, &self.endpoint, self.dir.path());
    }
}

/// The program under test.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_k3s-server"));
    // The developer's own K3S_* variables and journal must not reach the test.
    command.env_clear();
    command
}

fn launch(config: &Path, endpoint: &Endpoint, dir: &Path) -> Process {
    let mut command = program();
    command.arg("server").arg("--config").arg(config);
    let mut process = Process::start(&mut command, &dir.join("k3s-server.log"));
    process.wait_for_port(&endpoint.address);
    process.wait_until("is healthy", || is_healthy(endpoint));
    process
}

//! What is measured: etcd as K3s runs it, and k3s-server. Both with mutual TLS, as in production.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// One of the things compared.
#[derive(Clone, Debug)]
pub struct Subject {
    /// `etcd`, `ours`, or `ours` with something set: the column of the table.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The program.
    pub program: PathBuf,
    /// Lines for k3s-server's configuration.
    pub settings: Vec<String>,
}

/// Who made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// etcd, with the tuning K3s gives it.
    Etcd,
    /// k3s-server.
    Ours,
}

/// Files a client needs.
#[derive(Clone, Debug)]
pub struct ClientFiles {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Subject {
    /// The newest etcd that `.ci/setup` has unpacked.
    pub fn newest_etcd(root: &Path) -> Result<Self, Box<dyn Error>> {
        let mut found: Vec<(Vec<u32>, PathBuf)> = fs::read_dir(root.join("target/etcd"))
            .map_err(|error| format!("target/etcd: {error}; run .ci/setup first"))?
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let numbers = name.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
                Some((numbers, entry.path().join("etcd")))
            })
            .filter(|(_, program)| program.is_file())
            .collect();
        found.sort();
        let (_, program) = found.pop().ok_or("no etcd below target/etcd; run .ci/setup first")?;
        Ok(Self { name: "etcd".into(), kind: Kind::Etcd, program, settings: Vec::new() })
    }

    /// The release build of this repository.
    pub fn ours(root: &Path) -> Result<Self, Box<dyn Error>> {
        let program = root.join("target/release/k3s-server");
        if !program.is_file() {
            return Err("target/release/k3s-server is not there; run cargo build --release".into());
        }
        Ok(Self { name: "ours".into(), kind: Kind::Ours, program, settings: Vec::new() })
    }

    /// The same with one more line of configuration.
    pub fn with(&self, name: &str, setting: &str) -> Self {
        let mut changed = self.clone();
        changed.name = name.to_owned();
        changed.settings.push(setting.to_owned());
        changed
    }

    /// What it says it is.
    pub fn version(&self) -> String {
        let output = Command::new(&self.program).arg("--version").output();
        let said = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        said.unwrap_or_default().lines().next().unwrap_or("unknown").to_owned()
    }

    /// Loopback address of a node. Each subject has a network of its own, so that all may run at once.
    pub fn address(&self, network: u8, number: usize) -> String {
        let third = network * 2 + u8::from(self.kind == Kind::Ours);
        format!("127.{}.{third}.{number}", 64 + std::process::id() % 128)
    }

    /// Makes what the first start needs; says which files clients use.
    pub fn prepare(
        &self,
        shared: &Path,
        addresses: &[String],
        first_data: &Path,
    ) -> Result<ClientFiles, Box<dyn Error>> {
        match self.kind {
            Kind::Etcd => make_certificates(shared, addresses),
            Kind::Ours => {
                let tls = first_data.join("db/tls");
                Ok(ClientFiles {
                    ca: tls.join("ca.crt"),
                    certificate: tls.join("client.crt"),
                    key: tls.join("client.key"),
                })
            }
        }
    }

    /// The command that starts node `number` (from 1) of those at `addresses`, with its data in `data`.
    pub fn command(
        &self,
        number: usize,
        addresses: &[String],
        data: &Path,
        shared: &Path,
        first_data: &Path,
    ) -> Result<Command, Box<dyn Error>> {
        match self.kind {
            Kind::Etcd => Ok(self.etcd_command(number, addresses, data, shared)),
            Kind::Ours => self.our_command(number, addresses, data, first_data),
        }
    }

    /// As K3s starts its embedded etcd.
    fn etcd_command(
        &self,
        number: usize,
        addresses: &[String],
        data: &Path,
        shared: &Path,
    ) -> Command {
        let own = &addresses[number - 1];
        let members: Vec<String> = addresses
            .iter()
            .enumerate()
            .map(|(index, address)| format!("n{}=https://{address}:2380", index + 1))
            .collect();
        let file = |name: &str| shared.join(name);
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &format!("n{number}"), "--log-level", "warn"])
            .arg("--data-dir")
            .arg(data.join("etcd"))
            .args(["--listen-client-urls", &format!("https://{own}:2379")])
            .args(["--advertise-client-urls", &format!("https://{own}:2379")])
            .args(["--listen-peer-urls", &format!("https://{own}:2380")])
            .args(["--initial-advertise-peer-urls", &format!("https://{own}:2380")])
            .args(["--listen-metrics-urls", &format!("http://{own}:2381")])
            .args(["--initial-cluster", &members.join(","), "--initial-cluster-token", "bench"])
            .args(["--heartbeat-interval", "500", "--election-timeout", "5000"])
            .args(["--snapshot-count", "10000", "--experimental-initial-corrupt-check=true"]);
        for role in ["", "peer-"] {
            command
                .arg(format!("--{role}cert-file={}", file("server.crt").display()))
                .arg(format!("--{role}key-file={}", file("server.key").display()))
                .arg(format!("--{role}trusted-ca-file={}", file("ca.crt").display()))
                .arg(format!("--{role}client-cert-auth=true"));
        }
        command
    }

    fn our_command(
        &self,
        number: usize,
        addresses: &[String],
        data: &Path,
        first_data: &Path,
    ) -> Result<Command, Box<dyn Error>> {
        let own = &addresses[number - 1];
        let mut lines = vec![
            format!("node-name: pi-{number}"),
            format!("node-ip: {own}"),
            format!("db-dir: {}", data.join("db").display()),
            format!("client-listen: {own}:2379"),
            format!("peer-listen: {own}:2380"),
            format!("metrics-listen: {own}:2381"),
        ];
        if number == 1 {
            lines.push("cluster-init: true".to_owned());
        } else {
            lines.push(format!("server: https://{}:6443", addresses[0]));
            lines.push(format!("token-file: {}", first_data.join("db/token").display()));
        }
        lines.extend(self.settings.iter().cloned());
        let file = data.join("config.yaml");
        fs::write(&file, lines.join("\n") + "\n")?;
        let mut command = Command::new(&self.program);
        command.arg("server").arg("--config").arg(file);
        Ok(command)
    }
}

/// An authority, and one certificate for everything it signs.
fn make_certificates(dir: &Path, addresses: &[String]) -> Result<ClientFiles, Box<dyn Error>> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    fs::write(dir.join("ca.crt"), authority.self_signed(&authority_key)?.pem())?;
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate()?;
    // etcd looks for the address a peer comes from, which is this one.
    let names: Vec<String> = addresses.iter().cloned().chain(["127.0.0.1".to_owned()]).collect();
    let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    fs::write(dir.join("server.crt"), certificate.pem())?;
    fs::write(dir.join("server.key"), key.serialize_pem())?;
    Ok(ClientFiles {
        ca: dir.join("ca.crt"),
        certificate: dir.join("server.crt"),
        key: dir.join("server.key"),
    })
}

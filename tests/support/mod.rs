//! Starts real processes for tests: ours, and real etcds that `.ci/setup` unpacked. Shared by `#[path]`.
//!
//! Every process listens on 127.0.0.1 only, on ports the kernel chose, keeps its data in its own temporary
//! directory, and is killed by its pid when its value is dropped.
//!
//! # Shape
//!
//! [`ours`] is the only file that knows our command line, configuration keys and file names. [`etcd`] knows etcd's.
//! A test that takes a [`Subject`] runs against our server, or against the real etcd named by `HARNESS_SUBJECT`:
//! a test that a real etcd fails is a wrong test.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod certificates;
pub mod etcd;
pub mod ours;
pub mod process;
pub mod random;

use std::path::PathBuf;

/// Where a server answers, and what a client must show.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Host and port of the client API.
    pub address: String,
    /// Host and port of the plain HTTP endpoint with /health and /metrics.
    pub metrics_address: String,
    /// Present if the client API speaks TLS.
    pub tls: Option<TlsFiles>,
}

/// Files for a TLS client.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Endpoint {
    /// The URL of the client API.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// What `etcdctl` needs to reach the server.
    pub fn etcdctl_flags(&self) -> Vec<String> {
        let mut flags = vec![format!("--endpoints={}", self.url())];
        if let Some(tls) = &self.tls {
            flags.push(format!("--cacert={}", tls.ca.display()));
            flags.push(format!("--cert={}", tls.certificate.display()));
            flags.push(format!("--key={}", tls.key.display()));
        }
        flags
    }
}

/// How a test wants its server.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// TLS with client certificates; otherwise plain HTTP.
    pub tls: bool,
    /// etcd's own settings, `name=value`.
    pub etcd_settings: Vec<String>,
}

/// The server under test.
pub enum Subject {
    Ours(Box<ours::Ours>),
    Etcd(Box<etcd::Etcd>),
}

impl Subject {
    /// Starts our server, or the etcd that `HARNESS_SUBJECT` names by version.
    pub fn start(options: &Options) -> Self {
        match std::env::var("HARNESS_SUBJECT") {
            Ok(version) => {
                Self::Etcd(Box::new(etcd::Etcd::start(&etcd::Release::named(&version), options)))
            }
            Err(_) => Self::Ours(Box::new(ours::Ours::start(options))),
        }
    }

    pub fn endpoint(&self) -> &Endpoint {
        match self {
            Self::Ours(ours) => ours.endpoint(),
            Self::Etcd(etcd) => etcd.endpoint(),
        }
    }

    /// SIGKILL, as the kernel's out-of-memory killer does it.
    pub fn kill(&mut self) {
        match self {
            Self::Ours(ours) => ours.kill(),
            Self::Etcd(etcd) => etcd.kill(),
        }
    }

    /// SIGTERM, and waits for the end. Returns whether it ended with status 0.
    pub fn stop(&mut self) -> bool {
        match self {
            Self::Ours(ours) => ours.stop(),
            Self::Etcd(etcd) => etcd.stop(),
        }
    }

    /// Starts it again on the same data and ports.
    pub fn restart(&mut self) {
        match self {
            Self::Ours(ours) => ours.restart(),
            Self::Etcd(etcd) => etcd.restart(),
        }
    }
}

/// Says why a test did not run. Under `CI=true` nothing may be missing: `.ci/setup` was there before.
pub fn skip(reason: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "not available: {reason}");
    eprintln!("skipped: {reason}");
}

//! Turns a K3s configuration into a checked [`Config`], or into everything that is wrong with it.
//!
//! A configuration error on a Raspberry Pi in a cupboard costs an afternoon; K3s reports one at a time, without
//! a line, or not at all. Here every value keeps the place it came from, every check runs, and each message
//! says what was found, what was expected and what to write.
//!
//! # Shape
//!
//! [`load`] reads files and calls [`resolve`], which is pure: texts, arguments, variables in, [`Loaded`] or
//! [`Problems`] out. The table [`keys::KEYS`] drives all of it.
//!
//! # Invariants
//!
//! - A [`Config`] exists only if no problem is an error: this module alone can make one.
//! - The text of a secret is in no message and no `Debug` output.
//! - No input makes this module panic ([`parse_text`] and [`resolve`] are fuzzed).
//!
//! # Not here
//!
//! Comparison with the other servers (`critical`), the meaning of a token (`join`).

mod cidr;
mod dropins;
mod etcd_args;
mod key;
pub mod keys;
pub mod kinds;
mod layer;
mod merge;
mod origin;
mod problem;
mod scalar;
mod secret;
mod suggest;
mod url;
mod validate;
mod values;
mod yaml;

use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;

pub use cidr::{Cidr, Family};
pub use dropins::{Paths, Source};
pub use etcd_args::{AutoCompaction, EtcdOptions, LogLevel, Quota};
pub use key::{Group, Key, Kind, Repeat, Role};
pub use layer::{Assignment, Item, Layer};
pub use merge::{Given, Settings, Variables};
pub use origin::{Origin, Position};
pub use problem::{Problem, Problems, Severity};
pub use scalar::upstream_reading;
pub use secret::{REDACTED, Secret};
pub use suggest::nearest;
pub use url::{PEER_PORT, ServerUrl};
pub use values::{
    DatastoreArgument, Listen, Network, Passthrough, Start, StorageMedium, TokenSource, Values,
};

/// What was found out about this host, for defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Host name.
    pub name: Option<String>,
    /// Address of the interface with the default route.
    pub address: Option<IpAddr>,
    /// The file in which systemd hands the token over (`LoadCredential=`), if it does.
    pub token_credential: Option<PathBuf>,
}

/// Everything a configuration is made of. Not `Debug`: variables and arguments may be secret.
#[derive(Clone)]
pub struct Request {
    /// Arguments, in order.
    pub command_line: Vec<Given>,
    /// Environment.
    pub environment: Variables,
    /// Host.
    pub host: Host,
    /// Where files are looked for.
    pub paths: Paths,
}

impl Default for Paths {
    /// The paths of an installed system.
    fn default() -> Self {
        Self {
            default_file: PathBuf::from(keys::DEFAULT_FILE),
            upstream_file: PathBuf::from(keys::UPSTREAM_FILE),
        }
    }
}

/// A checked configuration. Read-only: its values are those that were checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    values: Values,
    settings: Settings,
    files: Vec<String>,
}

impl Deref for Config {
    type Target = Values;

    fn deref(&self) -> &Values {
        &self.values
    }
}

impl Config {
    /// The text of every value of a key: what was set, or the default.
    pub fn texts(&self, name: &str) -> Vec<&str> {
        let items = self.settings.items(name);
        if !items.is_empty() {
            return items.iter().map(|item| item.text.as_str()).collect();
        }
        let default = keys::find(name).map_or("", |key| key.default);
        default.split(',').filter(|piece| !piece.is_empty()).collect()
    }

    /// The text of a key with one value; empty if it has none.
    pub fn text(&self, name: &str) -> &str {
        match self.settings.one(name) {
            Some(item) => &item.text,
            None => keys::find(name).map_or("", |key| key.default),
        }
    }

    /// The value of a switch.
    pub fn boolean(&self, name: &str) -> bool {
        kinds::boolean(self.text(name)).unwrap_or(false)
    }

    /// Who set a key.
    pub fn origin(&self, name: &str) -> Origin {
        self.settings.origin(name)
    }

    /// The same, on a host that has got another address. One that is written stays.
    #[must_use]
    pub fn at_address(&self, found: IpAddr) -> Self {
        let mut moved = self.clone();
        if self.settings.items("node-ip").is_empty() {
            moved.values.node_ips = vec![found];
        }
        moved
    }

    /// What was set, with origins, before defaults.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Files that were read, in order.
    pub fn files(&self) -> &[String] {
        &self.files
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

/// A configuration and what is worth saying about it: warnings and notes, no errors.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Sorted.
    pub problems: Problems,
    /// What it was made of, to make it again.
    pub request: Request,
}

/// Reads the files that apply and checks everything.
pub fn load(request: &Request) -> Result<Loaded, Problems> {
    let (sources, problems) =
        dropins::read(&request.command_line, &request.environment, &request.paths);
    resolve(&sources, problems, request)
}

/// Checks texts that were already read. Pure.
pub fn resolve(
    sources: &[Source],
    mut problems: Problems,
    request: &Request,
) -> Result<Loaded, Problems> {
    let mut layers = Vec::new();
    for source in sources {
        let (layer, found) = layer::read(&source.name, &source.bytes);
        problems.append(found);
        if let Some(problem) = readable_secret(source, &layer) {
            problems.push(problem);
        }
        layers.push(layer);
    }
    let settings = Settings::merge(&layers, &request.command_line, &request.environment);
    let (values, found) = validate::validate(&settings, &request.host);
    problems.append(found);
    let problems = problems.sorted();
    let files = sources.iter().map(|source| source.name.clone()).collect();
    match values {
        Some(values) if !problems.has_errors() => {
            let config = Config { values, settings, files };
            Ok(Loaded { config, problems, request: request.clone() })
        }
        _ => Err(problems),
    }
}

/// Reads the text of one file as far as it can be judged alone. Never panics; the entry point of the fuzzer.
pub fn parse_text(name: &str, bytes: &[u8]) -> Result<(Layer, Problems), Problems> {
    let (layer, problems) = layer::read(name, bytes);
    let problems = problems.sorted();
    if problems.has_errors() { Err(problems) } else { Ok((layer, problems)) }
}

/// A secret in a file that every user of the host can read.
fn readable_secret(source: &Source, layer: &Layer) -> Option<Problem> {
    const READABLE_BY_OTHERS: u32 = 0o004;
    const PERMISSIONS: u32 = 0o7777;
    if source.mode & READABLE_BY_OTHERS == 0 {
        return None;
    }
    let secret = layer.first_secret()?;
    let mode = source.mode & PERMISSIONS;
    Some(
        Problem::warning(
            Origin::File(secret.position.clone()),
            format!("{} is readable by every user of this host", secret.key.name),
        )
        .found(format!("mode {mode:04o}"))
        .expected(format!("mode {:04o}", mode & 0o770))
        .fix(format!("chmod o= {}", source.name)),
    )
}

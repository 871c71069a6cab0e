//! What surrounds the process: arguments, variables, host.

use std::ffi::OsString;

use crate::config::keys::KEYS;
use crate::config::{Host, Paths, Variables};
use crate::server;

/// Everything the command line's meaning depends on. Not `Debug`: it may hold secrets.
#[derive(Clone)]
pub struct World {
    /// Arguments, the program's name first.
    pub arguments: Vec<OsString>,
    /// Environment variables that some key reads.
    pub variables: Variables,
    /// This host.
    pub host: Host,
    /// Where configuration files are looked for.
    pub paths: Paths,
    /// Columns of help text; `None`: those of the terminal.
    pub width: Option<usize>,
}

impl World {
    /// That of this process.
    pub fn of_process() -> Self {
        let known = |name: &str| KEYS.iter().any(|key| key.environment.contains(&name));
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| known(name))
            .collect();
        let host = Host {
            name: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()),
            address: server::address_of_default_route(),
        };
        Self {
            arguments: std::env::args_os().collect(),
            variables,
            host,
            paths: Paths::default(),
            width: None,
        }
    }
}

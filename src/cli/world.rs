//! What surrounds the process: arguments, variables, host.

use std::ffi::OsString;
use std::net::{IpAddr, UdpSocket};

use crate::config::keys::KEYS;
use crate::config::{Host, Paths, Variables};

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
            address: default_address(),
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

/// The address from which the default route starts. Asking the kernel for a route to an address set aside for
/// documentation sends nothing.
fn default_address() -> Option<IpAddr> {
    let from = |local: &str, remote: &str| {
        let socket = UdpSocket::bind(local).ok()?;
        socket.connect(remote).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    from("0.0.0.0:0", "192.0.2.1:9").or_else(|| from("[::]:0", "[2001:db8::1]:9"))
}

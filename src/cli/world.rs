//! What surrounds the process: arguments, variables, host.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

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
            token_credential: std::env::var_os("CREDENTIALS_DIRECTORY")
                .and_then(|directory| token_credential(Path::new(&directory))),
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

/// Names of the unit's credentials that may hold the token: the plain one, and the one that was sealed to this machine.
const TOKEN_CREDENTIALS: [&str; 2] = ["token", "token-sealed"];

/// The first credential that systemd found.
fn token_credential(directory: &Path) -> Option<PathBuf> {
    TOKEN_CREDENTIALS.iter().map(|name| directory.join(name)).find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_credential_comes_before_the_sealed_one() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(token_credential(dir.path()), None);
        std::fs::write(dir.path().join("token-sealed"), "x").unwrap();
        assert_eq!(token_credential(dir.path()), Some(dir.path().join("token-sealed")));
        std::fs::write(dir.path().join("token"), "x").unwrap();
        assert_eq!(token_credential(dir.path()), Some(dir.path().join("token")));
    }
}

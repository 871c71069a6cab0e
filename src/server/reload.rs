//! Reads the configuration again, and says of each key that has changed what that means.
//!
//! Only what cannot make this server differ from its cluster, and needs no port or file opened anew, holds at once: the names in
//! its certificates. Everything else waits for the next start, which checks it against the cluster; it is named, so that nobody
//! believes it in force.

use super::life::names;
use crate::config::keys::KEYS;
use crate::config::{self, Config, Request};
use crate::pki::Names;

/// Keys that only name this server in its certificates.
const AT_ONCE: [&str; 2] = ["tls-san", "node-external-ip"];

/// What reading gave.
pub(super) struct Reload {
    /// The configuration now.
    pub(super) config: Config,
    /// Names for certificates.
    pub(super) names: Names,
    /// A line for each key that has changed.
    pub(super) said: Vec<String>,
}

/// Reads and compares. The error lists everything that is wrong; then nothing changes.
pub(super) fn reload(request: &Request, before: &Config) -> Result<Reload, String> {
    let loaded = config::load(request).map_err(|problems| problems.to_string())?;
    let config = loaded.config;
    let names = names(&config).map_err(|error| error.to_string())?;
    let changed = KEYS.iter().filter(|key| config.texts(key.name) != before.texts(key.name));
    let said = changed.map(|key| {
        let when = if AT_ONCE.contains(&key.name) { "holds now" } else { "needs a restart" };
        format!("{}: {when}", key.name)
    });
    Ok(Reload { said: said.collect(), names, config })
}

/// For the journal.
pub(super) fn sentence(said: &[String]) -> String {
    if said.is_empty() { "nothing has changed".to_owned() } else { said.join("; ") }
}

//! Decides whether this server's settings fit the cluster, and says exactly where they do not.
//!
//! Some settings shape the whole cluster: two servers with different service networks or different component
//! lists fight each other without a word. K3s compares some of them, once, at a server's first join, and names
//! neither values nor servers. Here all of them are recorded with the cluster and compared at every join and
//! every start, in a canonical form, so that a default and the same value written out are equal.
//!
//! # Shape
//!
//! [`CriticalFlags::of`] takes a checked configuration. [`CriticalFlags::found`] makes the record of a new
//! cluster; [`CriticalFlags::matches`] compares with an existing [`ClusterFlags`]. Both end in [`MatchedFlags`],
//! the proof that founding and joining ask for. Pure: the record is bytes to its keeper. [`gate`] says what is compared at which
//! door; [`change`](change()) makes the record in which one flag has another value, on purpose.
//!
//! # Invariants
//!
//! - Only a comparison without a difference, or founding, makes a [`MatchedFlags`].
//! - [`Flag::ALL`] and the rows of the table marked critical are the same set.
//! - Flags this version does not know stay in a record it rewrites.
//!
//! # Not here
//!
//! When to compare and whom to ask (`join`, `server`), the commands that show and change flags (`etcd`, `admin`).

pub mod gate;

mod change;
mod compare;
mod flag;
mod format;
mod render;
mod value;

#[cfg(test)]
mod ways_tests;

pub use change::{ChangeRefused, Changed, change};
pub use compare::{
    ClusterFlags, ClusterSide, CriticalFlags, MatchedFlags, Mismatch, Mismatches, Recorded,
};
pub use flag::{Change, Flag};
pub use format::DecodeError;
pub use gate::FlagsError;
pub use render::{date, line};
pub use value::Value;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Host, Loaded, Paths, Problems, Request, Source, resolve};

    /// A configuration file with this text.
    pub(super) fn loaded(text: &str) -> Result<Loaded, Problems> {
        let request = Request {
            command_line: Vec::new(),
            environment: std::collections::BTreeMap::new(),
            host: Host { name: Some("pi-1".to_owned()), address: None, token_credential: None },
            paths: Paths::default(),
        };
        let source =
            Source { name: "config.yaml".to_owned(), bytes: text.as_bytes().to_vec(), mode: 0o600 };
        resolve(&[source], Problems::default(), &request)
    }

    /// Its flags.
    pub(super) fn flags(text: &str) -> CriticalFlags {
        let loaded = loaded(text).unwrap_or_else(|problems| panic!("{text}\n{problems}"));
        CriticalFlags::of(&loaded.config)
    }
}

//! Proves who is who: one certificate authority per cluster, and three certificates per node.
//!
//! # Shape
//!
//! [`Pki::establish`] makes, finishes, checks and loads everything in one directory, `<db-dir>/tls`:
//!
//! | file | what | who reads it |
//! |---|---|---|
//! | `ca.crt`, `ca.key` | the cluster's authority, ten years; the key only on the node that founded it | clients trust `ca.crt`; its hash is in the join token |
//! | `server.crt`, `server.key` | port 2379 | this daemon |
//! | `peer.crt`, `peer.key` | port 2380, both directions | this daemon |
//! | `client.crt`, `client.key` | to talk to port 2379 | etcdctl, upstream k3s, our own commands |
//!
//! Every certificate names its owner in one URI, `k3s-server://<cluster>/<role>/<node>`, ids in hexadecimal
//! ([`Identity`]). Addresses and host names are there for clients that check them; peers check the URI only, so that
//! a node may change its address.
//!
//! `issue` and [`validity`] decide what goes into a certificate and when it is due; `files` is the only part that
//! touches the disk; `tls` turns the result into rustls configurations.
//!
//! # Invariants
//!
//! - A certificate always matches its key, whenever the power fails: a key is durable before its certificate is made, and
//!   renewal keeps the key and replaces one file by rename.
//! - The authority is made once. With any other certificate present and `ca.crt` missing we stop: a second authority would
//!   invalidate the tokens and certificates that people hold.
//! - A role opens only its own door: server, peer and client certificates are refused on each other's ports, in the
//!   handshake.
//! - No certificate is refused because this board has no clock: see [`validity`].
//! - Private keys never leave the directory, are never logged, and are refused when others can read them.
//!
//! # Not here
//!
//! Tokens and the transfer of certificates to a joining node (`join`); which node ids are members (`raft`).

mod caller;
mod client_files;
mod error;
mod files;
mod identity;
mod issue;
mod names;
mod store;
mod stranger;
mod tls;
pub mod validity;

pub use caller::{Caller, ChannelBinding};
pub use client_files::{ClientFilesError, call_with_files};
pub use error::{NamesError, PkiError, WrongIdentity};
pub use identity::{Identity, Role};
pub use names::Names;
pub use store::{Issued, Owner, Paths, Pki};
pub use stranger::{call_stranger, introduced};
pub use tls::{ALPN_JOIN, Port};
pub use validity::{CertificateClock, Due, clock_is_unset};

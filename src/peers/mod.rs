//! Carries messages between nodes: gRPC over mutual TLS on port 2380, wherever the nodes are today.
//!
//! # Shape
//!
//! [`Peers`] is the calling side, a [`Transport`](crate::raft::transport::Transport). It keeps two connections to each node: one
//! for calls and streams of entries, one for snapshots, so that no heartbeat waits behind bulk. `lane` makes and keeps
//! them, `dial` opens one, [`address`] decides where to look. [`serve`] is the answering side: it knows the caller by its
//! certificate, asks a [`Gate`] what the cluster knows of it, and passes messages to a [`raft::transport::Answer`](crate::raft::transport::Answer).
//! [`join`] is the door for nodes that have no certificate yet.
//!
//! A connection is used only after a greeting went to and fro. So a certificate that is refused, another release or
//! another cluster are noticed before any message is sent, and `Unreachable` is said with certainty.
//!
//! # Invariants
//!
//! - Who answers is proved by the certificate, never by the address.
//! - Nothing waits for ever: calls have deadlines, connections have pings.
//! - What is received and not read yet is bounded by HTTP/2's windows and one message per stream.
//!
//! # Not here
//!
//! What messages say (`raft`, `join`, `server`), who is a member (the [`Gate`]), sockets that listen (`server::listen`).

pub mod address;
pub mod join;

mod dial;
mod envelope;
mod lane;
mod passport;
mod serve;
mod service;
mod tracked;
mod traffic;
mod transport;

pub use envelope::MESSAGE_BYTES_MAX;
pub use passport::Passport;
pub use serve::{serve, serve_join};
pub use service::{Gate, Standing, Visitor};
pub use transport::Peers;

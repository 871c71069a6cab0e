//! An etcd-compatible, Raft-replicated datastore for highly available K3s on SD cards.
//!
//! Start reading at ARCHITECTURE.md; the modules below are in the order in which they build on each other.

pub mod events;
pub mod limits;
pub mod mutants;
pub mod proto;
pub mod types;
pub mod versions;

pub mod board;
pub mod env;
pub mod metrics;

pub mod command;
pub mod config;
pub mod lease;
pub mod mvcc;
pub mod pki;
pub mod systemd;
pub mod wal;

pub mod client;
pub mod critical;
pub mod watch;

pub mod apply;

pub mod raft;

pub mod peers;

pub mod backup;
pub mod etcd;
pub mod join;

pub mod bus;
pub mod observe;

pub mod admin;
pub mod server;

pub mod cli;

#[cfg(any(test, feature = "testkit"))]
pub mod testkit;

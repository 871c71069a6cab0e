//! An etcd-compatible, Raft-replicated datastore for highly available K3s on SD cards.
//!
//! Start reading at ARCHITECTURE.md; the modules below are in the order in which they build on each other.

pub mod limits;
pub mod proto;
pub mod types;

pub mod env;

pub mod command;
pub mod mvcc;
pub mod wal;

pub mod apply;

pub mod raft;

#[cfg(any(test, feature = "testkit"))]
pub mod testkit;

//! Turns the store into the file that etcd's own tools restore from, and reads such files back.
//!
//! Nobody should be locked in: `etcdctl snapshot save` against us yields what it yields against etcd, a bbolt
//! file with etcd's buckets, so `etcdutl snapshot restore` and a plain etcd can take over from a backup.
//!
//! # Shape
//!
//! [`bolt`] knows pages, trees and checksums and nothing of etcd. [`etcd_file`] knows which buckets etcd keeps and
//! how their keys and values are spelled, and feeds them to the writer from iterators.
//!
//! # Not here
//!
//! The gRPC stream that carries the file (`etcd`), and the logical stream between our own nodes (`raft`).

pub mod bolt;
pub mod etcd_file;

//! Writes and reads bbolt files: the B+tree file format that etcd keeps its data in.
//!
//! A bbolt file is an array of equal pages. Pages 0 and 1 are the meta pages (the valid one with the higher
//! transaction number counts), the others hold a tree of named buckets, each a B+tree of sorted keys.
//!
//! # Shape
//!
//! [`Plan::measure`] runs over the content once to learn where the root will be, [`Plan::write`] runs over the same
//! content again and produces the file front to back. Neither keeps more than one page per tree level. [`Reader`]
//! opens a file somebody else wrote and trusts nothing in it.
//!
//! # Invariants
//!
//! - What [`Plan::write`] produces has exactly [`Plan::bytes`] bytes, is accepted by bbolt's own consistency check,
//!   and reads back the same keys and values.
//! - A damaged file makes [`Reader`] return an error. It never panics, loops, or allocates more than the file's size.
//!
//! # Not here
//!
//! Changing a file in place, free pages, transactions: a backup is written once.

mod format;
mod reader;
mod writer;

pub use format::PAGE_BYTES;
pub use reader::{Bucket, Cursor, ReadError, Reader};
pub use writer::{BucketWriter, FileWriter, Plan, WriteError};

#[cfg(test)]
mod tests;

//! Assembles a node out of its parts.

pub mod listen;

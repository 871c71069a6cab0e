//! Carries messages between nodes: gRPC over mutual TLS on port 2380.

mod dial;
pub mod join;

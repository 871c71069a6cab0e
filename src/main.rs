//! The `k3s-server` program.

fn main() {}

//! The world as tests need it: a disk that tears, fails and lies, a clock that stands still, chance from a seed.
//!
//! Only tests, benches and fuzz targets see this module (feature `testkit`). Every double implements a trait of
//! [`crate::env`], so the code under test is the code that ships.

mod chance;
mod clock;
pub mod disk;
pub mod network;

pub mod rerun;

use std::future::Future;
use std::sync::Arc;

use crate::env::Env;

pub use chance::{Random, SeededEntropy};
pub use clock::ManualClock;
pub use disk::FaultDisk;
pub use network::Network;

/// A world made of this disk, this clock, and chance from this seed.
pub fn env(disk: &FaultDisk, clock: &ManualClock, seed: u64) -> Env {
    Env {
        disk: Arc::new(disk.clone()),
        clock: Arc::new(clock.clone()),
        entropy: Arc::new(SeededEntropy::new(seed)),
    }
}

/// Waits for a future on this thread, for tests that are not asynchronous themselves.
pub fn wait<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(future),
        Err(error) => panic!("no runtime: {error}"),
    }
}

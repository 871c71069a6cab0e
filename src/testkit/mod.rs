//! What only tests, benches and fuzz targets use. A release build does not contain it.

pub mod rerun;

use std::future::Future;

/// Waits for a future on this thread, for tests that are not asynchronous themselves.
pub fn wait<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(future),
        Err(error) => panic!("no runtime: {error}"),
    }
}

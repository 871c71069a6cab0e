//! Takes the last chance out of the process: the kernel's random numbers come from the seed.
//!
//! The standard library keys its hash maps with `getrandom`, and tokio seeds its own generator with such a key: the order in
//! which waiting tasks wake would differ from run to run. This binary defines the symbol itself, so the linker takes it
//! for the C library's. A run has a process of its own, because tokio also counts its runtimes per process.

#![allow(unsafe_code, reason = "a symbol of the C library is replaced, in this test binary only")]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use k3s_server::testkit::Random;

static SEED: AtomicU64 = AtomicU64::new(0);
static CALLS: AtomicU64 = AtomicU64::new(0);

/// From now on, "random" numbers of the kernel follow from `seed`. To be called before anything else.
pub(crate) fn seed(seed: u64) {
    SEED.store(seed, Relaxed);
    k3s_server::raft::runtime::seed_this_thread(seed);
}

/// Replaces the C library's.
///
/// # Safety
///
/// `buffer` points to `len` bytes that may be written, as the C library's callers promise.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buffer: *mut u8, len: usize, _flags: u32) -> isize {
    let call = CALLS.fetch_add(1, Relaxed);
    // SAFETY: see above.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer, len) };
    Random::new(SEED.load(Relaxed) ^ call.wrapping_mul(0x9e37_79b9_7f4a_7c15)).fill(bytes);
    isize::try_from(len).unwrap_or(isize::MAX)
}

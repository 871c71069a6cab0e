//! The few system calls the standard library does not offer. The only `unsafe` of this package.
#![allow(unsafe_code, reason = "each is one call with plain numbers, see the comments")]

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Sleeps until `due`, to within microseconds.
pub fn sleep_until(due: Instant) {
    loop {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left);
    }
}

/// Lets this thread's sleeps end within a microsecond of their time.
pub fn exact_sleeps() {
    // SAFETY: only numbers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
}

/// Tells the kernel that this process serves a block device: it must not wait for its own write-back when memory is short.
pub fn serves_a_block_device() {
    const PR_SET_IO_FLUSHER: i32 = 57;
    // SAFETY: only numbers.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
}

/// Goes before others, or not, where that is allowed. A card is not slower because the processor is busy.
pub fn set_nice(value: i32) {
    // SAFETY: only numbers; 0 is this process.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) };
}

/// Gives back a range of a file, so that it reads as zeros.
pub fn punch_hole(file: &std::fs::File, offset: u64, length: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open for as long as `file` is borrowed.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes everything that is due on the file system that holds `path`.
pub fn sync_file_system(path: &Path) -> io::Result<()> {
    let dir = std::fs::File::open(path)?;
    // SAFETY: the descriptor is open for as long as `dir` lives.
    match unsafe { libc::syncfs(dir.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal to a process this one started.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: only numbers.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Signal numbers.
pub use libc::{SIGKILL, SIGTERM};

/// Waits while `condition` holds, at most `limit`; says whether it ended.
pub fn wait_while(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while condition() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Processor ticks in a second, the unit of /proc/PID/stat.
pub fn ticks_per_second() -> f64 {
    // SAFETY: only numbers.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) as f64 }
}

//! Reports the process itself (memory, files, processor time), read from the kernel at each scrape.
//!
//! Only what an unprivileged process may read about itself is used, so it works under the unit's
//! sandbox (`ProtectProc=`, `ProcSubset=pid`). What cannot be read is left out of the page.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::page::Page;

/// The collector. See the module documentation.
#[derive(Debug)]
pub struct Process {
    started: SystemTime,
}

/// What one look at the kernel's tables gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    /// Memory in RAM.
    pub resident_bytes: Option<u64>,
    /// Address space.
    pub virtual_bytes: Option<u64>,
    /// Open file descriptors.
    pub open_fds: Option<u64>,
    /// Most file descriptors allowed.
    pub max_fds: Option<u64>,
    /// User and system time.
    pub cpu_seconds: Option<f64>,
    /// Bytes handed to storage, the kernel's count: the log, the state and everything else.
    pub written_bytes: Option<u64>,
}

impl Process {
    /// A collector for a process that began at `started`.
    pub const fn new(started: SystemTime) -> Self {
        Self { started }
    }
}

/// Reads the kernel's tables about this process.
pub fn read() -> Reading {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let io = fs::read_to_string("/proc/self/io").unwrap_or_default();
    Reading {
        resident_bytes: field_bytes(&status, "VmRSS:"),
        virtual_bytes: field_bytes(&status, "VmSize:"),
        // The directory handle used for counting is one of the entries.
        open_fds: fs::read_dir("/proc/self/fd")
            .ok()
            .map(|dir| (dir.count() as u64).saturating_sub(1)),
        max_fds: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft),
        cpu_seconds: getrusage(UsageWho::RUSAGE_SELF)
            .ok()
            .map(|usage| seconds(usage.user_time()) + seconds(usage.system_time())),
        written_bytes: field(&io, "write_bytes:").and_then(|bytes| bytes.parse().ok()),
    }
}

/// What stands behind a name at the start of a line.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// `VmRSS:    1234 kB` in bytes. The kernel's "kB" are 1 024 bytes on every page size.
fn field_bytes(status: &str, name: &str) -> Option<u64> {
    let kib: u64 = field(status, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[allow(clippy::cast_precision_loss, reason = "processor time is far below 2^52 microseconds")]
fn seconds(time: nix::sys::time::TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut page = Page::new(encoder);
        let reading = read();
        let started = self.started.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let gauges = [
            (
                "process_resident_memory_bytes",
                "Resident memory size in bytes",
                reading.resident_bytes,
            ),
            ("process_virtual_memory_bytes", "Virtual memory size in bytes", reading.virtual_bytes),
            ("process_open_fds", "Number of open file descriptors", reading.open_fds),
            ("process_max_fds", "Maximum number of open file descriptors", reading.max_fds),
            (
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds",
                Some(started),
            ),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                page.gauges(&[(name, help, value)])?;
            }
        }
        if let Some(seconds) = reading.cpu_seconds {
            let help = "Total user and system CPU time spent in seconds";
            page.seconds_counter(("process_cpu_seconds", help, seconds))?;
        }
        if let Some(bytes) = reading.written_bytes {
            let help = "Bytes that this process caused to be written to storage";
            page.counters(&[("process_io_storage_written_bytes", help, bytes)])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_readable() {
        let reading = read();
        assert!(reading.resident_bytes.unwrap() > 100_000);
        assert!(reading.virtual_bytes.unwrap() >= reading.resident_bytes.unwrap());
        assert!(reading.open_fds.unwrap() >= 3);
        assert!(reading.max_fds.unwrap() >= reading.open_fds.unwrap());
        assert!(reading.cpu_seconds.unwrap() > 0.0);
        assert!(reading.written_bytes.is_some());
    }

    #[test]
    fn a_field_with_an_unknown_unit_is_left_out() {
        assert_eq!(field_bytes("VmRSS:\t  12 kB\n", "VmRSS:"), Some(12 * 1024));
        assert_eq!(field_bytes("VmRSS:\t  12 pages\n", "VmRSS:"), None);
        assert_eq!(field_bytes("Name:\tx\n", "VmRSS:"), None);
    }
}

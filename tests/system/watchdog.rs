//! A server that hangs.

use std::fs;

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::host::{Host, UNIT, until};
use crate::lab::Lab;
use crate::story::found;

/// A founded server whose watchdog is as the unit has it, only sooner; and its process id on the host.
fn watched(lab: &Lab) -> (&Host, String) {
    let host = &lab.hosts[0];
    let dropin = format!("/etc/systemd/system/{UNIT}.d/test.conf");
    host.write(&dropin, "[Service]\nWatchdogSec=3\nRestartSec=1\n");
    host.run(&["systemctl", "daemon-reload"]);
    found(host);
    host.put("kept", "1");
    (host, host.main_pid())
}

fn assert_restarted(host: &Host, old: &str) {
    host.ready();
    assert_ne!(host.main_pid(), old);
    assert_eq!(host.value("kept"), "1");
    let journal = host.journal();
    assert!(journal.contains("Watchdog timeout"), "{journal}");
    assert!(journal.contains("code=dumped") || journal.contains("code=killed"), "{journal}");
}

#[test]
fn hung_server_is_ended_by_the_watchdog_and_starts_again() {
    let Some(lab) = Lab::boot(1) else { return };
    let (host, pid) = watched(&lab);
    host.run(&["kill", "-STOP", &pid]);
    until("systemd restarted it", || host.property("NRestarts") != "0");
    assert_restarted(host, &pid);
}

/// Only the loops hang, and the thread that feeds the watchdog lives: it must not feed.
#[test]
fn server_whose_loops_hang_says_so_and_is_ended_by_the_watchdog() {
    let Some(lab) = Lab::boot(1) else { return };
    let (host, pid) = watched(&lab);
    let stopped = stop_loops(host.outer_pid());
    assert!(stopped.len() > 1, "{stopped:?}");
    until("systemd restarted it", || {
        // A stopped thread that was ended is gone only when who stopped it has looked.
        for thread in &stopped {
            let _ = waitpid(*thread, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL));
        }
        host.property("NRestarts") != "0"
    });
    assert_restarted(host, &pid);
    let journal = host.journal();
    assert!(journal.contains("the main loop has been silent"), "{journal}");
}

/// Stops every thread of the runtime where it is, as a debugger does.
fn stop_loops(process: i32) -> Vec<Pid> {
    let tasks = format!("/proc/{process}/task");
    let threads = fs::read_dir(tasks).unwrap().map(|entry| entry.unwrap().path());
    let loops = threads.filter(|path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "k3s-server")
    });
    let ids = loops.map(|path| path.file_name().unwrap().to_string_lossy().parse().unwrap());
    ids.map(Pid::from_raw)
        .inspect(|thread| {
            ptrace::seize(*thread, ptrace::Options::empty()).unwrap();
            ptrace::interrupt(*thread).unwrap();
        })
        .collect()
}

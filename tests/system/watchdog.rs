//! A server that hangs.

use crate::host::{UNIT, until};
use crate::lab::Lab;
use crate::story::found;

#[test]
fn hung_server_is_ended_by_the_watchdog_and_starts_again() {
    let Some(lab) = Lab::boot(1) else { return };
    let host = &lab.hosts[0];
    // As the unit has it, only sooner.
    let dropin = format!("/etc/systemd/system/{UNIT}.d/test.conf");
    host.write(&dropin, "[Service]\nWatchdogSec=3\nRestartSec=1\n");
    host.run(&["systemctl", "daemon-reload"]);
    found(host);
    host.put("kept", "1");
    let pid = host.main_pid();

    host.run(&["kill", "-STOP", &pid]);
    until("systemd restarted it", || host.property("NRestarts") != "0");
    host.ready();
    assert_ne!(host.main_pid(), pid);
    assert_eq!(host.value("kept"), "1");
    let journal = host.journal();
    assert!(journal.contains("Watchdog timeout"), "{journal}");
    assert!(journal.contains("code=dumped") || journal.contains("code=killed"), "{journal}");
}

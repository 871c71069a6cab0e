//! The unit file, judged by systemd's own tools where they are installed.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Highest exposure in tenths; see `systemd-analyze security`.
const EXPOSURE_MAX: &str = "18";

fn unit() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/k3s-server.service"))
        .unwrap()
}

/// The values of a setting, in order.
fn values<'u>(unit: &'u str, setting: &str) -> Vec<&'u str> {
    unit.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('=')).collect()
}

/// Runs systemd-analyze on a copy whose program exists; `None` without the tool.
fn analyze(arguments: &[&str]) -> Option<Output> {
    let dir = tempfile::tempdir().unwrap();
    let copy: PathBuf = dir.path().join("k3s-server.service");
    fs::write(&copy, unit().replace("/usr/bin/k3s-server", "/bin/true")).unwrap();
    match Command::new("systemd-analyze").args(arguments).arg(&copy).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("SKIPPED: systemd-analyze is not installed");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    let Some(output) = analyze(&["verify", "--man=no"]) else { return };
    let said = String::from_utf8(output.stderr).unwrap();
    // Only the two settings that Debian 12's systemd does not have yet.
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("k3s-server.service"))
        .filter(|line| !line.contains("'RestartSteps'") && !line.contains("'RestartMaxDelaySec'"))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    assert!(output.status.success(), "{said}");
}

#[test]
fn exposure_stays_below_the_limit() {
    let threshold = format!("--threshold={EXPOSURE_MAX}");
    let Some(output) = analyze(&["security", "--offline=yes", "--no-pager", &threshold]) else {
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// What the daemon relies on, whether or not systemd's tools are here.
#[test]
fn unit_says_what_the_daemon_relies_on() {
    let unit = unit();
    for (setting, value) in [
        ("Type", "notify"),
        ("User", "k3s-server"),
        ("StateDirectory", "k3s-server"),
        ("WatchdogSec", "60"),
        ("TimeoutStartSec", "infinity"),
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", "64 78"),
        ("UMask", "0077"),
    ] {
        assert_eq!(values(&unit, setting), [value], "{setting}");
    }
    assert!(values(&unit, "Wants").is_empty(), "nothing may delay the start");
}

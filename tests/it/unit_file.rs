//! The unit file, judged by systemd's own tools where they are installed.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Highest exposure in tenths; see `systemd-analyze security`.
const EXPOSURE_MAX: &str = "18";

const UNITS: [&str; 2] = ["k3s-server.service", "k3s-server-health.service"];

fn file(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)).unwrap()
}

fn unit() -> String {
    file("k3s-server.service")
}

/// The values of a setting, in order.
fn values<'u>(unit: &'u str, setting: &str) -> Vec<&'u str> {
    unit.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('=')).collect()
}

/// Runs systemd-analyze on copies of which the programs exist; `None` without the tool.
fn analyze(arguments: &[&str], name: &str) -> Option<Output> {
    let dir = tempfile::tempdir().unwrap();
    for name in UNITS {
        let text = file(name).replace("/usr/bin/k3s-server", "/bin/true");
        fs::write(dir.path().join(name), text).unwrap();
    }
    let copy: PathBuf = dir.path().join(name);
    match Command::new("systemd-analyze").args(arguments).arg(&copy).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("skipped: systemd-analyze is not installed (Debian: systemd)");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    for name in UNITS {
        let Some(output) = analyze(&["verify", "--man=no"], name) else { return };
        let said = String::from_utf8(output.stderr).unwrap();
        // Only the two settings that Debian 12's systemd does not have yet.
        let complaints: Vec<&str> = said
            .lines()
            .filter(|line| line.contains("k3s-server"))
            .filter(|line| {
                !line.contains("'RestartSteps'") && !line.contains("'RestartMaxDelaySec'")
            })
            .collect();
        assert!(complaints.is_empty(), "{complaints:#?}");
        assert!(output.status.success(), "{said}");
    }
}

#[test]
fn exposure_stays_below_the_limit() {
    let threshold = format!("--threshold={EXPOSURE_MAX}");
    for name in UNITS {
        let arguments = ["security", "--offline=yes", "--no-pager", &threshold];
        let Some(output) = analyze(&arguments, name) else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

/// What decides before `boot-complete.target` must not wait for a cluster.
#[test]
fn health_check_comes_before_the_end_of_the_boot_and_waits_for_nobody() {
    let unit = file("k3s-server-health.service");
    assert_eq!(values(&unit, "Before"), ["boot-complete.target"]);
    assert_eq!(values(&unit, "RequiredBy"), ["boot-complete.target"]);
    assert_eq!(values(&unit, "Type"), ["oneshot"]);
    assert!(values(&unit, "After").is_empty());
}

/// The actions in polkit's file are those that the daemon asks for.
#[test]
fn polkit_knows_every_action_that_is_asked_for() {
    let source = include_str!("../../src/bus/server1.rs");
    let asked = source.split('"').filter(|text| text.starts_with("io.k3s.Server1."));
    let policy = file("io.k3s.Server1.policy");
    let mut count = 0;
    for action in asked {
        assert!(policy.contains(&format!("<action id=\"{action}\">")), "{action}");
        count += 1;
    }
    assert_eq!(count, policy.matches("<action id=").count());
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

//! What the unit relies on: the watchdog, phases, exit statuses, credentials, reload.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::server::{Server, display, text};
use crate::support::process::Process;

fn signal(process: &Process, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(process.pid()).unwrap()), signal).unwrap();
}

/// A timer that feeds by itself would go on for ever here.
#[test]
fn hung_raft_loop_is_not_fed_for() {
    let server = Server::configure("");
    let variables = [("WATCHDOG_USEC", "3000000"), ("K3S_SERVER_TEST_HANG", "raft")];
    let process = server.start(&variables);
    server.notified("READY=1");
    server.notified("WATCHDOG=1");
    signal(&process, Signal::SIGUSR2);
    let seen = server.notified("STATUS=the main loop has been silent");
    assert!(seen.len() < 12, "fed on and on: {seen:#?}");
    // systemd would have killed it by the end of this.
    let end = std::time::Instant::now() + Duration::from_secs(4);
    let rest = std::thread::spawn(move || {
        let mut fed = 0;
        while std::time::Instant::now() < end {
            fed += usize::from(server.next_within(end) == Some("WATCHDOG=1".to_owned()));
        }
        fed
    });
    assert_eq!(rest.join().unwrap(), 0, "a hung loop was fed for");
    drop(process);
}

#[test]
fn without_the_variable_the_signal_ends_the_process_and_hangs_nothing() {
    let server = Server::configure("");
    let mut process = server.start(&[]);
    server.notified("READY=1");
    signal(&process, Signal::SIGUSR2);
    assert!(!process.ended().success());
}

#[test]
fn phases_lead_from_opening_to_stopped_and_health_agrees() {
    let server = Server::configure("");
    let mut process = server.start(&[]);
    server.notified("READY=1");
    process.wait_until("is ready", || server.phase()["phase"] == "ready");
    let run = display(&server.path("run"));
    let health = server.run(&["health", "--runtime-dir", &run, "--timeout", "30"], &[]);
    assert_eq!(
        (health.status.code(), text(&health.stdout).as_str()),
        (Some(0), "well: k3s-server serves\n")
    );
    assert!(process.stop().success());
    assert_eq!(server.phase()["phase"], "stopping");
}

#[test]
fn refused_configuration_is_broken_at_once_and_names_the_key() {
    let server = Server::configure("cluster-cidr: nonsense\n");
    let mut process = server.start(&[]);
    assert_eq!(process.ended().code(), Some(78));
    assert_eq!(server.phase()["exit"], 78);
    let run = display(&server.path("run"));
    let health = server.run(&["health", "--runtime-dir", &run, "--timeout", "600"], &[]);
    assert_eq!(health.status.code(), Some(1));
    let said = text(&health.stderr);
    assert!(said.starts_with("broken: the start is refused"), "{said}");
    assert!(said.contains("cluster-cidr"), "{said}");
}

/// After a power cut in the house every server starts alone, and none of them may be rolled back for that.
#[test]
fn server_that_cannot_reach_the_others_is_well() {
    let token = "K10".to_owned() + &"0".repeat(64) + "::server:" + &"x".repeat(40);
    let server = Server::configure(&format!("server: https://127.0.0.1:1\ntoken: \"{token}\"\n"));
    let mut process = server.start(&[]);
    process.wait_until("asks to be let in", || {
        server.path("run").join("phase.json").exists() && server.phase()["phase"] == "joining"
    });
    let run = display(&server.path("run"));
    let health = server.run(&["health", "--runtime-dir", &run, "--timeout", "60"], &[]);
    let said = text(&health.stdout);
    assert_eq!(health.status.code(), Some(0), "{said}{}", text(&health.stderr));
    assert!(said.contains("what is missing are the others"), "{said}");
}

#[test]
fn token_comes_from_the_units_credentials() {
    let server = Server::configure("");
    let credentials = server.path("credentials");
    std::fs::create_dir(&credentials).unwrap();
    let password = "a-credential-of-the-unit";
    std::fs::write(credentials.join("token"), format!("{password}\n")).unwrap();
    let mut process = server.start(&[("CREDENTIALS_DIRECTORY", &display(&credentials))]);
    server.notified("READY=1");
    let kept = std::fs::read_to_string(server.path("db/token")).unwrap();
    assert!(kept.trim_end().ends_with(&format!("::server:{password}")), "{kept}");
    assert!(process.stop().success());
    assert!(!process.printed().contains("expected 0600"), "{}", process.printed());
    assert!(!process.printed().contains(password));
}

#[test]
fn reload_tells_what_holds_now_and_what_waits() {
    let server = Server::configure("");
    let mut process = server.start(&[]);
    server.notified("READY=1");
    server.append("tls-san: pi-1.lan\nquota-backend-bytes: 4294967296");
    signal(&process, Signal::SIGHUP);
    process.wait_until_printed("tls-san: holds now");
    process.wait_until_printed("issued ");
    server.append("cluster-cidr: nonsense");
    signal(&process, Signal::SIGHUP);
    process.wait_until_printed("nothing was reloaded");
    assert!(process.stop().success());
}

#[test]
fn status_shows_a_running_and_a_stopped_server() {
    let server = Server::configure("");
    let mut process = server.start(&[]);
    let seen = server.notified("READY=1");
    assert!(seen.iter().any(|line| line.starts_with("STATUS=")), "{seen:#?}");
    let config = display(&server.path("config.yaml"));
    let nowhere = [("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")];
    let shown = server.run(&["status", "--config", &config], &nowhere);
    let page = text(&shown.stdout);
    assert_eq!(shown.status.code(), Some(0), "{page}{}", text(&shown.stderr));
    for part in ["pi-1 is leader in term", "barriers", "today, since", "| pi-1 | leader"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    let json = server.run(&["status", "-o", "json", "--config", &config], &nowhere);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["server"]["role"], "leader");
    assert!(json["server"]["barriers"]["p99_micros"].as_u64().unwrap() > 0);
    assert!(process.stop().success());
    let shown = server.run(&["status", "--config", &config], &nowhere);
    let page = text(&shown.stdout);
    assert_eq!(shown.status.code(), Some(1), "{page}");
    assert!(page.starts_with("k3s-server does not answer\n"), "{page}");
    assert!(page.contains(": node "), "{page}");
}

/// A port in use is said with its number, and the address.
#[test]
fn port_in_use_is_no_configuration_error_without_upstream() {
    let server = Server::configure("");
    let _held = std::net::TcpListener::bind(&server.client).unwrap();
    let nowhere = [("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")];
    let mut process = server.start(&nowhere);
    assert_eq!(process.ended().code(), Some(1));
    assert!(process.printed().contains("the port is in use by"), "{}", process.printed());
}

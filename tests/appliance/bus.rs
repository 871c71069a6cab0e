//! A private message bus: the real dbus-daemon, with our own policy file.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// The bus. Ends when dropped.
pub struct Bus {
    daemon: Child,
    pub address: String,
    _dir: TempDir,
}

impl Bus {
    /// `None` where there is no dbus-daemon; said aloud.
    pub fn start() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        // Other users come here, too.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let policy = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("systemd/io.k3s.Server1.conf");
        // The account of the daemon need not exist where tests run; the daemon runs as whoever runs them.
        let policy = std::fs::read_to_string(policy).unwrap();
        let me = nix::unistd::getuid().to_string();
        let policy = policy.replace("policy user=\"k3s-server\"", &format!("policy user=\"{me}\""));
        std::fs::write(dir.path().join("own.conf"), policy).unwrap();
        let config = format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={0}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow receive_type="method_call"/>
  </policy>
  <policy user="{me}">
    <allow own_prefix="org.freedesktop"/>
    <allow send_destination_prefix="org.freedesktop"/>
  </policy>
  <include>{0}/own.conf</include>
</busconfig>"#,
            dir.path().display()
        );
        std::fs::write(dir.path().join("bus.conf"), config).unwrap();
        let daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}/bus.conf", dir.path().display()))
            .args(["--nofork", "--print-address"])
            .stdout(Stdio::piped())
            .spawn();
        let mut daemon = match daemon {
            Ok(daemon) => daemon,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: dbus-daemon is not installed (Debian: dbus-daemon)");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Some(Self { daemon, address: address.trim().to_owned(), _dir: dir })
    }

    /// A connection of the test's own.
    pub async fn connect(&self) -> zbus::Connection {
        zbus::connection::Builder::address(self.address.as_str()).build().await.unwrap()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

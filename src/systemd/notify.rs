//! Sends the service manager's messages (`sd_notify(3)`).
//!
//! Our own and not the sd-notify crate's, because the socket is a value here: tests stand in for the service manager,
//! and nothing depends on the process environment after start. Sending never blocks and never fails the caller:
//! a full socket loses a status line, and the next one replaces it anyway.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

/// Longest status line, so that a message always fits one datagram.
const STATUS_BYTES_MAX: usize = 1024;

/// Where messages go. Cheap to clone; silent without a service manager.
#[derive(Clone, Debug, Default)]
pub struct Notifier(Option<Arc<Target>>);

#[derive(Debug)]
struct Target {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Notifier {
    /// A notifier nobody listens to.
    pub const fn silent() -> Self {
        Self(None)
    }

    /// The socket named by `$NOTIFY_SOCKET`; silent when it is not set.
    pub fn from_environment() -> io::Result<Self> {
        match std::env::var("NOTIFY_SOCKET") {
            Ok(name) => Self::to_socket(&name),
            Err(_) => Ok(Self::silent()),
        }
    }

    /// A socket by name: a path, or an abstract name behind `@`.
    pub fn to_socket(name: &str) -> io::Result<Self> {
        let address = match name.strip_prefix('@') {
            Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
            None => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self(Some(Arc::new(Target { socket, address }))))
    }

    /// Whether a service manager listens.
    pub const fn is_heard(&self) -> bool {
        self.0.is_some()
    }

    /// The service is up.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// One line in words, shown by `systemctl status`.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", one_line(text)));
    }

    /// The service has begun to stop.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The service is alive.
    pub fn watchdog(&self) {
        self.send("WATCHDOG=1");
    }

    /// Start or stop may take this long from now on. Call it again while there is progress.
    pub fn extend_timeout(&self, duration: Duration) {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}", duration.as_micros()));
    }

    fn send(&self, message: &str) {
        let Some(target) = &self.0 else { return };
        if let Err(error) = target.socket.send_to_addr(message.as_bytes(), &target.address) {
            tracing::debug!(%error, message, "the service manager was not told");
        }
    }
}

/// A message ends at the first newline, so what follows it would be read as another assignment.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(STATUS_BYTES_MAX));
    for character in text.chars() {
        let character = if character.is_control() { ' ' } else { character };
        if line.len() + character.len_utf8() > STATUS_BYTES_MAX {
            break;
        }
        line.push(character);
    }
    line
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A stand-in for the service manager.
    pub(in crate::systemd) struct Listener {
        socket: UnixDatagram,
        _dir: tempfile::TempDir,
    }

    impl Listener {
        pub(in crate::systemd) fn new() -> (Self, Notifier) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("notify");
            let socket = UnixDatagram::bind(&path).unwrap();
            socket.set_nonblocking(true).unwrap();
            let notifier = Notifier::to_socket(path.to_str().unwrap()).unwrap();
            (Self { socket, _dir: dir }, notifier)
        }

        /// Everything sent so far. Datagrams on a Unix socket arrive before the send returns.
        pub(in crate::systemd) fn drain(&self) -> Vec<String> {
            let mut messages = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(length) = self.socket.recv(&mut buffer) {
                messages.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
            }
            messages
        }
    }

    #[test]
    fn messages_arrive_as_systemd_spells_them() {
        let (listener, notifier) = Listener::new();
        notifier.ready();
        notifier.status("leader is pi-2");
        notifier.watchdog();
        notifier.extend_timeout(Duration::from_secs(30));
        notifier.stopping();
        assert_eq!(
            listener.drain(),
            [
                "READY=1",
                "STATUS=leader is pi-2",
                "WATCHDOG=1",
                "EXTEND_TIMEOUT_USEC=30000000",
                "STOPPING=1"
            ]
        );
    }

    #[test]
    fn abstract_sockets_are_understood() {
        let name = format!("k3s-server-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Notifier::to_socket(&format!("@{name}")).unwrap().ready();
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
    }

    /// A peer's host name ends up in the status; it must not be able to say READY=1 for us.
    #[test]
    fn status_cannot_smuggle_a_second_assignment() {
        let (listener, notifier) = Listener::new();
        notifier.status("leader is x\nREADY=1");
        notifier.status(&"é".repeat(STATUS_BYTES_MAX));
        let messages = listener.drain();
        assert_eq!(messages[0], "STATUS=leader is x READY=1");
        assert_eq!(messages[1].len(), "STATUS=".len() + STATUS_BYTES_MAX);
    }

    #[test]
    fn full_socket_does_not_block() {
        let (listener, notifier) = Listener::new();
        for _ in 0..100_000 {
            notifier.watchdog();
        }
        assert!(!listener.drain().is_empty());
    }

    #[test]
    fn nobody_listening_is_fine() {
        let notifier = Notifier::silent();
        assert!(!notifier.is_heard());
        notifier.ready();
        let gone = Notifier::to_socket("/nonexistent/notify").unwrap();
        gone.ready();
    }
}

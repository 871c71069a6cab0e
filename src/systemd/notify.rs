//! Sends the service manager's messages (`sd_notify(3)`).
//!
//! The `sd-notify` crate knows the protocol; what is ours is that nothing else needs to ask whether there is a service manager,
//! and that a message cannot carry more than it was meant to. Sending never fails the caller: a status line that is lost is
//! replaced by the next one anyway.
//!
//! The crate sends on the calling thread over a blocking socket. Unlike the journal's (`observe::forward` says how that is
//! dealt with), this one is emptied by PID 1, whose loop writes to no card, and it holds hundreds of messages
//! (`net.unix.max_dgram_qlen`). We send a dozen a minute at most. Should it be full all the same, the sender waits, as with any
//! program that uses `sd_notify`.
//!
//! # Not here
//!
//! Sockets in the abstract namespace (`NOTIFY_SOCKET=@…`): the crate does not know them; systemd's own is the path
//! `/run/systemd/notify`.

use std::time::Duration;

use sd_notify::NotifyState;

/// Longest status line, so that a message always fits one datagram.
const STATUS_BYTES_MAX: usize = 1024;

/// The service manager, if there is one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Notifier {
    heard: bool,
}

impl Notifier {
    /// A notifier nobody listens to.
    pub const fn silent() -> Self {
        Self { heard: false }
    }

    /// The socket named by `$NOTIFY_SOCKET`; silent when it is not set.
    pub fn from_environment() -> Self {
        Self { heard: std::env::var_os("NOTIFY_SOCKET").is_some_and(|name| !name.is_empty()) }
    }

    /// Whether a service manager listens.
    pub const fn is_heard(self) -> bool {
        self.heard
    }

    /// The service is up.
    pub fn ready(self) {
        self.send(NotifyState::Ready);
    }

    /// One line in words, shown by `systemctl status`.
    pub fn status(self, text: &str) {
        self.send(NotifyState::Status(&one_line(text)));
    }

    /// The service has begun to stop.
    pub fn stopping(self) {
        self.send(NotifyState::Stopping);
    }

    /// The service is alive.
    pub fn watchdog(self) {
        self.send(NotifyState::Watchdog);
    }

    /// Start or stop may take this long from now on, at most an hour. Call it again while there is progress.
    pub fn extend_timeout(self, duration: Duration) {
        let micros = u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        self.send(NotifyState::ExtendTimeoutUsec(micros));
    }

    fn send(self, message: NotifyState<'_>) {
        if !self.heard {
            return;
        }
        if let Err(error) = sd_notify::notify(std::slice::from_ref(&message)) {
            tracing::debug!(%error, %message, "the service manager was not told");
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
pub(crate) mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::testkit::rerun;

    /// A stand-in for the service manager.
    pub(in crate::systemd) struct Listener(UnixDatagram);

    impl Listener {
        /// The environment of a process is one for all its tests, so each test that listens gets a process of its own:
        /// `Some` is in there, `None` is where it was started from and has passed.
        pub(in crate::systemd) fn in_child(test: &str) -> Option<(Self, Notifier)> {
            if !rerun::is_child(test) {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("notify");
                rerun::pass(test, rerun::this_binary().env("NOTIFY_SOCKET", path));
                return None;
            }
            let socket = UnixDatagram::bind(std::env::var_os("NOTIFY_SOCKET").unwrap()).unwrap();
            socket.set_nonblocking(true).unwrap();
            let notifier = Notifier::from_environment();
            assert!(notifier.is_heard());
            Some((Self(socket), notifier))
        }

        /// Everything sent so far. Datagrams on a Unix socket arrive before the send returns.
        pub(in crate::systemd) fn drain(&self) -> Vec<String> {
            let mut messages = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(length) = self.0.recv(&mut buffer) {
                let message = std::str::from_utf8(&buffer[..length]).unwrap();
                messages.push(message.strip_suffix('\n').unwrap().to_owned());
            }
            messages
        }
    }

    #[test]
    fn messages_arrive_as_systemd_spells_them() {
        const TEST: &str = concat!(module_path!(), "::messages_arrive_as_systemd_spells_them");
        let Some((listener, notifier)) = Listener::in_child(TEST) else { return };
        notifier.ready();
        notifier.status("leader is pi-2");
        notifier.watchdog();
        notifier.extend_timeout(Duration::from_secs(30));
        notifier.extend_timeout(Duration::from_hours(24));
        notifier.stopping();
        assert_eq!(
            listener.drain(),
            [
                "READY=1",
                "STATUS=leader is pi-2",
                "WATCHDOG=1",
                "EXTEND_TIMEOUT_USEC=30000000",
                "EXTEND_TIMEOUT_USEC=4294967295",
                "STOPPING=1"
            ]
        );
    }

    /// A peer's host name ends up in the status; it must not be able to say READY=1 for us.
    #[test]
    fn status_cannot_smuggle_a_second_assignment() {
        const TEST: &str = concat!(module_path!(), "::status_cannot_smuggle_a_second_assignment");
        let Some((listener, notifier)) = Listener::in_child(TEST) else { return };
        notifier.status("leader is x\nREADY=1");
        notifier.status(&"é".repeat(STATUS_BYTES_MAX));
        let messages = listener.drain();
        assert_eq!(messages[0], "STATUS=leader is x READY=1");
        assert_eq!(messages[1].len(), "STATUS=".len() + STATUS_BYTES_MAX);
    }

    #[test]
    fn silent_notifier_says_nothing_and_a_deaf_manager_is_fine() {
        const TEST: &str =
            concat!(module_path!(), "::silent_notifier_says_nothing_and_a_deaf_manager_is_fine");
        let Some((listener, notifier)) = Listener::in_child(TEST) else { return };
        Notifier::silent().ready();
        assert!(listener.drain().is_empty());
        drop(listener);
        notifier.ready();
    }

    #[test]
    fn without_a_socket_in_the_environment_nobody_listens() {
        const TEST: &str =
            concat!(module_path!(), "::without_a_socket_in_the_environment_nobody_listens");
        if !rerun::is_child(TEST) {
            rerun::pass(TEST, rerun::this_binary().env_remove("NOTIFY_SOCKET"));
            return;
        }
        assert!(!Notifier::from_environment().is_heard());
    }
}

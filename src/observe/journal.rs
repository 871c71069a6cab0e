//! Decides what a log event looks like in the systemd journal.
//!
//! `tracing-journald` speaks the journal's protocol; this is the only file that knows the crate. Field names are upper-cased and `.`
//! becomes `_`. There is no prefix, so `message_id` is the journal's `MESSAGE_ID`, by which `journalctl -x` finds the
//! explanation, and `k3s.term` is `K3S_TERM`. Fields of the spans around an event are sent with it, and values with line
//! breaks arrive whole.
//!
//! # Invariants
//!
//! - The crate sends on the calling thread over a blocking socket, so its layer is never handed to the speakers themselves, only
//!   to the thread of [`super::forward`], which says why.
//!
//! # Not here
//!
//! Whether there is a journal to write to: [`super::logging`].

use std::io;

use tracing_journald::{Layer, Priority, PriorityMappings};
use tracing_subscriber::EnvFilter;

use super::forward::{Flush, Forward, forward};

/// The name the journal shows in front of each line.
const IDENTIFIER: &str = "k3s-server";

/// The journal's layer for all threads; `filter` as for [`forward`]. Fails when no journal listens.
pub fn open(filter: EnvFilter) -> io::Result<(Forward, Flush)> {
    let journal = Layer::new()?
        .with_field_prefix(None)
        .with_syslog_identifier(IDENTIFIER.into())
        .with_priority_mappings(priorities());
    forward(journal, filter)
}

/// syslog's priority for a level. INFO is 6: "informational", not "notice" as the crate has it.
fn priorities() -> PriorityMappings {
    PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        ..PriorityMappings::new()
    }
}

/// Against the real crate, whose socket has a fixed path: each test runs in a mount namespace of its own, with an empty
/// `/run` in which a stand-in for journald listens.
#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;
    use std::thread;
    use std::time::Duration;

    use crate::announce;
    use crate::events::{EventId, fields};
    use crate::observe::forward::LINES_MAX;
    use crate::observe::logging::{Logging, Logs, Output, init};
    use crate::testkit::rerun;

    const DIRECTORY: &str = "/run/systemd/journal";

    /// Makes a private, empty /run, says as systemd does that stderr is the journal, and runs the rest of its arguments.
    const SCRIPT: &str = "mount -t tmpfs tmpfs /run || exit 1
        JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$@\"";

    /// Runs the test in its namespace and returns what it left on stderr; `None` where none can be made.
    fn run_in_namespace(test: &str) -> Option<String> {
        // As root, or as anybody where user namespaces are allowed.
        for way in ["--mount", "--map-root-user --mount"] {
            let unshare = || {
                let mut command = Command::new("unshare");
                command.args(way.split(' ')).args(["sh", "-c", SCRIPT, "sh"]);
                command
            };
            if unshare().arg("true").output().is_ok_and(|output| output.status.success()) {
                let program = rerun::this_binary();
                return Some(rerun::pass(test, unshare().arg(program.get_program())));
            }
        }
        eprintln!("SKIPPED: {test}: no private mount namespace can be made here");
        None
    }

    /// A stand-in for journald.
    struct Journald(UnixDatagram);

    impl Journald {
        fn listen() -> Self {
            fs::create_dir_all(DIRECTORY).unwrap();
            let socket = UnixDatagram::bind(format!("{DIRECTORY}/socket")).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            Self(socket)
        }

        /// The next non-empty entry, decoded by the rules of the native protocol.
        fn next(&self) -> BTreeMap<String, String> {
            let mut buffer = vec![0; 256 * 1024];
            loop {
                let length = self.0.recv(&mut buffer).unwrap();
                if length > 0 {
                    return decode(&buffer[..length]);
                }
            }
        }
    }

    fn decode(mut rest: &[u8]) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        while !rest.is_empty() {
            let line = rest.iter().position(|byte| *byte == b'\n').unwrap();
            let head = std::str::from_utf8(&rest[..line]).unwrap();
            rest = &rest[line + 1..];
            let (name, value) = if let Some((name, value)) = head.split_once('=') {
                (name, value.to_owned())
            } else {
                let length = u64::from_le_bytes(rest[..8].try_into().unwrap());
                let length = usize::try_from(length).unwrap();
                let value = String::from_utf8(rest[8..8 + length].to_vec()).unwrap();
                assert_eq!(rest[8 + length], b'\n');
                rest = &rest[9 + length..];
                (head, value)
            };
            fields.insert(name.to_owned(), value);
        }
        fields
    }

    fn start() -> Logs {
        let logs = init(&Logging { debug: true, filter: None }).unwrap();
        assert_eq!(logs.output, Output::Journal);
        logs
    }

    #[test]
    fn events_arrive_with_the_names_and_priorities_journalctl_expects() {
        const TEST: &str = concat!(
            module_path!(),
            "::events_arrive_with_the_names_and_priorities_journalctl_expects"
        );
        if !rerun::is_child(TEST) {
            run_in_namespace(TEST);
            return;
        }
        let journald = Journald::listen();
        let _logs = start();

        announce!(EventId::Ready, { fields::TERM } = 5_u64, "ready to serve on {}", 2379);
        let ready = journald.next();
        assert_eq!(ready["MESSAGE"], "ready to serve on 2379");
        assert_eq!(ready["MESSAGE_ID"], EventId::Ready.to_string());
        assert_eq!(ready["MESSAGE_ID"].len(), 32);
        assert_eq!(ready["PRIORITY"], "6");
        assert_eq!(ready["K3S_TERM"], "5");
        assert_eq!(ready["SYSLOG_IDENTIFIER"], "k3s-server");
        assert!(ready["CODE_FILE"].ends_with("journal.rs"));
        assert!(!ready.contains_key("K3S_REMEDY"));

        announce!(EventId::SlowBarrier, { fields::MILLIS } = 7000_u64, "slow");
        let warning = journald.next();
        assert_eq!(warning["PRIORITY"], "4");
        assert_eq!(warning["K3S_REMEDY"], EventId::SlowBarrier.remedy().unwrap());
        announce!(EventId::BarrierFailed, "failed");
        assert_eq!(journald.next()["PRIORITY"], "3");
        tracing::debug!("detail");
        assert_eq!(journald.next()["PRIORITY"], "7");
    }

    #[test]
    fn values_with_line_breaks_survive_and_cannot_forge_fields() {
        const TEST: &str =
            concat!(module_path!(), "::values_with_line_breaks_survive_and_cannot_forge_fields");
        if !rerun::is_child(TEST) {
            run_in_namespace(TEST);
            return;
        }
        let journald = Journald::listen();
        let _logs = start();

        let node = tracing::info_span!("node", { fields::NODE } = "ab\nPRIORITY=0");
        node.in_scope(|| {
            tracing::info!({ fields::PEER } = "pi-2\nPRIORITY=0", "two\nlines\nMESSAGE_ID=1")
        });
        let entry = journald.next();
        assert_eq!(entry["MESSAGE"], "two\nlines\nMESSAGE_ID=1");
        assert_eq!(entry["K3S_PEER"], "pi-2\nPRIORITY=0");
        assert_eq!(entry["K3S_NODE"], "ab\nPRIORITY=0");
        assert_eq!(entry["PRIORITY"], "6");
        assert!(!entry.contains_key("MESSAGE_ID"));
    }

    #[test]
    fn journal_that_does_not_read_stops_nobody_and_learns_what_it_missed() {
        const TEST: &str = concat!(
            module_path!(),
            "::journal_that_does_not_read_stops_nobody_and_learns_what_it_missed"
        );
        if !rerun::is_child(TEST) {
            run_in_namespace(TEST);
            return;
        }
        let journald = Journald::listen();
        let logs = start();

        // More than the queue and any socket buffer hold. Sent by this thread, this would never end.
        let said = LINES_MAX + 20_000;
        for line in 0..said {
            tracing::info!({ fields::INDEX } = line, "line {line}");
        }
        let ending = thread::spawn(move || drop(logs));
        let (mut arrived, mut lost) = (0, 0);
        while arrived + lost < said {
            let entry = journald.next();
            if let Some(count) = entry.get("K3S_LINES_LOST") {
                lost += count.parse::<usize>().unwrap();
            } else {
                assert_eq!(entry["K3S_INDEX"], (arrived + lost).to_string());
                arrived += 1;
            }
        }
        assert!(lost > 0, "this test needs a longer stall");
        assert!(LINES_MAX <= arrived, "only {arrived} lines arrived");
        ending.join().unwrap();
    }

    #[test]
    fn without_a_socket_lines_go_to_stderr_as_text() {
        const TEST: &str = concat!(module_path!(), "::without_a_socket_lines_go_to_stderr_as_text");
        if !rerun::is_child(TEST) {
            if let Some(stderr) = run_in_namespace(TEST) {
                let remedy = EventId::ListenFailed.remedy().unwrap();
                let text = format!("ERROR cannot listen address=[::]:2379\n  fix: {remedy}\n");
                assert!(stderr.contains(&text), "{stderr}");
            }
            return;
        }
        let logs = init(&Logging::default()).unwrap();
        assert_eq!(logs.output, Output::Text { colour: false });
        announce!(EventId::ListenFailed, { fields::ADDRESS } = "[::]:2379", "cannot listen");
    }
}

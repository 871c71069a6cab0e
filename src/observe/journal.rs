//! Writes log events to the systemd journal, fields and all.
//!
//! Our own and not tracing-journald's, for one reason: that one sends on a blocking socket. When the card under
//! `/var/log/journal` pauses for seconds, journald stops reading, the socket fills, and the next log line would stop Raft with
//! it. Here a line that does not fit at once is dropped and counted, and the next line says how many were lost. The socket is
//! also a value, so tests read what really is sent.
//!
//! # Shape
//!
//! A `tracing_subscriber` layer. Each event is one datagram of `NAME=value` lines, or the length-prefixed form
//! for values with line breaks, as the journal's native protocol wants it. Field names are upper-cased and `.` becomes `_`; there is no
//! prefix, so `message_id` is the journal's `MESSAGE_ID` and `k3s.term` is `K3S_TERM`. Fields of the spans around an event are
//! sent with it.
//!
//! # Not here
//!
//! Whether there is a journal to write to: [`super::logging`].

use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use crate::events::fields;

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// Longest value of one field. Larger datagrams than the socket's buffer are refused by the kernel.
const VALUE_BYTES_MAX: usize = 48 * 1024;

/// Longest field name the journal accepts.
const NAME_BYTES_MAX: usize = 64;

/// The layer. See the module documentation.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    identifier: &'static str,
    lost: AtomicU64,
}

impl Journal {
    /// Writes to the journal listening at `path`. Fails when nobody listens there.
    pub fn open(path: &Path, identifier: &'static str) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        // journald ignores an empty datagram; without a listener this fails.
        socket.send_to(&[], path)?;
        Ok(Self { socket, path: path.to_owned(), identifier, lost: AtomicU64::new(0) })
    }

    fn send(&self, mut entry: Entry) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            entry.put(fields::LINES_LOST, &lost.to_string());
        }
        if self.socket.send_to(&entry.0, &self.path).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }
}

/// syslog's priority for a level. INFO is 6: "informational", not "notice".
const fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

/// One datagram being built.
#[derive(Clone, Debug, Default)]
struct Entry(Vec<u8>);

impl Entry {
    fn put(&mut self, name: &str, value: &str) {
        let start = self.0.len();
        push_name(&mut self.0, name);
        if self.0.len() == start {
            return;
        }
        let value = &value[..value.floor_char_boundary(VALUE_BYTES_MAX)];
        if value.contains('\n') {
            self.0.push(b'\n');
            self.0.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            self.0.push(b'=');
        }
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(b'\n');
    }
}

/// Upper case, `.` as `_`, nothing else but letters, digits and `_`, and never `_` first: those names are journald's own.
fn push_name(out: &mut Vec<u8>, name: &str) {
    let clean = name
        .bytes()
        .map(|byte| if byte == b'.' { b'_' } else { byte })
        .filter(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
        .skip_while(|byte| !byte.is_ascii_alphabetic())
        .map(|byte| byte.to_ascii_uppercase())
        .take(NAME_BYTES_MAX);
    out.extend(clean);
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        if write!(text, "{value:?}").is_ok() {
            self.put(field.name(), &text);
        }
    }
}

/// The fields of a span, as they are sent with each of its events.
struct SpanEntry(Entry);

impl<S> Layer<S> for Journal
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut entry = Entry::default();
        attributes.record(&mut entry);
        span.extensions_mut().replace(SpanEntry(entry));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(SpanEntry(entry)) = span.extensions_mut().get_mut() {
            values.record(entry);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut entry = Entry(Vec::with_capacity(512));
        let metadata = event.metadata();
        entry.put("PRIORITY", priority(*metadata.level()));
        entry.put("SYSLOG_IDENTIFIER", self.identifier);
        entry.put("TARGET", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            entry.put("CODE_FILE", file);
            entry.put("CODE_LINE", &line.to_string());
        }
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(SpanEntry(fields)) = span.extensions().get() {
                entry.0.extend_from_slice(&fields.0);
            }
        }
        event.record(&mut entry);
        self.send(entry);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::announce;
    use crate::events::EventId;

    /// A stand-in for journald.
    struct Journald {
        socket: UnixDatagram,
        dir: tempfile::TempDir,
    }

    impl Journald {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let socket = UnixDatagram::bind(dir.path().join("socket")).unwrap();
            socket.set_nonblocking(true).unwrap();
            Self { socket, dir }
        }

        fn layer(&self) -> Journal {
            Journal::open(&self.dir.path().join("socket"), "k3s-server").unwrap()
        }

        /// The next non-empty entry, decoded by the rules of the native protocol.
        fn next(&self) -> Option<BTreeMap<String, String>> {
            let mut buffer = vec![0; 256 * 1024];
            loop {
                let length = self.socket.recv(&mut buffer).ok()?;
                if length > 0 {
                    return Some(decode(&buffer[..length]));
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

    #[test]
    fn event_arrives_with_the_names_and_priority_journalctl_expects() {
        let journald = Journald::new();
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(journald.layer()),
            || announce!(EventId::Ready, { fields::TERM } = 5_u64, "ready to serve on {}", 2379),
        );
        let entry = journald.next().unwrap();
        assert_eq!(entry["MESSAGE"], "ready to serve on 2379");
        assert_eq!(entry["MESSAGE_ID"], EventId::Ready.to_string());
        assert_eq!(entry["MESSAGE_ID"].len(), 32);
        assert_eq!(entry["PRIORITY"], "6");
        assert_eq!(entry["K3S_TERM"], "5");
        assert_eq!(entry["SYSLOG_IDENTIFIER"], "k3s-server");
        assert!(entry["CODE_FILE"].ends_with("journal.rs"));
        assert!(!entry.contains_key("K3S_REMEDY"));
    }

    #[test]
    fn warnings_carry_their_remedy_and_each_level_its_priority() {
        let journald = Journald::new();
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(journald.layer()),
            || {
                announce!(EventId::SlowBarrier, { fields::MILLIS } = 7000_u64, "slow");
                announce!(EventId::BarrierFailed, "failed");
                tracing::debug!("detail");
            },
        );
        let warning = journald.next().unwrap();
        assert_eq!(warning["PRIORITY"], "4");
        assert_eq!(warning["K3S_REMEDY"], EventId::SlowBarrier.remedy().unwrap());
        assert_eq!(journald.next().unwrap()["PRIORITY"], "3");
        assert_eq!(journald.next().unwrap()["PRIORITY"], "7");
    }

    #[test]
    fn values_with_line_breaks_survive_and_cannot_forge_fields() {
        let journald = Journald::new();
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(journald.layer()),
            || tracing::info!({ fields::PEER } = "pi-2\nPRIORITY=0", "two\nlines"),
        );
        let entry = journald.next().unwrap();
        assert_eq!(entry["MESSAGE"], "two\nlines");
        assert_eq!(entry["K3S_PEER"], "pi-2\nPRIORITY=0");
        assert_eq!(entry["PRIORITY"], "6");
    }

    #[test]
    fn fields_of_the_spans_around_an_event_are_sent_with_it() {
        let journald = Journald::new();
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(journald.layer()),
            || {
                let span = tracing::info_span!(
                    "node",
                    { fields::NODE } = "ab",
                    { fields::LEADER } = tracing::field::Empty
                );
                let _entered = span.enter();
                span.record(fields::LEADER, "cd");
                tracing::info!("inside");
            },
        );
        let entry = journald.next().unwrap();
        assert_eq!(entry["K3S_NODE"], "ab");
        assert_eq!(entry["K3S_LEADER"], "cd");
    }

    /// The reason this layer exists: a journal whose card is stalled must not stall us.
    #[test]
    fn stalled_journal_loses_lines_instead_of_time_and_says_how_many() {
        let journald = Journald::new();
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(journald.layer()),
            || {
                let sent = 20_000;
                for line in 0..sent {
                    tracing::info!("line {line}");
                }
                let mut arrived = 0;
                while journald.next().is_some() {
                    arrived += 1;
                }
                assert!(arrived < sent);
                tracing::info!("after");
                let entry = journald.next().unwrap();
                assert_eq!(entry["K3S_LINES_LOST"], (sent - arrived).to_string());
                tracing::info!("later");
                assert!(!journald.next().unwrap().contains_key("K3S_LINES_LOST"));
            },
        );
    }

    #[test]
    fn oversized_values_are_cut_at_a_character() {
        let journald = Journald::new();
        let huge = "é".repeat(VALUE_BYTES_MAX);
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(journald.layer()),
            || tracing::info!({ fields::REASON } = huge, "table"),
        );
        let entry = journald.next().unwrap();
        assert_eq!(entry["K3S_REASON"].len(), VALUE_BYTES_MAX);
        assert_eq!(entry["MESSAGE"], "table");
    }

    #[test]
    fn nobody_listening_is_reported_when_opening() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Journal::open(&dir.path().join("socket"), "k3s-server").is_err());
    }

    #[test]
    fn names_are_made_acceptable_to_the_journal() {
        let named = |name: &str| {
            let mut out = Vec::new();
            push_name(&mut out, name);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(named("k3s.lines_lost"), "K3S_LINES_LOST");
        assert_eq!(named("__REALTIME_TIMESTAMP"), "REALTIME_TIMESTAMP");
        assert_eq!(named("é=\n"), "");
        assert_eq!(named(&"a".repeat(100)).len(), NAME_BYTES_MAX);
    }
}

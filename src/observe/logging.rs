//! Decides where log lines go, and how they look on a terminal.
//!
//! To the journal if stderr is connected to it and its socket is there, else to stderr as text. The decision is a pure
//! function of what the environment says, so that a daemon started by hand in a terminal prints where its user looks.
//!
//! # Invariants
//!
//! - Whoever says something never waits for the journal; see [`super::forward`]. Text is written by the speaker itself: it is
//!   for somebody who reads along, and must not stay behind when the process is killed.

use std::fmt;
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::MetadataExt;

use tracing::dispatcher::{self, Dispatch};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

use super::forward::Flush;
use super::journal;
use super::repeat::Repeats;
use crate::env::host;
use crate::events::fields;

/// Ours from INFO up; of the libraries only what is wrong. openraft warns of every heartbeat that a dead node does not answer, several
/// times a second for as long as it is dead, and calls it an error that nobody waits for an answer any more. Whatever counts is said
/// by us: who leads, who cannot be reached, why Raft stopped.
const FILTER: &str = "warn,openraft=error,openraft::raft=off,k3s_server=info";
/// The same with `--debug`.
const FILTER_DEBUG: &str = "info,k3s_server=debug,openraft=debug";

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Logging {
    /// `--debug`.
    pub debug: bool,
    /// A filter such as `k3s_server::raft=trace,info`; stronger than `debug`.
    pub filter: Option<String>,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter cannot be read.
    #[error(
        "log filter is not usable: found `{filter}`, expected parts like `info` or `k3s_server::raft=debug`"
    )]
    Filter {
        /// What was found.
        filter: String,
        /// Where it stops making sense.
        #[source]
        source: ParseError,
    },
    /// Something in this process has set up logging before.
    #[error("logging is already set up")]
    AlreadySet,
}

/// Where lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The systemd journal, with fields.
    Journal,
    /// Text on stderr.
    Text {
        /// With colours.
        colour: bool,
    },
}

/// What the process can see of its surroundings.
#[derive(Clone, Debug, Default)]
struct Surroundings {
    /// `$JOURNAL_STREAM`: device and inode of the stream systemd connected to the journal.
    journal_stream: Option<String>,
    /// Device and inode of stderr.
    stderr: Option<(u64, u64)>,
    terminal: bool,
    no_colour: bool,
}

impl Surroundings {
    fn look() -> Self {
        let stderr = std::fs::metadata("/proc/self/fd/2").ok();
        Self {
            journal_stream: std::env::var("JOURNAL_STREAM").ok(),
            stderr: stderr.map(|metadata| (metadata.dev(), metadata.ino())),
            terminal: io::stderr().is_terminal(),
            no_colour: std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
        }
    }

    /// The variable is inherited by everything systemd's child starts, a login shell included, so it must also name our
    /// own stderr. Whoever points stderr elsewhere wants to read it there.
    fn output(&self) -> Output {
        let stream = self.stderr.map(|(device, inode)| format!("{device}:{inode}"));
        if stream.is_some() && stream == self.journal_stream {
            Output::Journal
        } else {
            Output::Text { colour: self.terminal && !self.no_colour }
        }
    }
}

/// Logging, set up. Keep it until the process ends: dropping it gets the last lines out, the reason of the end among them.
#[derive(Debug)]
#[must_use = "without it the last lines of the process are lost"]
pub struct Logs {
    /// Where lines go.
    pub output: Output,
    /// What was left out because it had just been said.
    pub repeats: Repeats,
    _flush: Option<Flush>,
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.repeats.tell(true);
    }
}

/// Sets up logging for the process. Call it once, first thing.
pub fn init(logging: &Logging) -> Result<Logs, LoggingError> {
    let filter = filter(logging)?;
    let output = Surroundings::look().output();
    let repeats = Repeats::new(host::env().clock);
    let colour = match output {
        Output::Text { colour } => colour,
        Output::Journal => match journal::open(filter.clone()) {
            Ok((journal, flush)) => {
                let journal = tracing_subscriber::registry().with(filter).with(journal);
                set(journal.with(repeats.clone()))?;
                return Ok(Logs { output, repeats, _flush: Some(flush) });
            }
            // No socket: stderr still leads to the journal, as plain lines.
            Err(_) => false,
        },
    };
    let text = tracing_subscriber::fmt::layer()
        .with_ansi(colour)
        .with_writer(io::stderr)
        .event_format(Text);
    set(tracing_subscriber::registry().with(filter).with(text).with(repeats.clone()))?;
    Ok(Logs { output: Output::Text { colour }, repeats, _flush: None })
}

fn set(subscriber: impl Into<Dispatch>) -> Result<(), LoggingError> {
    dispatcher::set_global_default(subscriber.into()).map_err(|_| LoggingError::AlreadySet)
}

fn filter(logging: &Logging) -> Result<EnvFilter, LoggingError> {
    let default = if logging.debug { FILTER_DEBUG } else { FILTER };
    let text = logging.filter.as_deref().unwrap_or(default);
    EnvFilter::builder()
        .parse(text)
        .map_err(|source| LoggingError::Filter { filter: text.to_owned(), source })
}

/// One event as text: time, level, message, fields, and the remedy on a line of its own.
///
/// Control characters from outside are shown, not obeyed, and further lines of a message are indented: nothing that a
/// peer or a file sends us can look like a line of its own.
#[derive(Clone, Copy, Debug)]
pub struct Text;

impl<S, N> FormatEvent<S, N> for Text
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Line::default();
        event.record(&mut line);
        SystemTime.format_time(&mut writer)?;
        let (name, colour) = level(*event.metadata().level());
        if writer.has_ansi_escapes() {
            write!(writer, " \x1b[{colour}m{name}\x1b[0m")?;
        } else {
            write!(writer, " {name}")?;
        }
        writeln!(writer, " {}{}", line.message, line.fields)?;
        if let Some(remedy) = line.remedy {
            writeln!(writer, "  fix: {remedy}")?;
        }
        Ok(())
    }
}

/// Padded name and terminal colour.
const fn level(level: Level) -> (&'static str, u8) {
    match level {
        Level::ERROR => ("ERROR", 31),
        Level::WARN => ("WARN ", 33),
        Level::INFO => ("INFO ", 32),
        Level::DEBUG => ("DEBUG", 34),
        Level::TRACE => ("TRACE", 35),
    }
}

/// The parts of an event, already safe to print.
#[derive(Debug, Default)]
struct Line {
    message: String,
    fields: String,
    remedy: Option<String>,
}

impl Line {
    fn put(&mut self, name: &str, value: &str) {
        match name {
            "message" => self.message = printable(value),
            fields::REMEDY => self.remedy = Some(printable(value)),
            // A number for machines; the sentence is there for people.
            fields::MESSAGE_ID => {}
            _ => {
                let name = name.strip_prefix("k3s.").unwrap_or(name);
                self.fields.push_str(&format!(" {name}={}", printable(value)));
            }
        }
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field.name(), &format!("{value:?}"));
    }
}

fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\n  "),
            '\t' => out.push('\t'),
            control if control.is_control() => out.extend(control.escape_default()),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::announce;
    use crate::events::EventId;

    fn surroundings() -> Surroundings {
        Surroundings { stderr: Some((26, 4711)), ..Surroundings::default() }
    }

    #[test]
    fn stderr_connected_to_the_journal_means_journal() {
        let stream = Some("26:4711".to_owned());
        let here = Surroundings { journal_stream: stream, ..surroundings() };
        assert_eq!(here.output(), Output::Journal);
    }

    /// A login shell inherits JOURNAL_STREAM from the session that systemd started.
    #[test]
    fn inherited_variable_does_not_hide_lines_from_a_terminal() {
        let here = Surroundings {
            journal_stream: Some("26:1".to_owned()),
            terminal: true,
            ..surroundings()
        };
        assert_eq!(here.output(), Output::Text { colour: true });
        let dumb = Surroundings { no_colour: true, ..here };
        assert_eq!(dumb.output(), Output::Text { colour: false });
    }

    #[test]
    fn bad_filter_is_named() {
        let logging = Logging { filter: Some("k3s_server=loud".into()), debug: false };
        let error = filter(&logging).unwrap_err();
        assert!(error.to_string().contains("k3s_server=loud"), "{error}");
        assert!(filter(&Logging { debug: true, filter: None }).is_ok());
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn text_of(say: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .event_format(Text);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), say);
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn text_line_reads_like_a_sentence_with_fields_and_a_fix() {
        let text = text_of(|| {
            announce!(
                EventId::ListenFailed,
                { fields::ADDRESS } = "127.0.0.1:2379",
                "cannot listen"
            );
        });
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.ends_with('Z'), "{time}");
        let remedy = EventId::ListenFailed.remedy().unwrap();
        let expected = format!("ERROR cannot listen address=127.0.0.1:2379\n  fix: {remedy}\n");
        assert_eq!(rest, expected);
    }

    #[test]
    fn values_from_outside_cannot_forge_lines_or_move_the_cursor() {
        let text = text_of(|| tracing::info!(peer = "pi\x1b[2J\nERROR all is lost", "hello"));
        let (_, rest) = text.split_once(' ').unwrap();
        assert_eq!(rest, "INFO  hello peer=pi\\u{1b}[2J\n  ERROR all is lost\n");
    }
}

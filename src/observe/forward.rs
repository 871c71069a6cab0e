//! Hands log lines to a thread of their own, so that nobody waits for whoever writes them down.
//!
//! The journal is written over a blocking socket. When the card under `/var/log/journal` pauses for seconds, journald stops
//! reading, the socket fills after a hundred lines or so, and the next line stops the thread that says it. That must not be the
//! log's writer, Raft or apply: a pause of the journal's card would become a lost election, and a node that stops because
//! *its* card failed could not even say so and go.
//!
//! Keeping those threads quiet would not do. Their tasks share the runtime's few threads with everything else, and the
//! libraries speak there too: openraft has a line for every failed heartbeat, at the very moment when peers are gone.
//!
//! # Shape
//!
//! [`forward`] takes the layer that writes and returns the layer that speakers meet, [`Forward`]. That one copies the event
//! and the spans around it into a queue. The thread says them again, as the same call sites, to a subscriber of its own in which
//! the writing layer sits; so that layer can be anyone's.
//!
//! # Invariants
//!
//! - Saying something never waits. At most [`LINES_MAX`] lines are in memory; what comes on top is counted and dropped.
//! - Lines keep their order. Where lines are missing, [`EventId::LinesLost`] stands in their place.
//! - What was said before [`Flush`] is dropped gets written if the writer manages within [`FLUSH_MAX`].

use std::fmt::{self, Write as _};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;
use std::time::Duration;

use tracing::dispatcher::{self, Dispatch};
use tracing::field::{Field, Value, ValueSet, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Span, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::announce;
use crate::events::{EventId, fields};

/// Lines that may wait for the writer.
pub const LINES_MAX: usize = 256;

/// Longest value of one field, so that the queue's lines cannot be of any size.
const VALUE_BYTES_MAX: usize = 16 * 1024;

/// How long the end of the process waits for the last lines. The journal's card may be the one that has just failed.
pub const FLUSH_MAX: Duration = Duration::from_secs(2);

/// The layer that speakers meet. See the module documentation.
#[derive(Debug)]
pub struct Forward {
    queue: Sender<Message>,
    load: Arc<Load>,
}

/// Gets the last lines out: dropping it waits until what was said is written, at most [`FLUSH_MAX`].
#[derive(Debug)]
#[must_use = "without it the last lines of the process are lost"]
pub struct Flush {
    queue: Sender<Message>,
    patience: Duration,
}

/// What both sides of the queue know.
#[derive(Debug, Default)]
struct Load {
    waiting: AtomicUsize,
    /// Dropped since the last line that was not.
    lost: AtomicU64,
}

#[derive(Debug)]
enum Message {
    Line(Line),
    Flush(SyncSender<()>),
}

/// An event on its way.
#[derive(Debug)]
struct Line {
    /// How many lines are missing before this one.
    lost: u64,
    /// Outermost first.
    spans: Vec<Said>,
    event: Said,
}

/// What a call site said: the values of its fields, in the order of its metadata.
#[derive(Clone, Debug)]
struct Said {
    metadata: &'static Metadata<'static>,
    values: Vec<Option<String>>,
}

/// Starts the thread. `filter` must be the one that [`Forward`] is used with: call sites ask every subscriber whether to
/// speak at all, and a second one that lets everything through would make the silent ones costly.
pub fn forward<L>(writer: L, filter: EnvFilter) -> io::Result<(Forward, Flush)>
where
    L: Layer<tracing_subscriber::layer::Layered<EnvFilter, Registry>> + Send + Sync + 'static,
{
    let (queue, inbox) = mpsc::channel();
    let load = Arc::<Load>::default();
    let forward = Forward { queue: queue.clone(), load: load.clone() };
    let subscriber = Dispatch::new(tracing_subscriber::registry().with(filter).with(writer));
    thread::Builder::new().name("log".into()).spawn(move || write(&inbox, &subscriber, &load))?;
    Ok((forward, Flush { queue, patience: FLUSH_MAX }))
}

/// The thread's life. It ends when nobody is left to speak.
fn write(inbox: &Receiver<Message>, subscriber: &Dispatch, load: &Load) {
    for message in inbox {
        // For each message anew: while any thread has a subscriber of its own, all threads look for theirs.
        dispatcher::with_default(subscriber, || match message {
            Message::Line(line) => {
                admit(line.lost);
                line.say();
                load.waiting.fetch_sub(1, Ordering::Relaxed);
            }
            Message::Flush(done) => {
                admit(load.lost.swap(0, Ordering::Relaxed));
                // Whoever asked may have stopped waiting.
                let _gone = done.send(()).is_err();
            }
        });
    }
}

fn admit(lost: u64) {
    if lost > 0 {
        announce!(
            EventId::LinesLost,
            { fields::LINES_LOST } = lost,
            "the journal did not keep up; log lines lost before this one: {lost}"
        );
    }
}

impl Line {
    /// Says it again. The spans are made anew for it and end with it.
    fn say(&self) {
        fn within(spans: &[Said], event: &Said) {
            match spans.split_first() {
                Some((span, inner)) => span
                    .again(|values| Span::new(span.metadata, values))
                    .in_scope(|| within(inner, event)),
                None => event.again(|values| Event::dispatch(event.metadata, values)),
            }
        }
        within(&self.spans, &self.event);
    }
}

impl Said {
    fn nothing(metadata: &'static Metadata<'static>) -> Self {
        Self { metadata, values: vec![None; metadata.fields().len()] }
    }

    /// Gives the values back in tracing's own form, by the call that its macros expand to.
    fn again<T>(&self, use_values: impl FnOnce(&ValueSet<'_>) -> T) -> T {
        let values: Vec<Option<&dyn Value>> =
            self.values.iter().map(|value| value.as_ref().map(|text| text as &dyn Value)).collect();
        use_values(&self.metadata.fields().value_set_all(&values))
    }

    fn put(&mut self, field: &Field, mut value: String) {
        value.truncate(value.floor_char_boundary(VALUE_BYTES_MAX));
        if let Some(slot) = self.values.get_mut(field.index()) {
            *slot = Some(value);
        }
    }
}

impl Visit for Said {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        if write!(text, "{value:?}").is_ok() {
            self.put(field, text);
        }
    }
}

impl Forward {
    fn send(&self, spans: Vec<Said>, event: Said) {
        if self.load.waiting.fetch_add(1, Ordering::Relaxed) >= LINES_MAX {
            self.load.waiting.fetch_sub(1, Ordering::Relaxed);
            self.load.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let lost = self.load.lost.swap(0, Ordering::Relaxed);
        // The thread lives as long as this sender does.
        let _gone = self.queue.send(Message::Line(Line { lost, spans, event })).is_err();
    }
}

impl<S> Layer<S> for Forward
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut said = Said::nothing(attributes.metadata());
        attributes.record(&mut said);
        span.extensions_mut().replace(said);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(said) = span.extensions_mut().get_mut::<Said>() {
            values.record(said);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut said = Said::nothing(event.metadata());
        event.record(&mut said);
        let spans = context
            .event_scope(event)
            .into_iter()
            .flat_map(|scope| scope.from_root())
            .filter_map(|span| span.extensions().get::<Said>().cloned())
            .collect();
        self.send(spans, said);
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        let (done, finished) = mpsc::sync_channel(1);
        if self.queue.send(Message::Flush(done)).is_ok() {
            let _late = finished.recv_timeout(self.patience).is_err();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Writes what it is told to a channel, and hangs while the gate is locked, as the journal's layer does.
    struct Writer {
        gate: Arc<Mutex<()>>,
        written: Sender<String>,
    }

    #[derive(Default)]
    struct Text(String);

    impl Visit for Text {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            write!(self.0, " {}={value:?}", field.name()).unwrap();
        }
    }

    impl<S> Layer<S> for Writer
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
            let mut text = Text(attributes.metadata().name().to_owned());
            attributes.record(&mut text);
            context.span(id).unwrap().extensions_mut().insert(text);
        }

        fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
            let _open = self.gate.lock().unwrap();
            let mut text =
                Text(format!("{} {}", event.metadata().level(), event.metadata().target()));
            for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
                write!(text.0, " [{}]", span.extensions().get::<Text>().unwrap().0).unwrap();
            }
            event.record(&mut text);
            self.written.send(text.0).unwrap();
        }
    }

    struct Fixture {
        gate: Arc<Mutex<()>>,
        written: Receiver<String>,
        flush: Flush,
        _speaking: dispatcher::DefaultGuard,
    }

    impl Fixture {
        /// Until it is dropped, what this thread says is forwarded.
        fn new() -> Self {
            let gate = Arc::<Mutex<()>>::default();
            let (sender, written) = mpsc::channel();
            let writer = Writer { gate: gate.clone(), written: sender };
            let (forward, flush) = forward(writer, EnvFilter::new("info")).unwrap();
            let subscriber =
                tracing_subscriber::registry().with(EnvFilter::new("info")).with(forward);
            let _speaking = dispatcher::set_default(&subscriber.into());
            Self { gate, written, flush, _speaking }
        }

        fn next(&self) -> String {
            self.written.recv_timeout(Duration::from_secs(20)).unwrap()
        }
    }

    #[test]
    fn event_arrives_with_its_call_site_its_fields_and_its_spans() {
        let fixture = Fixture::new();
        let node = tracing::info_span!("node", id = 7, leader = tracing::field::Empty);
        node.in_scope(|| {
            node.record("leader", "pi-2");
            tracing::info_span!("term", term = 3_u64).in_scope(
                || tracing::warn!(target: "raft", peer = "pi\n3", late = true, "hello {}", 1),
            );
        });
        tracing::debug!("not for this filter");
        tracing::info!("outside");

        assert_eq!(
            fixture.next(),
            r#"WARN raft [node id="7" leader="pi-2"] [term term="3"] message="hello 1" peer="pi\n3" late="true""#
        );
        let outside = fixture.next();
        assert!(outside.ends_with(r#"tests message="outside""#), "{outside}");
    }

    /// The reason this module exists: a journal whose card is stalled must not stall us.
    #[test]
    fn stalled_writer_costs_lines_and_says_where_how_many() {
        const TOO_MANY: usize = 100;
        let fixture = Fixture::new();
        let stall = fixture.gate.lock().unwrap();
        for line in 0..LINES_MAX + TOO_MANY {
            tracing::info!(line, "early");
        }
        drop(stall);

        for line in 0..LINES_MAX {
            let written = fixture.next();
            assert!(written.ends_with(&format!(r#"message="early" line="{line}""#)), "{written}");
        }
        tracing::info!("after");
        let lost = fixture.next();
        assert!(lost.contains(&format!("message_id={}", EventId::LinesLost)), "{lost}");
        assert!(lost.contains(&format!("k3s.lines_lost={TOO_MANY}")), "{lost}");
        assert!(fixture.next().ends_with(r#"message="after""#));
        tracing::info!("later");
        assert!(fixture.next().ends_with(r#"message="later""#));
    }

    #[test]
    fn flush_gets_the_last_lines_out_and_the_count_of_those_that_are_lost() {
        let Fixture { gate, written, flush, _speaking } = Fixture::new();
        let stall = gate.lock().unwrap();
        for line in 0..=LINES_MAX {
            tracing::info!(line, "last words");
        }
        drop(stall);
        drop(flush);

        let lines: Vec<String> = written.try_iter().collect();
        assert_eq!(lines.len(), LINES_MAX + 1);
        assert!(lines[LINES_MAX].contains("k3s.lines_lost=1"), "{}", lines[LINES_MAX]);
    }

    #[test]
    fn flush_gives_up_on_a_writer_that_hangs() {
        let mut fixture = Fixture::new();
        fixture.flush.patience = Duration::from_millis(1);
        let Fixture { gate, written, flush, _speaking } = fixture;
        let stall = gate.lock().unwrap();
        tracing::info!("never written");
        drop(flush);
        assert!(written.try_recv().is_err());
        drop(stall);
    }

    #[test]
    fn oversized_values_are_cut_at_a_character() {
        let fixture = Fixture::new();
        tracing::info!(table = "é".repeat(VALUE_BYTES_MAX), "x");
        let line = fixture.next();
        assert_eq!(line.matches('é').count(), VALUE_BYTES_MAX / 2);
    }
}

//! Writes a line that repeats itself a few times, and then once a minute how often it was.
//!
//! A peer that is gone, a client with a wrong certificate, a card that pauses: each can say the same thing several times a
//! second for days. On a board whose journal lies on the card that is wear; anywhere it hides what matters. journald's own limit is no
//! help: it drops whatever comes, ours only what was already said.
//!
//! # Shape
//!
//! [`Window`] (pure) decides for one text. [`Repeats`] is a layer in front of those that write; [`Repeats::tell`] says what
//! was left out and is called every few seconds by whoever has a clock.
//!
//! # Invariants
//!
//! - The first [`BURST`] lines of a minute are written as they come. Of those left out the number is told, at the same level.
//! - What somebody turned on to see everything (DEBUG, TRACE) is not limited.
//! - At most [`TEXTS_MAX`] texts are remembered; what does not fit is written.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::env::Clock;
use crate::events::{fields, trouble};

/// Lines of one text that are written in a window.
const BURST: u32 = 5;

/// For how long a text is watched from its first line on.
const WINDOW: Duration = Duration::from_secs(60);

/// Texts that are watched at the same time.
const TEXTS_MAX: usize = 256;

/// Longest text that is remembered.
const TEXT_BYTES_MAX: usize = 512;

/// One text in one window.
#[derive(Clone, Copy, Debug)]
struct Window {
    began: Instant,
    written: u32,
    left_out: u32,
}

impl Window {
    const fn new(now: Instant) -> Self {
        Self { began: now, written: 0, left_out: 0 }
    }

    /// Whether one more line is written.
    const fn admit(&mut self) -> bool {
        let admitted = self.written < BURST;
        if admitted {
            self.written += 1;
        } else {
            self.left_out += 1;
        }
        admitted
    }

    fn is_over(&self, now: Instant) -> bool {
        WINDOW <= now.saturating_duration_since(self.began)
    }
}

/// What identifies a line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Text {
    message: String,
    id: Option<String>,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = cut(value.to_owned()),
            fields::MESSAGE_ID => self.id = Some(value.to_owned()),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if matches!(field.name(), "message" | fields::MESSAGE_ID) {
            self.record_str(field, &format!("{value:?}"));
        }
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

/// The layer. Cheap to clone; see the module documentation.
#[derive(Clone)]
pub struct Repeats {
    clock: Arc<dyn Clock>,
    texts: Arc<Mutex<HashMap<(Level, Text), Window>>>,
}

impl fmt::Debug for Repeats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repeats").field("texts", &self.texts().len()).finish_non_exhaustive()
    }
}

impl Repeats {
    /// Nothing was said yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, texts: Arc::default() }
    }

    fn texts(&self) -> MutexGuard<'_, HashMap<(Level, Text), Window>> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the line is written. A text whose window is over and of which nothing was left out begins a new one.
    fn admit(&self, level: Level, text: Text) -> bool {
        let now = self.clock.now();
        let mut texts = self.texts();
        let key = (level, text);
        if let Some(window) = texts.get_mut(&key) {
            if window.is_over(now) && window.left_out == 0 {
                *window = Window::new(now);
            }
            return window.admit();
        }
        if TEXTS_MAX <= texts.len() {
            texts.retain(|_, window| !window.is_over(now) || 0 < window.left_out);
        }
        if texts.len() < TEXTS_MAX {
            let mut window = Window::new(now);
            window.admit();
            texts.insert(key, window);
        }
        true
    }

    /// Says what was left out in windows that are over, or in all of them. To be called every few seconds, and at the end.
    pub fn tell(&self, all: bool) {
        let now = self.clock.now();
        let mut over = Vec::new();
        self.texts().retain(|key, window| {
            let is_over = all || window.is_over(now);
            if is_over && 0 < window.left_out {
                over.push((key.clone(), *window));
            }
            !is_over
        });
        // Not while the table is locked: the lines come by here.
        for ((level, text), window) in over {
            say(level, &text, window.left_out, now.saturating_duration_since(window.began));
        }
    }
}

fn say(level: Level, text: &Text, count: u32, time: Duration) {
    let (message, id, seconds) = (&text.message, text.id.as_deref(), time.as_secs().max(1));
    macro_rules! at {
        ($level:ident) => {
            tracing::event!(
                Level::$level,
                { fields::MESSAGE_ID } = id,
                { fields::COUNT } = count,
                "{message} (repeated {count} times in {seconds} s)"
            )
        };
    }
    match level {
        Level::ERROR => at!(ERROR),
        Level::WARN => at!(WARN),
        Level::INFO | Level::DEBUG | Level::TRACE => at!(INFO),
    }
}

impl<S: Subscriber> Layer<S> for Repeats {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        let level = *event.metadata().level();
        if Level::INFO < level {
            return true;
        }
        let mut text = Text::default();
        event.record(&mut text);
        if level == Level::ERROR {
            trouble::remember(&text.message);
        }
        self.admit(level, text)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::announce;
    use crate::events::EventId;
    use crate::testkit::ManualClock;

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

    /// Runs it with a limited log, and returns the lines.
    fn lines(act: impl FnOnce(&Repeats, &ManualClock)) -> Vec<String> {
        let clock = ManualClock::new();
        let repeats = Repeats::new(Arc::new(clock.clone()));
        let sink = Sink::default();
        let writer = sink.clone();
        let text = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(move || writer.clone());
        let subscriber = tracing_subscriber::registry().with(text).with(repeats.clone());
        tracing::subscriber::with_default(subscriber, || act(&repeats, &clock));
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_that_repeats_is_told_with_its_number() {
        let lines = lines(|repeats, clock| {
            for _ in 0..42 {
                tracing::warn!(peer = "x", "pi-2 does not answer");
                tracing::info!("something else");
                tracing::debug!("all of it");
            }
            repeats.tell(false);
            clock.advance(WINDOW);
            repeats.tell(false);
            repeats.tell(false);
        });
        let count = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
        assert_eq!(count("pi-2 does not answer peer"), 5);
        assert_eq!(count("pi-2 does not answer (repeated 37 times in 60 s)"), 1, "{lines:#?}");
        assert_eq!(count("something else (repeated 37 times in 60 s)"), 1);
        assert_eq!(count("all of it"), 42, "what was turned on to be seen is seen");
        let told = lines.iter().find(|line| line.contains("pi-2 does not answer (rep")).unwrap();
        assert!(told.trim_start().starts_with("WARN"), "{told}");
    }

    #[test]
    fn a_line_now_and_then_is_never_left_out_and_the_end_tells_the_rest() {
        let lines = lines(|repeats, clock| {
            for _ in 0..20 {
                tracing::warn!("rare");
                clock.advance(WINDOW);
            }
            for _ in 0..7 {
                announce!(EventId::LeaderLost, "no leader");
            }
            repeats.tell(true);
        });
        assert_eq!(lines.iter().filter(|line| line.contains("rare")).count(), 20);
        let told = lines.last().unwrap();
        assert!(told.contains("no leader (repeated 2 times in 1 s)"), "{told}");
        assert!(told.contains(&EventId::LeaderLost.to_string()), "{told}");
    }

    #[test]
    fn endless_different_texts_are_all_written_and_not_all_remembered() {
        let lines = lines(|repeats, _clock| {
            for number in 0..TEXTS_MAX * 2 {
                tracing::info!("number {number}");
            }
            assert!(repeats.texts().len() <= TEXTS_MAX);
        });
        assert_eq!(lines.len(), TEXTS_MAX * 2);
    }

    #[test]
    fn errors_are_remembered_for_the_status() {
        lines(|_repeats, _clock| tracing::error!("the card is gone, says this test"));
        assert!(trouble::last().is_some());
    }
}

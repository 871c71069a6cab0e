//! What all parts of one run share: simulated time, chance from the seed, the trace, and the first violation.
//!
//! # Invariants
//!
//! - Everything that happens is a line of the trace, and the hash of all lines is the run's fingerprint: two runs of one
//!   seed with different fingerprints are a defect of the simulator.
//! - The first violation ends the run; what follows from it is not reported.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use k3s_server::env::{BoxFuture, Clock};
use k3s_server::testkit::Random;
use tokio::sync::watch;

/// Clones share one world.
#[derive(Clone)]
pub(crate) struct World(Arc<Inner>);

struct Inner {
    start: tokio::time::Instant,
    state: Mutex<State>,
    /// Becomes true with the first violation.
    violated: watch::Sender<bool>,
}

struct State {
    random: Random,
    trace: Trace,
    violation: Option<String>,
    ended: Duration,
}

/// The lines, hashed, and kept if somebody wants to read them.
struct Trace {
    hash: u64,
    lines: u64,
    kept: Option<String>,
    echo: bool,
}

impl World {
    /// A world at its beginning. `keep` remembers the trace, `echo` prints it.
    pub(crate) fn new(seed: u64, keep: bool, echo: bool) -> Self {
        let trace =
            Trace { hash: 0xcbf2_9ce4_8422_2325, lines: 0, kept: keep.then(String::new), echo };
        Self(Arc::new(Inner {
            start: tokio::time::Instant::now(),
            state: Mutex::new(State {
                random: Random::new(seed),
                trace,
                violation: None,
                ended: Duration::ZERO,
            }),
            violated: watch::channel(false).0,
        }))
    }

    /// Simulated time since the beginning.
    pub(crate) fn elapsed(&self) -> Duration {
        self.0.start.elapsed()
    }

    /// The run is over; its clock is about to go.
    pub(crate) fn end(&self) {
        let elapsed = self.elapsed();
        self.lock().ended = elapsed;
    }

    /// How long the run was.
    pub(crate) fn ended(&self) -> Duration {
        self.lock().ended
    }

    /// A generator of its own for one part, so that parts do not disturb each other's chances.
    pub(crate) fn random(&self) -> Random {
        Random::new(self.lock().random.next_u64())
    }

    /// Writes a line of the trace.
    pub(crate) fn trace(&self, line: impl FnOnce(&mut String)) {
        let mut text = format!("{:>12.6} ", self.elapsed().as_secs_f64());
        line(&mut text);
        text.push('\n');
        let mut state = self.lock();
        let trace = &mut state.trace;
        for byte in text.bytes() {
            trace.hash = (trace.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        trace.lines += 1;
        if trace.echo {
            eprint!("{text}");
        }
        if let Some(kept) = &mut trace.kept {
            kept.push_str(&text);
        }
    }

    /// A promise was broken. Only the first is kept.
    pub(crate) fn violation(&self, what: impl FnOnce() -> String) {
        if self.is_violated() {
            return;
        }
        let what = what();
        self.trace(|line| {
            write!(line, "VIOLATION {what}").ok();
        });
        self.lock().violation.get_or_insert(what);
        self.0.violated.send_replace(true);
    }

    /// Whether one was.
    pub(crate) fn is_violated(&self) -> bool {
        *self.0.violated.borrow()
    }

    /// Completes when one was.
    pub(crate) async fn violated(&self) {
        let mut violated = self.0.violated.subscribe();
        // The sender lives as long as this world.
        violated.wait_for(|violated| *violated).await.ok();
    }

    /// The first violation.
    pub(crate) fn first_violation(&self) -> Option<String> {
        self.lock().violation.clone()
    }

    /// Fingerprint and number of lines.
    pub(crate) fn fingerprint(&self) -> (u64, u64) {
        let state = self.lock();
        (state.trace.hash, state.trace.lines)
    }

    /// The trace, if it was kept.
    pub(crate) fn kept_trace(&self) -> Option<String> {
        self.lock().trace.kept.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `trace!(world, "…")`: one line.
macro_rules! trace {
    ($world:expr, $($text:tt)*) => {
        $world.trace(|line| {
            use std::fmt::Write as _;
            write!(line, $($text)*).ok();
        })
    };
}
pub(crate) use trace;

/// One machine's clocks: monotonic time is tokio's, which stands still unless everybody sleeps; the wall clock is what
/// somebody set it to.
#[derive(Clone)]
pub(crate) struct SimClock {
    start: tokio::time::Instant,
    wall_at_start: Arc<Mutex<SystemTime>>,
}

impl SimClock {
    /// A clock that is right.
    pub(crate) fn new() -> Self {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000);
        Self { start: tokio::time::Instant::now(), wall_at_start: Arc::new(Mutex::new(wall)) }
    }

    /// Steps the wall clock.
    pub(crate) fn step(&self, seconds: i64) {
        let mut wall = self.wall_at_start.lock().unwrap_or_else(PoisonError::into_inner);
        let by = Duration::from_secs(seconds.unsigned_abs());
        *wall = if seconds < 0 { *wall - by } else { *wall + by };
    }
}

impl Clock for SimClock {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn wall(&self) -> SystemTime {
        *self.wall_at_start.lock().unwrap_or_else(PoisonError::into_inner) + self.start.elapsed()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

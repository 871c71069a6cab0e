//! Feeds systemd's watchdog for as long as the loop that matters is alive.
//!
//! A timer that says "alive" on its own proves only that timers work. Here the loop that matters (Raft's) holds a
//! [`Pulse`] and ticks it on every turn; the feeder passes life on to systemd only while ticks are recent. When they stop,
//! the status says since when, feeding stops, and systemd restarts the service.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::env::Clock;

use super::{Notifier, Shutdown};

/// The heartbeat of one loop. Ticking is one atomic store.
#[derive(Clone)]
pub struct Pulse {
    clock: Arc<dyn Clock>,
    epoch: Instant,
    /// Milliseconds from `epoch` to the last tick.
    last: Arc<AtomicU64>,
}

impl std::fmt::Debug for Pulse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pulse").field("silence", &self.silence()).finish_non_exhaustive()
    }
}

impl Pulse {
    /// Starts as if it had just ticked.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let epoch = clock.now();
        Self { clock, epoch, last: Arc::new(AtomicU64::new(0)) }
    }

    /// The loop is alive. Call it once per turn, and from inside long turns that make progress.
    pub fn tick(&self) {
        self.last.store(self.elapsed_millis(), Ordering::Relaxed);
    }

    /// How long the loop has been silent.
    pub fn silence(&self) -> Duration {
        let last = self.last.load(Ordering::Relaxed);
        Duration::from_millis(self.elapsed_millis().saturating_sub(last))
    }

    fn elapsed_millis(&self) -> u64 {
        let elapsed = self.clock.now().saturating_duration_since(self.epoch);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }
}

/// What to tell systemd after one look at the pulse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Feed.
    Alive,
    /// Feed, after a silence that was reported.
    Recovered,
    /// Do not feed; the silence has just become too long.
    Silent(Duration),
    /// Do not feed; already reported.
    StillSilent,
}

/// Decides whether to feed. Half of systemd's interval is left for the loop, the other half for the feeder.
fn judge(silence: Duration, interval: Duration, was_silent: bool) -> Verdict {
    match (silence <= interval / 2, was_silent) {
        (true, false) => Verdict::Alive,
        (true, true) => Verdict::Recovered,
        (false, false) => Verdict::Silent(silence),
        (false, true) => Verdict::StillSilent,
    }
}

/// systemd's watchdog, if the unit has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchdog {
    interval: Duration,
}

impl Watchdog {
    /// A watchdog that bites after `interval` without food.
    pub const fn new(interval: Duration) -> Self {
        Self { interval }
    }

    /// What `$WATCHDOG_USEC` and `$WATCHDOG_PID` say.
    pub fn from_environment() -> Option<Self> {
        let usec = std::env::var("WATCHDOG_USEC").ok()?;
        let pid = std::env::var("WATCHDOG_PID").ok();
        Self::parse(&usec, pid.as_deref(), std::process::id())
    }

    /// The variables are inherited by children; `WATCHDOG_PID` says whom they are meant for.
    fn parse(usec: &str, pid: Option<&str>, own_pid: u32) -> Option<Self> {
        if pid.is_some_and(|pid| pid.parse() != Ok(own_pid)) {
            return None;
        }
        let usec: u64 = usec.parse().ok().filter(|usec| *usec > 0)?;
        Some(Self::new(Duration::from_micros(usec)))
    }

    /// The time between feedings: a third of the interval, so that one late wake-up does no harm.
    fn period(self) -> Duration {
        self.interval / 3
    }

    /// Feeds until the shutdown has begun. From then on systemd's stop timeout guards the process.
    pub async fn feed(self, notifier: Notifier, pulse: Pulse, shutdown: Shutdown) {
        let mut silent = false;
        loop {
            match judge(pulse.silence(), self.interval, silent) {
                Verdict::Alive => notifier.watchdog(),
                Verdict::Recovered => {
                    silent = false;
                    notifier.watchdog();
                    notifier.status("the main loop is alive again");
                }
                Verdict::Silent(silence) => {
                    silent = true;
                    let seconds = silence.as_secs();
                    notifier.status(&format!("the main loop has been silent for {seconds} s"));
                    tracing::error!(seconds, "the main loop is silent; not feeding the watchdog");
                }
                Verdict::StillSilent => {}
            }
            tokio::select! {
                () = pulse.clock.sleep(self.period()) => {}
                _ = shutdown.begun() => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::StopReason;
    use super::super::notify::tests::Listener;
    use super::*;
    use crate::env::host::HostClock;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn environment_is_read_as_systemd_writes_it() {
        let minute = Some(Watchdog::new(MINUTE));
        assert_eq!(Watchdog::parse("60000000", None, 7), minute);
        assert_eq!(Watchdog::parse("60000000", Some("7"), 7), minute);
        assert_eq!(Watchdog::parse("60000000", Some("8"), 7), None);
        assert_eq!(Watchdog::parse("0", None, 7), None);
        assert_eq!(Watchdog::parse("soon", None, 7), None);
    }

    #[test]
    fn silence_of_half_the_interval_stops_the_feeding() {
        let half = MINUTE / 2;
        let longer = half + Duration::from_millis(1);
        assert_eq!(judge(half, MINUTE, false), Verdict::Alive);
        assert_eq!(judge(longer, MINUTE, false), Verdict::Silent(longer));
        assert_eq!(judge(longer, MINUTE, true), Verdict::StillSilent);
        assert_eq!(judge(half, MINUTE, true), Verdict::Recovered);
    }

    /// tokio's paused clock moves to the next timer by itself, so the whole minute takes no time.
    #[tokio::test(start_paused = true)]
    async fn dead_loop_is_fed_for_half_a_minute_and_then_no_more() {
        let (listener, notifier) = Listener::new();
        let pulse = Pulse::new(Arc::new(HostClock));
        let shutdown = Shutdown::new();
        let feeder =
            tokio::spawn(Watchdog::new(MINUTE).feed(notifier, pulse.clone(), shutdown.clone()));

        tokio::time::sleep(Duration::from_secs(59)).await;
        assert_eq!(
            listener.drain(),
            ["WATCHDOG=1", "WATCHDOG=1", "STATUS=the main loop has been silent for 40 s"]
        );

        pulse.tick();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(listener.drain(), ["WATCHDOG=1", "STATUS=the main loop is alive again"]);

        shutdown.begin(StopReason::Requested("the test"));
        feeder.await.unwrap();
    }
}

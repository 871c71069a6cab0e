//! Feeds systemd's watchdog for as long as the loop that matters is alive.
//!
//! The feeder belongs on a thread of its own (`server::run`): a runtime whose threads hang sees no timers.
//!
//! A timer that says "alive" on its own proves only that timers work. Here the loop that matters (Raft's) holds a
//! [`Pulse`] and ticks it on every turn; the feeder passes life on to systemd only while ticks are recent. When they stop,
//! the status says since when, feeding stops, and systemd restarts the service.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::announce;
use crate::env::Clock;
use crate::events::{EventId, fields};

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

    /// What `$WATCHDOG_USEC` says, unless `$WATCHDOG_PID` says that it is meant for another process: children inherit both.
    pub fn from_environment() -> Option<Self> {
        sd_notify::watchdog_enabled().filter(|interval| !interval.is_zero()).map(Self::new)
    }

    /// The time between feedings: a third of the interval, so that one late wake-up does no harm.
    pub fn period(self) -> Duration {
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
                    announce!(
                        EventId::LoopSilent,
                        { fields::MILLIS } = u64::try_from(silence.as_millis()).unwrap_or(u64::MAX),
                        "the main loop has been silent for {seconds} s; not feeding the watchdog"
                    );
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
    use std::process::Command;

    use super::super::StopReason;
    use super::super::notify::tests::Listener;
    use super::*;
    use crate::env::host::HostClock;
    use crate::testkit::rerun;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn environment_is_read_as_systemd_writes_it() {
        const TEST: &str = concat!(module_path!(), "::environment_is_read_as_systemd_writes_it");
        const EXPECTED: &str = "EXPECTED_SECONDS";
        if rerun::is_child(TEST) {
            let seconds = std::env::var(EXPECTED).unwrap().parse().ok();
            let expected = seconds.map(|seconds| Watchdog::new(Duration::from_secs(seconds)));
            assert_eq!(Watchdog::from_environment(), expected);
            return;
        }
        // `$$` is the shell's own process, which becomes the test's.
        for (variables, expected) in [
            ("WATCHDOG_USEC=60000000", "60"),
            ("WATCHDOG_USEC=60000000 WATCHDOG_PID=$$", "60"),
            ("WATCHDOG_USEC=60000000 WATCHDOG_PID=1", "none"),
            ("WATCHDOG_USEC=0", "none"),
            ("WATCHDOG_USEC=soon", "none"),
            ("", "none"),
        ] {
            let script = format!("unset WATCHDOG_USEC WATCHDOG_PID; {variables} exec \"$@\"");
            let mut command = Command::new("sh");
            command.args(["-c", &script, "sh"]).arg(rerun::this_binary().get_program());
            rerun::pass(TEST, command.env(EXPECTED, expected));
        }
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
        const TEST: &str =
            concat!(module_path!(), "::dead_loop_is_fed_for_half_a_minute_and_then_no_more");
        let Some((listener, notifier)) = Listener::in_child(TEST) else { return };
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

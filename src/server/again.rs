//! Decides how long a server waits before it begins anew in the same process.
//!
//! Once is nothing. A card or a link that fails again and again must not keep the others busy with filling this one, nor break its
//! clients' connections every few seconds; so pauses double, and are forgotten after a quiet time.

use std::time::{Duration, Instant};

/// See the module documentation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Again {
    first: Duration,
    last: Duration,
    quiet: Duration,
    /// How often lately, and when it was the last time.
    counted: u32,
    at: Option<Instant>,
}

impl Again {
    /// For a node that comes back as another one.
    pub(super) const fn rejoining() -> Self {
        Self::new(Duration::from_secs(5), Duration::from_secs(600), Duration::from_secs(3_600))
    }

    /// For a host that gets another address.
    pub(super) const fn moving() -> Self {
        Self::new(Duration::from_secs(15), Duration::from_secs(600), Duration::from_secs(1_800))
    }

    const fn new(first: Duration, last: Duration, quiet: Duration) -> Self {
        Self { first, last, quiet, counted: 0, at: None }
    }

    /// It happens now.
    pub(super) fn count(&mut self, now: Instant) {
        self.counted = if self.is_quiet(now) { 1 } else { self.counted.saturating_add(1) };
        self.at = Some(now);
    }

    /// How long to wait, if it has to be done now: not at all for the first time in a while.
    pub(super) fn pause(&self, now: Instant) -> Duration {
        if self.is_quiet(now) {
            return Duration::ZERO;
        }
        let Some(doublings) = self.counted.checked_sub(1) else { return Duration::ZERO };
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        self.first.saturating_mul(factor).min(self.last)
    }

    /// The time since the last one counts from the end of its pause.
    fn is_quiet(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| self.quiet + self.last <= now.saturating_duration_since(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_is_done_at_once_and_a_storm_dies_down() {
        let mut again = Again::rejoining();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..10 {
            let pause = again.pause(now);
            pauses.push(pause.as_secs());
            now += pause + Duration::from_secs(1);
            again.count(now);
        }
        assert_eq!(pauses, [0, 5, 10, 20, 40, 80, 160, 320, 600, 600]);
        now += Duration::from_secs(4_199);
        assert_eq!(again.pause(now).as_secs(), 600);
        now += Duration::from_secs(1);
        assert_eq!(again.pause(now), Duration::ZERO);
        again.count(now);
        assert_eq!(again.pause(now).as_secs(), 5, "an old storm is forgotten");
    }
}

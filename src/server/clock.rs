//! Follows the wall clock until it can be believed, and tells.
//!
//! Nothing waits for it: timers and leases are monotonic, and certificates are checked as [`crate::pki`] explains. But times in
//! the journal are wrong until then, and a certificate that was made on the wrong day is looked at again as soon as the day is known.
//!
//! | state | how it is known |
//! |---|---|
//! | unset | it shows a day before this release was made |
//! | plausible | it does not; it may still be the time of the last shutdown |
//! | synchronized | timedated says that it follows a time server |

use std::time::{Duration, SystemTime};

use super::cockpit::Cockpit;
use crate::announce;
use crate::bus::{Connection, timedate};
use crate::env::Clock;
use crate::events::{EventId, fields};
use crate::pki::clock_is_unset;

/// Between two looks.
const LOOK_FIRST: Duration = Duration::from_secs(5);
const LOOK_LAST: Duration = Duration::from_secs(60);

/// A step that is worth a word.
const STEP: Duration = Duration::from_secs(5);

/// How far the clock can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ClockState {
    /// Certainly wrong.
    Unset,
    /// Perhaps right.
    Plausible,
    /// Right.
    Synchronized,
}

impl ClockState {
    pub(super) fn of(wall: SystemTime) -> Self {
        if clock_is_unset(wall) { Self::Unset } else { Self::Plausible }
    }

    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Unset => "unset",
            Self::Plausible => "plausible",
            Self::Synchronized => "synchronized",
        }
    }
}

/// By how much the clock was moved, in words; empty if it was not.
fn step(expected: SystemTime, found: SystemTime) -> String {
    let words = |by: Duration, way: &str| {
        let seconds = by.as_secs();
        let by = match seconds {
            0..120 => format!("{seconds} s"),
            120..7_200 => format!("{} minutes", seconds / 60),
            7_200..172_800 => format!("{} hours", seconds / 3_600),
            _ => format!("{} days", seconds / 86_400),
        };
        format!("; it was moved {way} by {by}")
    };
    match found.duration_since(expected) {
        Ok(by) if STEP < by => words(by, "forward"),
        Err(by) if STEP < by.duration() => words(by.duration(), "back"),
        Ok(_) | Err(_) => String::new(),
    }
}

/// Looks until the clock is synchronised, or for ever where nobody can tell.
pub(super) async fn follow(cockpit: &Cockpit, clock: &dyn Clock, bus: Option<&Connection>) {
    let mut state = *cockpit.clock.borrow();
    if state == ClockState::Unset {
        announce!(
            EventId::ClockUnset,
            "the clock shows a day before this release was made; going on without it"
        );
    }
    let (wall, began) = (clock.wall(), clock.now());
    let mut pause = LOOK_FIRST;
    loop {
        let mut now = ClockState::of(clock.wall());
        if let Some(bus) = bus
            && timedate::is_synchronized(bus).await == Some(true)
        {
            now = ClockState::Synchronized;
        }
        if now != state {
            state = now;
            cockpit.clock.send_replace(now);
            let expected = wall + clock.now().saturating_duration_since(began);
            tell(now, &step(expected, clock.wall()));
            // A certificate that was made on another day may be due.
            cockpit.names.send_modify(|_names| ());
        }
        let settled =
            state == ClockState::Synchronized || (bus.is_none() && ClockState::Unset < state);
        if settled {
            return;
        }
        clock.sleep(pause).await;
        pause = (pause * 2).min(LOOK_LAST);
    }
}

fn tell(state: ClockState, step: &str) {
    match state {
        ClockState::Unset => {
            announce!(EventId::ClockUnset, "the clock was set to a day before this release{step}");
        }
        ClockState::Plausible => {
            announce!(EventId::ClockSet, { fields::REASON } = "set", "the clock is set{step}");
        }
        ClockState::Synchronized => announce!(
            EventId::ClockSet,
            { fields::REASON } = "synchronized",
            "the clock follows a time server{step}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn steps_are_told_in_words_a_person_uses() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for (expected, found, said) in [
            (100, 103, ""),
            (103, 100, ""),
            (100, 190, "; it was moved forward by 90 s"),
            (0, 86_400 * 20_000, "; it was moved forward by 20000 days"),
            (10_000, 2_000, "; it was moved back by 2 hours"),
            (1_000, 400, "; it was moved back by 10 minutes"),
        ] {
            assert_eq!(step(at(expected), at(found)), said);
        }
    }

    #[test]
    fn a_clock_before_this_release_is_unset() {
        assert_eq!(ClockState::of(UNIX_EPOCH), ClockState::Unset);
        assert_eq!(
            ClockState::of(UNIX_EPOCH + Duration::from_secs(2_000_000_000)),
            ClockState::Plausible
        );
    }
}

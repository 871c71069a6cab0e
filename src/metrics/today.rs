//! Counts what this process has handed to the card since midnight (UTC).
//!
//! Wear is a matter of bytes a day, and the kernel counts from the start of a process. So the count at midnight is kept, by whoever
//! calls [`Today::look`] now and then; what the process wrote before its first look belongs to the day of that look.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY: u64 = 24 * 60 * 60;

/// This process.
pub static TODAY: Today = Today::new();

/// See the module documentation.
#[derive(Debug)]
pub struct Today(Mutex<Option<Mark>>);

#[derive(Clone, Copy, Debug)]
struct Mark {
    day: u64,
    /// The kernel's count when the day began, or zero for the day of the start.
    before: u64,
    /// When counting for this day began.
    since: SystemTime,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub bytes: u64,
    /// Since when: midnight, or the start.
    pub since: SystemTime,
}

impl Today {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// How much it is by now. `total` is the kernel's count, which only grows.
    pub fn look(&self, wall: SystemTime, total: u64) -> Written {
        let seconds = wall.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let day = seconds / DAY;
        let mut mark = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = Mark { day, before: 0, since: wall };
        let now = match *mark {
            None => first,
            Some(mark) if mark.day == day => mark,
            Some(mark) if mark.day + 1 == day => {
                Mark { day, before: total, since: UNIX_EPOCH + Duration::from_secs(day * DAY) }
            }
            // The clock was set: still the day of the start, under another name.
            Some(mark) => Mark { day, since: wall, ..mark },
        };
        *mark = Some(now);
        Written { bytes: total.saturating_sub(now.before), since: now.since }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(day: u64, second: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(day * DAY + second)
    }

    #[test]
    fn a_new_day_begins_at_zero_and_a_clock_that_is_set_does_not() {
        let today = Today::new();
        assert_eq!(today.look(at(0, 5), 10).bytes, 10);
        assert_eq!(today.look(at(20_000, 5), 30), Written { bytes: 30, since: at(20_000, 5) });
        assert_eq!(today.look(at(20_000, 100), 90), Written { bytes: 90, since: at(20_000, 5) });
        assert_eq!(today.look(at(20_001, 60), 100), Written { bytes: 0, since: at(20_001, 0) });
        assert_eq!(today.look(at(20_001, 90), 107).bytes, 7);
    }
}

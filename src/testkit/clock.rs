//! Time that stands still until a test moves it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;

use crate::env::{BoxFuture, Clock};

/// A [`Clock`] that a test advances. Clones share the time.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Mutex<Time>>);

#[derive(Debug)]
struct Time {
    now: Instant,
    wall: SystemTime,
    sleepers: Vec<(Instant, oneshot::Sender<()>)>,
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl ManualClock {
    /// Starts at some instant; wall-clock time starts at 2026-01-01.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Time {
            now: Instant::now(),
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600),
            sleepers: Vec::new(),
        })))
    }

    /// Moves time and wakes whoever slept until then.
    pub fn advance(&self, duration: Duration) {
        let mut time = self.lock();
        time.now += duration;
        time.wall += duration;
        let now = time.now;
        let due = time.sleepers.extract_if(.., |(deadline, _)| *deadline <= now);
        for (_, sleeper) in due {
            // Whoever slept may have been dropped.
            sleeper.send(()).ok();
        }
    }

    /// Moves time to the next instant somebody sleeps until. False if nobody sleeps.
    pub fn advance_to_next(&self) -> bool {
        let next = {
            let mut time = self.lock();
            time.sleepers.retain(|(_, sleeper)| !sleeper.is_closed());
            let now = time.now;
            time.sleepers.iter().map(|(deadline, _)| deadline.duration_since(now)).min()
        };
        if let Some(duration) = next {
            self.advance(duration);
        }
        next.is_some()
    }

    /// Sets wall-clock time; monotonic time does not notice.
    pub fn set_wall(&self, wall: SystemTime) {
        self.lock().wall = wall;
    }

    fn lock(&self) -> MutexGuard<'_, Time> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        self.lock().now
    }

    fn wall(&self) -> SystemTime {
        self.lock().wall
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let mut time = self.lock();
        if duration.is_zero() {
            return Box::pin(std::future::ready(()));
        }
        let (sender, receiver) = oneshot::channel();
        let deadline = time.now + duration;
        time.sleepers.push((deadline, sender));
        drop(time);
        Box::pin(async move {
            if receiver.await.is_err() {
                // The clock is gone, so this instant never comes.
                std::future::pending::<()>().await;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sleepers_wake_in_time_and_not_before() {
        let clock = ManualClock::new();
        let start = clock.now();
        let early = tokio::spawn(clock.sleep(Duration::from_secs(1)));
        let late = tokio::spawn(clock.sleep(Duration::from_secs(2)));

        clock.advance(Duration::from_millis(999));
        tokio::task::yield_now().await;
        assert!(!early.is_finished());
        assert!(clock.advance_to_next());
        early.await.unwrap();
        assert!(!late.is_finished());
        assert!(clock.advance_to_next());
        late.await.unwrap();
        assert!(!clock.advance_to_next());
        assert_eq!(clock.now() - start, Duration::from_secs(2));
    }
}

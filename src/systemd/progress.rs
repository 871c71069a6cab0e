//! Asks systemd for more time while a start or a stop gets somewhere.
//!
//! The unit has no limit for the start, but somebody may set one, and stopping has one. Work that takes long here (replaying a
//! log, importing a datastore, being filled, a last checkpoint on a slow card) writes, so what counts as progress is that
//! the kernel has counted more bytes for this process. A start that waits for others writes nothing and asks for nothing.

use std::time::Duration;

use super::Notifier;
use crate::env::Clock;

/// How often to look. Well below [`EXTENSION`].
const TICK: Duration = Duration::from_secs(5);

/// How much more time is asked for.
const EXTENSION: Duration = Duration::from_secs(60);

/// Asks for as long as it is polled. `amount` is anything that grows while there is progress.
pub async fn extend_while_moving(
    notifier: Notifier,
    clock: &dyn Clock,
    amount: impl Fn() -> Option<u64>,
) {
    let mut before = amount();
    loop {
        clock.sleep(TICK).await;
        let now = amount();
        if before < now {
            notifier.extend_timeout(EXTENSION);
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::notify::tests::Listener;
    use super::*;
    use crate::env::host::HostClock;

    #[tokio::test(start_paused = true)]
    async fn time_is_asked_for_only_while_something_moves() {
        const TEST: &str =
            concat!(module_path!(), "::time_is_asked_for_only_while_something_moves");
        let Some((listener, notifier)) = Listener::in_child(TEST) else { return };
        let written = std::sync::Arc::new(AtomicU64::new(0));
        let amount = std::sync::Arc::clone(&written);
        let asks = tokio::spawn(async move {
            let amount = move || Some(amount.load(Ordering::Relaxed));
            extend_while_moving(notifier, &HostClock, amount).await;
        });
        tokio::time::sleep(TICK * 3).await;
        assert!(listener.drain().is_empty(), "nothing moved");
        written.store(1, Ordering::Relaxed);
        tokio::time::sleep(TICK * 3).await;
        assert_eq!(listener.drain(), ["EXTEND_TIMEOUT_USEC=60000000"]);
        asks.abort();
    }
}

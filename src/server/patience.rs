//! How long a running server waits for what takes minutes or weeks. Tests of whole processes cannot wait so long.

use std::time::Duration;

use crate::limits;

/// See the module documentation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Before a learner that does not answer is given up.
    pub(super) learner_silent: Duration,
    /// Between two checks of the card.
    pub(super) scrub_interval: Duration,
    /// Between a start and the first check.
    pub(super) scrub_settle: Duration,
    /// Between two attempts to have a damaged card filled again, while the others cannot.
    pub(super) heal_retry: Duration,
}

impl Patience {
    /// What everybody has.
    pub(super) const fn usual() -> Self {
        Self {
            learner_silent: limits::LEARNER_SILENT_MAX,
            scrub_interval: limits::SCRUB_INTERVAL,
            scrub_settle: limits::SCRUB_SETTLE,
            heal_retry: limits::HEAL_RETRY,
        }
    }

    /// What this process has.
    #[cfg(not(feature = "testkit"))]
    pub(super) const fn of_process() -> Self {
        Self::usual()
    }

    /// What this process has: a test may say how many seconds. No release is built with this.
    #[cfg(feature = "testkit")]
    pub(super) fn of_process() -> Self {
        let seconds = |name: &str, usual: Duration| {
            let text = std::env::var(format!("K3S_SERVER_TEST_{name}")).ok();
            text.and_then(|text| text.parse().ok()).map_or(usual, Duration::from_secs)
        };
        let usual = Self::usual();
        Self {
            learner_silent: seconds("LEARNER_SILENT", usual.learner_silent),
            scrub_interval: seconds("SCRUB", usual.scrub_interval),
            scrub_settle: seconds("SCRUB", usual.scrub_settle),
            heal_retry: seconds("HEAL_RETRY", usual.heal_retry),
        }
    }
}

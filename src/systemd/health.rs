//! Decides, after an update, whether this release may stay on this server.
//!
//! An image with two slots keeps a new one only when `boot-complete.target` is reached. What must not count against it is
//! that other servers are down: after a power cut in the house every server starts alone, and every one of them would be
//! rolled back.
//!
//! | the server | then |
//! |---|---|
//! | serves | well |
//! | has its own in order and waits for others, for [`STEADY`] | well |
//! | was refused for good (exit status 64 or 78) | broken, at once |
//! | failed otherwise, or is not there | systemd may start it again: broken when time is up |
//! | still opens its log and state | broken when time is up |
//! | was stopped by somebody | well when time is up |

use std::path::Path;
use std::time::Duration;

use crate::env::Clock;

use super::phase::{Phase, Report};

/// For so long a server must have gone on waiting: one that cannot get along with the others' release ends sooner.
pub const STEADY: Duration = Duration::from_secs(10);

/// How long a decision may take by default.
pub const PATIENCE: Duration = Duration::from_secs(300);

const POLL: Duration = Duration::from_millis(500);

/// The decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// The release may stay; why.
    Well(String),
    /// It may not; why.
    Broken(String),
}

/// One look; `None`: look again. `steady` is how long the same process has been in the same phase.
fn judge(seen: Option<&Report>, alive: bool, steady: Duration, time_is_up: bool) -> Option<Health> {
    let well = |why: String| Some(Health::Well(why));
    let late = |why: String| time_is_up.then_some(Health::Broken(why));
    let Some(report) = seen else {
        return late("k3s-server has not started: see `systemctl status k3s-server`".to_owned());
    };
    let detail = &report.detail;
    match (report.phase, alive) {
        (Phase::Failed, _) if matches!(report.exit, Some(64 | 78)) => {
            Some(Health::Broken(format!("the start is refused: {detail}")))
        }
        (Phase::Failed, _) => late(format!("k3s-server fails: {detail}")),
        (Phase::Stopping, _) => {
            time_is_up.then(|| Health::Well("k3s-server was stopped in good order".to_owned()))
        }
        (_, false) => late(format!("k3s-server has ended while {}", report.phase.word())),
        (Phase::Ready, true) => well("k3s-server serves".to_owned()),
        (Phase::Joining | Phase::Meeting | Phase::Settling, true) if STEADY <= steady => {
            well(format!("this server's own is in order; what is missing are the others: {detail}"))
        }
        (Phase::Joining | Phase::Meeting | Phase::Settling, true) => None,
        (Phase::Opening, true) => late(format!("k3s-server still is {detail}")),
    }
}

/// Looks until it is clear, at most for `patience`.
pub async fn watch(directory: &Path, clock: &dyn Clock, patience: Duration) -> Health {
    let begun = clock.now();
    let mut since = (None, begun);
    loop {
        let seen = Report::read(directory);
        let now = clock.now();
        let key = seen.as_ref().map(|report| (report.pid, report.phase));
        if since.0 != key {
            since = (key, now);
        }
        let alive = seen.as_ref().is_some_and(Report::is_alive);
        let steady = now.saturating_duration_since(since.1);
        let time_is_up = patience <= now.saturating_duration_since(begun);
        if let Some(health) = judge(seen.as_ref(), alive, steady, time_is_up) {
            return health;
        }
        clock.sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Phases;
    use super::*;
    use crate::env::host::HostClock;

    fn report(phase: Phase, exit: Option<u8>) -> Report {
        Report { phase, detail: "why".to_owned(), pid: 1, exit }
    }

    fn is_well(health: Option<Health>) -> Option<bool> {
        health.map(|health| matches!(health, Health::Well(_)))
    }

    /// Columns: phase, exit status, alive, verdict at once, when steady, when time is up.
    #[test]
    fn only_what_is_this_servers_own_counts_against_a_release() {
        use Phase::{Failed, Joining, Meeting, Opening, Ready, Settling, Stopping};
        let (well, broken) = (Some(true), Some(false));
        for (phase, exit, alive, at_once, steady, at_the_end) in [
            (Ready, None, true, well, well, well),
            (Meeting, None, true, None, well, well),
            (Joining, None, true, None, well, well),
            (Settling, None, true, None, well, well),
            (Opening, None, true, None, None, broken),
            (Stopping, None, false, None, None, well),
            (Ready, None, false, None, None, broken),
            (Meeting, None, false, None, None, broken),
            (Failed, Some(78), false, broken, broken, broken),
            (Failed, Some(64), false, broken, broken, broken),
            (Failed, Some(1), false, None, None, broken),
        ] {
            let seen = report(phase, exit);
            let look = |steady, up| is_well(judge(Some(&seen), alive, steady, up));
            assert_eq!(look(Duration::ZERO, false), at_once, "{phase:?} at once");
            assert_eq!(look(STEADY, false), steady, "{phase:?} steady");
            let expected = at_the_end;
            assert_eq!(look(STEADY, true), expected, "{phase:?} when time is up");
        }
        assert_eq!(judge(None, false, STEADY, false), None);
        assert_eq!(is_well(judge(None, false, STEADY, true)), broken);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_others_becomes_well_and_silence_becomes_broken() {
        let dir = tempfile::tempdir().unwrap();
        let silent = watch(dir.path(), &HostClock, Duration::from_secs(20)).await;
        assert!(matches!(silent, Health::Broken(_)), "{silent:?}");
        Phases::new(Some(dir.path().to_owned())).set(Phase::Meeting, "asks pi-2");
        let waits = watch(dir.path(), &HostClock, PATIENCE).await;
        let Health::Well(why) = waits else { panic!("{waits:?}") };
        assert!(why.ends_with("asks pi-2"), "{why}");
    }
}

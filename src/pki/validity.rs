//! When certificates are valid, on boards that do not know the time.
//!
//! A Raspberry Pi has no battery-backed clock: after a power cut it believes in 1970, or in the last shutdown, until the network
//! tells it better, and the network may itself need the cluster. So:
//!
//! - Certificates are valid from [`NOT_BEFORE`], long before anything of this project existed: a clock that is behind never
//!   makes one "not yet valid".
//! - The time used for every check is never before [`RELEASED`], the date of this release ([`CertificateClock`]). While
//!   the clock is unset, an expired certificate may pass; its key still has to be right and its authority ours. That is the
//!   price for a cluster that comes up after a power cut, and it ends when the clock is set.
//! - A certificate issued while the clock is unset counts from the release date. Renewal looks at the clock every hour, so
//!   it is replaced soon after the clock jumps forward.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;

use crate::env::Clock;

use super::Names;

const DAY: i64 = 24 * 60 * 60;

/// 2026-11-01, seconds since 1970. A constant and not the build time, so that a build can be repeated bit by bit; moved
/// forward with every release.
pub const RELEASED: i64 = 1_793_491_200;

/// 2020-01-01: the first second of every certificate.
pub const NOT_BEFORE: i64 = 1_577_836_800;

/// Life of the authority: ten years.
pub const AUTHORITY_LIFE: i64 = 3_653 * DAY;

/// Life of a node's certificates: one year.
pub const LEAF_LIFE: i64 = 365 * DAY;

/// A certificate is renewed when less than this is left.
pub const RENEWAL_WINDOW: i64 = 120 * DAY;

/// How often renewal is considered. An unset clock may jump at any time.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(60 * 60);

const _: () = {
    assert!(NOT_BEFORE < RELEASED);
    assert!(RENEWAL_WINDOW < LEAF_LIFE && LEAF_LIFE < AUTHORITY_LIFE);
};

/// Seconds since 1970 as certificates are checked: the wall clock, but never before this release.
pub fn certificate_time(wall: SystemTime) -> i64 {
    seconds(wall).max(RELEASED)
}

/// Whether the wall clock is certainly wrong.
pub fn clock_is_unset(wall: SystemTime) -> bool {
    seconds(wall) < RELEASED
}

fn seconds(wall: SystemTime) -> i64 {
    wall.duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// The clock that rustls checks certificates by.
#[derive(Clone)]
pub struct CertificateClock(Arc<dyn Clock>);

impl CertificateClock {
    /// Never earlier than the release, whatever `clock` says.
    pub const fn new(clock: Arc<dyn Clock>) -> Self {
        Self(clock)
    }

    /// Seconds since 1970.
    pub fn now(&self) -> i64 {
        certificate_time(self.0.wall())
    }
}

impl fmt::Debug for CertificateClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CertificateClock")
    }
}

impl TimeProvider for CertificateClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(self.now()))
    }
}

pub(super) fn unix(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Why a certificate has to be issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// There is none.
    Missing,
    /// It ends soon, or has ended.
    Ends {
        /// Days left; 0 if it has ended.
        days_left: i64,
    },
    /// The node's names or addresses have changed.
    NamesChanged,
}

impl fmt::Display for Due {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("there was none"),
            Self::Ends { days_left: 0 } => f.write_str("it had expired"),
            Self::Ends { days_left } => write!(f, "it would have expired in {days_left} days"),
            Self::NamesChanged => f.write_str("the names or addresses of this node have changed"),
        }
    }
}

/// What the decision to renew looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// Last second of validity.
    pub(super) not_after: i64,
    /// Names it is valid for.
    pub(super) names: Names,
}

/// Whether a certificate is due. The authority's own end limits what a new one could gain: a certificate that already
/// lasts as long as its authority is left alone.
pub(super) fn due(facts: &Facts, wanted: &Names, authority_ends: i64, now: i64) -> Option<Due> {
    let left = facts.not_after.saturating_sub(now);
    if left < RENEWAL_WINDOW && (facts.not_after < authority_ends || left < 0) {
        return Some(Due::Ends { days_left: left.max(0) / DAY });
    }
    (facts.names != *wanted).then_some(Due::NamesChanged)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAR: i64 = RELEASED + AUTHORITY_LIFE;

    fn facts(left: i64) -> Facts {
        Facts { not_after: RELEASED + left, names: Names::loopback() }
    }

    #[test]
    fn unset_clock_counts_as_the_release_date() {
        assert_eq!(certificate_time(UNIX_EPOCH), RELEASED);
        assert_eq!(certificate_time(UNIX_EPOCH - Duration::from_secs(1)), RELEASED);
        assert!(clock_is_unset(UNIX_EPOCH));
        let later = UNIX_EPOCH + Duration::from_secs(RELEASED.unsigned_abs() + 5);
        assert_eq!(certificate_time(later), RELEASED + 5);
        assert!(!clock_is_unset(later));
    }

    #[test]
    fn renewal_begins_120_days_before_the_end() {
        let wanted = Names::loopback();
        assert_eq!(due(&facts(RENEWAL_WINDOW), &wanted, FAR, RELEASED), None);
        let soon = due(&facts(RENEWAL_WINDOW - 1), &wanted, FAR, RELEASED);
        assert_eq!(soon, Some(Due::Ends { days_left: 119 }));
        let gone = due(&facts(-5 * DAY), &wanted, FAR, RELEASED);
        assert_eq!(gone, Some(Due::Ends { days_left: 0 }));
    }

    #[test]
    fn changed_names_are_due_at_once() {
        let mut wanted = Names::loopback();
        wanted.add("192.168.1.10").unwrap();
        assert_eq!(due(&facts(LEAF_LIFE), &wanted, FAR, RELEASED), Some(Due::NamesChanged));
    }

    /// Otherwise the last months of an authority would issue a new certificate every hour.
    #[test]
    fn certificate_that_lasts_as_long_as_its_authority_is_left_alone() {
        let wanted = Names::loopback();
        let end = RELEASED + 10 * DAY;
        assert_eq!(due(&facts(10 * DAY), &wanted, end, RELEASED), None);
    }
}

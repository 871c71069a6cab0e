//! D-Bus: asks logind, timedated and systemd, and answers as `io.k3s.Server1`.
//!
//! # Shape
//!
//! [`connect`] gives a connection to the system bus, or nothing where there is none. [`logind`] gets this node out of the way
//! before a reboot, [`timedate`] tells when the clock can be believed, [`units`] what systemd does with other units, and
//! [`server1`] is our own object. What a method does is behind [`Server`], so all of this runs without a node.
//!
//! # Invariants
//!
//! - Nothing depends on the bus: in a container, or by hand on a laptop, everything else works, and one debug line says so.
//! - Whoever may read properties cannot change anything. A method is for root and for those whom polkit lets; where there
//!   is no polkit, for root.
//!
//! # Not here
//!
//! systemd's own messages (readiness, watchdog, status): `systemd`, which needs no bus.

pub mod logind;
pub mod server1;
pub mod timedate;
pub mod units;

mod authority;

use std::time::Duration;

pub use server1::{MemberRow, Reading, Server};
pub use zbus::Connection;

/// A bus that is there answers much sooner.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for an answer of a service on the bus, which may have to be started.
const CALL_TIMEOUT: Duration = Duration::from_secs(25);

/// The system bus, if there is one: `$DBUS_SYSTEM_BUS_ADDRESS`, else its usual socket.
pub async fn connect() -> Option<Connection> {
    let bus = zbus::connection::Builder::system().method_timeout(CALL_TIMEOUT).build();
    match tokio::time::timeout(CONNECT_TIMEOUT, bus).await {
        Ok(Ok(bus)) => Some(bus),
        Ok(Err(error)) => {
            tracing::debug!(%error, "no system bus here; going on without it");
            None
        }
        Err(_elapsed) => {
            tracing::debug!("the system bus does not answer; going on without it");
            None
        }
    }
}

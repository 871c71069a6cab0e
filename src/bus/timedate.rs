//! Asks whether the clock is synchronised.
//!
//! timedated knows it from the kernel, whoever sets the clock (timesyncd, chrony, ntpd); the kernel itself is out of reach in the
//! unit's sandbox (`ProtectClock=`). It has no signal for this, and ends itself when nobody asks, so it is asked now and then
//! until the answer is yes.

use zbus::{Connection, proxy};

#[proxy(
    interface = "org.freedesktop.timedate1",
    default_service = "org.freedesktop.timedate1",
    default_path = "/org/freedesktop/timedate1"
)]
trait Timedate {
    #[zbus(property(emits_changed_signal = "false"), name = "NTPSynchronized")]
    fn ntp_synchronized(&self) -> zbus::Result<bool>;
}

/// Whether the kernel's clock follows a time server; `None` where nobody can tell.
pub async fn is_synchronized(bus: &Connection) -> Option<bool> {
    let asked = async { TimedateProxy::new(bus).await?.ntp_synchronized().await };
    match asked.await {
        Ok(synchronized) => Some(synchronized),
        Err(error) => {
            tracing::debug!(%error, "timedated was not asked");
            None
        }
    }
}

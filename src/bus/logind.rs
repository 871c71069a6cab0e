//! Gets this node out of the way before the machine goes down.
//!
//! logind waits for those who hold a delay lock, up to `InhibitDelayMaxSec=` (5 s by default), before it stops anything. In
//! that time another server takes over and what is in memory goes to the card, while network and clients are still there. It
//! is a courtesy: the stop of the service itself does the same a moment later, and so does whoever pulls the plug.
//!
//! # Invariants
//!
//! - The lock is let go when the work is done or when logind's time is nearly up, whichever is first.
//! - A shutdown that is called off gets a new lock.

use std::time::Duration;

use futures_util::StreamExt;
use zbus::{Connection, OwnedFd, proxy};

use crate::env::BoxFuture;

/// Of logind's time, what is left for it and the bus.
const MARGIN: Duration = Duration::from_millis(500);

#[proxy(
    interface = "org.freedesktop.login1.Manager",
    default_service = "org.freedesktop.login1",
    default_path = "/org/freedesktop/login1"
)]
trait Manager {
    fn inhibit(&self, what: &str, who: &str, why: &str, mode: &str) -> zbus::Result<OwnedFd>;

    #[zbus(signal)]
    fn prepare_for_shutdown(&self, start: bool) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "false"), name = "InhibitDelayMaxUSec")]
    fn inhibit_delay_max_usec(&self) -> zbus::Result<u64>;
}

/// How the work before a shutdown ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// Everything was done in time.
    Done,
    /// logind's time was up first.
    OutOfTime,
}

/// Does `work` before each shutdown, and tells `done` how it went. Ends when logind cannot be talked to, with why.
pub async fn guard(
    bus: &Connection,
    work: impl Fn() -> BoxFuture<'static, ()>,
    done: impl Fn(Prepared),
) -> zbus::Error {
    match guarded(bus, work, done).await {
        Err(error) => error,
        Ok(()) => zbus::Error::Failure("logind is gone".to_owned()),
    }
}

async fn guarded(
    bus: &Connection,
    work: impl Fn() -> BoxFuture<'static, ()>,
    done: impl Fn(Prepared),
) -> zbus::Result<()> {
    let manager = ManagerProxy::new(bus).await?;
    // Before the lock: a shutdown in between is not missed.
    let mut shutdowns = manager.receive_prepare_for_shutdown().await?;
    let mut lock = Some(lock(&manager).await?);
    while let Some(signal) = shutdowns.next().await {
        if !signal.args()?.start {
            lock = Some(self::lock(&manager).await?);
            continue;
        }
        let usec = manager.inhibit_delay_max_usec().await.unwrap_or(5_000_000);
        let time = Duration::from_micros(usec).saturating_sub(MARGIN);
        let ended = tokio::time::timeout(time, work()).await;
        drop(lock.take());
        done(if ended.is_ok() { Prepared::Done } else { Prepared::OutOfTime });
    }
    Ok(())
}

async fn lock(manager: &ManagerProxy<'_>) -> zbus::Result<OwnedFd> {
    let why = "another server takes over, and the state goes to the card";
    manager.inhibit("shutdown", "k3s-server", why, "delay").await
}

//! The one path on which the process ends.
//!
//! A signal, a failed part and an operator's command all call [`Shutdown::begin`]; every task that must finish something
//! waits on [`Shutdown::begun`]. The first reason is kept, because it is the one that explains the others.

use std::fmt;
use std::io;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Why the process stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// systemd or an operator sent this signal.
    Signal(&'static str),
    /// Something asked for it in the orderly way.
    Requested(&'static str),
    /// A part failed in a way that serving cannot go on.
    Failed(String),
}

impl StopReason {
    /// Whether the process should exit with success.
    pub const fn is_orderly(&self) -> bool {
        match self {
            Self::Signal(_) | Self::Requested(_) => true,
            Self::Failed(_) => false,
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(name) => write!(f, "received {name}"),
            Self::Requested(by) => write!(f, "asked by {by}"),
            Self::Failed(what) => f.write_str(what),
        }
    }
}

/// Starts the end, and tells everyone. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<watch::Sender<Option<StopReason>>>);

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// Nothing has asked to stop yet.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Asks to stop. Returns whether this was the first to ask.
    pub fn begin(&self, reason: StopReason) -> bool {
        self.0.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(reason);
            }
            first
        })
    }

    /// Why we stop, once something has asked.
    pub fn reason(&self) -> Option<StopReason> {
        self.0.borrow().clone()
    }

    /// Whether something has asked to stop.
    pub fn has_begun(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Completes with the reason when something asks to stop; at once if it already has.
    pub async fn begun(&self) -> StopReason {
        let mut receiver = self.0.subscribe();
        let reason = match receiver.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone(),
            Err(_) => unreachable!("the sender lives in `self`"),
        };
        match reason {
            Some(reason) => reason,
            None => unreachable!("waited for a reason and found none"),
        }
    }

    /// Turns SIGTERM and SIGINT into a shutdown, and takes SIGHUP's default action away, which would end the process: whoever
    /// reloads listens for it later, and a closed terminal stops no server.
    ///
    /// Needs a tokio runtime. The handlers are installed when this returns.
    pub fn on_signals(&self) -> io::Result<JoinHandle<()>> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // A handler stays installed when its stream is gone.
        drop(signal(SignalKind::hangup())?);
        let shutdown = self.clone();
        Ok(tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                shutdown.begin(StopReason::Signal(name));
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};

    use super::*;

    #[tokio::test]
    async fn the_first_reason_is_kept_and_everyone_hears_it() {
        let shutdown = Shutdown::new();
        let early = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.begun().await }
        });
        assert!(shutdown.begin(StopReason::Failed("write barrier failed".into())));
        assert!(!shutdown.begin(StopReason::Signal("SIGTERM")));
        let reason = early.await.unwrap();
        assert_eq!(reason, StopReason::Failed("write barrier failed".into()));
        assert_eq!(shutdown.begun().await, reason);
        assert!(!reason.is_orderly());
    }

    /// One test for all signals: they are sent to the whole test process, which has other tests running.
    #[tokio::test]
    async fn terminate_stops_and_hangup_does_not() {
        let shutdown = Shutdown::new();
        let handlers = shutdown.on_signals().unwrap();
        raise(Signal::SIGHUP).unwrap();
        raise(Signal::SIGTERM).unwrap();
        assert_eq!(shutdown.begun().await, StopReason::Signal("SIGTERM"));
        handlers.abort();
    }
}

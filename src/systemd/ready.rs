//! Says READY=1 when every part of the daemon has reported in.
//!
//! Each part gets a [`Latch`] before the start begins, and sets it when it can serve. Until the last one is set, the
//! status line names the parts that are still missing: a start that hangs says where.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::Notifier;

/// The latches of one start.
#[derive(Clone)]
pub struct Readiness(Arc<Shared>);

struct Shared {
    notifier: Notifier,
    waiting: Mutex<Vec<&'static str>>,
    ready: watch::Sender<bool>,
}

/// One part's promise to report in. Setting it twice is impossible; dropping it unset means never ready.
#[derive(Debug)]
#[must_use = "a latch that is never set keeps the service from becoming ready"]
pub struct Latch {
    name: &'static str,
    readiness: Readiness,
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

impl Readiness {
    /// Makes one latch per name, in the order of `parts`.
    pub fn new<const N: usize>(notifier: Notifier, parts: [&'static str; N]) -> (Self, [Latch; N]) {
        let ready = watch::Sender::new(N == 0);
        let waiting = Mutex::new(parts.to_vec());
        let readiness = Self(Arc::new(Shared { notifier, waiting, ready }));
        let latches = parts.map(|name| Latch { name, readiness: readiness.clone() });
        (readiness, latches)
    }

    /// The parts that have not reported in.
    pub fn waiting(&self) -> Vec<&'static str> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether all parts have reported in.
    pub fn is_ready(&self) -> bool {
        *self.0.ready.borrow()
    }

    /// Completes when all parts have reported in.
    pub async fn ready(&self) {
        let mut ready = self.0.ready.subscribe();
        // The sender lives in `self`, so waiting can only end with the value.
        let _closed = ready.wait_for(|ready| *ready).await.is_err();
    }

    fn set(&self, name: &'static str) {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|other| *other != name);
        if waiting.is_empty() {
            self.0.notifier.ready();
            self.0.ready.send_replace(true);
        } else {
            self.0.notifier.status(&format!("starting: waiting for {}", waiting.join(", ")));
        }
    }
}

impl Latch {
    /// This part can serve.
    pub fn set(self) {
        self.readiness.set(self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::super::notify::tests::Listener;
    use super::*;

    #[test]
    fn ready_is_sent_once_and_only_after_the_last_latch() {
        const TEST: &str =
            concat!(module_path!(), "::ready_is_sent_once_and_only_after_the_last_latch");
        let Some((listener, notifier)) = Listener::in_child(TEST) else { return };
        let (readiness, [datastore, raft, api]) =
            Readiness::new(notifier, ["the datastore", "a leader", "port 2379"]);
        raft.set();
        datastore.set();
        assert!(!readiness.is_ready());
        assert_eq!(
            listener.drain(),
            [
                "STATUS=starting: waiting for the datastore, port 2379",
                "STATUS=starting: waiting for port 2379"
            ]
        );
        api.set();
        assert!(readiness.is_ready());
        assert_eq!(listener.drain(), ["READY=1"]);
    }

    #[test]
    fn a_dropped_latch_keeps_the_service_unready_and_named() {
        const TEST: &str =
            concat!(module_path!(), "::a_dropped_latch_keeps_the_service_unready_and_named");
        let Some((listener, notifier)) = Listener::in_child(TEST) else { return };
        let (readiness, [raft, api]) = Readiness::new(notifier, ["a leader", "port 2379"]);
        drop(raft);
        api.set();
        assert_eq!(readiness.waiting(), ["a leader"]);
        assert_eq!(listener.drain(), ["STATUS=starting: waiting for a leader"]);
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let (readiness, [api]) = Readiness::new(Notifier::silent(), ["port 2379"]);
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        api.set();
        waiter.await.unwrap();
        readiness.ready().await;
    }
}

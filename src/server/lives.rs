//! One life of a node after the other, within one process.
//!
//! # Shape
//!
//! A node that has to become another one, or whose host has moved, ends its life and begins the next; [`Stage`] outlasts them.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::again::Again;
use super::failed::RunError;
use super::life::{Running, begin, stop, wait};
use super::listen::ListenError;
use super::stage::Stage;
use super::{address, neighbour};
use crate::announce;
use crate::config::Config;
use crate::env::Clock;
use crate::events::{EventId, fields};
use crate::metrics::process;
use crate::systemd::{Notifier, Phase as ServerPhase, StopReason, Watchdog, extend_while_moving};

/// How long tasks of the life before may take to let go of its ports.
const CLOSING_MAX: Duration = Duration::from_secs(10);
const CLOSING_POLL: Duration = Duration::from_millis(50);

/// One life after the other, and what lasts longer than one.
pub(super) struct Lives<'a> {
    stage: &'a Stage,
    /// As it was read, and where this host is now.
    config: Config,
    rejoins: Again,
    moves: Again,
    /// Ports of the life before may still be taken for so long.
    closing_until: Option<Instant>,
}

impl<'a> Lives<'a> {
    pub(super) fn new(config: &Config, stage: &'a Stage) -> Self {
        Self {
            stage,
            config: config.clone(),
            rejoins: Again::rejoining(),
            moves: Again::moving(),
            closing_until: None,
        }
    }

    pub(super) async fn run(mut self) -> Result<(), RunError> {
        let stage = self.stage;
        loop {
            let lived = live(&self).await;
            let next = tokio::select! {
                biased;
                // How a life ended comes first: whoever fails has asked everybody else to stop.
                next = self.next(lived) => next,
                _reason = stage.shutdown.begun() => Some(Ok(())),
            };
            if let Some(ended) = next {
                return ended;
            }
        }
    }

    /// Ends one life when this host has another address.
    fn follow_address(
        &self,
        stopping: watch::Receiver<bool>,
    ) -> impl Future<Output = Result<(), RunError>> + Send + 'static {
        let clock = Arc::clone(&self.stage.env.clock);
        let pause = self.moves.pause(clock.now());
        address::follow(self.config.clone(), clock, pause, stopping)
    }

    /// This host is at another address now.
    fn move_to(&mut self, address: IpAddr) -> Result<(), RunError> {
        self.config = self.config.at_address(address);
        self.stage.cockpit.moved(&self.config)
    }

    /// After one life: how the process ends, or nothing if another life begins.
    async fn next(&mut self, lived: Result<(), RunError>) -> Option<Result<(), RunError>> {
        let clock = Arc::clone(&self.stage.env.clock);
        let closing = self.closing_until.is_some_and(|until| clock.now() < until);
        match lived {
            // A node that has to become another one begins anew, in the same process.
            Err(RunError::StartOver) => {
                let pause = self.rejoins.pause(clock.now());
                if !pause.is_zero() {
                    tracing::info!("beginning anew in {} s", pause.as_secs());
                    clock.sleep(pause).await;
                }
                self.rejoins.count(clock.now());
            }
            Err(RunError::Moved(to)) => {
                if let Err(error) = self.move_to(to) {
                    return Some(Err(error));
                }
                self.moves.count(clock.now());
            }
            Err(RunError::Listen(ListenError::InUse { .. })) if closing => {
                clock.sleep(CLOSING_POLL).await;
                return None;
            }
            Err(RunError::Listen(error @ ListenError::InUse { .. })) => {
                return Some(Err(neighbour::explain(error).await));
            }
            // An address that was found, and has gone again before it was taken.
            Err(RunError::Listen(ListenError::NoSuchAddress { .. }))
                if closing && address::is_found(&self.config) =>
            {
                clock.sleep(CLOSING_POLL).await;
                let moved = address::of_default_route().map_or(Ok(()), |to| self.move_to(to));
                return moved.err().map(Err);
            }
            Err(RunError::HasReset(guidance)) => {
                tracing::info!("{guidance}");
                return Some(Ok(()));
            }
            lived => return Some(lived),
        }
        self.closing_until = Some(clock.now() + CLOSING_MAX);
        None
    }
}

/// Bytes that this process has handed to the card: what grows while a start or a stop gets somewhere.
fn bytes_written() -> Option<u64> {
    process::read().written_bytes
}

/// One life of a node: from taking the ports to the end.
async fn live(lives: &Lives<'_>) -> Result<(), RunError> {
    let stage = lives.stage;
    let mut running = tokio::select! {
        started = start(lives) => started?,
        // A node that waits for others, perhaps for hours, can be told to stop.
        reason = stage.shutdown.begun() => {
            announce!(
                EventId::Stopping,
                { fields::REASON } = %reason,
                "stopping before this node took part: {reason}"
            );
            return Ok(());
        }
        () = extend_while_moving(stage.notifier, &*stage.env.clock, bytes_written) => {
            unreachable!("asks for time until it is dropped")
        }
        () = feed_before_raft(stage.notifier, &*stage.env.clock) => {
            unreachable!("feeds until it is dropped")
        }
    };
    let (reason, error) = wait(&mut running).await;
    if !error.as_ref().is_some_and(RunError::starts_over) {
        stage.notifier.stopping();
        stage.phases.set(ServerPhase::Stopping, reason.to_string());
        announce!(EventId::Stopping, { fields::REASON } = %reason, "stopping: {reason}");
    }
    stage.cockpit.show(None);
    let stopped = tokio::select! {
        stopped = stop(running) => stopped,
        () = extend_while_moving(stage.notifier, &*stage.env.clock, bytes_written) => {
            unreachable!("asks for time until it is dropped")
        }
    };
    if let Some(error) = error {
        return Err(error);
    }
    match reason {
        StopReason::Failed(what) => Err(RunError::Failed(what)),
        StopReason::Signal(_) | StopReason::Requested(_) => {
            stopped?;
            announce!(EventId::Stopped, "stopped; everything is on the card");
            Ok(())
        }
    }
}

/// A process that was ready once and starts over has no Raft to feed for, perhaps for hours while the others are away; systemd, which
/// counts from the first READY=1, would kill it.
async fn feed_before_raft(notifier: Notifier, clock: &dyn Clock) {
    let Some(watchdog) = Watchdog::from_environment() else { return std::future::pending().await };
    loop {
        notifier.watchdog();
        clock.sleep(watchdog.period()).await;
    }
}

async fn start(lives: &Lives<'_>) -> Result<Running, RunError> {
    let (mut running, unsettled) = begin(&lives.config, lives.stage).await?;
    let stopping = unsettled.stopping.clone();
    running.serving.spawn(lives.follow_address(stopping));
    running.serving.spawn(unsettled.settling.run(unsettled.settled, unsettled.stopping));
    Ok(running)
}

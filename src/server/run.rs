//! The process of a server: journal, runtime, and what is there before and after every life of its node.

use std::sync::Arc;

use super::desk;
use super::failed::{Ended, RunError, tell};
use super::lives::Lives;
use super::stage::Stage;
use crate::announce;
use crate::config::{Loaded, Severity};
use crate::env::{Env, host};
use crate::events::{EventId, fields};
use crate::observe::logging::{self, Logging, Logs, Output};
use crate::observe::repeat::Repeats;
use crate::systemd::{Notifier, Phase as ServerPhase, Phases};

/// What `k3s-server` exits with: `cli` decides it, and this is only told.
const EXIT_FAILED: u8 = 1;
const EXIT_CONFIGURATION: u8 = 78;

/// Runs a server until it is told to stop or cannot go on.
pub fn run(loaded: &Loaded) -> Result<(), Ended> {
    let config = &loaded.config;
    let filter = std::env::var("K3S_SERVER_LOG").ok();
    // Dropped last: what is still queued for the journal is written then.
    let logs = logging::init(&Logging { debug: config.debug, filter })
        .map_err(|error| Ended { error: error.into(), told: false })?;
    announce_warnings(&loaded.problems);
    let ended = run_to_the_end(loaded, &logs);
    ended.map_err(|error| Ended { told: logs.output == Output::Journal && tell(&error), error })
}

fn run_to_the_end(loaded: &Loaded, logs: &Logs) -> Result<(), RunError> {
    // Two to four slow cores: more threads would only take turns. Blocking work has its own.
    let workers = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(16)
        .thread_name("k3s-server")
        .enable_all()
        .build()?;
    runtime.block_on(serve(loaded, host::env(), logs.repeats.clone()))
}

async fn serve(loaded: &Loaded, env: Env, repeats: Repeats) -> Result<(), RunError> {
    let config = &loaded.config;
    let (notifier, phases) = (Notifier::from_environment(), Phases::from_environment());
    let stage = Stage::new(loaded, env, notifier, phases, repeats)?;
    let signals = stage.shutdown.on_signals()?;
    announce!(
        EventId::Starting,
        { fields::NODE } = config.node_name.as_str(),
        { fields::VERSION } = env!("CARGO_PKG_VERSION"),
        "k3s-server {} starting, datastore in {}",
        env!("CARGO_PKG_VERSION"),
        config.db_dir.display()
    );
    stage.phases.set(ServerPhase::Opening, "opening its log and state");
    let desk = tokio::spawn(desk::run(Arc::clone(&stage.cockpit), stage.env.clone()));
    let ended = Lives::new(config, &stage).run().await;
    match &ended {
        Ok(()) => stage.phases.set(ServerPhase::Stopping, "stopped"),
        Err(error) => {
            let exit = if error.is_configuration() { EXIT_CONFIGURATION } else { EXIT_FAILED };
            stage.phases.failed(exit, error.to_string());
        }
    }
    desk.abort();
    signals.abort();
    ended
}

/// Says what was wrong with the configuration without being an error.
fn announce_warnings(problems: &crate::config::Problems) {
    for problem in problems.iter().filter(|problem| problem.severity == Severity::Warning) {
        announce!(
            EventId::ConfigurationWarning,
            { fields::PATH } = %problem.origin,
            "{problem}"
        );
    }
}

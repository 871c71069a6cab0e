//! Keeps this server on D-Bus, and answers SIGHUP.
//!
//! Runs beside everything else, from before the start to the end of the process. That there is no bus, that somebody does not let
//! us, that the bus is restarted: none of it matters to the datastore.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::clock;
use super::cockpit::Cockpit;
use crate::announce;
use crate::board::{self, Weight};
use crate::bus::logind::Prepared;
use crate::bus::{self, Connection, logind, server1};
use crate::env::Env;
use crate::events::{EventId, fields};

/// Before a bus that was there and is gone is looked for again.
const AGAIN: Duration = Duration::from_secs(30);

/// Runs until it is dropped.
pub(super) async fn run(cockpit: Arc<Cockpit>, env: Env) {
    tokio::join!(
        reload_on_hangup(&cockpit),
        stay_on_the_bus(&cockpit, &env),
        look_at_the_board(&cockpit)
    );
}

/// Says what the kernel lacks, once: what K3s needs as a warning, what spares the card as a note.
async fn look_at_the_board(cockpit: &Cockpit) {
    let directory = cockpit.db_dir.clone();
    let looked = tokio::task::spawn_blocking(move || board::look(Path::new("/"), &directory));
    for missing in looked.await.unwrap_or_default().missing {
        let (what, fix) = (missing.what, missing.fix);
        match missing.weight {
            Weight::Needed => announce!(
                EventId::PrerequisiteMissing,
                { fields::REASON } = what.as_str(),
                "{what}\n  fix: {fix}"
            ),
            Weight::Advised => tracing::info!("{what}; {fix}"),
        }
    }
}

async fn reload_on_hangup(cockpit: &Cockpit) {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    while hangups.recv().await.is_some() {
        if let Err(problems) = cockpit.read_again() {
            tracing::error!("nothing was reloaded, the configuration has errors: {problems}");
        }
    }
}

async fn stay_on_the_bus(cockpit: &Arc<Cockpit>, env: &Env) {
    while let Some(bus) = bus::connect().await {
        let all = async {
            tokio::join!(
                answer(&bus, cockpit),
                guard(&bus, cockpit),
                clock::follow(cockpit, &*env.clock, Some(&bus)),
            );
            // Nothing is left to do on a bus that let us do nothing.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = all => {}
            () = bus.closed() => {}
        }
        tracing::debug!("the system bus is gone");
        env.clock.sleep(AGAIN).await;
    }
    clock::follow(cockpit, &*env.clock, None).await;
}

async fn answer(bus: &Connection, cockpit: &Arc<Cockpit>) {
    let error = server1::serve(bus, Arc::<Cockpit>::clone(cockpit)).await;
    if !bus.is_closed() {
        tracing::info!("not on D-Bus as {}: {error}", server1::NAME);
    }
}

async fn guard(bus: &Connection, cockpit: &Arc<Cockpit>) {
    let work = || -> crate::env::BoxFuture<'static, ()> {
        let cockpit = Arc::clone(cockpit);
        Box::pin(async move { cockpit.prepare_for_shutdown().await })
    };
    let done = |prepared| {
        if prepared == Prepared::OutOfTime {
            tracing::warn!(
                "the machine goes down before everything was done; the stop of the service does the rest"
            );
        }
    };
    let error = logind::guard(bus, work, done).await;
    if !bus.is_closed() {
        tracing::info!(
            "no delay lock from logind ({error}); leadership is handed over when the service stops"
        );
    }
}

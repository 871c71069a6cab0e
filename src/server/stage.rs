//! What outlasts the lives of a node, and is shared by them.

use std::sync::Arc;

use super::cockpit::Cockpit;
use super::failed::RunError;
use crate::config::Loaded;
use crate::env::Env;
use crate::observe::repeat::Repeats;
use crate::systemd::{Notifier, Phases, Shutdown};

/// What every life of a server shares.
pub(super) struct Stage {
    pub(super) env: Env,
    pub(super) notifier: Notifier,
    pub(super) shutdown: Shutdown,
    pub(super) phases: Phases,
    pub(super) cockpit: Arc<Cockpit>,
    pub(super) repeats: Repeats,
}

impl Stage {
    pub(super) fn new(
        loaded: &Loaded,
        env: Env,
        notifier: Notifier,
        phases: Phases,
        repeats: Repeats,
    ) -> Result<Self, RunError> {
        let cockpit = Arc::new(Cockpit::new(loaded, &env, &phases)?);
        Ok(Self { env, notifier, shutdown: Shutdown::new(), phases, cockpit, repeats })
    }
}

//! A panic anywhere is a violation, whichever task it was in: tokio would swallow it.

use std::sync::{Mutex, PoisonError};

use crate::world::World;

static WORLD: Mutex<Option<World>> = Mutex::new(None);

/// From now on panics of this process are told to this world.
pub(crate) fn report_to(world: &World) {
    *WORLD.lock().unwrap_or_else(PoisonError::into_inner) = Some(world.clone());
    std::panic::set_hook(Box::new(|info| {
        let what = format!("panic: {info}");
        // Told from a thread of its own: whoever panics may hold the trace.
        let world = WORLD.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(world) = world {
            world.violation(|| what.replace('\n', " | "));
        }
    }));
}

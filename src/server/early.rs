//! Refuses a start whose critical flags differ before anything is opened, so that nothing is touched.
//!
//! | the record that was seen last | then |
//! |---|---|
//! | agrees, or there is none | go on: the comparison with the cluster follows |
//! | differs | it may be old, so another server is asked; if none answers, this server's own disk decides |
//!
//! Without the question, a server that was down while an operator changed a flag could never start with the new value: its own
//! copy would refuse it.

use std::path::Path;

use super::wal_tools;
use crate::client::Connection;
use crate::config::Config;
use crate::critical::{CriticalFlags, FlagsError, gate};
use crate::env::Env;
use crate::join::flags::seen;

/// Refuses if the start is sure to be refused. Reads only.
pub(super) async fn refuse_early(
    config: &Config,
    env: &Env,
    own: &CriticalFlags,
) -> Result<(), FlagsError> {
    // What cannot be read here is told by whoever opens it.
    let Ok(Some(cluster)) = seen(env, &config.db_dir) else { return Ok(()) };
    if !differs(own, &cluster.flags) {
        return Ok(());
    }
    let asked = Connection::of(config).ask_any_flags(&cluster.client_urls).await;
    let record = match asked {
        Some(reply) => Some(reply.record),
        None => on_disk(&config.db_dir).await,
    };
    let Some(record) = record.filter(|record| differs(own, record)) else { return Ok(()) };
    gate::against(own, &record).map(|_matched| ()).inspect_err(FlagsError::announce)
}

fn differs(own: &CriticalFlags, record: &[u8]) -> bool {
    matches!(gate::against(own, record), Err(FlagsError::Differ(_)))
}

/// The record in the datastore itself, read from a copy.
async fn on_disk(dir: &Path) -> Option<bytes::Bytes> {
    let dir = dir.to_owned();
    let read = tokio::task::spawn_blocking(move || wal_tools::recorded_flags(&dir)).await;
    read.ok()?.ok()?
}

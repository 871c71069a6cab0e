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
use std::time::Duration;

use super::wal_tools;
use crate::client::Connection;
use crate::config::Config;
use crate::critical::{CriticalFlags, FlagsError, gate};
use crate::env::Env;
use crate::join::flags::seen;
use crate::proto::node::FlagsRequest;
use crate::proto::node::admin_client::AdminClient;

/// Another server that leads or knows who does answers much sooner.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(6);

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
    let record = match ask(config, &cluster.client_urls).await {
        Some(record) => Some(record),
        None => on_disk(&config.db_dir).await,
    };
    let Some(record) = record.filter(|record| differs(own, record)) else { return Ok(()) };
    gate::against(own, &record).map(|_matched| ()).inspect_err(FlagsError::announce)
}

fn differs(own: &CriticalFlags, record: &[u8]) -> bool {
    matches!(gate::against(own, record), Err(FlagsError::Differ(_)))
}

/// The record as a majority has it, from whichever server answers first.
async fn ask(config: &Config, client_urls: &[String]) -> Option<bytes::Bytes> {
    let asked = async {
        for url in client_urls {
            let connection = Connection::of(config).to(std::slice::from_ref(url));
            let Ok(channel) = connection.open().await else { continue };
            let reply = AdminClient::new(channel).flags(FlagsRequest { local: false }).await;
            if let Ok(reply) = reply {
                return Some(reply.into_inner().record);
            }
        }
        None
    };
    tokio::time::timeout(ANSWER_TIMEOUT, asked).await.ok().flatten()
}

/// The record in the datastore itself, read from a copy.
async fn on_disk(dir: &Path) -> Option<bytes::Bytes> {
    let dir = dir.to_owned();
    let read = tokio::task::spawn_blocking(move || wal_tools::recorded_flags(&dir)).await;
    read.ok()?.ok()?
}

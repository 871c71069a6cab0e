//! Passes what was applied on to those who follow the store.

use std::sync::Arc;

use crate::etcd::Leases;
use crate::mvcc::Store;
use crate::raft::{AppliedBatch, Follow};
use crate::types::Revision;
use crate::watch::Hub;

/// Feeds watchers.
pub(super) struct Watchers(pub(super) Hub);

impl Follow for Watchers {
    fn applied(&self, batch: &AppliedBatch) {
        self.0.publish(&batch.events, batch.revision);
    }

    fn restored(&self, revision: Revision) {
        self.0.restored(revision);
    }
}

/// Feeds the lease clocks.
pub(super) struct LeaseClocks {
    pub(super) leases: Arc<Leases>,
    pub(super) store: Store,
}

impl Follow for LeaseClocks {
    fn applied(&self, batch: &AppliedBatch) {
        self.leases.applied(&batch.leases);
    }

    fn restored(&self, _revision: Revision) {
        // A store that cannot be read stops the node by its own channel; until then old leases stay, which is
        // late and never early.
        if let Err(error) = self.leases.restored(&self.store) {
            tracing::error!(%error, "leases could not be read from the new state");
        }
    }
}

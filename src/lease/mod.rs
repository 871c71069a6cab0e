//! Decides when a lease has run out: never early, by monotonic time, and only while this node leads.
//!
//! Kubernetes hangs events, masterleases and locks on leases. The replicated state knows a lease's id and the seconds
//! it was granted; how much is left is known to the leader alone, because a renewal is not written to the log.
//! A new leader therefore starts every lease afresh, or from its last checkpoint.
//!
//! # Shape
//!
//! [`Lessor`] is pure: every call takes the time as an argument. `etcd::expiry` feeds it what was applied, proposes
//! revocations for what [`Lessor::take_expired`] returns and checkpoints for [`Lessor::take_checkpoints`].
//!
//! # Invariants
//!
//! - A lease expires no earlier than its seconds after the grant was applied, the last renewal, or the
//!   promotion of this leader (then with the remaining seconds of the last checkpoint, if it has one).
//! - A lease whose remaining seconds are checkpointed is not renewed before the checkpoint is cleared in the log:
//!   else the next leader would expire it early. Nor is it while a checkpoint is on its way.
//! - One revocation per lease is under way at a time.
//!
//! # Not here
//!
//! Keys attached to a lease: `mvcc`. Smallest and largest TTL: `etcd::validate`.

mod lessor;

pub use lessor::{Lease, Lessor, Record, RenewError, Settings};

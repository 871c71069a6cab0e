//! How a node comes to belong to a cluster. Founding one is here; joining one follows the same steps.
//!
//! # Invariants
//!
//! - Ids are random numbers made once. Addresses and host names are attributes, never identity.
//! - Every step may be repeated: a crash anywhere in between is finished by the next start.

pub mod flags;
pub mod identity;
pub mod plan;

pub use identity::{Identity, IdentityError};
pub use plan::{OnDisk, Plan, PlanError, start_plan};

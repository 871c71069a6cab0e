//! How a node comes to belong to a cluster, and proves at every start that it still is the node it was.
//!
//! # Shape
//!
//! - [`identity`]: who this node is and how far it has come. [`token`]: the secret that lets servers in.
//! - [`pake`]: the proof that both sides know it. [`gate`]: who may try. [`door`]: the server's side of joining. [`enrol`]: the
//!   joiner's side; [`adopt`](mod@adopt): what it keeps.
//! - [`plan`]: what a start does at all. [`flags`]: whether its settings are the cluster's.
//! - [`hello`]: at every start, whether this still is the node that the others remember. [`quarantine`]: what becomes of one that is
//!   not. [`reset`]: when nobody else is left.
//!
//! # Invariants
//!
//! - Ids are random numbers made once. Addresses and host names are attributes, never identity.
//! - Every step may be repeated: a crash anywhere in between is finished or undone by the next start.
//! - The token's password never travels.

pub mod flags;
pub mod identity;
pub mod plan;
pub mod token;

pub mod pake;

pub mod gate;

pub mod door;
pub mod enrol;

pub mod adopt;

pub mod hello;

pub mod quarantine;
pub mod reset;

mod file;

#[cfg(test)]
mod join_tests;

pub use adopt::{AdoptError, adopt, contacts, undo_unfinished};
pub use door::{Door, Grant, House, JoinRefused};
pub use enrol::{Enrolled, Enrolment, JoinError};
pub use identity::{Identity, IdentityError, Phase};
pub use plan::{Plan, PlanError, start_plan};
pub use token::{AuthorityHash, Password, Token, TokenError};

//! Shows what the daemon does: the journal, the terminal, and HTTP on port 2381.
//!
//! # Shape
//!
//! [`logging`] chooses between [`journal`] and text; [`repeat`] keeps both from saying the same thing all day.
//! [`http`] serves metrics and health, [`grpc`] counts calls.
//!
//! # Invariants
//!
//! - Observing never blocks what it observes: a stalled journal loses lines, a scrape reads atomics.
//! - A metric name is an interface; it never changes its meaning.
//!
//! # Not here
//!
//! What is said, and the names of its fields: [`crate::events`]. Counting: [`crate::metrics`].

pub mod forward;
pub mod grpc;
pub mod http;
pub mod journal;
pub mod logging;
pub mod repeat;

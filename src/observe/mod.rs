//! Shows what the daemon does: the journal, the terminal, and HTTP on port 2381.
//!
//! # Shape
//!
//! [`events`] is the catalog of what is said, [`fields`] the names of the details. [`logging`] chooses between
//! [`journal`] and text. [`http`] serves metrics and health, [`grpc`] counts calls.
//!
//! # Invariants
//!
//! - Observing never blocks what it observes: a stalled journal loses lines, a scrape reads atomics.
//! - An event id, a field name and a metric name are interfaces; they never change their meaning.

pub mod events;
pub mod fields;
pub mod grpc;
pub mod http;
pub mod journal;
pub mod logging;

pub use events::EventId;

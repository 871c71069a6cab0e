//! Talks to the service manager: readiness, status, watchdog, signals.
//!
//! Everything works the same, silently, when no service manager is there.
//!
//! # Shape
//!
//! [`Notifier`] sends the messages. [`Readiness`] says READY=1 once, when every part has reported in.
//! [`Watchdog`] feeds systemd's watchdog for as long as the loop that matters has a [`Pulse`]. [`Shutdown`]
//! is the one path on which the process ends, whoever starts it. [`Phases`] leaves behind how far the server has come, and
//! [`health`] decides with that whether a new release may stay. [`extend_while_moving`] asks for more time.
//!
//! # Invariants
//!
//! - READY=1 is sent at most once, and only when all latches are set.
//! - Once Raft runs, the watchdog is fed on behalf of its loop, never for the sake of a timer.
//! - The first reason to stop is the one reported; later ones change nothing.

pub mod health;
pub mod phase;

mod notify;
mod progress;
mod ready;
mod shutdown;
mod watchdog;

pub use notify::Notifier;
pub use phase::{Phase, Phases};
pub use progress::extend_while_moving;
pub use ready::{Latch, Readiness};
pub use shutdown::{Shutdown, StopReason};
pub use watchdog::{Pulse, Watchdog};

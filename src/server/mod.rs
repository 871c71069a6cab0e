//! The daemon put together: every part is made, connected, run and stopped here, and nowhere else.
//!
//! # Shape
//!
//! [`run`] goes through the phases in order: open the data directory, start Raft, serve, become ready, wait, stop. What a
//! phase makes is handed to the next by value, so nothing can be used before it exists.
//!
//! # Invariants
//!
//! - There is one way out: [`Shutdown`]. A signal, a failed log, a failed store and a failed listener all take it.
//! - Stopping goes from the outside in: no new connections, calls under way finish, the state is made durable, the log
//!   is closed.
//!
//! # Not here
//!
//! Decisions. Each belongs to the module that is assembled.

pub mod listen;

mod address;
mod admit;
mod again;
mod backup;
mod clock;
mod cockpit;
mod collect;
mod data_dir;
mod desk;
mod dial;
mod dispatch;
mod doorway;
mod early;
mod enter;
mod failed;
mod figures;
mod follow;
mod heal;
mod health;
mod leases;
mod life;
mod lives;
mod membership;
mod mend;
mod neighbour;
mod parts;
mod patience;
mod reload;
mod repair;
mod run;
mod scrub;
mod settle;
mod stage;
mod stamp;
mod stranded;
mod supervise;
mod tuning;
mod wal_tools;

pub use address::of_default_route as address_of_default_route;
pub use dial::Network;
pub use failed::{Ended, RunError, refuse};
pub use repair::{RepairError, repair};
pub use run::run;
pub use wal_tools::{dump, recorded_flags, verify};

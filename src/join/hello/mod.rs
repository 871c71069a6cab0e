//! Asks the others, before a node takes part, whether it still is what they remember; and answers those who ask.
//!
//! # Shape
//!
//! - [`verdict`]: what the answers mean. Pure.
//! - [`ask`]: gathers answers until there is a verdict.
//! - [`find`]: asks for members that have moved.
//! - [`book`]: what this node remembers of the others. [`witness`] fills it from what they promise.
//! - [`answer`]: answers, from the card, also while this node is asking itself: a whole cluster that lost power comes back in any
//!   order.
//!
//! # Not here
//!
//! What follows from a verdict: `quarantine` for a node that has forgotten, the assembly for the rest.

pub mod answer;
pub mod ask;
pub mod book;
pub mod find;
pub mod verdict;
pub mod witness;

mod wire;

#[cfg(test)]
mod tests;

pub use answer::Answerer;
pub use ask::{Asked, Hello};
pub use book::HelloBook;
pub use find::Finder;
pub use verdict::{Forgotten, Own, Verdict, Voters};
pub use wire::members;
pub use witness::Witness;

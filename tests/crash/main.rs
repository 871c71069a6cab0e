//! Cuts the power everywhere, lets every operation fail, flips every bit, and checks what the log remembers.
//!
//! Every run follows a list of appends and a model of what the log holds after each of them. After any fault, what is
//! recovered must be the model after some number of appends: at least those that were acknowledged, at most those
//! that were made, none by halves. Opening must succeed after every crash; only damage to what was durable may be
//! reported instead of repaired.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod damage;
mod failures;
mod histories;
mod model;
mod power;
mod run;
mod start_over;

//! The image: what it does with the file on its boot partition, what its recipes declare, and that it boots.
//!
//! # Shape
//!
//! [`adopt`] runs the script of the image on directories of its own. [`recipes`] reads what cannot be built everywhere. [`boot`]
//! starts the image that `K3S_TEST_IMAGE` names on an emulated board; `make test-image` does that.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "dropping what is gone")]

#[path = "../support/mod.rs"]
mod support;

mod adopt;
mod boot;
mod recipes;

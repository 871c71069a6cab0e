//! A whole cluster in one process, from one seed: the real node on simulated cards, network and clocks.
//!
//! `cargo test --test sim` runs a quick part; `make sim` the whole. `--help` lists what else can be asked for.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program of its own, for people")]

mod campaign;
mod card;
mod client;
mod cluster;
mod entropy;
mod history;
mod log_model;
mod machine;
mod membership;
mod nemesis;
mod network;
mod oracle;
mod panics;
mod partition;
mod promises;
mod run;
mod scenarios;
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    match campaign::Request::parse(std::env::args().skip(1)) {
        Ok(request) => campaign::run(&request),
        Err(what) => {
            eprintln!("{what}\n{}", campaign::HELP);
            ExitCode::from(64)
        }
    }
}

//! A whole cluster in one process, from one seed: the real node on simulated cards, network and clocks.
//!
//! `cargo test --test sim` runs a quick part, `make sim` 400 seeds, `make sim-mutants` proves that planted faults are seen.
//! `cargo test --test sim -- --help` lists what else can be asked for. Every run is a process of its own, started by this one:
//! see [`entropy`] for why, and [`jobs`].
//!
//! Where to read on: [`machine`] puts a node together; [`card`] and [`network`] are its world; [`nemesis`] what goes wrong;
//! [`oracle`] and [`history`] what must hold; [`run`] one run from its beginning to its verdict; [`scenarios`] the runs that
//! have names.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program of its own, for people")]

mod arguments;
mod campaign;
mod card;
mod client;
mod cluster;
mod entropy;
mod history;
mod jobs;
mod log_model;
mod machine;
mod membership;
mod mutants;
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

use arguments::{Request, Task};

fn main() -> ExitCode {
    match Request::parse(std::env::args().skip(1)) {
        Ok(request) => match &request.task {
            Task::Help => {
                println!("{}", arguments::HELP);
                ExitCode::SUCCESS
            }
            Task::List => {
                campaign::names().iter().for_each(|name| println!("{name}: test"));
                ExitCode::SUCCESS
            }
            Task::One(life) => jobs::here(life, request.trace.as_deref()),
            Task::Tests(filters) => campaign::tests(&request, filters),
            Task::Seeds(seeds) => campaign::seeds(&request, seeds.clone()),
            Task::Mutants => campaign::mutants(&request),
        },
        Err(what) => {
            eprintln!("{what}\n\n{}", arguments::HELP);
            ExitCode::from(64)
        }
    }
}

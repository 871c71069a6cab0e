//! The `k3s-server` program.

use std::io::Write;
use std::process::ExitCode;

use k3s_server::cli::{self, Failure, Format, Programs, RepairArguments, WalArguments};
use k3s_server::config::Loaded;
use k3s_server::server;

/// What the command line hands over to the rest of the program.
struct Assembly;

impl Programs for Assembly {
    fn server(&self, loaded: Loaded) -> Result<(), Failure> {
        server::run(&loaded).map_err(failure)
    }

    fn wal_verify(&self, arguments: &WalArguments, out: &mut dyn Write) -> Result<(), Failure> {
        server::verify(&arguments.directory, arguments.format == Format::Json, out).map_err(failed)
    }

    fn wal_dump(&self, arguments: &WalArguments, out: &mut dyn Write) -> Result<(), Failure> {
        server::dump(&arguments.directory, arguments.format == Format::Json, out).map_err(failed)
    }

    fn wal_repair(&self, arguments: &RepairArguments, out: &mut dyn Write) -> Result<(), Failure> {
        server::repair(&arguments.directory, arguments.accept_data_loss, out).map_err(|error| {
            let failure = failed(&error);
            match error.remedy() {
                Some(remedy) => failure.fix(remedy),
                None => failure,
            }
        })
    }
}

fn failed(error: impl ToString) -> Failure {
    Failure::failed(error.to_string())
}

fn failure(error: server::RunError) -> Failure {
    let remedy = error.remedy();
    let failure = if error.is_configuration() {
        Failure::configuration(error.to_string())
    } else {
        failed(&error)
    };
    match remedy {
        Some(remedy) => failure.fix(remedy),
        None => failure,
    }
}

fn main() -> ExitCode {
    cli::run(&Assembly)
}

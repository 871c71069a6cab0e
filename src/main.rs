//! The `k3s-server` program.

use std::io::{self, BufRead as _, IsTerminal as _, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use k3s_server::admin::check::{NotAsked, Sources, Verdict, ask_cluster};
use k3s_server::admin::{self, Action, AdminError};
use k3s_server::cli::{self, Failure, Format, Programs, RepairArguments, WalArguments};
use k3s_server::client::Connection;
use k3s_server::config::{Config, Loaded};
use k3s_server::env::host;
use k3s_server::join::{Identity, flags};
use k3s_server::server;

/// What the command line hands over to the rest of the program.
struct Assembly;

impl Programs for Assembly {
    fn server(&self, loaded: Loaded) -> Result<(), Failure> {
        server::run(&loaded).map_err(|ended| {
            let mut failure = failure(ended.error);
            if ended.told {
                failure.text.clear();
            }
            failure
        })
    }

    fn refused(&self, problems: &str) -> bool {
        server::refuse(problems)
    }

    fn check(&self, config: &Config, server_named: bool) -> Verdict {
        let identity = Identity::load(&host::env(), &config.db_dir);
        let on_disk = identity.as_ref().ok().copied().flatten();
        let disk = || match &identity {
            Err(error) => Err(NotAsked::for_now(error)),
            Ok(_) => server::recorded_flags(&config.db_dir).map_err(NotAsked::for_now),
        };
        let cluster = || ask_cluster(config, Arc::new(server::Network));
        let seen = flags::seen(&host::env(), &config.db_dir).ok().flatten().unwrap_or_default();
        let others = seen.client_urls;
        let sources =
            Sources { on_disk, others, disk: &disk, cluster: &cluster, named: server_named };
        admin::check::check(config, &sources)
    }

    fn admin(
        &self,
        connection: &Connection,
        action: &Action,
        format: admin::Format,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        admin::run(connection, action, format, &confirm, out).map_err(|error| {
            let remedy = error.remedy();
            let failure = match error {
                // Decides itself whether that is one: `| head` has seen enough.
                AdminError::Io(error) => Failure::from(error),
                AdminError::Connection(_)
                | AdminError::Refused(_)
                | AdminError::Member(_)
                | AdminError::NotConfirmed => failed(error),
            };
            match remedy {
                Some(remedy) => failure.fix(remedy),
                None => failure,
            }
        })
    }

    fn status(
        &self,
        config: &Config,
        connection: &Connection,
        format: admin::Format,
        again: Option<Duration>,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        let serves = admin::status::run(config, connection, format, again, out).map_err(failed)?;
        // What is wrong was printed.
        if serves { Ok(()) } else { Err(failed("")) }
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

/// Asks on the terminal. Where there is none, nobody has agreed.
fn confirm(question: &str) -> bool {
    let (input, mut terminal) = (io::stdin(), io::stderr());
    if !input.is_terminal() {
        return false;
    }
    let mut answer = String::new();
    let asked = write!(terminal, "{question} [y/N] ").and_then(|()| terminal.flush());
    let read = asked.and_then(|()| input.lock().read_line(&mut answer));
    read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
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

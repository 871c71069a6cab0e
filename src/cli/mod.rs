//! Understands the command line, does the small commands itself and hands the large ones over.
//!
//! # Shape
//!
//! [`arguments`] builds the parser from the table of keys and turns arguments into a [`Command`]. [`run`]
//! carries it out. Whatever needs the rest of the program (the daemon, the log reader) is behind [`Programs`],
//! so that this module is tested without them.
//!
//! # Invariants
//!
//! - Exit status: see [`Exit`]. It is decided here and nowhere else.
//! - Nothing printed here holds the text of a secret.
//!
//! # Not here
//!
//! What values mean (`config`), what the daemon does (`server`).

pub mod arguments;
pub mod man;
mod report;
mod world;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use crate::admin::check::Verdict;
use crate::admin::{self, Action};
use crate::client::{self, Connection};
use crate::config::{self, Config, Given, Loaded, Request};
use crate::env::host;
use crate::pki::Paths;
use crate::systemd::health::Health;
use crate::systemd::{self, Phases};

pub use world::World;

/// Below `db-dir`.
const TOKEN_FILE: &str = "token";

/// What was asked for.
#[derive(Debug)]
pub enum Command {
    /// Run the daemon.
    Server(Vec<Given>),
    /// Check the configuration, and whether it fits the cluster.
    Check(Vec<Given>, Format),
    /// Show how this server is.
    Status(Vec<Given>, Target, admin::Format, Option<Duration>),
    /// Tell whether this release works here.
    Health(PathBuf, Duration),
    /// Write the man pages into a directory.
    Man(PathBuf),
    /// Ask a running server.
    Admin(Vec<Given>, Target, Action, admin::Format),
    /// Print where the token is, or the token.
    Token(Vec<Given>, bool),
    /// Print the configuration with origins.
    ConfigShow(Vec<Given>, Show),
    /// Look for damage in a log.
    WalVerify(WalArguments),
    /// Print what a log holds.
    WalDump(WalArguments),
    /// Begin a damaged log anew.
    WalRepair(RepairArguments),
    /// Print the version.
    Version,
    /// Print a completion script.
    Completion(clap_complete::Shell),
    /// Print this text: help that was asked for.
    Help(String),
}

/// Arguments of `wal verify` and `wal dump`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalArguments {
    /// The directory of a node (`db-dir`), running or not.
    pub directory: PathBuf,
    /// Form of the output.
    pub format: Format,
}

/// The server to ask, as far as it was named. What is left out comes from the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// `--endpoint`
    pub endpoints: Vec<String>,
    /// `--cacert`
    pub authority: Option<PathBuf>,
    /// `--cert`
    pub certificate: Option<PathBuf>,
    /// `--key`
    pub key: Option<PathBuf>,
}

/// Arguments of `wal repair`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepairArguments {
    /// The directory of a stopped node (`db-dir`).
    pub directory: PathBuf,
    /// Whether acknowledged writes may be given up.
    pub accept_data_loss: bool,
}

/// Form of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Arguments of `config show`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Show {
    /// Form of the output.
    pub format: Format,
    /// Whether keys at their defaults are shown too.
    pub all: bool,
}

/// The parts of the program that are too large for this module.
pub trait Programs {
    /// Runs the daemon until it is told to stop. Warnings are the daemon's to log.
    fn server(&self, loaded: Loaded) -> Result<(), Failure>;

    /// Tells the journal that the daemon's configuration cannot be used; `false` where there is none, so that it is printed.
    fn refused(&self, problems: &str) -> bool;

    /// What a start with this configuration would do, and whether its flags are the cluster's. With `server_named`, the cluster
    /// of `server` is meant, whatever is on disk.
    fn check(&self, config: &Config, server_named: bool) -> Verdict;

    /// Asks a running server.
    fn admin(
        &self,
        connection: &Connection,
        action: &Action,
        format: admin::Format,
        out: &mut dyn Write,
    ) -> Result<(), Failure>;

    /// Shows how the server of this host is, running or not; with `again` over and over.
    fn status(
        &self,
        config: &Config,
        connection: &Connection,
        format: admin::Format,
        again: Option<Duration>,
        out: &mut dyn Write,
    ) -> Result<(), Failure>;

    /// Looks for damage in the log of a node.
    fn wal_verify(&self, arguments: &WalArguments, out: &mut dyn Write) -> Result<(), Failure>;

    /// Prints every committed write of a node's log.
    fn wal_dump(&self, arguments: &WalArguments, out: &mut dyn Write) -> Result<(), Failure>;

    /// Begins the damaged log of a stopped node anew.
    fn wal_repair(&self, arguments: &RepairArguments, out: &mut dyn Write) -> Result<(), Failure>;
}

/// Why a command did not do what it should.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// Whether starting again could help.
    pub exit: Exit,
    /// What is wrong.
    pub text: String,
    /// What to do.
    pub fix: Option<String>,
}

impl Failure {
    /// Something went wrong that may go right next time.
    pub fn failed(text: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, text: text.into(), fix: None }
    }

    /// The configuration must change first: the unit is not restarted.
    pub fn configuration(text: impl Into<String>) -> Self {
        Self { exit: Exit::Configuration, text: text.into(), fix: None }
    }

    /// Adds what to do.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl From<io::Error> for Failure {
    /// An output that cannot be written.
    fn from(error: io::Error) -> Self {
        // `| head` has seen enough; that is no failure.
        let exit =
            if error.kind() == io::ErrorKind::BrokenPipe { Exit::Done } else { Exit::Failed };
        Self { exit, text: format!("cannot write the output: {error}"), fix: None }
    }
}

/// How a command ended: the contract with systemd and with scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It did what was asked.
    Done,
    /// It failed; trying again may help.
    Failed,
    /// The command line makes no sense (`EX_USAGE`). The unit is not restarted.
    Usage,
    /// The configuration is wrong (`EX_CONFIG`). The unit is not restarted.
    Configuration,
}

impl Exit {
    /// The process' exit status. 64 and 78 are in `RestartPreventExitStatus=` of the unit.
    pub const fn status(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 64,
            Self::Configuration => 78,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.status())
    }
}

/// Runs the program with the arguments, environment and streams of this process.
pub fn run(programs: &dyn Programs) -> ExitCode {
    let (mut out, mut err) = (io::stdout(), io::stderr());
    run_in(&World::of_process(), programs, &mut out, &mut err).into()
}

/// Runs the program in a world of the caller's choice.
pub fn run_in(
    world: &World,
    programs: &dyn Programs,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Exit {
    let result = match arguments::parse(&world.arguments, world.width) {
        Ok(command) => carry_out(command, world, programs, out).and_then(|()| Ok(out.flush()?)),
        Err(failure) => Err(failure),
    };
    let Err(failure) = result else {
        return Exit::Done;
    };
    if failure.exit != Exit::Done && !failure.text.is_empty() {
        let fix = failure.fix.map_or(String::new(), |fix| format!("\n  fix: {fix}"));
        // Nobody is left to tell if this cannot be written either.
        drop(writeln!(err, "{}{fix}", failure.text));
    }
    failure.exit
}

fn carry_out(
    command: Command,
    world: &World,
    programs: &dyn Programs,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    match command {
        Command::Server(given) => server(given, world, programs),
        Command::Check(given, format) => check(given, format, world, programs, out),
        Command::Admin(given, target, action, format) => {
            programs.admin(&connection(given, target, world)?, &action, format, out)
        }
        Command::Status(given, target, format, again) => {
            let config = load(given.clone(), world)?.config;
            let connection = connection(given, target, world)?;
            programs.status(&config, &connection, format, again, out)
        }
        Command::Health(directory, patience) => health(&directory, patience, out),
        Command::Man(directory) => Ok(man::write(&directory)?),
        Command::Token(given, show) => token(&load(given, world)?.config, show, out),
        Command::ConfigShow(given, show) => {
            Ok(report::config(&load(given, world)?.config, show, out)?)
        }
        Command::WalVerify(arguments) => programs.wal_verify(&arguments, out),
        Command::WalDump(arguments) => programs.wal_dump(&arguments, out),
        Command::WalRepair(arguments) => programs.wal_repair(&arguments, out),
        Command::Version => Ok(writeln!(out, "k3s-server version {}", env!("CARGO_PKG_VERSION"))?),
        Command::Completion(shell) => Ok(out.write_all(&arguments::completion(shell))?),
        Command::Help(text) => Ok(out.write_all(text.as_bytes())?),
    }
}

/// A start that is refused leaves behind why, for `health` and `status`.
fn server(given: Vec<Given>, world: &World, programs: &dyn Programs) -> Result<(), Failure> {
    match load(given, world) {
        Ok(loaded) => programs.server(loaded),
        Err(mut refusal) => {
            Phases::from_environment().failed(refusal.exit.status(), refusal.text.clone());
            if programs.refused(&refusal.text) {
                refusal.text.clear();
            }
            Err(refusal)
        }
    }
}

fn check(
    given: Vec<Given>,
    format: Format,
    world: &World,
    programs: &dyn Programs,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let server_named = given.iter().any(|given| given.key.name == "server");
    let result = config::load(&request(given, world));
    let verdict = result.as_ref().ok().map(|loaded| programs.check(&loaded.config, server_named));
    report::check(&result, verdict.as_ref(), format, out)?;
    match verdict {
        Some(verdict) if verdict.is_good() => Ok(()),
        Some(verdict) if !verdict.is_configuration() => Err(Failure::failed("")),
        Some(_) | None => Err(Failure::configuration("")),
    }
}

/// Where to ask, and with which files. A configuration that is wrong is no obstacle if everything was named.
fn connection(given: Vec<Given>, target: Target, world: &World) -> Result<Connection, Failure> {
    let Target { endpoints, authority, certificate, key } = target;
    if let (false, Some(authority), Some(certificate), Some(key)) =
        (endpoints.is_empty(), authority.clone(), certificate.clone(), key.clone())
    {
        return Ok(Connection { endpoints, files: Paths { authority, certificate, key } });
    }
    let mut connection = Connection::of(&load(given, world)?.config);
    let files = &mut connection.files;
    for (file, named) in [
        (&mut files.authority, authority),
        (&mut files.certificate, certificate),
        (&mut files.key, key),
    ] {
        if let Some(named) = named {
            *file = named;
        }
    }
    if !endpoints.is_empty() {
        connection.endpoints = endpoints;
    }
    Ok(connection)
}

/// Exit status 0: this release may stay on this server. 1: it is what is broken.
fn health(directory: &Path, patience: Duration, out: &mut dyn Write) -> Result<(), Failure> {
    let clock = host::env().clock;
    match client::block_on(systemd::health::watch(directory, &*clock, patience))? {
        Health::Well(why) => Ok(writeln!(out, "well: {why}")?),
        Health::Broken(why) => Err(Failure::failed(format!("broken: {why}"))
            .fix("`journalctl -u k3s-server -b` has the details; an image with two slots goes back to the other one")),
    }
}

/// Its place, or itself if that was asked for in so many words.
fn token(config: &Config, show: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let path = config.db_dir.join(TOKEN_FILE);
    if !show {
        return Ok(writeln!(out, "{}", path.display())?);
    }
    let text = std::fs::read_to_string(&path).map_err(|error| {
        let fix = if error.kind() == io::ErrorKind::NotFound {
            "the first start makes it; on a server that runs, check `db-dir`"
        } else {
            "run this as root or as the user that runs k3s-server"
        };
        Failure::failed(format!("{}: {error}", path.display())).fix(fix)
    })?;
    Ok(writeln!(out, "{}", text.trim_end())?)
}

fn request(given: Vec<Given>, world: &World) -> Request {
    Request {
        command_line: given,
        environment: world.variables.clone(),
        host: world.host.clone(),
        paths: world.paths.clone(),
    }
}

fn load(given: Vec<Given>, world: &World) -> Result<Loaded, Failure> {
    config::load(&request(given, world))
        .map_err(|problems| Failure::configuration(problems.to_string()))
}

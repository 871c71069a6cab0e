//! Builds the parser from the table of keys and reads the command line with it.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches};
use clap_complete::Shell;

use crate::config::keys::{KEYS, find};
use crate::config::{Given, Key, Kind, Repeat};

use super::{Command, Exit, Failure, Format, RepairArguments, Show, Target, WalArguments};
use crate::admin::{self, Action};
use crate::critical::Flag;
use crate::systemd::{health, phase};

const NAME: &str = "k3s-server";

/// For the shell to offer.
const CRITICAL: &[&str] = &Flag::NAMES;

/// Widest help text, whatever the terminal.
const WIDTH_MAX: usize = 100;

const AFTER_HELP: &str = "Exit status: 0 done, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Reads the command line.
pub fn parse(arguments: &[OsString], width: Option<usize>) -> Result<Command, Failure> {
    let matches = match parser(width).try_get_matches_from(with_two_dashes(arguments)) {
        Ok(matches) => matches,
        Err(error) => return answer(&error),
    };
    Ok(match matches.subcommand() {
        Some(("server", matches)) => Command::Server(given(matches)),
        Some(("check", matches)) => Command::Check(given(matches), format(matches)),
        Some(("config", matches)) => match matches.subcommand() {
            Some(("show", matches)) => {
                let show = Show { format: format(matches), all: matches.get_flag("all") };
                Command::ConfigShow(given(matches), show)
            }
            _ => unreachable!("clap asks for a subcommand of config"),
        },
        Some(("wal", matches)) => match matches.subcommand() {
            Some(("verify", matches)) => Command::WalVerify(wal(matches)),
            Some(("dump", matches)) => Command::WalDump(wal(matches)),
            Some(("repair", matches)) => Command::WalRepair(RepairArguments {
                directory: directory(matches),
                accept_data_loss: matches.get_flag(ACCEPT_DATA_LOSS),
            }),
            _ => unreachable!("clap asks for a subcommand of wal"),
        },
        Some(("status", matches)) => status_command(matches),
        Some(("health", matches)) => {
            let directory = matches.get_one::<PathBuf>("runtime-dir").cloned();
            let seconds = matches.get_one::<u64>("timeout").copied();
            let patience = seconds.map_or(health::PATIENCE, Duration::from_secs);
            Command::Health(directory.unwrap_or_else(|| phase::DIRECTORY.into()), patience)
        }
        Some(("man", matches)) => Command::Man(directory(matches)),
        Some(("flags", matches)) => flags_command(matches),
        Some(("member", matches)) => member_command(matches),
        Some(("token", matches)) => Command::Token(given(matches), matches.get_flag("show")),
        Some(("completion", matches)) => {
            let shell = matches.get_one::<String>("shell").map(String::as_str);
            Command::Completion(match shell {
                Some("zsh") => Shell::Zsh,
                Some("fish") => Shell::Fish,
                _ => Shell::Bash,
            })
        }
        Some(("version", _)) => Command::Version,
        _ => unreachable!("clap asks for a subcommand"),
    })
}

fn flags_command(matches: &ArgMatches) -> Command {
    match matches.subcommand() {
        Some(("show", matches)) => admin(matches, Action::FlagsShow),
        Some(("set", matches)) => {
            let (flag, value) = (word(matches, "flag"), word(matches, "value"));
            admin(matches, Action::FlagsSet { flag, value })
        }
        _ => unreachable!("clap asks for a subcommand of flags"),
    }
}

fn member_command(matches: &ArgMatches) -> Command {
    match matches.subcommand() {
        Some(("list", matches)) => admin(matches, Action::MemberList),
        Some(("remove", matches)) => {
            let (member, yes) = (word(matches, "member"), matches.get_flag("yes"));
            admin(matches, Action::MemberRemove { member, yes })
        }
        Some(("promote", matches)) => {
            admin(matches, Action::MemberPromote { member: word(matches, "member") })
        }
        _ => unreachable!("clap asks for a subcommand of member"),
    }
}

fn status_command(matches: &ArgMatches) -> Command {
    let again = matches.get_one::<u64>("watch").map(|seconds| Duration::from_secs(*seconds));
    Command::Status(given(matches), target(matches), admin_format(matches), again)
}

fn word(matches: &ArgMatches, name: &str) -> String {
    matches.get_one::<String>(name).cloned().unwrap_or_default()
}

fn admin(matches: &ArgMatches, action: Action) -> Command {
    Command::Admin(given(matches), target(matches), action, admin_format(matches))
}

fn target(matches: &ArgMatches) -> Target {
    let path = |name: &str| matches.get_one::<PathBuf>(name).cloned();
    let endpoints = matches.get_many::<String>("endpoint").into_iter().flatten();
    let endpoints = endpoints.flat_map(|text| text.split(',')).filter(|text| !text.is_empty());
    Target {
        endpoints: endpoints.map(str::to_owned).collect(),
        authority: path("cacert"),
        certificate: path("cert"),
        key: path("key"),
    }
}

fn admin_format(matches: &ArgMatches) -> admin::Format {
    let output = matches.try_get_one::<String>("output").ok().flatten();
    match output.map(String::as_str) {
        Some("json") => admin::Format::Json,
        Some("yaml") => admin::Format::Yaml,
        _ => admin::Format::Table,
    }
}

/// Help and version are answers; everything else is wrong usage.
fn answer(error: &clap::Error) -> Result<Command, Failure> {
    let text = error.render().to_string();
    if error.kind() == ErrorKind::DisplayHelp {
        Ok(Command::Help(text))
    } else if error.kind() == ErrorKind::DisplayVersion {
        Ok(Command::Version)
    } else {
        Err(Failure { exit: Exit::Usage, text: text.trim_end().to_owned(), fix: None })
    }
}

/// The completion script of a shell.
pub fn completion(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut parser(None), NAME, &mut script);
    script
}

/// The parser. Every subcommand that reads the configuration takes all keys as flags.
pub fn parser(width: Option<usize>) -> clap::Command {
    let parser = clap::Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about("etcd-compatible, replicated datastore for highly available K3s on SD cards")
        .after_help(AFTER_HELP)
        .subcommand_required(true)
        .max_term_width(WIDTH_MAX)
        .subcommands([
            with_keys(clap::Command::new("server"), true)
                .about("Run the datastore server")
                .long_about(
                    "Run the datastore server. Takes the configuration file and the flags of `k3s server`; those \
                     that concern upstream k3s only are checked and kept for it.",
                )
                .after_help(AFTER_HELP),
            with_keys(clap::Command::new("check"), false)
                .about("Check the configuration, and whether it fits the cluster, without starting; takes the flags of server")
                .long_about(
                    "Check the configuration without starting anything; takes the flags of server. If it is right by itself, its \
                     critical flags are compared with the cluster's: those of the server that runs here, else of the datastore \
                     on this disk, else of the cluster that `server` and `token` lead to. With --server on the command line, \
                     that cluster is asked in any case. Nothing is changed anywhere.",
                )
                .after_help(AFTER_HELP)
                .arg(output()),
            clap::Command::new("config")
                .about("Look at the configuration")
                .subcommand_required(true)
                .disable_help_subcommand(true)
                .subcommand(
                    with_keys(clap::Command::new("show"), false)
                        .about("Print the merged configuration and where each value comes from, without secrets")
                        .arg(output())
                        .arg(
                            Arg::new("all")
                                .long("all")
                                .action(ArgAction::SetTrue)
                                .help("Show defaults too"),
                        ),
                ),
            status_parser(),
            health_parser(),
            wal_parser(),
            flags_parser(),
            member_parser(),
            with_keys(clap::Command::new("token"), false)
                .about("Print where the token of this server's cluster is")
                .arg(
                    Arg::new("show")
                        .long("show")
                        .action(ArgAction::SetTrue)
                        .help("Print the token itself: with it, servers and agents can join"),
                ),
            clap::Command::new("man")
                .about("Write the man pages")
                .hide(true)
                .arg(directory_argument().help("Directory to write them to")),
            clap::Command::new("version").about("Print the version"),
            clap::Command::new("completion").about("Print a completion script").arg(
                Arg::new("shell").required(true).value_name("SHELL").value_parser(["bash", "zsh", "fish"]),
            ),
        ]);
    match width {
        Some(width) => parser.term_width(width),
        None => parser,
    }
}

fn status_parser() -> clap::Command {
    on_server(clap::Command::new("status"))
        .about("Print how this server is: cluster, log, card, what the board lacks; also when it does not run")
        .long_about(
            "Print how this server is: its cluster and members, its log and how fast the card takes it, what was written today, \
             the card's model and health where the kernel tells them, and what the board lacks, with the file to edit. When \
             the server does not answer, what it said last and what its disk says.",
        )
        .arg(formats(&["table", "json"]))
        .arg(
            Arg::new("watch")
                .long("watch")
                .short('w')
                .value_name("SECONDS")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("2")
                .value_parser(clap::value_parser!(u64).range(1..=3600))
                .help("Print it again and again, every 2 s unless told otherwise"),
        )
        .after_help("Exit status: 0 it serves, 1 it does not, 64 wrong usage, 78 wrong configuration.")
}

fn health_parser() -> clap::Command {
    clap::Command::new("health")
        .about("Tell, after an update, whether this release works on this server")
        .long_about(
            "Tell, after an update, whether this release works on this server: for systems that go back to the old image \
             otherwise (see k3s-server-health.service). A configuration that is refused, a log or a state that does not open, \
             certificates that cannot be used are this release's fault. Other servers that are down are not: a server that has \
             its own in order and waits for them is well.",
        )
        .arg(
            Arg::new("timeout")
                .long("timeout")
                .value_name("SECONDS")
                .value_parser(clap::value_parser!(u64).range(1..=86_400))
                .help("How long to look before what is not well counts as broken [default: 300]"),
        )
        .arg(
            Arg::new("runtime-dir")
                .long("runtime-dir")
                .value_name("DIR")
                .value_parser(clap::value_parser!(PathBuf))
                .help("The unit's runtime directory [default: /run/k3s-server]"),
        )
        .after_help("Exit status: 0 it works, or waits for other servers; 1 it is broken; 64 wrong usage.")
}

fn wal_parser() -> clap::Command {
    clap::Command::new("wal")
        .about("Inspect a log, of a running or a stopped node, or repair a damaged one")
        .subcommand_required(true)
        .disable_help_subcommand(true)
        .subcommand(
            on_directory(clap::Command::new("verify"))
                .about("Check every segment and frame and report the first damage"),
        )
        .subcommand(
            on_directory(clap::Command::new("dump")).about("Print every committed write in order"),
        )
        .subcommand(repair())
}

fn flags_parser() -> clap::Command {
    clap::Command::new("flags")
        .about("The flags that are the same on all servers: look at them, change one")
        .subcommand_required(true)
        .disable_help_subcommand(true)
        .subcommand(
            on_server(clap::Command::new("show"))
                .about("Print the flags of the cluster: since when, set by whom, and where this server differs")
                .arg(formats(&["table", "json", "yaml"]))
                .after_help(AFTER_HELP),
        )
        .subcommand(
            on_server(clap::Command::new("set"))
                .about("Give a flag another value in the whole cluster")
                .long_about(
                    "Give a flag another value in the whole cluster. Servers that run go on as they are; each needs the new value in \
                     its configuration at its next start. Networks, DNS address and domain of a living cluster cannot change.",
                )
                .arg(Arg::new("flag").required(true).value_name("FLAG").value_parser(AnyText(CRITICAL)).help("Its name"))
                .arg(
                    Arg::new("value")
                        .required(true)
                        .value_name("VALUE")
                        .allow_hyphen_values(true)
                        .help("As on the command line of server; \"\" for the default"),
                )
                .after_help(AFTER_HELP),
        )
}

fn member_parser() -> clap::Command {
    let member = || Arg::new("member").required(true).value_name("MEMBER").help("Its name or id");
    clap::Command::new("member")
        .about("The servers of the cluster: list them, remove or promote one")
        .subcommand_required(true)
        .disable_help_subcommand(true)
        .subcommand(
            on_server(clap::Command::new("list"))
                .about("Print the members: who leads, who answers, how far behind, and how many may fail")
                .arg(formats(&["table", "json"]))
                .after_help(AFTER_HELP),
        )
        .subcommand(
            on_server(clap::Command::new("remove"))
                .about("Remove a member for good; its card can join again as a new one")
                .arg(member())
                .arg(
                    Arg::new("yes")
                        .long("yes")
                        .short('y')
                        .action(ArgAction::SetTrue)
                        .help("Do not ask"),
                )
                .after_help(AFTER_HELP),
        )
        .subcommand(
            on_server(clap::Command::new("promote"))
                .about("Give a learner its vote now; the leader does this by itself when the learner has caught up")
                .arg(member())
                .after_help(AFTER_HELP),
        )
}

/// Adds what leads to a running server.
fn on_server(command: clap::Command) -> clap::Command {
    let file = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help(help)
            .help_heading("Server to ask")
    };
    with_keys(command, false)
        .mut_arg("db-dir", |flag| flag.hide(false))
        .arg(
            Arg::new("endpoint")
                .long("endpoint")
                .value_name("URL")
                .action(ArgAction::Append)
                .help("Client API of any server [default: this host's own]")
                .help_heading("Server to ask"),
        )
        .arg(file("cacert", "Certificate authority [default: tls/ca.crt in db-dir]"))
        .arg(file("cert", "Client certificate [default: tls/client.crt in db-dir]"))
        .arg(file("key", "Its key [default: tls/client.key in db-dir]"))
}

/// Adds every key as a flag. Where they are not what the subcommand is about, only `config` is shown, and `-o`
/// is free for the form of the output.
fn with_keys(command: clap::Command, shown: bool) -> clap::Command {
    KEYS.iter().fold(command, |command, key| {
        let visible = !key.hidden && (shown || key.name == "config");
        let letter = key.short.filter(|letter| shown || *letter != 'o');
        command.arg(flag(key).short(letter).hide(!visible))
    })
}

fn flag(key: &'static Key) -> Arg {
    let mut flag = Arg::new(key.name)
        .long(key.name)
        .action(ArgAction::Append)
        .value_name(key.kind.placeholder())
        .help(help(key))
        .help_heading(key.group.heading());
    flag = if key.kind == Kind::Bool {
        flag.num_args(0..=1).require_equals(true).default_missing_value("true")
    } else {
        flag.num_args(1).allow_hyphen_values(true)
    };
    let words = if let Kind::OneOf(words) = key.kind { words } else { &[] };
    flag.value_parser(AnyText(words))
}

fn help(key: &Key) -> String {
    let mut help = key.help.to_owned();
    let default = if key.default_note.is_empty() { key.default } else { key.default_note };
    if !default.is_empty() && default != "false" {
        help.push_str(&format!(" [default: {default}]"));
    }
    if let Some(variable) = key.environment.first() {
        help.push_str(&format!(" [env: {variable}]"));
    }
    if key.repeat != Repeat::Once {
        help.push_str(" [list]");
    }
    if key.critical {
        help.push_str(" [same on all servers]");
    }
    help
}

fn output() -> Arg {
    Arg::new("output")
        .long("output")
        .short('o')
        .value_name("FORMAT")
        .value_parser(["text", "json"])
        .default_value("text")
        .help("Form of the output")
}

fn formats(names: &[&'static str]) -> Arg {
    Arg::new("output")
        .long("output")
        .short('o')
        .value_name("FORMAT")
        .value_parser(clap::builder::PossibleValuesParser::new(names))
        .default_value("table")
        .help("Form of the output")
}

fn on_directory(command: clap::Command) -> clap::Command {
    command.arg(output()).arg(directory_argument())
}

fn directory_argument() -> Arg {
    Arg::new("directory")
        .required(true)
        .value_name("DIR")
        .value_parser(clap::value_parser!(PathBuf))
        .help("Directory of the node (db-dir)")
}

const ACCEPT_DATA_LOSS: &str = "accept-data-loss";

fn repair() -> clap::Command {
    clap::Command::new("repair")
        .about("Begin the damaged log of a stopped node anew")
        .long_about(
            "Begin the damaged log of a stopped node anew. For the only server of a cluster: a node with others is \
             removed from the cluster and joins it again. What nothing is lost by, a start does by itself; this is for a \
             log whose damage hides acknowledged writes. Prints what is kept and what is lost, moves the damaged log to \
             wal.damaged-N beside it, and goes on with the state and what can be read of the log after it.",
        )
        .arg(directory_argument())
        .arg(
            Arg::new(ACCEPT_DATA_LOSS)
                .long(ACCEPT_DATA_LOSS)
                .action(ArgAction::SetTrue)
                .help("Give up acknowledged writes that cannot be read; without it they are only listed"),
        )
}

fn format(matches: &ArgMatches) -> Format {
    match matches.get_one::<String>("output").map(String::as_str) {
        Some("json") => Format::Json,
        _ => Format::Text,
    }
}

fn wal(matches: &ArgMatches) -> WalArguments {
    WalArguments { directory: directory(matches), format: format(matches) }
}

fn directory(matches: &ArgMatches) -> PathBuf {
    matches.get_one::<PathBuf>("directory").cloned().unwrap_or_default()
}

fn given(matches: &ArgMatches) -> Vec<Given> {
    KEYS.iter()
        .flat_map(|key| {
            let texts = matches.get_many::<String>(key.name).into_iter().flatten();
            texts.map(|text| Given::new(key, text)).collect::<Vec<_>>()
        })
        .collect()
}

/// K3s' flag library takes `-cluster-init` for `--cluster-init`; so do we, for whole names only.
fn with_two_dashes(arguments: &[OsString]) -> Vec<OsString> {
    let mut is_value = false;
    let mut only_values = false;
    let one = |argument: &OsString| {
        let text = argument.to_str().unwrap_or_default();
        if is_value || only_values {
            is_value = false;
            return argument.clone();
        }
        only_values = text == "--";
        let bare = text.trim_start_matches('-');
        let name = bare.split('=').next().unwrap_or_default();
        let key = find(name).filter(|_| text.starts_with('-'));
        is_value = key.is_some_and(|key| key.kind != Kind::Bool) && !bare.contains('=');
        match key {
            Some(key) if 1 < key.name.len() && !text.starts_with("--") => {
                OsString::from(format!("-{text}"))
            }
            _ => argument.clone(),
        }
    };
    arguments.iter().map(one).collect()
}

/// Takes any text, so that a wrong value is reported like one in a file; offers the right ones to the shell.
#[derive(Clone, Copy)]
struct AnyText(&'static [&'static str]);

impl TypedValueParser for AnyText {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        if self.0.is_empty() {
            return None;
        }
        Some(Box::new(self.0.iter().map(|word| PossibleValue::new(*word))))
    }
}

//! Builds the parser from the table of keys and reads the command line with it.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches};
use clap_complete::Shell;

use crate::config::keys::{KEYS, find};
use crate::config::{Given, Key, Kind, Repeat};

use super::{Command, Exit, Failure, Format, RepairArguments, Show, WalArguments};

const NAME: &str = "k3s-server";

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
                .about("Check the configuration without starting; takes the flags of server")
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
                .subcommand(repair()),
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

//! The command line as scripts and people see it: texts and exit statuses.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use expect_test::expect;
use k3s_server::admin::check::{Compared, NotAsked, Verdict};
use k3s_server::admin::{self, Action};
use k3s_server::cli::{
    self, Exit, Failure, Format, Programs, RepairArguments, WalArguments, World, arguments,
};
use k3s_server::client::Connection;
use k3s_server::config::keys::KEYS;
use k3s_server::config::{Config, Host, Loaded, Paths};
use k3s_server::critical::{CriticalFlags, FlagsError};
use k3s_server::join::{Plan, start_plan};
use tempfile::TempDir;

use crate::config::golden;

/// Stands where the daemon and the log reader are, and remembers what it was asked for.
#[derive(Default)]
struct Recorder {
    started: RefCell<Vec<Loaded>>,
    inspected: RefCell<Vec<WalArguments>>,
    answer: Option<fn() -> Failure>,
    asked: RefCell<Vec<(Connection, Action, admin::Format)>>,
    verdict: Option<fn(&Config) -> Verdict>,
}

impl Programs for Recorder {
    fn server(&self, loaded: Loaded) -> Result<(), Failure> {
        self.started.borrow_mut().push(loaded);
        self.answer.map_or(Ok(()), |failure| Err(failure()))
    }

    fn refused(&self, _problems: &str) -> bool {
        false
    }

    fn check(&self, config: &Config, _server_named: bool) -> Verdict {
        self.verdict.unwrap_or(|config| Verdict {
            plan: start_plan(None, config),
            flags: Compared::Nothing("nobody was asked"),
        })(config)
    }

    fn admin(
        &self,
        connection: &Connection,
        action: &Action,
        format: admin::Format,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        self.asked.borrow_mut().push((connection.clone(), action.clone(), format));
        Ok(writeln!(out, "asked")?)
    }

    fn status(
        &self,
        _config: &Config,
        _connection: &Connection,
        format: admin::Format,
        again: Option<Duration>,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        Ok(writeln!(out, "status {format:?} {again:?}")?)
    }

    fn wal_verify(&self, arguments: &WalArguments, out: &mut dyn Write) -> Result<(), Failure> {
        self.inspected.borrow_mut().push(arguments.clone());
        Ok(writeln!(out, "verified")?)
    }

    fn wal_dump(&self, arguments: &WalArguments, out: &mut dyn Write) -> Result<(), Failure> {
        self.inspected.borrow_mut().push(arguments.clone());
        Ok(writeln!(out, "{{}}")?)
    }

    fn wal_repair(&self, arguments: &RepairArguments, out: &mut dyn Write) -> Result<(), Failure> {
        let RepairArguments { directory, accept_data_loss } = arguments;
        Ok(writeln!(out, "repair {} {accept_data_loss}", directory.display())?)
    }
}

struct Outcome {
    exit: Exit,
    out: String,
    err: String,
}

struct Place {
    directory: TempDir,
    programs: Recorder,
    variables: BTreeMap<String, String>,
}

impl Place {
    fn new(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        fs::write(&path, config).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        Self { directory, programs: Recorder::default(), variables: BTreeMap::new() }
    }

    fn world(&self, line: &[&str]) -> World {
        World {
            arguments: std::iter::once("k3s-server")
                .chain(line.iter().copied())
                .map(OsString::from)
                .collect(),
            variables: self.variables.clone(),
            host: Host { name: Some("pi-1".to_owned()), address: None, token_credential: None },
            paths: Paths {
                default_file: self.directory.path().join("config.yaml"),
                upstream_file: self.directory.path().join("upstream.yaml"),
            },
            width: Some(100),
        }
    }

    fn run(&self, line: &[&str]) -> Outcome {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let exit = cli::run_in(&self.world(line), &self.programs, &mut out, &mut err);
        let text = |bytes| {
            let text = String::from_utf8(bytes).unwrap();
            text.replace(&format!("{}/", self.directory.path().display()), "")
        };
        Outcome { exit, out: text(out), err: text(err) }
    }
}

#[test]
fn help_texts_are_as_printed() {
    let place = Place::new("");
    for (line, file) in [
        (&["--help"][..], "help.txt"),
        (&["server", "--help"], "help-server.txt"),
        (&["check", "--help"], "help-check.txt"),
        (&["config", "show", "--help"], "help-config-show.txt"),
        (&["wal", "dump", "--help"], "help-wal-dump.txt"),
        (&["flags", "--help"], "help-flags.txt"),
        (&["flags", "show", "--help"], "help-flags-show.txt"),
        (&["flags", "set", "--help"], "help-flags-set.txt"),
        (&["member", "--help"], "help-member.txt"),
        (&["member", "remove", "--help"], "help-member-remove.txt"),
        (&["token", "--help"], "help-token.txt"),
        (&["status", "--help"], "help-status.txt"),
        (&["health", "--help"], "help-health.txt"),
        (&["wal", "repair", "--help"], "help-wal-repair.txt"),
    ] {
        let outcome = place.run(line);
        assert_eq!((outcome.exit, outcome.err.as_str()), (Exit::Done, ""), "{line:?}");
        golden(file).assert_eq(&outcome.out);
    }
}

#[test]
fn every_visible_key_is_in_the_help_of_server() {
    let help = Place::new("").run(&["server", "--help"]).out;
    for key in KEYS {
        let flag = format!("--{} ", key.name);
        let switch = format!("--{}[=", key.name);
        assert_eq!(help.contains(&flag) || help.contains(&switch), !key.hidden, "{}", key.name);
    }
}

#[test]
fn parser_is_sound() {
    arguments::parser(None).debug_assert();
}

#[test]
fn exit_statuses_are_the_contract() {
    let statuses = [Exit::Done, Exit::Failed, Exit::Usage, Exit::Configuration].map(Exit::status);

    assert_eq!(statuses, [0, 1, 64, 78]);
}

#[test]
fn wrong_usage_is_64_and_wrong_configuration_is_78() {
    for line in [
        &[][..],
        &["nonsense"],
        &["server", "--nonsense"],
        &["server", "stray"],
        &["server", "--token"],
        &["server", "--cluster-init", "false"],
        &["wal"],
        &["wal", "dump"],
        &["completion", "tcsh"],
        &["check", "-o", "xml"],
        &["flags"],
        &["flags", "set", "disable"],
        &["member", "remove"],
        &["member", "list", "-o", "yaml"],
    ] {
        let outcome = Place::new("").run(line);
        assert_eq!(outcome.exit, Exit::Usage, "{line:?}");
        assert!(!outcome.err.is_empty() && outcome.out.is_empty(), "{line:?}");
    }
    let outcome = Place::new("cluster-cidr: x\n").run(&["server"]);
    assert_eq!((outcome.exit, outcome.out.as_str()), (Exit::Configuration, ""));
    assert!(
        outcome.err.starts_with("config.yaml:1:15: cluster-cidr is not a network"),
        "{}",
        outcome.err
    );
    assert_eq!(Place::new("").run(&["server", "--flannel-backend=x"]).exit, Exit::Configuration);
}

#[test]
fn server_hands_the_checked_configuration_over() {
    let place = Place::new("disable: traefik\n");
    let outcome = place.run(&[
        "server",
        "-cluster-init",
        "--disable",
        "servicelb",
        "-t",
        "x",
        "--debug=false",
        "--kubelet-arg",
        "--v=2",
        "--tls-san=a,b",
        "-tls-san",
        "c",
        "-c=",
        "--v",
        "3",
    ]);

    assert_eq!((outcome.exit, outcome.err.as_str()), (Exit::Done, ""));
    let started = place.programs.started.borrow();
    let config = &started[0].config;
    assert_eq!(config.texts("disable"), ["servicelb"], "-c= turned the file off");
    assert!(config.boolean("cluster-init") && !config.debug);
    assert_eq!(config.tls_sans, ["a", "b", "c"]);
    assert_eq!(config.texts("kubelet-arg"), ["--v=2"]);
    assert_eq!(config.text("v"), "3");
}

#[test]
fn failure_of_the_daemon_decides_the_exit_status() {
    let mut place = Place::new("");
    place.programs.answer = Some(|| Failure::failed("the card is gone").fix("replace it"));
    let outcome = place.run(&["server"]);

    assert_eq!(
        (outcome.exit, outcome.err.as_str()),
        (Exit::Failed, "the card is gone\n  fix: replace it\n")
    );
    place.programs.answer = Some(|| Failure::configuration("flags differ"));
    assert_eq!(place.run(&["server"]).exit, Exit::Configuration);
}

const MIXED: &str = "token: canary-secret\ncluster-init: true\ndisable: [traefik]\nclustr-dns: 1\netcd-arg: [max-txn-ops=1024, pre-vote]\n";

#[test]
fn check_reports_and_starts_nothing() {
    let good = Place::new(MIXED);
    let text = good.run(&["check"]);
    let json = good.run(&["check", "-o", "json"]);
    let bad = Place::new("cluster-cidr: [10.42.0.1/16]\nserver: http://x\nnope: 1\n");
    let bad_text = bad.run(&["check"]);
    let bad_json = bad.run(&["check", "--output=json"]);

    assert_eq!(
        [text.exit, json.exit, bad_text.exit, bad_json.exit].map(Exit::status),
        [0, 0, 78, 78]
    );
    assert!(good.programs.started.borrow().is_empty());
    for outcome in [&text, &json, &bad_text, &bad_json] {
        assert_eq!(outcome.err, "");
    }
    let all = format!("{}\n{}\n{}\n{}", text.out, json.out, bad_text.out, bad_json.out);
    golden("check.txt").assert_eq(&all);
}

/// The width of a column depends on the length of the test's own directory.
fn narrow(text: &str) -> String {
    let line = |line: &str| {
        let indent = &line[..line.len() - line.trim_start().len()];
        format!("{indent}{}\n", line.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    text.lines().map(line).collect()
}

/// The verdict of a cluster in which somebody disabled traefik and chose another domain.
fn differs(config: &Config) -> Verdict {
    let cluster = || {
        let place = Place::new("disable: traefik\ncluster-domain: k8s.local\n");
        let exit = place.run(&["server"]).exit;
        assert_eq!(exit, Exit::Done);
        let started = place.programs.started.borrow();
        let founder = CriticalFlags::of(&started[0].config);
        founder.found(UNIX_EPOCH + Duration::from_secs(1_785_931_200), "pi-1").0
    };
    let result = CriticalFlags::of(config).matches(&cluster()).map(|_matched| ());
    let source = "the server that runs here (pi-2)".to_owned();
    Verdict {
        plan: Ok(Plan::Continue { ignored: Vec::new() }),
        flags: Compared::With { source, result: result.map_err(FlagsError::Differ) },
    }
}

#[test]
fn check_shows_every_flag_that_differs_and_the_lines_to_write() {
    let mut place = Place::new("debug: true\ndisable: [servicelb]\n");
    place.programs.verdict = Some(differs);
    let text = place.run(&["check"]);
    let json = place.run(&["check", "-o", "json"]);

    assert_eq!([text.exit, json.exit], [Exit::Configuration; 2]);
    golden("check-differs.txt").assert_eq(&format!("{}\n{}", narrow(&text.out), json.out));
    let fixed = Place::new("debug: true\ndisable: [traefik]\ncluster-domain: k8s.local\n");
    let fixed =
        Place { programs: Recorder { verdict: Some(differs), ..Recorder::default() }, ..fixed };
    let text = fixed.run(&["check"]);
    assert_eq!((text.exit, text.err.as_str()), (Exit::Done, ""));
    assert!(
        text.out.ends_with("the critical flags are those of the server that runs here (pi-2)\n")
    );
}

#[test]
fn check_that_cannot_ask_is_a_failure_and_not_the_configurations_fault() {
    let mut place = Place::new("");
    place.programs.verdict = Some(|config| Verdict {
        plan: start_plan(None, config),
        flags: Compared::Unavailable {
            source: "pi-1".to_owned(),
            reason: NotAsked::for_now("refused"),
        },
    });
    let outcome = place.run(&["check"]);

    assert_eq!(outcome.exit, Exit::Failed);
    assert!(outcome.out.ends_with("critical flags not compared: pi-1 cannot be asked: refused\n"));
}

#[test]
fn check_tells_what_cannot_start_on_an_empty_disk() {
    let place = Place::new("cluster-init: true\nserver: https://pi-9:6443\n");
    let text = place.run(&["check"]);
    let json = place.run(&["check", "-o", "json"]);

    assert_eq!([text.exit, json.exit], [Exit::Configuration; 2]);
    assert!(text.out.contains("config.yaml:2:9: server needs token or token-file to join"));
    assert!(text.out.ends_with("the configuration is not valid: 2 errors\n"), "{}", text.out);
    assert!(json.out.contains("\"valid\": false") && json.out.contains("contradict each other"));
}

#[test]
fn commands_to_a_server_know_the_way_from_the_configuration() {
    let place = Place::new("db-dir: /d\nclient-listen: [0.0.0.0:7379, \"[::]:7379\"]\n");
    for line in [
        &["flags", "show"][..],
        &["flags", "set", "disable", "traefik,-x", "--db-dir=/other"],
        &["member", "list", "-o", "json"],
        &["member", "remove", "pi-2", "--endpoint", "https://a:1,b:2", "--endpoint=c:3", "--yes"],
        &["member", "promote", "c1", "--cert=/c", "--key=/k"],
        &[
            "flags",
            "show",
            "-o",
            "yaml",
            "--endpoint=https://x:1",
            "--cacert=/a",
            "--cert=/c",
            "--key=/k",
        ],
    ] {
        let outcome = place.run(line);
        assert_eq!(
            (outcome.exit, outcome.out.as_str()),
            (Exit::Done, "asked\n"),
            "{line:?} {}",
            outcome.err
        );
    }
    let asked = place.programs.asked.borrow();
    let text: Vec<String> = asked
        .iter()
        .map(|(connection, action, format)| {
            let files = &connection.files;
            let files = [&files.authority, &files.certificate, &files.key]
                .map(|path| path.display().to_string());
            format!(
                "{action:?} {format:?}\n  {} {}",
                connection.endpoints.join(" "),
                files.join(" ")
            )
        })
        .collect();
    expect![[r#"
        FlagsShow Table
          https://127.0.0.1:7379 https://[::1]:7379 /d/tls/ca.crt /d/tls/client.crt /d/tls/client.key
        FlagsSet { flag: "disable", value: "traefik,-x" } Table
          https://127.0.0.1:7379 https://[::1]:7379 /other/tls/ca.crt /other/tls/client.crt /other/tls/client.key
        MemberList Json
          https://127.0.0.1:7379 https://[::1]:7379 /d/tls/ca.crt /d/tls/client.crt /d/tls/client.key
        MemberRemove { member: "pi-2", yes: true } Table
          https://a:1 b:2 c:3 /d/tls/ca.crt /d/tls/client.crt /d/tls/client.key
        MemberPromote { member: "c1" } Table
          https://127.0.0.1:7379 https://[::1]:7379 /d/tls/ca.crt /c /k
        FlagsShow Yaml
          https://x:1 /a /c /k"#]].assert_eq(&text.join("\n"));
}

#[test]
fn a_server_named_with_its_files_needs_no_configuration() {
    let place = Place::new("cluster-cidr: nonsense\n");
    let line = ["member", "list", "--endpoint=x:1", "--cacert=/a", "--cert=/c"];
    assert_eq!(place.run(&line).exit, Exit::Configuration);
    let all = [&line[..], &["--key=/k"]].concat();
    assert_eq!(place.run(&all).exit, Exit::Done);
}

#[test]
fn token_shows_its_place_and_itself_only_when_asked() {
    let place = Place::new("");
    let directory = place.directory.path().to_str().unwrap().to_owned();
    let db_dir = format!("--db-dir={directory}");
    let missing = place.run(&["token", "--show", &db_dir]);
    assert_eq!(missing.exit, Exit::Failed);
    assert!(missing.err.contains("fix: the first start makes it"), "{}", missing.err);

    fs::write(place.directory.path().join("token"), "K10ab::server:canary\n").unwrap();
    assert_eq!(place.run(&["token", &db_dir]).out, "token\n");
    assert_eq!(place.run(&["token", "--show", &db_dir]).out, "K10ab::server:canary\n");
}

#[test]
fn check_takes_the_flags_of_server() {
    let place = Place::new("");

    assert_eq!(place.run(&["check", "--cluster-init", "--disable=traefik"]).exit, Exit::Done);
    assert_eq!(place.run(&["check", "--disable=nope"]).exit, Exit::Configuration);
    let other = place.directory.path().join("other.yaml");
    assert_eq!(
        place.run(&["check", "--config", other.to_str().unwrap()]).exit,
        Exit::Configuration
    );
}

#[test]
fn config_show_names_origins_and_hides_secrets() {
    let mut place = Place::new(MIXED);
    place.variables.insert("K3S_NODE_NAME".to_owned(), "pi-9".to_owned());
    let text = place.run(&["config", "show", "--tls-san=a"]);
    let json = place.run(&["config", "show", "-o", "json"]);
    let all = place.run(&["config", "show", "--all"]);

    assert_eq!([text.exit, json.exit, all.exit], [Exit::Done; 3]);
    golden("config-show.txt").assert_eq(&format!("{}\n{}", text.out, json.out));
    for outcome in [&text, &json, &all] {
        assert!(!outcome.out.contains("canary"), "{}", outcome.out);
    }
    for key in KEYS.iter().filter(|key| key.name != "config" && !key.help.starts_with("Old name")) {
        assert!(all.out.contains(&format!("\n{}: ", key.name)), "{}", key.name);
    }
}

#[test]
fn what_config_show_prints_is_a_configuration() {
    let shown = Place::new("disable: [traefik]\nnode-label: ['a=b c']\nwrite-kubeconfig-mode: '0644'\nserver: https://x:6443\ntoken-file: /t\n")
        .run(&["config", "show", "--all"])
        .out;
    let again = Place::new(&shown).run(&["config", "show", "--all"]).out;
    let values = |text: &str| {
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split("  # ").next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };

    assert_eq!(values(&again), values(&shown));
}

#[test]
fn wal_commands_get_directory_and_format() {
    let place = Place::new("not: read\n");
    let verify = place.run(&["wal", "verify", "/x"]);
    let dump = place.run(&["wal", "dump", "-o", "json", "/y"]);

    assert_eq!((verify.exit, verify.out.as_str()), (Exit::Done, "verified\n"));
    assert_eq!((dump.exit, dump.out.as_str()), (Exit::Done, "{}\n"));
    let inspected = place.programs.inspected.borrow();
    assert_eq!(
        inspected[0],
        WalArguments { directory: Path::new("/x").to_owned(), format: Format::Text }
    );
    assert_eq!(
        inspected[1],
        WalArguments { directory: Path::new("/y").to_owned(), format: Format::Json }
    );
}

#[test]
fn wal_repair_gives_up_nothing_unless_told_so() {
    let place = Place::new("not: read\n");
    assert_eq!(place.run(&["wal", "repair", "/x"]).out, "repair /x false\n");
    let accepted = place.run(&["wal", "repair", "--accept-data-loss", "/x"]);
    assert_eq!(accepted.out, "repair /x true\n");
    assert_eq!(place.run(&["wal", "repair", "--accept-data-loss"]).exit, Exit::Usage);
}

#[test]
fn version_and_completion_are_printed() {
    let place = Place::new("");
    let expected = format!("k3s-server version {}\n", env!("CARGO_PKG_VERSION"));

    assert_eq!(place.run(&["version"]).out, expected);
    assert_eq!(place.run(&["--version"]).out, expected);
    for shell in ["bash", "zsh", "fish"] {
        let script = place.run(&["completion", shell]).out;
        for word in ["cluster-init", "wireguard-native", "completion", "wal"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

/// A pipe whose reader has gone.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn closed_pipe_is_no_failure() {
    let place = Place::new("");
    let mut err = Vec::new();
    let exit =
        cli::run_in(&place.world(&["server", "--help"]), &place.programs, &mut Closed, &mut err);

    assert_eq!((exit, err.as_slice()), (Exit::Done, &b""[..]));
}

#[test]
fn usage_errors_do_not_repeat_secrets() {
    for line in [
        &["server", "--tokn=canary"][..],
        &["server", "--token=canary", "--nonsense"],
        &["server", "--token", "canary", "stray"],
    ] {
        let outcome = Place::new("").run(line);
        assert_eq!(outcome.exit, Exit::Usage);
        assert!(!outcome.err.contains("canary"), "{}", outcome.err);
    }
}

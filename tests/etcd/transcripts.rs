//! Replays what a real etcd answered, line for line, errors included.
//!
//! A file of `tests/transcripts` starts with the version that recorded it. `> line` is a request in the language of
//! [`crate::script`], the lines beneath are the reply. `>3.6 line` is sent only to servers that report 3.6 or later;
//! its reply was written by hand where no such etcd could be had. Each file starts with an empty store; comments
//! start with `#`; what etcd's settings must be is in a line `settings: a=1 b=2`.
//!
//! `UPDATE_TRANSCRIPTS=1` records the files anew from the newest real etcd that `.ci/setup` found.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::script::Session;
use crate::support::etcd::{Etcd, Release};
use crate::support::{Endpoint, Options, Subject, skip};

macro_rules! transcripts {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        /// A file that no test names would never be replayed.
        #[test]
        fn every_transcript_is_replayed() {
            let known = [$(stringify!($name)),*];
            let mut found: Vec<_> = fs::read_dir(directory()).unwrap()
                .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
                .collect();
            found.sort();
            assert_eq!(found, known);
        }
    };
}

transcripts! {
    auth, cluster, compact, election, errors, kv, lease, limits, lock, maintenance, quota, range, txn, watch,
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts")
}

/// One line of a transcript.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    /// A comment, a setting or nothing: kept as it is.
    Text(String),
    /// A request and its reply.
    Exchange { newer_only: bool, request: String, reply: Vec<String> },
}

fn parse(text: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    for line in text.lines() {
        let request = line
            .strip_prefix("> ")
            .map(|request| (false, request))
            .or_else(|| line.strip_prefix(">3.6 ").map(|request| (true, request)));
        match (request, lines.last_mut()) {
            (Some((newer_only, request)), _) => {
                let request = request.to_owned();
                lines.push(Line::Exchange { newer_only, request, reply: Vec::new() });
            }
            (None, Some(Line::Exchange { reply, .. }))
                if !line.is_empty() && !line.starts_with('#') =>
            {
                reply.push(line.to_owned());
            }
            (None, _) => lines.push(Line::Text(line.to_owned())),
        }
    }
    lines
}

fn print(lines: &[Line]) -> String {
    let mut out = String::new();
    for line in lines {
        match line {
            // Writing to a string cannot fail.
            Line::Text(text) => {
                let _ = writeln!(out, "{text}");
            }
            Line::Exchange { newer_only, request, reply } => {
                let mark = if *newer_only { ">3.6" } else { ">" };
                let _ = writeln!(out, "{mark} {request}");
                for line in reply {
                    let _ = writeln!(out, "{line}");
                }
            }
        }
    }
    out
}

/// The replies of one server to the requests of a transcript.
async fn replay(lines: &[Line], endpoint: &Endpoint) -> Vec<Line> {
    let mut session = Session::connect(endpoint).await;
    let mut replayed = Vec::new();
    for line in lines {
        let mut line = line.clone();
        if let Line::Exchange { newer_only, request, reply } = &mut line
            && (!*newer_only || session.is_36())
        {
            *reply = session.run(request).await;
        }
        replayed.push(line);
    }
    replayed
}

fn settings(lines: &[Line]) -> Vec<String> {
    let setting = |line: &Line| match line {
        Line::Text(text) => text.strip_prefix("settings: ").map(str::to_owned),
        Line::Exchange { .. } => None,
    };
    let found: Vec<String> = lines.iter().filter_map(setting).collect();
    found.iter().flat_map(|text| text.split(' ').map(str::to_owned)).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn check(name: &str) {
    let path = directory().join(format!("{name}.txt"));
    let lines = parse(&fs::read_to_string(&path).unwrap());
    let options = Options { etcd_settings: settings(&lines), ..Default::default() };
    if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
        return record(&path, lines, &options);
    }
    let subject = Subject::start(&options);
    let replayed = runtime().block_on(replay(&lines, subject.endpoint()));
    let differences = differences(&lines, &replayed);
    assert!(differences.is_empty(), "{}:\n{differences}", path.display());
}

fn record(path: &Path, mut lines: Vec<Line>, options: &Options) {
    let Some(release) = Release::newest() else { return skip("no etcd below target/etcd") };
    let etcd = Etcd::start(&release, options);
    lines[0] = Line::Text(format!("# Recorded from etcd {}.", release.version()));
    let recorded = runtime().block_on(replay(&lines, etcd.endpoint()));
    fs::write(path, print(&recorded)).unwrap();
}

fn differences(expected: &[Line], found: &[Line]) -> String {
    let mut out = String::new();
    for (expected, found) in expected.iter().zip(found) {
        let (Line::Exchange { request, reply: expected, .. }, Line::Exchange { reply: found, .. }) =
            (expected, found)
        else {
            continue;
        };
        if expected != found {
            let _ = writeln!(
                out,
                "\n> {request}\nexpected:\n  {}\nfound:\n  {}",
                expected.join("\n  "),
                found.join("\n  ")
            );
        }
    }
    out
}

#[test]
fn a_transcript_survives_parsing_and_printing() {
    let text = "# Recorded from etcd 3.5.30.\n\n# why\n> put a 1\nrev 2\n\n>3.6 get a\nrev 2\n";
    assert_eq!(print(&parse(text)), text);
}

#[test]
fn a_wrong_reply_is_found() {
    let Some(release) = Release::newest() else { return skip("no etcd below target/etcd") };
    let etcd = Etcd::start(&release, &Options::default());
    let lines = parse("# x\n> put a 1\nrev 2\n> put a 2\nrev 4\n");
    let replayed = runtime().block_on(replay(&lines, etcd.endpoint()));
    let found = differences(&lines, &replayed);
    assert!(!found.contains("put a 1") && found.contains("put a 2"), "{found}");
}

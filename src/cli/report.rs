//! Prints what `check` and `config show` found, for people and for programs.

use std::io::{self, Write};

use serde_json::{Value as Json, json};

use crate::config::keys::KEYS;
use crate::config::{
    Config, Key, Kind, Loaded, Origin, Problem, Problems, REDACTED, Role, Severity,
};

use super::{Format, Show};
use crate::admin::check::{Compared, Verdict};
use crate::critical::{FlagsError, Mismatch};
use crate::join::Plan;

/// The result of a check.
pub fn check(
    result: &Result<Loaded, Problems>,
    verdict: Option<&Verdict>,
    format: Format,
    out: &mut dyn Write,
) -> io::Result<()> {
    let (mut problems, files) = match result {
        Ok(loaded) => (loaded.problems.clone(), loaded.config.files()),
        Err(problems) => (problems.clone(), [].as_slice()),
    };
    if let Some(more) = verdict.and_then(Verdict::problems) {
        problems.append(more.clone());
        problems = problems.sorted();
    }
    let valid = !problems.has_errors();
    if format == Format::Json {
        let listed: Vec<Json> = problems.iter().map(problem).collect();
        let report = json!({
            "valid": valid,
            "files": files,
            "problems": listed,
            "start": verdict.and_then(|verdict| verdict.plan.as_ref().ok()).map(start),
            "flags": verdict.map(|verdict| compared(&verdict.flags)),
        });
        return writeln!(out, "{report:#}");
    }
    for problem in &problems {
        writeln!(out, "{problem}")?;
    }
    let count = |severity| problems.iter().filter(|problem| problem.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    if valid {
        writeln!(out, "the configuration is valid{}", counted(", with ", warnings, "warning"))?;
    } else {
        writeln!(
            out,
            "the configuration is not valid:{}{}",
            counted(" ", errors, "error"),
            counted(", ", warnings, "warning")
        )?;
    }
    verdict.map_or(Ok(()), |verdict| verdict_text(verdict, out))
}

fn verdict_text(verdict: &Verdict, out: &mut dyn Write) -> io::Result<()> {
    let Ok(plan) = &verdict.plan else { return Ok(()) };
    writeln!(out, "a start would {}", start(plan)["text"].as_str().unwrap_or_default())?;
    if let Some(note) = plan.note() {
        writeln!(out, "note: {note}")?;
    }
    match &verdict.flags {
        Compared::Nothing(why) => writeln!(out, "critical flags not compared: {why}"),
        Compared::With { source, result: Ok(()) } => {
            writeln!(out, "the critical flags are those of {source}")
        }
        Compared::With { source, result: Err(error) } => {
            writeln!(out, "compared with {source}:\n{error}")
        }
        Compared::Unavailable { source, reason } => {
            writeln!(out, "critical flags not compared: {source} cannot be asked: {reason}")
        }
    }
}

fn start(plan: &Plan) -> Json {
    let (word, text) = match plan {
        Plan::Found => ("found", "found a new cluster".to_owned()),
        Plan::Join(url) => ("join", format!("join the cluster of {url}")),
        Plan::Continue { .. } => ("continue", "go on with the datastore on disk".to_owned()),
        Plan::Reset { .. } => ("reset", "make this server the only member".to_owned()),
    };
    json!({ "does": word, "text": text, "note": plan.note() })
}

fn compared(compared: &Compared) -> Json {
    match compared {
        Compared::Nothing(why) => json!({ "equal": null, "reason": why }),
        Compared::Unavailable { source, reason } => {
            json!({ "equal": null, "with": source, "reason": reason.text })
        }
        Compared::With { source, result } => {
            let mismatches = match result {
                Err(FlagsError::Differ(mismatches)) => mismatches.iter().map(mismatch).collect(),
                Ok(()) | Err(FlagsError::Record(_) | FlagsError::Unrecorded) => Vec::new(),
            };
            let reason = result.as_ref().err().filter(|error| !error.is_configuration());
            json!({
                "equal": result.is_ok(),
                "with": source,
                "mismatches": mismatches,
                "reason": reason.map(ToString::to_string),
            })
        }
    }
}

fn mismatch(mismatch: &Mismatch) -> Json {
    json!({
        "flag": mismatch.flag.name(),
        "here": mismatch.here.text(),
        "origin": origin(&mismatch.origin),
        "cluster": mismatch.cluster.value().text(),
        "since": mismatch.cluster.since(),
        "set_by": mismatch.cluster.set_by(),
        "line": mismatch.line(),
    })
}

fn counted(before: &str, count: usize, what: &str) -> String {
    match count {
        0 => String::new(),
        1 => format!("{before}1 {what}"),
        _ => format!("{before}{count} {what}s"),
    }
}

fn problem(problem: &Problem) -> Json {
    json!({
        "severity": problem.severity.name(),
        "origin": origin(&problem.origin),
        "what": problem.what,
        "found": problem.found,
        "expected": problem.expected,
        "fix": problem.fix,
    })
}

fn origin(origin: &Origin) -> Json {
    match origin {
        Origin::File(position) => json!({
            "source": "file",
            "file": &*position.file,
            "line": position.line,
            "column": position.column,
        }),
        Origin::CommandLine => json!({ "source": "command line" }),
        Origin::Environment(name) => json!({ "source": "environment", "variable": name }),
        Origin::Default => json!({ "source": "default" }),
    }
}

/// The merged configuration. Its text form is itself a configuration file, apart from the secrets.
pub fn config(config: &Config, show: Show, out: &mut dyn Write) -> io::Result<()> {
    let rows: Vec<(&'static Key, Json)> = KEYS
        .iter()
        .filter(|key| !matches!(key.role, Role::Renamed(_)) && key.name != "config")
        .filter(|key| show.all || !config.settings().items(key.name).is_empty())
        .map(|key| (key, value(key, config)))
        .collect();
    match show.format {
        Format::Json => {
            let keys: serde_json::Map<String, Json> = rows
                .into_iter()
                .map(|(key, value)| {
                    let entry =
                        json!({ "value": value, "origin": origin(&config.origin(key.name)) });
                    (key.name.to_owned(), entry)
                })
                .collect();
            writeln!(out, "{:#}", json!({ "files": config.files(), "keys": keys }))
        }
        Format::Text => {
            for file in config.files() {
                writeln!(out, "# read: {file}")?;
            }
            for (key, value) in rows {
                writeln!(out, "{}: {value}  # {}", key.name, config.origin(key.name))?;
            }
            Ok(())
        }
    }
}

fn value(key: &Key, config: &Config) -> Json {
    let one = |text: &str| {
        if key.is_secret() && !text.is_empty() {
            json!(REDACTED)
        } else if key.kind == Kind::Bool {
            json!(config.boolean(key.name))
        } else if let (Kind::Int(..), Ok(number)) = (key.kind, text.parse::<i64>()) {
            json!(number)
        } else {
            json!(text)
        }
    };
    let network = &config.network;
    match key.name {
        "cluster-cidr" => json!(texts(&network.cluster_cidrs)),
        "service-cidr" => json!(texts(&network.service_cidrs)),
        "cluster-dns" => json!(texts(&network.cluster_dns)),
        _ if key.is_list() => config.texts(key.name).into_iter().map(one).collect(),
        _ => one(config.text(key.name)),
    }
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

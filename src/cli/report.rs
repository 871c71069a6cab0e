//! Prints what `check` and `config show` found, for people and for programs.

use std::io::{self, Write};

use serde_json::{Value as Json, json};

use crate::config::keys::KEYS;
use crate::config::{
    Config, Key, Kind, Loaded, Origin, Problem, Problems, REDACTED, Role, Severity,
};

use super::{Format, Show};

/// The result of a check.
pub fn check(
    result: &Result<Loaded, Problems>,
    format: Format,
    out: &mut dyn Write,
) -> io::Result<()> {
    let (problems, files) = match result {
        Ok(loaded) => (&loaded.problems, loaded.config.files()),
        Err(problems) => (problems, [].as_slice()),
    };
    if format == Format::Json {
        let listed: Vec<Json> = problems.iter().map(problem).collect();
        return writeln!(
            out,
            "{:#}",
            json!({ "valid": result.is_ok(), "files": files, "problems": listed })
        );
    }
    for problem in problems {
        writeln!(out, "{problem}")?;
    }
    let count = |severity| problems.iter().filter(|problem| problem.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    match result {
        Ok(_) => {
            writeln!(out, "the configuration is valid{}", counted(", with ", warnings, "warning"))
        }
        Err(_) => writeln!(
            out,
            "the configuration is not valid:{}{}",
            counted(" ", errors, "error"),
            counted(", ", warnings, "warning")
        ),
    }
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

//! The journal's contract, read from the source: every event is said somewhere, and with the fields that its explanation shows.
//!
//! An entry of the catalog with `@K3S_PATH@` for a line without that field reads "the log in  is damaged" at night.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use k3s_server::events::EventId;

/// One place where an event is said.
struct Said {
    place: String,
    event: String,
    fields: BTreeSet<String>,
}

fn read(directory: &Path, said: &mut Vec<Said>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, said);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            // What follows is the tests of that file.
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            said.extend(calls(code).map(|(line, call)| {
                Said {
                    place: format!("{}:{line}", path.display()),
                    event: word_after(call, "EventId::").unwrap_or_default().to_owned(),
                    fields: call
                        .match_indices("fields::")
                        .filter_map(|(at, _)| word_after(&call[at..], "fields::"))
                        .map(str::to_lowercase)
                        .collect(),
                }
            }));
        }
    }
}

/// Line and text of each `announce!( … )`.
fn calls(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.match_indices("announce!(").map(|(at, opening)| {
        let (mut depth, start) = (1, at + opening.len());
        let end = code[start..].find(|character| {
            depth += match character {
                '(' => 1,
                ')' => -1,
                _ => 0,
            };
            depth == 0
        });
        (code[..at].matches('\n').count() + 1, &code[start..start + end.unwrap()])
    })
}

fn word_after<'t>(text: &'t str, start: &str) -> Option<&'t str> {
    let rest = &text[text.find(start)? + start.len()..];
    Some(&rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())])
}

/// Placeholders of each entry.
fn shown() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let catalog = fs::read_to_string(root.join("systemd/k3s-server.catalog")).unwrap();
    let entry = |section: &str| {
        let placeholders = section.split('@').skip(1).step_by(2);
        let fields = placeholders.map(|name| name.trim_start_matches("K3S_").to_lowercase());
        (section[..32].to_owned(), fields.collect())
    };
    catalog.split("\n-- ").skip(1).map(entry).collect()
}

#[test]
fn every_event_is_said_with_what_its_explanation_shows() {
    let mut said = Vec::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut said);
    let shown = shown();
    let mut wrong = Vec::new();
    for event in EventId::ALL {
        let (name, number) = (format!("{event:?}"), event.to_string());
        let places: Vec<&Said> = said.iter().filter(|one| one.event == name).collect();
        if places.is_empty() {
            wrong.push(format!("{name} is explained and never said"));
        }
        for place in places {
            let missing: Vec<&String> = shown[&number].difference(&place.fields).collect();
            if !missing.is_empty() {
                wrong.push(format!("{}: {name} without {missing:?}", place.place));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// They force journald to write to the card at once.
#[test]
fn nothing_is_said_above_the_priority_of_an_error() {
    assert!(EventId::ALL.iter().all(|event| tracing::Level::ERROR <= event.level()));
    let journal = include_str!("../../src/observe/journal.rs");
    for level in ["Emergency", "Alert", "Critical"] {
        assert!(!journal.contains(&format!("Priority::{level}")), "{level}");
    }
}

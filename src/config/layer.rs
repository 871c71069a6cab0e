//! Turns the entries of one file into values of known keys, as K3s would understand them.
//!
//! # Invariants
//!
//! - A word that K3s would read as another text is refused, never passed on ([`super::scalar`]).
//! - Unknown keys are reported and dropped; nothing that is wrong with one key hides what is wrong with the next.
//! - No message carries the text of a secret.

use std::collections::BTreeMap;
use std::fmt;

use super::key::{Key, Kind, Repeat, Role};
use super::keys::{self, KEYS, RETIRED};
use super::origin::{Origin, Position};
use super::problem::{Problem, Problems};
use super::yaml::{self, Entry, Scalar, Value};
use super::{scalar, suggest};

/// One value with the place it came from.
#[derive(Clone, PartialEq, Eq)]
pub struct Item {
    /// Text as K3s would pass it on.
    pub text: String,
    /// Who wrote it.
    pub origin: Origin,
}

impl fmt::Debug for Item {
    /// Without the text, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Item({})", self.origin)
    }
}

/// What one line of a file does to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The key, old names already followed.
    pub key: &'static Key,
    /// Whether earlier values stay (`key+`).
    pub append: bool,
    /// The values.
    pub items: Vec<Item>,
    /// Where the key stands.
    pub position: Position,
}

/// A file that could be read: its assignments in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// In the order of the file.
    pub assignments: Vec<Assignment>,
}

impl Layer {
    /// Whether the file holds a secret in plain text.
    pub fn first_secret(&self) -> Option<&Assignment> {
        self.assignments.iter().find(|assignment| {
            assignment.key.is_secret() && assignment.items.iter().any(|item| !item.text.is_empty())
        })
    }
}

/// Reads a file's text. Problems may be warnings only; the caller looks at their severity.
pub fn read(name: &str, bytes: &[u8]) -> (Layer, Problems) {
    let entries = match yaml::parse(name, bytes) {
        Ok(entries) => entries,
        Err(problems) => return (Layer::default(), problems),
    };
    let mut problems = Problems::default();
    let mut layer = Layer::default();
    let mut first_line: BTreeMap<&'static str, usize> = BTreeMap::new();
    for entry in entries {
        let Some(key) = known(&entry, &mut problems) else {
            continue;
        };
        if !entry.append
            && let Some(line) = first_line.insert(key.name, entry.position.line)
        {
            let origin = Origin::File(entry.position.clone());
            problems.push(
                Problem::warning(origin, format!("{} is set twice", key.name))
                    .found(format!("lines {line} and {}", entry.position.line))
                    .expected("one of them; the later one counts, as in K3s")
                    .fix(format!("remove one line, or write `{}+:` to add to a list", key.name)),
            );
        }
        if let Some(items) = items(key, &entry, &mut problems) {
            layer.assignments.push(Assignment {
                key,
                append: entry.append,
                items,
                position: entry.position,
            });
        }
    }
    (layer, problems)
}

/// The row of an entry's key, or a warning.
fn known(entry: &Entry, problems: &mut Problems) -> Option<&'static Key> {
    let origin = Origin::File(entry.position.clone());
    let Some(key) = keys::find_any(&entry.name) else {
        problems.push(unknown(origin, &entry.name));
        return None;
    };
    if key.name == "config" {
        problems.push(
            Problem::warning(origin, "config has no effect inside a configuration file")
                .fix("use --config or K3S_CONFIG_FILE, or put a file into the drop-in directory"),
        );
        return None;
    }
    let target = keys::resolve(key);
    if let Role::Renamed(new) = key.role {
        problems.push(
            Problem::warning(origin, format!("{} is an old name", key.name))
                .fix(format!("write `{new}`")),
        );
    }
    Some(target)
}

/// The warning for a name that is no key.
pub fn unknown(origin: Origin, name: &str) -> Problem {
    if let Some((_, advice)) = RETIRED.iter().find(|(retired, _)| *retired == name) {
        return Problem::warning(
            origin,
            format!("{name} is not an option of k3s server any more and is ignored"),
        )
        .fix(*advice);
    }
    let shown: String = name.chars().take(64).collect();
    let problem =
        Problem::warning(origin, format!("unknown key `{}` is ignored", shown.escape_debug()));
    match suggest::nearest(name, KEYS.iter().map(|key| key.name)) {
        Some(near) => problem.fix(format!("write `{near}` if that is what you mean")),
        None => problem,
    }
}

/// The values of an entry; `None` when there is an error among them.
fn items(key: &'static Key, entry: &Entry, problems: &mut Problems) -> Option<Vec<Item>> {
    let at_key = Origin::File(entry.position.clone());
    let scalars = match &entry.value {
        Value::Unusable(form) => {
            problems.push(
                Problem::error(at_key, format!("{} has a value of the wrong form", key.name))
                    .found(*form)
                    .expected(if key.is_list() {
                        "a value or a list of values"
                    } else {
                        "one value"
                    }),
            );
            return None;
        }
        Value::One(scalar) => std::slice::from_ref(scalar),
        Value::List(scalars) => scalars.as_slice(),
    };
    if !key.is_list() && 1 < scalars.len() {
        problems.push(
            Problem::warning(at_key, format!("{} takes one value", key.name))
                .found(format!("a list of {}", scalars.len()))
                .expected("one value; the last one counts, as in K3s"),
        );
    }
    let mut items = Vec::new();
    let mut all_right = true;
    for scalar in scalars {
        match text(key, scalar) {
            Ok(text) => {
                let origin = Origin::File(scalar.position.clone());
                items.extend(split(key, &text).map(|text| Item { text, origin: origin.clone() }));
            }
            Err(problem) => {
                problems.push(*problem);
                all_right = false;
            }
        }
    }
    all_right.then_some(items)
}

/// Splits a value where the key says so; empty pieces of lists mean nothing.
pub fn split(key: &Key, text: &str) -> impl Iterator<Item = String> {
    let pieces: Vec<String> = match key.repeat {
        Repeat::Once => vec![text.to_owned()],
        Repeat::Many if text.is_empty() => Vec::new(),
        Repeat::Many => vec![text.to_owned()],
        Repeat::Split => text
            .split(',')
            .map(str::trim)
            .filter(|piece| !piece.is_empty())
            .map(str::to_owned)
            .collect(),
    };
    pieces.into_iter()
}

/// The text that K3s would work with.
fn text(key: &Key, scalar: &Scalar) -> Result<String, Box<Problem>> {
    let origin = Origin::File(scalar.position.clone());
    if scalar.quoted {
        return Ok(scalar.text.trim().to_owned());
    }
    if scalar::is_null(&scalar.text) {
        return Ok(String::new());
    }
    if key.kind == Kind::Bool
        && let Some(value) = scalar::boolean(&scalar.text)
    {
        return Ok(value.to_string());
    }
    // Numbers are checked digit by digit later, with a message of their own.
    if matches!(key.kind, Kind::Bool | Kind::Int(..)) {
        return Ok(scalar.text.clone());
    }
    let Some(reading) = scalar::upstream_reading(&scalar.text) else {
        return Ok(scalar.text.clone());
    };
    let problem = Problem::error(origin, format!("{} is ambiguous without quotes", key.name));
    Err(Box::new(if key.is_secret() {
        problem
            .found(
                "a word that K3s reads as a number, a boolean or nothing, and so as another secret",
            )
            .expected("text in quotes")
            .fix(format!("put the value of `{}` in double quotes", key.name))
    } else {
        problem
            .found(format!("{}, which K3s reads as {reading}", scalar.text))
            .expected("text in quotes")
            .fix(format!("write \"{}\", or \"{reading}\" if that is what you mean", scalar.text))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(text: &str) -> (Vec<(&'static str, Vec<String>)>, String) {
        let (layer, problems) = read("f", text.as_bytes());
        let seen = layer
            .assignments
            .into_iter()
            .map(|a| (a.key.name, a.items.into_iter().map(|item| item.text).collect()))
            .collect();
        (seen, problems.to_string())
    }

    fn strings(items: &[&str]) -> Vec<String> {
        items.iter().map(|item| (*item).to_owned()).collect()
    }

    #[test]
    fn lists_split_at_commas_only_where_k3s_splits() {
        let (seen, problems) = layer(
            "disable: traefik, servicelb\ntls-san: [a, 'b,c']\nkubelet-arg: x=1,y=2\nnode-label: [a=b]\n",
        );

        assert_eq!(problems, "");
        assert_eq!(seen[0], ("disable", strings(&["traefik", "servicelb"])));
        assert_eq!(seen[1], ("tls-san", strings(&["a", "b", "c"])));
        assert_eq!(seen[2], ("kubelet-arg", strings(&["x=1,y=2"])));
        assert_eq!(seen[3], ("node-label", strings(&["a=b"])));
    }

    #[test]
    fn booleans_are_those_of_yaml_1_1_unquoted_and_of_go_quoted() {
        let (seen, problems) = layer("cluster-init: yes\ndebug: 'yes'\nselinux: 1\n");

        assert_eq!(problems, "");
        assert_eq!(seen[0].1, ["true"]);
        assert_eq!(seen[1].1, ["yes"], "left to the check of the kind, which refuses it");
        assert_eq!(seen[2].1, ["1"]);
    }

    #[test]
    fn words_that_change_meaning_are_refused_with_both_readings() {
        let (seen, problems) = layer("write-kubeconfig-mode: 0644\n");

        assert_eq!(seen, []);
        assert_eq!(
            problems,
            "f:1:24: write-kubeconfig-mode is ambiguous without quotes: found 0644, which K3s reads as 420, \
             expected text in quotes\n  fix: write \"0644\", or \"420\" if that is what you mean"
        );
        assert_eq!(layer("write-kubeconfig-mode: \"0644\"\n").1, "");
        assert_eq!(layer("write-kubeconfig-mode: 644\n").1, "");
    }

    #[test]
    fn refused_secrets_are_not_repeated() {
        for word in ["012345678901", "1e10", "yes", "0x1F", "1_000_000"] {
            let (seen, problems) = layer(&format!("token: {word}\n"));
            assert_eq!(seen, []);
            assert!(problems.contains("in double quotes"), "{problems}");
            assert!(!problems.contains(word), "{problems}");
        }
        assert_eq!(layer("token: 12345678\n").0, [("token", strings(&["12345678"]))]);
    }

    #[test]
    fn unknown_keys_are_dropped_with_the_nearest_name() {
        let (seen, problems) =
            layer("cluster-cird: 10.42.0.0/16\nno-deploy: traefik\nxyzzy: {a: [1]}\n");

        assert_eq!(seen, []);
        assert_eq!(
            problems,
            "f:1:1: warning: unknown key `cluster-cird` is ignored\n  fix: write `cluster-cidr` if that is what you mean\n\
             f:2:1: warning: no-deploy is not an option of k3s server any more and is ignored\n  fix: use `disable`\n\
             f:3:1: warning: unknown key `xyzzy` is ignored"
        );
    }

    #[test]
    fn repeated_keys_are_named_with_both_lines() {
        let (seen, problems) = layer("token: a\nt: b\ntls-san: x\ntls-san+: z\n");

        assert_eq!(seen.len(), 4);
        assert!(
            problems.starts_with("f:2:1: warning: token is set twice: found lines 1 and 2"),
            "{problems}"
        );
        assert_eq!(problems.matches("twice").count(), 1);
    }

    #[test]
    fn old_names_lead_to_the_new_key() {
        let (seen, problems) = layer("kube-controller-arg: a=b\n");

        assert_eq!(seen, [("kube-controller-manager-arg", strings(&["a=b"]))]);
        assert!(problems.contains("write `kube-controller-manager-arg`"));
    }

    #[test]
    fn every_problem_of_a_file_is_found() {
        let (_, problems) = layer("token: 0644\ncluster-init: {a: 1}\nconfig: /x\nnope: 1\n");

        assert_eq!(problems.matches("f:").count(), 4, "{problems}");
    }
}

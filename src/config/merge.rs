//! Merges files, command line and environment as K3s does, keeping the origin of every value.
//!
//! Command line over files over environment: K3s puts the file's values in front of the user's arguments and
//! lets its flag library decide, which means that a single value is replaced by the later one, while lists of
//! file and command line are joined. A list from the environment is used only if neither gave one.

use std::collections::BTreeMap;

use super::key::Key;
use super::keys::KEYS;
use super::layer::{self, Item, Layer};
use super::origin::Origin;

/// One argument of the command line.
#[derive(Clone, Debug)]
pub struct Given {
    /// Which key.
    pub key: &'static Key,
    /// Its values, in order.
    pub items: Vec<Item>,
}

impl Given {
    /// An argument as typed.
    pub fn new(key: &'static Key, text: &str) -> Self {
        let items = layer::split(key, text)
            .map(|text| Item { text, origin: Origin::CommandLine })
            .collect();
        Self { key, items }
    }
}

/// Environment variables.
pub type Variables = BTreeMap<String, String>;

/// All values that somebody set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    items: BTreeMap<&'static str, Vec<Item>>,
}

impl Settings {
    /// Merges. Later files win over earlier ones.
    pub fn merge(files: &[Layer], command_line: &[Given], environment: &Variables) -> Self {
        let mut items: BTreeMap<&'static str, Vec<Item>> = BTreeMap::new();
        for assignment in files.iter().flat_map(|file| &file.assignments) {
            let values = items.entry(assignment.key.name).or_default();
            if !assignment.append {
                values.clear();
            }
            values.extend_from_slice(&assignment.items);
        }
        for given in command_line {
            items.entry(given.key.name).or_default().extend_from_slice(&given.items);
        }
        for key in KEYS {
            let values = items.entry(key.name).or_default();
            if values.is_empty() {
                *values = from_environment(key, environment);
            }
            if !key.is_list() && 1 < values.len() {
                values.drain(..values.len() - 1);
            }
        }
        items.retain(|_, values| !values.is_empty());
        Self { items }
    }

    /// The values of a key; none if nobody set it.
    pub fn items(&self, name: &str) -> &[Item] {
        self.items.get(name).map_or(&[], Vec::as_slice)
    }

    /// The value of a key that has one, unless it is empty.
    pub fn one(&self, name: &str) -> Option<&Item> {
        self.items(name).last().filter(|item| !item.text.is_empty())
    }

    /// Who set the key; the last one of several.
    pub fn origin(&self, name: &str) -> Origin {
        self.items(name).last().map_or(Origin::Default, |item| item.origin.clone())
    }

    /// Rows that somebody set, in the order of the table.
    pub fn set(&self) -> impl Iterator<Item = (&'static Key, &[Item])> {
        KEYS.iter().map(|key| (key, self.items(key.name))).filter(|(_, items)| !items.is_empty())
    }
}

fn from_environment(key: &'static Key, environment: &Variables) -> Vec<Item> {
    for name in key.environment {
        let Some(text) = environment.get(*name).filter(|text| !text.is_empty()) else {
            continue;
        };
        // systemd lists several state directories with colons; ours is the first.
        let text =
            if *name == "STATE_DIRECTORY" { text.split(':').next().unwrap_or(text) } else { text };
        return layer::split(key, text)
            .map(|text| Item { text, origin: Origin::Environment(name) })
            .collect();
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::find;

    fn merged(files: &[&str], arguments: &[(&str, &str)], variables: &[(&str, &str)]) -> Settings {
        let files: Vec<Layer> = files
            .iter()
            .map(|text| {
                let (layer, problems) = layer::read("f", text.as_bytes());
                assert!(!problems.has_errors(), "{problems}");
                layer
            })
            .collect();
        let arguments: Vec<Given> =
            arguments.iter().map(|(key, text)| Given::new(find(key).unwrap(), text)).collect();
        let variables =
            variables.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        Settings::merge(&files, &arguments, &variables)
    }

    fn texts<'a>(settings: &'a Settings, name: &str) -> Vec<&'a str> {
        settings.items(name).iter().map(|item| item.text.as_str()).collect()
    }

    #[test]
    fn command_line_wins_over_file_wins_over_environment() {
        let env = [("K3S_TOKEN", "env"), ("K3S_CLUSTER_INIT", "true"), ("K3S_NODE_NAME", "env")];
        let settings = merged(
            &["token: file\ncluster-init: false\n"],
            &[("token", "arg1"), ("token", "arg2")],
            &env,
        );

        assert_eq!(texts(&settings, "token"), ["arg2"]);
        assert_eq!(texts(&settings, "cluster-init"), ["false"]);
        assert_eq!(texts(&settings, "node-name"), ["env"]);
        assert_eq!(settings.origin("node-name"), Origin::Environment("K3S_NODE_NAME"));
        assert_eq!(settings.origin("token"), Origin::CommandLine);
    }

    #[test]
    fn lists_of_file_and_command_line_are_joined() {
        let settings = merged(&["tls-san: [a, b]\n"], &[("tls-san", "c,d")], &[]);

        assert_eq!(texts(&settings, "tls-san"), ["a", "b", "c", "d"]);
    }

    #[test]
    fn plus_appends_and_a_plain_key_starts_again() {
        let first = "tls-san: a\ntls-san+: [b]\n";

        assert_eq!(texts(&merged(&[first, "tls-san+: c\n"], &[], &[]), "tls-san"), ["a", "b", "c"]);
        assert_eq!(texts(&merged(&[first, "tls-san: c\n"], &[], &[]), "tls-san"), ["c"]);
        assert_eq!(texts(&merged(&["tls-san+: c\n"], &[], &[]), "tls-san"), ["c"]);
        assert_eq!(texts(&merged(&["token: a\ntoken+: b\n"], &[], &[]), "token"), ["b"]);
    }

    #[test]
    fn state_directory_of_systemd_is_the_weakest_say_on_db_dir() {
        let systemd = ("STATE_DIRECTORY", "/var/lib/private/x:/var/lib/y");

        assert_eq!(texts(&merged(&[], &[], &[systemd]), "db-dir"), ["/var/lib/private/x"]);
        assert_eq!(texts(&merged(&[], &[], &[systemd, ("K3S_DB_DIR", "/z")]), "db-dir"), ["/z"]);
        assert_eq!(texts(&merged(&["db-dir: /f\n"], &[], &[systemd]), "db-dir"), ["/f"]);
    }

    #[test]
    fn empty_variables_do_not_count() {
        assert_eq!(merged(&[], &[], &[("K3S_TOKEN", "")]), Settings::default());
    }
}

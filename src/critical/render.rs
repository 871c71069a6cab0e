//! Makes the table that a user sees when settings differ.
//!
//! One block per flag: the value here and where it is written, the cluster's value, since when and by whom;
//! then the lines to write, ready to be copied.

use std::fmt;
use std::time::SystemTime;

use time::OffsetDateTime;

use crate::config::{Origin, upstream_reading};

use super::compare::{ClusterSide, Mismatch, Mismatches};
use super::flag::Flag;
use super::value::Value;

impl Mismatch {
    /// The line to write into the configuration file, or what to do instead.
    pub fn line(&self) -> String {
        line(self.flag, self.cluster.value())
    }

    /// All of it in one sentence, for the journal.
    pub fn sentence(&self) -> String {
        let Self { flag, here, origin, cluster } = self;
        let place = self.place_there();
        let value = cluster.value();
        format!(
            "{flag} is {here} here ({origin}) and {value} in the cluster ({place}); write `{}`",
            self.line()
        )
    }

    fn place_here(&self) -> String {
        self.origin.to_string()
    }

    fn place_there(&self) -> String {
        match &self.cluster {
            ClusterSide::Recorded(recorded) => {
                format!("since {}, set by {}", date(recorded.since), recorded.set_by)
            }
            ClusterSide::Default(_) => "default; recorded before this flag was known".to_owned(),
        }
    }
}

impl ClusterSide {
    /// Since when it has this value, for people.
    pub fn since(&self) -> Option<String> {
        match self {
            Self::Recorded(recorded) => Some(date(recorded.since)),
            Self::Default(_) => None,
        }
    }
}

/// The line of a configuration file that gives a flag this value.
pub fn line(flag: Flag, value: &Value) -> String {
    if value.is_empty() {
        return format!("# no `{flag}`: remove it");
    }
    match value {
        Value::Set(words) => {
            format!("{flag}: [{}]", words.iter().cloned().collect::<Vec<_>>().join(", "))
        }
        Value::Text(text) if !is_plain(text) => format!("{flag}: {}", quoted(text)),
        Value::Networks(_) | Value::Addresses(_) if !is_plain(&value.text()) => {
            format!("{flag}: {}", quoted(&value.text()))
        }
        Value::Switch(_) | Value::Text(_) | Value::Networks(_) | Value::Addresses(_) => {
            format!("{flag}: {}", value.text())
        }
    }
}

/// Whether every YAML reader takes the word as it stands: a name, a network, a range. Not a number, a boolean or anything
/// with a mark of YAML's own.
fn is_plain(text: &str) -> bool {
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '/' | '_');
    let first = text.chars().next();
    text.chars().all(harmless)
        && first.is_some_and(|c| c.is_ascii_alphanumeric())
        && upstream_reading(text).is_none()
        && text.parse::<f64>().is_err()
}

/// In double quotes, as YAML reads them: JSON's escapes are among YAML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// To the minute, which is what a record that people read needs.
pub fn date(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02} UTC",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute()
    )
}

impl fmt::Display for Mismatches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["flag".to_owned(), "here".to_owned(), "cluster".to_owned()]];
        for mismatch in &self.0 {
            rows.push([
                mismatch.flag.to_string(),
                mismatch.here.to_string(),
                mismatch.cluster.value().to_string(),
            ]);
            rows.push([String::new(), mismatch.place_here(), mismatch.place_there()]);
        }
        let width =
            |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let (first, second) = (width(0), width(1));
        let settings = if self.0.len() == 1 { "setting differs" } else { "settings differ" };
        writeln!(f, "{} {settings} from the cluster; nothing was changed", self.0.len())?;
        for [flag, here, cluster] in &rows {
            writeln!(f, "  {flag:first$}  {here:second$}  {cluster}")?;
        }
        self.fix(f)
    }
}

impl Mismatches {
    fn fix(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_files =
            |mismatch: &&Mismatch| matches!(mismatch.origin, Origin::File(_) | Origin::Default);
        if self.0.iter().any(|mismatch| in_files(&mismatch)) {
            writeln!(f, "  fix: in the configuration file of this server write")?;
            for mismatch in self.0.iter().filter(in_files) {
                writeln!(f, "         {}", mismatch.line())?;
            }
        }
        for mismatch in self.0.iter().filter(|mismatch| !in_files(mismatch)) {
            let (name, value) = (mismatch.flag.name(), mismatch.cluster.value());
            match (&mismatch.origin, value.is_empty()) {
                (Origin::Environment(variable), true) => writeln!(f, "  fix: unset {variable}")?,
                (Origin::Environment(variable), false) => {
                    writeln!(f, "  fix: set {variable}={}", value.text())?;
                }
                (_, true) => writeln!(f, "  fix: leave --{name} out")?,
                (_, false) => writeln!(f, "  fix: start with --{name}={}", value.text())?,
            }
        }
        f.write_str("       then start this server again")
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use expect_test::expect;

    use super::super::tests::flags;

    #[test]
    fn table_shows_both_sides_and_the_lines_to_write() {
        let at = UNIX_EPOCH + Duration::from_secs(1_785_931_200);
        let there = "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: 10.43.0.0/16,fd00:43::/112\n\
            disable: [traefik, servicelb]\n";
        let (cluster, _) = flags(there).found(at, "pi-1");
        let here = "disable-helm-controller: true\nsystem-default-registry: registry.example\ndisable: traefik\n";

        let mismatches = flags(here).matches(&cluster).unwrap_err();

        expect![[r#"
            6 settings differ from the cluster; nothing was changed
              flag                     here              cluster
              cluster-cidr             10.42.0.0/16      10.42.0.0/16, fd00:42::/56
                                       default           since 2026-08-05 12:00 UTC, set by pi-1
              service-cidr             10.43.0.0/16      10.43.0.0/16, fd00:43::/112
                                       default           since 2026-08-05 12:00 UTC, set by pi-1
              cluster-dns              10.43.0.10        10.43.0.10, fd00:43::a
                                       default           since 2026-08-05 12:00 UTC, set by pi-1
              disable                  traefik           servicelb, traefik
                                       config.yaml:3:10  since 2026-08-05 12:00 UTC, set by pi-1
              disable-helm-controller  true              false
                                       config.yaml:1:26  since 2026-08-05 12:00 UTC, set by pi-1
              system-default-registry  registry.example  (none)
                                       config.yaml:2:26  since 2026-08-05 12:00 UTC, set by pi-1
              fix: in the configuration file of this server write
                     cluster-cidr: "10.42.0.0/16,fd00:42::/56"
                     service-cidr: "10.43.0.0/16,fd00:43::/112"
                     cluster-dns: "10.43.0.10,fd00:43::a"
                     disable: [servicelb, traefik]
                     disable-helm-controller: false
                     # no `system-default-registry`: remove it
                   then start this server again"#]]
        .assert_eq(&mismatches.to_string());
    }
}

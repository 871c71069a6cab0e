//! Makes the table that a user sees when settings differ.
//!
//! One block per flag: the value here and where it is written, the cluster's value, since when and by whom;
//! then the lines to write, ready to be copied.

use std::fmt;
use std::time::SystemTime;

use time::OffsetDateTime;

use crate::config::Origin;

use super::compare::{ClusterSide, Mismatch, Mismatches};
use super::value::Value;

impl Mismatch {
    /// The line to write into the configuration file, or what to do instead.
    pub fn line(&self) -> String {
        let value = self.cluster.value();
        let name = self.flag.name();
        if value.is_empty() {
            return format!("# no `{name}`: remove it");
        }
        match value {
            Value::Set(words) => {
                format!("{name}: [{}]", words.iter().cloned().collect::<Vec<_>>().join(", "))
            }
            Value::Text(_) | Value::Networks(_) | Value::Addresses(_)
                if value.text().contains([':', '#', ' ', '"', '\'']) =>
            {
                format!("{name}: \"{}\"", value.text().escape_default())
            }
            Value::Switch(_) | Value::Text(_) | Value::Networks(_) | Value::Addresses(_) => {
                format!("{name}: {}", value.text())
            }
        }
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

fn date(time: SystemTime) -> String {
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

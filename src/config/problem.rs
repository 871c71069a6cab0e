//! What is wrong with a configuration, said in full: place, key, what was found, what was expected, the fix.
//!
//! A configuration is checked to its end, so one run shows every problem. Problems carry data, not finished
//! sentences; [`fmt::Display`] is the only place that makes text of them.

use std::fmt;

use super::origin::Origin;
use super::secret::REDACTED;

/// What a problem means for the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The server does not start.
    Error,
    /// The server starts; somebody should look.
    Warning,
    /// Worth knowing.
    Note,
}

impl Severity {
    /// Lower-case name, as printed and as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// One thing to say about the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What it means.
    pub severity: Severity,
    /// Where.
    pub origin: Origin,
    /// What is wrong, beginning with the key where there is one.
    pub what: String,
    /// The offending text, never a secret.
    pub found: Option<String>,
    /// What would have been right.
    pub expected: Option<String>,
    /// What to do.
    pub fix: Option<String>,
}

impl Problem {
    /// A problem that stops the start.
    pub fn error(origin: Origin, what: impl Into<String>) -> Self {
        Self::new(Severity::Error, origin, what)
    }

    /// A problem that does not.
    pub fn warning(origin: Origin, what: impl Into<String>) -> Self {
        Self::new(Severity::Warning, origin, what)
    }

    /// Something worth knowing.
    pub fn note(origin: Origin, what: impl Into<String>) -> Self {
        Self::new(Severity::Note, origin, what)
    }

    fn new(severity: Severity, origin: Origin, what: impl Into<String>) -> Self {
        Self { severity, origin, what: what.into(), found: None, expected: None, fix: None }
    }

    /// Adds the offending text.
    #[must_use]
    pub fn found(mut self, found: impl Into<String>) -> Self {
        self.found = Some(printable(&found.into()));
        self
    }

    /// Adds what would have been right.
    #[must_use]
    pub fn expected(mut self, expected: impl Into<String>) -> Self {
        self.expected = Some(expected.into());
        self
    }

    /// Adds what to do.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(printable(&fix.into()));
        self
    }
}

/// Longest stretch of user text repeated in a message.
const FOUND_CHARS_MAX: usize = 200;

/// The text, with what stands before `@` in a URL as dots: a password, or part of one.
fn without_passwords(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        shown.push_str(before);
        shown.push_str("://");
        // Of several `@` the last one counts; a password may hold the others.
        let end = after.find(['/', ' ', '"', '\'']).unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(at) => {
                shown.push_str(REDACTED);
                &after[at..]
            }
            None => after,
        };
    }
    shown + rest
}

/// One line, bounded, nothing a terminal would act on, and no password of a URL.
fn printable(text: &str) -> String {
    let text = without_passwords(text);
    let mut shown: String = text
        .chars()
        .take(FOUND_CHARS_MAX)
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect();
    if text.chars().nth(FOUND_CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.origin != Origin::Default {
            write!(f, "{}: ", self.origin)?;
        }
        if self.severity != Severity::Error {
            write!(f, "{}: ", self.severity.name())?;
        }
        f.write_str(&self.what)?;
        match (&self.found, &self.expected) {
            (Some(found), Some(expected)) => write!(f, ": found {found}, expected {expected}")?,
            (Some(found), None) => write!(f, ": found {found}")?,
            (None, Some(expected)) => write!(f, ": expected {expected}")?,
            (None, None) => {}
        }
        if let Some(fix) = &self.fix {
            write!(f, "\n  fix: {fix}")?;
        }
        Ok(())
    }
}

/// Every problem of one load, in the order in which they should be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Adds one.
    pub fn push(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    /// Adds all of another's.
    pub fn append(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }

    /// Whether the server must not start.
    pub fn has_errors(&self) -> bool {
        self.0.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// Whether there is nothing to say.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In reading order.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }

    /// Errors first, then by place; problems of one place stay in the order in which they were found.
    #[must_use]
    pub fn sorted(mut self) -> Self {
        self.0.sort_by(|a, b| (a.severity, &a.origin).cmp(&(b.severity, &b.origin)));
        self.0.dedup();
        self
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_urls_are_not_repeated() {
        for (text, shown) in [
            ("https://user:secret@host:6443", "https://********@host:6443"),
            ("https://s@cret@host", "https://********@host"),
            ("a https://x@y, http://secret@z/@", "a https://********@y, http://********@z/@"),
            ("https://host/path@2", "https://host/path@2"),
            ("user@host", "user@host"),
            ("://", "://"),
        ] {
            let problem = Problem::error(Origin::Default, "x").found(text).fix(text);
            assert_eq!(problem.to_string(), format!("x: found {shown}\n  fix: {shown}"));
        }
    }

    #[test]
    fn text_names_place_found_expected_and_fix() {
        let problem = Problem::error(Origin::CommandLine, "token is odd")
            .found("a\u{1b}[2J\nb")
            .expected("c")
            .fix("write d");

        assert_eq!(
            problem.to_string(),
            "command line: token is odd: found a\\u{1b}[2J\\nb, expected c\n  fix: write d"
        );
    }

    #[test]
    fn endless_values_are_cut_in_messages() {
        let problem = Problem::error(Origin::Default, "x").found("é".repeat(1_000));

        assert_eq!(problem.found.unwrap().chars().count(), FOUND_CHARS_MAX + 1);
    }
}

//! Keeps secrets out of logs: a [`Secret`] prints as dots, whoever prints it and however.

use std::fmt;

/// A token, password or key. Only [`Secret::expose`] gives the text, so its uses can be found by name.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// What stands in the place of a secret wherever one would be printed.
pub const REDACTED: &str = "********";

impl Secret {
    /// Wraps the text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself. Never to be logged, put into an error or passed as an argument of a process.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_way_of_printing_shows_the_text() {
        let secret = Secret::new("correct horse");

        assert_eq!(format!("{secret} {secret:?} {secret:#?}"), "******** ******** ********");
        assert_eq!(secret.expose(), "correct horse");
    }
}

//! Remembers the last error that was said, for the status: whoever looks at a server does not have its journal at hand.

use std::sync::{Mutex, PoisonError};

static LAST: Mutex<Option<String>> = Mutex::new(None);

/// This was said as an error.
pub fn remember(text: &str) {
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.to_owned());
}

/// The last error of this process.
pub fn last() -> Option<String> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

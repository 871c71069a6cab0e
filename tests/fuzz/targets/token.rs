//! Tokens, as people paste them.

use k3s_server::join::Token;

pub const DICTIONARY: &[&[u8]] = &[
    b"K10",
    b"::",
    b"server:",
    b"node:",
    b"::server:",
    b"0123456789abcdef",
    b".",
    b"\n",
    b"\xc3\xa4",
];

const HASH: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

pub fn seeds() -> Vec<Vec<u8>> {
    [
        format!("K10{HASH}::server:correct-horse-battery\n"),
        format!("K10{HASH}::node:correct-horse-battery"),
        format!("K10{HASH}::abcdef.0123456789abcdef"),
        "K10::server:correct-horse-battery".to_owned(),
        "correct:horse::battery".to_owned(),
        "abcdef.0123456789abcdef".to_owned(),
    ]
    .map(String::into_bytes)
    .into()
}

/// Whatever the mutations make of the seeds, no part of their secrets is shown.
pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let said = match Token::parse(text) {
        Ok(token) => format!("{:?}", token.password),
        Err(error) => format!("{error} {error:?} {}", error.remedy()),
    };
    for secret in ["correct", "horse", "battery", "abcdef.0"] {
        assert!(!said.contains(secret), "{secret:?} in {said:?}");
    }
}

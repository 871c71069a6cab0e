//! Looks for a secret in bytes, in every form in which one escapes by accident.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use ring::digest;

/// A part of this length is as bad as the whole.
const PART_BYTES: usize = 10;

/// One form of a secret.
struct Form {
    name: String,
    bytes: Vec<u8>,
}

/// A secret by name, in all its forms.
pub struct Hunted {
    name: String,
    forms: Vec<Form>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Hunted {
    pub fn new(name: &str, secret: &[u8]) -> Self {
        assert!(PART_BYTES <= secret.len(), "{name} is too short to look for");
        let mut forms = Vec::new();
        let mut form = |name: &str, bytes: Vec<u8>| {
            forms.push(Form { name: name.to_owned(), bytes });
        };
        secret.windows(PART_BYTES).for_each(|part| form("a part", part.to_vec()));
        form("hex", hex(secret).into_bytes());
        form("HEX", hex(secret).to_uppercase().into_bytes());
        for (name, engine) in [("base64", &STANDARD), ("base64url", &URL_SAFE)] {
            // What stands before it decides how its bits fall into characters.
            for (before, lost) in [(0, 0), (1, 2), (2, 3)] {
                let padded = [&vec![0; before], secret].concat();
                let text = engine.encode(padded);
                form(name, text.as_bytes()[lost..text.len() - 4].to_vec());
            }
        }
        for (name, algorithm) in [
            ("SHA-1", &digest::SHA1_FOR_LEGACY_USE_ONLY),
            ("SHA-256", &digest::SHA256),
            ("SHA-512", &digest::SHA512),
        ] {
            let hash = digest::digest(algorithm, secret);
            form(name, hash.as_ref().to_vec());
            form(name, hex(hash.as_ref()).into_bytes());
        }
        Self { name: name.to_owned(), forms }
    }

    /// The private part of a key of the cluster, as bytes and as it stands in its file. What surrounds it is the same for all
    /// keys, and the public part is in certificates.
    pub fn key(name: &str, pem: &str) -> Vec<Self> {
        const BEFORE: &[u8] = &[2, 1, 1, 4, 32];
        const LINE_CHARACTERS: usize = 64;
        let body: String = pem.lines().filter(|line| !line.contains("-----")).collect();
        let der = STANDARD.decode(&body).unwrap();
        let at = der.windows(BEFORE.len()).position(|bytes| bytes == BEFORE).unwrap();
        let at = at + BEFORE.len();
        let (from, to) = (at.div_ceil(3) * 4, (at + 32) / 3 * 4);
        vec![
            Self::new(name, &der[at..at + 32]),
            Self::new(name, &body.as_bytes()[from..LINE_CHARACTERS]),
            Self::new(name, &body.as_bytes()[LINE_CHARACTERS..to]),
        ]
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The form in which it is there, if it is.
    pub fn found_in(&self, bytes: &[u8]) -> Option<&str> {
        let form = self.forms.iter().find(|form| contains(bytes, &form.bytes));
        form.map(|form| form.name.as_str())
    }

    /// Fails if it is there.
    pub fn is_not_in(&self, place: &str, bytes: &[u8]) {
        if let Some(form) = self.found_in(bytes) {
            panic!("{} is in {place} as {form}", self.name);
        }
    }
}

/// Looks at every place of the first byte only: these are megabytes.
fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| *byte == wanted[0]) {
        rest = &rest[at..];
        if rest.starts_with(wanted) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

#[test]
fn secrets_are_found_in_every_form() {
    let secret = b"a-secret-that-must-not-escape";
    let hunted = Hunted::new("it", secret);
    hunted.is_not_in("nothing", b"");
    hunted.is_not_in("a likeness", b"a-secret that must not escape");
    assert_eq!(hunted.found_in(b"... token=a-secret-tha..."), Some("a part"));
    assert_eq!(hunted.found_in(hex(secret).as_bytes()), Some("hex"));
    for before in 0..6 {
        let text = STANDARD.encode([&vec![b'x'; before], secret.as_slice(), b"yz"].concat());
        assert_eq!(hunted.found_in(text.as_bytes()), Some("base64"), "after {before} bytes");
    }
    let hash = digest::digest(&digest::SHA256, secret);
    assert_eq!(hunted.found_in(hash.as_ref()), Some("SHA-256"));
}

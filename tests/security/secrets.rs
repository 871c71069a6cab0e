//! Looks for secrets in bytes, in every form in which one escapes by accident.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use ring::digest;

/// What is passed over when it is all zeros.
const BLOCK: &[u8] = &[0; 4_096];

/// A part of this length is as bad as the whole.
const PART_BYTES: usize = 10;

/// One form of one secret.
struct Form {
    secret: String,
    name: &'static str,
    bytes: Vec<u8>,
}

/// Secrets in all their forms.
pub struct Secrets {
    forms: Vec<Form>,
    /// Which forms begin with two bytes: logs at their most talkative and preallocated files are read once, for all.
    beginnings: Vec<Vec<usize>>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Secrets {
    pub fn new() -> Self {
        Self { forms: Vec::new(), beginnings: vec![Vec::new(); 1 << 16] }
    }

    fn form(&mut self, secret: &str, name: &'static str, bytes: impl Into<Vec<u8>>) {
        let (secret, bytes) = (secret.to_owned(), bytes.into());
        self.beginnings[beginning(&bytes)].push(self.forms.len());
        self.forms.push(Form { secret, name, bytes });
    }

    pub fn add(&mut self, name: &str, secret: &[u8]) {
        assert!(PART_BYTES <= secret.len(), "{name} is too short to look for");
        for part in secret.windows(PART_BYTES) {
            self.form(name, "a part", part);
        }
        self.form(name, "hex", hex(secret));
        self.form(name, "HEX", hex(secret).to_uppercase());
        for (form, engine) in [("base64", &STANDARD), ("base64url", &URL_SAFE)] {
            // What stands before it decides how its bits fall into characters.
            for (before, lost) in [(0, 0), (1, 2), (2, 3)] {
                let text = engine.encode([&vec![0; before], secret].concat());
                self.form(name, form, &text.as_bytes()[lost..text.len() - 4]);
            }
        }
        for (form, algorithm) in [
            ("SHA-1", &digest::SHA1_FOR_LEGACY_USE_ONLY),
            ("SHA-256", &digest::SHA256),
            ("SHA-512", &digest::SHA512),
        ] {
            let hash = digest::digest(algorithm, secret);
            self.form(name, form, hash.as_ref());
            self.form(name, form, hex(hash.as_ref()));
        }
    }

    /// The private part of a key of the cluster, as bytes and as it stands in its file. What surrounds it is the same for all
    /// keys, and the public part is in certificates.
    pub fn add_key(&mut self, name: &str, pem: &str) {
        const BEFORE: &[u8] = &[2, 1, 1, 4, 32];
        const LINE_CHARACTERS: usize = 64;
        let body: String = pem.lines().filter(|line| !line.contains("-----")).collect();
        let der = STANDARD.decode(&body).unwrap();
        let at = der.windows(BEFORE.len()).position(|bytes| bytes == BEFORE).unwrap();
        let at = at + BEFORE.len();
        let (from, to) = (at.div_ceil(3) * 4, (at + 32) / 3 * 4);
        self.add(name, &der[at..at + 32]);
        self.add(name, &body.as_bytes()[from..LINE_CHARACTERS]);
        self.add(name, &body.as_bytes()[LINE_CHARACTERS..to]);
    }

    /// How many forms are looked for.
    pub fn count(&self) -> usize {
        self.forms.len()
    }

    /// A secret and the form in which it is there. One that is `allowed` there is passed over.
    pub fn found_in(&self, bytes: &[u8], allowed: &[&str]) -> Option<(&str, &str)> {
        // Preallocated files are mostly zeros.
        let blocks = (0..bytes.len())
            .step_by(BLOCK.len())
            .filter(|from| bytes.get(*from..from + BLOCK.len()).is_none_or(|block| block != BLOCK));
        let places = blocks.flat_map(|from| from..(from + BLOCK.len()).min(bytes.len() - 1));
        places
            .flat_map(|at| {
                self.beginnings[beginning(&bytes[at..])].iter().map(move |form| (at, form))
            })
            .map(|(at, form)| (at, &self.forms[*form]))
            .filter(|(at, form)| bytes[*at..].starts_with(&form.bytes))
            .map(|(_, form)| (form.secret.as_str(), form.name))
            .find(|(secret, _)| !allowed.contains(secret))
    }

    /// Fails if one is there.
    pub fn are_not_in(&self, place: &str, bytes: &[u8]) {
        self.are_not_in_but(place, bytes, &[]);
    }

    /// The same for all but some.
    pub fn are_not_in_but(&self, place: &str, bytes: &[u8], allowed: &[&str]) {
        if let Some((secret, form)) = self.found_in(bytes, allowed) {
            panic!("{secret} is in {place}, as {form}");
        }
    }
}

fn beginning(bytes: &[u8]) -> usize {
    usize::from(bytes[0]) << 8 | usize::from(bytes[1])
}

#[test]
fn secrets_are_found_in_every_form() {
    let secret = b"a-secret-that-must-not-escape";
    let mut secrets = Secrets::new();
    secrets.add("it", secret);
    secrets.add("another", b"0123456789");
    let found = |bytes: &[u8]| secrets.found_in(bytes, &[]).map(|(_, form)| form.to_owned());
    assert_eq!(found(b""), None);
    assert_eq!(found(b"a-secret that must not escape"), None);
    assert_eq!(found(b"... token=a-secret-tha...").as_deref(), Some("a part"));
    assert_eq!(found(hex(secret).as_bytes()).as_deref(), Some("hex"));
    for before in 0..6 {
        let text = STANDARD.encode([&vec![b'x'; before], secret.as_slice(), b"yz"].concat());
        assert_eq!(found(text.as_bytes()).as_deref(), Some("base64"), "after {before} bytes");
    }
    let hash = digest::digest(&digest::SHA256, secret);
    assert_eq!(found(hash.as_ref()).as_deref(), Some("SHA-256"));

    let both = [secret.as_slice(), b" 0123456789"].concat();
    assert_eq!(secrets.found_in(&both, &["it"]), Some(("another", "a part")));
    assert_eq!(secrets.found_in(&both, &["it", "another"]), None);
}

#[test]
fn keys_are_found_as_bytes_and_in_their_files() {
    let key = rcgen::KeyPair::generate().unwrap();
    let other = rcgen::KeyPair::generate().unwrap();
    let mut secrets = Secrets::new();
    secrets.add_key("the key", &key.serialize_pem());
    assert!(secrets.found_in(key.serialize_pem().as_bytes(), &[]).is_some());
    assert!(secrets.found_in(key.serialized_der(), &[]).is_some());
    assert_eq!(secrets.found_in(other.serialize_pem().as_bytes(), &[]), None);
    assert_eq!(secrets.found_in(other.serialized_der(), &[]), None);
    assert_eq!(secrets.found_in(key.public_key_pem().as_bytes(), &[]), None);
}

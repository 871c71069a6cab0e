//! Feeds damaged and made-up input to everything that reads bytes from outside: no panic, no hang, no wild memory.
//!
//! A plain mutation loop over a seed corpus, without coverage feedback, so that it runs on the stable compiler within
//! `cargo test`; `fuzz/` runs the same targets under cargo-fuzz for as long as one likes.
//!
//! - Seed and number of inputs are fixed: a green run stays green until code or corpus change.
//! - `FUZZ_SEED=n` tries other inputs, `FUZZ_SECONDS=n` tries for so long per target, whatever their number.
//! - An input that fails is written to `target/fuzz/<target>/`, and belongs into `fuzz/corpus/<target>/` once fixed:
//!   every file there is tried unchanged first.
//! - `UPDATE_CORPUS=1` writes the seeds that are made by code into the corpus.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, reason = "test code")]
#![allow(clippy::let_underscore_must_use, reason = "writing to a string, dropping what is gone")]

mod mutate;
mod targets;

#[path = "../support/random.rs"]
#[allow(dead_code, reason = "shared with the other tests")]
mod random;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mutate::Mutator;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use random::Random;
use targets::Target;

const SEED: u64 = 20_260_101;
/// Longest time one input may take, with room for a busy machine.
const INPUT_MAX: Duration = Duration::from_secs(10);
/// Address space of this process, stacks and allocator arenas included. A length field that is believed asks for more.
const ADDRESS_SPACE_MAX: u64 = 8 << 30;

/// One test per target, so that they share the cores and a failure names its target.
macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_run() {
            let run = [$(stringify!($name)),*];
            let known: Vec<_> = targets::ALL.iter().map(|target| target.name).collect();
            assert_eq!(known, run);
        }
    };
}

targets!(
    bolt, command, config, flags, identity, join, pki, requests, snapshot, token, wal, wal_frame,
    wal_tools
);

fn fuzz(name: &str) {
    let target = targets::ALL.iter().find(|target| target.name == name).expect("a known target");
    let number = |name: &str| -> Option<u64> {
        std::env::var(name).ok().map(|text| text.parse().expect("a number"))
    };
    let seed = number("FUZZ_SEED").unwrap_or(SEED);
    let effort = number("FUZZ_SECONDS").map_or(Effort::Inputs(target.inputs), |seconds| {
        Effort::Time(Duration::from_secs(seconds))
    });
    limit_memory();
    match run(target, &corpus(target), Random::new(seed), effort) {
        Ok(tried) => println!("{name}: {tried} inputs, FUZZ_SEED={seed}"),
        Err(failure) => panic!("{name}: {}, FUZZ_SEED={seed}", keep(target, &failure)),
    }
}

fn limit_memory() {
    let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    setrlimit(Resource::RLIMIT_AS, ADDRESS_SPACE_MAX.min(hard), hard).unwrap();
}

/// A loop that finds nothing proves something only if it would find something.
#[test]
fn a_planted_bug_is_found() {
    fn buggy(input: &[u8]) {
        // Needs a length field that disagrees with the length, behind an intact magic.
        if let [b'M', b'G', length, rest @ ..] = input {
            assert!(usize::from(*length) <= rest.len() + 64, "read past the end");
        }
    }
    let target =
        Target { name: "planted", inputs: 0, seeds: Vec::new, dictionary: &[], run: buggy };
    let corpus = vec![b"MG\x03abc".to_vec(), b"MG\x00".to_vec()];
    let failure = run(&target, &corpus, Random::new(SEED), Effort::Inputs(100_000));
    let failure = failure.expect_err("the planted bug");
    assert!(failure.what.contains("read past the end"), "{}", failure.what);
    assert!(failure.input.starts_with(b"MG"));
}

/// The list of messages is written by hand; the protocol says whether it is complete.
#[test]
fn every_request_of_the_protocol_is_decoded() {
    use prost::Message;
    let descriptors =
        prost_types::FileDescriptorSet::decode(k3s_server::proto::DESCRIPTORS).unwrap();
    let messages = descriptors.file.iter().flat_map(|file| &file.message_type);
    let requests = messages.map(|message| message.name()).filter(|name| name.ends_with("Request"));
    let decoded: Vec<_> = targets::requests::messages().collect();
    let missing: Vec<_> = requests.filter(|name| !decoded.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// How long to try.
#[derive(Clone, Copy, Debug)]
enum Effort {
    Inputs(usize),
    Time(Duration),
}

/// An input and what happened.
#[derive(Debug)]
struct Failure {
    input: Vec<u8>,
    what: String,
}

/// Tries the corpus unchanged, then mutations of it. Returns how many inputs were tried.
fn run(
    target: &Target,
    corpus: &[Vec<u8>],
    random: Random,
    effort: Effort,
) -> Result<usize, Failure> {
    assert!(!corpus.is_empty(), "no corpus for {}", target.name);
    for input in corpus {
        attempt(target, input)?;
    }
    let mut mutator = Mutator::new(random, corpus, target.dictionary);
    let (started, mut tried) = (Instant::now(), corpus.len());
    loop {
        let done = match effort {
            Effort::Inputs(inputs) => corpus.len() + inputs <= tried,
            Effort::Time(time) => time <= started.elapsed(),
        };
        if done {
            return Ok(tried);
        }
        attempt(target, &mutator.input())?;
        tried += 1;
    }
}

fn attempt(target: &Target, input: &[u8]) -> Result<(), Failure> {
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let what = match outcome {
        Ok(()) if started.elapsed() < INPUT_MAX => return Ok(()),
        Ok(()) => format!("took {:?}", started.elapsed()),
        Err(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "panicked".to_owned()),
    };
    Err(Failure { input: input.to_vec(), what })
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of `fuzz/corpus/<target>` and what the target makes up by itself.
fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let dir = root().join("fuzz/corpus").join(target.name);
    let made = (target.seeds)();
    if std::env::var_os("UPDATE_CORPUS").is_some() {
        fs::create_dir_all(&dir).unwrap();
        for (index, seed) in made.iter().enumerate() {
            fs::write(dir.join(format!("seed-{index:02}")), seed).unwrap();
        }
    }
    let mut files: Vec<PathBuf> =
        dir.read_dir().into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    made.into_iter().chain(files.iter().map(|file| fs::read(file).unwrap())).collect()
}

/// Writes a failing input where it can be found, and says where.
fn keep(target: &Target, failure: &Failure) -> String {
    let dir = root().join("target/fuzz").join(target.name);
    fs::create_dir_all(&dir).unwrap();
    let file = dir.join(format!("{:08x}", crc32c::crc32c(&failure.input)));
    fs::write(&file, &failure.input).unwrap();
    format!("{}; the input is in {}", failure.what, file.display())
}

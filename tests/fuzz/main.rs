//! Feeds damaged and made-up input to everything that reads bytes from outside: no panic, no hang, no wild memory.
//!
//! A plain mutation loop over a seed corpus, without coverage feedback, so that it runs on the stable compiler within
//! `cargo test`; `fuzz/` runs the same targets under cargo-fuzz for as long as one likes.
//!
//! - `FUZZ_SEED=n` repeats a run, `FUZZ_SECONDS=n` runs each target longer.
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
use random::Random;
use targets::Target;

/// The same every time, so that a green run stays green until code or corpus change.
const SEED: u64 = 20_260_101;
const SECONDS: u64 = 3;
/// Longest time one input may take, with room for a busy machine.
const INPUT_MAX: Duration = Duration::from_secs(5);

#[test]
fn no_input_makes_a_target_panic() {
    let number = |name: &str, default| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let (seed, seconds) = (number("FUZZ_SEED", SEED), number("FUZZ_SECONDS", SECONDS));
    println!("FUZZ_SEED={seed}");
    for target in targets::ALL {
        let corpus = corpus(target);
        let time = Duration::from_secs(seconds);
        match run(target, &corpus, Random::new(seed), time) {
            Ok(Count { tried, accepted }) => {
                println!("{}: {tried} inputs, {accepted} of them accepted", target.name);
                // Otherwise nothing behind the first check was reached.
                assert!(tried < accepted * 200, "{} hardly accepts anything", target.name);
            }
            Err(failure) => panic!("{}: {}", target.name, keep(target, &failure)),
        }
    }
}

/// A loop that finds nothing proves something only if it would find something.
#[test]
fn a_planted_bug_is_found() {
    fn buggy(input: &[u8]) -> bool {
        // Needs a length field that disagrees with the length, behind an intact magic.
        if let [b'M', b'G', length, rest @ ..] = input {
            assert!(usize::from(*length) <= rest.len() + 64, "read past the end");
        }
        true
    }
    let target =
        Target { name: "planted", seeds: Vec::new, dictionary: &[], message_at: None, run: buggy };
    let corpus = vec![b"MG\x03abc".to_vec(), b"MG\x00".to_vec()];
    let failure = run(&target, &corpus, Random::new(SEED), Duration::from_secs(20));
    let failure = failure.expect_err("the planted bug");
    assert!(failure.what.contains("read past the end"), "{}", failure.what);
    assert!(failure.input.starts_with(b"MG"));
}

/// An input and what happened.
#[derive(Debug)]
struct Failure {
    input: Vec<u8>,
    what: String,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    tried: usize,
    accepted: usize,
}

/// Tries the corpus unchanged, then mutations of it until the time is up.
fn run(
    target: &Target,
    corpus: &[Vec<u8>],
    random: Random,
    time: Duration,
) -> Result<Count, Failure> {
    assert!(!corpus.is_empty(), "no corpus for {}", target.name);
    let mut count = Count::default();
    for input in corpus {
        count.accepted += usize::from(attempt(target, input)?);
        count.tried += 1;
    }
    let mut mutator = Mutator::new(random, corpus, target.dictionary, target.message_at);
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        count.accepted += usize::from(attempt(target, &mutator.input())?);
        count.tried += 1;
    }
    Ok(count)
}

/// Whether the input was accepted.
fn attempt(target: &Target, input: &[u8]) -> Result<bool, Failure> {
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let what = match outcome {
        Ok(accepted) if started.elapsed() < INPUT_MAX => return Ok(accepted),
        Ok(_) => format!("took {:?}", started.elapsed()),
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

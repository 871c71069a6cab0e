//! What is run: the quick part, ranges of seeds, and every planted fault until a run sees it.

use std::io::Write as _;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::arguments::Request;
use crate::jobs::{self, DURATION, Ended, Life, What};
use crate::{mutants, scenarios};

/// The quick part: so many seeds, for so long each.
const QUICK_SEEDS: Range<u64> = 0..24;
const QUICK: Duration = Duration::from_secs(20);

/// Seeds that are run twice, to see that they are the same run.
const TWICE: Range<u64> = 1000..1003;

/// Runs after which a planted fault counts as not seen.
const MUTANT_SEEDS: Range<u64> = 0..50;
const MUTANT: Duration = Duration::from_secs(60);

const SAME_SEED: &str = "the_same_seed_is_the_same_run";
const SEEDS: &str = "seeds_find_nothing";

/// Everything in the quick part.
pub(crate) fn names() -> Vec<&'static str> {
    [SAME_SEED, SEEDS].into_iter().chain(scenarios::NAMES.iter().copied()).collect()
}

/// The quick part, or what of it has one of the filters in its name.
pub(crate) fn tests(request: &Request, filters: &[String]) -> ExitCode {
    let wanted =
        |name: &&str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()));
    let names: Vec<&str> = names().into_iter().filter(wanted).collect();
    println!("\nrunning {} simulations", names.len());
    let lives = names.iter().filter(|name| scenarios::NAMES.contains(name));
    let lives = lives.map(|name| Life::new(What::Scenario((*name).to_owned()), None)).collect();
    let mut failed = run_all(request, lives, true);
    if names.contains(&SEEDS) {
        failed += run_all(request, of_seeds(QUICK_SEEDS, request.duration.or(Some(QUICK))), false);
    }
    if names.contains(&SAME_SEED) {
        failed += run_twice(request);
    }
    println!("\nsimulations: {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn of_seeds(seeds: Range<u64>, duration: Option<Duration>) -> Vec<Life> {
    seeds.map(|seed| Life::new(What::Seed(seed), duration)).collect()
}

/// A range of seeds.
pub(crate) fn seeds(request: &Request, seeds: Range<u64>) -> ExitCode {
    let lives = of_seeds(seeds, Some(request.duration.unwrap_or(DURATION)));
    if run_all(request, lives, false) == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs them, tells about every failure, and sums up. How many failed.
fn run_all(request: &Request, lives: Vec<Life>, by_name: bool) -> usize {
    if lives.is_empty() {
        return 0;
    }
    let (done, total, begin) = (AtomicU64::new(0), lives.len() as u64, Instant::now());
    let ended = jobs::all(lives, request.jobs, |one| {
        if !one.passed {
            tell(request, one);
        } else if by_name {
            println!("{} ... ok", one.life.what);
        }
        let done = 1 + done.fetch_add(1, Relaxed);
        if !by_name && (done.is_multiple_of(20) || done == total) {
            println!("{done} of {total} seeds, {:.0} s", begin.elapsed().as_secs_f64());
            std::io::stdout().flush().ok();
        }
        true
    });
    if !by_name {
        sum_up(&ended, begin.elapsed(), request.jobs);
    }
    ended.iter().filter(|one| !one.passed).count()
}

fn tell(request: &Request, ended: &Ended) {
    println!("{} ... FAILED: {}", ended.life.what, ended.violation());
    println!("  again: {}", ended.life.command());
    let Some(dir) = &request.case_dir else { return };
    let trace = dir.join(format!("{}.trace", ended.life.what));
    if let Err(error) = std::fs::create_dir_all(dir) {
        println!("  {}: {error}", dir.display());
        return;
    }
    // The same run once more, now with its trace.
    let again = jobs::elsewhere(&ended.life, Some(&trace));
    println!("  trace: {} ({})", trace.display(), again.output.lines().next().unwrap_or_default());
}

fn sum_up(ended: &[Ended], took: Duration, jobs: usize) {
    let sum = |name: &str| ended.iter().filter_map(|one| one.number(name)).sum::<u64>();
    let seconds = Duration::from_millis(sum("simulated")).as_secs_f64();
    println!(
        "{} runs, {:.2} simulated hours in {:.0} s ({:.0} times as fast, {jobs} at a time)",
        ended.len(),
        seconds / 3600.0,
        took.as_secs_f64(),
        seconds / took.as_secs_f64()
    );
    let counted = [
        "messages", "writes:", "reads:", "unknown:", "replies:", "votes:", "commits:", "leaders:",
        "entries:", "batches:", "hashes:",
    ];
    let counted = counted.map(|name| format!("{} {}", name.trim_end_matches(':'), sum(name)));
    println!("  {}", counted.join(", "));
    let troubles = crate::nemesis::Trouble::ALL.iter();
    let troubles: Vec<String> =
        troubles.map(|trouble| format!("{trouble:?} {}", sum(&format!("{trouble:?}:")))).collect();
    println!("  {}", troubles.join(", "));
}

fn run_twice(request: &Request) -> usize {
    let lives = TWICE.chain(TWICE).map(|seed| Life::new(What::Seed(seed), Some(QUICK))).collect();
    let ended = jobs::all(lives, request.jobs, |_| true);
    let mut failed = 0;
    for seed in TWICE {
        let of_seed = ended.iter().filter(|one| one.life.what == What::Seed(seed));
        let fingerprints: Vec<_> = of_seed.map(Ended::fingerprint).collect();
        if fingerprints.len() != 2
            || fingerprints[0].is_none()
            || fingerprints[0] != fingerprints[1]
        {
            println!("{SAME_SEED} ... FAILED: seed {seed} ran as {fingerprints:?}");
            failed = 1;
        }
    }
    if failed == 0 {
        println!("{SAME_SEED} ... ok");
    }
    failed
}

/// Plants every fault, and runs seeds until one sees it.
pub(crate) fn mutants(request: &Request) -> ExitCode {
    let names = mutants::names();
    if names.is_empty() {
        println!("{}", mutants::MISSING);
        return ExitCode::FAILURE;
    }
    let seeds = request.seeds.clone().unwrap_or(MUTANT_SEEDS);
    let mut missed = Vec::new();
    for name in names {
        let duration = Some(request.duration.unwrap_or(MUTANT));
        let mut lives = of_seeds(seeds.clone(), duration);
        let known =
            scenarios::NAMES.iter().map(|name| Life::new(What::Scenario((*name).to_owned()), None));
        lives.extend(known);
        lives.iter_mut().for_each(|life| life.mutant = Some(name.to_owned()));
        let begin = Instant::now();
        let ended = jobs::all(lives, request.jobs, |one| one.passed);
        match ended.iter().find(|one| !one.passed) {
            Some(one) => println!(
                "{name}: seen by {} ({} runs, {:.0} s): {}",
                one.life.what,
                ended.len(),
                begin.elapsed().as_secs_f64(),
                short(one.violation())
            ),
            None => {
                println!("{name}: NOT SEEN in {} runs", ended.len());
                missed.push(name);
            }
        }
        std::io::stdout().flush().ok();
    }
    if missed.is_empty() {
        println!("every planted fault was seen");
        return ExitCode::SUCCESS;
    }
    println!("not seen: {}", missed.join(", "));
    ExitCode::FAILURE
}

fn short(text: &str) -> String {
    text.chars().take(160).collect()
}

//! What can be asked for on the command line.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use crate::jobs::{Life, What};

pub(crate) const HELP: &str = "\
usage: sim [NAME...]                        the quick part, or what has NAME in its name
       sim --seeds A..B [--seconds N]       these seeds, B excluded
       sim --mutants [--seeds A..B]         every planted fault (feature `mutants`)
       sim --replay SEED|NAME [--seconds N] one run, its trace on stderr

  --seconds N     simulated seconds of trouble per run
  --case-dir DIR  the trace of every failing run is written there
  --jobs N        runs at a time; as many as there are cores
  --mutant NAME   with --replay: with this fault planted";

/// What to do.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    Help,
    List,
    Tests(Vec<String>),
    Seeds(Range<u64>),
    Mutants,
    /// One run in this process.
    One(Life),
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) task: Task,
    pub(crate) seeds: Option<Range<u64>>,
    pub(crate) duration: Option<Duration>,
    pub(crate) case_dir: Option<PathBuf>,
    pub(crate) jobs: usize,
    pub(crate) trace: Option<PathBuf>,
}

impl Request {
    /// Reads the arguments; those that `cargo test -- …` gives to every test binary are understood or passed over.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let mut request = Self {
            task: Task::Tests(Vec::new()),
            seeds: None,
            duration: None,
            case_dir: None,
            jobs: cores,
            trace: None,
        };
        let (mut names, mut mutant, mut mutants, mut one) = (Vec::new(), None, false, None);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--help" | "-h" => request.task = Task::Help,
                "--list" => request.task = Task::List,
                "--seeds" => request.seeds = Some(range(&value()?)?),
                "--seconds" => request.duration = Some(Duration::from_secs(number(&value()?)?)),
                "--case-dir" => request.case_dir = Some(value()?.into()),
                "--jobs" | "--test-threads" => {
                    request.jobs = usize::try_from(number(&value()?)?).unwrap_or(1).max(1);
                }
                "--mutants" => mutants = true,
                "--mutant" => mutant = Some(value()?),
                "--trace" => request.trace = Some(value()?.into()),
                "--one" => one = Some((What::parse(&value()?), false)),
                "--replay" => one = Some((What::parse(&value()?), true)),
                "--format" | "--color" | "-Z" => drop(value()?),
                flag if flag.starts_with('-') => {
                    let known = ["--nocapture", "--no-capture", "--show-output", "--quiet", "-q"];
                    if !known.contains(&flag) && !flag.starts_with("--test-threads=") {
                        return Err(format!("unknown argument {flag}"));
                    }
                }
                name => names.push(name.to_owned()),
            }
        }
        request.task = match (request.task, one, mutants, &request.seeds) {
            (task @ (Task::Help | Task::List), ..) => task,
            (_, Some((what, echo)), ..) => {
                let seconds = request.duration;
                Task::One(Life { what, duration: seconds, mutant, echo })
            }
            (_, None, true, _) => Task::Mutants,
            (_, None, false, Some(seeds)) => Task::Seeds(seeds.clone()),
            (_, None, false, None) => Task::Tests(names),
        };
        Ok(request)
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected a number, found {text}"))
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (first, end) = text.split_once("..").ok_or(format!("expected A..B, found {text}"))?;
    Ok(number(first)?..number(end)?)
}

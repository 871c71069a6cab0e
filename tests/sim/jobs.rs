//! One run in a process of its own, and many of them at a time.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::mutants;
use crate::run::{self, Report, Watch};
use crate::scenarios;

/// Simulated seconds of trouble, unless told otherwise.
pub(crate) const DURATION: Duration = Duration::from_secs(120);

/// What is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Seed(u64),
    Scenario(String),
}

impl What {
    pub(crate) fn parse(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Scenario(text.to_owned()), Self::Seed)
    }
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seed(seed) => write!(f, "{seed}"),
            Self::Scenario(name) => f.write_str(name),
        }
    }
}

/// One run.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) what: What,
    pub(crate) duration: Option<Duration>,
    pub(crate) mutant: Option<String>,
    /// Its trace goes to stderr.
    pub(crate) echo: bool,
}

impl Life {
    pub(crate) const fn new(what: What, duration: Option<Duration>) -> Self {
        Self { what, duration, mutant: None, echo: false }
    }

    fn arguments(&self, verb: &str) -> Vec<String> {
        let mut arguments = vec![verb.to_owned(), self.what.to_string()];
        if let Some(duration) = self.duration {
            arguments.extend(["--seconds".to_owned(), duration.as_secs().to_string()]);
        }
        if let Some(mutant) = &self.mutant {
            arguments.extend(["--mutant".to_owned(), mutant.clone()]);
        }
        arguments
    }

    /// What to type to see it again.
    pub(crate) fn command(&self) -> String {
        let features = if self.mutant.is_some() { " --features mutants" } else { "" };
        let profile = if cfg!(debug_assertions) { "" } else { " --release" };
        format!(
            "cargo test{profile}{features} --test sim -- {}",
            self.arguments("--replay").join(" ")
        )
    }
}

/// How a run ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) life: Life,
    pub(crate) passed: bool,
    pub(crate) output: String,
}

impl Ended {
    /// The number behind a word of the run's line.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        let (_, rest) = self.output.split_once(&format!("{name} "))?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    }

    /// The fingerprint of everything that happened.
    pub(crate) fn fingerprint(&self) -> Option<&str> {
        self.output.strip_prefix("fingerprint ")?.split(' ').next()
    }

    /// What was violated.
    pub(crate) fn violation(&self) -> &str {
        self.output.split_once("violation: ").map_or(self.output.as_str(), |(_, what)| what).trim()
    }
}

/// Runs it in this process.
pub(crate) fn here(life: &Life, trace: Option<&Path>) -> ExitCode {
    if let Some(mutant) = &life.mutant
        && let Err(what) = mutants::plant(mutant)
    {
        eprintln!("{what}");
        return ExitCode::from(64);
    }
    let watch = Watch { keep_trace: trace.is_some(), echo: life.echo };
    let report = match &life.what {
        What::Seed(seed) => Some(run::seed(*seed, life.duration.unwrap_or(DURATION), watch)),
        What::Scenario(name) => scenarios::run(name, watch),
    };
    let Some(report) = report else {
        eprintln!("nothing is called {}", life.what);
        return ExitCode::from(64);
    };
    if let (Some(path), Some(text)) = (trace, &report.trace)
        && let Err(error) = std::fs::write(path, text)
    {
        eprintln!("{}: {error}", path.display());
    }
    println!("{}", line(&report));
    match &report.violation {
        Some(violation) => {
            println!("violation: {violation}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn line(report: &Report) -> String {
    let Report { fingerprint, lines, simulated, counts, checked, done, messages, .. } = report;
    format!(
        "fingerprint {fingerprint:016x} lines {lines} simulated {} messages {messages} {counts:?} {checked:?} {done:?}",
        simulated.as_millis()
    )
}

/// Runs it in a process of its own.
pub(crate) fn elsewhere(life: &Life, trace: Option<&Path>) -> Ended {
    let ended = |passed, output| Ended { life: life.clone(), passed, output };
    let exe: PathBuf = match std::env::current_exe() {
        Ok(exe) => exe,
        Err(error) => return ended(false, error.to_string()),
    };
    let mut command = Command::new(exe);
    command.args(life.arguments("--one"));
    if let Some(trace) = trace {
        command.arg("--trace").arg(trace);
    }
    match command.stdin(Stdio::null()).stderr(Stdio::inherit()).output() {
        Ok(output) => {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            if text.is_empty() {
                text = format!("the process said nothing: {}", output.status);
            }
            ended(output.status.success(), text)
        }
        Err(error) => ended(false, error.to_string()),
    }
}

/// Runs them all, so many at a time, and shows each when it has ended. Stops early when `each` says so.
pub(crate) fn all(
    lives: Vec<Life>,
    jobs: usize,
    each: impl Fn(&Ended) -> bool + Sync,
) -> Vec<Ended> {
    let (left, ended) = (Mutex::new(lives.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(life) = next else { return };
                    let one = elsewhere(&life, None);
                    if !each(&one) {
                        left.lock().unwrap_or_else(PoisonError::into_inner).by_ref().for_each(drop);
                    }
                    ended.lock().unwrap_or_else(PoisonError::into_inner).push(one);
                }
            });
        }
    });
    ended.into_inner().unwrap_or_else(PoisonError::into_inner)
}

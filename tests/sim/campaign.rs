//! Many runs: one process each, as many at a time as there are cores, a line for every failure and the command that repeats it.

use std::fs;
use std::io::Write as _;
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::run::{self, Report, Watch};

pub(crate) const HELP: &str = "\
usage: sim [--seeds A..B] [--seconds N] [--case-dir DIR] [--jobs N]
       sim --replay SEED [--seconds N]

  --seeds A..B    runs these seeds, B excluded
  --seconds N     simulated seconds of trouble per run (120)
  --case-dir DIR  the trace of every failing seed is written there
  --jobs N        runs at a time (as many as there are cores)
  --replay SEED   one run, its trace on stderr";

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    seeds: Range<u64>,
    duration: Duration,
    case_dir: Option<PathBuf>,
    jobs: usize,
    /// One seed in this process: what the runs of a campaign are.
    one: Option<u64>,
    echo: bool,
    trace: Option<PathBuf>,
}

impl Request {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let mut request = Self {
            seeds: 0..20,
            duration: Duration::from_secs(20),
            case_dir: None,
            jobs: cores,
            one: None,
            echo: false,
            trace: None,
        };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--seeds" => request.seeds = range(&value()?)?,
                "--seconds" => request.duration = Duration::from_secs(number(&value()?)?),
                "--case-dir" => request.case_dir = Some(value()?.into()),
                "--jobs" => request.jobs = usize::try_from(number(&value()?)?).unwrap_or(1).max(1),
                "--one" => request.one = Some(number(&value()?)?),
                "--trace" => request.trace = Some(value()?.into()),
                "--replay" => {
                    request.one = Some(number(&value()?)?);
                    request.echo = true;
                }
                // What `cargo test -- …` passes to every test binary.
                "--nocapture" | "--no-capture" | "--quiet" | "-q" => {}
                other => return Err(format!("unknown argument {other}")),
            }
        }
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

/// Does what is asked for.
pub(crate) fn run(request: &Request) -> ExitCode {
    match request.one {
        Some(seed) => one(request, seed),
        None => many(request),
    }
}

fn one(request: &Request, seed: u64) -> ExitCode {
    let watch = Watch { keep_trace: request.trace.is_some(), echo: request.echo };
    let report = run::seed(seed, request.duration, watch);
    if let (Some(path), Some(trace)) = (&request.trace, &report.trace)
        && let Err(error) = fs::write(path, trace)
    {
        eprintln!("{}: {error}", path.display());
    }
    println!("{}", line(&report));
    if let Some(violation) = &report.violation {
        println!("violation: {violation}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn line(report: &Report) -> String {
    let Report { fingerprint, lines, simulated, counts, checked, done, messages, .. } = report;
    format!(
        "fingerprint {fingerprint:016x} lines {lines} simulated {} messages {messages} {counts:?} {checked:?} {done:?}",
        simulated.as_millis()
    )
}

/// How a run in a process of its own ended.
struct Ended {
    seed: u64,
    output: String,
    passed: bool,
}

fn in_a_process(request: &Request, seed: u64, trace: Option<PathBuf>) -> Ended {
    let failed = |what: String| Ended { seed, output: what, passed: false };
    let exe = match std::env::current_exe() {
        Ok(exe) => exe,
        Err(error) => return failed(error.to_string()),
    };
    let mut command = Command::new(exe);
    command.args(["--one", &seed.to_string(), "--seconds", &request.duration.as_secs().to_string()]);
    if let Some(trace) = trace {
        command.arg("--trace").arg(trace);
    }
    match command.stdin(Stdio::null()).stderr(Stdio::inherit()).output() {
        Ok(output) => Ended {
            seed,
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            passed: output.status.success(),
        },
        Err(error) => failed(error.to_string()),
    }
}

fn many(request: &Request) -> ExitCode {
    let next = AtomicU64::new(request.seeds.start);
    let ended: Mutex<Vec<Ended>> = Mutex::default();
    let begin = Instant::now();
    let total = request.seeds.end.saturating_sub(request.seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..request.jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if request.seeds.end <= seed {
                        return;
                    }
                    let one = in_a_process(request, seed, None);
                    if !one.passed {
                        report_failure(request, &one);
                    }
                    let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
                    ended.push(one);
                    progress(ended.len() as u64, total, begin);
                }
            });
        }
    });
    let ended = ended.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary(request, &ended, begin.elapsed())
}

fn progress(done: u64, total: u64, begin: Instant) {
    if done.is_multiple_of(20) || done == total {
        println!("{done} of {total} seeds, {:.0} s", begin.elapsed().as_secs_f64());
        std::io::stdout().flush().ok();
    }
}

fn report_failure(request: &Request, ended: &Ended) {
    let Ended { seed, output, .. } = ended;
    let seconds = request.duration.as_secs();
    println!("seed {seed} failed: {}", output.trim());
    println!("  again: cargo test --test sim -- --replay {seed} --seconds {seconds}");
    let Some(dir) = &request.case_dir else { return };
    let trace = dir.join(format!("seed-{seed}.trace"));
    if let Err(error) = fs::create_dir_all(dir) {
        println!("  {}: {error}", dir.display());
        return;
    }
    // The same run once more, now with its trace: it is the same, because of its seed.
    in_a_process(request, *seed, Some(trace.clone()));
    println!("  trace: {}", trace.display());
}

fn summary(request: &Request, ended: &[Ended], took: Duration) -> ExitCode {
    let failed: Vec<u64> = ended.iter().filter(|one| !one.passed).map(|one| one.seed).collect();
    let simulated: f64 = ended.iter().filter_map(|one| field(&one.output, "simulated")).sum::<f64>() / 1e3;
    let writes: f64 = ended.iter().filter_map(|one| field(&one.output, "writes:")).sum();
    println!(
        "{} runs, {:.1} simulated hours in {:.0} s ({:.0} simulated seconds a second, {} at a time), {writes} acknowledged writes",
        ended.len(),
        simulated / 3600.0,
        took.as_secs_f64(),
        simulated / took.as_secs_f64(),
        request.jobs,
    );
    if failed.is_empty() {
        println!("no violation");
        return ExitCode::SUCCESS;
    }
    println!("{} failed: {failed:?}", failed.len());
    ExitCode::FAILURE
}

/// The number behind a word of a run's line.
fn field(output: &str, name: &str) -> Option<f64> {
    let (_, rest) = output.split_once(&format!("{name} "))?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

//! `bench-sd`: measures k3s-server against etcd on SD cards, emulated or real. `bench/README.md` says how to use it.

mod bench;
mod card;
mod cluster;
mod limit;
mod load;
mod measures;
mod plan;
mod plot;
mod report;
mod rig;
mod subject;
mod sys;
mod targets;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bench::{Case, Settings};
use subject::Subject;

const USAGE: &str = "\
bench-sd [only=WORD,WORD] [quick=1] [rounds=N] [seconds=N] [idle=SECONDS] [dir=DIRECTORY] [results=DIRECTORY] [etcd=PROGRAM]
bench-sd list";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ended = match arguments.split_first() {
        Some((first, rest)) if first == "card" => card::run(rest),
        Some((first, _)) if first == "list" => {
            list();
            Ok(())
        }
        _ => measure(&arguments),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-sd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list() {
    for group in plan::everything() {
        for work in &group.works {
            println!("{}", group.case(*work));
        }
    }
}

/// `key=value` words; those without a value are as if not there.
fn options(arguments: &[String]) -> Result<BTreeMap<String, String>, String> {
    let mut options = BTreeMap::new();
    for argument in arguments {
        let (key, value) = argument.split_once('=').ok_or(USAGE)?;
        let known = ["only", "quick", "rounds", "seconds", "idle", "dir", "results", "etcd"];
        if !known.contains(&key) {
            return Err(format!("{key}: no such option\n{USAGE}"));
        }
        if !value.is_empty() {
            options.insert(key.to_owned(), value.to_owned());
        }
    }
    Ok(options)
}

fn measure(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let options = options(arguments)?;
    let number = |key: &str, quick: f64, thorough: f64| match options.get(key) {
        Some(text) => text.parse().map_err(|_| format!("{key}={text}: expected a number")),
        None => Ok(if options.contains_key("quick") { quick } else { thorough }),
    };
    let settings = Settings {
        rounds: number("rounds", 1.0, 3.0)? as usize,
        seconds: number("seconds", 4.0, 10.0)?,
        idle_seconds: number("idle", 60.0, 600.0)?,
        directory: options.get("dir").map(PathBuf::from),
    };
    let words = options.get("only").map_or(Vec::new(), |words| {
        words.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect()
    });
    let groups = match settings.directory {
        Some(_) => plan::on_a_real_card(),
        None => plan::everything(),
    };
    let groups = plan::only(groups, &words);
    if groups.is_empty() {
        return Err("no case has such a name; `bench-sd list` has them all".into());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut etcd = Subject::newest_etcd(&root)?;
    if let Some(program) = options.get("etcd") {
        etcd.program = PathBuf::from(program);
    }
    let ours = Subject::ours(&root)?;
    let sd = ours.with("ours-sd", "storage-medium: sd");
    let results = options.get("results").map_or_else(|| root.join("bench/results"), PathBuf::from);
    let heading = heading(&[&etcd, &ours], &settings, arguments);
    println!("{heading}");
    let mut cases = earlier(&results);
    let everything = async {
        for group in &groups {
            bench::run_group(group, &[etcd.clone(), ours.clone(), sd.clone()], &settings, |case| {
                let alone = BTreeMap::from([(case.name.clone(), case.clone())]);
                println!("{}", report::table(&alone));
                cases.insert(case.name.clone(), case);
                report::write(&results, &heading, &cases).map(drop)
            })
            .await?;
        }
        Ok::<(), Box<dyn Error>>(())
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            ended = everything => ended,
            // Dropping what runs takes servers and cards away.
            _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
        }
    })?;
    println!("{}", targets::table(&cases));
    println!("written to {}", results.display());
    Ok(())
}

/// Cases that earlier runs left in the same directory, so that a few can be measured again.
fn earlier(results: &Path) -> BTreeMap<String, Case> {
    let text = fs::read_to_string(results.join("results.json")).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Machine and versions.
fn heading(subjects: &[&Subject], settings: &Settings, arguments: &[String]) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpu.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim()).to_owned()
    };
    let model = if field("Model").is_empty() { field("model name") } else { field("Model") };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let date = rig::run("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default();
    let card = settings.directory.as_ref().map_or_else(
        || "emulated cards, each server on its own".to_owned(),
        |directory| format!("a real card: {}", directory.display()),
    );
    let versions: Vec<String> =
        subjects.iter().map(|subject| format!("{}: {}", subject.name, subject.version())).collect();
    format!(
        "# Measured by `make bench-sd`\n\n\
         Last run {} with `bench-sd {}`, {} rounds of {} s; {card}.\n\
         Machine: {model}, {cores} cores, Linux {}; load at the start {}. {}.\n",
        date.trim(),
        arguments.join(" "),
        settings.rounds,
        settings.seconds,
        kernel.trim(),
        load.split_whitespace().next().unwrap_or_default(),
        versions.join("; "),
    )
}

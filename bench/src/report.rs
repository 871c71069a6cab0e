//! What was found, as a table and plots, with the machine and the versions it was found on.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::bench::Case;
use crate::plot::{Plot, Scale};
use crate::targets::{self, ratio, value};

/// Columns of the table: heading, measure, digits after the point.
const COLUMNS: &[(&str, &str, usize)] = &[
    ("writes/s", "writes_s", 0),
    ("p50 ms", "p50_ms", 2),
    ("p90", "p90_ms", 1),
    ("p99", "p99_ms", 1),
    ("p99.9", "p999_ms", 1),
    ("max", "max_ms", 0),
    ("gap ms", "gap_ms", 0),
    ("failed", "failed", 0),
    ("elections", "elections", 0),
    ("flush/write", "flushes_per_write", 3),
    ("card B/write", "bytes_per_write", 0),
    ("NAND B/write", "nand_per_write", 0),
    ("CPU us/write", "cpu_us_per_write", 0),
    ("RSS MiB", "rss_mib", 0),
];

/// Measures that only some cases have, named beneath their rows.
const MORE: &[&str] = &[
    "gb_per_day",
    "nand_gb_per_day",
    "flushes_s",
    "events_s",
    "cpu_us_per_event",
    "rss_added_mib",
    "attached_p99_ms",
    "seconds",
    "clean_start_s",
    "clean_cpu_s",
    "killed_start_s",
    "killed_cpu_s",
    "rss_idle_mib",
    "rss_100mb_mib",
    "rss_10k_watchers_added_mib",
];

/// Writes everything to `dir`: results of this run, beside those of earlier runs of other cases.
pub fn write(
    dir: &Path,
    heading: &str,
    cases: &BTreeMap<String, Case>,
) -> Result<String, Box<dyn Error>> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("results.json"), serde_json::to_string_pretty(cases)?)?;
    let text = format!(
        "{heading}\n## Numbers to reach\n\n{}\n## All cases\n\n{}",
        targets::table(cases),
        table(cases)
    );
    fs::write(dir.join("table.md"), &text)?;
    plots(dir, cases)?;
    Ok(text)
}

/// Four lines per case: etcd, ours, their ratio, what the card could do.
pub fn table(cases: &BTreeMap<String, Case>) -> String {
    let mut text = String::from("| case | |");
    for (heading, ..) in COLUMNS {
        let _ = write!(text, " {heading} |");
    }
    text += "\n|---|---|";
    text += &"---:|".repeat(COLUMNS.len());
    text.push('\n');
    for case in cases.values() {
        let subjects = case.rounds.keys().filter(|name| *name != "limit").cloned();
        for subject in subjects.chain(["ratio".to_owned(), "limit".to_owned()]) {
            if (subject == "limit" && !case.rounds.contains_key("limit"))
                || (subject == "ratio" && !has_table_columns(case))
            {
                continue;
            }
            text += &row(case, &subject);
        }
        text += &more(case);
    }
    text
}

fn has_table_columns(case: &Case) -> bool {
    COLUMNS.iter().any(|(_, measure, _)| ratio(case, "ours", "etcd", measure).is_some())
}

fn row(case: &Case, subject: &str) -> String {
    let mut text = format!("| {} | {subject} |", case.name);
    for (_, measure, digits) in COLUMNS {
        let cell = if subject == "ratio" {
            ratio(case, "ours", "etcd", measure).map(|ratio| format!("{ratio:.2}"))
        } else {
            value(case, subject, measure).map(|value| format!("{value:.digits$}"))
        };
        let _ = write!(text, " {} |", cell.unwrap_or_default());
    }
    text.push('\n');
    text
}

fn more(case: &Case) -> String {
    let mut said = Vec::new();
    for measure in MORE {
        let is_idle_only = measure.ends_with("per_day") || *measure == "flushes_s";
        if is_idle_only && !case.name.ends_with("/idle") {
            continue;
        }
        let of = |subject: &String| {
            value(case, subject, measure).map(|value| format!("{subject} {value:.2}"))
        };
        let values: Vec<String> = case.rounds.keys().filter_map(of).collect();
        if !values.is_empty() {
            let ratio = ratio(case, "ours", "etcd", measure);
            let ratio = ratio.map_or(String::new(), |ratio| format!(" (ratio {ratio:.3})"));
            said.push(format!("{measure}: {}{ratio}", values.join(", ")));
        }
    }
    if said.is_empty() {
        return String::new();
    }
    format!("| {} | more | {} |{}\n", case.name, said.join("; "), " |".repeat(COLUMNS.len() - 1))
}

fn plots(dir: &Path, cases: &BTreeMap<String, Case>) -> Result<(), Box<dyn Error>> {
    for case in cases.values().filter(|case| !case.points.is_empty()) {
        let title = format!("Latency of 50 writes/s: {}", case.name);
        let mut plot = Plot::new(&title, "seconds", "ms", Scale::Logarithmic);
        for (subject, points) in &case.points {
            plot.dots(subject, points);
        }
        let name = format!("latency-{}.svg", case.name.replace('/', "-"));
        fs::write(dir.join(name), plot.svg())?;
    }
    let mut groups: BTreeMap<String, Vec<(f64, &Case)>> = BTreeMap::new();
    for case in cases.values() {
        if let Some((group, work)) = case.name.rsplit_once('/')
            && let Some(clients) = work.strip_prefix("put-").and_then(|n| n.parse().ok())
        {
            groups.entry(group.to_owned()).or_default().push((clients, case));
        }
    }
    for (group, mut cases) in groups {
        cases.sort_by(|a, b| a.0.total_cmp(&b.0));
        let title = format!("Writes per second by clients: {group}");
        let mut plot = Plot::new(&title, "clients", "writes/s", Scale::BothLogarithmic);
        for subject in ["etcd", "ours", "limit"] {
            let of = |(clients, case): &(f64, &Case)| {
                Some((*clients, value(case, subject, "writes_s")?))
            };
            plot.line(subject, &cases.iter().filter_map(of).collect::<Vec<_>>());
        }
        fs::write(dir.join(format!("throughput-{}.svg", group.replace('/', "-"))), plot.svg())?;
    }
    let mut bars = Vec::new();
    for case in cases.values().filter(|case| case.name.ends_with("/idle")) {
        for subject in case.rounds.keys() {
            if let Some(bytes) = value(case, subject, "gb_per_day") {
                bars.push((format!("{} {subject}", case.name.trim_end_matches("/idle")), bytes));
            }
        }
    }
    if !bars.is_empty() {
        let svg = crate::plot::bars("Idle Kubernetes cluster: GB per day to each card", &bars);
        fs::write(dir.join("bytes-per-day.svg"), svg)?;
    }
    Ok(())
}

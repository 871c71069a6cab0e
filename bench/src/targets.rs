//! The numbers to reach, and whether they are.

use std::collections::BTreeMap;

use crate::bench::Case;
use crate::measures::{Measures, median};

/// How a number is judged.
#[derive(Clone, Copy, Debug)]
enum Judged {
    /// Ours over etcd's, pair by pair, at most.
    RatioAtMost(f64),
    /// At least.
    RatioAtLeast(f64),
    /// Ours over the physical limit, at most.
    LimitAtMost(f64),
    /// Ours as it is, at most.
    AtMost(f64),
}

/// A number to reach: case, whose, measure, judgement.
struct Target(&'static str, &'static str, &'static str, Judged);

use Judged::{AtMost, LimitAtMost, RatioAtLeast, RatioAtMost};

const TARGETS: &[Target] = &[
    Target("typical-a1/3/isolated", "ours", "bytes_per_write", LimitAtMost(1.1)),
    Target("typical-a1/3/isolated", "ours", "flushes_per_write", LimitAtMost(1.02)),
    Target("typical-a1/1/put-1", "ours", "p50_ms", LimitAtMost(1.25)),
    Target("typical-a1/3/put-1", "ours", "p50_ms", LimitAtMost(1.25)),
    Target("typical-a1/3/put-1", "ours", "writes_s", RatioAtLeast(1.5)),
    Target("typical-a1/3/put-16", "ours", "writes_s", RatioAtLeast(2.0)),
    Target("typical-a1/3/put-64", "ours", "writes_s", RatioAtLeast(2.0)),
    Target("typical-a1/3/put-256", "ours", "writes_s", RatioAtLeast(2.0)),
    Target("typical-a1/3/put-16", "ours", "p99_ms", RatioAtMost(1.0 / 3.0)),
    Target("typical-a1/3/put-64", "ours", "p99_ms", RatioAtMost(1.0 / 3.0)),
    Target("typical-a1/3/put-64", "ours", "cpu_us_per_write", RatioAtMost(1.0)),
    Target("typical-a1/3/stall-leader-7s", "ours", "gap_ms", AtMost(150.0)),
    Target("typical-a1/3/stall-leader-7s", "ours", "elections", AtMost(0.0)),
    Target("typical-a1/3/stall-leader-7s", "ours", "attached_p99_ms", AtMost(100.0)),
    Target("typical-a1/3/stall-follower-7s", "ours", "attached_p99_ms", AtMost(100.0)),
    Target("typical-a1/3/stall-leader-12s", "ours", "gap_ms", AtMost(300.0)),
    Target("typical-a1/3/stall-leader-12s", "ours", "failed", AtMost(0.0)),
    Target("typical-a1/3/idle", "ours-sd", "gb_per_day", RatioAtMost(1.0 / 15.0)),
    Target("typical-a1/3/idle", "ours", "gb_per_day", RatioAtMost(1.0 / 10.0)),
    Target("typical-a1/3/idle", "ours-sd", "flushes_s", RatioAtMost(1.0 / 6.0)),
    Target("typical-a1/3/memory", "ours", "rss_idle_mib", AtMost(24.0)),
    Target("typical-a1/3/memory", "ours", "rss_100mb_mib", AtMost(96.0)),
    Target("typical-a1/3/memory", "ours", "rss_10k_watchers_added_mib", AtMost(50.0)),
    Target("typical-a1/3/watch-1000", "ours", "events_s", RatioAtLeast(1.0)),
    Target("typical-a1/1/restart", "ours", "clean_cpu_s", AtMost(1.0)),
    Target("typical-a1/1/restart", "ours", "killed_cpu_s", AtMost(1.0)),
    Target("none/1/put-64", "ours", "writes_s", RatioAtLeast(1.0)),
    Target("none/1/put-256", "ours", "writes_s", RatioAtLeast(1.0)),
    Target("none/3/put-64", "ours", "writes_s", RatioAtLeast(1.0)),
    Target("none/3/put-256", "ours", "writes_s", RatioAtLeast(1.0)),
];

/// The median of one measure over a subject's rounds.
pub fn value(case: &Case, subject: &str, measure: &str) -> Option<f64> {
    let values = values(case.rounds.get(subject)?, measure);
    (!values.is_empty()).then(|| median(values))
}

/// The median over the rounds of the ratio within each: a slow minute of the machine cancels out.
pub fn ratio(case: &Case, above: &str, below: &str, measure: &str) -> Option<f64> {
    let above = values(case.rounds.get(above)?, measure);
    let below = values(case.rounds.get(below)?, measure);
    let pairs = above.iter().zip(&below).filter(|(_, below)| **below > 0.0);
    let ratios: Vec<f64> = pairs.map(|(above, below)| above / below).collect();
    (!ratios.is_empty()).then(|| median(ratios))
}

fn values(rounds: &[Measures], measure: &str) -> Vec<f64> {
    rounds.iter().filter_map(|measures| measures.get(measure).copied()).collect()
}

/// One line per number to reach that was measured, in Markdown.
pub fn table(cases: &BTreeMap<String, Case>) -> String {
    let mut text = String::from(
        "| case | whose | measure | found | to reach | |\n|---|---|---|---|---|---|\n",
    );
    for Target(name, whose, measure, judged) in TARGETS {
        let Some(case) = cases.get(*name) else { continue };
        let (found, wanted, met) = match *judged {
            RatioAtMost(most) => {
                let found = ratio(case, whose, "etcd", measure);
                (found, format!("at most {most:.3} x etcd"), found.is_some_and(|f| f <= most))
            }
            RatioAtLeast(least) => {
                let found = ratio(case, whose, "etcd", measure);
                (found, format!("at least {least:.2} x etcd"), found.is_some_and(|f| f >= least))
            }
            LimitAtMost(most) => {
                let found = ratio(case, whose, "limit", measure);
                (found, format!("at most {most:.2} x limit"), found.is_some_and(|f| f <= most))
            }
            AtMost(most) => {
                let found = value(case, whose, measure);
                (found, format!("at most {most}"), found.is_some_and(|f| f <= most))
            }
        };
        let Some(found) = found else { continue };
        let met = if met { "reached" } else { "**missed**" };
        text += &format!("| {name} | {whose} | {measure} | {found:.3} | {wanted} | {met} |\n");
    }
    text
}

//! Named numbers of one run: what clients saw, what the cards and the system counted.

use std::collections::BTreeMap;

use crate::cluster::Look;
use crate::load::{Recorder, histogram, is_write};

/// Numbers by name.
pub type Measures = BTreeMap<String, f64>;

/// Everything between two looks. Costs are per write, as a mean over the servers; processor time is the leader's.
pub fn between(before: &Look, after: &Look, recorder: &Recorder) -> Measures {
    let mut measures = clients(recorder, (after.at - before.at).as_secs_f64());
    let writes = measures["writes"].max(1.0);
    let servers = before.cards.len() as f64;
    let total = |count: fn(&crate::card::Counters) -> u64| {
        let sum = |look: &Look| look.cards.iter().map(count).sum::<u64>();
        (sum(after) - sum(before)) as f64 / servers
    };
    let (bytes, flushes) = (total(|card| card.bytes), total(|card| card.flushes));
    let nand = total(|card| card.nand_bytes);
    let seconds = (after.at - before.at).as_secs_f64();
    let days = seconds / 86_400.0;
    let cpu = |index: usize| after.processes[index].cpu_s - before.processes[index].cpu_s;
    let rss = after.processes.iter().map(|process| process.rss_mib).fold(0.0, f64::max);
    let all_cpu: f64 = (0..after.processes.len()).map(cpu).sum();
    for (name, value) in [
        ("flushes_per_write", flushes / writes),
        ("bytes_per_write", bytes / writes),
        ("nand_per_write", nand / writes),
        ("flushes_s", flushes / seconds),
        ("gb_per_day", bytes / days / 1e9),
        ("nand_gb_per_day", nand / days / 1e9),
        ("busy", total(|card| card.busy_us) / 1e6 / seconds),
        ("cpu_us_per_write", cpu(after.leader) / writes * 1e6),
        ("cpu_us_per_write_all", all_cpu / writes * 1e6),
        ("rss_mib", rss),
        ("elections", (after.term - before.term) as f64),
    ] {
        measures.insert(name.to_owned(), value);
    }
    measures
}

/// What clients saw in `seconds`.
pub fn clients(recorder: &Recorder, seconds: f64) -> Measures {
    let tally = recorder.tally();
    let mut writes = histogram();
    let mut measures = Measures::new();
    for (operation, latencies) in &tally.latencies {
        if is_write(operation) {
            // Both have the same bounds, so adding cannot fail.
            let _ = writes.add(latencies);
        }
        let p99 = latencies.value_at_quantile(0.99) as f64 / 1e3;
        measures.insert(format!("p99_ms {operation}"), p99);
    }
    let ms = |quantile| writes.value_at_quantile(quantile) as f64 / 1e3;
    let count = writes.len() as f64;
    for (name, value) in [
        ("writes", count),
        ("writes_s", count / seconds),
        ("p50_ms", ms(0.5)),
        ("p90_ms", ms(0.9)),
        ("p99_ms", ms(0.99)),
        ("p999_ms", ms(0.999)),
        ("max_ms", writes.max() as f64 / 1e3),
        ("gap_ms", tally.longest_gap.as_secs_f64() * 1e3),
        ("failed", tally.failed as f64),
        ("logical_bytes", tally.logical_bytes as f64),
    ] {
        measures.insert(name.to_owned(), value);
    }
    measures
}

/// The middle one; the mean of two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

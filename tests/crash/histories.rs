//! Long random histories: any records, any crash, many times over, compared with the model.

use k3s_server::testkit::disk::{Failure, Fate, Fault, Operation, changes, random};
use k3s_server::testkit::{FaultDisk, Random};

use crate::run::{Crashed, PAYLOAD_MAX, Run, block_on, disk};

/// Appends for a while, in batches of random sizes. Stops at a failure.
async fn work(disk: &FaultDisk, run: &mut Run, random: &mut Random) {
    for _ in 0..random.below(40) {
        for _ in 0..=random.below(4) {
            let records = run.model().random_append(random, PAYLOAD_MAX);
            run.append(records);
            if random.percent(30) {
                tokio::task::yield_now().await;
            }
        }
        if random.percent(80) && !run.flush().await {
            return;
        }
        if random.percent(10) && !disk.has_failed() {
            assert_eq!(crate::run::read(&run.wal), *run.model());
        }
    }
}

/// How this life of the process ends.
async fn end(disk: &FaultDisk, run: Run, random: &mut Random) -> Crashed {
    let crashed = run.crash().await;
    match random.below(4) {
        0 => disk.restart(),
        1 => disk.power_cut(|_| Fate::LOST),
        _ => disk.power_cut(k3s_server::testkit::disk::random(Random::new(random.next_u64()))),
    }
    crashed
}

fn fault(random: &mut Random) -> Option<Fault> {
    let nth = 1 + random.below(60);
    match random.below(5) {
        0 => Some(Fault::power_loss(nth)),
        1 => Some(Fault {
            only: |op| op == Operation::Sync,
            ..Fault::once(nth / 2 + 1, Failure::Eio)
        }),
        2 => Some(Fault { only: changes, ..Fault::once(nth, Failure::ShortWrite) }),
        _ => None,
    }
}

async fn history(seed: u64) -> u64 {
    let mut chance = Random::new(seed);
    let disk = disk();
    let mut segments = 0;
    let mut before: Option<Crashed> = None;
    for life in 0..12 {
        let what = format!("seed {seed}, life {life}");
        let mut run = match Run::open(&disk, chance.next_u64()).await {
            Ok(run) => run,
            Err(error) => panic!("{what}: does not open: {error}"),
        };
        if let Some(before) = &before {
            before.check_model(run.model(), &what);
        }
        let recovered = run.model().clone();
        if let Some(fault) = fault(&mut chance) {
            disk.fail(fault);
        }
        work(&disk, &mut run, &mut chance).await;
        segments += run.wal.stats().segments_started;
        if chance.percent(20) && run.wal.failed().is_none() {
            disk.heal();
            let crashed =
                Crashed { acknowledged: run.history.len() - 1, history: run.history.clone() };
            run.close().await;
            disk.power_cut(random(Random::new(seed)));
            before = Some(crashed);
        } else {
            let crashed = end(&disk, run, &mut chance).await;
            assert_eq!(crashed.history[0], recovered);
            before = Some(crashed);
        }
    }
    segments
}

/// Seeds that found something: a repetition replayed without what it repeats (115, 11407), a slot whose name was not
/// durable (378). They stay as long as the generator does.
const TRACK_RECORD: [u64; 3] = [115, 378, 11407];

#[test]
fn random_histories_agree_with_the_model() {
    let seeds = std::env::var("CRASH_SEEDS").map_or(150, |seeds| seeds.parse().unwrap());
    let first = std::env::var("CRASH_SEED").map_or(0, |seed| seed.parse().unwrap());
    let mut segments = 0;
    for seed in (first..first + seeds).chain(TRACK_RECORD) {
        segments += block_on(history(seed));
    }
    assert!(seeds * 5 < segments, "only {segments} segments in {seeds} histories");
}

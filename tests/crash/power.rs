//! The power goes at every operation, and every subset and tear of what was under way reaches the card.

use k3s_server::testkit::disk::{Fate, Fault, Rest, SECTOR, changes, prefix, random};
use k3s_server::testkit::{FaultDisk, Random};
use k3s_server::wal::Record;

use crate::model::{Model, entry, id, vote};
use crate::run::{Crashed, Run, block_on, check_usable, disk};

const RESTS: [Rest; 4] = [Rest::Old, Rest::Zeros, Rest::Ones, Rest::Garbage(42)];

/// Every kind of record, frames of one block and of many, three lives of the slots.
pub(crate) fn script() -> Vec<Vec<Record>> {
    let mut random = Random::new(1);
    let mut noise = vec![0; 3 * 4096];
    random.fill(&mut noise);
    let mut script = vec![
        vec![vote(1)],
        vec![entry(1, 1, "first"), Record::Committed(id(1, 1))],
        vec![entry(1, 2, noise), entry(1, 3, vec![b'z'; 9000])],
        vec![Record::TruncateAfter(Some(id(1, 2))), vote(2), entry(2, 3, "again")],
    ];
    for index in 4..50 {
        let mut records = vec![entry(2, index, vec![b'a'; 100])];
        if index % 10 == 0 {
            records.insert(0, Record::Purge(id(2, index - 5)));
        }
        script.push(records);
    }
    script.push(vec![vote(3), Record::TruncateAfter(Some(id(2, 45))), entry(3, 46, "tail")]);
    script
}

/// Follows the script until the power goes at an operation.
fn run_until(operation: u64) -> (FaultDisk, Crashed, bool) {
    let disk = disk();
    disk.fail(Fault::power_loss(operation));
    let crashed = block_on(async {
        match Run::open(&disk, 1).await {
            Ok(mut run) => {
                run.follow(&script()).await;
                run.crash().await
            }
            Err(_) => Crashed { history: vec![Model::default()], acknowledged: 0 },
        }
    });
    let struck = disk.has_failed();
    (disk, crashed, struck)
}

#[test]
fn power_cut_at_every_operation_loses_nothing_acknowledged() {
    let mut operation = 1;
    loop {
        let (disk, crashed, struck) = run_until(operation);
        let unsynced = disk.unsynced_bytes();
        block_on(async {
            let mut cuts: Vec<usize> = (0..=unsynced.min(20 * SECTOR)).step_by(SECTOR).collect();
            cuts.extend([1, 33, 200, 4097, unsynced.saturating_sub(1), unsynced]);
            for rest in RESTS {
                for &cut in &cuts {
                    let what = format!(
                        "power cut at {operation}, {cut} of {unsynced} bytes, then {rest:?}"
                    );
                    let torn = disk.fork();
                    torn.power_cut(prefix(cut, |_| rest));
                    crashed.check(&torn, 2, &what).await;
                }
            }
            for seed in 0..8 {
                let what = format!("power cut at {operation}, random seed {seed}");
                let torn = disk.fork();
                torn.power_cut(random(Random::new(seed)));
                crashed.check(&torn, 2, &what).await;
                check_usable(&torn, 3, &what).await;
            }
        });
        if !struck {
            assert_eq!(crashed.acknowledged, script().len(), "the script does not run to its end");
            assert!(100 < operation, "only {operation} operations: the script is too short");
            return;
        }
        operation += 1;
    }
}

/// The last frame cut at every byte, on zeros and on what an earlier life of the slot left there.
#[test]
fn last_frame_cut_at_every_byte_is_dropped_whole() {
    for (steps, name) in
        [(6, "a slot used for the first time"), (script().len() - 1, "a recycled slot")]
    {
        let (disk, crashed) = block_on(async {
            let disk = disk();
            let mut run = Run::open(&disk, 1).await.unwrap();
            run.follow(&script()[..steps]).await;
            disk.fail(Fault {
                only: |op| op == k3s_server::testkit::disk::Operation::Sync,
                ..Fault::power_loss(1)
            });
            run.follow(&script()[steps..=steps]).await;
            (disk.fork(), run.crash().await)
        });
        assert_eq!(crashed.acknowledged, steps);
        assert_eq!(disk.unsynced_bytes(), 4096, "the last frame is one block");
        block_on(async {
            for rest in RESTS {
                for cut in 0..=4096 {
                    let torn = disk.fork();
                    torn.power_cut(prefix(cut, |_| rest));
                    crashed.check(&torn, 2, &format!("{name}, cut at {cut}, then {rest:?}")).await;
                }
            }
        });
    }
}

#[test]
fn large_frame_survives_only_with_all_its_sectors() {
    let mut noise = vec![0; 5 * 4096];
    Random::new(5).fill(&mut noise);
    let (disk, crashed) = block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        run.follow(&script()[..2]).await;
        disk.fail(Fault {
            only: |op| op == k3s_server::testkit::disk::Operation::Sync,
            ..Fault::power_loss(1)
        });
        run.follow(&[vec![entry(1, 2, noise)]]).await;
        (disk.fork(), run.crash().await)
    });
    let sectors = disk.unsynced_bytes() / SECTOR;
    block_on(async {
        for missing in 0..sectors {
            for rest in RESTS {
                let torn = disk.fork();
                torn.power_cut(|piece| {
                    if piece.ordinal == missing { Fate { kept: 0, rest } } else { Fate::KEPT }
                });
                let what = format!("sector {missing} of {sectors} is {rest:?}");
                let found = crashed.check(&torn, 2, &what).await;
                // The last sectors are padding.
                let whole = found.entries.len() == 2;
                let padding = missing * SECTOR >= 64 + 29 + 5 * 4096;
                assert!(
                    whole == padding || rest == Rest::Zeros && missing + 8 > sectors,
                    "{what}: {whole}"
                );
            }
        }
    });
}

/// The second power cut comes while the first is being recovered from.
#[test]
fn power_cut_during_recovery_loses_nothing_acknowledged() {
    let mut second_cuts = 0;
    for operation in (1..).step_by(3) {
        let (disk, crashed, struck) = run_until(operation);
        if !struck {
            break;
        }
        for seed in 0..3 {
            let first = disk.fork();
            first.power_cut(random(Random::new(seed)));
            for again in 1.. {
                let second = first.fork();
                second.fail(Fault::power_loss(again));
                let recovered = block_on(async {
                    match Run::open(&second, 2).await {
                        Ok(run) => {
                            let found = run.model().clone();
                            run.crash().await;
                            Some(found)
                        }
                        Err(_) => None,
                    }
                });
                let struck = second.has_failed();
                second.power_cut(random(Random::new(seed + 100)));
                let what =
                    format!("power cut at {operation}, seed {seed}, then at {again} of recovery");
                block_on(async {
                    let found = crashed.check(&second, 3, &what).await;
                    if let Some(recovered) = recovered {
                        assert_eq!(found, recovered, "{what}: what was recovered was not durable");
                    }
                    check_usable(&second, 4, &what).await;
                });
                second_cuts += 1;
                if !struck {
                    break;
                }
            }
        }
    }
    assert!(300 < second_cuts, "only {second_cuts} second cuts");
    assert!(changes(k3s_server::testkit::disk::Operation::Write));
}

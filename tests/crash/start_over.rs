//! A damaged log whose loss the state covers begins anew; whatever is cut off meanwhile, nothing acknowledged is missing.

use std::path::{Path, PathBuf};

use k3s_server::env::Env;
use k3s_server::testkit::disk::{Fate, Fault, random};
use k3s_server::testkit::{self, FaultDisk, ManualClock, Random};
use k3s_server::types::{LogId, Term, Vote};
use k3s_server::wal::{Beginning, Old, OpenError, Record, Salvage, inspect, salvage, start_over};

use crate::model::{Model, entry, id, vote};
use crate::run::{DIR, IDENTITY, Run, block_on, check_usable, disk, options};

fn env(disk: &FaultDisk) -> Env {
    testkit::env(disk, &ManualClock::new(), 77)
}

/// One voter's log: entries of one term after the other, no truncations. Two segments and a part of the third.
fn closed(entries: u64) -> (FaultDisk, Model) {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        run.append(vec![vote(3)]);
        for index in 1..=entries {
            let mut records = vec![entry(3 + index / 20, index, vec![b'x'; 900])];
            if index % 20 == 0 {
                records.insert(0, vote(3 + index / 20));
            }
            records.insert(0, Record::Committed(id(3 + (index - 1) / 20, index - 1)));
            run.append(records);
            assert!(run.flush().await);
        }
        let model = run.model().clone();
        run.close().await;
        (disk.fork(), model)
    })
}

fn slots(disk: &FaultDisk) -> Vec<PathBuf> {
    disk.files().into_iter().filter(|path| path.starts_with(DIR)).collect()
}

fn covered(model: &Model, index: u64) -> LogId {
    model.entries[&index].id
}

fn read(disk: &FaultDisk, covered: LogId) -> Salvage {
    salvage(disk, Path::new(DIR), Some(IDENTITY), covered).unwrap()
}

/// What the model holds after an index.
fn after(model: &Model, index: u64) -> Vec<k3s_server::wal::Entry> {
    model.entries.range(index + 1..).map(|(_, entry)| entry.clone()).collect()
}

fn beginning(found: &Salvage, covered: LogId) -> Beginning {
    let term = Term::new(found.term.get() + 1);
    Beginning {
        after: Some(covered),
        vote: Some(Vote { term, node: IDENTITY.node, committed: false }),
        entries: found.entries.clone(),
    }
}

async fn begin(disk: &FaultDisk, beginning: &Beginning, old: Old<'_>) -> Result<(), OpenError> {
    start_over(&env(disk), Path::new(DIR), IDENTITY, &options(), beginning, old).await
}

/// The log after it began anew.
fn expected(model: &Model, beginning: &Beginning, covered: LogId) -> Model {
    let mut expected = model.clone();
    expected.entries.retain(|index, _| covered.index.get() < *index);
    expected.state.purged = Some(covered);
    expected.state.committed = Some(covered);
    expected.state.vote = beginning.vote;
    let last = expected.entries.values().next_back().map(|entry| entry.id);
    expected.state.last = last.or(Some(covered));
    expected
}

fn damages(disk: &FaultDisk) -> Vec<(String, FaultDisk)> {
    let mut damaged = Vec::new();
    for path in slots(disk) {
        let content = disk.content(&path).unwrap();
        for block in (0..content.len() / 4096).filter(|b| content[b * 4096..][..64] != [0; 64]) {
            for at in [3_u64, 30, 200] {
                let one = disk.fork();
                one.flip(&path, block as u64 * 4096 + at, 2);
                damaged.push((format!("byte {at} of block {block} of {}", path.display()), one));
            }
            let one = disk.fork();
            one.break_blocks(&path, block as u64..block as u64 + 1);
            damaged.push((format!("broken block {block} of {}", path.display()), one));
        }
    }
    damaged
}

#[test]
fn what_is_said_to_be_whole_is_whole_and_the_rest_is_a_prefix() {
    let (disk, model) = closed(45);
    let (mut whole, mut with_loss) = (0, 0);
    block_on(async {
        for (what, damaged) in damages(&disk) {
            if Run::open(&damaged.fork(), 2).await.is_ok() {
                continue;
            }
            for index in [1, 2, 10, 14, 15, 16, 30, 44, 45] {
                let covered = covered(&model, index);
                let found = read(&damaged, covered);
                let wanted = after(&model, index);
                let what = format!("{what}, covered {index}: {:?}", found.damage);
                if let Some(lost) = found.lost {
                    with_loss += 1;
                    assert!(wanted.starts_with(&found.entries), "{what}");
                    assert_eq!(lost.first.get(), index + 1 + found.entries.len() as u64, "{what}");
                } else {
                    whole += 1;
                    assert_eq!(found.entries, wanted, "{what}");
                }
                assert!(found.term <= model.state.vote.unwrap().term, "{what}");
            }
        }
    });
    assert!(200 < whole && 200 < with_loss, "{whole} whole, {with_loss} with loss");
}

/// With everything covered, damage anywhere costs nothing, but for what may have come after the end.
#[test]
fn damage_to_what_the_state_covers_costs_nothing() {
    let (disk, model) = closed(45);
    let covered = covered(&model, 45);
    let (mut healed, mut refused) = (0, 0);
    block_on(async {
        for (what, damaged) in damages(&disk) {
            if Run::open(&damaged.fork(), 2).await.is_ok() {
                continue;
            }
            let found = read(&damaged, covered);
            if found.lost.is_some() {
                refused += 1;
                continue;
            }
            healed += 1;
            let beginning = beginning(&found, covered);
            begin(&damaged, &beginning, Old::Remove).await.unwrap();
            let run = Run::open(&damaged, 3).await.unwrap();
            assert_eq!(*run.model(), expected(&model, &beginning, covered), "{what}");
            run.close().await;
            check_usable(&damaged, 4, &what).await;
        }
    });
    // The header of the newest segment, and a closing frame that cannot be read.
    assert!(refused < 12 && 100 < healed, "{healed} healed, {refused} refused");
}

#[test]
fn entries_after_the_covered_one_are_kept() {
    let (disk, model) = closed(45);
    disk.flip(&Path::new(DIR).join("slot-00.wal"), 5 * 4096 + 200, 1);
    for index in [10, 15, 30, 44] {
        let covered = covered(&model, index);
        let found = read(&disk, covered);
        assert_eq!((found.lost, found.damage.len()), (None, 1), "covered {index}");
        let beginning = beginning(&found, covered);
        let disk = disk.fork();
        block_on(async {
            begin(&disk, &beginning, Old::Remove).await.unwrap();
            let run = Run::open(&disk, 3).await.unwrap();
            assert_eq!(*run.model(), expected(&model, &beginning, covered));
            assert!(run.recovery.clean);
            run.close().await;
            check_usable(&disk, 4, "after entries were kept").await;
        });
    }
}

/// What is left of a log that was cut off, or lost its newest slot, is whole as far as it goes.
#[test]
fn log_without_its_end_is_not_taken_for_whole() {
    let (disk, model) = closed(45);
    let covered = covered(&model, 20);
    for path in slots(&disk) {
        let cut = disk.fork();
        let file = k3s_server::env::Disk::open(&cut, &path, k3s_server::env::Open::Write).unwrap();
        file.set_len(3 * 4096).unwrap();
        let found = read(&cut, covered);
        let whole = found.lost.is_none();
        assert!(!whole || found.entries == after(&model, 20), "{} cut off", path.display());
    }
    let newest = inspect::verify(&disk, Path::new(DIR)).unwrap().segments.pop().unwrap();
    let lost = disk.fork();
    k3s_server::env::Disk::remove(&lost, &newest.path).unwrap();
    lost.flip(&Path::new(DIR).join("slot-00.wal"), 5 * 4096 + 200, 1);
    let state = id(5, 44);
    assert!(read(&lost, state).lost.is_some(), "the log ends before the state");
}

/// The vote is what a forgotten one could contradict.
#[test]
fn term_is_above_every_term_that_can_be_read_behind_the_damage() {
    let (disk, model) = closed(45);
    disk.flip(&Path::new(DIR).join("slot-00.wal"), 5 * 4096 + 200, 1);
    let found = read(&disk, covered(&model, 10));
    assert_eq!(Some(found.term), model.state.vote.map(|vote| vote.term));
}

/// Opens, and begins anew where the old log is found, as a start does.
async fn start(disk: &FaultDisk, beginning: &Beginning, what: &str) -> Run {
    match Run::open(disk, 5).await {
        Ok(run) => run,
        Err(OpenError::Corrupt(_)) => {
            begin(disk, beginning, Old::Remove).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            Run::open(disk, 6).await.unwrap_or_else(|error| panic!("{what}: {error}"))
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

#[test]
fn power_cut_at_every_operation_of_starting_over_loses_nothing() {
    let (whole, model) = closed(45);
    whole.flip(&Path::new(DIR).join("slot-00.wal"), 5 * 4096 + 200, 1);
    let covered = covered(&model, 30);
    let found = read(&whole, covered);
    let beginning = beginning(&found, covered);
    let expected = expected(&model, &beginning, covered);
    let (mut cuts, mut begun) = (0, 0);
    for operation in 1.. {
        let disk = whole.fork();
        disk.fail(Fault::power_loss(operation));
        let done = block_on(begin(&disk, &beginning, Old::Remove));
        if !disk.has_failed() {
            done.unwrap();
            break;
        }
        for seed in 0..12 {
            let cut = disk.fork();
            match seed {
                0 => cut.power_cut(|_| Fate::LOST),
                1 => cut.power_cut(|_| Fate::KEPT),
                2 => cut.restart(),
                _ => cut.power_cut(random(Random::new(seed))),
            }
            let what = format!("cut at {operation}, seed {seed}");
            block_on(async {
                begun += u32::from(Run::open(&cut.fork(), 9).await.is_ok());
                let run = start(&cut, &beginning, &what).await;
                assert_eq!(*run.model(), expected, "{what}");
                run.crash().await;
                cut.power_cut(|_| Fate::LOST);
                let run = start(&cut, &beginning, &what).await;
                assert_eq!(*run.model(), expected, "{what}: gone after another cut");
                run.close().await;
                check_usable(&cut, 7, &what).await;
            });
            cuts += 1;
        }
    }
    assert!(100 < cuts && 20 < begun && begun < cuts, "{cuts} cuts, {begun} after the moment");
}

/// For a node whose log is replaced by a snapshot: nothing is damaged, and the log is behind or ahead.
#[test]
fn healthy_log_is_replaced_whole_or_not_at_all() {
    let (whole, model) = closed(30);
    for at in [id(9, 5), id(9, 500)] {
        let vote = Some(Vote { term: Term::new(9), node: IDENTITY.node, committed: true });
        let beginning = Beginning { after: Some(at), vote, entries: Vec::new() };
        for operation in 1.. {
            let disk = whole.fork();
            disk.fail(Fault::power_loss(operation));
            let done = block_on(begin(&disk, &beginning, Old::Remove));
            let struck = disk.has_failed();
            disk.power_cut(random(Random::new(operation)));
            block_on(async {
                let run = Run::open(&disk, 2).await.unwrap();
                let state = run.model().state;
                if state == model.state {
                    assert!(done.is_err(), "at {operation}");
                } else {
                    assert_eq!((state.purged, state.last, state.vote), (Some(at), Some(at), vote));
                    assert!(run.model().entries.is_empty());
                }
                run.close().await;
                check_usable(&disk, 3, "after it was replaced").await;
            });
            if !struck {
                break;
            }
        }
    }
}

#[test]
fn old_log_is_kept_aside_as_it_was() {
    let (disk, model) = closed(45);
    disk.flip(&Path::new(DIR).join("slot-00.wal"), 5 * 4096 + 200, 1);
    let before: Vec<_> = slots(&disk).into_iter().map(|path| disk.content(&path)).collect();
    let covered = covered(&model, 2);
    let found = read(&disk, covered);
    assert!(found.lost.is_some());
    let aside = Path::new("/data/wal.damaged-1");

    block_on(async {
        begin(&disk, &beginning(&found, covered), Old::MoveTo(aside)).await.unwrap();
        disk.power_cut(|_| Fate::LOST);
        Run::open(&disk, 2).await.unwrap().close().await;
    });

    let kept = disk.files().into_iter().filter(|path| path.starts_with(aside));
    assert_eq!(kept.map(|path| disk.content(&path)).collect::<Vec<_>>(), before);
}

/// More than one frame can hold, and more than a slot of the usual size.
#[test]
fn many_entries_are_kept_in_one_larger_slot() {
    let mut noise = Random::new(3);
    let entries: Vec<_> = (11..40)
        .map(|index| {
            let mut payload = vec![0; 9_000];
            noise.fill(&mut payload);
            k3s_server::wal::Entry { id: id(4, index), payload: payload.into() }
        })
        .collect();
    let beginning = Beginning { after: Some(id(4, 10)), vote: None, entries: entries.clone() };
    block_on(async {
        let disk = disk();
        begin(&disk, &beginning, Old::Remove).await.unwrap();
        let run = Run::open(&disk, 2).await.unwrap();
        assert!(run.model().entries.values().eq(&entries));
        run.close().await;
        check_usable(&disk, 3, "after many entries were kept").await;
        let run = Run::open(&disk, 5).await.unwrap();
        assert_eq!(run.model().entries.len(), 30);
        run.close().await;
    });
}

//! Every operation fails, once or for good. The process stops, and is started again, with or without a power cut.

use k3s_server::testkit::Random;
use k3s_server::testkit::disk::{Failure, Fate, Fault, Operation, random};
use k3s_server::wal::Record;

use crate::model::{Model, entry};
use crate::power::script;
use crate::run::{Crashed, Run, block_on, check_usable, disk, read};

/// Runs the script with a fault set; `None` when it did not strike any more.
fn run_with(fault: Fault) -> Option<(k3s_server::testkit::FaultDisk, Crashed)> {
    let disk = disk();
    disk.fail(fault);
    let crashed = block_on(async {
        match Run::open(&disk, 1).await {
            Ok(mut run) => {
                run.follow(&script()).await;
                run.crash().await
            }
            Err(_) => Crashed { history: vec![Model::default()], acknowledged: 0 },
        }
    });
    disk.has_failed().then_some((disk, crashed))
}

#[test]
fn every_failing_operation_is_survived() {
    let mut runs = 0;
    for failure in [Failure::Eio, Failure::Enospc, Failure::ShortWrite] {
        for for_good in [false, true] {
            for nth in 1.. {
                let fault = Fault { nth, only: |_| true, failure, for_good };
                let Some((disk, crashed)) = run_with(fault) else { break };
                runs += 1;
                let what = format!("{failure:?} at operation {nth}, for good: {for_good}");
                block_on(async {
                    let cut = disk.fork();
                    disk.restart();
                    let found = crashed.check(&disk, 2, &format!("{what}, restarted")).await;
                    // What the restarted log has shown must outlive a power cut, although the kernel had failed to
                    // write it and had not said so again.
                    disk.power_cut(|_| Fate::LOST);
                    let after = crashed.check(&disk, 3, &format!("{what}, restarted, cut")).await;
                    assert_eq!(after, found, "{what}: shown after the restart, gone after the cut");
                    cut.power_cut(random(Random::new(nth)));
                    crashed.check(&cut, 2, &format!("{what}, cut")).await;
                    check_usable(&cut, 4, &what).await;
                });
            }
        }
    }
    assert!(600 < runs, "only {runs} runs");
}

#[test]
fn failed_barrier_is_final() {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        run.append(vec![entry(1, 1, "a")]);
        assert!(run.flush().await);
        disk.fail(Fault { only: |op| op == Operation::Sync, ..Fault::once(1, Failure::Eio) });
        run.append(vec![entry(1, 2, "b")]);
        assert!(!run.flush().await);

        // The disk works again, the log does not.
        run.append(vec![entry(1, 3, "c")]);
        assert!(!run.flush().await);
        let error = run.wal.close().await.unwrap_err().to_string();
        assert!(error.contains("cannot sync /data/wal/slot-"), "{error}");
        assert!(error.contains("os error 5"), "{error}");
        let crashed = run.crash().await;
        assert_eq!(crashed.acknowledged, 1);
    });
}

/// The first frame of a segment and its header are one write; if its barrier fails, neither is on the card, though
/// the restarted process sees both.
#[test]
fn failed_barrier_at_a_segment_switch_is_survived() {
    let mut switches = 0;
    for steps in 5..script().len() {
        block_on(async {
            let disk = disk();
            let mut run = Run::open(&disk, 1).await.unwrap();
            run.follow(&script()[..steps]).await;
            let before = run.wal.stats().segments_started;
            disk.fail(Fault { only: |op| op == Operation::Sync, ..Fault::once(1, Failure::Eio) });
            run.follow(&script()[steps..=steps]).await;
            let crashed = run.crash().await;

            disk.restart();
            let restarted = Run::open(&disk, 2).await.unwrap();
            let found = restarted.model().clone();
            let survived = crashed.check_model(&found, "restarted");
            assert_eq!(survived, steps + 1, "the page cache shows the frame");
            restarted.crash().await;
            disk.power_cut(|_| Fate::LOST);
            let run = Run::open(&disk, 3).await.unwrap();
            assert_eq!(*run.model(), found);
            assert_eq!(run.recovery.stood_in, 1, "step {steps}: the copy was not needed");
            run.close().await;

            let whole = Run::open(&crate::run::disk(), 1).await;
            let mut whole = whole.unwrap();
            whole.follow(&script()[..=steps]).await;
            switches += whole.wal.stats().segments_started - before;
            whole.close().await;
        });
    }
    assert!(1 < switches, "no step switched segments");
}

#[test]
fn full_card_stops_filling_ahead_but_not_the_log() {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        run.follow(&script()[..3]).await;
        tokio::task::yield_now().await;
        disk.set_capacity(1);
        run.follow(&script()[3..20]).await;
        assert!(run.wal.failed().is_none(), "overwriting needs no space");
        assert!(run.wal.is_starved(), "nobody was told that the card is full");

        // Without purging, the slots run out; then the log stops and says why.
        for index in run.model().next_index().. {
            run.append(vec![entry(2, index, "x")]);
            if !run.flush().await {
                break;
            }
        }
        let error = run.wal.failed().unwrap().to_string();
        assert!(error.contains("cannot fill") && error.contains("os error 28"), "{error}");
        let crashed = run.crash().await;
        disk.set_capacity(0);
        disk.restart();
        crashed.check(&disk, 2, "full card").await;
    });
}

#[test]
fn truncation_and_purge_cause_no_barrier_of_their_own() {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        run.follow(&script()[..8]).await;
        let before = run.wal.stats().barriers;
        let last = run.model().state.last.unwrap();
        run.append(vec![Record::Committed(last)]);
        run.append(vec![Record::Purge(crate::model::id(1, 1))]);
        run.append(vec![Record::TruncateAfter(Some(crate::model::id(2, 5)))]);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(run.wal.stats().barriers, before);
        assert_eq!(read(&run.wal), *run.model(), "reads must reflect them at once");
        assert!(run.flush().await);
        assert_eq!(run.wal.stats().barriers, before + 1);
        run.close().await;
    });
}

/// The process died between filling a slot and making its name durable. The next one found a perfectly good slot, used
/// it, and lost a segment of acknowledged entries with the name at the power cut after that.
#[test]
fn slot_whose_name_an_earlier_process_left_undurable_is_safe_to_use() {
    block_on(async {
        let disk = disk();
        let run = Run::open(&disk, 1).await.unwrap();
        disk.fail(Fault { only: |op| op == Operation::SyncDir, ..Fault::once(1, Failure::Eio) });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(disk.has_failed(), "no slot was filled ahead");
        run.crash().await;

        disk.restart();
        let mut run = Run::open(&disk, 2).await.unwrap();
        let mut script = script().into_iter();
        while run.wal.stats().segments_started == 0 {
            run.follow(&[script.next().unwrap()]).await;
        }
        let crashed = run.crash().await;
        assert_eq!(crashed.acknowledged, crashed.history.len() - 1);
        disk.power_cut(|_| Fate::LOST);
        crashed.check(&disk, 3, "after the power cut").await;
    });
}

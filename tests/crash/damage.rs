//! Bits rot, sectors read as something else, files vanish: never a wrong record, and never an acknowledged one
//! dropped without a word.

use std::path::{Path, PathBuf};

use k3s_server::testkit::FaultDisk;
use k3s_server::types::{ClusterId, LogIndex, NodeId, SegmentNo};
use k3s_server::wal::format::Defect;
use k3s_server::wal::{Identity, OpenError, Record, Wal, inspect};

use crate::model::{Model, entry};
use crate::power::script;
use crate::run::{DIR, IDENTITY, Run, block_on, disk, options, read};

/// A log that was closed in an orderly way.
fn closed(steps: usize) -> (FaultDisk, Model) {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        run.follow(&script()[..steps]).await;
        let model = run.model().clone();
        run.close().await;
        (disk.fork(), model)
    })
}

/// Opens a damaged copy: either it says so, or nothing is missing.
async fn check(damaged: &FaultDisk, model: &Model, what: &str) -> bool {
    match Run::open(damaged, 2).await {
        Ok(run) => {
            assert_eq!(run.model(), model, "{what}: neither noticed nor harmless");
            run.crash().await;
            false
        }
        Err(OpenError::Corrupt(_)) => true,
        Err(other) => panic!("{what}: {other}"),
    }
}

fn slots(disk: &FaultDisk) -> Vec<PathBuf> {
    disk.files().into_iter().filter(|path| path.starts_with(DIR)).collect()
}

/// Where a block holds something but padding.
fn used(content: &[u8]) -> Vec<u64> {
    let mut offsets = Vec::new();
    for (block, bytes) in content.chunks(4096).enumerate() {
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 2);
        // All of what is used, and a little of what is not.
        let sparse = (used..4096).step_by(512);
        offsets.extend((0..used.min(4096)).chain(sparse).map(|at| (block * 4096 + at) as u64));
    }
    offsets
}

#[test]
fn every_flipped_bit_is_noticed_or_harmless() {
    let (disk, model) = closed(16);
    let (mut noticed, mut harmless) = (0, 0);
    block_on(async {
        for path in slots(&disk) {
            let content = disk.content(&path).unwrap();
            for offset in used(&content) {
                // Inside large payloads one bit of every byte is as good as all of them.
                let bits = if offset % 4096 < 300 { 0..8 } else { 3..4 };
                for bit in bits {
                    let damaged = disk.fork();
                    damaged.flip(&path, offset, bit);
                    let what = format!("bit {bit} of byte {offset} of {}", path.display());
                    if check(&damaged, &model, &what).await {
                        noticed += 1;
                    } else {
                        harmless += 1;
                    }
                }
            }
        }
    });
    assert!(10_000 < noticed, "{noticed} noticed, {harmless} harmless");
}

#[test]
fn every_sector_that_reads_as_something_else_is_noticed_or_harmless() {
    let (disk, model) = closed(script().len());
    let mut noticed = 0;
    block_on(async {
        for path in slots(&disk) {
            let content = disk.content(&path).unwrap();
            let sectors = content.len() / 512;
            for sector in 0..sectors {
                let elsewhere = (sector + 8) % sectors;
                let others: [&[u8]; 3] =
                    [&[0; 512], &[0xff; 512], &content[elsewhere * 512..(elsewhere + 1) * 512]];
                for other in others {
                    let damaged = disk.fork();
                    damaged.overwrite(&path, (sector * 512) as u64, other);
                    let what = format!("sector {sector} of {}", path.display());
                    noticed += usize::from(check(&damaged, &model, &what).await);
                }
            }
        }
    });
    assert!(50 < noticed, "only {noticed} were noticed");
}

#[test]
fn damage_names_file_segment_and_offset() {
    let (disk, model) = closed(6);
    let path = Path::new(DIR).join("slot-00.wal");
    // Block 3 holds the third frame.
    disk.flip(&path, 3 * 4096 + 70, 0);
    let error = block_on(Run::open(&disk, 2)).err().unwrap();
    let OpenError::Corrupt(damage) = error else { panic!("{error}") };
    assert_eq!((damage.path.clone(), damage.offset), (path, 3 * 4096));
    assert_eq!(damage.segment, Some(SegmentNo::new(1)));
    assert!(damage.last_good < model.state.last);
    assert!(matches!(damage.defect, Defect::PayloadChecksum { .. }));
    let text = damage.to_string();
    assert!(
        text.starts_with("/data/wal/slot-00.wal is damaged at byte 12288: payload checksum "),
        "{text}"
    );
    assert_eq!(inspect::verify(&disk, Path::new(DIR)).unwrap().damage, Some(*damage));
}

#[test]
fn missing_slot_is_noticed() {
    let (disk, _) = closed(script().len());
    let report = inspect::verify(&disk, Path::new(DIR)).unwrap();
    assert!(1 < report.segments.len(), "{report:?}");
    let (newest, needed) = report.segments.split_last().unwrap();
    for segment in needed {
        let damaged = disk.fork();
        k3s_server::env::Disk::remove(&damaged, &segment.path).unwrap();
        let error = block_on(Run::open(&damaged, 2)).err().unwrap().to_string();
        assert!(error.contains(&format!("segment {} is missing", segment.number)), "{error}");
    }
    // A copy under another name is no second segment.
    let copy = disk.content(&newest.path).unwrap();
    let env: &dyn k3s_server::env::Disk = &disk;
    let file =
        env.open(&Path::new(DIR).join("slot-77.wal"), k3s_server::env::Open::Create).unwrap();
    file.write_at(&copy, 0).unwrap();
    let error = block_on(Run::open(&disk, 2)).err().unwrap().to_string();
    assert!(error.contains("is in two slots"), "{error}");
}

#[test]
fn cut_off_file_is_noticed() {
    let (disk, _) = closed(6);
    let path = Path::new(DIR).join("slot-00.wal");
    let env: &dyn k3s_server::env::Disk = &disk;
    env.open(&path, k3s_server::env::Open::Write).unwrap().set_len(5 * 4096).unwrap();
    let error = block_on(Run::open(&disk, 2)).err().unwrap().to_string();
    assert!(error.contains("file is 20480 bytes, expected 65536"), "{error}");
}

#[test]
fn log_of_another_node_or_cluster_is_refused() {
    let (disk, _) = closed(3);
    let env = k3s_server::testkit::env(&disk, &k3s_server::testkit::ManualClock::new(), 2);
    for other in [
        Identity { node: NodeId::new(1), ..IDENTITY },
        Identity { cluster: ClusterId::new(1), ..IDENTITY },
    ] {
        let error = block_on(Wal::open(&env, Path::new(DIR), other, options())).err().unwrap();
        assert!(matches!(error, OpenError::Identity { found: IDENTITY, .. }), "{error}");
    }
}

/// The card holds what was written; only the page cache does not.
#[test]
fn bad_page_in_the_cache_is_read_again_from_the_card() {
    let (disk, model) = closed(script().len());
    let mut flips = 0;
    block_on(async {
        for path in slots(&disk) {
            let content = disk.content(&path).unwrap();
            for offset in used(&content).into_iter().filter(|offset| offset % 4096 < 200) {
                let damaged = disk.fork();
                damaged.flip_cached(&path, offset, 5);
                let what = format!("byte {offset} of {}", path.display());
                assert!(!check(&damaged, &model, &what).await, "{what} was not read again");
                flips += 1;
            }
        }
    });
    assert!(1_000 < flips, "only {flips}");
}

#[test]
fn bad_page_under_a_running_log_is_read_again_from_the_card() {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        for index in 1..30 {
            run.append(vec![entry(1, index, vec![b'x'; 500])]);
            assert!(run.flush().await);
        }
        for block in 2..8 {
            disk.flip_cached(&Path::new(DIR).join("slot-00.wal"), block * 4096 + 200, 4);
        }
        assert_eq!(read(&run.wal), *run.model());
        run.crash().await;
    });
}

/// Every block in turn, alone and with the one after it.
#[test]
fn block_that_cannot_be_read_is_noticed_or_harmless() {
    let (disk, model) = closed(script().len());
    let mut noticed = 0;
    block_on(async {
        for path in slots(&disk) {
            let blocks = disk.content(&path).unwrap().len() as u64 / 4096;
            for block in 0..blocks {
                for end in [block + 1, block + 2] {
                    let damaged = disk.fork();
                    damaged.break_blocks(&path, block..end);
                    let what = format!("blocks {block}..{end} of {}", path.display());
                    noticed += usize::from(check(&damaged, &model, &what).await);
                }
            }
        }
    });
    assert!(20 < noticed, "only {noticed} were noticed");
    // A slot that is not there at all could hold anything.
    for path in slots(&disk) {
        let damaged = disk.fork();
        damaged.break_blocks(&path, 0..u64::MAX);
        let error = block_on(Run::open(&damaged, 2)).err().unwrap().to_string();
        let named = ["cannot be read: Input/output error", "is missing"];
        assert!(named.iter().any(|words| error.contains(words)), "{error}");
    }
}

#[test]
fn rot_under_a_running_log_is_an_error_not_an_entry() {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        for index in 1..30 {
            run.append(vec![entry(1, index, vec![b'x'; 500])]);
            assert!(run.flush().await);
        }
        let before = read(&run.wal);
        assert_eq!(before, *run.model());
        // The first entry has left the small cache long ago.
        disk.flip(&Path::new(DIR).join("slot-00.wal"), 2 * 4096 + 200, 4);
        let all = LogIndex::new(0)..LogIndex::new(100);
        let error = run.wal.entries(all, u64::MAX).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("slot-00.wal is damaged at byte 8192"), "{error}");
        run.crash().await;
    });
}

#[test]
fn inspection_shows_what_the_log_holds_and_changes_nothing() {
    block_on(async {
        let disk = disk();
        let mut run = Run::open(&disk, 1).await.unwrap();
        for records in script() {
            run.append(records);
            assert!(run.flush().await);
            let report = inspect::verify(&disk, Path::new(DIR)).unwrap();
            assert_eq!((report.damage, report.cut), (None, None));
            assert_eq!(report.state, run.model().state);
            let dump = inspect::entries(&disk, Path::new(DIR)).unwrap();
            let entries: Vec<_> = dump.map(Result::unwrap).collect();
            assert!(entries.iter().eq(run.model().entries.values()));
        }
        let writes = disk.operations(k3s_server::testkit::disk::changes);
        inspect::verify(&disk, Path::new(DIR)).unwrap();
        assert_eq!(disk.operations(k3s_server::testkit::disk::changes), writes);
        run.close().await;
        assert!(inspect::verify(&disk, Path::new(DIR)).unwrap().clean);
    });
}

/// All that a scrub finds, and how much it read.
fn scrub(wal: &Wal) -> (u64, Vec<String>) {
    let (mut bytes, mut found) = (0, Vec::new());
    let mut scrub = wal.scrub();
    loop {
        match scrub.step(10_000) {
            Ok(Some(read)) => bytes += read,
            Ok(None) => return (bytes, found),
            Err(error) => found.push(error.to_string()),
        }
    }
}

async fn filled(disk: &FaultDisk, seed: u64, to: u64) -> Run {
    let mut run = Run::open(disk, seed).await.unwrap();
    for index in run.model().next_index()..=to {
        run.append(vec![entry(1, index, vec![b'x'; 500])]);
        assert!(run.flush().await);
    }
    run
}

/// Nobody has read these entries since they were written.
#[test]
fn scrub_finds_rot_in_a_closed_segment_of_a_running_log_and_names_it() {
    block_on(async {
        let disk = disk();
        filled(&disk, 1, 20).await.crash().await;
        // A start in the middle, so that there are repeated frames; and a torn one.
        disk.restart();
        let run = filled(&disk, 2, 50).await;
        let (bytes, found) = scrub(&run.wal);
        assert!(2 * 60_000 < bytes && found.is_empty(), "{bytes} bytes, {found:?}");

        disk.flip_cached(&Path::new(DIR).join("slot-00.wal"), 5 * 4096 + 200, 1);
        assert_eq!(scrub(&run.wal).1, Vec::<String>::new(), "the card is what is asked about");
        for (slot, block, what) in [(0, 5, "payload checksum"), (1, 14, "payload checksum")] {
            let path = Path::new(DIR).join(format!("slot-{slot:02}.wal"));
            disk.flip(&path, block * 4096 + 200, 1);
            let (_, found) = scrub(&run.wal);
            assert_eq!(found.len(), 1, "{found:?}");
            let place = format!("slot-{slot:02}.wal is damaged at byte {}: {what}", block * 4096);
            assert!(found[0].contains(&place), "{found:?}");
            disk.flip(&path, block * 4096 + 200, 1);
        }
        // The closed segment's header, its last frame, and a block that cannot be read.
        disk.flip(&Path::new(DIR).join("slot-00.wal"), 30, 1);
        assert_eq!(scrub(&run.wal).1.len(), 1);
        disk.flip(&Path::new(DIR).join("slot-00.wal"), 30, 1);
        disk.break_blocks(&Path::new(DIR).join("slot-01.wal"), 14..15);
        let (_, found) = scrub(&run.wal);
        assert!(found.len() == 1 && found[0].contains("Input/output error"), "{found:?}");
        run.crash().await;
    });
}

#[test]
fn segment_that_is_recycled_during_a_scrub_is_no_damage() {
    block_on(async {
        let disk = disk();
        let mut run = filled(&disk, 1, 50).await;
        let mut scrub = run.wal.scrub();
        assert_eq!(scrub.step(10_000).unwrap(), Some(12_288));
        run.append(vec![Record::Purge(crate::model::id(1, 45))]);
        assert!(run.flush().await);
        for index in 51..=110 {
            run.append(vec![
                entry(1, index, vec![b'x'; 500]),
                Record::Purge(crate::model::id(1, index - 1)),
            ]);
            assert!(run.flush().await);
        }
        while scrub.step(10_000).unwrap().is_some() {}
        run.crash().await;
    });
}

//! The double must be as unforgiving as it says.

use super::*;

const DIR: &str = "/d";

async fn synced(disk: &FaultDisk, name: &str, bytes: &[u8]) -> Arc<dyn DiskFile> {
    let file = disk.open(&Path::new(DIR).join(name), Open::Create).unwrap();
    file.write_at(bytes, 0).unwrap();
    file.sync().await.unwrap();
    disk.sync_dir(Path::new(DIR)).unwrap();
    file
}

fn disk() -> FaultDisk {
    FaultDisk::with_dir(Path::new(DIR))
}

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

#[tokio::test]
async fn only_what_a_barrier_covered_survives() {
    let disk = disk();
    let file = synced(&disk, "a", b"old").await;
    file.write_at(b"new", 0).unwrap();
    assert_eq!(disk.content(&path("a")).unwrap(), b"new");

    disk.power_cut(|_| Fate::LOST);
    assert_eq!(disk.content(&path("a")).unwrap(), b"old");
    assert!(file.write_at(b"x", 0).is_err(), "a handle survived the power cut");
}

#[tokio::test]
async fn name_without_directory_barrier_is_lost() {
    let disk = disk();
    let file = disk.open(&path("a"), Open::Create).unwrap();
    file.write_at(b"x", 0).unwrap();
    file.sync().await.unwrap();
    disk.fork().power_cut(|_| Fate::KEPT);

    disk.power_cut(|_| Fate::LOST);
    assert_eq!(disk.content(&path("a")), None);
}

#[tokio::test]
async fn removed_name_comes_back_and_renamed_file_keeps_its_old_name() {
    let disk = disk();
    synced(&disk, "a", b"a").await;
    synced(&disk, "b", b"b").await;
    disk.remove(&path("a")).unwrap();
    disk.rename(&path("b"), &path("c")).unwrap();

    let kept = disk.fork();
    kept.power_cut(|_| Fate::KEPT);
    assert_eq!(kept.files(), [path("c")]);
    disk.power_cut(|_| Fate::LOST);
    assert_eq!(disk.files(), [path("a"), path("b")]);
}

#[tokio::test]
async fn sectors_have_fates_of_their_own() {
    let disk = disk();
    let file = synced(&disk, "a", &[b'o'; 5 * SECTOR]).await;
    file.write_at(&[b'n'; 5 * SECTOR], 0).unwrap();

    disk.power_cut(|piece| match piece.ordinal {
        0 => Fate::KEPT,
        1 => Fate::LOST,
        2 => Fate { kept: 10, rest: Rest::Old },
        3 => Fate { kept: 0, rest: Rest::Zeros },
        _ => Fate { kept: 1, rest: Rest::Ones },
    });
    let content = disk.content(&path("a")).unwrap();
    assert_eq!(content[..SECTOR], [b'n'; SECTOR]);
    assert_eq!(content[SECTOR..2 * SECTOR], [b'o'; SECTOR]);
    assert_eq!(content[2 * SECTOR + 9..2 * SECTOR + 11], *b"no");
    assert_eq!(content[3 * SECTOR], 0);
    assert_eq!(content[4 * SECTOR..4 * SECTOR + 2], [b'n', 0xff]);
}

#[tokio::test]
async fn prefix_cuts_at_the_byte() {
    let disk = disk();
    let file = synced(&disk, "a", &[b'o'; 2 * SECTOR]).await;
    file.write_at(&[b'n'; 2 * SECTOR], 0).unwrap();

    disk.power_cut(prefix(SECTOR + 3, |_| Rest::Old));
    let content = disk.content(&path("a")).unwrap();
    assert_eq!(content.iter().filter(|byte| **byte == b'n').count(), SECTOR + 3);
    assert_eq!(content[SECTOR + 2..SECTOR + 4], *b"no");
}

#[tokio::test]
async fn failed_barrier_leaves_data_that_only_looks_clean() {
    let disk = disk();
    let file = synced(&disk, "a", b"old").await;
    file.write_at(b"new", 0).unwrap();
    disk.fail(Fault { only: |op| op == Operation::Sync, ..Fault::once(1, Failure::Eio) });
    assert!(file.sync().await.is_err());
    file.sync().await.unwrap();
    assert_eq!(disk.content(&path("a")).unwrap(), b"new");

    disk.power_cut(|_| Fate::KEPT);
    assert_eq!(disk.content(&path("a")).unwrap(), b"old");
}

#[tokio::test]
async fn restart_keeps_the_page_cache_and_kills_handles() {
    let disk = disk();
    let file = synced(&disk, "a", b"old").await;
    file.write_at(b"new", 0).unwrap();

    disk.restart();
    assert!(file.sync().await.is_err());
    assert_eq!(disk.content(&path("a")).unwrap(), b"new");
    disk.open(&path("a"), Open::Write).unwrap().sync().await.unwrap();
    disk.power_cut(|_| Fate::LOST);
    assert_eq!(disk.content(&path("a")).unwrap(), b"new");
}

#[tokio::test]
async fn lying_barrier_makes_nothing_durable() {
    let disk = disk();
    let file = synced(&disk, "a", b"old").await;
    disk.set_lying(true);
    file.write_at(b"new", 0).unwrap();
    file.sync().await.unwrap();
    disk.power_cut(|_| Fate::LOST);
    assert_eq!(disk.content(&path("a")).unwrap(), b"old");
}

#[tokio::test]
async fn write_during_a_barrier_is_not_covered_by_it() {
    let disk = disk();
    let file = synced(&disk, "a", b"..").await;
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let released = Mutex::new(Some(released));
    disk.set_sync_delay(Some(Arc::new(move |_| {
        let released = released.lock().unwrap().take();
        Box::pin(async move { drop(released.unwrap().await) })
    })));
    file.write_at(b"1", 0).unwrap();
    let mut sync = file.sync();
    assert!(futures_util::poll!(&mut sync).is_pending());
    file.write_at(b"2", 1).unwrap();
    release.send(()).unwrap();
    sync.await.unwrap();

    disk.power_cut(|_| Fate::LOST);
    assert_eq!(disk.content(&path("a")).unwrap(), b"1.");
}

#[tokio::test]
async fn full_card_refuses_growth_but_not_overwriting() {
    let disk = disk();
    let file = synced(&disk, "a", b"1234").await;
    disk.set_capacity(4);
    file.write_at(b"4321", 0).unwrap();
    assert_eq!(file.write_at(b"5", 4).unwrap_err().raw_os_error(), Some(28));
    assert_eq!(disk.free_bytes(&path("a")).unwrap(), 0);
    assert_eq!(disk.counters(&path("a")).writes, 2);
}

#[tokio::test]
async fn power_loss_keeps_the_write_it_struck_within_reach_of_the_card() {
    let disk = disk();
    let file = synced(&disk, "a", b"old").await;
    disk.fail(Fault::power_loss(1));
    assert!(file.write_at(b"new", 0).is_err());
    assert!(disk.open(&path("a"), Open::Read).is_err(), "something works without power");
    assert_eq!(disk.unsynced_bytes(), 3);
    disk.power_cut(|_| Fate::KEPT);
    assert_eq!(disk.content(&path("a")).unwrap(), b"new");
}

#[tokio::test]
async fn second_lock_is_refused_until_the_first_is_dropped() {
    let disk = disk();
    let lock = Disk::lock(&disk, &path("lock")).unwrap();
    assert!(Disk::lock(&disk, &path("lock")).is_err());
    drop(lock);
    assert!(Disk::lock(&disk, &path("lock")).is_ok());
}

#[tokio::test]
async fn write_inside_a_length_that_was_lost_is_lost_with_it() {
    let lost_growth = |piece: &Unsynced<'_>| if piece.len == 0 { Fate::LOST } else { Fate::KEPT };
    let disk = disk();
    let file = synced(&disk, "a", b"").await;
    file.set_len(1024).unwrap();
    file.write_at(b"inside", 0).unwrap();
    file.write_at(b"behind", 1024).unwrap();

    let kept = disk.fork();
    kept.power_cut(|_| Fate::KEPT);
    assert_eq!(kept.content(&path("a")).unwrap().len(), 1030);
    disk.power_cut(lost_growth);
    let found = disk.content(&path("a")).unwrap();
    assert!(found.starts_with(&[0; 6]), "data of a block that the file did not have");
    assert!(found.ends_with(b"behind"));
}

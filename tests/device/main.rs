//! What an isolated write costs the card, by the block device's own counters.
//!
//! Makes an ext4 file system on a loop device, mounts it as the product's image does, and reads
//! `/sys/block/loopN/stat` around a number of isolated appends: one 4 KiB block and one flush each, nothing else. Needs
//! root, loop devices and mkfs.ext4; where they are missing it says SKIPPED and why.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(clippy::print_stderr, reason = "a test that is skipped must say so")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k3s_server::env::host;
use k3s_server::types::{ClusterId, LogId, LogIndex, NodeId, Term};
use k3s_server::wal::{Identity, Options, Record, Urgency, Wal};

/// A file system on a loop device. Dropping it takes everything away again.
struct Card {
    dir: tempfile::TempDir,
    device: Option<PathBuf>,
    mounted: bool,
}

impl Card {
    fn make() -> Result<Self, String> {
        let mut card = Self { dir: tempfile::tempdir().unwrap(), device: None, mounted: false };
        let image = card.dir.path().join("card.img");
        fs::File::create(&image).unwrap().set_len(128 << 20).unwrap();
        run("mkfs.ext4", &["-q", "-b", "4096", "-F", text(&image)])?;
        let device = run("losetup", &["--find", "--show", text(&image)])?;
        card.device = Some(PathBuf::from(device.trim()));
        fs::create_dir(card.mount_point()).unwrap();
        let mount_point = card.mount_point();
        run("mount", &["-o", "noatime,commit=60", device.trim(), text(&mount_point)])?;
        card.mounted = true;
        Ok(card)
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Writes everything that is still due, so that it is not counted.
    fn settle(&self) {
        run("sync", &["-f", text(&self.mount_point())]).unwrap();
    }

    fn counters(&self) -> Counters {
        let name = self.device.as_ref().unwrap().file_name().unwrap();
        let stat = Path::new("/sys/block").join(name).join("stat");
        let fields: Vec<u64> = fs::read_to_string(stat)
            .unwrap()
            .split_whitespace()
            .map(|field| field.parse().unwrap())
            .collect();
        Counters { bytes: fields[6] * 512, flushes: fields[15] }
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.mounted {
            run("umount", &[text(&self.mount_point())]).ok();
        }
        if let Some(device) = &self.device {
            run("losetup", &["--detach", text(device)]).ok();
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Counters {
    bytes: u64,
    flushes: u64,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn append(wal: &Wal, index: u64) {
    let id = LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) };
    let record = Record::Entry { id, payload: vec![b'x'; 400].into() };
    wal.append(vec![record], Urgency::Urgent, |_| ()).unwrap();
    assert!(wal.flush().await.is_ok());
}

#[tokio::test]
async fn isolated_append_costs_one_block_and_one_flush() {
    let card = match Card::make() {
        Ok(card) => card,
        Err(reason) => {
            eprintln!("SKIPPED: no file system on a loop device here: {reason}");
            return;
        }
    };
    let identity = Identity { cluster: ClusterId::new(1), node: NodeId::new(1) };
    // Slots of ordinary size; none is filled ahead while we count.
    let options = Options { slots_min: 1, ..Options::default() };
    let path = card.mount_point().join("wal");
    let (wal, _, writer) = Wal::open(&host::env(), &path, identity, options).await.unwrap();
    let thread = writer.spawn_thread().unwrap();
    append(&wal, 1).await;
    card.settle();

    const WRITES: u64 = 50;
    let before = card.counters();
    for index in 2..2 + WRITES {
        append(&wal, index).await;
    }
    let after = card.counters();
    wal.close().await.unwrap();
    thread.join().unwrap();
    let cost =
        Counters { bytes: after.bytes - before.bytes, flushes: after.flushes - before.flushes };
    assert_eq!(
        cost,
        Counters { bytes: WRITES * 4096, flushes: WRITES },
        "for {WRITES} isolated writes"
    );
}

//! What the datastore lives on, and what follows from it.
//!
//! # Shape
//! [`medium_of`] looks the block device up in sysfs; [`tuning`] is a table. A value the operator set wins over the table.
//!
//! # Invariants
//! No row weakens durability: an acknowledged write is on a majority's media in each of them. They differ in how long work may wait.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::{major, minor};

use crate::config::StorageMedium;
use crate::limits;
use crate::raft::checkpoint::Policy;
use crate::types::ByteCount;

/// What a block device is made of, as far as that can be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// SD card, eMMC, or a USB stick: few writes, and pauses.
    Card,
    /// An SSD or a disk.
    Drive,
    /// Behind something that hides it.
    Unknown,
}

/// How long work may wait for company.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// A write that only renews leases.
    pub linger: Duration,
    /// The filling of log segments, between two pieces.
    pub fill_pause: Duration,
    /// Making the state durable.
    pub checkpoint: Policy,
}

/// What to run with: `said` and `linger` by the operator, `found` on the host.
pub fn tuning(said: StorageMedium, found: Medium, linger: Option<Duration>) -> Tuning {
    let medium = match said {
        StorageMedium::Auto => found,
        StorageMedium::Sd => Medium::Card,
        StorageMedium::Ssd => Medium::Drive,
    };
    let (linger_ms, fill_pause_ms, interval) = match medium {
        // A renewal has ten seconds; a second of company saves two flushes of three. What is replayed after a power
        // cut stays bounded by the log's bytes.
        Medium::Card => (1_000, 50, 3 * limits::CHECKPOINT_INTERVAL),
        Medium::Drive => (50, 5, limits::CHECKPOINT_INTERVAL),
        Medium::Unknown => (250, 50, limits::CHECKPOINT_INTERVAL),
    };
    Tuning {
        linger: linger.unwrap_or(Duration::from_millis(linger_ms)),
        fill_pause: Duration::from_millis(fill_pause_ms),
        checkpoint: Policy { interval, log_bytes: ByteCount::new(limits::CHECKPOINT_LOG_BYTES) },
    }
}

/// What holds `dir`, which exists.
pub fn medium_of(dir: &Path) -> Medium {
    let Ok(metadata) = fs::metadata(dir) else { return Medium::Unknown };
    let device = metadata.dev();
    let number = format!("{}:{}", major(device), minor(device));
    device_at(Path::new("/sys"), &PathBuf::from("dev/block").join(number))
}

/// What the entry `path` below `sysfs` is. A layer, such as encryption, is what lies under it.
fn device_at(sysfs: &Path, path: &Path) -> Medium {
    let Ok(entry) = fs::canonicalize(sysfs.join(path)) else { return Medium::Unknown };
    let device = match entry.parent() {
        Some(whole) if entry.join("partition").exists() => whole.to_owned(),
        _ => entry,
    };
    let under: Vec<PathBuf> = fs::read_dir(device.join("slaves"))
        .map(|slaves| slaves.flatten().map(|slave| slave.path()).collect())
        .unwrap_or_default();
    if let [only] = under.as_slice() {
        return device_at(sysfs, only);
    }
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_removable = fs::read_to_string(device.join("removable")).is_ok_and(|r| r.trim() == "1");
    if name.starts_with("mmcblk") || (name.starts_with("sd") && is_removable) {
        Medium::Card
    } else if name.starts_with("nvme") || name.starts_with("sd") {
        Medium::Drive
    } else {
        Medium::Unknown
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs with one device at 8:1; `attributes` are files of the whole device.
    fn sysfs(
        device: &str,
        partition: Option<&str>,
        attributes: &[(&str, &str)],
    ) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let whole = root.path().join("devices/bus").join(device);
        let entry = partition.map_or(whole.clone(), |name| whole.join(name));
        fs::create_dir_all(&entry).unwrap();
        if partition.is_some() {
            fs::write(entry.join("partition"), "1\n").unwrap();
        }
        for (name, value) in attributes {
            fs::write(whole.join(name), value).unwrap();
        }
        fs::create_dir_all(root.path().join("dev/block")).unwrap();
        symlink(entry, root.path().join("dev/block/8:1")).unwrap();
        root
    }

    fn found(device: &str, partition: Option<&str>, attributes: &[(&str, &str)]) -> Medium {
        let root = sysfs(device, partition, attributes);
        device_at(root.path(), Path::new("dev/block/8:1"))
    }

    #[test]
    fn what_the_operator_says_wins_over_what_is_found() {
        let linger = |said, found, set| tuning(said, found, set).linger.as_millis();

        assert_eq!(linger(StorageMedium::Auto, Medium::Card, None), 1_000);
        assert_eq!(linger(StorageMedium::Auto, Medium::Drive, None), 50);
        assert_eq!(linger(StorageMedium::Auto, Medium::Unknown, None), 250);
        assert_eq!(linger(StorageMedium::Ssd, Medium::Card, None), 50);
        assert_eq!(linger(StorageMedium::Sd, Medium::Drive, None), 1_000);
        let set = Some(Duration::from_millis(5));
        assert_eq!(linger(StorageMedium::Sd, Medium::Card, set), 5);
    }

    #[test]
    fn a_partition_of_a_card_is_a_card() {
        assert_eq!(found("mmcblk0", Some("mmcblk0p2"), &[("removable", "0\n")]), Medium::Card);
        assert_eq!(found("mmcblk0", None, &[]), Medium::Card);
    }

    #[test]
    fn a_usb_stick_is_a_card_and_a_usb_disk_is_a_drive() {
        assert_eq!(found("sda", Some("sda1"), &[("removable", "1\n")]), Medium::Card);
        assert_eq!(found("sda", Some("sda1"), &[("removable", "0\n")]), Medium::Drive);
        assert_eq!(found("nvme0n1", Some("nvme0n1p2"), &[]), Medium::Drive);
    }

    #[test]
    fn encryption_on_a_card_is_a_card() {
        let root = sysfs("mmcblk0", Some("mmcblk0p2"), &[]);
        let mapped = root.path().join("devices/virtual/dm-0/slaves");
        fs::create_dir_all(&mapped).unwrap();
        symlink(root.path().join("devices/bus/mmcblk0/mmcblk0p2"), mapped.join("mmcblk0p2"))
            .unwrap();
        symlink(root.path().join("devices/virtual/dm-0"), root.path().join("dev/block/253:0"))
            .unwrap();

        assert_eq!(device_at(root.path(), Path::new("dev/block/253:0")), Medium::Card);
    }

    #[test]
    fn what_hides_its_device_is_unknown() {
        assert_eq!(found("vda", Some("vda1"), &[]), Medium::Unknown);
        assert_eq!(found("loop0", None, &[]), Medium::Unknown);
        let root = sysfs("mmcblk0", None, &[]);
        assert_eq!(device_at(root.path(), Path::new("dev/block/0:42")), Medium::Unknown);
    }
}

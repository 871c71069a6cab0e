//! What the kernel tells of this board: the card under the data, how it is mounted, and whether K3s will find what it needs.
//!
//! Read from `/sys` and `/proc`, which stay readable in the unit's sandbox: no device is opened. What is not told is left out.
//!
//! # Shape
//!
//! [`look`] reads; [`card`] and [`mount`] say what the numbers mean; [`prerequisites`] (pure) says what is missing, and which
//! file to edit.

mod card;
mod mount;
mod prerequisites;

use std::path::{Path, PathBuf};

pub use card::{Card, Medium};
pub use mount::Mount;
pub use prerequisites::{Missing, Weight};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Board {
    /// Such as "Raspberry Pi 4 Model B Rev 1.4".
    pub model: Option<String>,
    /// What the directory lies on.
    pub card: Option<Card>,
    /// Where that is mounted, and how.
    pub mount: Option<Mount>,
    /// What is missing.
    pub missing: Vec<Missing>,
}

/// Looks at the board below `root` (`/`), for a datastore in `directory`.
pub fn look(root: &Path, directory: &Path) -> Board {
    let mount = mount::of(root, directory);
    let card = card::number(directory, mount.as_ref()).and_then(|number| card::of(root, number));
    let missing = prerequisites::missing(&prerequisites::Facts {
        memory_controller: prerequisites::memory_controller(root),
        command_line: prerequisites::command_line(root),
        mount: mount.as_ref(),
        medium: card.as_ref().map(|card| card.medium),
        worn: card.as_ref().and_then(Card::warning),
    });
    Board { model: text(&root.join("proc/device-tree/model")), card, mount, missing }
}

/// The text of a small file of the kernel, without what ends it.
fn text(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// The first of these that exists.
fn first_existing(root: &Path, names: &[&str]) -> Option<PathBuf> {
    names
        .iter()
        .map(|name| Path::new("/").join(name))
        .find(|path| path.strip_prefix("/").is_ok_and(|below| root.join(below).exists()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A Raspberry Pi with an SD card, as the kernel shows it.
    fn pi() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0");
        write(
            "proc/cgroups",
            "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t9\t1\nmemory\t0\t9\t0\n",
        );
        write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n");
        write("boot/firmware/cmdline.txt", "console=tty1 root=PARTUUID=1\n");
        write(
            "proc/self/mountinfo",
            "22 1 179:2 / / rw,relatime shared:1 - ext4 /dev/mmcblk0p2 rw,commit=30\n\
             23 22 0:5 / /dev rw - devtmpfs udev rw\n",
        );
        let block = "sys/devices/platform/emmc2/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0";
        write(&format!("{block}/size"), "62333952\n");
        write(&format!("{block}/mmcblk0p2/partition"), "2\n");
        let device = "sys/devices/platform/emmc2/mmc_host/mmc0/mmc0:aaaa";
        write(&format!("{device}/name"), "SC32G\n");
        write(&format!("{device}/type"), "SD\n");
        write(&format!("{device}/cid"), "035344534333324780abcdef0123456b\n");
        symlink("../..", root.path().join(block).join("device")).unwrap();
        fs::create_dir_all(root.path().join("sys/dev/block")).unwrap();
        symlink(format!("../../../{block}/mmcblk0p2"), root.path().join("sys/dev/block/179:2"))
            .unwrap();
        root
    }

    #[test]
    fn the_card_below_a_partition_is_found_and_what_is_missing_names_the_file() {
        let root = pi();
        let mount = mount::of(root.path(), Path::new("/var/lib/k3s-server")).unwrap();
        assert_eq!((mount.source.as_str(), mount.kind.as_str()), ("/dev/mmcblk0p2", "ext4"));
        let card = card::of(root.path(), (179, 2)).unwrap();
        assert_eq!(card.name.as_deref(), Some("SC32G"));
        assert_eq!((card.medium, card.bytes), (Medium::SdCard, Some(62_333_952 * 512)));
        assert_eq!(card.identity.as_deref(), Some("035344534333324780abcdef0123456b"));

        let board = look(root.path(), Path::new("/var/lib/k3s-server"));
        assert_eq!(board.model.as_deref(), Some("Raspberry Pi 4 Model B Rev 1.4"));
        let memory = &board.missing[0];
        assert_eq!(memory.weight, Weight::Needed);
        assert!(memory.fix.contains("/boot/firmware/cmdline.txt"), "{}", memory.fix);
        assert!(memory.fix.contains("cgroup_enable=memory"), "{}", memory.fix);
    }

    #[test]
    fn a_directory_without_anything_tells_nothing_and_asks_for_nothing() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(look(root.path(), Path::new("/nowhere")), Board::default());
    }
}

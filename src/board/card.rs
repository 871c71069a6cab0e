//! The block device under a directory: what it is, and what it says of its health.
//!
//! SD cards tell their name and number, and nothing of their wear. eMMC and newer cards with health registers do, through the
//! kernel's `life_time` and `pre_eol_info`, in tenths.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::mount::Mount;
use super::text;

/// Sectors of the kernel's `size` files.
const SECTOR_BYTES: u64 = 512;

/// What the data lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// An SD card.
    SdCard,
    /// Soldered flash behind the same bus.
    Emmc,
    /// A disk that turns.
    Disk,
    /// Anything else: SSD, NVMe, a virtual disk.
    SolidState,
}

impl Medium {
    /// For people.
    pub const fn words(self) -> &'static str {
        match self {
            Self::SdCard => "SD card",
            Self::Emmc => "eMMC",
            Self::Disk => "hard disk",
            Self::SolidState => "solid state disk",
        }
    }

    /// Whether every write counts.
    pub const fn wears(self) -> bool {
        matches!(self, Self::SdCard | Self::Emmc)
    }
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its name in the kernel, such as `mmcblk0`.
    pub device: String,
    /// What it is.
    pub medium: Medium,
    /// What it calls itself.
    pub name: Option<String>,
    /// Its number (CID): no two cards have the same.
    pub identity: Option<String>,
    /// Its size.
    pub bytes: Option<u64>,
    /// How much of its life is used up, in per cent: at least, and at most. The worse of its two parts.
    pub used: Option<(u8, u8)>,
    /// What it says of its spare blocks: 1 normal, 2 warning, 3 urgent.
    pub spare: Option<u8>,
}

impl Card {
    /// In words, if it should be replaced.
    pub fn warning(&self) -> Option<String> {
        let name = self.name.as_deref().unwrap_or(&self.device);
        match (self.spare, self.used) {
            (Some(3..), _) => Some(format!("{name} has used up its spare blocks")),
            (Some(2), _) => Some(format!("{name} has used 80 % of its spare blocks")),
            (_, Some((from, _))) if 90 <= from => {
                Some(format!("{name} has used {from} % or more of its life"))
            }
            _ => None,
        }
    }
}

/// Major and minor number of the device that holds a directory; where a file system has no device of its own (btrfs), of
/// what is mounted there.
pub(super) fn number(directory: &Path, mount: Option<&Mount>) -> Option<(u64, u64)> {
    let split = |device: u64| (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let mounted = mount.and_then(|mount| fs::metadata(&mount.source).ok());
    let own = fs::metadata(directory).ok().map(|found| split(found.dev()));
    own.filter(|(major, _)| *major != 0)
        .or_else(|| mounted.map(|found| split(found.rdev())).filter(|(major, _)| *major != 0))
}

/// The device with this number, or the whole of which it is a partition.
pub(super) fn of(root: &Path, (major, minor): (u64, u64)) -> Option<Card> {
    let mut path = fs::canonicalize(root.join(format!("sys/dev/block/{major}:{minor}"))).ok()?;
    if path.join("partition").exists() {
        path = path.parent()?.to_owned();
    }
    let device = path.file_name()?.to_str()?.to_owned();
    let below = |name: &str| text(&path.join("device").join(name));
    let medium = match below("type").as_deref() {
        Some("SD") => Medium::SdCard,
        Some("MMC") => Medium::Emmc,
        _ if text(&path.join("queue/rotational")).as_deref() == Some("1") => Medium::Disk,
        _ => Medium::SolidState,
    };
    let sectors: Option<u64> = text(&path.join("size")).and_then(|text| text.parse().ok());
    Some(Card {
        medium,
        name: below("name").or_else(|| below("model")),
        identity: below("cid"),
        bytes: sectors.map(|sectors| sectors * SECTOR_BYTES),
        used: below("life_time").and_then(|text| life(&text)),
        spare: below("pre_eol_info").and_then(|text| hexadecimal(&text)),
        device,
    })
}

fn hexadecimal(text: &str) -> Option<u8> {
    u8::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

/// `0x02 0x01`: the first tenth is over in one part of the flash, and none in the other. 0 says nothing, 11 is beyond its end.
fn life(text: &str) -> Option<(u8, u8)> {
    let worst = text.split_whitespace().filter_map(hexadecimal).max()?;
    match worst {
        0 => None,
        tenths @ 1..=10 => Some(((tenths - 1) * 10, tenths * 10)),
        _ => Some((100, 100)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn life_is_told_in_tenths_and_the_worse_part_counts() {
        for (text, expected) in [
            ("0x01 0x01", Some((0, 10))),
            ("0x02 0x0a", Some((90, 100))),
            ("0x0b 0x01", Some((100, 100))),
            ("0x00 0x00", None),
            ("", None),
            ("unknown", None),
        ] {
            assert_eq!(life(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_card_near_its_end_says_so() {
        let card = |used, spare| Card {
            device: "mmcblk0".to_owned(),
            medium: Medium::Emmc,
            name: Some("BJTD4R".to_owned()),
            identity: None,
            bytes: None,
            used,
            spare,
        };
        assert_eq!(card(Some((0, 10)), Some(1)).warning(), None);
        assert_eq!(card(Some((80, 90)), None).warning(), None);
        assert!(card(Some((90, 100)), Some(1)).warning().unwrap().contains("BJTD4R"));
        assert!(card(None, Some(2)).warning().unwrap().contains("80 %"));
        assert!(card(None, Some(3)).warning().unwrap().contains("used up"));
    }
}

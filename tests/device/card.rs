//! A file system on a loop device, and what the kernel counts for that device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system on a loop device. Dropping it takes everything away again.
pub struct Card {
    dir: tempfile::TempDir,
    device: Option<PathBuf>,
    mounted: bool,
}

impl Card {
    /// Makes one; fails where root, loop devices or mkfs.ext4 are missing.
    pub fn make() -> Result<Self, String> {
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

    pub fn mount_point(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Writes everything that is still due, so that it is not counted.
    pub fn settle(&self) {
        run("sync", &["-f", text(&self.mount_point())]).unwrap();
    }

    /// What the device was given since it was made.
    pub fn counters(&self) -> Counters {
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

/// Bytes written and flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    pub bytes: u64,
    pub flushes: u64,
}

impl std::ops::Sub for Counters {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { bytes: self.bytes - before.bytes, flushes: self.flushes - before.flushes }
    }
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

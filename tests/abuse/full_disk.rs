//! A file system that fills up under a running server, and one that turns read-only.
//!
//! A real ext4 on a loop device: what the kernel does then (delayed allocation, errors on write-back) cannot be made up.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Card {
    dir: tempfile::TempDir,
    mounted: bool,
}

/// The log, its ballast, the state, and not much more.
const CARD_BYTES: u64 = 160 << 20;

impl Card {
    fn make() -> Result<Self, String> {
        let mut card = Self { dir: tempfile::tempdir().unwrap(), mounted: false };
        let image = card.dir.path().join("card.img");
        fs::File::create(&image).unwrap().set_len(CARD_BYTES).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-m", "0", text(&image)])?;
        fs::create_dir(card.mount_point()).unwrap();
        run("mount", &["-o", "loop,noatime", text(&image), text(&card.mount_point())])?;
        card.mounted = true;
        Ok(card)
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.mounted {
            // The server may not quite be gone.
            drop(run("umount", &["--lazy", text(&self.mount_point())]));
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

//! Where a server's data lives: an emulated card with ext4 on it, or a directory on a real one. Both count the same things.
//!
//! # Invariants
//! Dropping a [`Medium`] takes everything it made away again: mount, loop device, card process, image.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::card::{self, Counters};
use crate::sys;

/// How to mount: as the product's image does.
const MOUNT_OPTIONS: &str = "noatime,commit=60";

/// Where data lives.
pub enum Medium {
    /// An emulated card.
    Emulated(Emulated),
    /// A directory on a real one. Removed at the end.
    Directory { path: PathBuf, device: String },
}

/// A card process, its loop device and the file system on that.
pub struct Emulated {
    dir: PathBuf,
    image: PathBuf,
    device: Option<String>,
    process: Child,
}

impl Medium {
    /// A new card of this profile.
    pub fn emulated(
        name: &str,
        profile: &str,
        bytes: u64,
        seed: u64,
    ) -> Result<Self, Box<dyn Error>> {
        Emulated::make(name, profile, bytes, seed).map(Self::Emulated)
    }

    /// A new directory below `parent`.
    pub fn directory(parent: &Path, name: &str) -> Result<Self, Box<dyn Error>> {
        let path = parent.join(format!("bench-sd-{}-{name}", std::process::id()));
        fs::create_dir_all(&path)?;
        let device = run("findmnt", &["-no", "SOURCE", "-T", text(&path)])?;
        let device = device.trim().trim_start_matches("/dev/").to_owned();
        Ok(Self::Directory { path, device })
    }

    /// Where to write.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Emulated(card) => card.mount_point(),
            Self::Directory { path, .. } => path.clone(),
        }
    }

    /// What it has counted. Of a real card only what its driver counts.
    pub fn counters(&self) -> Result<Counters, Box<dyn Error>> {
        match self {
            Self::Emulated(card) => Ok(serde_json::from_str(&card.ask("counters")?)?),
            Self::Directory { device, .. } => device_counters(device),
        }
    }

    /// Makes the card busy for this long from now on.
    pub fn stall(&self, length: Duration) -> Result<(), Box<dyn Error>> {
        match self {
            Self::Emulated(card) => card.ask(&format!("stall {}", length.as_millis())).map(drop),
            Self::Directory { .. } => Err("a real card stalls when it wants to".into()),
        }
    }

    /// Whether requests take the card's time, or none, while it is prepared.
    pub fn slow(&self, slow: bool) -> Result<(), Box<dyn Error>> {
        match self {
            Self::Emulated(card) => card.ask(if slow { "slow on" } else { "slow off" }).map(drop),
            Self::Directory { .. } => Ok(()),
        }
    }

    /// Forgets what the kernel has of it in memory, as after a reboot.
    pub fn forget_cache(&self) -> Result<(), Box<dyn Error>> {
        if let Self::Emulated(card) = self
            && let Some(device) = &card.device
        {
            run("umount", &[text(&card.mount_point())])?;
            run("mount", &["-o", MOUNT_OPTIONS, device, text(&card.mount_point())])?;
        }
        Ok(())
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        if let Self::Directory { path, .. } = self {
            drop(fs::remove_dir_all(path));
        }
    }
}

impl Emulated {
    fn make(name: &str, profile: &str, bytes: u64, seed: u64) -> Result<Self, Box<dyn Error>> {
        let dir = scratch().join(name);
        fs::create_dir_all(dir.join("fuse"))?;
        fs::create_dir_all(dir.join("mounted"))?;
        // In memory: the emulated card must be the only slow thing.
        let image =
            Path::new("/dev/shm").join(format!("bench-sd-{}-{name}.img", std::process::id()));
        let process = Command::new(std::env::current_exe()?)
            .args(["card", text(&image), text(&dir.join("fuse")), text(&dir.join("control"))])
            .args([profile, &bytes.to_string(), &seed.to_string()])
            .stdin(Stdio::null())
            .spawn()?;
        let mut card = Self { dir, image, device: None, process };
        let file = card.dir.join("fuse").join(card::IMAGE);
        if !sys::wait_while(Duration::from_secs(20), || !file.exists()) {
            return Err(format!("the card {name} did not come up (FUSE needs root)").into());
        }
        card.format_and_mount(&file)?;
        Ok(card)
    }

    fn format_and_mount(&mut self, file: &Path) -> Result<(), Box<dyn Error>> {
        // direct I/O: one request of the file system is one command of the card.
        let device = run("losetup", &["--find", "--show", "--direct-io=on", text(file)])?;
        let device = self.device.insert(device.trim().to_owned());
        let queue = Path::new("/sys/block").join(device.trim_start_matches("/dev/")).join("queue");
        // As sdhci has it. Both outlive a detach of the loop device, so they are always written.
        fs::write(queue.join("max_sectors_kb"), "512")?;
        fs::write(queue.join("write_cache"), "write back")?;
        let format = "lazy_itable_init=0,lazy_journal_init=0,nodiscard";
        run("mkfs.ext4", &["-q", "-b", "4096", "-E", format, "-J", "size=16", device])?;
        run("mount", &["-o", MOUNT_OPTIONS, device, text(&self.dir.join("mounted"))])?;
        Ok(())
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.join("mounted")
    }

    fn ask(&self, command: &str) -> Result<String, Box<dyn Error>> {
        Ok(card::ask(&self.dir.join("control"), command)?)
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        // What fails here was not made, or is gone.
        drop(self.ask("slow off"));
        drop(run("umount", &[text(&self.mount_point())]));
        if let Some(device) = &self.device {
            drop(run("losetup", &["--detach", device]));
        }
        let fuse = self.dir.join("fuse");
        let mut tries = 0;
        while run("umount", &[text(&fuse)]).is_err() && tries < 50 {
            // The kernel lets go of a loop device a moment after it says so.
            std::thread::sleep(Duration::from_millis(100));
            tries += 1;
        }
        if tries == 50 {
            drop(self.process.kill());
        }
        drop(self.process.wait());
        drop(fs::remove_file(&self.image));
        drop(fs::remove_dir_all(&self.dir));
        drop(fs::remove_dir(scratch()));
    }
}

/// Mount points, sockets and logs of this run.
pub fn scratch() -> PathBuf {
    PathBuf::from(format!("/run/bench-sd-{}", std::process::id()))
}

/// `/sys/class/block/*/stat`: sectors written of the partition; flushes are counted for the whole device only.
fn device_counters(device: &str) -> Result<Counters, Box<dyn Error>> {
    let class = fs::canonicalize(Path::new("/sys/class/block").join(device))?;
    let whole = if class.join("partition").exists() {
        class.parent().ok_or("a partition without a device")?.to_owned()
    } else {
        class.clone()
    };
    let part = stat(&class)?;
    let all = stat(&whole)?;
    Ok(Counters {
        reads: part[0],
        writes: part[4],
        bytes: part[6] * 512,
        flushes: all.get(15).copied().unwrap_or(0),
        busy_us: all[9] * 1_000,
        ..Counters::default()
    })
}

fn stat(device: &Path) -> Result<Vec<u64>, Box<dyn Error>> {
    let text = fs::read_to_string(device.join("stat"))?;
    Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

/// Runs a program to its end; its output, or what it complained about.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, Box<dyn Error>> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} {}: {}", arguments.join(" "), said.trim()).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Paths of ours are ASCII.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

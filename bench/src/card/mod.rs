//! An emulated SD card: a FUSE file that takes as long as a card, stalls as one, and counts what it wears.
//!
//! Runs as a process of its own, before others in priority, so that what is measured does not slow the card down.
//! ext4, the page cache and the loop device above it are the kernel's own.

mod control;
mod disk;
mod latency;
mod state;
mod wear;

use std::error::Error;
use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Arc;

pub use control::ask;
use disk::Card;
pub use disk::IMAGE;
use latency::Profile;
pub use state::Counters;
use state::State;

use crate::sys;

/// The profiles that are built in: name and numbers.
const PROFILES: &[(&str, &str)] = &[
    ("good-a2", include_str!("../../profiles/good-a2.json")),
    ("typical-a1", include_str!("../../profiles/typical-a1.json")),
    ("bad-old", include_str!("../../profiles/bad-old.json")),
    ("worn", include_str!("../../profiles/worn.json")),
    ("none", include_str!("../../profiles/none.json")),
];

/// `bench-sd card IMAGE MOUNT_POINT SOCKET PROFILE SIZE SEED`: serves a card until it is unmounted.
pub fn run(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let [image, mount_point, socket, profile, size, seed] = arguments else {
        return Err("card: expected IMAGE MOUNT_POINT SOCKET PROFILE SIZE SEED".into());
    };
    let profile = profile_named(profile)?;
    let size: u64 = size.parse()?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(image)?;
    file.set_len(size)?;
    sys::serves_a_block_device();
    sys::set_nice(-15);
    let card = Arc::new(Card::new(State::new(profile, size, seed.parse()?), file));
    control::serve(Arc::clone(&card), Path::new(socket))?;
    disk::serve(card, Path::new(mount_point))?;
    Ok(())
}

fn profile_named(name: &str) -> Result<Profile, Box<dyn Error>> {
    let built_in = PROFILES.iter().find(|(known, _)| *known == name);
    let text = match built_in {
        Some((_, text)) => (*text).to_owned(),
        None => std::fs::read_to_string(name).map_err(|error| format!("{name}: {error}"))?,
    };
    Ok(serde_json::from_str(&text)?)
}

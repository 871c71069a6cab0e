//! Small files that say when something was done last, by the wall clock.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::env::{Env, Open};

/// Seconds since 1970.
pub(super) fn seconds(wall: SystemTime) -> u64 {
    wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What was written last; nothing if that cannot be understood.
pub(super) fn read(env: &Env, path: &Path) -> io::Result<Option<SystemTime>> {
    if !env.disk.exists(path)? {
        return Ok(None);
    }
    let file = env.disk.open(path, Open::Read)?;
    // A number of seconds and a line feed.
    let mut text = vec![0; usize::try_from(file.len()?.min(64)).unwrap_or(64)];
    file.read_at(&mut text, 0)?;
    let text = String::from_utf8_lossy(&text);
    let seconds = text.trim().parse().ok();
    Ok(seconds.and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds))))
}

/// Durable when it returns.
pub(super) async fn write(env: &Env, path: &Path, wall: SystemTime) -> io::Result<()> {
    let new = path.with_extension("tmp");
    if env.disk.exists(&new)? {
        env.disk.remove(&new)?;
    }
    let file = env.disk.open(&new, Open::Create)?;
    file.write_at(format!("{}\n", seconds(wall)).as_bytes(), 0)?;
    file.sync().await?;
    env.disk.rename(&new, path)?;
    env.disk.sync_dir(path.parent().unwrap_or(path))
}

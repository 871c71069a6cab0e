//! Reads and replaces the small files of a data directory: each is always the old one or the new one, whole.

use std::io;
use std::path::{Path, PathBuf};

use crate::env::{Disk, Env, Open};

/// Far more than any of these files ever holds; a larger one is not ours.
pub(super) const BYTES_MAX: u64 = 64 * 1024;

fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Writes the file with mode 0600: durable under its name when this returns, or not there at all.
pub(super) async fn replace(env: &Env, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = unfinished(path);
    if env.disk.exists(&temporary)? {
        env.disk.remove(&temporary)?;
    }
    let file = env.disk.open(&temporary, Open::Create)?;
    file.write_at(bytes, 0)?;
    file.sync().await?;
    env.disk.rename(&temporary, path)?;
    env.disk.sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// The file's bytes; `None` if there is no such file.
pub(super) fn read(disk: &dyn Disk, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path, Open::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.len()?;
    if BYTES_MAX < length {
        let found = format!("found {length} bytes, expected at most {BYTES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, found));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}

/// Removes the file, if it is there, and what an interrupted [`replace`] left. Durable after a sync of its directory.
pub(super) fn remove(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    remove_unfinished(disk, path)?;
    if disk.exists(path)? { disk.remove(path) } else { Ok(()) }
}

/// Removes what an interrupted [`replace`] left.
pub(super) fn remove_unfinished(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let temporary = unfinished(path);
    if disk.exists(&temporary)? { disk.remove(&temporary) } else { Ok(()) }
}

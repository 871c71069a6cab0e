//! Reads and writes the files, so that each is always either the old one or the new one.
//!
//! Written under a temporary name, synced, renamed, directory synced: a power cut leaves at most a temporary file, which the next
//! start removes.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use crate::env::{Disk, Open};

use super::PkiError;

/// Ends the name of a file being written.
const UNFINISHED: &str = "tmp";

/// Far more than any certificate; a larger file is not one.
const FILE_BYTES_MAX: u64 = 64 * 1024;

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> PkiError {
    let path = path.to_owned();
    move |source| PkiError::Io { path, doing, source }
}

/// Makes the directory and removes what an interrupted write left.
pub(super) fn prepare(disk: &dyn Disk, dir: &Path) -> Result<(), PkiError> {
    disk.create_dir_all(dir).map_err(failed(dir, "created"))?;
    for path in disk.list(dir).map_err(failed(dir, "listed"))? {
        if path.extension() == Some(OsStr::new(UNFINISHED)) {
            // Names from the listing may or may not carry the directory.
            let path = dir.join(path.file_name().unwrap_or_default());
            disk.remove(&path).map_err(failed(&path, "removed"))?;
        }
    }
    Ok(())
}

/// Replaces the file at `path`. Durable when it returns.
pub(super) async fn write(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), PkiError> {
    let unfinished = unfinished(path);
    if disk.exists(&unfinished).map_err(failed(&unfinished, "looked up"))? {
        disk.remove(&unfinished).map_err(failed(&unfinished, "removed"))?;
    }
    let file = disk.open(&unfinished, Open::Create).map_err(failed(&unfinished, "created"))?;
    file.write_at(bytes, 0).map_err(failed(&unfinished, "written"))?;
    file.sync().await.map_err(failed(&unfinished, "made durable"))?;
    disk.rename(&unfinished, path).map_err(failed(path, "replaced"))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    disk.sync_dir(dir).map_err(failed(dir, "made durable"))
}

/// Removes a file, if there is one. Durable after [`sync`].
pub(super) fn remove(disk: &dyn Disk, path: &Path) -> Result<(), PkiError> {
    if disk.exists(path).map_err(failed(path, "looked up"))? {
        disk.remove(path).map_err(failed(path, "removed"))?;
    }
    Ok(())
}

/// Makes the directory's entries durable.
pub(super) fn sync(disk: &dyn Disk, dir: &Path) -> Result<(), PkiError> {
    disk.sync_dir(dir).map_err(failed(dir, "made durable"))
}

fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(UNFINISHED);
    PathBuf::from(name)
}

/// The file's bytes; `None` if there is no such file.
pub(super) fn read(disk: &dyn Disk, path: &Path) -> Result<Option<Vec<u8>>, PkiError> {
    let file = match disk.open(path, Open::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(path, "opened")(error)),
    };
    let length = file.len().map_err(failed(path, "read"))?;
    if FILE_BYTES_MAX < length {
        let error = io::Error::other(format!("found {length} bytes, expected a few hundred"));
        return Err(failed(path, "read")(error));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_at(&mut bytes, 0).map_err(failed(path, "read"))?;
    Ok(Some(bytes))
}

/// The same for a private key: refused if anyone but the owner may read it.
pub(super) fn read_secret(disk: &dyn Disk, path: &Path) -> Result<Option<Vec<u8>>, PkiError> {
    let Some(bytes) = read(disk, path)? else { return Ok(None) };
    match disk.mode(path).map_err(failed(path, "looked up"))? {
        Some(mode) if mode & 0o077 != 0 => {
            Err(PkiError::PermissionsTooOpen { path: path.to_owned(), mode })
        }
        Some(_) | None => Ok(Some(bytes)),
    }
}

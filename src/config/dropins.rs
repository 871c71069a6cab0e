//! Chooses and reads the files: the main one, then its drop-ins in byte order.
//!
//! The rules are K3s': `K3S_CONFIG_FILE` wins over `--config`, an empty `--config=` means no file, drop-ins are
//! the `.yaml` and `.yml` files of `<file>.d/`, and the main file may be missing where there are drop-ins. One
//! rule is ours: a file that somebody named must exist.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::keys::find;
use super::merge::{Given, Variables};
use super::origin::Origin;
use super::problem::{Problem, Problems};
use super::yaml::FILE_BYTES_MAX;

/// Environment variable that names the file.
const VARIABLE: &str = "K3S_CONFIG_FILE";

/// Where files are looked for when nobody names one.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Ours.
    pub default_file: PathBuf,
    /// K3s', which we do not read but may mention.
    pub upstream_file: PathBuf,
}

/// A file as read.
#[derive(Clone)]
pub struct Source {
    /// Its path, for messages.
    pub name: String,
    /// Its content, at most one byte more than is allowed.
    pub bytes: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
}

impl fmt::Debug for Source {
    /// Without the content, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({}, {} bytes)", self.name, self.bytes.len())
    }
}

/// The file to read and who chose it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    Nothing,
    Default(PathBuf),
    Named(PathBuf, Origin),
}

/// Reads the chosen file and its drop-ins.
pub fn read(
    command_line: &[Given],
    environment: &Variables,
    paths: &Paths,
) -> (Vec<Source>, Problems) {
    let mut problems = Problems::default();
    let choice = choose(command_line, environment, paths, &mut problems);
    let (path, named_by) = match choice {
        Choice::Nothing => return (Vec::new(), problems),
        Choice::Default(path) => (path, None),
        Choice::Named(path, origin) => (path, Some(origin)),
    };
    if let Some(origin) = &named_by
        && ["http://", "https://"].iter().any(|scheme| path.to_string_lossy().starts_with(scheme))
    {
        problems.push(
            Problem::error(origin.clone(), "config cannot be a URL")
                .fix("copy the file to this server and give its path"),
        );
        return (Vec::new(), problems);
    }
    let mut sources = Vec::new();
    let main_is_missing = !collect(&path, &mut sources, &mut problems);
    let mut directory = path.clone().into_os_string();
    directory.push(".d");
    for dropin in list(Path::new(&directory), &mut problems) {
        collect(&dropin, &mut sources, &mut problems);
    }
    if main_is_missing && sources.is_empty() && !problems.has_errors() {
        problems.append(missing(&path, named_by, paths));
    }
    (sources, problems)
}

fn choose(
    command_line: &[Given],
    environment: &Variables,
    paths: &Paths,
    problems: &mut Problems,
) -> Choice {
    let is_config = |given: &&Given| find("config").is_some_and(|key| key.name == given.key.name);
    let argument = command_line
        .iter()
        .rfind(is_config)
        .and_then(|given| given.items.last())
        .map(|item| item.text.as_str());
    let variable = environment.get(VARIABLE).map(String::as_str).filter(|path| !path.is_empty());
    match (variable, argument) {
        (Some(path), argument) => {
            if let Some(other) = argument.filter(|other| *other != path) {
                problems.push(
                    Problem::warning(
                        Origin::CommandLine,
                        "config is overruled by K3S_CONFIG_FILE, as in K3s",
                    )
                    .found(if other.is_empty() { "no file" } else { other })
                    .expected(path)
                    .fix("unset K3S_CONFIG_FILE or leave --config out"),
                );
            }
            Choice::Named(PathBuf::from(path), Origin::Environment(VARIABLE))
        }
        (None, Some("")) => Choice::Nothing,
        (None, Some(path)) => Choice::Named(PathBuf::from(path), Origin::CommandLine),
        (None, None) => Choice::Default(paths.default_file.clone()),
    }
}

/// What to say when there is no file at all.
fn missing(path: &Path, named_by: Option<Origin>, paths: &Paths) -> Problems {
    let mut problems = Problems::default();
    if let Some(origin) = named_by {
        problems.push(
            Problem::error(origin, "the configuration file does not exist")
                .found(path.display().to_string())
                .fix("create the file or correct its name"),
        );
    } else if paths.upstream_file.exists() {
        let upstream = paths.upstream_file.display();
        problems.push(
            Problem::warning(
                Origin::Default,
                format!("{upstream} is not read: it belongs to upstream k3s"),
            )
            .found(format!("no {}", path.display()))
            .fix(format!(
                "copy the settings that shall apply here: cp {upstream} {}",
                path.display()
            )),
        );
    } else {
        let text = format!("no configuration file {}: defaults apply", path.display());
        problems.push(Problem::note(Origin::Default, text));
    }
    problems
}

/// Reads one file; false if there is none.
fn collect(path: &Path, sources: &mut Vec<Source>, problems: &mut Problems) -> bool {
    let name = path.display().to_string();
    match read_bounded(path) {
        Ok((bytes, mode)) => sources.push(Source { name, bytes, mode }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
        Err(error) => {
            let fix = if error.kind() == io::ErrorKind::PermissionDenied {
                "let the user that runs k3s-server read it (chgrp, chmod g+r)"
            } else {
                "make it a readable regular file"
            };
            problems.push(
                Problem::error(Origin::Default, format!("cannot read {name}"))
                    .found(error.to_string())
                    .fix(fix),
            );
        }
    }
    true
}

fn read_bounded(path: &Path) -> io::Result<(Vec<u8>, u32)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    }
    let mut bytes = Vec::new();
    let limit = u64::try_from(FILE_BYTES_MAX).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes)?;
    Ok((bytes, metadata.permissions().mode()))
}

/// Drop-in files in byte order of their names.
fn list(directory: &Path, problems: &mut Problems) -> Vec<PathBuf> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            problems.push(
                Problem::error(Origin::Default, format!("cannot read {}", directory.display()))
                    .found(error.to_string())
                    .fix("make it a directory that k3s-server may read, or remove it"),
            );
            return Vec::new();
        }
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension().is_some_and(|extension| {
                extension.eq_ignore_ascii_case("yaml") || extension.eq_ignore_ascii_case("yml")
            })
        })
        .filter(|path| !path.is_dir())
        .collect();
    files.sort_by(|a, b| a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes()));
    files
}

//! What K3s and a card need from the kernel, and which file to edit where it is missing.

use std::fs;
use std::path::{Path, PathBuf};

use super::card::Medium;
use super::first_existing;
use super::mount::Mount;

/// ext4 writes its journal this often by default.
const COMMIT_SECONDS_DEFAULT: u64 = 5;
const COMMIT_SECONDS_WANTED: u64 = 30;

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// K3s does not start, or the card is about to fail.
    Needed,
    /// It works, and wears the card more than it has to.
    Advised,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// How much it matters.
    pub weight: Weight,
    /// What it is.
    pub what: String,
    /// What to do, with the file to edit.
    pub fix: String,
}

/// What is looked at.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts<'a> {
    pub(super) memory_controller: Option<bool>,
    pub(super) command_line: Option<PathBuf>,
    pub(super) mount: Option<&'a Mount>,
    pub(super) medium: Option<Medium>,
    pub(super) worn: Option<String>,
}

/// Whether control groups can limit memory; `None` if nobody can tell.
pub(super) fn memory_controller(root: &Path) -> Option<bool> {
    if let Ok(text) = fs::read_to_string(root.join("sys/fs/cgroup/cgroup.controllers"))
        && text.split_whitespace().any(|controller| controller == "memory")
    {
        return Some(true);
    }
    let table = fs::read_to_string(root.join("proc/cgroups")).ok()?;
    let row = table.lines().find(|line| line.split_whitespace().next() == Some("memory"))?;
    Some(row.split_whitespace().last() == Some("1"))
}

/// Where a Raspberry Pi's kernel command line is, by age of the system.
pub(super) fn command_line(root: &Path) -> Option<PathBuf> {
    first_existing(root, &["boot/firmware/cmdline.txt", "boot/cmdline.txt"])
}

/// Decides.
pub(super) fn missing(facts: &Facts<'_>) -> Vec<Missing> {
    let mut missing = Vec::new();
    if facts.memory_controller == Some(false) {
        let fix = match &facts.command_line {
            Some(file) => format!(
                "add ` cgroup_enable=memory` at the end of the one line in {}, and reboot",
                file.display()
            ),
            None => {
                "add `cgroup_enable=memory` to the kernel's command line, and reboot".to_owned()
            }
        };
        let what = "the kernel's memory controller is off, and K3s does not start without it";
        missing.push(Missing { weight: Weight::Needed, what: what.to_owned(), fix });
    }
    if let Some(worn) = &facts.worn {
        let fix =
            "replace it: another card, then the same configuration and `server` with the token";
        missing.push(Missing { weight: Weight::Needed, what: worn.clone(), fix: fix.to_owned() });
    }
    if let Some(mount) = facts.mount
        && facts.medium.is_some_and(Medium::wears)
    {
        missing.extend(mount_options(mount));
    }
    missing
}

fn mount_options(mount: &Mount) -> Option<Missing> {
    let mut wanted = Vec::new();
    if !mount.has("noatime") {
        wanted.push("noatime");
    }
    let commit = mount.number("commit").unwrap_or(COMMIT_SECONDS_DEFAULT);
    if mount.kind == "ext4" && commit < COMMIT_SECONDS_WANTED {
        wanted.push("commit=60");
    }
    let point = mount.point.display();
    (!wanted.is_empty()).then(|| Missing {
        weight: Weight::Advised,
        what: format!(
            "{point} is mounted without {}: the card wears more than it has to",
            wanted.join(",")
        ),
        fix: format!(
            "add {} to the options of {point} in /etc/fstab, and reboot",
            wanted.join(",")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_names_the_file_to_edit() {
        let bare = Mount { kind: "ext4".to_owned(), point: "/".into(), ..Mount::default() };
        let good =
            Mount { options: vec!["noatime".to_owned(), "commit=60".to_owned()], ..bare.clone() };
        let fixes = |facts: &Facts<'_>| -> Vec<String> {
            missing(facts).into_iter().map(|missing| missing.fix).collect()
        };
        let card = Some(Medium::SdCard);
        let memory = Facts { memory_controller: Some(false), ..Facts::default() };
        assert!(fixes(&memory)[0].contains("kernel's command line"));
        let file = Some(PathBuf::from("/boot/cmdline.txt"));
        assert!(fixes(&Facts { command_line: file, ..memory })[0].contains("/boot/cmdline.txt"));
        let options = Facts { mount: Some(&bare), medium: card, ..Facts::default() };
        assert_eq!(
            fixes(&options),
            ["add noatime,commit=60 to the options of / in /etc/fstab, and reboot"]
        );
        assert!(fixes(&Facts { mount: Some(&good), ..options.clone() }).is_empty());
        let disk = Facts { medium: Some(Medium::SolidState), ..options };
        assert!(fixes(&disk).is_empty(), "an SSD does not mind");
    }
}

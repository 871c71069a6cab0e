//! The mount that holds a directory, from the kernel's own table.

use std::fs;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// What is mounted, such as `/dev/mmcblk0p2`.
    pub source: String,
    /// Where.
    pub point: PathBuf,
    /// The file system.
    pub kind: String,
    /// Options of the mount and of the file system.
    pub options: Vec<String>,
}

impl Mount {
    /// Whether this option is set.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|one| one == option)
    }

    /// The number behind `name=`.
    pub fn number(&self, name: &str) -> Option<u64> {
        let value = |one: &String| one.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
        self.options.iter().find_map(value)
    }
}

/// The mount that holds `directory`.
pub(super) fn of(root: &Path, directory: &Path) -> Option<Mount> {
    let table = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    // A directory that does not exist yet will be made on the mount of its parent.
    let real = directory.ancestors().find_map(|path| fs::canonicalize(path).ok());
    find(&table, &real.unwrap_or_else(|| directory.to_owned()))
}

/// The last of the deepest: a later mount hides an earlier one at the same place.
fn find(table: &str, directory: &Path) -> Option<Mount> {
    let mounts = table.lines().filter_map(parse);
    mounts
        .filter(|mount| directory.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.components().count())
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse(line: &str) -> Option<Mount> {
    let (mount, system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(4);
    let (point, options) = (unescape(mount.next()?), mount.next()?);
    let mut system = system.split(' ');
    let (kind, source) = (system.next()?.to_owned(), unescape(system.next()?));
    let options = options.split(',').chain(system.next().unwrap_or_default().split(','));
    let options = options.filter(|one| !one.is_empty()).map(str::to_owned).collect();
    Some(Mount { source, point: PathBuf::from(point), kind, options })
}

/// The kernel writes blanks as octal numbers.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_counts_and_of_two_at_one_place_the_later() {
        let table = "1 0 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
            2 1 179:3 / /var/lib\\040x rw,noatime shared:2 - ext4 /dev/mmcblk0p3 rw,commit=60\n\
            3 1 0:9 / /var rw - tmpfs tmpfs rw\n\
            4 1 8:2 / /var rw,noatime - xfs /dev/sdb rw\n";
        let found = find(table, Path::new("/var/lib x/k3s-server")).unwrap();
        assert_eq!(found.source, "/dev/mmcblk0p3");
        assert!(found.has("noatime") && !found.has("relatime"));
        assert_eq!(found.number("commit"), Some(60));
        assert_eq!(find(table, Path::new("/var/log")).unwrap().kind, "xfs");
        assert_eq!(find(table, Path::new("/variable")).unwrap().source, "/dev/sda1");
        assert_eq!(find("nonsense\n", Path::new("/")), None);
    }
}

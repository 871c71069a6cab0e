//! The files of the package, laid out as the package would: what `Cargo.toml` lists for cargo-deb is the only list.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The crate.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// One line of the list.
#[derive(Debug)]
struct Asset {
    source: String,
    destination: String,
    mode: u32,
}

/// `["source", "destination", "mode"],`
fn asset(line: &str) -> Option<Asset> {
    let line = line.trim().strip_prefix('[')?;
    let mut quoted = line.split('"').skip(1).step_by(2);
    let (source, destination) = (quoted.next()?.to_owned(), quoted.next()?.to_owned());
    let mode = u32::from_str_radix(quoted.next()?, 8).ok()?;
    Some(Asset { source, destination, mode })
}

/// Everything the package lists.
fn assets() -> Vec<Asset> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let (_, package) = manifest.split_once("[package.metadata.deb]").expect("what is packaged");
    let (_, list) = package.split_once("assets = [\n").expect("a list of files");
    let (list, _) = list.split_once("\n]").expect("the end of the list");
    list.lines().filter_map(asset).collect()
}

/// Files that a source names; `*` stands for what has no slash and may be nothing.
fn sources(pattern: &str) -> Vec<PathBuf> {
    let path = root().join(pattern);
    let Some((before, after)) = path.file_name().unwrap().to_str().unwrap().split_once('*') else {
        return vec![path];
    };
    let entries = fs::read_dir(path.parent().unwrap()).into_iter().flatten();
    let matches = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with(before) && name.ends_with(after)
    };
    entries.map(|entry| entry.unwrap().path()).filter(matches).collect()
}

/// Puts a file into place. The program is 90 MB, so it is linked if that can be.
pub fn install(from: &Path, to: &Path, mode: u32) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    let linked = mode == 0o755 && fs::hard_link(from, to).is_ok();
    if !linked {
        fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        fs::set_permissions(to, PermissionsExt::from_mode(mode)).unwrap();
    }
}

/// Lays the package out below a directory, with the program that was built for this test. What is made only while
/// packaging (`target/…`) is left out.
pub fn lay_out(below: &Path) {
    let program = Path::new(env!("CARGO_BIN_EXE_k3s-server"));
    for Asset { source, destination, mode } in assets() {
        let is_program = destination == "usr/bin/";
        if source.starts_with("target/") && !is_program {
            continue;
        }
        let sources = if is_program { vec![program.to_owned()] } else { sources(&source) };
        for from in sources {
            let mut to = below.join(&destination);
            if destination.ends_with('/') {
                to.push(from.file_name().unwrap());
            }
            install(&from, &to, mode);
        }
    }
}

#[test]
fn package_lists_what_the_daemon_needs_and_nothing_below_etc_or_var() {
    let assets = assets();
    for wanted in ["usr/bin/", "usr/lib/systemd/system/", "usr/lib/sysusers.d/k3s-server.conf"] {
        assert!(assets.iter().any(|asset| asset.destination == wanted), "{wanted}: {assets:#?}");
    }
    for Asset { source, destination, .. } in &assets {
        assert!(destination.starts_with("usr/"), "{destination}");
        let there = source.starts_with("target/") || source.contains('*');
        assert!(there || root().join(source).is_file(), "{source} is not there");
    }
    for entry in fs::read_dir(root().join("systemd")).unwrap() {
        let path = entry.unwrap().path();
        let packaged = assets.iter().any(|asset| sources(&asset.source).contains(&path));
        assert!(packaged, "{} is not packaged", path.display());
    }
}

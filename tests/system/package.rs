//! The package's life on a host: installed, upgraded, removed, purged. Its scripts are the real ones, its files the listed ones;
//! only the program is the one that was built for this test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::host::{Host, UNIT};
use crate::lab::Lab;
use crate::layout::{install, lay_out, root};
use crate::story::CONFIG;

/// Builds the package with this version, and puts it onto the host's disk.
fn build(host: &Host, version: &str) -> PathBuf {
    let tree = host.parts.disk.join(format!("package-{version}"));
    lay_out(&tree);
    for script in ["preinst", "postinst", "prerm", "postrm"] {
        let to = tree.join("DEBIAN").join(script);
        install(&root().join("packaging/scripts").join(script), &to, 0o755);
    }
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let depends = manifest.lines().find_map(|line| line.strip_prefix("depends = ")).unwrap();
    let control = format!(
        "Package: k3s-server\nVersion: {version}\nArchitecture: all\nMaintainer: a test <a@test.invalid>\n\
         Depends: {}\nDescription: a test\n",
        depends.trim_matches('"')
    );
    fs::write(tree.join("DEBIAN/control"), control).unwrap();
    let package = host.parts.disk.join(format!("{version}.deb"));
    let built = Command::new("dpkg-deb")
        .args(["--root-owner-group", "-Zgzip", "-z1", "-b"])
        .args([&tree, &package])
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let _ = fs::remove_dir_all(&tree);
    package
}

fn dpkg(host: &Host, verb: &str, package: &Path) {
    let bytes = fs::read(package).unwrap();
    host.write("/root/package.deb", &bytes);
    host.run(&["dpkg", verb, "/root/package.deb"]);
}

fn is_enabled(host: &Host) -> bool {
    host.command(&["systemctl", "is-enabled", UNIT]).1.trim() == "enabled"
}

#[test]
fn package_is_installed_upgraded_removed_and_purged_as_debian_users_expect() {
    let Some(lab) = Lab::boot_bare(1) else { return };
    let host = &lab.hosts[0];
    let first = build(host, "1");
    let second = build(host, "2");

    // Installed: enabled, and doing nothing until there is a configuration.
    dpkg(host, "-i", &first);
    assert!(is_enabled(host));
    assert_eq!(host.property("ActiveState"), "inactive");
    host.shell("id k3s-server && test -d /etc/k3s && test ! -e /var/lib/k3s-server");
    assert_eq!(host.shell("dpkg -L k3s-server | grep -E '^/(etc|var)' || true"), "");
    host.shell("journalctl --list-catalog | grep -q k3s-server");

    host.write(CONFIG, b"cluster-init: true\n");
    host.run(&["systemctl", "start", UNIT]);
    host.put("kept", "1");

    // Upgraded: restarted, and ready when dpkg returns.
    let before = host.main_pid();
    dpkg(host, "-i", &second);
    assert!(host.is_active());
    assert_ne!(host.main_pid(), before);
    assert_eq!(host.value("kept"), "1");

    // What an operator has switched off stays off.
    host.run(&["systemctl", "disable", "--now", "--quiet", UNIT]);
    dpkg(host, "-i", &second);
    assert!(!is_enabled(host) && !host.is_active());
    host.run(&["systemctl", "enable", "--now", "--quiet", UNIT]);

    // Removed: stopped; data and configuration stay, and a new installation goes on with them.
    host.run(&["dpkg", "--remove", "k3s-server"]);
    host.shell("test ! -e /usr/bin/k3s-server && test -e /var/lib/k3s-server/node.json && test -e /etc/k3s/config.yaml");
    assert_ne!(host.property("ActiveState"), "active");
    dpkg(host, "-i", &second);
    assert!(host.is_active() && is_enabled(host));
    assert_eq!(host.value("kept"), "1");

    // Purged: nothing stays.
    host.run(&["dpkg", "--purge", "k3s-server"]);
    host.shell("test ! -e /var/lib/k3s-server && test ! -e /etc/k3s");
    let left =
        host.shell("find /etc/systemd /var/lib/systemd -name '*k3s-server*' ! -path '*/timers/*'");
    assert_eq!(left.trim(), "");
}

//! What the image and its recipes say, where they cannot be built: parsed, and held against what the package and the design need.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn image(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("image").join(below)
}

fn read(below: &str) -> String {
    fs::read_to_string(image(below)).unwrap_or_else(|error| panic!("image/{below}: {error}"))
}

fn files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, out) } else { out.push(path) }
    }
    out.sort();
}

/// The fields between METABEGIN and METAEND, continued lines joined.
fn metadata(layer: &str) -> BTreeMap<String, String> {
    let (_, rest) = layer.split_once("# METABEGIN\n").expect("METABEGIN");
    let (header, _) = rest.split_once("# METAEND\n").expect("METAEND");
    let mut fields: BTreeMap<String, String> = BTreeMap::new();
    let mut last = String::new();
    for line in header.lines() {
        let line = line.strip_prefix('#').expect("a comment");
        if let Some(more) = line.strip_prefix("  ") {
            *fields.get_mut(&last).expect("something to continue") += more;
        } else if let Some((name, value)) = line.trim().split_once(": ") {
            assert!(name.starts_with("X-Env-"), "{line}");
            name.clone_into(&mut last);
            assert!(fields.insert(name.to_owned(), value.to_owned()).is_none(), "{name} twice");
        } else {
            assert_eq!(line.trim(), "", "not a field");
        }
    }
    fields
}

#[test]
fn layer_of_rpi_image_gen_is_well_formed() {
    let text = read("rpi-image-gen/layer/k3s-server.yaml");
    let fields = metadata(&text);
    assert_eq!(fields["X-Env-Layer-Name"], "k3s-server");
    let version: Vec<u32> =
        fields["X-Env-Layer-Version"].split('.').map(|part| part.parse().unwrap()).collect();
    assert_eq!(version.len(), 3);
    // Every variable that a hook asks for is declared under the prefix.
    let prefix = &fields["X-Env-VarPrefix"];
    let asked = text.matches(&format!("{prefix}_")).count();
    assert_eq!(asked, text.matches(&format!("{prefix}_enable")).count());
    for suffix in ["", "-Desc", "-Valid", "-Set"] {
        assert!(fields.contains_key(&format!("X-Env-Var-enable{suffix}")), "{suffix}");
    }
    let yaml: serde_json::Value = parse(&text);
    let hooks = yaml["mmdebstrap"]["customize-hooks"].as_array().expect("hooks");
    assert!(hooks.iter().all(serde_json::Value::is_string), "{hooks:#?}");
    assert!(yaml["mmdebstrap"]["packages"].as_array().is_some_and(|list| !list.is_empty()));
    // A layer must not ship what would overwrite an operator's edits at every boot.
    let mut shipped = Vec::new();
    files(&image("rpi-image-gen/layer/k3s-server.d"), &mut shipped);
    assert!(
        shipped.iter().all(|path| !path.to_string_lossy().contains("overlay/etc/k3s")),
        "{shipped:?}"
    );
}

#[test]
fn data_and_configuration_are_declared_to_stay_across_slots() {
    let overlay = "rpi-image-gen/layer/k3s-server.d/customize.overlay";
    let shared = read(&format!("{overlay}/etc/rpi-image-gen/slot-shared.d/k3s-server.conf"));
    let settings: Vec<&str> = shared.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(settings, ["Version=1", "Path=/var/lib/k3s-server", "Path=/etc/k3s"]);
    let dropin =
        read(&format!("{overlay}/usr/lib/systemd/system/k3s-server.service.d/10-slots.conf"));
    for path in settings[1..].iter().filter_map(|line| line.strip_prefix("Path=")) {
        assert!(dropin.contains(&format!("AssertPathIsMountPoint={path}\n")), "{path}");
        // An image must hold the mount point.
        assert!(
            read("rpi-image-gen/layer/k3s-server.yaml").contains(&format!("$1{path}\n")),
            "{path}"
        );
    }
}

#[test]
fn configuration_of_rpi_image_gen_names_our_layer() {
    let config = parse(&read("rpi-image-gen/config/k3s-server.yaml"));
    let layers = config["layer"].as_object().expect("layers");
    assert!(layers.values().any(|name| name == "k3s-server"), "{layers:?}");
}

fn parse(text: &str) -> serde_json::Value {
    // Of several documents the last one counts, as there.
    let body = text.rsplit("\n---\n").next().unwrap();
    serde_yaml::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

#[test]
fn image_says_what_a_card_needs() {
    for (file, line) in [
        ("rootfs/etc/fstab", "rw,noatime,commit=60,errors=remount-ro"),
        (
            "rootfs/etc/systemd/journald.conf.d/10-card.conf",
            "Storage=volatile\nRuntimeMaxUse=32M\n",
        ),
        ("rootfs/etc/systemd/system.conf.d/10-watchdog.conf", "RuntimeWatchdogSec=15s\n"),
        ("rootfs/etc/systemd/zram-generator.conf", "[zram0]\n"),
        ("boot/cmdline.txt", " cgroup_enable=memory "),
        ("boot/config.txt", "arm_64bit=1\n"),
    ] {
        assert!(read(file).contains(line), "{file}: {line:?}");
    }
    let preset = read("rootfs/usr/lib/systemd/system-preset/10-k3s-server-image.preset");
    for unit in [
        "k3s-server.service",
        "k3s-server-adopt.service",
        "k3s-server-grow.service",
        "fstrim.timer",
    ] {
        assert!(preset.contains(&format!("enable {unit}\n")), "{unit}");
    }
    assert_eq!(read("boot/cmdline.txt").lines().count(), 1, "the firmware reads one line");
    // The editor of whoever flashes may be of any system; what we ship has no marks of one.
    for file in ["boot/k3s-server.yaml.head", "boot/README.txt", "boot/config.txt"] {
        assert!(read(file).is_ascii() && !read(file).contains('\r'), "{file}");
    }
}

#[test]
fn no_identity_is_in_what_the_image_adds() {
    let mut all = Vec::new();
    files(&image("rootfs"), &mut all);
    for path in &all {
        let name = path.to_string_lossy();
        for identity in ["machine-id", "hostname", "ssh_host_", "random-seed", "etc/k3s", "var/lib"]
        {
            assert!(!name.contains(identity), "{name}");
        }
    }
    let build = read("build");
    for identity in
        ["etc/ssh/ssh_host_*", "etc/hostname", "dbus/machine-id", "random-seed", "etc/machine-id"]
    {
        assert!(build.contains(identity), "{identity} is not taken out");
    }
}

#[test]
fn shell_scripts_of_image_and_packaging_are_well_formed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = Vec::new();
    for dir in ["image", "packaging", ".ci"] {
        files(&root.join(dir), &mut all);
    }
    all.extend(["tests/system/boot", "tests/system/tree"].map(|name| root.join(name)));
    let is_script = |path: &PathBuf| {
        let text = fs::read(path).unwrap_or_default();
        text.starts_with(b"#!/bin/sh") || path.extension().is_some_and(|end| end == "sh")
    };
    let scripts: Vec<_> = all.into_iter().filter(is_script).collect();
    assert!(scripts.len() > 12, "{scripts:?}");
    for script in scripts {
        let output = Command::new("sh").arg("-n").arg(&script).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn units_of_the_image_are_understood_by_systemd() {
    let dir = tempfile::tempdir().unwrap();
    let units = image("rootfs/usr/lib/systemd/system");
    let mut names = Vec::new();
    for entry in fs::read_dir(units).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let text: String = text
            .lines()
            .map(|line| {
                if line.starts_with("ExecStart=") {
                    "ExecStart=/bin/true\n".to_owned()
                } else {
                    format!("{line}\n")
                }
            })
            .collect();
        let copy = dir.path().join(path.file_name().unwrap());
        fs::write(&copy, text).unwrap();
        names.push(copy);
    }
    match Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&names).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let ours: Vec<&str> =
                said.lines().filter(|line| line.contains("k3s-server-")).collect();
            assert!(ours.is_empty(), "{ours:#?}");
        }
        Err(_) => eprintln!("skipped: systemd-analyze is not installed"),
    }
}

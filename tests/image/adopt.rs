//! The file on the boot partition: checked, taken over whole, or refused with its line numbers and the old one kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A board: its boot partition and its root file system.
struct Board {
    dir: TempDir,
}

impl Board {
    fn new() -> Self {
        let board = Self { dir: tempfile::tempdir().unwrap() };
        for dir in ["boot/firmware", "etc", "proc/device-tree", "root"] {
            fs::create_dir_all(board.path(dir)).unwrap();
        }
        board
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    /// Writes the file with a PC.
    fn write(&self, text: &str) {
        fs::write(self.path("boot/firmware/k3s-server.yaml"), text).unwrap();
    }

    /// A start of the board. What the journal gets.
    fn start(&self) -> String {
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("image/rootfs/usr/libexec/k3s-server-adopt");
        let output = Command::new(script)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("ADOPT_ROOT", self.dir.path())
            .env("ADOPT_PROGRAM", env!("CARGO_BIN_EXE_k3s-server"))
            .output()
            .unwrap();
        assert!(output.status.success(), "a board must boot: {output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        String::from_utf8(output.stdout).unwrap()
    }

    fn read(&self, below: &str) -> String {
        fs::read_to_string(self.path(below)).unwrap_or_default()
    }

    fn config(&self) -> String {
        self.read("etc/k3s/config.yaml")
    }

    fn status(&self) -> String {
        self.read("boot/firmware/k3s-server.status.txt")
    }
}

#[test]
fn right_file_is_adopted_with_its_name_and_said_so() {
    let board = Board::new();
    board.write("cluster-init: true\nnode-name: pi-1   # the first\n");
    let said = board.start();
    assert_eq!(board.config(), "cluster-init: true\nnode-name: pi-1   # the first\n");
    assert!(said.contains("was adopted") && said.contains("this host is pi-1"), "{said}");
    assert_eq!(board.status(), "k3s-server.yaml was adopted.\n");
    assert_eq!(board.read("etc/hostname"), "pi-1\n");
    assert!(board.read("etc/hosts").contains("127.0.1.1 pi-1"));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(board.path("etc/k3s/config.yaml")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o640, "it may hold the token");
}

#[test]
fn byte_order_mark_and_carriage_returns_are_no_mistake() {
    let board = Board::new();
    board.write("\u{feff}cluster-init: true\r\nnode-name: pi-1\r\n");
    board.start();
    assert_eq!(board.config(), "cluster-init: true\nnode-name: pi-1\n");
    assert_eq!(board.read("etc/hostname"), "pi-1\n");
}

#[test]
fn wrong_file_is_refused_with_its_lines_and_the_last_good_one_stays() {
    let board = Board::new();
    board.write("cluster-init: true\nnode-name: pi-1\n");
    board.start();
    let good = board.config();
    for (wrong, line) in [
        (
            "cluster-init: true\r\nnode-name: pi-1\r\ncluster-cidr: 10.42.0.0/33\r\n",
            "k3s-server.yaml:3:",
        ),
        ("cluster-init: true\n\tnode-name: pi-1\n", "k3s-server.yaml:2:"),
        ("cluster-init: perhaps\n", "k3s-server.yaml:1:"),
    ] {
        board.write(wrong);
        let said = board.start();
        let status = board.status();
        assert_eq!(board.config(), good, "{wrong:?}");
        for text in [&said, &status] {
            assert!(text.contains("NOT adopted") && text.contains(line), "{wrong:?}: {text}");
            assert!(text.contains("last good configuration stays"), "{text}");
        }
        // The next start says it again.
        assert!(board.start().contains(line), "{wrong:?}");
    }
    board.write("cluster-init: true\nnode-name: pi-2\n");
    board.start();
    assert!(board.config().contains("pi-2"));
    assert_eq!(board.status(), "k3s-server.yaml was adopted.\n");
    assert_eq!(board.read("etc/hostname"), "pi-2\n");
}

#[test]
fn wrong_file_on_a_new_board_starts_nothing() {
    let board = Board::new();
    board.write("cluster-innit: true\nserver: \"not a url\"\n");
    let said = board.start();
    assert!(!board.path("etc/k3s/config.yaml").exists());
    assert!(said.contains("k3s-server.yaml:2:") && said.contains("Nothing was started"), "{said}");
}

#[test]
fn file_as_it_is_flashed_starts_nothing_and_asks_for_settings() {
    let board = Board::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let head = fs::read_to_string(root.join("image/boot/k3s-server.yaml.head")).unwrap();
    let rest = fs::read_to_string(root.join("config.example.yaml")).unwrap();
    board.write(&format!("{head}{rest}"));
    board.start();
    assert!(!board.path("etc/k3s/config.yaml").exists());
    assert!(board.status().contains("remove the #"), "{}", board.status());
    // A name all the same, so that the board can be found.
    let name = board.read("etc/hostname");
    assert!(name.starts_with("k3s-") && name.trim().len() == "k3s-123456".len(), "{name:?}");
    board.start();
    assert_eq!(board.read("etc/hostname"), name, "the name stays");
}

#[test]
fn examples_in_the_flashed_file_are_right_once_their_marks_are_removed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let head = fs::read_to_string(root.join("image/boot/k3s-server.yaml.head")).unwrap();
    let (first, other) = head.split_once("# Every other board:").unwrap();
    for (half, name) in [(first, "pi-1"), (other, "pi-2")] {
        let lines = half.lines().filter_map(|line| line.strip_prefix('#'));
        let settings: String = lines
            .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()))
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(settings.contains(name), "{settings}");
        let board = Board::new();
        board.write(&settings);
        let said = board.start();
        assert!(said.contains("was adopted"), "{settings}\n{said}");
    }
}

#[test]
fn edits_on_the_board_stay_until_the_boot_partition_changes() {
    let board = Board::new();
    board.write("cluster-init: true\nnode-name: pi-1\n");
    board.start();
    fs::write(
        board.path("etc/k3s/config.yaml"),
        "cluster-init: true\nnode-name: pi-1\ndebug: true\n",
    )
    .unwrap();
    board.start();
    assert!(board.config().contains("debug"), "{}", board.config());
    board.write("cluster-init: true\nnode-name: pi-1\nwal-linger: 100ms\n");
    board.start();
    assert!(board.config().contains("wal-linger"), "{}", board.config());
}

#[test]
fn nothing_is_written_when_nothing_has_changed() {
    let board = Board::new();
    board.write("cluster-init: true\nnode-name: pi-1\n");
    fs::write(board.path("boot/firmware/authorized_keys"), "ssh-ed25519 AAAA me\r\n").unwrap();
    board.start();
    assert_eq!(board.read("root/.ssh/authorized_keys"), "ssh-ed25519 AAAA me\n");
    let files = [
        "etc/k3s/config.yaml",
        "etc/hostname",
        "root/.ssh/authorized_keys",
        "boot/firmware/k3s-server.status.txt",
    ];
    let inodes = || {
        files.map(|file| {
            std::os::unix::fs::MetadataExt::ino(&fs::metadata(board.path(file)).unwrap())
        })
    };
    let before = inodes();
    assert_eq!(board.start(), "");
    assert_eq!(inodes(), before);
}

#[test]
fn board_without_a_boot_partition_keeps_what_it_has() {
    let board = Board::new();
    board.write("cluster-init: true\nnode-name: pi-1\n");
    board.start();
    fs::remove_dir_all(board.path("boot/firmware")).unwrap();
    board.start();
    assert!(board.config().contains("pi-1"));
    assert_eq!(board.read("etc/hostname"), "pi-1\n");
}

#[test]
fn configuration_partition_of_raspberry_pis_own_image_tool_is_found() {
    let board = Board::new();
    fs::create_dir(board.path("bootfs")).unwrap();
    fs::write(board.path("bootfs/k3s-server.yaml"), "cluster-init: true\nnode-name: pi-9\n")
        .unwrap();
    board.start();
    assert!(board.config().contains("pi-9"));
    assert!(board.read("bootfs/k3s-server.status.txt").contains("was adopted"));
}

#[test]
fn name_comes_from_the_serial_number_if_nobody_gave_one() {
    let board = Board::new();
    fs::write(board.path("proc/device-tree/serial-number"), "10000000abcdef12\0").unwrap();
    board.write("cluster-init: true\n");
    board.start();
    assert_eq!(board.read("etc/hostname"), "k3s-cdef12\n");
}

//! The image on an emulated board: edited as on a PC, booted, used, its power cut, booted again.
//!
//! The board is qemu's generic one with the image's kernel: the firmware's own way to the kernel is not emulated by anything. What
//! is asked on the board goes through ssh, with the key that was put on the boot partition.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::process::{Process, free_ports};

/// Emulated processors are slow, and a loaded machine emulates slowly.
const LONG: Duration = Duration::from_secs(900);
/// Where the boot partition begins.
const FAT: &str = "@@4M";
/// A card larger than the image.
const CARD_BYTES: u64 = 4 << 30;

/// An image, if one is to be tested.
fn image() -> Option<PathBuf> {
    let Some(path) = std::env::var_os("K3S_TEST_IMAGE") else {
        eprintln!("skipped: the image is booted by `make test-image`");
        return None;
    };
    Some(PathBuf::from(path))
}

fn must(command: &mut Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// A card in a board.
struct Board {
    dir: TempDir,
    card: PathBuf,
    image: PathBuf,
    port: u16,
    runs: u32,
    running: Option<Process>,
}

impl Board {
    /// Flashes the image onto a card.
    fn flash(image: &Path) -> Self {
        let dir = TempDir::with_prefix_in("board-", image.parent().unwrap()).unwrap();
        let card = dir.path().join("card");
        must(Command::new("cp").arg("--sparse=always").arg(image).arg(&card));
        fs::OpenOptions::new().write(true).open(&card).unwrap().set_len(CARD_BYTES).unwrap();
        let key = dir.path().join("key");
        must(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        let [port] = free_ports();
        let board = Self { dir, card, image: image.to_owned(), port, runs: 0, running: None };
        board.put_file("authorized_keys", &fs::read_to_string(key.with_extension("pub")).unwrap());
        board
    }

    /// Writes a file to the boot partition, as a PC does.
    fn put_file(&self, name: &str, text: &str) {
        let from = self.dir.path().join(name);
        fs::write(&from, text).unwrap();
        let mut command = Command::new("mcopy");
        command
            .args(["-o", "-i"])
            .arg(format!("{}{FAT}", self.card.display()))
            .arg(from)
            .arg("::/");
        must(command.env("MTOOLS_SKIP_CHECK", "1"));
    }

    /// What the serial line of this start has shown.
    fn serial(&self) -> PathBuf {
        self.dir.path().join(format!("serial-{}", self.runs))
    }

    fn boot(&mut self) {
        self.runs += 1;
        let beside = self.image.parent().unwrap();
        let cmdline = fs::read_to_string(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("image/boot/cmdline.txt"),
        )
        .unwrap();
        let own: Vec<_> =
            cmdline.split_whitespace().filter(|word| !word.starts_with("console=")).collect();
        let cmdline = format!(
            "console=ttyAMA0 systemd.journald.forward_to_console=1 loglevel=4 systemd.default_device_timeout_sec=900 {}",
            own.join(" ")
        );
        let mut command = Command::new("qemu-system-aarch64");
        command.args([
            "-M",
            "virt",
            "-cpu",
            "cortex-a72",
            "-accel",
            "tcg,thread=multi",
            "-smp",
            "2",
            "-m",
            "1024",
        ]);
        command.args(["-nographic", "-monitor", "none", "-no-reboot", "-device", "i6300esb"]);
        command
            .arg("-kernel")
            .arg(beside.join("vmlinuz"))
            .arg("-initrd")
            .arg(beside.join("initrd.img"));
        command.args(["-append", &cmdline]);
        command.arg("-drive").arg(format!(
            "file={},if=none,id=card,format=raw,cache=writeback",
            self.card.display()
        ));
        command.args(["-device", "virtio-blk-pci,drive=card"]);
        let forward = format!(
            "user,restrict=on,hostfwd=tcp:127.0.0.1:{}-:22,model=virtio-net-pci",
            self.port
        );
        command.args(["-nic", &forward]);
        command.env("PATH", "/usr/bin:/bin");
        self.running = Some(Process::start(&mut command, &self.serial()));
    }

    /// Waits until the serial line shows something.
    fn shows(&mut self, text: &str) {
        let began = Instant::now();
        while !fs::read_to_string(self.serial()).unwrap_or_default().contains(text) {
            assert!(began.elapsed() < LONG, "never: {text:?}");
            thread::sleep(Duration::from_millis(250));
            let running = self.running.as_mut().expect("a board that is on");
            running.wait_until("still runs", || true);
        }
        println!("{text:?} after {:?}", began.elapsed());
    }

    fn ssh(&self, line: &str) -> (bool, String) {
        let mut command = Command::new("ssh");
        command.args([
            "-q",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ]);
        command
            .args(["-o", "ConnectTimeout=60", "-o", "BatchMode=yes", "-i"])
            .arg(self.dir.path().join("key"));
        command.args(["-p", &self.port.to_string(), "root@127.0.0.1", line]);
        let output = command.stdin(Stdio::null()).output().expect("ssh (Debian: openssh-client)");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), said + &String::from_utf8_lossy(&output.stderr))
    }

    /// Waits until one can log in.
    fn answers(&self) {
        let began = Instant::now();
        while !self.ssh("true").0 {
            assert!(began.elapsed() < LONG, "nobody could log in");
            thread::sleep(Duration::from_secs(1));
        }
    }

    /// A line for the board's shell that must succeed.
    fn run(&self, line: &str) -> String {
        let (done, said) = self.ssh(line);
        assert!(done, "{line}: {said}");
        said.trim().to_owned()
    }

    fn ctl(&self, arguments: &str) -> String {
        let tls = "/var/lib/k3s-server/tls";
        self.run(&format!(
            "ETCDCTL_API=3 etcdctl --endpoints=https://127.0.0.1:2379 --command-timeout=60s --dial-timeout=30s \
             --cacert={tls}/ca.crt --cert={tls}/client.crt --key={tls}/client.key {arguments}"
        ))
    }

    /// The power goes: nothing is written any more.
    fn power_cut(&mut self) {
        self.running.take().expect("a board that is on").kill();
    }

    /// What tells this host from others.
    fn identity(&self) -> [String; 3] {
        [
            "cat /etc/machine-id",
            "sed -n 's/.*\"node\": *\"\\([0-9a-f]*\\)\".*/\\1/p' /var/lib/k3s-server/node.json",
            "cut -d ' ' -f 2 /etc/ssh/ssh_host_ed25519_key.pub",
        ]
        .map(|line| self.run(line))
    }
}

/// A line for the board's shell, and what its answer must be.
type Promise = (&'static str, fn(&str) -> bool);

/// What the image promises about the card and the board.
const PROMISES: &[Promise] = &[
    ("findmnt -no OPTIONS /", |said| said.contains("noatime") && said.contains("commit=60")),
    // A card of 4 GiB, in KiB.
    ("df --output=size / | tail -n 1", |said| said.parse().is_ok_and(|kib: u64| kib > 3_500_000)),
    ("find /var/log/journal -type f 2>/dev/null; ls /run/log/journal/*/system.journal", |said| {
        said.lines().count() == 1
    }),
    ("cat /sys/fs/cgroup/cgroup.controllers", |said| said.contains("memory")),
    ("swapon --show=NAME --noheadings", |said| said.lines().all(|line| line.contains("zram"))),
    ("systemctl is-enabled fstrim.timer", |said| said == "enabled"),
    ("systemctl show --value -p RuntimeWatchdogUSec", |said| said == "15s"),
    ("systemctl --failed --no-legend list-units", str::is_empty),
    ("hostname; cat /etc/hostname", |said| said == "pi-1\npi-1"),
    ("cat /boot/firmware/k3s-server.status.txt", |said| said.contains("was adopted")),
    ("stat -c '%a %U %G' /etc/k3s/config.yaml", |said| said == "640 root k3s-server"),
    ("/usr/libexec/k3s-server-report; cat /boot/firmware/k3s-server.status.txt", |said| {
        said.contains("server     active") && said.contains("leader of 1 server")
    }),
    ("journalctl -b -q -o cat -t k3s-server-adopt", |said| said.contains("was adopted")),
];

fn keeps_the_promises(board: &Board) {
    let said = PROMISES.iter().map(|(line, _)| board.ssh(line).1.trim().to_owned());
    let broken: Vec<_> = PROMISES
        .iter()
        .zip(said)
        .filter(|((_, holds), said)| !holds(said))
        .map(|((line, _), said)| format!("{line}: {said:?}"))
        .collect();
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn flashed_card_serves_survives_a_power_cut_and_is_like_no_other() {
    let Some(image) = image() else { return };
    let mut board = Board::flash(&image);
    board.put_file("k3s-server.yaml", "# from a PC\r\ncluster-init: true\r\nnode-name: pi-1\r\n");
    board.boot();
    board.shows("ready, serving etcd clients");
    board.answers();
    assert_eq!(board.run("systemctl is-active k3s-server"), "active");
    assert_eq!(board.ctl("put greeting hello"), "OK");
    keeps_the_promises(&board);
    let serial = fs::read_to_string(board.serial()).unwrap();
    assert!(serial.contains("hardware timeout of 15s"), "the watchdog was not armed");
    let identity = board.identity();

    board.power_cut();
    board.boot();
    board.shows("ready, serving etcd clients");
    board.answers();
    assert_eq!(board.ctl("get greeting --print-value-only"), "hello");
    assert_eq!(board.identity(), identity, "the same host");
    board.power_cut();

    let mut other = Board::flash(&image);
    other.put_file("k3s-server.yaml", "cluster-init: true\n");
    other.boot();
    other.shows("ready, serving etcd clients");
    other.answers();
    for (one, two) in identity.iter().zip(&other.identity()) {
        assert!(!one.is_empty() && one != two, "two cards of one image share {one:?}");
    }
    assert!(other.run("hostname").starts_with("k3s-"));
}

//! One machine: a disk, an address, and a booted systemd that may be asked, rebooted, or lose its power.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::layout::root;
use crate::support::process::Process;

/// Longest time anything may take on a loaded machine.
pub const LONG: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(50);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The unit under test.
pub const UNIT: &str = "k3s-server.service";
/// What systemd-nspawn says by its status when the host wants to be booted again.
const REBOOTED: i32 = 133;

/// Waits until something holds, and says how long that took.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LONG, "never: {what}");
        thread::sleep(POLL);
    }
    began.elapsed()
}

/// What a host consists of, running or not.
#[derive(Clone, Debug)]
pub struct Parts {
    pub name: String,
    pub address: String,
    /// What it has written, and its console.
    pub disk: PathBuf,
    /// The trees below its disk.
    pub lower: String,
    /// A process that holds its network.
    pub network: u32,
    /// A name for its cgroup that no other host has.
    pub cgroup: String,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Host {
    pub parts: Parts,
    /// systemd-nspawn, and the host's first process.
    running: Option<(Process, u32)>,
}

impl Host {
    /// A new disk in a machine that is off.
    pub fn new(parts: Parts) -> Self {
        fs::create_dir_all(parts.disk.join("upper/etc")).unwrap();
        fs::write(parts.disk.join("upper/etc/hostname"), format!("{}\n", parts.name)).unwrap();
        // Hosts with an id do not run what a first boot of a new system runs; no two may share one.
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap().replace('-', "");
        fs::write(parts.disk.join("upper/etc/machine-id"), id).unwrap();
        Self { parts, running: None }
    }

    pub fn name(&self) -> &str {
        &self.parts.name
    }

    /// Switches it on. From the thread of the test, with which everything it has started ends.
    pub fn switch_on(&mut self) {
        assert!(self.running.is_none(), "{} is on", self.name());
        let Parts { disk, lower, network, cgroup, .. } = &self.parts;
        let mut command = Command::new(root().join("tests/system/boot"));
        command.env("PATH", PATH).arg(disk).arg(lower);
        command.arg(format!("/proc/{network}/ns/net")).arg(cgroup);
        let process = Process::start(&mut command, &disk.join("console"));
        self.running = Some((process, 0));
    }

    /// Waits until its systemd has started everything.
    pub fn booted(&mut self) {
        let (process, leader) = self.running.as_mut().expect("a host that is on");
        let nspawn = process.pid();
        process.wait_until("booted", || {
            *leader = first_process(nspawn).unwrap_or(0);
            let asked = &["systemctl", "is-system-running"];
            *leader != 0 && {
                let (_, state) = output(&mut inside(*leader, asked));
                matches!(state.trim(), "running" | "degraded")
            }
        });
    }

    fn leader(&self) -> u32 {
        self.running.as_ref().unwrap_or_else(|| panic!("{} is off", self.name())).1
    }

    /// Waits until systemd-nspawn has ended; its status.
    fn ended(&mut self) -> i32 {
        let (mut process, _) = self.running.take().expect("a host that is on");
        process.ended().code().unwrap_or(-1)
    }

    /// `systemctl reboot`, and boots again.
    pub fn reboot(&mut self) {
        self.shell("systemctl --no-block reboot");
        assert_eq!(self.ended(), REBOOTED, "{} did not reboot", self.name());
        self.switch_on();
        self.booted();
    }

    /// The plug: everything on it ends at once.
    pub fn power_cut(&mut self) {
        let (mut process, leader) = self.running.take().expect("a host that is on");
        kill(leader);
        process.kill();
        until("the host is gone", || !Path::new(&format!("/proc/{leader}")).exists());
    }

    /// A command on the host: status, and what it said.
    pub fn command(&self, arguments: &[&str]) -> (i32, String) {
        output(&mut inside(self.leader(), arguments))
    }

    /// A command that must succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let (status, said) = self.command(arguments);
        assert_eq!(status, 0, "{}: {arguments:?}: {said}", self.name());
        said
    }

    /// A line for the shell that must succeed.
    pub fn shell(&self, line: &str) -> String {
        self.run(&["sh", "-ec", line])
    }

    /// A file as root writes it with an editor.
    pub fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let line = format!("mkdir -p \"$(dirname {path})\" && cat >{path}");
        let mut command = inside(self.leader(), &["sh", "-ec", &line]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_ref()).unwrap();
        assert!(child.wait().unwrap().success(), "{}: {path}", self.name());
    }

    /// A property of the unit.
    pub fn property(&self, name: &str) -> String {
        let said = self.run(&["systemctl", "show", UNIT, "--value", "--property", name]);
        said.trim().to_owned()
    }

    /// The unit's messages since the host booted.
    pub fn journal(&self) -> String {
        self.shell(&format!("journalctl --sync; journalctl --no-pager -b -o cat -u {UNIT}"))
    }

    /// When the unit said something, in microseconds; in the boot before this one with `-1`.
    pub fn when(&self, boot: &str, text: &str) -> Vec<u64> {
        let line = format!("journalctl --sync; journalctl -b {boot} -o json -u {UNIT}");
        let lines = self.shell(&line);
        let entries = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let said =
            |entry: &Value| entry["MESSAGE"].as_str().is_some_and(|said| said.contains(text));
        let time = |entry: Value| entry["__REALTIME_TIMESTAMP"].as_str().unwrap().parse().unwrap();
        entries.filter(said).map(time).collect()
    }

    /// Whether the unit is up, which means ready.
    pub fn is_active(&self) -> bool {
        self.property("ActiveState") == "active"
    }

    /// Waits until the unit is ready.
    pub fn ready(&self) -> Duration {
        let name = self.name();
        until(&format!("{name} is ready"), || {
            let state = self.property("ActiveState");
            let done = state == "failed";
            assert!(!done, "{name} failed:\n{}", self.journal());
            state == "active"
        })
    }

    /// Waits until the unit's status line, as `systemctl status` shows it, holds this text.
    pub fn says(&self, text: &str) {
        until(&format!("status {text:?} on {}", self.name()), || {
            self.property("StatusText").contains(text)
        });
    }

    /// `etcdctl` on the host, with the files the server made there.
    pub fn etcdctl(&self, arguments: &[&str]) -> (i32, String) {
        let tls = "/var/lib/k3s-server/tls";
        let files = [("cacert", "ca.crt"), ("cert", "client.crt"), ("key", "client.key")];
        let files = files.map(|(flag, file)| format!("--{flag}={tls}/{file}"));
        let mut all = vec!["env", "ETCDCTL_API=3", "etcdctl", "--command-timeout=15s"];
        all.push("--endpoints=https://127.0.0.1:2379");
        all.extend(files.iter().map(String::as_str));
        all.extend(arguments);
        self.command(&all)
    }

    /// An `etcdctl` that must succeed.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let (status, said) = self.etcdctl(arguments);
        assert_eq!(status, 0, "{}: etcdctl {arguments:?}: {said}", self.name());
        said
    }

    pub fn put(&self, key: &str, value: &str) {
        assert_eq!(self.ctl(&["put", key, value]).trim(), "OK");
    }

    /// A linearizable read through this host.
    pub fn value(&self, key: &str) -> String {
        self.ctl(&["get", key, "--print-value-only"]).trim().to_owned()
    }

    /// Process id of the daemon, as seen from here.
    pub fn outer_pid(&self) -> i32 {
        let inner = self.main_pid();
        let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = space(&self.leader().to_string());
        let here = |pid: &String| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            ids.is_some_and(|ids| ids.split_whitespace().last() == Some(&inner))
                && space(pid) == own
        };
        let all = fs::read_dir("/proc").unwrap();
        let mut all = all.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        all.find(here).expect("the daemon's process").parse().unwrap()
    }

    /// Process id of the daemon, as seen on the host.
    pub fn main_pid(&self) -> String {
        self.property("MainPID")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() && self.running.is_some() {
            let line = format!("journalctl --sync; journalctl --no-pager -n 40 -u {UNIT}");
            let (_, said) = self.command(&["sh", "-c", &line]);
            eprintln!("--- journal of {}\n{said}", self.name());
        }
        if self.running.is_some() {
            self.power_cut();
        }
        for hierarchy in ["", "unified/", "systemd/"] {
            let path = Path::new("/sys/fs/cgroup").join(hierarchy).join(&self.parts.cgroup);
            // The last process of a host leaves its cgroup a moment after it has ended.
            for _ in 0..40 {
                remove_cgroup(&path);
                if !path.exists() {
                    break;
                }
                thread::sleep(POLL);
            }
        }
    }
}

/// Empty cgroups only, deepest first.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    // It may have ended by itself.
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

/// The first process of a host: systemd-nspawn's child with process ids of its own.
fn first_process(nspawn: u32) -> Option<u32> {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let children = fs::read_to_string(format!("/proc/{nspawn}/task/{nspawn}/children")).ok()?;
    let mut children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    let own = namespace(std::process::id())?;
    children.find(|pid| namespace(*pid).is_some_and(|found| found != own))
}

/// A command in all namespaces of a host.
fn inside(leader: u32, arguments: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &leader.to_string(), "-m", "-u", "-i", "-n", "-p", "-C", "--"]);
    command.args(arguments).env_clear();
    command.envs([("PATH", PATH), ("HOME", "/root"), ("TERM", "dumb"), ("LC_ALL", "C.UTF-8")]);
    command
}

fn output(command: &mut Command) -> (i32, String) {
    let output = command.stdin(Stdio::null()).output().expect("nsenter (util-linux)");
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), said)
}

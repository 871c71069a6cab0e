//! Three hosts on a switch, and whether this machine can have them at all.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

use crate::host::{Host, Parts, until};
use crate::layout::{lay_out, root};
use crate::support::process::Process;
use crate::support::skip;

/// See the module documentation.
pub struct Lab {
    pub hosts: Vec<Host>,
    switch: Process,
    /// Each holds the network of one host.
    networks: Vec<Process>,
    dir: TempDir,
}

/// Why hosts cannot boot here, if that is so. What `.ci/setup` could have brought must not be missing where it ran.
fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("hosts with systemd need root".to_owned());
    }
    let tried = Command::new("unshare").args(["--mount", "--net", "true"]).output();
    if !tried.is_ok_and(|output| output.status.success()) {
        return Some("hosts with systemd need mount and network namespaces".to_owned());
    }
    if !Path::new("/run/systemd/system").is_dir() && !cgroups_can_be_made() {
        return Some("hosts with systemd need a cgroup hierarchy that can be written".to_owned());
    }
    None
}

/// Whether every hierarchy that systemd would use takes a new cgroup.
fn cgroups_can_be_made() -> bool {
    let probe = format!("k3s-system-probe-{}", std::process::id());
    let hierarchies = ["", "unified", "systemd"].map(|name| Path::new("/sys/fs/cgroup").join(name));
    let mut there = hierarchies.iter().filter(|path| path.join("cgroup.procs").exists()).peekable();
    there.peek().is_some()
        && there.all(|path| {
            let made = fs::create_dir(path.join(&probe)).is_ok();
            let _ = fs::remove_dir(path.join(&probe));
            made
        })
}

/// Whether a host's disk can lie above the tree: not on every file system, and not in every container.
fn try_overlay(tree: &Path) -> Result<(), String> {
    fs::create_dir_all(root().join("target/system")).map_err(|error| error.to_string())?;
    let dir = TempDir::with_prefix_in("probe-", root().join("target/system"));
    let dir = dir.map_err(|error| error.to_string())?;
    let line = "mkdir upper work root && \
                mount -t overlay probe -o \"lowerdir=$1,upperdir=upper,workdir=work\" root && touch root/probe";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", line, "sh"]).arg(tree).current_dir(dir.path());
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Directories below the disks of the hosts.
struct Trees {
    package: String,
    tree: String,
}

/// The tree the hosts boot from, and the package's files above it; `None` with a line that says why.
fn trees() -> Option<&'static Trees> {
    static TREES: OnceLock<Option<Trees>> = OnceLock::new();
    let trees = TREES.get_or_init(|| {
        if let Some(obstacle) = obstacle() {
            eprintln!("skipped: {obstacle}");
            return None;
        }
        let tree = root().join("target/trees/host");
        if !tree.with_extension("complete").exists() {
            skip("no tree for hosts with systemd; .ci/setup makes it");
            return None;
        }
        if let Err(error) = try_overlay(&tree) {
            eprintln!("skipped: hosts with systemd need overlays on this file system: {error}");
            return None;
        }
        let package = root().join("target/system/package");
        let _ = fs::remove_dir_all(&package);
        lay_out(&package);
        Some(Trees { package: package.display().to_string(), tree: tree.display().to_string() })
    });
    trees.as_ref()
}

fn hold(log: &Path) -> Process {
    let mut command = Command::new("unshare");
    command.args(["--net", "--", "sleep", "infinity"]);
    let process = Process::start(&mut command, log);
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    let path = format!("/proc/{}/ns/net", process.pid());
    until("a network of its own", || fs::read_link(&path).is_ok_and(|found| found != own));
    process
}

/// A line for the shell in a network.
fn network(pid: u32, line: &str) {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{pid}/ns/net")).args(["sh", "-ec", line]);
    let output = command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Lab {
    /// Boots hosts `pi-1`, `pi-2`, … that have the package and no configuration. `None` where that cannot be.
    pub fn boot(count: usize) -> Option<Self> {
        let Trees { package, tree } = trees()?;
        Some(Self::boot_from(count, &format!("{package}:{tree}")))
    }

    /// The same without the package.
    pub fn boot_bare(count: usize) -> Option<Self> {
        Some(Self::boot_from(count, &trees()?.tree))
    }

    fn boot_from(count: usize, lower: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = TempDir::with_prefix_in("lab-", root().join("target/system")).unwrap();
        let switch = hold(&dir.path().join("switch"));
        network(
            switch.pid(),
            "ip link add br0 type bridge && ip addr add 10.88.0.254/24 dev br0 && ip link set br0 up",
        );
        let mut lab = Self { hosts: Vec::new(), switch, networks: Vec::new(), dir };
        for at in 0..count {
            let parts = lab.plug_in(at, number, lower);
            lab.hosts.push(Host::new(parts));
        }
        lab.boot_all();
        lab
    }

    /// Switches all hosts on at once.
    pub fn boot_all(&mut self) {
        self.hosts.iter_mut().for_each(Host::switch_on);
        self.hosts.iter_mut().for_each(Host::booted);
    }

    /// A network for a host, with a cable to the switch.
    fn plug_in(&mut self, at: usize, lab: u32, lower: &str) -> Parts {
        let dir = self.dir.path().to_owned();
        let name = format!("pi-{}", at + 1);
        let own = hold(&dir.join(format!("network-{name}")));
        let (switch, pid) = (self.switch.pid(), own.pid());
        let address = format!("10.88.0.{}", at + 1);
        network(
            switch,
            &format!(
                "ip link add v{at} type veth peer name eth0 netns {pid} && ip link set v{at} master br0 up"
            ),
        );
        network(
            pid,
            &format!(
                "ip link set lo up && ip addr add {address}/24 dev eth0 && ip link set eth0 up && \
                 ip route add default via 10.88.0.254"
            ),
        );
        self.networks.push(own);
        let cgroup = format!("k3s-system-{}-{lab}-{name}", std::process::id());
        Parts {
            disk: dir.join(&name),
            name,
            address,
            lower: lower.to_owned(),
            network: pid,
            cgroup,
        }
    }

    /// Pulls a host's cable.
    pub fn unplug(&self, at: usize) {
        network(self.switch.pid(), &format!("ip link set v{at} down"));
    }

    /// Puts it back.
    pub fn plug(&self, at: usize) {
        network(self.switch.pid(), &format!("ip link set v{at} up"));
    }
}

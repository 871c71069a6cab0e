//! A network whose links can be cut, in each direction by itself: a namespace for every machine, and one that routes between them.
//!
//! What is cut is lost without a word, as by a broken switch: nobody gets an error. Needs root and `ip`; the namespaces end with the
//! processes that hold them.

use std::net::Ipv4Addr;
use std::process::Command;

use tempfile::TempDir;

use crate::machine::until;
use crate::support::process::Process;

/// Where a machine lives: the processes that hold its namespace and the router's.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub own: u32,
    pub router: u32,
}

/// See the module documentation.
pub struct Lan {
    router: Process,
    nodes: Vec<Process>,
    cuts: Vec<(usize, usize)>,
    /// The last number of each machine's address.
    hosts: Vec<u8>,
    _dir: TempDir,
}

fn hold(dir: &TempDir) -> Process {
    let mut command = Command::new("unshare");
    command.args(["--net", "--", "sleep", "infinity"]);
    Process::start(&mut command, &dir.path().join("namespaces"))
}

/// This command in the namespace that a process holds.
pub fn inside(pid: u32, command: &Command) -> Command {
    let mut wrapped = Command::new("nsenter");
    wrapped.arg(format!("--net=/proc/{pid}/ns/net")).arg("--").arg(command.get_program());
    wrapped.args(command.get_args()).env_clear();
    wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    wrapped
}

fn run(pid: u32, line: &str) -> Result<(), String> {
    let mut command = Command::new("sh");
    command.args(["-c", line]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let output = inside(pid, &command).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr)))
}

impl Lan {
    /// A network with places for so many machines; the error says what this host does not allow.
    pub fn new(count: usize) -> Result<Self, String> {
        let dir = tempfile::tempdir().unwrap();
        let router = hold(&dir);
        let nodes: Vec<Process> = (0..count).map(|_| hold(&dir)).collect();
        let own = std::fs::read_link("/proc/self/ns/net").map_err(|error| error.to_string())?;
        for holder in nodes.iter().chain([&router]) {
            let path = format!("/proc/{}/ns/net", holder.pid());
            let mut tries = 0;
            until("a namespace of its own", || {
                tries += 1;
                std::fs::read_link(&path).is_ok_and(|found| found != own) || tries > 200
            });
            if std::fs::read_link(&path).is_ok_and(|found| found == own) {
                return Err(format!("unshare --net: {}", holder.printed()));
            }
        }
        let lan = Self { router, nodes, cuts: Vec::new(), hosts: vec![1; count], _dir: dir };
        lan.lay_out()?;
        Ok(lan)
    }

    fn lay_out(&self) -> Result<(), String> {
        let router = self.router.pid();
        run(router, "echo 1 > /proc/sys/net/ipv4/ip_forward && ip link set lo up")?;
        for (at, node) in self.nodes.iter().enumerate() {
            let node = node.pid();
            let address = self.address(at);
            let [a, b, c, _] = address.octets();
            let gateway = format!("{a}.{b}.{c}.254");
            run(
                router,
                &format!(
                    "ip link add v{at} type veth peer name eth0 netns {node} && \
                     ip addr add {gateway}/24 dev v{at} && ip link set v{at} up"
                ),
            )?;
            run(
                node,
                &format!(
                    "ip link set lo up && ip addr add {address}/24 dev eth0 && \
                     ip link set eth0 up && ip route add default via {gateway}"
                ),
            )?;
        }
        Ok(())
    }

    /// The address of a machine.
    pub fn address(&self, at: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, u8::try_from(at + 1).unwrap(), self.hosts[at])
    }

    /// Takes a machine's address away and gives it another one, as a router does that has forgotten whom it gave which.
    pub fn readdress(&mut self, at: usize, host: u8) {
        self.hosts[at] = host;
        let (address, network) = (self.address(at), at + 1);
        let line = format!(
            "ip -4 addr flush dev eth0 && ip addr add {address}/24 dev eth0 && \
             ip route replace default via 10.77.{network}.254"
        );
        run(self.nodes[at].pid(), &line).unwrap();
    }

    /// Where a machine lives.
    pub fn place(&self, at: usize) -> Place {
        Place { own: self.nodes[at].pid(), router: self.router.pid() }
    }

    fn rule(&self, verb: &str, from: usize, to: usize) {
        let line = format!("ip rule {verb} iif v{from} to {} blackhole", self.address(to));
        run(self.router.pid(), &line).unwrap();
    }

    /// Nothing gets from one machine to the other any more.
    pub fn cut_one_way(&mut self, from: usize, to: usize) {
        self.rule("add", from, to);
        self.cuts.push((from, to));
    }

    /// Nothing gets from either to the other.
    pub fn cut(&mut self, one: usize, other: usize) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Nothing gets to or from a machine.
    pub fn isolate(&mut self, at: usize) {
        for other in 0..self.nodes.len() {
            if other != at {
                self.cut(at, other);
            }
        }
    }

    /// Everything gets through again.
    pub fn heal(&mut self) {
        for (from, to) in std::mem::take(&mut self.cuts) {
            self.rule("del", from, to);
        }
    }
}

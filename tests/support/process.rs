//! One child process: started with nothing but its own environment and its output in a file, killed by pid when
//! dropped.

use std::fs::{File, OpenOptions};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// Longest time a server may need to answer, on a loaded machine.
const START_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// A running program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program. What it prints is appended to `log`.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let open = || -> File {
            OpenOptions::new().create(true).append(true).open(log).expect("log of the child")
        };
        let child = dying_with_us(command)
            .stdin(Stdio::null())
            .stdout(open())
            .stderr(open())
            .spawn()
            .unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
        Self { child, log: log.to_owned() }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    pub fn printed(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until something accepts connections. Panics with the program's output if it ends instead.
    pub fn wait_for_port(&mut self, address: &str) {
        let address: SocketAddr = address.parse().expect("an address");
        self.wait_until("accepts connections", || {
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        });
    }

    /// Waits until a condition holds.
    pub fn wait_until(&mut self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + START_MAX;
        while !holds() {
            if let Some(status) = self.child.try_wait().expect("waiting for the child") {
                panic!("ended with {status} before it {what}; it printed:\n{}", self.printed());
            }
            assert!(Instant::now() < deadline, "never {what}; it printed:\n{}", self.printed());
            thread::sleep(POLL);
        }
    }

    /// Waits until it has printed something.
    pub fn wait_until_printed(&mut self, text: &str) {
        let log = self.log.clone();
        let printed = || std::fs::read_to_string(&log).unwrap_or_default();
        self.wait_until(&format!("printed {text:?}"), || printed().contains(text));
    }

    /// SIGSTOP: it hangs, and its connections stay open.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        signal::kill(pid, signal).expect("signal to an own child");
    }

    /// Waits until it ends by itself.
    pub fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + STOP_MAX;
        loop {
            if let Some(status) = self.child.try_wait().expect("waiting for the child") {
                return status;
            }
            assert!(Instant::now() < deadline, "did not end; it printed:\n{}", self.printed());
            thread::sleep(POLL);
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("killing a child that was not waited for");
        self.child.wait().expect("waiting for the child");
    }

    /// SIGTERM, then waits.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let printed = self.printed();
            let tail: Vec<_> = printed.lines().rev().take(40).collect();
            eprintln!("--- last lines of {}", self.log.display());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// The same command, killed by the kernel should this test process end without cleaning up.
fn dying_with_us(command: &Command) -> Command {
    let mut wrapped = Command::new("setpriv");
    wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program());
    wrapped.args(command.get_args()).env_clear();
    wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    wrapped
}

/// Below the ports that the kernel gives to outgoing connections, which would otherwise take one between the moment
/// it was found free and the moment the server binds it.
const PORTS: std::ops::Range<u32> = 20_000..32_000;

/// Ports that are free now. None is handed out twice within one test process, and two processes start apart.
pub fn free_ports<const N: usize>() -> [u16; N] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let count = PORTS.end - PORTS.start;
    let start = std::process::id().wrapping_mul(977) % count;
    let mut candidates = std::iter::repeat_with(|| {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(step < count, "no free ports left on loopback");
        u16::try_from(PORTS.start + (start + step) % count).expect("a port")
    });
    std::array::from_fn(|_| {
        let free = candidates.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
        free.expect("the candidates do not end")
    })
}

//! What the tests have in common: a cluster that three hosts form as an operator would do it, and a client that writes meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::{Host, UNIT, until};
use crate::lab::Lab;

/// The file an operator edits.
pub const CONFIG: &str = "/etc/k3s/config.yaml";
const TOKEN: &str = "/etc/k3s/token";

/// Three hosts whose servers are one cluster, all of them ready. `None` where that cannot be.
pub fn cluster() -> Option<Lab> {
    let lab = Lab::boot(3)?;
    found(&lab.hosts[0]);
    let token = lab.hosts[0].shell("cat /var/lib/k3s-server/token");
    for host in &lab.hosts[1..] {
        host.write(TOKEN, &token);
        host.shell(&format!("chown k3s-server {TOKEN} && chmod 600 {TOKEN}"));
        host.write(
            CONFIG,
            format!("server: https://{}:6443\ntoken-file: {TOKEN}\n", lab.hosts[0].parts.address),
        );
        host.run(&["systemctl", "enable", "--now", "--no-block", "--quiet", UNIT]);
    }
    for host in &lab.hosts {
        host.ready();
    }
    Some(lab)
}

/// The first server of a cluster, ready.
pub fn found(host: &Host) {
    host.write(CONFIG, "cluster-init: true\n");
    host.run(&["systemctl", "enable", "--now", "--quiet", UNIT]);
}

/// Whether this host's server says that it leads.
fn leads(host: &Host) -> bool {
    let (status, said) = host.etcdctl(&["endpoint", "status", "-w", "json"]);
    let said: Value = serde_json::from_str(&said).unwrap_or_default();
    let of = &said[0]["Status"];
    status == 0 && of["leader"].is_u64() && of["leader"] == of["header"]["member_id"]
}

/// Which of these leads; waits for one.
pub fn leader(hosts: &[&Host]) -> usize {
    let mut found = None;
    until("a leader", || {
        found = hosts.iter().position(|host| leads(host));
        found.is_some()
    });
    found.unwrap()
}

/// The lab's leader, as a position.
pub fn leader_of(lab: &Lab) -> usize {
    leader(&lab.hosts.iter().collect::<Vec<_>>())
}

/// What a client lived through.
#[derive(Debug)]
pub struct Written {
    pub acknowledged: u32,
    /// What clients were told instead.
    pub failed: Vec<String>,
    /// The longest time from one answer to the next.
    pub gap: Duration,
}

impl Written {
    /// Leadership changed in the orderly way: a write that was on its way then may be told so, and no other.
    pub fn assert_went_on(&self) {
        let known = self.failed.iter().all(|said| said.contains("etcdserver: leader changed"));
        assert!(known && self.failed.len() <= 1, "{self:#?}");
    }
}

/// Writes one value after another through a host while something happens, and reads the last one back.
pub fn while_writing<T>(through: &Host, happens: impl FnOnce() -> T) -> (Written, T) {
    let stop = AtomicBool::new(false);
    let (written, happened) = thread::scope(|scope| {
        let writer = scope.spawn(|| write_until(through, &stop));
        let happened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(happens));
        stop.store(true, Ordering::Relaxed);
        (writer.join().unwrap(), happened)
    });
    let happened = happened.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    println!("through {}: {written:?}", through.name());
    assert_eq!(through.value("written"), written.acknowledged.to_string(), "{written:?}");
    (written, happened)
}

fn write_until(through: &Host, stop: &AtomicBool) -> Written {
    let mut written = Written { acknowledged: 0, failed: Vec::new(), gap: Duration::ZERO };
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) || written.acknowledged == 0 {
        let next = (written.acknowledged + 1).to_string();
        match through.etcdctl(&["put", "written", &next]) {
            (0, _) => written.acknowledged += 1,
            (_, said) => written.failed.push(said),
        }
        written.gap = written.gap.max(last.elapsed());
        last = Instant::now();
    }
    written
}

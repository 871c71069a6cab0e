//! Founding and joining: in every order, interrupted anywhere, and refused for what cannot work.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::cluster::{Cluster, members};
use crate::machine::{LONG, Machine, until};
use crate::support::ours::program;
use crate::support::random::Random;

/// Nothing of a node is in a directory: at most the lock that was taken.
pub fn assert_untouched(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| name == "lock"), "{}: {names:?}", dir.display());
}

#[test]
fn two_join_at_once_and_a_fourth_through_a_follower() {
    let mut cluster = Cluster::of(3, "");
    cluster.serves("three");
    let through = cluster.followers()[0];
    let lines = cluster.machines[through].joining(&cluster.machines[through]);
    let fourth = cluster.add();
    fourth.configure(&lines);
    println!("joined through a follower in {:?}", fourth.up());
    cluster.settled(4);
    cluster.serves("four");
    let list = cluster.any().run(&["member", "list"]);
    assert!(list.contains("4 voters survive no more failures than 3 would"), "{list}");
    for machine in &mut cluster.machines {
        machine.says("4 servers vote: the cluster bears the loss of 1, no more than with 3");
    }
}

/// What systemd hears of a start.
struct Systemd {
    socket: UnixDatagram,
}

impl Systemd {
    fn start(machine: &mut Machine) -> Self {
        let path = machine.dir.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        let mut command = program();
        command.arg("server").arg("--config").arg(machine.config()).env("NOTIFY_SOCKET", &path);
        machine.spawn(&mut command);
        Self { socket }
    }

    /// Everything up to READY=1.
    fn until_ready(&self) -> Vec<String> {
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let length = self.socket.recv(&mut buffer).expect("READY=1 within a minute");
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            heard.extend(text.lines().map(str::to_owned));
            if heard.iter().any(|line| line == "READY=1") {
                return heard;
            }
        }
    }
}

#[test]
fn joiner_is_ready_only_with_its_vote_and_all_data() {
    let mut cluster = Cluster::of(1, "");
    let value = "v".repeat(100_000);
    for number in 0..40 {
        cluster.machines[0].put(&format!("bulk/{number}"), &value);
    }
    let lines = cluster.machines[0].joining(&cluster.machines[0]);
    let joiner = cluster.add();
    joiner.configure(&lines);
    let systemd = Systemd::start(joiner);

    let heard = systemd.until_ready();

    println!("{heard:?}");
    let joiner = &cluster.machines[1];
    let count = joiner.ctl(&["get", "bulk/", "--prefix", "--keys-only", "--consistency=s"]);
    assert_eq!(count.lines().filter(|line| !line.is_empty()).count(), 40, "{count}");
    let voters = members(joiner);
    assert!(voters.iter().all(|member| member["isLearner"] != true), "{voters:?}");
    assert_eq!(voters.len(), 2);
}

/// Starts, and kills at random moments, as often as asked for. The time to READY is what the moments are drawn from.
fn interrupted(machine: &mut Machine, random: &mut Random, times: usize, usual: Duration) {
    let usual = usize::try_from(usual.as_millis()).unwrap() + 1;
    for _ in 0..times {
        machine.start();
        // A moment to be killed at, not a synchronisation: any is as good as another.
        thread::sleep(Duration::from_millis(random.below(usual) as u64));
        machine.kill();
    }
}

#[test]
fn founding_and_joining_killed_anywhere_are_finished_by_the_next_start() {
    let (mut random, _) = Random::from_env("CLUSTER_SEED");
    let mut cluster = Cluster::empty();
    let founder = cluster.add();
    founder.configure("cluster-init: true\n");
    let usual = Duration::from_millis(1_000);
    interrupted(founder, &mut random, 8, usual);
    println!("founded in {:?} after 8 kills", founder.up());
    founder.put("founded", "once");
    let lines = founder.joining(founder);
    for _ in 0..2 {
        let joiner = cluster.add();
        joiner.configure(&lines);
        interrupted(joiner, &mut random, 5, 3 * usual);
        println!("joined in {:?} after 5 kills", joiner.up());
    }
    cluster.settled(3);
    cluster.all_have("founded", "once");
    let ids: Vec<u64> = cluster.machines.iter().map(Machine::id).collect();
    let listed: Vec<u64> =
        members(cluster.any()).iter().map(|m| m["ID"].as_u64().unwrap()).collect();
    assert!(ids.iter().all(|id| listed.contains(id)), "{ids:?} and {listed:?}");
}

#[test]
fn founder_killed_while_others_join_finds_them_again() {
    let (mut random, _) = Random::from_env("CLUSTER_SEED");
    let mut cluster = Cluster::of(1, "");
    let lines = cluster.machines[0].joining(&cluster.machines[0]);
    for _ in 0..2 {
        let joiner = cluster.add();
        joiner.configure(&lines);
        joiner.start();
    }
    for _ in 0..4 {
        thread::sleep(Duration::from_millis(200 + random.below(900) as u64));
        cluster.machines[0].kill();
        cluster.machines[0].start();
    }
    let ready: Vec<_> = cluster.machines.iter_mut().map(Machine::ready).collect();
    println!("ready {ready:?} after the founder's last start");
    cluster.settled(3);
    cluster.serves("after");
}

#[test]
fn token_file_is_waited_for_and_a_bare_password_works_with_a_warning() {
    let mut cluster = Cluster::of(1, "token: correct-horse-battery\n");
    let (url, token) = (cluster.machines[0].url(), cluster.machines[0].token());
    assert!(token.starts_with("K10") && token.ends_with("::server:correct-horse-battery"));
    assert!(!cluster.machines[0].printed().contains("correct-horse-battery"));
    let later = cluster.dir().join("token-that-comes-later");
    let waiting = cluster.add();
    waiting.configure(&format!("server: {url}\ntoken-file: {}\n", later.display()));
    waiting.start();
    waiting.says("waiting for the token file");
    assert_untouched(waiting.db_dir());
    fs::write(&later, format!("{token}\n")).unwrap();
    let bare = cluster.add();
    bare.configure(&format!("server: {url}\ntoken: correct-horse-battery\n"));
    bare.up();
    let warned = bare.printed();
    assert!(warned.contains("the token does not include a CA hash"), "{warned}");
    assert!(!warned.contains("correct-horse"), "{warned}");
    assert_eq!(bare.token(), token, "the full token is kept");
    cluster.machines[1].ready();
    cluster.settled(3);
    let printed = cluster.machines[1].printed();
    assert!(!printed.contains("does not include a CA hash") && !printed.contains("correct-horse"));
}

#[test]
fn what_cannot_join_is_refused_with_the_reason_and_leaves_nothing() {
    let mut cluster = Cluster::of(1, "");
    let (url, token) = (cluster.machines[0].url(), cluster.machines[0].token());
    let (_, password) = token.rsplit_once(':').unwrap();
    let hash = &token[3..67];
    let other_hash = format!("{}{}", if hash.starts_with('0') { '1' } else { '0' }, &hash[1..]);
    let joiner = cluster.add();
    let own = joiner.url();
    let table = [
        (
            format!("token: K10{other_hash}::server:{password}\n"),
            "token CA hash does not match the Cluster CA",
        ),
        (format!("token: K10{hash}::server:not-the-password-at-all\n"), "refuses the token"),
        ("token: not-the-password-at-all\n".to_owned(), "refuses the token"),
        (format!("token: K10{hash}::node:{password}\n"), "agent's token"),
        ("token: abcdef.0123456789abcdef\n".to_owned(), "bootstrap token"),
        ("token: short\n".to_owned(), "too short"),
        ("token: \"\"\n".to_owned(), "server needs token or token-file"),
        (String::new(), "server needs token or token-file"),
        (format!("token: K10{}::server:{password}\n", &hash[1..]), "CA hash length"),
        ("token: correct-horse-battery\ncluster-init: true\n".to_owned(), "contradict each other"),
    ];
    for (lines, expected) in table {
        joiner.configure(&format!("server: {url}\n{lines}"));
        let said = joiner.refused();
        assert!(said.contains(expected), "{lines}\n{said}");
        assert!(!said.contains(password) && !said.contains("not-the-password"), "{said}");
        assert_untouched(joiner.db_dir());
    }
    joiner.configure(&format!("server: {own}\ntoken: correct-horse-battery\n"));
    let said = joiner.refused();
    assert!(said.contains("server names this server itself"), "{said}");
    assert_untouched(joiner.db_dir());
    joiner.configure("datastore-endpoint: https://127.0.0.1:1\n");
    let said = joiner.refused();
    assert!(said.contains("k3s-server is the datastore"), "{said}");
    joiner.configure(&format!("cluster-init: true\ntoken: {token}\n"));
    let said = joiner.refused();
    assert!(said.contains("belongs to a cluster that exists"), "{said}");
    assert_untouched(joiner.db_dir());
    assert_eq!(members(&cluster.machines[0]).len(), 1);
    let printed = cluster.machines[0].printed();
    assert!(!printed.contains(password) && !printed.contains("not-the-password"));
    let lines = cluster.machines[0].joining(&cluster.machines[0]);
    cluster.machines[1].configure(&lines);
    println!("after all refusals joined in {:?}", cluster.machines[1].up());
}

#[test]
fn datastore_on_disk_wins_over_datastore_arguments_and_says_so() {
    let mut cluster = Cluster::of(1, "");
    let machine = &mut cluster.machines[0];
    machine.put("kept", "yes");
    let id = machine.id();
    machine.stop();
    machine.configure(
        "cluster-init: true\nserver: https://127.0.0.1:6443\ntoken-file: /nowhere/token\n\
         datastore-endpoint: https://127.0.0.1:1\n",
    );
    machine.up();
    let said = machine.printed();
    for name in ["cluster-init", "server", "datastore-endpoint"] {
        assert!(said.contains(name), "{name}: {said}");
    }
    assert!(said.contains("are ignored, as in K3s"), "{said}");
    assert_eq!((machine.value("kept").as_str(), machine.id()), ("yes", id));
}

#[test]
fn joiner_waits_for_a_server_that_is_not_there_yet() {
    let mut cluster = Cluster::empty();
    let password = "token: correct-horse-battery\n";
    let founder = cluster.add();
    let url = founder.url();
    founder.configure(&format!("cluster-init: true\n{password}"));
    let joiner = cluster.add();
    joiner.configure(&format!("server: {url}\n{password}"));
    joiner.start();
    joiner.says("waiting to join");
    assert_untouched(joiner.db_dir());
    cluster.machines[0].up();
    println!("joined {:?} after the founder was ready", cluster.machines[1].ready());
    until("two voters", || members(&cluster.machines[0]).len() == 2);
}

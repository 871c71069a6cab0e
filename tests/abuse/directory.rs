//! A data directory that is missing, in use, not ours, not readable, or not what it was: the server says what it found,
//! what it expected and what to do; ends with the right status; and leaves everything as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::proto::etcdserverpb as pb;
use nix::sys::signal::{self, Signal};
use nix::unistd::{Pid, Uid};
use prost::Message;
use tempfile::TempDir;

use crate::client;
use crate::support::process::free_ports;
use crate::support::{Endpoint, TlsFiles, ours};

const FAILED: i32 = 1;
const CONFIGURATION: i32 = 78;

/// Longest time until a server ends or serves, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Nobody.
const STRANGER: u32 = 65_534;

/// How a start ended.
struct Ended {
    /// `None` if it served, and was stopped.
    status: Option<i32>,
    printed: String,
}

/// What to do with a server that serves, before it is stopped.
type WhileServing<'a> = &'a dyn Fn(&Endpoint);

/// A start of the server on a directory.
struct Start<'a> {
    db_dir: &'a Path,
    ports: [u16; 3],
    user: Option<u32>,
    serving: WhileServing<'a>,
}

impl<'a> Start<'a> {
    fn on(db_dir: &'a Path) -> Self {
        Self { db_dir, ports: free_ports(), user: None, serving: &|_| () }
    }

    fn command(&self, log: &Path) -> Command {
        let [client, peer, metrics] = self.ports;
        let mut command = ours::program();
        command
            .arg("server")
            .arg("--db-dir")
            .arg(self.db_dir)
            .args(["--client-listen", &format!("127.0.0.1:{client}")])
            .args(["--peer-listen", &format!("127.0.0.1:{peer}")])
            .args(["--metrics-listen", &format!("127.0.0.1:{metrics}")])
            .stdin(Stdio::null())
            .stdout(fs::File::create(log).unwrap())
            .stderr(fs::File::options().append(true).open(log).unwrap());
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    fn endpoint(&self) -> Endpoint {
        let tls = self.db_dir.join("tls");
        let [client, _, metrics] = self.ports.map(|port| format!("127.0.0.1:{port}"));
        let (ca, certificate) = (tls.join("ca.crt"), tls.join("client.crt"));
        let tls = TlsFiles { ca, certificate, key: tls.join("client.key") };
        Endpoint { address: client, metrics_address: metrics, tls: Some(tls) }
    }

    /// Waits until it ends, or stops it once it serves.
    fn run(&self) -> Ended {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut child = self.command(&log).spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut served = false;
        loop {
            let printed = || fs::read_to_string(&log).unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                let printed = printed();
                assert!(!printed.contains("panicked"), "{printed}");
                if served {
                    assert_eq!(status.code(), Some(0), "{printed}");
                    return Ended { status: None, printed };
                }
                return Ended { status: Some(status.code().expect("an exit code")), printed };
            }
            if !served && printed().contains("ready, serving") {
                served = true;
                (self.serving)(&self.endpoint());
                let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
                signal::kill(pid, Signal::SIGTERM).unwrap();
            }
            if deadline < Instant::now() {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("neither ended nor served: {}", printed());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Calls the server as a client would.
fn call(endpoint: &Endpoint, path: &str, message: &impl Message) -> Bytes {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = client::channel(endpoint).await.unwrap();
        client::call(&channel, path, message.encode_to_vec().into()).await.unwrap()
    })
}

fn write(endpoint: &Endpoint) {
    for key in KEYS {
        let key = Bytes::from_static(key.as_bytes());
        let put = pb::PutRequest { value: key.clone(), key, ..Default::default() };
        call(endpoint, "/etcdserverpb.KV/Put", &put);
    }
}

/// Everything that was acknowledged is there.
fn read(endpoint: &Endpoint) {
    for key in KEYS {
        let key = Bytes::from_static(key.as_bytes());
        let get = pb::RangeRequest { key: key.clone(), ..Default::default() };
        let found = call(endpoint, "/etcdserverpb.KV/Range", &get);
        let found = pb::RangeResponse::decode(found).unwrap();
        assert!(found.kvs.len() == 1 && found.kvs[0].value == key, "lost {key:?}");
    }
}

fn write_and_read(endpoint: &Endpoint) {
    write(endpoint);
    read(endpoint);
}

const KEYS: [&str; 3] = ["first", "second", "third"];

/// A directory on which a server has served, kept three writes and was stopped.
fn pristine() -> &'static Path {
    static USED: OnceLock<PathBuf> = OnceLock::new();
    USED.get_or_init(|| {
        // For all tests, so none of them removes it; the next run does.
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("abuse-directory");
        drop(fs::remove_dir_all(&dir));
        let wal = dir.join("wal");
        let first = Start { serving: &write, ..Start::on(&dir) }.run();
        assert_eq!(first.status, None, "{}", first.printed);
        // The second start reads what the first one wrote, and goes on until a spare slot is filled.
        let wait_for_spare = |endpoint: &Endpoint| {
            read(endpoint);
            let deadline = Instant::now() + PATIENCE;
            while spare_header(&wal).is_none() {
                assert!(Instant::now() < deadline, "no slot is filled ahead");
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        let second = Start { serving: &wait_for_spare, ..Start::on(&dir) }.run();
        assert_eq!(second.status, None, "{}", second.printed);
        dir
    })
}

/// The header block of a slot that holds nothing yet.
fn spare_header(wal: &Path) -> Option<Vec<u8>> {
    const SPARE: &[u8] = &[2, 0, 0, 0];
    let slots = wal.read_dir().ok()?.map(|entry| entry.unwrap().path());
    let mut headers = slots.filter_map(|path| {
        let mut block = vec![0; 4_096];
        fs::File::open(path).ok()?.read_exact(&mut block).ok()?;
        Some(block)
    });
    headers.find(|block| block.starts_with(b"K3SWALS1") && &block[12..16] == SPARE)
}

/// A copy of the used directory.
fn used() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_all(pristine(), &copy.path().join("db"));
    copy
}

/// Sparse, and with modes and owners as they are.
fn copy_all(from: &Path, to: &Path) {
    let mut cp = Command::new("cp");
    let cp = cp.args(["-a", "--sparse=always", "-T"]).arg(from).arg(to);
    assert!(cp.status().unwrap().success());
}

/// Every file below a directory, its mode and what is in it.
fn contents(dir: &Path) -> Vec<(PathBuf, u32, Vec<u8>)> {
    let mut found = Vec::new();
    let Ok(entries) = dir.read_dir() else { return found };
    for entry in entries {
        let path = entry.unwrap().path();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        if path.is_dir() {
            found.extend(contents(&path));
            found.push((path, mode, Vec::new()));
        } else {
            let bytes = fs::read(&path).unwrap();
            found.push((path, mode, bytes));
        }
    }
    found.sort();
    found
}

/// The start is refused with these words, a remedy and this status.
fn refused(start: &Start<'_>, status: i32, words: &[&str]) {
    let ended = start.run();
    let printed = &ended.printed;
    assert_eq!(ended.status, Some(status), "{printed}");
    for word in words {
        assert!(printed.contains(word), "expected {word:?} in:\n{printed}");
    }
    assert!(printed.contains("fix: "), "no remedy in:\n{printed}");
}

/// Damages a used directory, expects a refusal that names the file, and that nothing else was harmed: with the damaged
/// files put back as they were, the server serves everything.
fn refused_when(damage: impl FnOnce(&Path), words: &[&str]) {
    refused_as(FAILED, damage, words);
}

fn refused_as(status: i32, damage: impl FnOnce(&Path), words: &[&str]) {
    let dir = used();
    let db = dir.path().join("db");
    damage(&db);
    let damaged = difference(pristine(), &db);
    assert!(!damaged.is_empty(), "nothing is damaged");

    refused(&Start::on(&db), status, words);

    for path in damaged {
        let (good, bad) = (pristine().join(&path), db.join(&path));
        drop(fs::remove_file(&bad));
        drop(fs::remove_dir_all(&bad));
        if good.exists() {
            copy_all(&good, &bad);
        }
    }
    let again = Start { serving: &read, ..Start::on(&db) }.run();
    assert_eq!(again.status, None, "after all was put right: {}", again.printed);
}

/// Names, from the top, of what is not the same in two directories.
fn difference(one: &Path, other: &Path) -> Vec<PathBuf> {
    let listed = |dir: &Path| -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let all = contents(dir).into_iter();
        all.map(|(path, mode, bytes)| (path.strip_prefix(dir).unwrap().to_owned(), (mode, bytes)))
            .collect()
    };
    let (one, other) = (listed(one), listed(other));
    let names: BTreeSet<_> = one.keys().chain(other.keys()).cloned().collect();
    names.into_iter().filter(|name| one.get(name) != other.get(name)).collect()
}

/// Damages a used directory in a way that does no harm.
fn served_when(damage: impl FnOnce(&Path)) {
    let dir = used();
    let db = dir.path().join("db");
    damage(&db);
    let ended = Start { serving: &read, ..Start::on(&db) }.run();
    assert_eq!(ended.status, None, "{}", ended.printed);
}

fn garble(path: &Path, from: usize, bytes: usize) {
    let mut content = fs::read(path).unwrap();
    let end = (from + bytes).min(content.len());
    for (at, byte) in content[from..end].iter_mut().enumerate() {
        *byte = (at * 167 % 251) as u8;
    }
    fs::write(path, content).unwrap();
}

fn truncate(path: &Path, bytes: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn db_dir_that_is_a_file_is_a_mistake_in_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();

    refused(&Start::on(&file), CONFIGURATION, &["is a file, expected a directory"]);
    refused(&Start::on(&file.join("below")), CONFIGURATION, &["is a file, expected a directory"]);

    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn db_dir_that_cannot_be_made_or_entered_is_named() {
    let nowhere = Path::new("/proc/k3s-server/db");
    refused(&Start::on(nowhere), FAILED, &["cannot use the data directory /proc/k3s-server/db"]);
}

#[test]
fn one_directory_serves_one_server() {
    let dir = tempfile::tempdir().unwrap();
    let db = dir.path().join("db");
    let log = dir.path().join("first.log");
    let first = Start::on(&db);
    let mut holder = first.command(&log).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string(&log).unwrap().contains("ready, serving") {
        assert!(Instant::now() < deadline, "the first server does not serve");
        std::thread::sleep(Duration::from_millis(10));
    }

    // Log and state are in use, so only the outcome is looked at here.
    let second = Start::on(&db).run();
    let (other, third) = (dir.path().join("other"), dir.path().join("third"));
    let same_ports = Start { ports: first.ports, ..Start::on(&other) }.run();
    let [_, peer, metrics] = free_ports();
    let same_client_port =
        Start { ports: [first.ports[0], peer, metrics], ..Start::on(&third) }.run();

    assert_eq!(second.status, Some(FAILED), "{}", second.printed);
    assert!(second.printed.contains("in use by another process"), "{}", second.printed);
    for taken in [same_ports, same_client_port] {
        assert_eq!(taken.status, Some(FAILED), "{}", taken.printed);
        assert!(taken.printed.contains("the port is in use by `k3s-server`"), "{}", taken.printed);
        assert!(taken.printed.contains("fix: stop the process"), "{}", taken.printed);
    }
    assert!(!other.exists() && !third.exists(), "a directory was made for nothing");
    assert!(holder.try_wait().unwrap().is_none(), "the first server is gone");
    holder.kill().unwrap();
    holder.wait().unwrap();
}

#[test]
fn a_directory_of_another_user_is_named_and_left_alone() {
    if !Uid::effective().is_root() {
        return eprintln!("skipped: another user's files need root");
    }
    let dir = used();
    let db = dir.path().join("db");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let start = Start { user: Some(STRANGER), ..Start::on(&db) };
    refused(&start, FAILED, &["cannot use the data directory", "Permission denied"]);

    // The directory is his, a file in it is not.
    for (file, words) in [
        ("node.json", "node.json"),
        ("state.redb", "state.redb"),
        ("wal/slot-00.wal", "slot-00.wal"),
        ("tls/server.key", "tls/server.key"),
    ] {
        let dir = used();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let db = dir.path().join("db");
        let owner = format!("{STRANGER}:{STRANGER}");
        assert!(Command::new("chown").arg("-R").arg(owner).arg(&db).status().unwrap().success());
        assert!(Command::new("chown").arg("0:0").arg(db.join(file)).status().unwrap().success());
        let start = Start { user: Some(STRANGER), ..Start::on(&db) };
        refused(&start, FAILED, &[words, "Permission denied"]);
    }
}

#[test]
fn damaged_identity_is_named() {
    let file = |db: &Path| db.join("node.json");
    refused_when(
        |db| fs::write(file(db), "garbage").unwrap(),
        &["node.json is not a node identity"],
    );
    refused_when(|db| truncate(&file(db), 0), &["node.json is not a node identity"]);
    refused_when(|db| truncate(&file(db), 1 << 20), &["node.json is not a node identity"]);
    refused_when(
        |db| fs::remove_file(file(db)).unwrap(),
        &["no node.json, which says whose it is"],
    );
    // Starting again would not help: another release is needed.
    refused_as(
        CONFIGURATION,
        |db| {
            let text = fs::read_to_string(file(db)).unwrap();
            fs::write(file(db), text.replace("\"format\": 2", "\"format\": 9")).unwrap();
        },
        &["node.json has format 9, this release reads 1 to 2"],
    );
    let other = used_by_another();
    refused_when(
        |db| copy_all(&other.path().join("db/node.json"), &file(db)),
        &["belong", "expected"],
    );
}

/// A directory of another cluster.
fn used_by_another() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let ended = Start::on(&dir.path().join("db")).run();
    assert_eq!(ended.status, None, "{}", ended.printed);
    dir
}

#[test]
fn damaged_state_is_named() {
    let file = |db: &Path| db.join("state.redb");
    refused_when(|db| garble(&file(db), 4_096, 65_536), &["state.redb", "damaged"]);
    refused_when(|db| truncate(&file(db), 5_000), &["state.redb", "expected a multiple of 4096"]);
    refused_when(|db| truncate(&file(db), 8_192), &["state.redb", "expected"]);
    refused_when(|db| truncate(&file(db), 0), &["state.redb", "expected"]);
    let other = used_by_another();
    refused_when(
        |db| {
            for name in ["state.redb", "state.redb.crc.0", "state.redb.crc.1"] {
                drop(fs::remove_file(db.join(name)));
                let from = other.path().join("db").join(name);
                if from.exists() {
                    fs::copy(from, db.join(name)).unwrap();
                }
            }
        },
        &["the state is of cluster"],
    );
}

/// The checksums are made again from a state that passes its own checks, and without the state, from the whole log.
#[test]
fn what_can_be_made_again_is() {
    let table = |db: &Path| {
        let tables = ["state.redb.crc.0", "state.redb.crc.1"].map(|name| db.join(name));
        tables.into_iter().find(|path| path.exists()).unwrap()
    };
    // The first block is in the table of checksums once more.
    served_when(|db| garble(&db.join("state.redb"), 0, 4_096));
    served_when(|db| garble(&table(db), 0, 8_192));
    served_when(|db| truncate(&table(db), 100));
    served_when(|db| fs::remove_file(table(db)).unwrap());
    served_when(|db| {
        for name in ["state.redb", "state.redb.crc.0", "state.redb.crc.1"] {
            drop(fs::remove_file(db.join(name)));
        }
    });
    served_when(|db| fs::remove_file(db.join("lock")).unwrap());
    // The authority's key may be kept elsewhere; nothing has to be signed now.
    served_when(|db| fs::remove_file(db.join("tls/ca.key")).unwrap());
    served_when(|db| fs::write(db.join("tls/server.crt.tmp"), "half").unwrap());
}

#[test]
fn damaged_log_is_named() {
    let slot = |db: &Path| db.join("wal/slot-00.wal");
    refused_when(|db| garble(&slot(db), 0, 4_096), &["slot-00.wal is damaged at byte 0"]);
    refused_when(|db| truncate(&slot(db), 10_000), &["slot-00.wal is damaged", "expected 8388608"]);
    refused_when(|db| fs::remove_file(slot(db)).unwrap(), &["do not belong together", "the log"]);
    refused_when(
        |db| fs::remove_dir_all(db.join("wal")).unwrap(),
        &["do not belong together", "there is no log, but the state has applied"],
    );
    refused_when(
        |db| {
            fs::remove_dir_all(db.join("wal")).unwrap();
            fs::write(db.join("wal"), "").unwrap();
        },
        &["db/wal: Not a directory"],
    );
    let other = used_by_another();
    refused_when(
        |db| copy_all(&other.path().join("db/wal/slot-00.wal"), &slot(db)),
        &["slot-00.wal belongs to node", "expected node"],
    );
}

/// The state has what the damaged frame held, and nobody else votes.
#[test]
fn damage_that_the_state_covers_is_mended_and_said() {
    for frame in [1, 2, 4] {
        let dir = used();
        let db = dir.path().join("db");
        garble(&db.join("wal/slot-00.wal"), frame * 4_096, 4_096);
        let ended = Start { serving: &read, ..Start::on(&db) }.run();
        assert_eq!(ended.status, None, "{}", ended.printed);
        let said = format!("slot-00.wal is damaged at byte {}", frame * 4_096);
        for words in [&said, "the log begins anew after it", "nothing was lost"] {
            assert!(ended.printed.contains(words), "expected {words:?} in:\n{}", ended.printed);
        }
        // It is a log like any other now, and takes writes.
        let again = Start { serving: &write_and_read, ..Start::on(&db) }.run();
        assert_eq!(again.status, None, "{}", again.printed);
        assert!(!again.printed.contains("damaged"), "{}", again.printed);
        let again = Start { serving: &read, ..Start::on(&db) }.run();
        assert_eq!(again.status, None, "{}", again.printed);
    }
}

/// A card may give a block back as it was before. An old header hides a segment.
#[test]
fn a_log_whose_header_went_back_in_time_is_not_taken_for_empty() {
    refused_when(
        |db| {
            let header = spare_header(&db.join("wal")).unwrap();
            let slot = db.join("wal/slot-00.wal");
            let mut content = fs::read(&slot).unwrap();
            content[..4_096].copy_from_slice(&header);
            fs::write(slot, content).unwrap();
        },
        &["slot-00.wal is damaged at byte 0", "header is not that of segment 1"],
    );
}

#[test]
fn damaged_certificates_are_named() {
    let tls = |db: &Path, name: &str| db.join("tls").join(name);
    for name in ["ca.crt", "server.crt", "client.crt"] {
        let path = format!("tls/{name}");
        refused_when(|db| fs::write(tls(db, name), "x").unwrap(), &[&path, "damaged"]);
        refused_when(|db| truncate(&tls(db, name), 0), &[&path, "damaged"]);
        refused_when(|db| truncate(&tls(db, name), 1 << 20), &[&path, "found 1048576 bytes"]);
        refused_when(|db| garble(&tls(db, name), 100, 40), &[&path, "damaged"]);
    }
    for name in ["ca.key", "server.key", "peer.key"] {
        let path = format!("tls/{name}");
        refused_when(|db| fs::write(tls(db, name), "x").unwrap(), &[&path, "damaged"]);
        let open = fs::Permissions::from_mode(0o644);
        refused_when(
            |db| fs::set_permissions(tls(db, name), open).unwrap(),
            &[&path, "found mode 0644, expected 0600"],
        );
    }
    refused_when(|db| fs::remove_file(tls(db, "ca.crt")).unwrap(), &["tls/ca.crt is missing"]);
    refused_when(
        |db| copy_all(&tls(db, "peer.key"), &tls(db, "server.key")),
        &["tls/server.crt does not belong to", "tls/server.key"],
    );
    refused_when(
        |db| {
            for kind in ["crt", "key"] {
                let name = |role: &str| format!("{role}.{kind}");
                fs::copy(tls(db, &name("peer")), tls(db, &name("server"))).unwrap();
            }
        },
        &["tls/server.crt names the wrong owner"],
    );
}

/// A write that was acknowledged after the last checkpoint is in the log only.
#[test]
fn damage_that_hides_a_write_is_repaired_only_with_consent() {
    let dir = used();
    let (db, crashed) = (dir.path().join("db"), dir.path().join("crashed"));
    // What a power cut leaves: the log has the write, the state's last checkpoint does not.
    let write_and_copy = |endpoint: &Endpoint| {
        let put = pb::PutRequest { key: Bytes::from_static(b"last"), ..Default::default() };
        call(endpoint, "/etcdserverpb.KV/Put", &put);
        call(endpoint, "/etcdserverpb.KV/Put", &put);
        copy_all(&db, &crashed);
    };
    let ended = Start { serving: &write_and_copy, ..Start::on(&db) }.run();
    assert_eq!(ended.status, None, "{}", ended.printed);
    let slot = crashed.join("wal/slot-00.wal");
    let content = fs::read(&slot).unwrap();
    let used = content.chunks(4_096).take_while(|block| block.iter().any(|b| *b != 0)).count();
    garble(&slot, (used - 2) * 4_096, 4_096);

    refused(
        &Start::on(&crashed),
        FAILED,
        &["slot-00.wal is damaged at byte", "is not in the state"],
    );
    let repair = |flags: &[&str]| {
        let output = ours::program().args(["wal", "repair"]).args(flags).arg(&crashed).output();
        let output = output.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let before = contents(&crashed.join("wal"));
    let (status, out, err) = repair(&[]);
    assert_eq!(status, Some(1), "{out}{err}");
    assert!(out.contains("damage: ") && out.contains("\nlost: entr"), "{out}");
    assert!(err.contains("nothing was changed") && err.contains("--accept-data-loss"), "{err}");
    assert!(contents(&crashed.join("wal")) == before, "it said that nothing was changed");

    let (status, out, err) = repair(&["--accept-data-loss"]);
    assert_eq!(status, Some(0), "{out}{err}");
    let aside = crashed.join("wal.damaged-1/slot-00.wal");
    assert!(out.contains("done; the damaged log is in") && aside.exists(), "{out}");
    let (status, out, _) = repair(&[]);
    assert_eq!((status, out.as_str()), (Some(0), "the log is whole; nothing was changed\n"));
    let again = Start { serving: &write_and_read, ..Start::on(&crashed) }.run();
    assert_eq!(again.status, None, "{}", again.printed);
}

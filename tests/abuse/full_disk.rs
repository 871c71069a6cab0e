//! A file system that fills up under a running server, and one that turns read-only.
//!
//! A real ext4 on a loop device: what the kernel does then (delayed allocation, errors on write-back) cannot be made up.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::proto::etcdserverpb as pb;
use nix::sys::statvfs::statvfs;
use prost::Message;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::client;
use crate::support::process::{Process, free_ports};
use crate::support::{Endpoint, ours};

/// Longest time until the server notices, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

const VALUE_BYTES: usize = 256 << 10;

/// A file system on a loop device.
struct Card {
    dir: tempfile::TempDir,
    mounted: bool,
}

/// The log, the ballast, and so much that the server, too, finds it enough when it is not full.
const CARD_BYTES: u64 = 320 << 20;

impl Card {
    fn make() -> Result<Self, String> {
        let mut card = Self { dir: tempfile::tempdir().unwrap(), mounted: false };
        let image = card.dir.path().join("card.img");
        fs::File::create(&image).unwrap().set_len(CARD_BYTES).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-m", "0", text(&image)])?;
        fs::create_dir(card.mount_point()).unwrap();
        run("mount", &["-o", "loop,noatime", text(&image), text(&card.mount_point())])?;
        card.mounted = true;
        Ok(card)
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.mounted {
            // The server may not quite be gone.
            drop(run("umount", &["--lazy", text(&self.mount_point())]));
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// A server whose data is on the card.
struct OnCard {
    process: Process,
    endpoint: Endpoint,
    log: PathBuf,
}

impl OnCard {
    fn start(card: &Card) -> Self {
        let [client, peer, metrics] = free_ports().map(|port| format!("127.0.0.1:{port}"));
        let mut command = ours::program();
        command
            .args(["server", "--insecure-http", "--db-dir"])
            .arg(card.mount_point().join("db"))
            .args(["--client-listen", &client, "--peer-listen", &peer])
            .args(["--metrics-listen", &metrics]);
        let log = card.dir.path().join("log");
        let mut process = Process::start(&mut command, &log);
        process.wait_for_port(&client);
        let endpoint = Endpoint { address: client, metrics_address: metrics, tls: None };
        Self { process, endpoint, log }
    }

    async fn channel(&self) -> Channel {
        client::channel(&self.endpoint).await.unwrap()
    }

    fn printed(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

async fn put(channel: &Channel, key: u32) -> Result<(), Status> {
    let value = vec![key as u8; VALUE_BYTES].into();
    let put = pb::PutRequest { key: name(key), value, ..Default::default() };
    client::call(channel, "/etcdserverpb.KV/Put", put.encode_to_vec().into()).await.map(drop)
}

async fn small_put(channel: &Channel) -> Result<(), Status> {
    let put = pb::PutRequest { key: Bytes::from_static(b"small"), ..Default::default() };
    client::call(channel, "/etcdserverpb.KV/Put", put.encode_to_vec().into()).await.map(drop)
}

async fn delete(channel: &Channel, key: u32) -> Result<(), Status> {
    let delete = pb::DeleteRangeRequest { key: name(key), ..Default::default() };
    let path = "/etcdserverpb.KV/DeleteRange";
    client::call(channel, path, delete.encode_to_vec().into()).await.map(drop)
}

fn name(key: u32) -> Bytes {
    format!("key-{key:06}").into()
}

/// Whether a key is there, with its value.
async fn has(channel: &Channel, key: u32) -> bool {
    let get = pb::RangeRequest { key: name(key), ..Default::default() };
    let path = "/etcdserverpb.KV/Range";
    let found = client::call(channel, path, get.encode_to_vec().into()).await.unwrap();
    let found = pb::RangeResponse::decode(found).unwrap();
    found.kvs.len() == 1 && found.kvs[0].value == vec![key as u8; VALUE_BYTES]
}

/// Takes room until no more than so much is left; what the server gives back meanwhile, too.
fn fill(card: &Card, leave: u64) -> PathBuf {
    let path = card.mount_point().join("somebody-elses");
    let mut file = fs::File::create(&path).unwrap();
    let chunk = vec![7; 256 << 10];
    let free = || {
        let found = statvfs(&card.mount_point()).unwrap();
        found.blocks_available() * found.fragment_size()
    };
    while leave < free() && file.write_all(&chunk).is_ok() {}
    // What is refused may show only when it is written back.
    drop(run("sync", &["-f", text(&card.mount_point())]));
    path
}

async fn twenty_keys(channel: &Channel) -> Vec<u32> {
    for key in 0..20 {
        put(channel, key).await.unwrap();
    }
    (0..20).collect()
}

/// A server on this card has all of them, and then stops as it should.
async fn has_all(card: &Card, kept: &[u32]) {
    let mut server = OnCard::start(card);
    let channel = server.channel().await;
    for key in kept {
        assert!(has(&channel, *key).await, "{key} was acknowledged and is gone");
    }
    drop(channel);
    assert!(server.process.stop().success(), "{}", server.printed());
    assert!(!server.printed().contains("panicked"), "{}", server.printed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_is_nearly_full_takes_no_writes_until_there_is_room() {
    let card = match Card::make() {
        Ok(card) => card,
        Err(reason) => return eprintln!("skipped: no file system on a loop device: {reason}"),
    };
    let mut server = OnCard::start(&card);
    let channel = server.channel().await;
    let mut kept = twenty_keys(&channel).await;

    let filler = fill(&card, 16 << 20);
    let deadline = Instant::now() + PATIENCE;
    let refused = loop {
        // Small ones: the room that is left is to last until the server looks.
        match small_put(&channel).await {
            Ok(()) => assert!(Instant::now() < deadline, "16 MiB are enough for a server"),
            Err(status) => break status,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };

    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}: {}", server.printed());
    assert_eq!(refused.message(), "etcdserver: mvcc: database space exceeded");
    all_are_refused_at_once(&channel).await;
    for key in &kept {
        assert!(has(&channel, *key).await, "{key} was acknowledged and is gone");
    }
    // What makes room is not refused.
    delete(&channel, kept.remove(0)).await.unwrap();

    // With room again, and the alarm cleared as with etcd, writes go on.
    fs::remove_file(filler).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let next = kept.last().unwrap() + 1;
    while let Err(status) = disarm_and_put(&channel, next).await {
        assert!(Instant::now() < deadline, "{status}: {}", server.printed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    kept.push(next);

    drop(channel);
    assert!(server.process.stop().success(), "{}", server.printed());
    has_all(&card, &kept).await;
}

/// Then even what was acknowledged cannot leave the log for the state; the server may have to end, but not to forget.
#[tokio::test(flavor = "multi_thread")]
async fn a_card_without_a_single_free_block_loses_nothing() {
    let card = match Card::make() {
        Ok(card) => card,
        Err(reason) => return eprintln!("skipped: no file system on a loop device: {reason}"),
    };
    let mut server = OnCard::start(&card);
    let channel = server.channel().await;
    let mut kept = twenty_keys(&channel).await;

    let filler = fill(&card, 0);
    // It used to be "request timed out": puts were admitted until the alarm had been through the log, and the log was
    // full of puts.
    let refused = keep_putting(&channel, &mut kept).await;
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}: {}", server.printed());
    all_are_refused_at_once(&channel).await;
    let deadline = Instant::now() + PATIENCE;
    while !server.printed().contains("stopping: ") && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let (status, printed) = (server.process.stop(), server.printed());
    assert!(!printed.contains("panicked"), "{printed}");
    if !status.success() {
        assert_eq!(status.code(), Some(1), "{printed}");
        for words in ["No space left on device", "fix: free space"] {
            assert!(printed.contains(words), "expected {words:?} in:\n{printed}");
        }
    }
    fs::remove_file(filler).unwrap();
    has_all(&card, &kept).await;
}

/// Many large puts together, none of which waits for the card.
async fn all_are_refused_at_once(channel: &Channel) {
    const AT_ONCE: Duration = Duration::from_secs(3);
    let puts = (0..32).map(|key| tokio::time::timeout(AT_ONCE, put(channel, 1_000 + key)));
    for refused in futures_util::future::join_all(puts).await {
        let refused = refused.expect("a put waits for a full card").unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    }
}

/// Puts until one is refused; how.
async fn keep_putting(channel: &Channel, kept: &mut Vec<u32>) -> Status {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let key = kept.last().unwrap() + 1;
        match put(channel, key).await {
            Ok(()) => kept.push(key),
            Err(status) => return status,
        }
        assert!(Instant::now() < deadline, "{} writes of 256 KiB on a full card", kept.len());
    }
}

async fn disarm_and_put(channel: &Channel, key: u32) -> Result<(), Status> {
    const DEACTIVATE: i32 = 2;
    const NOSPACE: i32 = 1;
    let disarm = pb::AlarmRequest { action: DEACTIVATE, member_id: 0, alarm: NOSPACE };
    let path = "/etcdserverpb.Maintenance/Alarm";
    client::call(channel, path, disarm.encode_to_vec().into()).await?;
    put(channel, key).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_is_read_only_is_named() {
    let card = match Card::make() {
        Ok(card) => card,
        Err(reason) => return eprintln!("skipped: no file system on a loop device: {reason}"),
    };
    let mut server = OnCard::start(&card);
    let channel = server.channel().await;
    put(&channel, 1).await.unwrap();
    assert!(server.process.stop().success());

    run("mount", &["-o", "remount,ro", text(&card.mount_point())]).unwrap();
    let [client, peer, metrics] = free_ports().map(|port| format!("127.0.0.1:{port}"));
    let output = ours::program()
        .args(["server", "--insecure-http", "--db-dir"])
        .arg(card.mount_point().join("db"))
        .args(["--client-listen", &client, "--peer-listen", &peer])
        .args(["--metrics-listen", &metrics])
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    for words in ["Read-only file system", "fix: ", text(&card.mount_point())] {
        assert!(printed.contains(words), "expected {words:?} in:\n{printed}");
    }
    assert!(!printed.contains("panicked"), "{printed}");

    run("mount", &["-o", "remount,rw", text(&card.mount_point())]).unwrap();
    let mut server = OnCard::start(&card);
    assert!(has(&server.channel().await, 1).await);
    assert!(server.process.stop().success());
}

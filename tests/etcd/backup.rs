//! The bbolt file that we write, before etcd's own tools: status, restore, and a real etcd that starts from it.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use k3s_server::backup::bolt::{Reader, WriteError};
use k3s_server::backup::etcd_file::{EtcdFile, RevisionRow, Revisions};
use k3s_server::env::{DiskFile, Open, host};
use k3s_server::mvcc::LeaseRecord;
use k3s_server::proto::etcdserverpb as pb;
use k3s_server::proto::mvccpb::KeyValue;
use k3s_server::raft::Member;
use k3s_server::types::{LeaseId, LogIndex, NodeId, Revision, Term};
use pb::maintenance_client::MaintenanceClient;
use prost::Message as _;
use sha2::Digest as _;

use crate::script::Session;
use crate::support::etcd::{Etcd, Release};
use crate::support::{Options, skip};

const MEMBER: NodeId = NodeId::new(0x1234_5678_9abc_def0);
const COMPACTED: i64 = 3;

/// A history worth restoring: 700 keys of growing values, one of them a megabyte, one deleted, one leased, and a
/// transaction with several writes.
struct History(Vec<(i64, i64, bool, Vec<u8>)>);

impl History {
    fn new() -> Self {
        let mut history = Self(Vec::new());
        for n in 0..700_i64 {
            let value = vec![b'v'; usize::try_from(n * 7).unwrap()];
            history.put(n + 4, 0, &format!("k{n:03}"), value, 0);
        }
        history.put(704, 0, "large", vec![b'x'; 1_000_000], 0);
        history.put(705, 0, "leased", b"soon gone".to_vec(), 77);
        history.put(706, 0, "together/1", b"1".to_vec(), 0);
        history.put(706, 1, "together/2", b"2".to_vec(), 0);
        history.delete(707, 0, "k005");
        history
    }

    fn put(&mut self, main: i64, sub: i64, key: &str, value: Vec<u8>, lease: i64) {
        let kv = KeyValue {
            key: Bytes::copy_from_slice(key.as_bytes()),
            create_revision: main,
            mod_revision: main,
            version: 1,
            value: value.into(),
            lease,
        };
        self.0.push((main, sub, false, kv.encode_to_vec()));
    }

    fn delete(&mut self, main: i64, sub: i64, key: &str) {
        let kv = KeyValue { key: Bytes::copy_from_slice(key.as_bytes()), ..Default::default() };
        self.0.push((main, sub, true, kv.encode_to_vec()));
    }
}

impl Revisions for History {
    fn walk(
        &self,
        visit: &mut dyn FnMut(RevisionRow<'_>) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        self.0.iter().try_for_each(|(main, sub, tombstone, key_value)| {
            visit(RevisionRow {
                main: Revision::new(*main),
                sub: *sub,
                tombstone: *tombstone,
                key_value,
            })
        })
    }
}

/// Writes the file as `etcdctl snapshot save` does: with its SHA-256 behind it.
fn save(path: &Path) {
    let member = Member {
        id: MEMBER,
        name: "pi1".into(),
        peer_urls: vec!["https://10.0.0.1:2380".into()],
        client_urls: vec!["https://10.0.0.1:2379".into()],
        learner: false,
        replaces: None,
    };
    let history = History::new();
    let file = EtcdFile {
        revisions: &history,
        compacted: Revision::new(COMPACTED),
        applied: LogIndex::new(900),
        term: Term::new(3),
        leases: &[LeaseRecord { id: LeaseId::new(77), ttl_secs: 1_000, remaining_secs: 0 }],
        alarms: &[],
        members: &[member],
        version: "3.6.0",
    };
    let plan = file.plan().unwrap();
    let mut bytes = Vec::new();
    file.write(&plan, &mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, plan.bytes());
    let digest = sha2::Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    fs::write(path, bytes).unwrap();
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}{complained}", output.status);
    said
}

#[test]
fn etcds_own_tool_knows_our_file() {
    let releases = Release::all();
    if releases.is_empty() {
        return skip("no etcd below target/etcd");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup.db");
    save(&file);
    for release in releases {
        let said = run(release.etcdutl().args(["snapshot", "status", "-w", "json"]).arg(&file));
        let status: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(status["revision"], 707, "{}: {said}", release.version());
        // All buckets are counted: 705 revisions, 6 facts in meta, a lease, a member and the cluster's version.
        assert_eq!(status["totalKey"], 705 + 9, "{}: {said}", release.version());
    }
}

#[test]
fn every_etcd_starts_from_our_file_and_has_the_same_data() {
    let releases = Release::all();
    if releases.is_empty() {
        return skip("no etcd below target/etcd");
    }
    for release in releases {
        let dir = tempfile::tempdir().unwrap();
        let (file, data) = (dir.path().join("backup.db"), dir.path().join("restored"));
        save(&file);
        run(release
            .etcdutl()
            .args(["snapshot", "restore", "--name=default"])
            .args(["--initial-cluster=default=http://127.0.0.1:1"])
            .args(["--initial-advertise-peer-urls=http://127.0.0.1:1", "--data-dir"])
            .arg(&data)
            .arg(&file));
        let etcd = Etcd::start_in(&release, &Options::default(), dir, &data, "default");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check_restored(&etcd));
    }
}

async fn check_restored(etcd: &Etcd) {
    let version = etcd.release().version();
    let mut session = Session::connect(etcd.endpoint()).await;
    for (request, reply) in [
        ("get k from count_only", "rev 707, count 703"),
        ("get k005", "rev 707, count 0"),
        ("get k005 rev=706 count_only", "rev 707, count 1"),
        ("get k prefix rev=500 count_only", "rev 707, count 497"),
        ("get large", "rev 707, count 1\n  \"large\" = x*1000000 create 704 mod 704 version 1"),
        ("get a rev=2", "error OutOfRange: etcdserver: mvcc: required revision has been compacted"),
        (
            "get together from",
            "rev 707, count 2\n  \"together/1\" = \"1\" create 706 mod 706 version 1\n  \
             \"together/2\" = \"2\" create 706 mod 706 version 1",
        ),
        ("put after 1", "rev 708"),
        ("ttl 77 keys", "rev 708, lease 77 ttl <granted> granted 1000\n  \"leased\""),
        ("revoke 77", "rev 709"),
        ("get leased", "rev 709, count 0"),
        ("compact 708 physical", "rev 709"),
        ("defragment", "no header"),
        ("get k from count_only", "rev 709, count 702"),
    ] {
        assert_eq!(session.run(request).await.join("\n"), reply, "{version}: {request}");
    }
}

fn open(path: &Path) -> Arc<dyn DiskFile> {
    host::env().disk.open(path, Open::Read).unwrap()
}

/// The small buckets of a real file are what ours are modelled on.
#[test]
fn a_file_written_by_a_real_etcd_reads_back_and_has_the_buckets_that_ours_has() {
    let Some(release) = Release::newest() else { return skip("no etcd below target/etcd") };
    let etcd = Etcd::start(&release, &Options::default());
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("theirs.db"), dir.path().join("ours.db"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut session = Session::connect(etcd.endpoint()).await;
        for line in
            ["grant 1000 id=77", "put a 1 lease=77", "put a 2", "del a", "compact 2 physical"]
        {
            session.run(line).await;
        }
        let mut maintenance = MaintenanceClient::connect(etcd.endpoint().url()).await.unwrap();
        let stream = maintenance.snapshot(pb::SnapshotRequest {}).await.unwrap();
        let mut stream = stream.into_inner();
        let mut file = fs::File::create(&theirs).unwrap();
        while let Some(part) = stream.message().await.unwrap() {
            file.write_all(&part.blob).unwrap();
        }
    });
    save(&ours);
    let (theirs, ours) = (Reader::open(open(&theirs)).unwrap(), Reader::open(open(&ours)).unwrap());
    let buckets = ours.bucket_names().unwrap();
    for name in theirs.bucket_names().unwrap() {
        assert!(buckets.contains(&name), "ours lacks bucket {name:?}");
    }
    for (bucket, key) in [
        ("meta", "confState"),
        ("meta", "consistent_index"),
        ("meta", "term"),
        ("meta", "finishedCompactRev"),
        ("meta", "scheduledCompactRev"),
        ("cluster", "clusterVersion"),
    ] {
        let find = |reader: &Reader| {
            reader.bucket(bucket).unwrap().and_then(|bucket| bucket.find(key.as_bytes()).unwrap())
        };
        let (theirs, ours) = (find(&theirs), find(&ours));
        let (theirs, ours) = (theirs.unwrap_or_default(), ours.unwrap_or_default());
        assert_eq!(theirs.is_empty(), ours.is_empty(), "{bucket}/{key}: {theirs:?}, {ours:?}");
        if key == "confState" {
            let keys = |text: &[u8]| -> Vec<String> {
                let value: serde_json::Value = serde_json::from_slice(text).unwrap();
                value.as_object().unwrap().keys().cloned().collect()
            };
            assert_eq!(keys(&theirs), keys(&ours));
        } else {
            assert_eq!(theirs.len(), ours.len(), "{bucket}/{key}: {theirs:?}, {ours:?}");
        }
    }
    let lease = theirs.bucket("lease").unwrap().unwrap().find(&77_u64.to_be_bytes()).unwrap();
    assert_eq!(lease.unwrap()[..], [8, 77, 16, 0xe8, 7]);
    let mut history = theirs.bucket("key").unwrap().unwrap().cursor();
    let mut keys = Vec::new();
    while let Some((key, _)) = history.next().unwrap() {
        keys.push(key);
    }
    let tombstone: &[u8] = b"\0\0\0\0\0\0\0\x04_\0\0\0\0\0\0\0\0t";
    assert_eq!(keys.last().map(|key| &key[..]), Some(tombstone));
}

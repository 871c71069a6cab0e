//! `node.json`, which says who a node is.

use std::path::{Path, PathBuf};

use k3s_server::join::identity::FILE;
use k3s_server::join::{Identity, Phase};
use k3s_server::testkit::wait;
use k3s_server::types::{ClusterId, NodeId};

use super::memory::MemoryDisk;

pub const DICTIONARY: &[&[u8]] = &[
    b"\"format\": 1",
    b"\"format\": 2",
    b"\"epoch\"",
    b"\"phase\"",
    b"\"founding\"",
    b"\"joining\"",
    b"\"setting-aside\"",
    b"\"member\"",
    b"\"replaces\"",
    b"\"cluster\"",
    b"\"node\"",
    b"\"check\"",
    b"null",
    b"-1",
    b"1e999",
    b"\\ud800",
    b"{",
    b"[[[[[[[[",
    b"+1",
    b"0x1",
];

const WRITTEN: Identity = Identity {
    cluster: ClusterId::new(0xfeed),
    node: NodeId::new(0xbeef),
    epoch: 7,
    phase: Phase::Joining { replaces: Some(NodeId::new(0xdead)) },
};

/// As release 0.1.0 wrote it.
const FORMAT_1: &[u8] =
    b"{\n  \"format\": 1,\n  \"cluster\": \"feed\",\n  \"node\": \"beef\",\n  \"check\": 3091785842\n}\n";

fn path() -> PathBuf {
    Path::new("db").join(FILE)
}

pub fn seeds() -> Vec<Vec<u8>> {
    let disk = MemoryDisk::default();
    wait(WRITTEN.store(&disk.env(), Path::new("db"))).unwrap();
    vec![disk.files()[&path()].clone(), FORMAT_1.to_vec()]
}

/// Whatever is accepted has ids that were written together.
pub fn run(input: &[u8]) {
    let disk = MemoryDisk::of(&[(path(), input.to_vec())].into());
    match Identity::load(&disk.env(), Path::new("db")) {
        Ok(found) => {
            let found = found.expect("the file is there");
            let again = MemoryDisk::default();
            wait(found.store(&again.env(), Path::new("db"))).unwrap();
            let loaded = Identity::load(&again.env(), Path::new("db")).unwrap();
            assert_eq!(loaded, Some(found));
        }
        Err(error) => assert!(error.to_string().contains(FILE), "no file in {error}"),
    }
}

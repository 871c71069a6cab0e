//! What is fuzzed: everything that reads bytes which somebody else wrote. Shared with `fuzz/` by `#[path]`.
//!
//! A target takes any bytes and returns; it panics only when a promise of the code under test is broken.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use k3s_server::backup::bolt::{Plan, ReadError, Reader};
use k3s_server::command::{Command, Encoded};
use k3s_server::env::{BoxFuture, DiskFile};
use k3s_server::proto::etcdserverpb as pb;

/// One entry point.
pub struct Target {
    /// Also the name of its directory in `fuzz/corpus`.
    pub name: &'static str,
    /// Valid inputs, made by code so that they follow the format.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the format.
    pub dictionary: &'static [&'static [u8]],
    /// Tries one input.
    pub run: fn(&[u8]),
}

/// All of them.
pub const ALL: &[Target] = &[
    Target {
        name: "bolt",
        seeds: bolt_seeds,
        dictionary: &[b"key", b"meta", &[0xed, 0xda, 0x0c, 0xed]],
        run: bolt,
    },
    Target {
        name: "command",
        seeds: command_seeds,
        dictionary: &[&[1, 1, 0], &[1, 3, 0], &[1, 3, 1]],
        run: command,
    },
];

// --- bbolt files ------------------------------------------------------------------------------------------------

fn bolt_seeds() -> Vec<Vec<u8>> {
    let file = |keys: u64, value_bytes: usize| {
        let fill = |file: &mut k3s_server::backup::bolt::FileWriter<'_>| {
            file.bucket("empty", |_| Ok(()))?;
            file.bucket("key", |bucket| {
                (0..keys).try_for_each(|n| bucket.put(&n.to_be_bytes(), &vec![7; value_bytes]))
            })
        };
        let plan = Plan::measure(fill).unwrap();
        let mut out = Vec::new();
        plan.write(&mut out, fill).unwrap();
        out
    };
    vec![file(0, 0), file(3, 10), file(200, 40), file(2, 9_000)]
}

/// Walks every bucket of the file.
fn bolt(input: &[u8]) {
    fn walk(input: &[u8]) -> Result<(), ReadError> {
        let reader = Reader::open(Arc::new(MemoryFile(Mutex::new(input.to_vec()))))?;
        for name in reader.bucket_names()? {
            let Some(bucket) = reader.bucket(&String::from_utf8_lossy(&name))? else { continue };
            let (mut cursor, mut last) = (bucket.cursor(), Bytes::new());
            while let Some((key, _)) = cursor.next()? {
                assert!(last.is_empty() || last < key, "keys out of order were let through");
                last = key;
            }
        }
        Ok(())
    }
    // A refusal is as good as an answer.
    let _ = walk(input);
}

#[derive(Debug)]
struct MemoryFile(Mutex<Vec<u8>>);

impl DiskFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let found = offset.checked_add(buffer.len()).and_then(|end| bytes.get(offset..end));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn write_at(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }
    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

// --- log commands -----------------------------------------------------------------------------------------------

/// One of each command, with every field in use.
fn commands() -> Vec<Command> {
    use pb::request_op::Request;
    let put = pb::PutRequest {
        key: Bytes::from_static(b"key"),
        value: Bytes::from_static(b"value"),
        lease: 7,
        prev_kv: true,
        ..Default::default()
    };
    let range = pb::RangeRequest {
        key: Bytes::from_static(b"a"),
        range_end: Bytes::from_static(b"\0"),
        limit: 5,
        revision: 3,
        sort_order: 2,
        sort_target: 4,
        min_mod_revision: 1,
        max_create_revision: 9,
        ..Default::default()
    };
    let delete = pb::DeleteRangeRequest {
        key: Bytes::from_static(b"a"),
        range_end: Bytes::from_static(b"b"),
        prev_kv: true,
    };
    let compare = pb::Compare {
        result: 3,
        target: 3,
        key: Bytes::from_static(b"key"),
        range_end: Bytes::from_static(b"kez"),
        target_union: Some(pb::compare::TargetUnion::Value(Bytes::from_static(b"value"))),
    };
    let op = |request| pb::RequestOp { request: Some(request) };
    let inner = pb::TxnRequest {
        compare: vec![compare.clone()],
        success: vec![op(Request::RequestPut(put.clone()))],
        failure: vec![op(Request::RequestDeleteRange(delete.clone()))],
    };
    let txn = pb::TxnRequest {
        compare: vec![compare],
        success: vec![op(Request::RequestRange(range)), op(Request::RequestTxn(inner.clone()))],
        failure: vec![op(Request::RequestTxn(inner))],
    };
    let checkpoints = vec![pb::LeaseCheckpoint { id: 7, remaining_ttl: 50 }];
    vec![
        Command::Put(put),
        Command::DeleteRange(delete),
        Command::Txn(txn),
        Command::Compact(pb::CompactionRequest { revision: 5, physical: true }),
        Command::LeaseGrant(pb::LeaseGrantRequest { ttl: 60, id: 7 }),
        Command::LeaseRevoke(pb::LeaseRevokeRequest { id: 7 }),
        Command::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints }),
        Command::Alarm(pb::AlarmRequest { action: 1, member_id: 1, alarm: 1 }),
    ]
}

fn command_seeds() -> Vec<Vec<u8>> {
    commands().iter().map(|command| command.encode().bytes().to_vec()).collect()
}

/// What decodes must encode to something that decodes to the same.
fn command(input: &[u8]) {
    let encoded = Encoded::from_log(Bytes::copy_from_slice(input));
    let _ = encoded.class();
    if let Ok(command) = encoded.decode() {
        let again = command.encode().decode();
        assert_eq!(again.as_ref(), Ok(&command), "a command changes when it is written again");
    }
}

//! The writer and the reader against each other, and the reader against damage. bbolt itself is the judge in
//! `tests/etcd/backup.rs`.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::*;
use crate::env::{BoxFuture, DiskFile};

type Content = BTreeMap<String, BTreeMap<Vec<u8>, Vec<u8>>>;

/// A file in memory.
#[derive(Debug)]
struct MemoryFile(Mutex<Vec<u8>>);

impl MemoryFile {
    fn holding(bytes: Vec<u8>) -> Arc<dyn DiskFile> {
        Arc::new(Self(Mutex::new(bytes)))
    }
}

impl DiskFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let offset = usize::try_from(offset).unwrap();
        let found = bytes.get(offset..offset + buffer.len());
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

fn fill(content: &Content, file: &mut FileWriter<'_>) -> Result<(), WriteError> {
    for (name, keys) in content {
        file.bucket(name, |bucket| {
            keys.iter().try_for_each(|(key, value)| bucket.put(key, value))
        })?;
    }
    Ok(())
}

fn write(content: &Content) -> Vec<u8> {
    let plan = Plan::measure(|file| fill(content, file)).unwrap();
    let mut out = Vec::new();
    plan.write(&mut out, |file| fill(content, file)).unwrap();
    assert_eq!(out.len() as u64, plan.bytes());
    out
}

fn read(bytes: Vec<u8>) -> Result<Content, ReadError> {
    let reader = Reader::open(MemoryFile::holding(bytes))?;
    let mut content = Content::new();
    for name in reader.bucket_names()? {
        let name = String::from_utf8_lossy(&name).into_owned();
        let Some(bucket) = reader.bucket(&name)? else { continue };
        let mut cursor = bucket.cursor();
        let keys = content.entry(name).or_default();
        while let Some((key, value)) = cursor.next()? {
            keys.insert(key.to_vec(), value.to_vec());
        }
    }
    Ok(content)
}

/// Keys 0..count as eight bytes, values of growing size.
fn numbered(count: u64, value_bytes: impl Fn(u64) -> usize) -> BTreeMap<Vec<u8>, Vec<u8>> {
    (0..count)
        .map(|n| (n.to_be_bytes().to_vec(), vec![u8::try_from(n % 251).unwrap(); value_bytes(n)]))
        .collect()
}

#[test]
fn what_was_written_reads_back() {
    for content in [
        Content::new(),
        Content::from([("empty".into(), BTreeMap::new())]),
        Content::from([("one".into(), numbered(1, |_| 0)), ("two".into(), numbered(2, |_| 5))]),
        Content::from([("page".into(), numbered(400, |n| usize::try_from(n % 40).unwrap()))]),
        // Three levels of branches need more than 150 * 150 leaves.
        Content::from([("deep".into(), numbered(30_000, |_| 2_100))]),
        Content::from([("large".into(), numbered(20, |n| usize::try_from(n * 5_000).unwrap()))]),
    ] {
        assert!(read(write(&content)).unwrap() == content);
    }
}

#[test]
fn long_keys_are_found_through_the_branches() {
    let keys: BTreeMap<_, _> = (0..200u8).map(|n| (vec![n; 3_000], vec![n])).collect();
    let content = Content::from([("long".into(), keys)]);
    assert!(read(write(&content)).unwrap() == content);
}

#[test]
fn keys_out_of_order_are_refused() {
    let found = Plan::measure(|file| {
        file.bucket("key", |bucket| {
            bucket.put(b"b", b"")?;
            bucket.put(b"a", b"")
        })
    });
    assert!(matches!(found, Err(WriteError::Order { .. })), "{found:?}");
    let twice = Plan::measure(|file| {
        file.bucket("key", |_| Ok(()))?;
        file.bucket("key", |_| Ok(()))
    });
    assert!(matches!(twice, Err(WriteError::BucketTwice(_))), "{twice:?}");
    let empty = Plan::measure(|file| file.bucket("key", |bucket| bucket.put(b"", b"")));
    assert!(matches!(empty, Err(WriteError::Size { .. })), "{empty:?}");
}

#[test]
fn content_that_changed_after_measuring_is_noticed() {
    let before = Content::from([("key".into(), numbered(1_000, |_| 10))]);
    let after = Content::from([("key".into(), numbered(1_500, |_| 10))]);
    let plan = Plan::measure(|file| fill(&before, file)).unwrap();
    let found = plan.write(&mut io::sink(), |file| fill(&after, file));
    assert!(matches!(found, Err(WriteError::Changed { .. })), "{found:?}");
}

#[test]
fn either_meta_page_alone_is_enough() {
    let content = Content::from([("key".into(), numbered(300, |_| 30))]);
    for meta in 0..2 {
        let mut bytes = write(&content);
        bytes[meta * PAGE_BYTES..][..PAGE_BYTES].fill(0);
        assert!(read(bytes).unwrap() == content);
    }
    let mut bytes = write(&content);
    bytes[..2 * PAGE_BYTES].fill(0);
    assert!(matches!(read(bytes), Err(ReadError::NoMeta { .. })));
}

#[test]
fn a_file_cut_short_is_refused() {
    let bytes = write(&Content::from([("key".into(), numbered(300, |_| 30))]));
    for len in (0..bytes.len()).step_by(97) {
        let found = read(bytes[..len].to_vec());
        assert!(
            matches!(found, Err(ReadError::NoMeta { .. } | ReadError::Short { .. })),
            "{len}: {found:?}"
        );
    }
}

#[test]
fn damage_anywhere_ends_in_an_error_or_in_other_content_but_never_in_a_panic() {
    let content = Content::from([
        ("alarm".into(), BTreeMap::new()),
        ("key".into(), numbered(400, |n| usize::try_from(n % 60).unwrap())),
        ("large".into(), numbered(2, |_| 9_000)),
    ]);
    let bytes = write(&content);
    let mut refused = 0;
    for at in 0..bytes.len() {
        // The bytes of page and element headers are what can mislead; most of the rest is content.
        if at % PAGE_BYTES > 300 && at % 29 != 0 {
            continue;
        }
        for value in [0x00, 0xff, bytes[at] ^ (1 << (at % 8))] {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            refused += usize::from(read(damaged).is_err());
        }
    }
    assert!(0 < refused);
}

#[test]
fn a_tree_that_points_back_to_itself_ends_in_an_error() {
    let mut bytes = write(&Content::from([("key".into(), numbered(3_000, |_| 30))]));
    let pages = bytes.len() / PAGE_BYTES;
    let branch = (3..pages)
        .find(|page| bytes[page * PAGE_BYTES + 8] == 0x01)
        .expect("3000 keys need a branch page");
    // The first child of the branch becomes the branch itself.
    let own = (branch as u64).to_le_bytes();
    bytes[branch * PAGE_BYTES + 16 + 8..][..8].copy_from_slice(&own);
    assert!(matches!(read(bytes), Err(ReadError::Damaged { .. })));
}

#[test]
fn a_key_is_found_without_knowing_its_place() {
    let content = Content::from([("meta".into(), numbered(10, |n| usize::try_from(n).unwrap()))]);
    let reader = Reader::open(MemoryFile::holding(write(&content))).unwrap();
    let meta = reader.bucket("meta").unwrap().expect("bucket meta");
    assert_eq!(meta.find(&3u64.to_be_bytes()).unwrap(), Some(Bytes::from_static(&[3, 3, 3])));
    assert_eq!(meta.find(b"missing").unwrap(), None);
    assert!(reader.bucket("missing").unwrap().is_none());
}

//! bbolt files of real etcds, which conversion and restore read.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use k3s_server::backup::bolt::{FileWriter, Plan, ReadError, Reader};
use k3s_server::env::{Disk, Open};

use super::memory::MemoryDisk;

pub fn seeds() -> Vec<Vec<u8>> {
    let file = |keys: u64, value_bytes: usize| {
        let fill = |file: &mut FileWriter<'_>| {
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

/// Walks every bucket of the file. A refusal is as good as an answer.
pub fn run(input: &[u8]) {
    drop(walk(input));
}

fn walk(input: &[u8]) -> Result<(), ReadError> {
    let path = Path::new("db");
    let disk = MemoryDisk::of(&[(PathBuf::from(path), input.to_vec())].into());
    let file = disk.open(path, Open::Read).expect("a file that is there");
    let reader = Reader::open(file)?;
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

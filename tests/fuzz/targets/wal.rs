//! The log: one frame, one slot header, and a whole directory of slots after any damage.
//!
//! An input of the target `wal` is a directory: blocks of slots that are not all zeros, and where they stand.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use k3s_server::testkit::wait;
use k3s_server::types::{ClusterId, LogId, LogIndex, NodeId, Term, Vote};
use k3s_server::wal::format::{self, BLOCK, FrameHeader, SlotHeader};
use k3s_server::wal::{Entry, Identity, OpenError, Options, Record, Urgency, Wal, inspect};

use super::Input;
use super::memory::{Files, MemoryDisk};

pub const DICTIONARY: &[&[u8]] =
    &[b"K3WF", b"K3SWALS1", &[1, 0, 0, 0], &[0, 16, 0, 0], &[0, 0, 48, 0]];

const DIR: &str = "wal";
const SLOTS: u8 = 4;
/// Small, so that an input fills a few segments.
const SLOT_BYTES: usize = 24 * BLOCK;
/// In place of a block number: what follows is not a block but the slot's length.
const LENGTH: usize = 0xffff;
const RIGHT_CHECKSUMS: u8 = 1;

const OWNER: Identity = Identity { cluster: ClusterId::new(0xc1), node: NodeId::new(0x11) };

fn slot(number: u8) -> PathBuf {
    Path::new(DIR).join(format!("slot-{number:02}.wal"))
}

fn options() -> Options {
    Options {
        linger: Duration::ZERO,
        segment_bytes: SLOT_BYTES as u64,
        slots_min: 2,
        fill_pause: Duration::ZERO,
        ..Options::default()
    }
}

// --- a directory as an input ------------------------------------------------------------------------------------

/// Packs the slots of a directory.
pub fn archive(files: &Files, mode: u8) -> Vec<u8> {
    let mut out = vec![mode];
    for number in 0..SLOTS {
        let Some(bytes) = files.get(&slot(number)) else { continue };
        out.push(number);
        out.extend(u16::try_from(LENGTH).unwrap().to_le_bytes());
        out.extend(u16::try_from(bytes.len() / BLOCK).unwrap().to_le_bytes());
        for (at, block) in bytes.chunks(BLOCK).enumerate() {
            let used = block.len() - block.iter().rev().take_while(|byte| **byte == 0).count();
            if 0 < used {
                out.push(number);
                out.extend(u16::try_from(at).unwrap().to_le_bytes());
                super::put_piece(&mut out, &block[..used]);
            }
        }
    }
    out
}

/// The directory that an input stands for; slots no longer than `blocks_max`.
pub fn unpack(input: &[u8], blocks_max: usize) -> Files {
    let mut input = Input(input);
    let mode = input.byte();
    let mut files = Files::new();
    while !input.is_empty() {
        let file = files.entry(slot(input.byte() % SLOTS)).or_default();
        match (input.u16(), input.u16()) {
            (LENGTH, blocks) => file.resize(blocks.min(blocks_max) * BLOCK, 0),
            (at, length) => {
                let piece = input.piece(length);
                let at = at % blocks_max * BLOCK;
                let end = (at + piece.len()).min(file.len().max(at));
                if at < end {
                    file[at..end].copy_from_slice(&piece[..end - at]);
                }
            }
        }
    }
    if mode & RIGHT_CHECKSUMS != 0 {
        files.values_mut().for_each(|file| right_checksums(file));
    }
    files
}

/// Puts the checksums of a slot right, and the chain from frame to frame.
fn right_checksums(file: &mut [u8]) {
    const SLOT_CRC_AT: usize = 176;
    const CHAIN_AT: usize = 72;
    const FRAME_CHAIN_AT: usize = 20;
    const PAYLOAD_CRC_AT: usize = 52;
    const FRAME_CRC_AT: usize = 60;
    let put = |file: &mut [u8], at: usize, crc: u32| {
        file[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    };
    let word = |file: &[u8], at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let blocks = file.len() / BLOCK;
    for header in [0, blocks.saturating_sub(1)].map(|block| block * BLOCK) {
        if file.len() < header + BLOCK {
            continue;
        }
        let crc = crc32c::crc32c(&file[header..header + SLOT_CRC_AT]);
        put(file, header + SLOT_CRC_AT, crc);
    }
    let mut chain = if blocks == 0 { 0 } else { word(file, CHAIN_AT) };
    for at in (1..blocks).map(|block| block * BLOCK) {
        if &file[at..at + 4] != b"K3WF" {
            continue;
        }
        put(file, at + FRAME_CHAIN_AT, chain);
        let bytes = usize::try_from(word(file, at + 8)).unwrap();
        let payload = at + format::FRAME_HEADER_BYTES;
        if let Some(found) = payload.checked_add(bytes).and_then(|end| file.get(payload..end)) {
            let crc = crc32c::crc32c(found);
            put(file, at + PAYLOAD_CRC_AT, crc);
        }
        chain = crc32c::crc32c(&file[at..at + FRAME_CRC_AT]);
        put(file, at + FRAME_CRC_AT, chain);
    }
}

// --- logs to start from -----------------------------------------------------------------------------------------

fn id(term: u64, index: u64) -> LogId {
    LogId { term: Term::new(term), leader: NodeId::new(0x11), index: LogIndex::new(index) }
}

fn entry(term: u64, index: u64, bytes: usize) -> Record {
    let byte = u8::try_from(index % 251).unwrap();
    Record::Entry { id: id(term, index), payload: Bytes::from(vec![byte; bytes]) }
}

fn vote(term: u64) -> Record {
    Record::Vote(Vote { term: Term::new(term), node: NodeId::new(0x11), committed: true })
}

/// The files of a log to which these batches were appended, each with a barrier of its own.
fn written(batches: Vec<Vec<Record>>, close: bool) -> Files {
    let disk = MemoryDisk::default();
    wait(async {
        let (wal, _, writer) =
            Wal::open(&disk.env(), Path::new(DIR), OWNER, options()).await.unwrap();
        let writer = tokio::spawn(writer.run());
        for records in batches {
            wal.append(records, Urgency::Urgent, drop).unwrap();
            let _durable = wal.flush().await.unwrap();
        }
        if close {
            wal.close().await.unwrap();
        }
        writer.abort();
        drop(writer.await);
    });
    disk.files()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let history = || {
        vec![
            vec![vote(1), entry(1, 0, 40)],
            vec![entry(1, 1, 100), entry(1, 2, 5_000)],
            vec![Record::Committed(id(1, 2)), vote(2), entry(2, 3, 9_000)],
            vec![Record::TruncateAfter(Some(id(1, 2))), entry(3, 3, 10)],
            vec![entry(3, 4, 30_000), Record::Committed(id(3, 4))],
        ]
    };
    let long = (0..40)
        .map(|index| vec![entry(1, index, 3_000 + usize::try_from(index).unwrap())])
        .chain([vec![Record::Purge(id(1, 20)), entry(1, 40, 1)]])
        .chain((41..48).map(|index| vec![entry(1, index, 2_500)]))
        .collect();
    let logs = [
        written(vec![], true),
        written(history(), true),
        written(history(), false),
        written(long, true),
    ];
    let modes = [0, RIGHT_CHECKSUMS];
    logs.iter().flat_map(|files| modes.map(|mode| archive(files, mode))).collect()
}

// --- the whole log ----------------------------------------------------------------------------------------------

/// Looking never changes anything. Damage is refused and left alone. What opens shows what was seen before, and opens
/// to the same again. A log whose checksums were put right over nonsense may also answer with an error later.
pub fn run(input: &[u8]) {
    let believable = input.first().is_none_or(|mode| mode & RIGHT_CHECKSUMS == 0);
    let before = unpack(input, SLOT_BYTES / BLOCK);
    let disk = MemoryDisk::of(&before);
    let report = inspect::verify(&disk, Path::new(DIR));
    let seen = inspect::entries(&disk, Path::new(DIR))
        .and_then(|dump| dump.collect::<Result<Vec<_>, _>>());
    assert!(disk.files() == before, "looking changed the log");
    match wait(opened(&disk)) {
        Err(error) => {
            assert!(disk.files() == before, "a log that was refused was changed: {error}");
            assert!(!error.to_string().is_empty());
        }
        Ok(first) => {
            let report = report.expect("what opens can be looked at");
            assert!(report.damage.is_none(), "opened in spite of {:?}", report.damage);
            assert_eq!(report.state.last, first.state.last);
            let second = wait(opened(&disk)).expect("what opened once opens again");
            assert_eq!(first.state, second.state);
            if believable || first.entries.is_ok() {
                let entries = first.entries.expect("entries of a log that opened");
                assert_eq!(seen.expect("what opens can be dumped"), entries);
                assert_eq!(second.entries.expect("entries of a log that opened"), entries);
            }
        }
    }
}

struct Log {
    state: k3s_server::wal::HardState,
    entries: io::Result<Vec<Entry>>,
}

async fn opened(disk: &MemoryDisk) -> Result<Log, OpenError> {
    let (wal, _, writer) = Wal::open(&disk.env(), Path::new(DIR), OWNER, options()).await?;
    drop(writer);
    let state = wal.hard_state();
    let all = LogIndex::new(0)..LogIndex::new(u64::MAX);
    let entries = wal.entries(all, u64::MAX);
    Ok(Log { state, entries })
}

// --- one frame, one header --------------------------------------------------------------------------------------

pub fn frame_seeds() -> Vec<Vec<u8>> {
    let mut blocks = Vec::new();
    for input in seeds() {
        for file in unpack(&input, SLOT_BYTES / BLOCK).into_values() {
            for (at, block) in file.chunks(BLOCK).enumerate() {
                let used = block.len() - block.iter().rev().take_while(|byte| **byte == 0).count();
                if 0 < used {
                    let mode = u8::try_from(at % 2).unwrap();
                    blocks.push([&[mode], &block[..used.max(180)]].concat());
                }
            }
        }
    }
    blocks.sort();
    blocks.dedup();
    blocks
}

pub fn run_frame(input: &[u8]) {
    let mut input = Input(input);
    let mut bytes = input.byte().to_le_bytes().to_vec();
    let mode = bytes.remove(0);
    bytes.extend_from_slice(input.0);
    if mode & RIGHT_CHECKSUMS != 0 {
        // As a slot of a header and a frame, both from the input.
        let mut file = [bytes.clone(), vec![0; 2 * BLOCK]].concat();
        let mut frame = bytes.clone();
        frame.resize(frame.len().next_multiple_of(BLOCK).max(BLOCK), 0);
        file.truncate(BLOCK);
        file.resize(BLOCK, 0);
        file.extend_from_slice(&frame);
        file.resize(file.len() + BLOCK, 0);
        right_checksums(&mut file);
        drop(SlotHeader::decode(&file));
        let end = file.len() - BLOCK;
        decode(&file[BLOCK..end]);
    }
    drop(SlotHeader::decode(&bytes));
    decode(&bytes);
    // Records without any frame around them.
    for expected in [0, 1, 7, u32::MAX] {
        format::records(&bytes, expected).take_while(Result::is_ok).for_each(drop);
    }
}

fn decode(frame: &[u8]) {
    let header = FrameHeader::decode(frame);
    if let Ok((decoded, records)) = format::decode_frame(frame) {
        assert_eq!(header, Ok(decoded));
        let mut raw = Vec::new();
        records.iter().for_each(|record| format::encode_record(record, &mut raw));
        assert!(raw.len() <= format::RAW_BYTES_MAX);
    }
}

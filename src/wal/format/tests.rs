//! Golden bytes, and bytes that nobody wrote.

use bytes::Bytes;

use super::*;
use crate::testkit::Random;
use crate::wal::frame::FrameBuffer;

fn id(term: u64, leader: u64, index: u64) -> LogId {
    LogId { term: Term::new(term), leader: NodeId::new(leader), index: LogIndex::new(index) }
}

fn identity() -> Identity {
    Identity { cluster: ClusterId::new(0x0c), node: NodeId::new(0x0d) }
}

fn place() -> Place {
    Place {
        segment: SegmentNo::new(3),
        generation: 0x1122_3344_5566_7788,
        block: 5,
        seq: 9,
        chain: 0xaabb_ccdd,
        replaces: 2,
        replaced_chain: 0x0102_0304,
    }
}

fn samples() -> Vec<Record> {
    vec![
        Record::Entry { id: id(1, 2, 3), payload: Bytes::from_static(b"hi") },
        Record::Vote(Vote { term: Term::new(4), node: NodeId::new(5), committed: true }),
        Record::Committed(id(6, 7, 8)),
        Record::TruncateAfter(Some(id(9, 10, 11))),
        Record::TruncateAfter(None),
        Record::Purge(id(12, 13, 14)),
    ]
}

fn sealed(records: &[Record]) -> (Vec<u8>, u32) {
    let mut frame = FrameBuffer::new();
    for record in records {
        frame.push(record);
    }
    frame.compress(&mut Vec::new());
    let crc = frame.seal(&place());
    (frame.frame().to_vec(), crc)
}

fn le(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// The polynomial is part of the format: this is the check value everybody publishes for CRC-32C.
#[test]
fn checksum_is_crc32c() {
    assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn version_1_records_never_change() {
    let n = |value: u64| value.to_le_bytes();
    let expected = [
        le(&[&[1], &n(1), &n(2), &n(3), &[2, 0, 0, 0], b"hi"]),
        le(&[&[2], &n(4), &n(5), &[1]]),
        le(&[&[3], &n(6), &n(7), &n(8)]),
        le(&[&[4, 1], &n(9), &n(10), &n(11)]),
        le(&[&[4, 0], &n(0), &n(0), &n(0)]),
        le(&[&[5], &n(12), &n(13), &n(14)]),
    ];
    for (record, expected) in samples().iter().zip(expected) {
        let mut bytes = Vec::new();
        encode_record(record, &mut bytes);
        assert_eq!(bytes, expected, "{record:?}");
        assert_eq!(bytes.len(), record_bytes(record), "{record:?}");
    }
}

#[test]
fn version_1_frame_header_never_changes() {
    let (bytes, crc) = sealed(&samples()[2..3]);
    let expected = le(&[
        b"K3WF",
        &[1, 0, 2, 0],
        &[25, 0, 0, 0],
        &[25, 0, 0, 0],
        &[1, 0, 0, 0],
        &[0xdd, 0xcc, 0xbb, 0xaa],
        &9_u64.to_le_bytes(),
        &[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11],
        &3_u64.to_le_bytes(),
        &[5, 0, 0, 0],
        &0x6bbf_3fd2_u32.to_le_bytes(),
        &[4, 3, 2, 1],
        &0xd170_185b_u32.to_le_bytes(),
    ]);
    assert_eq!(bytes[..FRAME_HEADER_BYTES], expected, "crc {crc:08x}");
    assert_eq!(bytes.len(), BLOCK, "padded to a block");
    assert!(bytes[FRAME_HEADER_BYTES + 25..].iter().all(|byte| *byte == 0));
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        identity: identity(),
        segment: SegmentNo::new(3),
        generation: 0x77,
        slot_bytes: 8 << 20,
        oldest_live: SegmentNo::new(2),
        first_seq: 21,
        chain: 0xdead_beef,
        state: HardState {
            vote: Some(Vote { term: Term::new(1), node: NodeId::new(2), committed: true }),
            committed: Some(id(1, 2, 30)),
            purged: None,
            last: Some(id(1, 2, 33)),
        },
    }
}

#[test]
fn version_1_slot_headers_never_change() {
    let n = |value: u64| value.to_le_bytes();
    let mut block = vec![7; BLOCK];
    SlotHeader::Segment(segment_header()).encode(&mut block);
    let expected = le(&[
        b"K3SWALS1",
        &[1, 0, 0, 0],
        &[1, 0, 0, 0],
        &n(0x0c),
        &n(0x0d),
        &n(3),
        &n(0x77),
        &n(8 << 20),
        &n(2),
        &n(21),
        &[0xef, 0xbe, 0xad, 0xde],
        &[0, 0, 0, 0],
        &[0b10111, 0, 0, 0],
        &[0, 0, 0, 0],
        &n(1),
        &n(2),
        &le(&[&n(1), &n(2), &n(30)]),
        &[0; 24],
        &le(&[&n(1), &n(2), &n(33)]),
        &0x05c3_f105_u32.to_le_bytes(),
    ]);
    assert_eq!(block[..180], expected);
    assert!(block[180..].iter().all(|byte| *byte == 0));
    assert_eq!(SlotHeader::decode(&block), Ok(SlotHeader::Segment(segment_header())));

    let spare = SlotHeader::Spare { identity: identity(), slot_bytes: 4 << 20 };
    spare.encode(&mut block);
    assert_eq!(block[12], 2);
    assert_eq!(SlotHeader::decode(&block), Ok(spare));
}

#[test]
fn decoding_gives_back_what_was_encoded() {
    let (bytes, crc) = sealed(&samples());
    let (header, records) = decode_frame(&bytes).unwrap();
    assert_eq!(records, samples());
    assert_eq!((header.seq, header.chain, header.crc), (9, 0xaabb_ccdd, crc));
    assert_eq!((header.replaces, header.replaced_chain), (2, 0x0102_0304));
    assert_eq!(header.check_place(place().generation, place().segment, 5), Ok(()));
    assert!(header.check_place(place().generation, place().segment, 6).is_err());
    assert!(header.check_place(1, place().segment, 5).is_err());
    assert!(header.check_order(10, 0xaabb_ccdd).is_err());
    assert!(header.check_order(9, 0).is_err());
}

#[test]
fn frame_is_compressed_only_when_that_saves_a_block() {
    let large = |payload: Vec<u8>| Record::Entry { id: id(1, 1, 1), payload: payload.into() };
    let mut noise = vec![0; 9000];
    Random::new(3).fill(&mut noise);

    let (bytes, _) = sealed(&[large(vec![b'x'; 9000])]);
    assert_eq!(bytes.len(), BLOCK);
    let (header, records) = decode_frame(&bytes).unwrap();
    assert!(header.flags.has(Flags::LZ4));
    assert_eq!(records, [large(vec![b'x'; 9000])]);

    let (bytes, _) = sealed(&[large(noise.clone())]);
    assert_eq!(bytes.len(), 3 * BLOCK);
    assert!(!FrameHeader::decode(&bytes).unwrap().flags.has(Flags::LZ4));
    assert_eq!(decode_frame(&bytes).unwrap().1, [large(noise)]);

    let (bytes, _) = sealed(&[large(vec![b'x'; 3000])]);
    assert!(!FrameHeader::decode(&bytes).unwrap().flags.has(Flags::LZ4), "one block is one block");
}

#[test]
fn every_flipped_bit_of_a_frame_is_noticed() {
    for records in
        [samples(), vec![Record::Entry { id: id(1, 1, 1), payload: vec![5; 9000].into() }]]
    {
        let (bytes, _) = sealed(&records);
        let header = FrameHeader::decode(&bytes).unwrap();
        for bit in 0..(FRAME_HEADER_BYTES + header.payload_bytes) * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_frame(&flipped).is_err(), "bit {bit}");
        }
    }
}

#[test]
fn every_cut_frame_is_noticed() {
    let (bytes, _) = sealed(&samples());
    let header = FrameHeader::decode(&bytes).unwrap();
    for len in 0..FRAME_HEADER_BYTES + header.payload_bytes {
        assert!(decode_frame(&bytes[..len]).is_err(), "{len} bytes");
    }
}

/// Correct checksums over nonsense: what a bug or an attacker could write.
#[test]
fn nonsense_with_valid_checksums_is_refused_without_large_allocations() {
    let mut random = Random::new(11);
    for round in 0..20_000 {
        let mut bytes = vec![0; FRAME_HEADER_BYTES + random.index(200)];
        random.fill(&mut bytes);
        bytes[..4].copy_from_slice(b"K3WF");
        bytes[4] = 1;
        bytes[5] &= 1;
        let payload = (bytes.len() - FRAME_HEADER_BYTES) as u64;
        let claimed = if random.percent(50) { payload } else { random.next_u64() };
        bytes[8..12].copy_from_slice(&claimed.to_le_bytes()[..4]);
        if random.percent(50) {
            let raw = random.below(5 << 20);
            bytes[12..16].copy_from_slice(&raw.to_le_bytes()[..4]);
        } else {
            bytes.copy_within(8..12, 12);
        }
        bytes[16..20].copy_from_slice(&random.below(4).to_le_bytes()[..4]);
        let crc = crc32c::crc32c(&bytes[FRAME_HEADER_BYTES..]);
        bytes[52..56].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..FRAME_CRC_AT]);
        bytes[FRAME_CRC_AT..FRAME_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        if let Ok((_, records)) = decode_frame(&bytes) {
            assert!(records.len() <= 3, "round {round}: {records:?}");
        }
    }
}

#[test]
fn record_counts_must_match() {
    let mut raw = Vec::new();
    for record in samples() {
        encode_record(&record, &mut raw);
    }
    let defect = |expected| records(&raw, expected).find_map(Result::err);
    assert_eq!(defect(6), None);
    assert_eq!(defect(5), Some(Defect::Count { found: 6, expected: 5 }));
    assert_eq!(defect(7), Some(Defect::Count { found: 6, expected: 7 }));
    assert_eq!(records(&raw, 5).count(), 6, "nothing after the first defect");
    assert_eq!(records(&[99], 1).next(), Some(Err(Defect::Kind { found: 99 })));
}

#[test]
fn newer_versions_are_named() {
    let mut block = vec![0; BLOCK];
    SlotHeader::Segment(segment_header()).encode(&mut block);
    block[8] = 2;
    let crc = crc32c::crc32c(&block[..SLOT_CRC_AT]);
    block[SLOT_CRC_AT..SLOT_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(SlotHeader::decode(&block), Err(Defect::Version { found: 2 }));
    let text = Defect::Version { found: 2 }.to_string();
    assert_eq!(text, "format version 2, this release reads up to 1");
}

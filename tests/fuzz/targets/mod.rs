//! What is fuzzed: everything that reads bytes which somebody else wrote. Shared with `fuzz/` by `#[path]`.
//!
//! A target takes any bytes and returns; it panics only when a promise of the code under test is broken. Where a
//! checksum would turn away every mutation at the door, the first byte of the input says whether the target puts
//! checksums right before it hands the bytes on: then what is behind the door is tried too.

mod bolt;
mod config;
mod flags;
mod identity;
mod join;
mod memory;
mod pki;
pub mod requests;
mod snapshot;
mod token;
mod wal;
mod wal_tools;

/// One entry point.
pub struct Target {
    /// Also the name of its directory in `fuzz/corpus`.
    pub name: &'static str,
    /// How many inputs `cargo test` tries: a second's worth at most.
    pub inputs: usize,
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
        inputs: 20_000,
        seeds: bolt::seeds,
        dictionary: &[b"key", b"meta", &[0xed, 0xda, 0x0c, 0xed]],
        run: bolt::run,
    },
    Target {
        name: "command",
        inputs: 100_000,
        seeds: requests::command_seeds,
        dictionary: &[&[1, 1, 0], &[1, 3, 0], &[1, 3, 1]],
        run: requests::run_command,
    },
    Target {
        name: "config",
        inputs: 1_000,
        seeds: config::seeds,
        dictionary: config::DICTIONARY,
        run: config::run,
    },
    Target {
        name: "flags",
        inputs: 20_000,
        seeds: flags::seeds,
        dictionary: &[&[2, 0, 0, 0], &[1, 1], &[4, 10, 43, 0, 0, 16]],
        run: flags::run,
    },
    Target {
        name: "identity",
        inputs: 50_000,
        seeds: identity::seeds,
        dictionary: identity::DICTIONARY,
        run: identity::run,
    },
    Target {
        name: "join",
        inputs: 2_000,
        seeds: join::seeds,
        dictionary: join::DICTIONARY,
        run: join::run,
    },
    Target {
        name: "pki",
        inputs: 3_000,
        seeds: pki::seeds,
        dictionary: pki::DICTIONARY,
        run: pki::run,
    },
    Target {
        name: "requests",
        inputs: 600,
        seeds: requests::session_seeds,
        dictionary: &[b"a", b"b", b"\0", &[0x40, 0x01], &[0x08, 0x07], &[0x1a, 0x00]],
        run: requests::run_session,
    },
    Target {
        name: "snapshot",
        inputs: 600,
        seeds: snapshot::seeds,
        dictionary: &[b"head", b"format", b"membership", b"alarm"],
        run: snapshot::run,
    },
    Target {
        name: "token",
        inputs: 50_000,
        seeds: token::seeds,
        dictionary: token::DICTIONARY,
        run: token::run,
    },
    Target {
        name: "wal",
        inputs: 600,
        seeds: wal::seeds,
        dictionary: wal::DICTIONARY,
        run: wal::run,
    },
    Target {
        name: "wal_frame",
        inputs: 50_000,
        seeds: wal::frame_seeds,
        dictionary: wal::DICTIONARY,
        run: wal::run_frame,
    },
    Target {
        name: "wal_tools",
        inputs: 30,
        seeds: wal_tools::seeds,
        dictionary: wal::DICTIONARY,
        run: wal_tools::run,
    },
];

/// Reads numbers and pieces off an input; what is not there is zero or empty.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.piece(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> usize {
        usize::from(self.byte()) | usize::from(self.byte()) << 8
    }

    /// So many bytes, or as many as there are.
    fn piece(&mut self, length: usize) -> &'a [u8] {
        let (piece, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        piece
    }

    const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The other way round, for seeds.
fn put_piece(out: &mut Vec<u8>, piece: &[u8]) {
    out.extend(u16::try_from(piece.len()).expect("a short piece").to_le_bytes());
    out.extend_from_slice(piece);
}

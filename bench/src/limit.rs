//! The physical limit: what one program gets from the card that does nothing but write blocks and wait for them.
//!
//! The file is written with zeros once, so that no file metadata changes, and each batch is whole 4 KiB blocks in ascending order. Nothing
//! that survives a power cut can be cheaper; a batch holds as many writes as there are clients.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::load::histogram;

const FILE_BYTES: u64 = 64 << 20;
/// What a log adds to a key and a value.
const ENVELOPE_BYTES: usize = 60;

/// A file of zeros on the card.
pub struct Limit {
    file: File,
}

/// What the card can do.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Writes in a second.
    pub writes_s: f64,
    /// Median of a batch.
    pub p50_ms: f64,
    /// The slowest of a hundred.
    pub p99_ms: f64,
}

impl Limit {
    /// Fills the file.
    pub fn prepare(dir: &Path) -> Result<Self, Box<dyn Error>> {
        let file = File::options().write(true).create(true).truncate(true).open(dir.join("raw"))?;
        let zeros = vec![0; 1 << 20];
        for offset in (0..FILE_BYTES).step_by(zeros.len()) {
            file.write_all_at(&zeros, offset)?;
        }
        file.sync_all()?;
        Ok(Self { file })
    }

    /// Writes batches of `writes` values of `size` bytes for `length`.
    pub fn measure(
        &self,
        writes: usize,
        size: usize,
        length: Duration,
    ) -> Result<Found, Box<dyn Error>> {
        let block = vec![0xa5; (writes * (size + ENVELOPE_BYTES)).next_multiple_of(4096)];
        let mut latencies = histogram();
        let begin = Instant::now();
        let mut offset = 0;
        while begin.elapsed() < length {
            if offset + block.len() as u64 > FILE_BYTES {
                offset = 0;
            }
            let asked = Instant::now();
            self.file.write_all_at(&block, offset)?;
            self.file.sync_data()?;
            latencies.saturating_record(asked.elapsed().as_micros() as u64);
            offset += block.len() as u64;
        }
        let ms = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
        Ok(Found {
            writes_s: latencies.len() as f64 * writes as f64 / begin.elapsed().as_secs_f64(),
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
        })
    }
}

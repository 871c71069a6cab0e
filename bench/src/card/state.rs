//! The card behind the image: what has been counted, what it costs, and what would survive a power cut.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::latency::{Latency, Profile, Rng};
use super::wear::Wear;

/// Bytes of unflushed writes remembered for a power cut; older ones count as durable.
const PENDING_BYTES_MAX: u64 = 64 << 20;

/// A write that no flush has made durable.
struct Pending {
    sequence: u64,
    offset: u64,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// What is counted between two looks at it. All from the start of the card; whoever looks subtracts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Write commands.
    pub writes: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Flush commands.
    pub flushes: u64,
    /// Read commands.
    pub reads: u64,
    /// Bytes programmed in flash by the wear model.
    pub nand_bytes: u64,
    /// Blocks erased by the wear model.
    pub erases: u64,
    /// Microseconds the card was busy.
    pub busy_us: u64,
    /// Stalls, the model's own and injected ones.
    pub stalls: u64,
    /// Length of all stalls.
    pub stalled_ms: u64,
}

/// How a power cut leaves the last write that was under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// Whole or not at all.
    None,
    /// Its first sectors.
    Prefix,
    /// Its first sectors, and noise in the one on which power failed.
    Garbage,
}

/// One card.
pub struct State {
    /// Service times.
    pub latency: Latency,
    wear: Wear,
    /// Size of the image.
    pub size: u64,
    counters: Counters,
    /// Whether requests take time at all.
    pub slow: bool,
    busy_until: Instant,
    started: Instant,
    /// Power is off: every request fails.
    pub cut: bool,
    /// Flushes are acknowledged and not done.
    pub lies: bool,
    /// End of life: writes fail, reads work.
    pub fails_writes: bool,
    /// All service times times this.
    pub factor: f64,
    pending: VecDeque<Pending>,
    pending_bytes: u64,
    sequence: u64,
    wrote_since_flush: bool,
    cached_pages: Vec<u64>,
}

impl State {
    pub fn new(profile: Profile, size: u64, seed: u64) -> Self {
        let now = Instant::now();
        Self {
            wear: Wear::new(&profile, size),
            latency: Latency::new(profile, seed),
            size,
            counters: Counters::default(),
            slow: false,
            busy_until: now,
            started: now,
            cut: false,
            lies: false,
            fails_writes: false,
            factor: 1.0,
            pending: VecDeque::new(),
            pending_bytes: 0,
            sequence: 0,
            wrote_since_flush: false,
            cached_pages: Vec::new(),
        }
    }

    pub fn counters(&self) -> Counters {
        let page = self.latency.p.page_kib * 1024;
        let stalls = &self.latency.stalls;
        Counters {
            nand_bytes: (self.wear.host_pages + self.wear.copy_pages + self.wear.meta_pages) * page,
            erases: self.wear.erases,
            stalls: stalls.iter().map(|stall| stall.count).sum(),
            stalled_ms: stalls.iter().map(|stall| stall.total_ms).sum::<f64>() as u64,
            ..self.counters
        }
    }

    /// The card is one serial device: a request begins when the one before it is done.
    fn charge(&mut self, now: Instant, us: f64) -> Instant {
        if !self.slow {
            return now;
        }
        let us = us * self.factor;
        self.counters.busy_us += us as u64;
        self.busy_until = self.busy_until.max(now) + Duration::from_nanos((us * 1_000.0) as u64);
        self.busy_until
    }

    /// Takes a write; says when it is done.
    pub fn write(
        &mut self,
        image: &File,
        offset: u64,
        data: &[u8],
        now: Instant,
    ) -> io::Result<Instant> {
        let length = data.len() as u64;
        if self.cut || self.fails_writes || offset + length > self.size || length == 0 {
            return Err(io::ErrorKind::Other.into());
        }
        self.remember(image, offset, data)?;
        image.write_all_at(data, offset)?;
        self.counters.writes += 1;
        self.counters.bytes += length;
        self.wrote_since_flush = true;
        let mut us = self.latency.write_us(offset, length);
        self.program(offset, length);
        if self.slow {
            let mib = self.wear.host_bytes() as f64 / f64::from(1 << 20);
            us += self.latency.stall_us(mib, self.started.elapsed().as_secs_f64());
        }
        Ok(self.charge(now, us))
    }

    fn remember(&mut self, image: &File, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut old = vec![0; data.len()];
        image.read_exact_at(&mut old, offset)?;
        self.sequence += 1;
        let sequence = self.sequence;
        self.pending.push_back(Pending { sequence, offset, old, new: data.to_vec() });
        self.pending_bytes += data.len() as u64;
        while self.pending_bytes > PENDING_BYTES_MAX
            && let Some(oldest) = self.pending.pop_front()
        {
            self.pending_bytes -= oldest.new.len() as u64;
        }
        Ok(())
    }

    /// A card with a cache programs when it flushes; one without programs the whole pages each command touches.
    fn program(&mut self, offset: u64, length: u64) {
        let page = self.latency.p.page_kib * 1024;
        let pages = offset / page..=(offset + length - 1) / page;
        if !self.latency.p.cache {
            pages.for_each(|page| self.wear.host_program(page));
            return;
        }
        self.cached_pages.extend(pages);
        if self.cached_pages.len() as u64 * page > self.latency.p.cache_kib * 1024 {
            self.drain_cache();
        }
    }

    fn drain_cache(&mut self) -> u64 {
        let mut pages = std::mem::take(&mut self.cached_pages);
        pages.sort_unstable();
        pages.dedup();
        pages.iter().for_each(|page| self.wear.host_program(*page));
        pages.len() as u64
    }

    /// Takes a read; says when it is done.
    pub fn read(&mut self, offset: u64, length: u64, now: Instant) -> Instant {
        self.counters.reads += 1;
        let us = self.latency.read_us(offset, length);
        self.charge(now, us)
    }

    /// Takes a flush; says when it is done, and up to which write it makes durable.
    pub fn flush(&mut self, now: Instant) -> (Instant, u64) {
        self.counters.flushes += 1;
        let clean = !std::mem::take(&mut self.wrote_since_flush);
        let pages = self.drain_cache();
        let us = self.latency.flush_us(pages, clean);
        (self.charge(now, us), self.sequence)
    }

    /// Takes a discard; says when it is done.
    pub fn discard(&mut self, now: Instant) -> Instant {
        let us = self.latency.p.cmd_us.min(400.0);
        self.charge(now, us)
    }

    /// A flush is done.
    pub fn durable_up_to(&mut self, sequence: u64) {
        if self.lies || self.cut {
            return;
        }
        while self.pending.front().is_some_and(|pending| pending.sequence <= sequence) {
            if let Some(pending) = self.pending.pop_front() {
                self.pending_bytes -= pending.new.len() as u64;
            }
        }
    }

    /// Busy from now on, whether or not a request comes.
    pub fn stall(&mut self, length: Duration) {
        self.busy_until = self.busy_until.max(Instant::now()) + length;
        self.counters.busy_us += length.as_micros() as u64;
        if let Some(injected) = self.latency.stalls.last_mut() {
            injected.count += 1;
            injected.total_ms += length.as_secs_f64() * 1e3;
        }
    }

    /// Makes requests take time, or not.
    pub fn set_slow(&mut self, slow: bool) {
        self.slow = slow;
        self.busy_until = Instant::now();
    }

    /// Power comes back: the image holds what was durable, and each unflushed write with probability `keep`; one is torn.
    pub fn restore(
        &mut self,
        image: &File,
        keep: f64,
        tear: Tear,
        seed: u64,
    ) -> io::Result<(usize, usize)> {
        let pending = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        for write in pending.iter().rev() {
            image.write_all_at(&write.old, write.offset)?;
        }
        let mut random = Rng::new(seed);
        let torn = (tear != Tear::None && !pending.is_empty())
            .then(|| random.below(pending.len() as u64) as usize);
        let (mut kept, mut dropped) = (0, 0);
        for (index, write) in pending.iter().enumerate() {
            if torn == Some(index) && write.new.len() > 512 {
                image.write_all_at(&torn_write(&write.new, tear, &mut random), write.offset)?;
            } else if random.f() < keep {
                image.write_all_at(&write.new, write.offset)?;
                kept += 1;
            } else {
                dropped += 1;
            }
        }
        self.cut = false;
        self.busy_until = Instant::now();
        self.wrote_since_flush = false;
        self.cached_pages.clear();
        Ok((kept, dropped))
    }
}

fn torn_write(new: &[u8], tear: Tear, random: &mut Rng) -> Vec<u8> {
    let whole = (1 + random.below(new.len() as u64 / 512 - 1)) as usize * 512;
    let mut data = new[..whole].to_vec();
    if tear == Tear::Garbage {
        let noise = (new.len() - whole).min(512);
        data.extend((0..noise).map(|_| random.next() as u8));
    }
    data
}

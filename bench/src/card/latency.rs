//! How long a card takes: service time of each request, and when it stalls.
//!
//! # Shape
//! A [`Profile`] is numbers from a JSON file. A [`Latency`] is one card of that profile: it remembers which erase units are open and
//! where sequential streams end, as a card's controller does, because that decides what a write costs.
//!
//! # Not here
//! Time. Callers ask for microseconds and wait themselves.

use serde::Deserialize;

/// A kind of pause the card makes to tidy up.
#[derive(Clone, Debug, Deserialize)]
pub struct StallSpec {
    /// mean MiB of host-caused NAND programming between stalls (exponential gaps)
    pub per_mib: Option<f64>,
    /// mean seconds between stalls (exponential gaps); fires on the next write
    pub per_s: Option<f64>,
    pub ms_lo: f64,
    pub ms_hi: f64,
}

/// Numbers of a kind of card; `profiles/` has them with their reasons.
#[derive(Clone, Debug, Deserialize)]
pub struct Profile {
    pub cmd_us: f64,
    pub bw_write_mb: f64,
    pub bw_read_mb: f64,
    pub read_cmd_us: f64,
    pub read_rand_us: f64,
    pub open_units: usize,
    pub unit_kib: u64,
    pub in_unit_us: f64,
    pub switch_us: f64,
    pub rmw_us: f64,
    pub jitter_sigma: f64,
    pub cache: bool,
    pub cache_kib: u64,
    pub flush_us: f64,
    pub flush_page_us: f64,
    pub flush_clean_us: f64,
    pub stalls: Vec<StallSpec>,
    pub ftl: String,
    pub page_kib: u64,
    pub spare_units: usize,
    pub meta_every_pages: u64,
    /// hybrid only: size of the log/merge region (an erase unit holds several)
    #[serde(default)]
    pub merge_kib: u64,
    /// hybrid only: number of log regions
    #[serde(default)]
    pub merge_logs: usize,
}

pub struct Rng(u64);
impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed.wrapping_mul(0x9E3779B97F4A7C15) ^ 0xD1B54A32D192ED03)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E3779B97F4A7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
        z ^ (z >> 31)
    }
    pub fn f(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }
    pub fn exp(&mut self, mean: f64) -> f64 {
        -self.f().ln() * mean
    }
    pub fn gauss(&mut self) -> f64 {
        let (a, b) = (self.f(), self.f());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}
#[derive(Default, Clone, Debug)]
pub struct StallStat {
    pub count: u64,
    pub total_ms: f64,
    pub max_ms: f64,
}

/// One card: what it remembers of the requests before this one.
pub struct Latency {
    pub p: Profile,
    pub rng: Rng,
    open: Vec<u64>,    // units, most recent last
    streams: Vec<u64>, // write end offsets, most recent last
    last_read_end: u64,
    next_mib: Vec<f64>,
    next_s: Vec<f64>,
    pub stalls: Vec<StallStat>,
    pub n_seq: u64,
    pub n_in_unit: u64,
    pub n_switch: u64,
    pub n_rmw: u64,
}

impl Latency {
    pub fn new(p: Profile, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut next_mib = vec![];
        let mut next_s = vec![];
        let mut stalls = vec![];
        for s in &p.stalls {
            next_mib.push(s.per_mib.map(|m| rng.exp(m)).unwrap_or(f64::INFINITY));
            next_s.push(s.per_s.map(|m| rng.exp(m)).unwrap_or(f64::INFINITY));
            stalls.push(StallStat::default());
        }
        stalls.push(StallStat::default());
        Latency {
            p,
            rng,
            open: vec![],
            streams: vec![],
            last_read_end: u64::MAX,
            next_mib,
            next_s,
            stalls,
            n_seq: 0,
            n_in_unit: 0,
            n_switch: 0,
            n_rmw: 0,
        }
    }
    fn jitter(&mut self) -> f64 {
        if self.p.jitter_sigma == 0.0 {
            return 1.0;
        }
        let g = self.rng.gauss();
        (g * self.p.jitter_sigma).exp().clamp(0.5, 6.0)
    }
    /// returns service time in microseconds
    pub fn write_us(&mut self, off: u64, len: u64) -> f64 {
        let unit_b = self.p.unit_kib * 1024;
        let page_b = self.p.page_kib * 1024;
        let unit = off / unit_b;
        let seq = self.streams.iter().position(|e| *e == off);
        let open = self.open.iter().position(|u| *u == unit);
        let mut us = self.p.cmd_us;
        if self.p.bw_write_mb > 0.0 {
            us += len as f64 / self.p.bw_write_mb;
        }
        if seq.is_some() && open.is_some() {
            self.n_seq += 1;
        } else if open.is_some() {
            self.n_in_unit += 1;
            us += self.p.in_unit_us;
        } else if seq.is_some() {
            self.n_seq += 1; // stream crossing into the next unit
        } else {
            self.n_switch += 1;
            us += self.p.switch_us;
        }
        let head = off % page_b != 0 && seq.is_none();
        let tail = (off + len) % page_b != 0;
        let single = off / page_b == (off + len - 1) / page_b;
        let parts = if single {
            (head || (tail && seq.is_none())) as u32
        } else {
            head as u32 + tail as u32
        };
        self.n_rmw += parts as u64;
        us += parts as f64 * self.p.rmw_us;
        us *= self.jitter();
        // bookkeeping
        for u in unit..=(off + len - 1) / unit_b {
            if let Some(i) = self.open.iter().position(|x| *x == u) {
                self.open.remove(i);
            }
            self.open.push(u);
            if self.open.len() > self.p.open_units {
                self.open.remove(0);
            }
        }
        if let Some(i) = seq {
            self.streams.remove(i);
        }
        self.streams.push(off + len);
        if self.streams.len() > self.p.open_units {
            self.streams.remove(0);
        }
        us
    }
    pub fn read_us(&mut self, off: u64, len: u64) -> f64 {
        let mut us = self.p.read_cmd_us;
        if self.p.bw_read_mb > 0.0 {
            us += len as f64 / self.p.bw_read_mb;
        }
        if off != self.last_read_end {
            us += self.p.read_rand_us;
        }
        self.last_read_end = off + len;
        us * self.jitter()
    }
    pub fn flush_us(&mut self, dirty_pages: u64, clean: bool) -> f64 {
        if clean {
            return self.p.flush_clean_us * self.jitter();
        }
        (self.p.flush_us + self.p.flush_page_us * dirty_pages.min(64) as f64) * self.jitter()
    }
    /// stall time (us) due now, given total NAND MiB programmed and device uptime
    pub fn stall_us(&mut self, nand_mib: f64, up_s: f64) -> f64 {
        let mut tot = 0.0;
        for i in 0..self.p.stalls.len() {
            let s = self.p.stalls[i].clone();
            let mut fire = 0;
            if let Some(m) = s.per_mib {
                while nand_mib >= self.next_mib[i] {
                    self.next_mib[i] += self.rng.exp(m).max(0.05);
                    fire += 1;
                }
            }
            if let Some(m) = s.per_s {
                if up_s >= self.next_s[i] {
                    self.next_s[i] = up_s + self.rng.exp(m);
                    fire += 1;
                }
            }
            for _ in 0..fire {
                // log-uniform duration
                let ms = (s.ms_lo.ln() + self.rng.f() * (s.ms_hi.ln() - s.ms_lo.ln())).exp();
                let st = &mut self.stalls[i];
                st.count += 1;
                st.total_ms += ms;
                st.max_ms = st.max_ms.max(ms);
                tot += ms * 1000.0;
            }
        }
        tot
    }
}

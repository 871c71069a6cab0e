//! What the card's flash chips wear: an estimate of the bytes programmed and the blocks erased behind the requests.
//!
//! # Not here
//! Wear levelling and bit errors. TRIM brings nothing: the card is taken to be full of other data.

use super::latency::Profile;

/// Wear estimate. Two kinds:
///  page   - page mapped, log structured, greedy GC with a bounded spare pool
///  hybrid - block mapped units with a small number of page-appended log units,
///           merged (copying every still valid page) when filled or evicted
pub struct Wear {
    hybrid: bool,
    page: u64,
    ppu: u32, // pages per unit
    npages: u64,
    pub host_pages: u64,
    pub copy_pages: u64,
    pub meta_pages: u64,
    pub erases: u64,
    meta_every: u64,
    meta_ctr: u64,
    // page mapped
    map: Vec<u32>,   // logical page -> physical page (u32::MAX = none)
    rmap: Vec<u32>,  // physical page -> logical page
    valid: Vec<u16>, // per unit
    free: Vec<u32>,  // free units
    cur: u32,
    cur_n: u32,
    closed: Vec<bool>,
    // hybrid
    logs: Vec<LogUnit>,
    max_logs: usize,
    pub merges: u64,
    unit_ppu: u32,
    consumed: u64,
}
struct LogUnit {
    unit: u64,
    used: u32,
    sequential: bool,
    seen: Vec<bool>,
}

impl Wear {
    pub fn new(p: &Profile, size: u64) -> Self {
        let page = p.page_kib * 1024;
        let unit_ppu = (p.unit_kib / p.page_kib) as u32;
        let ppu = if p.ftl == "hybrid" && p.merge_kib > 0 {
            (p.merge_kib / p.page_kib) as u32
        } else {
            unit_ppu
        };
        let npages = size.div_ceil(page);
        let hybrid = p.ftl == "hybrid";
        let units = npages.div_ceil(ppu as u64) as usize + p.spare_units.max(2);
        let mut f = Wear {
            hybrid,
            page,
            ppu,
            npages,
            host_pages: 0,
            copy_pages: 0,
            meta_pages: 0,
            erases: 0,
            meta_every: p.meta_every_pages.max(1),
            meta_ctr: 0,
            map: vec![],
            rmap: vec![],
            valid: vec![],
            free: vec![],
            cur: 0,
            cur_n: 0,
            closed: vec![],
            logs: vec![],
            max_logs: if p.merge_logs > 0 { p.merge_logs } else { p.open_units.max(1) },
            merges: 0,
            unit_ppu,
            consumed: 0,
        };
        if !hybrid {
            // The card is assumed to be full of static data outside this image, and every logical
            // page of the image counts as valid from the start (no TRIM on a used card).
            f.map = (0..npages as u32).collect();
            f.rmap = vec![u32::MAX; units * ppu as usize];
            for l in 0..npages as usize {
                f.rmap[l] = l as u32;
            }
            f.valid = vec![0; units];
            f.closed = vec![false; units];
            for u in 0..units {
                let s = u as u64 * ppu as u64;
                let v = npages.saturating_sub(s).min(ppu as u64) as u16;
                f.valid[u] = v;
                if v > 0 { f.closed[u] = true } else { f.free.push(u as u32) }
            }
            f.cur = f.free.pop().unwrap();
        }
        f
    }
    pub fn host_bytes(&self) -> u64 {
        self.host_pages * self.page
    }

    fn meta(&mut self, n: u64) {
        self.meta_ctr += n;
        while self.meta_ctr >= self.meta_every {
            self.meta_ctr -= self.meta_every;
            self.meta_pages += 1;
        }
    }
    fn program(&mut self, l: u32) {
        if self.cur_n == self.ppu {
            self.closed[self.cur as usize] = true;
            self.cur = self.free.pop().unwrap_or_else(|| panic!("ftl out of units"));
            self.cur_n = 0;
        }
        let old = self.map[l as usize];
        if old != u32::MAX {
            self.valid[(old / self.ppu) as usize] -= 1;
            self.rmap[old as usize] = u32::MAX;
        }
        let ph = self.cur * self.ppu + self.cur_n;
        self.cur_n += 1;
        self.map[l as usize] = ph;
        self.rmap[ph as usize] = l;
        self.valid[self.cur as usize] += 1;
    }
    fn gc(&mut self) {
        while self.free.len() < 2 {
            let mut best = (u16::MAX, u32::MAX);
            for u in 0..self.valid.len() {
                if self.closed[u] && self.valid[u] < best.0 {
                    best = (self.valid[u], u as u32);
                }
            }
            let u = best.1;
            if u == u32::MAX || best.0 as u32 >= self.ppu {
                break;
            }
            self.closed[u as usize] = false;
            for i in 0..self.ppu {
                let l = self.rmap[(u * self.ppu + i) as usize];
                if l != u32::MAX {
                    self.program(l);
                    self.copy_pages += 1;
                }
            }
            self.erases += 1;
            self.free.push(u);
        }
    }
    fn merge(&mut self, i: usize) {
        let l = self.logs.swap_remove(i);
        let distinct = l.seen.iter().filter(|b| **b).count() as u32;
        if l.sequential && l.used == self.ppu {
            // switch merge, nothing to copy
        } else if l.sequential {
            self.copy_pages += (self.ppu - distinct) as u64; // partial merge
        } else {
            self.copy_pages += self.ppu as u64; // full merge
            self.consumed += self.ppu as u64;
        }
        // pages consumed are erased sooner or later, a whole erase unit at a time
        self.consumed += self.ppu as u64;
        while self.consumed >= self.unit_ppu as u64 {
            self.consumed -= self.unit_ppu as u64;
            self.erases += 1;
        }
        self.merges += 1;
    }
    /// one NAND page program caused by the host
    pub fn host_program(&mut self, lpage: u64) {
        if lpage >= self.npages {
            return;
        }
        self.host_pages += 1;
        self.meta(1);
        if !self.hybrid {
            self.program(lpage as u32);
            self.gc();
            return;
        }
        let unit = lpage / self.ppu as u64;
        let idx = (lpage % self.ppu as u64) as usize;
        let pos = match self.logs.iter().position(|l| l.unit == unit) {
            Some(p) => p,
            None => {
                if self.logs.len() >= self.max_logs {
                    self.merge(0)
                }
                let n = self.ppu as usize;
                self.logs.push(LogUnit { unit, used: 0, sequential: true, seen: vec![false; n] });
                self.logs.len() - 1
            }
        };
        let l = self.logs.remove(pos);
        self.logs.push(l); // most recently used last
        let l = self.logs.last_mut().unwrap();
        if l.used as usize != idx {
            l.sequential = false
        }
        l.used += 1;
        l.seen[idx] = true;
        if l.used == self.ppu {
            let i = self.logs.len() - 1;
            self.merge(i);
        }
    }
}

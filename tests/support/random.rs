//! A small seeded random generator, so that a printed seed repeats a run exactly.

/// SplitMix64: every seed is good, and its state is one number.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed in the variable `name`, or a new one from the kernel; printed either way.
    pub fn from_env(name: &str) -> (Self, u64) {
        let seed = std::env::var(name).ok().map_or_else(
            || getrandom::u64().expect("random numbers from the kernel"),
            |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        );
        println!("{name}={seed}");
        (Self::new(seed), seed)
    }

    /// Chance from the seed in this environment variable, else from `seed`: the same every time.
    pub fn from_env_or(name: &str, seed: u64) -> (Self, u64) {
        if std::env::var_os(name).is_some() {
            return Self::from_env(name);
        }
        println!("{name}={seed}");
        (Self::new(seed), seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        assert!(0 < end);
        usize::try_from(self.next_u64() % end as u64).expect("below a usize")
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

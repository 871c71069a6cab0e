//! Decides who may hold how many bytes of answers.
//!
//! An account is a connection. What it holds may not exceed its own maximum, nor what would still be free beside it: the
//! more accounts hold on to theirs, the less is in reach of each, and the last of the room is never one account's. A
//! small minimum is every account's in any case, so that somebody who reads is served however many others do not.
//!
//! An answer larger than an account's maximum takes the one *large place* there is instead. It waits for nobody but
//! another such answer, and so cannot be starved by small ones.
//!
//! # Shape
//!
//! Pure: no clock, no waiting. [`Core::take`] answers at once; [`Core::wait`] queues, and whatever gives room back
//! returns who of the queue now has some. The queue is in order of arrival, but who fits passes who does not.
//!
//! # Invariants
//!
//! - `used` is the sum of all parts held. It exceeds the total at most by the minimum of each account, unless
//!   [`Core::force`] was used.
//! - Nobody in the queue fits: whatever changes that hands the room out in the same call.

use std::collections::{HashMap, VecDeque};

/// An account, unique while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct AccountKey(u64);

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// Bounds in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) total: u64,
    pub(super) account: u64,
    pub(super) account_min: u64,
}

/// Room that is held. Not `Clone`: it is given back once.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// So many bytes of the account's part.
    Part(u64),
    /// The large place: as many bytes as it takes.
    Large,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    ticket: Ticket,
    account: AccountKey,
    bytes: u64,
}

/// Room handed out to somebody who waited.
pub(super) type Granted = Vec<(Ticket, Hold)>;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Core {
    limits: Limits,
    used: u64,
    large_taken: bool,
    held: HashMap<AccountKey, u64>,
    queue: VecDeque<Waiting>,
    keys_made: u64,
}

impl Core {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            used: 0,
            large_taken: false,
            held: HashMap::new(),
            queue: VecDeque::new(),
            keys_made: 0,
        }
    }

    pub(super) fn open(&mut self) -> AccountKey {
        self.keys_made += 1;
        AccountKey(self.keys_made)
    }

    pub(super) const fn used(&self) -> u64 {
        self.used
    }

    /// What an account holds in parts.
    pub(super) fn held(&self, account: AccountKey) -> u64 {
        self.held.get(&account).copied().unwrap_or(0)
    }

    /// Room at once, or none.
    pub(super) fn take(&mut self, account: AccountKey, bytes: u64) -> Option<Hold> {
        if self.limits.account < bytes {
            return (!std::mem::replace(&mut self.large_taken, true)).then_some(Hold::Large);
        }
        if !self.fits(account, bytes) {
            return None;
        }
        self.add(account, bytes);
        Some(Hold::Part(bytes))
    }

    /// Queues for room that [`Core::take`] just refused.
    pub(super) fn wait(&mut self, account: AccountKey, bytes: u64) -> Ticket {
        self.keys_made += 1;
        let ticket = Ticket(self.keys_made);
        self.queue.push_back(Waiting { ticket, account, bytes });
        ticket
    }

    /// Leaves the queue.
    pub(super) fn leave(&mut self, ticket: Ticket) {
        self.queue.retain(|waiting| waiting.ticket != ticket);
    }

    /// Whether others keep this account from its bytes: it would fit if they held nothing.
    pub(super) fn is_kept_waiting(&self, account: AccountKey, bytes: u64) -> bool {
        let held = self.held(account);
        self.limits.account < bytes || held + bytes <= self.limits.account
    }

    /// Makes what is held at least `bytes` large; `None` if there is no room.
    pub(super) fn grow(
        &mut self,
        account: AccountKey,
        hold: &mut Hold,
        bytes: u64,
    ) -> Option<Granted> {
        let part = match *hold {
            Hold::Large => return Some(Granted::new()),
            Hold::Part(part) if bytes <= part => return Some(Granted::new()),
            Hold::Part(part) => part,
        };
        if bytes <= self.limits.account {
            let more = bytes - part;
            if !self.fits(account, more) {
                return None;
            }
            self.add(account, more);
            *hold = Hold::Part(bytes);
            return Some(Granted::new());
        }
        if std::mem::replace(&mut self.large_taken, true) {
            return None;
        }
        self.subtract(account, part);
        *hold = Hold::Large;
        Some(self.hand_out())
    }

    /// Makes what is held exactly `bytes` large, room or not: they are in memory already.
    #[must_use]
    pub(super) fn force(&mut self, account: AccountKey, hold: &mut Hold, bytes: u64) -> Granted {
        match *hold {
            Hold::Part(part) if part < bytes => self.add(account, bytes - part),
            Hold::Part(part) => self.subtract(account, part - bytes),
            // Small after all: others may need the place.
            Hold::Large if self.limits.account < bytes || !self.fits(account, bytes) => {
                return Granted::new();
            }
            Hold::Large => {
                self.add(account, bytes);
                self.large_taken = false;
            }
        }
        *hold = Hold::Part(bytes);
        self.hand_out()
    }

    /// Gives room back.
    #[must_use]
    pub(super) fn give_back(&mut self, account: AccountKey, hold: Hold) -> Granted {
        match hold {
            Hold::Part(bytes) => self.subtract(account, bytes),
            Hold::Large => self.large_taken = false,
        }
        self.hand_out()
    }

    fn hand_out(&mut self) -> Granted {
        let mut granted = Granted::new();
        let waiting = std::mem::take(&mut self.queue);
        for one in waiting {
            match self.take(one.account, one.bytes) {
                Some(hold) => granted.push((one.ticket, hold)),
                None => self.queue.push_back(one),
            }
        }
        granted
    }

    /// Whether so much more is all right, by what is then held and what is then still free.
    fn fits(&self, account: AccountKey, bytes: u64) -> bool {
        let held = self.held(account) + bytes;
        let free = self.limits.total.saturating_sub(self.used + bytes);
        held <= self.limits.account_min || held <= self.limits.account.min(free)
    }

    fn add(&mut self, account: AccountKey, bytes: u64) {
        self.used += bytes;
        *self.held.entry(account).or_default() += bytes;
    }

    fn subtract(&mut self, account: AccountKey, bytes: u64) {
        self.used -= bytes;
        if let Some(held) = self.held.get_mut(&account) {
            *held -= bytes;
            if *held == 0 {
                self.held.remove(&account);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const LIMITS: Limits = Limits { total: 64, account: 16, account_min: 0 };

    fn part(hold: Option<Hold>) -> u64 {
        match hold {
            Some(Hold::Part(bytes)) => bytes,
            other => panic!("expected a part, found {other:?}"),
        }
    }

    /// Takes until nothing more is given.
    fn hog(core: &mut Core, account: AccountKey, bytes: u64) -> u64 {
        std::iter::from_fn(|| core.take(account, bytes)).map(|hold| part(Some(hold))).sum()
    }

    #[test]
    fn one_account_gets_its_maximum_and_leaves_the_rest() {
        let mut core = Core::new(LIMITS);
        let (greedy, modest) = (core.open(), core.open());
        assert_eq!(hog(&mut core, greedy, 4), 16);
        assert_eq!(hog(&mut core, modest, 4), 16);
        assert_eq!((core.used(), core.held(greedy)), (32, 16));
    }

    #[test]
    fn each_of_many_gets_less_and_the_last_room_is_nobodys_alone() {
        let limits = Limits { total: 64 << 10, account: 16 << 10, account_min: 0 };
        let mut core = Core::new(limits);
        let accounts: Vec<_> = (0..9).map(|_| core.open()).collect();
        let got: Vec<_> =
            accounts.iter().map(|account| hog(&mut core, *account, 1 << 10)).collect();
        assert_eq!(got, [16, 16, 16, 8, 4, 2, 1, 0, 0].map(|kib| kib << 10));
    }

    #[test]
    fn however_many_hold_on_to_theirs_everybody_gets_the_minimum() {
        let limits = Limits { total: 64 << 10, account: 16 << 10, account_min: 16 };
        let mut core = Core::new(limits);
        for hogs in 0..3_000 {
            let account = core.open();
            assert!(16 <= hog(&mut core, account, 16), "number {hogs} got nothing");
        }
        assert!(core.used() <= limits.total + 3_000 * limits.account_min, "{}", core.used());
    }

    #[test]
    fn room_given_back_goes_to_those_who_fit_in_order_of_arrival() {
        let mut core = Core::new(LIMITS);
        let (a, b) = (core.open(), core.open());
        let first = core.take(a, 10).unwrap();
        let second = core.take(a, 6).unwrap();
        assert_eq!(core.take(a, 8), None);
        let [large, small, tiny] = [8, 5, 2].map(|bytes| core.wait(a, bytes));
        let other = core.wait(b, 1);

        let granted = core.give_back(a, second);
        assert_eq!(granted, [(small, Hold::Part(5)), (other, Hold::Part(1))]);
        core.leave(tiny);
        assert_eq!(core.give_back(a, first), [(large, Hold::Part(8))]);
        assert_eq!(core.held(a), 13);
    }

    #[test]
    fn answers_larger_than_an_account_go_one_at_a_time_whatever_else_is_held() {
        let mut core = Core::new(LIMITS);
        let accounts: Vec<_> = (0..9).map(|_| core.open()).collect();
        for account in &accounts {
            hog(&mut core, *account, 1);
        }
        let used = core.used();
        let first = core.take(accounts[0], 1_000_000).unwrap();
        assert_eq!((&first, core.used()), (&Hold::Large, used));
        assert_eq!(core.take(accounts[1], 17), None);
        let next = core.wait(accounts[1], 17);
        assert!(core.is_kept_waiting(accounts[1], 17));
        assert_eq!(core.give_back(accounts[0], first), [(next, Hold::Large)]);
    }

    #[test]
    fn growing_moves_to_the_large_place_and_settling_back_from_it() {
        let mut core = Core::new(LIMITS);
        let account = core.open();
        let mut hold = core.take(account, 4).unwrap();
        for bytes in [12, 3] {
            assert_eq!(core.grow(account, &mut hold, bytes), Some(vec![]));
            assert_eq!(hold, Hold::Part(12));
        }
        let waiting = core.wait(account, 9);
        assert_eq!(core.grow(account, &mut hold, 40), Some(vec![(waiting, Hold::Part(9))]));
        drop(core.give_back(account, Hold::Part(9)));
        assert_eq!((&hold, core.used()), (&Hold::Large, 0));
        let mut second = core.take(account, 10).unwrap();
        assert_eq!(core.grow(account, &mut second, 17), None);
        let waiting = core.wait(account, 20);

        assert_eq!(core.force(account, &mut hold, 5), [(waiting, Hold::Large)]);
        assert_eq!((hold, core.used()), (Hold::Part(5), 15));
    }

    #[test]
    fn what_is_in_memory_already_counts_even_where_there_was_no_room() {
        let mut core = Core::new(LIMITS);
        let account = core.open();
        let mut hold = core.take(account, 16).unwrap();
        assert_eq!(core.force(account, &mut hold, 30), []);
        assert_eq!((core.held(account), core.take(account, 1)), (30, None));
        assert!(!core.is_kept_waiting(account, 1), "it stands in its own way");
        let waiting = core.wait(account, 1);
        assert_eq!(core.give_back(account, hold), [(waiting, Hold::Part(1))]);
    }

    #[test]
    fn random_histories_keep_the_sums_and_leave_nobody_waiting_who_fits() {
        let mut state = 11_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            (state >> 33) % below
        };
        let mut core = Core::new(LIMITS);
        let accounts: Vec<_> = (0..5).map(|_| core.open()).collect();
        let mut holds: Vec<(AccountKey, Hold)> = Vec::new();
        let mut waiting: BTreeMap<Ticket, AccountKey> = BTreeMap::new();
        for _ in 0..20_000 {
            let account = accounts[usize::try_from(random(5)).unwrap()];
            let picked = usize::try_from(random(holds.len().max(1) as u64)).unwrap();
            let granted = match random(5) {
                _ if 30 < waiting.len() => {
                    let given_up = *waiting.keys().next().unwrap();
                    waiting.remove(&given_up);
                    core.leave(given_up);
                    Granted::new()
                }
                0 | 1 => {
                    let bytes = random(24);
                    match core.take(account, bytes) {
                        Some(hold) => holds.push((account, hold)),
                        None => {
                            waiting.insert(core.wait(account, bytes), account);
                        }
                    }
                    Granted::new()
                }
                2 if picked < holds.len() => {
                    let (account, hold) = &mut holds[picked];
                    core.grow(*account, hold, random(24)).unwrap_or_default()
                }
                3 if picked < holds.len() => {
                    let (account, hold) = &mut holds[picked];
                    core.force(*account, hold, random(12))
                }
                _ if picked < holds.len() => {
                    let (account, hold) = holds.swap_remove(picked);
                    core.give_back(account, hold)
                }
                _ => Granted::new(),
            };
            for (ticket, hold) in granted {
                holds.push((waiting.remove(&ticket).unwrap(), hold));
            }
            let parts = |of: Option<AccountKey>| -> u64 {
                let mine = holds.iter().filter(|(account, _)| of.is_none_or(|of| of == *account));
                mine.map(|(_, hold)| if let Hold::Part(bytes) = hold { *bytes } else { 0 }).sum()
            };
            assert_eq!(core.used(), parts(None));
            assert!(accounts.iter().all(|account| core.held(*account) == parts(Some(*account))));
            assert!(holds.iter().filter(|(_, hold)| *hold == Hold::Large).count() <= 1);
            assert_eq!(core.queue.len(), waiting.len());
            assert!(core.queue.iter().all(|one| match one.bytes {
                17.. => core.large_taken,
                bytes => !core.fits(one.account, bytes),
            }));
        }
        while let Some((account, hold)) = holds.pop() {
            for (ticket, hold) in core.give_back(account, hold) {
                holds.push((waiting.remove(&ticket).unwrap(), hold));
            }
        }
        assert_eq!((core.used(), waiting.len(), core.held.len()), (0, 0, 0));
    }
}

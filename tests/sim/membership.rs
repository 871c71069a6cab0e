//! Who votes, read from an entry's bytes with code of its own.

use std::collections::BTreeSet;

use k3s_server::proto::node as wire;
use prost::Message;

/// The first byte of a membership entry.
const MEMBERSHIP: u8 = 0x80;

/// The voters of one membership: one set, or two while it changes. A majority of each decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Voters(Vec<BTreeSet<u64>>);

impl Voters {
    /// The membership in an entry, if that is what it is.
    pub(crate) fn of_payload(payload: &[u8]) -> Option<Self> {
        let (first, rest) = payload.split_first()?;
        if *first != MEMBERSHIP {
            return None;
        }
        wire::Membership::decode(rest).ok().map(|membership| Self::of_wire(&membership))
    }

    fn of_wire(membership: &wire::Membership) -> Self {
        let sets = membership.configs.iter().map(|set| set.ids.iter().copied().collect());
        Self(sets.collect())
    }

    /// Whether those of whom `has` is true are a majority of every set.
    pub(crate) fn is_quorum(&self, has: impl Fn(u64) -> bool) -> bool {
        !self.0.is_empty()
            && self.0.iter().all(|set| {
                let votes = set.iter().filter(|id| has(**id)).count();
                set.len() < 2 * votes
            })
    }

    /// All of them.
    pub(crate) fn ids(&self) -> BTreeSet<u64> {
        self.0.iter().flatten().copied().collect()
    }
}

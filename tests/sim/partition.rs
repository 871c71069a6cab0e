//! Shapes of partitions, as sets of cut directions.

use std::collections::BTreeSet;

use k3s_server::testkit::Random;
use k3s_server::types::NodeId;

/// See each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Two halves that do not hear each other.
    Halves,
    /// One node alone.
    Alone,
    /// One node hears others, and is not heard.
    Mute,
    /// One node is heard, and hears nobody.
    Deaf,
    /// Two halves, and one node that reaches both.
    Bridge,
    /// Everybody reaches its two neighbours only.
    Ring,
    /// The same, and the ends do not reach each other.
    Chain,
    /// Any direction may be cut.
    Anything,
}

impl Shape {
    pub(crate) const ALL: &'static [Self] = &[
        Self::Halves,
        Self::Alone,
        Self::Mute,
        Self::Deaf,
        Self::Bridge,
        Self::Ring,
        Self::Chain,
        Self::Anything,
    ];

    /// Which directions are cut, with the parts dealt out by chance.
    pub(crate) fn cuts(self, ids: &[NodeId], random: &mut Random) -> BTreeSet<(NodeId, NodeId)> {
        let mut order = ids.to_vec();
        for at in (1..order.len()).rev() {
            order.swap(at, random.index(at + 1));
        }
        self.cuts_in_order(&order, random)
    }

    /// The same with the parts dealt out in this order: the first node is the one that is alone, mute, deaf or the bridge.
    pub(crate) fn cuts_in_order(
        self,
        order: &[NodeId],
        random: &mut Random,
    ) -> BTreeSet<(NodeId, NodeId)> {
        let n = order.len();
        let half = n / 2;
        let mut cuts = BTreeSet::new();
        for from in 0..n {
            for to in (0..n).filter(|to| *to != from) {
                let distance = from.abs_diff(to);
                let cut = match self {
                    Self::Halves => (from < half) != (to < half),
                    Self::Alone => from == 0 || to == 0,
                    Self::Mute => from == 0,
                    Self::Deaf => to == 0,
                    Self::Bridge => from != 0 && to != 0 && (from <= half) != (to <= half),
                    Self::Ring => distance != 1 && distance != n - 1,
                    Self::Chain => distance != 1,
                    Self::Anything => random.percent(30),
                };
                if cut {
                    cuts.insert((order[from], order[to]));
                }
            }
        }
        cuts
    }
}

//! Finds the watchers of a key without looking at the others.
//!
//! Watchers of one key sit in a hash map. Ranges sit in a treap ordered by start that knows the largest end below
//! each node, so a lookup touches the ranges that match and about log n others.
//!
//! # Invariants
//!
//! - `visit` calls back exactly once for each inserted watcher whose range contains the key.
//! - A node's `reach` is the largest end in its subtree, and its priority is not below its children's.

use std::cmp::Ordering;
use std::collections::HashMap;

use bytes::Bytes;

use super::core::WatcherKey;
use crate::mvcc::KeyRange;

/// Watchers by what they watch.
#[derive(Debug, Default)]
pub(super) struct Interest {
    keys: HashMap<Bytes, Vec<WatcherKey>>,
    root: Link,
    nodes_made: u64,
}

type Link = Option<Box<Node>>;

#[derive(Debug)]
struct Node {
    span: Span,
    watchers: Vec<WatcherKey>,
    reach: End,
    priority: u64,
    left: Link,
    right: Link,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    start: Bytes,
    end: End,
}

/// `Unbounded` is declared last, so it is the largest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Before(Bytes),
    Unbounded,
}

impl End {
    fn is_after(&self, key: &[u8]) -> bool {
        match self {
            Self::Before(end) => key < end.as_ref(),
            Self::Unbounded => true,
        }
    }
}

impl Interest {
    /// Adds a watcher. The caller never adds one twice.
    pub(super) fn insert(&mut self, range: &KeyRange, watcher: WatcherKey) {
        let span = match range {
            KeyRange::One(key) => {
                self.keys.entry(key.clone()).or_default().push(watcher);
                return;
            }
            KeyRange::Span(start, end) => {
                Span { start: start.clone(), end: End::Before(end.clone()) }
            }
            KeyRange::From(start) => Span { start: start.clone(), end: End::Unbounded },
        };
        self.nodes_made += 1;
        let node = Box::new(Node {
            reach: span.end.clone(),
            span,
            watchers: vec![watcher],
            priority: scramble(self.nodes_made),
            left: None,
            right: None,
        });
        self.root = Some(insert(self.root.take(), node));
    }

    /// Takes a watcher out. One that is not in changes nothing.
    pub(super) fn remove(&mut self, range: &KeyRange, watcher: WatcherKey) {
        let span = match range {
            KeyRange::One(key) => {
                if let Some(watchers) = self.keys.get_mut(key) {
                    watchers.retain(|other| *other != watcher);
                    if watchers.is_empty() {
                        self.keys.remove(key);
                    }
                }
                return;
            }
            KeyRange::Span(start, end) => {
                Span { start: start.clone(), end: End::Before(end.clone()) }
            }
            KeyRange::From(start) => Span { start: start.clone(), end: End::Unbounded },
        };
        self.root = remove(self.root.take(), &span, watcher);
    }

    /// Calls back for each watcher whose range contains `key`.
    pub(super) fn visit(&self, key: &[u8], mut found: impl FnMut(WatcherKey)) {
        for watcher in self.keys.get(key).into_iter().flatten() {
            found(*watcher);
        }
        visit(self.root.as_deref(), key, &mut found);
    }
}

/// SplitMix64: spreads a counter over all bits, so that the treap's shape does not follow insertion order.
const fn scramble(counter: u64) -> u64 {
    let mut x = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Node {
    fn measure(&mut self) {
        let below = [&self.left, &self.right].into_iter().flatten().map(|child| &child.reach).max();
        self.reach = match below {
            Some(reach) if self.span.end < *reach => reach.clone(),
            Some(_) | None => self.span.end.clone(),
        };
    }

    fn rotate_right(mut self: Box<Self>) -> Box<Self> {
        let Some(mut top) = self.left.take() else { return self };
        self.left = top.right.take();
        self.measure();
        top.right = Some(self);
        top.measure();
        top
    }

    fn rotate_left(mut self: Box<Self>) -> Box<Self> {
        let Some(mut top) = self.right.take() else { return self };
        self.right = top.left.take();
        self.measure();
        top.left = Some(self);
        top.measure();
        top
    }
}

fn insert(link: Link, new: Box<Node>) -> Box<Node> {
    let Some(mut node) = link else { return new };
    match new.span.cmp(&node.span) {
        Ordering::Equal => {
            node.watchers.extend(new.watchers);
            node
        }
        Ordering::Less => {
            let child = insert(node.left.take(), new);
            let lifted = node.priority < child.priority;
            node.left = Some(child);
            node.measure();
            if lifted { node.rotate_right() } else { node }
        }
        Ordering::Greater => {
            let child = insert(node.right.take(), new);
            let lifted = node.priority < child.priority;
            node.right = Some(child);
            node.measure();
            if lifted { node.rotate_left() } else { node }
        }
    }
}

fn remove(link: Link, span: &Span, watcher: WatcherKey) -> Link {
    let mut node = link?;
    match span.cmp(&node.span) {
        Ordering::Less => node.left = remove(node.left.take(), span, watcher),
        Ordering::Greater => node.right = remove(node.right.take(), span, watcher),
        Ordering::Equal => {
            node.watchers.retain(|other| *other != watcher);
            if node.watchers.is_empty() {
                return merge(node.left.take(), node.right.take());
            }
        }
    }
    node.measure();
    Some(node)
}

/// Joins two subtrees, everything in the first being before everything in the second.
fn merge(left: Link, right: Link) -> Link {
    match (left, right) {
        (None, other) | (other, None) => other,
        (Some(mut a), Some(mut b)) => {
            if b.priority < a.priority {
                a.right = merge(a.right.take(), Some(b));
                a.measure();
                Some(a)
            } else {
                b.left = merge(Some(a), b.left.take());
                b.measure();
                Some(b)
            }
        }
    }
}

fn visit(node: Option<&Node>, key: &[u8], found: &mut impl FnMut(WatcherKey)) {
    let Some(node) = node else { return };
    if !node.reach.is_after(key) {
        return;
    }
    visit(node.left.as_deref(), key, found);
    if node.span.start <= key {
        if node.span.end.is_after(key) {
            for watcher in &node.watchers {
                found(*watcher);
            }
        }
        visit(node.right.as_deref(), key, found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dice(u64);

    impl Dice {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 += 1;
            scramble(self.0) % bound
        }

        fn key(&mut self) -> Bytes {
            let length = 1 + self.below(3);
            (0..length).map(|_| b'a' + u8::try_from(self.below(4)).unwrap()).collect()
        }

        fn range(&mut self) -> KeyRange {
            match self.below(4) {
                0 => KeyRange::One(self.key()),
                1 => KeyRange::From(self.key()),
                _ => KeyRange::Span(self.key(), self.key()),
            }
        }
    }

    fn found(interest: &Interest, key: &[u8]) -> Vec<WatcherKey> {
        let mut out = Vec::new();
        interest.visit(key, |watcher| out.push(watcher));
        out.sort_unstable();
        out
    }

    fn depth(link: &Link) -> usize {
        link.as_ref().map_or(0, |node| 1 + depth(&node.left).max(depth(&node.right)))
    }

    #[test]
    fn lookup_agrees_with_asking_every_watcher() {
        for seed in 0..40 {
            println!("seed {seed}");
            let mut dice = Dice(seed * 1_000_003);
            let mut interest = Interest::default();
            let mut plain: Vec<(KeyRange, WatcherKey)> = Vec::new();
            for step in 0..200 {
                if dice.below(3) == 0 && !plain.is_empty() {
                    let at = usize::try_from(dice.below(plain.len() as u64)).unwrap();
                    let (range, watcher) = plain.swap_remove(at);
                    interest.remove(&range, watcher);
                } else {
                    let range = dice.range();
                    interest.insert(&range, WatcherKey(step));
                    plain.push((range, WatcherKey(step)));
                }
                let key = dice.key();
                let mut expected: Vec<WatcherKey> = plain
                    .iter()
                    .filter(|(range, _)| range.contains(&key))
                    .map(|(_, watcher)| *watcher)
                    .collect();
                expected.sort_unstable();
                assert_eq!(found(&interest, &key), expected, "key {key:?}");
            }
        }
    }

    #[test]
    fn ten_thousand_ordered_ranges_stay_shallow() {
        let mut interest = Interest::default();
        for n in 0..10_000_u64 {
            let key = |n: u64| Bytes::from(format!("/registry/{n:06}/"));
            interest.insert(&KeyRange::Span(key(n), key(n + 1)), WatcherKey(n));
        }
        let depth = depth(&interest.root);
        assert!(depth < 60, "depth {depth}");
        assert_eq!(found(&interest, b"/registry/004711/x"), [WatcherKey(4711)]);
    }

    #[test]
    fn removing_the_last_watcher_leaves_nothing_behind() {
        let mut interest = Interest::default();
        let one = KeyRange::One(Bytes::from_static(b"a"));
        let from = KeyRange::From(Bytes::from_static(b"a"));
        for range in [&one, &from] {
            interest.insert(range, WatcherKey(1));
            interest.remove(range, WatcherKey(2));
            interest.remove(range, WatcherKey(1));
        }
        assert!(interest.keys.is_empty() && interest.root.is_none());
    }
}

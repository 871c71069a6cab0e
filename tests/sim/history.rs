//! What clients saw, checked in linear time: every answer names a revision, so the order of everything is known.
//!
//! # What is checked
//!
//! - An acknowledged write is in the history at its revision, and nowhere else.
//! - Revisions respect real time: an answer's revision is above (for a write) or not below (for a read) every revision that was
//!   acknowledged before the call began.
//! - A read at revision R is what replaying the history up to R gives; so is what a comparison in a transaction found.
//! - A write of unknown outcome is in the history at most once, and after everything acknowledged before it was asked for.
//! - A write that was refused is nowhere.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use k3s_server::mvcc::RevisionEvents;

/// What replaying gives: values by key.
pub(crate) type Contents = BTreeMap<Bytes, Bytes>;

/// A call that began.
#[derive(Clone, Debug)]
pub(crate) struct Began {
    /// The highest revision that anybody had been told.
    floor: i64,
    /// The value it writes, which nobody else ever writes; none for deletes and reads.
    tag: Option<Bytes>,
}

/// What the answer said.
#[derive(Clone, Debug)]
pub(crate) enum Saw {
    /// The value was written at this revision.
    Wrote { revision: i64 },
    /// The key was deleted at this revision.
    Deleted { key: Bytes, revision: i64 },
    /// At this revision the key had this value, or none; nothing was changed.
    Found { key: Bytes, value: Option<Bytes>, revision: i64 },
    /// The value was written at this revision, because the key had this value before.
    Swapped { key: Bytes, expected: Option<Bytes>, revision: i64 },
    /// The value was not written: at this revision the key did not have the expected one.
    Differed { key: Bytes, expected: Option<Bytes>, revision: i64 },
    /// Everything, at this revision.
    Read { contents: Contents, revision: i64 },
    /// It was not done, and will not be.
    Refused,
    /// It may be done, now or later.
    Unknown,
}

impl Saw {
    fn revision(&self) -> Option<i64> {
        match self {
            Self::Wrote { revision, .. }
            | Self::Deleted { revision, .. }
            | Self::Found { revision, .. }
            | Self::Swapped { revision, .. }
            | Self::Differed { revision, .. }
            | Self::Read { revision, .. } => Some(*revision),
            Self::Refused | Self::Unknown => None,
        }
    }

    const fn changed(&self) -> bool {
        matches!(self, Self::Wrote { .. } | Self::Deleted { .. } | Self::Swapped { .. })
    }
}

/// See the module documentation. Clones share the history.
#[derive(Clone, Default)]
pub(crate) struct History(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Highest revision in any answer.
    told: i64,
    calls: Vec<(Began, Saw)>,
    counts: Counts,
}

/// How calls ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) refused: u64,
    pub(crate) unknown: u64,
}

impl History {
    /// A call begins.
    pub(crate) fn begin(&self, tag: Option<Bytes>) -> Began {
        Began { floor: self.lock().told, tag }
    }

    /// It ended. An error says why that cannot be.
    pub(crate) fn end(&self, began: Began, saw: Saw) -> Result<(), String> {
        let mut state = self.lock();
        match &saw {
            saw if saw.changed() => state.counts.writes += 1,
            Saw::Refused => state.counts.refused += 1,
            Saw::Unknown => state.counts.unknown += 1,
            Saw::Wrote { .. }
            | Saw::Deleted { .. }
            | Saw::Found { .. }
            | Saw::Swapped { .. }
            | Saw::Differed { .. }
            | Saw::Read { .. } => state.counts.reads += 1,
        }
        let floor = began.floor;
        if let Some(revision) = saw.revision() {
            let stale = if saw.changed() { revision <= floor } else { revision < floor };
            if stale {
                return Err(format!(
                    "real time: {saw:?} was answered to a call that began when {floor} was acknowledged"
                ));
            }
            state.told = state.told.max(revision);
        }
        state.calls.push((began, saw));
        Ok(())
    }

    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// Holds everything that was seen against what the nodes applied.
    pub(crate) fn check(
        &self,
        revisions: &BTreeMap<i64, Arc<RevisionEvents>>,
    ) -> Result<(), String> {
        let mut state = self.lock();
        let places = places(revisions)?;
        for (began, saw) in &state.calls {
            check_place(began, saw, &places, revisions)?;
        }
        // What a call saw in its own revision was there before it.
        state.calls.sort_by_key(|(_, saw)| {
            if let Saw::Swapped { revision, .. } = saw {
                (revision - 1, 1)
            } else {
                (saw.revision().unwrap_or(i64::MAX), 0)
            }
        });
        let mut contents = Contents::new();
        let mut ahead = revisions.range(..).peekable();
        for (_, saw) in &state.calls {
            let Some(mut revision) = saw.revision() else { continue };
            if matches!(saw, Saw::Swapped { .. }) {
                revision -= 1;
            }
            while let Some((_, events)) = ahead.next_if(|(at, _)| **at <= revision) {
                replay(&mut contents, events);
            }
            check_contents(saw, &contents)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const DELETE: i32 = 1;

fn replay(contents: &mut Contents, events: &RevisionEvents) {
    for event in &events.events {
        let Some(kv) = &event.kv else { continue };
        if event.r#type == DELETE {
            contents.remove(&kv.key);
        } else {
            contents.insert(kv.key.clone(), kv.value.clone());
        }
    }
}

/// Where every value was written.
fn places(revisions: &BTreeMap<i64, Arc<RevisionEvents>>) -> Result<HashMap<Bytes, i64>, String> {
    let mut places = HashMap::new();
    for (revision, events) in revisions {
        for kv in events
            .events
            .iter()
            .filter(|event| event.r#type != DELETE)
            .filter_map(|e| e.kv.as_ref())
        {
            if let Some(before) = places.insert(kv.value.clone(), *revision) {
                return Err(format!(
                    "{:?} was written twice: at {before} and at {revision}",
                    kv.value
                ));
            }
        }
    }
    Ok(places)
}

fn check_place(
    began: &Began,
    saw: &Saw,
    places: &HashMap<Bytes, i64>,
    revisions: &BTreeMap<i64, Arc<RevisionEvents>>,
) -> Result<(), String> {
    let place = began.tag.as_ref().and_then(|tag| places.get(tag)).copied();
    match saw {
        Saw::Wrote { revision, .. } | Saw::Swapped { revision, .. } if place != Some(*revision) => {
            Err(format!("lost write: {:?} was answered {saw:?}, it stands at {place:?}", began.tag))
        }
        Saw::Deleted { key, revision } => {
            let deleted = revisions.get(revision).is_some_and(|events| {
                events.events.iter().any(|event| {
                    event.r#type == DELETE && event.kv.as_ref().is_some_and(|kv| kv.key == *key)
                })
            });
            if deleted { Ok(()) } else { Err(format!("lost delete: {saw:?}")) }
        }
        Saw::Differed { .. } | Saw::Refused if place.is_some() => {
            Err(format!("{:?} was answered {saw:?}, but was written at {place:?}", began.tag))
        }
        Saw::Unknown if place.is_some_and(|place| place <= began.floor) => Err(format!(
            "{:?} was written at {place:?}, before it was asked for at {}",
            began.tag, began.floor
        )),
        Saw::Wrote { .. }
        | Saw::Swapped { .. }
        | Saw::Differed { .. }
        | Saw::Refused
        | Saw::Unknown
        | Saw::Found { .. }
        | Saw::Read { .. } => Ok(()),
    }
}

fn check_contents(saw: &Saw, contents: &Contents) -> Result<(), String> {
    let wrong = match saw {
        Saw::Read { contents: found, .. } => found != contents,
        Saw::Found { key, value, .. } => contents.get(key) != value.as_ref(),
        Saw::Swapped { key, expected, .. } => contents.get(key) != expected.as_ref(),
        Saw::Differed { key, expected, .. } => contents.get(key) == expected.as_ref(),
        Saw::Wrote { .. } | Saw::Deleted { .. } | Saw::Refused | Saw::Unknown => false,
    };
    if wrong { Err(format!("{saw:?}, but replaying gives {contents:?}")) } else { Ok(()) }
}

//! Ranges: which keys, in which order, how many.
//!
//! Filtering and sorting look at what the index says of a key; values are fetched last, for what is really
//! answered. Only a sort by value needs them earlier.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use bytes::Bytes;
use pb::range_request::{SortOrder, SortTarget};

use crate::mvcc::{Entry, KeyRange, View};
use crate::proto::etcdserverpb as pb;
use crate::proto::mvccpb::KeyValue;
use crate::types::Revision;

use super::{Room, Step, Stop, inner_header};

/// What a key costs beside its own bytes, as [`Found`] and in the answer.
const KEY_BYTES: usize = size_of::<Found>() + size_of::<KeyValue>() + 64;

/// One key of the answer, as far as it is known.
struct Found {
    key: Bytes,
    entry: Entry,
    /// Fetched early only to sort by it.
    value: Bytes,
}

pub(super) fn range(
    view: &impl View,
    request: &pb::RangeRequest,
    room: &impl Room,
) -> Step<pb::RangeResponse> {
    let at = view.resolve(request.revision)?;
    let keys = KeyRange::new(request.key.clone(), request.range_end.clone());
    let (mut found, count) = collect(view, request, &keys, at, room)?;
    sort(request, &mut found);
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let more = 0 < limit && limit < found.len();
    if more {
        found.truncate(limit);
    }
    let kvs = found
        .into_iter()
        .map(|found| answer(view, request, found, room))
        .collect::<Step<Vec<KeyValue>>>()?;
    Ok(pb::RangeResponse { header: inner_header(view.revision()), kvs, more, count })
}

/// Keys that pass the filters, no more than can be needed, and the count of all in the range.
fn collect(
    view: &impl View,
    request: &pb::RangeRequest,
    keys: &KeyRange,
    at: Revision,
    room: &impl Room,
) -> Step<(Vec<Found>, i64)> {
    let most = fetched_max(request);
    let by_value = sort_target(request) == Some(SortTarget::Value);
    let (mut found, mut count, mut full) = (Vec::new(), 0_i64, false);
    view.visit(keys, at, &mut |key, entry| {
        count += 1;
        if !request.count_only && found.len() < most && passes(request, entry) {
            let value = if by_value { view.load(key, entry)?.value } else { Bytes::new() };
            full = !room.keep(KEY_BYTES + 2 * key.len() + value.len());
            found.push(Found { key: Bytes::copy_from_slice(key), entry: *entry, value });
        }
        Ok(if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    if full { Err(Stop::NoRoom) } else { Ok((found, count)) }
}

/// One more than asked for, to see whether there are more; everything, if an order or a filter was asked for. A
/// sort target without an order is not enough: etcd then sorts only what the limit let through.
fn fetched_max(request: &pb::RangeRequest) -> usize {
    let natural = request.sort_order == SortOrder::None as i32
        || request.sort_order == SortOrder::Ascend as i32
            && request.sort_target == SortTarget::Key as i32;
    let filtered = request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0;
    match usize::try_from(request.limit) {
        Ok(limit) if 0 < limit && natural && !filtered => limit.saturating_add(1),
        _ => usize::MAX,
    }
}

const fn passes(request: &pb::RangeRequest, entry: &Entry) -> bool {
    within(entry.at.main, request.min_mod_revision, request.max_mod_revision)
        && within(entry.create, request.min_create_revision, request.max_create_revision)
}

/// A bound of 0 is none.
const fn within(revision: i64, min: i64, max: i64) -> bool {
    (min == 0 || min <= revision) && (max == 0 || revision <= max)
}

/// What to sort by, if keys are not in the order asked for already. Unknown enum values sort nothing.
fn sort_target(request: &pb::RangeRequest) -> Option<SortTarget> {
    let target = SortTarget::try_from(request.sort_target).ok()?;
    match SortOrder::try_from(request.sort_order).ok()? {
        SortOrder::None | SortOrder::Ascend if target == SortTarget::Key => None,
        SortOrder::None | SortOrder::Ascend | SortOrder::Descend => Some(target),
    }
}

fn sort(request: &pb::RangeRequest, found: &mut [Found]) {
    let Some(target) = sort_target(request) else {
        return;
    };
    let compare = |a: &Found, b: &Found| -> Ordering {
        match target {
            SortTarget::Key => a.key.cmp(&b.key),
            SortTarget::Version => a.entry.version.cmp(&b.entry.version),
            SortTarget::Create => a.entry.create.cmp(&b.entry.create),
            SortTarget::Mod => a.entry.at.main.cmp(&b.entry.at.main),
            SortTarget::Value => a.value.cmp(&b.value),
        }
    };
    if request.sort_order == SortOrder::Descend as i32 {
        found.sort_by(|a, b| compare(b, a));
    } else {
        found.sort_by(compare);
    }
}

fn answer(
    view: &impl View,
    request: &pb::RangeRequest,
    found: Found,
    room: &impl Room,
) -> Step<KeyValue> {
    if request.keys_only {
        let Found { key, entry, .. } = found;
        return Ok(KeyValue {
            key,
            create_revision: entry.create,
            mod_revision: entry.at.main,
            version: entry.version,
            value: Bytes::new(),
            lease: entry.lease,
        });
    }
    let kv = view.load(&found.key, &found.entry)?;
    if room.keep(kv.value.len()) { Ok(kv) } else { Err(Stop::NoRoom) }
}

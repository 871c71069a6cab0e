//! Makes etcd's watch responses out of the hub's messages, and cuts large ones when the watcher agreed to that.

use prost::Message as _;

use super::{Body, Message, Options, Part};
use crate::proto::etcdserverpb::{ResponseHeader, WatchResponse};
use crate::proto::mvccpb::{Event, KeyValue, event::EventType};

/// The response for a message. `header` has everything but the revision; `previous` finds the key-value before an
/// event, if it still exists, and is asked only for watchers that want it.
pub fn response<E>(
    message: Message,
    header: ResponseHeader,
    mut previous: impl FnMut(&KeyValue) -> Result<Option<KeyValue>, E>,
) -> Result<WatchResponse, E> {
    let mut response = WatchResponse {
        header: Some(ResponseHeader { revision: message.revision.get(), ..header }),
        watch_id: message.id,
        ..WatchResponse::default()
    };
    match message.body {
        Body::Created => response.created = true,
        Body::Refused(reason) => {
            response.created = true;
            response.canceled = true;
            response.cancel_reason = reason.to_owned();
        }
        Body::Canceled => response.canceled = true,
        Body::Compacted(revision) => {
            response.canceled = true;
            response.compact_revision = revision.get();
        }
        Body::Progress => {}
        Body::Events { parts, options } => {
            response.events = events(&parts, options, &mut previous)?;
        }
    }
    Ok(response)
}

/// Keys and values are shared with the hub, not copied.
fn events<E>(
    parts: &[Part],
    options: Options,
    previous: &mut impl FnMut(&KeyValue) -> Result<Option<KeyValue>, E>,
) -> Result<Vec<Event>, E> {
    let mut out = Vec::with_capacity(parts.iter().map(|part| part.events().count()).sum());
    for event in parts.iter().flat_map(Part::events) {
        let mut event = event.clone();
        if let Some(kv) = &event.kv
            && options.prev_kv
            && !(event.r#type() == EventType::Put && kv.create_revision == kv.mod_revision)
        {
            event.prev_kv = previous(kv)?;
        }
        out.push(event);
    }
    Ok(out)
}

/// Cuts a response so that each piece is below `bytes_max`, or holds a single event. All but the last are marked.
pub fn fragments(response: WatchResponse, bytes_max: usize) -> Vec<WatchResponse> {
    if response.events.len() < 2 || response.encoded_len() < bytes_max {
        return vec![response];
    }
    let frame = WatchResponse { events: Vec::new(), fragment: true, ..response.clone() };
    let frame_bytes = frame.encoded_len();
    let mut pieces = vec![frame.clone()];
    let mut bytes = frame_bytes;
    for event in response.events {
        let cost = field_bytes(event.encoded_len());
        let full = bytes_max <= bytes + cost;
        if full && pieces.last().is_some_and(|piece| !piece.events.is_empty()) {
            pieces.push(frame.clone());
            bytes = frame_bytes;
        }
        bytes += cost;
        if let Some(piece) = pieces.last_mut() {
            piece.events.push(event);
        }
    }
    if let Some(last) = pieces.last_mut() {
        last.fragment = false;
    }
    pieces
}

/// Bytes of a length-delimited field with a one-byte tag.
fn field_bytes(len: usize) -> usize {
    1 + prost::length_delimiter_len(len) + len
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::Arc;

    use crate::mvcc::RevisionEvents;
    use crate::types::Revision;
    use crate::watch::Picks;

    fn event(key: &'static str, value_bytes: usize, create: i64, revision: i64) -> Event {
        let kv = KeyValue {
            key: key.as_bytes().into(),
            value: vec![b'v'; value_bytes].into(),
            create_revision: create,
            mod_revision: revision,
            ..Default::default()
        };
        Event { kv: Some(kv), ..Default::default() }
    }

    fn message(events: Vec<Event>, options: Options) -> Message {
        let revision = Revision::new(9);
        let events = Arc::new(RevisionEvents { revision, events });
        let parts = vec![Part { events, picks: Picks::All }];
        Message { id: 3, revision, body: Body::Events { parts, options } }
    }

    #[test]
    fn previous_is_asked_for_updates_and_deletes_but_not_for_creates() {
        let mut delete = event("c", 0, 0, 9);
        delete.r#type = EventType::Delete.into();
        let events = vec![event("a", 1, 9, 9), event("b", 1, 4, 9), delete];
        let options = Options { prev_kv: true, ..Options::default() };
        let mut asked = Vec::new();
        let response = response(message(events, options), ResponseHeader::default(), |kv| {
            asked.push(kv.key.clone());
            Ok::<_, Infallible>(Some(KeyValue::default()))
        })
        .unwrap();

        assert_eq!(asked, ["b", "c"]);
        let with: Vec<bool> = response.events.iter().map(|e| e.prev_kv.is_some()).collect();
        assert_eq!(with, [false, true, true]);
        assert_eq!(response.header.unwrap().revision, 9);
    }

    #[test]
    fn compacted_message_has_revision_zero_and_no_reason() {
        let body = Body::Compacted(Revision::new(7));
        let message = Message { id: 3, revision: Revision::new(0), body };
        let header = ResponseHeader { cluster_id: 1, ..Default::default() };
        let response = response(message, header, |_| Ok::<_, Infallible>(None)).unwrap();
        assert!(response.canceled && !response.created);
        assert_eq!((response.compact_revision, response.cancel_reason.as_str()), (7, ""));
        assert_eq!(response.header.map(|h| (h.cluster_id, h.revision)), Some((1, 0)));
    }

    fn cut(sizes: &[usize], bytes_max: usize) -> Vec<(usize, bool)> {
        let events = sizes.iter().map(|bytes| event("k", *bytes, 9, 9)).collect();
        let header = ResponseHeader::default();
        let whole =
            response(message(events, Options::default()), header, |_| Ok::<_, Infallible>(None))
                .unwrap();
        let pieces = fragments(whole, bytes_max);
        for piece in &pieces {
            assert!(piece.encoded_len() < bytes_max || piece.events.len() == 1);
            assert_eq!(piece.watch_id, 3);
        }
        pieces.iter().map(|piece| (piece.events.len(), piece.fragment)).collect()
    }

    #[test]
    fn pieces_stay_below_the_limit_and_only_the_last_is_unmarked() {
        assert_eq!(cut(&[100, 100], 10_000), [(2, false)]);
        assert_eq!(cut(&[900, 900, 900], 1_000), [(1, true), (1, true), (1, false)]);
        assert_eq!(cut(&[300, 300, 300, 300], 1_000), [(3, true), (1, false)]);
        assert_eq!(cut(&[5_000, 10, 10], 1_000), [(1, true), (2, false)]);
        assert_eq!(cut(&[5_000], 1_000), [(1, false)]);
    }
}

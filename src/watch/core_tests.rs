//! Decisions of the watch core: one test per promise, and a random run against a plain model.

use super::*;
use crate::proto::mvccpb::{Event, KeyValue, event::EventType};
use bytes::Bytes;

const SMALL: Limits = Limits {
    ring_bytes_max: 2_000,
    stream_bytes_max: 1_000,
    hub_bytes_max: 100_000,
    replay_bytes_max: 500,
};

fn rev(n: i64) -> Revision {
    Revision::new(n)
}

fn event(key: &str, value_bytes: usize, kind: EventType, n: i64) -> Event {
    let kv = KeyValue {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: vec![b'v'; value_bytes].into(),
        mod_revision: n,
        ..Default::default()
    };
    Event { r#type: kind.into(), kv: Some(kv), prev_kv: None }
}

fn puts(n: i64, keys: &[&str]) -> Arc<RevisionEvents> {
    let events = keys.iter().map(|key| event(key, 10, EventType::Put, n)).collect();
    Arc::new(RevisionEvents { revision: rev(n), events })
}

fn one(key: &str) -> KeyRange {
    KeyRange::One(Bytes::copy_from_slice(key.as_bytes()))
}

fn all() -> KeyRange {
    KeyRange::From(Bytes::from_static(&[0]))
}

fn want(range: KeyRange, start: i64) -> Create {
    Create { id: 0, range, start, options: Options::default() }
}

/// One line a message, for reading tests at a glance.
fn text(message: &Message) -> String {
    let Message { id, revision, body } = message;
    match body {
        Body::Created => format!("{id}@{revision} created"),
        Body::Refused(reason) => format!("{id}@{revision} refused {reason}"),
        Body::Canceled => format!("{id}@{revision} canceled"),
        Body::Compacted(at) => format!("{id}@{revision} compacted {at}"),
        Body::Progress => format!("{id}@{revision} progress"),
        Body::Events { parts, .. } => {
            let events: Vec<String> = parts
                .iter()
                .flat_map(Part::events)
                .filter_map(|e| e.kv.as_ref())
                .map(|kv| format!("{}:{}", String::from_utf8_lossy(&kv.key), kv.mod_revision))
                .collect();
            format!("{id}@{revision} {}", events.join(" "))
        }
    }
}

/// Everything the stream gets without reading the store.
fn drain(core: &mut Core, stream: StreamKey) -> Vec<String> {
    let mut out = Vec::new();
    while let Step::Send(message) = core.step(stream) {
        out.push(text(&message));
    }
    out
}

fn publish(core: &mut Core, n: i64, keys: &[&str]) {
    core.publish(&[puts(n, keys)], rev(n));
}

#[test]
fn created_comes_first_and_one_revision_is_one_message() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    core.create(stream, want(all(), 0), rev(1));
    publish(&mut core, 2, &["a", "b", "c"]);
    publish(&mut core, 3, &["a"]);
    assert_eq!(drain(&mut core, stream), ["0@1 created", "0@2 a:2 b:2 c:2", "0@3 a:3"]);
}

#[test]
fn ids_count_from_zero_and_jump_over_ids_the_client_chose() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 0), rev(1));
    core.create(stream, Create { id: 1, ..want(one("a"), 0) }, rev(1));
    core.create(stream, Create { id: 1, ..want(one("a"), 0) }, rev(1));
    core.create(stream, want(one("a"), 0), rev(1));
    assert_eq!(
        drain(&mut core, stream),
        [
            "0@1 created",
            "1@1 created",
            "-1@1 refused mvcc: duplicate watch ID provided on the WatchStream",
            "2@1 created"
        ]
    );
}

#[test]
fn bad_requests_are_refused_with_etcds_words() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    let span = |a: &str, b: &str| {
        KeyRange::Span(Bytes::copy_from_slice(a.as_bytes()), Bytes::copy_from_slice(b.as_bytes()))
    };
    core.create(stream, want(span("b", "a"), 0), rev(1));
    core.create(stream, want(span("b", "b"), 0), rev(1));
    core.create(stream, want(span("b", "a"), -1), rev(1));
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    assert_eq!(
        drain(&mut core, stream),
        [
            "-1@1 refused mvcc: watcher range is empty".to_owned(),
            "-1@1 refused mvcc: watcher range is empty".to_owned(),
            format!("-1@1 refused {compacted}"),
        ]
    );
    assert_eq!(core.watcher_count(), 0);
}

#[test]
fn future_start_waits_for_its_revision() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 4), rev(1));
    for n in 2..=5 {
        publish(&mut core, n, &["a"]);
    }
    assert_eq!(drain(&mut core, stream), ["0@1 created", "0@4 a:4", "0@5 a:5"]);
}

#[test]
fn start_from_now_counts_from_the_store_even_if_the_hub_lags() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 0), rev(3));
    for n in 2..=4 {
        publish(&mut core, n, &["a"]);
    }
    assert_eq!(drain(&mut core, stream), ["0@3 created", "0@4 a:4"]);
}

#[test]
fn past_start_asks_the_store_whether_it_is_compacted_and_the_ring_does_the_rest() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    for n in 2..=4 {
        publish(&mut core, n, &["a", "b"]);
    }
    core.create(stream, want(one("a"), 3), rev(4));
    publish(&mut core, 5, &["a"]);
    assert_eq!(drain(&mut core, stream), ["0@4 created"]);
    let Step::Replay(replay) = core.step(stream) else { panic!("expected a replay") };

    let read = Replayed { events: vec![], looked: rev(3), current: rev(5), compacted: rev(2) };
    core.replayed(&replay, read).unwrap();
    assert_eq!(drain(&mut core, stream), ["0@5 a:4 a:5"]);
}

#[test]
fn older_past_is_asked_of_the_store_and_compaction_ends_the_watcher() {
    let mut core = Core::new(rev(10), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 3), rev(10));
    assert_eq!(drain(&mut core, stream), ["0@10 created"]);
    let Step::Replay(replay) = core.step(stream) else { panic!("expected a replay") };
    assert_eq!(replay.from, rev(3));

    let read = Replayed { events: vec![], looked: rev(3), current: rev(10), compacted: rev(7) };
    core.replayed(&replay, read).unwrap();
    assert_eq!(drain(&mut core, stream), ["0@0 compacted 7"]);
    assert_eq!(core.watcher_count(), 0);
}

#[test]
fn history_at_the_compacted_revision_is_delivered() {
    let mut core = Core::new(rev(10), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 7), rev(10));
    drain(&mut core, stream);
    let Step::Replay(replay) = core.step(stream) else { panic!("expected a replay") };
    let events = vec![puts(7, &["a"]).as_ref().clone()];
    let read = Replayed { events, looked: rev(10), current: rev(10), compacted: rev(7) };
    core.replayed(&replay, read).unwrap();
    publish(&mut core, 11, &["a"]);
    assert_eq!(drain(&mut core, stream), ["0@10 a:7", "0@11 a:11"]);
}

#[test]
fn stream_that_stops_reading_is_bounded_and_later_gets_everything_once() {
    let mut core = Core::new(rev(1), Limits { ring_bytes_max: 1 << 20, ..SMALL });
    let (slow, quick) = (core.open(), core.open());
    core.create(slow, want(all(), 0), rev(1));
    core.create(quick, want(all(), 0), rev(1));
    let mut quick_seen = drain(&mut core, quick).len() - 1;
    for n in 2..=100 {
        publish(&mut core, n, &["a"]);
        quick_seen += drain(&mut core, quick).len();
        assert!(core.backlog(slow) <= SMALL.stream_bytes_max, "revision {n}");
    }
    assert_eq!(quick_seen, 99);
    assert_eq!(core.behind_count(), 1);

    let seen: Vec<String> = drain(&mut core, slow)
        .iter()
        .flat_map(|line| line.split(' ').skip(1).map(str::to_owned).collect::<Vec<_>>())
        .filter(|word| word != "created")
        .collect();
    let expected: Vec<String> = (2..=100).map(|n| format!("a:{n}")).collect();
    assert_eq!(seen, expected);
    assert_eq!((core.behind_count(), core.queued_bytes()), (0, 0));
}

#[test]
fn all_streams_together_are_bounded() {
    let limits = Limits { stream_bytes_max: 10_000, hub_bytes_max: 3_000, ..SMALL };
    let mut core = Core::new(rev(1), limits);
    let streams: Vec<_> = (0..10).map(|_| core.open()).collect();
    for stream in &streams {
        core.create(*stream, want(all(), 0), rev(1));
    }
    for n in 2..=50 {
        publish(&mut core, n, &["a"]);
    }
    assert!(core.queued_bytes() <= limits.hub_bytes_max, "{} bytes", core.queued_bytes());
}

#[test]
fn single_message_larger_than_the_bound_still_goes_out() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    core.create(stream, want(all(), 0), rev(1));
    drain(&mut core, stream);
    let events = vec![event("big", 5_000, EventType::Put, 2)];
    core.publish(&[Arc::new(RevisionEvents { revision: rev(2), events })], rev(2));
    assert_eq!(drain(&mut core, stream), ["0@2 big:2"]);
}

#[test]
fn filters_drop_events_but_not_revisions() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    let options = Options { no_put: true, ..Options::default() };
    core.create(stream, Create { options, ..want(one("a"), 0) }, rev(1));
    publish(&mut core, 2, &["a"]);
    let events = vec![event("a", 0, EventType::Delete, 3)];
    core.publish(&[Arc::new(RevisionEvents { revision: rev(3), events })], rev(3));
    core.request_progress(stream);
    assert_eq!(drain(&mut core, stream), ["0@1 created", "0@3 a:3", "-1@3 progress"]);
}

#[test]
fn progress_is_answered_only_when_every_watcher_is_current() {
    let mut core = Core::new(rev(10), SMALL);
    let stream = core.open();
    core.request_progress(stream);
    core.create(stream, want(one("a"), 0), rev(10));
    core.request_progress(stream);
    core.create(stream, want(one("b"), 12), rev(10));
    core.request_progress(stream);
    publish(&mut core, 11, &["a"]);
    core.request_progress(stream);
    publish(&mut core, 12, &["a"]);
    core.request_progress(stream);
    core.create(stream, want(one("c"), 3), rev(12));
    core.request_progress(stream);
    assert_eq!(
        drain(&mut core, stream),
        [
            "0@10 created",
            "-1@10 progress",
            "1@10 created",
            "0@11 a:11",
            "0@12 a:12",
            "-1@12 progress",
            "2@12 created"
        ]
    );
}

#[test]
fn progress_never_overtakes_events_the_client_has_not_got() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    let options = Options { progress_notify: true, ..Options::default() };
    core.create(stream, Create { options, ..want(all(), 0) }, rev(1));
    for n in 2..=60 {
        publish(&mut core, n, &["a"]);
    }
    core.request_progress(stream);
    core.tick(stream);
    let mut sent = 1;
    while let Step::Send(message) = core.step(stream) {
        match &message.body {
            Body::Progress => assert!(message.revision.get() <= sent, "{message:?}"),
            Body::Events { parts, .. } => {
                sent = parts.iter().map(|part| part.events.revision.get()).max().unwrap();
            }
            Body::Created | Body::Refused(_) | Body::Canceled | Body::Compacted(_) => {}
        }
    }
}

#[test]
fn periodic_progress_skips_watchers_that_had_events() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    let options = Options { progress_notify: true, ..Options::default() };
    core.create(stream, Create { options, ..want(one("a"), 0) }, rev(1));
    core.create(stream, Create { options, ..want(one("b"), 0) }, rev(1));
    core.create(stream, want(one("c"), 0), rev(1));
    publish(&mut core, 2, &["a"]);
    drain(&mut core, stream);
    core.tick(stream);
    assert_eq!(drain(&mut core, stream), ["1@2 progress"]);
    core.tick(stream);
    assert_eq!(drain(&mut core, stream), ["0@2 progress", "1@2 progress"]);
}

#[test]
fn cancel_answers_for_live_ids_only_and_frees_the_id() {
    let mut core = Core::new(rev(1), SMALL);
    let stream = core.open();
    core.create(stream, Create { id: 7, ..want(one("a"), 0) }, rev(1));
    core.cancel(stream, 8, rev(1));
    core.cancel(stream, 7, rev(1));
    core.cancel(stream, 7, rev(1));
    publish(&mut core, 2, &["a"]);
    core.create(stream, Create { id: 7, ..want(one("a"), 0) }, rev(2));
    assert_eq!(drain(&mut core, stream), ["7@1 created", "7@1 canceled", "7@2 created"]);
}

#[test]
fn snapshot_sends_live_watchers_to_the_store_for_what_they_did_not_see() {
    let mut core = Core::new(rev(5), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 0), rev(5));
    core.create(stream, want(one("a"), 30), rev(5));
    drain(&mut core, stream);
    core.restored(rev(20));
    let Step::Replay(replay) = core.step(stream) else { panic!("expected a replay") };
    assert_eq!((replay.from, core.behind_count()), (rev(6), 1));
}

#[test]
fn gap_in_what_is_published_is_read_from_the_store() {
    let mut core = Core::new(rev(5), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 0), rev(5));
    drain(&mut core, stream);
    publish(&mut core, 8, &["a"]);
    let Step::Replay(replay) = core.step(stream) else { panic!("expected a replay") };
    assert_eq!(replay.from, rev(6));
}

#[test]
fn cancel_during_a_replay_drops_what_was_read() {
    let mut core = Core::new(rev(10), SMALL);
    let stream = core.open();
    core.create(stream, want(one("a"), 3), rev(10));
    drain(&mut core, stream);
    let Step::Replay(replay) = core.step(stream) else { panic!("expected a replay") };
    core.cancel(stream, 0, rev(10));
    let events = vec![puts(4, &["a"]).as_ref().clone()];
    let read = Replayed { events, looked: rev(10), current: rev(10), compacted: rev(0) };
    core.replayed(&replay, read).unwrap();
    assert_eq!(drain(&mut core, stream), ["0@10 canceled"]);
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((x ^ (x >> 31)) % bound as u64).unwrap()
    }
}

/// What a store would answer.
fn read(history: &[Arc<RevisionEvents>], dice: &mut Dice, replay: &Replay) -> Replayed {
    let count = 1 + dice.below(5);
    let events: Vec<_> = history
        .iter()
        .filter(|events| replay.from <= events.revision)
        .take(count)
        .map(|events| events.as_ref().clone())
        .collect();
    let current = history.last().map_or(rev(1), |events| events.revision);
    let looked = events.last().map_or(current, |events| events.revision);
    Replayed { events, looked, current, compacted: rev(0) }
}

/// Watchers by their expected events, checked against what they got.
#[test]
fn any_interleaving_gives_every_watcher_each_event_once_in_order() {
    for seed in 0..60_u64 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let mut core = Core::new(rev(1), SMALL);
        let mut history: Vec<Arc<RevisionEvents>> = Vec::new();
        let stream = core.open();
        let mut watched: Vec<(i64, &str)> = Vec::new();
        let mut got: Vec<Vec<String>> = Vec::new();
        let keys = ["a", "b", "c"];
        for _ in 0..400 {
            let current = rev(1 + i64::try_from(history.len()).unwrap());
            match dice.below(10) {
                0 if watched.len() < 8 => {
                    let key = keys[dice.below(3)];
                    let start = 2 + i64::try_from(dice.below(history.len() + 3)).unwrap();
                    core.create(stream, want(one(key), start), current);
                    watched.push((start, key));
                    got.push(Vec::new());
                }
                1..=4 => take(&mut core, stream, &history, &mut dice, &mut got),
                _ => {
                    let n = current.get() + 1;
                    let count = 1 + dice.below(3);
                    history.push(puts(n, &keys[..count]));
                    publish(&mut core, n, &keys[..count]);
                }
            }
        }
        for _ in 0..10_000 {
            take(&mut core, stream, &history, &mut dice, &mut got);
        }
        for ((start, key), got) in watched.iter().zip(&got) {
            let expected: Vec<String> = history
                .iter()
                .filter(|events| *start <= events.revision.get())
                .filter(|events| {
                    events.events.iter().any(|e| e.kv.as_ref().unwrap().key == key.as_bytes())
                })
                .map(|events| format!("{key}:{}", events.revision))
                .collect();
            assert_eq!(*got, expected, "watcher of {key} from {start}");
        }
        assert_eq!(core.queued_bytes(), 0);
    }
}

fn take(
    core: &mut Core,
    stream: StreamKey,
    history: &[Arc<RevisionEvents>],
    dice: &mut Dice,
    got: &mut [Vec<String>],
) {
    match core.step(stream) {
        Step::Send(message) => {
            if let Body::Events { .. } = &message.body {
                let id = usize::try_from(message.id).unwrap();
                let line = text(&message);
                got[id].extend(line.split(' ').skip(1).map(str::to_owned));
            }
        }
        Step::Replay(replay) => {
            let read = read(history, dice, &replay);
            core.replayed(&replay, read).unwrap();
        }
        Step::Idle => {}
    }
}

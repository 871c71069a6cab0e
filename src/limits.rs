//! Every bound in one place, with the relations between them checked at compile time.

use std::time::Duration;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// How often a leader says that it is there: as K3s has it for embedded etcd.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

/// Shorter than K3s' 5 s, which is there for cards that pause: here no heartbeat waits for a card. A follower trusts a silent leader
/// for the longest election timeout ([`election_max`]), and then waits once more, by chance between the shortest and the longest. So
/// a silence of 3.2 s is borne by everybody, and one of 3.4 s by nobody: ARCHITECTURE.md tells why there is so little between them.
pub const ELECTION_MIN: Duration = Duration::from_millis(1_500);

/// The longest election timeout that goes with a shortest one.
pub const fn election_max(election_min: Duration) -> Duration {
    match election_min.saturating_mul(17).checked_div(15) {
        Some(max) => max,
        None => election_min,
    }
}

/// Largest client request: etcd's default, which clients have been built against (`max-request-bytes`).
pub const REQUEST_BYTES_MAX: u64 = 3 * MIB / 2;

/// What etcd allows above the request for gRPC's own framing.
pub const GRPC_OVERHEAD_BYTES: u64 = 512 * KIB;

/// Most operations in one transaction, nested ones included (`max-txn-ops`).
pub const TXN_OPS_MAX: usize = 128;

/// Deepest nesting of transactions, the outermost one included. etcd has no limit of its own: each level must hold an
/// operation, and nested levels get what is left of `max-txn-ops`, so there it is 129 at most. Here it is what the
/// protobuf decoder accepts, which stops at 100 messages within each other, two of them for a level: without that limit,
/// 2 MiB of nested prefixes would be 250,000 calls of it on one stack. Nobody is known to nest deeper than two or three.
pub const TXN_DEPTH_MAX: usize = 50;

/// Calls that one connection may have open (`max-concurrent-streams`). etcd has no limit; but each costs 10 KiB even
/// when nothing follows its headers. A client that wants more waits, or opens another connection.
pub const CONCURRENT_STREAMS_MAX: u32 = 4_096;

/// Memory for answers that are being made or wait for their clients, of all connections. A Pi has 1 to 4 GiB and shares
/// it with Kubernetes; the unit's `MemoryHigh` is 256 MiB, and caches, log and watchers need about as much as is left.
/// One answer larger than a connection's share may be in memory besides (`etcd::budget`).
pub const ANSWER_BYTES_MAX: u64 = 64 * MIB;

/// Of these, what one connection may hold: a list of 8 MiB while it is encoded, or a dozen of etcd's largest values. A
/// client that reads gets the next answer as soon as the one before is on its way.
pub const ANSWER_BYTES_PER_CONNECTION_MAX: u64 = 16 * MIB;

/// Of these, what a connection may hold however much the others do: a few ordinary objects. All connections there can be
/// have 32 MiB of it together.
pub const ANSWER_BYTES_PER_CONNECTION_MIN: u64 = 16 * KIB;

/// A single answer may take this much while it is made; the message is about half of it. gRPC stops at 2 GiB, but a
/// transaction may ask 128 times for everything there is.
pub const ANSWER_BYTES_LARGEST: u64 = 1024 * MIB;

/// A request of up to so many bytes is taken in whatever else is on its way: renewals, watches, most reads. The call around it
/// costs more.
pub const REQUEST_BYTES_FREE: u64 = 4 * KIB;

/// A request of up to so many bytes is ordinary: larger ones wait for room of their own, and delay no smaller one.
pub const REQUEST_BYTES_ORDINARY: u64 = 64 * KIB;

/// Ordinary requests that are on their way in or being carried out, of all connections, and of one. Each is in memory about
/// three times: as it came, as it is proposed, and in the log's batch.
pub const ORDINARY_BYTES_MAX: u64 = 12 * MIB;
/// See [`ORDINARY_BYTES_MAX`].
pub const ORDINARY_BYTES_PER_CONNECTION_MAX: u64 = 4 * MIB;

/// The same of larger ones.
pub const BULK_BYTES_MAX: u64 = 24 * MIB;
/// See [`BULK_BYTES_MAX`].
pub const BULK_BYTES_PER_CONNECTION_MAX: u64 = 8 * MIB;

/// What a client may send of one request before it is wanted, and of all on one connection. Those that wait for room never take up
/// the connection's: others on it go on, and so do those that have room and are still arriving.
pub const STREAM_WINDOW_BYTES: u32 = 32 << 10;
/// See [`STREAM_WINDOW_BYTES`].
pub const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Requests that may wait for room: more are refused at once. Of one connection, and of all.
pub const REQUESTS_WAITING_PER_CONNECTION_MAX: usize = 96;
/// See [`REQUESTS_WAITING_PER_CONNECTION_MAX`].
pub const REQUESTS_WAITING_MAX: usize = 512;

/// Longest that a request waits for room, if its client has so much time.
pub const REQUEST_WAIT_MAX: Duration = Duration::from_secs(30);

/// A request that has room arrives within this, or the room is for others.
pub const REQUEST_ARRIVAL_MAX: Duration = Duration::from_secs(30);

/// Largest lease TTL in seconds that etcd accepts.
pub const LEASE_TTL_SECS_MAX: i64 = 9_000_000_000;

/// Default for `quota-backend-bytes`: etcd's.
pub const QUOTA_BACKEND_BYTES: u64 = 2 * 1024 * MIB;

/// Entries that may be committed but not applied before new proposals are refused, as in etcd.
pub const APPLY_BACKLOG_MAX: u64 = 5_000;

/// One card block. Every frame starts and ends on this boundary, so a torn write can only hurt a frame that
/// nobody was promised.
pub const WAL_BLOCK_BYTES: u64 = 4 * KIB;

/// Size a segment file is preallocated to, so that appending never changes file metadata.
pub const WAL_SEGMENT_BYTES: u64 = 8 * MIB;

/// Largest gathered batch before a barrier starts at once.
pub const WAL_BATCH_BYTES_MAX: u64 = 256 * KIB;

/// Largest record: one request plus the entry's own fields.
pub const WAL_RECORD_BYTES_MAX: u64 = 2 * MIB;

/// Largest frame on disk: a full batch and one more record of the largest size.
pub const WAL_FRAME_BYTES_MAX: u64 = 3 * MIB;

/// Slots the log fills ahead: the active one, what piles up until a checkpoint, and a spare.
pub const WAL_SLOTS_MIN: usize = 4;

/// Slots kept for reuse. More exist only while their entries may not be purged.
pub const WAL_SLOTS_MAX: usize = 16;

/// Newest entries kept in memory for followers and for applying, beside those not yet durable.
pub const WAL_CACHE_BYTES: u64 = 8 * MIB;

/// How long entries that only renew leases may wait for company (`wal-linger`).
pub const WAL_LINGER: Duration = Duration::from_millis(250);

/// Log that may pile up before a checkpoint is due.
pub const CHECKPOINT_LOG_BYTES: u64 = 16 * MIB;

/// Longest time between checkpoints while there is something to write.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);

/// Page cache of the state machine. redb's own default is 1 GiB, more than a Pi has.
pub const STATE_CACHE_BYTES: usize = 16 << 20;

/// Fastest that a snapshot is sent: half of what a Pi's card can write, so that its log finds the other half.
pub const SNAPSHOT_BYTES_PER_SECOND: u64 = 8 * MIB;

/// A file that is given back when the card is full, so that deletes and compaction still work.
pub const BALLAST_BYTES: u64 = 32 * MIB;

/// With less free space than this on the card, clients may not put: what is left is for deletes and compaction.
pub const SPACE_LOW_BYTES: u64 = 32 * MIB;

/// With this much free space, beside the ballast, they may again.
pub const SPACE_ENOUGH_BYTES: u64 = 96 * MIB;

/// How often the card is read and checked as a whole.
pub const SCRUB_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);

/// For so long after a start the card is left to those who wait for it.
pub const SCRUB_SETTLE: Duration = Duration::from_secs(600);

/// A card that was found damaged, and whose server was filled again, gets no second chance within this time: it is failing.
pub const HEAL_REST: Duration = Duration::from_secs(21 * 24 * 3600);

/// How often it is tried to have a damaged card filled again, while the others cannot spare the server.
pub const HEAL_RETRY: Duration = Duration::from_secs(600);

/// How fast the card is read to check it. A card reads twenty times as fast.
pub const SCRUB_BYTES_PER_SECOND: u64 = MIB;

/// Writes to the state machine's file that may be held in memory while the card is slow, or full.
pub const STATE_HELD_BYTES_MAX: usize = 16 << 20;

/// Nodes that may be on their way in at a time. Each is filled from the leader's card.
pub const LEARNERS_MAX: usize = 4;

/// A learner that has not answered for so long is given up; its place is for others.
pub const LEARNER_SILENT_MAX: Duration = Duration::from_secs(300);

/// A learner that answers and has no more of the log than before is given up after this: longer than any snapshot takes.
pub const LEARNER_STUCK_MAX: Duration = Duration::from_secs(1_800);

/// A card that keeps a barrier waiting for so long is no card to lead with.
pub const CARD_SLOW: Duration = Duration::from_secs(1);

/// A leader whose card keeps it waiting for so long hands over: not sooner, because the others bridge a pause with no gap at
/// all, and in time before [`CARD_HUNG_EXIT`].
pub const HAND_OVER_STALL: Duration = Duration::from_secs(15);

/// It hands over sooner, after this, if so much of the log waits in memory.
pub const HAND_OVER_STALL_MIN: Duration = Duration::from_secs(3);

/// See [`HAND_OVER_STALL_MIN`].
pub const HAND_OVER_BYTES: u64 = 32 * MIB;

/// Rest between two attempts to hand over.
pub const HAND_OVER_COOLDOWN: Duration = Duration::from_secs(60);

/// A card that has not answered a barrier for so long will not: the node exits, and systemd starts it again.
pub const CARD_HUNG_EXIT: Duration = Duration::from_secs(20);

const _: () = {
    // A leader may be held up for so long, wherever in its beat that begins, without anybody standing for election.
    let silence = ELECTION_MIN.as_millis() + election_max(ELECTION_MIN).as_millis();
    assert!(2_700 <= silence - HEARTBEAT.as_millis());
    assert!(HAND_OVER_STALL_MIN.as_secs() < HAND_OVER_STALL.as_secs());
    // A look a second, a hand-over within two elections' pre-vote and vote.
    assert!(HAND_OVER_STALL.as_secs() + 3 <= CARD_HUNG_EXIT.as_secs());
    assert!(LEARNER_SILENT_MAX.as_secs() < LEARNER_STUCK_MAX.as_secs());
    // The next check after a refill must not refill again.
    assert!(SCRUB_INTERVAL.as_secs() < HEAL_REST.as_secs());
    assert!(REQUEST_BYTES_MAX + GRPC_OVERHEAD_BYTES <= WAL_RECORD_BYTES_MAX);
    // Two connections that never read must leave the others more than they take.
    assert!(2 * ANSWER_BYTES_PER_CONNECTION_MAX <= ANSWER_BYTES_MAX / 2);
    // However many requests wait, a quarter of the connection's window is for others.
    assert!(
        REQUESTS_WAITING_PER_CONNECTION_MAX as u64 * STREAM_WINDOW_BYTES as u64
            <= 3 * CONNECTION_WINDOW_BYTES as u64 / 4
    );
    assert!(REQUEST_BYTES_MAX + GRPC_OVERHEAD_BYTES <= BULK_BYTES_PER_CONNECTION_MAX);
    // A value, what it was before, and both encoded.
    assert!(4 * REQUEST_BYTES_MAX <= ANSWER_BYTES_PER_CONNECTION_MAX);
    assert!(WAL_BATCH_BYTES_MAX + WAL_RECORD_BYTES_MAX + WAL_BLOCK_BYTES <= WAL_FRAME_BYTES_MAX);
    assert!(WAL_FRAME_BYTES_MAX * 2 <= WAL_SEGMENT_BYTES);
    assert!(WAL_SEGMENT_BYTES.is_multiple_of(WAL_BLOCK_BYTES));
    assert!(CHECKPOINT_LOG_BYTES.div_ceil(WAL_SEGMENT_BYTES) + 2 <= WAL_SLOTS_MIN as u64);
    assert!(WAL_SLOTS_MIN <= WAL_SLOTS_MAX);
    // Giving the ballast back must not look like enough room, and must make room for what is held.
    assert!(SPACE_LOW_BYTES + BALLAST_BYTES < SPACE_ENOUGH_BYTES);
    assert!(STATE_HELD_BYTES_MAX as u64 <= BALLAST_BYTES);
};

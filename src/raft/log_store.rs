//! The write-ahead log as openraft sees it: a thin translation, no decisions.
//!
//! # Invariants
//!
//! - `save_vote` returns after its barrier; `append` calls back after its barrier; nothing else waits.
//! - Truncation and purge are ordered records in the same log, so no reordering is possible on the card.
//! - A purge never passes the last durable checkpoint of the state machine, whatever openraft asks.
//! - What is read for a message or to be applied is read by bytes, however many entries are asked for. (openraft's start asks
//!   for 64 entries at a time, and wants all of them.)

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use futures_util::{Stream, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};

use super::checkpoint::CheckpointMark;
use super::types::{self, Entry, RaftLogId, RaftVote, TypeConfig};
use crate::command::Class;
use crate::mutants::{Mutant, is_planted};
use crate::types::{LogId, LogIndex};
use crate::wal::{self, Record, Urgency, Wal};

/// Most bytes of entries read at a time, and sent in one message: 40 ms of a Pi's Ethernet, so that what comes behind it does
/// not wait for long. A single larger entry is read and sent as it is.
const READ_BYTES_MAX: u64 = 512 << 10;

/// See the module documentation.
#[derive(Clone, Debug)]
pub(super) struct LogStore {
    wal: Wal,
    checkpoint: Arc<CheckpointMark>,
}

impl LogStore {
    pub(super) const fn new(wal: Wal, checkpoint: Arc<CheckpointMark>) -> Self {
        Self { wal, checkpoint }
    }

    /// Puts a record in its place in the order of writes. It becomes durable with what follows it.
    fn remember(&self, record: Record) -> io::Result<()> {
        // Nobody waits for it; a log that failed says so to whoever does wait.
        self.wal.append(vec![record], Urgency::RideAlong, |_| ()).map_err(io::Error::other)
    }

    fn read(&self, start: u64, end: u64, bytes_max: u64) -> io::Result<Vec<Entry>> {
        let range = LogIndex::new(start)..LogIndex::new(end);
        self.wal.entries(range, bytes_max)?.into_iter().map(entry_from_wal).collect()
    }
}

fn entry_from_wal(entry: wal::Entry) -> io::Result<Entry> {
    let payload = types::decode_payload(&entry.payload)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Entry { log_id: types::raft_log_id(entry.id), payload })
}

fn urgency(payload: &types::Payload) -> Urgency {
    match payload {
        types::Payload::Normal(command) => match command.class() {
            Class::Lease => Urgency::Lease,
            Class::Urgent => Urgency::Urgent,
        },
        types::Payload::Blank | types::Payload::Membership(_) => Urgency::Urgent,
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end + 1,
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

/// Entries of a range, read a few at a time.
struct ReadAhead {
    log: LogStore,
    next: u64,
    end: u64,
    read: std::vec::IntoIter<Entry>,
}

impl Iterator for ReadAhead {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(entry) = self.read.next() {
            return Some(Ok(entry));
        }
        if self.end <= self.next {
            return None;
        }
        match self.log.read(self.next, self.end, READ_BYTES_MAX) {
            Ok(entries) => {
                // Nothing there: openraft, which knows what must be there, says so.
                self.next = entries.last().map_or(self.end, |last| last.log_id.index() + 1);
                self.read = entries.into_iter();
                self.read.next().map(Ok)
            }
            Err(error) => {
                self.next = self.end;
                Some(Err(error))
            }
        }
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = bounds(&range);
        self.read(start, end, u64::MAX)
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        // What is applied is committed, so it is neither cut off nor purged between two reads.
        let (start, end) = bounds(&range);
        stream::iter(ReadAhead {
            log: self.clone(),
            next: start,
            end,
            read: Vec::new().into_iter(),
        })
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end, READ_BYTES_MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<RaftVote>, io::Error> {
        Ok(self.wal.hard_state().vote.map(types::raft_vote))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.wal.hard_state();
        Ok(LogState {
            last_purged_log_id: state.purged.map(types::raft_log_id),
            last_log_id: state.last.or(state.purged).map(types::raft_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> Result<(), io::Error> {
        self.remember(Record::Vote(types::vote(vote)))?;
        if is_planted(Mutant::VoteNotSynced) {
            return Ok(());
        }
        self.wal.flush().await.map(|_durable| ()).map_err(io::Error::other)
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> Result<(), io::Error> {
        match committed {
            Some(committed) => self.remember(Record::Committed(types::log_id(&committed))),
            None => Ok(()),
        }
    }

    async fn read_committed(&mut self) -> Result<Option<RaftLogId>, io::Error> {
        let state = self.wal.hard_state();
        // A hint, and never one about entries that are not here: openraft would look for them.
        let is_here = |id: &LogId| state.last.is_some_and(|last| id.index <= last.index);
        Ok(state.committed.filter(is_here).map(types::raft_log_id))
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        // One entry that somebody waits for takes the whole append along.
        let mut most_urgent = Urgency::Lease;
        let records = entries
            .into_iter()
            .map(|entry| {
                most_urgent = most_urgent.max(urgency(&entry.payload));
                Record::Entry {
                    id: types::log_id(&entry.log_id),
                    payload: types::encode_payload(&entry.payload),
                }
            })
            .collect();
        if is_planted(Mutant::AckEarly) {
            callback.io_completed(Ok(()));
            return self.wal.append(records, most_urgent, |_| ()).map_err(io::Error::other);
        }
        self.wal
            .append(records, most_urgent, move |result| {
                callback.io_completed(result.map(|_durable| ()).map_err(io::Error::other));
            })
            .map_err(io::Error::other)
    }

    async fn truncate_after(&mut self, last: Option<RaftLogId>) -> Result<(), io::Error> {
        if is_planted(Mutant::TruncationLost) {
            return Ok(());
        }
        self.remember(Record::TruncateAfter(last.as_ref().map(types::log_id)))
    }

    async fn purge(&mut self, upto: RaftLogId) -> Result<(), io::Error> {
        let upto = types::log_id(&upto);
        // Replay starts at the durable checkpoint; what it needs stays, even if openraft thinks otherwise.
        if !self.checkpoint.covers(upto) {
            return Ok(());
        }
        self.remember(Record::Purge(upto))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use openraft::storage::RaftLogStorageExt as _;

    use super::*;
    use crate::testkit::{self, FaultDisk, ManualClock};
    use crate::types::{NodeId, Term};

    fn id(index: u64) -> LogId {
        LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) }
    }

    async fn open(disk: &FaultDisk) -> (LogStore, tokio::task::JoinHandle<()>) {
        let env = testkit::env(disk, &ManualClock::new(), 1);
        let options = wal::Options { segment_bytes: 64 << 10, ..wal::Options::default() };
        let owner = wal::Identity::default();
        let (wal, _, writer) = Wal::open(&env, Path::new("/db/wal"), owner, options).await.unwrap();
        let store = LogStore::new(wal, Arc::new(CheckpointMark::new(Some(id(100)))));
        (store, tokio::spawn(writer.run()))
    }

    /// After a snapshot was installed, the log ends before the entry that is purged up to.
    #[tokio::test]
    async fn purge_beyond_the_end_empties_the_log_and_lets_it_go_on_there() {
        let disk = FaultDisk::with_dir(Path::new("/db"));
        let (mut store, writer) = open(&disk).await;
        let blank =
            |index| Entry { log_id: types::raft_log_id(id(index)), payload: types::Payload::Blank };
        store.blocking_append([blank(1), blank(2), blank(3)]).await.unwrap();
        store.truncate_after(Some(types::raft_log_id(id(2)))).await.unwrap();
        store.purge(types::raft_log_id(id(50))).await.unwrap();
        store.save_committed(Some(types::raft_log_id(id(60)))).await.unwrap();
        store.blocking_append([blank(51)]).await.unwrap();
        assert_eq!(store.read_committed().await.unwrap(), None, "60 is not here");

        store.wal.close().await.unwrap();
        writer.await.unwrap();
        disk.power_cut(|_| testkit::disk::Fate::LOST);
        let (mut store, _writer) = open(&disk).await;

        let state = store.get_log_state().await.unwrap();
        assert_eq!(state.last_purged_log_id, Some(types::raft_log_id(id(50))));
        assert_eq!(state.last_log_id, Some(types::raft_log_id(id(51))));
        let entries = store.read(0, u64::MAX, u64::MAX).unwrap();
        assert_eq!(entries.iter().map(|entry| entry.log_id.index).collect::<Vec<_>>(), [51]);
        store.save_committed(Some(types::raft_log_id(id(51)))).await.unwrap();
        assert_eq!(store.read_committed().await.unwrap(), Some(types::raft_log_id(id(51))));
    }
}

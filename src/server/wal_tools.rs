//! `wal verify`, `wal dump` and what `check` reads: look into a node's log without touching it.
//!
//! The log holds requests, not what came of them. To name the revision each write got, the dump applies them again, to
//! a store of its own in a temporary directory: from the beginning if the log still has it, else from a copy of the
//! node's last checkpoint. For entries before that the state remembers it (`mvcc::marks`), for a quarter of a million of
//! them; still older ones are shown without a revision.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use thiserror::Error;

use super::data_dir::{STATE_FILE, wal_dir};
use crate::apply;
use crate::command::Encoded;
use crate::env::{Env, host};
use crate::limits;
use crate::mvcc::{self, DrainOn, Store, StoreError};
use crate::raft::inspect::{Content, content};
use crate::types::{LogId, Revision};
use crate::wal::{OpenError, inspect};

/// Why a log could not be shown.
#[derive(Debug, Error)]
pub enum ToolError {
    /// The log cannot be read, or is damaged.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// The log is damaged: `wal verify` prints where, and this is its result.
    #[error("the log is damaged")]
    Damaged,
    /// An entry holds what this release does not know.
    #[error("entry {id}: {what}")]
    Entry {
        /// The entry.
        id: LogId,
        /// What is wrong with it.
        what: String,
    },
    /// The temporary store failed.
    #[error("applying the log again: {0}")]
    Store(#[from] StoreError),
    /// Output or a temporary file failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The log of a data directory; a log directory itself is taken too.
fn log_of(directory: &Path) -> PathBuf {
    let inside = wal_dir(directory);
    if inside.is_dir() { inside } else { directory.to_owned() }
}

/// Checks every frame and prints what is there, down to the first damage.
pub fn verify(directory: &Path, json: bool, out: &mut dyn Write) -> Result<(), ToolError> {
    let report = inspect::verify(&*host::env().disk, &log_of(directory))?;
    if json {
        writeln!(out, "{}", verify_json(&report))?;
    } else {
        verify_text(&report, out)?;
    }
    if report.damage.is_some() { Err(ToolError::Damaged) } else { Ok(()) }
}

fn verify_json(report: &inspect::Report) -> serde_json::Value {
    let index = |id: Option<LogId>| id.map(|id| id.index.get());
    let segments: Vec<_> = report
        .segments
        .iter()
        .map(|segment| {
            json!({
                "number": segment.number.get(),
                "path": segment.path.display().to_string(),
                "bytes": segment.bytes,
            })
        })
        .collect();
    json!({
        "segments": segments,
        "spare_slots": report.spare_slots,
        "frames": report.frames,
        "cluster": report.identity.map(|identity| identity.cluster.to_string()),
        "node": report.identity.map(|identity| identity.node.to_string()),
        "first": report.first.map(crate::types::LogIndex::get),
        "last": index(report.state.last),
        "committed": index(report.state.committed),
        "purged": index(report.state.purged),
        "clean": report.clean,
        "torn_tail": report.cut.as_ref().map(|cut| json!({
            "path": cut.path.display().to_string(),
            "segment": cut.segment.get(),
            "offset": cut.offset,
            "found": cut.defect.to_string(),
        })),
        "damage": report.damage.as_ref().map(ToString::to_string),
    })
}

fn verify_text(report: &inspect::Report, out: &mut dyn Write) -> io::Result<()> {
    if let Some(damage) = &report.damage {
        return writeln!(out, "DAMAGED: {damage}");
    }
    let show = |id: Option<LogId>| id.map_or_else(|| "none".to_owned(), |id| id.to_string());
    for segment in &report.segments {
        let (number, path) = (segment.number, segment.path.display());
        writeln!(out, "segment {number}: {path}, {} bytes", segment.bytes)?;
    }
    writeln!(out, "spare slots: {}", report.spare_slots)?;
    writeln!(out, "frames: {}, all good", report.frames)?;
    writeln!(out, "last entry: {}", show(report.state.last))?;
    writeln!(out, "committed: {}", show(report.state.committed))?;
    writeln!(out, "purged: {}", show(report.state.purged))?;
    match &report.cut {
        Some(cut) => writeln!(
            out,
            "torn tail: {} at {}, {}; the next start cuts it, nothing acknowledged is in it",
            cut.path.display(),
            cut.offset,
            cut.defect
        ),
        None if report.clean => writeln!(out, "closed cleanly"),
        None => writeln!(out, "not closed: the node runs, or crashed"),
    }
}

/// Prints every committed write in order.
pub fn dump(directory: &Path, json: bool, out: &mut dyn Write) -> Result<(), ToolError> {
    let env = host::env();
    let entries = inspect::entries(&*env.disk, &log_of(directory))?;
    let committed = entries.state().committed;
    let from_start = entries.state().purged.is_none();
    let mut replay = Replay::prepare(&env, directory, from_start)?;
    let mut voters = replay.voters.clone();
    for entry in entries {
        let entry = entry?;
        let content =
            content(&entry.payload).map_err(|what| ToolError::Entry { id: entry.id, what })?;
        if let Content::Voters(ids) = &content {
            voters.clone_from(ids);
        }
        // The only voter commits what it has; with peers, only what the log says is certain.
        let alone = voters.len() == 1;
        if !alone && committed.is_none_or(|committed| committed.index < entry.id.index) {
            break;
        }
        if let Content::Command(encoded) = &content {
            let revision = replay.apply(entry.id, encoded)?;
            print(entry.id, encoded, revision, json, out)?;
        }
    }
    Ok(())
}

/// The critical flags that a stopped node has on disk, if it has any (`critical::ClusterFlags::decode`). Reads a copy.
pub fn recorded_flags(directory: &Path) -> Result<Option<bytes::Bytes>, ToolError> {
    let env = host::env();
    let mut replay = Replay::prepare(&env, directory, false)?;
    let entries = inspect::entries(&*env.disk, &log_of(directory))?;
    let committed = entries.state().committed;
    let alone = replay.voters.len() == 1;
    for entry in entries {
        let entry = entry?;
        if !alone && committed.is_none_or(|committed| committed.index < entry.id.index) {
            break;
        }
        let content =
            content(&entry.payload).map_err(|what| ToolError::Entry { id: entry.id, what })?;
        if let Content::Command(encoded) = &content {
            replay.apply(entry.id, encoded)?;
        }
    }
    Ok(apply::flags(&replay.store.read()?)?)
}

fn print(
    id: LogId,
    encoded: &Encoded,
    revision: Option<Revision>,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), ToolError> {
    let kind =
        encoded.decode().map_err(|error| ToolError::Entry { id, what: error.to_string() })?.kind();
    if json {
        let line = json!({
            "term": id.term.get(),
            "index": id.index.get(),
            "revision": revision.map(Revision::get),
            "kind": kind,
            "request": STANDARD.encode(encoded.message()),
        });
        writeln!(out, "{line}")?;
    } else {
        let revision = revision.map_or_else(|| "-".to_owned(), |revision| revision.to_string());
        let bytes = encoded.message().len();
        writeln!(out, "{} term {} revision {revision} {kind} {bytes} bytes", id.index, id.term)?;
    }
    Ok(())
}

/// Applies the log again, somewhere else.
struct Replay {
    store: Store,
    /// What the store began with; entries up to here are in it already.
    base: Option<LogId>,
    /// Who voted at the base.
    voters: BTreeSet<crate::types::NodeId>,
    dir: PathBuf,
}

impl Drop for Replay {
    fn drop(&mut self) {
        // It lies in the system's temporary directory; what cannot be removed now goes at the next boot.
        drop(fs::remove_dir_all(&self.dir));
    }
}

impl Replay {
    fn prepare(env: &Env, directory: &Path, from_start: bool) -> Result<Self, ToolError> {
        let name = format!("k3s-server-dump-{:016x}", env.entropy.next_u64());
        let dir = std::env::temp_dir().join(name);
        env.disk.create_dir_all(&dir)?;
        if !from_start {
            for file in mvcc::backend::files(&directory.join(STATE_FILE)) {
                if let (true, Some(name)) = (file.exists(), file.file_name()) {
                    fs::copy(&file, dir.join(name))?;
                }
            }
        }
        let options =
            mvcc::Options { cache_bytes: limits::STATE_CACHE_BYTES, drain: DrainOn::Thread };
        let store = Store::open(env, &dir.join(STATE_FILE), &options)?;
        let view = store.read()?;
        let base = view.applied();
        let voters = crate::raft::inspect::voters(&view)
            .map_err(|what| ToolError::Entry { id: base.unwrap_or_default(), what })?;
        Ok(Self { store, base, voters, dir })
    }

    /// The revision after this entry; `None` if it lies before what the replay began with, and is not remembered.
    fn apply(&mut self, id: LogId, encoded: &Encoded) -> Result<Option<Revision>, ToolError> {
        if self.base.is_some_and(|base| id.index <= base.index) {
            return Ok(self.store.read()?.revision_after(id.index)?);
        }
        let command =
            encoded.decode().map_err(|error| ToolError::Entry { id, what: error.to_string() })?;
        let applied = self.store.write(|txn| apply::apply(txn, id, &command))?;
        Ok(Some(applied.outcome.revision))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use crate::proto::etcdserverpb as pb;
    use crate::testkit::wait;
    use crate::types::{LogIndex, NodeId, Term};
    use crate::wal::{self, Record, Urgency, Wal};

    fn id(index: u64) -> LogId {
        LogId { term: Term::new(1), leader: NodeId::new(1), index: LogIndex::new(index) }
    }

    /// Every third deletes what is not there, and so makes no revision.
    fn command(index: u64) -> Command {
        let key = format!("key{index}").into();
        if index.is_multiple_of(3) {
            Command::DeleteRange(pb::DeleteRangeRequest { key, ..Default::default() })
        } else {
            Command::Put(pb::PutRequest { key, ..Default::default() })
        }
    }

    async fn write_log(dir: &Path, purged: u64, last: u64) {
        let options = wal::Options { segment_bytes: 1 << 20, ..wal::Options::default() };
        let owner = wal::Identity::default();
        let (wal, _, writer) = Wal::open(&host::env(), dir, owner, options).await.unwrap();
        writer.spawn_thread().unwrap();
        let entry = |index| Record::Entry {
            id: id(index),
            payload: command(index).encode().bytes().clone(),
        };
        wal.append((1..=last).map(entry).collect(), Urgency::Urgent, |_| ()).unwrap();
        let records = vec![Record::Committed(id(last)), Record::Purge(id(purged))];
        wal.append(records, Urgency::Urgent, |_| ()).unwrap();
        wal.close().await.unwrap();
    }

    /// Applies entries in batches of odd sizes, with a restart in the middle; returns the revision after each.
    async fn write_state(path: &Path, last: u64) -> Vec<i64> {
        let options = mvcc::Options { cache_bytes: 1 << 20, drain: DrainOn::Thread };
        let mut revisions = Vec::new();
        let mut next = 1;
        while next <= last {
            let store = Store::open(&host::env(), path, &options).unwrap();
            for size in [1, 7, 70] {
                store
                    .write(|txn| {
                        for index in next..=last.min(next + size - 1) {
                            let applied = apply::apply(txn, id(index), &command(index))?;
                            revisions.push(applied.outcome.revision.get());
                        }
                        Ok(())
                    })
                    .unwrap();
                next += size;
            }
            store.close().await.unwrap();
        }
        revisions
    }

    /// Everything before the state's last checkpoint was null once the log no longer began at its beginning.
    #[test]
    fn every_write_has_its_revision_though_the_log_begins_in_the_middle() {
        let dir = tempfile::tempdir().unwrap();
        let (purged, applied, last) = (10, 300, 320);
        let mut revisions = wait(write_state(&dir.path().join(STATE_FILE), applied));
        wait(write_log(&wal_dir(dir.path()), purged, last));
        for index in applied + 1..=last {
            let made = i64::from(!index.is_multiple_of(3));
            revisions.push(revisions.last().unwrap() + made);
        }

        let mut out = Vec::new();
        dump(dir.path(), true, &mut out).unwrap();

        let lines: Vec<serde_json::Value> = String::from_utf8(out)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len() as u64, last - purged);
        for line in lines {
            let index = usize::try_from(line["index"].as_u64().unwrap()).unwrap();
            assert_eq!(line["revision"].as_i64(), Some(revisions[index - 1]), "{line}");
        }
    }
}

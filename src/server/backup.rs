//! `etcdctl snapshot save`: the store at one moment, laid out as etcd's database file.

use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use prost::Message;

use crate::backup::bolt::WriteError;
use crate::backup::etcd_file::{EtcdFile, RevisionRow, Revisions};
use crate::env::{Env, Open};
use crate::etcd::{self, Backup, BackupSource};
use crate::mvcc::{ReadTxn, StoreError};
use crate::proto::mvccpb::KeyValue;
use crate::proto::mvccpb::event::EventType;
use crate::raft::{Member, Node};
use crate::types::{LogId, Revision};

/// History read from the store at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Room that a backup leaves on the card: the datastore comes first.
const FREE_BYTES_MIN: u64 = 128 << 20;

/// One moment of the store, and what etcd's file wants to know besides.
struct Moment {
    view: ReadTxn,
    applied: LogId,
    members: Arc<[Member]>,
}

impl Revisions for ReadTxn {
    fn walk(
        &self,
        visit: &mut dyn FnMut(RevisionRow<'_>) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        let mut from = Revision::new(0);
        while from <= self.revision() {
            let (chunk, looked_at) = self.events(from, None, CHUNK_BYTES).map_err(io_error)?;
            for revision in chunk {
                for (event, sub) in revision.events.iter().zip(0_i64..) {
                    let tombstone = event.r#type() == EventType::Delete;
                    let mut kv = event.kv.clone().unwrap_or_default();
                    if tombstone {
                        // As etcd stores it: nothing but the key.
                        kv = KeyValue { key: kv.key, ..KeyValue::default() };
                    }
                    let key_value = kv.encode_to_vec();
                    visit(RevisionRow {
                        main: revision.revision,
                        sub,
                        tombstone,
                        key_value: &key_value,
                    })?;
                }
            }
            from = looked_at.next();
        }
        Ok(())
    }
}

fn io_error(error: StoreError) -> WriteError {
    WriteError::Io(io::Error::other(error))
}

impl Moment {
    fn of(node: &Node) -> Result<Self, StoreError> {
        let view = node.store().read()?;
        let applied = view.applied().unwrap_or_default();
        Ok(Self { view, applied, members: node.status().members })
    }

    fn with_file<T>(
        &self,
        act: impl FnOnce(&EtcdFile<'_>) -> Result<T, WriteError>,
    ) -> Result<T, WriteError> {
        let leases = self.view.leases().map_err(io_error)?;
        let alarms = self.view.alarms().map_err(io_error)?;
        act(&EtcdFile {
            revisions: &self.view,
            compacted: self.view.compacted(),
            applied: self.applied.index,
            term: self.applied.term,
            leases: &leases,
            alarms: &alarms,
            members: &self.members,
            version: etcd::CLUSTER_VERSION,
        })
    }

    /// Measures, then streams from a thread of its own: the file is never in memory or on this node's card.
    fn stream(self) -> io::Result<Backup> {
        let plan = self.with_file(|file| file.plan()).map_err(io::Error::other)?;
        let bytes = plan.bytes();
        let (reader, mut writer) = io::pipe()?;
        thread::Builder::new().name("backup".to_owned()).spawn(move || {
            let written = self.with_file(|file| file.write(&plan, &mut writer));
            if let Err(error) = written {
                // The reader sees a short stream and says so to the client, who may simply have gone.
                tracing::debug!(%error, "backup ended early");
            }
        })?;
        Ok(Backup { bytes, reader: Box::new(reader) })
    }
}

/// Writes a backup to a new file, durable when this returns its length. Blocks: for a thread of its own.
pub(super) async fn write_file(node: &Node, env: &Env, path: &Path) -> io::Result<u64> {
    let directory = path.parent().unwrap_or(Path::new("."));
    env.disk.create_dir_all(directory)?;
    if env.disk.exists(path)? {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a backup of this name"));
    }
    let Backup { bytes, mut reader } = Moment::of(node).map_err(io::Error::other)?.stream()?;
    let free = env.disk.free_bytes(directory)?;
    if free < bytes.saturating_add(FREE_BYTES_MIN) {
        let text = format!("the backup needs {bytes} bytes, and {free} are free");
        return Err(io::Error::new(io::ErrorKind::StorageFull, text));
    }
    let unfinished = path.with_extension("unfinished");
    if env.disk.exists(&unfinished)? {
        env.disk.remove(&unfinished)?;
    }
    let file = env.disk.open(&unfinished, Open::Create)?;
    let (mut piece, mut at) = (vec![0; CHUNK_BYTES], 0_u64);
    loop {
        let length = reader.read(&mut piece)?;
        if length == 0 {
            break;
        }
        file.write_at(&piece[..length], at)?;
        at += length as u64;
    }
    if at != bytes {
        env.disk.remove(&unfinished)?;
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the backup ended early"));
    }
    file.sync().await?;
    env.disk.rename(&unfinished, path)?;
    env.disk.sync_dir(directory)?;
    Ok(bytes)
}

/// Backups of this node's store.
pub(super) fn source(node: Node) -> BackupSource {
    Arc::new(move || Moment::of(&node).map_err(io::Error::other)?.stream())
}

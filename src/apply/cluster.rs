//! What the cluster knows of itself: its critical flags, and every node that ever started.
//!
//! Records beside the keys, replicated and carried by snapshots like them. Changing one costs no revision: etcd's clients
//! never see it.
//!
//! # Invariants
//!
//! - A node that is retired stays retired.
//! - A node's epoch only grows: a start with an epoch that is known already comes from an old or a copied card.
//! - The format is never lowered, and raised only if every member, as of this entry, has announced that it reads it.

use prost::Message;

use crate::mvcc::{ReadTxn, StoreError, WriteTxn};
use crate::proto::node::cluster_change::Change;
use crate::proto::node::cluster_reply::Result as Answer;
use crate::proto::node::{
    Boot, ClusterChange, ClusterReply, FormatRecord, NodeRecord, RaiseFormat, Retire,
    StoredMembership,
};
use crate::types::NodeId;
use crate::versions;

use super::Step;

const FLAGS: &str = "flags";
const FORMAT: &str = "format";
const NODES: &str = "node/";

fn node_name(id: u64) -> String {
    format!("{NODES}{id:016x}")
}

fn answer(result: Answer) -> ClusterReply {
    ClusterReply { result: result.into(), epoch: 0 }
}

pub(super) fn change(txn: &mut WriteTxn<'_>, change: &ClusterChange) -> Step<ClusterReply> {
    let done = match &change.change {
        Some(Change::RecordFlags(record)) => replace_flags(txn, None, &record.flags)?,
        Some(Change::SetFlag(set)) => replace_flags(txn, Some(&set.expected), &set.flags)?,
        Some(Change::Boot(boot)) => self::boot(txn, boot)?,
        Some(Change::Retire(retire)) => self::retire(txn, retire)?,
        Some(Change::RaiseFormat(raise)) => raise_format(txn, raise)?,
        // Written by a later release: it knows what it means, we know that we do not.
        None => answer(Answer::Conflict),
    };
    Ok(done)
}

/// Compare and set. The same record written twice is done, not a conflict: whoever was cut off may ask again.
fn replace_flags(
    txn: &mut WriteTxn<'_>,
    expected: Option<&[u8]>,
    flags: &[u8],
) -> Step<ClusterReply> {
    let found = txn.record(FLAGS)?;
    if found.as_deref() == Some(flags) {
        return Ok(answer(Answer::Done));
    }
    if found.as_deref() != expected {
        return Ok(answer(Answer::Conflict));
    }
    txn.set_record(FLAGS, flags)?;
    Ok(answer(Answer::Done))
}

fn boot(txn: &mut WriteTxn<'_>, boot: &Boot) -> Step<ClusterReply> {
    let name = node_name(boot.node);
    let known = decode(txn.record(&name)?.as_deref())?;
    if known.retired {
        return Ok(answer(Answer::Retired));
    }
    if boot.epoch <= known.epoch {
        return Ok(ClusterReply { result: Answer::StaleEpoch.into(), epoch: known.epoch });
    }
    let record = NodeRecord {
        epoch: boot.epoch,
        name: boot.name.clone(),
        release: boot.release.clone(),
        wire_version: boot.wire_version,
        format: boot.format,
        ..known
    };
    txn.set_record(&name, &record.encode_to_vec())?;
    Ok(answer(Answer::Done))
}

fn retire(txn: &mut WriteTxn<'_>, retire: &Retire) -> Step<ClusterReply> {
    let name = node_name(retire.node);
    let known = decode(txn.record(&name)?.as_deref())?;
    if !known.retired {
        let record = NodeRecord { retired: true, retired_reason: retire.reason.clone(), ..known };
        txn.set_record(&name, &record.encode_to_vec())?;
    }
    Ok(answer(Answer::Done))
}

/// Raised once is done for whoever asks again.
fn raise_format(txn: &mut WriteTxn<'_>, raise: &RaiseFormat) -> Step<ClusterReply> {
    let known = decode_format(txn.record(FORMAT)?.as_deref())?;
    if raise.format <= known.format {
        return Ok(answer(Answer::Done));
    }
    let Some(members) = txn.membership()? else { return Ok(answer(Answer::Conflict)) };
    let members = StoredMembership::decode(members.as_ref())
        .map_err(|error| StoreError::damaged("meta", error.to_string()))?;
    let members = members.membership.unwrap_or_default().members;
    for member in &members {
        let record = decode(txn.record(&node_name(member.id))?.as_deref())?;
        if versions::announced(record.format) < raise.format {
            return Ok(answer(Answer::Conflict));
        }
    }
    if members.is_empty() {
        return Ok(answer(Answer::Conflict));
    }
    let record = FormatRecord { format: raise.format, release: raise.release.clone() };
    txn.set_record(FORMAT, &record.encode_to_vec())?;
    Ok(answer(Answer::Done))
}

fn decode_format(bytes: Option<&[u8]>) -> Result<FormatRecord, StoreError> {
    let first = FormatRecord { format: versions::FORMAT_FIRST, release: String::new() };
    let Some(bytes) = bytes else { return Ok(first) };
    FormatRecord::decode(bytes).map_err(|error| StoreError::damaged("meta", error.to_string()))
}

/// The format in which the cluster's data is written, and the release that raised it.
pub fn format(view: &ReadTxn) -> Result<FormatRecord, StoreError> {
    decode_format(view.record(FORMAT)?.as_deref())
}

fn decode(bytes: Option<&[u8]>) -> Result<NodeRecord, StoreError> {
    let Some(bytes) = bytes else { return Ok(NodeRecord::default()) };
    NodeRecord::decode(bytes).map_err(|error| StoreError::damaged("meta", error.to_string()))
}

/// The critical flags as recorded, if they are: `critical::ClusterFlags` reads them.
pub fn flags(view: &ReadTxn) -> Result<Option<bytes::Bytes>, StoreError> {
    view.record(FLAGS)
}

/// What is known of a node.
pub fn node(view: &ReadTxn, id: NodeId) -> Result<Option<NodeRecord>, StoreError> {
    view.record(&node_name(id.get()))?.map(|bytes| decode(Some(&bytes))).transpose()
}

/// Every node that ever started, by id.
pub fn nodes(view: &ReadTxn) -> Result<Vec<(NodeId, NodeRecord)>, StoreError> {
    let mut nodes = Vec::new();
    for (name, bytes) in view.records(NODES)? {
        let id = name.strip_prefix(NODES).and_then(|id| u64::from_str_radix(id, 16).ok());
        let Some(id) = id else {
            return Err(StoreError::damaged("meta", format!("{name} names no node")));
        };
        nodes.push((NodeId::new(id), decode(Some(&bytes))?));
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use crate::apply::Reply;
    use crate::apply::tests::Machine;
    use crate::command::Command;
    use crate::proto::node as wire;
    use crate::proto::node::{RecordFlags, SetFlag};

    use super::*;

    fn done(machine: &mut Machine, change: Change) -> ClusterReply {
        let applied = machine.apply(Command::Cluster(ClusterChange { change: Some(change) }));
        assert_eq!(applied.outcome.revision.get(), 1, "no revision for etcd's clients");
        let Ok(Reply::Cluster(reply)) = applied.outcome.reply else {
            panic!("{:?}", applied.outcome)
        };
        reply
    }

    fn boot(epoch: u64) -> Change {
        Change::Boot(Boot { node: 7, epoch, name: "pi-1".to_owned(), ..Boot::default() })
    }

    #[test]
    fn a_start_is_known_once() {
        let mut machine = Machine::new();
        assert_eq!(done(&mut machine, boot(1)), answer(Answer::Done));
        assert_eq!(done(&mut machine, boot(3)), answer(Answer::Done));
        for old in [1, 3] {
            let reply = ClusterReply { result: Answer::StaleEpoch.into(), epoch: 3 };
            assert_eq!(done(&mut machine, boot(old)), reply);
        }
        let known = node(&machine.store.read().unwrap(), NodeId::new(7)).unwrap().unwrap();
        assert_eq!((known.epoch, known.name.as_str()), (3, "pi-1"));
    }

    #[test]
    fn a_retired_node_does_not_come_back() {
        let mut machine = Machine::new();
        done(&mut machine, boot(1));
        let reason = "removed by an operator".to_owned();
        let retire = Change::Retire(Retire { node: 7, reason });
        assert_eq!(done(&mut machine, retire), answer(Answer::Done));
        assert_eq!(done(&mut machine, boot(9)), answer(Answer::Retired));
        let nodes = nodes(&machine.store.read().unwrap()).unwrap();
        assert_eq!(nodes.len(), 1);
        assert!(nodes[0].1.retired && nodes[0].1.retired_reason.contains("operator"));
    }

    fn raise(format: u32) -> Change {
        Change::RaiseFormat(RaiseFormat { format, release: "0.2.0".to_owned() })
    }

    fn boots(node: u64, epoch: u64, format: u32) -> Change {
        Change::Boot(Boot { node, epoch, format, ..Boot::default() })
    }

    #[test]
    fn format_is_raised_when_every_member_reads_it_and_never_lowered() {
        let mut machine = Machine::new();
        let now = |machine: &Machine| format(&machine.store.read().unwrap()).unwrap().format;
        assert_eq!(done(&mut machine, raise(2)), answer(Answer::Conflict), "nobody is a member");
        let members = [7, 8].map(|id| wire::Member { id, ..Default::default() }).to_vec();
        let membership = wire::Membership { members, ..Default::default() };
        let stored = StoredMembership { membership: Some(membership), log_id: None };
        machine.store.write(|txn| txn.set_membership(&stored.encode_to_vec())).unwrap();

        done(&mut machine, boots(7, 1, 2));
        assert_eq!(done(&mut machine, raise(2)), answer(Answer::Conflict), "8 never started");
        done(&mut machine, boots(8, 1, 0));
        assert_eq!(done(&mut machine, raise(2)), answer(Answer::Conflict), "8 reads the first");
        done(&mut machine, boots(8, 2, 3));
        assert_eq!(done(&mut machine, raise(3)), answer(Answer::Conflict), "7 does not");
        assert_eq!(now(&machine), 1);
        assert_eq!(done(&mut machine, raise(2)), answer(Answer::Done));
        assert_eq!(done(&mut machine, raise(2)), answer(Answer::Done), "asked again");
        assert_eq!(done(&mut machine, raise(1)), answer(Answer::Done), "it is at least that");
        assert_eq!(now(&machine), 2);
        // Whoever is no member any more is not asked.
        done(&mut machine, boots(7, 2, 3));
        done(&mut machine, boots(9, 1, 1));
        assert_eq!(done(&mut machine, raise(3)), answer(Answer::Done));
        assert_eq!(now(&machine), 3);
    }

    #[test]
    fn flags_are_recorded_once_and_changed_only_as_they_were_seen() {
        let mut machine = Machine::new();
        let record =
            |flags: &'static [u8]| Change::RecordFlags(RecordFlags { flags: flags.into() });
        let set = |expected: &'static [u8], flags: &'static [u8]| {
            let (flags, expected) = (flags.into(), expected.into());
            Change::SetFlag(SetFlag { flags, expected, flag: String::new() })
        };
        assert_eq!(done(&mut machine, record(b"a")), answer(Answer::Done));
        assert_eq!(done(&mut machine, record(b"a")), answer(Answer::Done), "asked again");
        assert_eq!(done(&mut machine, record(b"b")), answer(Answer::Conflict));
        assert_eq!(done(&mut machine, set(b"x", b"c")), answer(Answer::Conflict));
        assert_eq!(done(&mut machine, set(b"a", b"c")), answer(Answer::Done));
        assert_eq!(flags(&machine.store.read().unwrap()).unwrap().unwrap(), "c");
    }
}

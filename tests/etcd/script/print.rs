//! From a reply to lines of text: every field that is not zero, and names for what differs between servers.

use std::fmt::Write as _;

use k3s_server::proto::etcdserverpb as pb;
use k3s_server::proto::mvccpb::{Event, KeyValue};
use tonic::Status;

/// The server's own ids, which become names in the text.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    pub cluster: u64,
    pub member: u64,
    pub term: u64,
    /// Lease ids that the server chose, in order of appearance.
    pub leases: Vec<i64>,
    pub client_url: String,
    pub peer_url: String,
}

/// Ids chosen by a script are small; the server's are random 63-bit numbers.
const CHOSEN_BY_SCRIPT_MAX: i64 = 1 << 32;

impl Ids {
    /// Remembers a lease id if the server chose it.
    pub fn learn_lease(&mut self, id: i64) {
        if CHOSEN_BY_SCRIPT_MAX < id && !self.leases.contains(&id) {
            self.leases.push(id);
        }
    }

    /// Replaces `$lease1` and `$member` in a line of a script.
    pub fn fill_in(&self, line: &str) -> String {
        let mut line = line.replace("$member", &self.member.to_string());
        for (index, id) in self.leases.iter().enumerate().rev() {
            line = line.replace(&format!("$hexlease{}", index + 1), &format!("{id:x}"));
            line = line.replace(&format!("$lease{}", index + 1), &id.to_string());
        }
        line
    }

    /// Replaces what [`Ids::fill_in`] fills in by names again.
    pub fn name_in(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (index, id) in self.leases.iter().enumerate() {
            let name = format!("<lease{}>", index + 1);
            text = text.replace(&id.to_string(), &name).replace(&format!("{id:x}"), &name);
        }
        for (id, name) in [(self.cluster, "<cluster>"), (self.member, "<member>")] {
            text = text.replace(&id.to_string(), name).replace(&format!("{id:x}"), name);
        }
        text.replace(&self.client_url, "<client-url>").replace(&self.peer_url, "<peer-url>")
    }

    /// `rev 5`, and what is wrong with the rest of the header if anything is.
    pub fn header(&self, header: Option<&pb::ResponseHeader>) -> String {
        let Some(header) = header else { return "no header".into() };
        let mut out = format!("rev {}", header.revision);
        let found = (header.cluster_id, header.member_id, header.raft_term);
        if found == (0, 0, 0) {
            out.push_str(", no ids");
        } else if found != (self.cluster, self.member, self.term) {
            let _ = write!(out, ", ids {found:?}");
        }
        out
    }
}

/// Bytes as the script language spells them.
pub fn quote(bytes: &[u8]) -> String {
    // A long run of one byte is what transcripts use for large values.
    if let [first, rest @ ..] = bytes
        && 64 < bytes.len()
        && rest.iter().all(|byte| byte == first)
        && first.is_ascii_alphanumeric()
    {
        return format!("{}*{}", char::from(*first), bytes.len());
    }
    let mut out = String::from("\"");
    for &byte in bytes {
        match byte {
            0 => out.push_str("\\0"),
            b'\n' => out.push_str("\\n"),
            b'"' | b'\\' => {
                out.push('\\');
                out.push(char::from(byte));
            }
            0x20..=0x7e => out.push(char::from(byte)),
            _ => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
    }
    out.push('"');
    out
}

/// ` name value` for each that is not zero.
fn numbers(fields: &[(&str, i64)]) -> String {
    fields.iter().filter(|(_, value)| *value != 0).fold(String::new(), |mut out, (name, value)| {
        let _ = write!(out, " {name} {value}");
        out
    })
}

fn flags(fields: &[(&str, bool)]) -> String {
    fields.iter().filter(|(_, set)| *set).fold(String::new(), |out, (name, _)| out + " " + name)
}

/// An error of a call.
pub fn status(status: &Status) -> Vec<String> {
    vec![format!("error {:?}: {}", status.code(), status.message())]
}

pub fn key_value(kv: &KeyValue) -> String {
    let fields = [
        ("create", kv.create_revision),
        ("mod", kv.mod_revision),
        ("version", kv.version),
        ("lease", kv.lease),
    ];
    format!("{} = {}{}", quote(&kv.key), quote(&kv.value), numbers(&fields))
}

fn indented(prefix: &str, lines: Vec<String>) -> impl Iterator<Item = String> {
    let prefix = prefix.to_owned();
    lines.into_iter().map(move |line| format!("{prefix}{line}"))
}

pub fn put(ids: &Ids, reply: &pb::PutResponse) -> Vec<String> {
    let mut lines = vec![ids.header(reply.header.as_ref())];
    lines.extend(reply.prev_kv.iter().map(|kv| format!("prev {}", key_value(kv))));
    lines
}

pub fn range(ids: &Ids, reply: &pb::RangeResponse) -> Vec<String> {
    let mut first = ids.header(reply.header.as_ref());
    let _ = write!(first, ", count {}{}", reply.count, flags(&[("more", reply.more)]));
    let mut lines = vec![first];
    lines.extend(reply.kvs.iter().map(|kv| format!("  {}", key_value(kv))));
    lines
}

pub fn delete_range(ids: &Ids, reply: &pb::DeleteRangeResponse) -> Vec<String> {
    let mut lines =
        vec![format!("{}, deleted {}", ids.header(reply.header.as_ref()), reply.deleted)];
    lines.extend(reply.prev_kvs.iter().map(|kv| format!("prev {}", key_value(kv))));
    lines
}

pub fn txn(ids: &Ids, reply: &pb::TxnResponse) -> Vec<String> {
    use pb::response_op::Response;
    let succeeded = if reply.succeeded { "succeeded" } else { "failed" };
    let mut lines = vec![format!("{}, {succeeded}", ids.header(reply.header.as_ref()))];
    for op in &reply.responses {
        let (name, inner) = match &op.response {
            Some(Response::ResponsePut(reply)) => ("put", put(ids, reply)),
            Some(Response::ResponseRange(reply)) => ("get", range(ids, reply)),
            Some(Response::ResponseDeleteRange(reply)) => ("del", delete_range(ids, reply)),
            Some(Response::ResponseTxn(reply)) => ("txn", txn(ids, reply)),
            None => ("nothing", Vec::new()),
        };
        lines.push(format!("  {name}:"));
        lines.extend(indented("    ", inner));
    }
    lines
}

pub fn watch(ids: &Ids, reply: &pb::WatchResponse) -> Vec<String> {
    let mut first = format!("watch {}, {}", reply.watch_id, ids.header(reply.header.as_ref()));
    first.push_str(&flags(&[
        ("created", reply.created),
        ("canceled", reply.canceled),
        ("fragment", reply.fragment),
    ]));
    first.push_str(&numbers(&[("compacted", reply.compact_revision)]));
    if !reply.cancel_reason.is_empty() {
        let _ = write!(first, " because {}", quote(reply.cancel_reason.as_bytes()));
    }
    let mut lines = vec![first];
    for event in &reply.events {
        lines.extend(indented("  ", watch_event(event)));
    }
    lines
}

pub fn watch_event(event: &Event) -> Vec<String> {
    let kind = match event.r#type {
        0 => "PUT".to_owned(),
        1 => "DELETE".to_owned(),
        other => format!("TYPE {other}"),
    };
    let kv = event.kv.as_ref().map_or_else(|| "no kv".to_owned(), key_value);
    let mut lines = vec![format!("{kind} {kv}")];
    lines.extend(event.prev_kv.iter().map(|kv| format!("  prev {}", key_value(kv))));
    lines
}

pub fn lease_grant(ids: &Ids, reply: &pb::LeaseGrantResponse) -> Vec<String> {
    let header = ids.header(reply.header.as_ref());
    let mut line = format!("{header}, lease {} ttl {}", reply.id, reply.ttl);
    if !reply.error.is_empty() {
        let _ = write!(line, " error {}", quote(reply.error.as_bytes()));
    }
    vec![line]
}

pub fn keep_alive(ids: &Ids, reply: &pb::LeaseKeepAliveResponse) -> Vec<String> {
    let header = ids.header(reply.header.as_ref());
    vec![format!("{header}, lease {} ttl {}", reply.id, reply.ttl)]
}

pub fn time_to_live(ids: &Ids, reply: &pb::LeaseTimeToLiveResponse) -> Vec<String> {
    let header = ids.header(reply.header.as_ref());
    // A few seconds may have passed, on a slow machine up to the client's deadline.
    let about = reply.granted_ttl - 15..=reply.granted_ttl;
    let ttl = if 0 < reply.granted_ttl && about.contains(&reply.ttl) {
        "<granted>".to_owned()
    } else {
        reply.ttl.to_string()
    };
    let granted = reply.granted_ttl;
    let mut lines = vec![format!("{header}, lease {} ttl {ttl} granted {granted}", reply.id)];
    // etcd lists them in any order.
    let mut keys: Vec<_> = reply.keys.iter().map(|key| format!("  {}", quote(key))).collect();
    keys.sort();
    lines.extend(keys);
    lines
}

pub fn leases(ids: &Ids, reply: &pb::LeaseLeasesResponse) -> Vec<String> {
    let mut lines = vec![ids.header(reply.header.as_ref())];
    // etcd lists them by expiry, which ties within one second.
    let name = |lease: &pb::LeaseStatus| ids.name_in(&format!("  {}", lease.id));
    let mut found: Vec<_> = reply.leases.iter().map(name).collect();
    found.sort();
    lines.extend(found);
    lines
}

/// Stands for a number that must be there but differs.
fn some(name: &str, number: i64) -> String {
    if 0 < number { format!(" <{name}>") } else { format!(" {name} {number}") }
}

pub fn status_reply(ids: &Ids, reply: &pb::StatusResponse) -> Vec<String> {
    let mut line = ids.header(reply.header.as_ref());
    line.push_str(if reply.version.starts_with("3.") { " <version>" } else { " no version" });
    line.push_str(&some("size", reply.db_size));
    line.push_str(&some("size in use", reply.db_size_in_use));
    line.push_str(&some("index", i64::try_from(reply.raft_index).unwrap_or(-1)));
    line.push_str(&some("applied", i64::try_from(reply.raft_applied_index).unwrap_or(-1)));
    let _ = write!(line, " leader {}", reply.leader);
    line.push_str(if reply.raft_term == ids.term { " <term>" } else { " another term" });
    line.push_str(&flags(&[("learner", reply.is_learner)]));
    let mut lines = vec![line];
    lines.extend(reply.errors.iter().map(|error| format!("  error {error}")));
    lines
}

/// The fields that etcd 3.6 added to its status.
pub fn status_of_36(reply: &pb::StatusResponse) -> Vec<String> {
    let downgrade = reply.downgrade_info.as_ref();
    vec![format!(
        "storage version {} quota {} downgrade {}",
        reply.storage_version,
        reply.db_size_quota,
        downgrade.map_or_else(
            || "none".to_owned(),
            |info| format!(
                "enabled {} target {}",
                info.enabled,
                quote(info.target_version.as_bytes())
            )
        ),
    )]
}

pub fn alarm(ids: &Ids, reply: &pb::AlarmResponse) -> Vec<String> {
    let mut lines = vec![ids.header(reply.header.as_ref())];
    lines.extend(
        reply.alarms.iter().map(|alarm| format!("  {} alarm {}", alarm.member_id, alarm.alarm)),
    );
    lines
}

fn member(member: &pb::Member) -> String {
    // Two servers may name themselves differently.
    let name = if member.name.is_empty() { " no name" } else { " <name>" };
    let urls = |urls: &[String]| urls.join(",");
    format!(
        "  {}{name} peers {} clients {}{}",
        member.id,
        urls(&member.peer_ur_ls),
        urls(&member.client_ur_ls),
        flags(&[("learner", member.is_learner)])
    )
}

pub fn members(ids: &Ids, header: Option<&pb::ResponseHeader>, all: &[pb::Member]) -> Vec<String> {
    let mut lines = vec![ids.header(header)];
    let mut members: Vec<_> = all.iter().map(member).collect();
    members.sort();
    lines.extend(members);
    lines
}

pub fn hash_kv(ids: &Ids, reply: &pb::HashKvResponse) -> Vec<String> {
    let hash = if reply.hash == 0 { "no hash" } else { "<hash>" };
    let compacted = numbers(&[("compacted", reply.compact_revision)]);
    vec![format!("{}, {hash}{compacted}", ids.header(reply.header.as_ref()))]
}

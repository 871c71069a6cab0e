//! `member list`, `member remove` and `member promote`.
//!
//! Who is a member is one server's answer. Who is alive, and how far behind, is each member's own: all are asked at once.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use thiserror::Error;
use tonic::Status;
use tonic::transport::Channel;

use super::table;
use super::{AdminError, Confirm, Format};
use crate::client::Connection;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::cluster_client::ClusterClient;
use crate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::proto::node::admin_client::AdminClient;
use crate::proto::node::{NodeRecord, NodesRequest};
use crate::types::NodeId;

/// A member that has not answered by then counts as not answering.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);

/// Which member is meant cannot be told.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MemberError {
    /// Nobody has that name or id.
    #[error("no member is called {0:?}, and none has it as its id")]
    Unknown(String),
    /// Several have that name.
    #[error("several members are called {name:?}: use an id, {}", ids.join(" or "))]
    Ambiguous {
        /// The name.
        name: String,
        /// Who has it.
        ids: Vec<String>,
    },
}

/// What a member says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    leader: u64,
    last: u64,
    applied: u64,
}

/// A member, and what is known of it.
#[derive(Clone, Debug)]
struct Row {
    member: pb::Member,
    /// What was recorded at its last start.
    record: Option<NodeRecord>,
    /// `None`: it does not answer.
    answer: Option<Answer>,
}

/// All members.
#[derive(Clone, Debug)]
pub(super) struct Roll {
    rows: Vec<Row>,
    /// The answering server could not make sure with a majority.
    may_be_old: bool,
}

/// How many decide, and how many of them answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quorum {
    voters: usize,
    answering: usize,
}

impl Quorum {
    const fn needed(self) -> usize {
        self.voters / 2 + 1
    }
}

impl fmt::Display for Quorum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let voters = if self.voters == 1 { "voter" } else { "voters" };
        let answer = if self.answering == 1 { "answers" } else { "answer" };
        let Self { voters: count, answering } = self;
        write!(f, "{count} {voters}, {} needed for a majority, {answering} {answer}", self.needed())
    }
}

impl Row {
    fn id(&self) -> NodeId {
        NodeId::new(self.member.id)
    }

    /// A member that was added and has not started has no name yet.
    fn name(&self) -> &str {
        if self.member.name.is_empty() { "(not started)" } else { &self.member.name }
    }
}

impl Roll {
    /// As most members that answer say.
    fn leader(&self) -> Option<u64> {
        let said = |row: &Row| row.answer.map(|answer| answer.leader).filter(|id| *id != 0);
        // A leader knows itself best.
        let own =
            self.rows.iter().find(|row| said(row) == Some(row.member.id)).map(|row| row.member.id);
        own.or_else(|| self.rows.iter().find_map(said))
    }

    fn role(&self, row: &Row) -> &'static str {
        match (row.member.is_learner, row.answer) {
            (true, _) => "learner",
            (false, _) if self.leader() == Some(row.member.id) => "leader",
            (false, Some(_)) => "follower",
            (false, None) => "voter",
        }
    }

    /// Entries that a member has not applied and somebody else has.
    fn lag(&self, row: &Row) -> Option<u64> {
        let last = self.rows.iter().filter_map(|row| row.answer).map(|answer| answer.last).max()?;
        Some(last.saturating_sub(row.answer?.applied))
    }

    fn quorum(&self) -> Quorum {
        let voters = || self.rows.iter().filter(|row| !row.member.is_learner);
        let answering = voters().filter(|row| row.answer.is_some()).count();
        Quorum { voters: voters().count(), answering }
    }

    /// The numbers once this member is gone.
    fn without(&self, id: NodeId) -> Quorum {
        let rows = self.rows.iter().filter(|row| row.id() != id).cloned().collect();
        Self { rows, ..*self }.quorum()
    }

    fn find(&self, wanted: &str) -> Result<&Row, MemberError> {
        let wanted_id = u64::from_str_radix(wanted.trim_start_matches("0x"), 16).ok();
        let named: Vec<&Row> = self.rows.iter().filter(|row| row.member.name == wanted).collect();
        match named.as_slice() {
            [one] => return Ok(one),
            [] => {}
            several => {
                let ids = several.iter().map(|row| row.id().to_string()).collect();
                return Err(MemberError::Ambiguous { name: wanted.to_owned(), ids });
            }
        }
        let by_id = self.rows.iter().find(|row| Some(row.member.id) == wanted_id);
        by_id.ok_or_else(|| MemberError::Unknown(wanted.to_owned()))
    }

    pub(super) async fn gather(
        connection: &Connection,
        channel: Channel,
    ) -> Result<Self, AdminError> {
        let mut cluster = ClusterClient::new(channel.clone());
        let (list, may_be_old) =
            match cluster.member_list(pb::MemberListRequest { linearizable: true }).await {
                Ok(list) => (list, false),
                Err(_) => {
                    let request = pb::MemberListRequest { linearizable: false };
                    (cluster.member_list(request).await?, true)
                }
            };
        let records = match AdminClient::new(channel).nodes(NodesRequest {}).await {
            Ok(reply) => reply.into_inner().nodes,
            // A real etcd, or a server without a store: the table has gaps then.
            Err(_) => Vec::new(),
        };
        let members = list.into_inner().members;
        let answers = join_all(members.iter().map(|member| ask(connection, member))).await;
        let row = |(member, answer): (pb::Member, _)| {
            let record = records.iter().find(|known| known.id == member.id);
            Row { record: record.and_then(|known| known.record.clone()), answer, member }
        };
        let mut rows: Vec<Row> = members.into_iter().zip(answers).map(row).collect();
        rows.sort_by(|a, b| (a.name(), a.member.id).cmp(&(b.name(), b.member.id)));
        Ok(Self { rows, may_be_old })
    }
}

/// Asks a member itself.
async fn ask(connection: &Connection, member: &pb::Member) -> Option<Answer> {
    let ask = async {
        let channel = connection.to(&member.client_ur_ls).open().await.ok()?;
        let mut client = MaintenanceClient::new(channel);
        let status = client.status(pb::StatusRequest {}).await.ok()?.into_inner();
        // An address that now belongs to another member says nothing of this one.
        let itself = status.header.is_some_and(|header| header.member_id == member.id);
        let (leader, last, applied) = (status.leader, status.raft_index, status.raft_applied_index);
        itself.then_some(Answer { leader, last, applied })
    };
    tokio::time::timeout(ANSWER_TIMEOUT, ask).await.ok().flatten()
}

/// `member list`
pub async fn list(
    connection: &Connection,
    format: Format,
    out: &mut dyn Write,
) -> Result<(), AdminError> {
    let roll = Roll::gather(connection, connection.open().await?).await?;
    match format {
        Format::Json | Format::Yaml => writeln!(out, "{:#}", as_json(&roll))?,
        Format::Table => print(&roll, out)?,
    }
    Ok(())
}

pub(super) fn print(roll: &Roll, out: &mut dyn Write) -> io::Result<()> {
    let unknown = || "-".to_owned();
    let row = |row: &Row| {
        let release = row.record.as_ref().map(|record| record.release.clone());
        [
            row.id().to_string(),
            row.name().to_owned(),
            roll.role(row).to_owned(),
            if row.answer.is_some() { "yes" } else { "NO" }.to_owned(),
            roll.lag(row).map_or_else(unknown, |lag| lag.to_string()),
            row.member.peer_ur_ls.join(", "),
            row.member.client_ur_ls.join(", "),
            release.filter(|release| !release.is_empty()).unwrap_or_else(unknown),
            row.record.as_ref().map_or_else(unknown, |record| record.epoch.to_string()),
        ]
    };
    let head =
        ["ID", "NAME", "ROLE", "ANSWERS", "LAG", "PEER ADDRS", "CLIENT ADDRS", "VERSION", "STARTS"];
    let rows: Vec<_> = roll.rows.iter().map(row).collect();
    table::draw(head, &rows, out)?;
    let quorum = roll.quorum();
    writeln!(out, "{quorum}")?;
    if let Some(advice) = advice(quorum) {
        writeln!(out, "{advice}")?;
    }
    if roll.leader().is_none() {
        writeln!(out, "there is no leader")?;
    }
    if roll.may_be_old {
        writeln!(out, "no majority could confirm this list: it may be old")?;
    }
    Ok(())
}

/// What a person should do about these numbers.
fn advice(quorum: Quorum) -> Option<String> {
    let Quorum { voters, answering } = quorum;
    if answering < quorum.needed() {
        return Some(
            "without a majority nothing can be written: start the servers that do not answer"
                .to_owned(),
        );
    }
    if answering == quorum.needed() && voters > 1 {
        return Some("no other voter may fail now".to_owned());
    }
    (voters % 2 == 0).then(|| {
        format!(
            "{voters} voters survive no more failures than {} would: add one, or remove one",
            voters - 1
        )
    })
}

pub(super) fn as_json(roll: &Roll) -> serde_json::Value {
    let members = roll.rows.iter().map(|row| {
        json!({
            "id": row.id().to_string(),
            "name": row.member.name,
            "role": roll.role(row),
            "learner": row.member.is_learner,
            "answers": row.answer.is_some(),
            "lag": roll.lag(row),
            "peer_urls": row.member.peer_ur_ls,
            "client_urls": row.member.client_ur_ls,
            "release": row.record.as_ref().map(|record| &record.release),
            "starts": row.record.as_ref().map(|record| record.epoch),
        })
    });
    let quorum = roll.quorum();
    json!({
        "members": members.collect::<Vec<_>>(),
        "leader": roll.leader().map(|id| NodeId::new(id).to_string()),
        "voters": quorum.voters,
        "needed": quorum.needed(),
        "answering": quorum.answering,
        "may_be_old": roll.may_be_old,
    })
}

/// `member remove`
pub async fn remove(
    connection: &Connection,
    wanted: &str,
    confirm: Confirm<'_>,
    out: &mut dyn Write,
) -> Result<(), AdminError> {
    let channel = connection.open().await?;
    let roll = Roll::gather(connection, channel.clone()).await?;
    let row = roll.find(wanted)?;
    let numbers = consequence(&roll, row);
    let question = format!(
        "{numbers}\n{} cannot come back with its data, only join as a new member. Remove it?",
        row.name()
    );
    if !confirm(&question) {
        return Err(AdminError::NotConfirmed);
    }
    let request = pb::MemberRemoveRequest { id: row.member.id };
    let mut client = ClusterClient::new(channel);
    client.member_remove(request).await.map_err(|status| refused(&status, &numbers))?;
    writeln!(out, "{} ({}) is no member any more", row.name(), row.id())?;
    writeln!(out, "{}", roll.without(row.id()))?;
    Ok(())
}

/// What the cluster is before and after.
fn consequence(roll: &Roll, row: &Row) -> String {
    let answers = if row.answer.is_some() { "answers" } else { "does not answer" };
    format!(
        "{} ({}) is a {} and {answers}.\nnow:   {}\nafter: {}",
        row.name(),
        row.id(),
        roll.role(row),
        roll.quorum(),
        roll.without(row.id())
    )
}

fn refused(status: &Status, numbers: &str) -> AdminError {
    AdminError::Refused(format!("{}\n{numbers}", status.message()))
}

/// `member promote`
pub async fn promote(
    connection: &Connection,
    wanted: &str,
    out: &mut dyn Write,
) -> Result<(), AdminError> {
    let channel = connection.open().await?;
    let roll = Roll::gather(connection, channel.clone()).await?;
    let row = roll.find(wanted)?;
    let behind = roll
        .lag(row)
        .map_or_else(|| "it does not answer".to_owned(), |lag| format!("it lacks {lag} entries"));
    let numbers = format!("{} ({}) is a {}; {behind}", row.name(), row.id(), roll.role(row));
    let request = pb::MemberPromoteRequest { id: row.member.id };
    let mut client = ClusterClient::new(channel);
    client.member_promote(request).await.map_err(|status| refused(&status, &numbers))?;
    writeln!(out, "{} ({}) is a voter now", row.name(), row.id())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn row(id: u64, name: &str, answer: Option<(u64, u64, u64)>) -> Row {
        let urls = |port| vec![format!("https://10.0.0.{id}:{port}")];
        let member = pb::Member {
            id,
            name: name.to_owned(),
            peer_ur_ls: urls(2380),
            client_ur_ls: urls(2379),
            is_learner: false,
        };
        let record =
            NodeRecord { epoch: id + 4, release: "0.2.0".to_owned(), ..NodeRecord::default() };
        let answer = answer.map(|(leader, last, applied)| Answer { leader, last, applied });
        Row { member, record: Some(record), answer }
    }

    fn roll() -> Roll {
        let mut learner = row(0xc, "pi-4", Some((1, 100, 40)));
        learner.member.is_learner = true;
        learner.record = None;
        let rows = vec![
            row(1, "pi-1", Some((1, 120, 120))),
            row(2, "pi-2", Some((1, 118, 117))),
            row(3, "pi-3", None),
            learner,
        ];
        Roll { rows, may_be_old: false }
    }

    #[test]
    fn table_tells_who_answers_and_how_far_behind() {
        let mut out = Vec::new();
        print(&roll(), &mut out).unwrap();
        expect![[r#"
            +----+------+----------+---------+-----+------------------------+------------------------+---------+--------+
            | ID | NAME | ROLE     | ANSWERS | LAG | PEER ADDRS             | CLIENT ADDRS           | VERSION | STARTS |
            +----+------+----------+---------+-----+------------------------+------------------------+---------+--------+
            | 1  | pi-1 | leader   | yes     | 0   | https://10.0.0.1:2380  | https://10.0.0.1:2379  | 0.2.0   | 5      |
            | 2  | pi-2 | follower | yes     | 3   | https://10.0.0.2:2380  | https://10.0.0.2:2379  | 0.2.0   | 6      |
            | 3  | pi-3 | voter    | NO      | -   | https://10.0.0.3:2380  | https://10.0.0.3:2379  | 0.2.0   | 7      |
            | c  | pi-4 | learner  | yes     | 80  | https://10.0.0.12:2380 | https://10.0.0.12:2379 | -       | -      |
            +----+------+----------+---------+-----+------------------------+------------------------+---------+--------+
            3 voters, 2 needed for a majority, 2 answer
            no other voter may fail now
        "#]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }

    #[test]
    fn json_has_the_same_and_the_numbers() {
        let json = as_json(&roll());

        assert_eq!(
            (&json["voters"], &json["needed"], &json["answering"]),
            (&json!(3), &json!(2), &json!(2))
        );
        assert_eq!((&json["leader"], &json["members"][3]["id"]), (&json!("1"), &json!("c")));
        assert_eq!(json["members"][2]["lag"], json!(null));
        assert_eq!(json["members"][1]["starts"], json!(6));
    }

    #[test]
    fn members_are_found_by_name_first_and_then_by_id() {
        let mut roll = roll();
        roll.rows[2].member.name = "c".to_owned();
        assert_eq!(roll.find("pi-2").unwrap().member.id, 2);
        assert_eq!(roll.find("2").unwrap().member.id, 2);
        assert_eq!(roll.find("c").unwrap().member.id, 3, "a name wins over an id");
        assert_eq!(roll.find("0xc").unwrap().member.id, 12);
        assert_eq!(roll.find("pi-9").unwrap_err(), MemberError::Unknown("pi-9".to_owned()));
        roll.rows[0].member.name = "pi-2".to_owned();
        let error = roll.find("pi-2").unwrap_err().to_string();
        assert_eq!(error, "several members are called \"pi-2\": use an id, 1 or 2");
    }

    #[test]
    fn consequence_has_the_numbers_before_and_after() {
        let roll = roll();
        expect![[r#"
            pi-2 (2) is a follower and answers.
            now:   3 voters, 2 needed for a majority, 2 answer
            after: 2 voters, 2 needed for a majority, 1 answers"#]]
        .assert_eq(&consequence(&roll, &roll.rows[1]));
    }

    #[test]
    fn advice_warns_of_lost_thin_and_even_majorities() {
        let of = |voters, answering| advice(Quorum { voters, answering });

        assert_eq!(of(1, 1), None);
        assert_eq!(of(3, 3), None);
        assert!(of(3, 1).unwrap().starts_with("without a majority"));
        assert_eq!(of(3, 2).unwrap(), "no other voter may fail now");
        assert_eq!(of(2, 2).unwrap(), "no other voter may fail now");
        assert!(of(4, 4).unwrap().starts_with("4 voters survive no more failures than 3 would"));
    }
}

//! Alarms: raising and clearing them, and what may still be applied while one is raised.

use pb::alarm_request::AlarmAction;
use pb::request_op::Request;

use crate::command::Command;
use crate::mvcc::WriteTxn;
use crate::proto::etcdserverpb as pb;
use crate::types::NodeId;

use super::{Refusal, Step};

/// Refuses what a raised alarm forbids. A damaged cluster is worse news than a full one, so it comes first.
pub(super) fn permit(txn: &WriteTxn<'_>, command: &Command) -> Step<()> {
    let raised = |alarm: pb::AlarmType| txn.alarms().iter().any(|(_, kind)| *kind == alarm as i32);
    if raised(pb::AlarmType::Corrupt) && !allowed_when_corrupt(command) {
        return Err(Refusal::Corrupt.into());
    }
    if raised(pb::AlarmType::Nospace) && needs_space(command) {
        return Err(Refusal::NoSpace.into());
    }
    Ok(())
}

const fn allowed_when_corrupt(command: &Command) -> bool {
    match command {
        Command::LeaseCheckpoint(_) | Command::Alarm(_) | Command::Cluster(_) => true,
        Command::Put(_)
        | Command::DeleteRange(_)
        | Command::Txn(_)
        | Command::Compact(_)
        | Command::LeaseGrant(_)
        | Command::LeaseRevoke(_) => false,
    }
}

fn needs_space(command: &Command) -> bool {
    match command {
        Command::Put(_) | Command::LeaseGrant(_) => true,
        Command::Txn(request) => has_put(request),
        Command::DeleteRange(_)
        | Command::Compact(_)
        | Command::LeaseRevoke(_)
        | Command::LeaseCheckpoint(_)
        | Command::Alarm(_)
        | Command::Cluster(_) => false,
    }
}

/// In either branch: etcd counts the dearer one, taken or not.
fn has_put(request: &pb::TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).any(|op| match &op.request {
        Some(Request::RequestPut(_)) => true,
        Some(Request::RequestTxn(nested)) => has_put(nested),
        Some(Request::RequestRange(_) | Request::RequestDeleteRange(_)) | None => false,
    })
}

pub(super) fn alarm(txn: &mut WriteTxn<'_>, request: &pb::AlarmRequest) -> Step<pb::AlarmResponse> {
    let member = NodeId::new(request.member_id);
    let this = pb::AlarmMember { member_id: request.member_id, alarm: request.alarm };
    let alarms = match AlarmAction::try_from(request.action) {
        Ok(AlarmAction::Get) => list(txn, request.alarm),
        Ok(AlarmAction::Activate) if request.alarm != pb::AlarmType::None as i32 => {
            txn.raise_alarm(member, request.alarm)?;
            vec![this]
        }
        Ok(AlarmAction::Deactivate) if txn.clear_alarm(member, request.alarm)? => vec![this],
        Ok(AlarmAction::Activate | AlarmAction::Deactivate) | Err(_) => Vec::new(),
    };
    Ok(pb::AlarmResponse { header: None, alarms })
}

fn list(txn: &WriteTxn<'_>, kind: i32) -> Vec<pb::AlarmMember> {
    txn.alarms()
        .iter()
        .filter(|(_, raised)| kind == pb::AlarmType::None as i32 || kind == *raised)
        .map(|(member, alarm)| pb::AlarmMember { member_id: member.get(), alarm: *alarm })
        .collect()
}

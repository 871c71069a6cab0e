//! The Maintenance service: status, alarms, hashes, backups, the move of leadership.

use std::io::Read;
use std::time::Instant;

use futures_util::stream;
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use super::answer::{self, NoMessages};
use super::api::{Api, Call, wrong_reply};
use super::error::{EtcdError, store_failed};
use super::{Backup, CLUSTER_VERSION, VERSION};
use crate::apply::Reply;
use crate::command::Command;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::downgrade_request::DowngradeAction;
use crate::proto::etcdserverpb::maintenance_server::Maintenance;
use crate::raft::Role;
use crate::types::{NodeId, Revision};

/// Bytes in one message of a backup, as etcd sends it.
const BLOB_BYTES: usize = 32 << 10;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct MaintenanceService(pub(super) Api);

impl Api {
    /// The alarms as they are; not a write, unlike in etcd, whose `endpoint health` therefore costs the card a flush.
    async fn alarms(
        &self,
        wanted: i32,
        deadline: Instant,
    ) -> Result<(Vec<pb::AlarmMember>, Revision), Status> {
        let freshness = self.barrier(deadline).await?;
        let view = self.view(&freshness)?;
        let alarms = view.alarms().map_err(|error| store_failed(&error))?;
        let any = i32::from(pb::AlarmType::None);
        let alarms = alarms
            .into_iter()
            .filter(|(_, alarm)| wanted == any || wanted == *alarm)
            .map(|(member, alarm)| pb::AlarmMember { member_id: member.get(), alarm })
            .collect();
        Ok((alarms, view.revision()))
    }

    async fn alarm(
        &self,
        request: pb::AlarmRequest,
        deadline: Instant,
    ) -> Result<pb::AlarmResponse, Status> {
        if request.action == i32::from(AlarmAction::Get) {
            let (alarms, revision) = self.alarms(request.alarm, deadline).await?;
            return Ok(pb::AlarmResponse { header: self.header_at(revision), alarms });
        }
        match self.propose(Command::Alarm(request), deadline).await? {
            (Reply::Alarm(mut response), revision) => {
                response.header = self.header_at(revision);
                Ok(response)
            }
            (other, _) => Err(wrong_reply(&other)),
        }
    }

    fn status_response(&self) -> Result<pb::StatusResponse, Status> {
        let view = self.view(&super::api::Freshness::Serializable)?;
        let size = self.parts().node.store().size().map_err(|error| store_failed(&error))?;
        let alarms = view.alarms().map_err(|error| store_failed(&error))?;
        let header = self.header_at(view.revision());
        let status = self.status();
        let mut errors = Vec::new();
        if status.leader.is_none() {
            errors.push(EtcdError::NoLeader.text().to_owned());
        }
        errors.extend(alarms.iter().map(|(member, alarm)| alarm_text(*member, *alarm)));
        Ok(pb::StatusResponse {
            header,
            version: VERSION.to_owned(),
            db_size: signed(size.total),
            leader: status.leader.map_or(0, NodeId::get),
            raft_index: status.committed.get(),
            raft_term: status.term.get(),
            raft_applied_index: status.applied.get(),
            errors,
            db_size_in_use: signed(size.in_use),
            is_learner: status.role == Role::Learner,
            storage_version: CLUSTER_VERSION.to_owned(),
            db_size_quota: self.settings().quota_bytes.map_or(-1, signed),
            downgrade_info: Some(pb::DowngradeInfo::default()),
        })
    }

    async fn hash_kv(&self, at: i64, call: &Call) -> Result<pb::HashKvResponse, Status> {
        let view = self.view(&super::api::Freshness::Serializable)?;
        let header = self.header_at(view.revision());
        let at = (0 < at).then(|| Revision::new(at));
        let hashed = self.digest(call, view, move |view| view.hash_kv(at)).await?;
        let (hash, compacted, hashed_at) = hashed.map_err(EtcdError::from)?;
        Ok(pb::HashKvResponse {
            header,
            hash,
            compact_revision: compacted.get(),
            hash_revision: hashed_at.get(),
        })
    }

    async fn move_leader(&self, to: NodeId, deadline: Instant) -> Result<(), Status> {
        {
            let status = self.status();
            if status.role != Role::Leader {
                return Err(EtcdError::NotLeader.into());
            }
            let voter = status.members.iter().any(|member| member.id == to && !member.learner);
            if !voter {
                return Err(EtcdError::BadLeaderTransferee.into());
            }
            if to == status.node {
                return Ok(());
            }
        }
        let moved = self.parts().node.transfer_leader(to, deadline).await;
        Ok(moved.map_err(EtcdError::from)?)
    }
}

/// How etcd prints an alarm: protobuf's text form, with its space at the end.
fn alarm_text(member: NodeId, alarm: i32) -> String {
    let id = member.get();
    match pb::AlarmType::try_from(alarm) {
        Ok(pb::AlarmType::None) => format!("memberID:{id} "),
        Ok(known) => format!("memberID:{id} alarm:{} ", known.as_str_name()),
        Err(_) => format!("memberID:{id} alarm:{alarm} "),
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// What a downgrade would be allowed to. Asking whether the previous release is a target answers as etcd does;
/// really going there is refused, because there is no older release that could read our files.
fn downgrade(request: &pb::DowngradeRequest) -> Result<(), EtcdError> {
    match DowngradeAction::try_from(request.action) {
        Ok(DowngradeAction::Validate | DowngradeAction::Enable)
            if !is_version(&request.version) =>
        {
            Err(EtcdError::WrongDowngradeVersionFormat)
        }
        Ok(DowngradeAction::Validate) if is_previous(&request.version) => Ok(()),
        Ok(DowngradeAction::Validate | DowngradeAction::Enable) => {
            Err(EtcdError::InvalidDowngradeTarget)
        }
        Ok(DowngradeAction::Cancel) => Err(EtcdError::NoInflightDowngrade),
        Err(_) => Err(EtcdError::UnknownMethod),
    }
}

/// Whether this is the minor release before the one whose answers we give.
fn is_previous(target: &str) -> bool {
    let minor = |text: &str| {
        let mut parts = text.split('.').map(|part| part.parse::<u32>().ok());
        parts.next().flatten().zip(parts.next().flatten())
    };
    let ours = minor(super::CLUSTER_VERSION);
    ours.zip(minor(target))
        .is_some_and(|(ours, target)| (ours.0, ours.1) == (target.0, target.1 + 1))
}

/// `major.minor` or `major.minor.patch`.
fn is_version(text: &str) -> bool {
    let parts: Vec<&str> = text.split('.').collect();
    let number = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    (2..=3).contains(&parts.len()) && parts.iter().all(number)
}

/// A backup on its way: each blob is read when the client takes it.
enum Sending {
    Data { backup: Backup, left: u64, hash: Sha256 },
    Hash(Sha256),
    Done,
}

impl Sending {
    fn start(backup: Backup) -> Self {
        let left = backup.bytes;
        Self::Data { backup, left, hash: Sha256::new() }.settle()
    }

    /// Data of which nothing is left is the hash's turn.
    fn settle(self) -> Self {
        match self {
            Self::Data { left: 0, hash, .. } => Self::Hash(hash),
            Self::Data { .. } | Self::Hash(_) | Self::Done => self,
        }
    }

    fn step(self) -> std::io::Result<Option<(pb::SnapshotResponse, Self)>> {
        let version = CLUSTER_VERSION.to_owned();
        match self {
            Self::Data { mut backup, left, mut hash } => {
                let size = usize::try_from(left).map_or(BLOB_BYTES, |left| left.min(BLOB_BYTES));
                let mut blob = vec![0; size];
                backup.reader.read_exact(&mut blob)?;
                hash.update(&blob);
                let left = left.saturating_sub(size as u64);
                let blob = blob.into();
                let response =
                    pb::SnapshotResponse { header: None, remaining_bytes: left, blob, version };
                Ok(Some((response, Self::Data { backup, left, hash }.settle())))
            }
            Self::Hash(hash) => {
                let blob = hash.finalize().to_vec().into();
                let response =
                    pb::SnapshotResponse { header: None, remaining_bytes: 0, blob, version };
                Ok(Some((response, Self::Done)))
            }
            Self::Done => Ok(None),
        }
    }
}

async fn off_thread<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    let result = done.map_err(|_| Status::from(EtcdError::Stopped))?;
    result.map_err(|error| Status::unknown(format!("{what}: {error}")))
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    type SnapshotStream = NoMessages<pb::SnapshotResponse>;

    async fn alarm(
        &self,
        request: Request<pb::AlarmRequest>,
    ) -> Result<Response<pb::AlarmResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.alarm(request.into_inner(), deadline).await?))
    }

    async fn status(
        &self,
        _request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Ok(Response::new(self.0.status_response()?))
    }

    async fn defragment(
        &self,
        _request: Request<pb::DefragmentRequest>,
    ) -> Result<Response<pb::DefragmentResponse>, Status> {
        let defragment = self.0.parts().defragment.clone();
        off_thread("defragment", move || defragment()).await?;
        Ok(Response::new(pb::DefragmentResponse { header: None }))
    }

    async fn hash(
        &self,
        request: Request<pb::HashRequest>,
    ) -> Result<Response<pb::HashResponse>, Status> {
        let call = self.0.call(&request);
        let pb::HashKvResponse { header, hash, .. } = self.0.hash_kv(0, &call).await?;
        Ok(Response::new(pb::HashResponse { header, hash }))
    }

    async fn hash_kv(
        &self,
        request: Request<pb::HashKvRequest>,
    ) -> Result<Response<pb::HashKvResponse>, Status> {
        let call = self.0.call(&request);
        Ok(Response::new(self.0.hash_kv(request.into_inner().revision, &call).await?))
    }

    async fn snapshot(
        &self,
        request: Request<pb::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let account = self.0.call(&request).account;
        let slot = self.0.backup_slot()?;
        let source = self.0.parts().backup.clone();
        let backup = off_thread("snapshot", move || source()).await?;
        let sending = (Sending::start(backup), account, slot);
        Ok(answer::stream(stream::try_unfold(sending, |(sending, account, slot)| async move {
            let permit = account.reserve(BLOB_BYTES as u64, None).await?;
            let blob = off_thread("snapshot", move || sending.step()).await?;
            Ok(blob.map(|(blob, sending)| {
                (answer::frame(vec![blob], permit), (sending, account, slot))
            }))
        })))
    }

    async fn move_leader(
        &self,
        request: Request<pb::MoveLeaderRequest>,
    ) -> Result<Response<pb::MoveLeaderResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        self.0.move_leader(NodeId::new(request.into_inner().target_id), deadline).await?;
        Ok(Response::new(pb::MoveLeaderResponse { header: None }))
    }

    async fn downgrade(
        &self,
        request: Request<pb::DowngradeRequest>,
    ) -> Result<Response<pb::DowngradeResponse>, Status> {
        downgrade(request.get_ref())?;
        let revision = self.0.view(&super::api::Freshness::Serializable)?.revision();
        let version = super::CLUSTER_VERSION.to_owned();
        Ok(Response::new(pb::DowngradeResponse { header: self.0.header_at(revision), version }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blobs(bytes: usize, claimed: u64) -> std::io::Result<Vec<pb::SnapshotResponse>> {
        let data: Vec<u8> = (0..bytes).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let reader = Box::new(std::io::Cursor::new(data));
        let mut sending = Sending::start(Backup { bytes: claimed, reader });
        let mut out = Vec::new();
        while let Some((blob, next)) = sending.step()? {
            out.push(blob);
            sending = next;
        }
        Ok(out)
    }

    #[test]
    fn backup_is_sent_in_blobs_and_ends_with_the_hash_of_all() {
        let sent = blobs(100_000, 100_000).unwrap();
        let sizes: Vec<_> = sent.iter().map(|b| (b.blob.len(), b.remaining_bytes)).collect();
        assert_eq!(
            sizes,
            [(32_768, 67_232), (32_768, 34_464), (32_768, 1_696), (1_696, 0), (32, 0)]
        );
        let data: Vec<u8> = sent[..4].iter().flat_map(|b| b.blob.to_vec()).collect();
        assert_eq!(sent[4].blob, Sha256::digest(&data).to_vec());
        assert_eq!(sent[0].version, "3.6.0");
    }

    #[test]
    fn empty_backup_is_only_a_hash_and_a_short_one_is_an_error() {
        assert_eq!(blobs(0, 0).unwrap().len(), 1);
        assert!(blobs(10, 11).is_err());
    }

    #[test]
    fn alarms_read_as_in_etcd() {
        assert_eq!(alarm_text(NodeId::new(11), 1), "memberID:11 alarm:NOSPACE ");
        assert_eq!(alarm_text(NodeId::new(11), 2), "memberID:11 alarm:CORRUPT ");
    }

    #[test]
    fn downgrades_are_answered_but_never_begun() {
        let ask = |action, version: &str| {
            downgrade(&pb::DowngradeRequest { action, version: version.to_owned() })
        };
        assert_eq!(ask(0, "3.5"), Ok(()));
        assert_eq!(ask(0, "3.4"), Err(EtcdError::InvalidDowngradeTarget));
        assert_eq!(ask(1, "3.5.0"), Err(EtcdError::InvalidDowngradeTarget));
        for bad in ["", "3", "v3.5", "3.5.0.1", "3..5", "three.five"] {
            assert_eq!(ask(0, bad), Err(EtcdError::WrongDowngradeVersionFormat), "{bad}");
        }
        assert_eq!(ask(2, ""), Err(EtcdError::NoInflightDowngrade));
        assert_eq!(ask(9, ""), Err(EtcdError::UnknownMethod));
    }
}

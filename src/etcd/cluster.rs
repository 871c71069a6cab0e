//! The Cluster service: who is a member.
//!
//! What can be seen in the member list is refused here, in etcd's words; the change itself is the assembly's
//! ([`super::Membership`]), which also knows who is healthy.

use std::time::Instant;

use tonic::{Request, Response, Status};

use super::MembershipError;
use super::api::Api;
use super::error::EtcdError;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::cluster_server::Cluster;
use crate::raft::Member;
use crate::types::NodeId;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct ClusterService(pub(super) Api);

impl From<MembershipError> for EtcdError {
    fn from(error: MembershipError) -> Self {
        match error {
            MembershipError::NotFound => Self::MemberNotFound,
            MembershipError::NotLearner => Self::MemberNotLearner,
            MembershipError::LearnerNotReady => Self::LearnerNotReady,
            MembershipError::TooManyLearners => Self::TooManyLearners,
            MembershipError::PeerUrlExists => Self::PeerUrlExists,
            MembershipError::NotEnoughStarted => Self::MemberNotEnoughStarted,
            MembershipError::Unhealthy => Self::Unhealthy,
            MembershipError::NoLeader => Self::NoLeader,
            MembershipError::TimedOut => Self::TimedOut,
            MembershipError::Stopped => Self::Stopped,
        }
    }
}

fn member(member: &Member) -> pb::Member {
    pb::Member {
        id: member.id.get(),
        name: member.name.clone(),
        peer_ur_ls: member.peer_urls.clone(),
        client_ur_ls: member.client_urls.clone(),
        is_learner: member.learner,
    }
}

/// etcd wants at least one URL, each `scheme://host:port` and nothing after it.
fn check_urls(urls: &[String]) -> Result<(), EtcdError> {
    let good = !urls.is_empty() && urls.iter().all(|url| is_peer_url(url));
    if good { Ok(()) } else { Err(EtcdError::MemberBadUrls) }
}

fn is_peer_url(url: &str) -> bool {
    let url = url.trim();
    let Some((scheme, rest)) = url.split_once("://") else { return false };
    match scheme {
        "unix" | "unixs" => !rest.is_empty(),
        "http" | "https" => {
            let Ok(authority) = rest.parse::<http::uri::Authority>() else { return false };
            authority.port_u16().is_some() && !authority.as_str().contains('@')
        }
        _ => false,
    }
}

/// Whether another member has one of the URLs.
fn check_unused(members: &[Member], urls: &[String], except: NodeId) -> Result<(), EtcdError> {
    let others = members.iter().filter(|member| member.id != except);
    let taken = others.flat_map(|member| &member.peer_urls).any(|url| urls.contains(url));
    if taken { Err(EtcdError::PeerUrlExists) } else { Ok(()) }
}

/// The last voter cannot go: nobody would be left to agree to it.
fn check_removal(members: &[Member], id: NodeId) -> Result<(), EtcdError> {
    let leaving = find(members, id)?;
    let voters = members.iter().filter(|member| !member.learner).count();
    let last = !leaving.learner && voters <= 1;
    if last { Err(EtcdError::MemberNotEnoughStarted) } else { Ok(()) }
}

fn find(members: &[Member], id: NodeId) -> Result<&Member, EtcdError> {
    members.iter().find(|member| member.id == id).ok_or(EtcdError::MemberNotFound)
}

impl Api {
    fn members(&self) -> Vec<pb::Member> {
        self.status().members.iter().map(member).collect()
    }

    /// A member answer's header has no revision.
    fn member_header(&self) -> Option<pb::ResponseHeader> {
        Some(self.header())
    }

    async fn add_member(
        &self,
        request: pb::MemberAddRequest,
        deadline: Instant,
    ) -> Result<pb::MemberAddResponse, Status> {
        check_urls(&request.peer_ur_ls)?;
        check_unused(&self.status().members, &request.peer_ur_ls, NodeId::default())?;
        let membership = &self.parts().membership;
        let added = membership.add(request.peer_ur_ls, request.is_learner, deadline).await;
        let added = added.map_err(EtcdError::from)?;
        Ok(pb::MemberAddResponse {
            header: self.member_header(),
            member: Some(member(&added)),
            members: self.members(),
        })
    }

    async fn remove_member(&self, id: NodeId, deadline: Instant) -> Result<(), Status> {
        check_removal(&self.status().members, id)?;
        let removed = self.parts().membership.remove(id, deadline).await;
        Ok(removed.map_err(EtcdError::from)?)
    }

    async fn promote_member(&self, id: NodeId, deadline: Instant) -> Result<(), Status> {
        if !find(&self.status().members, id)?.learner {
            return Err(EtcdError::MemberNotLearner.into());
        }
        let promoted = self.parts().membership.promote(id, deadline).await;
        Ok(promoted.map_err(EtcdError::from)?)
    }

    async fn update_member(
        &self,
        id: NodeId,
        peer_urls: Vec<String>,
        deadline: Instant,
    ) -> Result<(), Status> {
        {
            let status = self.status();
            find(&status.members, id)?;
            check_urls(&peer_urls)?;
            check_unused(&status.members, &peer_urls, id)?;
        }
        let updated = self.parts().membership.update(id, peer_urls, deadline).await;
        Ok(updated.map_err(EtcdError::from)?)
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<pb::MemberAddRequest>,
    ) -> Result<Response<pb::MemberAddResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        Ok(Response::new(self.0.add_member(request.into_inner(), deadline).await?))
    }

    async fn member_remove(
        &self,
        request: Request<pb::MemberRemoveRequest>,
    ) -> Result<Response<pb::MemberRemoveResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        self.0.remove_member(NodeId::new(request.into_inner().id), deadline).await?;
        let (header, members) = (self.0.member_header(), self.0.members());
        Ok(Response::new(pb::MemberRemoveResponse { header, members }))
    }

    async fn member_update(
        &self,
        request: Request<pb::MemberUpdateRequest>,
    ) -> Result<Response<pb::MemberUpdateResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        let request = request.into_inner();
        self.0.update_member(NodeId::new(request.id), request.peer_ur_ls, deadline).await?;
        let (header, members) = (self.0.member_header(), self.0.members());
        Ok(Response::new(pb::MemberUpdateResponse { header, members }))
    }

    async fn member_list(
        &self,
        request: Request<pb::MemberListRequest>,
    ) -> Result<Response<pb::MemberListResponse>, Status> {
        if request.get_ref().linearizable {
            let deadline = self.0.deadline(request.metadata());
            self.0.barrier(deadline).await?;
        }
        let (header, members) = (self.0.member_header(), self.0.members());
        Ok(Response::new(pb::MemberListResponse { header, members }))
    }

    async fn member_promote(
        &self,
        request: Request<pb::MemberPromoteRequest>,
    ) -> Result<Response<pb::MemberPromoteResponse>, Status> {
        let deadline = self.0.deadline(request.metadata());
        self.0.promote_member(NodeId::new(request.into_inner().id), deadline).await?;
        let (header, members) = (self.0.member_header(), self.0.members());
        Ok(Response::new(pb::MemberPromoteResponse { header, members }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members() -> Vec<Member> {
        let one = |id, learner| Member {
            id: NodeId::new(id),
            peer_urls: vec![format!("https://10.0.0.{id}:2380")],
            learner,
            ..Member::default()
        };
        vec![one(1, false), one(2, true)]
    }

    #[test]
    fn peer_urls_are_scheme_host_and_port() {
        for good in ["http://10.0.0.1:2380", "https://pi-2:2380", "https://[fd00::1]:2380"] {
            assert_eq!(check_urls(&[good.to_owned()]), Ok(()), "{good}");
        }
        let bad = [
            "",
            "10.0.0.1:2380",
            "http://10.0.0.1",
            "ftp://10.0.0.1:2380",
            "http://10.0.0.1:2380/path",
            "http://10.0.0.1:99999",
            "http://a@b:2380",
            "http://:x",
        ];
        for bad in bad {
            assert_eq!(check_urls(&[bad.to_owned()]), Err(EtcdError::MemberBadUrls), "{bad}");
        }
        assert_eq!(check_urls(&[]), Err(EtcdError::MemberBadUrls));
    }

    #[test]
    fn url_of_another_member_is_refused_and_ones_own_is_not() {
        let url = ["https://10.0.0.2:2380".to_owned()];
        let other = check_unused(&members(), &url, NodeId::new(1));
        assert_eq!(other, Err(EtcdError::PeerUrlExists));
        assert_eq!(check_unused(&members(), &url, NodeId::new(2)), Ok(()));
    }

    #[test]
    fn last_voter_cannot_be_removed_but_a_learner_can() {
        let last = check_removal(&members(), NodeId::new(1));
        assert_eq!(last, Err(EtcdError::MemberNotEnoughStarted));
        assert_eq!(check_removal(&members(), NodeId::new(2)), Ok(()));
        let unknown = check_removal(&members(), NodeId::new(3));
        assert_eq!(unknown, Err(EtcdError::MemberNotFound));
    }
}

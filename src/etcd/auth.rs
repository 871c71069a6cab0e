//! The Auth service of a server that has no users: access is decided by client certificates.
//!
//! Half of etcd's access control would be worse than none, so it is off and stays off, and the answers are those etcd
//! gives while it is off and nobody has made a user or a role. Making one is UNIMPLEMENTED.

use tonic::{Request, Response, Status};

use super::api::Api;
use super::error::EtcdError;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::auth_server::Auth;

/// The revision of etcd's auth store before anything was ever changed in it.
const AUTH_REVISION: u64 = 1;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct AuthService(pub(super) Api);

fn not_supported() -> Status {
    Status::unimplemented(
        "etcdserver: users and roles are not supported, access is by client certificate",
    )
}

/// Unless the name is empty, which etcd says first.
fn refuse_new(name: &str, empty: EtcdError) -> Status {
    if name.is_empty() { empty.into() } else { not_supported() }
}

fn check_permission(request: &pb::AuthRoleGrantPermissionRequest) -> EtcdError {
    let Some(permission) = &request.perm else { return EtcdError::PermissionNotGiven };
    let (key, end) = (permission.key.as_ref(), permission.range_end.as_ref());
    let sound = !key.is_empty() && (end.is_empty() || end == [0] || key < end);
    if sound { EtcdError::RoleNotFound } else { EtcdError::InvalidAuthManagement }
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn auth_enable(
        &self,
        _request: Request<pb::AuthEnableRequest>,
    ) -> Result<Response<pb::AuthEnableResponse>, Status> {
        Err(EtcdError::RootUserNotExist.into())
    }

    async fn auth_disable(
        &self,
        _request: Request<pb::AuthDisableRequest>,
    ) -> Result<Response<pb::AuthDisableResponse>, Status> {
        Ok(Response::new(pb::AuthDisableResponse { header: self.0.header_now()? }))
    }

    async fn auth_status(
        &self,
        _request: Request<pb::AuthStatusRequest>,
    ) -> Result<Response<pb::AuthStatusResponse>, Status> {
        let header = self.0.header_now()?;
        let auth_revision = AUTH_REVISION;
        Ok(Response::new(pb::AuthStatusResponse { header, enabled: false, auth_revision }))
    }

    async fn authenticate(
        &self,
        _request: Request<pb::AuthenticateRequest>,
    ) -> Result<Response<pb::AuthenticateResponse>, Status> {
        Err(EtcdError::AuthNotEnabled.into())
    }

    async fn user_add(
        &self,
        request: Request<pb::AuthUserAddRequest>,
    ) -> Result<Response<pb::AuthUserAddResponse>, Status> {
        Err(refuse_new(&request.get_ref().name, EtcdError::UserEmpty))
    }

    async fn user_get(
        &self,
        _request: Request<pb::AuthUserGetRequest>,
    ) -> Result<Response<pb::AuthUserGetResponse>, Status> {
        Err(EtcdError::UserNotFound.into())
    }

    async fn user_list(
        &self,
        _request: Request<pb::AuthUserListRequest>,
    ) -> Result<Response<pb::AuthUserListResponse>, Status> {
        let header = self.0.header_now()?;
        Ok(Response::new(pb::AuthUserListResponse { header, users: Vec::new() }))
    }

    async fn user_delete(
        &self,
        _request: Request<pb::AuthUserDeleteRequest>,
    ) -> Result<Response<pb::AuthUserDeleteResponse>, Status> {
        Err(EtcdError::UserNotFound.into())
    }

    async fn user_change_password(
        &self,
        _request: Request<pb::AuthUserChangePasswordRequest>,
    ) -> Result<Response<pb::AuthUserChangePasswordResponse>, Status> {
        Err(EtcdError::UserNotFound.into())
    }

    async fn user_grant_role(
        &self,
        _request: Request<pb::AuthUserGrantRoleRequest>,
    ) -> Result<Response<pb::AuthUserGrantRoleResponse>, Status> {
        Err(EtcdError::UserNotFound.into())
    }

    async fn user_revoke_role(
        &self,
        _request: Request<pb::AuthUserRevokeRoleRequest>,
    ) -> Result<Response<pb::AuthUserRevokeRoleResponse>, Status> {
        Err(EtcdError::UserNotFound.into())
    }

    async fn role_add(
        &self,
        request: Request<pb::AuthRoleAddRequest>,
    ) -> Result<Response<pb::AuthRoleAddResponse>, Status> {
        Err(refuse_new(&request.get_ref().name, EtcdError::RoleEmpty))
    }

    async fn role_get(
        &self,
        _request: Request<pb::AuthRoleGetRequest>,
    ) -> Result<Response<pb::AuthRoleGetResponse>, Status> {
        Err(EtcdError::RoleNotFound.into())
    }

    async fn role_list(
        &self,
        _request: Request<pb::AuthRoleListRequest>,
    ) -> Result<Response<pb::AuthRoleListResponse>, Status> {
        let header = self.0.header_now()?;
        Ok(Response::new(pb::AuthRoleListResponse { header, roles: Vec::new() }))
    }

    async fn role_delete(
        &self,
        _request: Request<pb::AuthRoleDeleteRequest>,
    ) -> Result<Response<pb::AuthRoleDeleteResponse>, Status> {
        Err(EtcdError::RoleNotFound.into())
    }

    async fn role_grant_permission(
        &self,
        request: Request<pb::AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<pb::AuthRoleGrantPermissionResponse>, Status> {
        Err(check_permission(request.get_ref()).into())
    }

    async fn role_revoke_permission(
        &self,
        _request: Request<pb::AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<pb::AuthRoleRevokePermissionResponse>, Status> {
        Err(EtcdError::RoleNotFound.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::authpb::Permission;
    use bytes::Bytes;

    #[test]
    fn permissions_are_checked_before_the_role_is_looked_for() {
        let ask = |perm| {
            check_permission(&pb::AuthRoleGrantPermissionRequest { name: "r".to_owned(), perm })
        };
        let range = |key: &'static str, end: &'static str| {
            let (key, range_end) = (Bytes::from_static(key.as_bytes()), end.into());
            Some(Permission { key, range_end, ..Default::default() })
        };
        assert_eq!(ask(None), EtcdError::PermissionNotGiven);
        assert_eq!(ask(range("", "")), EtcdError::InvalidAuthManagement);
        assert_eq!(ask(range("b", "a")), EtcdError::InvalidAuthManagement);
        assert_eq!(ask(range("b", "\0")), EtcdError::RoleNotFound);
        assert_eq!(ask(range("a", "b")), EtcdError::RoleNotFound);
    }
}

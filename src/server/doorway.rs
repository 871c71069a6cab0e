//! What the join door gives to a node that has proved that it knows the token.

use crate::apply;
use crate::join::Grant;
use crate::mvcc::Store;
use crate::pki::Pki;
use crate::proto::node::Credentials;
use crate::raft::inspect;
use crate::types::ClusterId;
use crate::versions;

/// Gives this server's credentials away.
pub(super) struct OwnCredentials {
    pub(super) cluster: ClusterId,
    pub(super) pki: Pki,
    pub(super) store: Store,
}

impl Grant for OwnCredentials {
    fn credentials(&self) -> Result<Credentials, String> {
        let view = self.store.read().map_err(|error| error.to_string())?;
        let flags = apply::flags(&view).map_err(|error| error.to_string())?;
        // A founder that has not come so far, or a joiner that has not been filled yet.
        let flags = flags.ok_or("this server is not ready itself")?;
        let key = self.pki.authority_key_pem().map_err(|error| error.to_string())?;
        let key =
            key.ok_or("this server does not have the cluster's authority; ask another one")?;
        Ok(Credentials {
            cluster: self.cluster.get(),
            authority_pem: self.pki.authority_pem().to_owned().into(),
            authority_key_pem: key.into(),
            membership: Some(inspect::stored_membership(&view)?),
            flags,
        })
    }

    fn format(&self) -> u32 {
        // A store that cannot be read gives nobody credentials.
        let view = self.store.read().ok();
        let format = view.and_then(|view| apply::format(&view).ok());
        format.map_or(versions::FORMAT_FIRST, |record| record.format)
    }
}

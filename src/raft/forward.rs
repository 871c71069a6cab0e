//! Answers what other nodes send on to the leader: reads, writes and changes of members.

use bytes::Bytes;

use super::Node;
use super::transport::{Method, Refused};
use crate::types::NodeId;

impl Node {
    /// Answers a request that a follower's client made.
    pub(super) async fn answer_forwarded(
        &self,
        _from: NodeId,
        method: Method,
        _request: Bytes,
    ) -> Result<Bytes, Refused> {
        Err(Refused::NotReady(format!("{method:?} is not served here")))
    }
}

//! Finds members that have moved: whoever has heard from one knows where it is, and tells those who have not.
//!
//! Two members that get other addresses at the same moment know each other's old ones only. A third one, to whom both have said hello
//! from where they are now, knows both.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;

use super::wire;
use crate::proto::node::HelloReply;
use crate::raft::Member;
use crate::raft::transport::{Method, Transport};
use crate::types::{ClusterId, NodeId};

/// How long one other may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Asks for members that cannot be reached. See the module documentation.
#[derive(Clone)]
pub struct Finder {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeId,
    /// The number of this run of the process.
    pub incarnation: u64,
    /// How others are reached.
    pub transport: Arc<dyn Transport>,
}

impl Finder {
    /// Where members are that `via` has heard from since it started; nothing if it does not answer.
    pub async fn ask(&self, via: &Member) -> Vec<Member> {
        let probe = wire::probe(self.cluster, self.node, self.incarnation);
        let answer = self.transport.call(via, Method::Hello, probe, ANSWER_TIMEOUT).await;
        let reply = answer.ok().and_then(|reply| HelloReply::decode(reply).ok());
        let seen = reply.unwrap_or_default().seen;
        seen.iter().map(|member| wire::member(member, false)).collect()
    }
}

//! Answers the questions of the health endpoints from the running node.

use std::time::Duration;

use crate::env::BoxFuture;
use crate::observe::http::{Alarm, HealthSource};
use crate::proto::etcdserverpb::AlarmType;
use crate::raft::{Node, Role};

/// See the module documentation.
pub(super) struct NodeHealth {
    pub(super) node: Node,
    pub(super) timeout: Duration,
}

/// etcd's health check reads this key.
const KEY: &[u8] = b"health";

impl NodeHealth {
    fn read(&self) -> Result<(), String> {
        let view = self.node.store().read().map_err(|error| error.to_string())?;
        view.get(KEY, None).map(drop).map_err(|error| error.to_string())
    }
}

impl HealthSource for NodeHealth {
    fn has_leader(&self) -> bool {
        self.node.status().leader.is_some()
    }

    fn is_learner(&self) -> bool {
        self.node.status().role == Role::Learner
    }

    fn alarms(&self) -> Vec<Alarm> {
        // A store that cannot be read fails the read checks; here it has no alarms.
        let alarms = self.node.store().read().and_then(|view| view.alarms()).unwrap_or_default();
        alarms
            .into_iter()
            .filter_map(|(_, kind)| match AlarmType::try_from(kind) {
                Ok(AlarmType::Nospace) => Some(Alarm::NoSpace),
                Ok(AlarmType::Corrupt) => Some(Alarm::Corrupt),
                Ok(AlarmType::None) | Err(_) => None,
            })
            .collect()
    }

    fn linearizable_read(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async {
            let deadline = self.node.env().clock.now() + self.timeout;
            let _barrier =
                self.node.read_barrier(deadline).await.map_err(|error| error.to_string())?;
            self.read()
        })
    }

    fn serializable_read(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async { self.read() })
    }
}

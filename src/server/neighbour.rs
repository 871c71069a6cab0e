//! Tells a port that upstream k3s holds with its embedded etcd from one that anybody else holds.

use super::failed::RunError;
use super::listen::ListenError;
use crate::bus;
use crate::bus::units::{self, Datastore, UnitState};

/// The better error, if upstream k3s is behind this one: then starting again is of no use.
pub(super) async fn explain(error: ListenError) -> RunError {
    let Some(bus) = bus::connect().await else { return error.into() };
    match units::look(&bus, units::UPSTREAM).await.and_then(|unit| conflict(&unit)) {
        Some(unit) => RunError::Upstream { unit, source: error },
        None => error.into(),
    }
}

/// How to name it, if it may be the holder of one of our ports.
fn conflict(unit: &UnitState) -> Option<String> {
    if !unit.is_running() || units::datastore(unit) == Datastore::Elsewhere {
        return None;
    }
    let name = units::UPSTREAM;
    Some(match unit.pid {
        0 => format!("{name} ({})", unit.active),
        pid => format!("{name} ({}, pid {pid})", unit.active),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(active: &str, arguments: &str, pid: u32) -> UnitState {
        UnitState {
            active: active.to_owned(),
            arguments: arguments.split(' ').map(str::to_owned).collect(),
            pid,
            ..UnitState::default()
        }
    }

    #[test]
    fn only_a_running_upstream_with_a_datastore_of_its_own_is_a_conflict() {
        let server = "/usr/local/bin/k3s server --cluster-init";
        let found = conflict(&unit("active", server, 42));
        assert_eq!(found.as_deref(), Some("k3s.service (active, pid 42)"));
        assert!(conflict(&unit("activating", "/usr/local/bin/k3s server", 0)).is_some());
        assert_eq!(conflict(&unit("inactive", server, 0)), None);
        assert_eq!(conflict(&unit("active", "/usr/local/bin/k3s agent", 42)), None);
        let ours = "/usr/local/bin/k3s server --datastore-endpoint=https://127.0.0.1:2379";
        assert_eq!(conflict(&unit("active", ours, 42)), None);
    }
}

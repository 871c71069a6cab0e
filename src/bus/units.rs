//! What systemd does with a unit: upstream's `k3s.service`, or our own.
//!
//! Upstream k3s that keeps its own embedded etcd listens on the same ports as we do. Beside it there is nothing to start, and
//! trying again every few seconds only fills the journal: the operator has to decide which of the two is the datastore.
//! A k3s that uses our endpoint, or that is an agent, is what we are here for.

use zbus::{Connection, OwnedObjectPath, proxy};

/// Upstream's unit.
pub const UPSTREAM: &str = "k3s.service";

/// Ours.
pub const OWN: &str = "k3s-server.service";

#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
}

#[proxy(
    interface = "org.freedesktop.systemd1.Unit",
    default_service = "org.freedesktop.systemd1",
    assume_defaults = false
)]
trait Unit {
    #[zbus(property(emits_changed_signal = "false"))]
    fn active_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn sub_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn load_state(&self) -> zbus::Result<String>;
}

/// Path, arguments, and what systemd knows of the last run.
type Exec = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

#[proxy(
    interface = "org.freedesktop.systemd1.Service",
    default_service = "org.freedesktop.systemd1",
    assume_defaults = false
)]
trait Service {
    #[zbus(property(emits_changed_signal = "false"), name = "MainPID")]
    fn main_pid(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn exec_start(&self) -> zbus::Result<Vec<Exec>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn environment(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn status_text(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn result(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"), name = "NRestarts")]
    fn n_restarts(&self) -> zbus::Result<u32>;
}

/// A service, as systemd sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnitState {
    /// `loaded`, `not-found`, …
    pub load: String,
    /// `active`, `activating`, `inactive`, `failed`, …
    pub active: String,
    /// `running`, `auto-restart`, `dead`, …
    pub sub: String,
    /// How the last run ended: `success`, `exit-code`, `watchdog`, …
    pub result: String,
    /// What it said of itself.
    pub text: String,
    /// Automatic restarts since it was started by hand.
    pub restarts: u32,
    /// Its main process; 0 if there is none.
    pub pid: u32,
    /// Its command line.
    pub arguments: Vec<String>,
    /// Its variables, as far as the unit itself sets them.
    pub environment: Vec<String>,
}

impl UnitState {
    /// Whether it runs, or is about to.
    pub fn is_running(&self) -> bool {
        matches!(self.active.as_str(), "active" | "activating" | "reloading" | "deactivating")
    }
}

/// Looks at a unit; `None` where systemd cannot be asked.
pub async fn look(bus: &Connection, unit: &str) -> Option<UnitState> {
    match looked(bus, unit).await {
        Ok(state) => Some(state),
        Err(error) => {
            tracing::debug!(%error, unit, "systemd was not asked");
            None
        }
    }
}

async fn looked(bus: &Connection, name: &str) -> zbus::Result<UnitState> {
    let path = ManagerProxy::new(bus).await?.load_unit(name).await?;
    let unit = UnitProxy::builder(bus).path(path.clone()).build().await?;
    let service = ServiceProxy::builder(bus).path(path).build().await?;
    // Units of other kinds, and those that are not there, have no service's properties.
    let mut arguments = service.exec_start().await.unwrap_or_default();
    Ok(UnitState {
        load: unit.load_state().await?,
        active: unit.active_state().await?,
        sub: unit.sub_state().await?,
        result: service.result().await.unwrap_or_default(),
        text: service.status_text().await.unwrap_or_default(),
        restarts: service.n_restarts().await.unwrap_or_default(),
        pid: service.main_pid().await.unwrap_or_default(),
        arguments: arguments.pop().map(|exec| exec.1).unwrap_or_default(),
        environment: service.environment().await.unwrap_or_default(),
    })
}

/// Which datastore upstream k3s has, as far as its unit says. Its configuration file is root's, and may say more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datastore {
    /// None of its own: an agent, or a server with `--datastore-endpoint`.
    Elsewhere,
    /// Embedded etcd.
    Embedded,
    /// Not told by the unit.
    Untold,
}

/// See [`Datastore`].
pub fn datastore(unit: &UnitState) -> Datastore {
    let mut words = unit.arguments.iter().skip(1).map(String::as_str);
    let is_set = |variable: &str| {
        unit.environment.iter().any(|one| {
            let value = one.strip_prefix(variable).and_then(|rest| rest.strip_prefix('='));
            value.is_some_and(|value| !value.is_empty() && value != "false")
        })
    };
    let given = |flag: &str| {
        unit.arguments.iter().any(|word| {
            let value = word.trim_start_matches('-').strip_prefix(flag);
            word.starts_with('-')
                && value.is_some_and(|rest| {
                    rest.is_empty() || (rest.starts_with('=') && rest != "=false")
                })
        })
    };
    if words.next() == Some("agent")
        || given("datastore-endpoint")
        || is_set("K3S_DATASTORE_ENDPOINT")
    {
        return Datastore::Elsewhere;
    }
    let embedded = ["cluster-init", "server", "cluster-reset"].into_iter().any(given)
        || is_set("K3S_CLUSTER_INIT")
        || is_set("K3S_URL");
    if embedded { Datastore::Embedded } else { Datastore::Untold }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(arguments: &str, environment: &str) -> UnitState {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        UnitState {
            arguments: words(arguments),
            environment: words(environment),
            ..UnitState::default()
        }
    }

    #[test]
    fn datastore_of_upstream_is_told_by_flags_and_variables() {
        use Datastore::{Elsewhere, Embedded, Untold};
        for (arguments, environment, expected) in [
            ("/usr/local/bin/k3s server", "", Untold),
            ("/usr/local/bin/k3s server --cluster-init", "", Embedded),
            ("/usr/local/bin/k3s server --cluster-init=false", "", Untold),
            ("/usr/local/bin/k3s server -cluster-init", "", Embedded),
            ("/usr/local/bin/k3s server --server https://pi-1:6443", "", Embedded),
            ("/usr/local/bin/k3s server", "K3S_URL=https://pi-1:6443 K3S_TOKEN=x", Embedded),
            ("/usr/local/bin/k3s server", "K3S_CLUSTER_INIT=true", Embedded),
            ("/usr/local/bin/k3s agent --server https://pi-1:6443", "", Elsewhere),
            (
                "/usr/local/bin/k3s server --cluster-init --datastore-endpoint https://127.0.0.1:2379",
                "",
                Elsewhere,
            ),
            (
                "/usr/local/bin/k3s server --server=https://pi-1:6443",
                "K3S_DATASTORE_ENDPOINT=https://127.0.0.1:2379",
                Elsewhere,
            ),
        ] {
            let found = datastore(&unit(arguments, environment));
            assert_eq!(found, expected, "{arguments} {environment}");
        }
    }

    #[test]
    fn a_unit_that_is_about_to_run_counts_as_running() {
        let running = |active: &str| {
            UnitState { active: active.to_owned(), ..UnitState::default() }.is_running()
        };
        assert!(
            ["active", "activating", "reloading", "deactivating"].map(running).iter().all(|is| *is)
        );
        assert!(!["inactive", "failed", ""].map(running).iter().any(|is| *is));
    }
}

//! What is shown of this server on D-Bus, and what can be asked of it there.
//!
//! Lives from before the start to the end of the process: a server that waits for others for hours says so, and one that starts
//! over as another node goes on under the same name.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::backup;
use super::clock::ClockState;
use super::failed::RunError;
use super::life::names;
use super::reload::{self, Reload};
use crate::announce;
use crate::bus::{MemberRow, Reading, Server};
use crate::config::{Config, Loaded, Request};
use crate::env::{BoxFuture, Env};
use crate::events::{EventId, fields, trouble};
use crate::metrics::Observations;
use crate::metrics::process;
use crate::metrics::today::{TODAY, Written};
use crate::pki::Names;
use crate::raft::{Member, Node, Role, Status};
use crate::systemd::{Phase, Phases};
use crate::types::NodeId;

/// How long a transfer of leadership may take.
const TRANSFER: Duration = Duration::from_secs(10);

/// Below the data directory.
const BACKUPS: &str = "backups";

/// See the module documentation.
pub(super) struct Cockpit {
    env: Env,
    phases: Phases,
    /// The clock, as far as it can be believed.
    pub(super) clock: watch::Sender<ClockState>,
    /// Names for this server's certificates. Told anew when certificates should be looked at.
    pub(super) names: watch::Sender<Names>,
    pub(super) db_dir: PathBuf,
    request: Request,
    config: Mutex<Config>,
    node: Mutex<Option<Node>>,
}

impl Cockpit {
    pub(super) fn new(loaded: &Loaded, env: &Env, phases: &Phases) -> Result<Self, RunError> {
        let config = loaded.config.clone();
        Ok(Self {
            env: env.clone(),
            phases: phases.clone(),
            clock: watch::Sender::new(ClockState::of(env.clock.wall())),
            names: watch::Sender::new(names(&config)?),
            db_dir: config.db_dir.clone(),
            request: loaded.request.clone(),
            config: Mutex::new(config),
            node: Mutex::default(),
        })
    }

    /// This node takes part now, or nobody does any more.
    pub(super) fn show(&self, node: Option<Node>) {
        *self.node.lock().unwrap_or_else(PoisonError::into_inner) = node;
    }

    fn node(&self) -> Option<Node> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn taking_part(&self) -> Result<Node, String> {
        self.node().ok_or_else(|| "this server does not take part yet".to_owned())
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This host is at another address: its certificates name that one.
    pub(super) fn moved(&self, config: &Config) -> Result<(), RunError> {
        self.names.send_replace(names(config)?);
        *self.config() = config.clone();
        Ok(())
    }

    /// Before the machine goes down: lets another one lead, and makes durable what is in memory.
    pub(super) async fn prepare_for_shutdown(&self) {
        let Some(node) = self.node() else { return };
        let led = node.status().role == Role::Leader;
        node.leave_leadership().await;
        let status = node.status();
        let leads = leader_name(&status).unwrap_or_else(|| "nobody".to_owned());
        let flushed = node.checkpoint().await;
        let state = match &flushed {
            Ok(()) => "the state is on the card".to_owned(),
            Err(error) => format!("the state could not be made durable: {error}"),
        };
        let lead = if led && status.role != Role::Leader {
            format!("{leads} leads now")
        } else {
            format!("leader is {leads}")
        };
        announce!(EventId::ShutdownPrepared, "the machine goes down: {lead}, {state}");
    }

    /// Reads the configuration again and uses what can be used while running.
    pub(super) fn read_again(&self) -> Result<Vec<String>, String> {
        let Reload { config, names, said } = reload::reload(&self.request, &self.config())?;
        self.names.send_if_modified(|now| {
            let changed = *now != names;
            *now = names;
            changed
        });
        *self.config() = config;
        announce!(
            EventId::Reloaded,
            "the configuration was read again: {}",
            reload::sentence(&said)
        );
        Ok(said)
    }
}

/// The name of whoever leads.
pub(super) fn leader_name(status: &Status) -> Option<String> {
    let leader = status.leader?;
    let member = status.members.iter().find(|member| member.id == leader);
    Some(member.map_or_else(|| leader.to_string(), |member| member.name.clone()))
}

pub(super) const fn role(role: Role) -> &'static str {
    match role {
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Learner => "learner",
    }
}

/// Microseconds of a histogram in seconds; zero before there is anything. What is above all buckets counts as their end.
pub(super) fn quantile_seconds(observations: &Observations, share: f64) -> f64 {
    if observations.count == 0 {
        return 0.0;
    }
    let last = crate::metrics::MICROS[crate::metrics::MICROS.len() - 1];
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52 microseconds")]
    let seconds = observations.quantile(share).min(last) as f64 / 1e6;
    seconds
}

/// What was handed to the card today.
pub(super) fn written_today(env: &Env) -> Written {
    TODAY.look(env.clock.wall(), process::read().written_bytes.unwrap_or(0))
}

fn row(member: &Member, leader: Option<NodeId>) -> MemberRow {
    let role = match (member.learner, Some(member.id) == leader) {
        (true, _) => "learner",
        (false, true) => "leader",
        (false, false) => "voter",
    };
    (
        member.id.to_string(),
        member.name.clone(),
        role.to_owned(),
        member.peer_urls.clone(),
        member.client_urls.clone(),
    )
}

/// A member by name or id.
fn find<'s>(status: &'s Status, wanted: &str) -> Option<&'s Member> {
    let named = status.members.iter().find(|member| member.name == wanted);
    named.or_else(|| status.members.iter().find(|member| member.id.to_string() == wanted))
}

impl Server for Cockpit {
    fn reading(&self) -> Reading {
        let report = self.phases.watch().borrow().clone();
        let mut reading = Reading {
            state: report.phase.word().to_owned(),
            state_detail: report.detail,
            node_name: self.config().node_name.clone(),
            clock: self.clock.borrow().word().to_owned(),
            last_error: trouble::last().unwrap_or_default(),
            written_today: written_today(&self.env).bytes,
            ..Reading::default()
        };
        let Some(node) = self.node() else { return reading };
        let (status, barriers) = (node.status(), node.wal().stats().barrier_micros);
        if report.phase == Phase::Ready && status.leader.is_none() {
            "no-leader".clone_into(&mut reading.state);
        }
        role(status.role).clone_into(&mut reading.role);
        reading.node_id = status.node.to_string();
        reading.cluster_id = status.cluster.to_string();
        reading.leader_id = status.leader.map(|id| id.to_string()).unwrap_or_default();
        reading.leader_name = leader_name(&status).unwrap_or_default();
        reading.term = status.term.get();
        reading.committed_index = status.committed.get();
        reading.applied_index = status.applied.get();
        reading.revision = node.store().read().map_or(0, |view| view.revision().get());
        reading.members = status.members.iter().map(|one| row(one, status.leader)).collect();
        reading.barrier_p50 = quantile_seconds(&barriers, 0.5);
        reading.barrier_p99 = quantile_seconds(&barriers, 0.99);
        reading
    }

    fn transfer_leadership<'a>(&'a self, to: &'a str) -> BoxFuture<'a, Result<String, String>> {
        Box::pin(async move {
            let node = self.taking_part()?;
            let status = node.status();
            if to.is_empty() {
                if status.role != Role::Leader {
                    let leads = leader_name(&status).unwrap_or_else(|| "nobody".to_owned());
                    return Err(format!("this server does not lead, {leads} does"));
                }
                node.leave_leadership().await;
                let now = node.status();
                return match leader_name(&now) {
                    Some(leader) if now.role != Role::Leader => Ok(leader),
                    _ => Err("no other voter is fit to lead now".to_owned()),
                };
            }
            let member = find(&status, to).ok_or_else(|| format!("no member is called {to:?}"))?;
            let deadline = self.env.clock.now() + TRANSFER;
            let done = node.transfer_leader(member.id, deadline).await;
            done.map(|()| member.name.clone()).map_err(|error| error.to_string())
        })
    }

    fn checkpoint(&self) -> BoxFuture<'_, Result<u64, String>> {
        Box::pin(async {
            let node = self.taking_part()?;
            node.checkpoint().await.map_err(|error| error.to_string())?;
            Ok(node.stats().checkpoint_index.get())
        })
    }

    fn backup<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<String, String>> {
        Box::pin(async move {
            let node = self.taking_part()?;
            let file = file_name(name, &self.config().node_name, self.env.clock.wall())?;
            let path = self.db_dir.join(BACKUPS).join(file);
            let (env, target) = (self.env.clone(), path.clone());
            let handle = tokio::runtime::Handle::current();
            let written = tokio::task::spawn_blocking(move || {
                handle.block_on(backup::write_file(&node, &env, &target))
            });
            let bytes = written
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| format!("{}: {error}", path.display()))?;
            announce!(
                EventId::BackupWritten,
                { fields::PATH } = %path.display(),
                { fields::BYTES } = bytes,
                "wrote a backup of {bytes} bytes to {}",
                path.display()
            );
            Ok(path.display().to_string())
        })
    }

    fn reload(&self) -> BoxFuture<'_, Result<Vec<String>, String>> {
        Box::pin(async { self.read_again() })
    }
}

/// A name in one directory: what was asked for, or one with node and time.
fn file_name(wanted: &str, node: &str, wall: SystemTime) -> Result<PathBuf, String> {
    if wanted.is_empty() {
        let seconds = wall.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // As K3s names them.
        return Ok(PathBuf::from(format!("on-demand-{node}-{seconds}")));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_fine = wanted.len() <= 128 && wanted.chars().all(plain) && !wanted.starts_with('.');
    if !is_fine || Path::new(wanted).components().count() != 1 {
        return Err(format!(
            "{wanted:?} is no name for a backup: expected letters, digits, `.`, `-` and `_`, not beginning with `.`"
        ));
    }
    Ok(PathBuf::from(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_cannot_be_named_out_of_their_directory() {
        let wall = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let named = |name| file_name(name, "pi-1", wall);
        assert_eq!(named("").unwrap(), Path::new("on-demand-pi-1-1800000000"));
        assert_eq!(named("before-2.0.db").unwrap(), Path::new("before-2.0.db"));
        for wrong in ["../x", "/etc/passwd", "a/b", ".", "..", ".x", "a b", "a\nb"] {
            assert!(named(wrong).unwrap_err().contains("expected"), "{wrong:?}");
        }
        assert!(named(&"x".repeat(129)).is_err());
    }

    #[test]
    fn quantiles_are_seconds_and_finite() {
        let histogram = crate::metrics::Histogram::new(&crate::metrics::MICROS);
        assert!(quantile_seconds(&histogram.snapshot(), 0.99).abs() < f64::EPSILON);
        histogram.observe(900);
        assert!((quantile_seconds(&histogram.snapshot(), 0.5) - 0.001).abs() < 1e-9);
        histogram.observe(u64::MAX / 2);
        assert!(quantile_seconds(&histogram.snapshot(), 0.99) < 60.0);
    }
}

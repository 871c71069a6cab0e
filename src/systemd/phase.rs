//! Says how far the daemon has come, in a small file that outlives it.
//!
//! `k3s-server health` decides with it whether a new release may stay, and `status` tells it when port 2379 does not answer. It
//! lies in the runtime directory (`$RUNTIME_DIRECTORY`, below `/run`): memory, so the card is not touched, and gone at the next
//! boot. Without such a directory nobody is told.
//!
//! # Invariants
//!
//! - A reader sees a whole report or the one before it: written aside, then renamed.
//! - [`Phase::Meeting`] and everything after it mean that what is this server's own was in order: configuration, ports, log,
//!   state, certificates, token.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Where systemd puts the unit's runtime directory.
pub const DIRECTORY: &str = "/run/k3s-server";

const FILE: &str = "phase.json";

/// How far a server is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Looks at its own: configuration, ports, log, state, certificates.
    #[default]
    Opening,
    /// Asks to be let into a cluster.
    Joining,
    /// Its own is in order; asks the other servers whether it has forgotten anything.
    Meeting,
    /// Takes part; not admitted, filled or up to date yet.
    Settling,
    /// Serves.
    Ready,
    /// Is on its way out.
    Stopping,
    /// Has ended badly.
    Failed,
}

impl Phase {
    /// One word, for people and for D-Bus.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Joining => "joining",
            Self::Meeting => "meeting",
            Self::Settling => "settling",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        }
    }
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How far.
    pub phase: Phase,
    /// In words.
    pub detail: String,
    /// Whose report this is.
    pub pid: u32,
    /// With [`Phase::Failed`]: the exit status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<u8>,
}

impl Report {
    /// The last report in a runtime directory; `None` if there is none that can be read.
    pub fn read(directory: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(directory.join(FILE)).ok()?).ok()
    }

    /// Whether whoever wrote it is still there.
    pub fn is_alive(&self) -> bool {
        self.pid != 0 && Path::new("/proc").join(self.pid.to_string()).exists()
    }
}

/// Tells the phase to whoever wants to know. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Phases {
    directory: Option<Arc<PathBuf>>,
    now: Arc<watch::Sender<Report>>,
}

impl Phases {
    /// Told in the directory that systemd made, if it did.
    pub fn from_environment() -> Self {
        // Several directories of one unit are separated by colons; ours has one.
        let directory = std::env::var_os("RUNTIME_DIRECTORY").filter(|path| !path.is_empty());
        Self::new(directory.map(PathBuf::from))
    }

    /// Told in this directory.
    pub fn new(directory: Option<PathBuf>) -> Self {
        let first = Report { pid: std::process::id(), ..Report::default() };
        Self { directory: directory.map(Arc::new), now: Arc::new(watch::Sender::new(first)) }
    }

    /// The server is this far now.
    pub fn set(&self, phase: Phase, detail: impl Into<String>) {
        self.tell(Report { phase, detail: detail.into(), pid: std::process::id(), exit: None });
    }

    /// The server ends with this status, and why.
    pub fn failed(&self, exit: u8, detail: impl Into<String>) {
        let (phase, pid) = (Phase::Failed, std::process::id());
        self.tell(Report { phase, detail: detail.into(), pid, exit: Some(exit) });
    }

    /// The phase now, and every change of it.
    pub fn watch(&self) -> watch::Receiver<Report> {
        self.now.subscribe()
    }

    fn tell(&self, report: Report) {
        if *self.now.borrow() == report {
            return;
        }
        if let Some(directory) = &self.directory
            && let Err(error) = write(directory, &report)
        {
            tracing::debug!(%error, "the phase file was not written");
        }
        self.now.send_replace(report);
    }
}

fn write(directory: &Path, report: &Report) -> io::Result<()> {
    let aside = directory.join(format!("{FILE}.new"));
    fs::write(&aside, serde_json::to_vec(report)?)?;
    fs::rename(aside, directory.join(FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_can_be_read_back_and_names_a_living_process() {
        let dir = tempfile::tempdir().unwrap();
        let phases = Phases::new(Some(dir.path().to_owned()));
        assert_eq!(Report::read(dir.path()), None);
        phases.set(Phase::Meeting, "asks pi-2");
        let report = Report::read(dir.path()).unwrap();
        assert_eq!((report.phase, report.detail.as_str()), (Phase::Meeting, "asks pi-2"));
        assert!(report.is_alive());
        phases.failed(78, "wrong");
        let report = Report::read(dir.path()).unwrap();
        assert_eq!((report.phase, report.exit), (Phase::Failed, Some(78)));
        assert_eq!(*phases.watch().borrow(), report);
        assert!(!Report::default().is_alive());
    }

    #[test]
    fn words_are_those_of_the_file() {
        for phase in [Phase::Opening, Phase::Joining, Phase::Meeting, Phase::Settling, Phase::Ready]
        {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.word());
        }
    }

    #[test]
    fn without_a_runtime_directory_nobody_is_told_and_nothing_fails() {
        let phases = Phases::new(None);
        phases.set(Phase::Ready, "");
        assert_eq!(phases.watch().borrow().phase, Phase::Ready);
        Phases::new(Some(PathBuf::from("/nonexistent/k3s"))).set(Phase::Ready, "");
    }
}

//! `check`: whether a server with this configuration would be let in, before anything is restarted.
//!
//! Compared with the first of these that there is: a cluster named on the command line, the running server of this host, the
//! datastore on its disk (and, if that differs, another member: the disk may be behind), the cluster that the configuration
//! wants to join.
//!
//! # Not here
//!
//! Whether the configuration is right by itself (`config`), reading a datastore that nobody runs on (`server`).

use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

use super::AdminError;
use crate::client::{self, Connection, ConnectionError};
use crate::config::{Config, Problems, Start, TokenSource};
use crate::critical::{CriticalFlags, FlagsError, gate};
use crate::env::host;
use crate::join::enrol::{Dial, is_own};
use crate::join::token::{ObtainError, obtain};
use crate::join::{Enrolment, Identity, JoinError, Plan, PlanError, start_plan};
use crate::proto::node::FlagsRequest;
use crate::proto::node::admin_client::AdminClient;

/// What would happen at a start.
#[derive(Debug)]
pub struct Verdict {
    /// What the start would do, or why not.
    pub plan: Result<Plan, PlanError>,
    /// Whether the flags are the cluster's.
    pub flags: Compared,
}

/// Whether the flags are the cluster's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compared {
    /// There is nothing to compare with, and why.
    Nothing(&'static str),
    /// Compared with this.
    With {
        /// What was asked, for people.
        source: String,
        /// How it came out.
        result: Result<(), FlagsError>,
    },
    /// What should have been compared with could not be asked.
    Unavailable {
        /// What was asked.
        source: String,
        /// Why not.
        reason: NotAsked,
    },
}

/// Why a record cannot be had.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{text}")]
pub struct NotAsked {
    /// In words, with what to do.
    pub text: String,
    /// A start with this configuration would end the same way, as with a wrong token.
    pub certain: bool,
}

impl NotAsked {
    /// Asking again may help.
    pub fn for_now(error: impl ToString) -> Self {
        Self { text: error.to_string(), certain: false }
    }
}

impl From<JoinError> for NotAsked {
    fn from(error: JoinError) -> Self {
        Self { text: format!("{error}\n  fix: {}", error.remedy()), certain: !error.may_pass() }
    }
}

impl From<ObtainError> for NotAsked {
    fn from(error: ObtainError) -> Self {
        Self { text: format!("{error}\n  fix: {}", error.remedy()), certain: true }
    }
}

impl Verdict {
    /// Whether a start would succeed as far as can be told.
    pub const fn is_good(&self) -> bool {
        self.plan.is_ok() && self.flags.is_good()
    }

    /// Whether a start is certainly refused until the configuration changes.
    pub fn is_configuration(&self) -> bool {
        let differ = match &self.flags {
            Compared::With { result: Err(error), .. } => error.is_configuration(),
            Compared::Unavailable { reason, .. } => reason.certain,
            Compared::With { .. } | Compared::Nothing(_) => false,
        };
        self.plan.is_err() || differ
    }

    /// What is wrong with the plan.
    pub fn problems(&self) -> Option<&Problems> {
        self.plan.as_ref().err().map(PlanError::problems)
    }
}

impl Compared {
    const fn is_good(&self) -> bool {
        matches!(self, Self::Nothing(_) | Self::With { result: Ok(()), .. })
    }
}

/// A record as it is carried.
pub type Record = Result<Option<Bytes>, NotAsked>;

/// A place where one can be had.
pub type Source<'a> = &'a dyn Fn() -> Record;

/// Where records can be had.
pub struct Sources<'a> {
    /// `node.json` of this host.
    pub on_disk: Option<Identity>,
    /// Where other members answered clients when this server saw them last.
    pub others: Vec<String>,
    /// Reads the record from a datastore on which nobody runs, without writing to it. `None`: it holds none.
    pub disk: Source<'a>,
    /// Proves the token to the server that `server` names, and gets the record. `None`: that cluster has none yet.
    pub cluster: Source<'a>,
    /// `server` was named on the command line: its cluster is meant, whatever is on disk.
    pub named: bool,
}

/// See the module documentation.
pub fn check(config: &Config, sources: &Sources<'_>) -> Verdict {
    let plan = start_plan(sources.on_disk.as_ref(), config);
    let flags = compare(config, sources, plan.is_ok());
    Verdict { plan, flags }
}

fn compare(config: &Config, sources: &Sources<'_>, can_join: bool) -> Compared {
    let own = CriticalFlags::of(config);
    let server = config.text("server");
    let cluster = || outcome(&own, format!("the cluster of {server}"), (sources.cluster)());
    if !server.is_empty() && sources.named {
        return cluster();
    }
    if sources.on_disk.is_some() {
        return match running(config) {
            Some((source, record)) => outcome(&own, source, record),
            None => on_disk(config, &own, sources),
        };
    }
    match (server.is_empty(), can_join) {
        (false, true) => cluster(),
        (false, false) => Compared::Nothing("this start would be refused before that"),
        (true, _) => Compared::Nothing(
            "there is no datastore yet: a first start records these flags as the cluster's",
        ),
    }
}

/// The disk may be behind: what differs from it may be what the cluster has now.
fn on_disk(config: &Config, own: &CriticalFlags, sources: &Sources<'_>) -> Compared {
    let source = format!("the datastore in {}", config.db_dir.display());
    let local = outcome(own, source, (sources.disk)());
    if !matches!(&local, Compared::With { result: Err(_), .. }) || sources.others.is_empty() {
        return local;
    }
    let connection = Connection::of(config);
    match client::block_on(connection.ask_any_flags(&sources.others)) {
        Ok(Some(reply)) => {
            let source = format!("another server of the cluster ({})", reply.name);
            outcome(own, source, Ok(Some(reply.record)))
        }
        Ok(None) | Err(_) => local,
    }
}

fn outcome(own: &CriticalFlags, source: String, record: Record) -> Compared {
    match record {
        Err(reason) => Compared::Unavailable { source, reason },
        Ok(None) => Compared::Nothing("the cluster has not recorded its flags yet"),
        Ok(Some(record)) if record.is_empty() => {
            Compared::Nothing("the cluster has not recorded its flags yet")
        }
        Ok(Some(record)) => {
            Compared::With { source, result: gate::against(own, &record).map(|_matched| ()) }
        }
    }
}

/// What the server that runs here says. `None`: none runs, so the disk may be read.
fn running(config: &Config) -> Option<(String, Record)> {
    let connection = Connection::of(config);
    let asked = client::block_on(async {
        let channel = connection.open().await?;
        let mut client = AdminClient::new(channel);
        let reply = client.flags(FlagsRequest { local: true }).await?.into_inner();
        Ok::<_, AdminError>((reply.name, reply.record))
    });
    let source = "the server that runs here".to_owned();
    match asked {
        Ok(Ok((name, record))) => Some((format!("{source} ({name})"), Ok(Some(record)))),
        Ok(Err(AdminError::Connection(
            ConnectionError::Unreachable(_) | ConnectionError::Files(_),
        ))) => None,
        Ok(Err(error)) => Some((source, Err(NotAsked::for_now(error)))),
        Err(error) => Some((source, Err(NotAsked::for_now(error)))),
    }
}

/// Proves the token to the server that `server` names, and takes the record out of what it hands over. Nothing is kept.
pub fn ask_cluster(config: &Config, dial: Arc<dyn Dial>) -> Record {
    let (Start::Join(server), Some(source)) = (&config.start, &config.token) else {
        return Err(NotAsked {
            text: "server and token are both needed".to_owned(),
            certain: true,
        });
    };
    if let TokenSource::File(path) = source
        && !path.exists()
    {
        // A start waits for it; a check tells.
        return Err(NotAsked::for_now(format!("there is no token in {} yet", path.display())));
    }
    let (listens, local) =
        (config.peer_listen.addresses(&config.node_ips), config.node_ips.clone());
    let asked = client::block_on(async {
        let env = host::env();
        let token = obtain(&env, source).await?;
        let is_own = Box::new(move |address| is_own(address, &listens, &local));
        let enrolment = Enrolment { env, dial, server: server.clone(), token, is_own };
        let enrolled = enrolment.attempt().await?;
        Ok((!enrolled.flags.is_empty()).then_some(enrolled.flags))
    });
    asked.unwrap_or_else(|error| Err(NotAsked::for_now(error)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::config::{Host, Paths, Request, resolve};
    use crate::join::Phase;
    use crate::types::{ClusterId, NodeId};

    const DISK: Option<Identity> = Some(Identity {
        cluster: ClusterId::new(1),
        node: NodeId::new(2),
        epoch: 1,
        phase: Phase::Member,
    });

    /// Nothing listens on port 1 of loopback.
    const NOBODY: &str = "db-dir: /nowhere\ninsecure-http: true\nclient-listen: 127.0.0.1:1\n";

    fn config(text: &str) -> Config {
        let request = Request {
            command_line: Vec::new(),
            environment: BTreeMap::new(),
            host: Host { name: Some("pi-1".to_owned()), address: None, token_credential: None },
            paths: Paths::default(),
        };
        let bytes = format!("{NOBODY}{text}").into_bytes();
        let source = crate::config::Source { name: "config.yaml".to_owned(), bytes, mode: 0o600 };
        resolve(&[source], Problems::default(), &request).unwrap().config
    }

    fn record(text: &str) -> Bytes {
        CriticalFlags::of(&config(text)).found(UNIX_EPOCH, "pi-1").0.encode().into()
    }

    fn verdict(
        text: &str,
        on_disk: Option<Identity>,
        named: bool,
        local: &str,
        remote: &str,
    ) -> Verdict {
        let disk = || Ok(Some(record(local)));
        let cluster = || Ok(Some(record(remote)));
        let sources =
            Sources { on_disk, others: Vec::new(), disk: &disk, cluster: &cluster, named };
        check(&config(text), &sources)
    }

    fn source(verdict: &Verdict) -> &str {
        match &verdict.flags {
            Compared::Nothing(why) => why,
            Compared::With { source, .. } | Compared::Unavailable { source, .. } => source,
        }
    }

    const JOIN: &str = "server: https://pi-9:6443\ntoken: abcdefgh12345678\n";

    #[test]
    fn datastore_on_disk_is_what_counts_unless_a_server_is_named() {
        let own = verdict(JOIN, DISK, false, "", "disable: traefik\n");
        assert!(own.is_good() && source(&own) == "the datastore in /nowhere", "{own:?}");
        let named = verdict(JOIN, DISK, true, "", "disable: traefik\n");
        assert_eq!(source(&named), "the cluster of https://pi-9:6443");
        assert!(named.is_configuration() && !named.is_good());
    }

    #[test]
    fn without_a_datastore_the_cluster_to_join_is_asked() {
        let good = verdict(JOIN, None, false, "", "");
        assert!(good.is_good() && matches!(good.plan, Ok(Plan::Join(_))), "{good:?}");
        let differs = verdict(JOIN, None, false, "", "cluster-domain: k8s.local\n");
        assert!(differs.is_configuration());
    }

    #[test]
    fn a_founder_has_nothing_to_compare_with() {
        let founder = verdict("cluster-init: true\n", None, false, "", "");
        assert!(founder.is_good() && source(&founder).starts_with("there is no datastore yet"));
    }

    #[test]
    fn a_start_that_is_refused_anyway_asks_nobody() {
        let refused = verdict("server: https://pi-9:6443\n", None, false, "", "");
        assert!(refused.is_configuration() && refused.problems().is_some());
        assert!(matches!(refused.flags, Compared::Nothing(_)));
    }

    #[test]
    fn what_cannot_be_asked_is_neither_good_nor_the_configurations_fault() {
        let disk = || Err(NotAsked::for_now("permission denied"));
        let cluster = || panic!("nobody asked for that");
        let sources = Sources {
            on_disk: DISK,
            others: Vec::new(),
            disk: &disk,
            cluster: &cluster,
            named: false,
        };
        let verdict = check(&config(""), &sources);

        assert!(!verdict.is_good() && !verdict.is_configuration());
        assert!(matches!(verdict.flags, Compared::Unavailable { .. }));
    }
}

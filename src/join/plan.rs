//! Decides what a start does: found, join, go on, or nothing.
//!
//! | on disk | asked for | then |
//! |---|---|---|
//! | a datastore | anything but a reset | go on with it; what was asked for is ignored and said, as in K3s |
//! | a datastore | `cluster-reset` | reset |
//! | nothing | `server` and a token | join |
//! | nothing | `cluster-init`, or nothing | found |
//! | nothing | `server` without a token | refused: K3s begins a new, lone datastore here |
//! | nothing | `server` naming this server itself | refused |
//! | nothing | `server` and `cluster-init` | refused: a cluster founded by mistake is expensive |
//! | nothing | `datastore-endpoint` | refused: this daemon is the datastore |
//! | nothing | `cluster-reset` | refused, unless a backup is named |
//!
//! Pure: a configuration and what the disk says in, a plan or everything that is wrong out.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use super::{Identity, Phase};
use crate::config::{Config, DatastoreArgument, Problem, Problems, ServerUrl, Start};

/// What a start does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Make a new cluster of which this is the first server.
    Found,
    /// Become a member through this server.
    Join(ServerUrl),
    /// Go on with the datastore on disk.
    Continue {
        /// Arguments that only a first start heeds.
        ignored: Vec<DatastoreArgument>,
    },
    /// Become the only member.
    Reset {
        /// Replace the data by this backup first.
        restore: Option<PathBuf>,
    },
}

impl Plan {
    /// For the journal: that arguments are ignored, and why.
    pub fn note(&self) -> Option<String> {
        let Self::Continue { ignored } = self else { return None };
        let (first, rest) = ignored.split_first()?;
        let mut names = first.to_string();
        for argument in rest {
            names.push_str(&format!(", {argument}"));
        }
        let verb = if rest.is_empty() { "is" } else { "are" };
        Some(format!("there is a datastore already, so {names} {verb} ignored, as in K3s"))
    }
}

/// Why nothing is started. Waiting or trying again changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError(Problems);

impl PlanError {
    /// Everything that is wrong, with places.
    pub const fn problems(&self) -> &Problems {
        &self.0
    }
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for PlanError {}

/// See the module documentation.
pub fn start_plan(on_disk: Option<&Identity>, config: &Config) -> Result<Plan, PlanError> {
    let start = config.start.clone();
    if let Some(on_disk) = on_disk {
        return Ok(match start {
            Start::Reset { restore } => Plan::Reset { restore },
            Start::Standalone | Start::Found | Start::Join(_) => {
                Plan::Continue { ignored: ignored(on_disk.phase, config) }
            }
        });
    }
    let mut problems = Problems::default();
    for argument in &config.datastore_arguments {
        if argument.name == "datastore-endpoint" {
            problems.push(external(argument));
        }
    }
    match &start {
        Start::Join(url) => refuse_join(url, config, &mut problems),
        Start::Reset { restore: None } => problems.push(nothing_to_reset(config)),
        Start::Standalone | Start::Found | Start::Reset { restore: Some(_) } => {}
    }
    if !problems.is_empty() {
        return Err(PlanError(problems.sorted()));
    }
    Ok(match start {
        Start::Join(url) => Plan::Join(url),
        Start::Reset { restore } => Plan::Reset { restore },
        Start::Standalone | Start::Found => Plan::Found,
    })
}

/// What is still under way is not ignored: a join through `server`, a founding by `cluster-init`.
fn ignored(phase: Phase, config: &Config) -> Vec<DatastoreArgument> {
    let founds = phase == Phase::Founding;
    let joins = phase.joins();
    let mut ignored = Vec::new();
    for (name, set, under_way) in [
        ("cluster-init", config.boolean("cluster-init"), founds),
        ("server", !config.text("server").is_empty(), joins),
    ] {
        if set && !under_way {
            ignored.push(DatastoreArgument { name, origin: config.origin(name) });
        }
    }
    ignored.extend_from_slice(&config.datastore_arguments);
    ignored
}

fn external(argument: &DatastoreArgument) -> Problem {
    Problem::error(
        argument.origin.clone(),
        "datastore-endpoint names another datastore, but k3s-server is the datastore",
    )
    .fix("remove `datastore-endpoint`; the README tells how to move the data")
}

fn nothing_to_reset(config: &Config) -> Problem {
    Problem::error(
        config.origin("cluster-reset"),
        "cluster-reset needs a datastore, and there is none",
    )
    .found(format!("no node.json in {}", config.db_dir.display()))
    .fix("name a backup with `cluster-reset-restore-path`, or correct `db-dir`")
}

fn refuse_join(url: &ServerUrl, config: &Config, problems: &mut Problems) {
    let origin = config.origin("server");
    if config.token.is_none() {
        problems.push(
            Problem::error(origin.clone(), "server needs token or token-file to join")
                .expected("the token of the cluster, as in `k3s-server token --show` on one of its servers")
                .fix("add `token:` or `token-file:`; to begin a new cluster instead, remove `server`"),
        );
    }
    if config.boolean("cluster-init") {
        problems.push(
            Problem::error(
                config.origin("cluster-init"),
                "server and cluster-init contradict each other: one joins a cluster, the other founds one",
            )
            .fix("remove `cluster-init` to join, or `server` on the server that founds the cluster"),
        );
    }
    if let Some(own) = own_address(url, config) {
        problems.push(
            Problem::error(origin, "server names this server itself")
                .found(format!("{own}, which is this server"))
                .expected("another server of the cluster")
                .fix("name another server; on the first one, write `cluster-init: true` instead of `server`"),
        );
    }
}

/// The URL in words, if it leads back to this server. A name shared by all servers may lead anywhere and is none of ours.
fn own_address(url: &ServerUrl, config: &Config) -> Option<String> {
    let port = url.join_port();
    let listening = config.peer_listen.addresses(&config.node_ips);
    let here = |ip: IpAddr| {
        let own = config.node_ips.contains(&ip) || config.node_external_ips.contains(&ip);
        listening.iter().any(|at| {
            let any = at.ip().is_unspecified() && (own || ip.is_loopback());
            at.port() == port && (at.ip() == ip || own || any)
        })
    };
    let own = match url.address() {
        Some(ip) => here(ip),
        None if url.host() == "localhost" => here(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        None => url.host() == config.node_name && listening.iter().any(|at| at.port() == port),
    };
    own.then(|| match url.address() {
        Some(ip) => SocketAddr::new(ip, port).to_string(),
        None => format!("{}:{port}", url.host()),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use expect_test::{Expect, expect};

    use super::*;
    use crate::config::{Host, Paths, Request, Source, resolve};
    use crate::types::{ClusterId, NodeId};

    const DISK: Option<Identity> = Some(Identity {
        cluster: ClusterId::new(0xc1),
        node: NodeId::new(0xab),
        epoch: 3,
        phase: Phase::Member,
    });

    fn config(text: &str) -> Config {
        let request = Request {
            command_line: Vec::new(),
            environment: BTreeMap::new(),
            host: Host {
                name: Some("pi-2".to_owned()),
                address: "10.0.0.2".parse().ok(),
                token_credential: None,
            },
            paths: Paths::default(),
        };
        let bytes = text.as_bytes().to_vec();
        let source = Source { name: "config.yaml".to_owned(), bytes, mode: 0o600 };
        let loaded = resolve(&[source], Problems::default(), &request);
        loaded.unwrap_or_else(|problems| panic!("{text}\n{problems}")).config
    }

    fn plan(on_disk: Option<Identity>, text: &str) -> Result<Plan, String> {
        start_plan(on_disk.as_ref(), &config(text)).map_err(|error| error.to_string())
    }

    fn refused(text: &str, expected: Expect) {
        expected.assert_eq(&plan(None, text).unwrap_err());
    }

    #[test]
    fn an_empty_disk_is_founded_on_or_joins() {
        assert_eq!(plan(None, ""), Ok(Plan::Found));
        assert_eq!(plan(None, "cluster-init: true\ntoken: abcdefgh12345678\n"), Ok(Plan::Found));
        let url = ServerUrl::parse("https://pi-1:6443").unwrap();
        let joined = plan(None, "server: https://pi-1:6443\ntoken: abcdefgh12345678\n");
        assert_eq!(joined, Ok(Plan::Join(url.clone())));
        let joined = plan(None, "server: https://pi-1:6443\ntoken-file: /run/token\n");
        assert_eq!(joined, Ok(Plan::Join(url)));
    }

    #[test]
    fn a_datastore_on_disk_wins_over_every_argument_and_says_so() {
        assert_eq!(plan(DISK, ""), Ok(Plan::Continue { ignored: Vec::new() }));
        let text = "cluster-init: true\nserver: https://10.0.0.2:6443\n\
            datastore-endpoint: mysql://db\ndatastore-cafile: /ca\n";
        let plan = plan(DISK, text).unwrap();
        expect![
            "there is a datastore already, so cluster-init (config.yaml:1:15), server (config.yaml:2:9), datastore-endpoint (config.yaml:3:21), datastore-cafile (config.yaml:4:19) are ignored, as in K3s"
        ]
        .assert_eq(&plan.note().unwrap());
    }

    #[test]
    fn the_usual_config_of_a_founder_is_one_note_at_its_second_start() {
        let plan = plan(DISK, "cluster-init: true\ncluster-reset: false\n").unwrap();
        expect![
            "there is a datastore already, so cluster-init (config.yaml:1:15) is ignored, as in K3s"
        ]
        .assert_eq(&plan.note().unwrap());
    }

    #[test]
    fn what_a_first_start_was_asked_counts_until_it_is_finished() {
        let phase = |phase| DISK.map(|disk| Identity { phase, ..disk });
        let join = "server: https://pi-1:6443\ntoken: abcdefgh12345678\n";
        let found = "cluster-init: true\n";
        let replaces = NodeId::new(7);

        for (phase, text, silent) in [
            (phase(Phase::Joining { replaces: None }), join, true),
            (phase(Phase::SettingAside { replaces }), join, true),
            (phase(Phase::Member), join, false),
            (phase(Phase::Founding), join, false),
            (phase(Phase::Founding), found, true),
            (phase(Phase::Joining { replaces: None }), found, false),
            (phase(Phase::Member), found, false),
        ] {
            let plan = plan(phase, text).unwrap();
            assert_eq!(plan.note().is_none(), silent, "{phase:?} {text}");
        }
    }

    #[test]
    fn reset_needs_a_datastore_or_a_backup() {
        assert_eq!(plan(DISK, "cluster-reset: true\n"), Ok(Plan::Reset { restore: None }));
        let restore = Some(PathBuf::from("/b"));
        let text = "cluster-reset: true\ncluster-reset-restore-path: /b\n";
        assert_eq!(plan(None, text), Ok(Plan::Reset { restore }));
        refused(
            "cluster-reset: true\ndb-dir: /d\n",
            expect![[r#"
                config.yaml:1:16: cluster-reset needs a datastore, and there is none: found no node.json in /d
                  fix: name a backup with `cluster-reset-restore-path`, or correct `db-dir`"#]],
        );
    }

    #[test]
    fn server_without_a_token_does_not_become_a_new_lone_datastore() {
        refused(
            "server: https://pi-1:6443\n",
            expect![[r#"
                config.yaml:1:9: server needs token or token-file to join: expected the token of the cluster, as in `k3s-server token --show` on one of its servers
                  fix: add `token:` or `token-file:`; to begin a new cluster instead, remove `server`"#]],
        );
    }

    #[test]
    fn founding_and_joining_at_once_is_refused() {
        refused(
            "cluster-init: true\nserver: https://pi-1:6443\ntoken: abcdefgh12345678\n",
            expect![[r#"
                config.yaml:1:15: server and cluster-init contradict each other: one joins a cluster, the other founds one
                  fix: remove `cluster-init` to join, or `server` on the server that founds the cluster"#]],
        );
    }

    #[test]
    fn another_datastore_is_refused() {
        refused(
            "datastore-endpoint: mysql://user:password@db\n",
            expect![[r#"
                config.yaml:1:21: datastore-endpoint names another datastore, but k3s-server is the datastore
                  fix: remove `datastore-endpoint`; the README tells how to move the data"#]],
        );
        assert_eq!(plan(None, "datastore-endpoint: https://127.0.0.1:2379\n"), Ok(Plan::Found));
    }

    #[test]
    fn ones_own_address_is_recognised_in_every_form() {
        refused(
            "server: https://10.0.0.2:6443\ntoken: abcdefgh12345678\n",
            expect![[r#"
                config.yaml:1:9: server names this server itself: found 10.0.0.2:2380, which is this server, expected another server of the cluster
                  fix: name another server; on the first one, write `cluster-init: true` instead of `server`"#]],
        );
        for (server, more, own) in [
            ("https://127.0.0.1:6443", "", true),
            ("https://localhost", "", true),
            ("https://PI-2:6443", "", true),
            ("https://192.0.2.7:6443", "node-external-ip: 192.0.2.7\n", true),
            ("https://10.0.0.2:7000", "peer-listen: 0.0.0.0:7000\n", true),
            ("https://[fd00::2]:6443", "node-ip: fd00::2\n", true),
            ("https://10.0.0.1:6443", "", false),
            ("https://10.0.0.2:7000", "", false),
            ("https://127.0.0.1:7000", "peer-listen: 127.0.0.1:7001\n", false),
            ("https://127.0.0.1:7000", "peer-listen: 127.0.0.2:7000\n", false),
            ("https://pi-1:6443", "", false),
            ("https://servers.example:6443", "tls-san: servers.example\n", false),
        ] {
            let text = format!("server: {server}\ntoken: abcdefgh12345678\n{more}");
            assert_eq!(plan(None, &text).is_err(), own, "{text}");
        }
    }

    #[test]
    fn everything_wrong_comes_at_once() {
        let text =
            "cluster-init: true\nserver: https://10.0.0.2:6443\ndatastore-endpoint: nats://x\n";
        let lines = plan(None, text).unwrap_err();

        assert_eq!(lines.matches("fix:").count(), 4, "{lines}");
    }
}

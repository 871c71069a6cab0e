//! Checks merged settings and turns them into [`Values`]: first each value alone, then values against others.
//!
//! # Invariants
//!
//! - All problems are reported, not only the first; a rule that needs a value which is itself wrong is silent.
//! - `Values` exist only for settings without an error.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::cidr::{Cidr, Family};
use super::key::{Key, Role};
use super::keys::{KEYS, find};
use super::kinds::{self, Wrong};
use super::layer::Item;
use super::merge::Settings;
use super::origin::Origin;
use super::problem::{Problem, Problems};
use super::secret::Secret;
use super::url::ServerUrl;
use super::values::{
    DatastoreArgument, Listen, Network, Passthrough, Start, StorageMedium, TokenSource, Values,
};
use super::{Host, etcd_args};

/// Longest linger: lease clients give up after 5 to 10 s.
const LINGER_MAX: Duration = Duration::from_secs(1);

/// Checks everything. `None` exactly if there is an error among the problems.
pub fn validate(settings: &Settings, host: &Host) -> (Option<Values>, Problems) {
    let mut check = Check { settings, problems: Problems::default(), wrong: BTreeSet::new() };
    check.each_alone();
    let network = check.network(host);
    let start = check.start();
    let token = check.token(host);
    let datastore_arguments = check.datastore();
    let etcd = etcd_args::read(settings.items("etcd-arg"), &mut check.problems);
    let insecure_http = check.boolean("insecure-http");
    let values = Values {
        db_dir: check.directory("db-dir"),
        data_dir: check.directory("data-dir"),
        node_name: check.node_name(host),
        node_ips: check.node_ips(host),
        node_external_ips: check.addresses("node-external-ip"),
        tls_sans: settings.items("tls-san").iter().map(|item| item.text.clone()).collect(),
        start,
        datastore_arguments,
        token,
        client_listen: check.client_listen(insecure_http),
        peer_listen: check.listen("peer-listen", 2380, true),
        metrics_listen: check.listen("metrics-listen", 2381, check.boolean("etcd-expose-metrics")),
        insecure_http,
        etcd,
        wal_linger: check.linger(),
        storage_medium: match check.text("storage-medium") {
            "sd" => StorageMedium::Sd,
            "ssd" => StorageMedium::Ssd,
            _ => StorageMedium::Auto,
        },
        network,
        debug: check.boolean("debug"),
        passthrough: passthrough(settings),
    };
    let ok = !check.problems.has_errors();
    (ok.then_some(values), check.problems)
}

fn passthrough(settings: &Settings) -> Passthrough {
    let theirs = |role| matches!(role, Role::Both | Role::Upstream);
    let texts = |items: &[Item]| items.iter().map(|item| item.text.clone()).collect();
    Passthrough(
        settings
            .set()
            .filter(|(key, _)| theirs(key.role))
            .map(|(key, items)| (key, texts(items)))
            .collect(),
    )
}

struct Check<'a> {
    settings: &'a Settings,
    problems: Problems,
    /// Keys with an error of their own.
    wrong: BTreeSet<&'static str>,
}

impl Check<'_> {
    /// Every value against the kind of its key.
    fn each_alone(&mut self) {
        for (key, items) in self.settings.set() {
            for item in items {
                let result = if item.text.is_empty() {
                    empty(key)
                } else {
                    kinds::check(key.kind, &item.text)
                };
                if let Err(wrong) = result {
                    self.wrong.insert(key.name);
                    self.problems.push(problem(key, item, wrong));
                }
                if key.is_secret() && item.origin == Origin::CommandLine && !item.text.is_empty() {
                    self.problems.push(
                        Problem::warning(
                            Origin::CommandLine,
                            format!("{} is readable by every user of this host (ps)", key.name),
                        )
                        .fix(advice_for_secret(key)),
                    );
                }
            }
        }
    }

    fn error(&mut self, key: &str, what: impl Into<String>) -> &mut Self {
        self.problems.push(Problem::error(self.settings.origin(key), what));
        self
    }

    /// The text of a key that has a default.
    fn text(&self, name: &'static str) -> &str {
        self.settings
            .one(name)
            .filter(|_| !self.wrong.contains(name))
            .map_or_else(|| find(name).map_or("", |key| key.default), |item| &item.text)
    }

    fn boolean(&self, name: &'static str) -> bool {
        kinds::boolean(self.text(name)).unwrap_or(false)
    }

    fn addresses(&self, name: &'static str) -> Vec<IpAddr> {
        self.settings
            .items(name)
            .iter()
            .filter_map(|item| kinds::address(&item.text).ok())
            .collect()
    }

    /// Configured, else detected.
    fn node_ips(&self, host: &Host) -> Vec<IpAddr> {
        let configured = self.addresses("node-ip");
        if configured.is_empty() { host.address.into_iter().collect() } else { configured }
    }

    /// A directory; relative ones would depend on where the daemon was started.
    fn directory(&mut self, name: &'static str) -> PathBuf {
        let path = PathBuf::from(self.text(name));
        if !path.is_absolute() {
            let shown = path.display().to_string();
            if self.settings.origin(name) == Origin::CommandLine {
                // Typed by somebody who sees the working directory it is relative to.
                return path;
            }
            self.problems.push(
                Problem::error(
                    self.settings.origin(name),
                    format!("{name} is not an absolute path"),
                )
                .found(shown)
                .expected("a path that begins with /"),
            );
        }
        path
    }

    /// As K3s: the configured name or the host's, lower case.
    fn node_name(&mut self, host: &Host) -> String {
        let configured = self.settings.one("node-name").map(|item| item.text.to_lowercase());
        let Some(name) = configured.or_else(|| host.name.as_ref().map(|name| name.to_lowercase()))
        else {
            return "localhost".to_owned();
        };
        if kinds::check(super::key::Kind::Domain, &name).is_err() {
            self.problems.push(
                Problem::error(
                    self.settings.origin("node-name"),
                    "node-name is not usable in Kubernetes",
                )
                .found(name.clone())
                .expected("letters, digits, `-` and `.`")
                .fix("set `node-name`"),
            );
        }
        name
    }

    fn linger(&mut self) -> Option<Duration> {
        let linger = kinds::duration(self.text("wal-linger")).ok()?;
        if LINGER_MAX < linger {
            self.problems.push(
                Problem::error(self.settings.origin("wal-linger"), "wal-linger is too long")
                    .found(self.text("wal-linger").to_owned())
                    .expected("at most 1s, because lease holders give up after a few seconds")
                    .fix("write `wal-linger: 1s` or less"),
            );
        }
        Some(linger)
    }

    fn listen(&self, name: &'static str, port: u16, node_addresses: bool) -> Listen {
        let given: Vec<_> = self
            .settings
            .items(name)
            .iter()
            .filter_map(|item| kinds::socket_address(&item.text).ok())
            .collect();
        if given.is_empty() { Listen::Port { port, node_addresses } } else { Listen::At(given) }
    }

    fn client_listen(&mut self, insecure_http: bool) -> Listen {
        let listen = self.listen("client-listen", 2379, !insecure_http);
        if insecure_http && let Listen::At(addresses) = &listen {
            for address in addresses.iter().filter(|address| !address.ip().is_loopback()) {
                self.problems.push(
                    Problem::error(
                        self.settings.origin("client-listen"),
                        "client-listen is not loopback, and insecure-http is on",
                    )
                    .found(address.to_string())
                    .expected("127.0.0.1:PORT or [::1]:PORT")
                    .fix("turn `insecure-http` off"),
                );
            }
        }
        listen
    }

    /// Which of the ways to begin was asked for. What contradicts it may be ignored: that depends on the disk.
    fn start(&mut self) -> Start {
        let init = self.boolean("cluster-init");
        let reset = self.boolean("cluster-reset");
        let server = self.settings.one("server").and_then(|item| {
            ServerUrl::parse(&item.text).ok().map(|url| (url, item.origin.clone()))
        });
        let restore =
            self.settings.one("cluster-reset-restore-path").map(|item| PathBuf::from(&item.text));
        if restore.is_some() && !reset {
            self.error(
                "cluster-reset-restore-path",
                "cluster-reset-restore-path needs cluster-reset",
            );
        }
        match (server, reset, init) {
            (Some((_, origin)), true, _) => {
                self.problems.push(
                    Problem::error(origin, "server and cluster-reset contradict each other: a reset keeps this server only")
                        .fix("remove `server` while resetting"),
                );
                Start::Standalone
            }
            (Some((url, _)), false, _) => Start::Join(url),
            (None, true, _) => Start::Reset { restore },
            (None, false, true) => Start::Found,
            (None, false, false) => Start::Standalone,
        }
    }

    /// `token-file` wins over `token`, and both over a credential of the unit.
    fn token(&mut self, host: &Host) -> Option<TokenSource> {
        let inline = self.settings.one("token");
        let file = self.settings.one("token-file");
        if inline.is_some()
            && let Some(file) = file
        {
            self.problems.push(
                Problem::warning(file.origin.clone(), "token-file wins over token, as in K3s")
                    .fix("remove `token`"),
            );
        }
        match (file, inline) {
            (Some(file), _) => Some(TokenSource::File(PathBuf::from(&file.text))),
            (None, Some(item)) => Some(TokenSource::Inline(Secret::new(item.text.clone()))),
            (None, None) => host.token_credential.clone().map(TokenSource::Credential),
        }
    }

    /// This daemon is the datastore, so another one is a contradiction, except its own address, and except where it was
    /// only meant for a first start that lies behind.
    fn datastore(&mut self) -> Vec<DatastoreArgument> {
        let mut arguments = Vec::new();
        if let Some(item) = self.settings.one("datastore-endpoint") {
            let own = |endpoint: &str| {
                ["https://127.0.0.1:2379", "https://localhost:2379", "https://[::1]:2379"]
                    .contains(&endpoint)
            };
            let origin = item.origin.clone();
            if item.text.split(',').all(|endpoint| own(endpoint.trim())) {
                self.problems.push(Problem::note(
                    origin,
                    "datastore-endpoint names this daemon itself and is ignored here",
                ));
            } else {
                arguments.push(DatastoreArgument { name: "datastore-endpoint", origin });
            }
        }
        for name in ["datastore-cafile", "datastore-certfile", "datastore-keyfile", "kine-tls"] {
            if let Some(item) = self.settings.one(name).filter(|item| item.text != "false") {
                let text = format!("{name} is ignored: k3s-server is the datastore");
                self.problems.push(Problem::warning(item.origin.clone(), text));
                arguments.push(DatastoreArgument { name, origin: item.origin.clone() });
            }
        }
        self.contradictions();
        arguments
    }

    /// Switches that leave nothing to do, or much to fear.
    fn contradictions(&mut self) {
        if self.boolean("disable-etcd") {
            self.problems.push(
                Problem::error(self.settings.origin("disable-etcd"), "disable-etcd leaves k3s-server nothing to do")
                    .fix("run upstream k3s alone on this server, with `datastore-endpoint` naming the others"),
            );
        }
        if self.boolean("insecure-http") {
            let text = "insecure-http serves the datastore to every user of this host without a certificate";
            self.problems.push(Problem::warning(self.settings.origin("insecure-http"), text));
        }
    }

    /// Networks with their defaults, and the rules between them.
    fn network(&mut self, host: &Host) -> Network {
        let first = self.node_ips(host).first().copied();
        let six = self.addresses("node-ip").first().is_some_and(IpAddr::is_ipv6);
        self.networks_of_ipv6_host(host);
        let (cluster_default, service_default) =
            if six { ("fd00:42::/56", "fd00:43::/112") } else { ("10.42.0.0/16", "10.43.0.0/16") };
        let cluster_cidrs = self.cidrs("cluster-cidr", cluster_default);
        let service_cidrs = self.cidrs("service-cidr", service_default);
        self.families_once("cluster-cidr", &cluster_cidrs);
        self.families_once("service-cidr", &service_cidrs);
        let networks_right =
            !self.wrong.contains("cluster-cidr") && !self.wrong.contains("service-cidr");
        if networks_right {
            self.same_families(&cluster_cidrs, &service_cidrs);
            self.no_overlap(&cluster_cidrs, &service_cidrs);
            self.node_family(first, &cluster_cidrs);
        }
        let cluster_dns = self.cluster_dns(&service_cidrs, networks_right);
        Network { cluster_cidrs, service_cidrs, cluster_dns }
    }

    /// K3s would choose IPv6 networks on such a host. Here only what is written decides: the cluster's networks may not depend on
    /// which of the host's addresses came up first at this boot.
    fn networks_of_ipv6_host(&mut self, host: &Host) {
        let said = ["node-ip", "cluster-cidr", "service-cidr"];
        let silent = said.iter().all(|name| self.settings.items(name).is_empty());
        if let Some(IpAddr::V6(address)) = host.address
            && silent
        {
            self.problems.push(
                Problem::warning(
                    Origin::Default,
                    "cluster-cidr and service-cidr are IPv4 by default, and this host has only an IPv6 address now",
                )
                .found(address.to_string())
                .fix(format!("if that is meant to be, write `node-ip: \"{address}\"`; the networks follow it")),
            );
        }
    }

    fn cidrs(&self, name: &'static str, default: &str) -> Vec<Cidr> {
        let given: Vec<Cidr> = self
            .settings
            .items(name)
            .iter()
            .filter_map(|item| Cidr::parse(&item.text).ok())
            .collect();
        if given.is_empty() { Cidr::parse(default).into_iter().collect() } else { given }
    }

    fn families_once(&mut self, name: &'static str, networks: &[Cidr]) {
        for (index, network) in networks.iter().enumerate() {
            let earlier = networks[..index].iter().find(|other| other.family() == network.family());
            if let Some(earlier) = earlier {
                self.wrong.insert(name);
                self.problems.push(
                    Problem::error(
                        self.settings.origin(name),
                        format!("{name} has two {} networks", network.family()),
                    )
                    .found(format!("{earlier} and {network}"))
                    .fix(format!("remove one of them from `{name}`"))
                    .expected("at most one of each IP family"),
                );
            }
        }
    }

    fn same_families(&mut self, cluster: &[Cidr], service: &[Cidr]) {
        let families =
            |networks: &[Cidr]| networks.iter().map(|n| n.family()).collect::<Vec<Family>>();
        let (pods, services) = (families(cluster), families(service));
        if pods == services {
            return;
        }
        let name = |families: &[Family]| {
            families.iter().map(ToString::to_string).collect::<Vec<_>>().join(" then ")
        };
        let culprit = if self.settings.items("service-cidr").is_empty() {
            "cluster-cidr"
        } else {
            "service-cidr"
        };
        let what = if pods.len() == services.len()
            && pods.iter().all(|family| services.contains(family))
        {
            "service-cidr and cluster-cidr name the IP families in different order"
        } else {
            "service-cidr and cluster-cidr are of different IP families"
        };
        self.problems.push(
            Problem::error(self.settings.origin(culprit), what)
                .found(format!("{} for services", name(&services)))
                .expected(format!("{}, as cluster-cidr", name(&pods)))
                .fix("write both lists with the same families in the same order"),
        );
    }

    fn no_overlap(&mut self, cluster: &[Cidr], service: &[Cidr]) {
        for pods in cluster {
            for services in service.iter().filter(|services| services.overlaps(*pods)) {
                let culprit = if self.settings.items("service-cidr").is_empty() {
                    "cluster-cidr"
                } else {
                    "service-cidr"
                };
                self.problems.push(
                    Problem::error(
                        self.settings.origin(culprit),
                        "service-cidr and cluster-cidr overlap",
                    )
                    .found(format!("{services} and {pods}"))
                    .expected("networks without a common address")
                    .fix("choose another network for one of them"),
                );
            }
        }
    }

    fn node_family(&mut self, first: Option<IpAddr>, cluster: &[Cidr]) {
        if self.settings.items("node-ip").is_empty() {
            return;
        }
        if let (Some(address), Some(network)) = (first, cluster.first())
            && Family::of(address) != network.family()
        {
            self.problems.push(
                Problem::error(
                    self.settings.origin("cluster-cidr"),
                    "cluster-cidr begins with another IP family than node-ip",
                )
                .found(format!("{network} for pods and {address} for the node"))
                .expected(format!("an {} network first", Family::of(address)))
                .fix("change the order of `cluster-cidr` and `service-cidr`, or of `node-ip`"),
            );
        }
    }

    fn dns_families_once(&mut self, given: &[IpAddr]) {
        for (index, address) in given.iter().enumerate() {
            let family = Family::of(*address);
            if let Some(earlier) = given[..index].iter().find(|other| Family::of(**other) == family)
            {
                self.problems.push(
                    Problem::error(
                        self.settings.origin("cluster-dns"),
                        format!("cluster-dns has two {family} addresses"),
                    )
                    .found(format!("{earlier} and {address}"))
                    .fix("remove one of them from `cluster-dns`")
                    .expected("at most one of each IP family"),
                );
            }
        }
    }

    /// Inside a service network, and not its first address, which the API server takes.
    fn cluster_dns(&mut self, services: &[Cidr], networks_right: bool) -> Vec<IpAddr> {
        let given = self.addresses("cluster-dns");
        if given.is_empty() {
            return services.iter().filter_map(|network| network.nth(10)).collect();
        }
        self.dns_families_once(&given);
        if networks_right {
            for item in self.settings.items("cluster-dns") {
                let Ok(address) = kinds::address(&item.text) else { continue };
                let home = services.iter().find(|network| network.contains(address));
                let problem = Problem::error(item.origin.clone(), "cluster-dns is not usable")
                    .found(&item.text);
                let networks: Vec<String> = services.iter().map(ToString::to_string).collect();
                match home {
                    None => self.problems.push(
                        problem
                            .expected(format!(
                                "an address inside service-cidr ({})",
                                networks.join(", ")
                            ))
                            .fix("remove `cluster-dns` to get the tenth address"),
                    ),
                    Some(network)
                        if network.nth(1) == Some(address) || network.address() == address =>
                    {
                        self.problems.push(
                            problem.expected("another address: the API server takes this one"),
                        )
                    }
                    Some(_) => {}
                }
            }
        }
        given
    }
}

/// An empty value means "not set" where there is nothing to fall back to.
fn empty(key: &Key) -> Result<(), Wrong> {
    if key.default.is_empty() {
        return Ok(());
    }
    Err(Wrong::new("is empty", "a value").advice("remove the line to get the default"))
}

fn problem(key: &Key, item: &Item, wrong: Wrong) -> Problem {
    let mut problem = Problem::error(item.origin.clone(), format!("{} {}", key.name, wrong.what));
    if !key.is_secret() && !item.text.is_empty() {
        problem = problem.found(&item.text);
    }
    problem = problem.expected(wrong.expected);
    match (wrong.value, wrong.advice) {
        (Some(value), _) => problem.fix(written(key, item, &value)),
        (None, Some(advice)) => problem.fix(advice),
        (None, None) => problem,
    }
}

/// How to write the right value in the place of the wrong one.
fn written(key: &Key, item: &Item, value: &str) -> String {
    match &item.origin {
        Origin::File(_) if key.is_list() => format!("write `{value}` in `{}`", key.name),
        Origin::File(_) | Origin::Default => format!("write `{}: {value}`", key.name),
        Origin::CommandLine => format!("write --{}={value}", key.name),
        Origin::Environment(name) => format!("write {name}={value}"),
    }
}

fn advice_for_secret(key: &Key) -> String {
    let file_key = format!("{}-file", key.name);
    let file = KEYS.iter().find(|other| other.name == file_key);
    match (file, key.environment.first()) {
        (Some(file), _) => format!("put it into a file with mode 0600 and use --{}", file.name),
        (None, Some(variable)) => format!("use the configuration file or {variable}"),
        (None, None) => "use the configuration file".to_owned(),
    }
}

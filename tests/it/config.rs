//! Configuration from files to checked values, as a user meets it.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use expect_test::{ExpectFile, expect, expect_file};
use k3s_server::config::keys::{self, KEYS};
use k3s_server::config::{
    self, Config, Given, Group, Host, Listen, Loaded, Origin, Paths, Problems, Repeat, Request,
    Role, Source, Start, TokenSource, Values,
};
use k3s_server::join::start_plan;
use tempfile::TempDir;

/// A directory of configuration files and everything else a load depends on.
struct Place {
    directory: TempDir,
    request: Request,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let request = Request {
            command_line: Vec::new(),
            environment: BTreeMap::new(),
            host: Host { name: Some("Pi-1".to_owned()), address: None, token_credential: None },
            paths: Paths {
                default_file: directory.path().join("config.yaml"),
                upstream_file: directory.path().join("upstream.yaml"),
            },
        };
        Self { directory, request }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(self, name: &str, text: &str) -> Self {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        self
    }

    fn argument(mut self, key: &str, text: &str) -> Self {
        self.request.command_line.push(Given::new(keys::find(key).unwrap(), text));
        self
    }

    fn variable(mut self, name: &str, text: &str) -> Self {
        self.request.environment.insert(name.to_owned(), text.to_owned());
        self
    }

    fn load(&self) -> Result<Loaded, Problems> {
        config::load(&self.request)
    }

    fn config(&self) -> Config {
        self.load().unwrap_or_else(|problems| panic!("{problems}")).config
    }

    /// Messages with the directory's name cut.
    fn said(&self) -> String {
        let problems = match self.load() {
            Ok(loaded) => loaded.problems,
            Err(problems) => problems,
        };
        problems.to_string().replace(&format!("{}/", self.directory.path().display()), "")
    }
}

fn of_text(text: &str) -> Result<Loaded, Problems> {
    let source =
        Source { name: "config.yaml".to_owned(), bytes: text.as_bytes().to_vec(), mode: 0o600 };
    config::resolve(&[source], Problems::default(), &Place::new().request)
}

fn said_of(text: &str) -> String {
    match of_text(text) {
        Ok(loaded) => loaded.problems.to_string(),
        Err(problems) => problems.to_string(),
    }
}

#[test]
fn main_file_then_dropins_in_byte_order_then_arguments() {
    let place = Place::new()
        .write("config.yaml", "tls-san: [a]\nnode-name: main\ndisable: traefik\n")
        .write("config.yaml.d/10-b.yaml", "tls-san+: [c]\nnode-name: ten\n")
        .write("config.yaml.d/2-a.YML", "tls-san+: d\nnode-name: two\n")
        .write("config.yaml.d/B.yaml", "tls-san+: e\n")
        .write("config.yaml.d/a.yaml", "tls-san+: f\ndisable: servicelb\n")
        .write("config.yaml.d/ignored.txt", "tls-san: z\n")
        .write("config.yaml.d/sub.yaml/x", "tls-san: z\n")
        .argument("tls-san", "g");
    let config = place.config();

    assert_eq!(config.tls_sans, ["a", "c", "d", "e", "f", "g"]);
    assert_eq!(config.node_name, "two");
    assert_eq!(config.texts("disable"), ["servicelb"]);
    assert_eq!(config.files().len(), 5);
}

#[test]
fn dropins_alone_are_enough() {
    let place = Place::new().write("config.yaml.d/x.yaml", "node-name: alone\n");

    assert_eq!(place.config().node_name, "alone");
    assert_eq!(place.said(), "");
}

#[test]
fn variable_wins_over_argument_in_naming_the_file() {
    let place = Place::new().write("a.yaml", "node-name: a\n").write("b.yaml", "node-name: b\n");
    let (a, b) = (place.path("a.yaml"), place.path("b.yaml"));
    let place = place
        .variable("K3S_CONFIG_FILE", a.to_str().unwrap())
        .argument("config", b.to_str().unwrap());

    assert_eq!(place.config().node_name, "a");
    expect![[r#"
        command line: warning: config is overruled by K3S_CONFIG_FILE, as in K3s: found b.yaml, expected a.yaml
          fix: unset K3S_CONFIG_FILE or leave --config out"#]]
    .assert_eq(&place.said());
}

#[test]
fn empty_config_argument_reads_no_file() {
    let place = Place::new().write("config.yaml", "node-name: main\n").argument("config", "");

    assert_eq!(place.config().node_name, "pi-1");
    assert!(place.config().files().is_empty());
}

#[test]
fn named_file_must_exist_and_default_file_need_not() {
    assert!(Place::new().said().ends_with("no configuration file config.yaml: defaults apply"));
    expect![[r#"
        warning: upstream.yaml is not read: it belongs to upstream k3s: found no config.yaml
          fix: copy the settings that shall apply here: cp upstream.yaml config.yaml"#]]
    .assert_eq(&Place::new().write("upstream.yaml", "").said());
    expect![[r#"
        command line: the configuration file does not exist: found /nonexistent/x.yaml
          fix: create the file or correct its name"#]]
    .assert_eq(&Place::new().argument("config", "/nonexistent/x.yaml").said());
    expect![[r#"
        command line: config cannot be a URL
          fix: copy the file to this server and give its path"#]]
    .assert_eq(&Place::new().argument("config", "https://example.org/x.yaml").said());
}

#[test]
fn directory_in_place_of_a_file_is_an_error() {
    let place = Place::new().write("config.yaml/x", "");

    assert!(place.said().starts_with("cannot read config.yaml: found "), "{}", place.said());
    assert!(place.load().is_err());
}

#[test]
fn secret_in_a_world_readable_file_is_warned_about() {
    let place = Place::new().write("config.yaml", "debug: false\ntoken: correct-horse\n");
    fs::set_permissions(place.path("config.yaml"), fs::Permissions::from_mode(0o644)).unwrap();

    expect![[r#"
        config.yaml:2:1: warning: token is readable by every user of this host: found mode 0644, expected mode 0640
          fix: chmod o= config.yaml"#]]
    .assert_eq(&place.said());
    let harmless = Place::new().write("config.yaml", "debug: false\n");
    fs::set_permissions(harmless.path("config.yaml"), fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(harmless.said(), "");
}

#[test]
fn secret_on_the_command_line_is_warned_about() {
    let said = Place::new().write("config.yaml", "").argument("token", "correct-horse").said();

    expect![[r#"
        command line: warning: token is readable by every user of this host (ps)
          fix: put it into a file with mode 0600 and use --token-file"#]]
    .assert_eq(&said);
}

#[test]
fn typical_k3s_file_works_unchanged() {
    let loaded = of_text(
        "# first server\r\ntoken: K10aaaa::server:bbbb\r\ncluster-init: true\r\ntls-san:\r\n  - k3s.example.org\r\n  - 192.168.1.5\r\n\
         disable: [traefik, servicelb]\r\nwrite-kubeconfig-mode: \"0644\"\r\nkubelet-arg:\r\n  - max-pods=200\r\n\
         etcd-arg: [quota-backend-bytes=4294967296, snapshot-count=10000]\r\nnode-label: [a=b]\r\n\
         etcd-expose-metrics: true\r\nflannel-backend: host-gw\r\n",
    )
    .unwrap();
    let config = &loaded.config;

    assert_eq!(config.start, Start::Found);
    assert_eq!(config.tls_sans, ["k3s.example.org", "192.168.1.5"]);
    let passed: Vec<_> = config.passthrough.iter().map(|(key, _)| key.name).collect();
    assert_eq!(
        passed,
        [
            "token",
            "flannel-backend",
            "disable",
            "tls-san",
            "write-kubeconfig-mode",
            "node-label",
            "kubelet-arg"
        ]
    );
    expect!["config.yaml:11:44: warning: etcd-arg snapshot-count is ignored: the log is purged by size here"]
        .assert_eq(&loaded.problems.to_string());
}

#[test]
fn joining_takes_the_host_from_the_server_url() {
    let loaded = of_text("server: https://pi-1.local:6443\ntoken-file: /etc/k3s/token\n").unwrap();
    let Start::Join(url) = &loaded.config.start else { panic!() };

    assert_eq!((url.host(), url.join_port()), ("pi-1.local", 2380));
    assert_eq!(loaded.config.token, Some(TokenSource::File(PathBuf::from("/etc/k3s/token"))));
}

#[test]
fn listeners_default_to_loopback_and_node_addresses() {
    let addresses = |listen: &Listen, values: &Values| {
        listen.addresses(&values.node_ips).iter().map(SocketAddr::to_string).collect::<Vec<_>>()
    };
    let config = of_text("node-ip: 10.0.0.5,fd00::5\n").unwrap().config;

    assert_eq!(
        addresses(&config.client_listen, &config),
        ["127.0.0.1:2379", "10.0.0.5:2379", "[fd00::5]:2379"]
    );
    assert_eq!(addresses(&config.metrics_listen, &config), ["127.0.0.1:2381"]);
    let config = of_text("node-ip: 10.0.0.5\ninsecure-http: true\nclient-listen: 127.0.0.1:0\netcd-expose-metrics: true\n")
        .unwrap()
        .config;
    assert_eq!(addresses(&config.client_listen, &config), ["127.0.0.1:0"]);
    assert_eq!(addresses(&config.metrics_listen, &config), ["127.0.0.1:2381", "10.0.0.5:2381"]);
    let config = of_text("node-ip: 10.0.0.5\ninsecure-http: true\n").unwrap().config;
    assert_eq!(addresses(&config.client_listen, &config), ["127.0.0.1:2379"]);
}

/// Every rule between values, each alone: the text of a file and what is said about it.
#[test]
fn every_contradiction_has_its_message() {
    let files = [
        "server: https://pi-9:6443\n",
        "server: https://pi-9:6443\ntoken: x\ncluster-init: true\n",
        "server: http://pi-9:6443\ntoken: x\n",
        "server: https://pi-9:6443\ntoken: x\ncluster-reset: true\n",
        "cluster-reset-restore-path: /x\n",
        "cluster-reset: true\n",
        "node-ip: 10.0.0.5\nserver: https://10.0.0.5:6443\ntoken: x\n",
        "servicelb-namespace: Kube-System\n",
        "system-default-registry: https://registry.example/\n",
        "token: x\ntoken-file: /x\n",
        "datastore-endpoint: mysql://user:canary@tcp(db:3306)/k3s\n",
        "datastore-endpoint: https://127.0.0.1:2379\ndatastore-cafile: /x\n",
        "disable-etcd: true\n",
        "disable: network-policy\n",
        "disable: [treafik, coredns, nonsense]\n",
        "cluster-cidr: 10.42.0.7/16\n",
        "cluster-cidr: 10.0.0.0/8\n",
        "service-cidr: 10.42.128.0/20\n",
        "cluster-cidr: 10.42.0.0/16,10.50.0.0/16\n",
        "cluster-cidr: 10.42.0.0/16,fd00:42::/56\n",
        "cluster-cidr: 10.42.0.0/16,fd00:42::/56\nservice-cidr: fd00:43::/112,10.43.0.0/16\n",
        "node-ip: fd00::5\ncluster-cidr: 10.42.0.0/16\nservice-cidr: 10.43.0.0/16\n",
        "cluster-dns: 10.44.0.10\n",
        "cluster-dns: 10.43.0.1\n",
        "cluster-dns: 10.43.0.10,10.43.0.11\n",
        "cluster-domain: Cluster.Local\n",
        "flannel-backend: wireguard\n",
        "https-listen-port: 70000\n",
        "https-listen-port: 06443\n",
        "service-node-port-range: 32767-30000\n",
        "etcd-s3-timeout: 5\n",
        "wal-linger: 2s\n",
        "insecure-http: true\nclient-listen: 0.0.0.0:2379\n",
        "db-dir: demo\n",
        "cluster-init: maybe\n",
        "cluster-init:\n",
        "node-name: Pi_1\n",
        "token: [a, b]\n",
        "etcd-arg: [max-request-bytes=10485760, listen-client-urls=http://x]\n",
        "node-label: =x\n",
    ];
    let mut text = String::new();
    for file in files {
        let mut said = said_of(file);
        // What only matters where there is no datastore yet is decided by the plan of the start.
        if let Ok(loaded) = of_text(file)
            && let Err(error) = start_plan(None, &loaded.config)
        {
            said = format!("{said}\nat a first start: {error}").trim_start().to_owned();
        }
        assert!(!said.is_empty(), "nothing said about {file}");
        text.push_str(&format!("{}\n{said}\n\n", file.trim_end().replace('\n', " | ")));
    }

    golden("config-messages.txt").assert_eq(&text);
}

#[test]
fn everything_wrong_is_reported_at_once() {
    let place = Place::new()
        .write(
            "config.yaml",
            "cluster-cird: 10.42.0.0/16\ncluster-cidr: 10.42.1.0/16\ntoken: 012345678901\nwrite-kubeconfig-mode: 0644\n\
             disable: [network-policy, traefik]\nflannel-backend: wireguard\nserver: http://pi-1\n",
        )
        .write("config.yaml.d/1.yaml", "a: [\n")
        .write("config.yaml.d/2.yaml", "etcd-s3-timeout: fast\n")
        .variable("K3S_LB_SERVER_PORT", "many")
        .argument("cluster-dns", "dns");

    golden("config-all-at-once.txt").assert_eq(&format!("{}\n", place.said()));
    assert!(place.load().is_err());
}

#[test]
fn no_message_repeats_a_secret() {
    for text in [
        "token: \"canary\\u0007\"\n",
        "datastore-endpoint: postgres://u:canary@h/d\n",
        "token: {canary: 1}\n",
        "token: [canary, canary]\n",
        "token: [[canary]]\n",
        "etcd-s3-secret-key: \"can\\nary-canary\"\n",
        "vpn-auth: canary\nagent-token: canary\ntoken: canary\n",
    ] {
        let loaded = of_text(text);
        let said = format!("{loaded:?} {loaded:#?} {}", said_of(text));
        assert!(!said.contains("canary"), "{text}: {said}");
    }
}

/// An address that comes up late at one boot must not make this server's networks differ from the cluster's.
#[test]
fn written_addresses_decide_the_family_of_the_networks_and_detected_ones_do_not() {
    let mut place = Place::new();
    place.request.host.address = Some("fd00::7".parse().unwrap());
    let config = place.config();
    assert_eq!(config.network.cluster_cidrs[0].to_string(), "10.42.0.0/16");
    assert_eq!(config.node_ips, ["fd00::7".parse::<std::net::IpAddr>().unwrap()]);
    assert!(place.said().contains("write `node-ip: \"fd00::7\"`"), "{}", place.said());

    let mut place = Place::new().argument("node-ip", "fd00::7");
    place.request.host.address = Some("10.0.0.7".parse().unwrap());
    let config = place.config();
    assert_eq!(config.network.cluster_cidrs[0].to_string(), "fd00:42::/56");
    assert_eq!(config.network.cluster_dns[0].to_string(), "fd00:43::a");
    assert!(!place.said().contains("node-ip"), "{}", place.said());
}

#[test]
fn defaults_are_those_promised() {
    let config = Place::new().config();

    assert_eq!(config.db_dir, Path::new("/var/lib/k3s-server"));
    assert_eq!(config.data_dir, Path::new("/var/lib/rancher/k3s"));
    assert_eq!(config.wal_linger, None);
    assert_eq!(config.start, Start::Standalone);
    assert_eq!(config.token, None);
    assert_eq!(config.etcd, config::EtcdOptions::default());
    assert_eq!(config.node_name, "pi-1");
    assert_eq!(config.origin("db-dir"), Origin::Default);
}

// --- config.example.yaml --------------------------------------------------------------------------------

const EXAMPLE_HEAD: &str = "\
# Example configuration of k3s-server: every key, its meaning and its default.
#
# Copy it to /etc/k3s/config.yaml (mode 0600 once it holds a token) and remove the `#` before what you need.
# Files in /etc/k3s/config.yaml.d/ that end in .yaml or .yml are read after it, in byte order of their names;
# there, `key+:` adds to a list instead of replacing it. The command line wins over files, files win over the
# environment. `k3s-server check` checks everything without starting.
#
# Keys marked [same on all servers] are recorded with the cluster and compared at every start. Keys marked
# [upstream k3s] are checked here and kept for upstream k3s.
#
# The smallest useful files:
#   first server:    token: a-long-random-text
#                    cluster-init: true
#   other servers:   token: the-same-long-random-text
#                    server: \"https://first-server:6443\"
";

/// The example file as the table has it.
fn example() -> String {
    let mut text = EXAMPLE_HEAD.to_owned();
    let mut group: Option<Group> = None;
    for key in
        KEYS.iter().filter(|key| !matches!(key.role, Role::Renamed(_)) && key.name != "config")
    {
        if group != Some(key.group) {
            group = Some(key.group);
            text.push_str(&format!("\n# ===== {} =====\n", key.group.heading()));
        }
        let mut marks = String::new();
        if key.critical {
            marks.push_str(" [same on all servers]");
        }
        if key.role == Role::Upstream {
            marks.push_str(" [upstream k3s]");
        }
        text.push_str(&format!("\n# {}.{marks}\n", key.help));
        if !key.default_note.is_empty() {
            text.push_str(&format!("# Default: {}.\n", key.default_note));
        }
        if !key.environment.is_empty() {
            text.push_str(&format!("# Environment: {}.\n", key.environment.join(", ")));
        }
        text.push_str(&format!("#{}:{}\n", key.name, written(key)));
    }
    text
}

fn written(key: &config::Key) -> String {
    let quoted = |text: &str| {
        if text.contains([' ', '*', '#']) { format!("\"{text}\"") } else { text.to_owned() }
    };
    match (key.repeat, key.default) {
        (Repeat::Once, "") => String::new(),
        (Repeat::Once, default) => format!(" {}", quoted(default)),
        (Repeat::Many | Repeat::Split, "") => " []".to_owned(),
        (Repeat::Many | Repeat::Split, default) => format!(" [{default}]"),
    }
}

#[test]
fn example_file_follows_the_table() {
    expect_file!["../../config.example.yaml"].assert_eq(&example());
}

#[test]
fn example_file_with_every_line_on_means_the_defaults() {
    let text =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config.example.yaml")).unwrap();
    let is_key = |line: &str| {
        line.strip_prefix('#')
            .and_then(|rest| rest.split_once(':'))
            .is_some_and(|(name, _)| keys::find(name).is_some())
    };
    let all_on: String = text
        .lines()
        .map(|line| if is_key(line) { format!("{}\n", &line[1..]) } else { format!("{line}\n") })
        .collect();
    let on = of_text(&all_on).unwrap();
    let off = of_text(&text).unwrap();

    assert_eq!((on.problems.to_string(), off.problems.to_string()), (String::new(), String::new()));
    assert_eq!(off.config.settings(), &config::Settings::default(), "as shipped it sets nothing");
    let without_passthrough = |config: &Config| Values {
        passthrough: config::Passthrough::default(),
        ..(**config).clone()
    };
    assert_eq!(without_passthrough(&on.config), without_passthrough(&off.config));
    for key in
        KEYS.iter().filter(|key| !matches!(key.role, Role::Renamed(_)) && key.name != "config")
    {
        assert_eq!(
            on.config.texts(key.name).join(","),
            off.config.texts(key.name).join(","),
            "{}",
            key.name
        );
    }
}

// --- any bytes ------------------------------------------------------------------------------------------

/// Small and deterministic; the seed is printed with every failure.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound).unwrap()).unwrap()
    }
}

#[test]
fn no_bytes_make_the_reader_panic() {
    const PIECES: &[&str] = &[
        ": ",
        "- ",
        "\n",
        "\r\n",
        "\t",
        "  ",
        "[",
        "]",
        "{",
        "}",
        "'",
        "\"",
        "#",
        "&a ",
        "*a",
        "!!str ",
        "!x ",
        "|\n",
        ">-\n",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "? ",
        "<<: ",
        "~",
        "0644",
        "1e10",
        "yes",
        "\u{feff}",
        "\u{85}",
        "é",
        "\0",
        "@",
        "`",
    ];
    let keys: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
    let place = Place::new();
    for seed in 1..=4_000_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut bytes = Vec::new();
        for _ in 0..random.below(40) {
            match random.below(4) {
                0 => bytes.extend(keys[random.below(keys.len())].bytes().chain(*b": ")),
                1 => bytes.push(u8::try_from(random.below(256)).unwrap()),
                _ => bytes.extend(PIECES[random.below(PIECES.len())].bytes()),
            }
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let parsed = config::parse_text("f", &bytes);
            let source = Source { name: "f".to_owned(), bytes: bytes.clone(), mode: 0o600 };
            let resolved = config::resolve(&[source], Problems::default(), &place.request);
            // What one file alone is refused for is never accepted as part of a whole.
            assert!(parsed.is_ok() || resolved.is_err());
        }));
        assert!(outcome.is_ok(), "seed {seed}: {:?}", String::from_utf8_lossy(&bytes));
    }
}

pub fn golden(name: &str) -> ExpectFile {
    expect_file![format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))]
}

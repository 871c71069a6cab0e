//! Secrets that must not be found anywhere but in their own files: not in logs, however talkative, not in the output of commands or
//! the text of errors, not in what the kernel or the metrics tell, not in backups, and not in files that others can read.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use k3s_server::config::keys::KEYS;
use k3s_server::env::host;
use k3s_server::proto::etcdserverpb as pb;
use pb::auth_client::AuthClient;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tokio_stream::StreamExt;

use crate::secrets::Secrets;
use crate::servers::{CONFIGURATION, Server, Servers, serves};
use crate::support::etcd::http_get;
use crate::support::ours::program;

/// Everything, of all crates.
const TALKATIVE: (&str, &str) = ("K3S_SERVER_LOG", "trace");

/// Clients' values are what is kept; they may be where the data is, and nowhere else.
const DATA: [&str; 1] = ["value"];

/// A secret that can be told from all others.
fn canary(name: &str) -> String {
    let mut bytes = [0; 12];
    host::env().entropy.fill(&mut bytes);
    let unique: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("canary-{unique}-{name}")
}

/// The secrets of one test, and how many places were searched.
struct Hunt {
    secrets: Secrets,
    places: usize,
}

impl Hunt {
    /// A new secret to look for.
    fn canary(&mut self, name: &str) -> String {
        let canary = canary(name);
        // The name is no secret.
        self.secrets.add(name, canary.strip_suffix(name).unwrap().as_bytes());
        canary
    }

    fn search(&mut self, place: &str, bytes: &[u8]) {
        self.search_but(place, bytes, &[]);
    }

    fn search_but(&mut self, place: &str, bytes: &[u8], allowed: &[&str]) {
        assert!(!bytes.is_empty(), "{place} is empty");
        self.places += 1;
        self.secrets.are_not_in_but(place, bytes, allowed);
    }

    fn search_output(&mut self, place: &str, output: &Output, allowed: &[&str]) {
        self.search_but(place, &[&output.stdout[..], &output.stderr].concat(), allowed);
    }
}

/// Every secret that a configuration may hold, except the token and what is refused.
fn secret_lines(hunt: &mut Hunt) -> String {
    let mut lines = String::new();
    let mut count = 0;
    for key in KEYS.iter().filter(|key| key.is_secret()) {
        if ["token", "datastore-endpoint"].contains(&key.name) {
            continue;
        }
        lines.push_str(&format!("{}: \"{}\"\n", key.name, hunt.canary(key.name)));
        count += 1;
    }
    assert!(4 <= count, "{lines}");
    lines
}

/// Files below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        }
        found.push(path);
    }
    found
}

/// What only the owner may touch.
fn nobody_else_can_read(dir: &Path) {
    let all = [files(dir), vec![dir.to_owned()]].concat();
    assert!(15 < all.len(), "{all:?}");
    for path in all {
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o7777;
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        // A lock holds nothing, but is a file like any other.
        assert_eq!(mode, expected, "{} has mode {mode:04o}", path.display());
    }
}

/// A client's own secrets: values, and a password for etcd's users, which are not supported.
async fn writes_secrets(server: &Server, value: &str) {
    let channel = server.channel().await;
    let bytes = || value.as_bytes().to_vec();
    let put = pb::PutRequest {
        key: b"/registry/secrets/default/one".to_vec().into(),
        value: bytes().into(),
        ..Default::default()
    };
    KvClient::new(channel.clone()).put(put).await.unwrap();
    let user = pb::AuthUserAddRequest {
        name: "root".to_owned(),
        password: value.to_owned(),
        ..Default::default()
    };
    let mut auth = AuthClient::new(channel);
    let refused = auth.user_add(user).await.unwrap_err();
    assert!(!refused.message().contains(value), "{refused}");
    let login = pb::AuthenticateRequest { name: "root".to_owned(), password: value.to_owned() };
    let refused = auth.authenticate(login).await.unwrap_err();
    assert!(!refused.message().contains(value), "{refused}");
}

async fn backup(server: &Server) -> Vec<u8> {
    let mut client = MaintenanceClient::new(server.channel().await);
    let mut stream = client.snapshot(pb::SnapshotRequest::default()).await.unwrap().into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = stream.next().await {
        bytes.extend(part.unwrap().blob);
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_found_anywhere_but_in_its_own_file() {
    let mut hunt = Hunt { secrets: Secrets::new(), places: 0 };
    let token = hunt.canary("token");
    let secrets = secret_lines(&mut hunt);
    let value = hunt.canary("value");
    let mut servers = Servers::none();

    let first = servers.add();
    first.configure(&format!("cluster-init: true\ntoken: \"{token}\"\n{secrets}"));
    // The modes are the program's own, not the umask's.
    first.start_as("umask 0", &[TALKATIVE]);
    first.ready();
    let address = first.address;
    let ca_key = fs::read_to_string(first.tls_dir().join("ca.key")).unwrap();
    hunt.secrets.add_key("the authority's key", &ca_key);
    let full = fs::read_to_string(first.token_file()).unwrap();

    let join = format!("server: https://{address}:6443\n");
    let second = servers.add();
    second.configure(&format!("{join}token: {full}{secrets}"));
    second.start_as("umask 0", &[TALKATIVE]);
    second.ready();
    writes_secrets(&servers.all[1], &value).await;

    let refused = [
        (format!("token: \"{}\"\n", hunt.canary("wrong")), "its password is not the one"),
        (format!("token: \"{token}\"\nservice-cidr: 10.99.0.0/16\n"), "service-cidr"),
        (format!("token: \"K10{}::server:{token}\"\n", "0".repeat(64)), "does not match"),
    ];
    for (lines, words) in refused {
        let joiner = servers.add();
        joiner.configure(&format!("{join}{lines}{secrets}"));
        joiner.start_as("umask 0", &[TALKATIVE]);
        let (status, printed) = servers.all.pop().unwrap().ended();
        assert_eq!(status, Some(CONFIGURATION), "{printed}");
        assert!(printed.contains(words), "{printed}");
        hunt.search(words, printed.as_bytes());
    }

    commands(&mut hunt, &servers.all[0], address);
    for server in &servers.all {
        serves(server.channel().await, "meanwhile").await.unwrap();
        everywhere(&mut hunt, server);
        assert!(server.printed().contains("TRACE"), "the log is not talkative");
    }
    hunt.search_but("a backup", &backup(&servers.all[0]).await, &DATA);
    for server in &servers.all {
        on_disk(&mut hunt, server);
        nobody_else_can_read(&server.db_dir());
    }
    println!("{} forms of secrets in {} places", hunt.secrets.count(), hunt.places);
    servers.stop();
}

/// Every command that there is, and the same with mistakes in the configuration.
fn commands(hunt: &mut Hunt, server: &Server, address: Ipv4Addr) {
    let db_dir = server.db_dir();
    let wal = ["wal", "verify", db_dir.to_str().unwrap()];
    let dump = ["wal", "dump", db_dir.to_str().unwrap()];
    let url = format!("https://{address}:6443");
    let all: &[&[&str]] = &[
        &["check"],
        &["check", "-o", "json"],
        &["check", "--server", &url],
        &["config", "show"],
        &["config", "show", "--all"],
        &["config", "show", "--all", "-o", "json"],
        &["flags", "show"],
        &["flags", "show", "-o", "json"],
        &["flags", "set", "disable", "traefik"],
        &["member", "list"],
        &["member", "list", "-o", "json"],
        &["member", "remove", "--yes", "nobody"],
        &["token"],
    ];
    for arguments in all {
        let output = server.command(arguments).env(TALKATIVE.0, TALKATIVE.1).output().unwrap();
        hunt.search_output(&arguments.join(" "), &output, &[]);
    }
    for arguments in [wal, dump] {
        let output = program().args(arguments).output().unwrap();
        hunt.search_output(&arguments.join(" "), &output, &DATA);
    }
    let shown = server.run(&["token", "--show"]);
    assert!(hunt.secrets.found_in(&shown.stdout, &[]).is_some(), "what is there is not found");
    mistakes(hunt, server);
}

/// Mistakes in the lines that hold secrets.
fn mistakes(hunt: &mut Hunt, server: &Server) {
    let config = server.config().with_file_name("mistaken.yaml");
    let mut secret = || hunt.canary("mistaken");
    let hash = "0".repeat(64);
    let texts = [
        format!("token: [\"{}\"]\n", secret()),
        format!("token: {{a: \"{}\"}}\n", secret()),
        format!("token: \"{}\n", secret()),
        format!("token: {}: x\n", secret()),
        format!("token:{}\n", secret()),
        format!("tokn: \"{}\"\n", secret()),
        format!("cluster-secret: \"{}\"\n", secret()),
        format!("token: \"{}\"\ntoken: \"x\"\n", secret()),
        format!("token: \"with spaces {}\"\n", secret()),
        format!("token: \"K10{}\"\n", secret()),
        format!("token: \"K10abc::server:{}\"\n", secret()),
        format!("token: \"K10{hash}::node:{}\"\n", secret()),
        format!("token: \"K10{hash}::{}\"\n", secret()),
        format!("agent-token: [\"{}\"]\n", secret()),
        format!("etcd-s3-secret-key: {{x: \"{}\"}}\n", secret()),
        format!("etcd-s3-proxy: \"http://user:{}@:x\"\n", secret()),
        format!("datastore-endpoint: \"postgres://user:{}@host/db\"\n", secret()),
        format!("datastore-endpoint: \"{}\"\n", secret()),
        format!("token: \"{}\"\nservice-cidr: nonsense\n", secret()),
        format!("server: \"https://user:{}@host:6443\"\ntoken: \"0123456789abcdef\"\n", secret()),
    ];
    let on_the_command_line = [
        ["--token", "--bogus"],
        ["--agent-token", "--service-cidr=x"],
        ["--etcd-s3-secret-key", "--server=https://a --cluster-init"],
        ["--datastore-endpoint", "--debug"],
    ];
    let flags: Vec<_> = on_the_command_line.iter().map(|flags| (flags, secret())).collect();
    let environment = secret();
    for text in texts {
        fs::write(&config, &text).unwrap();
        for arguments in [&["check"][..], &["config", "show"], &["server"]] {
            let mut command = program();
            command.args(arguments).arg("--config").arg(&config);
            // Nothing of this may really start.
            command.args(
                ["--db-dir", "/proc/nowhere"].iter().filter(|_| arguments != ["config", "show"]),
            );
            command.env(TALKATIVE.0, TALKATIVE.1);
            let output = command.output().unwrap();
            hunt.search_output(&format!("{arguments:?} of {text}"), &output, &[]);
        }
    }
    for ([flag, mistake], secret) in flags {
        let mut command = program();
        command.args(["check", flag, &secret, mistake]).args(["--db-dir", "/proc/nowhere"]);
        hunt.search_output(flag, &command.output().unwrap(), &[]);
    }
    let mut command = program();
    command.args(["check", "--service-cidr", "x"]).env("K3S_TOKEN", environment);
    hunt.search_output("the environment", &command.output().unwrap(), &[]);
}

/// What a running server tells to whoever looks.
fn everywhere(hunt: &mut Hunt, server: &Server) {
    hunt.search("the log", server.printed().as_bytes());
    for file in ["cmdline", "environ", "status", "maps"] {
        let path = format!("/proc/{}/{file}", server.pid());
        hunt.search(&path, &fs::read(&path).unwrap());
    }
    for page in ["/metrics", "/version", "/health", "/livez?verbose", "/readyz?verbose", "/nothing"]
    {
        hunt.search(page, http_get(&server.door(2381), page).unwrap().as_bytes());
    }
}

/// What is kept, but for the files that are there to hold a secret.
fn on_disk(hunt: &mut Hunt, server: &Server) {
    for path in files(&server.db_dir()) {
        // The ballast is 32 MiB of chance.
        let own = ["token", "tls/ca.key", "ballast"].map(|name| server.db_dir().join(name));
        if path.is_file() && !own.contains(&path) {
            let bytes = fs::read(&path).unwrap();
            if !bytes.is_empty() {
                hunt.search_but(&path.display().to_string(), &bytes, &DATA);
            }
        }
    }
    let token = fs::read(server.token_file()).unwrap();
    assert!(hunt.secrets.found_in(&token, &DATA).is_some(), "what is there is not found");
}

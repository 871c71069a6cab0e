//! Configuration files.

use k3s_server::config::{self, Host, Paths, Problems, Request, Source};

pub const DICTIONARY: &[&[u8]] = &[
    b"token: ",
    b"db-dir: /x\n",
    b"cluster-cidr: 10.42.0.0/16,fd00::/56\n",
    b"node-label+: ",
    b"etcd-arg:\n  - ",
    b"disable: [",
    b"quota-backend-bytes=",
    b"wal-linger: 0.25s\n",
    b"insecure-http: true\n",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"0644",
    b"0o17",
    b"1_000",
    b"12:30:45",
    b"yes",
    b"~",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!binary ",
    b"? ",
    b"- ",
    b"--- \n",
    b"%YAML 1.1\n",
    b"|+\n ",
    b">-\n ",
    b"\t",
    b"{",
    b"}",
    b"\"\\x",
    b"'",
    b"# ",
    b".inf",
    b"2001:db8::1",
];

const FULL: &str = r#"# all kinds of values
token: "K10abc::server:secret"
db-dir: /var/lib/k3s-server
node-name: pi-1
node-ip: [192.168.1.11, "fd00::11"]
cluster-cidr: 10.42.0.0/16
service-cidr: "10.43.0.0/16"
cluster-dns: 10.43.0.10
disable:
  - traefik
  - servicelb
disable-network-policy: true
tls-san+:
  - pi.example.org
client-listen: 127.0.0.1:2379
etcd-arg:
  - "quota-backend-bytes=4294967296"
  - heartbeat-interval=100
  - auto-compaction-retention=5m
wal-linger: 250ms
write-kubeconfig-mode: "0644"
"#;

pub fn seeds() -> Vec<Vec<u8>> {
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\ndisable: [*e,*e,*e,*e,*e]\n";
    vec![
        FULL.into(),
        FULL.replace('\n', "\r\n").into(),
        [b"\xef\xbb\xbf", FULL.as_bytes()].concat(),
        b"server: https://pi-1:6443\ntoken: abc\n".to_vec(),
        b"x: &x\n  - a\ndisable: *x\n<<: {token: t}\n".to_vec(),
        bomb.into(),
        format!("disable: {}", "[".repeat(2_000)).into(),
        b"".to_vec(),
    ]
}

/// Every input is either a configuration or a list of problems that can be shown.
pub fn run(input: &[u8]) {
    let alone = config::parse_text("fuzz.yaml", input).map(drop);
    show(alone.as_ref().err());
    let request = Request {
        command_line: Vec::new(),
        environment: [].into(),
        host: Host {
            name: Some("pi-1".to_owned()),
            address: Some([192, 168, 1, 11].into()),
            token_credential: None,
        },
        paths: Paths::default(),
    };
    let source = Source { name: "fuzz.yaml".to_owned(), bytes: input.to_vec(), mode: 0o600 };
    let resolved = config::resolve(&[source], Problems::default(), &request);
    match &resolved {
        Ok(loaded) => {
            assert!(!loaded.problems.has_errors());
            assert!(alone.is_ok(), "a file that is wrong by itself made a configuration");
            show(Some(&loaded.problems));
        }
        Err(problems) => {
            assert!(problems.has_errors(), "refused without saying why");
            show(Some(problems));
        }
    }
}

fn show(problems: Option<&Problems>) {
    for problem in problems.into_iter().flat_map(Problems::iter) {
        assert!(!problem.to_string().is_empty());
    }
}

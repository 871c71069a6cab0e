//! The endpoints over a real HTTP connection, with the node replaced by a few switches.

use std::sync::Mutex;
use std::time::SystemTime;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::metrics::Versions;

/// A node whose health is whatever the test says.
#[derive(Clone, Debug)]
struct Node {
    leader: bool,
    learner: bool,
    alarms: Vec<Alarm>,
    linearizable: Result<(), String>,
    serializable: Result<(), String>,
    hangs: bool,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            leader: true,
            learner: false,
            alarms: vec![],
            linearizable: Ok(()),
            serializable: Ok(()),
            hangs: false,
        }
    }
}

impl HealthSource for Node {
    fn has_leader(&self) -> bool {
        self.leader
    }

    fn is_learner(&self) -> bool {
        self.learner
    }

    fn alarms(&self) -> Vec<Alarm> {
        self.alarms.clone()
    }

    fn linearizable_read(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            if self.hangs {
                std::future::pending::<()>().await;
            }
            self.linearizable.clone()
        })
    }

    fn serializable_read(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(std::future::ready(self.serializable.clone()))
    }
}

fn metrics() -> Arc<Metrics> {
    let versions = Versions { server: "3.6.5", cluster: "3.6", daemon: "0.1.0" };
    Arc::new(Metrics::new(versions, SystemTime::UNIX_EPOCH))
}

/// A connection to a server with this node behind it.
fn connect(node: Node, metrics: &Arc<Metrics>) -> (DuplexStream, tokio::task::JoinHandle<()>) {
    let (client, server) = tokio::io::duplex(64 * 1024);
    let version = Version { server: "3.6.5", cluster: "3.6.0", storage: "3.6.0" };
    let router = router(Arc::new(node), Arc::clone(metrics), version);
    let incoming = tokio_stream::iter([Ok(server)]).chain(tokio_stream::pending());
    let served = tokio::spawn(serve(incoming, router, std::future::pending()));
    (client, served)
}

/// Status and body of one request.
async fn ask(node: Node, method: &str, path: &str) -> (u16, String) {
    let (status, _, body) = ask_counting(node, method, path, &metrics()).await;
    (status, body)
}

async fn ask_counting(
    node: Node,
    method: &str,
    path: &str,
    metrics: &Arc<Metrics>,
) -> (u16, String, String) {
    let (mut client, _served) = connect(node, metrics);
    let request = format!("{method} {path} HTTP/1.1\r\nHost: pi\r\nConnection: close\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).await.unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_owned())
}

#[tokio::test]
async fn healthy_node_answers_as_etcd_does() {
    let body = r#"{"health":"true","reason":""}"#;
    assert_eq!(ask(Node::default(), "GET", "/health").await, (200, body.to_owned()));
    let version = r#"{"etcdserver":"3.6.5","etcdcluster":"3.6.0","storage":"3.6.0"}"#;
    assert_eq!(ask(Node::default(), "GET", "/version").await, (200, version.to_owned()));
    assert_eq!(ask(Node::default(), "GET", "/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(ask(Node::default(), "GET", "/readyz").await, (200, "ok\n".to_owned()));
    assert_eq!(ask(Node::default(), "GET", "/nonsense").await.0, 404);
}

#[tokio::test]
async fn health_gives_the_first_reason_that_applies() {
    let unhealthy =
        |reason: &str| (503, format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}\n"));
    let alarmed = Node { alarms: vec![Alarm::NoSpace], leader: false, ..Node::default() };
    assert_eq!(ask(alarmed.clone(), "GET", "/health").await, unhealthy("ALARM NOSPACE"));
    let excluded = ask(alarmed.clone(), "GET", "/health?exclude=NOSPACE").await;
    assert_eq!(excluded, unhealthy("RAFT NO LEADER"));
    let local = ask(alarmed, "GET", "/health?exclude=NOSPACE&serializable=true").await;
    assert_eq!(local.0, 200);

    let broken =
        Node { linearizable: Err("etcdserver: request timed out".into()), ..Node::default() };
    let reason = "RANGE ERROR:etcdserver: request timed out";
    assert_eq!(ask(broken, "GET", "/health").await, unhealthy(reason));
}

#[tokio::test]
async fn readyz_names_the_failed_checks_and_verbose_names_all() {
    let learner = Node { learner: true, alarms: vec![Alarm::Corrupt], ..Node::default() };
    let (status, body) = ask(learner.clone(), "GET", "/readyz").await;
    assert_eq!(status, 503);
    assert_eq!(
        body,
        "[-]data_corruption failed: alarm activated: CORRUPT\n[+]serializable_read ok\n\
         [+]linearizable_read ok\n[-]non_learner failed: not supported for learner\n\n"
    );
    let excluded = "/readyz?exclude=data_corruption&exclude=non_learner&exclude=unknown";
    assert_eq!(ask(learner.clone(), "GET", excluded).await, (200, "ok\n".to_owned()));
    let verbose = ask(learner, "GET", "/livez?verbose").await;
    assert_eq!(verbose, (200, "[+]serializable_read ok\nok\n".to_owned()));
}

/// A full or leaderless node is alive: restarting it would not help.
#[tokio::test]
async fn livez_ignores_what_a_restart_cannot_cure() {
    let node =
        Node { leader: false, alarms: vec![Alarm::NoSpace, Alarm::Corrupt], ..Node::default() };
    assert_eq!(ask(node, "GET", "/livez").await.0, 200);
    let stuck = Node { serializable: Err("state damaged".into()), ..Node::default() };
    assert_eq!(ask(stuck, "GET", "/livez").await.0, 503);
}

#[tokio::test]
async fn single_checks_have_their_own_path() {
    let learner = Node { learner: true, ..Node::default() };
    assert_eq!(ask(learner.clone(), "GET", "/readyz/linearizable_read").await.0, 200);
    assert_eq!(ask(learner.clone(), "GET", "/readyz/non_learner").await.0, 503);
    assert_eq!(ask(learner, "GET", "/livez/non_learner").await.0, 404);
}

#[tokio::test]
async fn only_get_is_answered() {
    for path in ["/health", "/readyz", "/metrics"] {
        let (status, head, _) = ask_counting(Node::default(), "POST", path, &metrics()).await;
        assert_eq!(status, 405, "{path}");
        assert!(head.contains("allow: get"), "{head}");
    }
}

#[tokio::test(start_paused = true)]
async fn check_that_hangs_fails_after_its_timeout() {
    let node = Node { hangs: true, ..Node::default() };
    let started = tokio::time::Instant::now();
    let (status, body) = ask(node, "GET", "/health").await;
    assert_eq!(status, 503);
    assert!(body.contains("RANGE ERROR:context deadline exceeded"), "{body}");
    assert!(started.elapsed() >= CHECK_TIMEOUT);
}

/// Otherwise a few idle connections keep everyone else out (the slow-loris attack).
#[tokio::test(start_paused = true)]
async fn connection_without_headers_is_closed() {
    let (mut client, _served) = connect(Node::default(), &metrics());
    client.write_all(b"GET /health HTTP/1.1\r\nHost: pi\r\nX-Slow: ").await.unwrap();
    let started = tokio::time::Instant::now();
    let mut reply = Vec::new();
    client.read_to_end(&mut reply).await.unwrap();
    let waited = started.elapsed();
    assert!(HEADER_TIMEOUT <= waited && waited < HEADER_TIMEOUT * 2, "{waited:?}");
}

#[tokio::test]
async fn checks_are_counted_and_shown_on_the_metrics_page() {
    let metrics = metrics();
    let learner = Node { learner: true, ..Node::default() };
    ask_counting(learner.clone(), "GET", "/readyz", &metrics).await;
    ask_counting(learner.clone(), "GET", "/health", &metrics).await;
    let (status, head, page) = ask_counting(learner, "GET", "/metrics", &metrics).await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    for line in [
        "etcd_server_health_success_total 1",
        "etcd_server_healthcheck{type=\"readyz\",name=\"non_learner\"} 0",
        "etcd_server_healthchecks_total{type=\"readyz\",name=\"linearizable_read\",status=\"success\"} 1",
    ] {
        assert!(page.contains(line), "`{line}` is missing from:\n{page}");
    }
}

#[tokio::test]
async fn stopping_lets_the_request_in_progress_finish() {
    let (mut client, server) = tokio::io::duplex(1024);
    let (release, held) = tokio::sync::oneshot::channel::<()>();
    let (entered, running) = tokio::sync::oneshot::channel::<()>();
    let gate = Arc::new(Mutex::new(Some((entered, held))));
    let slow = move || {
        let (entered, held) = gate.lock().unwrap().take().unwrap();
        async move {
            entered.send(()).unwrap();
            held.await.unwrap();
            "done"
        }
    };
    let router = Router::new().route("/slow", any(slow));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let incoming = tokio_stream::iter([Ok(server)]).chain(tokio_stream::pending());
    let served = tokio::spawn(serve(incoming, router, async { stopped.await.unwrap() }));

    client.write_all(b"GET /slow HTTP/1.1\r\nHost: pi\r\n\r\n").await.unwrap();
    running.await.unwrap();
    stop.send(()).unwrap();
    release.send(()).unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).await.unwrap();
    assert!(reply.ends_with("done"), "{reply}");
    served.await.unwrap();
}

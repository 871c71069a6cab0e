//! Serves metrics, health and version over HTTP/1.1 on port 2381.
//!
//! Paths, parameters, bodies and status codes are etcd's, because load balancers, kubelet probes and dashboards are configured for
//! them. Read-only and without secrets; on loopback unless `etcd-expose-metrics` says otherwise.
//!
//! # Shape
//!
//! The node is seen through [`HealthSource`], so all of this runs without one. [`router`] answers requests, [`serve`] runs
//! connections from any source.
//!
//! # Invariants
//!
//! - No request can make the daemon wait or grow: headers must arrive within [`HEADER_TIMEOUT`], bodies are not read, a
//!   check that hangs fails after [`CHECK_TIMEOUT`].

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::{Stream, StreamExt};

use crate::env::BoxFuture;
use crate::metrics::{CONTENT_TYPE, Metrics};

/// A client has this long to send its request's headers, the wait between two requests included.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// A health check fails when it takes longer: etcd's request timeout.
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections may take this long to finish their last request when the daemon stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// etcd's alarms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// The space quota is used up.
    NoSpace,
    /// Members disagree about the data.
    Corrupt,
}

impl Alarm {
    const fn name(self) -> &'static str {
        match self {
            Self::NoSpace => "NOSPACE",
            Self::Corrupt => "CORRUPT",
        }
    }
}

/// What the health endpoints ask a node.
pub trait HealthSource: Send + Sync + 'static {
    /// Whether the node knows a leader.
    fn has_leader(&self) -> bool;
    /// Whether the node has no vote.
    fn is_learner(&self) -> bool;
    /// The raised alarms.
    fn alarms(&self) -> Vec<Alarm>;
    /// A read agreed with a majority. The error is its text as a client would see it.
    fn linearizable_read(&self) -> BoxFuture<'_, Result<(), String>>;
    /// A read of this node's own state.
    fn serializable_read(&self) -> BoxFuture<'_, Result<(), String>>;
}

/// What `/version` answers.
#[derive(Clone, Copy, Debug)]
pub struct Version {
    /// `etcdserver`, such as `3.6.5`.
    pub server: &'static str,
    /// `etcdcluster`, such as `3.6.0`.
    pub cluster: &'static str,
    /// `storage`, such as `3.6.0`.
    pub storage: &'static str,
}

/// What the endpoints share.
#[derive(Clone)]
struct Endpoints {
    health: Arc<dyn HealthSource>,
    metrics: Arc<Metrics>,
    version: Version,
}

/// The service of port 2381.
pub fn router(health: Arc<dyn HealthSource>, metrics: Arc<Metrics>, version: Version) -> Router {
    Router::new()
        .route("/metrics", any(show_metrics))
        .route("/version", any(show_version))
        .route("/health", any(show_health))
        .route("/livez", any(|state, query| probe(LIVEZ, state, query)))
        .route("/readyz", any(|state, query| probe(READYZ, state, query)))
        .route("/livez/{check}", any(|state, path| probe_one(LIVEZ, state, path)))
        .route("/readyz/{check}", any(|state, path| probe_one(READYZ, state, path)))
        .layer(middleware::from_fn(only_get))
        .with_state(Endpoints { health, metrics, version })
}

/// etcd answers GET only, HEAD included in the refusal.
async fn only_get(request: Request, next: Next) -> Response {
    if request.method() == Method::GET {
        return next.run(request).await;
    }
    let refusal = plain(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n".to_owned());
    ([(header::ALLOW, "GET")], refusal).into_response()
}

fn plain(status: StatusCode, body: String) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers, body).into_response()
}

fn json(body: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn show_metrics(State(endpoints): State<Endpoints>) -> Response {
    // The numbers come from where they are kept, the store on the card among them: not on a thread that serves others.
    match tokio::task::spawn_blocking(move || endpoints.metrics.text()).await {
        Ok(page) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], page).into_response(),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

async fn show_version(State(endpoints): State<Endpoints>) -> Response {
    let Version { server, cluster, storage } = endpoints.version;
    json(format!(r#"{{"etcdserver":"{server}","etcdcluster":"{cluster}","storage":"{storage}"}}"#))
}

/// Every value of a query parameter; empty ones do not count. etcd's names hold no escaped characters.
fn values<'q>(query: &'q str, name: &str) -> Vec<&'q str> {
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .filter(|(key, value)| *key == name && !value.is_empty())
        .map(|(_, value)| value)
        .collect()
}

fn is_present(query: &str, name: &str) -> bool {
    query.split('&').any(|pair| pair.split('=').next() == Some(name))
}

async fn show_health(State(endpoints): State<Endpoints>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let serializable = values(&query, "serializable").first() == Some(&"true");
    match health_problem(&*endpoints.health, &values(&query, "exclude"), serializable).await {
        None => {
            endpoints.metrics.health.success.inc();
            json(r#"{"health":"true","reason":""}"#.to_owned())
        }
        Some(reason) => {
            endpoints.metrics.health.failures.inc();
            let body = serde_json::json!({ "health": "false", "reason": reason });
            // etcd sends failures through Go's http.Error: text/plain, one newline.
            plain(StatusCode::SERVICE_UNAVAILABLE, format!("{body}\n"))
        }
    }
}

/// `/health`'s checks in etcd's order; the first that fails is the answer.
async fn health_problem(
    health: &dyn HealthSource,
    excluded: &[&str],
    serializable: bool,
) -> Option<String> {
    if let Some(alarm) = health.alarms().iter().find(|alarm| !excluded.contains(&alarm.name())) {
        return Some(format!("ALARM {}", alarm.name()));
    }
    if !serializable && !health.has_leader() {
        return Some("RAFT NO LEADER".to_owned());
    }
    let read = if serializable { health.serializable_read() } else { health.linearizable_read() };
    within(read).await.err().map(|error| format!("RANGE ERROR:{error}"))
}

async fn within(check: BoxFuture<'_, Result<(), String>>) -> Result<(), String> {
    match tokio::time::timeout(CHECK_TIMEOUT, check).await {
        Ok(result) => result,
        Err(_) => Err("context deadline exceeded".to_owned()),
    }
}

/// One check of `/livez` or `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

/// A path and its checks.
#[derive(Clone, Copy, Debug)]
struct Probe {
    name: &'static str,
    checks: &'static [Check],
}

const LIVEZ: Probe = Probe { name: "livez", checks: &[Check::SerializableRead] };
const READYZ: Probe = Probe {
    name: "readyz",
    checks: &[
        Check::DataCorruption,
        Check::SerializableRead,
        Check::LinearizableRead,
        Check::NonLearner,
    ],
};

impl Check {
    const fn name(self) -> &'static str {
        match self {
            Self::DataCorruption => "data_corruption",
            Self::SerializableRead => "serializable_read",
            Self::LinearizableRead => "linearizable_read",
            Self::NonLearner => "non_learner",
        }
    }

    async fn run(self, health: &dyn HealthSource) -> Result<(), String> {
        match self {
            Self::DataCorruption if health.alarms().contains(&Alarm::Corrupt) => {
                Err("alarm activated: CORRUPT".to_owned())
            }
            Self::NonLearner if health.is_learner() => Err("not supported for learner".to_owned()),
            Self::DataCorruption | Self::NonLearner => Ok(()),
            Self::SerializableRead => within(health.serializable_read()).await,
            Self::LinearizableRead => within(health.linearizable_read()).await,
        }
    }
}

async fn probe(
    probe: Probe,
    State(endpoints): State<Endpoints>,
    RawQuery(query): RawQuery,
) -> Response {
    let query = query.unwrap_or_default();
    let excluded: BTreeSet<&str> = values(&query, "exclude").into_iter().collect();
    let checks = probe.checks.iter().copied().filter(|check| !excluded.contains(check.name()));
    run_checks(&endpoints, probe.name, checks, is_present(&query, "verbose")).await
}

async fn probe_one(probe: Probe, state: State<Endpoints>, Path(name): Path<String>) -> Response {
    match probe.checks.iter().find(|check| check.name() == name) {
        Some(check) => run_checks(&state.0, probe.name, [*check].into_iter(), false).await,
        None => plain(StatusCode::NOT_FOUND, "404 page not found\n".to_owned()),
    }
}

async fn run_checks(
    endpoints: &Endpoints,
    name: &'static str,
    checks: impl Iterator<Item = Check>,
    verbose: bool,
) -> Response {
    let mut report = String::new();
    let mut all_passed = true;
    for check in checks {
        let result = check.run(&*endpoints.health).await;
        endpoints.metrics.health.check(name, check.name(), result.is_ok());
        match result {
            Ok(()) => report.push_str(&format!("[+]{} ok\n", check.name())),
            Err(error) => {
                all_passed = false;
                report.push_str(&format!("[-]{} failed: {error}\n", check.name()));
            }
        }
    }
    if !all_passed {
        return plain(StatusCode::SERVICE_UNAVAILABLE, format!("{report}\n"));
    }
    let body = if verbose { format!("{report}ok\n") } else { "ok\n".to_owned() };
    plain(StatusCode::OK, body)
}

/// Serves connections until `stop` completes; then requests in progress get a moment to finish.
///
/// The number of connections is capped where they come from.
pub async fn serve<I, Io>(mut incoming: I, router: Router, stop: impl Future<Output = ()>)
where
    I: Stream<Item = io::Result<Io>> + Unpin,
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(16 * 1024);
    let stopping = watch::Sender::new(false);
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let io = tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            next = incoming.next() => match next {
                Some(Ok(io)) => io,
                Some(Err(_)) => continue,
                None => break,
            },
        };
        let service = TowerToHyperService::new(router.clone());
        let connection = builder.serve_connection(TokioIo::new(io), service);
        connections.spawn(run_connection(connection, stopping.subscribe()));
    }
    drop(incoming);
    stopping.send_replace(true);
    let finished = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_TIMEOUT, finished).await.is_err() {
        tracing::debug!("connections to the metrics port were cut off");
    }
}

type Served<Io> = http1::Connection<TokioIo<Io>, TowerToHyperService<Router>>;

async fn run_connection<Io>(connection: Served<Io>, mut stopping: watch::Receiver<bool>)
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = begins(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection to the metrics port failed");
    }
}

/// Completes when the value becomes true, or nobody can set it any more.
async fn begins(stopping: &mut watch::Receiver<bool>) {
    let _gone = stopping.wait_for(|stopping| *stopping).await.is_err();
}

#[cfg(test)]
mod tests;

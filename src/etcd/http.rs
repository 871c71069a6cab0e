//! Answers `/version` and `/health` on the client port, as etcd does for load balancers and scripts.

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{StatusCode, header};
use tonic::Status;

use super::api::Api;
use super::error::store_failed;
use super::{CLUSTER_VERSION, VERSION};
use crate::proto::etcdserverpb::AlarmType;

/// Paths that are not gRPC.
pub(super) const PATHS: [&str; 2] = ["/version", "/health"];

/// What a health question leaves out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthQuery {
    /// Ask only this node, not a majority.
    pub serializable: bool,
    /// Alarms that do not count, by name.
    pub excluded: Vec<String>,
}

/// Why a node is not healthy, in etcd's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unhealthy(pub String);

impl HealthQuery {
    /// Reads a query string: `serializable=true`, `exclude=NOSPACE`. What it does not know is ignored, as in etcd.
    pub fn parse(query: &str) -> Self {
        let mut parsed = Self::default();
        for pair in query.split('&') {
            match pair.split_once('=') {
                Some(("serializable", value)) => parsed.serializable = value == "true",
                Some(("exclude", value)) => parsed.excluded.push(value.to_owned()),
                Some(_) | None => {}
            }
        }
        parsed
    }
}

impl Api {
    /// Whether this node serves: no alarm, a leader, and a read that succeeds. In etcd's order.
    pub async fn health(&self, query: &HealthQuery) -> Result<(), Unhealthy> {
        let failed = |status: Status| Unhealthy(format!("RANGE ERROR:{}", status.message()));
        let view = self.view(&super::api::Freshness::Serializable).map_err(failed)?;
        let alarms = view.alarms().map_err(|error| failed(store_failed(&error)))?;
        for (_, alarm) in alarms {
            let name = AlarmType::try_from(alarm).map_or("UNKNOWN", |alarm| alarm.as_str_name());
            if !query.excluded.iter().any(|excluded| excluded == name) {
                return Err(Unhealthy(format!("ALARM {name}")));
            }
        }
        if self.status().leader.is_none() {
            return Err(Unhealthy("RAFT NO LEADER".to_owned()));
        }
        self.freshness(query.serializable, self.own_deadline()).await.map_err(failed)?;
        Ok(())
    }
}

/// The routes.
pub(super) fn router(api: Api) -> Router {
    Router::new().route("/version", get(version)).route("/health", get(health)).with_state(api)
}

async fn version() -> Response {
    let text = format!(
        r#"{{"etcdserver":"{VERSION}","etcdcluster":"{CLUSTER_VERSION}","storage":"{CLUSTER_VERSION}"}}"#
    );
    json(StatusCode::OK, text)
}

async fn health(State(api): State<Api>, RawQuery(query): RawQuery) -> Response {
    let query = HealthQuery::parse(query.as_deref().unwrap_or_default());
    match api.health(&query).await {
        Ok(()) => json(StatusCode::OK, r#"{"health":"true","reason":""}"#.to_owned()),
        Err(Unhealthy(reason)) => {
            let reason = serde_json::Value::from(reason);
            let text = format!(r#"{{"health":"false","reason":{reason}}}"#);
            json(StatusCode::SERVICE_UNAVAILABLE, text)
        }
    }
}

fn json(status: StatusCode, text: String) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_query_reads_what_it_knows_and_ignores_the_rest() {
        assert_eq!(HealthQuery::parse(""), HealthQuery::default());
        assert_eq!(
            HealthQuery::parse("serializable=true&exclude=NOSPACE&x=1&exclude=CORRUPT&y"),
            HealthQuery {
                serializable: true,
                excluded: vec!["NOSPACE".to_owned(), "CORRUPT".to_owned()]
            }
        );
    }
}

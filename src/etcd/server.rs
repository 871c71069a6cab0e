//! Puts the services on connections that somebody else accepted.
//!
//! # Invariants
//!
//! - What one connection can make us hold is bounded: streams, header bytes, reset streams, message size, requests on their way
//!   in (`intake`), and the answers that it has not read (`budget`).

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::middleware;
use futures_util::stream::{Stream, StreamExt as _};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::admin::AdminService;
use super::api::Api;
use super::auth::AuthService;
use super::budget::{Observed, Payer};
use super::cluster::ClusterService;
use super::election::ElectionService;
use super::kv::KvService;
use super::lease::LeaseService;
use super::lock::LockService;
use super::maintenance::MaintenanceService;
use super::watch::WatchService;
use super::{gate, http};
use crate::limits::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};
use crate::proto::etcdserverpb::auth_server::AuthServer;
use crate::proto::etcdserverpb::cluster_server::ClusterServer;
use crate::proto::etcdserverpb::kv_server::KvServer;
use crate::proto::etcdserverpb::lease_server::LeaseServer;
use crate::proto::etcdserverpb::maintenance_server::MaintenanceServer;
use crate::proto::etcdserverpb::watch_server::WatchServer;
use crate::proto::node::admin_server::AdminServer;
use crate::proto::v3electionpb::election_server::ElectionServer;
use crate::proto::v3lockpb::lock_server::LockServer;

/// Headers of one request. etcd's clients send a few hundred bytes.
const HEADER_BYTES_MAX: u32 = 16 << 10;

/// Streams a client may reset before we look at them; more in one go is an attack.
const PENDING_RESETS_MAX: usize = 64;

/// Streams a client may make us reset before the connection is closed.
const LOCAL_RESETS_MAX: usize = 1_024;

/// How long calls under way, and clients that do not read, may hold up the end.
const LINGER: Duration = Duration::from_millis(1_500);

/// Why serving ended before it was asked to.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The reflection service could not be made of our own descriptors.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("client connections: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves clients until `shutdown`, and then until the calls under way are done. Streams that have no end of their own are
/// ended then, so that this does not take long unless a client does not read.
///
/// `incoming` yields accepted connections, after TLS where there is TLS. An error in it is one failed
/// connection, not the end. `around` puts layers of the caller, such as counters, around
/// all routes.
pub async fn serve<IO>(
    api: Api,
    around: impl FnOnce(axum::Router) -> axum::Router,
    incoming: impl Stream<Item = io::Result<IO>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let settings = *api.settings();
    let budget = api.budget().clone();
    let accounts = budget.clone();
    let intake = api.intake().clone();
    let incoming =
        incoming.map(move |io| io.map(|io| Observed::new(io, accounts.open(), intake.open())));
    let stopping = api.clone();
    let begun = Arc::new(Notify::new());
    let stopped = Arc::clone(&begun);
    let shutdown = async move {
        shutdown.await;
        stopping.stop();
        stopped.notify_one();
    };
    let clock = Arc::clone(&api.parts().env.clock);
    // Each where the services look for it.
    let unpack = middleware::map_request(async |mut request: axum::extract::Request| {
        let extensions = request.extensions_mut();
        if let Some(Payer { account, lane, info }) = extensions.remove::<Payer<IO::ConnectInfo>>() {
            extensions.insert(account);
            extensions.insert(lane);
            extensions.insert(info);
        }
        request
    });
    let routes = Routes::from(around(routes(&api).await?.layer(unpack)));
    let served = Server::builder()
        .accept_http1(true)
        .max_concurrent_streams(settings.concurrent_streams_max)
        .http2_keepalive_interval(Some(settings.keepalive_interval))
        .http2_keepalive_timeout(Some(settings.keepalive_timeout))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(LOCAL_RESETS_MAX))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, shutdown);
    let cut = async {
        begun.notified().await;
        clock.sleep(LINGER).await;
        budget.end_connections();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        served = served => Ok(served?),
        () = cut => unreachable!("connections that end end the serving"),
    }
}

/// Every service, behind the gate.
async fn routes(api: &Api) -> Result<axum::Router, ServeError> {
    let bytes_max = api.settings().message_bytes_max();
    let (_reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    /// Each service type has its own method of this name.
    macro_rules! limited {
        ($server:ident($service:expr)) => {
            $server::new($service).max_decoding_message_size(bytes_max)
        };
    }
    let services = Routes::new(limited!(KvServer(KvService(api.clone()))))
        .add_service(limited!(WatchServer(WatchService(api.clone()))))
        .add_service(limited!(LeaseServer(LeaseService(api.clone()))))
        .add_service(limited!(ClusterServer(ClusterService(api.clone()))))
        .add_service(limited!(MaintenanceServer(MaintenanceService(api.clone()))))
        .add_service(limited!(AuthServer(AuthService(api.clone()))))
        .add_service(limited!(LockServer(LockService(api.clone()))))
        .add_service(limited!(ElectionServer(ElectionService(api.clone()))))
        .add_service(limited!(AdminServer(AdminService(api.clone()))))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok(services
        .into_axum_router()
        .merge(http::router(api.clone()))
        .layer(middleware::from_fn_with_state(api.clone(), gate::gate)))
}

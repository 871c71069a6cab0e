//! Calls port 2379 as any etcd client does: finds a server that answers, with or without TLS.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};

use crate::config::Config;
use crate::env::host;
use crate::pki::{CertificateClock, ClientFilesError, Paths, call_with_files};
use crate::proto::node::admin_client::AdminClient;
use crate::proto::node::{FlagsReply, FlagsRequest};

/// A server that is there answers much sooner, also on a slow board.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest wait for an answer: a server's own limit is 5 s and two elections.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest wait for the first of several servers: one that leads, or knows who does, answers much sooner.
const ANY_TIMEOUT: Duration = Duration::from_secs(8);

/// Where servers answer, and what to show them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// URLs of port 2379, tried in order.
    pub endpoints: Vec<String>,
    /// Authority, certificate and key.
    pub files: Paths,
}

/// Why no server could be asked.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// Not the URL of a server.
    #[error("{0} is not an endpoint: expected https://HOST:PORT")]
    Endpoint(String),
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Files(#[from] ClientFilesError),
    /// Nobody answered; one line for each endpoint.
    #[error("no server answers:{}", lines(.0))]
    Unreachable(Vec<(String, String)>),
}

fn lines(tried: &[(String, String)]) -> String {
    tried.iter().map(|(endpoint, error)| format!("\n  {endpoint}: {error}")).collect()
}

impl ConnectionError {
    /// What the operator can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Endpoint(_) => "correct --endpoint".to_owned(),
            Self::Files(error) => format!(
                "run this as the user that can read {}, or name other files with --cacert, --cert and --key",
                error.path.display()
            ),
            Self::Unreachable(_) => {
                "look at `systemctl status k3s-server`, or name a server that runs with --endpoint"
                    .to_owned()
            }
        }
    }
}

impl Connection {
    /// To this host's own server, as its configuration says.
    pub fn of(config: &Config) -> Self {
        let scheme = if config.insecure_http { "http" } else { "https" };
        let reachable = |address: SocketAddr| match address.ip() {
            ip if ip.is_unspecified() && ip.is_ipv4() => {
                SocketAddr::from(([127, 0, 0, 1], address.port()))
            }
            ip if ip.is_unspecified() => {
                SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, address.port()))
            }
            _ => address,
        };
        let addresses = config.client_listen.addresses(&config.node_ips);
        let endpoints = addresses.into_iter().map(|at| format!("{scheme}://{}", reachable(at)));
        let tls = config.db_dir.join("tls");
        let files = Paths {
            authority: tls.join("ca.crt"),
            certificate: tls.join("client.crt"),
            key: tls.join("client.key"),
        };
        Self { endpoints: endpoints.collect(), files }
    }

    /// The same, to another member.
    pub fn to(&self, endpoints: &[String]) -> Self {
        Self { endpoints: endpoints.to_vec(), files: self.files.clone() }
    }

    /// Connects to the first endpoint that answers.
    pub async fn open(&self) -> Result<Channel, ConnectionError> {
        let mut tried = Vec::new();
        for endpoint in &self.endpoints {
            let connector = self.connector(endpoint)?;
            match open(connector).await {
                Ok(channel) => return Ok(channel),
                Err(error) => tried.push((endpoint.clone(), error)),
            }
        }
        Err(ConnectionError::Unreachable(tried))
    }

    /// The critical flags as a majority has them, from the first of these servers that knows. They may be other members than
    /// the endpoints.
    pub async fn ask_any_flags(&self, servers: &[String]) -> Option<FlagsReply> {
        let asked = async {
            for server in servers {
                let Ok(channel) = self.to(std::slice::from_ref(server)).open().await else {
                    continue;
                };
                let request = FlagsRequest { local: false };
                if let Ok(reply) = AdminClient::new(channel).flags(request).await {
                    return Some(reply.into_inner());
                }
            }
            None
        };
        tokio::time::timeout(ANY_TIMEOUT, asked).await.ok().flatten()
    }

    fn connector(&self, endpoint: &str) -> Result<Connector, ConnectionError> {
        let wrong = || ConnectionError::Endpoint(endpoint.to_owned());
        let text = if endpoint.contains("://") {
            endpoint.to_owned()
        } else {
            format!("https://{endpoint}")
        };
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let host = uri.host().ok_or_else(wrong)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(2379);
        let tls = match uri.scheme_str() {
            Some("https") => {
                let clock = CertificateClock::new(host::env().clock);
                let name = ServerName::try_from(host.clone()).map_err(|_| wrong())?;
                Some((call_with_files(&self.files, clock)?, name))
            }
            Some("http") => None,
            _ => return Err(wrong()),
        };
        Ok(Connector { host, port, tls })
    }
}

async fn open(connector: Connector) -> Result<Channel, String> {
    // The connector knows the way; the URI only names the authority in requests.
    let endpoint = Endpoint::from_static("http://k3s-server")
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .user_agent(concat!("k3s-server/", env!("CARGO_PKG_VERSION")))
        .map_err(|error| error.to_string())?;
    endpoint.connect_with_connector(connector).await.map_err(|error| innermost(&error))
}

/// "transport error" says nothing; its cause does.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Runs a command to its end.
pub fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

/// Bytes to and from a server.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

#[derive(Clone)]
struct Connector {
    host: String,
    port: u16,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

impl Connector {
    async fn connect(self) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let Some((config, name)) = self.tls else { return Ok(Box::new(stream)) };
        Ok(Box::new(TlsConnector::from(config).connect(name, stream).await?))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { Ok(TokioIo::new(connector.connect().await?)) })
    }
}

//! A client that can be as rude as a test wants: any TLS settings, any bytes as a message, any path.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use http::Uri;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::Service;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::support::{Endpoint, TlsFiles};

/// A connection of either kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What a well-behaved client shows.
pub fn tls(files: &TlsFiles) -> ClientConfig {
    let certificates = CertificateDer::pem_file_iter(&files.certificate).unwrap();
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    tls_with(files, Some((certificates.map(Result::unwrap).collect(), key)))
}

/// Trusts the server, shows this certificate or none.
pub fn tls_with(
    files: &TlsFiles,
    shown: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files.ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shown {
        Some((certificates, key)) => config.with_client_auth_cert(certificates, key).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// Connects, and does the TLS handshake if there is to be one.
pub async fn dial(address: &str, tls: Option<Arc<ClientConfig>>) -> io::Result<Box<dyn Stream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let Some(config) = tls else { return Ok(Box::new(stream)) };
    let name = ServerName::try_from("127.0.0.1").map_err(io::Error::other)?;
    Ok(Box::new(TlsConnector::from(config).connect(name, stream).await?))
}

/// The way a well-behaved client connects.
pub async fn dial_endpoint(endpoint: &Endpoint) -> io::Result<Box<dyn Stream>> {
    let config = endpoint.tls.as_ref().map(|files| Arc::new(tls(files)));
    dial(&endpoint.address, config).await
}

#[derive(Clone)]
struct Dialer {
    address: String,
    tls: Option<Arc<ClientConfig>>,
}

type Dialing = Pin<Box<dyn Future<Output = io::Result<TokioIo<Box<dyn Stream>>>> + Send>>;

impl Service<Uri> for Dialer {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = io::Error;
    type Future = Dialing;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Dialing {
        let Self { address, tls } = self.clone();
        Box::pin(async move { dial(&address, tls).await.map(TokioIo::new) })
    }
}

/// A gRPC channel.
pub async fn channel(endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
    let config = endpoint.tls.as_ref().map(tls);
    channel_with(&endpoint.address, config).await
}

/// A gRPC channel with any TLS settings.
pub async fn channel_with(
    address: &str,
    tls: Option<ClientConfig>,
) -> Result<Channel, tonic::transport::Error> {
    let dialer = Dialer { address: address.to_owned(), tls: tls.map(Arc::new) };
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
    endpoint.timeout(Duration::from_secs(60)).connect_with_connector(dialer).await
}

/// Calls any path with any bytes as the message; the answer's bytes.
pub async fn call(channel: &Channel, path: &str, message: Bytes) -> Result<Bytes, Status> {
    let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(usize::MAX);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path: PathAndQuery = path.parse().expect("a path");
    grpc.unary(Request::new(message), path, Raw).await.map(tonic::Response::into_inner)
}

/// Messages are their bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(input.copy_to_bytes(input.remaining())))
    }
}

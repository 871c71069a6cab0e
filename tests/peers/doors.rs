//! The two doors of port 2380: what is behind each, and that there is no way from one to the other.

use std::sync::Arc;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use k3s_server::peers::join;
use k3s_server::pki::{self, Caller, CertificateClock, Names, Paths, Port, Role};
use k3s_server::proto::node::join_client::JoinClient;
use k3s_server::proto::node::join_server::{Join, JoinServer};
use k3s_server::proto::node::peers_client::PeersClient;
use k3s_server::proto::node::{
    BeginReply, BeginRequest, Envelope, FinishReply, FinishRequest, IntroduceReply,
    IntroduceRequest,
};
use k3s_server::raft::transport::{Method, Transport};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::service::Routes;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Response, Status};

use crate::node::{CLUSTER, Cluster, Node, SOON, id};

/// Gives tonic a connection that is there already.
struct Once<S>(Option<S>);

impl<S> tonic::codegen::Service<http::Uri> for Once<S> {
    type Response = S;
    type Error = std::io::Error;
    type Future = std::future::Ready<std::io::Result<S>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        std::future::ready(self.0.take().ok_or_else(|| std::io::Error::other("used")))
    }
}

/// Shows what a join service can see of its caller.
struct Show;

#[tonic::async_trait]
impl Join for Show {
    async fn introduce(
        &self,
        request: Request<IntroduceRequest>,
    ) -> Result<Response<IntroduceReply>, Status> {
        let caller = request.extensions().get::<Caller>().expect("tonic puts it there");
        assert_eq!(caller.identity, None);
        let binding = caller.binding.expect("this door makes one");
        let authority_pem = binding.bytes().to_vec().into();
        Ok(Response::new(IntroduceReply { authority_pem, ..IntroduceReply::default() }))
    }

    async fn begin(&self, request: Request<BeginRequest>) -> Result<Response<BeginReply>, Status> {
        let exchange = request.into_inner().exchange;
        Ok(Response::new(BeginReply { session: exchange, ..BeginReply::default() }))
    }

    async fn finish(&self, _: Request<FinishRequest>) -> Result<Response<FinishReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

pub fn join_routes() -> Routes {
    Routes::new(JoinServer::new(Show).max_decoding_message_size(join::MESSAGE_BYTES_MAX))
}

#[tokio::test]
async fn both_ends_of_a_join_share_a_binding_and_see_the_authority() {
    let cluster = Cluster::new();
    let node = cluster.node(1).await;
    let mut bindings = Vec::new();
    for _ in 0..2 {
        let connection = join::connect(node.address).await.unwrap();
        let mut client = JoinClient::new(connection.channel);
        let reply = client.introduce(IntroduceRequest::default()).await.unwrap();
        let theirs = reply.into_inner().authority_pem;
        assert_eq!(theirs, connection.binding.bytes().as_slice());
        bindings.push(theirs);

        let clock = CertificateClock::new(Arc::clone(&cluster.env.clock));
        let pem = node.pki.authority_pem().as_bytes();
        assert_eq!(connection.chain.len(), 2);
        let identity = pki::introduced(&connection.chain, pem, &clock).unwrap();
        assert_eq!((identity.cluster, identity.role, identity.node), (CLUSTER, Role::Peer, id(1)));
    }
    assert_ne!(bindings[0], bindings[1]);
}

#[tokio::test]
async fn a_renewed_certificate_is_used_at_both_doors_without_a_restart() {
    let cluster = Cluster::new();
    let (node, other) = (cluster.node(1).await, cluster.node(2).await);
    let old = join::connect(node.address).await.unwrap().chain;
    let mut names = Names::loopback();
    names.add("pi-1.example").unwrap();
    assert!(!node.pki.renew(&names).await.unwrap().is_empty());
    assert!(!other.pki.renew(&names).await.unwrap().is_empty());

    let new = join::connect(node.address).await.unwrap().chain;
    assert_ne!(old[0], new[0]);
    assert_eq!(old[1], new[1]);
    let reply = other.peers.call(&node.member(), Method::Vote, "x".into(), SOON).await;
    assert_eq!(reply, Ok("x".into()));
}

#[tokio::test]
async fn an_authority_that_did_not_sign_is_noticed() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let node = ours.node(1).await;
    let other = theirs.pki(1).await;
    let connection = join::connect(node.address).await.unwrap();
    let clock = CertificateClock::new(Arc::clone(&ours.env.clock));
    let pem = other.authority_pem().as_bytes();
    assert!(pki::introduced(&connection.chain, pem, &clock).is_err());
    assert!(pki::introduced(&connection.chain, b"nonsense", &clock).is_err());
    assert!(pki::introduced(&[], node.pki.authority_pem().as_bytes(), &clock).is_err());
    // A leaf is nobody's authority, not even its own.
    let leaf = std::fs::read(node.pki.paths(Role::Peer).certificate).unwrap();
    assert!(pki::introduced(&connection.chain, &leaf, &clock).is_err());
}

#[tokio::test]
async fn the_door_for_newcomers_leads_to_no_other_service() {
    let cluster = Cluster::new();
    let node = cluster.node(1).await;
    let connection = join::connect(node.address).await.unwrap();
    let mut peers = PeersClient::new(connection.channel);
    let status = peers.call(Envelope::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    let stream = tokio_stream::iter([Envelope::default()]);
    assert_eq!(peers.stream(stream).await.unwrap_err().code(), Code::Unimplemented);
    assert!(node.echo.visitors.lock().unwrap().is_empty());
}

#[tokio::test]
async fn nodes_do_not_find_the_join_service_at_their_door() {
    let cluster = Cluster::new();
    let node = cluster.node(1).await;
    let config = cluster.pki(2).await.call_peer(id(1)).unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = TcpStream::connect(node.address).await.unwrap();
    let stream = TlsConnector::from(config).connect(name, stream).await.unwrap();
    let endpoint = Endpoint::from_static("http://peer");
    let channel = endpoint.connect_with_connector(Once(Some(TokioIo::new(stream)))).await.unwrap();
    let status = JoinClient::new(channel).begin(BeginRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

#[tokio::test]
async fn more_than_64_kib_at_once_is_no_request_to_join() {
    let cluster = Cluster::new();
    let node = cluster.node(1).await;
    let mut client = JoinClient::new(join::connect(node.address).await.unwrap().channel);
    let fits = BeginRequest { exchange: vec![1; 60 << 10].into() };
    client.begin(fits).await.unwrap();
    let large = BeginRequest { exchange: vec![1; 65 << 10].into() };
    client.begin(large).await.unwrap_err();
}

/// Whatever answered the second time would have another binding.
#[tokio::test]
async fn a_join_connection_that_ended_does_not_come_back() {
    let cluster = Cluster::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = cluster.pki(1).await.accept(Port::Join).unwrap();
    let (accepted, mut count) = tokio::sync::mpsc::unbounded_channel();
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            drop(TlsAcceptor::from(Arc::clone(&config)).accept(stream).await);
            accepted.send(()).unwrap();
        }
    });
    let connection = join::connect(address).await.unwrap();
    count.recv().await.unwrap();
    let mut client = JoinClient::new(connection.channel);
    for _ in 0..3 {
        client.begin(BeginRequest::default()).await.unwrap_err();
    }
    assert!(count.try_recv().is_err(), "it connected again");
    serving.abort();
}

/// A node's certificate is asked for, and every other one is refused, before a single byte of HTTP.
#[tokio::test]
async fn at_the_nodes_door_only_a_nodes_certificate_helps() {
    let (cluster, foreign) = (Cluster::new(), Cluster::new());
    let node = cluster.node(1).await;
    let (ours, theirs) = (cluster.pki(2).await, foreign.pki(2).await);
    let certificates = [
        ("none", None),
        ("client", Some(ours.paths(Role::Client))),
        ("server", Some(ours.paths(Role::Server))),
        ("another cluster's", Some(theirs.paths(Role::Peer))),
    ];
    for (name, paths) in certificates {
        for protocols in [vec![b"h2".to_vec()], vec![]] {
            let refused = is_refused(&node, config(paths.as_ref(), protocols)).await;
            assert!(refused, "certificate: {name}");
        }
    }
    let right = config(Some(&ours.paths(Role::Peer)), vec![b"h2".to_vec()]);
    assert!(!is_refused(&node, right).await, "the test's own way of connecting is wrong");
    assert!(node.echo.visitors.lock().unwrap().is_empty());
}

/// Takes any server, shows this certificate.
fn config(paths: Option<&Paths>, protocols: Vec<Vec<u8>>) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(&pki::call_stranger().unwrap());
    config.alpn_protocols = protocols;
    if let Some(paths) = paths {
        let chain = vec![CertificateDer::from_pem_file(&paths.certificate).unwrap()];
        let key = PrivateKeyDer::from_pem_file(&paths.key).unwrap();
        let provider = rustls::crypto::ring::default_provider();
        let certified = CertifiedKey::from_der(chain, key, &provider).unwrap();
        config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certified));
    }
    Arc::new(config)
}

/// Whether the node hangs up instead of speaking HTTP/2. It speaks first, once it is content.
async fn is_refused(node: &Node, config: Arc<ClientConfig>) -> bool {
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = TcpStream::connect(node.address).await.unwrap();
    let Ok(mut stream) = TlsConnector::from(config).connect(name, stream).await else {
        return true;
    };
    let read = tokio::time::timeout(SOON, stream.read(&mut [0; 16])).await;
    matches!(read.expect("it speaks or hangs up"), Ok(0) | Err(_))
}

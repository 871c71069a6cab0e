//! Sits between a server and one that wants to join, with everything an attacker on the network has: an authority of its own, the
//! real server's door, and time.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use k3s_server::env::host;
use k3s_server::join::pake;
use k3s_server::join::{AuthorityHash, Token};
use k3s_server::metrics::{Metrics, Versions};
use k3s_server::peers;
use k3s_server::pki::{self, ChannelBinding, Names, Owner, Pki, Port};
use k3s_server::proto::node::join_client::JoinClient;
use k3s_server::proto::node::join_server::{Join, JoinServer};
use k3s_server::proto::node::{
    BeginReply, BeginRequest, FinishReply, FinishRequest, IntroduceReply, IntroduceRequest,
};
use k3s_server::server::listen::{Listeners, PeerDoors, Security};
use k3s_server::types::{ClusterId, NodeId};
use prost::Message;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ruse {
    /// Listens.
    Wiretap,
    /// Speaks TLS to both and hands on what they say, every byte.
    Relay,
    /// Introduces itself with its own authority and tries a password of its own.
    Guess,
    /// Introduces itself with its own authority and hands the exchange on, message by message.
    RelayExchange,
}

/// See the module documentation. Dropped, it is gone.
pub struct Middle {
    captured: Arc<Mutex<Vec<u8>>>,
    tasks: Vec<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Middle {
    /// Stands at this address, in the way to the server's.
    pub async fn start(ruse: Ruse, at: Ipv4Addr, server: String, cluster: ClusterId) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let env = host::env();
        let owner = Owner { cluster, node: NodeId::new(0xbad) };
        let pki = Pki::establish(&env, dir.path(), owner, &Names::loopback()).await.unwrap().0;
        let captured = Arc::new(Mutex::new(Vec::new()));
        let address = SocketAddr::new(IpAddr::V4(at), 2380);
        let task = match ruse {
            Ruse::Wiretap | Ruse::Relay => {
                let listener = TcpListener::bind(address).await.unwrap();
                let tls = (ruse == Ruse::Relay).then(|| pki.accept(Port::Join).unwrap());
                tokio::spawn(between(listener, tls, server, Arc::clone(&captured)))
            }
            Ruse::Guess | Ruse::RelayExchange => {
                let actor = Actor { ruse, pki: pki.clone(), server, captured: captured.clone() };
                let actor = Routes::new(JoinServer::new(actor));
                let listeners =
                    Listeners::bind(&[address], Security::ClosedUntilTls, "the middle").await;
                let versions = Versions { server: "", cluster: "", daemon: "" };
                let metrics = Metrics::new(versions, std::time::SystemTime::UNIX_EPOCH);
                let doors = PeerDoors {
                    nodes: pki.accept(Port::Peers).unwrap(),
                    newcomers: pki.accept(Port::Join).unwrap(),
                };
                let incoming = listeners.unwrap().accept_peers(doors, metrics.connections);
                tokio::spawn(async move {
                    let _nodes = incoming.nodes;
                    let served =
                        peers::serve_join(actor, incoming.newcomers, std::future::pending());
                    served.await.unwrap();
                })
            }
        };
        Self { captured, tasks: vec![task], _dir: dir }
    }

    /// Everything that it has seen, both ways, as plainly as it could.
    pub fn captured(&self) -> Vec<u8> {
        self.captured.lock().unwrap().clone()
    }
}

/// Passes on what comes, and keeps it.
async fn between(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    server: String,
    captured: Arc<Mutex<Vec<u8>>>,
) {
    loop {
        let (joiner, _) = listener.accept().await.unwrap();
        let (tls, server, captured) = (tls.clone(), server.clone(), captured.clone());
        tokio::spawn(async move {
            let onward = TcpStream::connect(&server).await?;
            match tls {
                None => pass(joiner, onward, captured).await,
                Some(tls) => {
                    let joiner = TlsAcceptor::from(tls).accept(joiner).await?;
                    let name = ServerName::try_from("127.0.0.1").unwrap();
                    let connector = TlsConnector::from(pki::call_stranger().unwrap());
                    pass(joiner, connector.connect(name, onward).await?, captured).await
                }
            }
        });
    }
}

async fn pass(
    joiner: impl AsyncRead + AsyncWrite,
    server: impl AsyncRead + AsyncWrite,
    captured: Arc<Mutex<Vec<u8>>>,
) -> io::Result<()> {
    let (joiner_says, joiner_hears) = tokio::io::split(joiner);
    let (server_says, server_hears) = tokio::io::split(server);
    let one = copy(joiner_says, server_hears, &captured);
    let other = copy(server_says, joiner_hears, &captured);
    tokio::select! {
        ended = one => ended,
        ended = other => ended,
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    captured: &Mutex<Vec<u8>>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        captured.lock().unwrap().extend(&buffer[..count]);
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
    }
}

/// The server's part, played by somebody else.
struct Actor {
    ruse: Ruse,
    pki: Pki,
    server: String,
    captured: Arc<Mutex<Vec<u8>>>,
}

/// Where an exchange is, between two calls; the name of the session is its place in [`PLAYS`].
enum Play {
    Guessing(pake::Session),
    Relaying(JoinClient<Channel>, Bytes),
}

static PLAYS: Mutex<Vec<Option<Play>>> = Mutex::new(Vec::new());

impl Actor {
    fn saw(&self, message: &impl Message) {
        self.captured.lock().unwrap().extend(message.encode_to_vec());
    }

    fn put(play: Play) -> Bytes {
        let mut plays = PLAYS.lock().unwrap();
        plays.push(Some(play));
        Bytes::copy_from_slice(&(plays.len() - 1).to_be_bytes())
    }
}

#[tonic::async_trait]
impl Join for Actor {
    async fn introduce(
        &self,
        request: Request<IntroduceRequest>,
    ) -> Result<Response<IntroduceReply>, Status> {
        self.saw(request.get_ref());
        Ok(Response::new(IntroduceReply {
            authority_pem: self.pki.authority_pem().to_owned().into(),
            cluster: self.pki.identity(pki::Role::Peer).cluster.get(),
            wire_version_min: 1,
            wire_version_max: 1,
            release: "0.1.0".to_owned(),
        }))
    }

    async fn begin(&self, request: Request<BeginRequest>) -> Result<Response<BeginReply>, Status> {
        self.saw(request.get_ref());
        let caller = request.extensions().get::<pki::Caller>().cloned().unwrap();
        let exchange = request.into_inner().exchange;
        if self.ruse == Ruse::Guess {
            let context = pake::Context {
                authority: AuthorityHash::of(self.pki.authority_pem().as_bytes()),
                cluster: self.pki.identity(pki::Role::Peer).cluster,
                exporter: *caller.binding.unwrap().bytes(),
            };
            let guess = Token::parse("what-people-take-for-a-secret").unwrap().password;
            let (session, message) =
                pake::answer(&*host::env().entropy, &guess, &context, &exchange).unwrap();
            let session = Self::put(Play::Guessing(session));
            return Ok(Response::new(BeginReply { session, exchange: message }));
        }
        let mut client = Visit::from(Ipv4Addr::LOCALHOST, &self.server).await.unwrap().client;
        let begun = client.begin(BeginRequest { exchange }).await?.into_inner();
        self.saw(&begun);
        let session = Self::put(Play::Relaying(client, begun.session));
        Ok(Response::new(BeginReply { session, exchange: begun.exchange }))
    }

    async fn finish(
        &self,
        request: Request<FinishRequest>,
    ) -> Result<Response<FinishReply>, Status> {
        let request = request.into_inner();
        self.saw(&request);
        let place = usize::from_be_bytes(request.session[..].try_into().unwrap());
        let play = PLAYS.lock().unwrap()[place].take().unwrap();
        let confirmation = request.confirmation;
        match play {
            Play::Guessing(session) => {
                assert!(session.confirm(&confirmation).is_err(), "it guessed right");
                let (confirmation, sealed) = (vec![7; 32].into(), vec![7; 200].into());
                Ok(Response::new(FinishReply { confirmation, sealed }))
            }
            Play::Relaying(mut client, session) => {
                let answer = client.finish(FinishRequest { session, confirmation }).await;
                if let Ok(reply) = &answer {
                    self.saw(reply.get_ref());
                }
                answer
            }
        }
    }
}

/// Somebody at a server's door for newcomers.
pub struct Visit {
    pub client: JoinClient<Channel>,
    pub channel: Channel,
    pub binding: ChannelBinding,
}

impl Visit {
    /// From any address of loopback.
    pub async fn from(source: Ipv4Addr, server: &str) -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(IpAddr::V4(source), 0))?;
        let stream = socket.connect(server.parse().unwrap()).await?;
        stream.set_nodelay(true)?;
        let connector = TlsConnector::from(pki::call_stranger().unwrap());
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = connector.connect(name, stream).await?;
        let binding = ChannelBinding::of(stream.get_ref().1).map_err(io::Error::other)?;
        let once = Once(Some(TokioIo::new(stream)));
        let endpoint = Endpoint::from_static("http://server");
        let channel = endpoint.connect_with_connector(once).await.map_err(io::Error::other)?;
        Ok(Self { client: JoinClient::new(channel.clone()), channel, binding })
    }
}

/// Gives tonic a connection that is there already.
struct Once<S>(Option<S>);

impl<S> tonic::codegen::Service<http::Uri> for Once<S> {
    type Response = S;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<S>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        std::future::ready(self.0.take().ok_or_else(|| io::Error::other("used")))
    }
}

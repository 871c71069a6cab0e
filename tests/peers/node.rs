//! A node that only answers: real certificates, a real port, and an [`Answer`] that shows what arrived.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;
use k3s_server::env::{BoxFuture, Env, host};
use k3s_server::metrics::{Metrics, Versions};
use k3s_server::peers::{self, Gate, Passport, Peers, Standing, Visitor};
use k3s_server::pki::{Names, Owner, Pki, Port};
use k3s_server::raft::Member;
use k3s_server::raft::transport::{Answer, BoxStream, CallError, Method, Refused, StreamMethod};
use k3s_server::server::listen::{Listeners, PeerDoors, Security};
use k3s_server::types::{ClusterId, NodeId};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;

pub const CLUSTER: ClusterId = ClusterId::new(0xc1);

/// Long enough for a slow machine, short enough to fail a test.
pub const SOON: Duration = Duration::from_secs(20);

pub fn id(number: u64) -> NodeId {
    NodeId::new(number)
}

/// Where the cluster's files are, one directory per node.
pub struct Cluster {
    dir: tempfile::TempDir,
    pub env: Env,
}

impl Cluster {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), env: host::env() }
    }

    /// Certificates of a node; all nodes share the first one's authority.
    pub async fn pki(&self, number: u64) -> Pki {
        self.pki_at(&self.env, number).await
    }

    pub async fn pki_at(&self, env: &Env, number: u64) -> Pki {
        let authority = self.dir.path().join("authority");
        let tls = self.dir.path().join(number.to_string());
        if !authority.exists() {
            establish(env, &authority, 0xffff).await;
        }
        std::fs::create_dir_all(&tls).unwrap();
        for file in ["ca.crt", "ca.key"] {
            std::fs::copy(authority.join(file), tls.join(file)).unwrap();
        }
        establish(env, &tls, number).await
    }

    pub async fn node(&self, number: u64) -> Node {
        self.node_on(number, "127.0.0.1:0").await
    }

    pub async fn node_on(&self, number: u64, address: &str) -> Node {
        Node::start(self.pki(number).await, &self.env, address.parse().unwrap()).await
    }
}

async fn establish(env: &Env, tls: &Path, number: u64) -> Pki {
    let owner = Owner { cluster: CLUSTER, node: id(number) };
    Pki::establish(env, tls, owner, &Names::loopback()).await.unwrap().0
}

/// One that runs.
pub struct Node {
    pub id: NodeId,
    pub pki: Pki,
    pub peers: Peers,
    pub address: SocketAddr,
    pub echo: Arc<Echo>,
    pub standing: Arc<Mutex<Standing>>,
    pub metrics: Metrics,
    _stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Node {
    pub async fn start(pki: Pki, env: &Env, address: SocketAddr) -> Self {
        let passport = Passport::new(CLUSTER, 1, &*env.entropy);
        Self::start_as(pki, env, address, passport).await
    }

    pub async fn start_as(pki: Pki, env: &Env, address: SocketAddr, passport: Passport) -> Self {
        let id = pki.identity(k3s_server::pki::Role::Peer).node;
        let listeners = Listeners::bind(&[address], Security::ClosedUntilTls, "peers").await;
        let listeners = listeners.unwrap();
        let address = listeners.addresses().unwrap()[0];
        let member = member(id, &[address]);
        let peers = Peers::new(pki.clone(), passport, &member, Arc::clone(&env.entropy));
        let echo = Arc::new(Echo::default());
        let standing = Arc::new(Mutex::new(Standing::Member));
        let versions = Versions { server: "3.6.5", cluster: "3.6", daemon: "0.1.0" };
        let metrics = Metrics::new(versions, SystemTime::UNIX_EPOCH);
        let doors = PeerDoors {
            nodes: pki.accept(Port::Peers).unwrap(),
            newcomers: pki.accept(Port::Join).unwrap(),
        };
        let incoming = listeners.accept_peers(doors, metrics.connections.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let gate: Arc<dyn Gate> = {
            let standing = Arc::clone(&standing);
            let echo = Arc::clone(&echo);
            Arc::new(move |visitor: &Visitor| {
                echo.visitors.lock().unwrap().push(visitor.clone());
                standing.lock().unwrap().clone()
            })
        };
        let serving = {
            let (peers, answer) = (peers.clone(), Arc::clone(&echo) as Arc<dyn Answer>);
            tokio::spawn(async move {
                let stopped = async { drop(stopped.await) };
                let join = crate::doors::join_routes();
                let nodes = peers::serve(&peers, answer, gate, incoming.nodes, stopped);
                let newcomers = peers::serve_join(join, incoming.newcomers, std::future::pending());
                tokio::select! {
                    ended = nodes => ended.unwrap(),
                    ended = newcomers => ended.unwrap(),
                }
            })
        };
        Self { id, pki, peers, address, echo, standing, metrics, _stop: stop, serving }
    }

    /// As others have it on record.
    pub fn member(&self) -> Member {
        member(self.id, &[self.address])
    }

    /// As a power cut: nothing is said to anybody, and the port is free afterwards.
    pub async fn kill(self) -> Pki {
        // Connections are tasks of their own; they end with the leashes.
        for other in 0..100 {
            self.peers.forget(id(other));
        }
        self.serving.abort();
        drop(self.serving.await);
        self.pki
    }
}

pub fn member(id: NodeId, addresses: &[SocketAddr]) -> Member {
    Member {
        id,
        // Not a name that any resolver knows.
        name: String::new(),
        peer_urls: addresses.iter().map(|address| format!("https://{address}")).collect(),
        ..Member::default()
    }
}

/// Answers with what it got, and does a few other things when told to.
pub struct Echo {
    pub calls: Mutex<Vec<(NodeId, Method, Bytes)>>,
    pub visitors: Mutex<Vec<Visitor>>,
    /// Said to every call instead of an answer.
    pub refusal: Mutex<Option<Refused>>,
    /// [`HANG`] was asked for.
    pub waiting: Notify,
    /// Streams are read only while this is true.
    pub reads: watch::Sender<bool>,
    /// How each stream's requests ended, and how many bytes they were.
    pub ends: watch::Sender<Vec<(u64, Result<(), CallError>)>>,
    pub taken: watch::Sender<u64>,
}

impl Default for Echo {
    fn default() -> Self {
        Self {
            calls: Mutex::default(),
            visitors: Mutex::default(),
            refusal: Mutex::default(),
            waiting: Notify::new(),
            reads: watch::Sender::new(true),
            ends: watch::Sender::default(),
            taken: watch::Sender::default(),
        }
    }
}

impl Echo {
    /// Waits until a stream has ended.
    pub async fn ended(&self) -> (u64, Result<(), CallError>) {
        let mut ends = self.ends.subscribe();
        let ends = tokio::time::timeout(SOON, ends.wait_for(|ends| !ends.is_empty())).await;
        ends.expect("the stream ends").unwrap().last().unwrap().clone()
    }
}

/// Never answered; everything else is echoed.
pub const HANG: Method = Method::ReadIndex;

impl Answer for Echo {
    fn answer(
        &self,
        from: NodeId,
        method: Method,
        request: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refused>> {
        self.calls.lock().unwrap().push((from, method, request.clone()));
        let refusal = self.refusal.lock().unwrap().clone();
        if let Some(refusal) = refusal {
            return Box::pin(async move { Err(refusal) });
        }
        if method == HANG {
            self.waiting.notify_one();
            return Box::pin(std::future::pending());
        }
        Box::pin(async move { Ok(request) })
    }

    /// `Append`: each message comes back. `Snapshot`: one reply at the proper end.
    fn answer_stream(
        &self,
        _from: NodeId,
        method: StreamMethod,
        requests: BoxStream<Result<Bytes, CallError>>,
    ) -> BoxStream<Result<Bytes, Refused>> {
        let (ends, taken) = (self.ends.clone(), self.taken.clone());
        let state = (requests, self.reads.subscribe(), 0_u64, false);
        let replies = futures_util::stream::unfold(state, move |state| {
            let (ends, taken) = (ends.clone(), taken.clone());
            async move {
                let (mut requests, mut reads, mut bytes, over) = state;
                if over {
                    return None;
                }
                loop {
                    reads.wait_for(|reads| *reads).await.ok()?;
                    match requests.next().await {
                        Some(Ok(body)) => {
                            bytes += body.len() as u64;
                            taken.send_modify(|taken| *taken += body.len() as u64);
                            if method == StreamMethod::Append {
                                return Some((Ok(body), (requests, reads, bytes, false)));
                            }
                        }
                        Some(Err(error)) => {
                            ends.send_modify(|ends| ends.push((bytes, Err(error))));
                            return None;
                        }
                        None => {
                            ends.send_modify(|ends| ends.push((bytes, Ok(()))));
                            let reply = Bytes::from(bytes.to_string());
                            return Some((Ok(reply), (requests, reads, bytes, true)));
                        }
                    }
                }
            }
        });
        Box::pin(replies)
    }
}

//! Takes a server that has nothing but a token through the door of a cluster, and back with its credentials.
//!
//! # Shape
//!
//! [`enrol`] asks until a server answers or says something that asking again will not change. Nothing is written here: what
//! comes back is [`Enrolled`], whose critical flags are to be compared before [`super::adopt`] writes anything.
//!
//! # Invariants
//!
//! - If the token names an authority, its hash is compared before anything else is sent.
//! - The certificate that the other end has proved to own must be signed by that authority.
//! - What a server says after the exchange is read only if it has proved that it knows the password too.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::pake::{Context, Joiner, PakeError};
use super::token::{AuthorityHash, Token};
use crate::config::ServerUrl;
use crate::env::{BoxFuture, Env};
use crate::pki::{self, CertificateClock, ChannelBinding};
use crate::proto::node::join_client::JoinClient;
use crate::proto::node::{
    BeginReply, BeginRequest, Credentials, FinishReply, FinishRequest, IntroduceReply,
    IntroduceRequest, StoredMembership,
};
use crate::types::ClusterId;
use crate::versions;

/// How long one call may take. K3s gives its bootstrap 15 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// Between attempts: soon at first, then rarely enough not to disturb.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_LAST: Duration = Duration::from_secs(10);
/// Attempts between two lines of the journal that say the same.
const MENTION_EVERY: u32 = 6;
/// Largest message taken from a server: a membership with everybody's addresses is far smaller.
const MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// The calls of the Join service, over one connection.
pub trait JoinCalls: Send + Sync {
    /// `Introduce`.
    fn introduce(&self, request: IntroduceRequest) -> Call<'_, IntroduceReply>;
    /// `Begin`.
    fn begin(&self, request: BeginRequest) -> Call<'_, BeginReply>;
    /// `Finish`.
    fn finish(&self, request: FinishRequest) -> Call<'_, FinishReply>;
}

/// One call under way.
pub type Call<'a, T> = BoxFuture<'a, Result<T, Status>>;

impl JoinCalls for Channel {
    fn introduce(&self, request: IntroduceRequest) -> Call<'_, IntroduceReply> {
        let mut client = client(self);
        Box::pin(async move { client.introduce(request).await.map(tonic::Response::into_inner) })
    }

    fn begin(&self, request: BeginRequest) -> Call<'_, BeginReply> {
        let mut client = client(self);
        Box::pin(async move { client.begin(request).await.map(tonic::Response::into_inner) })
    }

    fn finish(&self, request: FinishRequest) -> Call<'_, FinishReply> {
        let mut client = client(self);
        Box::pin(async move { client.finish(request).await.map(tonic::Response::into_inner) })
    }
}

fn client(channel: &Channel) -> JoinClient<Channel> {
    JoinClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// A connection to somebody who may or may not be a member of the right cluster.
pub struct Stranger {
    /// Calls on this connection.
    pub calls: Box<dyn JoinCalls>,
    /// The certificates shown, the other end's own first. It has proved that it has that one's key, and nothing else.
    pub chain: Vec<CertificateDer<'static>>,
    /// What the other end knows too if nobody sits in between.
    pub binding: ChannelBinding,
}

/// Finds and connects to servers: `peers`, or a test's.
pub trait Dial: Send + Sync {
    /// The addresses of a host.
    fn resolve(&self, host: &str, port: u16) -> BoxFuture<'_, io::Result<Vec<SocketAddr>>>;
    /// Connects, whoever answers.
    fn connect(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Stranger>>;
}

/// What a server needs to become a member. Holds the authority's key: not to be printed.
#[derive(Clone)]
pub struct Enrolled {
    /// The cluster.
    pub cluster: ClusterId,
    /// `ca.crt`.
    pub authority_pem: Bytes,
    /// `ca.key`.
    pub(super) authority_key_pem: Bytes,
    /// The members, as the server that answered knows them.
    pub membership: StoredMembership,
    /// The critical flags as recorded (`critical::ClusterFlags::decode`); empty if none are.
    pub flags: Bytes,
    /// The token, with the authority's hash even if it was given without.
    pub(super) token: Token,
}

impl fmt::Debug for Enrolled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enrolled").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// Why a server is not let in.
#[derive(Debug, Error)]
pub enum JoinError {
    /// Nobody answers there, or not to the end.
    #[error("{server} cannot be reached: {found}")]
    Unreachable {
        /// The address in the configuration.
        server: String,
        /// What happened.
        found: String,
    },
    /// The server asks to come back later.
    #[error("{server} cannot let anybody in yet: {found}")]
    Later {
        /// The address in the configuration.
        server: String,
        /// What it said.
        found: String,
    },
    /// That is this server.
    #[error("`server` is this server itself: {address} is its own address")]
    OwnAddress {
        /// What it resolved to.
        address: SocketAddr,
    },
    /// The token names another authority; in K3s' words.
    #[error("token CA hash does not match the Cluster CA certificate hash: {token} != {found}")]
    HashMismatch {
        /// In the token.
        token: AuthorityHash,
        /// Of what the server presented.
        found: AuthorityHash,
    },
    /// Certificate and authority do not belong together.
    #[error("{server} is not what it says: its certificate is not one of its authority's: {found}")]
    Impostor {
        /// The address in the configuration.
        server: String,
        /// What is wrong.
        found: String,
    },
    /// The password is not the cluster's.
    #[error("{server} refuses the token: its password is not the one of this cluster")]
    WrongPassword {
        /// The address in the configuration.
        server: String,
    },
    /// The other end does not know the password either.
    #[error("{server} has not proved that it knows the token's password; nothing was sent to it")]
    NotConfirmed {
        /// The address in the configuration.
        server: String,
    },
    /// No common version.
    #[error("{server} runs a release that does not work with this one ({}): {found}", versions::own().name)]
    Incompatible {
        /// The address in the configuration.
        server: String,
        /// What it said.
        found: String,
    },
    /// It speaks our protocol and says nonsense.
    #[error("{server} answers what this release does not understand: {found}")]
    Nonsense {
        /// The address in the configuration.
        server: String,
        /// What.
        found: String,
    },
}

impl JoinError {
    /// Whether asking again may help without anybody changing anything.
    pub const fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Later { .. })
    }

    /// What the operator can do.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => {
                "check that k3s-server runs there and that port 2380 is open between the servers"
            }
            Self::Later { .. } => {
                "wait; if it lasts, see `journalctl -u k3s-server` on that server"
            }
            Self::OwnAddress { .. } => {
                "set `server` to another server of the cluster, or use `cluster-init: true` on the server that founds it"
            }
            Self::HashMismatch { .. } | Self::Impostor { .. } => {
                "check that `server` names a server of the cluster that the token is from; if it does, somebody may be in between: compare the token with the file `token` on that server"
            }
            Self::WrongPassword { .. } | Self::NotConfirmed { .. } => {
                "copy the whole line from the file `token` in the data directory of a server of the cluster"
            }
            Self::Incompatible { .. } | Self::Nonsense { .. } => {
                "install the release that the cluster runs, join, and then upgrade all servers one after the other"
            }
        }
    }
}

/// Whether an address is one on which this server listens itself. An unspecified one stands for every address in `local`.
pub fn is_own(address: SocketAddr, listens: &[SocketAddr], local: &[std::net::IpAddr]) -> bool {
    listens.iter().any(|own| {
        let same_host = own.ip() == address.ip()
            || own.ip().is_unspecified()
                && (local.contains(&address.ip()) || address.ip().is_loopback());
        same_host && own.port() == address.port()
    })
}

/// How a server asks to be let in.
pub struct Enrolment {
    /// The world.
    pub env: Env,
    /// How servers are reached.
    pub dial: Arc<dyn Dial>,
    /// Whom to ask.
    pub server: ServerUrl,
    /// The secret, and perhaps the authority's hash.
    pub token: Token,
    /// Whether an address is this server's own: see [`is_own`].
    pub is_own: Box<dyn Fn(SocketAddr) -> bool + Send + Sync>,
}

impl Enrolment {
    /// Asks until a server lets us in or says something final. Progress and the reasons to wait go to the journal.
    pub async fn run(&self) -> Result<Enrolled, JoinError> {
        let mut pause = PAUSE_FIRST;
        let mut attempts = 0u32;
        loop {
            let error = match self.attempt().await {
                Ok(enrolled) => return Ok(enrolled),
                Err(error) => error,
            };
            if !error.may_pass() {
                return Err(error);
            }
            if attempts.is_multiple_of(MENTION_EVERY) {
                tracing::info!("waiting to join: {error}; {}", error.remedy());
            }
            attempts = attempts.saturating_add(1);
            self.env.clock.sleep(pause).await;
            pause = (pause * 2).min(PAUSE_LAST);
        }
    }

    /// Asks every address of the server once, until one lets us in.
    pub async fn attempt(&self) -> Result<Enrolled, JoinError> {
        let (host, port) = (self.server.host(), self.server.join_port());
        let addresses = self.limited(self.dial.resolve(host, port)).await;
        let addresses = addresses.map_err(|found| self.unreachable(found))?;
        if let Some(address) = addresses.iter().copied().find(|address| (self.is_own)(*address)) {
            return Err(JoinError::OwnAddress { address });
        }
        let mut last = self.unreachable("the name has no address".to_owned());
        for address in addresses {
            let stranger = self.limited(self.dial.connect(address)).await;
            last = match stranger {
                Ok(stranger) => match self.ask(&stranger).await {
                    Ok(enrolled) => return Ok(enrolled),
                    Err(error) if error.may_pass() => error,
                    Err(error) => return Err(error),
                },
                Err(found) => self.unreachable(format!("{address}: {found}")),
            };
        }
        Err(last)
    }

    fn server(&self) -> String {
        self.server.to_string()
    }

    fn unreachable(&self, found: String) -> JoinError {
        JoinError::Unreachable { server: self.server(), found }
    }

    async fn limited<T, E: fmt::Display>(
        &self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, String> {
        tokio::select! {
            result = call => result.map_err(|error| error.to_string()),
            () = self.env.clock.sleep(CALL_TIMEOUT) => Err("no answer in time".to_owned()),
        }
    }

    async fn call<T>(&self, call: Call<'_, T>) -> Result<T, JoinError> {
        let answer = tokio::select! {
            answer = call => answer,
            () = self.env.clock.sleep(CALL_TIMEOUT) => {
                return Err(self.unreachable("no answer in time".to_owned()));
            }
        };
        answer.map_err(|status| self.refusal(&status))
    }

    /// What a status of the Join service means: see `door`.
    fn refusal(&self, status: &Status) -> JoinError {
        let (server, found) = (self.server(), status.message().to_owned());
        match status.code() {
            Code::PermissionDenied => JoinError::WrongPassword { server },
            Code::FailedPrecondition => JoinError::Incompatible { server, found },
            Code::InvalidArgument | Code::Unimplemented | Code::Unauthenticated => {
                JoinError::Nonsense { server, found }
            }
            // Also from tonic itself, when the connection ends.
            Code::ResourceExhausted | Code::NotFound | Code::Unavailable => {
                JoinError::Later { server, found }
            }
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::AlreadyExists
            | Code::Aborted
            | Code::OutOfRange
            | Code::Internal
            | Code::DataLoss => self.unreachable(found),
        }
    }

    /// The whole conversation.
    async fn ask(&self, stranger: &Stranger) -> Result<Enrolled, JoinError> {
        let introduced = self.introduce(stranger).await?;
        let context = Context {
            authority: introduced.hash,
            cluster: introduced.cluster,
            exporter: *stranger.binding.bytes(),
        };
        let credentials = self.exchange(stranger, context).await?;
        self.enrolled(&introduced, credentials)
    }

    /// Who the other end says it is, as far as that can be checked.
    async fn introduce(&self, stranger: &Stranger) -> Result<Introduced, JoinError> {
        let request = IntroduceRequest {
            wire_version_min: *versions::own().wire.start(),
            wire_version_max: *versions::own().wire.end(),
            release: versions::own().name.to_owned(),
            format: versions::own().format,
        };
        let reply = self.call(stranger.calls.introduce(request)).await?;
        let hash = AuthorityHash::of(&reply.authority_pem);
        match self.token.authority {
            Some(token) if token != hash => {
                return Err(JoinError::HashMismatch { token, found: hash });
            }
            Some(_) => {}
            None => tracing::warn!(
                "Cluster CA certificate is not trusted by the host CA bundle, but the token does not include a CA hash. \
                 Use the full token from the server's token file to enable Cluster CA validation. \
                 The certificate presented has the hash {hash}"
            ),
        }
        let clock = CertificateClock::new(Arc::clone(&self.env.clock));
        let impostor = |found: String| JoinError::Impostor { server: self.server(), found };
        let identity = pki::introduced(&stranger.chain, &reply.authority_pem, &clock)
            .map_err(|error| impostor(error.to_string()))?;
        if identity.cluster.get() != reply.cluster {
            let found =
                format!("it names cluster {:x}, expected {}", reply.cluster, identity.cluster);
            return Err(impostor(found));
        }
        let theirs = reply.wire_version_min..=reply.wire_version_max;
        let ours = &versions::own().wire;
        if versions::common(ours, &theirs).is_none() {
            let (theirs, ours) = (versions::in_words(&theirs), versions::in_words(ours));
            let found = format!("release {} speaks {theirs}, this one {ours}", reply.release);
            return Err(JoinError::Incompatible { server: self.server(), found });
        }
        Ok(Introduced { hash, cluster: identity.cluster, authority_pem: reply.authority_pem })
    }

    /// Both sides prove that they know the password; then the server's credentials are opened.
    async fn exchange(
        &self,
        stranger: &Stranger,
        context: Context,
    ) -> Result<Credentials, JoinError> {
        let nonsense = |found: String| JoinError::Nonsense { server: self.server(), found };
        let entropy = &*self.env.entropy;
        let (joiner, exchange) = Joiner::begin(entropy, &self.token.password, context);
        let begun = self.call(stranger.calls.begin(BeginRequest { exchange })).await?;
        let (expecting, confirmation) =
            joiner.finish(&begun.exchange).map_err(|error| nonsense(error.to_string()))?;
        let request = FinishRequest { session: begun.session, confirmation };
        let finished = self.call(stranger.calls.finish(request)).await?;
        let failed = |error: PakeError| match error {
            PakeError::NotConfirmed => JoinError::NotConfirmed { server: self.server() },
            PakeError::Malformed | PakeError::NotOpened => nonsense(error.to_string()),
        };
        let confirmed = expecting.confirm(&finished.confirmation).map_err(failed)?;
        let opened = confirmed.open(&finished.sealed).map_err(failed)?;
        Credentials::decode(opened.as_slice()).map_err(|error| nonsense(error.to_string()))
    }

    fn enrolled(
        &self,
        introduced: &Introduced,
        credentials: Credentials,
    ) -> Result<Enrolled, JoinError> {
        let nonsense =
            |found: &str| JoinError::Nonsense { server: self.server(), found: found.to_owned() };
        if credentials.authority_pem != introduced.authority_pem
            || credentials.cluster != introduced.cluster.get()
        {
            return Err(nonsense("credentials of another cluster than it introduced"));
        }
        let membership =
            credentials.membership.ok_or_else(|| nonsense("credentials without members"))?;
        Ok(Enrolled {
            cluster: introduced.cluster,
            authority_pem: credentials.authority_pem,
            authority_key_pem: credentials.authority_key_pem,
            membership,
            flags: credentials.flags,
            token: Token::full(introduced.hash, self.token.password.clone()),
        })
    }
}

/// The other end, as checked before anything secret happens.
struct Introduced {
    hash: AuthorityHash,
    cluster: ClusterId,
    authority_pem: Bytes,
}

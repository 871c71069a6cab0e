//! Answers at the door: the Join service, which any member offers to whoever has nothing but the token.
//!
//! # Shape
//!
//! [`Door`] implements the service. What happened on the connection (its exporter, the caller's address) is in each request's
//! [`Caller`]; what is given away in the end comes from [`Grant`].
//!
//! # Invariants
//!
//! - Until the joiner has proved that it knows the password it gets nothing but what is public: the authority's certificate, the
//!   cluster's id, version numbers.
//! - A request that is refused for its rate or its form costs no arithmetic on the curve and no memory that stays.
//! - The journal gets at most one line a second, with the caller's address, whatever callers do.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use thiserror::Error;
use tonic::{Code, Request, Response, Status};

use super::gate::{Gate, Mentions, SessionId, TooMany};
use super::pake::{self, Context, MESSAGE_BYTES, PakeError, Session};
use super::token::{AuthorityHash, Password};
use crate::announce;
use crate::env::Env;
use crate::events::EventId;
use crate::pki::{Caller, ChannelBinding};
use crate::proto::node::join_server::{Join, JoinServer};
use crate::proto::node::{
    BeginReply, BeginRequest, Credentials, FinishReply, FinishRequest, IntroduceReply,
    IntroduceRequest,
};
use crate::types::ClusterId;
use crate::versions;

/// Longest request. An honest one has about a hundred bytes.
const REQUEST_BYTES_MAX: usize = 4 * 1024;

/// What a server gives to a node that has proved that it knows the token.
pub trait Grant: Send + Sync + 'static {
    /// As of now. The error says why this server cannot answer yet; the joiner asks again.
    fn credentials(&self) -> Result<Credentials, String>;

    /// The cluster's format, which a joiner must read.
    fn format(&self) -> u32 {
        versions::FORMAT_FIRST
    }
}

/// What everybody may know, and the secret to compare with.
#[derive(Clone, Debug)]
pub struct House {
    /// The cluster.
    pub cluster: ClusterId,
    /// `ca.crt`, byte for byte.
    pub authority_pem: Bytes,
    /// The token's.
    pub password: Password,
}

/// Why a joiner does not get further. The texts cross the wire, so they say nothing that a stranger may not know.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum JoinRefused {
    /// Too many attempts; the joiner waits and tries again.
    #[error("too many attempts to join, try again in {} ms", wait.as_millis())]
    Busy {
        /// When it may succeed.
        wait: Duration,
    },
    /// Not a message of this protocol.
    #[error("malformed request: {0}")]
    Malformed(String),
    /// The exchange was not begun here, or has ended; the joiner begins again.
    #[error("no such exchange, or it took too long")]
    UnknownSession,
    /// The token's password is another one.
    #[error("the token's password is not the one of this cluster")]
    WrongPassword,
    /// The versions have nothing in common.
    #[error("incompatible: {0}")]
    Incompatible(String),
    /// The server is not far enough itself.
    #[error("not ready: {0}")]
    NotReady(String),
}

impl From<JoinRefused> for Status {
    fn from(refused: JoinRefused) -> Self {
        let code = match &refused {
            JoinRefused::Busy { .. } => Code::ResourceExhausted,
            JoinRefused::Malformed(_) => Code::InvalidArgument,
            JoinRefused::UnknownSession => Code::NotFound,
            JoinRefused::WrongPassword => Code::PermissionDenied,
            JoinRefused::Incompatible(_) => Code::FailedPrecondition,
            JoinRefused::NotReady(_) => Code::Unavailable,
        };
        Self::new(code, refused.to_string())
    }
}

/// The service. See the module documentation.
pub struct Door {
    env: Env,
    house: House,
    authority: AuthorityHash,
    grant: Arc<dyn Grant>,
    state: Mutex<State>,
}

struct State {
    gate: Gate<Session>,
    mentions: Mentions,
}

impl Door {
    /// Opens when it is served.
    pub fn new(env: &Env, house: House, grant: Arc<dyn Grant>) -> Self {
        let state = State { gate: Gate::new(env.clock.now()), mentions: Mentions::default() };
        let authority = AuthorityHash::of(&house.authority_pem);
        Self { env: env.clone(), house, authority, grant, state: Mutex::new(state) }
    }

    /// As a gRPC service, which decodes nothing that is longer than any honest request.
    pub fn service(self: &Arc<Self>) -> JoinServer<Self> {
        JoinServer::from_arc(Arc::clone(self)).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn context(&self, binding: &ChannelBinding) -> Context {
        let (authority, cluster) = (self.authority, self.house.cluster);
        Context { authority, cluster, exporter: *binding.bytes() }
    }

    fn introduction(&self, request: &IntroduceRequest) -> Result<IntroduceReply, JoinRefused> {
        let own = versions::own();
        let theirs = request.wire_version_min..=request.wire_version_max;
        // A name from a stranger, for people: short, and nothing but letters and digits.
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || ".-".contains(*c);
        let name: String = request.release.chars().filter(is_plain).take(32).collect();
        if versions::common(&own.wire, &theirs).is_none() {
            return Err(JoinRefused::Incompatible(format!(
                "release {} of this server speaks {}, release {name} of the joiner {}",
                own.name,
                versions::in_words(&own.wire),
                versions::in_words(&theirs)
            )));
        }
        let (cluster, reads) = (self.grant.format(), versions::announced(request.format));
        if reads < cluster {
            return Err(JoinRefused::Incompatible(format!(
                "the cluster's data is in format {cluster}, release {name} of the joiner reads up to {reads}"
            )));
        }
        Ok(IntroduceReply {
            authority_pem: self.house.authority_pem.clone(),
            cluster: self.house.cluster.get(),
            wire_version_min: *own.wire.start(),
            wire_version_max: *own.wire.end(),
            release: versions::own().name.to_owned(),
        })
    }

    fn exchange(
        &self,
        caller: &Visitor,
        request: &BeginRequest,
    ) -> Result<BeginReply, JoinRefused> {
        if request.exchange.len() != MESSAGE_BYTES {
            return Err(self.note(caller, malformed(&PakeError::Malformed)));
        }
        let admitted = self.state().gate.admit(self.env.clock.now(), caller.address);
        let admitted =
            admitted.map_err(|TooMany { wait }| self.note(caller, JoinRefused::Busy { wait }))?;
        let entropy = &*self.env.entropy;
        let context = self.context(&caller.binding);
        let (session, message) =
            pake::answer(entropy, &self.house.password, &context, &request.exchange)
                .map_err(|error| self.note(caller, malformed(&error)))?;
        let mut id: SessionId = [0; 16];
        entropy.fill(&mut id);
        self.state().gate.open(self.env.clock.now(), admitted, id, session);
        Ok(BeginReply { session: Bytes::copy_from_slice(&id), exchange: message })
    }

    fn conclusion(
        &self,
        caller: &Visitor,
        request: &FinishRequest,
    ) -> Result<FinishReply, JoinRefused> {
        let now = self.env.clock.now();
        let session = self.state().gate.take(now, caller.address, &request.session);
        let session = session.ok_or_else(|| self.note(caller, JoinRefused::UnknownSession))?;
        let (confirmed, confirmation) = session
            .confirm(&request.confirmation)
            .map_err(|_| self.note(caller, JoinRefused::WrongPassword))?;
        self.state().gate.forgive(caller.address);
        let credentials = self.grant.credentials().map_err(JoinRefused::NotReady)?;
        let sealed = confirmed
            .seal(&credentials.encode_to_vec())
            .map_err(|error| JoinRefused::NotReady(error.to_string()))?;
        tracing::info!("gave the cluster's credentials to a server at {}", caller.address);
        Ok(FinishReply { confirmation, sealed })
    }

    /// Tells the journal of a refusal, not too often.
    fn note(&self, caller: &Visitor, refused: JoinRefused) -> JoinRefused {
        let mention = self.state().mentions.mention(self.env.clock.now());
        if let Some(left_out) = mention {
            let more = if left_out == 0 {
                String::new()
            } else {
                format!(" ({left_out} more refusals since the last such line)")
            };
            announce!(
                EventId::JoinRefused,
                "refused an attempt to join from {}: {refused}{more}",
                caller.address
            );
        }
        refused
    }
}

fn malformed(error: &PakeError) -> JoinRefused {
    JoinRefused::Malformed(error.to_string())
}

/// Who calls, over which connection.
struct Visitor {
    address: IpAddr,
    binding: ChannelBinding,
}

fn visitor<T>(request: &Request<T>) -> Result<Visitor, Status> {
    let caller = request.extensions().get::<Caller>();
    let visitor = caller
        .and_then(|caller| Some(Visitor { address: caller.remote.ip(), binding: caller.binding? }));
    visitor.ok_or_else(|| Status::unauthenticated("the connection is not one for joining"))
}

#[tonic::async_trait]
impl Join for Door {
    async fn introduce(
        &self,
        request: Request<IntroduceRequest>,
    ) -> Result<Response<IntroduceReply>, Status> {
        let introduced = self.introduction(request.get_ref());
        if let (Err(refused), Ok(visitor)) = (&introduced, visitor(&request)) {
            self.note(&visitor, refused.clone());
        }
        Ok(Response::new(introduced?))
    }

    async fn begin(&self, request: Request<BeginRequest>) -> Result<Response<BeginReply>, Status> {
        let visitor = visitor(&request)?;
        Ok(Response::new(self.exchange(&visitor, request.get_ref())?))
    }

    async fn finish(
        &self,
        request: Request<FinishRequest>,
    ) -> Result<Response<FinishReply>, Status> {
        let visitor = visitor(&request)?;
        Ok(Response::new(self.conclusion(&visitor, request.get_ref())?))
    }
}

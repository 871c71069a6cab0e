//! What a connection has proved about its two ends.

use std::fmt;
use std::net::SocketAddr;

use rustls::{ConnectionCommon, Error};

use super::Identity;

/// What both ends of one TLS connection know and nobody else can: from RFC 8446's exporter.
const BINDING_LABEL: &[u8] = b"EXPORTER-k3s-server-join";

/// Equal at both ends of one TLS connection, different for every other connection. Whoever sits in between and speaks
/// TLS to both ends has two different ones.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ChannelBinding([u8; 32]);

impl ChannelBinding {
    /// The value of this connection, whose handshake has ended.
    pub fn of<Data>(connection: &ConnectionCommon<Data>) -> Result<Self, Error> {
        connection.export_keying_material([0; 32], BINDING_LABEL, None).map(Self)
    }

    /// The bytes to mix into whatever is to be bound.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Not secret, but of no use to a reader.
impl fmt::Debug for ChannelBinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChannelBinding")
    }
}

/// Who is at the other end of a connection to us; tonic puts it into each request's extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The caller's address.
    pub remote: SocketAddr,
    /// The address it called.
    pub local: SocketAddr,
    /// The owner of its certificate; `None` if it showed none, which only some ports allow.
    pub identity: Option<Identity>,
    /// On a connection for joining, what binds a proof to this connection.
    pub binding: Option<ChannelBinding>,
}

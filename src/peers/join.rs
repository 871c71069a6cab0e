//! The connection of a node that has nothing but a token, both ends of it.
//!
//! On port 2380, but asked for by name (ALPN `k3s-join`): no client certificate, one service, tight bounds.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tonic::transport::Channel;

use super::dial;
use crate::pki::{self, ChannelBinding};

/// Largest message of the join service, either way. The service sets it where it decodes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// A server has this long to answer the telephone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to somebody who may or may not be a member of the right cluster.
#[derive(Debug)]
pub struct JoinConnection {
    /// Calls on this connection. It never reconnects: afterwards all calls fail.
    pub channel: Channel,
    /// The certificates shown, the node's own first. Proven is only that the other end has the first one's key: see
    /// [`pki::introduced`].
    pub chain: Vec<CertificateDer<'static>>,
    /// What the other end knows too if nobody sits in between.
    pub binding: ChannelBinding,
}

/// Connects to the join service at `address`, whoever answers.
pub async fn connect(address: SocketAddr) -> io::Result<JoinConnection> {
    let connecting = async {
        let config = pki::call_stranger().map_err(io::Error::other)?;
        let stream = dial::tls(address, config).await?;
        let connection = stream.get_ref().1;
        if connection.alpn_protocol() != Some(pki::ALPN_JOIN) {
            return Err(io::Error::other("what answers does not know how to let others join"));
        }
        let chain = connection.peer_certificates().unwrap_or_default();
        let chain = chain.iter().map(|one| one.clone().into_owned()).collect();
        let binding = ChannelBinding::of(connection).map_err(io::Error::other)?;
        let channel = dial::http2(stream).await.map_err(io::Error::other)?;
        Ok(JoinConnection { channel, chain, binding })
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

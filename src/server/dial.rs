//! Finds and connects to servers that this one wants to join: what `peers` does, in the words of `join`.

use std::io;
use std::net::SocketAddr;

use crate::env::BoxFuture;
use crate::join::enrol::{Dial, Stranger};
use crate::peers;

/// The network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Network;

impl Dial for Network {
    fn resolve(&self, host: &str, port: u16) -> BoxFuture<'_, io::Result<Vec<SocketAddr>>> {
        let host = host.to_owned();
        Box::pin(async move { Ok(tokio::net::lookup_host((host.as_str(), port)).await?.collect()) })
    }

    fn connect(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Stranger>> {
        Box::pin(async move {
            let peers::join::JoinConnection { channel, chain, binding } =
                peers::join::connect(address).await?;
            Ok(Stranger { calls: Box::new(channel), chain, binding })
        })
    }
}

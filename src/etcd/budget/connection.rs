//! Watches what a connection is written, and ends it when it stands in the way of others.
//!
//! A client that leaves its answers alone keeps their room. It may: it has only its own share. But when others wait, and
//! nothing of note was written to it for a while, it loses the connection. Its answers go with it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use super::Account;
use crate::env::Clock;
use crate::etcd::intake::Lane;

/// Less than this at a time is no answer but an acknowledgement of a ping, or the reply to a put.
const NOTABLE_BYTES: usize = 4 << 10;

/// What is known of a connection's life.
pub(super) struct Activity {
    clock: Arc<dyn Clock>,
    opened: Instant,
    /// Milliseconds after `opened`.
    last: AtomicU64,
    ended: AtomicBool,
    /// The connection's task.
    task: AtomicWaker,
}

impl Activity {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            opened: clock.now(),
            clock,
            last: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            task: AtomicWaker::new(),
        }
    }

    /// Something happened that was worth waiting for.
    pub(super) fn touch(&self) {
        let since = self.clock.now().saturating_duration_since(self.opened);
        self.last.fetch_max(u64::try_from(since.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// How long nothing happened.
    pub(super) fn idle(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Relaxed));
        self.clock.now().saturating_duration_since(self.opened).saturating_sub(last)
    }

    /// Ends the connection; `false` if that was done before.
    pub(super) fn end(&self) -> bool {
        let first = !self.ended.swap(true, Relaxed);
        self.task.wake();
        first
    }

    fn check(&self, cx: &Context<'_>) -> io::Result<()> {
        self.task.register(cx.waker());
        if self.ended.load(Relaxed) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "ended by the server"));
        }
        Ok(())
    }
}

/// A connection with its account. Requests find a [`Payer`] in their extensions.
pub(in crate::etcd) struct Observed<IO> {
    io: IO,
    account: Account,
    lane: Lane,
}

impl<IO> Observed<IO> {
    pub(in crate::etcd) const fn new(io: IO, account: Account, lane: Lane) -> Self {
        Self { io, account, lane }
    }

    fn wrote(&self, result: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(bytes)) = result
            && NOTABLE_BYTES <= *bytes
        {
            self.account.0.activity.touch();
        }
    }
}

/// Whose account a request goes to, and what its connection says of itself besides.
#[derive(Clone, Debug)]
pub(in crate::etcd) struct Payer<Info> {
    pub(in crate::etcd) account: Account,
    pub(in crate::etcd) lane: Lane,
    pub(in crate::etcd) info: Info,
}

impl<IO: Connected> Connected for Observed<IO> {
    type ConnectInfo = Payer<IO::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        let (account, lane) = (self.account.clone(), self.lane.clone());
        Payer { account, lane, info: self.io.connect_info() }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Observed<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A connection's task always waits to read, whatever else it does.
        self.account.0.activity.check(cx)?;
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Observed<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.wrote(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.wrote(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

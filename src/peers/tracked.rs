//! A byte stream that knows whether somebody still wants it: to cut connections that others hold.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tonic::transport::server::Connected;

/// A stream on a leash.
#[derive(Debug)]
pub(super) struct Tracked<S> {
    io: S,
    cut: oneshot::Receiver<Infallible>,
    was_cut: bool,
    ended: Arc<AtomicBool>,
}

/// Dropping it cuts the stream, whoever holds that.
#[derive(Debug)]
#[must_use = "the connection is cut when this is dropped"]
pub(super) struct Leash {
    _cut: oneshot::Sender<Infallible>,
    ended: Arc<AtomicBool>,
}

impl Leash {
    /// Whether the stream was closed.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Relaxed)
    }
}

impl<S> Tracked<S> {
    pub(super) fn new(io: S) -> (Self, Leash) {
        let (sender, cut) = oneshot::channel();
        let ended = Arc::new(AtomicBool::new(false));
        let leash = Leash { _cut: sender, ended: Arc::clone(&ended) };
        (Self { io, cut, was_cut: false, ended }, leash)
    }

    /// An error from when the leash is dropped; the waker is kept until then.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        self.was_cut = self.was_cut || Pin::new(&mut self.cut).poll(cx).is_ready();
        if self.was_cut {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was cut"));
        }
        Ok(())
    }
}

impl<S> Drop for Tracked<S> {
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tracked<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tracked<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.was_cut {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.was_cut {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
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

impl<S: Connected> Connected for Tracked<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.io.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn dropping_the_leash_cuts_a_stream_that_waits_for_bytes() {
        let (near, mut far) = tokio::io::duplex(64);
        let (mut tracked, leash) = Tracked::new(near);
        far.write_all(b"x").await.unwrap();
        assert_eq!(tracked.read_u8().await.unwrap(), b'x');
        let reading = tokio::spawn(async move { tracked.read_u8().await });
        tokio::task::yield_now().await;
        assert!(!leash.has_ended());

        let ended = Arc::clone(&leash.ended);
        drop(leash);
        let error = reading.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(ended.load(Relaxed));
    }
}

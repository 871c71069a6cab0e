//! HTTP/2 frame by frame, for what no library lets one send.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::client::{self, Stream};
use crate::support::Endpoint;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// A write that takes longer is one that the other side does not want to read.
const WRITE_MAX: Duration = Duration::from_secs(1);

/// One side of a connection whose client ignores every rule.
pub struct Wire {
    write: WriteHalf<Box<dyn Stream>>,
    reading: Reading,
}

enum Reading {
    /// A client that does not read: kept open, never looked at.
    Not {
        _half: ReadHalf<Box<dyn Stream>>,
    },
    Counting {
        seen: Arc<Seen>,
        task: JoinHandle<()>,
    },
}

/// Frames from the server, counted by kind; the last place is for the end of the connection.
#[derive(Default)]
pub struct Seen([AtomicU64; 11]);

const END: u8 = 10;

impl Seen {
    pub fn count(&self, kind: u8) -> u64 {
        self.0[usize::from(kind.min(END))].load(Ordering::Relaxed)
    }

    fn saw(&self, kind: u8) {
        self.0[usize::from(kind.min(END))].fetch_add(1, Ordering::Relaxed);
    }
}

impl Wire {
    /// Reads and counts what the server says.
    pub async fn listening(endpoint: &Endpoint) -> Self {
        Self::over(client::dial_endpoint(endpoint).await.unwrap()).await.unwrap()
    }

    /// The same over any connection. An error: the server does not want it.
    pub async fn over(stream: Box<dyn Stream>) -> io::Result<Self> {
        let (read, write) = tokio::io::split(stream);
        let seen = Arc::new(Seen::default());
        let task = tokio::spawn(count(read, Arc::clone(&seen)));
        Self { write, reading: Reading::Counting { seen, task } }.begin().await
    }

    /// Never reads a byte.
    pub async fn deaf(endpoint: &Endpoint) -> Self {
        let (read, write) = tokio::io::split(client::dial_endpoint(endpoint).await.unwrap());
        Self { write, reading: Reading::Not { _half: read } }.begin().await.unwrap()
    }

    async fn begin(mut self) -> io::Result<Self> {
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        self.send(&frame(SETTINGS, 0, 0, &[])).await?;
        Ok(self)
    }

    /// Sends bytes. An error means that the server has had enough: it closed the connection or does not read on.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        timeout(WRITE_MAX, self.write.write_all(bytes))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Sends the same again and again; how often it was taken.
    pub async fn flood(&mut self, times: u32, mut bytes: impl FnMut(u32) -> Vec<u8>) -> u32 {
        let mut batch = Vec::new();
        for number in 0..times {
            batch.extend(bytes(number));
            if 32 << 10 <= batch.len() || number + 1 == times {
                if self.send(&batch).await.is_err() {
                    return number;
                }
                batch.clear();
            }
        }
        times
    }

    pub fn seen(&self) -> &Seen {
        match &self.reading {
            Reading::Counting { seen, .. } => seen,
            Reading::Not { .. } => panic!("this client does not read"),
        }
    }

    /// Waits until the server closes the connection; whether it does.
    pub async fn is_closed_within(&mut self, longest: Duration) -> bool {
        match &mut self.reading {
            Reading::Counting { task, .. } => timeout(longest, task).await.is_ok(),
            Reading::Not { .. } => panic!("this client does not read"),
        }
    }

    /// Waits until the server answers a call, resets it or closes the connection; whether it does.
    pub async fn is_answered_within(&self, longest: Duration) -> bool {
        let answered = async {
            while [HEADERS, RST_STREAM, GOAWAY, END]
                .iter()
                .all(|kind| self.seen().count(*kind) == 0)
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(longest, answered).await.is_ok()
    }
}

impl Drop for Wire {
    /// Both halves must go for the connection to be closed.
    fn drop(&mut self) {
        if let Reading::Counting { task, .. } = &self.reading {
            task.abort();
        }
    }
}

async fn count(mut read: ReadHalf<Box<dyn Stream>>, seen: Arc<Seen>) {
    let mut payload = Vec::new();
    let mut header = [0; 9];
    while read.read_exact(&mut header).await.is_ok() {
        let [a, b, c, kind, ..] = header;
        payload.resize(u32::from_be_bytes([0, a, b, c]) as usize, 0);
        if read.read_exact(&mut payload).await.is_err() {
            break;
        }
        seen.saw(kind);
    }
    seen.saw(END);
}

/// One frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut out = length[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// A header block that says everything in full.
pub fn block<'a>(headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in headers {
        out.push(0);
        for text in [name, value] {
            put_length(&mut out, text.len());
            out.extend_from_slice(text.as_bytes());
        }
    }
    out
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    const PREFIX: usize = 0x7f;
    if length < PREFIX {
        out.push(length as u8);
        return;
    }
    out.push(PREFIX as u8);
    let mut rest = length - PREFIX;
    while 0x80 <= rest {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// What a gRPC call begins with.
pub fn call_headers(path: &str) -> [(&'static str, &str); 6] {
    [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "127.0.0.1"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
}

/// The HEADERS frame of a gRPC call.
pub fn call(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &block(call_headers(path)))
}

/// A gRPC message in a DATA frame.
pub fn message(stream: u32, flags: u8, bytes: &[u8]) -> Vec<u8> {
    let mut payload = vec![0];
    payload.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    payload.extend_from_slice(bytes);
    frame(DATA, flags, stream, &payload)
}

/// The streams a client may open, in order.
pub const fn stream(number: u32) -> u32 {
    2 * number + 1
}

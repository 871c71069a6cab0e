//! Who may not come in: no certificate, a stranger's, an old one, another role's, and no TLS at all.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rcgen::ExtendedKeyUsagePurpose;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::client;
use crate::host::Host;
use crate::support::TlsFiles;
use crate::support::certificates::{Shown, Wish, authority, from_files, stranger, uri};

const PATIENCE: Duration = Duration::from_secs(15);

fn strangers(dir: &Path) -> Vec<(&'static str, Shown)> {
    let client = uri(dir, "client");
    let own = authority(dir);
    let good = Wish::of(&client);
    let servers = vec![ExtendedKeyUsagePurpose::ServerAuth];
    vec![
        ("no certificate", None),
        ("the certificate of port 2380", from_files(dir, "peer")),
        ("the server's own certificate", from_files(dir, "server")),
        ("the authority itself", from_files(dir, "ca")),
        ("a stranger's authority", good.issue(&stranger())),
        ("an expired certificate", Wish { until: Wish::long_ago(), ..good.clone() }.issue(&own)),
        ("another cluster's", Wish::of("k3s-server://1/client/2").issue(&own)),
        ("one without a name", Wish { uri: None, ..good.clone() }.issue(&own)),
        ("a strange name", Wish::of("k3s-server://").issue(&own)),
        ("one for servers", Wish { usages: servers, ..good }.issue(&own)),
    ]
}

fn files(host: &Host) -> TlsFiles {
    host.endpoint().tls.clone().expect("a server with TLS")
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_turned_away_in_the_handshake() {
    let mut host = Host::with_tls().await;
    let files = files(&host);
    let dir = files.ca.parent().unwrap().to_owned();
    for (what, shown) in strangers(&dir) {
        let config = Arc::new(client::tls_with(&files, shown));
        let refused = timeout(PATIENCE, async {
            // With TLS 1.3 the client is done before the server has looked at its certificate.
            match client::dial(&host.endpoint().address, Some(config)).await {
                Err(_) => true,
                Ok(mut stream) => {
                    let mut byte = [0];
                    !matches!(stream.read(&mut byte).await, Ok(1))
                }
            }
        });
        assert!(refused.await.expect("an answer in time"), "{what} was let in");
    }
    // The same maker's certificate with the right contents does get in: the others failed for their own faults.
    let shown = Wish::of(&uri(&dir, "client")).issue(&authority(&dir));
    let config = client::tls_with(&files, shown);
    let channel = client::channel_with(&host.endpoint().address, Some(config)).await.unwrap();
    let members = "/etcdserverpb.Cluster/MemberList";
    client::call(&channel, members, Bytes::new()).await.expect("a good certificate");
    host.is_well().await;
    host.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_tls_is_dropped() {
    let mut host = Host::with_tls().await;
    let client_hello = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let noise: Vec<u8> = (0..100_000_u32).map(|n| (n * 167 % 251) as u8).collect();
    for (what, bytes) in [
        ("plain HTTP/1", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("plain HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("noise", noise.clone()),
        ("a greeting and noise", [&client_hello[..], &noise].concat()),
        ("a record of no length", vec![22, 3, 1, 0, 0]),
        ("a record too long", [&[22, 3, 1, 0xff, 0xff][..], &noise].concat()),
        ("an alert", vec![21, 3, 1, 0, 2, 2, 40]),
        ("data before a handshake", vec![23, 3, 3, 0, 1, 0]),
    ] {
        let mut stream = TcpStream::connect(&host.endpoint().address).await.unwrap();
        drop(stream.write_all(&bytes).await);
        let mut answer = Vec::new();
        let ended = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "{what}: the connection stays");
        assert!(answer.len() < 100, "{what}: answered with {} bytes", answer.len());
    }
    host.is_well().await;
    host.stops().await;
}

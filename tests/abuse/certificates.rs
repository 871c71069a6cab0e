//! Who may not come in: no certificate, a stranger's, an old one, another role's, and no TLS at all.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::client;
use crate::host::Host;
use crate::support::TlsFiles;

const PATIENCE: Duration = Duration::from_secs(15);

type Shown = Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>;

fn from_files(dir: &Path, name: &str) -> Shown {
    let certificate = CertificateDer::from_pem_file(dir.join(format!("{name}.crt"))).unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.join(format!("{name}.key"))).unwrap();
    Some((vec![certificate], key))
}

/// What a certificate is made from.
struct Wish {
    uri: Option<String>,
    until: time::OffsetDateTime,
    usage: ExtendedKeyUsagePurpose,
}

impl Wish {
    fn issue(&self, issuer: &Issuer<'_, KeyPair>) -> Shown {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.not_before = time::OffsetDateTime::UNIX_EPOCH + time::Duration::days(18_000);
        params.not_after = self.until;
        params.extended_key_usages = vec![self.usage.clone()];
        if let Some(uri) = &self.uri {
            params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
        }
        let certificate = params.signed_by(&key, issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Some((vec![certificate.der().clone()], key))
    }
}

/// The cluster's own authority: the worst case is a certificate that it really signed.
fn authority(dir: &Path) -> Issuer<'static, KeyPair> {
    let key = KeyPair::from_pem(&std::fs::read_to_string(dir.join("ca.key")).unwrap()).unwrap();
    let certificate = std::fs::read_to_string(dir.join("ca.crt")).unwrap();
    Issuer::from_ca_cert_pem(&certificate, key).unwrap()
}

fn stranger() -> Issuer<'static, KeyPair> {
    Issuer::new(CertificateParams::new(Vec::new()).unwrap(), KeyPair::generate().unwrap())
}

/// The name in a certificate of the server, as it stands in the file.
fn uri(dir: &Path, name: &str) -> String {
    let certificate = CertificateDer::from_pem_file(dir.join(format!("{name}.crt"))).unwrap();
    k3s_server::pki::Identity::of(&certificate).unwrap().to_string()
}

fn strangers(dir: &Path) -> Vec<(&'static str, Shown)> {
    let client = uri(dir, "client");
    let later = time::OffsetDateTime::UNIX_EPOCH + time::Duration::days(40_000);
    let good = || Wish {
        uri: Some(client.clone()),
        until: later,
        usage: ExtendedKeyUsagePurpose::ClientAuth,
    };
    let long_ago = time::OffsetDateTime::UNIX_EPOCH + time::Duration::days(18_100);
    let other_cluster = "k3s-server://1/client/2".to_owned();
    let own = authority(dir);
    vec![
        ("no certificate", None),
        ("the certificate of port 2380", from_files(dir, "peer")),
        ("the server's own certificate", from_files(dir, "server")),
        ("the authority itself", from_files(dir, "ca")),
        ("a stranger's authority", good().issue(&stranger())),
        ("an expired certificate", Wish { until: long_ago, ..good() }.issue(&own)),
        ("another cluster's", Wish { uri: Some(other_cluster), ..good() }.issue(&own)),
        ("one without a name", Wish { uri: None, ..good() }.issue(&own)),
        ("a strange name", Wish { uri: Some("k3s-server://".to_owned()), ..good() }.issue(&own)),
        (
            "one for servers",
            Wish { usage: ExtendedKeyUsagePurpose::ServerAuth, ..good() }.issue(&own),
        ),
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
    let later = time::OffsetDateTime::UNIX_EPOCH + time::Duration::days(40_000);
    let usage = ExtendedKeyUsagePurpose::ClientAuth;
    let good = Wish { uri: Some(uri(&dir, "client")), until: later, usage };
    let shown = good.issue(&authority(&dir));
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

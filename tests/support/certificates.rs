//! Makes certificates: a throw-away CA with a server and a client certificate, for real etcds in TLS tests, and for our server
//! whatever somebody may show to it.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::{Duration, OffsetDateTime};

use super::TlsFiles;

/// What a server needs.
#[derive(Clone, Debug)]
pub struct ServerFiles {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Writes ca.crt, server.crt, server.key, client.crt and client.key into `dir`.
pub fn write(dir: &Path) -> (ServerFiles, TlsFiles) {
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::new(Vec::new()).expect("no names to refuse");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).expect("a self-signed certificate");
    let issuer = Issuer::new(ca, ca_key);
    let ca_file = dir.join("ca.crt");
    fs::write(&ca_file, ca_certificate.pem()).expect("a writable directory");
    let leaf = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("valid names");
        // etcd's gateway is a client of its own server, with the server's certificate.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer).expect("a signed certificate");
        let files = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        fs::write(&files.0, certificate.pem()).expect("a writable directory");
        fs::write(&files.1, key.serialize_pem()).expect("a writable directory");
        files
    };
    let (server, client) = (leaf("server"), leaf("client"));
    (
        ServerFiles { ca: ca_file.clone(), certificate: server.0, key: server.1 },
        TlsFiles { ca: ca_file, certificate: client.0, key: client.1 },
    )
}

/// What somebody shows in a handshake, if anything.
pub type Shown = Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>;

/// A certificate and its key, as they lie in a directory.
pub fn from_files(dir: &Path, name: &str) -> Shown {
    let certificate = CertificateDer::from_pem_file(dir.join(format!("{name}.crt")));
    let key = PrivateKeyDer::from_pem_file(dir.join(format!("{name}.key")));
    Some((vec![certificate.expect("a certificate")], key.expect("a key")))
}

/// The name in one of our server's certificates.
pub fn uri(dir: &Path, name: &str) -> String {
    let certificate = CertificateDer::from_pem_file(dir.join(format!("{name}.crt")));
    k3s_server::pki::Identity::of(&certificate.expect("a certificate")).expect("a name").to_string()
}

/// The authority in a server's directory: the worst case is a certificate that it really signed.
pub fn authority(dir: &Path) -> Issuer<'static, KeyPair> {
    let key = fs::read_to_string(dir.join("ca.key")).expect("the authority's key");
    let key = KeyPair::from_pem(&key).expect("a key");
    let certificate = fs::read_to_string(dir.join("ca.crt")).expect("the authority");
    Issuer::from_ca_cert_pem(&certificate, key).expect("an authority")
}

/// An authority that nobody knows.
pub fn stranger() -> Issuer<'static, KeyPair> {
    let params = CertificateParams::new(Vec::new()).expect("no names to refuse");
    Issuer::new(params, KeyPair::generate().expect("a key"))
}

/// What a certificate is made from.
#[derive(Clone, Debug)]
pub struct Wish {
    pub uri: Option<String>,
    /// Further URIs.
    pub more: Vec<String>,
    pub from: OffsetDateTime,
    pub until: OffsetDateTime,
    pub usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Wish {
    /// A good client's.
    pub fn of(uri: &str) -> Self {
        Self {
            uri: Some(uri.to_owned()),
            more: Vec::new(),
            from: Self::day(18_000),
            until: Self::far_ahead(),
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth],
        }
    }

    /// In 2019.
    pub fn long_ago() -> OffsetDateTime {
        Self::day(18_100)
    }

    /// In 2079.
    pub fn far_ahead() -> OffsetDateTime {
        Self::day(40_000)
    }

    fn day(number: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + Duration::days(number)
    }

    /// With a new key.
    pub fn issue(&self, issuer: &Issuer<'_, KeyPair>) -> Shown {
        let key = KeyPair::generate().expect("a key");
        let pem = self.issue_for(&key, issuer);
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
        Some((vec![certificate], PrivateKeyDer::try_from(key.serialize_der()).expect("a key")))
    }

    /// For a key, in PEM.
    pub fn issue_for(&self, key: &KeyPair, issuer: &Issuer<'_, KeyPair>) -> String {
        let mut params = CertificateParams::new(Vec::new()).expect("no names to refuse");
        params.not_before = self.from;
        params.not_after = self.until;
        params.extended_key_usages.clone_from(&self.usages);
        let names = self.uri.iter().chain(&self.more);
        params.subject_alt_names =
            names.map(|uri| SanType::URI(uri.as_str().try_into().expect("ASCII"))).collect();
        params.signed_by(key, issuer).expect("a signed certificate").pem()
    }
}

//! Makes a throw-away CA with a server and a client certificate, for real etcds in TLS tests.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

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

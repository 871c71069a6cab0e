//! How a command calls port 2379: with the files any etcd client uses, read and never written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;

use super::store::Paths;
use super::tls::provider;
use super::validity::CertificateClock;

/// Why the files cannot be used.
#[derive(Debug, Error)]
#[error("{path}: {what}")]
pub struct ClientFilesError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
}

fn error(path: &Path, what: impl ToString) -> ClientFilesError {
    ClientFilesError { path: path.to_owned(), what: what.to_string() }
}

/// The server's certificate is checked as any etcd client does: signed by the authority, and for the name that is called.
pub fn call_with_files(
    paths: &Paths,
    clock: CertificateClock,
) -> Result<Arc<ClientConfig>, ClientFilesError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&paths.authority)? {
        roots.add(certificate).map_err(|found| error(&paths.authority, found))?;
    }
    let chain = certificates(&paths.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&paths.key).map_err(|found| error(&paths.key, found))?;
    let mut config = ClientConfig::builder_with_details(Arc::new(provider()), Arc::new(clock))
        .with_safe_default_protocol_versions()
        .map_err(|found| error(&paths.authority, found))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|found| error(&paths.certificate, found))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ClientFilesError> {
    let all: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|found| error(path, found))?.collect();
    let all = all.map_err(|found| error(path, found))?;
    if all.is_empty() {
        return Err(error(path, "holds no certificate in PEM form"));
    }
    Ok(all)
}

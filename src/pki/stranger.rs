//! The first TLS connection of a node that trusts nobody yet: to whom it talks is decided afterwards.
//!
//! A node that joins has a token, not the cluster's authority. It takes whatever certificates the other end shows,
//! makes sure only that the other end has the key of the first one, and then compares the authority in the chain with
//! the hash in its token ([`introduced`]). Until that, nothing secret may be said.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use super::identity::{authority_uri, uris};
use super::tls::{ALPN_JOIN, provider, refused, roots};
use super::validity::{CertificateClock, unix};
use super::{Identity, Role, WrongIdentity};

/// How to call port 2380 with nothing but a token: any certificate will do, if the other end has its key.
pub fn call_stranger() -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::new(provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(KeyOnly(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Who the other end is, if `authority_pem` is a cluster's authority and has signed the first certificate of `chain`.
///
/// Says nothing about whether that authority is the one that was meant: compare its hash with the token first.
pub fn introduced(
    chain: &[CertificateDer<'_>],
    authority_pem: &[u8],
    clock: &CertificateClock,
) -> Result<Identity, Error> {
    let leaf = chain.first().ok_or(Error::NoCertificatesPresented)?;
    let authority = CertificateDer::from_pem_slice(authority_pem)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(leaf)?,
        &*roots(&authority)?,
        &[],
        unix(clock.now()),
        provider().signature_verification_algorithms.all,
    )?;
    let found = Identity::of(leaf).map_err(refused)?;
    let expected = authority_uri(found.cluster);
    if uris(&authority).map_err(refused)? != [expected.as_str()] {
        return Err(refused(WrongIdentity::Unnamed(format!("its authority is not {expected}"))));
    }
    found.expect(found.cluster, Role::Peer, None).map_err(refused)
}

/// Checks that the other end has the key of its certificate, and nothing else.
#[derive(Debug)]
struct KeyOnly(Arc<CryptoProvider>);

impl ServerCertVerifier for KeyOnly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        ParsedCertificate::try_from(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

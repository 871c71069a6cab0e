//! Turns certificates into rustls configurations: who may come in, whom we talk to, by which clock.
//!
//! rustls' own verifiers (webpki) check chain, time and purpose; ours run after them and check the owner in the URI. Nothing
//! here makes a check weaker except one, on purpose: peers are recognised by that URI and not by their address.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ResolvesClientCert, Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor,
};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert,
    VerifierBuilderError, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    OtherError, RootCertStore, ServerConfig, SignatureScheme, SupportedCipherSuite,
    SupportedProtocolVersion,
};

use crate::types::{ClusterId, NodeId};

use super::store::Owner;
use super::validity::{CertificateClock, NOT_BEFORE, unix};
use super::{Identity, Role, WrongIdentity};

/// gRPC's protocol name; what is spoken behind TLS.
const ALPN_H2: &[u8] = b"h2";

/// Asks port 2380 for the service that nodes without a certificate may use, and for nothing else. HTTP/2 as well.
pub const ALPN_JOIN: &[u8] = b"k3s-join";

/// Debian's etcdctl and older tools may not speak 1.3.
static CLIENT_VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];
/// Both ends are ours.
static PEER_VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13];

/// A door into this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// 2379: etcd's API. TLS 1.2 and 1.3, for clients with a client certificate.
    Clients,
    /// 2380: the other nodes. TLS 1.3 only, for peers with a peer certificate.
    Peers,
    /// 2380 again, for a node that has nothing yet but a token. TLS 1.3 only; the caller shows no certificate.
    Join,
}

impl Port {
    /// The role a caller must have; `None` if it need not say who it is.
    pub const fn caller(self) -> Option<Role> {
        match self {
            Self::Clients => Some(Role::Client),
            Self::Peers => Some(Role::Peer),
            Self::Join => None,
        }
    }

    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Clients => CLIENT_VERSIONS,
            Self::Peers | Self::Join => PEER_VERSIONS,
        }
    }

    fn protocol(self) -> &'static [u8] {
        match self {
            Self::Clients | Self::Peers => ALPN_H2,
            Self::Join => ALPN_JOIN,
        }
    }
}

/// A certificate that can be replaced while connections use it.
#[derive(Debug)]
pub(super) struct LiveCertificate(RwLock<Arc<CertifiedKey>>);

impl LiveCertificate {
    pub(super) fn new(certified: Arc<CertifiedKey>) -> Self {
        Self(RwLock::new(certified))
    }

    pub(super) fn replace(&self, certified: Arc<CertifiedKey>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = certified;
    }

    fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for LiveCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

/// The same certificate with the authority's behind it: who does not have that yet compares it with the token's hash.
#[derive(Debug)]
struct Introduced {
    live: Arc<LiveCertificate>,
    authority: CertificateDer<'static>,
}

impl ResolvesServerCert for Introduced {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut certified = CertifiedKey::clone(&self.live.current());
        certified.cert.push(self.authority.clone());
        Some(Arc::new(certified))
    }
}

impl ResolvesClientCert for LiveCertificate {
    fn resolve(
        &self,
        _authorities: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// ring's algorithms, in the order that is fast on this processor.
pub(super) fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    prefer_fast(&mut provider.cipher_suites, has_aes_instructions());
    provider
}

/// Without AES instructions (Pi 3 and 4), AES takes several times as long as `ChaCha20` and its table look-ups leak timing.
fn prefer_fast(suites: &mut [SupportedCipherSuite], has_aes: bool) {
    if !has_aes {
        // Stable: apart from that, rustls' order stays.
        suites.sort_by_key(|suite| !is_chacha(suite.suite()));
    }
}

fn is_chacha(suite: CipherSuite) -> bool {
    [
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ]
    .contains(&suite)
}

#[cfg(target_arch = "aarch64")]
fn has_aes_instructions() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(target_arch = "x86_64")]
fn has_aes_instructions() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
fn has_aes_instructions() -> bool {
    false
}

/// Everything needed to build configurations.
#[derive(Debug)]
pub(super) struct Tls {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    authority: CertificateDer<'static>,
    clock: Arc<CertificateClock>,
    owner: Owner,
    server: Arc<LiveCertificate>,
    peer: Arc<LiveCertificate>,
    client: Arc<LiveCertificate>,
}

impl Tls {
    pub(super) fn new(
        authority: &CertificateDer<'static>,
        owner: Owner,
        clock: CertificateClock,
        server: Arc<LiveCertificate>,
        peer: Arc<LiveCertificate>,
        client: Arc<LiveCertificate>,
    ) -> Result<Self, Error> {
        Ok(Self {
            provider: Arc::new(provider()),
            roots: roots(authority)?,
            authority: authority.clone(),
            clock: Arc::new(clock),
            owner,
            server,
            peer,
            client,
        })
    }

    pub(super) fn accept(&self, port: Port) -> Result<Arc<ServerConfig>, Error> {
        let provider = Arc::clone(&self.provider);
        let builder = ServerConfig::builder_with_details(provider, self.clock.clone())
            .with_protocol_versions(port.versions())?;
        let builder = match port.caller() {
            Some(role) => {
                let webpki = client_verifier(&self.roots, &self.provider)?;
                let cluster = self.owner.cluster;
                builder.with_client_cert_verifier(Arc::new(CallerVerifier {
                    webpki,
                    cluster,
                    role,
                }))
            }
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(self.certificate(port));
        config.alpn_protocols = vec![port.protocol().to_vec()];
        config.ignore_client_order = !has_aes_instructions();
        // A resumed session would skip the check of a certificate that has expired or lost its place since. Clients of a
        // datastore keep their connections, so nothing is gained by resuming.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn certificate(&self, port: Port) -> Arc<dyn ResolvesServerCert> {
        match port {
            Port::Clients => self.server.clone(),
            Port::Peers => self.peer.clone(),
            Port::Join => Arc::new(Introduced {
                live: Arc::clone(&self.peer),
                authority: self.authority.clone(),
            }),
        }
    }

    pub(super) fn call_peer(&self, node: NodeId) -> Result<Arc<ClientConfig>, Error> {
        let verifier = CalledPeerVerifier {
            roots: Arc::clone(&self.roots),
            provider: Arc::clone(&self.provider),
            cluster: self.owner.cluster,
            node,
        };
        self.call(Port::Peers, Arc::new(verifier), Arc::clone(&self.peer))
    }

    pub(super) fn call_server(&self) -> Result<Arc<ClientConfig>, Error> {
        let webpki = WebPkiServerVerifier::builder_with_provider(
            Arc::clone(&self.roots),
            Arc::clone(&self.provider),
        )
        .build()
        .map_err(builder_error)?;
        let verifier = CalledServerVerifier { webpki, cluster: self.owner.cluster };
        self.call(Port::Clients, Arc::new(verifier), Arc::clone(&self.client))
    }

    fn call(
        &self,
        port: Port,
        verifier: Arc<dyn ServerCertVerifier>,
        certificate: Arc<LiveCertificate>,
    ) -> Result<Arc<ClientConfig>, Error> {
        let provider = Arc::clone(&self.provider);
        let mut config = ClientConfig::builder_with_details(provider, self.clock.clone())
            .with_protocol_versions(port.versions())?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(certificate);
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

pub(super) fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(Arc::new(roots))
}

fn builder_error(error: VerifierBuilderError) -> Error {
    Error::General(error.to_string())
}

fn client_verifier(
    roots: &Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
        .build()
        .map_err(builder_error)
}

/// Whether `authority` signed this certificate for this role, leaving its dates aside.
pub(super) fn check_signature(
    authority: &CertificateDer<'static>,
    certificate: &CertificateDer<'_>,
    role: Role,
) -> Result<(), Error> {
    // The one moment at which every certificate of ours is valid.
    let moment = unix(NOT_BEFORE + 1);
    let (roots, provider) = (roots(authority)?, Arc::new(provider()));
    match role {
        Role::Server => verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(certificate)?,
            &roots,
            &[],
            moment,
            provider.signature_verification_algorithms.all,
        ),
        Role::Peer | Role::Client => client_verifier(&roots, &provider)?
            .verify_client_cert(certificate, &[], moment)
            .map(|_| ()),
    }
}

/// The second check: the owner in the URI.
fn check_owner(
    certificate: &CertificateDer<'_>,
    cluster: ClusterId,
    role: Role,
    node: Option<NodeId>,
) -> Result<Identity, Error> {
    Identity::of(certificate).and_then(|found| found.expect(cluster, role, node)).map_err(refused)
}

pub(super) fn refused(wrong: WrongIdentity) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong))))
}

/// Checks who calls us: genuine by webpki, and of the role that this port is for.
#[derive(Debug)]
struct CallerVerifier {
    webpki: Arc<dyn ClientCertVerifier>,
    cluster: ClusterId,
    role: Role,
}

impl ClientCertVerifier for CallerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.webpki.verify_client_cert(end_entity, intermediates, now)?;
        check_owner(end_entity, self.cluster, self.role, None)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Checks the server our own commands call: genuine, called by this name, and a server.
#[derive(Debug)]
struct CalledServerVerifier {
    webpki: Arc<WebPkiServerVerifier>,
    cluster: ClusterId,
}

impl ServerCertVerifier for CalledServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)?;
        check_owner(end_entity, self.cluster, Role::Server, None)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Checks the peer we call: genuine, and exactly the node we mean. Its address may have changed, so the name is not looked at.
#[derive(Debug)]
struct CalledPeerVerifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    cluster: ClusterId,
    node: NodeId,
}

impl ServerCertVerifier for CalledPeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        check_owner(end_entity, self.cluster, Role::Peer, Some(self.node))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(has_aes: bool) -> Vec<CipherSuite> {
        let mut suites = rustls::crypto::ring::default_provider().cipher_suites;
        prefer_fast(&mut suites, has_aes);
        suites.iter().map(SupportedCipherSuite::suite).collect()
    }

    #[test]
    fn chacha_comes_first_only_where_aes_is_slow() {
        let slow_aes = names(false);
        assert!(is_chacha(slow_aes[0]));
        let first_aes = slow_aes.iter().position(|suite| !is_chacha(*suite)).unwrap();
        assert!(slow_aes[first_aes..].iter().all(|suite| !is_chacha(*suite)));

        let fast_aes = names(true);
        assert!(!is_chacha(fast_aes[0]));
        assert_eq!(fast_aes.len(), slow_aes.len(), "nothing is dropped");
    }
}

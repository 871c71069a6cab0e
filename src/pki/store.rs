//! Makes, finishes, checks, loads and renews the files of one node.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, Error as TlsError, InconsistentKeys, ServerConfig};
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex, watch};

use crate::env::Env;
use crate::types::{ClusterId, NodeId};

use super::identity::{authority_uri, uris};
use super::issue::{self, Serial, Signer};
use super::tls::{LiveCertificate, Port, Tls};
use super::validity::{self, CertificateClock, Due, Facts};
use super::{Identity, Names, PkiError, Role, WrongIdentity, files};

/// Who the certificates are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
}

impl Owner {
    const fn identity(self, role: Role) -> Identity {
        Identity { cluster: self.cluster, role, node: self.node }
    }
}

/// A certificate that was issued, for the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// What it is for.
    pub role: Role,
    /// Why the old one would not do.
    pub reason: Due,
    /// Where it is.
    pub path: PathBuf,
}

/// The files a client needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The authority's certificate.
    pub authority: PathBuf,
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The loaded certificates of one node. Cheap to clone; renewal is seen by all clones.
#[derive(Clone, Debug)]
pub struct Pki(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: Dir,
    authority: Authority,
    tls: Tls,
    /// Serial access: two renewals at once would issue twice.
    pairs: Mutex<Vec<Pair>>,
}

/// One role's certificate in use.
#[derive(Debug)]
struct Pair {
    role: Role,
    live: Arc<LiveCertificate>,
    facts: Facts,
}

impl Pki {
    /// Makes what is missing, renews what is due, checks everything and loads it.
    ///
    /// Called at every start. If a start was interrupted anywhere in here, the next call finishes the work: a key is
    /// durable before the certificate for it is made, and the authority before anything it signs. What was issued is returned
    /// for the journal.
    pub async fn establish(
        env: &Env,
        dir: &Path,
        owner: Owner,
        names: &Names,
    ) -> Result<(Self, Vec<Issued>), PkiError> {
        let dir = Dir { env: env.clone(), path: dir.to_owned(), owner };
        files::prepare(&*env.disk, &dir.path)?;
        let authority = dir.establish_authority().await?;
        let mut live = Vec::new();
        let (mut pairs, mut all_issued) = (Vec::new(), Vec::new());
        for role in Role::ALL {
            let (certified, facts, issued) = dir.establish_pair(&authority, role, names).await?;
            let certificate = Arc::new(LiveCertificate::new(certified));
            live.push(Arc::clone(&certificate));
            pairs.push(Pair { role, live: certificate, facts });
            all_issued.extend(issued);
        }
        let [server, peer, client]: [Arc<LiveCertificate>; 3] = match live.try_into() {
            Ok(all) => all,
            Err(_) => unreachable!("one certificate was made for each of the three roles"),
        };
        let clock = CertificateClock::new(Arc::clone(&env.clock));
        let tls = Tls::new(&authority.certificate, owner, clock, server, peer, client)?;
        let pairs = Mutex::new(pairs);
        Ok((Self(Arc::new(Inner { dir, authority, tls, pairs })), all_issued))
    }

    /// Keeps the authority that a server of the cluster has given to this one, with its key, so that [`Self::establish`] can
    /// issue this node's certificates. Replaces an authority that is there: see `join::adopt` for when that is right.
    ///
    /// Checked first, and nothing is written otherwise: one certificate, of this cluster, not expired, and the key signs what it
    /// verifies.
    pub async fn adopt(
        env: &Env,
        dir: &Path,
        cluster: ClusterId,
        certificate_pem: &[u8],
        key_pem: &[u8],
    ) -> Result<(), PkiError> {
        // No certificate is issued here, so no node is named.
        let owner = Owner { cluster, node: NodeId::default() };
        let dir = Dir { env: env.clone(), path: dir.to_owned(), owner };
        dir.check_offered(certificate_pem, key_pem)?;
        files::prepare(&*env.disk, &dir.path)?;
        files::write(&*env.disk, &dir.authority_key(), key_pem).await?;
        files::write(&*env.disk, &dir.authority_certificate(), certificate_pem).await
    }

    /// Removes an authority that was adopted and not used yet.
    pub fn forget(env: &Env, dir: &Path) -> Result<(), PkiError> {
        let owner = Owner { cluster: ClusterId::default(), node: NodeId::default() };
        let dir = Dir { env: env.clone(), path: dir.to_owned(), owner };
        files::prepare(&*env.disk, &dir.path)?;
        for path in [dir.authority_certificate(), dir.authority_key()] {
            files::remove(&*env.disk, &path)?;
        }
        files::sync(&*env.disk, &dir.path)
    }

    /// Issues what has become due, with `names` as the names that are wanted now. New handshakes use it at once. On a node
    /// without the authority's key nothing is issued.
    pub async fn renew(&self, names: &Names) -> Result<Vec<Issued>, PkiError> {
        let Inner { dir, authority, pairs, .. } = &*self.0;
        let mut pairs = pairs.lock().await;
        let mut all_issued = Vec::new();
        if !authority.can_sign {
            return Ok(all_issued);
        }
        for pair in pairs.iter_mut() {
            let wanted = wanted(pair.role, names);
            let Some(reason) = validity::due(&pair.facts, &wanted, authority.ends, dir.now())
            else {
                continue;
            };
            let key = dir.load_key(pair.role)?;
            let certificate = dir.issue(authority, pair.role, &wanted, &key).await?;
            pair.live.replace(certified(&certificate, &key)?);
            pair.facts = dir.facts(pair.role, &certificate)?;
            all_issued.push(dir.issued(pair.role, reason));
        }
        Ok(all_issued)
    }

    /// Renews for as long as it is polled: every hour, and whenever the names change. `report` hears what was issued
    /// and what failed; a failure is tried again an hour later.
    pub async fn keep_fresh(
        &self,
        mut names: watch::Receiver<Names>,
        report: impl Fn(Result<Issued, PkiError>),
    ) {
        let mut names_may_change = true;
        loop {
            let wanted = names.borrow_and_update().clone();
            match self.renew(&wanted).await {
                Ok(issued) => issued.into_iter().for_each(|one| report(Ok(one))),
                Err(error) => report(Err(error)),
            }
            let hour = self.0.dir.env.clock.sleep(validity::CHECK_INTERVAL);
            if names_may_change {
                tokio::select! {
                    changed = names.changed() => names_may_change = changed.is_ok(),
                    () = hour => {}
                }
            } else {
                hour.await;
            }
        }
    }

    /// Who this node is, in a role.
    pub fn identity(&self, role: Role) -> Identity {
        self.0.dir.owner.identity(role)
    }

    /// The authority's certificate as it is on disk.
    pub fn authority_pem(&self) -> &str {
        &self.0.authority.pem
    }

    /// The authority's key as it is on disk, for a server that has proved that it knows the token; `None` on a node without it.
    pub fn authority_key_pem(&self) -> Result<Option<Vec<u8>>, PkiError> {
        let dir = &self.0.dir;
        files::read(&*dir.env.disk, &dir.authority_key())
    }

    /// The authority's hash as it stands in a join token (`K10<hash>::…`): SHA-256 of the PEM file's bytes, in hexadecimal.
    pub fn authority_hash(&self) -> String {
        let digest = Sha256::digest(self.0.authority.pem.as_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The files of a role, for example to show how to call etcdctl.
    pub fn paths(&self, role: Role) -> Paths {
        let dir = &self.0.dir;
        Paths {
            authority: dir.authority_certificate(),
            certificate: dir.certificate(role),
            key: dir.key(role),
        }
    }

    /// How a port accepts connections.
    pub fn accept(&self, port: Port) -> Result<Arc<ServerConfig>, PkiError> {
        Ok(self.0.tls.accept(port)?)
    }

    /// How to call another node's port 2380: whatever its address, it must prove to be `node`.
    pub fn call_peer(&self, node: NodeId) -> Result<Arc<ClientConfig>, PkiError> {
        Ok(self.0.tls.call_peer(node)?)
    }

    /// How our own commands call port 2379, checking the server's name as any etcd client does.
    pub fn call_server(&self) -> Result<Arc<ClientConfig>, PkiError> {
        Ok(self.0.tls.call_server()?)
    }
}

/// The names a role's certificate carries. A client's address means nothing, so it is not in there, and a new lease
/// from the router does not change the file that etcdctl uses.
fn wanted(role: Role, names: &Names) -> Names {
    match role {
        Role::Server | Role::Peer => names.clone(),
        Role::Client => Names::none(),
    }
}

/// A role's certificate and key in the form rustls signs with.
fn certified(
    certificate: &CertificateDer<'static>,
    key: &KeyPair,
) -> Result<Arc<CertifiedKey>, TlsError> {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialized_der().to_vec()));
    let provider = super::tls::provider();
    Ok(Arc::new(CertifiedKey::from_der(vec![certificate.clone()], key, &provider)?))
}

/// The cluster's authority as this node has it.
#[derive(Debug)]
struct Authority {
    pem: String,
    certificate: CertificateDer<'static>,
    ends: i64,
    can_sign: bool,
}

/// The directory and whom it belongs to.
#[derive(Debug)]
struct Dir {
    env: Env,
    path: PathBuf,
    owner: Owner,
}

impl Dir {
    fn authority_certificate(&self) -> PathBuf {
        self.path.join("ca.crt")
    }

    fn authority_key(&self) -> PathBuf {
        self.path.join("ca.key")
    }

    fn certificate(&self, role: Role) -> PathBuf {
        self.path.join(format!("{role}.crt"))
    }

    fn key(&self, role: Role) -> PathBuf {
        self.path.join(format!("{role}.key"))
    }

    fn now(&self) -> i64 {
        validity::certificate_time(self.env.clock.wall())
    }

    fn serial(&self) -> Serial {
        let mut bytes = [0; 16];
        self.env.entropy.fill(&mut bytes);
        Serial(bytes)
    }

    fn issued(&self, role: Role, reason: Due) -> Issued {
        Issued { role, reason, path: self.certificate(role) }
    }

    async fn establish_authority(&self) -> Result<Authority, PkiError> {
        let path = self.authority_certificate();
        if let Some((pem, certificate)) = self.read_certificate(&path)? {
            return self.check_authority(pem, certificate);
        }
        for role in Role::ALL {
            if files::read(&*self.env.disk, &self.certificate(role))?.is_some() {
                return Err(PkiError::AuthorityMissing { path });
            }
        }
        // Nothing signed by it has been written yet, so nobody has seen it: making it now, perhaps with a key that an
        // interrupted founding left, is safe.
        let key = self.load_or_make_key(&self.authority_key()).await?;
        let pem = issue::authority(&key, self.owner.cluster, self.serial(), self.now())?;
        files::write(&*self.env.disk, &path, pem.as_bytes()).await?;
        let certificate = parse_certificate(&path, pem.as_bytes())?;
        self.check_authority(pem, certificate)
    }

    /// Whether this is the authority of the owner's cluster and its key.
    fn check_offered(&self, certificate_pem: &[u8], key_pem: &[u8]) -> Result<(), PkiError> {
        let (path, key_path) = (self.authority_certificate(), self.authority_key());
        let count = CertificateDer::pem_slice_iter(certificate_pem).count();
        if count != 1 {
            let found = format!("found {count} certificates, expected one");
            return Err(PkiError::CertificateDamaged { path, found });
        }
        let certificate = parse_certificate(&path, certificate_pem)?;
        let ends = self.check_certificate(&path, &certificate)?;
        let key = parse_key(&key_path, key_pem)?;
        check_match(&path, &certificate, &key_path, &key)?;
        // What it says of itself may still be wrong: it has to do what an authority does.
        let probe = issue::new_key()?;
        let signer = Signer { certificate: &certificate, key, ends };
        let owner = self.owner.identity(Role::Peer);
        let pem =
            issue::leaf(signer, owner, &Names::loopback(), &probe, self.serial(), self.now())?;
        let issued = parse_certificate(&path, pem.as_bytes())?;
        super::tls::check_signature(&certificate, &issued, Role::Peer).map_err(|error| {
            PkiError::CertificateDamaged { path, found: format!("it is no authority: {error}") }
        })
    }

    fn check_authority(
        &self,
        pem: String,
        certificate: CertificateDer<'static>,
    ) -> Result<Authority, PkiError> {
        let path = self.authority_certificate();
        let ends = self.check_certificate(&path, &certificate)?;
        let key_path = self.authority_key();
        let key = self.read_key(&key_path)?;
        if let Some(key) = &key {
            check_match(&path, &certificate, &key_path, key)?;
        }
        Ok(Authority { pem, certificate, ends, can_sign: key.is_some() })
    }

    /// Whether a certificate is the authority of the owner's cluster, and valid; its last second.
    fn check_certificate(
        &self,
        path: &Path,
        certificate: &CertificateDer<'static>,
    ) -> Result<i64, PkiError> {
        let path = path.to_owned();
        let wrong = |wrong| PkiError::WrongOwner { path: path.clone(), wrong };
        let expected = authority_uri(self.owner.cluster);
        let found = uris(certificate).map_err(wrong)?;
        if found != [expected.as_str()] {
            let found = format!("found {found:?}, expected {expected}");
            return Err(wrong(WrongIdentity::Unnamed(found)));
        }
        let ends = self.facts_of(&path, certificate)?.not_after;
        if ends < self.now() {
            return Err(PkiError::Expired { path, not_after: ends, now: self.now() });
        }
        Ok(ends)
    }

    async fn establish_pair(
        &self,
        authority: &Authority,
        role: Role,
        names: &Names,
    ) -> Result<(Arc<CertifiedKey>, Facts, Option<Issued>), PkiError> {
        let wanted = wanted(role, names);
        let path = self.certificate(role);
        let found = self.read_certificate(&path)?.map(|(_, certificate)| certificate);
        let key = match &found {
            // The key of an existing certificate is never replaced silently: a peer's key is its identity.
            Some(_) => self.load_key(role)?,
            None => self.load_or_make_key(&self.key(role)).await?,
        };
        let reason = match &found {
            None => Some(Due::Missing),
            Some(certificate) => {
                check_match(&path, certificate, &self.key(role), &key)?;
                self.check_owner(&path, certificate, role)?;
                self.check_signature(authority, &path, certificate, role)?;
                let facts = self.facts_of(&path, certificate)?;
                self.due(authority, &path, &facts, &wanted)?
            }
        };
        let certificate = match (found, reason) {
            (Some(certificate), None) => certificate,
            (_, _) => self.issue(authority, role, &wanted, &key).await?,
        };
        let facts = self.facts(role, &certificate)?;
        let issued = reason.map(|reason| self.issued(role, reason));
        Ok((certified(&certificate, &key)?, facts, issued))
    }

    /// Whether to issue. Without the authority's key a certificate is used to its last day.
    fn due(
        &self,
        authority: &Authority,
        path: &Path,
        facts: &Facts,
        wanted: &Names,
    ) -> Result<Option<Due>, PkiError> {
        let now = self.now();
        if authority.can_sign {
            return Ok(validity::due(facts, wanted, authority.ends, now));
        }
        if facts.not_after < now {
            let path = path.to_owned();
            return Err(PkiError::Expired { path, not_after: facts.not_after, now });
        }
        Ok(None)
    }

    async fn issue(
        &self,
        authority: &Authority,
        role: Role,
        names: &Names,
        key: &KeyPair,
    ) -> Result<CertificateDer<'static>, PkiError> {
        let path = self.certificate(role);
        let key_path = self.authority_key();
        let Some(authority_key) = self.read_key(&key_path)? else {
            return Err(PkiError::AuthorityKeyMissing { path: key_path, certificate: path });
        };
        let signer = Signer {
            certificate: &authority.certificate,
            key: authority_key,
            ends: authority.ends,
        };
        let owner = self.owner.identity(role);
        let pem = issue::leaf(signer, owner, names, key, self.serial(), self.now())?;
        files::write(&*self.env.disk, &path, pem.as_bytes()).await?;
        parse_certificate(&path, pem.as_bytes())
    }

    fn check_owner(
        &self,
        path: &Path,
        certificate: &CertificateDer<'_>,
        role: Role,
    ) -> Result<(), PkiError> {
        Identity::of(certificate)
            .and_then(|found| found.expect(self.owner.cluster, role, Some(self.owner.node)))
            .map(|_| ())
            .map_err(|wrong| PkiError::WrongOwner { path: path.to_owned(), wrong })
    }

    fn check_signature(
        &self,
        authority: &Authority,
        path: &Path,
        certificate: &CertificateDer<'_>,
        role: Role,
    ) -> Result<(), PkiError> {
        super::tls::check_signature(&authority.certificate, certificate, role).map_err(|_| {
            PkiError::WrongAuthority {
                certificate: path.to_owned(),
                authority: self.authority_certificate(),
            }
        })
    }

    fn facts(&self, role: Role, certificate: &CertificateDer<'_>) -> Result<Facts, PkiError> {
        self.facts_of(&self.certificate(role), certificate)
    }

    fn facts_of(&self, path: &Path, certificate: &CertificateDer<'_>) -> Result<Facts, PkiError> {
        issue::facts(certificate)
            .map_err(|found| PkiError::CertificateDamaged { path: path.to_owned(), found })
    }

    fn read_certificate(
        &self,
        path: &Path,
    ) -> Result<Option<(String, CertificateDer<'static>)>, PkiError> {
        let Some(bytes) = files::read(&*self.env.disk, path)? else { return Ok(None) };
        let certificate = parse_certificate(path, &bytes)?;
        match String::from_utf8(bytes) {
            Ok(pem) => Ok(Some((pem, certificate))),
            Err(error) => Err(PkiError::CertificateDamaged {
                path: path.to_owned(),
                found: error.utf8_error().to_string(),
            }),
        }
    }

    fn load_key(&self, role: Role) -> Result<KeyPair, PkiError> {
        let path = self.key(role);
        match self.read_key(&path)? {
            Some(key) => Ok(key),
            None => Err(PkiError::KeyDamaged { path, found: "no such file".to_owned() }),
        }
    }

    fn read_key(&self, path: &Path) -> Result<Option<KeyPair>, PkiError> {
        let Some(bytes) = files::read_secret(&*self.env.disk, path)? else { return Ok(None) };
        parse_key(path, &bytes).map(Some)
    }

    async fn load_or_make_key(&self, path: &Path) -> Result<KeyPair, PkiError> {
        if let Some(key) = self.read_key(path)? {
            return Ok(key);
        }
        let key = issue::new_key()?;
        files::write(&*self.env.disk, path, key.serialize_pem().as_bytes()).await?;
        Ok(key)
    }
}

fn parse_certificate(path: &Path, bytes: &[u8]) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(bytes).map_err(|error| PkiError::CertificateDamaged {
        path: path.to_owned(),
        found: error.to_string(),
    })
}

fn parse_key(path: &Path, bytes: &[u8]) -> Result<KeyPair, PkiError> {
    let damaged = |found: String| PkiError::KeyDamaged { path: path.to_owned(), found };
    let text = std::str::from_utf8(bytes).map_err(|error| damaged(error.to_string()))?;
    KeyPair::from_pem(text).map_err(|error| damaged(error.to_string()))
}

/// Whether the key is the certificate's.
fn check_match(
    certificate_path: &Path,
    certificate: &CertificateDer<'static>,
    key_path: &Path,
    key: &KeyPair,
) -> Result<(), PkiError> {
    match certified(certificate, key) {
        Ok(_) => Ok(()),
        Err(TlsError::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            Err(PkiError::KeyMismatch {
                certificate: certificate_path.to_owned(),
                key: key_path.to_owned(),
            })
        }
        Err(error) => Err(PkiError::CertificateDamaged {
            path: certificate_path.to_owned(),
            found: error.to_string(),
        }),
    }
}

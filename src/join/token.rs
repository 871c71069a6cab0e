//! Reads, makes and keeps the token: the secret that lets a server into the cluster.
//!
//! K3s' formats, because people copy tokens from one to the other: `K10<hash>::server:<password>`, where the hash names the
//! cluster's authority, or the password alone. K3s sends the password to whatever authority it was shown when there is no
//! hash, and takes passwords of any length. Here the password never travels ([`super::pake`]), and a short one is refused: what is
//! worth a cluster must not be guessed.
//!
//! # Invariants
//!
//! - No error, no `Debug` and no log line holds a password or a part of one.
//! - A [`Password`] has at least [`PASSWORD_CHARACTERS_MIN`] characters.
//! - Agents' tokens do not make servers.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::file;
use crate::announce;
use crate::config::{Secret, TokenSource};
use crate::env::Env;
use crate::events::{EventId, fields};

/// Name of the token's file in the data directory.
pub const FILE: &str = "token";

/// Shortest password. Eleven random letters and digits would already take centuries at the rate at which a cluster answers
/// guesses; people's passwords are less random than that, hence one more, and no less.
pub const PASSWORD_CHARACTERS_MIN: usize = 12;

/// Longest token; K3s' own are 101 characters.
const TOKEN_BYTES_MAX: usize = 4 * 1024;

const PREFIX: &str = "K10";
const HASH_CHARACTERS: usize = 64;
const SERVER: &str = "server";
const AGENT: &str = "node";

/// How long a token file is waited for, and how often it is looked for: as K3s.
const FILE_WAIT: Duration = Duration::from_secs(240);
const FILE_POLL: Duration = Duration::from_secs(2);
/// How often the wait is mentioned.
const FILE_MENTION: Duration = Duration::from_secs(30);

/// SHA-256 of the bytes of `ca.crt`, as it stands in a token. Not secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AuthorityHash([u8; 32]);

impl AuthorityHash {
    /// The hash of an authority's certificate file.
    pub fn of(authority_pem: &[u8]) -> Self {
        Self(Sha256::digest(authority_pem).into())
    }

    pub(super) const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != HASH_CHARACTERS || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for AuthorityHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AuthorityHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The secret part of a server's token. Prints as dots.
#[derive(Clone)]
pub struct Password(Secret);

impl Password {
    /// 256 random bits, in hexadecimal.
    pub fn random(env: &Env) -> Self {
        let mut bytes = [0; 32];
        env.entropy.fill(&mut bytes);
        Self(Secret::new(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
    }

    fn check(text: &str) -> Result<Self, TokenError> {
        if text.is_empty() {
            return Err(TokenError::NoPassword);
        }
        if !text.chars().all(|character| character.is_ascii_graphic()) {
            return Err(TokenError::Characters);
        }
        if text.len() < PASSWORD_CHARACTERS_MIN {
            return Err(TokenError::Short { found: text.len() });
        }
        Ok(Self(Secret::new(text)))
    }

    pub(super) fn expose(&self) -> &str {
        self.0.expose()
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    pub fn equals(&self, other: &Self) -> bool {
        // Of hashes, so that the time does not depend on the lengths either.
        let digest = |password: &Self| Sha256::digest(password.expose().as_bytes());
        let pairs = digest(self).into_iter().zip(digest(other));
        pairs.fold(0, |differences, (one, other)| differences | (one ^ other)) == 0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A server's token.
#[derive(Clone, Debug)]
pub struct Token {
    /// The authority that the cluster must have; `None` if the token does not say.
    pub authority: Option<AuthorityHash>,
    /// The secret.
    pub password: Password,
}

/// Why a text is not a token that makes a server. Says what was found, never the secret.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TokenError {
    /// Nothing there.
    #[error("token is empty")]
    Empty,
    /// Far too long.
    #[error("token is too long: found {found} bytes, expected at most {TOKEN_BYTES_MAX}")]
    Long {
        /// Its length.
        found: usize,
    },
    /// The hash has another length, as K3s words it.
    #[error(
        "invalid token CA hash length: found {found} characters between `K10` and `::`, expected {HASH_CHARACTERS}"
    )]
    HashLength {
        /// Its length.
        found: usize,
    },
    /// The hash is not hexadecimal.
    #[error(
        "invalid token CA hash: found other characters than hexadecimal digits between `K10` and `::`"
    )]
    HashDigits,
    /// Begins like a full token and does not go on like one.
    #[error(
        "invalid token format: begins with K10, but `{missing}` is missing, expected K10<ca-hash>::server:<password>"
    )]
    Format {
        /// What is missing.
        missing: &'static str,
    },
    /// Another user's.
    #[error("invalid token format: the user before the password is not `server`")]
    User,
    /// Nothing after `server:`.
    #[error("invalid token format: the password is empty")]
    NoPassword,
    /// An agent's token.
    #[error("this is an agent's token (user `node`): it lets agents in, not servers")]
    Agent,
    /// A bootstrap token.
    #[error("this is a bootstrap token (<id>.<secret>): it lets agents in, not servers")]
    Bootstrap,
    /// Spaces, line breaks, or letters that keyboards and files encode differently.
    #[error("the token's password has characters that are not printable ASCII, such as spaces")]
    Characters,
    /// Could be guessed.
    #[error(
        "the token's password is too short: found {found} characters, expected at least {PASSWORD_CHARACTERS_MIN}"
    )]
    Short {
        /// Its length.
        found: usize,
    },
}

impl TokenError {
    /// What the operator can do.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Empty
            | Self::Long { .. }
            | Self::HashLength { .. }
            | Self::HashDigits
            | Self::Format { .. }
            | Self::User
            | Self::NoPassword => {
                "copy the whole line from the file `token` in the data directory of a server of the cluster"
            }
            Self::Agent | Self::Bootstrap => {
                "use the server token: the line in the file `token` in the data directory of a server of the cluster"
            }
            Self::Characters => {
                "write the token without spaces and in ASCII, or leave `token` out when founding: one is made"
            }
            Self::Short { .. } => {
                "leave `token` out when founding and a strong one is made, or choose one with `openssl rand -hex 32`"
            }
        }
    }
}

impl Token {
    /// Reads a token as K3s does, and refuses what K3s accepts by mistake. Surrounding white space is not part of it.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(TokenError::Empty);
        }
        if TOKEN_BYTES_MAX < text.len() {
            return Err(TokenError::Long { found: text.len() });
        }
        let Some(rest) = text.strip_prefix(PREFIX) else {
            if is_bootstrap(text) {
                return Err(TokenError::Bootstrap);
            }
            return Ok(Self { authority: None, password: Password::check(text)? });
        };
        let (hash, credentials) =
            rest.split_once("::").ok_or(TokenError::Format { missing: "::" })?;
        let authority = match hash.len() {
            // K3s writes this when it does not know its authority.
            0 => None,
            HASH_CHARACTERS => Some(AuthorityHash::parse(hash).ok_or(TokenError::HashDigits)?),
            _ => return Err(TokenError::HashLength { found: hash.chars().count() }),
        };
        if is_bootstrap(credentials) {
            return Err(TokenError::Bootstrap);
        }
        let (user, password) =
            credentials.split_once(':').ok_or(TokenError::Format { missing: "server:" })?;
        match user {
            SERVER => Ok(Self { authority, password: Password::check(password)? }),
            AGENT => Err(TokenError::Agent),
            _ => Err(TokenError::User),
        }
    }

    /// The token of a cluster with this authority.
    pub const fn full(authority: AuthorityHash, password: Password) -> Self {
        Self { authority: Some(authority), password }
    }

    /// The text that people copy. Not to be logged.
    fn text(&self) -> Secret {
        let password = self.password.expose();
        Secret::new(match self.authority {
            Some(authority) => format!("{PREFIX}{authority}::{SERVER}:{password}"),
            None => password.to_owned(),
        })
    }

    /// Whether a new cluster may have this token. Its authority cannot be known before it is made: a token with a hash
    /// belongs to a cluster that exists, unless an interrupted founding made `made` already.
    pub fn check_founding(&self, made: Option<AuthorityHash>) -> Result<(), FoundingToken> {
        match self.authority {
            Some(found) if Some(found) != made => Err(FoundingToken { found }),
            Some(_) | None => Ok(()),
        }
    }
}

/// A cluster cannot be founded with the token of another one.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the token belongs to a cluster that exists: its authority has the hash {found}, and a new cluster makes its own"
)]
pub struct FoundingToken {
    /// The hash in the token.
    pub found: AuthorityHash,
}

impl FoundingToken {
    /// What the operator can do.
    pub const fn remedy(&self) -> &'static str {
        "to join that cluster, set `server` and remove `cluster-init`; to found a new one with the same password, give only what follows `server:`"
    }
}

/// Six and sixteen small letters and digits: what kubeadm and K3s call a bootstrap token.
fn is_bootstrap(text: &str) -> bool {
    let small =
        |part: &str| part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    text.split_once('.').is_some_and(|(id, secret)| {
        id.len() == 6 && secret.len() == 16 && small(id) && small(secret)
    })
}

/// Why there is no token.
#[derive(Debug, Error)]
pub enum ObtainError {
    /// It is none.
    #[error("{origin}: {error}")]
    Token {
        /// The key or the file.
        origin: String,
        /// What is wrong.
        #[source]
        error: TokenError,
    },
    /// The file did not appear.
    #[error("{path}: no such file, after waiting for {} s", FILE_WAIT.as_secs())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl ObtainError {
    /// What the operator can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Token { error, .. } => error.remedy().to_owned(),
            Self::Missing { path } => {
                format!(
                    "write the token to {} with mode 0600, or set `token-file` to where it is",
                    path.display()
                )
            }
            Self::Io { path, .. } => {
                format!(
                    "make {} readable for the user that runs k3s-server, and only for it",
                    path.display()
                )
            }
        }
    }
}

/// The token that the configuration names. A file that is not there yet is waited for.
pub async fn obtain(env: &Env, source: &TokenSource) -> Result<Token, ObtainError> {
    match source {
        TokenSource::Inline(secret) => Token::parse(secret.expose())
            .map_err(|error| ObtainError::Token { origin: "token".to_owned(), error }),
        TokenSource::File(path) => obtain_file(env, path).await,
        TokenSource::Credential(path) => obtain_credential(env, path),
    }
}

/// systemd has put it there before the start, for nobody but this service: there is nothing to wait for, and its mode shows
/// the access list by which it lets us read it.
fn obtain_credential(env: &Env, path: &Path) -> Result<Token, ObtainError> {
    let io = |source| ObtainError::Io { path: path.to_owned(), source };
    let bytes = file::read(&*env.disk, path).map_err(io)?;
    let bytes = bytes.ok_or_else(|| io(io::ErrorKind::NotFound.into()))?;
    parse(path, &bytes)
}

async fn obtain_file(env: &Env, path: &Path) -> Result<Token, ObtainError> {
    let begun = env.clock.now();
    let mut mentioned = None;
    loop {
        if let Some(token) = read(env, path)? {
            return Ok(token);
        }
        let waited = env.clock.now().saturating_duration_since(begun);
        if FILE_WAIT <= waited {
            return Err(ObtainError::Missing { path: path.to_owned() });
        }
        if mentioned.is_none_or(|at| FILE_MENTION <= waited.saturating_sub(at)) {
            mentioned = Some(waited);
            tracing::info!("waiting for the token file {}", path.display());
        }
        env.clock.sleep(FILE_POLL).await;
    }
}

/// The token in a file; `None` if there is no such file.
fn read(env: &Env, path: &Path) -> Result<Option<Token>, ObtainError> {
    let io = |source| ObtainError::Io { path: path.to_owned(), source };
    let Some(bytes) = file::read(&*env.disk, path).map_err(io)? else { return Ok(None) };
    if let Some(mode) = env.disk.mode(path).map_err(io)?
        && mode & 0o077 != 0
    {
        announce!(
            EventId::SecretExposed,
            { fields::PATH } = %path.display(),
            "{} holds the token and has mode {mode:04o}, expected 0600",
            path.display()
        );
    }
    parse(path, &bytes).map(Some)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Token, ObtainError> {
    let wrong = |error| ObtainError::Token { origin: path.display().to_string(), error };
    let text = std::str::from_utf8(bytes).map_err(|_| wrong(TokenError::Characters))?;
    Token::parse(text).map_err(wrong)
}

/// The token that this node keeps in its data directory.
pub fn load(env: &Env, dir: &Path) -> Result<Option<Token>, ObtainError> {
    read(env, &dir.join(FILE))
}

/// Keeps the token in the data directory: mode 0600, one line, ready to be copied.
pub async fn store(env: &Env, dir: &Path, token: &Token) -> Result<(), ObtainError> {
    let path = dir.join(FILE);
    let line = Secret::new(format!("{}\n", token.text().expose()));
    file::replace(env, &path, line.expose().as_bytes())
        .await
        .map_err(|source| ObtainError::Io { path, source })
}

/// The token of a founder: the one kept, else the one configured, else a new one; kept when this returns. Repeating it after a
/// crash gives the same token.
///
/// A configured password that differs from the kept one is refused, as in K3s: others have joined with the kept one.
pub async fn establish(
    env: &Env,
    dir: &Path,
    configured: Option<&Token>,
    authority: AuthorityHash,
) -> Result<Token, EstablishError> {
    if let Some(kept) = load(env, dir)? {
        return match configured {
            Some(configured) if !configured.password.equals(&kept.password) => {
                Err(EstablishError::Differs { path: dir.join(FILE) })
            }
            Some(_) | None if kept.authority == Some(authority) => Ok(kept),
            Some(_) | None => {
                let token = Token::full(authority, kept.password);
                store(env, dir, &token).await?;
                Ok(token)
            }
        };
    }
    if let Some(configured) = configured {
        configured.check_founding(Some(authority))?;
    }
    let password = configured.map_or_else(|| Password::random(env), |token| token.password.clone());
    let token = Token::full(authority, password);
    store(env, dir, &token).await?;
    Ok(token)
}

/// Why a node has no token to keep.
#[derive(Debug, Error)]
pub enum EstablishError {
    /// It cannot be read or written.
    #[error(transparent)]
    Obtain(#[from] ObtainError),
    /// It is another cluster's.
    #[error(transparent)]
    Founding(#[from] FoundingToken),
    /// The configuration has another one.
    #[error(
        "the configured token is not the cluster's: its password differs from the one in {path}"
    )]
    Differs {
        /// Where the cluster's is.
        path: PathBuf,
    },
}

impl EstablishError {
    /// What the operator can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Obtain(error) => error.remedy(),
            Self::Founding(error) => error.remedy().to_owned(),
            Self::Differs { path } => format!(
                "remove `token` from the configuration, or set it to what {} holds",
                path.display()
            ),
        }
    }
}

#[cfg(test)]
#[path = "token_tests.rs"]
mod tests;

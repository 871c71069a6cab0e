//! Proves to each other that both sides know the password, and agrees on a key, without either showing it.
//!
//! SPAKE2 gives both sides a key that is equal only if their passwords are. Two confirmations then prove it, the joiner's
//! first. Whoever interposes can try one password per attempt, on-line, and learns nothing else; whoever records can try none.
//!
//! # Shape
//!
//! Pure but for chance: [`Joiner::begin`] → message → [`answer`] → message → [`Joiner::finish`] → confirmation →
//! [`Session::confirm`] → confirmation and sealed credentials → [`Confirmed::open`]. Each step consumes the one before, so
//! none is used twice.
//!
//! # Invariants
//!
//! - Everything is bound to one [`Context`]: authority, cluster, and the TLS connection by its exporter (RFC 9266). An exchange
//!   relayed over another connection has another exporter and does not confirm.
//! - The server says nothing that depends on the password before the joiner has proved that it knows it.
//! - Role and both messages are under every confirmation: nothing can be reflected or replayed.
//!
//! # Not here
//!
//! How often one may try (`gate`), and what is sealed (`door`, `enrol`).

use bytes::Bytes;
use rand_core_06::{CryptoRng, RngCore};
use ring::{aead, hkdf, hmac};
use sha2::{Digest, Sha256};
use spake2::{Ed25519Group, Identity, Password as Spake2Password, Spake2};
use thiserror::Error;

use super::token::{AuthorityHash, Password};
use crate::env::Entropy;
use crate::types::ClusterId;

/// What names this protocol in every derivation. A change of the protocol changes it.
const PROTOCOL: &[u8] = b"k3s-server join 1";

/// Length of a message of the exchange: a side and a point.
pub const MESSAGE_BYTES: usize = 33;
/// Length of a confirmation.
pub const CONFIRMATION_BYTES: usize = 32;

/// What an exchange is bound to. Both sides must see the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The authority's certificate.
    pub authority: AuthorityHash,
    /// The cluster.
    pub cluster: ClusterId,
    /// The TLS connection: its exporter.
    pub exporter: [u8; 32],
}

/// Why an exchange ended. Does not say more, so that the other side does not learn more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PakeError {
    /// Not a message of this protocol.
    #[error("the message is not one of the key exchange")]
    Malformed,
    /// The other side has another password, or does not see the same connection.
    #[error("the other side does not know the same token, or the connection was tampered with")]
    NotConfirmed,
    /// What was sealed has been changed, or is not for us.
    #[error("the sealed message cannot be opened")]
    NotOpened,
}

/// Random numbers in the shape that spake2 takes.
struct Chance<'a>(&'a dyn Entropy);

impl RngCore for Chance<'_> {
    fn next_u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.0.fill(&mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), rand_core_06::Error> {
        self.0.fill(bytes);
        Ok(())
    }
}

impl CryptoRng for Chance<'_> {}

#[derive(Clone, Copy)]
enum Side {
    Joiner,
    Server,
}

impl Side {
    const fn name(self) -> &'static [u8] {
        match self {
            Self::Joiner => b"joiner",
            Self::Server => b"server",
        }
    }
}

fn identity(side: Side, context: &Context) -> Identity {
    let cluster = context.cluster.get().to_be_bytes();
    Identity::new(
        &[PROTOCOL, b" ", side.name(), context.authority.bytes().as_slice(), &cluster].concat(),
    )
}

fn secret(password: &Password) -> Spake2Password {
    Spake2Password::new(password.expose())
}

/// A joiner that waits for the server's message.
pub struct Joiner {
    state: Spake2<Ed25519Group>,
    context: Context,
    message: Bytes,
}

impl Joiner {
    /// Begins; the message is for the server.
    pub fn begin(entropy: &dyn Entropy, password: &Password, context: Context) -> (Self, Bytes) {
        let (state, message) = Spake2::<Ed25519Group>::start_a_with_rng(
            &secret(password),
            &identity(Side::Joiner, &context),
            &identity(Side::Server, &context),
            Chance(entropy),
        );
        let message = Bytes::from(message);
        (Self { state, context, message: message.clone() }, message)
    }

    /// Takes the server's message; the confirmation is for the server.
    pub fn finish(self, message: &[u8]) -> Result<(Expecting, Bytes), PakeError> {
        let shared = self.state.finish(message).map_err(|_| PakeError::Malformed)?;
        let keys = Keys::derive(&shared, &self.context, &self.message, message);
        let confirmation = keys.confirmation(Side::Joiner);
        Ok((Expecting { keys }, confirmation))
    }
}

/// A joiner that has proved its knowledge and waits for the server's proof.
pub struct Expecting {
    keys: Keys,
}

impl Expecting {
    /// Checks the server's confirmation. Only then is anything it sent worth reading.
    pub fn confirm(self, confirmation: &[u8]) -> Result<Confirmed, PakeError> {
        self.keys.check(Side::Server, confirmation)?;
        Ok(Confirmed { keys: self.keys })
    }
}

/// Proof that the other side knows the password and sees the same connection.
#[must_use]
pub struct Confirmed {
    keys: Keys,
}

impl Confirmed {
    /// Opens what the server sealed.
    pub fn open(self, sealed: &[u8]) -> Result<Vec<u8>, PakeError> {
        let mut bytes = sealed.to_vec();
        let key = self.keys.sealing();
        let opened = key
            .open_in_place(nonce(), aead::Aad::from(self.keys.transcript), &mut bytes)
            .map_err(|_| PakeError::NotOpened)?;
        Ok(opened.to_vec())
    }

    /// Seals for the joiner. Consumes the key, because it may be used once.
    pub fn seal(self, plain: &[u8]) -> Result<Bytes, PakeError> {
        let mut bytes = plain.to_vec();
        self.keys
            .sealing()
            .seal_in_place_append_tag(nonce(), aead::Aad::from(self.keys.transcript), &mut bytes)
            .map_err(|_| PakeError::NotOpened)?;
        Ok(bytes.into())
    }
}

/// A server that has answered and waits for the joiner's proof.
pub struct Session {
    keys: Keys,
}

/// Answers a joiner's message; what is returned goes to the joiner. Costs a few multiplications on the curve, so ask
/// `gate` before.
pub fn answer(
    entropy: &dyn Entropy,
    password: &Password,
    context: &Context,
    message: &[u8],
) -> Result<(Session, Bytes), PakeError> {
    if message.len() != MESSAGE_BYTES {
        return Err(PakeError::Malformed);
    }
    let (state, ours) = Spake2::<Ed25519Group>::start_b_with_rng(
        &secret(password),
        &identity(Side::Joiner, context),
        &identity(Side::Server, context),
        Chance(entropy),
    );
    let shared = state.finish(message).map_err(|_| PakeError::Malformed)?;
    let keys = Keys::derive(&shared, context, message, &ours);
    Ok((Session { keys }, ours.into()))
}

impl Session {
    /// Checks the joiner's confirmation; the server's own is for the joiner.
    pub fn confirm(self, confirmation: &[u8]) -> Result<(Confirmed, Bytes), PakeError> {
        self.keys.check(Side::Joiner, confirmation)?;
        let ours = self.keys.confirmation(Side::Server);
        Ok((Confirmed { keys: self.keys }, ours))
    }
}

/// What both sides derive from the shared secret and everything they saw.
struct Keys {
    root: hkdf::Prk,
    transcript: [u8; 32],
}

/// A length for HKDF.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

impl Keys {
    fn derive(shared: &[u8], context: &Context, joiner: &[u8], server: &[u8]) -> Self {
        let mut transcript = Sha256::new();
        // All of fixed length, but for the messages, whose lengths were checked before they were used.
        transcript.update(PROTOCOL);
        transcript.update(context.authority.bytes());
        transcript.update(context.cluster.get().to_be_bytes());
        transcript.update(context.exporter);
        transcript.update(joiner);
        transcript.update(server);
        let transcript: [u8; 32] = transcript.finalize().into();
        let root = hkdf::Salt::new(hkdf::HKDF_SHA256, &transcript).extract(shared);
        Self { root, transcript }
    }

    fn expand(&self, purpose: &[u8]) -> [u8; 32] {
        let mut key = [0; 32];
        let filled = self
            .root
            .expand(&[PROTOCOL, purpose], Length(key.len()))
            .and_then(|okm| okm.fill(&mut key));
        assert!(filled.is_ok(), "HKDF gives 32 bytes, far from its limit of 8,160");
        key
    }

    fn confirming(&self, side: Side) -> hmac::Key {
        let purpose = match side {
            Side::Joiner => b" joiner's confirmation",
            Side::Server => b" server's confirmation",
        };
        hmac::Key::new(hmac::HMAC_SHA256, &self.expand(purpose))
    }

    fn message(&self, side: Side) -> Vec<u8> {
        [side.name(), &self.transcript].concat()
    }

    fn confirmation(&self, side: Side) -> Bytes {
        let tag = hmac::sign(&self.confirming(side), &self.message(side));
        Bytes::copy_from_slice(tag.as_ref())
    }

    /// In constant time.
    fn check(&self, side: Side, confirmation: &[u8]) -> Result<(), PakeError> {
        hmac::verify(&self.confirming(side), &self.message(side), confirmation)
            .map_err(|_| PakeError::NotConfirmed)
    }

    fn sealing(&self) -> aead::LessSafeKey {
        let key = aead::UnboundKey::new(&aead::CHACHA20_POLY1305, &self.expand(b" credentials"));
        match key {
            Ok(key) => aead::LessSafeKey::new(key),
            Err(_) => unreachable!("a key of ChaCha20-Poly1305 has 32 bytes"),
        }
    }
}

/// Each key seals one message, so any nonce will do.
fn nonce() -> aead::Nonce {
    aead::Nonce::assume_unique_for_key([0; 12])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::join::token::Token;
    use crate::testkit::SeededEntropy;

    fn password(text: &str) -> Password {
        Token::parse(text).unwrap().password
    }

    fn context() -> Context {
        let authority = AuthorityHash::of(b"ca");
        Context { authority, cluster: ClusterId::new(7), exporter: [9; 32] }
    }

    /// A whole exchange; what the joiner opened.
    fn exchange(joiner: (&str, Context), server: (&str, Context)) -> Result<Vec<u8>, PakeError> {
        let entropy = SeededEntropy::new(3);
        let (state, message) = Joiner::begin(&entropy, &password(joiner.0), joiner.1);
        let (session, message) = answer(&entropy, &password(server.0), &server.1, &message)?;
        let (state, confirmation) = state.finish(&message)?;
        let (confirmed, confirmation) = session.confirm(&confirmation)?;
        let sealed = confirmed.seal(b"credentials")?;
        assert!(!sealed.windows(11).any(|window| window == b"credentials"));
        state.confirm(&confirmation)?.open(&sealed)
    }

    #[test]
    fn same_password_and_same_connection_agree() {
        let same = ("correct-horse", context());
        assert_eq!(exchange(same, same).unwrap(), b"credentials");
    }

    #[test]
    fn other_password_authority_cluster_or_connection_is_noticed() {
        let ours = context();
        let other_authority = Context { authority: AuthorityHash::of(b"mitm"), ..ours };
        let other_cluster = Context { cluster: ClusterId::new(8), ..ours };
        // Relayed: the man in the middle has one connection with each side.
        let relayed = Context { exporter: [8; 32], ..ours };
        for (what, server) in [
            ("password", ("battery-staple", ours)),
            ("authority", ("correct-horse", other_authority)),
            ("cluster", ("correct-horse", other_cluster)),
            ("connection", ("correct-horse", relayed)),
        ] {
            let result = exchange(("correct-horse", ours), server);
            assert_eq!(result, Err(PakeError::NotConfirmed), "{what}");
        }
    }

    #[test]
    fn truncated_reflected_and_foreign_messages_are_refused() {
        let entropy = SeededEntropy::new(5);
        let word = password("correct-horse");
        let (_, message) = Joiner::begin(&entropy, &word, context());
        for length in 0..message.len() {
            let refused = answer(&entropy, &word, &context(), &message[..length]).err();
            assert_eq!(refused, Some(PakeError::Malformed), "{length} bytes");
        }
        // A joiner's own message sent back to it is not a server's.
        let (state, message) = Joiner::begin(&entropy, &word, context());
        assert_eq!(state.finish(&message).err(), Some(PakeError::Malformed));
        // About half of all numbers are no coordinate of a point of the curve.
        let no_points = (0..100).filter(|first| {
            let mut bad = message.to_vec();
            bad[1] = *first;
            answer(&entropy, &word, &context(), &bad).err() == Some(PakeError::Malformed)
        });
        assert!((20..80).contains(&no_points.count()));
    }

    #[test]
    fn joiners_confirmation_is_not_the_servers() {
        let entropy = SeededEntropy::new(6);
        let word = password("correct-horse");
        let (state, message) = Joiner::begin(&entropy, &word, context());
        let (_, message) = answer(&entropy, &word, &context(), &message).unwrap();
        let (state, confirmation) = state.finish(&message).unwrap();
        assert_eq!(state.confirm(&confirmation).err(), Some(PakeError::NotConfirmed));
    }

    #[test]
    fn confirmation_of_an_earlier_exchange_is_refused() {
        let entropy = SeededEntropy::new(7);
        let word = password("correct-horse");
        let (state, first) = Joiner::begin(&entropy, &word, context());
        let (_, reply) = answer(&entropy, &word, &context(), &first).unwrap();
        let (_, recorded) = state.finish(&reply).unwrap();
        // The same first message again: the server's part is new, and so is every key.
        let (session, again) = answer(&entropy, &word, &context(), &first).unwrap();
        assert_ne!(reply, again);
        assert_eq!(session.confirm(&recorded).err(), Some(PakeError::NotConfirmed));
    }

    #[test]
    fn every_changed_bit_of_what_is_sealed_is_noticed() {
        let entropy = SeededEntropy::new(8);
        let word = password("correct-horse");
        for bit in [0, 7, 40, 88, 200] {
            let (state, message) = Joiner::begin(&entropy, &word, context());
            let (session, message) = answer(&entropy, &word, &context(), &message).unwrap();
            let (state, confirmation) = state.finish(&message).unwrap();
            let (confirmed, confirmation) = session.confirm(&confirmation).unwrap();
            let mut sealed = confirmed.seal(b"credentials").unwrap().to_vec();
            sealed[bit / 8] ^= 1 << (bit % 8);
            let opened = state.confirm(&confirmation).unwrap().open(&sealed);
            assert_eq!(opened, Err(PakeError::NotOpened));
        }
    }
}

//! What a stranger sends to the door, and what a joiner gets back: the key exchange, and the message in the end.

use k3s_server::env::Entropy;
use k3s_server::join::pake::{self, Context, Joiner};
use k3s_server::join::{AuthorityHash, Token};
use k3s_server::testkit::SeededEntropy;
use k3s_server::types::ClusterId;

use super::{Input, put_piece};

pub const DICTIONARY: &[&[u8]] = &[b"A", b"B", b"S", &[33, 0], &[32, 0], &[0xff; 32], &[0; 32]];

const ENTROPY_SEED: u64 = 11;

fn context() -> Context {
    let authority = AuthorityHash::of(b"authority");
    Context { authority, cluster: ClusterId::new(7), exporter: [5; 32] }
}

/// Three pieces: the joiner's message, the server's, and a confirmation.
pub fn seeds() -> Vec<Vec<u8>> {
    let password = Token::parse("correct-horse-battery").unwrap().password;
    let entropy = SeededEntropy::new(ENTROPY_SEED);
    let (joiner, message) = Joiner::begin(&entropy, &password, context());
    let (_, reply) = pake::answer(&entropy, &password, &context(), &message).unwrap();
    let (_, confirmation) = joiner.finish(&reply).unwrap();
    let mut seed = Vec::new();
    for piece in [&message, &reply, &confirmation] {
        put_piece(&mut seed, piece);
    }
    vec![seed]
}

/// Whoever does not know the password never gets a confirmation accepted, whatever is sent in whatever order.
pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let mut piece = || {
        let length = input.u16();
        input.piece(length).to_vec()
    };
    let (theirs, reply, confirmation) = (piece(), piece(), piece());
    let password = Token::parse("a-password-nobody-has").unwrap().password;
    let entropy = SeededEntropy::new(ENTROPY_SEED);
    // Chance that the input cannot know.
    entropy.next_u64();
    if let Ok((session, _)) = pake::answer(&entropy, &password, &context(), &theirs) {
        assert!(session.confirm(&confirmation).is_err(), "let in without the password");
    }
    let (joiner, _) = Joiner::begin(&entropy, &password, context());
    if let Ok((expecting, _)) = joiner.finish(&reply) {
        assert!(expecting.confirm(&confirmation).is_err(), "believed without the password");
    }
}

//! What is a token, what is refused, and that nothing ever shows one.

use super::*;
use crate::env::Disk;
use crate::testkit::{self, FaultDisk, ManualClock};

const HASH: &str = "0123456789abcdef0123456789ABCDEF0123456789abcdef0123456789abcdef";
const PASSWORD: &str = "correct:horse::battery";

fn world() -> (FaultDisk, ManualClock, Env) {
    let (disk, clock) = (FaultDisk::with_dir(Path::new("db")), ManualClock::new());
    let env = testkit::env(&disk, &clock, 1);
    (disk, clock, env)
}

#[test]
fn every_form_of_a_server_token_is_read() {
    for (text, authority, password) in [
        (format!("K10{HASH}::server:{PASSWORD}"), true, PASSWORD),
        (format!("  K10{HASH}::server:{PASSWORD}\n"), true, PASSWORD),
        (format!("K10::server:{PASSWORD}"), false, PASSWORD),
        (PASSWORD.to_owned(), false, PASSWORD),
        ("k10-is-no-prefix".to_owned(), false, "k10-is-no-prefix"),
        ("ABCDEF.0123456789abcdef".to_owned(), false, "ABCDEF.0123456789abcdef"),
    ] {
        let token = Token::parse(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(token.authority.is_some(), authority, "{text}");
        assert_eq!(token.password.expose(), password);
        let again = Token::parse(token.text().expose()).unwrap();
        assert_eq!(again.authority, token.authority);
        assert!(again.password.equals(&token.password));
    }
}

#[test]
fn everything_else_is_refused_with_the_reason() {
    for (text, expected) in [
        (String::new(), TokenError::Empty),
        ("  \n".to_owned(), TokenError::Empty),
        ("SECRET".to_owned(), TokenError::Short { found: 6 }),
        ("elevenchars".to_owned(), TokenError::Short { found: 11 }),
        ("correct horse battery".to_owned(), TokenError::Characters),
        ("p\u{e4}ssword-p\u{e4}ssword".to_owned(), TokenError::Characters),
        ("abcdef.0123456789abcdef".to_owned(), TokenError::Bootstrap),
        (format!("K10{HASH}::abcdef.0123456789abcdef"), TokenError::Bootstrap),
        (format!("K10{HASH}::node:{PASSWORD}"), TokenError::Agent),
        (format!("K10{HASH}::admin:{PASSWORD}"), TokenError::User),
        (format!("K10{HASH}::server:"), TokenError::NoPassword),
        (format!("K10{HASH}::server:SECRET"), TokenError::Short { found: 6 }),
        (format!("K10{HASH}::{}", "x".repeat(30)), TokenError::Format { missing: "server:" }),
        (format!("K10{HASH}:server:{PASSWORD}"), TokenError::HashLength { found: 85 }),
        ("K10abcdefghijklmnop".to_owned(), TokenError::Format { missing: "::" }),
        (format!("K10{}::server:{PASSWORD}", &HASH[1..]), TokenError::HashLength { found: 63 }),
        (format!("K10{}x::server:{PASSWORD}", &HASH[1..]), TokenError::HashDigits),
        ("x".repeat(5_000), TokenError::Long { found: 5_000 }),
    ] {
        let error = Token::parse(&text).expect_err(&text);
        assert_eq!(error, expected, "{text}");
        for secret in [PASSWORD, "SECRET", "elevenchars", "0123456789abcdef", "admin", "horse"] {
            let said = format!("{error} {error:?} {}", error.remedy());
            assert!(!said.contains(secret), "{said}");
        }
    }
}

#[test]
fn no_way_of_printing_shows_the_password() {
    let token = Token::parse(&format!("K10{HASH}::server:{PASSWORD}")).unwrap();
    for said in [format!("{token:?}"), format!("{token:#?}"), format!("{:?}", token.password)] {
        assert!(!said.contains("horse") && said.contains("****"), "{said}");
    }
}

#[test]
fn passwords_are_equal_only_whole() {
    let password = |text: &str| Password::check(text).unwrap();
    assert!(password("correct-horse").equals(&password("correct-horse")));
    for other in ["correct-horsf", "dorrect-horse", "correct-horse-", "correct-hors"] {
        assert!(!password("correct-horse").equals(&password(other)), "{other}");
    }
}

#[test]
fn made_token_has_256_bits_and_the_form_of_k3s() {
    let (disk, _, env) = world();
    let authority = AuthorityHash::of(b"ca");
    let dir = Path::new("db");

    let token = testkit::wait(establish(&env, dir, None, authority)).unwrap();

    assert_eq!(token.password.expose().len(), 64);
    assert!(!token.password.equals(&Password::random(&env)), "every time the same");
    let file = String::from_utf8(disk.durable(&dir.join(FILE)).unwrap()).unwrap();
    assert_eq!(file, format!("K10{authority}::server:{}\n", token.password.expose()));
    let again = testkit::wait(establish(&env, dir, None, authority)).unwrap();
    assert!(again.password.equals(&token.password), "made anew at the second start");
}

#[test]
fn founder_keeps_the_configured_password_and_refuses_another_later() {
    let (_, _, env) = world();
    let (dir, authority) = (Path::new("db"), AuthorityHash::of(b"ca"));
    let configured = Token::parse(PASSWORD).unwrap();
    let token = testkit::wait(establish(&env, dir, Some(&configured), authority)).unwrap();
    assert_eq!((token.authority, token.password.expose()), (Some(authority), PASSWORD));

    let other = Token::parse("another-password").unwrap();
    let error = testkit::wait(establish(&env, dir, Some(&other), authority)).unwrap_err();
    assert!(matches!(error, EstablishError::Differs { .. }), "{error}");
    assert!(!error.to_string().contains("another") && !error.to_string().contains("horse"));
}

#[test]
fn cluster_is_not_founded_with_the_token_of_another_one() {
    let (disk, _, env) = world();
    let foreign = Token::parse(&format!("K10{HASH}::server:{PASSWORD}")).unwrap();
    let ours = AuthorityHash::of(b"ca");
    let error = testkit::wait(establish(&env, Path::new("db"), Some(&foreign), ours)).unwrap_err();
    assert!(matches!(error, EstablishError::Founding(_)), "{error}");
    assert_eq!(disk.files(), Vec::<PathBuf>::new());
    // The same start again, after a crash: by then the hash may be known and written into the configuration.
    assert_eq!(foreign.check_founding(foreign.authority), Ok(()));
    assert!(foreign.check_founding(None).is_err());
}

#[tokio::test]
async fn token_file_is_waited_for_and_trimmed() {
    let (disk, clock, env) = world();
    let path = Path::new("db").join("given");
    let source = TokenSource::File(path.clone());
    let waiting = tokio::spawn({
        let env = env.clone();
        async move { obtain(&env, &source).await }
    });
    for _ in 0..10 {
        tokio::task::yield_now().await;
        clock.advance(FILE_POLL);
    }
    let file = env.disk.open(&path, crate::env::Open::Create).unwrap();
    file.write_at(format!(" {PASSWORD}\n\n").as_bytes(), 0).unwrap();
    while !waiting.is_finished() {
        tokio::task::yield_now().await;
        clock.advance(FILE_POLL);
    }
    assert_eq!(waiting.await.unwrap().unwrap().password.expose(), PASSWORD);
    assert!(disk.exists(&path).unwrap());
}

#[tokio::test]
async fn token_file_is_given_up_after_four_minutes() {
    let (_, clock, env) = world();
    let source = TokenSource::File(PathBuf::from("db/never"));
    let begun = env.clock.now();
    let waiting = tokio::spawn({
        let env = env.clone();
        async move { obtain(&env, &source).await }
    });
    while !waiting.is_finished() {
        tokio::task::yield_now().await;
        clock.advance(FILE_POLL);
    }
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(error, ObtainError::Missing { .. }), "{error}");
    let waited = env.clock.now() - begun;
    assert!(FILE_WAIT <= waited && waited < FILE_WAIT * 2, "{waited:?}");
}

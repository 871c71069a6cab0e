//! Knows how K3s' YAML reader (YAML 1.1) understands an unquoted word.
//!
//! K3s reads its file with a YAML 1.1 library and turns every value back into text. `0644` becomes 420, `yes`
//! becomes true, a token of digits with an `e` becomes a power of ten. Our parser would keep the words as they
//! are, so the same file would mean two things to two servers of one cluster. Where that is so, the word is
//! refused and the remedy is a pair of quotes.
//!
//! # Invariants
//!
//! - [`upstream_reading`] is `None` exactly where both readers see the same text.

/// The text K3s would work with, where it differs from what is written.
pub fn upstream_reading(word: &str) -> Option<String> {
    let reading = if let Some(value) = boolean(word) {
        value.to_string()
    } else if is_null(word) {
        String::new()
    } else {
        number(word)?
    };
    (reading != word).then_some(reading)
}

/// YAML 1.1 booleans, as the library spells them.
pub fn boolean(word: &str) -> Option<bool> {
    match word {
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            Some(true)
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            Some(false)
        }
        _ => None,
    }
}

/// Whether the word means "nothing".
pub fn is_null(word: &str) -> bool {
    matches!(word, "" | "~" | "null" | "Null" | "NULL")
}

fn number(word: &str) -> Option<String> {
    match word {
        ".nan" | ".NaN" | ".NAN" => return Some("NaN".to_owned()),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => return Some("+Inf".to_owned()),
        "-.inf" | "-.Inf" | "-.INF" => return Some("-Inf".to_owned()),
        _ => {}
    }
    let first = word.bytes().next()?;
    if !(first.is_ascii_digit() || matches!(first, b'+' | b'-' | b'.')) {
        return None;
    }
    let digits = word.replace('_', "");
    if first != b'.'
        && let Some(integer) = integer(&digits)
    {
        return Some(integer);
    }
    is_float(&digits).then(|| digits.parse::<f64>().ok()).flatten().map(go_float)
}

/// As Go's `ParseInt` and `ParseUint` with base 0: `0x`, `0b`, `0o` and a leading 0 choose the base.
fn integer(digits: &str) -> Option<String> {
    let (negative, unsigned) = match digits.as_bytes().first()? {
        b'-' => (true, &digits[1..]),
        b'+' => (false, &digits[1..]),
        _ => (false, digits),
    };
    let lower = unsigned.to_ascii_lowercase();
    let (body, radix) = if let Some(body) = lower.strip_prefix("0x") {
        (body, 16)
    } else if let Some(body) = lower.strip_prefix("0b") {
        (body, 2)
    } else if let Some(body) = lower.strip_prefix("0o") {
        (body, 8)
    } else if 1 < lower.len() && lower.starts_with('0') {
        (&lower[1..], 8)
    } else {
        (lower.as_str(), 10)
    };
    if body.is_empty() || !body.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let value = i128::from_str_radix(body, radix).ok()?;
    let value = if negative { -value } else { value };
    (i128::from(i64::MIN) <= value && value <= i128::from(u64::MAX)).then(|| value.to_string())
}

/// The library's pattern: optional sign, digits with at most one point, optional exponent.
fn is_float(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let exponent_is_right = exponent.is_none_or(|exponent| {
        let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
    });
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    exponent_is_right
        && !(whole.is_empty() && fraction.is_empty())
        && whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit())
}

/// As Go prints a `float64` with `%v`: shortest digits; an exponent, of at least two digits, from 1e+06 on
/// and below 1e-04.
fn go_float(value: f64) -> String {
    const EXPONENT_MAX: i32 = 6;
    if value.is_infinite() {
        return if value < 0.0 { "-Inf" } else { "+Inf" }.to_owned();
    }
    let shortest = format!("{value:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((shortest.as_str(), "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..EXPONENT_MAX).contains(&exponent) {
        return format!("{value}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_those_measured_on_the_library_of_k3s() {
        for (word, reading) in [
            ("0644", "420"),
            ("yes", "true"),
            ("Off", "false"),
            ("1e10", "1e+10"),
            ("012345678901", "1.2345678901e+10"),
            ("0x1F", "31"),
            ("0b101", "5"),
            ("0o17", "15"),
            ("1_000", "1000"),
            ("123456789012345678901234567890", "1.2345678901234568e+29"),
            ("089", "89"),
            ("+5", "5"),
            ("1.10", "1.1"),
            ("1.0", "1"),
            (".5", "0.5"),
            ("1234567.5", "1.2345675e+06"),
            ("0.00001", "1e-05"),
            ("~", ""),
            ("null", ""),
            ("-0", "0"),
            (".inf", "+Inf"),
        ] {
            assert_eq!(upstream_reading(word).as_deref(), Some(reading), "{word}");
        }
    }

    #[test]
    fn words_that_both_readers_agree_on_have_no_other_reading() {
        for word in [
            "12345",
            "0",
            "-7",
            "1.5",
            "true",
            "false",
            "1:30",
            "2001-12-14",
            "10.42.0.0/16",
            "10.43.0.10",
            "K10abc::server:x",
            "1h30m",
            "250ms",
            "0xyz",
            "1e",
            "e10",
            "1.2.3",
            "-",
            "+",
            ".",
            "..",
            "_1",
            "",
            "18446744073709551615",
            "ё",
        ] {
            assert_eq!(upstream_reading(word), None, "{word}");
        }
    }
}

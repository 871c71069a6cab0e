//! Reads one value: text in, typed value or "found, expected" out.
//!
//! Accepts what Go's standard library accepts where K3s uses it (booleans, durations), and refuses what K3s
//! would take and misread later (host bits in a network, upper-case domains).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::cidr::Cidr;
use super::key::Kind;
use super::keys::COMPONENTS;
use super::suggest;
use super::url::ServerUrl;

/// Why a text is not a value of its kind. Completed by the caller with key and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Predicate to follow the key: "is not a number".
    pub what: &'static str,
    /// What would have been right.
    pub expected: String,
    /// The value to write instead, when it is known.
    pub value: Option<String>,
    /// What else to do, when it is not a value.
    pub advice: Option<&'static str>,
}

impl Wrong {
    pub(super) fn new(what: &'static str, expected: impl Into<String>) -> Self {
        Self { what, expected: expected.into(), value: None, advice: None }
    }

    pub(super) fn value(mut self, value: impl Into<String>) -> Self {
        self.value = Some(value.into());
        self
    }

    pub(super) const fn advice(mut self, advice: &'static str) -> Self {
        self.advice = Some(advice);
        self
    }
}

/// Checks one item of a value.
pub fn check(kind: Kind, text: &str) -> Result<(), Wrong> {
    match kind {
        Kind::Bool => boolean(text).map(drop),
        Kind::Int(min, max) => integer(text, min, max).map(drop),
        Kind::Duration => duration(text).map(drop),
        Kind::OneOf(words) => one_of(text, words),
        Kind::Cidr => Cidr::parse(text).map(drop),
        Kind::Address => address(text).map(drop),
        Kind::SocketAddress => socket_address(text).map(drop),
        Kind::PortRange => port_range(text).map(drop),
        Kind::Domain => domain(text),
        Kind::Label => label(text),
        Kind::Registry => registry(text),
        Kind::Component => component(text),
        Kind::ServerUrl => ServerUrl::parse(text).map(drop),
        Kind::Argument => argument(text).map(drop),
        Kind::Secret => secret(text),
        Kind::Text | Kind::Path => plain(text),
    }
}

/// As Go's `strconv.ParseBool`.
pub fn boolean(text: &str) -> Result<bool, Wrong> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(Wrong::new("is not a boolean", "true or false")),
    }
}

/// A decimal number.
pub fn integer(text: &str, min: i64, max: i64) -> Result<i64, Wrong> {
    let wrong = |what| Wrong::new(what, format!("a decimal number from {min} to {max}"));
    let digits = text.strip_prefix('-').unwrap_or(text);
    let decimal = !digits.is_empty()
        && digits.bytes().all(|b| b.is_ascii_digit())
        && (digits == "0" || !digits.starts_with('0'));
    if !decimal {
        return Err(wrong("is not a number"));
    }
    text.parse()
        .ok()
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| wrong("is out of range"))
}

/// As Go's `time.ParseDuration`, without a sign: `250ms`, `1.5h`, `1h30m`, `0`.
pub fn duration(text: &str) -> Result<Duration, Wrong> {
    parse_duration(text).ok_or_else(|| {
        Wrong::new("is not a duration", "a number with a unit, such as 250ms, 30s, 5m or 1h30m")
    })
}

fn parse_duration(text: &str) -> Option<Duration> {
    /// Go's own bound: 2^63 - 1 nanoseconds.
    const NANOS_MAX: u128 = i64::MAX as u128;
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0_u128);
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let nanos: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        total = total.checked_add(scaled(number, nanos)?)?;
        rest = tail;
    }
    if text.is_empty() || NANOS_MAX < total {
        return None;
    }
    Some(Duration::from_nanos(u64::try_from(total).ok()?))
}

/// `number` times `nanos`, cut to whole nanoseconds.
fn scaled(number: &str, nanos: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || 20 < whole.len() {
        return None;
    }
    let mut total =
        if whole.is_empty() { 0 } else { whole.parse::<u128>().ok()?.checked_mul(nanos)? };
    let mut unit = nanos;
    for digit in fraction.bytes() {
        unit /= 10;
        total = total.checked_add(u128::from(digit - b'0') * unit)?;
    }
    Some(total)
}

/// An IP address in its usual form.
pub fn address(text: &str) -> Result<IpAddr, Wrong> {
    text.parse().map_err(|_| {
        Wrong::new("is not an IP address", "an address such as 192.168.1.10 or fd00::10")
    })
}

/// An IP address with a port; port 0 lets the kernel choose.
pub fn socket_address(text: &str) -> Result<SocketAddr, Wrong> {
    text.parse().map_err(|_| {
        Wrong::new("is not an address with a port", "IP:PORT, such as 127.0.0.1:2379 or [::1]:2379")
    })
}

/// `first-last`, both ports, in order.
pub fn port_range(text: &str) -> Result<(u16, u16), Wrong> {
    let wrong = || Wrong::new("is not a range of ports", "FIRST-LAST, such as 30000-32767");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let port = |text: &str| {
        integer(text, 1, 65_535).ok().and_then(|port| u16::try_from(port).ok()).ok_or_else(wrong)
    };
    let (first, last) = (port(first)?, port(last)?);
    if last < first {
        return Err(wrong());
    }
    Ok((first, last))
}

fn one_of(text: &str, words: &[&str]) -> Result<(), Wrong> {
    if words.contains(&text) {
        return Ok(());
    }
    let wrong = Wrong::new("has an unknown value", format!("one of {}", words.join(", ")));
    let longer = || words.iter().copied().find(|word| !text.is_empty() && word.starts_with(text));
    Err(match suggest::nearest(text, words.iter().copied()).or_else(longer) {
        Some(word) => wrong.value(word),
        None => wrong,
    })
}

/// Names people put into `disable` that have a switch of their own, or another name.
const NOT_COMPONENTS: &[(&str, &str)] = &[
    ("network-policy", "use `disable-network-policy: true` (--disable-network-policy)"),
    ("kube-proxy", "use `disable-kube-proxy: true` (--disable-kube-proxy)"),
    ("helm-controller", "use `disable-helm-controller: true` (--disable-helm-controller)"),
    ("cloud-controller", "use `disable-cloud-controller: true` (--disable-cloud-controller)"),
    ("scheduler", "use `disable-scheduler: true` (--disable-scheduler)"),
    ("flannel", "use `flannel-backend: none` (--flannel-backend=none)"),
    ("local-path", "the component is called local-storage"),
    ("local-path-provisioner", "the component is called local-storage"),
    ("svclb", "the component is called servicelb"),
    ("klipper-lb", "the component is called servicelb"),
    ("dns", "the component is called coredns"),
];

fn component(text: &str) -> Result<(), Wrong> {
    if COMPONENTS.contains(&text) {
        return Ok(());
    }
    let wrong =
        Wrong::new("names an unknown component", format!("one of {}", COMPONENTS.join(", ")));
    if let Some((_, advice)) = NOT_COMPONENTS.iter().find(|(name, _)| *name == text) {
        return Err(wrong.advice(advice));
    }
    Err(match suggest::nearest(text, COMPONENTS.iter().copied()) {
        Some(word) => wrong.value(word),
        None => wrong,
    })
}

/// One part of a name, by RFC 1123: lower case, as Kubernetes wants it.
fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn domain(text: &str) -> Result<(), Wrong> {
    if text.len() <= 253 && text.split('.').all(is_label) {
        return Ok(());
    }
    let wrong = Wrong::new(
        "is not a domain",
        "lower-case letters, digits, `-` and `.`, such as cluster.local",
    );
    let lower = text.to_ascii_lowercase();
    let lower = lower.trim_end_matches('.');
    Err(if lower != text && domain(lower).is_ok() { wrong.value(lower) } else { wrong })
}

fn label(text: &str) -> Result<(), Wrong> {
    if is_label(text) {
        return Ok(());
    }
    let wrong = Wrong::new("is not a name", "lower-case letters, digits and `-`");
    let lower = text.to_ascii_lowercase();
    Err(if is_label(&lower) { wrong.value(lower) } else { wrong })
}

/// What may stand before the name of an image.
fn registry(text: &str) -> Result<(), Wrong> {
    let wrong =
        || Wrong::new("is not a registry", "HOST[:PORT][/PATH], such as registry.example:5000");
    if let Some((_, rest)) = text.split_once("://") {
        let bare = rest.trim_end_matches('/');
        return Err(if registry(bare).is_ok() { wrong().value(bare) } else { wrong() });
    }
    let harmless = |c: char| c.is_ascii_graphic() && !matches!(c, '?' | '#' | '@' | '"' | '\\');
    if text.chars().all(harmless)
        && !text.is_empty()
        && !text.starts_with('/')
        && !text.ends_with('/')
    {
        return Ok(());
    }
    Err(wrong())
}

/// `name=value`; the value may be empty or missing, as for a switch.
pub fn argument(text: &str) -> Result<(&str, Option<&str>), Wrong> {
    let text = text.trim_start_matches('-');
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(Wrong::new("is not an argument", "NAME=VALUE"));
    }
    Ok((name, value))
}

fn secret(text: &str) -> Result<(), Wrong> {
    if text.contains(char::is_control) {
        return Err(Wrong::new("holds a line break or control character", "one line of text"));
    }
    Ok(())
}

fn plain(text: &str) -> Result<(), Wrong> {
    if text.contains('\0') {
        return Err(Wrong::new("holds a zero byte", "text"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans_are_those_of_go() {
        for text in ["1", "t", "T", "TRUE", "true", "True"] {
            assert_eq!(boolean(text), Ok(true), "{text}");
        }
        for text in ["0", "f", "F", "FALSE", "false", "False"] {
            assert_eq!(boolean(text), Ok(false), "{text}");
        }
        for text in ["", "yes", "on", "tRUE", " true", "2"] {
            assert!(boolean(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        let ms = Duration::from_millis;
        for (text, expected) in [
            ("0", ms(0)),
            ("0s", ms(0)),
            ("250ms", ms(250)),
            ("1.5h", ms(5_400_000)),
            ("1h30m", ms(5_400_000)),
            (".5s", ms(500)),
            ("1.s", ms(1_000)),
            ("10m0s", ms(600_000)),
            ("1us", Duration::from_micros(1)),
            ("1µs", Duration::from_micros(1)),
            ("1.0000000001s", ms(1_000)),
        ] {
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "5",
            "s",
            ".s",
            "1.2.3s",
            "-5s",
            "+5s",
            "5 s",
            "5S",
            "1d",
            "99999999999999999999999h",
            "300000000h",
            "1e3s",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_decimal_and_bounded() {
        assert_eq!(integer("65535", 1, 65_535), Ok(65_535));
        assert_eq!(integer("-3", -5, 5), Ok(-3));
        for text in [
            "",
            "-",
            "0",
            "65536",
            "06443",
            "0x50",
            "1_000",
            "1e3",
            "+5",
            " 5",
            "99999999999999999999",
        ] {
            assert!(integer(text, 1, 65_535).is_err(), "{text}");
        }
    }

    #[test]
    fn component_with_a_switch_of_its_own_is_explained() {
        let wrong = component("network-policy").unwrap_err();

        assert!(wrong.advice.unwrap().contains("--disable-network-policy"));
        assert_eq!(component("treafik").unwrap_err().value.as_deref(), Some("traefik"));
        for name in COMPONENTS {
            assert_eq!(component(name), Ok(()));
        }
    }

    #[test]
    fn domains_are_lower_case_names() {
        for text in ["cluster.local", "a", "k8s-1.example.org", "1.2"] {
            assert_eq!(domain(text), Ok(()), "{text}");
        }
        for text in ["", ".", "a..b", "-a.b", "a-.b", "a_b", "ä.local", "a b"] {
            assert_eq!(domain(text).unwrap_err().value, None, "{text}");
        }
        assert_eq!(domain("Cluster.Local.").unwrap_err().value.as_deref(), Some("cluster.local"));
        assert!(domain(&"a".repeat(64)).is_err());
    }

    #[test]
    fn namespaces_and_registries_are_refused_with_the_right_spelling() {
        assert_eq!(label("kube-system"), Ok(()));
        assert_eq!(label("Kube-System").unwrap_err().value.as_deref(), Some("kube-system"));
        for text in ["", "a.b", "-a", "a_b"] {
            assert_eq!(label(text).unwrap_err().value, None, "{text}");
        }
        for text in ["registry.example", "r:5000", "[fd00::1]:5000/mirror", "docker.io/rancher"] {
            assert_eq!(registry(text), Ok(()), "{text}");
        }
        let wrong = registry("https://registry.example:5000/").unwrap_err();
        assert_eq!(wrong.value.as_deref(), Some("registry.example:5000"));
        for text in ["", "/", "a b", "user@registry", "registry/"] {
            assert_eq!(registry(text).unwrap_err().value, None, "{text}");
        }
    }

    #[test]
    fn port_ranges_have_an_order() {
        assert_eq!(port_range("30000-32767"), Ok((30_000, 32_767)));
        for text in ["", "-", "1", "5-4", "0-5", "1-65536", "a-b", "1-2-3"] {
            assert!(port_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn arguments_may_carry_dashes_and_equal_signs() {
        assert_eq!(argument("--a=b=c"), Ok(("a", Some("b=c"))));
        assert_eq!(argument("pre-vote"), Ok(("pre-vote", None)));
        assert!(argument("=x").is_err());
        assert!(argument("--").is_err());
    }
}

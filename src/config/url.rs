//! The address of a server to join.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::kinds::{Wrong, integer};

/// Port of the K3s supervisor. In a `server` URL it only says "this is a K3s server".
pub const SUPERVISOR_PORT: u16 = 6443;

/// Port on which our servers talk to each other and let new ones join.
pub const PEER_PORT: u16 = 2380;

/// `https://host[:port]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUrl {
    host: String,
    port: Option<u16>,
}

impl ServerUrl {
    /// Reads the URL. Only HTTPS, because the token's pin of the certificate authority needs it.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let wrong = || Wrong::new("is not the URL of a server", "https://HOST:6443");
        let Some((scheme, rest)) = text.split_once("://") else {
            let with_scheme = format!("https://{text}");
            return Err(if Self::parse(&with_scheme).is_ok() {
                wrong().value(with_scheme)
            } else {
                wrong()
            });
        };
        if scheme != "https" {
            let secure = format!("https://{rest}");
            let wrong = Wrong::new("does not use https", "https://HOST:6443");
            return Err(if Self::parse(&secure).is_ok() { wrong.value(secure) } else { wrong });
        }
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = split_authority(authority).ok_or_else(wrong)?;
        let port = match port {
            None => None,
            Some(text) => {
                let port = integer(text, 1, 65_535).map_err(|_| wrong())?;
                Some(u16::try_from(port).map_err(|_| wrong())?)
            }
        };
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }

    /// Host name or IP address, an IPv6 one without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Where to ask for joining. The supervisor's port names the host only: joining uses our own port there.
    pub fn join_port(&self) -> u16 {
        match self.port {
            None | Some(SUPERVISOR_PORT) => PEER_PORT,
            Some(port) => port,
        }
    }

    /// The host if it is an address.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

/// Host and port text; `None` for anything that is more than that.
fn split_authority(authority: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, tail) = rest.split_once(']')?;
        host.parse::<Ipv6Addr>().ok()?;
        return match tail {
            "" => Some((host, None)),
            _ => Some((host, Some(tail.strip_prefix(':')?))),
        };
    }
    let (host, port) = match authority.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    };
    let host_is_plain = !host.is_empty()
        && host.len() <= 253
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_');
    host_is_plain.then_some((host, port))
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]", self.host)?;
        } else {
            write!(f, "https://{}", self.host)?;
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supervisor_port_names_the_host_only() {
        for (text, host, port) in [
            ("https://pi-1:6443", "pi-1", 2380),
            ("https://PI-1/", "pi-1", 2380),
            ("https://192.168.1.10:7000", "192.168.1.10", 7000),
            ("https://[fd00::1]:6443", "fd00::1", 2380),
            ("https://[fd00::1]", "fd00::1", 2380),
        ] {
            let url = ServerUrl::parse(text).unwrap();
            assert_eq!((url.host(), url.join_port()), (host, port), "{text}");
            assert_eq!(ServerUrl::parse(&url.to_string()).unwrap(), url);
        }
    }

    #[test]
    fn plain_http_and_missing_scheme_are_refused_with_the_right_url() {
        let fix = |text| ServerUrl::parse(text).unwrap_err().value;

        assert_eq!(fix("http://pi-1:6443").as_deref(), Some("https://pi-1:6443"));
        assert_eq!(fix("pi-1:6443").as_deref(), Some("https://pi-1:6443"));
        assert_eq!(fix("ftp://"), None);
    }

    #[test]
    fn anything_more_than_host_and_port_is_refused() {
        for text in [
            "",
            "https://",
            "https://:6443",
            "https://a:0",
            "https://a:65536",
            "https://a:b",
            "https://a/b",
            "https://u:p@a",
            "https://a?x",
            "https://[::1",
            "https://[x]:1",
            "https://fd00::1:6443",
            "https://a b",
        ] {
            assert!(ServerUrl::parse(text).is_err(), "{text}");
        }
    }
}

//! Finds out who holds a port, from the kernel's tables under `/proc`.
//!
//! The tables name a socket's inode and user; which process has the socket open is visible only for our own user's processes.
//! Whatever cannot be seen is left out of the answer.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use nix::unistd::{Uid, User};

/// The kernel's number for a listening TCP socket.
const LISTEN: &str = "0A";

/// Who holds the port, as far as it can be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// A process of our own user, or of anyone's if we are root.
    Process {
        /// Its id.
        pid: u32,
        /// Its command name.
        command: String,
    },
    /// A process of this user.
    User(u32),
    /// Not to be seen.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command } => write!(f, "`{command}` (process {pid})"),
            Self::User(uid) => match User::from_uid(Uid::from_raw(*uid)) {
                Ok(Some(user)) => write!(f, "a process of user {}", user.name),
                Ok(None) | Err(_) => write!(f, "a process of user {uid}"),
            },
            Self::Unknown => f.write_str("another process"),
        }
    }
}

/// Looks for the holder of `address`.
pub(super) fn find(address: SocketAddr) -> Holder {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let mut sockets = tables
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| parse(&table))
        .filter(|socket| conflicts(socket.address, address));
    let Some(socket) = sockets.next() else { return Holder::Unknown };
    process_with(socket.inode).unwrap_or(Holder::User(socket.uid))
}

/// One row of `/proc/net/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Socket {
    address: SocketAddr,
    uid: u32,
    inode: u64,
}

/// Whether a socket listening on `held` keeps us from listening on `wanted`.
fn conflicts(held: SocketAddr, wanted: SocketAddr) -> bool {
    held.port() == wanted.port()
        && (held.ip() == wanted.ip() || held.ip().is_unspecified() || wanted.ip().is_unspecified())
}

/// The listening sockets of a table.
fn parse(table: &str) -> Vec<Socket> {
    table.lines().skip(1).filter_map(parse_row).collect()
}

/// `sl local rem state tx:rx tr:when retransmits uid timeout inode …`
fn parse_row(row: &str) -> Option<Socket> {
    let columns: Vec<&str> = row.split_ascii_whitespace().collect();
    let [_, local, _, state, _, _, _, uid, _, inode, ..] = columns.as_slice() else { return None };
    if *state != LISTEN {
        return None;
    }
    let (ip, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(Socket {
        address: SocketAddr::new(parse_ip(ip)?, port),
        uid: uid.parse().ok()?,
        inode: inode.parse().ok()?,
    })
}

/// 32-bit words in the machine's own byte order, printed as hexadecimal numbers.
fn parse_ip(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(hex.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// The process that has the socket with this inode open.
fn process_with(inode: u64) -> Option<Holder> {
    let wanted = format!("socket:[{inode}]");
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if has_open(&entry.path(), &wanted) {
            let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Some(Holder::Process { pid, command: command.trim().to_owned() });
        }
    }
    None
}

fn has_open(process: &Path, wanted: &str) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors
        .flatten()
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .any(|target| target.as_os_str() == wanted)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn own_listening_socket_is_found_with_its_process() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = find(listener.local_addr().unwrap());
        let Holder::Process { pid, command } = holder else { panic!("found {holder:?}") };
        assert_eq!(pid, std::process::id());
        assert!(!command.is_empty());
    }

    #[test]
    fn kernel_tables_are_read_as_the_kernel_writes_them() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:094B 00000000:0000 0A 00000000:00000000 00:00000000 00000000   999        0 23107 1 0 100 0 0 10 0\n   \
            1: 0100007F:094B 0100007F:D2A6 01 00000000:00000000 00:00000000 00000000   999        0 23108 1 0 100 0 0 10 0\n\
            damaged row\n";
        if cfg!(target_endian = "little") {
            let address = "127.0.0.1:2379".parse().unwrap();
            assert_eq!(parse(table), [Socket { address, uid: 999, inode: 23107 }]);
            let v6 = "00000000000000000000000001000000";
            assert_eq!(parse_ip(v6), Some(Ipv6Addr::LOCALHOST.into()));
        }
        assert_eq!(parse_ip("0100"), None);
    }

    #[test]
    fn a_socket_on_every_address_conflicts_with_each() {
        let held: SocketAddr = "0.0.0.0:2379".parse().unwrap();
        assert!(conflicts(held, "127.0.0.1:2379".parse().unwrap()));
        assert!(!conflicts(held, "127.0.0.1:2380".parse().unwrap()));
        let one: SocketAddr = "10.0.0.1:2379".parse().unwrap();
        assert!(!conflicts(one, "127.0.0.1:2379".parse().unwrap()));
    }
}

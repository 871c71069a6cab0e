//! The directory of keys and certificates: any file in it damaged, swapped or cut.

use std::path::{Path, PathBuf};

use k3s_server::pki::{Identity, Names, Owner, Pki, Port};
use k3s_server::testkit::wait;
use k3s_server::types::{ClusterId, NodeId};
use rustls::pki_types::CertificateDer;

use super::memory::{Files, MemoryDisk};
use super::{Input, put_piece};

pub const DICTIONARY: &[&[u8]] = &[
    b"-----BEGIN CERTIFICATE-----\n",
    b"-----END CERTIFICATE-----\n",
    b"-----BEGIN PRIVATE KEY-----\n",
    b"-----BEGIN RSA PRIVATE KEY-----\n",
    b"\n\n",
    b"=",
    b"MII",
];

const DIR: &str = "tls";
const FILES: [&str; 8] = [
    "ca.crt",
    "ca.key",
    "server.crt",
    "server.key",
    "peer.crt",
    "peer.key",
    "client.crt",
    "client.key",
];
const OWNER: Owner = Owner { cluster: ClusterId::new(0xc1), node: NodeId::new(0xab) };

/// Keys are new in every run: the authors would rather not have private keys in the repository.
pub fn seeds() -> Vec<Vec<u8>> {
    let made = |owner: Owner| {
        let disk = MemoryDisk::default();
        wait(Pki::establish(&disk.env(), Path::new(DIR), owner, &Names::loopback())).unwrap();
        disk.files()
    };
    let own = made(OWNER);
    let other = made(Owner { node: NodeId::new(0xcd), ..OWNER });
    // Only the authority: the others are made.
    let authority: Files =
        own.iter().filter(|(path, _)| path.starts_with("tls/ca.crt")).map(clone).collect();
    let without_signer: Files =
        own.iter().filter(|(path, _)| !path.ends_with("ca.key")).map(clone).collect();
    // As they are, and without armour: X.509 itself is read then.
    let mut seeds: Vec<_> =
        [own, other, authority, without_signer].iter().map(|files| archive(files, 0)).collect();
    seeds.extend(seeds.clone().into_iter().map(|mut seed| {
        seed[0] = 1;
        seed
    }));
    seeds
}

fn clone((path, bytes): (&PathBuf, &Vec<u8>)) -> (PathBuf, Vec<u8>) {
    (path.clone(), bytes.clone())
}

fn archive(files: &Files, mode: u8) -> Vec<u8> {
    let mut out = vec![mode];
    for (number, name) in FILES.iter().enumerate() {
        if let Some(bytes) = files.get(&Path::new(DIR).join(name)) {
            out.push(u8::try_from(number).unwrap());
            put_piece(&mut out, bytes);
        }
    }
    out
}

/// Either the certificates can be used, or the error names a file and nothing that was there is gone.
pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let bare = input.byte() & 1 == 1;
    let mut before = Files::new();
    while !input.is_empty() {
        let name = FILES[usize::from(input.byte()) % FILES.len()];
        let length = input.u16();
        let bytes = input.piece(length).to_vec();
        if bare {
            // Nothing here may panic either: it is what a stranger's handshake brings.
            drop(Identity::of(&CertificateDer::from(bytes.clone())));
            drop(Identity::of(&CertificateDer::from(decoded(&bytes))));
        }
        before.insert(Path::new(DIR).join(name), bytes);
    }
    let disk = MemoryDisk::of(&before);
    match wait(Pki::establish(&disk.env(), Path::new(DIR), OWNER, &Names::loopback())) {
        Ok((pki, _)) => {
            for port in [Port::Clients, Port::Peers] {
                pki.accept(port).expect("certificates that were established");
            }
        }
        Err(error) => {
            assert!(error.to_string().contains("tls/"), "no file in: {error}");
            assert!(!error.remedy().is_empty());
            let after = disk.files();
            for path in before.keys().filter(|path| path.extension().is_none_or(|e| e != "tmp")) {
                assert!(after.contains_key(path), "{} is gone after: {error}", path.display());
            }
            let keys = |files: &Files| -> Files {
                let is_key = |path: &PathBuf| path.extension().is_some_and(|e| e == "key");
                files.iter().filter(|(path, _)| is_key(path)).map(clone).collect()
            };
            for (path, key) in keys(&before) {
                assert_eq!(keys(&after)[&path], key, "{} was replaced", path.display());
            }
        }
    }
}

/// What is between the armour's lines, or nothing.
fn decoded(pem: &[u8]) -> Vec<u8> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem).map(|der| der.to_vec()).unwrap_or_default()
}

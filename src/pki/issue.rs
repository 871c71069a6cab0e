//! Decides what a certificate says, and reads back what one says. No files here.

use std::collections::BTreeSet;
use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::types::ClusterId;

use super::identity::authority_uri;
use super::validity::{AUTHORITY_LIFE, Facts, LEAF_LIFE, NOT_BEFORE};
use super::{Identity, Names, Role};

/// A number that no two certificates of an authority share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serial(pub(super) [u8; 16]);

impl Serial {
    /// Positive and of full length in DER, whatever the random bytes are.
    fn number(self) -> SerialNumber {
        let mut bytes = self.0;
        bytes[0] = bytes[0] & 0x3f | 0x40;
        SerialNumber::from_slice(&bytes)
    }
}

/// A new key. ECDSA on P-256: every client knows it, and it signs fast on a Pi.
pub(super) fn new_key() -> Result<KeyPair, rcgen::Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
}

/// The authority's certificate, signed with its own key, in PEM.
pub(super) fn authority(
    key: &KeyPair,
    cluster: ClusterId,
    serial: Serial,
    now: i64,
) -> Result<String, rcgen::Error> {
    let mut params =
        params(&format!("k3s-server-ca@{cluster}"), serial, now.saturating_add(AUTHORITY_LIFE));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![SanType::URI(authority_uri(cluster).try_into()?)];
    Ok(params.self_signed(key)?.pem())
}

/// What signs a node's certificate.
pub(super) struct Signer<'a> {
    /// The authority's certificate.
    pub(super) certificate: &'a CertificateDer<'a>,
    /// Its key.
    pub(super) key: KeyPair,
    /// Its last second; nothing it signs lasts longer.
    pub(super) ends: i64,
}

/// A node's certificate for a role, in PEM.
pub(super) fn leaf(
    signer: Signer<'_>,
    owner: Identity,
    names: &Names,
    key: &KeyPair,
    serial: Serial,
    now: i64,
) -> Result<String, rcgen::Error> {
    let common_name = format!("k3s-server-{} {}", owner.role, owner.node);
    let mut params = params(&common_name, serial, now.saturating_add(LEAF_LIFE).min(signer.ends));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match owner.role {
        Role::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
        Role::Peer => {
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
        }
        Role::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.subject_alt_names.push(SanType::URI(owner.to_string().try_into()?));
    for host in names.hosts() {
        params.subject_alt_names.push(SanType::DnsName(host.try_into()?));
    }
    params.subject_alt_names.extend(names.addresses().map(SanType::IpAddress));
    let issuer = Issuer::from_ca_cert_der(signer.certificate, signer.key)?;
    Ok(params.signed_by(key, &issuer)?.pem())
}

fn params(common_name: &str, serial: Serial, not_after: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, common_name);
    params.distinguished_name = subject;
    params.serial_number = Some(serial.number());
    params.not_before = date(NOT_BEFORE);
    params.not_after = date(not_after);
    params
}

/// The date, or the last one that X.509 can write.
fn date(seconds: i64) -> OffsetDateTime {
    let last = rcgen::date_time_ymd(9999, 12, 31);
    OffsetDateTime::from_unix_timestamp(seconds).map_or(last, |date| date.min(last))
}

/// Reads back what decides about renewal. The error says what is wrong with the certificate.
pub(super) fn facts(certificate: &CertificateDer<'_>) -> Result<Facts, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    let extension = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    let (mut hosts, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for name in extension.iter().flat_map(|extension| &extension.value.general_names) {
        if let GeneralName::DNSName(host) = name {
            hosts.insert((*host).to_owned());
        } else if let GeneralName::IPAddress(bytes) = name {
            addresses.insert(address(bytes).ok_or("an address in it has a wrong length")?);
        }
    }
    let not_after = parsed.validity().not_after.timestamp();
    Ok(Facts { not_after, names: Names::of(hosts, addresses) })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject;

    use super::super::validity::RELEASED;
    use super::*;
    use crate::types::NodeId;

    fn der(pem: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    }

    #[test]
    fn what_is_issued_reads_back_the_same() {
        let cluster = ClusterId::new(0xc1);
        let key = new_key().unwrap();
        let ca = der(&authority(&key, cluster, Serial([0xff; 16]), RELEASED).unwrap());
        assert_eq!(facts(&ca).unwrap().not_after, RELEASED + AUTHORITY_LIFE);

        let owner = Identity { cluster, role: Role::Server, node: NodeId::new(0xab) };
        let mut names = Names::loopback();
        names.add("pi-1.lan").unwrap();
        names.add("192.168.1.10").unwrap();
        let signer = Signer { certificate: &ca, key, ends: RELEASED + 100 };
        let leaf_key = new_key().unwrap();
        let leaf = leaf(signer, owner, &names, &leaf_key, Serial([0; 16]), RELEASED).unwrap();
        let leaf = der(&leaf);
        let read = facts(&leaf).unwrap();
        assert_eq!(read.names, names);
        assert_eq!(read.not_after, RELEASED + 100, "must not outlive its authority");
        assert_eq!(Identity::of(&leaf).unwrap(), owner);
    }

    #[test]
    fn far_dates_do_not_overflow() {
        assert_eq!(date(i64::MAX), rcgen::date_time_ymd(9999, 12, 31));
    }
}

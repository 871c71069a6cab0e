//! Every kind of credentials that somebody may show at a door.

use std::path::Path;
use std::sync::Arc;

use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rustls::ClientConfig;

use crate::client;
use crate::support::TlsFiles;
use crate::support::certificates::{Shown, Wish, authority, from_files, stranger, uri};

/// What somebody shows.
pub struct Credentials {
    pub what: &'static str,
    pub config: Arc<ClientConfig>,
    /// The port that they open.
    pub opens: Option<u16>,
}

/// All kinds, for a server with this directory of certificates. All but two are refused everywhere, and these at the other
/// door.
pub fn all_kinds(tls: &Path) -> Vec<Credentials> {
    let files = TlsFiles {
        ca: tls.join("ca.crt"),
        certificate: tls.join("client.crt"),
        key: tls.join("client.key"),
    };
    let own = authority(tls);
    let (client, peer) = (uri(tls, "client"), uri(tls, "peer"));
    let both = vec![ClientAuth, ServerAuth];
    let wish = |uri: &str| Wish { usages: both.clone(), ..Wish::of(uri) };
    let other_cluster = |uri: &str| {
        let (_, rest) = uri.strip_prefix("k3s-server://").unwrap().split_once('/').unwrap();
        format!("k3s-server://1/{rest}")
    };
    let mut kinds: Vec<(&'static str, Shown, Option<u16>)> = vec![
        ("no certificate", None, None),
        ("a client's", from_files(tls, "client"), Some(2379)),
        ("a peer's", from_files(tls, "peer"), Some(2380)),
        ("the server's own", from_files(tls, "server"), None),
        ("the authority itself", from_files(tls, "ca"), None),
    ];
    for (role, uri) in [("client", &client), ("peer", &peer)] {
        let kind = |text: &str| -> &'static str { format!("{text} ({role})").leak() };
        let expired = Wish { until: Wish::long_ago(), ..wish(uri) };
        let unborn = Wish { from: Wish::far_ahead(), ..wish(uri) };
        let servers_only = Wish { usages: vec![ServerAuth], ..wish(uri) };
        kinds.extend([
            (kind("another cluster's authority"), wish(uri).issue(&stranger()), None),
            (kind("expired"), expired.issue(&own), None),
            (kind("not valid yet"), unborn.issue(&own), None),
            (kind("another cluster's name"), wish(&other_cluster(uri)).issue(&own), None),
            (kind("only for servers"), servers_only.issue(&own), None),
        ]);
    }
    let two_names = Wish { more: vec![client.clone()], ..wish(&peer) };
    kinds.extend([
        ("a name of no role", wish(&client.replace("client", "admin")).issue(&own), None),
        ("no name", Wish { uri: None, ..wish("") }.issue(&own), None),
        ("two names", two_names.issue(&own), None),
    ]);
    // The same contents as the good ones: the others fail for their own faults.
    kinds.push(("made by this test (client)", wish(&client).issue(&own), Some(2379)));
    kinds.push(("made by this test (peer)", wish(&peer).issue(&own), Some(2380)));
    kinds
        .into_iter()
        .map(|(what, shown, opens)| Credentials {
            what,
            config: Arc::new(client::tls_with(&files, shown)),
            opens,
        })
        .collect()
}

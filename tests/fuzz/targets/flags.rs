//! The replicated record of critical flags.

use std::time::{Duration, UNIX_EPOCH};

use k3s_server::config::Cidr;
use k3s_server::critical::{ClusterFlags, Flag, Value};

pub fn seeds() -> Vec<Vec<u8>> {
    let since = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let values = |text: &str| {
        let networks = ["10.42.0.0/16", "fd00:42::/56"].map(|text| Cidr::parse(text).unwrap());
        [
            Value::Switch(true),
            Value::Text(text.to_owned()),
            Value::Networks(networks.to_vec()),
            Value::Addresses(vec!["10.43.0.10".parse().unwrap(), "fd00::a".parse().unwrap()]),
            Value::Set(["traefik", "servicelb"].map(str::to_owned).into()),
            Value::Set([].into()),
        ]
    };
    let mut all = ClusterFlags::default();
    for (flag, value) in Flag::ALL.into_iter().zip(values("cluster.local").into_iter().cycle()) {
        all.set(flag, value, since, "pi-1");
    }
    let mut unknown = all.encode();
    // One more entry, with a number that no release has given away.
    unknown[1] += 1;
    unknown.extend([250, 3, 0, 0, 0, 1, 2, 3]);
    vec![ClusterFlags::default().encode(), all.encode(), unknown]
}

/// A value has one encoding: what is read is what would be written.
pub fn run(input: &[u8]) {
    if let Ok(flags) = ClusterFlags::decode(input) {
        assert_eq!(flags.encode(), input, "a record changes when it is written again");
    }
}

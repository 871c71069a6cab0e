//! The events a person may look for, each with a number that never changes.
//!
//! The number becomes the journal's `MESSAGE_ID`; `journalctl -x` finds the explanation in
//! `systemd/k3s-server.catalog` by it, `journalctl MESSAGE_ID=…` finds every occurrence. A test holds this table and the
//! catalog against each other. Numbers were drawn at random once; never reuse or change one.
//!
//! Say one with [`announce!`](crate::announce): it adds the level, the number and the remedy. [`fields`] names the details.
//!
//! # Not here
//!
//! Where lines go and how they look: `observe`. This module is on the lowest row so that every other one can name its events.

pub mod fields;
pub mod trouble;

use std::fmt;

use tracing::Level;

/// Declares the catalog: name, number, level, remedy for those that have one.
macro_rules! events {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $level:ident $(, $remedy:literal)?;)+) => {
        /// The stable name of a log event. See the module documentation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum EventId {
            $($(#[$doc])* $name,)+
        }

        impl EventId {
            /// Every event.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The number.
            pub const fn number(self) -> u128 {
                match self {
                    $(Self::$name => $id,)+
                }
            }

            /// How urgent it is.
            pub const fn level(self) -> Level {
                match self {
                    $(Self::$name => Level::$level,)+
                }
            }

            /// What the operator can do. Every warning and error has one.
            pub const fn remedy(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => events!(@remedy $($remedy)?),)+
                }
            }
        }
    };
    (@remedy) => { None };
    (@remedy $remedy:literal) => { Some($remedy) };
}

events! {
    /// The daemon begins.
    Starting = 0xca1f8d0efc574880b1c63112fa1bf2a7, INFO;
    /// A datastore was found and opened.
    DatastoreFound = 0xffbc4ab792404c24815db1e96f127322, INFO;
    /// A new datastore was made: a new cluster begins.
    DatastoreCreated = 0xcc0f554a8e314032b03e86198064aa51, INFO;
    /// The critical flags equal the cluster's.
    FlagsMatch = 0x3b3485eabf8c47529cc73deca4a120c7, INFO;
    /// At least one critical flag differs from the cluster's.
    FlagsMismatch = 0x8cdfe6312ba24edb85203ec6469ccfaf, ERROR,
        "set the listed flags to the cluster's values in /etc/k3s/config.yaml on this node, then run `systemctl restart k3s-server`";
    /// An operator gave a critical flag another value.
    FlagChanged = 0xf934e4d2eb8b4c22a21a8a9f937c662e, INFO;
    /// The cluster's flags were changed, and this server still runs with the old ones.
    FlagsOutdated = 0x431adee2a0434079b57ac34f098ae912, WARN,
        "write the new value into /etc/k3s/config.yaml on this node, then run `systemctl restart k3s-server`; without that the next start is refused";
    /// There is a new leader.
    LeaderChanged = 0xf6a82f8a3b37480fb7fe895ed1703acc, INFO;
    /// There is no leader; writes wait.
    LeaderLost = 0x0cc445a7fbf44b31be27b4a8600f8a9d, WARN,
        "check that a majority of the servers is running and that port 2380 is reachable between them";
    /// Somebody became a member, got a vote, changed address or left.
    MembersChanged = 0xfa4b21403b6c4ce78bb1e8138fcc974d, INFO;
    /// A change of members would have left too few that answer.
    ChangeRefused = 0xfd0a4ce0b96b456b8fe51e770c666a05, WARN,
        "bring the servers that do not answer back first (`k3s-server member list` names them), or remove one of those instead";
    /// An even number of servers votes.
    EvenVoters = 0x8145e432337d4451bced691939d90235, WARN,
        "add one more server, or remove one: three bear the loss of one, five of two";
    /// A joining node made no progress and was removed.
    LearnerGivenUp = 0xddff2bd9799e48fb87834ce6657e5098, WARN,
        "look at the journal of that node; when it runs and reaches port 2380 of the others, it joins again by itself under a new id";
    /// A leader let another node lead, because its own card hangs.
    LeaderHandedOver = 0x48e1df866078482aaf692228b4ece67f, WARN,
        "look for `mmc` errors in `journalctl -k` on this node; if its card pauses like this again, replace it";
    /// The node serves.
    Ready = 0xd997da6130b745d6af392af6d8f1ca03, INFO;
    /// The node has begun to stop.
    Stopping = 0x406aae4579e74fffb9b4db371e1a3f2a, INFO;
    /// The node has stopped; everything is on the card.
    Stopped = 0xd3518a9da89e4614b5f7cc42929bdae2, INFO;
    /// The node stops because a part of it failed.
    Failed = 0x29a85f7cec4e4b6bb58c60379aaf7c0b, ERROR,
        "read the reason above; systemd starts the service again, and `systemctl status k3s-server` shows whether that helped";
    /// The state was made durable.
    Checkpoint = 0x289c044e93614c50b5bf530cccba3e8f, DEBUG;
    /// A checkpoint failed. The log keeps what it should have made durable.
    CheckpointFailed = 0xe5fd18d0636440b4f3d87bb6628d5163, WARN,
        "the message names the cause; while the card is full, free space on it; otherwise check `journalctl -k -g mmc`";
    /// A write barrier took very long.
    SlowBarrier = 0x63c35a417ee447298c9754bf48625f91, WARN,
        "a pause now and then is normal for an SD card; if this repeats, look for `mmc` errors in `journalctl -k`, and consider a card of application class A2 or an SSD";
    /// A write barrier failed. The node stops.
    BarrierFailed = 0xf8f0deeccafc41a789e5a07b030e0846, ERROR,
        "check `journalctl -k -g mmc`; if the card reports errors, replace it, remove this node from the cluster and join it again";
    /// The log ended in a half-written batch, as after a power cut. Nothing acknowledged was in it.
    TornTailCut = 0x62b09b167db1447f9e71a3dd02e8d73c, INFO;
    /// The log was damaged, but the state had all of it that could be missing. The log began anew.
    LogStartedOver = 0x799d718727c1694e5918a8394c8d7cd3, WARN,
        "nothing has to be done now; a card that lost a bit will lose more: make a backup, and replace it";
    /// The log is damaged before its end: acknowledged writes may be missing on this card.
    LogCorrupt = 0x3bfd1ef16889441a92006a1a01599b4a, ERROR,
        "do not delete anything; with other servers running, remove this node from the cluster and join it again; alone, restore the last backup, or see `k3s-server wal repair --help`";
    /// The whole state and the closed log were read from the card and checked.
    ScrubCompleted = 0x5237731a2c5dde3042f5c2bb202447f2, INFO;
    /// A read was wrong, and right at the second attempt, past the page cache.
    ReadHealed = 0x835f07c6906313f3d7d2b811e68f0bcf, WARN,
        "nothing was lost; if it repeats, check the power supply (`vcgencmd get_throttled`), the memory and `journalctl -k -g mmc`";
    /// The state file is damaged.
    StateDamaged = 0x6607024824534aacb39c6a8b8b2ecc2d, ERROR,
        "with other servers running, remove this node from the cluster and join it again; alone, restore the last backup; replace the card if it happens again";
    /// The file system is full.
    DiskFull = 0x7435732f0d224cce8cb0292270047388, ERROR,
        "free space on the file system that holds the datastore; until then only reads, deletes and compaction work";
    /// An alarm was raised.
    AlarmRaised = 0xc3530229a6bc4c7e963ec839dcc9dfec, WARN,
        "NOSPACE: compact and defragment, or raise `quota-backend-bytes`, then `etcdctl alarm disarm`; CORRUPT: find the member that differs, remove it and join it again";
    /// An alarm was cleared.
    AlarmCleared = 0x12cb5e43306e4228bffe3c4f335a1555, INFO;
    /// A certificate was issued anew.
    CertificateRenewed = 0xfe87f8243bdd4fe0b39ec43679a72189, INFO;
    /// A certificate or key cannot be used or renewed.
    CertificateProblem = 0xaf6b83159bb24860a950e0cf49ba6a55, ERROR,
        "the message names the file and what is wrong with it; restore that file from a backup of this node, or move a damaged server, peer or client pair away and restart, and a new pair is made";
    /// The configuration cannot be used.
    ConfigurationError = 0x63699df9adad440aa38d5ee090c7da92, ERROR,
        "correct the listed lines, try `k3s-server check`, then run `systemctl restart k3s-server`";
    /// The configuration can be used, but something in it looks wrong.
    ConfigurationWarning = 0x9418bcfdf37a4dba96fbcd85bb2923dc, WARN,
        "the message names the key and the file; `k3s-server check` repeats it without starting";
    /// The wall clock is before the day this release was made.
    ClockUnset = 0xc929a8c08540400ab6ee7b44f04014b5, WARN,
        "nothing has to be done if the network sets the time soon; otherwise check `timedatectl`";
    /// The wall clock was set, or follows a time server now.
    ClockSet = 0x63fe87d19c60da5691ed570cae0399d3, INFO;
    /// The kernel lacks something that K3s or a card needs.
    PrerequisiteMissing = 0x8086056bd47e9f96e973bbeabce00695, WARN,
        "the message names the file to edit and the line to write; `k3s-server status` repeats it";
    /// Upstream k3s runs with an etcd of its own on our ports, or is set up to.
    UpstreamConflict = 0xb85775ea9e9f8f45c56d43691328a337, ERROR,
        "decide which of the two is the datastore: `systemctl disable --now k3s` and start this one, or `systemctl disable --now k3s-server`; to use this one, k3s needs `datastore-endpoint: https://127.0.0.1:2379` and no `cluster-init` or `server`";
    /// The machine goes down; this node got out of the way first.
    ShutdownPrepared = 0x0d60dc3b1db8cb3f926e64039741de93, INFO;
    /// The configuration was read again.
    Reloaded = 0x17c0bf08ccbb808c1df2243878a1e273, INFO;
    /// A backup was written beside the datastore.
    BackupWritten = 0x58bf8ec73f2756bd556ba9e7fd3ceb13, INFO;
    /// An address cannot be listened on.
    ListenFailed = 0xf9e81f43f2ff479191ceff00eb790381, ERROR,
        "the message names the address and, where it can be seen, the process that holds it; stop that process or change the address";
    /// Connections are refused because a cap was reached.
    ConnectionsRefused = 0xf335a5a68204491986923ad2c47f8097, WARN,
        "look for a client that opens connections without closing them: `ss -tn sport = :2379`";
    /// A file with a secret can be read by others.
    SecretExposed = 0x2267d7dba8b8413382b44b47f58689f5, WARN,
        "run `chmod 600` on the file, and rotate the token if others had accounts on this machine";
    /// The loop that everything depends on has stopped turning. The watchdog is no longer fed.
    LoopSilent = 0x3bab740b159645f484d8b9a60882f8a1, ERROR,
        "systemd restarts the service if this lasts; if it repeats, look for `mmc` errors in `journalctl -k`, and keep the lines around this one for a report";
    /// The journal did not keep up, and lines are missing before this one.
    LinesLost = 0xa96db72faa874f05a82941b6b39fffa8, WARN,
        "look for `mmc` errors in `journalctl -k`; if the journal lives on a slow card, set `Storage=volatile` in /etc/systemd/journald.conf";
    /// Somebody tried to join and was refused.
    JoinRefused = 0xab1c914ed99b003262110c9f51ed4f55, WARN,
        "if this is a server that shall join, give it the line from the file `token` of a member; if it is not, look who has that address";
    /// This node asks to be let into a cluster.
    Joining = 0xdd661696eb9bc4b571bd54d6c9dfb9da, INFO;
    /// The leader made this node a member.
    Admitted = 0xc870551d1f083b60b6bad92584500b02, INFO;
    /// The data of a former life was moved away.
    SetAside = 0xa013f34e85fae21d48d0eb74b273dad3, INFO;
    /// The token that lets others in was written to its file.
    TokenKept = 0xd33d7532541888f5613cc1387390ad95, INFO;
    /// This node's promises cannot be trusted; it takes no part in decisions and comes back as a new one.
    Quarantined = 0xc6b3f8e0194d4907b8833fe7b777ef60, ERROR,
        "nothing has to be done while a majority of the other servers runs: this node fills itself again; an older image, a copied card or a lying card is behind this, so replace the card if it happens again";
    /// So many servers came back without what they had promised that nobody can lead.
    MajorityForgot = 0x5c1b8d3e7f0a4c62a94fd17be08c6235, ERROR,
        "put the newest cards back in if they still exist; else stop k3s-server on the server with the newest data, run `k3s-server server --cluster-reset` there, and start it again";
    /// This node was removed from the cluster and has come back.
    NodeRetired = 0x7e0701907fa6e3afd7c4ab4cb5c2d261, ERROR,
        "if it shall be a member again, move its data directory away and start it with `server` and the token";
    /// Another run of this very node is alive: a copied card.
    NodeDuplicate = 0x947f5b54987b2031cc063f8a39b0ce63, ERROR,
        "stop one of the two; for the copy to become a server of its own, move its data directory away and start it with `server` and the token";
    /// Data is written in a newer format from now on.
    FormatRaised = 0x5b1d0f6c3a8e4d27917c46e2f0ab83d4, INFO;
    /// The other members run a release that this one cannot talk to.
    Incompatible = 0x2fd8b947ad137a10b6aeb8acfaa38676, ERROR,
        "upgrade the server with the older release; to upgrade a cluster, upgrade one server after the other";
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.number())
    }
}

/// Says a catalogued event: `announce!(EventId::Ready, { fields::TERM } = 5, "ready to serve")`.
///
/// The event id must be written out as a path, because level and number are fixed at compile time.
#[macro_export]
macro_rules! announce {
    ($id:path, $($rest:tt)+) => {
        ::tracing::event!(
            $id.level(),
            { $crate::events::fields::MESSAGE_ID } = %$id,
            { $crate::events::fields::REMEDY } = $id.remedy(),
            $($rest)+
        )
    };
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const CATALOG: &str = include_str!("../../systemd/k3s-server.catalog");

    struct Entry {
        subject: String,
        body: String,
    }

    /// Reads the catalog as systemd does: `-- <id>`, headers up to an empty line, then the text.
    fn catalog() -> BTreeMap<u128, Entry> {
        let mut entries = BTreeMap::new();
        for section in CATALOG.split("\n-- ").skip(1) {
            let (id, rest) = section.split_once('\n').unwrap();
            let id = u128::from_str_radix(id.trim(), 16).unwrap();
            let (headers, body) = rest.split_once("\n\n").unwrap();
            let header = |name: &str| {
                headers
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .unwrap_or_else(|| panic!("{id:032x} has no {name}"))
                    .trim()
                    .to_owned()
            };
            assert_eq!(header("Defined-By:"), "k3s-server");
            let entry = Entry { subject: header("Subject:"), body: words(body) };
            assert!(entries.insert(id, entry).is_none(), "{id:032x} is in the catalog twice");
        }
        entries
    }

    fn words(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn catalog_explains_exactly_the_events_there_are() {
        let explained: BTreeSet<u128> = catalog().into_keys().collect();
        let known: BTreeSet<u128> = EventId::ALL.iter().map(|event| event.number()).collect();
        assert_eq!(known.len(), EventId::ALL.len(), "two events share a number");
        assert_eq!(known, explained);
    }

    #[test]
    fn warnings_and_errors_have_a_remedy_and_the_catalog_tells_the_same_one() {
        let catalog = catalog();
        for event in EventId::ALL {
            let entry = &catalog[&event.number()];
            assert!(!entry.subject.is_empty(), "{event:?}");
            assert!(entry.body.len() > 40, "{event:?} is not explained");
            let urgent = event.level() <= Level::WARN;
            assert_eq!(event.remedy().is_some(), urgent, "{event:?}");
            if let Some(remedy) = event.remedy() {
                let told = format!("Remedy: {}", words(remedy));
                assert!(entry.body.contains(&told), "{event:?}: {}\n{told}", entry.body);
            }
        }
    }

    #[test]
    fn placeholders_in_the_catalog_are_fields_we_send() {
        for placeholder in CATALOG.split('@').skip(1).step_by(2) {
            let field = placeholder.to_lowercase().replacen('_', ".", 1);
            assert!(fields::ALL.contains(&field.as_str()), "@{placeholder}@");
        }
    }
}

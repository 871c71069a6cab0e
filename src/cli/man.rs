//! Writes the man pages from what the program itself goes by: the parser, the table of keys, the object on D-Bus.
//!
//! They lie in `man/`, ready to be packaged; `UPDATE_EXPECT=1 cargo test man` writes them anew, and without that the
//! test fails when one has gone stale. No date is in them, so a build can be repeated.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use clap_mangen::Man;

use super::arguments::parser;
use crate::bus::server1::{NAME, PATH, introspection};
use crate::config::keys::{DEFAULT_FILE, KEYS};
use crate::config::{Group, Key, Role};

/// Name of the file, and its text.
type Page = (String, String);

const MANUAL: &str = "k3s-server";

/// Writes all pages into a directory.
pub fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for (name, text) in pages()? {
        fs::write(directory.join(name), text)?;
    }
    Ok(())
}

/// All pages.
pub fn pages() -> io::Result<Vec<Page>> {
    let mut pages = vec![
        ("k3s-server.8".to_owned(), main_page()?),
        ("k3s-server.yaml.5".to_owned(), keys_page()),
        (format!("{NAME}.5"), bus_page()),
    ];
    let root = parser(None);
    for command in root.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("k3s-server-{}", command.get_name());
        pages.push((format!("{name}.8"), command_page(command, &name)?));
    }
    Ok(pages)
}

fn man(command: clap::Command, name: &str) -> Man {
    Man::new(command)
        .title(name)
        .section("8")
        .date("")
        .source(concat!("k3s-server ", env!("CARGO_PKG_VERSION")))
        .manual(MANUAL)
}

/// A subcommand, and those below it.
fn command_page(command: &clap::Command, name: &str) -> io::Result<String> {
    let spoken = name.replace('-', " ").replacen("k3s server", "k3s-server", 1);
    let command = command.clone().bin_name(spoken.clone()).display_name(name.to_owned());
    let page = man(command.clone(), name);
    let mut out = Vec::new();
    page.render_title(&mut out)?;
    page.render_name_section(&mut out)?;
    page.render_synopsis_section(&mut out)?;
    page.render_description_section(&mut out)?;
    if command.get_name() == "server" {
        let text = ".SH OPTIONS\nEvery key of \\fBk3s\\-server.yaml\\fR(5) is a long flag: \\fB\\-\\-node\\-name=pi\\-1\\fR.\n";
        out.extend(text.bytes());
    } else {
        page.render_options_section(&mut out)?;
    }
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        let title = format!("{spoken} {}", below.get_name());
        out.extend(format!(".SH {}\n", escape(&title.to_uppercase())).bytes());
        let below = below.clone().bin_name(title.clone()).display_name(title);
        let page = man(below, name);
        page.render_synopsis_section(&mut out)?;
        page.render_description_section(&mut out)?;
        page.render_options_section(&mut out)?;
    }
    page.render_extra_section(&mut out)?;
    out.extend(see_also(&["k3s-server(8)", "k3s-server.yaml(5)"]).bytes());
    Ok(without_subheadings(&String::from_utf8_lossy(&out)))
}

/// Sections of a subcommand of a subcommand are parts of one section.
fn without_subheadings(text: &str) -> String {
    let mut inside = false;
    let mut page = String::new();
    for line in text.lines() {
        let heading = line.strip_prefix(".SH ");
        if let Some(name) = heading {
            let part = ["SYNOPSIS", "DESCRIPTION", "OPTIONS"].contains(&name)
                || !name.starts_with("K3S")
                    && inside
                    && !["EXTRA", "\"SEE ALSO\"", "NAME"].contains(&name);
            inside |= name.starts_with("K3S");
            if inside && part {
                let _always = writeln!(page, ".SS {name}");
                continue;
            }
        }
        let _always = writeln!(page, "{line}");
    }
    page
}

fn main_page() -> io::Result<String> {
    let root = parser(None);
    let page = man(root.clone(), MANUAL);
    let mut out = Vec::new();
    page.render_title(&mut out)?;
    page.render_name_section(&mut out)?;
    let mut text = String::from_utf8_lossy(&out).into_owned();
    text.push_str(".SH SYNOPSIS\n\\fBk3s\\-server\\fR \\fICOMMAND\\fR [\\fIOPTIONS\\fR]\n");
    text.push_str(DESCRIPTION);
    text.push_str(".SH COMMANDS\n");
    for command in root.get_subcommands().filter(|command| !command.is_hide_set()) {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        entry(&mut text, &format!("k3s-server-{}(8)", command.get_name()), &about);
    }
    text.push_str(SECTIONS);
    text.push_str(&see_also(&[
        "k3s-server.yaml(5)",
        "io.k3s.Server1(5)",
        "systemd.service(5)",
        "journalctl(1)",
    ]));
    Ok(text)
}

fn keys_page() -> String {
    let mut text = title("K3S-SERVER.YAML", "5");
    text.push_str(".SH NAME\nk3s\\-server.yaml \\- configuration of k3s\\-server\n");
    let _always = write!(text, ".SH SYNOPSIS\n{0}\n.br\n{0}.d/*.yaml\n", escape(DEFAULT_FILE));
    text.push_str(KEYS_DESCRIPTION);
    let mut group: Option<Group> = None;
    for key in KEYS.iter().filter(|key| !key.hidden && !matches!(key.role, Role::Renamed(_))) {
        if group != Some(key.group) {
            group = Some(key.group);
            let _always = writeln!(text, ".SH {}", escape(&key.group.heading().to_uppercase()));
        }
        let head = format!("{}: {}", key.name, key.kind.placeholder());
        entry(&mut text, &head, &key_text(key));
    }
    text.push_str(&see_also(&["k3s-server(8)"]));
    text
}

fn key_text(key: &Key) -> String {
    let mut text = format!("{}.", key.help);
    let default = if key.default_note.is_empty() { key.default } else { key.default_note };
    if !default.is_empty() {
        let _always = write!(text, " Default: {default}.");
    }
    if key.is_list() {
        text.push_str(" A list.");
    }
    if key.critical {
        text.push_str(" The same on all servers.");
    }
    if !key.environment.is_empty() {
        let _always = write!(text, " Environment: {}.", key.environment.join(", "));
    }
    text
}

/// One thing of an interface, as it is introspected.
struct Introspected<'x> {
    name: &'x str,
    detail: String,
}

/// Elements of the XML with this name. The XML is our own, one element a line.
fn introspected<'x>(xml: &'x str, element: &str) -> Vec<Introspected<'x>> {
    let attribute = |line: &'x str, name: &str| {
        line.split_once(&format!("{name}=\"")).and_then(|(_, rest)| rest.split('"').next())
    };
    let (open, close) = (format!("<{element} "), format!("</{element}>"));
    let mut found = Vec::new();
    let mut lines = xml.lines();
    while let Some(line) = lines.next() {
        if !line.trim_start().starts_with(&open) {
            continue;
        }
        let Some(name) = attribute(line, "name") else { continue };
        let mut detail = attribute(line, "type").unwrap_or_default().to_owned();
        if !line.trim_end().ends_with("/>") {
            for inner in lines.by_ref().take_while(|inner| !inner.contains(&close)) {
                if let Some(kind) = attribute(inner, "type") {
                    let arrow = if inner.contains("direction=\"out\"") { "-> " } else { "" };
                    let called = attribute(inner, "name").unwrap_or("");
                    let _always = write!(detail, " {arrow}{kind} {called}");
                } else if inner.contains("EmitsChangedSignal") {
                    let silent = attribute(inner, "value") == Some("false");
                    detail.push_str(if silent { ", not announced" } else { ", never changes" });
                }
            }
        }
        found.push(Introspected { name, detail: detail.trim().to_owned() });
    }
    found
}

fn bus_page() -> String {
    let xml = introspection();
    let mut text = title("IO.K3S.SERVER1", "5");
    let _always = write!(
        text,
        ".SH NAME\n{NAME} \\- the D\\-Bus object of k3s\\-server\n.SH SYNOPSIS\nname {NAME}, object {PATH}, interface {NAME}, on the system bus\n"
    );
    text.push_str(BUS_DESCRIPTION);
    text.push_str(".SH METHODS\n");
    for method in introspected(&xml, "method") {
        let said =
            METHODS.iter().find(|(name, _)| *name == method.name).map_or("", |(_, said)| said);
        entry(&mut text, &format!("{}({})", method.name, method.detail), said);
    }
    text.push_str(".SH PROPERTIES\n");
    for property in introspected(&xml, "property") {
        let said =
            PROPERTIES.iter().find(|(name, _)| *name == property.name).map_or("", |(_, said)| said);
        entry(&mut text, &format!("{} ({})", property.name, property.detail), said);
    }
    text.push_str(BUS_EXAMPLES);
    text.push_str(&see_also(&["k3s-server(8)", "busctl(1)", "polkit(8)"]));
    text
}

fn title(name: &str, section: &str) -> String {
    format!(".TH {name} {section} \"\" \"k3s\\-server {}\" {MANUAL}\n", env!("CARGO_PKG_VERSION"))
}

fn entry(text: &mut String, head: &str, body: &str) {
    let _always = write!(text, ".TP\n\\fB{}\\fR\n{}\n", escape(head), escape(body));
}

fn see_also(pages: &[&str]) -> String {
    format!(".SH \"SEE ALSO\"\n{}\n", escape(&pages.join(", ")))
}

/// Plain text for roff.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

const DESCRIPTION: &str = r#".SH DESCRIPTION
The datastore of a highly available K3s on boards with SD cards: it speaks the etcd v3 API, replicates with Raft, and writes
to the card as little and as rarely as it can. It reads K3s' own configuration file, see
.BR k3s\-server.yaml (5).
.PP
Normally systemd runs it:
.BR "systemctl start k3s\-server" .
The unit is ready when this server has the data and its vote.
"#;

const SECTIONS: &str = r#".SH "EXIT STATUS"
.TP
0
Done.
.TP
1
Failed; trying again may help. systemd starts the daemon again after 5 s, with systemd 254 and later after growing times up
to 60 s.
.TP
64
Wrong usage. The daemon is not started again.
.TP
78
Wrong configuration: something must be changed first. The daemon is not started again.
.SH SIGNALS
.TP
SIGTERM, SIGINT
Hand leadership over, finish what was begun, make the state durable, end.
.TP
SIGHUP
Read the configuration again (\fBsystemctl reload k3s\-server\fR). The journal tells of each changed key whether it holds now or
after a restart.
.SH "THE TOKEN"
Instead of writing it into the configuration, give it to the unit as a credential. As a file that only root reads:
.PP
.nf
    install \-m 600 /dev/stdin /etc/credstore/k3s\-server.token
.fi
.PP
or sealed to this machine (its TPM, or a key that systemd keeps in /var):
.PP
.nf
    systemd\-creds encrypt \-\-name=token\-sealed \- /etc/credstore.encrypted/k3s\-server.token
.fi
.PP
\fBtoken\fR and \fBtoken\-file\fR in the configuration win over both.
.SH WATCHDOG
The loop that drives Raft feeds systemd's watchdog. If it has not turned for 30 s, feeding stops; after 60 s the service is killed
and started again. A card that pauses does not stop that loop.
.SH SHUTDOWN
With logind on the system bus the daemon holds a delay lock. Before the machine goes down it lets another server lead and makes
its state durable, within \fIInhibitDelayMaxSec\fR of
.BR logind.conf (5).
Where logind does not let it (a user other than root needs polkit for that), the same is done when the service stops.
.SH "UPDATES WITH TWO SLOTS"
\fIk3s\-server\-health.service\fR runs \fBk3s\-server health\fR before \fIboot\-complete.target\fR. It fails, so that the old
image comes back, when a configuration is refused, the log or the state does not open, a format is too new, or certificates cannot be
used. It passes when this server's own is in order and others are down.
.SH JOURNAL
\fBjournalctl \-x \-u k3s\-server\fR explains every line that has a number, with what to do. Fields to search by:
.TP
K3S_NODE, K3S_PEER, K3S_LEADER
A server, by name or id.
.TP
K3S_TERM, K3S_INDEX, K3S_REVISION
Raft's term, a log index, a revision of the store.
.TP
K3S_FLAG, K3S_VALUE_HERE, K3S_VALUE_CLUSTER, K3S_BY, K3S_SINCE
A setting, its two values, who set it, since when.
.TP
K3S_PATH, K3S_ADDRESS, K3S_BYTES, K3S_MILLIS, K3S_COUNT
A file, an address, numbers.
.TP
K3S_REASON, K3S_REMEDY
What went wrong, and what to do.
.TP
K3S_CLUSTER, K3S_ALARM, K3S_ROLE, K3S_VERSION, K3S_LINES_LOST
The cluster's id, an alarm, a certificate's role, a release, lines that the journal did not take.
.PP
A line that repeats itself is written five times a minute; then its number is told. In normal operation nothing is above
priority 3 (err): higher ones make journald write to the card at once.
.SH ENVIRONMENT
.TP
K3S_*
Keys of the configuration, see
.BR k3s\-server.yaml (5).
.TP
K3S_SERVER_LOG
Which lines are written, such as \fIinfo,k3s_server::raft=debug\fR.
.TP
STATE_DIRECTORY, RUNTIME_DIRECTORY, CREDENTIALS_DIRECTORY, NOTIFY_SOCKET, WATCHDOG_USEC
As systemd sets them.
.SH FILES
.TP
/etc/k3s/config.yaml, /etc/k3s/config.yaml.d/*.yaml
Configuration.
.TP
/var/lib/k3s\-server
Log, state, certificates, token; \fIbackups\fR.
.TP
/run/k3s\-server/phase.json
How far the last start came.
"#;

const KEYS_DESCRIPTION: &str = r"
.SH DESCRIPTION
K3s' configuration file: its keys keep K3s' meaning, and keys that concern upstream k3s only are checked and kept for it. An
empty file is a valid start. Files of the directory follow in the order of their names; \fIkey+\fR adds to a list. What the
command line says wins over the file, and the file over the environment.
.PP
\fBk3s\-server check\fR reports everything that is wrong at once, with file, line and what to write;
\fBk3s\-server config show\fR prints what came of it.
";

const BUS_DESCRIPTION: &str = r".SH DESCRIPTION
Everybody may read the properties. Methods are for root; for others polkit decides (actions
\fIio.k3s.Server1.transfer\-leadership\fR, \fI.checkpoint\fR, \fI.backup\fR, \fI.reload\fR), and where there is no polkit the
answer is no.
\fIPropertiesChanged\fR tells of every change, but for properties marked as not announced: they change with every write.
";

/// What each method does.
pub const METHODS: &[(&str, &str)] = &[
    (
        "TransferLeadership",
        "Lets another voter lead: the one with this name or id, or the fittest if it is empty. Answers who leads then. With an empty name it must be asked of the leader.",
    ),
    ("Checkpoint", "Makes the state durable now. Answers the log index up to which it is."),
    (
        "Backup",
        "Writes the whole datastore as it is at one moment to a file of this name, below backups in the data directory; an empty name: one with server and time. Answers the path. The file is one that etcdutl restores.",
    ),
    (
        "Reload",
        "Reads the configuration again. Answers a line for each key that has changed: whether it holds now or after a restart.",
    ),
];

/// What each property says.
pub const PROPERTIES: &[(&str, &str)] = &[
    (
        "State",
        "opening, joining, meeting (asks the other servers whether it has forgotten anything), settling, ready, no-leader, stopping or failed.",
    ),
    ("StateDetail", "The same in a sentence."),
    ("Role", "leader, follower, candidate or learner; empty before it takes part."),
    ("NodeId", "Its id, in hexadecimal."),
    ("NodeName", "Its name."),
    ("ClusterId", "The cluster's id."),
    ("LeaderId", "The leader's id; empty: there is none, and writes wait."),
    ("LeaderName", "The leader's name."),
    ("Term", "Raft's term; it grows with every election."),
    (
        "Members",
        "All members: id, name, role (leader, voter, learner), addresses for servers, addresses for clients.",
    ),
    ("Clock", "unset, plausible, or synchronized (timedated says so)."),
    ("LastError", "The last error in this process' journal; empty: none."),
    ("Version", "The release."),
    ("CommittedIndex", "The last log entry that is known to be on a majority."),
    ("AppliedIndex", "The last log entry that is in the store."),
    ("Revision", "The store's revision."),
    ("BarrierP50", "Seconds: half of the write barriers since the start took no longer."),
    ("BarrierP99", "Seconds: 99 % of the write barriers since the start took no longer."),
    ("WrittenToday", "Bytes handed to the card since midnight (UTC), or since the start."),
];

const BUS_EXAMPLES: &str = r#".SH EXAMPLES
Everything at a glance:
.PP
.nf
    busctl introspect io.k3s.Server1 /io/k3s/Server1 io.k3s.Server1
.fi
.PP
Who leads:
.PP
.nf
    busctl get\-property io.k3s.Server1 /io/k3s/Server1 io.k3s.Server1 LeaderName
.fi
.PP
Follow changes:
.PP
.nf
    busctl monitor \-\-match "type='signal',sender='io.k3s.Server1'"
.fi
.PP
Take this server out of the way before work on it:
.PP
.nf
    busctl call io.k3s.Server1 /io/k3s/Server1 io.k3s.Server1 TransferLeadership s ""
.fi
.PP
A backup before an update:
.PP
.nf
    busctl call io.k3s.Server1 /io/k3s/Server1 io.k3s.Server1 Backup s before\-update
.fi
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_and_property_is_explained_and_nothing_else() {
        let xml = introspection();
        for (element, table) in [("method", METHODS), ("property", PROPERTIES)] {
            let mut there: Vec<&str> =
                introspected(&xml, element).iter().map(|found| found.name).collect();
            let mut explained: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
            there.sort_unstable();
            explained.sort_unstable();
            assert_eq!(there, explained, "{xml}");
        }
    }

    #[test]
    fn text_cannot_become_a_request() {
        assert_eq!(escape(".SH x-y\\z"), "\\&.SH x\\-y\\ez");
    }

    /// `UPDATE_EXPECT=1` writes them.
    #[test]
    fn pages_in_man_are_those_of_this_program() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("man");
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            write(&directory).unwrap();
        }
        let mut expected: Vec<String> = Vec::new();
        for (name, text) in pages().unwrap() {
            let found = fs::read_to_string(directory.join(&name)).unwrap_or_default();
            assert!(found == text, "man/{name} is stale; UPDATE_EXPECT=1 cargo test man");
            expected.push(name);
        }
        for file in fs::read_dir(&directory).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            assert!(expected.contains(&name), "man/{name} is no page of this program");
        }
    }
}

//! `status`: everything about this host's server on one page, whether it runs or not.
//!
//! What the server knows of itself, it is asked on port 2379; who the members are, all of them. What the board is like is read
//! here. A server that does not answer is shown as it said last: its phase, systemd's view of its unit, and who it is on disk.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value as Json, json};

use super::members::{self, Roll};
use super::{AdminError, Format};
use crate::board::{self, Board, Card, Mount, Weight};
use crate::bus::units::{self, UnitState};
use crate::bus::{self, timedate};
use crate::client::{self, Connection};
use crate::config::Config;
use crate::env::host;
use crate::join::Identity;
use crate::proto::node::admin_client::AdminClient;
use crate::proto::node::{ServerStatus, ServerStatusRequest};
use crate::systemd::phase::{DIRECTORY, Report};
use crate::types::{ClusterId, NodeId};

/// Everything that is shown.
struct Page {
    server: Result<(ServerStatus, Roll), String>,
    /// What it said last of its start.
    report: Option<Report>,
    unit: Option<UnitState>,
    synchronized: Option<bool>,
    disk: Disk,
    board: Board,
    free_bytes: Option<u64>,
}

/// Who a node is, as its directory says.
struct Disk {
    directory: String,
    identity: Result<Option<Identity>, String>,
}

/// Prints it, with `again` over and over. Returns whether the server serves.
pub fn run(
    config: &Config,
    connection: &Connection,
    format: Format,
    again: Option<Duration>,
    out: &mut dyn Write,
) -> Result<bool, AdminError> {
    client::block_on(async {
        loop {
            let page = Page::gather(config, connection).await;
            match format {
                Format::Json | Format::Yaml => writeln!(out, "{:#}", page.as_json())?,
                Format::Table => page.print(out)?,
            }
            out.flush()?;
            let Some(pause) = again else { return Ok(page.serves()) };
            tokio::time::sleep(pause).await;
            writeln!(out)?;
        }
    })?
}

async fn ask(connection: &Connection) -> Result<(ServerStatus, Roll), AdminError> {
    let channel = connection.open().await?;
    let mut client = AdminClient::new(channel.clone());
    let status = client.status(ServerStatusRequest {}).await?.into_inner();
    Ok((status, Roll::gather(connection, channel).await?))
}

impl Page {
    async fn gather(config: &Config, connection: &Connection) -> Self {
        let bus = bus::connect().await;
        let (unit, synchronized) = match &bus {
            Some(bus) => {
                tokio::join!(units::look(bus, units::OWN), timedate::is_synchronized(bus))
            }
            None => (None, None),
        };
        let directory = &config.db_dir;
        let identity = Identity::load(&host::env(), directory).map_err(|error| error.to_string());
        Self {
            server: ask(connection).await.map_err(|error| error.to_string()),
            report: Report::read(Path::new(DIRECTORY)),
            unit: unit.filter(|unit| unit.load == "loaded"),
            synchronized,
            disk: Disk { directory: directory.display().to_string(), identity },
            board: board::look(Path::new("/"), directory),
            free_bytes: host::env().disk.free_bytes(directory).ok(),
        }
    }

    const fn serves(&self) -> bool {
        match &self.server {
            Ok((status, _)) => status.leader != 0,
            Err(_) => false,
        }
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.server {
            Ok((status, roll)) => {
                write!(out, "{}", running(status))?;
                write!(out, "{}", self.surroundings())?;
                writeln!(out)?;
                members::print(roll, out)?;
            }
            Err(why) => {
                write!(out, "{}", self.stopped(why))?;
                write!(out, "{}", self.surroundings())?;
            }
        }
        write!(out, "{}", advice(&self.board))
    }

    /// What is known of a server that does not answer.
    fn stopped(&self, why: &str) -> String {
        let mut text = String::from("k3s-server does not answer\n");
        line(&mut text, "asked", &why.replace('\n', "; "));
        if let Some(unit) = &self.unit {
            let restarts = match unit.restarts {
                0 => String::new(),
                count => format!(", restarted {count} times"),
            };
            line(
                &mut text,
                "unit",
                &format!("{} ({}), result {}{restarts}", unit.active, unit.sub, unit.result),
            );
            if !unit.text.is_empty() {
                line(&mut text, "said", &unit.text);
            }
        }
        if let Some(report) = &self.report {
            let gone = if report.is_alive() { "" } else { ", and has ended" };
            let exit = report.exit.map_or_else(String::new, |exit| format!(", exit status {exit}"));
            line(
                &mut text,
                "phase",
                &format!("{}{exit}: {}{gone}", report.phase.word(), report.detail),
            );
        }
        line(&mut text, "on disk", &self.disk.sentence());
        text
    }

    fn surroundings(&self) -> String {
        let mut text = String::new();
        if let Some(model) = &self.board.model {
            line(&mut text, "board", model);
        }
        if let Some(card) = &self.board.card {
            line(&mut text, "card", &describe(card));
        }
        if let Some(mount) = &self.board.mount {
            line(&mut text, "mount", &mounted(mount, self.free_bytes));
        }
        line(&mut text, "clock", clock(self.synchronized));
        text
    }

    fn as_json(&self) -> Json {
        let server = match &self.server {
            Ok((status, roll)) => {
                let mut json = server_json(status);
                json["members"] = members::as_json(roll);
                json
            }
            Err(why) => json!({ "error": why }),
        };
        let card = self.board.card.as_ref().map(|card| {
            json!({
                "device": card.device,
                "kind": card.medium.words(),
                "name": card.name,
                "cid": card.identity,
                "bytes": card.bytes,
                "life_used_percent": card.used.map(|(from, to)| [from, to]),
                "spare_blocks": card.spare,
            })
        });
        let mount = self.board.mount.as_ref().map(|mount| {
            json!({
                "source": mount.source,
                "point": mount.point.display().to_string(),
                "file_system": mount.kind,
                "options": mount.options,
                "free_bytes": self.free_bytes,
            })
        });
        let missing = self.board.missing.iter().map(|missing| {
            let needed = missing.weight == Weight::Needed;
            json!({ "needed": needed, "what": missing.what, "fix": missing.fix })
        });
        json!({
            "serves": self.serves(),
            "server": server,
            "phase": self.report,
            "unit": self.unit.as_ref().map(|unit| json!({
                "active": unit.active, "sub": unit.sub, "result": unit.result,
                "restarts": unit.restarts, "status": unit.text,
            })),
            "disk": {
                "directory": self.disk.directory,
                "node": self.disk.known().map(|identity| identity.node.to_string()),
                "cluster": self.disk.known().map(|identity| identity.cluster.to_string()),
                "starts": self.disk.known().map(|identity| identity.epoch),
            },
            "board": self.board.model,
            "card": card,
            "mount": mount,
            "clock_synchronized": self.synchronized,
            "missing": missing.collect::<Vec<_>>(),
        })
    }
}

impl Disk {
    fn known(&self) -> Option<Identity> {
        self.identity.as_ref().ok().copied().flatten()
    }

    fn sentence(&self) -> String {
        let directory = &self.directory;
        match &self.identity {
            Ok(Some(identity)) => format!(
                "{directory}: node {} of cluster {}, started {} times",
                identity.node, identity.cluster, identity.epoch
            ),
            Ok(None) => format!("{directory}: no datastore yet"),
            Err(error) => format!("{directory}: {error}"),
        }
    }
}

fn line(text: &mut String, name: &str, value: &str) {
    // Writing to a string cannot fail.
    let _always = writeln!(text, "  {name:<11} {value}");
}

/// What a running server says.
fn running(status: &ServerStatus) -> String {
    let mut text = format!(
        "{} is {} in term {}, k3s-server {}, pid {}\n",
        status.name, status.role, status.term, status.release, status.pid
    );
    line(
        &mut text,
        "cluster",
        &format!("{}, this is node {}", ClusterId::new(status.cluster), NodeId::new(status.node)),
    );
    if status.leader == 0 {
        line(&mut text, "leader", "NONE: writes wait");
    }
    let lag = status.committed.saturating_sub(status.applied);
    let behind = if lag == 0 { String::new() } else { format!(" ({lag} behind)") };
    line(
        &mut text,
        "log",
        &format!(
            "entry {} committed, {} applied{behind}, state on the card up to {}",
            status.committed, status.applied, status.checkpoint
        ),
    );
    let quota = match status.quota_bytes {
        0 => String::new(),
        quota => format!(" of {}", size(quota)),
    };
    line(
        &mut text,
        "datastore",
        &format!("{}{quota}, revision {}", size(status.store_bytes), status.revision),
    );
    line(&mut text, "barriers", &barriers(status));
    let since = status.written_since.rem_euclid(86_400);
    let (hour, minute) = (since / 3_600, since % 3_600 / 60);
    line(
        &mut text,
        "written",
        &format!("{} today, since {hour:02}:{minute:02} UTC", size(status.written)),
    );
    line(&mut text, "memory", &size(status.resident_bytes));
    for alarm in &status.alarms {
        line(&mut text, "ALARM", alarm);
    }
    if !status.last_error.is_empty() {
        line(&mut text, "last error", &status.last_error.replace('\n', "; "));
    }
    text
}

fn barriers(status: &ServerStatus) -> String {
    if status.barriers == 0 {
        return "none yet".to_owned();
    }
    format!(
        "{}; half took up to {}, 90 % up to {}, 99 % up to {}, the slowest up to {}",
        status.barriers,
        time(status.barrier_p50),
        time(status.barrier_p90),
        time(status.barrier_p99),
        time(status.barrier_slowest)
    )
}

fn server_json(status: &ServerStatus) -> Json {
    json!({
        "name": status.name,
        "release": status.release,
        "pid": status.pid,
        "cluster": ClusterId::new(status.cluster).to_string(),
        "node": NodeId::new(status.node).to_string(),
        "role": status.role,
        "leader": (status.leader != 0).then(|| NodeId::new(status.leader).to_string()),
        "term": status.term,
        "last": status.last,
        "committed": status.committed,
        "applied": status.applied,
        "lag": status.committed.saturating_sub(status.applied),
        "checkpoint": status.checkpoint,
        "revision": status.revision,
        "store_bytes": status.store_bytes,
        "quota_bytes": (status.quota_bytes != 0).then_some(status.quota_bytes),
        "barriers": {
            "count": status.barriers,
            "p50_micros": status.barrier_p50,
            "p90_micros": status.barrier_p90,
            "p99_micros": status.barrier_p99,
            "slowest_micros": status.barrier_slowest,
        },
        "written_today_bytes": status.written,
        "written_since": status.written_since,
        "alarms": status.alarms,
        "last_error": (!status.last_error.is_empty()).then(|| status.last_error.clone()),
        "resident_bytes": status.resident_bytes,
    })
}

fn describe(card: &Card) -> String {
    let name = card.name.as_deref().unwrap_or("unnamed");
    let mut text = format!("{name}, {}", card.medium.words());
    if let Some(bytes) = card.bytes {
        text.push_str(&format!(", {}", size(bytes)));
    }
    text.push_str(&format!(" ({})", card.device));
    match card.used {
        Some((from, to)) => text.push_str(&format!(", {from} to {to} % of its life used")),
        None if card.medium.wears() => text.push_str(", does not tell its wear"),
        None => {}
    }
    text
}

fn mounted(mount: &Mount, free: Option<u64>) -> String {
    let commit =
        mount.number("commit").map_or_else(String::new, |commit| format!(",commit={commit}"));
    let atime = if mount.has("noatime") { "noatime" } else { "relatime" };
    let free = free.map_or_else(String::new, |free| format!(", {} free", size(free)));
    format!("{} on {}, {} {atime}{commit}{free}", mount.source, mount.point.display(), mount.kind)
}

const fn clock(synchronized: Option<bool>) -> &'static str {
    match synchronized {
        Some(true) => "follows a time server",
        Some(false) => "does not follow a time server (yet); see `timedatectl`",
        None => "nobody here can tell whether it is right",
    }
}

/// What is missing, the important first.
fn advice(board: &Board) -> String {
    let mut text = String::new();
    for weight in [Weight::Needed, Weight::Advised] {
        for missing in board.missing.iter().filter(|missing| missing.weight == weight) {
            let mark = if weight == Weight::Needed { "MISSING" } else { "advice" };
            let _always = writeln!(text, "{mark}: {}\n  fix: {}", missing.what, missing.fix);
        }
    }
    text
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "shown with one digit after the point")]
    let of = |unit: u64| bytes as f64 / unit as f64;
    match bytes {
        0..1_024 => format!("{bytes} B"),
        1_024..1_048_576 => format!("{:.1} KiB", of(1 << 10)),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", of(1 << 20)),
        _ => format!("{:.1} GiB", of(1 << 30)),
    }
}

/// Microseconds for people.
fn time(micros: u64) -> String {
    match micros {
        u64::MAX => "more than 30 s".to_owned(),
        0..1_000 => format!("{micros} µs"),
        1_000..1_000_000 => format!("{} ms", micros.div_ceil(1_000)),
        _ => format!("{:.1} s", std::time::Duration::from_micros(micros).as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::board::{Medium, Missing};

    fn status() -> ServerStatus {
        ServerStatus {
            cluster: 0xc1,
            node: 0xa1,
            name: "pi-1".to_owned(),
            release: "0.1.0".to_owned(),
            role: "follower".to_owned(),
            leader: 0xa2,
            term: 7,
            last: 130,
            committed: 120,
            applied: 100,
            checkpoint: 90,
            revision: 5_678,
            store_bytes: 13_000_000,
            quota_bytes: 2 << 30,
            barriers: 20_123,
            barrier_p50: 4_000,
            barrier_p90: 8_000,
            barrier_p99: 512_000,
            barrier_slowest: u64::MAX,
            written: 312 << 20,
            written_since: 86_400 * 20_000 + 9 * 3_600 + 12 * 60,
            alarms: vec!["NOSPACE (a1)".to_owned()],
            last_error: "the card refused a write".to_owned(),
            pid: 812,
            resident_bytes: 19_000_000,
        }
    }

    fn board() -> Board {
        Board {
            model: Some("Raspberry Pi 4 Model B Rev 1.4".to_owned()),
            card: Some(Card {
                device: "mmcblk0".to_owned(),
                medium: Medium::SdCard,
                name: Some("SC32G".to_owned()),
                identity: None,
                bytes: Some(31_914_983_424),
                used: None,
                spare: None,
            }),
            mount: Some(Mount {
                source: "/dev/mmcblk0p2".to_owned(),
                point: "/".into(),
                kind: "ext4".to_owned(),
                options: vec!["noatime".to_owned(), "commit=60".to_owned()],
            }),
            missing: vec![Missing {
                weight: Weight::Needed,
                what: "the kernel's memory controller is off, and K3s does not start without it".to_owned(),
                fix: "add ` cgroup_enable=memory` at the end of the one line in /boot/firmware/cmdline.txt, and reboot".to_owned(),
            }],
        }
    }

    fn page(server: Result<(ServerStatus, Roll), String>) -> Page {
        Page {
            server,
            report: Some(Report {
                phase: crate::systemd::Phase::Failed,
                detail: "critical flags differ".to_owned(),
                pid: 0,
                exit: Some(78),
            }),
            unit: Some(UnitState {
                active: "failed".to_owned(),
                sub: "failed".to_owned(),
                result: "exit-code".to_owned(),
                ..UnitState::default()
            }),
            synchronized: Some(true),
            disk: Disk { directory: "/var/lib/k3s-server".to_owned(), identity: Ok(None) },
            board: board(),
            free_bytes: Some(20 << 30),
        }
    }

    #[test]
    fn a_running_server_is_one_page() {
        let mut text = running(&status());
        let page = page(Err(String::new()));
        text.push_str(&page.surroundings());
        text.push_str(&advice(&page.board));
        expect![[r#"
            pi-1 is follower in term 7, k3s-server 0.1.0, pid 812
              cluster     c1, this is node a1
              log         entry 120 committed, 100 applied (20 behind), state on the card up to 90
              datastore   12.4 MiB of 2.0 GiB, revision 5678
              barriers    20123; half took up to 4 ms, 90 % up to 8 ms, 99 % up to 512 ms, the slowest up to more than 30 s
              written     312.0 MiB today, since 09:12 UTC
              memory      18.1 MiB
              ALARM       NOSPACE (a1)
              last error  the card refused a write
              board       Raspberry Pi 4 Model B Rev 1.4
              card        SC32G, SD card, 29.7 GiB (mmcblk0), does not tell its wear
              mount       /dev/mmcblk0p2 on /, ext4 noatime,commit=60, 20.0 GiB free
              clock       follows a time server
            MISSING: the kernel's memory controller is off, and K3s does not start without it
              fix: add ` cgroup_enable=memory` at the end of the one line in /boot/firmware/cmdline.txt, and reboot
        "#]]
        .assert_eq(&text);
    }

    #[test]
    fn a_server_that_does_not_answer_is_shown_as_it_said_last() {
        let page = page(Err("no server answers:\n  https://127.0.0.1:2379: refused".to_owned()));
        assert!(!page.serves());
        expect![[r#"
            k3s-server does not answer
              asked       no server answers:;   https://127.0.0.1:2379: refused
              unit        failed (failed), result exit-code
              phase       failed, exit status 78: critical flags differ, and has ended
              on disk     /var/lib/k3s-server: no datastore yet
        "#]]
        .assert_eq(&page.stopped(page.server.as_ref().err().map_or("", String::as_str)));
        let json = page.as_json();
        assert_eq!(json["serves"], json!(false));
        assert_eq!(json["phase"]["exit"], json!(78));
        assert_eq!(json["card"]["name"], json!("SC32G"));
    }

    #[test]
    fn json_has_numbers_and_not_sentences() {
        let json = server_json(&status());
        assert_eq!(json["lag"], json!(20));
        assert_eq!(json["barriers"]["p99_micros"], json!(512_000));
        assert_eq!(json["leader"], json!("a2"));
    }
}

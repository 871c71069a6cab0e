//! `flags show` and `flags set`.

use std::io::{self, Write};

use serde_json::json;
use tonic::Code;
use tonic::transport::Channel;

use super::table;
use super::{AdminError, Format};
use crate::client::Connection;
use crate::critical::{Change, ClusterFlags, ClusterSide, date, line};
use crate::proto::node::admin_client::AdminClient;
use crate::proto::node::{ChangeFlagRequest, FlagsReply, FlagsRequest};

/// What a server knows of the flags.
pub struct Known {
    /// The cluster's record.
    pub record: ClusterFlags,
    /// The answering server's own.
    pub own: ClusterFlags,
    /// Its name.
    pub name: String,
    /// Without a leader nobody can say that there is no newer record.
    pub may_be_old: bool,
}

/// Asks for the newest record, and for the server's own copy if there is no leader.
pub async fn ask(channel: Channel) -> Result<Known, AdminError> {
    let mut client = AdminClient::new(channel);
    let newest = client.flags(FlagsRequest { local: false }).await;
    let (reply, may_be_old) = match newest {
        Err(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => {
            (client.flags(FlagsRequest { local: true }).await?, true)
        }
        other => (other?, false),
    };
    let FlagsReply { record, own, name } = reply.into_inner();
    if record.is_empty() {
        return Err(AdminError::Refused(
            "the cluster has not recorded its critical flags yet".to_owned(),
        ));
    }
    let decode = |bytes: &[u8]| {
        ClusterFlags::decode(bytes).map_err(|error| AdminError::Refused(error.to_string()))
    };
    Ok(Known { record: decode(&record)?, own: decode(&own)?, name, may_be_old })
}

/// `flags show`
pub async fn show(
    connection: &Connection,
    format: Format,
    out: &mut dyn Write,
) -> Result<(), AdminError> {
    let known = ask(connection.open().await?).await?;
    Ok(print(&known, format, out)?)
}

fn print(known: &Known, format: Format, out: &mut dyn Write) -> io::Result<()> {
    match format {
        Format::Table => print_table(known, out),
        Format::Json => writeln!(out, "{:#}", as_json(known)),
        Format::Yaml => {
            writeln!(out, "# what every server of the cluster must be configured with")?;
            for (flag, side) in known.record.sides() {
                writeln!(out, "{}", line(flag, side.value()))?;
            }
            Ok(())
        }
    }
}

fn since(side: &ClusterSide) -> String {
    match side {
        ClusterSide::Recorded(recorded) => date(recorded.since),
        ClusterSide::Default(_) => "-".to_owned(),
    }
}

fn print_table(known: &Known, out: &mut dyn Write) -> io::Result<()> {
    let row = |(flag, side): (crate::critical::Flag, ClusterSide)| {
        let own = known.own.value(flag);
        let here = match own {
            Some(own) if own != *side.value() => own.to_string(),
            _ => "same".to_owned(),
        };
        let change = match flag.change() {
            Change::WithRestart => "flags set, restarts",
            Change::Never(_) => "never",
        };
        [
            flag.name().to_owned(),
            side.value().to_string(),
            since(&side),
            side.set_by().unwrap_or("default").to_owned(),
            here,
            change.to_owned(),
        ]
    };
    let rows: Vec<_> = known.record.sides().map(row).collect();
    let here = format!("ON {}", known.name);
    table::draw(["FLAG", "CLUSTER", "SINCE", "SET BY", &here, "CAN CHANGE"], &rows, out)?;
    if known.record.unknown_count() > 0 {
        let count = known.record.unknown_count();
        writeln!(out, "{count} more that only a newer release knows")?;
    }
    if known.may_be_old {
        writeln!(out, "there is no leader: this is the copy of {}, and may be old", known.name)?;
    }
    Ok(())
}

fn as_json(known: &Known) -> serde_json::Value {
    let flags = known.record.sides().map(|(flag, side)| {
        let reason = match flag.change() {
            Change::WithRestart => None,
            Change::Never(reason) => Some(reason),
        };
        let own = known.own.value(flag);
        json!({
            "flag": flag.name(),
            "cluster": side.value().text(),
            "since": side.since(),
            "set_by": side.set_by(),
            "here": own.as_ref().map(crate::critical::Value::text),
            "equal": own.as_ref() == Some(side.value()),
            "changeable": reason.is_none(),
            "reason": reason,
        })
    });
    json!({
        "server": known.name,
        "may_be_old": known.may_be_old,
        "unknown_flags": known.record.unknown_count(),
        "flags": flags.collect::<Vec<_>>(),
    })
}

/// `flags set`
pub async fn set(
    connection: &Connection,
    flag: &str,
    value: &str,
    out: &mut dyn Write,
) -> Result<(), AdminError> {
    let mut client = AdminClient::new(connection.open().await?);
    let request = ChangeFlagRequest { flag: flag.to_owned(), value: value.to_owned() };
    let reply = client.change_flag(request).await?.into_inner();
    writeln!(out, "{flag} of the cluster changed from {} to {}", reply.old, reply.new)?;
    writeln!(out, "now, on every server, one after the other:")?;
    writeln!(out, "  1. in /etc/k3s/config.yaml write:  {}", reply.line)?;
    writeln!(out, "  2. systemctl restart k3s-server, and wait until it is ready")?;
    writeln!(out, "a server without the new value goes on, and is refused at its next start")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use expect_test::expect;

    use super::*;
    use crate::critical::{Flag, Value};

    fn known() -> Known {
        let mut record = ClusterFlags::default();
        let at = UNIX_EPOCH + Duration::from_secs(1_785_931_200);
        let network = |text| Value::Networks(vec![crate::config::Cidr::parse(text).unwrap()]);
        record.set(Flag::ClusterCidr, network("10.42.0.0/16"), at, "pi-1");
        record.set(Flag::ServiceCidr, network("10.43.0.0/16"), at, "pi-1");
        let dns = Value::Addresses(vec!["10.43.0.10".parse().unwrap()]);
        record.set(Flag::ClusterDns, dns, at, "pi-1");
        let own = record.clone();
        let set = Value::Set(["traefik".to_owned()].into());
        record.set(Flag::Disable, set, at + Duration::from_secs(86_400), "pi-3");
        Known { record, own, name: "pi-2".to_owned(), may_be_old: true }
    }

    fn printed(format: Format) -> String {
        let mut out = Vec::new();
        print(&known(), format, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn table_shows_the_record_and_where_the_answering_server_differs() {
        let table = printed(Format::Table);
        let rows: Vec<&str> = table.lines().skip(1).filter(|line| !line.starts_with('+')).collect();
        expect![[r#"
            | FLAG                        | CLUSTER       | SINCE                | SET BY  | ON pi-2 | CAN CHANGE          |
            | cluster-cidr                | 10.42.0.0/16  | 2026-08-05 12:00 UTC | pi-1    | same    | never               |
            | service-cidr                | 10.43.0.0/16  | 2026-08-05 12:00 UTC | pi-1    | same    | never               |
            | cluster-dns                 | 10.43.0.10    | 2026-08-05 12:00 UTC | pi-1    | same    | never               |
            | cluster-domain              | cluster.local | -                    | default | same    | never               |
            | disable                     | traefik       | 2026-08-06 12:00 UTC | pi-3    | (none)  | flags set, restarts |"#]]
        .assert_eq(&rows[..6].join("\n"));
        assert!(table.ends_with("there is no leader: this is the copy of pi-2, and may be old\n"));
        assert_eq!(rows.len(), 1 + Flag::ALL.len() + 1);
    }

    #[test]
    fn yaml_is_what_a_servers_configuration_needs() {
        let yaml = printed(Format::Yaml);

        assert!(
            yaml.contains("\ncluster-cidr: 10.42.0.0/16\n")
                && yaml.contains("\ndisable: [traefik]\n")
        );
        crate::config::parse_text("config.yaml", yaml.as_bytes()).unwrap();
    }

    #[test]
    fn json_says_what_can_change_and_why_not() {
        let json = as_json(&known());
        let flags = json["flags"].as_array().unwrap();

        assert_eq!(flags.len(), Flag::ALL.len());
        assert_eq!((&flags[0]["equal"], &flags[0]["changeable"]), (&json!(true), &json!(false)));
        assert!(flags[0]["reason"].as_str().unwrap().contains("pod network"));
        assert_eq!((&flags[4]["cluster"], &flags[4]["here"]), (&json!("traefik"), &json!("")));
        assert_eq!((&flags[4]["equal"], &flags[4]["set_by"]), (&json!(false), &json!("pi-3")));
    }
}

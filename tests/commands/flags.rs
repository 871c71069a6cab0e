//! `flags show` and `flags set` on a running server, and what a restart makes of it.

use serde_json::json;

use crate::server::{Ran, Server};

const FLAGS: &str = "disable: [traefik]\ncluster-domain: k8s.local\n";

#[test]
fn flags_are_recorded_at_founding_and_shown_with_time_and_author() {
    let server = Server::configure("pi-1", "127.0.0.1", FLAGS).start();
    let shown = server.run(&["flags", "show"]).done();
    let row = shown.lines().find(|line| line.starts_with("| disable ")).unwrap();

    assert!(
        row.contains("| traefik ") && row.contains("| pi-1 ") && row.contains("| same "),
        "{row}"
    );
    let json = server.run(&["flags", "show", "-o", "json"]).json();
    assert_eq!((&json["server"], &json["may_be_old"]), (&json!("pi-1"), &json!(false)));
    let yaml = server.run(&["flags", "show", "-o", "yaml"]).done();
    assert!(yaml.contains("\ncluster-domain: k8s.local\n"), "{yaml}");
}

#[test]
fn a_changed_flag_warns_now_and_refuses_the_next_start_until_the_configuration_agrees() {
    let mut server = Server::configure("pi-1", "127.0.0.1", FLAGS).start();
    let changed = server.run(&["flags", "set", "disable", "servicelb,traefik"]).done();
    assert!(
        changed.starts_with("disable of the cluster changed from traefik to servicelb, traefik\n")
    );
    assert!(changed.contains("write:  disable: [servicelb, traefik]\n"), "{changed}");
    server.wait_for_log("this server still runs with another value");
    server.wait_for_log("disable changed from traefik to servicelb, traefik by pi-1");
    let table = server.run(&["flags", "show"]).done();
    let row = table.lines().find(|line| line.starts_with("| disable ")).unwrap();
    assert!(row.contains("| servicelb, traefik ") && row.contains("| traefik "), "{row}");
    let check = server.run(&["check"]);
    assert_eq!(check.status, 78, "{check:?}");
    assert!(check.out.contains("compared with the server that runs here (pi-1)"), "{check:?}");
    server.stop();

    let refused = refused_untouched(&server);
    let said = format!("{}{}", refused.out, refused.err);
    for part in
        ["1 setting differs", "servicelb, traefik", "set by pi-1", "disable: [servicelb, traefik]"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    let line = server.config().display().to_string();
    assert!(said.contains(&format!("{line}:7:11")), "{said}");
    server.write("disable: [traefik]\ndisable+: servicelb\ncluster-domain: k8s.local\n");
    let check = server.run(&["check"]).done();
    assert!(check.contains("the critical flags are those of the datastore in "), "{check}");
    server.restart();
    assert_eq!(server.run(&["check"]).status, 0);
    server.stop();
}

/// A start that ends with status 78 and leaves every byte as it was.
fn refused_untouched(server: &Server) -> Ran {
    let before = server.contents();
    let refused = server.refused();
    assert_eq!(refused.status, 78, "{refused:?}");
    let after = server.contents();
    let touched = after.iter().filter(|(path, bytes)| before.get(*path) != Some(*bytes));
    let touched: Vec<_> =
        touched.map(|(path, _)| path.strip_prefix(server.db_dir()).unwrap()).collect();
    assert!(touched.is_empty() && before.len() == after.len(), "{touched:?}");
    refused
}

/// What the server has written down of the cluster's flags.
fn has_seen(server: &Server, value: &str) -> bool {
    let file = std::fs::read(server.db_dir().join("flags")).unwrap_or_default();
    String::from_utf8_lossy(&file).contains(value)
}

#[test]
fn a_server_that_was_down_during_a_change_starts_with_the_new_value_and_not_with_the_old_one() {
    let mut servers = Server::three("disable: [traefik]\n");
    let [first, second, third] = &mut servers;
    for server in [&mut *first, second, third] {
        server.wait_until("has seen the flags", |server| has_seen(server, "traefik"));
    }
    third.stop();
    first.run(&["flags", "set", "disable", "runtimes"]).done();
    first.wait_until("has seen the change", |server| has_seen(server, "runtimes"));

    let old = refused_by_the_others(third);
    assert!(old.contains("disable: [runtimes]") && old.contains("set by pi-1"), "{old}");
    third.put("disable: [runtimes]\n");
    let check = third.run(&["check"]).done();
    assert!(
        check.contains("the critical flags are those of another server of the cluster"),
        "{check}"
    );
    third.restart();
    third.wait_until("has seen the change", |server| has_seen(server, "runtimes"));
    third.put("cluster-domain: k8s.local\n");
    third.stop();
    let again = refused_untouched(third);
    assert!(again.err.contains("cluster-domain"), "{again:?}");
    for server in [&mut *first, second] {
        server.kill();
    }
    let alone = refused_untouched(third);
    assert!(alone.err.contains("cluster-domain: cluster.local"), "{alone:?}");
}

/// Its own copy agrees with the old value, so it has to open its data to hear of the new one.
fn refused_by_the_others(server: &Server) -> String {
    let refused = server.refused();
    assert_eq!(refused.status, 78, "{refused:?}");
    refused.err
}

#[test]
fn what_must_not_change_is_refused_with_the_reason() {
    let server = Server::configure("pi-1", "127.0.0.1", "").start();
    for (flag, value, why) in [
        (
            "cluster-cidr",
            "10.50.0.0/16",
            "cluster-cidr of a living cluster cannot be changed: every node keeps the pod network",
        ),
        ("service-cidr", "10.51.0.0/16", "existing services keep addresses of the old network"),
        ("cluster-dns", "10.43.0.11", "running pods keep the old DNS address"),
        ("cluster-domain", "x.local", "running pods and certificates keep the old domain"),
        ("disable", "treafik", "disable names an unknown component: found treafik"),
        ("disable", "", "disable is (none) already"),
        ("dissable", "traefik", "dissable is no critical flag, did you mean disable?"),
    ] {
        let refused = server.run(&["flags", "set", flag, value]);
        assert_eq!((refused.status, refused.out.as_str()), (1, ""), "{refused:?}");
        assert!(refused.err.contains(why), "{refused:?}");
    }
    assert!(server.log().contains("was refused"), "{}", server.log());
}

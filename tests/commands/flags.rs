//! `flags show` and `flags set` on a running server, and what a restart makes of it.

use serde_json::json;

use crate::server::Server;

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

    let refused = server.refused();
    assert_eq!(refused.status, 78, "{refused:?}");
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

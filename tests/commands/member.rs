//! `member` on a cluster of one and of three.

use serde_json::json;

use crate::server::Server;

#[test]
fn last_voter_is_not_removed_and_the_numbers_say_why() {
    let server = Server::configure("pi-1", "127.0.0.1", "").start();
    let table = server.run(&["member", "list"]).done();
    assert!(table.contains("| leader "), "{table}");
    assert!(table.ends_with("1 voter, 1 needed for a majority, 1 answers\n"), "{table}");

    let refused = server.run(&["member", "remove", "pi-1", "--yes"]);
    assert_eq!(refused.status, 1, "{refused:?}");
    assert!(
        refused.err.contains("re-configuration failed due to not enough started members"),
        "{refused:?}"
    );
    assert!(
        refused.err.contains("after: 0 voters, 1 needed for a majority, 0 answer"),
        "{refused:?}"
    );
    let unasked = server.run(&["member", "remove", "pi-1"]);
    assert_eq!(unasked.status, 1);
    assert!(
        unasked.err.contains("nothing was changed\n  fix: answer `y`, or add --yes"),
        "{unasked:?}"
    );
    let unknown = server.run(&["member", "promote", "pi-7"]);
    assert!(unknown.err.contains("no member is called \"pi-7\""), "{unknown:?}");
    let voter = server.run(&["member", "promote", "pi-1"]);
    assert!(voter.err.contains("can only promote a learner member"), "{voter:?}");
}

#[test]
fn three_servers_are_listed_and_one_is_removed_by_name_through_another() {
    let [founder, second, third] = Server::three("");

    let list = second.run(&["member", "list", "-o", "json"]).json();
    assert_eq!(
        (&list["voters"], &list["answering"], &list["needed"]),
        (&json!(3), &json!(3), &json!(2)),
        "{list}"
    );
    for (at, name) in ["pi-1", "pi-2", "pi-3"].iter().enumerate() {
        let member = &list["members"][at];
        assert_eq!(
            (&member["name"], &member["answers"], &member["starts"]),
            (&json!(name), &json!(true), &json!(1)),
            "{list}"
        );
    }
    let changed = third.run(&["flags", "set", "disable", "traefik"]).done();
    assert!(changed.contains("disable of the cluster changed"), "{changed}");
    let shown = founder.run(&["flags", "show", "-o", "json"]).json();
    let disable = &shown["flags"][4];
    assert_eq!(
        (&disable["cluster"], &disable["set_by"]),
        (&json!("traefik"), &json!("pi-3")),
        "{shown}"
    );

    let removed = second.run(&["member", "remove", "pi-3", "--yes"]).done();
    assert!(removed.contains("is no member any more"), "{removed}");
    let list = founder.run(&["member", "list"]).done();
    assert!(!list.contains("pi-3") && list.contains("2 voters, 2 needed for a majority"), "{list}");
}

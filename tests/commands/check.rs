//! `check`: before anything is restarted, without changing anything.

use std::fs;

use crate::server::Server;

#[test]
fn an_empty_disk_has_nothing_to_compare_with_and_stays_empty() {
    let server = Server::configure("pi-1", "127.0.0.1", "cluster-init: true\n");
    let out = server.run(&["check"]).done();

    assert!(out.contains("a start would found a new cluster"), "{out}");
    assert!(!server.db_dir().exists());
}

#[test]
fn a_stopped_server_is_compared_with_its_disk_byte_for_byte_untouched() {
    let mut server = Server::configure("pi-1", "127.0.0.1", "cluster-init: true\n").start();
    server.stop();
    let before = server.contents();
    let good = server.run(&["check"]).done();
    assert!(good.contains("note: there is a datastore already, so cluster-init"), "{good}");
    assert!(good.contains("the critical flags are those of the datastore in"), "{good}");
    server.write("service-cidr: 10.99.0.0/16\n");
    let differs = server.run(&["check", "-o", "json"]);

    assert_eq!(differs.status, 78, "{differs:?}");
    let flags = &differs.json()["flags"];
    let names: Vec<_> = flags["mismatches"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["flag"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["service-cidr", "cluster-dns"]);
    assert_eq!(flags["mismatches"][0]["origin"]["line"], 7);
    assert_eq!(server.contents(), before);
}

#[test]
fn a_cluster_is_asked_with_the_token_before_joining_it() {
    let founder =
        Server::configure("pi-1", "127.0.0.1", "cluster-init: true\ndisable: [traefik]\n").start();
    let token = founder.run(&["token", "--show"]).done();
    let join = format!("server: {}\ntoken: \"{}\"\n", founder.url(), token.trim());
    let joiner = Server::configure("pi-2", "127.0.0.2", &join);

    let differs = joiner.run(&["check"]);
    assert_eq!(differs.status, 78, "{differs:?}");
    assert!(
        differs.out.contains(&format!("compared with the cluster of {}", founder.url())),
        "{differs:?}"
    );
    assert!(differs.out.contains("disable: [traefik]"), "{differs:?}");
    let good = joiner.run(&["check", "--disable=traefik"]).done();
    assert!(good.contains("a start would join the cluster of"), "{good}");

    let wrong = format!("{}x", token.trim());
    let wrong = joiner.run(&["check", "--token", &wrong]);
    assert_eq!(wrong.status, 78, "{wrong:?}");
    assert!(wrong.out.contains("refuses the token"), "{wrong:?}");
    let nobody = joiner.run(&["check", "--server=https://127.0.0.3:2"]);
    assert_eq!(nobody.status, 1, "{nobody:?}");
    assert!(nobody.out.contains("cannot be asked"), "{nobody:?}");
    for ran in [&differs, &wrong, &nobody] {
        let password = token.trim().rsplit(':').next().unwrap();
        assert!(!ran.out.contains(password) && !ran.err.contains(password), "{ran:?}");
    }
    assert!(!joiner.db_dir().exists(), "nothing was written");
    assert_eq!(fs::read_dir(joiner.config().parent().unwrap()).unwrap().count(), 1);
}

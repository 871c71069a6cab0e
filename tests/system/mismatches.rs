//! A configuration that differs from the cluster's: refused once, with everything that has to be known.

use crate::host::{LONG, UNIT};
use crate::story::{CONFIG, cluster};

#[test]
fn wrong_setting_fails_once_with_78_and_the_table_is_in_status_and_journal() {
    let Some(lab) = cluster() else { return };
    let host = &lab.hosts[2];
    let right = host.shell(&format!("cat {CONFIG}"));
    host.put("before", "1");
    host.run(&["systemctl", "stop", UNIT]);
    host.write(CONFIG, format!("{right}service-cidr: 10.99.0.0/16\ndisable: traefik\n"));

    let (status, _) = host.command(&["systemctl", "start", UNIT]);
    assert_ne!(status, 0, "it started");
    // A unit that waits for another try is "activating".
    assert_eq!(host.property("ActiveState"), "failed");
    assert_eq!(host.property("ExecMainStatus"), "78");
    assert_eq!(host.property("NRestarts"), "0");
    let (_, shown) = host.command(&["systemctl", "status", "--no-pager", "--full", UNIT]);
    assert!(shown.contains("status=78/CONFIG"), "{shown}");
    let journal = host.journal();
    for part in ["10.43.0.0/16", "traefik", "config.yaml:4:10", "fix: "] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
        assert!(journal.contains(part), "no {part:?} in\n{journal}");
    }
    for part in ["settings differ", "10.99.0.0/16", "config.yaml:3:15"] {
        assert!(journal.contains(part), "no {part:?} in\n{journal}");
    }

    // The others did not mind, and the corrected file is all it takes.
    lab.hosts[0].put("meanwhile", "2");
    host.write(CONFIG, &right);
    let limit = LONG.as_secs().to_string();
    host.run(&["timeout", &limit, "systemctl", "start", UNIT]);
    assert_eq!((host.value("before"), host.value("meanwhile")), ("1".to_owned(), "2".to_owned()));
}

#[test]
fn mistake_in_the_file_fails_once_with_78_and_its_line() {
    let Some(lab) = crate::lab::Lab::boot(1) else { return };
    let host = &lab.hosts[0];
    host.write(CONFIG, "cluster-init: true\ncluster-cidr: 10.42.0.0/33\nno-such-key: 1\n");
    let (status, _) = host.command(&["systemctl", "start", UNIT]);
    assert_ne!(status, 0, "it started");
    assert_eq!(
        (host.property("ActiveState").as_str(), host.property("ExecMainStatus").as_str()),
        ("failed", "78")
    );
    assert_eq!(host.property("NRestarts"), "0");
    let journal = host.journal();
    assert!(journal.contains("config.yaml:2:"), "{journal}");
    host.shell("test ! -e /var/lib/k3s-server/node.json");
}

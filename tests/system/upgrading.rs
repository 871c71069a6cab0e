//! A new release, one host after the other.

use crate::host::{LONG, UNIT};
use crate::story::{cluster, while_writing};

#[test]
fn cluster_is_upgraded_one_host_at_a_time_while_clients_write() {
    let Some(lab) = cluster() else { return };
    // The way dpkg replaces a program that runs. Bytes behind the end of a program make it another file, and nothing else.
    let replace = "cp /usr/bin/k3s-server /usr/bin/k3s-server.dpkg-new && echo new >>/usr/bin/k3s-server.dpkg-new && \
                   mv /usr/bin/k3s-server.dpkg-new /usr/bin/k3s-server";
    for (at, host) in lab.hosts.iter().enumerate() {
        let other = &lab.hosts[(at + 1) % 3];
        host.shell(replace);
        let limit = LONG.as_secs().to_string();
        let (written, _) =
            while_writing(other, || host.run(&["timeout", &limit, "systemctl", "restart", UNIT]));
        written.assert_went_on();
        // systemctl returned, so it is ready: the next one may go.
        let running = host.shell(&format!("tail -c 4 /proc/{}/exe", host.main_pid()));
        assert_eq!(running, "new\n");
        assert_eq!(host.value("written"), written.acknowledged.to_string());
    }
}

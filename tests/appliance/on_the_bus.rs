//! `io.k3s.Server1`, and what the daemon does when logind and systemd say something.

use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd as StdFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zbus::object_server::SignalEmitter;
use zbus::{OwnedFd, OwnedObjectPath, fdo, interface};

use k3s_server::bus::MemberRow;

use crate::bus::Bus;
use crate::server::{PATIENCE, Server};

const NAME: &str = "io.k3s.Server1";
const PATH: &str = "/io/k3s/Server1";

async fn object(bus: &zbus::Connection) -> zbus::Proxy<'static> {
    let deadline = std::time::Instant::now() + PATIENCE;
    let daemon = zbus::fdo::DBusProxy::new(bus).await.unwrap();
    while !daemon.name_has_owner(NAME.try_into().unwrap()).await.unwrap() {
        assert!(std::time::Instant::now() < deadline, "nobody is {NAME}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    zbus::proxy::Builder::new(bus)
        .destination(NAME)
        .path(PATH)
        .interface(NAME)
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await
        .unwrap()
}

async fn until(object: &zbus::Proxy<'_>, property: &str, wanted: &str) {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let found: String = object.get_property(property).await.unwrap();
        if found == wanted {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{property} is {found:?}, not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn properties_tell_the_state_and_methods_do_their_work_for_root() {
    let Some(bus) = Bus::start() else { return };
    let server = Server::configure("");
    let mut process = server.start(&[("DBUS_SYSTEM_BUS_ADDRESS", &bus.address)]);
    let connection = bus.connect().await;
    let object = object(&connection).await;
    until(&object, "State", "ready").await;
    assert_eq!(object.get_property::<String>("Role").await.unwrap(), "leader");
    assert_eq!(object.get_property::<String>("LeaderName").await.unwrap(), "pi-1");
    assert!(object.get_property::<u64>("Term").await.unwrap() > 0);
    assert!(object.get_property::<u64>("AppliedIndex").await.unwrap() > 0);
    assert!(object.get_property::<f64>("BarrierP99").await.unwrap() > 0.0);
    let members: Vec<MemberRow> = object.get_property("Members").await.unwrap();
    assert_eq!(
        (members.len(), members[0].1.as_str(), members[0].2.as_str()),
        (1, "pi-1", "leader")
    );

    if !nix::unistd::getuid().is_root() {
        eprintln!("skipped: methods are for root, and this is somebody else");
        return;
    }
    let index: u64 = object.call("Checkpoint", &()).await.unwrap();
    assert!(index > 0);
    let path: String = object.call("Backup", &("first",)).await.unwrap();
    assert_eq!(path, server.path("db/backups/first").display().to_string());
    assert!(std::fs::metadata(&path).unwrap().len() > 0);
    let again: zbus::Result<String> = object.call("Backup", &("first",)).await;
    assert!(again.unwrap_err().to_string().contains("of this name"));
    let outside: zbus::Result<String> = object.call("Backup", &("../first",)).await;
    assert!(outside.is_err());
    let alone: zbus::Result<String> = object.call("TransferLeadership", &("",)).await;
    assert!(alone.unwrap_err().to_string().contains("no other voter"));
    server.append("tls-san: pi-1.lan");
    let said: Vec<String> = object.call("Reload", &()).await.unwrap();
    assert_eq!(said, ["tls-san: holds now"]);

    // Asked of the bus, and not of the object: it is gone by the time somebody looks.
    let mut changes = fdo::PropertiesProxy::new(&connection, NAME, PATH)
        .await
        .unwrap()
        .receive_properties_changed()
        .await
        .unwrap();
    server.append("cluster-cidr: nonsense");
    let refused: zbus::Result<Vec<String>> = object.call("Reload", &()).await;
    assert!(refused.unwrap_err().to_string().contains("cluster-cidr"));
    kill(Pid::from_raw(i32::try_from(process.pid()).unwrap()), Signal::SIGHUP).unwrap();
    let told = async {
        loop {
            let change = changes.next().await.expect("the bus goes on");
            let args = change.args().unwrap();
            // Other changes, from before, may come first.
            if let Some(error) = args.changed_properties.get("LastError") {
                return error.to_string();
            }
        }
    };
    let error = tokio::time::timeout(PATIENCE, told).await.expect("the change is told");
    assert!(error.contains("nothing was reloaded"), "{error}");
    assert!(process.stop().success());
}

/// Whoever may look must not be able to change anything.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_may_look_and_not_touch() {
    let Some(bus) = Bus::start() else { return };
    if !nix::unistd::getuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let server = Server::configure("");
    let mut process = server.start(&[("DBUS_SYSTEM_BUS_ADDRESS", &bus.address)]);
    let connection = bus.connect().await;
    until(&object(&connection).await, "State", "ready").await;
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "dbus-send"]);
        command.arg(format!("--bus={}", bus.address)).arg("--print-reply");
        let output = command.arg(format!("--dest={NAME}")).arg(PATH).args(arguments).output();
        let output = output.unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let (done, said) =
        as_nobody(&["org.freedesktop.DBus.Properties.Get", "string:io.k3s.Server1", "string:Role"]);
    assert!(done && said.contains("leader"), "{said}");
    for (method, argument) in [
        ("TransferLeadership", Some("string:pi-1")),
        ("Checkpoint", None),
        ("Backup", Some("string:mine")),
        ("Reload", None),
    ] {
        let name = format!("{NAME}.{method}");
        let arguments: Vec<&str> = [Some(name.as_str()), argument].into_iter().flatten().collect();
        let (done, said) = as_nobody(&arguments);
        assert!(!done && said.contains("AccessDenied"), "{method}: {said}");
    }
    assert!(!server.path("db/backups/mine").exists());
    assert!(process.stop().success());
}

/// Stands where logind is: hands out delay locks, and says that the machine goes down.
#[derive(Clone, Default)]
struct Logind {
    locks: Arc<Mutex<Vec<StdFd>>>,
}

#[interface(name = "org.freedesktop.login1.Manager")]
impl Logind {
    fn inhibit(&self, what: String, who: String, _why: String, mode: String) -> OwnedFd {
        assert_eq!(
            (what.as_str(), who.as_str(), mode.as_str()),
            ("shutdown", "k3s-server", "delay")
        );
        let (ours, theirs) = std::io::pipe().unwrap();
        self.locks.lock().unwrap().push(ours.into());
        StdFd::from(theirs).into()
    }

    #[zbus(property, name = "InhibitDelayMaxUSec")]
    fn inhibit_delay_max_usec(&self) -> u64 {
        20_000_000
    }

    #[zbus(signal)]
    async fn prepare_for_shutdown(emitter: &SignalEmitter<'_>, start: bool) -> zbus::Result<()>;
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_machine_goes_down_the_state_is_on_the_card_and_the_lock_is_let_go() {
    let Some(bus) = Bus::start() else { return };
    let logind = Logind::default();
    let connection = bus.connect().await;
    connection.object_server().at("/org/freedesktop/login1", logind.clone()).await.unwrap();
    connection.request_name("org.freedesktop.login1").await.unwrap();
    let server = Server::configure("");
    let mut process = server.start(&[("DBUS_SYSTEM_BUS_ADDRESS", &bus.address)]);
    until(&object(&connection).await, "State", "ready").await;
    process.wait_until("holds a lock", || !logind.locks.lock().unwrap().is_empty());

    let emitter = SignalEmitter::new(&connection, "/org/freedesktop/login1").unwrap();
    Logind::prepare_for_shutdown(&emitter, true).await.unwrap();
    let lock = logind.locks.lock().unwrap().pop().unwrap();
    // The other end is closed when the daemon lets go.
    let released = tokio::task::spawn_blocking(move || {
        let mut lock = std::fs::File::from(lock);
        lock.read(&mut [0]).unwrap()
    });
    let end = tokio::time::timeout(PATIENCE, released).await.expect("the lock was not let go");
    assert_eq!(end.unwrap(), 0);
    process.wait_until_printed("the machine goes down");
    process.wait_until_printed("the state is on the card");

    // The shutdown is called off: a new lock.
    Logind::prepare_for_shutdown(&emitter, false).await.unwrap();
    process.wait_until("holds a lock again", || !logind.locks.lock().unwrap().is_empty());
    assert!(process.stop().success());
}

/// Stands where systemd is, and knows one unit.
struct Systemd;

#[interface(name = "org.freedesktop.systemd1.Manager")]
impl Systemd {
    fn load_unit(&self, name: String) -> OwnedObjectPath {
        assert_eq!(name, "k3s.service");
        OwnedObjectPath::try_from("/org/freedesktop/systemd1/unit/k3s_2eservice").unwrap()
    }
}

struct Unit;

#[interface(name = "org.freedesktop.systemd1.Unit")]
impl Unit {
    #[zbus(property)]
    fn load_state(&self) -> String {
        "loaded".to_owned()
    }
    #[zbus(property)]
    fn active_state(&self) -> String {
        "active".to_owned()
    }
    #[zbus(property)]
    fn sub_state(&self) -> String {
        "running".to_owned()
    }
}

type Exec = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

struct Service {
    arguments: Vec<String>,
}

#[interface(name = "org.freedesktop.systemd1.Service")]
impl Service {
    #[zbus(property, name = "MainPID")]
    fn main_pid(&self) -> u32 {
        4711
    }
    #[zbus(property)]
    fn exec_start(&self) -> Vec<Exec> {
        vec![("/usr/local/bin/k3s".to_owned(), self.arguments.clone(), false, 0, 0, 0, 0, 0, 0, 0)]
    }
    #[zbus(property)]
    fn environment(&self) -> Vec<String> {
        Vec::new()
    }
}

async fn with_upstream(bus: &Bus, arguments: &str) -> zbus::Connection {
    let connection = bus.connect().await;
    let server = connection.object_server();
    let unit = "/org/freedesktop/systemd1/unit/k3s_2eservice";
    server.at("/org/freedesktop/systemd1", Systemd).await.unwrap();
    server.at(unit, Unit).await.unwrap();
    let arguments = arguments.split(' ').map(str::to_owned).collect();
    server.at(unit, Service { arguments }).await.unwrap();
    connection.request_name("org.freedesktop.systemd1").await.unwrap();
    connection
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_with_its_own_etcd_on_our_ports_is_refused_by_name_and_not_retried() {
    for (arguments, status, said) in [
        ("/usr/local/bin/k3s server --cluster-init", 78, "k3s.service (active, pid 4711)"),
        ("/usr/local/bin/k3s server --datastore-endpoint https://127.0.0.1:2379", 1, "in use by"),
    ] {
        let Some(bus) = Bus::start() else { return };
        let _systemd = with_upstream(&bus, arguments).await;
        let server = Server::configure("");
        let _held = TcpListener::bind(&server.client).unwrap();
        let mut process = server.start(&[("DBUS_SYSTEM_BUS_ADDRESS", &bus.address)]);
        let ended = tokio::task::spawn_blocking(move || (process.ended(), process.printed()));
        let (ended, printed) = ended.await.unwrap();
        assert_eq!(ended.code(), Some(status), "{printed}");
        assert!(printed.contains(said), "{printed}");
        assert_eq!(printed.contains("datastore-endpoint"), status == 78, "{printed}");
    }
}

/// A bus where nobody gives locks and no name can be had, and no bus at all: the datastore does not care.
#[test]
fn without_a_bus_everything_else_works_and_nothing_is_said() {
    let server = Server::configure("");
    let mut process = server.start(&[("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")]);
    server.notified("READY=1");
    assert!(process.stop().success());
    let printed = process.printed();
    assert!(!printed.contains("bus"), "{printed}");
}

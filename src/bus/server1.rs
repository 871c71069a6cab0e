//! Our own object: `io.k3s.Server1`, on `/io/k3s/Server1`.
//!
//! What `systemctl status` says in a sentence is here in properties, for dashboards, scripts (`busctl`) and whoever takes a board
//! out of service. The reference, with examples, is the man page `io.k3s.Server1(5)`.
//!
//! # Invariants
//!
//! - `PropertiesChanged` is sent for what changes now and then. Numbers that change with every write say that they
//!   do not announce it: a bus is no place for two messages a second.
//! - Every method asks [`super::authority`] first.

use std::sync::Arc;
use std::time::Duration;

use zbus::fdo::Error;
use zbus::message::Header;
use zbus::object_server::{InterfaceRef, SignalEmitter};
use zbus::{Connection, interface};

use super::authority::permit;
use crate::env::BoxFuture;

/// Our name on the bus.
pub const NAME: &str = "io.k3s.Server1";

/// Our only object.
pub const PATH: &str = "/io/k3s/Server1";

/// How often properties are compared with what was said of them.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Id, name, role, addresses for peers, addresses for clients.
pub type MemberRow = (String, String, String, Vec<String>, Vec<String>);

/// All properties at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// How far the server is: `opening` … `ready`, `stopping`, `failed`.
    pub state: String,
    /// The same in a sentence.
    pub state_detail: String,
    /// `leader`, `follower`, `candidate`, `learner`; empty before it takes part.
    pub role: String,
    /// Its id, in hexadecimal.
    pub node_id: String,
    /// Its name.
    pub node_name: String,
    /// Its cluster's id.
    pub cluster_id: String,
    /// Whom it follows; empty: nobody.
    pub leader_id: String,
    /// The name of that one.
    pub leader_name: String,
    /// Raft's term.
    pub term: u64,
    /// Known to be on a majority.
    pub committed_index: u64,
    /// In the store.
    pub applied_index: u64,
    /// The store's revision.
    pub revision: i64,
    /// All members.
    pub members: Vec<MemberRow>,
    /// Seconds; half of the write barriers were faster.
    pub barrier_p50: f64,
    /// Seconds; 99 % of the write barriers were faster.
    pub barrier_p99: f64,
    /// Bytes handed to the card since midnight (UTC), or since the start if that was later.
    pub written_today: u64,
    /// Whether the clock follows a time server, or at least cannot be wrong by years.
    pub clock: String,
    /// The last error in the journal; empty: none since the start.
    pub last_error: String,
}

/// Who answers.
pub trait Server: Send + Sync + 'static {
    /// The properties now.
    fn reading(&self) -> Reading;
    /// Lets another voter lead: this one, by name or id, or the best one if it is empty. Returns who leads then.
    fn transfer_leadership<'a>(&'a self, to: &'a str) -> BoxFuture<'a, Result<String, String>>;
    /// Makes the state durable. Returns the log index that is.
    fn checkpoint(&self) -> BoxFuture<'_, Result<u64, String>>;
    /// Writes a backup beside the datastore. Returns the file.
    fn backup<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<String, String>>;
    /// Reads the configuration again. Returns what came of each key that differs.
    fn reload(&self) -> BoxFuture<'_, Result<Vec<String>, String>>;
}

struct Server1(Arc<dyn Server>);

#[interface(name = "io.k3s.Server1")]
impl Server1 {
    /// Lets another voter lead. An empty name: the one that is fit best.
    #[zbus(out_args("leader"))]
    async fn transfer_leadership(
        &self,
        to: String,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<String, Error> {
        permit(bus, &header, "io.k3s.Server1.transfer-leadership").await?;
        self.0.transfer_leadership(&to).await.map_err(Error::Failed)
    }

    /// Makes the state durable on the card.
    #[zbus(out_args("index"))]
    async fn checkpoint(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<u64, Error> {
        permit(bus, &header, "io.k3s.Server1.checkpoint").await?;
        self.0.checkpoint().await.map_err(Error::Failed)
    }

    /// Writes a backup into `backups` below the data directory. An empty name: one with the date.
    #[zbus(out_args("path"))]
    async fn backup(
        &self,
        name: String,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<String, Error> {
        permit(bus, &header, "io.k3s.Server1.backup").await?;
        self.0.backup(&name).await.map_err(Error::Failed)
    }

    /// Reads the configuration again; tells of each key that has changed whether that holds now or after a restart.
    #[zbus(out_args("outcome"))]
    async fn reload(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] bus: &Connection,
    ) -> Result<Vec<String>, Error> {
        permit(bus, &header, "io.k3s.Server1.reload").await?;
        self.0.reload().await.map_err(Error::Failed)
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.0.reading().state
    }

    #[zbus(property)]
    fn state_detail(&self) -> String {
        self.0.reading().state_detail
    }

    #[zbus(property)]
    fn role(&self) -> String {
        self.0.reading().role
    }

    #[zbus(property)]
    fn node_id(&self) -> String {
        self.0.reading().node_id
    }

    #[zbus(property)]
    fn node_name(&self) -> String {
        self.0.reading().node_name
    }

    #[zbus(property)]
    fn cluster_id(&self) -> String {
        self.0.reading().cluster_id
    }

    #[zbus(property)]
    fn leader_id(&self) -> String {
        self.0.reading().leader_id
    }

    #[zbus(property)]
    fn leader_name(&self) -> String {
        self.0.reading().leader_name
    }

    #[zbus(property)]
    fn term(&self) -> u64 {
        self.0.reading().term
    }

    #[zbus(property)]
    fn members(&self) -> Vec<MemberRow> {
        self.0.reading().members
    }

    #[zbus(property)]
    fn clock(&self) -> String {
        self.0.reading().clock
    }

    #[zbus(property)]
    fn last_error(&self) -> String {
        self.0.reading().last_error
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn committed_index(&self) -> u64 {
        self.0.reading().committed_index
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn applied_index(&self) -> u64 {
        self.0.reading().applied_index
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn revision(&self) -> i64 {
        self.0.reading().revision
    }

    #[zbus(property(emits_changed_signal = "false"), name = "BarrierP50")]
    fn barrier_p50(&self) -> f64 {
        self.0.reading().barrier_p50
    }

    #[zbus(property(emits_changed_signal = "false"), name = "BarrierP99")]
    fn barrier_p99(&self) -> f64 {
        self.0.reading().barrier_p99
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn written_today(&self) -> u64 {
        self.0.reading().written_today
    }
}

/// Answers on the bus under our name for as long as it is polled; ends when the bus is gone, or does not let us.
pub async fn serve(bus: &Connection, server: Arc<dyn Server>) -> zbus::Error {
    match served(bus, server).await {
        Err(error) => error,
        Ok(()) => zbus::Error::Failure("the bus is gone".to_owned()),
    }
}

async fn served(bus: &Connection, server: Arc<dyn Server>) -> zbus::Result<()> {
    // The object first: who finds the name finds it too.
    bus.object_server().at(PATH, Server1(Arc::clone(&server))).await?;
    bus.request_name(NAME).await?;
    let object = bus.object_server().interface::<_, Server1>(PATH).await?;
    let mut said = server.reading();
    while !bus.is_closed() {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = server.reading();
        say_changes(&object, &said, &now).await?;
        said = now;
    }
    Ok(())
}

async fn say_changes(
    object: &InterfaceRef<Server1>,
    before: &Reading,
    now: &Reading,
) -> zbus::Result<()> {
    let (server, emitter): (_, &SignalEmitter<'_>) = (object.get().await, object.signal_emitter());
    macro_rules! say {
        ($($field:ident => $signal:ident,)+) => {
            $(if before.$field != now.$field {
                server.$signal(emitter).await?;
            })+
        };
    }
    say! {
        state => state_changed,
        state_detail => state_detail_changed,
        role => role_changed,
        node_id => node_id_changed,
        node_name => node_name_changed,
        cluster_id => cluster_id_changed,
        leader_id => leader_id_changed,
        leader_name => leader_name_changed,
        term => term_changed,
        members => members_changed,
        clock => clock_changed,
        last_error => last_error_changed,
    }
    Ok(())
}

/// What somebody else's server says on the bus; for `k3s-server status`.
pub async fn property(bus: &Connection, name: &str) -> Option<String> {
    let proxy = zbus::Proxy::new(bus, NAME, PATH, NAME).await.ok()?;
    proxy.get_property::<String>(name).await.ok()
}

/// The introspection of our interface, as it is answered on the bus; for the man page and its test.
pub fn introspection() -> String {
    use zbus::object_server::Interface;
    struct Nobody;
    impl Server for Nobody {
        fn reading(&self) -> Reading {
            Reading::default()
        }
        fn transfer_leadership<'a>(
            &'a self,
            _to: &'a str,
        ) -> BoxFuture<'a, Result<String, String>> {
            Box::pin(async { Err(String::new()) })
        }
        fn checkpoint(&self) -> BoxFuture<'_, Result<u64, String>> {
            Box::pin(async { Err(String::new()) })
        }
        fn backup<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, Result<String, String>> {
            Box::pin(async { Err(String::new()) })
        }
        fn reload(&self) -> BoxFuture<'_, Result<Vec<String>, String>> {
            Box::pin(async { Err(String::new()) })
        }
    }
    let mut xml = String::new();
    Server1(Arc::new(Nobody)).introspect_to_writer(&mut xml, 0);
    xml
}
